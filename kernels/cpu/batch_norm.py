"""Batch normalisation: what shares a mean is a channel of all samples.

Where a channel's elements lie in a row, sample by sample, its *segments* are read as rows are.
Where the channels lie side by side, (batch, channels) or channels last, they are *columns*: some
rows of them are read several times, from the cache. Either way parts have moments of their own,
which are put together in order: results are the same bit for bit from run to run and on any number
of threads.
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
from gpugrad.kernels.cpu.compile import numpy_storage, parallel, serial
from gpugrad.kernels.cpu.elementwise import LABEL, refuse_arrays
from gpugrad.kernels.cpu.norm import BLOCK, folded, kind_of, matrix, refuse_parameters, vector
from gpugrad.kernels.cpu.rows import (
    alone,
    row_moments,
    scale_segments,
    segment_gradients,
    segment_sums,
)
from gpugrad.kernels.moments import difference, from_mean, rounded_off
from gpugrad.kernels.template import T, read, write

Array = np.ndarray[Any, Any]

#: Elements of columns that a thread takes at a time, and rows at least.
LOT, ROWS = 32768, 16

#: Columns that stand side by side at least, where several rows can: loops are long enough then.
WIDTH = 256


# -- segments -------------------------------------------------------------------------------------


@parallel
def _segment_moments(x, mean, rest, var):
    rows, n = x.shape
    lot = max(1, BLOCK // n)
    for block in prange((rows + lot - 1) // lot):
        i = block * lot
        k = min(i + lot, rows)
        row_moments(x[i:k], mean[i:k], rest[i:k], var[i:k])


@parallel
def _scale_segments(x, mean, rest, rstd, weight, bias, y):
    rows, n = x.shape
    lot = max(1, BLOCK // n)
    for block in prange((rows + lot - 1) // lot):
        i = block * lot
        k = min(i + lot, rows)
        scale_segments(x[i:k], i, 1, mean, rest, rstd, weight, bias, y[i:k])


@parallel
def _segment_sums(g, x, mean, rest, rstd, sums, products):
    rows, n = x.shape
    lot = max(1, BLOCK // n)
    for block in prange((rows + lot - 1) // lot):
        i = block * lot
        k = min(i + lot, rows)
        segment_sums(g[i:k], x[i:k], i, 1, mean, rest, rstd, sums[i:k], products[i:k])


@parallel
def _segment_gradients(
    g, x, mean, rest, rstd, weight, level,
    slope, gx,
):  # fmt: skip
    rows, n = x.shape
    lot = max(1, BLOCK // n)
    for block in prange((rows + lot - 1) // lot):
        i = block * lot
        k = min(i + lot, rows)
        segment_gradients(
            g[i:k], x[i:k], i, 1, mean, rest, rstd, weight, level, slope, gx[i:k], gx[i:k]
        )  # fmt: skip


_GRADIENTS = _segment_gradients.bind(segment_gradients=segment_gradients.bind(plus=alone))


# -- columns --------------------------------------------------------------------------------------


@serial
def column_moments(x, mean, rest, var):
    """Mean, what rounding left of it, and variance of each column."""
    rows = x.shape[0]
    first = x[0]
    for j in range(mean.size):
        mean[j] = T(0)
        var[j] = T(0)
    for i in range(rows):
        row = x[i]
        for j in range(mean.size):
            mean[j] += difference(read(row, j), read(first, j))
    for j in range(mean.size):
        start = read(first, j)
        offset = mean[j] / T(rows)
        mean[j] = start + offset
        rest[j] = rounded_off(start, offset, mean[j])
    for i in range(rows):
        row = x[i]
        for j in range(mean.size):
            d = from_mean(read(row, j), mean[j], rest[j])
            var[j] += d * d
    for j in range(mean.size):
        var[j] /= T(rows)


@serial
def scale_columns(x, mean, rest, factor, bias, y):
    """The result of some rows."""
    for i in range(x.shape[0]):
        row, out = x[i], y[i]
        for j in range(row.size):
            write(out, j, from_mean(read(row, j), mean[j], rest[j]) * factor[j] + bias[j])


@serial
def column_sums(g, x, mean, rest, sums, products):
    """Of each column, the sum of `g`, and of `g` times the distance from the mean."""
    for j in range(sums.size):
        sums[j] = T(0)
        products[j] = T(0)
    for i in range(x.shape[0]):
        up, row = g[i], x[i]
        for j in range(sums.size):
            d = read(up, j)
            sums[j] += d
            products[j] += d * from_mean(read(row, j), mean[j], rest[j])


@serial
def column_gradients(
    g, x, mean, rest, factor, level, slope,
    gx,
):  # fmt: skip
    """The gradient of some rows."""
    for i in range(x.shape[0]):
        up, row, out = g[i], x[i], gx[i]
        for j in range(row.size):
            d = from_mean(read(row, j), mean[j], rest[j])
            write(out, j, read(up, j) * factor[j] - level[j] - d * slope[j])


@parallel
def _column_moments(x, mean, rest, var, lot):
    for part in prange(mean.shape[0]):
        i = part * lot
        column_moments(x[i : i + lot], mean[part], rest[part], var[part])


@parallel
def _scale_columns(x, mean, rest, factor, bias, y, lot):
    for part in prange((x.shape[0] + lot - 1) // lot):
        i = part * lot
        scale_columns(x[i : i + lot], mean, rest, factor, bias, y[i : i + lot])


@parallel
def _column_sums(g, x, mean, rest, sums, products, lot):
    for part in prange(sums.shape[0]):
        i = part * lot
        column_sums(g[i : i + lot], x[i : i + lot], mean, rest, sums[part], products[part])


@parallel
def _column_gradients(
    g, x, mean, rest, factor, level, slope,
    gx, lot,
):  # fmt: skip
    for part in prange((x.shape[0] + lot - 1) // lot):
        i = part * lot
        k = i + lot
        column_gradients(g[i:k], x[i:k], mean, rest, factor, level, slope, gx[i:k])


@serial
def _together(mean, rest, var, counts, middle, left, total):
    """Moments of all parts from those of each, which has so many elements (Chan et al., 1979)."""
    whole = counts.sum()
    first = np.zeros(middle.size)
    second = np.zeros(middle.size)
    for i in range(mean.shape[0]):
        a, b, share = mean[i], rest[i], counts[i] / whole
        for j in range(middle.size):
            first[j] += share * (np.float64(a[j]) + np.float64(b[j]))
    for i in range(mean.shape[0]):
        a, b, c, share = mean[i], rest[i], var[i], counts[i] / whole
        for j in range(middle.size):
            d = (np.float64(a[j]) - first[j]) + np.float64(b[j])
            second[j] += share * (np.float64(c[j]) + d * d)
    for j in range(middle.size):
        middle[j] = T(first[j])
        left[j] = T(first[j] - np.float64(middle[j]))
        total[j] = T(second[j])


# -- for Python -----------------------------------------------------------------------------------


class _Batch:
    """How an operand of shape (batch, channels, ...) is cut.

    As columns, `side` of them stand for each channel, in every row of `rows`, of which a thread
    takes `lot` at a time.
    """

    def __init__(self, x: Array) -> None:
        self.shape = x.shape
        self.channels = x.shape[1]
        self.columns = prod(x.shape[2:]) == 1 or (
            not x.flags.c_contiguous and np.moveaxis(x, 1, -1).flags.c_contiguous
        )
        self.kind = kind_of(x)
        self.storage = numpy_storage(x.dtype)
        self.count = x.size // self.channels  # elements that share a mean
        self.side = 1
        while self.side * self.channels < WIDTH and self.count % (2 * self.side) == 0:
            self.side *= 2
        self.rows = self.count // self.side
        self.lot = max(ROWS, LOT // (self.side * self.channels))

    def seen(self, x: Array) -> Array:
        """`x`, of this shape, as columns or as segments."""
        if self.columns:
            return matrix(np.moveaxis(x, 1, -1), self.rows, self.side * self.channels)
        return matrix(x, self.shape[0] * self.channels, -1)

    def fresh(self, dtype: Any) -> tuple[Array, Array]:
        """Memory for a result, which lies as the operand does, and how kernels see it."""
        if not self.columns:
            y = empty(self.shape, dtype)
        else:
            y = np.moveaxis(empty((self.shape[0], *self.shape[2:], self.channels), dtype), -1, 1)
        return y, self.seen(y)

    def parts(self, count: int) -> tuple[Array, ...]:
        """Memory for `count` numbers of every part: a column of a lot, or a segment."""
        if self.columns:
            shape = (-(-self.rows // self.lot), self.side * self.channels)
        else:
            shape = (self.shape[0], self.channels)
        return tuple(np.empty((count, *shape), self.kind))

    def aside(self, *values: Array) -> list[Array]:
        """Numbers of channels as numbers of columns."""
        return [np.tile(v, self.side) for v in values]

    def moments(self, x: Array) -> tuple[Array, ...]:
        mean, rest, var = self.parts(3)
        if self.columns:
            _column_moments[self.storage](self.seen(x), mean, rest, var, self.lot)
            counts = np.full(len(mean), float(self.lot))
            counts[-1] = self.rows - self.lot * (len(mean) - 1)
            counts = np.repeat(counts, self.side)
        else:
            _segment_moments[self.storage](self.seen(x), *map(np.ravel, (mean, rest, var)))
            counts = np.ones(self.shape[0])
        found = np.empty((3, self.channels), self.kind)
        each = (v.reshape(-1, self.channels) for v in (mean, rest, var))
        _together[self.kind.name](*each, counts, *found)
        return tuple(found)

    def scaled(
        self, x: Array, mean: Array, rest: Array, rstd: Array, weight: Array | None,
        bias: Array | None,
    ) -> Array:  # fmt: skip
        """The result."""
        y, out = self.fresh(x.dtype)
        if self.columns:
            factor = rstd if weight is None else rstd * weight.astype(self.kind)
            shift = np.zeros_like(rstd) if bias is None else bias.astype(self.kind)
            values = self.aside(mean, rest, factor, shift)
            _scale_columns[self.storage](self.seen(x), *values, out, self.lot)
        else:
            w = vector(weight, self.channels, x.dtype, 1.0)
            b = vector(bias, self.channels, x.dtype, 0.0)
            _scale_segments[self.storage](self.seen(x), mean, rest, rstd, w, b, out)
        return y

    def sums(
        self, g: Array, x: Array, mean: Array, rest: Array, rstd: Array
    ) -> tuple[Array, Array]:
        """Of each channel, the sum of `g`, and of `g` times what was normalised."""
        sums, products = self.parts(2)
        if self.columns:
            values = self.aside(mean, rest)
            _column_sums[self.storage](
                self.seen(g), self.seen(x), *values, sums, products, self.lot
            )
        else:
            _segment_sums[self.storage](
                self.seen(g), self.seen(x), mean, rest, rstd, np.ravel(sums), np.ravel(products)
            )
        total, product = (folded(v.reshape(-1, self.channels)) for v in (sums, products))
        return total, product * rstd if self.columns else product

    def gradient(
        self, g: Array, x: Array, mean: Array, rest: Array, rstd: Array, weight: Array | None,
        level: Array, slope: Array,
    ) -> Array:  # fmt: skip
        """rstd·(weight·g − level − slope·y), y being what was normalised."""
        gx, out = self.fresh(x.dtype)
        if self.columns:
            factor = rstd if weight is None else rstd * weight.astype(self.kind)
            values = self.aside(mean, rest, factor, rstd * level, rstd * rstd * slope)
            _column_gradients[self.storage](self.seen(g), self.seen(x), *values, out, self.lot)
        else:
            w = vector(weight, self.channels, x.dtype, 1.0)
            _GRADIENTS[self.storage](
                self.seen(g), self.seen(x), mean, rest, rstd, w, level, slope, out
            )
        return gx


# -- operations -----------------------------------------------------------------------------------


def batch_moments(m: Backend, x: Array) -> tuple[Array, ...]:
    """Mean, what its rounding left of it, and variance of each channel."""
    if x.size == 0:
        return tuple(np.zeros((3, x.shape[1]), kind_of(x)))
    return _Batch(x).moments(x)


def _rstd(var: Array, eps: float) -> Array:
    out: Array = 1.0 / np.sqrt(var + var.dtype.type(eps))
    return out


def _training(
    m: Backend, x: Array, weight: Array | None = None, bias: Array | None = None,
    eps: float = 1e-5, moments: Sequence[Array] | None = None,
) -> tuple[Array, ...]:  # fmt: skip
    mean, rest, var = batch_moments(m, x) if moments is None else moments
    statistics = mean, rest, _rstd(var, eps)
    y = _Batch(x).scaled(x, *statistics, weight, bias) if x.size else empty(x.shape, x.dtype)
    return y, *(v.reshape(-1, *(1,) * (x.ndim - 2)) for v in statistics)


def _backward(
    m: Backend, g: Array, x: Array, weight: Array | None, statistics: Sequence[Array] | None,
    eps: float, needs: Sequence[bool],
) -> tuple[Array | None, ...]:  # fmt: skip
    if statistics is None:
        mean, rest, var = batch_moments(m, x)
        statistics = mean, rest, _rstd(var, eps)
    mean, rest, rstd = (v.reshape(-1) for v in statistics)
    gx = None
    if x.size == 0:
        sums = products = np.zeros(x.shape[1])
        gx = empty(x.shape, x.dtype)
    else:
        cut = _Batch(x)
        sums, products = cut.sums(g, x, mean, rest, rstd)
        if needs[0]:
            share = (1.0 if weight is None else weight.astype(cut.kind)) / cut.kind.type(cut.count)
            gx = cut.gradient(g, x, mean, rest, rstd, weight, share * sums, share * products)
    found = (gx, products.astype(x.dtype), sums.astype(x.dtype))
    return tuple(v if need else None for v, need in zip(found, needs))


def _given(x: Array, mean: Array, var: Array, eps: float) -> tuple[Array, Array, Array]:
    kind = kind_of(x)
    return mean.astype(kind), np.zeros(mean.shape, kind), _rstd(var.astype(kind), eps)


def _inference(
    m: Backend, x: Array, mean: Array, var: Array, weight: Array | None = None,
    bias: Array | None = None, eps: float = 1e-5,
) -> Array:  # fmt: skip
    if x.size == 0:
        return empty(x.shape, x.dtype)
    return _Batch(x).scaled(x, *_given(x, mean, var, eps), weight, bias)


def _inference_backward(
    m: Backend, g: Array, x: Array, mean: Array, var: Array, weight: Array | None, eps: float,
    needs: Sequence[bool],
) -> tuple[Array | None, ...]:  # fmt: skip
    kind = kind_of(x)
    gx, sums, products = None, *np.zeros((2, x.shape[1]), kind)
    statistics = _given(x, mean, var, eps)
    rstd = statistics[-1]
    if x.size == 0:
        gx = empty(x.shape, x.dtype)
    else:
        cut = _Batch(x)
        if needs[0]:
            gx = cut.gradient(g, x, *statistics, weight, np.zeros_like(rstd), np.zeros_like(rstd))
        if any(needs[1:]):
            sums, products = cut.sums(g, x, *statistics)
    factor = rstd if weight is None else rstd * weight.astype(kind)
    found = (
        gx,
        (-factor * sums).astype(mean.dtype),
        (products * factor * rstd * kind.type(-0.5)).astype(var.dtype),
        products.astype(x.dtype),
        sums.astype(x.dtype),
    )
    return tuple(v if need else None for v, need in zip(found, needs))


# -- what they do not take ------------------------------------------------------------------------


def _refuse(x: Any, parameters: Sequence[Any] = (), given: Sequence[Any] = ()) -> str | None:
    why = refuse_arrays(x)
    if why:
        return why
    if x.ndim < 2:
        return f"no axis of channels in the shape {x.shape}"
    for v in given:
        if not isinstance(v, np.ndarray) or not numpy_storage(v.dtype) or v.shape != x.shape[1:2]:
            return f"moments that are not {x.shape[1]} numbers of a kernel's dtype"
    return refuse_parameters(x, x.shape[1:2], parameters)


def _refuse_forward(m: Backend, x: Any, *parameters: Any, **options: Any) -> str | None:
    return _refuse(x, parameters)


def _refuse_backward(m: Backend, g: Any, x: Any, weight: Any, *more: Any) -> str | None:
    return refuse_arrays(g, x) or _refuse(x, (weight,))


def _refuse_inference(
    m: Backend, x: Any, mean: Any, var: Any, *parameters: Any, **options: Any
) -> str | None:
    return _refuse(x, parameters, (mean, var))


def _refuse_inference_backward(
    m: Backend, g: Any, x: Any, mean: Any, var: Any, weight: Any, *more: Any
) -> str | None:
    return refuse_arrays(g, x) or _refuse(x, (weight,), (mean, var))


KERNELS = {
    "batch_moments": Kernel(batch_moments, LABEL, _refuse_forward),
    "batch_norm_training": Kernel(_training, LABEL, _refuse_forward),
    "batch_norm_backward": Kernel(_backward, LABEL, _refuse_backward),
    "batch_norm_inference": Kernel(_inference, LABEL, _refuse_inference),
    "batch_norm_inference_backward": Kernel(_inference_backward, LABEL, _refuse_inference_backward),
}
