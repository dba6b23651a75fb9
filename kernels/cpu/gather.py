"""Reading along an axis at places of its own for each element, and adding up where it was read.

Along the last axis a row is one thread's; along another, a strip of elements that lie side by side.
A thread adds up in the order of the places, so that a sum is the same bit for bit from run to run
and on any number of threads.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu.compile import in_a_row, numpy_storage, parallel, serial
from gpugrad.kernels.cpu.elementwise import LABEL
from gpugrad.kernels.template import T, where

Array = np.ndarray[Any, Any]

#: Elements side by side that are one thread's.
WIDTH = 512


@serial
def _read_row(x: Array, places: Array, y: Array) -> Any:
    """Whether all places were inside."""
    n = x.size
    good = True
    for j in range(y.size):
        k = places[j]
        k = where(k < 0, k + n, k)
        if k >= 0 and k < n:
            y[j] = x[k]
        else:
            good = False
    return good


@serial
def _add_row(g: Array, places: Array, total: Array) -> Any:
    n = total.size
    good = True
    for j in range(g.size):
        k = places[j]
        k = where(k < 0, k + n, k)
        if k >= 0 and k < n:
            total[k] += g[j]
        else:
            good = False
    return good


@serial
def _read_strip(x: Array, places: Array, y: Array, a: Any, b: Any) -> Any:
    n = x.shape[0]
    good = True
    for j in range(y.shape[0]):
        for i in range(a, b):
            k = places[j, i]
            k = where(k < 0, k + n, k)
            if k >= 0 and k < n:
                y[j, i] = x[k, i]
            else:
                good = False
    return good


@serial
def _add_strip(g: Array, places: Array, total: Array, a: Any, b: Any) -> Any:
    n = total.shape[0]
    good = True
    for k in range(n):
        for i in range(a, b):
            total[k, i] = T(0)
    for j in range(g.shape[0]):
        for i in range(a, b):
            k = places[j, i]
            k = where(k < 0, k + n, k)
            if k >= 0 and k < n:
                total[k, i] += g[j, i]
            else:
                good = False
    return good


@parallel
def _read_rows(x: Array, places: Array, y: Array, good: Array) -> None:
    for i in prange(good.size):
        good[i] = _read_row(x[i], places[i], y[i])  # type: ignore[operator]


@parallel
def _add_rows(g: Array, places: Array, total: Array, good: Array) -> None:
    for i in prange(good.size):
        total[i] = T(0)
        good[i] = _add_row(g[i], places[i], total[i])  # type: ignore[operator]


@parallel
def _read_strips(x: Array, places: Array, y: Array, good: Array) -> None:
    inner = y.shape[2]
    count = good.size // y.shape[0]
    for unit in prange(good.size):
        o, a = unit // count, unit % count * WIDTH
        good[unit] = _read_strip(x[o], places[o], y[o], a, min(a + WIDTH, inner))  # type: ignore[operator]


@parallel
def _add_strips(g: Array, places: Array, total: Array, good: Array) -> None:
    inner = total.shape[2]
    count = good.size // total.shape[0]
    for unit in prange(good.size):
        o, a = unit // count, unit % count * WIDTH
        good[unit] = _add_strip(g[o], places[o], total[o], a, min(a + WIDTH, inner))  # type: ignore[operator]


def _laid(x: Array, axis: int) -> Array:
    """An array as axes (outer, along, inner); without the last, where that has one element."""
    outer, inner = prod(x.shape[:axis]), prod(x.shape[axis + 1 :])
    shape = (outer, x.shape[axis]) if inner == 1 else (outer, x.shape[axis], inner)
    return in_a_row(x).reshape(shape)


def _run(rows: Any, strips: Any, x: Array, indices: Array, out: Array, axis: int, n: int) -> None:
    """One of the two loops, over the operand, the places and the result."""
    if not indices.size:
        return
    index = indices if indices.dtype in (np.int32, np.int64) else indices.astype(np.int64)
    a, places, b = (_laid(v, axis) for v in (x, index, out))
    loop = rows if a.ndim == 2 else strips
    units = a.shape[0] if a.ndim == 2 else a.shape[0] * -(-a.shape[2] // WIDTH)
    good = np.ones(units, bool)
    loop[numpy_storage(out.dtype) or "float32"](a, places, b, good)
    if not good.all():
        raise IndexError(
            f"take_along_axis: indices from {indices.min()} to {indices.max()} along axis {axis} "
            f"with {n} elements"
        )


#: By the bytes of an element: what is only read is moved as an integer of its width.
_BITS = {1: "uint8", 2: "uint16", 4: "int32", 8: "int64"}


def gather(m: Backend, x: Array, indices: Array, /, axis: int) -> Array:
    """As `numpy.take_along_axis`."""
    axis %= x.ndim
    y = empty(indices.shape, x.dtype)
    bits = _BITS[x.dtype.itemsize]
    own = x if x.flags.c_contiguous else np.ascontiguousarray(x)
    _run(_read_rows, _read_strips, own.view(bits), indices, y.view(bits), axis, x.shape[axis])
    return y


def scatter_add_along_axis(
    m: Backend, x: Array, indices: Array, /, shape: tuple[int, ...], axis: int
) -> Array:
    """Zeros with `x` added where :func:`gather` reads; half precision is added up in float32."""
    axis %= x.ndim
    if x.dtype.itemsize == 2:
        wide = scatter_add_along_axis(m, x.astype(np.float32), indices, shape, axis)
        return wide.astype(x.dtype)
    if not x.size:
        return np.zeros(shape, x.dtype)
    total = empty(shape, x.dtype)
    _run(_add_rows, _add_strips, x, indices, total, axis, shape[axis])
    return total


def _refuse(x: Any, indices: Any, axis: int, shape: tuple[int, ...]) -> str | None:
    if not isinstance(x, np.ndarray) or not isinstance(indices, np.ndarray):
        return "operands that are not arrays"
    if indices.dtype.kind not in "iu":
        return f"indices of {indices.dtype}"
    if indices.ndim != len(shape) or not shape:
        return f"indices of {indices.ndim} axes for {len(shape)}"
    at = axis % len(shape)
    if any(a != b for i, (a, b) in enumerate(zip(shape, indices.shape)) if i != at):
        return f"indices of shape {indices.shape} for {tuple(shape)}"
    return None


def _refuse_gather(m: Backend, x: Any, indices: Any, /, axis: int) -> str | None:
    if why := _refuse(x, indices, axis, np.shape(x)):
        return why
    return None if x.dtype.itemsize in _BITS else f"elements of {x.dtype.itemsize} bytes"


def _refuse_scatter(
    m: Backend, x: Any, indices: Any, /, shape: tuple[int, ...], axis: int
) -> str | None:
    if why := _refuse(x, indices, axis, shape):
        return why
    if x.shape != indices.shape:
        return f"indices of shape {indices.shape} for elements of shape {x.shape}"
    return None if numpy_storage(x.dtype) else f"no kernel for {x.dtype}"


KERNELS = {
    "gather": Kernel(gather, LABEL, _refuse_gather),
    "scatter_add_along_axis": Kernel(scatter_add_along_axis, LABEL, _refuse_scatter),
}
