"""Softmax and its logarithm, forward and backward, along any axis; and what their kin share.

Where the elements of a row lie one after the other, a *team* of threads has a row: a warp a short
one, a block a long one. Going forward each thread keeps the greatest of its elements and the sum of
exponentials relative to it, in one pass, and the team puts these together, always in one order.
Where rows lie side by side, along another axis than the last, each thread has one of its own, and
neighbours read neighbouring elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel as Implementation
from gpugrad.kernels.cuda.blockwide import add, block_sum
from gpugrad.kernels.cuda.elementwise import LABEL, in_a_row, refuse_arrays, refuse_shapes
from gpugrad.kernels.cuda.language import (
    LANES,
    Elements,
    Int,
    Kernel,
    Size,
    cuda,
    device,
    fold,
    kernel,
    lanes,
    pack_size,
    read_pack,
    shuffle,
    thread,
    threads,
    write_pack,
)
from gpugrad.kernels.cuda.launch import Entry, Machine, machine, storage_of
from gpugrad.kernels.probabilities import (
    log_share,
    log_softmax_partial,
    log_softmax_term,
    share,
    softmax_partial,
    softmax_term,
)
from gpugrad.kernels.template import STORAGE, Placeholder, T, exp, log, read, write

Array = Any

INF = math.inf

#: Elements of a row that are work enough for a warp, and too little for a block.
SHORT = 1024

finish: Any = Placeholder("finish")
scaled: Any = Placeholder("scaled")
term: Any = Placeholder("term")
partial: Any = Placeholder("partial")
combine: Any = Placeholder("combine")
members: Any = Placeholder("members")
team_greatest: Any = Placeholder("team_greatest")
team_sum: Any = Placeholder("team_sum")

# -- teams ----------------------------------------------------------------------------------------


@device
def greater(a: Any, b: Any) -> Any:
    """The greater of two; `b` does not count if it is NaN."""
    return b if b > a else a


@device
def _in_warp(x: Any, scratch: Any) -> Any:
    mask = 16
    while mask > 0:
        x = combine(x, shuffle(x, mask))
        mask >>= 1
    return x


warp_sum: Any = _in_warp.bind(combine=add)
warp_greatest: Any = _in_warp.bind(combine=greater)


@device
def block_greatest(x: Any, scratch: Any) -> Any:
    """The greatest of all threads' `x`; as the functions of `blockwide.py`."""
    x = warp_greatest(x, scratch)
    cuda.syncthreads()  # `scratch` may still be read from the last time
    if cuda.threadIdx.x & 31 == 0:
        scratch[cuda.threadIdx.x >> 5] = x
    cuda.syncthreads()
    # The number of warps is a power of 2. That some are seen twice does not matter.
    return warp_greatest(scratch[cuda.threadIdx.x & ((cuda.blockDim.x >> 5) - 1)], scratch)


@device
def warp_members() -> Any:
    """How many threads a team has that is a warp."""
    return 32


@device
def block_members() -> Any:
    """How many threads a team has that is a block."""
    return cuda.blockDim.x


# -- what every row needs -------------------------------------------------------------------------


@device
def add_exp(total: Any, x: Any, base: Any) -> Any:
    """One more exponential to a sum of them."""
    return total + exp(x - base)


greatest_of = fold(greater, ".x")
sum_exp_of = fold(add_exp, ".x.")


@device
def carried(total: Any, base: Any, top: Any) -> Any:
    """A sum of exponentials relative to `base`, relative to `top`."""
    return total * exp(base - top) if top > base else total


@device
def base_of(largest: Any) -> Any:
    """What exponentials are relative to; infinities have no differences."""
    return T(0) if largest == T(-INF) else largest


@device
def row_statistics(
    x: Any, start: Any, n: Any, aligned: Any, lane: Any, width: Any, scratch: Any
) -> Any:
    """The greatest of `n` elements and the sum of exp(element - greatest); NaN where undefined.

    Every thread of the block must come here.
    """
    largest = T(-INF)
    total = T(0)
    i = lane * LANES
    while i + LANES <= n:
        pack = read_pack(x, start + i, LANES, aligned)
        top = greatest_of(largest, pack)
        total = sum_exp_of(carried(total, largest, top), pack, base_of(top))
        largest = top
        i += width * LANES
    i = n - n % LANES + lane
    while i < n:
        z = read(x, start + i)
        top = greater(largest, z)
        total = add_exp(carried(total, largest, top), z, base_of(top))
        largest = top
        i += width
    most = team_greatest(largest, scratch)
    return most, team_sum(total * exp(largest - most), scratch)


#: What a team is, for kernels over rows.
TEAMS: dict[str, dict[str, Any]] = {
    "warp": {
        "members": warp_members,
        "team_sum": warp_sum,
        "row_statistics": row_statistics.bind(team_greatest=warp_greatest, team_sum=warp_sum),
    },
    "block": {
        "members": block_members,
        "team_sum": block_sum,
        "row_statistics": row_statistics.bind(team_greatest=block_greatest, team_sum=block_sum),
    },
}


