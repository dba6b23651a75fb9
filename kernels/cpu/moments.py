"""What the elements of parts of an array amount to, in one pass: sums, extremes, and counts.

Each part is cut into blocks of a fixed size, and what the blocks give is combined in order: results
are the same bit for bit from run to run and on any number of threads. Everything is added up in
double precision, as the variance of elements far from zero needs it.
"""

from __future__ import annotations

import math
from types import FunctionType
from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.kernels.cpu.compile import in_a_row, numpy_storage, parallel, serial
from gpugrad.kernels.template import I, T, from_bits, read, to_bits

LABEL = "numba cpu"

#: Elements of a block.
BLOCK = 8192

#: Blocks that one thread is done with before others are awake.
FEW = 8

#: Numbers of a part: count, sum, sum of squares, least, greatest, not finite, zero, outside.
NUMBERS = 8

Array = np.ndarray[Any, Any]


# The bits of numbers, as integers, are in the numbers' order once those of negative ones are turned
# around; and a compiler has vector instructions for the least and the greatest of integers, where
# NaN is nothing special.


@serial
def _count(a: Array, low: Any, high: Any, out: Array) -> None:
    total, squares = np.float64(0), np.float64(0)
    magnitude, infinity = I(~to_bits(T(-0.0))), to_bits(T(np.inf))
    most, least = infinity, I(to_bits(T(-np.inf)) ^ magnitude)
    lowest, greatest = most, least
    fine, zeros, outside = I(0), I(0), I(0)
    below, above = T(low), T(high)
    for i in range(a.size):
        x = read(a, i)
        bits = to_bits(x)
        size = I(bits & magnitude)
        finite = size < infinity
        key = I(bits ^ magnitude) if bits < 0 else bits
        down = key if finite else most
        up = key if finite else least
        lowest = down if down < lowest else lowest
        greatest = up if up > greatest else greatest
        kept = np.float64(x if finite else T(0))
        total += kept
        squares += kept * kept
        fine += I(finite)
        zeros += I(size == 0)
        outside += I((x <= below) | (x >= above))
    lowest = I(lowest ^ magnitude) if lowest < 0 else lowest
    greatest = I(greatest ^ magnitude) if greatest < 0 else greatest
    out[0], out[1], out[2] = a.size, total, squares
    out[3], out[4] = from_bits(lowest), from_bits(greatest)
    out[5], out[6], out[7] = a.size - fine, zeros, outside


def _blocks(a: Array, table: Array, low: Any, high: Any, out: Array) -> None:
    for block in prange(out.shape[0]):
        _count(a[table[block, 0] : table[block, 1]], low, high, out[block])  # type: ignore[operator]


_some = serial(FunctionType(_blocks.__code__, globals(), "_some"))
_many = parallel(_blocks)


def moments(
    m: Backend,
    x: Array,
    /,
    *,
    bounds: Array | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> Array:
    """The eight numbers of each part, [parts, 8]."""
    storage = numpy_storage(x.dtype)
    flat = in_a_row(x).reshape(-1)
    if bounds is None:
        if flat.size <= BLOCK:
            row = np.empty((1, NUMBERS))
            _count[storage](flat, low, high, row[0])
            return row
        bounds = np.array([[0, flat.size]])
    starts, ends = bounds[:, 0], bounds[:, 1]
    # A part of no elements has a block, too, so that each part has a row to begin with.
    counts = np.maximum(-(-(ends - starts) // BLOCK), 1)
    first = np.cumsum(counts) - counts
    at = np.repeat(starts - BLOCK * first, counts) + BLOCK * np.arange(counts.sum())
    table = np.stack((at, np.minimum(at + BLOCK, np.repeat(ends, counts))), axis=1)
    rows = np.empty((len(table), NUMBERS))
    run = _some if len(table) <= FEW else _many
    run[storage](flat, table, low, high, rows)
    if len(rows) == len(bounds):
        return rows
    out = np.add.reduceat(rows, first, axis=0)
    np.minimum.reduceat(rows[:, 3], first, out=out[:, 3])
    np.maximum.reduceat(rows[:, 4], first, out=out[:, 4])
    return out


def _refuse(m: Backend, x: Any, /, **options: Any) -> str | None:
    if not isinstance(x, np.ndarray):
        return f"a {type(x).__name__}; kernels take arrays"
    return None if numpy_storage(x.dtype) else f"no kernel for {x.dtype}"


KERNELS = {"moments": Kernel(moments, LABEL, _refuse)}
