"""What all threads of a block find out together: sums, the greatest number, counts.

Every thread of the block must call these, and every one gets the result. The order of the additions
is a matter of the block's size alone, so results are the same bit for bit on every run. Blocks are
of whole warps, 1024 threads at most. `scratch` is `cuda.shared.array(32, T)`; one serves all calls.
"""

from __future__ import annotations

from typing import Any

from gpugrad.kernels.cuda.language import cuda, device, shuffle
from gpugrad.kernels.template import I, Placeholder, T, absolute, from_bits, to_bits

__all__ = ["block_count", "block_peak", "block_sum", "block_total", "not_finite", "peak"]

combine: Any = Placeholder("combine")


@device
def add(a: Any, b: Any) -> Any:
    return a + b


@device
def peak(a: Any, x: Any) -> Any:
    """The greater of `a` and |x|; NaN if either is."""
    b = absolute(x)
    # A comparison with NaN is false: it takes the place of `a` by the first, and keeps it by the
    # second.
    return a if a >= b or not (a == a) else b  # noqa: SIM201


@device
def not_finite(count: Any, x: Any) -> Any:
    """One more if `x` is NaN or infinite: their exponents are all ones, and no other's is."""
    ones = to_bits(T(float("inf")))
    return I(count + I(1)) if (to_bits(x) & ones) == ones else count


@device
def _in_block(x: Any, scratch: Any) -> Any:
    """`combine` of all threads' `x`, for which 0 is neutral."""
    lane = cuda.threadIdx.x & 31
    warp = cuda.threadIdx.x >> 5
    mask = 16
    while mask > 0:
        x = combine(x, shuffle(x, mask))
        mask >>= 1
    cuda.syncthreads()  # `scratch` may still be read from the last time
    if lane == 0:
        scratch[warp] = x
    cuda.syncthreads()
    x = scratch[lane] if lane < cuda.blockDim.x >> 5 else T(0)
    mask = 16
    while mask > 0:
        x = combine(x, shuffle(x, mask))
        mask >>= 1
    return x


@device
def _add_bits(a: Any, b: Any) -> Any:
    return from_bits(I(to_bits(a) + to_bits(b)))


block_sum: Any = _in_block.bind(combine=add)
block_peak: Any = _in_block.bind(combine=peak)
_block_bits: Any = _in_block.bind(combine=_add_bits)


@device
def block_count(x: Any, scratch: Any) -> Any:
    """The sum of all threads' `x`, whole numbers of type `I`."""
    return to_bits(_block_bits(from_bits(x), scratch))


@device
def block_total(parts: Any, count: Any, scratch: Any) -> Any:
    """The sum of an array of partial sums, taken by one block; the same in every block."""
    total = T(0)
    i = cuda.threadIdx.x
    while i < count:
        total += parts[i]
        i += cuda.blockDim.x
    return block_sum(total, scratch)
