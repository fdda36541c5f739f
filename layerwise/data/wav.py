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
    ends: bool
    """Whether the size of the whole file that the header declares is that of the file."""

    @property
    def goes_to_the_end(self) -> bool:
        """Whether the program that wrote it could not know how long it would be."""
        empty = self.declared == 0 and not self.ends
        return empty or any(abs(self.declared - size) <= NEAR for size in TO_THE_END)

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
        length = os.fstat(file.fileno()).st_size
        kind = file.read(16)
        if kind == _W64:
            (whole,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            return _find(file, "<4s12xQ", first=40, extra=24, whole=whole, length=length)
        if kind[:4] not in (b"RIFF", b"RIFX", b"RF64"):
            return None
        order = ">" if kind[:4] == b"RIFX" else "<"
        (whole,) = struct.unpack(f"{order}I", kind[4:8].ljust(4, b"\0"))
        return _find(file, f"{order}4sI", first=12, extra=0, whole=whole + 8, length=length)


def _find(file: BinaryIO, header: str, first: int, extra: int, whole: int, length: int) -> DataChunk | None:
    """header: of each chunk: its name, and its size at the end; first: place of the first one; extra: bytes of its header that
    a size counts; whole: that the file should have."""
    size_layout, place, longer, longer_at = header[0] + header[-1], first, None, 0
    while True:
        file.seek(place)
        content = file.read(struct.calcsize(header))
        if len(content) < struct.calcsize(header):
            return None
        name, size = struct.unpack(header, content)
        begins = file.tell()
        if name == b"ds64":  # of RF64: the sizes for which 32 bits are too few
            long_sizes = file.read(16).ljust(16, b"\0")
            whole, longer = struct.unpack("<Q", long_sizes[:8])[0] + 8, struct.unpack("<Q", long_sizes[8:])[0]
            longer_at = begins + 8
        if name == b"data":
            ends = abs(whole - length) <= 1
            if longer is not None and size == 0xFFFFFFFF:
                return DataChunk(longer, length - begins, longer_at, "<Q", 0, ends)
            at = begins - struct.calcsize(size_layout)
            return DataChunk(max(size - extra, 0), length - begins, at, size_layout, extra, ends)
        inside = max(size - extra, 0)
        place = begins + inside + -inside % (8 if extra else 2)
        if place >= length:
            return None


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
        if path.suffix.lower() == ".mp3":  # its decoder comments on every odd tag
            opened.enter_context(quiet())
        file = path if patch is None else opened.enter_context(PatchedFile(path, *patch))
        yield opened.enter_context(soundfile.SoundFile(file))
