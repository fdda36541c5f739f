"""Reads and writes at a position of a file, never short. They move no file pointer, so threads and forks may share it."""

import os


def read_all(descriptor: int, buffers: list[memoryview], position: int) -> bool:
    """Fills the byte buffers one after another from the position on. False where the file ends before."""
    count = os.preadv(descriptor, buffers, position)
    missing = sum(map(len, buffers)) - count
    while missing:
        position += count
        while count >= len(buffers[0]):
            count -= len(buffers[0])
            buffers = buffers[1:]
        buffers = [buffers[0][count:], *buffers[1:]]
        count = os.preadv(descriptor, buffers, position)
        if count == 0:
            return False
        missing -= count
    return True


def write_all(descriptor: int, content: memoryview | bytes, position: int) -> None:
    """Raises OSError where the disk does not take it."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written
