"""Loops over rows: moments, what is normalised by them, and the gradients of that.

A *row* is what shares a mean. It may consist of *segments*, one for each channel. A function takes
some rows, few enough to stay in a thread's nearest cache, and what it finds there next to nothing
costs to read again; `norm.py` and `batch_norm.py` hand them out to threads.

Beside a large mean, a small deviation would be lost when the mean is rounded: distances are summed
from the first element, and the mean is kept as a sum of two numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpugrad.kernels.cpu.compile import serial
from gpugrad.kernels.moments import difference, from_mean, gradient, rounded_off, scaled
from gpugrad.kernels.template import Placeholder, T, device, read, sqrt, write

Array = np.ndarray[Any, Any]

#: Elements that are added up in the type that is computed in; sums of so many in double precision.
PIECE = 4096

centre: Any = Placeholder("centre")
level_of: Any = Placeholder("level_of")
collect: Any = Placeholder("collect")
plus: Any = Placeholder("plus")


# -- one element ----------------------------------------------------------------------------------
# What is common to all targets is in `kernels/moments.py`.


@device
def from_zero(x, mean, rest):
    """Stands for :func:`from_mean` where there is no mean."""
    return x


@device
def as_it_is(level):
    """A mean gradient where a mean was taken off."""
    return level


@device
def as_zero(level):
    """A mean gradient where none was."""
    return T(0)


@device
def alone(x, also, j):
    """A gradient to which nothing is added."""
    return x


@device
def with_more(x, also, j):
    """A gradient and what reaches the operand by another way."""
    return x + read(also, j)


@device
def to_none(weight, bias, j, g, y):
    """Gradients of neither weight nor bias."""


@device
def to_weight(weight, bias, j, g, y):
    """That of the weight: what an element adds to it."""
    weight[j] += g * y


@device
def to_bias(weight, bias, j, g, y):
    """That of the bias."""
    bias[j] += g


@device
def to_both(weight, bias, j, g, y):
    """Both."""
    weight[j] += g * y
    bias[j] += g


# -- rows -----------------------------------------------------------------------------------------


@serial
def add_rows(x, residual, total):
    """`total` = `x` + `residual`."""
    for i in range(x.shape[0]):
        a, b, out = x[i], residual[i], total[i]
        for j in range(a.size):
            write(out, j, read(a, j) + read(b, j))


@serial
def keep_rows(x, residual, total):
    """Nothing is added: `total` is `x`."""


@serial
def row_moments(x, mean, rest, var):
    """Mean, what rounding left of it, and variance of each row."""
    n = x.shape[1]
    for i in range(x.shape[0]):
        row = x[i]
        first = read(row, 0)
        total = 0.0
        for start in range(0, n, PIECE):
            part = T(0)
            piece = row[start : start + PIECE]
            for j in range(piece.size):
                part += difference(read(piece, j), first)
            total += part
        offset = total / n
        middle = T(first + offset)
        left = T(rounded_off(np.float64(first), offset, np.float64(middle)))
        mean[i] = middle
        rest[i] = left
        total = 0.0
        for start in range(0, n, PIECE):
            part = T(0)
            piece = row[start : start + PIECE]
            for j in range(piece.size):
                d = from_mean(read(piece, j), middle, left)
                part += d * d
            total += part
        var[i] = T(total / n)


@serial
def row_mean_squares(x, mean, rest, var):
    """The mean square of each row, for :func:`row_moments` where there is no mean."""
    n = x.shape[1]
    for i in range(x.shape[0]):
        row = x[i]
        total = 0.0
        for start in range(0, n, PIECE):
            part = T(0)
            piece = row[start : start + PIECE]
            for j in range(piece.size):
                d = read(piece, j)
                part += d * d
            total += part
        var[i] = T(total / n)


@serial
def invert(var, eps):
    """1/sqrt(var + eps), in place."""
    for i in range(var.size):
        var[i] = T(1) / sqrt(var[i] + eps)


@serial
def scale_rows(x, mean, rest, rstd, weight, bias, y):
    """The result of each row."""
    for i in range(x.shape[0]):
        row, out = x[i], y[i]
        middle, left, factor = mean[i], rest[i], rstd[i]
        for j in range(row.size):
            z = scaled(centre(read(row, j), middle, left), factor, read(weight, j), read(bias, j))
            write(out, j, z)


@serial
def row_gradients(
    g, x, weight, mean, rest, rstd, also,
    gx, weights, biases,
):  # fmt: skip
    """Gradients of some rows, and what they add to those of weight and bias."""
    n = x.shape[1]
    for i in range(x.shape[0]):
        up, row = g[i], x[i]
        middle, left, factor = mean[i], rest[i], rstd[i]
        level = T(0)
        slope = T(0)
        for j in range(n):
            y = centre(read(row, j), middle, left) * factor
            d = read(up, j)
            collect(weights, biases, j, d, y)
            d *= read(weight, j)
            level += d
            slope += d * y
        if gx.shape[0] > 0:
            level = level_of(level) / T(n)
            slope /= T(n)
            out, more = gx[i], also[i]
            for j in range(n):
                y = centre(read(row, j), middle, left) * factor
                d = gradient(read(up, j), read(weight, j), y, level, slope, factor)
                write(out, j, plus(d, more, j))


@serial
def fold_rows(parts, out):
    """The sum of the rows of `parts`, in double precision."""
    total = np.zeros(out.size)
    for i in range(parts.shape[0]):
        part = parts[i]
        for j in range(out.size):
            total[j] += part[j]
    for j in range(out.size):
        write(out, j, T(total[j]))


# -- segments -------------------------------------------------------------------------------------
# Segment q belongs to channel q % channels; its moments are number q // per % count.


@serial
def scale_segments(
    x, first, per, mean, rest, rstd, weight,
    bias, y,
):  # fmt: skip
    """Segments from number `first` on."""
    for i in range(x.shape[0]):
        row, out = x[i], y[i]
        s, c = (first + i) // per % rstd.size, (first + i) % weight.size
        middle, left = mean[s], rest[s]
        factor, w, b = rstd[s], read(weight, c), read(bias, c)
        for j in range(row.size):
            write(out, j, scaled(from_mean(read(row, j), middle, left), factor, w, b))


@serial
def segment_sums(
    g, x, first, per, mean, rest, rstd, sums,
    products,
):  # fmt: skip
    """Of each segment, the sum of `g`, and of `g` times what was normalised."""
    for i in range(x.shape[0]):
        up, row = g[i], x[i]
        s = (first + i) // per % rstd.size
        middle, left = mean[s], rest[s]
        total = T(0)
        product = T(0)
        for j in range(row.size):
            d = read(up, j)
            total += d
            product += d * from_mean(read(row, j), middle, left)
        sums[i] = total
        products[i] = product * rstd[s]


@serial
def group_levels(
    sums, products, first, per, weight, count, level,
    slope,
):  # fmt: skip
    """What is taken off the gradient of each group: its mean, and its share of the result."""
    for i in range(level.size):
        a = T(0)
        b = T(0)
        for q in range(i * per, i * per + per):
            w = read(weight, (first + q) % weight.size)
            a += w * sums[q]
            b += w * products[q]
        level[i] = a / T(count)
        slope[i] = b / T(count)


@serial
def segment_gradients(
    g, x, first, per, mean, rest, rstd, weight,
    level, slope, also, gx,
):  # fmt: skip
    """The gradient of segments from number `first` on."""
    for i in range(x.shape[0]):
        up, row, more, out = g[i], x[i], also[i], gx[i]
        s, c = (first + i) // per % rstd.size, (first + i) % weight.size
        middle, left, factor = mean[s], rest[s], rstd[s]
        w, a, b = read(weight, c), level[s], slope[s] * factor
        for j in range(row.size):
            d = from_mean(read(row, j), middle, left)
            write(out, j, plus(gradient(read(up, j), w, d, a, b, factor), more, j))
