"""The gradient of a weight for a batch of few rows: gᵀ·x, each element of it written once.

OpenBLAS reads and writes a result anew for every stretch of rows, and where there are few of them
that is most of the work. Here the sums stay in registers over all rows (`microkernel.py`), and both
operands are packed once, for all threads. On the way out, while it is in the cache, a result that
is an optimiser's gradient is also squared and summed, so that the norm need not read it again.

Sums are taken in the order of the rows, and those of squares strip by strip: neither depends on the
number of threads.
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
from gpugrad.kernels.cpu import products
from gpugrad.kernels.cpu.compile import in_a_row, numpy_storage, parallel, serial
from gpugrad.kernels.cpu.elementwise import LABEL
from gpugrad.kernels.cpu.memory import address, pointer, size_of
from gpugrad.kernels.cpu.microkernel import ROWS, VECTOR, packed_shape, panel, product
from gpugrad.kernels.cpu.optimizer import BLOCK, TINY
from gpugrad.kernels.template import T

__all__ = ["KERNELS", "weight_gradient"]

Array = np.ndarray[Any, Any]

#: More rows than this are OpenBLAS's: with longer vectors ours is level with it for longer.
MOST = 256 if VECTOR == 64 else 128

#: Elements of the result that packing is worth.
LEAST = NOTED

_NO_SUMS = np.empty(0)


@serial
def _pack(source, target, rows, n, width, k):
    """Copy `width` columns of n, those of panel k, or as many of them as there are."""
    a, b = pointer(source, T(0)), pointer(target, T(0))
    first, there = k * width, min(width, n - k * width)
    for i in range(rows):
        start, to = i * n + first, (k * rows + i) * width
        for j in range(there):
            b[to + j] = a[start + j]


@serial
def _single(c, n):
    a = pointer(c, T(0))
    total = T(0)
    for i in range(n):
        total += a[i] * a[i]
    return np.float64(total)


@serial
def _double(c, n):
    a = pointer(c, T(0))
    total = np.float64(0)
    for i in range(n):
        x = np.float64(a[i])
        total += x * x
    return total


@serial
def _sum_squares(c, n):
    """Of n elements, in blocks that are few enough for single precision."""
    total = np.float64(0)
    for first in range(0, n, BLOCK):
        at, there = c + first * size_of(T(0)), min(BLOCK, n - first)
        part = _single(at, there)
        # Too small or too great for single precision, or not finite, which it is in double, too.
        total += part if TINY < part < np.inf else _double(at, there)
    return total


@serial
def _strip(strip, rows, m, n, left, right, out, sums):
    """`ROWS` rows of the result, and their sum of squares."""
    size, width = size_of(T(0)), panel()
    first = strip * ROWS
    there = min(ROWS, m - first)
    c = out + first * n * size
    product(there, n, 1, rows, left + first * rows * size, (1, 0, ROWS), right,
            (0, width, rows * width), c, n, False)  # fmt: skip
    if sums.size > 0:
        sums[strip] = _sum_squares(c, there * n)


@parallel
def _product(g, x, out, left, right, rows, m, n, sums):
    strips, panels = (m + ROWS - 1) // ROWS, (n + panel() - 1) // panel()
    for k in prange(strips + panels):
        if k < strips:
            _pack(g, left, rows, m, ROWS, k)
        else:
            _pack(x, right, rows, n, panel(), k - strips)
    for strip in prange(strips):
        _strip(strip, rows, m, n, left, right, out, sums)


def weight_gradient(m: Backend | None, g: Array, x: Array, weight_home: Array | None) -> Array:
    """gᵀ·x over all axes but the last, in its home if there is one.

    Σ of the squares of what lies in a home is noted in :data:`gpugrad.backend.memory.squares`, if
    it is finite.
    """
    rows, features, inputs = math.prod(g.shape[:-1]), g.shape[-1], x.shape[-1]
    g, x = g.reshape(rows, features), x.reshape(rows, inputs)
    out = empty((features, inputs), x.dtype) if weight_home is None else weight_home
    in_order = out.flags.c_contiguous and out.flags.aligned
    if not 0 < rows <= MOST or features * inputs < LEAST or not in_order:
        return products.matmul(g.T, x, out)
    g, x = in_a_row(g), in_a_row(x)
    strips = -(-features // ROWS)
    left = empty((strips, rows, ROWS), x.dtype)
    right = empty(packed_shape(rows, inputs, x.dtype), x.dtype)
    sums = _NO_SUMS if weight_home is None else np.empty(strips)
    _product[numpy_storage(x.dtype)](
        address(g), address(x), address(out), address(left), address(right), rows, features,
        inputs, sums,
    )  # fmt: skip
    if weight_home is not None:
        total = float(np.add.reduce(sums))
        if math.isfinite(total):
            squares[id(weight_home)] = total
    return out


def _refuse(m: Backend, g: Any, x: Any, weight_home: Any) -> str | None:
    return products.refuse(m, g, x)  # for the product of matrices that it is


KERNELS = {"weight_gradient": Kernel(weight_gradient, LABEL, _refuse)}
