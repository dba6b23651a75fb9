"""Layer, RMS, group and batch normalisation, forward and backward.

What shares a mean is a row of a matrix, and a *team* of threads has it: a warp a short one, a block
a long one. It reads the row three times, of which two find it in the cache. Over groups of channels
and over a batch, a row consists of *segments*, one for each channel of each sample: these are what
is scaled, each by two numbers.

Gradients of weight and bias are sums along columns, which blocks take over tiles of the matrix, and
a second kernel adds up. There are no atomic additions: results are the same bit for bit from run to
run, and on every GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from gpugrad.kernels.cuda.blockwide import add
from gpugrad.kernels.cuda.language import (
    LANES,
    Elements,
    Int,
    Kernel,
    Number,
    Size,
    Values,
    cuda,
    device,
    elements_of,
    fold,
    kernel,
    lanes,
    read_pack,
    spread,
    thread,
    threads,
    write_pack,
    zero_pack,
)
from gpugrad.kernels.cuda.launch import Entry, Machine
from gpugrad.kernels.cuda.softmax import TEAMS
from gpugrad.kernels.moments import difference, from_mean, gradient, rounded_off, scaled
from gpugrad.kernels.template import STORAGE, Placeholder, T, read, sqrt, write

#: A pack for each thread of a block.
SHARE = elements_of(Machine.threads)

members: Any = Placeholder("members")
team_sum: Any = Placeholder("team_sum")

# -- elements -------------------------------------------------------------------------------------


@device
def add_offset(total: Any, x: Any, first: Any) -> Any:
    """One more distance from the first element to a sum of them."""
    return total + difference(x, first)


@device
def add_square(total: Any, x: Any, mean: Any, rest: Any) -> Any:
    """One more squared distance from the mean."""
    d = from_mean(x, mean, rest)
    return total + d * d


@device
def add_level(total: Any, g: Any, weight: Any) -> Any:
    """One more element to the sum whose mean is the level: see `gradient`."""
    return total + g * weight


@device
def add_slope(total: Any, g: Any, weight: Any, x: Any, mean: Any, rest: Any, rstd: Any) -> Any:
    """One more to the sum whose mean is the slope."""
    return total + g * weight * (from_mean(x, mean, rest) * rstd)


@device
def add_product(total: Any, g: Any, x: Any, mean: Any, rest: Any, rstd: Any) -> Any:
    """One more to the gradient of the weight."""
    return total + g * (from_mean(x, mean, rest) * rstd)


@device
def scaled_one(x: Any, weight: Any, bias: Any, mean: Any, rest: Any, rstd: Any) -> Any:
    """The result."""
    return scaled(from_mean(x, mean, rest), rstd, weight, bias)


@device
def gradient_one(
    g: Any, weight: Any, x: Any, mean: Any, rest: Any, rstd: Any, level: Any, slope: Any
) -> Any:
    """The gradient."""
    return gradient(g, weight, from_mean(x, mean, rest) * rstd, level, slope, rstd)


offsets_of = fold(add_offset, ".x.")
squares_of = fold(add_square, ".x..")
level_of = fold(add_level, ".xx")
level_of_segment = fold(add_level, ".x.")
slope_of = fold(add_slope, ".xxx...")
product_of = fold(add_product, ".xx...")
add_pack = lanes(add, "xx")
products_pack = lanes(add_product, "xxx...")
scaled_pack = lanes(scaled_one, "xxx...")
scaled_segment = lanes(scaled_one, "x.....")
gradient_pack = lanes(gradient_one, "xxx.....")
gradient_segment = lanes(gradient_one, "x.x.....")

# -- rows -----------------------------------------------------------------------------------------


@device
def row_moments(
    x: Any, start: Any, n: Any, first: Any, count: Any, centred: Any, aligned: Any, lane: Any,
    width: Any, scratch: Any,
) -> Any:  # fmt: skip
    """Mean, its rest and the variance of `n` elements; without a mean, 0, 0 and the mean square.

    Every thread of the block must come here. A pack is always the same thread's.
    """
    mean = T(0)
    rest = T(0)
    if centred != 0:
        total = T(0)
        i = lane * LANES
        while i < n:
            if i + LANES <= n:
                total = offsets_of(total, read_pack(x, start + i, LANES, aligned), first)
            else:
                j = i
                while j < n:
                    total = add_offset(total, read(x, start + j), first)
                    j += 1
            i += width * LANES
        offset = team_sum(total, scratch) / count
        mean = first + offset
        rest = rounded_off(first, offset, mean)
    total = T(0)
    i = lane * LANES
    while i < n:
        if i + LANES <= n:
            total = squares_of(total, read_pack(x, start + i, LANES, aligned), mean, rest)
        else:
            j = i
            while j < n:
                total = add_square(total, read(x, start + j), mean, rest)
                j += 1
        i += width * LANES
    return mean, rest, team_sum(total, scratch) / count


@kernel
def moments_kernel(
    x: Elements, mean: Values, rest: Values, var: Values, eps: Number, count: Number, rows: Size,
    columns: Size, centred: Int, inverse: Int, aligned: Int,
) -> None:  # fmt: skip
    """Of every row; if `inverse`, 1/sqrt(var + eps) in place of the variance."""
    scratch = cuda.shared.array(32, T)
    width = members()
    lane = np.int64(cuda.threadIdx.x & (width - 1))
    teams = cuda.blockDim.x // width
    top = np.int64(cuda.blockIdx.x) * teams
    while top < rows:
        row = top + cuda.threadIdx.x // width
        start = row * columns
        n = columns if row < rows else np.int64(0)
        first = read(x, start) if n > 0 else T(0)
        a, b, c = row_moments(x, start, n, first, count, centred, aligned, lane, width, scratch)
        if lane == 0 and n > 0:
            if centred != 0:
                mean[row] = a
                rest[row] = b
            var[row] = T(1) / sqrt(c + eps) if inverse != 0 else c
        top += np.int64(cuda.gridDim.x) * teams


@kernel
def forward_kernel(
    x: Elements, residual: Elements, total: Elements, weight: Elements, bias: Elements, y: Elements,
    mean: Values, rest: Values, rstd: Values, eps: Number, count: Number, rows: Size, columns: Size,
    centred: Int, joined: Int, aligned: Int,
) -> None:  # fmt: skip
    """Every row of `total`, into which `x` and `residual` are added before if `joined`."""
    scratch = cuda.shared.array(32, T)
    width = members()
    lane = np.int64(cuda.threadIdx.x & (width - 1))
    teams = cuda.blockDim.x // width
    top = np.int64(cuda.blockIdx.x) * teams
    while top < rows:
        row = top + cuda.threadIdx.x // width
        start = row * columns
        n = columns if row < rows else np.int64(0)
        first = read(x, start) if n > 0 else T(0)
        if joined != 0:
            first = first + (read(residual, start) if n > 0 else T(0))
            i = lane * LANES
            while i < n:
                a = read_pack(x, start + i, n - i, aligned)
                b = read_pack(residual, start + i, n - i, aligned)
                write_pack(total, start + i, add_pack(a, b), n - i, aligned)
                i += width * LANES
        middle, left, var = row_moments(
            total, start, n, first, count, centred, aligned, lane, width, scratch
        )
        factor = T(1) / sqrt(var + eps)
        if lane == 0 and n > 0:
            if centred != 0:
                mean[row] = middle
                rest[row] = left
            rstd[row] = factor
        i = lane * LANES
        while i < n:
            z = read_pack(total, start + i, n - i, aligned)
            w = read_pack(weight, i, n - i, aligned)
            b = read_pack(bias, i, n - i, aligned)
            z = scaled_pack(z, w, b, middle, left, factor)
            write_pack(y, start + i, z, n - i, aligned)
            i += width * LANES
        top += np.int64(cuda.gridDim.x) * teams


@kernel
def gradient_kernel(
    g: Elements, x: Elements, weight: Elements, mean: Values, rest: Values, rstd: Values,
    also: Elements, gx: Elements, count: Number, rows: Size, columns: Size, centred: Int,
    joined: Int, aligned: Int,
) -> None:  # fmt: skip
    """The gradient of every row, and that which reaches it by another way if `joined`."""
    scratch = cuda.shared.array(32, T)
    width = members()
    lane = np.int64(cuda.threadIdx.x & (width - 1))
    teams = cuda.blockDim.x // width
    top = np.int64(cuda.blockIdx.x) * teams
    while top < rows:
        row = top + cuda.threadIdx.x // width
        start = row * columns
        n = columns if row < rows else np.int64(0)
        middle = mean[row] if n > 0 and centred != 0 else T(0)
        left = rest[row] if n > 0 and centred != 0 else T(0)
        factor = rstd[row] if n > 0 else T(0)
        level = T(0)
        slope = T(0)
        i = lane * LANES
        while i < n:
            a = read_pack(g, start + i, n - i, aligned)
            b = read_pack(x, start + i, n - i, aligned)
            w = read_pack(weight, i, n - i, aligned)
            level = level_of(level, a, w)
            slope = slope_of(slope, a, w, b, middle, left, factor)
            i += width * LANES
        level = team_sum(level, scratch) / count
        slope = team_sum(slope, scratch) / count
        level = level if centred != 0 else T(0)
        i = lane * LANES
        while i < n:
            a = read_pack(g, start + i, n - i, aligned)
            b = read_pack(x, start + i, n - i, aligned)
            w = read_pack(weight, i, n - i, aligned)
            d = gradient_pack(a, w, b, middle, left, factor, level, slope)
            if joined != 0:
                d = add_pack(d, read_pack(also, start + i, n - i, aligned))
            write_pack(gx, start + i, d, n - i, aligned)
            i += width * LANES
        top += np.int64(cuda.gridDim.x) * teams


@device
def tile_total(share: Any, out: Any, at: Any, left: Any, tile: Any) -> None:
    """The sums of a block's columns, from what its threads have spread out in `share`."""
    here = cuda.threadIdx.x
    width = cuda.blockDim.x
    half = width >> 1
    while half >= tile:
        cuda.syncthreads()
        if here < half:
            j = here
            while j < LANES * width:
                share[j] += share[j + half]
                j += width
        half >>= 1
    if here < tile:
        j = 0
        while j < LANES and j < left:
            out[at + j] = share[j * width + here]
            j += 1
    cuda.syncthreads()


