"""The cross-entropy of logits with classes, and its gradient: one pass over the logits each.

Probabilities are never stored: see `kernels/probabilities.py` for the two numbers of each row that
are kept in their place. Rows and teams are those of `kernels/cuda/softmax.py`. The loss takes two
launches, of which the second adds up what the blocks of the first left behind; the gradient takes
one, and reads what it has to divide by from the device.

A target that is no class makes loss and gradient NaN: the host does not wait to look.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel as Implementation
from gpugrad.kernels.cuda.blockwide import add, block_sum, block_total
from gpugrad.kernels.cuda.elementwise import LABEL, in_a_row, refuse_arrays
from gpugrad.kernels.cuda.language import (
    LANES,
    Elements,
    Int,
    Kernel,
    Longs,
    Number,
    Size,
    Values,
    cuda,
    device,
    kernel,
    lanes,
    read_pack,
    thread,
    threads,
    write_pack,
    zero_pack,
)
from gpugrad.kernels.cuda.launch import Entry, machine, number_type, storage_of
from gpugrad.kernels.cuda.softmax import TEAMS, Rows, column_statistics, first_of_column
from gpugrad.kernels.probabilities import (
    distribution,
    loss,
    mismatch,
    share,
    shifted,
    smoothing,
)
from gpugrad.kernels.template import STORAGE, Placeholder, T, read, write

Array = Any

NAN = math.nan

members: Any = Placeholder("members")
team_sum: Any = Placeholder("team_sum")
row_statistics: Any = Placeholder("row_statistics")

# -- the loss -------------------------------------------------------------------------------------


@device
def weight_of(weight: Any, t: Any, weighted: Any) -> Any:
    """How much a class counts."""
    return weight[t] if weighted != 0 else T(1)


@device
def whole_of(whole: Any, classes: Any, weighted: Any) -> Any:
    """How much all classes count."""
    return whole[0] if weighted != 0 else T(classes)


@kernel
def loss_rows_kernel(
    x: Elements, target: Longs, weight: Values, whole: Values, losses: Values, largest: Values,
    total: Values, loss_parts: Values, weight_parts: Values, rows: Size, columns: Size,
    ignore: Size, certain: Number, spread: Number, weighted: Int, aligned: Int,
) -> None:  # fmt: skip
    """Every row by a team; each block leaves behind its rows' losses and weights, added up."""
    scratch = cuda.shared.array(32, T)
    width = members()
    lane = np.int64(cuda.threadIdx.x & (width - 1))
    teams = cuda.blockDim.x // width
    all_losses = T(0)
    all_counted = T(0)
    first = np.int64(cuda.blockIdx.x) * teams
    while first < rows:
        row = first + cuda.threadIdx.x // width
        start = row * columns
        t = target[row] if row < rows else ignore
        # What is ignored is not looked at: padding may hold anything, and costs nothing.
        n = columns if t != ignore and t >= 0 and t < columns else np.int64(0)
        top, sum_exp = row_statistics(x, start, n, aligned, lane, width, scratch)
        shifts = T(0)
        if spread > T(0):
            i = lane
            while i < n:
                shifts += shifted(read(x, start + i), top, weight_of(weight, i, weighted))
                i += width
            shifts = team_sum(shifts, scratch)
        if lane == 0 and row < rows:
            value = T(0) if t == ignore else T(NAN)
            if n > 0:
                w = weight_of(weight, t, weighted)
                value = loss(
                    read(x, start + t), top, sum_exp, shifts, w, certain, spread,
                    whole_of(whole, columns, weighted),
                )  # fmt: skip
                all_counted += w
            losses[row] = value
            largest[row] = top if n > 0 else T(0)
            total[row] = sum_exp if n > 0 else T(columns)
            all_losses += value
        first += np.int64(cuda.gridDim.x) * teams
    all_losses = block_sum(all_losses, scratch)
    all_counted = block_sum(all_counted, scratch)
    if cuda.threadIdx.x == 0:
        loss_parts[cuda.blockIdx.x] = all_losses
        weight_parts[cuda.blockIdx.x] = all_counted


@kernel
def loss_columns_kernel(
    x: Elements, target: Longs, weight: Values, whole: Values, losses: Values, largest: Values,
    total: Values, loss_parts: Values, weight_parts: Values, rows: Size, classes: Size,
    inner: Size, ignore: Size, certain: Number, spread: Number, weighted: Int,
) -> None:  # fmt: skip
    """The same, every row by a thread."""
    scratch = cuda.shared.array(32, T)
    all_losses = T(0)
    all_counted = T(0)
    row = thread()
    while row < rows:
        t = target[row]
        value = T(0) if t == ignore else T(NAN)
        top = T(0)
        sum_exp = T(classes)
        if t != ignore and t >= 0 and t < classes:
            start = first_of_column(row, classes, inner)
            top, sum_exp = column_statistics(x, start, classes, inner)
            shifts = T(0)
            if spread > T(0):
                i = np.int64(0)
                while i < classes:
                    z = read(x, start + i * inner)
                    shifts += shifted(z, top, weight_of(weight, i, weighted))
                    i += 1
            w = weight_of(weight, t, weighted)
            value = loss(
                read(x, start + t * inner), top, sum_exp, shifts, w, certain, spread,
                whole_of(whole, classes, weighted),
            )  # fmt: skip
            all_counted += w
        losses[row] = value
        largest[row] = top
        total[row] = sum_exp
        all_losses += value
        row += threads()
    all_losses = block_sum(all_losses, scratch)
    all_counted = block_sum(all_counted, scratch)
    if cuda.threadIdx.x == 0:
        loss_parts[cuda.blockIdx.x] = all_losses
        weight_parts[cuda.blockIdx.x] = all_counted


