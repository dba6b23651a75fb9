"""Data sets, samplers, loaders, transforms and text.

`Dataset`, the samplers and `DataLoader` follow `torch.utils.data`; `load` reads labelled data sets,
`gpugrad.data.text` reads text, and `gpugrad.data.transforms` changes images where they are.
"""

from __future__ import annotations

from gpugrad.data.collate import default_collate, default_convert
from gpugrad.data.datasets import NAMES, LabelledDataset, load
from gpugrad.data.errors import (
    DataCorruptError,
    DataError,
    DataLoaderError,
    DataNotFoundError,
    NonFiniteDataError,
)
from gpugrad.data.idx import read_idx
from gpugrad.data.loader import DataLoader
from gpugrad.data.resident import DeviceLoader
from gpugrad.data.samplers import (
    BatchSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from gpugrad.data.sources import ConcatDataset, Dataset, Subset, TensorDataset, random_split
from gpugrad.data.text import SequenceDataset

__all__ = [
    "BatchSampler",
    "ConcatDataset",
    "DataCorruptError",
    "DataError",
    "DataLoader",
    "DataLoaderError",
    "DataNotFoundError",
    "Dataset",
    "DeviceLoader",
    "LabelledDataset",
    "NAMES",
    "NonFiniteDataError",
    "RandomSampler",
    "Sampler",
    "SequenceDataset",
    "SequentialSampler",
    "Subset",
    "SubsetRandomSampler",
    "TensorDataset",
    "WeightedRandomSampler",
    "default_collate",
    "default_convert",
    "load",
    "random_split",
    "read_idx",
]