@device
def column_statistics(x: Any, start: Any, n: Any, step: Any) -> Any:
    """The same of elements `step` apart, by one thread alone."""
    largest = T(-INF)
    total = T(0)
    i = start
    end = start + n * step
    while i < end:
        z = read(x, i)
        top = greater(largest, z)
        total = add_exp(carried(total, largest, top), z, base_of(top))
        largest = top
        i += step
    return largest, total if largest > T(-INF) else total * T(math.nan)


@device
def first_of_column(row: Any, n: Any, inner: Any) -> Any:
    """Where the `n` elements begin of a row that lies across memory, `inner` apart."""
    return row // inner * n * inner + row % inner


# -- forward --------------------------------------------------------------------------------------


@device
def reciprocal(total: Any) -> Any:
    """What exponentials are scaled by, to be shares."""
    return T(1) / total


@device
def logarithm(total: Any) -> Any:
    """What is taken from exponents, to be logarithms of shares."""
    return log(total)


finish_pack = lanes(finish, "x..")


@kernel
def forward_rows_kernel(x: Elements, y: Elements, rows: Size, columns: Size, aligned: Int) -> None:
    """Every row by a team."""
    scratch = cuda.shared.array(32, T)
    width = members()
    lane = np.int64(cuda.threadIdx.x & (width - 1))
    teams = cuda.blockDim.x // width
    first = np.int64(cuda.blockIdx.x) * teams
    while first < rows:
        row = first + cuda.threadIdx.x // width
        start = row * columns
        n = columns if row < rows else np.int64(0)
        largest, total = row_statistics(x, start, n, aligned, lane, width, scratch)
        number = scaled(total)
        i = lane * LANES
        while i < n:
            z = read_pack(x, start + i, n - i, aligned)
            write_pack(y, start + i, finish_pack(z, largest, number), n - i, aligned)
            i += width * LANES
        first += np.int64(cuda.gridDim.x) * teams


@kernel
def forward_columns_kernel(x: Elements, y: Elements, rows: Size, length: Size, inner: Size) -> None:
    """Every row by a thread."""
    row = thread()
    while row < rows:
        start = first_of_column(row, length, inner)
        largest, total = column_statistics(x, start, length, inner)
        number = scaled(total)
        i = start
        end = start + length * inner
        while i < end:
            write(y, i, finish(read(x, i), largest, number))
            i += inner
        row += threads()


# -- backward -------------------------------------------------------------------------------------


@device
def add_term(total: Any, g: Any, y: Any) -> Any:
    """One more term to a sum."""
    return total + term(g, y)


added: Any = Placeholder("added")
added_of = fold(added, ".xx")
partial_pack = lanes(partial, "xx.")


@kernel
def backward_rows_kernel(
    g: Elements, y: Elements, gx: Elements, rows: Size, columns: Size, aligned: Int
) -> None:
    """Every row by a team."""
    scratch = cuda.shared.array(32, T)
    width = members()
    lane = np.int64(cuda.threadIdx.x & (width - 1))
    teams = cuda.blockDim.x // width
    first = np.int64(cuda.blockIdx.x) * teams
    while first < rows:
        row = first + cuda.threadIdx.x // width
        start = row * columns
        n = columns if row < rows else np.int64(0)
        total = T(0)
        i = lane * LANES
        while i < n:
            a = read_pack(g, start + i, n - i, aligned)
            b = read_pack(y, start + i, n - i, aligned)
            total = added_of(total, a, b)
            i += width * LANES
        total = team_sum(total, scratch)
        i = lane * LANES
        while i < n:
            a = read_pack(g, start + i, n - i, aligned)
            b = read_pack(y, start + i, n - i, aligned)
            write_pack(gx, start + i, partial_pack(a, b, total), n - i, aligned)
            i += width * LANES
        first += np.int64(cuda.gridDim.x) * teams


@kernel
def backward_columns_kernel(
    g: Elements, y: Elements, gx: Elements, rows: Size, length: Size, inner: Size
) -> None:
    """Every row by a thread."""
    row = thread()
    while row < rows:
        start = first_of_column(row, length, inner)
        end = start + length * inner
        total = T(0)
        i = start
        while i < end:
            total = added(total, read(g, i), read(y, i))
            i += inner
        i = start
        while i < end:
            write(gx, i, partial(read(g, i), read(y, i), total))
            i += inner
        row += threads()


# -- launching ------------------------------------------------------------------------------------

#: For each operation, what the bodies of its kernels stand for.
FORWARD = {
    "softmax": {"finish": share, "scaled": reciprocal},
    "log_softmax": {"finish": log_share, "scaled": logarithm},
}
BACKWARD = {
    "softmax_backward": {"added": add_term.bind(term=softmax_term), "partial": softmax_partial},
    "log_softmax_backward": {
        "added": add_term.bind(term=log_softmax_term),
        "partial": log_softmax_partial,
    },
}


