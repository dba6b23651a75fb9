"""The cross-entropy of logits with classes, and its gradient: one pass over the logits each.

Probabilities are never stored. Going forward, two numbers of each row are kept, its greatest logit
and the sum of the exponentials relative to it, from which going backward they are made anew. Rows
and tiles of rows are those of `kernels/cpu/softmax.py`.

A target that is no class is none of this file's business, but must not do harm: its loss and its
gradient are NaN.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.tape import call, replayable, spoil
from gpugrad.kernels.cpu.compile import copied, numpy_storage, serial
from gpugrad.kernels.cpu.elementwise import LABEL
from gpugrad.kernels.cpu.softmax import (
    Array,
    Loops,
    statistics,
    tile_statistics,
    write_share,
)
from gpugrad.kernels.probabilities import (
    distribution,
    loss,
    mismatch,
    share,
    shifted,
    smoothing,
)
from gpugrad.kernels.template import T, arithmetic, read, write

# -- one row --------------------------------------------------------------------------------------


@serial
def _sum_shifted(x, largest):
    total = T(0)
    for j in range(x.size):
        total += shifted(read(x, j), largest, T(1))
    return total


@serial
def _dot_shifted(x, weight, largest):
    total = T(0)
    for j in range(x.size):
        total += shifted(read(x, j), largest, weight[j])
    return total


@serial
def _loss_row(x, same, out, i, more):
    target, weight, ignore, certain, spread, all_weights, losses, largest, total, weights = more
    t = target[i]
    losses[i], largest[i], total[i], weights[i] = T(0), T(0), T(x.size), T(0)
    # What is ignored is not looked at: padding may hold anything, and costs nothing.
    if t == ignore:
        return
    if t < 0 or t >= x.size:
        losses[i] = T(np.nan)
        return
    largest[i], total[i] = statistics(x)
    w, shifts = T(1), T(0)
    if weight.size > 0:
        w = weight[t]
        if spread > T(0):
            shifts = _dot_shifted(x, weight, largest[i])
    elif spread > T(0):
        shifts = _sum_shifted(x, largest[i])
    weights[i] = w
    losses[i] = loss(read(x, t), largest[i], total[i], shifts, w, certain, spread, all_weights)


@serial
def _fill(gx, value):
    for j in range(gx.size):
        write(gx, j, value)


@serial
def _write_less(x, gx, largest, scale, even):
    for j in range(x.size):
        write(gx, j, share(read(x, j), largest, scale) - even)


@serial
def _write_less_weighted(x, gx, largest, scale, even, weight):
    for j in range(x.size):
        write(gx, j, share(read(x, j), largest, scale) - even * weight[j])


@serial
def _gradient_row(x, same, gx, i, more):
    target, weight, ignore, certain, spread, all_weights, above, each, largest, total = more
    t = target[i]
    if t == ignore:
        _fill(gx, T(0))
        return
    if t < 0 or t >= x.size:
        _fill(gx, T(np.nan))
        return
    w = weight[t] if weight.size > 0 else T(1)
    point, even, scale = distribution(above[i * each], w, total[i], certain, spread, all_weights)
    if spread == T(0):
        write_share(x, gx, largest[i], scale)
    elif weight.size == 0:
        _write_less(x, gx, largest[i], scale, even)
    else:
        _write_less_weighted(x, gx, largest[i], scale, even, weight)
    write(gx, t, share(read(x, t), largest[i], scale) - (even * w + point))


# -- a tile of rows -------------------------------------------------------------------------------


@serial
def _add_shifted(x, largest, w, shifts):
    for k in range(x.size):
        shifts[k] += shifted(read(x, k), largest[k], w)


@serial
def _loss_tile(x, same, out, i, a, b, more):
    target, weight, ignore, certain, spread, all_weights, losses, largest, total, weights = more
    first = i * x.shape[2]
    tops, totals = largest[first + a : first + b], total[first + a : first + b]
    tile_statistics(x, i, a, b, tops, totals)
    shifts = np.zeros(b - a, T)
    if spread > T(0):
        for j in range(x.shape[1]):
            w = weight[j] if weight.size > 0 else T(1)
            _add_shifted(x[i, j, a:b], tops, w, shifts)
    for k in range(a, b):
        r = first + k
        t = target[r]
        if t == ignore:
            losses[r], largest[r], total[r], weights[r] = T(0), T(0), T(x.shape[1]), T(0)
        elif t < 0 or t >= x.shape[1]:
            losses[r], weights[r] = T(np.nan), T(0)
        else:
            weights[r] = weight[t] if weight.size > 0 else T(1)
            losses[r] = loss(
                read(x, (i, t, k)), largest[r], total[r], shifts[k - a], weights[r],
                certain, spread, all_weights,
            )  # fmt: skip


@serial
def _write_gradients(x, gx, largest, scale, even, w):
    for k in range(x.size):
        write(gx, k, share(read(x, k), largest[k], scale[k]) - even[k] * w)


@serial
def _gradient_tile(x, same, gx, i, a, b, more):
    target, weight, ignore, certain, spread, all_weights, above, each, largest, total = more
    first = i * x.shape[2]
    point, even, scale = np.empty(b - a, T), np.empty(b - a, T), np.empty(b - a, T)
    for k in range(b - a):
        r = first + a + k
        t = target[r]
        point[k], even[k], scale[k] = T(0), T(0), T(np.nan)
        if t >= 0 and t < x.shape[1] and t != ignore:
            w = weight[t] if weight.size > 0 else T(1)
            point[k], even[k], scale[k] = distribution(
                above[r * each], w, total[r], certain, spread, all_weights
            )
    tops = largest[first + a : first + b]
    for j in range(x.shape[1]):
        w = weight[j] if weight.size > 0 else T(1)
        _write_gradients(x[i, j, a:b], gx[i, j, a:b], tops, scale, even, w)
    for k in range(b - a):
        t = target[first + a + k]
        if t == ignore:
            for j in range(x.shape[1]):
                write(gx, (i, j, a + k), T(0))
        elif t >= 0 and t < x.shape[1]:
            w = weight[t] if weight.size > 0 else T(1)
            e = share(read(x, (i, t, a + k)), tops[k], scale[k])
            write(gx, (i, t, a + k), e - (even[k] * w + point[k]))


# -- all rows -------------------------------------------------------------------------------------


@serial
def _add_up(losses, weights, mean, y, counted):
    total, weight = np.float64(0), np.float64(0)
    for i in range(losses.size):
        total += np.float64(losses[i])
        weight += np.float64(weights[i])
    counted[()] = T(weight)
    y[()] = T(total / weight) if mean else T(total)


@serial
def _divide(g, counted, above):
    above[0] = g[0] / T(counted[()])


_losses = Loops(_loss_row, _loss_tile)
_gradients = Loops(_gradient_row, _gradient_tile)

# -- what the backend calls -----------------------------------------------------------------------


def _told(
    input: Array, target: Array, weight: Array | None, ignore_index: int, label_smoothing: float
) -> tuple[Any, ...]:
    """What the functions of rows and tiles are told of the targets, beside the logits."""
    numbers = _numbers(input.dtype, input.shape[1], ignore_index, label_smoothing)
    if target.ndim != 1 or target.dtype != np.int64 or not target.flags.c_contiguous:
        plain = target.dtype == np.int64 and target.flags.c_contiguous
        target = (target if plain else copied(target, np.int64)).reshape(-1)
    if weight is None:
        return target, *numbers
    spoil("weights of classes, which are added up")
    none, *others, classes = numbers
    weight = np.ascontiguousarray(weight, none.dtype)
    return target, weight, *others, weight.sum() if weight.size else classes


@lru_cache(256)
def _numbers(dtype: Any, classes: int, ignore_index: int, label_smoothing: float) -> Any:
    """What is told where there are no weights, in the type that is computed in."""
    wide = np.dtype(arithmetic(numpy_storage(dtype))).type
    certain, spread = smoothing(label_smoothing, classes)
    return np.empty(0, wide), np.int64(ignore_index), wide(certain), wide(spread), wide(classes)


@replayable
def class_cross_entropy(
    m: Backend,
    input: Array,
    target: Array,
    weight: Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Array, ...]:
    """The loss; each row's greatest logit and sum of exponentials; the weight of all targets."""
    told = _told(input, target, weight, ignore_index, label_smoothing)
    rows = told[0].size
    losses, largest, total, weights = of_rows = np.empty((4, rows), told[1].dtype)
    _losses(1, input, more=(*told, *of_rows), result=False)
    y, counted = np.empty((), losses.dtype), np.empty((), losses.dtype)
    call(_add_up[losses.dtype.name], losses, weights, reduction == "mean", y, counted)
    if reduction == "none":
        y = losses.reshape(target.shape)
    y = y if y.dtype == input.dtype else copied(y, input.dtype)
    if target.ndim != 1:
        largest, total = largest.reshape(target.shape), total.reshape(target.shape)
    return y, largest, total, counted


