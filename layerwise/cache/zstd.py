"""A chunk of activations as one zstd frame and back, as HDF5's own shuffle and its registered filter 32015 would do it.

Shuffled: the first bytes of all numbers, then the second ones, and so on; those that hold exponents are much alike.
"""

import numpy as np

from layerwise.errors import CacheError

try:
    import zstandard
except (ImportError, OSError, RuntimeError):
    zstandard = None  # type: ignore[assignment]  # a module has no type that says so

FILTER = 32015
"""zstd's number in the HDF Group's registry of filters."""

LEVEL = 1
"""Higher ones gain nothing on activations and cost up to seven times as much, see benchmarks/RESULTS.md."""


class NotAFrame(Exception):
    """These bytes do not hold what they should, or more of it."""


def require_zstandard() -> None:
    """Raises CacheError where the package is not installed."""
    if zstandard is None:
        raise CacheError("Compressed caches need zstandard; install it: pip install 'layerwise[compression]'.")


def longest_frame(size: int) -> int:
    """Most bytes that `size` bytes can take when they are compressed: a little more than they are."""
    return size + size // 256 + 64


def encode(chunks: np.ndarray, itemsize: int) -> list[bytes]:
    """The frames of chunks uint8 [n, bytes of a chunk]. The same chunk gives the same frame."""
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    shuffled = np.ascontiguousarray(chunks.reshape(len(chunks), -1, itemsize).swapaxes(1, 2))
    return [compressor.compress(memoryview(chunk).cast("B")) for chunk in shuffled]


class Decoder:
    """Decodes one frame after another; for one thread."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor()

    def decode(self, frame: np.ndarray, size: int, itemsize: int) -> np.ndarray:
        """The chunk of `size` bytes, still shuffled: uint8 [itemsize, numbers]. Takes no more memory than that.

        Raises NotAFrame.
        """
        try:
            if zstandard.frame_content_size(memoryview(frame)) != size:  # what decompress would allocate
                raise NotAFrame
            content = self._decompressor.decompress(memoryview(frame))
        except zstandard.ZstdError:
            raise NotAFrame from None
        return np.frombuffer(content, dtype=np.uint8).reshape(itemsize, -1)
