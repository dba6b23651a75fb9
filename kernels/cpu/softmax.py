"""Softmax and its logarithm, forward and backward, along any axis; and what their kin share.

The work is cut into *rows*, the elements along the axis. Where they lie in a row in memory, one is
worked on at a time: going forward it is read once from memory, piece by piece, and all that is
needed of a piece is computed while it is in the nearest cache. Where rows lie side by side, along
another axis than the last, a *tile* of them is worked on at a time, an element of each at once.

Each row is one thread's and summed in a fixed order: the result is the same bit for bit from run to
run and on any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu import pool
from gpugrad.kernels.cpu.compile import (
    VECTOR,
    CpuTemplate,
    copied,
    numpy_storage,
    parallel,
    serial,
    storage_view,
)
from gpugrad.kernels.cpu.elementwise import LABEL, refuse_arrays
from gpugrad.kernels.probabilities import (
    log_share,
    log_softmax_partial,
    log_softmax_term,
    share,
    softmax_partial,
    softmax_term,
)
from gpugrad.kernels.template import (
    I,
    Placeholder,
    T,
    device,
    exp,
    from_bits,
    log,
    read,
    to_bits,
    where,
    write,
)

Array = np.ndarray[Any, Any]

#: Elements of a row that are looked at together.
PIECE = 2048

#: Rows from which it pays to lay short ones side by side.
MANY = 256

#: Elements of a tile, which is read more than once and should stay in the cache; and the fewest and
#: the most rows that it has.
TILE, NARROWEST, WIDEST = 1 << 15, 64, 1024

#: Elements of each row of a tile that are added up by themselves.
STRETCH = 64

#: Elements that one thread is done with before others are awake, and how many a row is worth.
FEW, FIXED = 1 << 15, 64

#: How far an element may lie above what exponentials are relative to.
MARGIN = 30.0

row: Any = Placeholder("row")
tile: Any = Placeholder("tile")
term: Any = Placeholder("term")
partial: Any = Placeholder("partial")
sum_terms: Any = Placeholder("sum_terms")
add_terms: Any = Placeholder("add_terms")
write_partials: Any = Placeholder("write_partials")

# -- one row --------------------------------------------------------------------------------------


@device
def _ordered(bits):
    """From a number's bits to an integer that is ordered as the numbers are, and back."""
    return where(bits < I(0), I(bits ^ ~to_bits(T(-0.0))), bits)


# There are vector instructions for the greatest of integers, and none for floats that heed NaN.
@serial
def _greatest(x):
    most = _ordered(to_bits(T(-np.inf)))
    for j in range(x.size):
        this = _ordered(to_bits(read(x, j)))
        most = this if this > most else most
    return from_bits(_ordered(I(most)))


@serial
def _sum_exp(x, base):
    total = T(0)
    for j in range(x.size):
        total += exp(read(x, j) - base)
    return total


@serial
def _greatest_and_sum_exp(x, base):
    most = _ordered(to_bits(T(-np.inf)))
    total = T(0)
    for j in range(x.size):
        z = read(x, j)
        this = _ordered(to_bits(z))
        most = this if this > most else most
        total += exp(z - base)
    return from_bits(_ordered(I(most))), total


@serial
def statistics(x):
    """The greatest element of a row, and the sum of exp(element - greatest); NaN where undefined.

    The exponentials are taken relative to the greatest element of the first piece, as long as none
    exceeds it so far that sums could overflow: then both come from one look at each element.
    """
    base = largest = T(-np.inf)
    total = T(0)
    for start in range(0, x.size, PIECE):
        piece = x[start : start + PIECE]
        if base == T(-np.inf):  # so far, all is masked out
            base = largest = _greatest(piece)
            total += _sum_exp(piece, where(base == T(-np.inf), T(0), base))
        else:
            top, part = _greatest_and_sum_exp(piece, base)
            if not top <= base + T(MARGIN):
                total *= exp(base - top)
                base = top
                part = _sum_exp(piece, base)
            total += part
            largest = where(top > largest, top, largest)
    # A NaN has a sign, which may have hidden it from the search, but not from the sum.
    return largest, total * exp(base - largest)


@serial
def write_share(x, y, largest, scale):
    """The shares of a row's elements."""
    for j in range(x.size):
        write(y, j, share(read(x, j), largest, scale))


@serial
def _write_log_share(x, y, largest, log_total):
    for j in range(x.size):
        write(y, j, log_share(read(x, j), largest, log_total))