@kernel
def column_sums_kernel(
    g: Elements, x: Elements, mean: Values, rest: Values, rstd: Values, weights: Values,
    biases: Values, rows: Size, columns: Size, tile: Int, chunk: Size, centred: Int, aligned: Int,
) -> None:  # fmt: skip
    """What a chunk of rows adds to the gradients of weight and bias, row `blockIdx.y` of them."""
    share = cuda.shared.array(SHARE, T)
    here = cuda.threadIdx.x
    column = (np.int64(cuda.blockIdx.x) * tile + (here & (tile - 1))) * LANES
    row = cuda.blockIdx.y * chunk + here // tile
    last = (cuda.blockIdx.y + 1) * chunk
    last = last if last < rows else rows
    left = columns - column
    products = zero_pack()
    sums = zero_pack()
    if left > 0:
        while row < last:
            i = row * columns + column
            a = read_pack(g, i, left, aligned)
            b = read_pack(x, i, left, aligned)
            middle = mean[row] if centred != 0 else T(0)
            beyond = rest[row] if centred != 0 else T(0)
            products = products_pack(products, a, b, middle, beyond, rstd[row])
            sums = add_pack(sums, a)
            row += cuda.blockDim.x // tile
    at = cuda.blockIdx.y * columns + column
    spread(share, here, products, cuda.blockDim.x)
    tile_total(share, weights, at, left, tile)
    spread(share, here, sums, cuda.blockDim.x)
    tile_total(share, biases, at, left, tile)


