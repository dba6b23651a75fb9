"""What a gradient amounts to: its norm, and which of its elements are not finite.

Every block leaves behind what its share amounts to, and whoever wants the whole puts all shares
together: a kernel of one block, or each block of an update (`optimizer.py`). It is always done in
one order: results are the same bit for bit from run to run, and on every GPU.

Sums of squares are taken in the arithmetic type, for double precision is slow on most GPUs. Many
squares that float32 cannot hold are those of numbers that it can. So there are three sums: one of
elements as they are, one of small elements made greater, and one of great elements made smaller;
each pack goes into one of them. A thread adds with Kahan's compensation, a block adds pairwise:
norms are within 2**-20 of the true ones (float64: 2**-49), whatever the number of elements. They
neither overflow nor vanish as long as the arithmetic type can hold the norm itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from gpugrad.backend import Backend
from gpugrad.kernels.cuda.blockwide import _in_block, block_count, block_sum, not_finite
from gpugrad.kernels.cuda.elementwise import refuse_arrays
from gpugrad.kernels.cuda.language import (
    LANES,
    Elements,
    Int,
    Longs,
    Size,
    Values,
    cuda,
    device,
    fold,
    kernel,
    lanes,
    pack_size,
    read_pack,
    thread,
    threads,
)
from gpugrad.kernels.cuda.launch import Entry, machine, number_type, storage_of
from gpugrad.kernels.cuda.reduce import add_square
from gpugrad.kernels.scalars import Typed
from gpugrad.kernels.template import STORAGE, I, T, arithmetic, from_bits, to_bits

__all__ = [
    "Measured", "entries", "finite_pack", "flat_norm", "launch_measure", "refuse_rows",
    "times_pack", "together", "undone",
]  # fmt: skip

Array = Any

# -- what threads of a block find out together -----------------------------------------------------


@device
def _greater_bits(a: Any, b: Any) -> Any:
    return a if to_bits(a) > to_bits(b) else b


_block_greatest: Any = _in_block.bind(combine=_greater_bits)


@device
def block_most(x: Any, scratch: Any) -> Any:
    """The greatest of all threads' `x`, whole numbers of type `I` that are not negative."""
    return to_bits(_block_greatest(from_bits(x), scratch))


#: 30 bits: a whole number of so many is no NaN when its bits are taken for a float's.
HALF = (1 << 30) - 1


@device
def block_first(x: Any, scratch: Any) -> Any:
    """The least of all threads' `x` of 64 bits, but for those that are -1; -1 if all are."""
    # In two halves, and from above: 0 is what does not count in a block.
    mine = I(HALF - (x >> 30)) if x >= 0 else I(0)
    upper = block_most(mine, scratch)
    if upper == I(0):
        return np.int64(-1)
    mine = I(HALF - (x & HALF)) if x >= 0 and mine == upper else I(0)
    lower = block_most(mine, scratch)
    return (np.int64(HALF - upper) << 30) + np.int64(HALF - lower)


# -- the shares ------------------------------------------------------------------------------------

#: Packs whose squares add up to less than `LOW` or more than `HIGH` are summed with their elements
#: multiplied by `UP` or `DOWN`. So no sum over 2**36 packs overflows, and no square vanishes that
#: would change the sum of its pack.
LOW = Typed(np.float32(2.0**-84), np.float64(2.0**-150))
HIGH = Typed(np.float32(2.0**88), np.float64(2.0**900))
UP = Typed(np.float32(2.0**86), np.float64(2.0**563))
DOWN = Typed(np.float32(2.0**-86), np.float64(2.0**-563))


@device
def add_exactly(total: Any, lost: Any, x: Any) -> Any:
    """Kahan's sum: the total, and what rounding has added to it."""
    x = x - lost
    new = total + x
    return new, (new - total) - x


@device
def greater(top: Any, x: Any) -> Any:
    """The greater of `top` and the bits of |x|, which are in order, with infinity and NaN last."""
    bits = I(to_bits(x) & I(~to_bits(T(-0.0))))
    return bits if bits > top else top


@device
def place(seen: Any, x: Any) -> Any:
    """How many elements were seen, until one is not finite: then the complement of that."""
    if seen < I(0):
        return seen
    return I(~seen) if not_finite(I(0), x) > I(0) else I(seen + I(1))