@replayable
def class_cross_entropy_backward(
    m: Backend,
    input: Array,
    g: Array,
    target: Array,
    weight: Array | None,
    largest: Array,
    total: Array,
    counted: Array,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Array:
    """The gradient of the logits."""
    told = _told(input, target, weight, ignore_index, label_smoothing)
    above = g if g.dtype == told[1].dtype else copied(g, told[1].dtype)
    above, largest, total = [
        (x if x.flags.c_contiguous else copied(x)).reshape(-1) for x in (above, largest, total)
    ]
    if reduction == "mean":
        above, undivided = np.empty(1, above.dtype), above
        call(_divide[above.dtype.name], undivided, counted, above)
    each = np.int64(reduction == "none")
    return _gradients(1, input, more=(*told, above, each, largest, total))


def _refuse(
    m: Backend,
    input: Any,
    target: Any,
    weight: Any = None,
    ignore_index: Any = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> str | None:
    for x in (input, target) if weight is None else (input, target, weight):
        if not isinstance(x, np.ndarray):
            return f"a {type(x).__name__} among the operands; kernels take arrays"
    if not numpy_storage(input.dtype):
        return f"no kernel for {input.dtype}"
    if weight is not None and not numpy_storage(weight.dtype):
        return f"weights of {weight.dtype}"
    return mismatch(input, target, weight, ignore_index)


def _refuse_backward(
    m: Backend, input: Any, g: Any, target: Any, weight: Any, largest: Any, total: Any,
    counted: Any, ignore_index: Any, reduction: str, label_smoothing: float,
) -> str | None:  # fmt: skip
    shape = target.shape if reduction == "none" else ()
    if not isinstance(g, np.ndarray) or g.shape != shape or not numpy_storage(g.dtype):
        return f"a gradient that is not an array of floats of shape {shape}"
    return _refuse(m, input, target, weight, ignore_index)


KERNELS = {
    "class_cross_entropy": Kernel(class_cross_entropy, LABEL, _refuse),
    "class_cross_entropy_backward": Kernel(class_cross_entropy_backward, LABEL, _refuse_backward),
}