@kernel
def fold_kernel(totals: Values, out: Elements, columns: Size, chunks: Size) -> None:
    """The sum of the rows of `totals`, 32 columns to a block."""
    share = cuda.shared.array(SHARE, T)
    here = cuda.threadIdx.x
    column = np.int64(cuda.blockIdx.x) * 32 + (here & 31)
    total = T(0)
    if column < columns:
        chunk = np.int64(here >> 5)
        while chunk < chunks:
            total += totals[chunk * columns + column]
            chunk += cuda.blockDim.x >> 5
    share[here] = total
    half = cuda.blockDim.x >> 1
    while half >= 32:
        cuda.syncthreads()
        if here < half:
            share[here] += share[here + half]
        half >>= 1
    if here < 32 and column < columns:
        write(out, column, share[here])


# -- segments -------------------------------------------------------------------------------------
# Segment q belongs to channel q % channels; its moments are number q // per % sets.


@kernel
def together_kernel(
    mean: Values, rest: Values, var: Values, whole: Values, left: Values, total: Values,
    channels: Size, parts: Size, count: Number,
) -> None:  # fmt: skip
    """Moments of every channel from those of its segments, which are equally long."""
    c = thread()
    while c < channels:
        base = mean[c]
        beyond = rest[c]
        offset = T(0)
        i = c
        while i < channels * parts:
            offset += difference(mean[i], base) + difference(rest[i], beyond)
            i += channels
        offset = offset / count + beyond
        middle = base + offset
        rounding = rounded_off(base, offset, middle)
        square = T(0)
        i = c
        while i < channels * parts:
            d = from_mean(mean[i], middle, rounding) + rest[i]
            square += var[i] + d * d
            i += channels
        whole[c] = middle
        left[c] = rounding
        total[c] = square / count
        c += threads()


