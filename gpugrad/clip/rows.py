"""Arrays that are parts of one buffer, taken together: few long arrays for many short ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpugrad.backend import SPACES, Array, Backend
from gpugrad.backend.memory import ALIGNMENT
from gpugrad.core.graph import lent

__all__ = ["Rows", "rows_of"]

#: Arrays in host memory from which on it pays to join them.
FEW = 24


class Rows(NamedTuple):
    """Arrays that lie in one buffer.

    Attributes
    ----------
    buffer:
        All elements of the buffer, in a row.
    runs:
        First and last element, the last one not in it, of neighbours together. What alignment
        leaves free between neighbours is in a run: it is zero, and must stay so.
    gaps:
        The same of all that is free in the runs.
    """

    buffer: Array
    runs: NDArray[np.int64]
    gaps: NDArray[np.int64]

    def arrays(self) -> list[Array]:
        """The runs as arrays."""
        getitem = SPACES[type(self.buffer)].getitem
        return [getitem(self.buffer, slice(int(a), int(b))) for a, b in self.runs]

    def clean(self) -> None:
        """Make what is free zero again, after it has become NaN."""
        if len(self.gaps):
            m: Backend = SPACES[type(self.buffer)]
            index = _index(m, m.device(self.buffer), self.gaps.tobytes())
            m.bind(m.setitem)(self.buffer, index, 0.0)


@lru_cache(maxsize=16)
def _index(m: Backend, device: str, gaps: bytes) -> Array:
    """The numbers of all elements in the gaps, on a device; uploaded once."""
    first, end = np.frombuffer(gaps, np.int64).reshape(-1, 2).T
    counts = end - first
    before = np.cumsum(counts) - counts
    return m.asarray(np.repeat(first - before, counts) + np.arange(counts.sum()), device=device)


def rows_of(arrays: Sequence[Array]) -> tuple[list[Rows], Sequence[int]]:
    """The arrays that share a buffer with others, and the numbers of those that do not.

    In host memory, where an operation costs little, a few arrays are left alone.

    >>> import numpy as np
    >>> rows_of([np.zeros(3), np.zeros(2)])
    ([], range(0, 2))
    """
    if len(arrays) < FEW and (len(arrays) < 2 or SPACES[type(arrays[0])].on_host):
        return [], range(len(arrays))
    found: dict[int, list[Any]] = {}
    alone = []
    parts = lent.parts(arrays)
    if not any(parts):
        return [], range(len(arrays))
    for i, (x, part) in enumerate(zip(arrays, parts, strict=True)):
        if part is None:
            alone.append(i)
        else:
            _, buffer, start = part
            kept = found.setdefault(id(buffer), [buffer, [], [], []])
            kept[1].append(i)
            kept[2].append(start)
            kept[3].append(math.prod(x.shape))
    rows = []
    for buffer, numbers, starts, sizes in found.values():
        if len(numbers) == 1:
            alone += numbers
        else:
            rows.append(_joined(buffer, np.array(starts), np.array(sizes)))
    return rows, sorted(alone)


def _joined(buffer: Array, starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> Rows:
    order = np.argsort(starts, kind="stable")
    starts = starts[order]
    ends = starts + sizes[order]
    unit = max(1, ALIGNMENT // SPACES[type(buffer)].numpy_dtype(buffer).itemsize)
    # Between these two nothing can begin.
    beside = starts[1:] == -(-ends[:-1] // unit) * unit
    cut = np.flatnonzero(~beside)
    runs = np.stack((starts[np.append(0, cut + 1)], ends[np.append(cut, len(ends) - 1)]), axis=1)
    gaps = np.stack((ends[:-1], starts[1:]), axis=1)[beside & (ends[:-1] < starts[1:])]
    return Rows(buffer, runs, np.ascontiguousarray(gaps))
