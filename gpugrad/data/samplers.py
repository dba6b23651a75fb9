"""Samplers: which examples come, and in which order.

A sampler is iterated over once per epoch and gives indices. Those that draw have a state: with
``state_dict`` of a sampler loaded, its next iteration repeats the latest one, and those after it
go on as they would have.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpugrad.data.errors import DataError
from gpugrad.data.order import permutation, uniform
from gpugrad.errors import ParameterError
from gpugrad.nn.random import Generator, draws_from

__all__ = [
    "BatchSampler",
    "RandomSampler",
    "Sampler",
    "SequentialSampler",
    "SubsetRandomSampler",
    "WeightedRandomSampler",
]

T_co = TypeVar("T_co", covariant=True)


class Sampler(Generic[T_co]):
    """Indices of examples: a subclass has `__iter__`, and `__len__`.

    One that draws its order should have `state_dict` and `load_state_dict`, as the module says;
    any other must give the same indices at every iteration for a loader to resume.
    """

    def __iter__(self) -> Iterator[T_co]:
        raise NotImplementedError(f"{type(self).__name__} needs an __iter__")


class SequentialSampler(Sampler[int]):
    """Every index of `data_source` in order."""

    def __init__(self, data_source: Sized) -> None:
        self.data_source = data_source

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.data_source)))

    def __len__(self) -> int:
        return len(self.data_source)


class _Drawn(Sampler[int]):
    """A sampler whose every iteration is one draw of a generator: two integers name it."""

    def __init__(self, generator: Generator | None) -> None:
        if generator is not None:
            draws_from(generator)  # complains
        self.generator = generator
        self._latest: tuple[int, int] | None = None
        self._repeat = False

    def __iter__(self) -> Iterator[int]:
        if not self._repeat or self._latest is None:
            self._latest = draws_from(self.generator).stream()
        self._repeat = False
        order: list[int] = self._order(*self._latest).tolist()
        return iter(order)

    def _order(self, seed: int, offset: int) -> NDArray[np.int64]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The latest draw, and the state of the sampler's own generator (None for the default)."""
        return {
            "draw": self._latest,
            "generator": None if self.generator is None else self.generator.state,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave: the next iteration repeats the latest one."""
        draw, state = state_dict["draw"], state_dict["generator"]
        if (state is None) != (self.generator is None):
            raise DataError(
                f"{type(self).__name__}: the state is of a sampler "
                f"{'without' if state is None else 'with'} a generator of its own"
            )
        if self.generator is not None:
            self.generator.state = tuple(state)
        self._latest = None if draw is None else (int(draw[0]), int(draw[1]))
        self._repeat = draw is not None


class RandomSampler(_Drawn):
    """The indices of `data_source` in a random order, a new one at every iteration.

    Parameters
    ----------
    replacement:
        Draw each index anew, so that some come several times and some never.
    num_samples:
        How many indices come, by default as many as there are examples. Beyond that, without
        replacement, one order follows another.
    generator:
        Where the order is drawn from; the default generator when None.

    >>> list(RandomSampler(range(5), generator=Generator(0)))
    [0, 2, 1, 4, 3]
    """

    def __init__(
        self,
        data_source: Sized,
        replacement: bool = False,
        num_samples: int | None = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(generator)
        self.data_source = data_source
        self.replacement = bool(replacement)
        self._num_samples = None if num_samples is None else check_count("num_samples", num_samples)

    @property
    def num_samples(self) -> int:
        """How many indices one iteration gives."""
        return len(self.data_source) if self._num_samples is None else self._num_samples

    def _order(self, seed: int, offset: int) -> NDArray[np.int64]:
        n, wanted = len(self.data_source), self.num_samples
        if not n and wanted:
            raise DataError("RandomSampler: the data set is empty")
        if self.replacement:
            return (uniform(wanted, seed, offset) * n).astype(np.int64)
        if wanted <= n:
            return permutation(n, seed, offset)[:wanted]
        keys = uniform(n * math.ceil(wanted / n), seed, offset).reshape(-1, n)
        return np.argsort(keys, axis=1, kind="stable").reshape(-1)[:wanted]

    def __len__(self) -> int:
        return self.num_samples


class SubsetRandomSampler(_Drawn):
    """These indices in a random order."""

    def __init__(self, indices: Sequence[int], generator: Generator | None = None) -> None:
        super().__init__(generator)
        self.indices = indices

    def _order(self, seed: int, offset: int) -> NDArray[np.int64]:
        indices = np.asarray(self.indices, dtype=np.int64)
        return indices[permutation(len(indices), seed, offset)]

    def __len__(self) -> int:
        return len(self.indices)


class WeightedRandomSampler(_Drawn):
    """Indices 0 ... len(weights) - 1, drawn with chances in proportion to `weights`.

    Without replacement the first drawn is taken out before the next one is drawn, and so on, by the
    keys of Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006).

    Raises ParameterError for weights that are negative, infinite or NaN, all zero, or fewer above
    zero than are to be drawn without replacement.

    >>> list(WeightedRandomSampler([0.0, 1.0], 3, generator=Generator(0)))
    [1, 1, 1]
    """

    def __init__(
        self,
        weights: Any,
        num_samples: int,
        replacement: bool = True,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(generator)
        self.weights = np.asarray(weights, dtype=np.float64)
        self.num_samples = check_count("num_samples", num_samples)
        self.replacement = bool(replacement)
        if self.weights.ndim != 1:
            raise ParameterError(f"weights: one number per example, got {self.weights.shape}")
        if not (np.isfinite(self.weights).all() and (self.weights >= 0).all()):
            raise ParameterError("weights: finite numbers from 0 on are needed")
        able = int(np.count_nonzero(self.weights))
        if able < (1 if self.replacement else self.num_samples):
            raise ParameterError(
                f"weights: {able} are above 0, too few to draw {self.num_samples} examples "
                f"with{'' if self.replacement else 'out'} replacement"
            )

    def _order(self, seed: int, offset: int) -> NDArray[np.int64]:
        if self.replacement:
            ends = np.cumsum(self.weights)
            drawn = uniform(self.num_samples, seed, offset) * ends[-1]
            # Rounding may bring a draw to the very end, where the last weights may be zeros.
            last = np.flatnonzero(self.weights)[-1]
            found: NDArray[np.int64] = np.searchsorted(ends, drawn, side="right").clip(max=last)
            return found
        with np.errstate(divide="ignore", invalid="ignore"):
            keys = -np.log1p(-uniform(len(self.weights), seed, offset)) / self.weights
        keys[self.weights == 0] = np.inf
        return np.argsort(keys, kind="stable")[: self.num_samples]

    def __len__(self) -> int:
        return self.num_samples


class BatchSampler(Sampler[list[Any]]):
    """Lists of `batch_size` indices of `sampler`, the last one shorter or left out.

    >>> list(BatchSampler(SequentialSampler(range(5)), 2, drop_last=False))
    [[0, 1], [2, 3], [4]]
    """

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool) -> None:
        self.sampler = sampler
        self.batch_size = check_count("batch_size", batch_size)
        self.drop_last = bool(drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        # Not a generator: the order is drawn now, and not at the first batch.
        return self._batches(iter(self.sampler))

    def _batches(self, indices: Iterator[int]) -> Iterator[list[int]]:
        while batch := list(islice(indices, self.batch_size)):
            if len(batch) < self.batch_size and self.drop_last:
                return
            yield batch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def state_dict(self) -> dict[str, Any]:
        """The state of the sampler of examples; {} when it has none."""
        return state_of(self.sampler)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        load_state(self.sampler, state_dict)


def state_of(sampler: Any) -> dict[str, Any]:
    """The state of any sampler; {} for one that has none."""
    return dict(sampler.state_dict()) if hasattr(sampler, "state_dict") else {}


def load_state(sampler: Any, state: Mapping[str, Any]) -> None:
    """Give `state` to any sampler; DataError when it has a state and `sampler` has none."""
    if hasattr(sampler, "load_state_dict"):
        if not state and state_of(sampler):
            raise DataError(
                f"{type(sampler).__name__}: the state is of a sampler that draws nothing; was "
                "shuffle= another when it was saved?"
            )
        sampler.load_state_dict(state)
    elif state:
        raise DataError(
            f"{type(sampler).__name__} has no state, and the loader that was saved had one; was "
            "shuffle= another when it was saved?"
        )


def check_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ParameterError(f"{name} is an integer, got {value!r}")
    count = operator.index(value)
    if count < 1:
        raise ParameterError(f"{name} is at least 1, got {count}")
    return count