@kernel
def segments_kernel(
    x: Elements, mean: Values, rest: Values, rstd: Values, weight: Elements, bias: Elements,
    y: Elements, rows: Size, columns: Size, per: Size, sets: Size, channels: Size, aligned: Int,
) -> None:  # fmt: skip
    """Every segment scaled by a team."""
    width = members()
    lane = np.int64(cuda.threadIdx.x & (width - 1))
    teams = cuda.blockDim.x // width
    row = np.int64(cuda.blockIdx.x) * teams + cuda.threadIdx.x // width
    while row < rows:
        start = row * columns
        s = row // per % sets
        c = row % channels
        middle, left, factor = mean[s], rest[s], rstd[s]
        w, b = read(weight, c), read(bias, c)
        i = lane * LANES
        while i < columns:
            z = read_pack(x, start + i, columns - i, aligned)
            z = scaled_segment(z, w, b, middle, left, factor)
            write_pack(y, start + i, z, columns - i, aligned)
            i += width * LANES
        row += np.int64(cuda.gridDim.x) * teams


@kernel
def segment_sums_kernel(
    g: Elements, x: Elements, mean: Values, rest: Values, rstd: Values, sums: Values,
    products: Values, rows: Size, columns: Size, per: Size, sets: Size, aligned: Int,
) -> None:  # fmt: skip
    """Of every segment the sum of `g`, and of `g` times what was normalised."""
    scratch = cuda.shared.array(32, T)
    width = members()
    lane = np.int64(cuda.threadIdx.x & (width - 1))
    teams = cuda.blockDim.x // width
    top = np.int64(cuda.blockIdx.x) * teams
    while top < rows:
        row = top + cuda.threadIdx.x // width
        start = row * columns
        n = columns if row < rows else np.int64(0)
        s = row // per % sets
        middle, left, factor = mean[s], rest[s], rstd[s]
        total = T(0)
        product = T(0)
        i = lane * LANES
        while i < n:
            a = read_pack(g, start + i, n - i, aligned)
            b = read_pack(x, start + i, n - i, aligned)
            total = level_of_segment(total, a, T(1))
            product = product_of(product, a, b, middle, left, factor)
            i += width * LANES
        total = team_sum(total, scratch)
        product = team_sum(product, scratch)
        if lane == 0 and n > 0:
            sums[row] = total
            products[row] = product
        top += np.int64(cuda.gridDim.x) * teams