@kernel
def loss_total_kernel(
    loss_parts: Values, weight_parts: Values, y: Elements, counted: Values, parts: Int, mean: Int
) -> None:
    """One block puts the parts together: the weight of all targets, and the loss."""
    scratch = cuda.shared.array(32, T)
    value = block_total(loss_parts, parts, scratch)
    w = block_total(weight_parts, parts, scratch)
    if cuda.threadIdx.x == 0:
        counted[0] = w
        write(y, 0, value / w if mean != 0 else value)


# -- its gradient ---------------------------------------------------------------------------------


@device
def share_less(x: Any, largest: Any, scale: Any, less: Any) -> Any:
    """What is scaled less what the target has of it."""
    return share(x, largest, scale) - less


share_less_pack = lanes(share_less, "x...")
add_to_pack = lanes(add, "x.")


@device
def above_of(g: Any, row: Any, each: Any, counted: Any, mean: Any) -> Any:
    """The gradient of a row's loss."""
    above = read(g, row * each)
    return above / counted[0] if mean != 0 else above


@kernel
def gradient_rows_kernel(
    x: Elements, target: Longs, weight: Values, whole: Values, g: Elements, counted: Values,
    largest: Values, total: Values, gx: Elements, rows: Size, columns: Size, ignore: Size,
    certain: Number, spread: Number, weighted: Int, each: Int, mean: Int, width: Int, aligned: Int,
) -> None:  # fmt: skip
    """Every row by `width` threads, a power of 2."""
    lane = np.int64(cuda.threadIdx.x & (width - 1))
    teams = cuda.blockDim.x // width
    row = np.int64(cuda.blockIdx.x) * teams + cuda.threadIdx.x // width
    while row < rows:
        start = row * columns
        t = target[row]
        if t == ignore or t < 0 or t >= columns:
            fill = add_to_pack(zero_pack(), T(0) if t == ignore else T(NAN))
            i = lane * LANES
            while i < columns:
                write_pack(gx, start + i, fill, columns - i, aligned)
                i += width * LANES
        else:
            w = weight_of(weight, t, weighted)
            above = above_of(g, row, each, counted, mean)
            point, even, scale = distribution(
                above, w, total[row], certain, spread, whole_of(whole, columns, weighted)
            )
            top = largest[row]
            own = share_less(read(x, start + t), top, scale, even * w + point)
            if weighted != 0 and spread > T(0):
                i = lane
                while i < columns:
                    z = share_less(read(x, start + i), top, scale, even * weight[i])
                    write(gx, start + i, own if i == t else z)
                    i += width
            else:
                i = lane * LANES
                while i < columns:
                    pack = read_pack(x, start + i, columns - i, aligned)
                    pack = share_less_pack(pack, top, scale, even)
                    write_pack(gx, start + i, pack, columns - i, aligned)
                    # After the pack, by the same thread.
                    if i <= t and t < i + LANES:
                        write(gx, start + t, own)
                    i += width * LANES
        row += np.int64(cuda.gridDim.x) * teams


@kernel
def gradient_columns_kernel(
    x: Elements, target: Longs, weight: Values, whole: Values, g: Elements, counted: Values,
    largest: Values, total: Values, gx: Elements, rows: Size, classes: Size, inner: Size,
    ignore: Size, certain: Number, spread: Number, weighted: Int, each: Int, mean: Int,
) -> None:  # fmt: skip
    """Every row by a thread."""
    row = thread()
    while row < rows:
        start = first_of_column(row, classes, inner)
        t = target[row]
        i = np.int64(0)
        if t == ignore or t < 0 or t >= classes:
            while i < classes:
                write(gx, start + i * inner, T(0) if t == ignore else T(NAN))
                i += 1
        else:
            w = weight_of(weight, t, weighted)
            above = above_of(g, row, each, counted, mean)
            point, even, scale = distribution(
                above, w, total[row], certain, spread, whole_of(whole, classes, weighted)
            )
            while i < classes:
                less = even * weight_of(weight, i, weighted)
                less = less + point if i == t else less
                z = share_less(read(x, start + i * inner), largest[row], scale, less)
                write(gx, start + i * inner, z)
                i += 1
        row += threads()


