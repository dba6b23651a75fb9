"""Reductions of one array: Σx², the greatest |x|, and how many are not finite, in one pass.

Two stages. In the first each block takes its share of the elements, a matter of their number alone,
and leaves its results behind; in the second one block puts these together. There are no atomic
additions: results are the same bit for bit from run to run, and on every GPU. Sums are of the
arithmetic type, float32 for half precision. An optimiser need not launch the second stage: a block
of its own kernel can take :func:`~gpugrad.kernels.cuda.blockwide.block_total` of the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from gpugrad.kernels.cuda.blockwide import block_count, block_peak, block_sum, not_finite, peak
from gpugrad.kernels.cuda.language import (
    LANES,
    Elements,
    Int,
    Ints,
    Size,
    Values,
    cuda,
    device,
    fold,
    kernel,
    pack_size,
    read_pack,
    thread,
    threads,
)
from gpugrad.kernels.cuda.launch import Entry, machine, number_type, storage_of
from gpugrad.kernels.template import STORAGE, I, T, arithmetic

__all__ = ["Parts", "Summary", "entries", "launch_summary", "launch_summary_parts"]


@device
def add_square(total: Any, x: Any) -> Any:
    return total + x * x


squares_of = fold(add_square, ".x")
peak_of = fold(peak, ".x")
not_finite_of = fold(not_finite, ".x")


@kernel
def summary_kernel(
    x: Elements, sums: Values, peaks: Values, bad: Ints, n: Size, aligned: Int
) -> None:
    """Each block's share; a block's results are the elements `blockIdx.x` of the others."""
    scratch = cuda.shared.array(32, T)
    total = T(0)
    most = T(0)
    count = I(0)
    i = thread() * LANES
    step = threads() * LANES
    while i < n:
        pack = read_pack(x, i, n - i, aligned)
        total = squares_of(total, pack)
        most = peak_of(most, pack)
        count = not_finite_of(count, pack)
        i += step
    total = block_sum(total, scratch)
    most = block_peak(most, scratch)
    count = block_count(count, scratch)
    if cuda.threadIdx.x == 0:
        sums[cuda.blockIdx.x] = total
        peaks[cuda.blockIdx.x] = most
        bad[cuda.blockIdx.x] = count


@kernel
def summary_total_kernel(
    sums: Values, peaks: Values, bad: Ints, parts: Int, out_sum: Values, out_peak: Values,
    out_bad: Ints,
) -> None:  # fmt: skip
    """One block puts the parts together."""
    scratch = cuda.shared.array(32, T)
    total = T(0)
    most = T(0)
    count = I(0)
    i = cuda.threadIdx.x
    while i < parts:
        total += sums[i]
        most = peak(most, peaks[i])
        count = I(count + bad[i])
        i += cuda.blockDim.x
    total = block_sum(total, scratch)
    most = block_peak(most, scratch)
    count = block_count(count, scratch)
    if cuda.threadIdx.x == 0:
        out_sum[0] = total
        out_peak[0] = most
        out_bad[0] = count


class Parts(NamedTuple):
    """What the blocks of the first stage leave behind, an element each."""

    sums: Any
    peaks: Any
    bad: Any


class Summary(NamedTuple):
    """Arrays of one element, where the operand is.

    Attributes
    ----------
    squares, peak:
        Σx² and the greatest |x|, in the arithmetic type; NaN if an element is.
    bad:
        How many elements are NaN or infinite, as int32.
    """

    squares: Any
    peak: Any
    bad: Any


def launch_summary_parts(x: Any) -> Parts:
    """The first stage for an array whose elements lie in a row."""
    gpu, storage = machine(x), storage_of(x)
    number = number_type(storage)
    blocks = gpu.divided(x.size, pack_size(storage))
    (count,) = blocks
    parts = Parts(gpu.empty(count, number), gpu.empty(count, number), gpu.empty(count, np.int32))
    gpu.run(summary_kernel[storage], blocks, x, *parts, x.size, gpu.aligned(x))
    return parts


def launch_summary(x: Any) -> Summary:
    """Σx², max |x| and the count of elements that are not finite, of an array that lies in a row.

    Empty arrays give zeros.
    """
    parts = launch_summary_parts(x)
    gpu, storage = machine(x), arithmetic(storage_of(x))
    number = number_type(storage)
    found = Summary(gpu.empty(1, number), gpu.empty(1, number), gpu.empty(1, np.int32))
    gpu.run(summary_total_kernel[storage], (1,), *parts, parts.sums.size, *found)
    return found


def entries() -> Iterator[Entry]:
    """All that ships."""
    for storage in STORAGE:
        yield summary_kernel[storage]
    for storage in ("float32", "float64"):
        yield summary_total_kernel[storage]
