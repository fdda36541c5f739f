"""Activation caches: a stage's outputs for the whole data set, in one HDF5 file."""

from layerwise.cache.layout import SPLITS, Layout
from layerwise.cache.reader import ActivationCache
from layerwise.cache.writer import CacheWriter

__all__ = ["SPLITS", "ActivationCache", "CacheWriter", "Layout"]
