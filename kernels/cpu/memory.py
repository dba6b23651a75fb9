"""Memory by its address, for loops that walk over it in strides of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, prange, types
from numba.extending import intrinsic

from gpugrad.backend.scratch import empty
from gpugrad.backend.tape import address
from gpugrad.kernels.cpu.compile import VECTOR, numpy_storage, parallel, serial
from gpugrad.kernels.template import T, device

__all__ = [
    "address",
    "channels_last",
    "clear",
    "copy",
    "matrix",
    "places_inside",
    "pointer",
    "size_of",
    "turn",
    "turn_all",
    "vector",
]

Array = np.ndarray[Any, Any]

#: Elements of a matrix that are turned together, about, and a line of the cache: pieces are as wide
#: as some of them.
PIECE, LINE = 1 << 13, 16


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


@device
def matrix(at, rows, columns):
    """The array of elements from an address on."""
    return carray(pointer(at, T(0)), (rows, columns))


@device
def vector(at, n):
    """The same with one axis."""
    return carray(pointer(at, T(0)), (n,))


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


@intrinsic
def _turn_block(typing, zero, source, down, target, to_down):
    """Turn a block as wide and high as a vector is long, in registers; strides in bytes.

    Row i and column j change places bit by bit of their numbers: for each bit, of two rows that
    differ in it alone, the halves are exchanged that differ in it the other way round.
    """
    vector, word = VECTOR, types.int64

    def code(context, builder, signature, args):
        _, source, down, target, to_down = args
        n = vector // (zero.bitwidth // 8)
        line, pointer = ir.VectorType(context.get_value_type(zero), n), ir.PointerType()
        mask, align = ir.VectorType(ir.IntType(32), n), zero.bitwidth // 8

        def place(address, step, i):
            moved = builder.add(address, builder.mul(step, step.type(i)))
            return builder.inttoptr(moved, pointer)

        rows = [builder.load(place(source, down, i), align=align, typ=line) for i in range(n)]
        bit = n // 2
        while bit:
            upper = ir.Constant(mask, [n + j - bit if j & bit else j for j in range(n)])
            lower = ir.Constant(mask, [n + j if j & bit else j + bit for j in range(n)])
            for i in range(n):
                if not i & bit:
                    a, b = rows[i], rows[i + bit]
                    rows[i] = builder.shuffle_vector(a, b, upper)
                    rows[i + bit] = builder.shuffle_vector(a, b, lower)
            bit //= 2
        for i, row in enumerate(rows):
            builder.store(row, place(target, to_down, i), align=align)
        return context.get_dummy_value()

    return types.void(zero, word, word, word, word), code


@serial
def turn(source, down, rows, columns, target, to_down):
    """target[j, i] = source[i, j] for matrices whose rows are so many elements apart."""
    size = size_of(T(0))
    n = VECTOR // size
    a, b = pointer(source, T(0)), pointer(target, T(0))
    whole, even = rows // n * n, columns // n * n
    for i in range(0, whole, n):
        for j in range(0, even, n):
            _turn_block(T(0), source + (i * down + j) * size, down * size,
                        target + (j * to_down + i) * size, to_down * size)  # fmt: skip
    for i in range(rows):
        for j in range(even if i < whole else 0, columns):
            b[j * to_down + i] = a[i * down + j]


@parallel
def turn_all(source, target, items, rows, columns):
    """The same for so many dense matrices, one behind the other, on all threads."""
    one = size_of(T(0))
    size = one * rows * columns
    width = max(LINE, PIECE // rows // LINE * LINE)
    pieces = (columns + width - 1) // width
    for unit in prange(items * pieces):
        item, piece = unit // pieces, unit % pieces
        low = piece * width
        turn(source + item * size + low * one, columns, rows, min(width, columns - low),
             target + item * size + low * rows * one, rows)  # fmt: skip


def channels_last(x: Array) -> Array:
    """An array (N, C, H, W) as a dense one (N, H, W, C): a view if it lies so, else a copy."""
    there = x.transpose(0, 2, 3, 1)
    if there.flags.c_contiguous and x.flags.aligned:
        return there
    if not (x.flags.c_contiguous and x.flags.aligned):
        return np.ascontiguousarray(there)
    out = empty(there.shape, x.dtype)
    n, h, w, c = there.shape
    turn_all[numpy_storage(x.dtype)](address(x), address(out), n, c, h * w)
    return out
