"""The gradient of a weight, gᵀ·x, and its sum of squares while it is in the cache.

Where the weight is large, reading its gradient once more for the norm would cost as much as a part
of the product. The result is computed in blocks (`kernels/cpu/direct.py`), and one that lies in an
optimiser's gradient is squared and summed as soon as it is there.

How the blocks are divided among the threads changes no bit, neither of the sums nor of theirs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.memory import NOTED, squares
from gpugrad.backend.scratch import empty
from gpugrad.backend.tape import call, replayable
from gpugrad.kernels.cpu import products
from gpugrad.kernels.cpu.compile import in_a_row, numpy_storage, parallel, serial
from gpugrad.kernels.cpu.direct import LARGEST, direct
from gpugrad.kernels.cpu.elementwise import LABEL
from gpugrad.kernels.cpu.memory import address, pointer, size_of
from gpugrad.kernels.cpu.microkernel import ROWS, panel
from gpugrad.kernels.cpu.optimizer import TINY
from gpugrad.kernels.template import T, device

__all__ = ["KERNELS", "weight_gradient"]

Array = np.ndarray[Any, Any]

#: Elements of a result whose squares are worth adding up here.
LEAST = NOTED

#: Rows and columns of a block, about: it fits into the nearest cache, and all threads get as many.
STRIP, WIDTH = 4 * ROWS, 192


@serial
def _double(c, n):
    a = pointer(c, T(0))
    total = np.float64(0)
    for i in range(n):
        x = np.float64(a[i])
        total += x * x
    return total


@serial
def _sum_squares(c, step, rows, n):
    """Of rows of n elements, `step` apart: each in single precision, if that suffices."""
    a = pointer(c, T(0))
    total = np.float64(0)
    for i in range(rows):
        part, first = T(0), i * step
        for j in range(n):
            part += a[first + j] * a[first + j]
        total += np.float64(part)
    if TINY < total < np.inf:
        return total
    # Too small or too great for single precision, or not finite, which it is in double, too.
    total = np.float64(0)
    for i in range(rows):
        total += _double(c + i * step * size_of(T(0)), n)
    return total


@device
def units(m, n):
    """Blocks that a result of m rows and n columns is computed in."""
    return ((m + STRIP - 1) // STRIP) * ((n + WIDTH - 1) // WIDTH)


@serial
def compute_unit(unit, g, x, out, rows, m, n, sums):
    """A block of the result, and its sum of squares."""
    size, width = size_of(T(0)), panel()
    strips, blocks = (m + STRIP - 1) // STRIP, (n + WIDTH - 1) // WIDTH
    panels = (n + width - 1) // width
    # Those strips follow each other that take the same columns of x.
    strip, block = unit % strips, unit // strips
    i, j = m * strip // strips, panels * block // blocks * width
    count = m * (strip + 1) // strips - i
    columns = min(panels * (block + 1) // blocks * width, n) - j
    c = out + (i * n + j) * size
    direct(count, columns, rows, g + i * size, 1, m, x + j * size, n, width, c, n, False)
    sums[unit] = _sum_squares(c, n, count, columns)


@parallel
def _product(g, x, out, rows, m, n, sums):
    for unit in prange(sums.size):
        compute_unit(unit, g, x, out, rows, m, n, sums)


@replayable
def weight_gradient(m: Backend | None, g: Array, x: Array, weight_home: Array | None) -> Array:
    """gᵀ·x over all axes but the last, in its home if there is one.

    Σ of the squares of what lies in a home is noted in :data:`gpugrad.backend.memory.squares`, if
    it is finite.
    """
    rows, features, inputs = math.prod(g.shape[:-1]), g.shape[-1], x.shape[-1]
    g, x = g.reshape(rows, features), x.reshape(rows, inputs)
    out = empty((features, inputs), x.dtype) if weight_home is None else weight_home
    in_order = out.flags.c_contiguous and out.flags.aligned
    small = features * inputs < LEAST or not 0 < x.nbytes <= LARGEST
    if weight_home is None or small or not in_order:
        call(products.matmul, g.T, x, out)
        return out
    g, x = in_a_row(g), in_a_row(x)
    sums = np.empty(-(-features // STRIP) * -(-inputs // WIDTH))
    _product[numpy_storage(x.dtype)](
        address(g), address(x), address(out), rows, features, inputs, sums
    )
    call(_note_squares, id(weight_home), sums)
    return out


def _note_squares(home: int, sums: Array) -> None:
    total = float(np.add.reduce(sums))
    if math.isfinite(total):
        squares[home] = total


def _refuse(m: Backend, g: Any, x: Any, weight_home: Any) -> str | None:
    return products.refuse(m, g, x)  # for the product of matrices that it is


KERNELS = {"weight_gradient": Kernel(weight_gradient, LABEL, _refuse)}