@device
def finite(x: Any) -> Any:
    return T(0) if not_finite(I(0), x) > I(0) else x


@device
def times(x: Any, factor: Any) -> Any:
    return x * factor


squares_of = fold(add_square, ".x")
greater_of = fold(greater, ".x")
not_finite_of = fold(not_finite, ".x")
place_of = fold(place, ".x")
finite_pack = lanes(finite, "x")
times_pack = lanes(times, "x.")


@kernel
def measure_kernel(
    g: Elements, count: Longs, sums: Values, marks: Longs, n: Size, clean: Int, aligned: Int
) -> None:
    """Each block's share, as :class:`Measured` says; `count` is kept for the next kernel."""
    scratch = cuda.shared.array(32, T)
    low, low_lost = T(0), T(0)
    middle, middle_lost = T(0), T(0)
    high, high_lost = T(0), T(0)
    top, bad = I(0), I(0)
    first = np.int64(-1)
    i = thread() * LANES
    step = threads() * LANES
    while i < n:
        pack = read_pack(g, i, n - i, aligned)
        squares = squares_of(T(0), pack)
        if not squares < T(float("inf")):
            wrong = not_finite_of(I(0), pack)
            if wrong > I(0):
                if bad == I(0):
                    first = i + np.int64(~place_of(I(0), pack))
                bad = I(bad + wrong)
                if clean != 0:
                    pack = finite_pack(pack)
                    squares = squares_of(T(0), pack)
        if squares > LOW and squares < HIGH:
            middle, middle_lost = add_exactly(middle, middle_lost, squares)
        elif squares < T(1):
            squares = squares_of(T(0), times_pack(pack, UP))
            low, low_lost = add_exactly(low, low_lost, squares)
        else:
            squares = squares_of(T(0), times_pack(pack, DOWN))
            high, high_lost = add_exactly(high, high_lost, squares)
        top = greater_of(top, pack)
        i += step
    # A compensation makes NaN of infinity.
    if top >= to_bits(T(float("inf"))):
        high = from_bits(top)
    low = block_sum(low, scratch)
    middle = block_sum(middle, scratch)
    high = block_sum(high, scratch)
    top = block_most(top, scratch)
    bad = block_count(bad, scratch)
    first = block_first(first, scratch)
    if cuda.threadIdx.x == 0:
        part, parts = cuda.blockIdx.x, cuda.gridDim.x
        sums[part] = low
        sums[parts + part] = middle
        sums[2 * parts + part] = high
        sums[3 * parts + part] = from_bits(top)
        marks[part] = first
        marks[parts + part] = np.int64(bad)
        if part == 0:
            marks[2 * parts] = count[0]


# -- all of them -----------------------------------------------------------------------------------


@device
def together(sums: Any, marks: Any, parts: Any, scratch: Any) -> Any:
    """The parts put together, the same in every block: the sum of squares, of elements as they are
    (0), made greater (-1) or smaller (1), which of these, and the first that is not finite, or -1.
    """
    low, middle, high = T(0), T(0), T(0)
    first = np.int64(-1)
    i = cuda.threadIdx.x
    while i < parts:
        low += sums[i]
        middle += sums[parts + i]
        high += sums[2 * parts + i]
        if marks[i] >= 0 and (first < 0 or marks[i] < first):
            first = marks[i]
        i += cuda.blockDim.x
    low = block_sum(low, scratch)
    middle = block_sum(middle, scratch)
    high = block_sum(high, scratch)
    first = block_first(first, scratch)
    if not high == T(0):  # noqa: SIM201 - NaN comes here, too
        return high + middle * DOWN * DOWN, I(1), first
    if middle > T(0):
        return middle + low * DOWN * DOWN, I(0), first
    return low, I(-1), first


@device
def undone(x: Any, scale: Any) -> Any:
    """`x`, which was computed of elements of this scale, as it is of elements as they are."""
    return x * UP if scale > I(0) else x * DOWN if scale < I(0) else x