@serial
def _sum_terms(g, y):
    total = T(0)
    for j in range(g.size):
        total += term(read(g, j), read(y, j))
    return total


# A row's function takes the rows of two operands (the same twice, if there is one) and of the
# result, the row's number, and a tuple of whatever else there is.
@serial
def _softmax_row(x, same, y, i, more):
    largest, total = statistics(x)
    write_share(x, y, largest, T(1) / total)


@serial
def _log_softmax_row(x, same, y, i, more):
    largest, total = statistics(x)
    _write_log_share(x, y, largest, log(total))


@serial
def _backward_row(g, y, gx, i, more):
    total = sum_terms(g, y)
    for j in range(g.size):
        write(gx, j, partial(read(g, j), read(y, j), total))


# -- a tile of rows -------------------------------------------------------------------------------
# The functions up to the next line take an element of each row, and a number for each row.


@serial
def _raise(x, largest):
    for k in range(x.size):
        z = read(x, k)
        largest[k] = where(z > largest[k], z, largest[k])


@serial
def _add_exp(x, largest, total):
    for k in range(x.size):
        total[k] += exp(read(x, k) - largest[k])


@serial
def _write_shares(x, y, largest, scale):
    for k in range(x.size):
        write(y, k, share(read(x, k), largest[k], scale[k]))


@serial
def _write_log_shares(x, y, largest, log_total):
    for k in range(x.size):
        write(y, k, log_share(read(x, k), largest[k], log_total[k]))


@serial
def _add_terms(g, y, total):
    for k in range(g.size):
        total[k] += term(read(g, k), read(y, k))


@serial
def _write_partials(g, y, gx, total):
    for k in range(g.size):
        write(gx, k, partial(read(g, k), read(y, k), total[k]))


# A tile's function takes two operands and the result, of axes (outer, along the rows, inner), and
# which rows: number `i` of the outer axis, `a` to `b` of the inner one.
@serial
def tile_statistics(x, i, a, b, largest, total):
    """As :func:`statistics`, into an array each."""
    largest[:] = T(-np.inf)
    total[:] = T(0)
    for j in range(x.shape[1]):
        _raise(x[i, j, a:b], largest)
    # Sums of sums, for a long one would lose the last of many small terms.
    part = np.empty(b - a, T)
    for start in range(0, x.shape[1], STRETCH):
        part[:] = T(0)
        for j in range(start, min(start + STRETCH, x.shape[1])):
            _add_exp(x[i, j, a:b], largest, part)
        total += part


@serial
def _softmax_tile(x, same, y, i, a, b, more):
    largest, total = np.empty(b - a, T), np.empty(b - a, T)
    tile_statistics(x, i, a, b, largest, total)
    for k in range(b - a):
        total[k] = T(1) / total[k]
    for j in range(x.shape[1]):
        _write_shares(x[i, j, a:b], y[i, j, a:b], largest, total)


@serial
def _log_softmax_tile(x, same, y, i, a, b, more):
    largest, total = np.empty(b - a, T), np.empty(b - a, T)
    tile_statistics(x, i, a, b, largest, total)
    for k in range(b - a):
        total[k] = log(total[k])
    for j in range(x.shape[1]):
        _write_log_shares(x[i, j, a:b], y[i, j, a:b], largest, total)


@serial
def _backward_tile(g, y, gx, i, a, b, more):
    total = np.zeros(b - a, T)
    for j in range(g.shape[1]):
        add_terms(g[i, j, a:b], y[i, j, a:b], total)
    for j in range(g.shape[1]):
        write_partials(g[i, j, a:b], y[i, j, a:b], gx[i, j, a:b], total)


# -- all of them ----------------------------------------------------------------------------------


@parallel
def _rows(a, b, out, more):
    for i in prange(a.shape[0]):
        row(a[i], b[i], out[i], i, more)


