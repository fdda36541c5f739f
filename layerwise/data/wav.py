"""Headers of WAV files that were never finished: written into a pipe, or of a file that was cut off.

A program that cannot go back to the header leaves a size there that means "to the end", or 0, which libsndfile takes for an
empty file. Of a file that was cut off libsndfile reads what is left, in silence. RIFF, RIFX, RF64 and W64 alike.
"""

import io
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import soundfile

from layerwise.screen import quiet

TO_THE_END = (2**31, 2**32, 2**63, 2**64)
"""Sizes that no program knows are given as one near these, by NEAR bytes at most: 0x7FFFF000, 0x80000000, 0xFFFFFFFF."""

NEAR = 2**16

_W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"


@dataclass(frozen=True, slots=True)
class DataChunk:
    """Where the sound is, as the header says."""

    declared: int
    """Bytes of the chunk."""
    there: int
    """Bytes of the file from the beginning of the sound on."""
    size_at: int
    """Place of the size in the file."""
    size_layout: str
    """Of `struct`."""
    extra: int
    """Bytes that the size counts besides the sound."""
    chunks_follow: bool
    """Whether other chunks stand behind it, up to the end of the file."""

    @property
    def goes_to_the_end(self) -> bool:
        """Whether the program that wrote it could not know how long it would be."""
        if self.declared == 0:
            return not self.chunks_follow
        return any(abs(self.declared - size) <= NEAR for size in TO_THE_END)

    @property
    def is_cut_off(self) -> bool:
        """Whether sound is missing at the end."""
        return self.declared > self.there and not self.goes_to_the_end

    @property
    def patch(self) -> tuple[int, bytes] | None:
        """Where libsndfile must find another size for the sound to be read: place and content; None where it need not."""
        if 0 < self.declared < 2**62 or not self.there or not self.goes_to_the_end:
            return None
        most = 2 ** (8 * struct.calcsize(self.size_layout)) - 1
        return self.size_at, struct.pack(self.size_layout, min(self.there + self.extra, most))


def data_chunk(path: Path) -> DataChunk | None:
    """What the header of a WAV file says of its sound; None of other files. Raises OSError."""
    with open(path, "rb") as file:
        kind = file.read(16)
        if kind == _W64:
            chunks = _Chunks(file, "<4s12xQ", first=40, extra=24)
        elif kind[:4] in (b"RIFF", b"RIFX", b"RF64"):
            chunks = _Chunks(file, f"{'>' if kind[:4] == b'RIFX' else '<'}4sI", first=12, extra=0)
        else:
            return None
        longer, longer_at = None, 0
        for name, size, begins in chunks.walk(chunks.first):
            if name == b"ds64":  # of RF64: the sizes for which 32 bits are too few
                longer_at = begins + 8
                longer = struct.unpack("<8xQ", file.read(16).ljust(16, b"\0"))[0]
            if name == b"data":
                there, follow = chunks.length - begins, size == 0 and chunks.are_all_behind(begins)
                if longer is not None and size == 0xFFFFFFFF:
                    return DataChunk(longer, there, longer_at, "<Q", 0, longer == 0 and chunks.are_all_behind(begins))
                size_at = begins - struct.calcsize(chunks.size_layout)
                return DataChunk(size, there, size_at, chunks.size_layout, chunks.extra, follow)
        return None


class _Chunks:
    """The chunks of a file, one behind another."""

    def __init__(self, file: BinaryIO, header: str, first: int, extra: int) -> None:
        """header: of each chunk: its name, and its size at the end. first: place of the first one. extra: bytes of the header
        that a size counts."""
        self._file, self._header, self.first, self.extra = file, header, first, extra
        self.size_layout = header[0] + header[-1]
        self.length = os.fstat(file.fileno()).st_size

    def walk(self, place: int) -> Iterator[tuple[bytes, int, int]]:
        """Name, bytes inside, and the place where these begin, of the chunks from a place on."""
        while place < self.length:
            self._file.seek(place)
            content = self._file.read(struct.calcsize(self._header))
            if len(content) < struct.calcsize(self._header):
                return
            name, size = struct.unpack(self._header, content)
            inside, begins = max(size - self.extra, 0), self._file.tell()
            yield name, inside, begins
            place = begins + inside + -inside % (8 if self.extra else 2)

    def are_all_behind(self, place: int) -> bool:
        """Whether nothing but chunks stands from a place on."""
        ends = [
            (name.isascii() and name.decode().isprintable(), begins + size) for name, size, begins in self.walk(place)
        ]
        return (
            bool(ends)
            and all(named for named, _ in ends)
            and self.length <= ends[-1][1] + 1
            and ends[-1][1] <= self.length
        )


class PatchedFile(io.FileIO):
    """A file in which some bytes are read as others."""

    def __init__(self, path: Path, place: int, content: bytes) -> None:
        super().__init__(path)
        self._place, self._content = place, content

    def readinto(self, buffer: Any) -> int | None:
        """Fills the buffer, as files do."""
        start, count = self.tell(), super().readinto(buffer)
        view = memoryview(buffer).cast("B")
        for place, byte in enumerate(self._content, self._place):
            if start <= place < start + (count or 0):
                view[place - start] = byte
        return count


@contextmanager
def open_sound(path: Path, patch: tuple[int, bytes] | None) -> Iterator[soundfile.SoundFile]:
    """A file of sound, with another size in its header where there is a patch. Raises as soundfile does."""
    with ExitStack() as opened:
        if path.suffix.lower() == ".mp3":
            opened.enter_context(quiet())
        file = path if patch is None else opened.enter_context(PatchedFile(path, *patch))
        yield opened.enter_context(soundfile.SoundFile(file))
