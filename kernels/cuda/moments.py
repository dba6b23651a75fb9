"""What the elements of parts of an array amount to: sums, extremes and counts, in two launches.

Parts are cut into chunks, by their sizes alone. A block leaves behind what its chunk amounts to,
and a second kernel, a block of which stands for a part, adds the chunks up in double precision:
results are the same bit for bit from run to run, and on every GPU.

In the first kernel there is no double precision, which is slow on most GPUs; but the variance of
elements far from zero needs more than single. So sums are kept as pairs of numbers, the second of
which is what rounding has taken from the first (Knuth's sum), and squares are taken of halves of
the digits, whose products are exact: no sum can change by what a compiler contracts. Elements that
are very small or great are scaled while they are summed. Sums are within 2**-36 of the sums of
magnitudes (float64: 2**-49); of elements narrower than float64 they neither overflow nor vanish.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from threading import RLock
from typing import Any, NamedTuple

import numpy as np

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel as Implementation
from gpugrad.kernels.cuda.blockwide import block_count, block_sum
from gpugrad.kernels.cuda.elementwise import LABEL, in_a_row, refuse_arrays
from gpugrad.kernels.cuda.gradient import block_most, flat_norm
from gpugrad.kernels.cuda.language import (
    LANES,
    Elements,
    Int,
    Longs,
    Number,
    Size,
    Values,
    cuda,
    device,
    fold,
    kernel,
    lanes,
    pack_size,
    read_pack,
    shuffle,
)
from gpugrad.kernels.cuda.launch import Entry, Machine, machine, storage_of
from gpugrad.kernels.scalars import Typed
from gpugrad.kernels.template import STORAGE, I, Placeholder, T, from_bits, read, to_bits

__all__ = ["entries", "moments"]

Array = Any

#: Packs of a thread in a chunk, as long as a part has no more chunks than a grid has parts.
EACH = 8

#: Columns of the result: see `gpugrad.health.statistics`.
NUMBERS = 8

# -- sums of twice the digits ----------------------------------------------------------------------


@device
def plus(total: Any, x: Any) -> Any:
    """A pair and one number more; nothing is lost."""
    high, low = total
    new = high + x
    part = new - high
    return new, low + ((high - (new - part)) + (x - part))


#: All bits of a number but those of the lower half of its digits.
UPPER = Typed(np.int32(-(1 << 12)), np.int64(-(1 << 27)))


@device
def plus_square(total: Any, x: Any) -> Any:
    """A pair and the square of a number."""
    upper = from_bits(I(to_bits(x) & UPPER))
    lower = x - upper
    high, low = plus(plus(total, upper * upper), (upper + upper) * lower)
    return high, low + lower * lower


@device
def plus_pair(total: Any, other: Any) -> Any:
    high, low = plus(total, other[0])
    return high, low + other[1]


@device
def renewed(total: Any) -> Any:
    """The same pair, the second of which is little beside the first."""
    high, low = total
    new = high + low
    return new, low - (new - high)


@device
def extremes(a: Any, b: Any) -> Any:
    """The lesser of the first, and the greater of the second."""
    return a[0] if a[0] < b[0] else b[0], a[1] if a[1] > b[1] else b[1]


@device
def zero() -> Any:
    return T(0), T(0)


@device
def void() -> Any:
    """The extremes of nothing."""
    return T(float("inf")), T(float("-inf"))


combine: Any = Placeholder("combine")
nothing: Any = Placeholder("nothing")


@device
def _in_block(x: Any, scratch: Any) -> Any:
    """`combine` of the pairs of all threads; `scratch` has room for one of each warp."""
    lane = cuda.threadIdx.x & 31
    warp = cuda.threadIdx.x >> 5
    mask = 16
    while mask > 0:
        x = combine(x, (shuffle(x[0], mask), shuffle(x[1], mask)))
        mask >>= 1
    cuda.syncthreads()  # `scratch` may still be read from the last time
    if lane == 0:
        scratch[2 * warp] = x[0]
        scratch[2 * warp + 1] = x[1]
    cuda.syncthreads()
    x = nothing()
    if lane < cuda.blockDim.x >> 5:
        x = scratch[2 * lane], scratch[2 * lane + 1]
    mask = 16
    while mask > 0:
        x = combine(x, (shuffle(x[0], mask), shuffle(x[1], mask)))
        mask >>= 1
    return x


block_pair: Any = _in_block.bind(combine=plus_pair, nothing=zero)
block_extremes: Any = _in_block.bind(combine=extremes, nothing=void)

# -- levels ----------------------------------------------------------------------------------------

#: As long as a thread has met nothing but magnitudes below `LOW`, elements are multiplied by `UP`
#: before they are summed; once it has met one of `HIGH` or more, by `DOWN`. So no sum of 2**36
#: squares overflows, and what vanishes does not count beside the greatest.
LOW = Typed(np.float32(2.0**-50), np.float64(2.0**-470))
HIGH = Typed(np.float32(2.0**45), np.float64(2.0**450))
UP = Typed(np.float32(2.0**86), np.float64(2.0**563))
DOWN = Typed(np.float32(2.0**-86), np.float64(2.0**-563))


@device
def level_of(top: Any) -> Any:
    """The level of a magnitude, given as its bits."""
    return I(0) if top < to_bits(LOW) else I(1) if top < to_bits(HIGH) else I(2)


@device
def lowered(x: Any) -> Any:
    return x[0] * DOWN, x[1] * DOWN


@device
def _double32(x: Any, up: Any) -> Any:
    """The bits in double precision of `x`, multiplied so often by `UP`."""
    up = np.int64(up)
    ones = to_bits(T(float("inf")))
    if (to_bits(x) & ones) == 0:  # subnormal numbers have no exponent
        x = x * UP
        up -= 1
    bits = np.int64(to_bits(x))
    exponent = (bits >> 23) & 255
    if exponent == 255:
        exponent = np.int64(2047)
    elif exponent != 0:
        exponent += 896 + 86 * up  # the biases of the exponents differ by so much
    return ((bits >> 63) << 63) | (exponent << 52) | ((bits & 0x7FFFFF) << 29)


@device
def _double64(x: Any, up: Any) -> Any:
    while up > 0:
        x = x * UP
        up -= 1
    while up < 0:
        x = x * DOWN
        up += 1
    return to_bits(x)


double: Any = Typed(_double32, _double64)

# -- chunks ----------------------------------------------------------------------------------------


@device
def look(seen: Any, x: Any, low: Any, high: Any) -> Any:
    """Least and greatest of the finite elements, the bits of their greatest magnitude; and how many
    are not finite, zero, and outside."""
    least, greatest, top, bad, zeros, outside = seen
    size = I(to_bits(x) & I(~to_bits(T(-0.0))))
    if size < to_bits(T(float("inf"))):
        least = x if x < least else least
        greatest = x if x > greatest else greatest
        top = size if size > top else top
        zeros = I(zeros + I(1)) if size == I(0) else zeros
    else:
        bad = I(bad + I(1))
    outside = I(outside + I(1)) if x <= low or x >= high else outside
    return least, greatest, top, bad, zeros, outside


@device
def kept(x: Any, factor: Any) -> Any:
    """A finite element scaled; 0 for another."""
    ones = to_bits(T(float("inf")))
    return T(0) if (to_bits(x) & ones) == ones else x * factor


look_of = fold(look, ".x..")
kept_pack = lanes(kept, "x.")
sum_of = fold(plus, ".x")
squares_of = fold(plus_square, ".x")


@kernel
def moments_kernel(
    x: Elements, table: Longs, sums: Longs, counts: Longs, n: Size, chunk: Size, low: Number,
    high: Number, aligned: Int,
) -> None:  # fmt: skip
    """Each block's chunk: of `chunk` elements, or as the table says if that is 0.

    A row of `sums` has six numbers, as the bits of float64: the pairs of the sum and of the sum of
    squares, least and greatest; one of `counts` has three.
    """
    scratch = cuda.shared.array(64, T)
    here = np.int64(cuda.blockIdx.x)
    start = here * chunk
    end = start + chunk
    if chunk == 0:
        start = table[2 * here]
        end = table[2 * here + 1]
    elif end > n:
        end = n
    packs = aligned if (start & (LANES - 1)) == 0 else 0
    last = end - ((end - start) & (LANES - 1))
    level = I(0)
    total = zero()
    squares = zero()
    seen = (T(float("inf")), T(float("-inf")), I(0), I(0), I(0), I(0))
    i = start + np.int64(cuda.threadIdx.x) * LANES
    while i < last:
        pack = read_pack(x, i, LANES, packs)
        seen = look_of(seen, pack, low, high)
        while level < level_of(seen[2]):
            level = I(level + I(1))
            total = lowered(total)
            squares = lowered(lowered(squares))
        pack = kept_pack(pack, UP if level == I(0) else DOWN if level == I(2) else T(1))
        total = renewed(sum_of(total, pack))
        squares = renewed(squares_of(squares, pack))
        i += np.int64(cuda.blockDim.x) * LANES
    # What is no pack any more is less than one element for each thread.
    i = last + np.int64(cuda.threadIdx.x)
    if i < end:
        one = read(x, i)
        seen = look(seen, one, low, high)
        while level < level_of(seen[2]):
            level = I(level + I(1))
            total = lowered(total)
            squares = lowered(lowered(squares))
        one = kept(one, UP if level == I(0) else DOWN if level == I(2) else T(1))
        total = plus(total, one)
        squares = plus_square(squares, one)
    common = block_most(level, scratch)
    while level < common:
        level = I(level + I(1))
        total = lowered(total)
        squares = lowered(lowered(squares))
    total = renewed(block_pair(total, scratch))
    squares = renewed(block_pair(squares, scratch))
    ends = block_extremes((seen[0], seen[1]), scratch)
    bad = block_count(seen[3], scratch)
    zeros = block_count(seen[4], scratch)
    outside = block_count(seen[5], scratch)
    if cuda.threadIdx.x == 0:
        up = level - 1
        sums[6 * here] = double(total[0], up)
        sums[6 * here + 1] = double(total[1], up)
        sums[6 * here + 2] = double(squares[0], 2 * up)
        sums[6 * here + 3] = double(squares[1], 2 * up)
        sums[6 * here + 4] = double(ends[0], 0)
        sums[6 * here + 5] = double(ends[1], 0)
        counts[3 * here] = bad
        counts[3 * here + 1] = zeros
        counts[3 * here + 2] = outside


# -- parts -----------------------------------------------------------------------------------------


@device
def whole(high: Any, low: Any) -> Any:
    """A pair as one number."""
    return high + low if high - high == T(0) else high


@kernel
def moments_total_kernel(
    sums: Values, counts: Longs, table: Longs, out: Values, n: Size, chunks: Size, parts: Size
) -> None:
    """A block adds up the chunks of a part: all of them, or as the table says if `chunks` is 0.

    Behind the chunks the table has the first chunk of each part, how many there are, and the number
    of elements of each part.
    """
    scratch = cuda.shared.array(64, T)
    here = np.int64(cuda.blockIdx.x)
    first = np.int64(0)
    end = chunks
    size = n
    if chunks == 0:
        first = table[here]
        end = table[here + 1]
        size = table[parts + 1 + here]
    total, squares, bad, zeros, outside = T(0), T(0), T(0), T(0), T(0)
    ends = void()
    i = first + np.int64(cuda.threadIdx.x)
    while i < end:
        total += whole(sums[6 * i], sums[6 * i + 1])
        squares += whole(sums[6 * i + 2], sums[6 * i + 3])
        ends = extremes(ends, (sums[6 * i + 4], sums[6 * i + 5]))
        bad += T(counts[3 * i])
        zeros += T(counts[3 * i + 1])
        outside += T(counts[3 * i + 2])
        i += np.int64(cuda.blockDim.x)
    total = block_sum(total, scratch)
    squares = block_sum(squares, scratch)
    ends = block_extremes(ends, scratch)
    bad = block_sum(bad, scratch)
    zeros = block_sum(zeros, scratch)
    outside = block_sum(outside, scratch)
    if cuda.threadIdx.x == 0:
        out[8 * here] = T(size)
        out[8 * here + 1] = total
        out[8 * here + 2] = squares
        out[8 * here + 3] = ends[0]
        out[8 * here + 4] = ends[1]
        out[8 * here + 5] = bad
        out[8 * here + 6] = zeros
        out[8 * here + 7] = outside


# -- launching -------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Where chunks and parts begin and end, on a device.

    Attributes
    ----------
    chunks, parts:
        As :func:`moments_kernel` and :func:`moments_total_kernel` take them.
    blocks:
        How many chunks there are.
    """

    chunks: Array
    parts: Array
    blocks: int