# -- launching ------------------------------------------------------------------------------------


@cache
def loss_kernel(team: str) -> Kernel:
    """The kernel of the losses of rows in memory, a team for each."""
    return loss_rows_kernel.bind(**TEAMS[team]).named(f"class_loss_{team}")


class _Told:
    """What kernels are told of targets and classes: the first arrays, and the first numbers."""

    def __init__(
        self, laid: Rows, target: Array, weight: Array | None, ignore_index: int,
        label_smoothing: float,
    ) -> None:  # fmt: skip
        number = number_type(storage_of(laid.arrays[0]))
        certain, spread = smoothing(label_smoothing, laid.length)
        target = in_a_row(target.astype(np.int64, copy=False))
        if weight is None:
            gpu = machine(laid.arrays[0])
            self.arrays = (laid.arrays[0], target, gpu.empty(1, number), gpu.empty(1, number))
        else:
            weight = in_a_row(weight.astype(number, copy=False))
            self.arrays = (laid.arrays[0], target, weight, weight.sum(keepdims=True))
        self.numbers = (ignore_index, certain, spread, int(weight is not None))


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
    gpu, storage = machine(input), storage_of(input)
    number = number_type(storage)
    laid = Rows(1, input)
    told = _Told(laid, target, weight, ignore_index, label_smoothing)
    losses, largest, total = (gpu.empty(target.shape, number) for _ in range(3))
    # As many blocks on every GPU, for they add up.
    blocks = laid.blocks(gpu, gpu.parts)
    parts = gpu.empty(blocks, number), gpu.empty(blocks, number)
    rows = (*told.arrays, losses, largest, total, *parts, laid.rows, laid.length)
    if laid.inner == 1:
        aligned = laid.aligned(gpu)
        gpu.run(loss_kernel(laid.team())[storage], blocks, *rows, *told.numbers, aligned)
    else:
        gpu.run(loss_columns_kernel[storage], blocks, *rows, laid.inner, *told.numbers)
    y, counted = gpu.empty((), input.dtype), gpu.empty((), number)
    gpu.run(loss_total_kernel[storage], (1,), *parts, y, counted, *blocks, int(reduction == "mean"))
    if reduction == "none":
        y = losses.astype(input.dtype, copy=False)
    return y, largest, total, counted


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
    gpu, storage = machine(input), storage_of(input)
    laid = Rows(1, input)
    told = _Told(laid, target, weight, ignore_index, label_smoothing)
    gx = laid.empty(gpu)
    if laid.rows:
        g = in_a_row(g.astype(input.dtype, copy=False))
        arrays = (*told.arrays, g, counted, in_a_row(largest), in_a_row(total), gx)
        numbers = (*told.numbers, int(reduction == "none"), int(reduction == "mean"))
        blocks = laid.blocks(gpu, gpu.wave)
        sizes = (laid.rows, laid.length)
        if laid.inner == 1:
            width = 32 if laid.team() == "warp" else gpu.threads
            gpu.run(
                gradient_rows_kernel[storage], blocks,
                *arrays, *sizes, *numbers, width, laid.aligned(gpu, gx),
            )  # fmt: skip
        else:
            gpu.run(gradient_columns_kernel[storage], blocks, *arrays, *sizes, laid.inner, *numbers)
    return laid.back(gx)


def _refuse(
    m: Backend,
    input: Any,
    target: Any,
    weight: Any = None,
    ignore_index: Any = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> str | None:
    why = refuse_arrays(input)
    for x in (target,) if weight is None else (target, weight):
        if why is None and not hasattr(x, "flags"):
            why = f"a {type(x).__name__} among the operands; kernels take arrays"
    if why is None and weight is not None:
        why = refuse_arrays(weight)
    return why or mismatch(input, target, weight, ignore_index)


def _refuse_backward(
    m: Backend, input: Any, g: Any, target: Any, weight: Any, largest: Any, total: Any,
    counted: Any, ignore_index: Any, reduction: str, label_smoothing: float,
) -> str | None:  # fmt: skip
    shape = target.shape if reduction == "none" else ()
    if why := refuse_arrays(g):
        return why
    if g.shape != shape:
        return f"a gradient of shape {g.shape} for a loss of shape {shape}"
    return _refuse(m, input, target, weight, ignore_index)


#: For the slots of the backend.
KERNELS = {
    "class_cross_entropy": Implementation(class_cross_entropy, LABEL, _refuse),
    "class_cross_entropy_backward": Implementation(
        class_cross_entropy_backward, LABEL, _refuse_backward
    ),
}


def entries() -> Iterator[Entry]:
    """All that ships."""
    for storage in STORAGE:
        for team in TEAMS:
            yield loss_kernel(team)[storage]
        yield loss_columns_kernel[storage]
        yield loss_total_kernel[storage]
        yield gradient_rows_kernel[storage]
        yield gradient_columns_kernel[storage]