@kernel
def levels_kernel(
    sums: Values, products: Values, weight: Elements, level: Values, slope: Values, groups: Size,
    per: Size, channels: Size, count: Number,
) -> None:  # fmt: skip
    """What is taken off the gradient of each group of segments: see `gradient`."""
    k = thread()
    while k < groups:
        a = T(0)
        b = T(0)
        q = k * per
        while q < (k + 1) * per:
            w = read(weight, q % channels)
            a += w * sums[q]
            b += w * products[q]
            q += 1
        level[k] = a / count
        slope[k] = b / count
        k += threads()


@kernel
def segment_gradients_kernel(
    g: Elements, x: Elements, mean: Values, rest: Values, rstd: Values, weight: Elements,
    level: Values, slope: Values, also: Elements, gx: Elements, rows: Size, columns: Size,
    per: Size, sets: Size, channels: Size, joined: Int, aligned: Int,
) -> None:  # fmt: skip
    """The gradient of every segment, and that which reaches it by another way if `joined`."""
    width = members()
    lane = np.int64(cuda.threadIdx.x & (width - 1))
    teams = cuda.blockDim.x // width
    row = np.int64(cuda.blockIdx.x) * teams + cuda.threadIdx.x // width
    while row < rows:
        start = row * columns
        s = row // per % sets
        middle, left, factor = mean[s], rest[s], rstd[s]
        w, a, b = read(weight, row % channels), level[s], slope[s]
        i = lane * LANES
        while i < columns:
            u = read_pack(g, start + i, columns - i, aligned)
            z = read_pack(x, start + i, columns - i, aligned)
            d = gradient_segment(u, w, z, middle, left, factor, a, b)
            if joined != 0:
                d = add_pack(d, read_pack(also, start + i, columns - i, aligned))
            write_pack(gx, start + i, d, columns - i, aligned)
            i += width * LANES
        row += np.int64(cuda.gridDim.x) * teams


#: Kernels of which a team has a row, and the others.
BY_TEAM = {
    "moments": moments_kernel,
    "norm_forward": forward_kernel,
    "norm_gradient": gradient_kernel,
    "norm_segments": segments_kernel,
    "norm_segment_sums": segment_sums_kernel,
    "norm_segment_gradients": segment_gradients_kernel,
}
PLAIN = {
    "norm_column_sums": column_sums_kernel,
    "norm_fold": fold_kernel,
    "norm_together": together_kernel,
    "norm_levels": levels_kernel,
}


@cache
def kernel_of(name: str, team: str = "") -> Kernel:
    """A kernel, for a team of threads to a row where it has rows."""
    if not team:
        return PLAIN[name].named(name)
    parts = {part: TEAMS[team][part] for part in ("members", "team_sum")}
    inner = row_moments.bind(team_sum=TEAMS[team]["team_sum"])
    return BY_TEAM[name].bind(**parts, row_moments=inner).named(f"{name}_{team}")


def entries() -> Iterator[Entry]:
    """All that ships."""
    for storage in STORAGE:
        for name in BY_TEAM:
            for team in TEAMS:
                yield kernel_of(name, team)[storage]
        for name in PLAIN:
            if name != "norm_together" or storage in ("float32", "float64"):
                yield kernel_of(name)[storage]
