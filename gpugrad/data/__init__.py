"""Data sets and minibatches, as NumPy arrays."""

from __future__ import annotations

from gpugrad.data.batching import batches
from gpugrad.data.datasets import NAMES, Dataset, load
from gpugrad.data.errors import DataCorruptError, DataError, DataNotFoundError, NonFiniteDataError
from gpugrad.data.idx import read_idx

__all__ = [
    "NAMES",
    "DataCorruptError",
    "DataError",
    "DataNotFoundError",
    "Dataset",
    "NonFiniteDataError",
    "batches",
    "load",
    "read_idx",
]