@parallel
def _tiles(a, b, out, more):
    inner = a.shape[2]
    width = min(max(TILE // a.shape[1], NARROWEST), WIDEST)
    count = (inner + width - 1) // width
    for n in prange(a.shape[0] * count):
        k = n % count * width
        tile(a, b, out, n // count, k, min(k + width, inner), more)


class Loops:
    """An operation along an axis, from its functions of a row and of a tile."""

    def __init__(self, of_a_row: CpuTemplate, of_a_tile: CpuTemplate) -> None:
        self.bodies = of_a_row, of_a_tile
        self.rows = _rows.bind(row=of_a_row)
        self.tiles = _tiles.bind(tile=of_a_tile)

    def __call__(
        self, axis: int, *operands: Array, more: tuple[Any, ...] = (), result: bool = True
    ) -> Array:
        """Run over operands of one shape and dtype, one or two of them.

        Without a `result` of its own, an operation finds its places to write to in `more`.
        """
        first = operands[0]
        if not first.size:
            return empty(first.shape, first.dtype)
        last = first.ndim - 1
        axis %= first.ndim
        short = axis == last and first.shape[axis] * first.itemsize < VECTOR
        if short and first.size >= MANY * first.shape[axis]:
            return self._side_by_side(operands, more, result)
        if axis == last == 1 and all(x.flags.c_contiguous for x in operands):  # the common case
            laid = [storage_view(x) for x in operands]
            out = empty(first.shape, first.dtype) if result else first
            places = storage_view(out) if result else laid[0]
            rows = self.rows[numpy_storage(first.dtype)]
            if first.size + FIXED * len(first) < FEW:
                pool.here(rows, laid[0], laid[-1], places, more)
            else:
                rows(laid[0], laid[-1], places, more)
            return out
        length, inner = first.shape[axis], prod(first.shape[axis + 1 :])
        # Rows may lie one after the other although their axis is not the last: a transposed view.
        turned = operands if axis == last else [np.moveaxis(x, axis, last) for x in operands]
        if inner == 1 or all(x.flags.c_contiguous for x in turned):
            kernel, shape = self.rows, [-1, length]
        else:
            kernel, shape, turned = self.tiles, [-1, length, inner], operands
        laid = [
            storage_view((x if x.flags.c_contiguous else copied(x)).reshape(shape)) for x in turned
        ]
        out = empty(turned[0].shape, first.dtype) if result else first
        places = storage_view(out.reshape(shape)) if result else laid[0]
        kernel[numpy_storage(first.dtype)](laid[0], laid[-1], places, more)
        return out if turned is operands else np.moveaxis(out, last, axis)

    def _side_by_side(
        self, operands: Sequence[Array], more: tuple[Any, ...], result: bool
    ) -> Array:
        """Rows shorter than a vector: copies in which those of many rows lie side by side."""
        shape = operands[0].shape
        turned = [copied(x.reshape(-1, shape[-1]).T)[None] for x in operands]
        out = self(1, *turned, more=more, result=result)
        return copied(out[0].T).reshape(shape) if result else operands[0]


# -- what the backend calls -----------------------------------------------------------------------


def _of_one(loops: Loops) -> Kernel:
    """A kernel `run(m, x, axis)`."""

    def run(m: Backend, x: Array, axis: int = -1) -> Array:
        return loops(axis, x)

    return Kernel(run, LABEL, _refuse)


def _of_two(loops: Loops) -> Kernel:
    """A kernel `run(m, g, y, axis)`."""

    def run(m: Backend, g: Array, y: Array, axis: int = -1) -> Array:
        return loops(axis, g, y)

    def refuse(m: Backend, g: Any, y: Any, axis: Any = -1) -> str | None:
        return _refuse(m, g, axis) or refuse_arrays(g, y)

    return Kernel(run, LABEL, refuse)


def _refuse(m: Backend, x: Any, axis: Any = -1) -> str | None:
    if why := refuse_arrays(x):
        return why
    if not isinstance(axis, int | np.integer) or not -x.ndim <= axis < x.ndim:
        return f"axis {axis!r} of {x.ndim}; kernels work along one"
    return None


def _backward(of_a_term: Any, of_an_element: Any) -> Loops:
    """The backward of an operation, from what an element adds to a total and makes of it."""
    return Loops(
        _backward_row.bind(sum_terms=_sum_terms.bind(term=of_a_term), partial=of_an_element),
        _backward_tile.bind(
            add_terms=_add_terms.bind(term=of_a_term),
            write_partials=_write_partials.bind(partial=of_an_element),
        ),
    )


LOOPS = {
    "softmax": Loops(_softmax_row, _softmax_tile),
    "log_softmax": Loops(_log_softmax_row, _log_softmax_tile),
    "softmax_backward": _backward(softmax_term, softmax_partial),
    "log_softmax_backward": _backward(log_softmax_term, log_softmax_partial),
}

KERNELS = {
    name: (_of_two if name.endswith("backward") else _of_one)(loops)
    for name, loops in LOOPS.items()
}