@device
def _double_bits32(squares: Any, scale: Any) -> Any:
    """The bits of a sum of squares in double precision, which has room for every scale."""
    bits = np.int64(to_bits(squares)) & 0x7FFFFFFF
    exponent = (bits >> 23) + 896  # the biases of the exponents differ by so much
    if bits == 0:
        exponent = np.int64(0)
    elif exponent == 255 + 896:
        exponent = np.int64(2047)
    else:
        exponent += 172 * np.int64(scale)  # the square of UP
    return (exponent << 52) + ((bits & 0x7FFFFF) << 29)


@device
def _double_bits64(squares: Any, scale: Any) -> Any:
    return to_bits(undone(undone(squares, scale), scale))


double_bits: Any = Typed(_double_bits32, _double_bits64)


@kernel
def norm_total_kernel(sums: Values, marks: Longs, top: Values, out: Longs, parts: Int) -> None:
    """One block puts the parts together: `out` is Σg² as the bits of a float64, how many elements
    are not finite, and the first of them."""
    scratch = cuda.shared.array(32, T)
    squares, scale, first = together(sums, marks, parts, scratch)
    most, few, many = I(0), I(0), I(0)
    i = cuda.threadIdx.x
    while i < parts:
        most = greater(most, sums[3 * parts + i])
        # Counts of 64 bits in two halves, whose sums 32 bits can hold.
        few = I(few + I(marks[parts + i] & 0xFFFF))
        many = I(many + I(marks[parts + i] >> 16))
        i += cuda.blockDim.x
    most = block_most(most, scratch)
    few = block_count(few, scratch)
    many = block_count(many, scratch)
    if cuda.threadIdx.x == 0:
        top[0] = from_bits(most)
        out[0] = double_bits(squares, scale)
        out[1] = (np.int64(many) << 16) + np.int64(few)
        out[2] = first if first >= 0 else np.int64(0)


# -- launching -------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What the blocks of :func:`measure_kernel` leave behind.

    Attributes
    ----------
    sums:
        For every block the sums of squares of small, middling and great elements, and the greatest
        magnitude: four rows, in the arithmetic type.
    marks:
        For every block the index of its first element that is not finite, or -1, and how many there
        are, two rows of int64; then the count of steps as it was.
    parts:
        How many blocks there were.
    """

    sums: Array
    marks: Array
    parts: int


def launch_measure(g: Array, count: Array | None = None, *, clean: bool = False) -> Measured:
    """The first launch, for a gradient whose elements lie in a row."""
    gpu, storage = machine(g), storage_of(g)
    blocks = gpu.divided(g.size, pack_size(storage))
    (parts,) = blocks
    sums = gpu.empty(4 * parts, number_type(storage))
    marks = gpu.empty(2 * parts + 1, np.int64)
    if count is None:
        count = gpu.empty(1, np.int64)
    gpu.run(
        measure_kernel[storage], blocks,
        g, count, sums, marks, g.size, clean, gpu.aligned(g),
    )  # fmt: skip
    return Measured(sums, marks, parts)


def flat_norm(m: Backend, g: Array, /, *, finite_only: bool) -> tuple[Array, Array, Array, Array]:
    """Σg² in double precision, the greatest |g|, how many are not finite, and the first of them."""
    gpu = machine(g)
    storage = arithmetic(storage_of(g))
    sums, marks, parts = launch_measure(g, clean=finite_only)
    top, out = gpu.empty((), number_type(storage)), gpu.empty(3, np.int64)
    gpu.run(norm_total_kernel[storage], (1,), sums, marks, top, out, parts)
    return out.view(np.float64)[0, ...], top, out[1, ...], out[2, ...]


def refuse_rows(m: Backend, *arrays: Any, **options: Any) -> str | None:
    """Why these arrays cannot be taken: they are to be alike, and their elements in a row."""
    why = refuse_arrays(*arrays)
    if why is not None:
        return why
    first = arrays[0]
    for x in arrays:
        if not x.flags.c_contiguous:
            return "elements that do not lie in a row"
        if x.shape != first.shape:
            return f"shapes {first.shape} and {x.shape}"
    return None


def entries() -> Iterator[Entry]:
    """All that ships."""
    for storage in STORAGE:
        yield measure_kernel[storage]
    for storage in ("float32", "float64"):
        yield norm_total_kernel[storage]
