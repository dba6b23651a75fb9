"""Data sets by index: what samplers choose from and loaders read."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Generic, TypeVar

import numpy as np

from gpugrad.backend import SPACES, Array, scratch
from gpugrad.core.conversion import asarray
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.core.tree import flatten
from gpugrad.data.collate import default_collate
from gpugrad.data.errors import DataError
from gpugrad.data.order import permutation
from gpugrad.errors import OutOfRangeError
from gpugrad.nn.random import Generator, draws_from

__all__ = ["ConcatDataset", "Dataset", "Subset", "TensorDataset", "random_split"]

T_co = TypeVar("T_co", covariant=True)


class Dataset(Generic[T_co]):
    """Examples by index: a subclass has `__getitem__`, and `__len__`.

    A data set that can read many examples at once also has `get_batch(indices)`, which returns the
    batch that collating those examples would give. A loader then asks for whole batches.

    >>> class Squares(Dataset):
    ...     def __len__(self):
    ...         return 4
    ...     def __getitem__(self, index):
    ...         return index, index * index
    >>> len(Squares() + Squares())
    8
    """

    def __getitem__(self, index: int) -> T_co:
        raise NotImplementedError(f"{type(self).__name__} needs a __getitem__")

    def __add__(self, other: Any) -> ConcatDataset:
        return ConcatDataset([self, other])


class TensorDataset(Dataset[tuple[Tensor, ...]]):
    """Tensors, or arrays, with one example per row of each; an example is a tuple of their rows.

    Shares their memory. A batch is one indexing operation for each of them, where they are.

    Raises DataError without tensors, and for tensors that differ in length.

    >>> data = TensorDataset(np.arange(6.0).reshape(3, 2), [10, 20, 30])
    >>> data[1]
    (tensor([2., 3.]), tensor(20))
    >>> data.get_batch([2, 0])[1]
    tensor([30, 10])
    """

    def __init__(self, *tensors: Any) -> None:
        if not tensors:
            raise DataError("TensorDataset: needs at least one tensor")
        self.tensors = tuple(asarray(x).detach() for x in tensors)
        if any(x.ndim == 0 for x in self.tensors):
            raise DataError("TensorDataset: a tensor of one number has no rows")
        lengths = [x.shape[0] for x in self.tensors]
        if len(set(lengths)) > 1:
            raise DataError(
                f"TensorDataset: tensors must have one row per example, and have {lengths} rows"
            )

    def __len__(self) -> int:
        return int(self.tensors[0].shape[0])

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        return tuple(x[index] for x in self.tensors)

    def get_batch(self, indices: Any) -> tuple[Tensor, ...]:
        """The batch of these examples."""
        return tuple(tensor_of(take_rows(x.data, indices)) for x in self.tensors)


class Subset(Dataset[Any]):
    """The examples of `dataset` at `indices`, in this order."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices
        self._places = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self._places[checked(index, len(self))])]

    def get_batch(self, indices: Any) -> Any:
        """The batch of these examples."""
        return get_batch(self.dataset, self._places[checked(indices, len(self))])


