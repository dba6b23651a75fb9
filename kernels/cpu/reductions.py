"""Moments and sums of exponentials along axes, their gradients, and those of extremes.

The axes lie side by side: an array is seen as (outer, along, inner). It is cut into pieces of a
fixed size, small enough to be read from the cache the second time; what the pieces give is put
together in double precision, in order, so that results are the same bit for bit from run to run and
on any number of threads. Where there is no inner axis, a piece is a part of a row; elsewhere it is
some rows of elements that lie side by side, each of which belongs to another result.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu.compile import CpuTemplate, in_a_row, numpy_storage, parallel, serial
from gpugrad.kernels.cpu.elementwise import LABEL
from gpugrad.kernels.cpu.softmax import _add_exp, _greatest, _raise, _sum_exp
from gpugrad.kernels.template import Placeholder, T, arithmetic, device, exp, read, where, write

Array = np.ndarray[Any, Any]

#: Elements of a piece of a row, which are added up in the type that is computed in.
PIECE = 4096

#: Rows of a piece of those that lie side by side, and how many elements of each are looked at
#: together.
ROWS, WIDTH = 64, 256

part: Any = Placeholder("part")
one: Any = Placeholder("one")
f: Any = Placeholder("f")


# -- a piece of a row -----------------------------------------------------------------------------


@serial
def _sum(x: Array) -> Any:
    total = T(0)
    for i in range(x.size):
        total += read(x, i)
    return total


@serial
def _deviations(x: Array, mean: Any) -> Any:
    total = T(0)
    squares = T(0)
    for i in range(x.size):
        d = read(x, i) - mean
        total += d
        squares += d * d
    return total, squares


@serial
def _moments(x: Array) -> Any:
    """The mean, and the sum of the squared distances from it."""
    mean = _sum(x) / T(x.size)  # type: ignore[operator]
    left, squares = _deviations(x, mean)  # type: ignore[operator]
    rest = np.float64(left) / x.size
    return np.float64(mean) + rest, np.float64(squares) - rest * left


@serial
def _log_sum_exp(x: Array) -> Any:
    """It, and the sum."""
    shift = _greatest(x)  # type: ignore[operator]
    # Infinity and NaN, which are no shift, find their way through the sum.
    shift = where((shift > T(-np.inf)) & (shift < T(np.inf)), shift, T(0))
    total = np.float64(_sum_exp(x, shift))  # type: ignore[operator]
    return np.float64(shift) + np.log(total), total


@parallel
def _rows(x: Array, first: Array, second: Array) -> None:
    pieces = first.shape[1]
    for unit in prange(first.size):
        o, k = unit // pieces, unit % pieces
        first[o, k], second[o, k] = part(x[o, k * PIECE : min((k + 1) * PIECE, x.shape[1])])


# -- rows side by side ----------------------------------------------------------------------------


@serial
def _add_line(x: Array, total: Array) -> None:
    for k in range(x.size):
        total[k] += read(x, k)


@serial
def _add_deviations(x: Array, mean: Array, total: Array, squares: Array) -> None:
    for k in range(x.size):
        d = read(x, k) - mean[k]
        total[k] += d
        squares[k] += d * d


@serial
def _moments_tile(x: Array, a: Any, b: Any, first: Array, second: Array) -> None:
    rows = x.shape[0]
    mean, left, squares = np.zeros(b - a, T), np.zeros(b - a, T), np.zeros(b - a, T)
    for j in range(rows):
        _add_line(x[j, a:b], mean)  # type: ignore[operator]
    for k in range(b - a):
        mean[k] /= T(rows)
    for j in range(rows):
        _add_deviations(x[j, a:b], mean, left, squares)  # type: ignore[operator]
    for k in range(b - a):
        rest = np.float64(left[k]) / rows
        first[a + k] = np.float64(mean[k]) + rest
        second[a + k] = np.float64(squares[k]) - rest * left[k]


@serial
def _log_sum_exp_tile(x: Array, a: Any, b: Any, first: Array, second: Array) -> None:
    shift, total = np.full(b - a, T(-np.inf)), np.zeros(b - a, T)
    for j in range(x.shape[0]):
        _raise(x[j, a:b], shift)  # type: ignore[operator]
    for k in range(b - a):
        finite = (shift[k] > T(-np.inf)) & (shift[k] < T(np.inf))
        shift[k] = where(finite, shift[k], T(0))
    for j in range(x.shape[0]):
        _add_exp(x[j, a:b], shift, total)  # type: ignore[operator]
    for k in range(b - a):
        first[a + k] = np.float64(shift[k]) + np.log(np.float64(total[k]))


@parallel
def _tiles(x: Array, first: Array, second: Array) -> None:
    pieces, inner = first.shape[1], first.shape[2]
    strips = (inner + WIDTH - 1) // WIDTH
    for unit in prange(first.shape[0] * pieces * strips):
        o, k, a = unit // strips // pieces, unit // strips % pieces, unit % strips * WIDTH
        rows = x[o, k * ROWS : min((k + 1) * ROWS, x.shape[1])]
        part(rows, a, min(a + WIDTH, inner), first[o, k], second[o, k])


# -- gradients ------------------------------------------------------------------------------------


@device
def _from_level(x, level, rest, slope):
    """Of a moment: what an element is away from the mean."""
    return slope * ((x - level) - rest)


@device
def _share(x, level, rest, slope):
    """Of the logarithm of a sum of exponentials, which is stored and so has no rest."""
    return slope * exp(x - level)


@serial
def _spread(x: Array, out: Array, level: Any, rest: Any, slope: Any) -> None:
    for i in range(x.size):
        write(out, i, f(read(x, i), level, rest, slope))


@serial
def _spread_from_mean(x: Array, out: Array, level: Any, rest: Any, slope: Any) -> None:
    """With the mean of these elements."""
    mean = _sum(x) / T(x.size)  # type: ignore[operator]
    left, _ = _deviations(x, mean)  # type: ignore[operator]
    _spread_level(x, out, mean, left / T(x.size), slope)  # type: ignore[operator]


@serial
def _spread_to_extreme(x: Array, out: Array, level: Any, rest: Any, slope: Any) -> None:
    """In equal shares to all elements that are the extreme; a NaN is the extreme."""
    count = T(0)
    for i in range(x.size):
        z = read(x, i)
        count += where((z == level) | (z != z), T(1), T(0))
    for i in range(x.size):
        z = read(x, i)
        write(out, i, where((z == level) | (z != z), slope / count, T(0) * slope))


@parallel
def _spread_rows(x: Array, out: Array, piece: Any, level: Array, rest: Array, slope: Array) -> None:
    pieces = (x.shape[1] + piece - 1) // piece
    for unit in prange(x.shape[0] * pieces):
        o, i = unit // pieces, unit % pieces * piece
        j = min(i + piece, x.shape[1])
        one(x[o, i:j], out[o, i:j], level[o, 0], rest[o, 0], slope[o, 0])


@serial
def _spread_line(x: Array, out: Array, level: Array, rest: Array, slope: Array) -> None:
    for k in range(x.size):
        write(out, k, f(read(x, k), level[k], rest[k], slope[k]))


@parallel
def _spread_tiles(x: Array, out: Array, level: Array, rest: Array, slope: Array) -> None:
    pieces = (x.shape[1] + ROWS - 1) // ROWS
    for unit in prange(x.shape[0] * pieces):
        o, first = unit // pieces, unit % pieces * ROWS
        for j in range(first, min(first + ROWS, x.shape[1])):
            one(x[o, j], out[o, j], level[o], rest[o], slope[o])


_spread_level = _spread.bind(f=_from_level)

# -- putting together -----------------------------------------------------------------------------


def _axes(x: Array, axis: Any) -> tuple[int, int, int] | None:
    """The array as (outer, along, inner); None where the axes do not lie side by side."""
    if axis is None:
        return 1, x.size, 1
    axes = sorted({a % x.ndim for a in (axis if isinstance(axis, tuple | list) else (axis,))})
    if not axes or axes != list(range(axes[0], axes[-1] + 1)):
        return None
    return (
        math.prod(x.shape[: axes[0]]),
        math.prod(x.shape[axes[0] : axes[-1] + 1]),
        math.prod(x.shape[axes[-1] + 1 :]),
    )


def _kept(shape: tuple[int, ...], axis: Any, keepdims: bool) -> tuple[int, ...]:
    """The shape of the result."""
    gone = range(len(shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    taken = {a % len(shape) for a in gone}
    return tuple(1 if i in taken else n for i, n in enumerate(shape) if keepdims or i not in taken)


def _laid(x: Array, layout: tuple[int, int, int]) -> Array:
    outer, along, inner = layout
    return in_a_row(x).reshape((outer, along) if inner == 1 else layout)


def _parts(
    row: CpuTemplate, tile: CpuTemplate, x: Array, layout: tuple[int, int, int]
) -> tuple[Array, Array, Array]:
    """Two numbers of each piece, of shape (outer, pieces, inner), and how many its elements are.

    A function of tiles may leave the second number out.
    """
    outer, along, inner = layout
    size = PIECE if inner == 1 else ROWS
    pieces = -(-along // size)
    counts = np.full(pieces, float(size))
    counts[-1] = along - (pieces - 1) * size
    first, second = np.empty((2, outer, pieces, inner))
    storage = numpy_storage(x.dtype)
    seen = _laid(x, layout)
    if inner == 1:
        _rows.bind(part=row)[storage](seen, first[:, :, 0], second[:, :, 0])
    else:
        _tiles.bind(part=tile)[storage](seen, first, second)
    return first, second, counts[:, None]


def _mean_and_squares(x: Array, layout: tuple[int, int, int]) -> tuple[Array, Array]:
    """Of shape (outer, inner), the means and the sums of squared distances from them."""
    mean, squares, counts = _parts(_moments, _moments_tile, x, layout)
    if mean.shape[1] == 1:
        return mean[:, 0], squares[:, 0]
    whole = (mean * counts).sum(axis=1, keepdims=True) / layout[1]
    between = ((mean - whole) ** 2 * counts).sum(axis=1)
    return whole[:, 0], squares.sum(axis=1) + between


def var(
    m: Backend, x: Array, /, axis: Any = None, correction: float = 0, keepdims: bool = False
) -> Array:
    """The variance."""
    layout = _axes(x, axis)
    assert layout is not None
    with np.errstate(invalid="ignore", divide="ignore"):
        _, squares = _mean_and_squares(x, layout)
        found = squares / max(layout[1] - correction, 0)
    return found.astype(x.dtype).reshape(_kept(x.shape, axis, keepdims))


def std(
    m: Backend, x: Array, /, axis: Any = None, correction: float = 0, keepdims: bool = False
) -> Array:
    """The standard deviation."""
    layout = _axes(x, axis)
    assert layout is not None
    with np.errstate(invalid="ignore", divide="ignore"):
        _, squares = _mean_and_squares(x, layout)
        found = np.sqrt(squares / max(layout[1] - correction, 0))
    return found.astype(x.dtype).reshape(_kept(x.shape, axis, keepdims))


def _spread_all(
    row: CpuTemplate, line: CpuTemplate | None, piece: int, x: Array,
    layout: tuple[int, int, int], level: Any, slope: Any,
) -> Array:  # fmt: skip
    """A gradient, from one level and one slope for each result, of shape (outer, inner)."""
    storage = numpy_storage(x.dtype)
    width = arithmetic(storage)
    # Own arrays: a gradient may be one number that is seen many times, which loops take slowly.
    whole, slopes = np.empty((layout[0], layout[2])), np.empty((layout[0], layout[2]), width)
    whole[...] = level
    slopes[...] = np.asarray(slope).reshape(whole.shape)
    near = whole.astype(width)
    with np.errstate(invalid="ignore"):
        rest = (whole - near).astype(width)
    out = empty(x.shape, x.dtype)
    seen, places = _laid(x, layout), _laid(out, layout)
    if layout[2] == 1:
        _spread_rows.bind(one=row)[storage](seen, places, piece, near, rest, slopes)
    else:
        assert line is not None
        _spread_tiles.bind(one=line)[storage](seen, places, near, rest, slopes)
    return out


def var_backward(
    m: Backend, x: Array, g: Array, axis: Any, correction: float, keepdims: bool
) -> Array:
    """The gradient of the operand."""
    layout = _axes(x, axis)
    assert layout is not None
    n = layout[1] - correction
    slope = np.asarray(g, "float64").reshape(layout[0], layout[2]) * (2 / n if n > 0 else math.nan)
    if layout[2] == 1 and layout[1] <= PIECE:
        return _spread_all(_spread_from_mean, None, PIECE, x, layout, 0.0, slope)
    mean, _ = _mean_and_squares(x, layout)
    line = _spread_line.bind(f=_from_level)
    return _spread_all(_spread_level, line, PIECE, x, layout, mean, slope)


def logsumexp(m: Backend, x: Array, /, axis: Any = None, keepdims: bool = False) -> Array:
    """The logarithm of the sum of exponentials."""
    layout = _axes(x, axis)
    assert layout is not None
    y, _, _ = _parts(_log_sum_exp, _log_sum_exp_tile, x, layout)
    if y.shape[1] > 1:
        shift = y.max(axis=1, keepdims=True)
        shift[~np.isfinite(shift)] = 0
        with np.errstate(divide="ignore"):
            y = shift + np.log(np.exp(y - shift).sum(axis=1, keepdims=True))
    return y.astype(x.dtype).reshape(_kept(x.shape, axis, keepdims))


def logsumexp_backward(
    m: Backend, x: Array, y: Array, g: Array, axis: Any, keepdims: bool
) -> Array:
    """The gradient of the operand."""
    layout = _axes(x, axis)
    assert layout is not None
    level = np.asarray(y, "float64").reshape(layout[0], layout[2])
    level = np.where(np.isfinite(level), level, 0.0)
    row, line = _spread.bind(f=_share), _spread_line.bind(f=_share)
    return _spread_all(row, line, PIECE, x, layout, level, g)


def extreme_backward(m: Backend, x: Array, y: Array, g: Array, axis: Any, keepdims: bool) -> Array:
    """The gradient of the operand."""
    layout = _axes(x, axis)
    assert layout is not None
    level = np.asarray(y, "float64").reshape(layout[0], 1)
    return _spread_all(_spread_to_extreme, None, layout[1], x, layout, level, g)


def _refuse(x: Any, axis: Any) -> str | None:
    if not isinstance(x, np.ndarray) or not numpy_storage(x.dtype):
        return f"no kernel for {x.dtype}"
    if not x.size:
        return "nothing to compute"
    return None if x.ndim and _axes(x, axis) else f"axes {axis} of {x.ndim} are not side by side"


def _refuse_moment(
    m: Backend, x: Any, /, axis: Any = None, correction: float = 0, keepdims: bool = False
) -> str | None:
    return _refuse(x, axis)


def _refuse_moment_backward(
    m: Backend, x: Any, g: Any, axis: Any, correction: float, keepdims: bool
) -> str | None:
    return _refuse(x, axis)


def _refuse_sum(m: Backend, x: Any, /, axis: Any = None, keepdims: bool = False) -> str | None:
    return _refuse(x, axis)


def _refuse_backward(m: Backend, x: Any, y: Any, g: Any, axis: Any, keepdims: bool) -> str | None:
    return _refuse(x, axis)


def _refuse_extreme(m: Backend, x: Any, y: Any, g: Any, axis: Any, keepdims: bool) -> str | None:
    if why := _refuse(x, axis):
        return why
    layout = _axes(x, axis)
    return None if layout is not None and layout[2] == 1 else "not along the last axes"


KERNELS = {
    "var": Kernel(var, LABEL, _refuse_moment),
    "std": Kernel(std, LABEL, _refuse_moment),
    "var_backward": Kernel(var_backward, LABEL, _refuse_moment_backward),
    "logsumexp": Kernel(logsumexp, LABEL, _refuse_sum),
    "logsumexp_backward": Kernel(logsumexp_backward, LABEL, _refuse_backward),
    "extreme_backward": Kernel(extreme_backward, LABEL, _refuse_extreme),
}
