"""Every random choice as a pure function of the seed and of what it is for, so that a resume repeats it."""

import zlib

import numpy as np


def stream(seed: int, *key: int | str) -> np.random.Generator:
    """An independent generator for this seed and key, the same on every machine."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    # numpy pads the entropy with zeros, so without the length (1,) and (1, 0) would be the same stream.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, len(words), *words])))
