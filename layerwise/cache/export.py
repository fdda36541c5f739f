"""Hands the features of a stage over to other programs, in constant memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from layerwise.cache.features import FeatureFile, MeanFile
from layerwise.cache.reader import ActivationCache

READ_BYTES = 32 * 2**20
"""Read at once."""


def export(cache: ActivationCache, path: Path, mean: bool = False) -> None:
    """View 0 of every sample as .npy or .h5, by the name of `path` (see features.py); bfloat16 and int8 become float32.

    mean: one row per sample instead of its frames. Raises CacheError where the file exists or the name has another ending.
    """
    dtype = np.dtype(np.float16 if cache.layout.dtype == "float16" else np.float32)
    kind = MeanFile if mean else FeatureFile
    with kind(path, cache.frame_shape, dtype, cache.layout.stage) as file:
        for sample, (name, length) in enumerate(zip(cache.ids, cache.lengths.tolist(), strict=True)):
            for piece in _pieces(cache, sample, length):
                file.append(piece)
            file.keep(name)
        file.finish(cache.labels)


def _pieces(cache: ActivationCache, sample: int, length: int) -> Iterator[np.ndarray]:
    """float32 [n, *frame shape], sample piece by piece; float16 as it is."""
    step = max(READ_BYTES // cache.layout.row_bytes, 1)
    for start in range(0, length, step):
        frames = cache.read(sample, start, min(start + step, length))
        yield (frames if cache.layout.dtype == "float16" else frames.float()).numpy()
