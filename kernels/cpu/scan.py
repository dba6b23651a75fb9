"""Running sums and products along an axis, forwards and backwards.

An array is seen as (outer, along, inner). Totals are kept in double precision, and every result is
rounded once. Where there is no inner axis, a sum runs through a row in vectors: each becomes its
own running sum in a few exchanges of its elements, while the sum of those before it, which alone
has to be waited for, is one addition. A long row is cut into pieces of a fixed size, which are
added up first, so that results are the same bit for bit on any number of threads. A product is
taken one factor after the other: in another order it could overflow on the way.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu.compile import (
    VECTOR,
    CpuTemplate,
    in_a_row,
    numpy_storage,
    parallel,
    serial,
    storage_view,
)
from gpugrad.kernels.cpu.elementwise import LABEL
from gpugrad.kernels.template import Placeholder, T, read, write

Array = np.ndarray[Any, Any]

#: Elements of a piece of a row, at least as many of a unit of short rows, and of the part of a
#: piece that is held in double precision at a time.
PIECE, BLOCK, STRETCH = 1 << 15, 4096, 512

#: Columns of rows that lie side by side which are looked at together.
WIDTH = 256

#: Numbers of double precision in a vector.
LANES = VECTOR // 8

one: Any = Placeholder("one")


# -- along a row ----------------------------------------------------------------------------------


@intrinsic
def _prefix(typing, room, i, before):
    """Let a vector of `room`, from i on, become its running sum after `before`; the whole sum."""

    def code(context, builder, signature, args):
        room, i, before = args
        number, word = ir.DoubleType(), ir.IntType(32)
        line, mask = ir.VectorType(number, LANES), ir.VectorType(word, LANES)
        data = context.make_array(signature.args[0])(context, builder, room).data
        place = builder.bitcast(builder.gep(data, [i]), line.as_pointer())
        # Adding it changes nothing; and unlike 0 it is not exchanged by slow, masked instructions.
        none = ir.Constant(line, [-0.0] * LANES)
        x = builder.load(place, align=8)
        step = 1
        while step < LANES:
            # As many zeros as the step is long, then the elements from the first on.
            later = ir.Constant(mask, [j if j < step else LANES + j - step for j in range(LANES)])
            x = builder.fadd(x, builder.shuffle_vector(none, x, later))
            step *= 2
        total = builder.fadd(builder.extract_element(x, word(LANES - 1)), before)
        first = builder.insert_element(none, before, word(0))
        every = builder.shuffle_vector(first, none, ir.Constant(mask, [0] * LANES))
        builder.store(builder.fadd(x, every), place, align=8)
        return total

    return types.float64(room, types.intp, types.float64), code


@serial
def _widen(x: Array, room: Array) -> None:
    for i in range(x.size):
        room[i] = read(x, i)


@serial
def _widen_back(x: Array, room: Array) -> None:
    # Of an index without a sign nobody asks whether it counts from the end.
    last = np.uint64(x.size - 1)
    for i in range(x.size):
        room[last - np.uint64(i)] = read(x, i)


@serial
def _narrow(room: Array, out: Array) -> None:
    for i in range(out.size):
        write(out, i, T(room[i]))


@serial
def _narrow_back(room: Array, out: Array) -> None:
    last = np.uint64(out.size - 1)
    for i in range(out.size):
        write(out, i, T(room[last - np.uint64(i)]))


@serial
def _sum_row(x: Array, out: Array, total: Any, backwards: Any, room: Array) -> None:
    for low in range(0, x.size, STRETCH):
        high = min(low + STRETCH, x.size)
        if backwards:
            _widen_back(x[x.size - high : x.size - low], room)  # type: ignore[operator]
        else:
            _widen(x[low:high], room)  # type: ignore[operator]
        # Behind the last element there may be those of before, of which nothing is kept.
        for i in range(0, high - low, LANES):
            total = _prefix(room, i, total)
        if backwards:
            _narrow_back(room, out[x.size - high : x.size - low])  # type: ignore[operator]
        else:
            _narrow(room, out[low:high])  # type: ignore[operator]


@serial
def _product_row(x: Array, out: Array, total: Any, backwards: Any, room: Array) -> None:
    for i in range(x.size):
        total *= np.float64(read(x, i))
        write(out, i, T(total))


@parallel
def _rows(x: Array, out: Array, before: Array, piece: Any, backwards: Any) -> None:
    """Of every piece, `before` is the total of those that it comes after."""
    rows, n = x.shape
    lead, pieces = out.shape[1] - n, before.shape[1]
    per = max(1, BLOCK // n)
    for unit in prange((rows + per - 1) // per * pieces):
        k, first = unit % pieces, unit // pieces * per
        room = np.zeros(STRETCH)
        low = k * piece
        high = min(low + piece, n)
        a, b = (n - high, n - low) if backwards else (low, high)
        for o in range(first, min(first + per, rows)):
            one(x[o, a:b], out[o, lead + a : lead + b], before[o, k], backwards, room)


@serial
def _total(x: Array) -> Any:
    total = np.float64(0)
    for i in range(x.size):
        total += np.float64(read(x, i))
    return total


@parallel
def _totals(x: Array, found: Array, piece: Any, backwards: Any) -> None:
    """What the pieces of each row add up to, but for the last."""
    n, pieces = x.shape[1], found.shape[1]
    for unit in prange(found.size):
        o, low = unit // pieces, unit % pieces * piece
        a = n - low - piece if backwards else low
        found[o, unit % pieces] = _total(x[o, a : a + piece])  # type: ignore[operator]


# -- along rows that lie side by side -------------------------------------------------------------


@serial
def _sum_line(x: Array, out: Array, total: Array) -> None:
    for k in range(x.size):
        total[k] += np.float64(read(x, k))
        write(out, k, T(total[k]))


@serial
def _product_line(x: Array, out: Array, total: Array) -> None:
    for k in range(x.size):
        total[k] *= np.float64(read(x, k))
        write(out, k, T(total[k]))


@parallel
def _tiles(x: Array, out: Array, start: Any, backwards: Any) -> None:
    outer, n, inner = x.shape
    lead = out.shape[1] - n
    strips = (inner + WIDTH - 1) // WIDTH
    for unit in prange(outer * strips):
        o, a = unit // strips, unit % strips * WIDTH
        b = min(a + WIDTH, inner)
        total = np.full(b - a, start)
        for i in range(n):
            j = n - 1 - i if backwards else i
            one(x[o, j, a:b], out[o, lead + j, a:b], total)


# -- putting together -----------------------------------------------------------------------------


_SUM = _rows.bind(one=_sum_row), _tiles.bind(one=_sum_line)
_PRODUCT = _rows.bind(one=_product_row), _tiles.bind(one=_product_line)


def _scan(
    x: Array, axis: int | None, initial: bool, loops: tuple[CpuTemplate, CpuTemplate],
    backwards: bool = False,
) -> Array:  # fmt: skip
    rows, tiles = loops
    start = 0.0 if loops is _SUM else 1.0
    axis = 0 if axis is None else axis % x.ndim
    shape, n = x.shape, x.shape[axis] + initial
    layout = math.prod(shape[:axis]), n, math.prod(shape[axis + 1 :])
    out = empty((*shape[:axis], n, *shape[axis + 1 :]), x.dtype)
    places = out.reshape(layout)
    if initial:
        places[:, 0] = start
    seen = in_a_row(x).reshape(layout[0], shape[axis], layout[2])
    places, storage = storage_view(places), numpy_storage(x.dtype)
    if layout[2] > 1:
        tiles[storage](seen, places, np.float64(start), backwards)
        return out
    seen, places = seen[:, :, 0], places[:, :, 0]
    # A product is not cut: that of a piece may overflow where that of the row does not.
    piece = PIECE if loops is _SUM else shape[axis]
    before = np.full((layout[0], -(-shape[axis] // piece)), start)
    if before.shape[1] > 1:
        found = np.empty((layout[0], before.shape[1] - 1))
        _totals[storage](seen, found, piece, backwards)
        with np.errstate(over="ignore", invalid="ignore"):
            np.cumsum(found, axis=1, out=before[:, 1:])
    rows[storage](seen, places, before, piece, backwards)
    return out


def cumulative_sum(
    m: Backend, x: Array, /, axis: int | None = None, dtype: Any = None,
    include_initial: bool = False,
) -> Array:  # fmt: skip
    """The running sum along an axis."""
    return _scan(x, axis, include_initial, _SUM)


def cumulative_prod(
    m: Backend, x: Array, /, axis: int | None = None, dtype: Any = None,
    include_initial: bool = False,
) -> Array:  # fmt: skip
    """The running product along an axis."""
    return _scan(x, axis, include_initial, _PRODUCT)


def cumulative_sum_backward(m: Backend, g: Array, axis: int) -> Array:
    """The running sum from the end of an axis."""
    return _scan(g, axis, False, _SUM, backwards=True)


def _refuse(
    m: Backend, x: Any, /, axis: int | None = None, dtype: Any = None,
    include_initial: bool = False,
) -> str | None:  # fmt: skip
    if not isinstance(x, np.ndarray) or not numpy_storage(x.dtype):
        return f"no kernel for {x.dtype}"
    if dtype is not None and m.dtype(dtype) != x.dtype:
        return f"{x.dtype} is to be added up as {dtype}"
    if not x.size:
        return "nothing to compute"
    fits = x.ndim == 1 if axis is None else -x.ndim <= axis < x.ndim
    return None if fits else f"no axis {axis} of {x.ndim}"


def _by_numpy(scan: Any) -> Kernel:
    """Whole numbers, of which a training step has a few at most: it takes no loop of ours."""

    def run(
        m: Backend, x: Array, /, axis: int | None = None, dtype: Any = None,
        include_initial: bool = False,
    ) -> Array:  # fmt: skip
        found: Array = scan(x, axis=axis, dtype=m.dtype(dtype), include_initial=include_initial)
        return found

    def refuse(m: Backend, x: Any, /, *args: Any, **kwargs: Any) -> str | None:
        return None if isinstance(x, np.ndarray) and x.dtype.kind in "iu" else "no whole numbers"

    return Kernel(run, "numpy", refuse)


KERNELS = {
    "cumulative_sum": [
        Kernel(cumulative_sum, LABEL, _refuse), _by_numpy(np.cumulative_sum),
    ],
    "cumulative_prod": [
        Kernel(cumulative_prod, LABEL, _refuse), _by_numpy(np.cumulative_prod),
    ],
    "cumulative_sum_backward": Kernel(cumulative_sum_backward, LABEL, _refuse),
}  # fmt: skip
