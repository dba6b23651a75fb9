"""Long rows of measurements made short enough for a picture, with their extremes kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Columns", "extremes"]

Array = NDArray[Any]


def extremes(values: Array, most: int) -> Array:
    """Which of `values` to draw: of each of `most` stretches the first, last, least and greatest.

    A line through them looks like one through all values, spikes of a single step included.
    Returns their indices in ascending order; all of them when there are few. What is not finite
    counts as neither least nor greatest.

    >>> extremes(np.array([0, 0, 9, 0, 0, 0, -5, 0.0]), 1).tolist()
    [0, 2, 6, 7]
    """
    n = len(values)
    if n <= 4 * most:
        return np.arange(n)
    edges = np.linspace(0, n, most + 1).astype(int)
    known = np.isfinite(values)
    low, high = np.where(known, values, np.inf), np.where(known, values, -np.inf)
    kept = {0, n - 1}
    for a, b in zip(edges[:-1].tolist(), edges[1:].tolist()):
        kept |= {a, b - 1, a + int(low[a:b].argmin()), a + int(high[a:b].argmax())}
    return np.array(sorted(kept))


@dataclass(frozen=True)
class Columns:
    """The steps of a record in at most `most` columns of equal width.

    Attributes
    ----------
    first, last:
        Steps where the first column begins and the last one ends, both counted in.
    edges:
        Steps between the columns, [columns + 1].
    """

    first: int
    last: int
    edges: Array
    _starts: Array  # row where each filled column begins
    _source: Array  # for each column the filled one that it shows: its own, or the last before it

    @classmethod
    def of(cls, steps: Array, most: int) -> Columns:
        """Columns for ascending, not empty `steps`."""
        first, last = int(steps[0]), int(steps[-1])
        count = min(most, last - first + 1)
        edges = np.linspace(first, last + 1, count + 1)
        column = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, count - 1)
        filled, starts = np.unique(column, return_index=True)
        source = np.searchsorted(filled, np.arange(count), side="right") - 1
        return cls(first, last, edges, starts, source)

    def __len__(self) -> int:
        return len(self._source)

    def greatest(self, values: Array) -> Array:
        """The greatest value of each column; NaN where there is none."""
        return self._of(np.fmax, values)

    def least(self, values: Array) -> Array:
        """The least value of each column; NaN where there is none."""
        return self._of(np.fmin, values)

    def mean(self, values: Array) -> Array:
        """The mean of the finite values of each column; NaN where there is none."""
        known = np.isfinite(values)
        count = self._of(np.add, known.astype(np.float64))
        with np.errstate(invalid="ignore", divide="ignore"):
            total = self._of(np.add, np.where(known, values, 0).astype(np.float64))
            return np.asarray(total / np.where(count > 0, count, np.nan))

    def any(self, flags: Array) -> Array:
        """Whether a column has a true flag."""
        return self._of(np.logical_or, flags)

    def _of(self, combine: np.ufunc, values: Array) -> Array:
        with np.errstate(invalid="ignore"):
            found = combine.reduceat(values, self._starts, axis=0)
        return np.asarray(found[self._source])
