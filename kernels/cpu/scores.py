"""What attention does between its products: to a tile of scores, and to a block of queries.

A tile holds the scores of some keys, down, for some queries, across. Operands of four axes are
given by an address and strides in elements, without the last: that is 1.
"""

from __future__ import annotations

import numpy as np

from gpugrad.kernels.cpu.compile import serial
from gpugrad.kernels.cpu.dropout import SPARE, _limit, _words
from gpugrad.kernels.cpu.memory import pointer, size_of
from gpugrad.kernels.cpu.microkernel import panel
from gpugrad.kernels.template import T, device, exp, log, where

#: What a mask is: nothing, which keys are seen, or what is added.
NONE, SEEN, ADDED = range(3)


# -- where things are -----------------------------------------------------------------------------


@device
def row_at(x, b, h, i):
    """The address of a row."""
    return x[0] + (b * x[1] + h * x[2] + i * x[3]) * size_of(T(0))


@serial
def turn(address, row, n, features, factor, packed):
    """Rows times a factor, as panels of columns for :func:`product`."""
    width = panel()
    for i in range(n):
        x = pointer(address + i * row * size_of(T(0)), T(0))
        start = i // width * width * features + i % width
        for d in range(features):
            packed[start + d * width] = x[d] * factor


@serial
def clear(address, row, n, features):
    """Rows of zeros."""
    for i in range(n):
        x = pointer(address + i * row * size_of(T(0)), T(0))
        for d in range(features):
            x[d] = T(0)


# -- a tile of scores, keys down and queries across -----------------------------------------------


@serial
def hide(tile, m, n, distance):
    """Scores of keys behind their query; the first key lies `distance` behind the first query."""
    for j in range(max(0, 1 - distance), m):
        row = tile[j]
        for k in range(min(n, j + distance)):
            row[k] = T(-np.inf)


@serial
def mask_seen(tile, m, n, address, down, right):
    """Scores of keys that a mask hides; its strides count elements."""
    for k in range(n):
        seen = pointer(address + k * down, np.uint8(0))
        for j in range(m):  # without a branch: what a mask hides cannot be foretold
            tile[j, k] = where(seen[j * right] != 0, tile[j, k], T(-np.inf))


@serial
def mask_added(tile, m, n, address, down, right):
    """Scores and what a mask adds to them."""
    for k in range(n):
        more = pointer(address + k * down * size_of(T(0)), T(0))
        for j in range(m):
            tile[j, k] += more[j * right]


@device
def masked(tile, m, n, mask, b, h, i, j, is_causal):
    """Apply mask and causality to the scores of `m` keys from `j` on, `n` queries from `i` on."""
    kind, address, outer, inner, down, right = mask
    first = b * outer + h * inner + i * down + j * right
    if kind == SEEN:
        mask_seen(tile, m, n, address + first, down, right)
    elif kind == ADDED:
        mask_added(tile, m, n, address + first * size_of(T(0)), down, right)
    if is_causal and j + m - 1 > i:
        hide(tile, m, n, j - i)


@serial
def draw_kept(kept, m, n, start, keys, drop, factor):
    """What dropout multiplies the shares of a tile with, whose first is number `start` of all."""
    count, o0, o1, s0, s1 = drop
    limit = _limit(count)
    room = np.empty(m + SPARE, np.uint32)
    for k in range(n):
        words = _words(room, start + k * keys, count, (o0, o1, s0, s1))
        for j in range(m):
            kept[j, k] = where(words[j] > limit, factor, T(0))


@serial
def soften(tile, m, n, top, base, total, shrunk):
    """Scores to exponentials relative to the greatest so far, which `top` is before and after.

    `total` is their sum, and `shrunk` what sums from before are to be multiplied with.
    """
    for k in range(n):
        base[k] = top[k]
    for j in range(m):
        row = tile[j]
        for k in range(n):
            base[k] = where(row[k] > base[k], row[k], base[k])
    for k in range(n):
        best = base[k]
        # Where nothing has been seen yet, there is nothing to be relative to.
        base[k] = where(best == T(-np.inf), T(0), best)
        shrunk[k] = exp(top[k] - base[k])
        top[k] = best
    sums = np.zeros(n, T)
    for j in range(m):
        row = tile[j]
        for k in range(n):
            e = exp(row[k] - base[k])
            row[k] = e
            sums[k] += e
    for k in range(n):
        total[k] = total[k] * shrunk[k] + sums[k]


@serial
def thin(tile, kept, m, n):
    """Shares after dropout."""
    for j in range(m):
        row, factor = tile[j], kept[j]
        for k in range(n):
            row[k] *= factor[k]


@serial
def scale_rows(x, n, features, factor):
    """Rows times a factor each."""
    for i in range(n):
        row, f = x[i], factor[i]
        for d in range(features):
            row[d] *= f


@serial
def differentiate(tile, other, m, n, lse, level, scale):
    """Scores to shares, and gradients of shares to those of products, in place."""
    for j in range(m):
        row, up = tile[j], other[j]
        for k in range(n):
            p = exp(row[k] - lse[k])
            row[k] = p
            up[k] = p * (up[k] - level[k]) * scale


@serial
def differentiate_thinned(tile, other, kept, m, n, lse, level, scale):
    """:func:`differentiate` where shares were dropped."""
    for j in range(m):
        row, up, factor = tile[j], other[j], kept[j]
        for k in range(n):
            p = exp(row[k] - lse[k])
            row[k] = p * factor[k]
            up[k] = p * (up[k] * factor[k] - level[k]) * scale


# -- rows of queries -------------------------------------------------------------------------------


@serial
def finish(acc, n, out, top, total, address, row, sums):
    """Write results, and the logarithms of the sums of exponentials."""
    for i in range(n):
        y = pointer(address + i * row * size_of(T(0)), T(0))
        # A query that sees nothing gets zeros; from infinity, its shares are found to be zeros.
        blind = total[i] == T(0)
        factor = T(0) if blind else T(1) / total[i]
        x = acc[i]
        for d in range(out):
            y[d] = x[d] * factor
        sums[i] = T(np.inf) if blind else top[i] + log(total[i])


@serial
def levels(g, y, n, out, level):
    """Of each query, the sum of its result times the gradient of that."""
    for i in range(n):
        a = pointer(g[0] + i * g[1] * size_of(T(0)), T(0))
        b = pointer(y[0] + i * y[1] * size_of(T(0)), T(0))
        total = T(0)
        for d in range(out):
            total += a[d] * b[d]
        level[i] = total
