"""Memory by its address, for loops that walk over it in strides of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange, types
from numba.extending import intrinsic

from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu.compile import parallel, serial
from gpugrad.kernels.template import T, device

__all__ = ["address", "channels_last", "clear", "copy", "places_inside", "pointer", "size_of"]

Array = np.ndarray[Any, Any]

#: Elements of a row that are turned at a time: a line of the cache.
LINE = 16


@intrinsic
def pointer(typing, address, like):
    """The elements at an address, of the type of `like`: `pointer(a, T(0))[i]`."""

    def code(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.intp, like), code


@intrinsic
def size_of(typing, like):
    """Bytes of a number of the type of `like`, known when the code is compiled."""
    size = like.bitwidth // 8

    def code(context, builder, signature, args):
        return context.get_constant(types.int64, size)

    return types.int64(like), code


def address(x: Array) -> int:
    """Where the first element of an array is."""
    return int(x.ctypes.data)


@device
def places_inside(at, step, count, n):
    """Which of `count` places, `step` apart from `at` on, are among n: first, and one behind."""
    # `at` may be negative: before the first.
    first = 0 if at >= 0 else (-at + step - 1) // step
    return first, min(count, max(first, (n - at + step - 1) // step))


@serial
def copy(source, target, n):
    """Copy n elements from an address to another; the two do not overlap."""
    a, b = pointer(source, T(0)), pointer(target, T(0))
    for i in range(n):
        b[i] = a[i]


@serial
def clear(target, n):
    """Set n elements to zero."""
    a = pointer(target, T(0))
    for i in range(n):
        a[i] = T(0)


@serial
def _turn(source, target, rows, columns, first, last):
    """target[j, i] = source[i, j] for columns from `first` to `last`."""
    a, b = pointer(source, T(0)), pointer(target, T(0))
    for start in range(first, last, LINE):
        stop = min(start + LINE, last)
        for i in range(rows):
            for j in range(start, stop):
                b[j * rows + i] = a[i * columns + j]


@parallel
def _turn_all(source, target, items, rows, columns):
    size = size_of(T(0)) * rows * columns
    # Pieces of some thousand elements.
    width = max(LINE, 8192 // rows // LINE * LINE)
    pieces = (columns + width - 1) // width
    for unit in prange(items * pieces):
        item, piece = unit // pieces, unit % pieces
        low = piece * width
        _turn(source + item * size, target + item * size, rows, columns, low,
              min(low + width, columns))  # fmt: skip


def channels_last(x: Array) -> Array:
    """An array (N, C, H, W) as a dense one (N, H, W, C): a view if it lies so, else a copy."""
    there = x.transpose(0, 2, 3, 1)
    if there.flags.c_contiguous and x.flags.aligned:
        return there
    if not (x.flags.c_contiguous and x.flags.aligned):
        return np.ascontiguousarray(there)
    out = empty(there.shape, x.dtype)
    n, h, w, c = there.shape
    _turn_all[x.dtype.name](address(x), address(out), n, c, h * w)
    return out