class ConcatDataset(Dataset[Any]):
    """The examples of each data set after those of the one before.

    Raises DataError without data sets.
    """

    def __init__(self, datasets: Iterable[Any]) -> None:
        self.datasets = list(datasets)
        if not self.datasets:
            raise DataError("ConcatDataset: needs at least one data set")
        self.cumulative_sizes = list(accumulate(len(d) for d in self.datasets))

    def __len__(self) -> int:
        return self.cumulative_sizes[-1]

    def __getitem__(self, index: int) -> Any:
        i = int(checked(index, len(self)))
        which = bisect_right(self.cumulative_sizes, i)
        return self.datasets[which][i - self._start(which)]

    def _start(self, which: int) -> int:
        return self.cumulative_sizes[which - 1] if which else 0

    def get_batch(self, indices: Any) -> Any:
        """The batch of these examples."""
        chosen = checked(indices, len(self))
        member = np.searchsorted(self.cumulative_sizes, chosen, side="right")
        there = [int(which) for which in np.unique(member)]
        if len(there) > 1 and not all(hasattr(self.datasets[i], "get_batch") for i in there):
            return default_collate([self[int(i)] for i in chosen])
        parts = [get_batch(self.datasets[i], chosen[member == i] - self._start(i)) for i in there]
        if len(parts) == 1:
            return parts[0]
        # Rows come grouped by data set; this is where each of them belongs.
        back = np.argsort(np.argsort(member, kind="stable"), kind="stable")
        groups = list(zip(*(flatten(part)[0] for part in parts)))
        if not all(isinstance(x, Tensor) for group in groups for x in group):
            return default_collate([self[int(i)] for i in chosen])
        return flatten(parts[0])[1]([_joined(group, back) for group in groups])


def get_batch(dataset: Any, indices: Any) -> Any:
    """The batch of these examples of any data set."""
    if hasattr(dataset, "get_batch"):
        return dataset.get_batch(indices)
    return default_collate([dataset[int(i)] for i in indices])


def _joined(group: Sequence[Tensor], back: Any) -> Tensor:
    m = SPACES[type(group[0].data)]
    return tensor_of(take_rows(m.concat([x.data for x in group], axis=0), back))


def random_split(
    dataset: Any, lengths: Sequence[int | float], generator: Generator | None = None
) -> list[Subset]:
    """Split a data set at random into parts of these lengths, which share no example.

    Parameters
    ----------
    lengths:
        Numbers of examples that add up to all of them; or fractions that add up to 1, where what
        rounding down leaves over goes to the first parts, one example each.
    generator:
        Where the order is drawn from; the default generator when None.

    Raises
    ------
    DataError
        The lengths do not add up.

    >>> parts = random_split(range(10), [0.7, 0.3], Generator(0))
    >>> [len(part) for part in parts], sorted(i for part in parts for i in part.indices)
    ([7, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    n = len(dataset)
    if not all(length >= 0 for length in lengths):
        raise DataError(f"random_split: lengths are at least 0, got {list(lengths)}")
    sizes = [int(length) for length in lengths]
    if math.isclose(sum(lengths), 1):
        sizes = [math.floor(n * fraction) for fraction in lengths]
        for i in range(n - sum(sizes)):
            sizes[i % len(sizes)] += 1
    elif sum(sizes) != n or sizes != list(lengths):
        raise DataError(
            f"random_split: lengths {list(lengths)} must add up to the {n} examples, or to 1"
        )
    order = permutation(n, *draws_from(generator).stream()).tolist()
    ends = list(accumulate(sizes))
    return [Subset(dataset, order[end - size : end]) for end, size in zip(ends, sizes)]


# -- rows ------------------------------------------------------------------------------------------


def checked(indices: Any, n: int) -> Any:
    """`indices` as an array of integers from 0 to n - 1; negative ones count from the end."""
    found = np.asarray(indices, dtype=np.int64)
    if found.size and not (-n <= found.min() and found.max() < n):
        first = found[(found < -n) | (found >= n)][0]
        raise OutOfRangeError(f"there is no example {first}: the data set has {n}")
    return np.where(found < 0, found + n, found)


def take_rows(x: Array, indices: Any) -> Array:
    """The rows of `x` at `indices`, which are on the host, in an array beside `x`."""
    chosen = checked(indices, x.shape[0])
    if not isinstance(x, np.ndarray):
        m = SPACES[type(x)]
        return m.take(x, m.asarray(chosen, device=m.device(x)), axis=0)
    # The indices were checked: "clip" spares a second look, and a copy with it.
    out = scratch.empty((*chosen.shape, *x.shape[1:]), x.dtype)
    return np.take(x, chosen, axis=0, out=out, mode="clip")