def chunk_of(gpu: Machine, size: Any, lanes: int) -> Any:
    """Elements of a chunk of parts of these sizes: a matter of the sizes alone."""
    unit = EACH * gpu.threads * lanes
    return unit * np.maximum(-(-size // (unit * gpu.parts)), 1)


def tabulated(bounds: np.ndarray[Any, Any], gpu: Machine, lanes: int) -> tuple[Any, int]:
    """The chunks of all parts, and behind them what the second kernel wants; how many chunks."""
    starts, ends = bounds.astype(np.int64).T
    sizes = np.maximum(ends - starts, 0)
    chunk = chunk_of(gpu, sizes, lanes)
    # A part of no elements has a chunk, too, so that there is somebody to say so.
    counts = np.maximum(-(-sizes // chunk), 1)
    first = np.cumsum(counts) - counts
    part = np.repeat(np.arange(len(bounds)), counts)
    at = starts[part] + chunk[part] * (np.arange(len(part)) - first[part])
    until = np.minimum(at + chunk[part], starts[part] + sizes[part])
    chunks = np.stack((at, until), axis=1).reshape(-1)
    return np.concatenate((chunks, first, [len(part)], sizes)), len(part)


_lock = RLock()


@lru_cache(maxsize=64)
def _table(m: Backend, gpu: Machine, device: str, lanes: int, told: bytes) -> Table:
    """A table that was uploaded for bounds, given as their bytes, and stays."""
    bounds = np.frombuffer(told, np.int64).reshape(-1, 2)
    host, count = tabulated(bounds, gpu, lanes)
    there = m.asarray(host, device=device)
    return Table(there, there[2 * count :], count)


def moments(
    m: Backend,
    x: Array,
    /,
    *,
    bounds: np.ndarray[Any, Any] | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> Array:
    """The eight numbers of each part, [parts, 8]; in two launches for any number of parts.

    What bounds are uploaded as is kept: the same ones are uploaded once.
    """
    x = in_a_row(x)
    gpu, storage = machine(x), storage_of(x)
    lanes = pack_size(storage)
    parts = 1 if bounds is None else len(bounds)
    out = gpu.empty((parts, NUMBERS), np.float64)
    if not parts:
        return out
    if bounds is None:
        chunk = int(chunk_of(gpu, x.size, lanes))
        blocks = max(1, -(-x.size // chunk))
        rows = None
    else:
        told = np.ascontiguousarray(bounds, np.int64).tobytes()
        with _lock:
            rows = _table(m, gpu, m.device(x), lanes, told)
        chunk, blocks = 0, rows.blocks
    sums, counts = gpu.empty(6 * blocks, np.int64), gpu.empty(3 * blocks, np.int64)
    gpu.run(
        moments_kernel[storage], (blocks,),
        x, counts if rows is None else rows.chunks, sums, counts, x.size, chunk, low, high,
        gpu.aligned(x),
    )  # fmt: skip
    gpu.run(
        moments_total_kernel["float64"], (parts,),
        sums.view(np.float64), counts, counts if rows is None else rows.parts, out, x.size,
        blocks if rows is None else 0, parts,
    )  # fmt: skip
    return out


def sum_of_squares(m: Backend, x: Array, /) -> Array:
    """Σx² as a float64, which neither overflows nor vanishes for narrower elements."""
    return flat_norm(m, in_a_row(x), finite_only=False)[0]


def max_abs(m: Backend, x: Array, /) -> Array:
    """The greatest |x|."""
    return flat_norm(m, in_a_row(x), finite_only=False)[1]


def nonfinite_count(m: Backend, x: Array, /) -> Array:
    """How many elements are NaN or infinite."""
    return flat_norm(m, in_a_row(x), finite_only=False)[2]


def _refuse(m: Backend, x: Any, /, **options: Any) -> str | None:
    return refuse_arrays(x)


#: For the slots of the backend. What clipping asks of one array, the norm of a step finds out.
KERNELS = {
    run.__name__: Implementation(run, LABEL, _refuse)
    for run in (moments, sum_of_squares, max_abs, nonfinite_count)
}


def entries() -> Iterator[Entry]:
    """All that ships."""
    for storage in STORAGE:
        yield moments_kernel[storage]
    yield moments_total_kernel["float64"]