@cache
def rows_kernel(name: str, team: str) -> Kernel:
    """The kernel of an operation over rows in memory, a team for each."""
    body = forward_rows_kernel if name in FORWARD else backward_rows_kernel
    parts = {**FORWARD, **BACKWARD}[name]
    bound = {**TEAMS[team], **parts}
    return body.bind(**bound).named(f"{name}_{team}")


@cache
def columns_kernel(name: str) -> Kernel:
    """The kernel of an operation over rows side by side, a thread for each."""
    body = forward_columns_kernel if name in FORWARD else backward_columns_kernel
    return body.bind(**{**FORWARD, **BACKWARD}[name]).named(f"{name}_columns")


class Rows:
    """Operands of one shape, laid so that rows can be worked on.

    Attributes
    ----------
    arrays:
        The operands, their elements one after the other.
    rows, length, inner:
        How many rows there are, of how many elements, and how far apart these are: 1 if they lie
        one after the other.
    """

    def __init__(self, axis: int, *operands: Array) -> None:
        first = operands[0]
        axis %= first.ndim
        self.order = [*(i for i in range(first.ndim) if i != axis), axis]
        self.length, self.inner = first.shape[axis], math.prod(first.shape[axis + 1 :])
        self.rows = first.size // self.length if self.length else 0
        turned = [x.transpose(self.order) for x in operands]
        # Rows may lie one after the other although their axis is not the last: a transposed view.
        if self.inner == 1 or all(x.flags.c_contiguous for x in turned):
            self.inner = 1
            self.arrays = [in_a_row(x) for x in turned]
        else:
            self.order = list(range(first.ndim))
            self.arrays = [in_a_row(x) for x in operands]

    def empty(self, gpu: Machine) -> Array:
        """A result of the operands' shape, laid as they are."""
        return gpu.empty(self.arrays[0].shape, self.arrays[0].dtype)

    def back(self, out: Array) -> Array:
        """A result with its axes where the operands had them."""
        return out.transpose([self.order.index(i) for i in range(len(self.order))])

    def team(self) -> str:
        """What works on a row."""
        return "warp" if self.length <= SHORT else "block"

    def blocks(self, gpu: Machine, most: int) -> tuple[int]:
        """Blocks for all rows."""
        at_once = gpu.threads // 32 if self.team() == "warp" else 1
        if self.inner > 1:
            at_once = gpu.threads
        return (max(1, min((self.rows + at_once - 1) // at_once, most)),)

    def aligned(self, gpu: Machine, *others: Array) -> int:
        """1 if packs may be loaded from all rows of all arrays, else 0."""
        first = self.arrays[0]
        if self.length % pack_size(storage_of(first)):
            return 0
        return gpu.aligned(*self.arrays, *others)


def launch_along(name: str, axis: int, *operands: Array) -> Array:
    """An operation along an axis of one or two operands of one shape and dtype."""
    gpu, storage = machine(operands[0]), storage_of(operands[0])
    laid = Rows(axis, *operands)
    out = laid.empty(gpu)
    if laid.rows:
        blocks = laid.blocks(gpu, gpu.wave)
        if laid.inner == 1:
            gpu.run(
                rows_kernel(name, laid.team())[storage], blocks,
                *laid.arrays, out, laid.rows, laid.length, laid.aligned(gpu, out),
            )  # fmt: skip
        else:
            gpu.run(
                columns_kernel(name)[storage], blocks,
                *laid.arrays, out, laid.rows, laid.length, laid.inner,
            )  # fmt: skip
    return laid.back(out)


def _implementation(name: str) -> Implementation:
    count = 1 if name in FORWARD else 2

    def run(m: Backend, *args: Any, axis: int = -1) -> Array:
        # A rule hands its parameters on by position, a forward by name.
        operands, axis = args[:count], args[count] if args[count:] else axis
        return launch_along(name, axis, *operands)

    def refuse(m: Backend, *args: Any, axis: Any = -1) -> str | None:
        operands, axis = args[:count], args[count] if args[count:] else axis
        if why := refuse_arrays(*operands) or refuse_shapes(*operands):
            return why
        if not isinstance(axis, int) or not -operands[0].ndim <= axis < operands[0].ndim:
            return f"axis {axis!r} of {operands[0].ndim}; kernels work along one"
        return None

    return Implementation(run, LABEL, refuse)


#: For the slots of the backend.
KERNELS = {name: _implementation(name) for name in (*FORWARD, *BACKWARD)}


def entries() -> Iterator[Entry]:
    """All that ships."""
    for storage in STORAGE:
        for name in (*FORWARD, *BACKWARD):
            for team in TEAMS:
                yield rows_kernel(name, team)[storage]
            yield columns_kernel(name)[storage]
