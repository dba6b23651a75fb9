"""Dropout, alone and after a product with bias, activation and residual: one pass over memory.

Each thread makes the random words of the elements that it has loaded, in registers. Forward and
backward make the same ones, so that no mask is ever stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel as Implementation
from gpugrad.backend.random import dropped, kept_scale, stream
from gpugrad.kernels.cuda.bias import SHARE, bias_total_kernel, from_operand, from_result
from gpugrad.kernels.cuda.blockwide import add
from gpugrad.kernels.cuda.elementwise import LABEL, in_a_row, refuse_arrays, refuse_shapes
from gpugrad.kernels.cuda.language import (
    LANES,
    Elements,
    Int,
    Kernel,
    Number,
    Packed,
    Size,
    Values,
    cuda,
    device,
    kernel,
    lanes,
    pack_size,
    read_pack,
    spread,
    thread,
    threads,
    write_pack,
    zero_pack,
)
from gpugrad.kernels.cuda.launch import Entry, machine, number_type, storage_of
from gpugrad.kernels.formula import formula
from gpugrad.kernels.random import philox_block
from gpugrad.kernels.template import STORAGE, Placeholder, T

Array = Any

#: Activations whose kernels ship; None stands for none. After others, dropout is an operation of
#: its own.
BEFORE_DROPOUT = (None, "relu", "gelu", "gelu_tanh", "silu")

f: Any = Placeholder("f")
local: Any = Placeholder("local")

add_pack = lanes(add, "xx")
f_pack = lanes(f, "x")
local_pack = lanes(local, "xx")

# -- the mask -------------------------------------------------------------------------------------


class Words(Packed):
    """The words of a pack of elements, as a function of the first one's place.

    Parameters
    ----------
    anywhere:
        Whether a pack may begin in the middle of a block; otherwise its place is a multiple of its
        size.
    """

    def __init__(self, anywhere: bool) -> None:
        super().__init__(philox_block, ".....", folds=False)
        self.name = "words_anywhere" if anywhere else "words"
        self.anywhere = anywhere

    def text(self, width: int) -> str:
        made = -(-width // 4)
        lines = [f"def {self.name}(i, o0, o1, s0, s1):"]
        lines += [_block_line(b) for b in range(made)]
        shifts = [s for s in range(4) if s + width <= 4 * made]
        if self.anywhere:
            lines.append(f"    if (i & 3) <= {shifts[-1]}:")
            lines.append(f"        return {_picked(width, shifts)}")
            lines.append(_block_line(made))
            shifts = [s for s in range(4) if s not in shifts]
        lines.append(f"    return {_picked(width, shifts if self.anywhere else shifts[::width])}")
        return "\n".join(lines) + "\n"


def _block_line(b: int) -> str:
    words = ", ".join(f"w{4 * b + j}" for j in range(4))
    return f"    {words} = f((i >> 2) + {b}, o0, o1, s0, s1)"


def _picked(width: int, shifts: list[int]) -> str:
    """Words in a row, from the one that `i & 3` names on."""

    def one(j: int) -> str:
        *others, last = (f"w{s + j}" for s in shifts)
        cases = (f"{w} if (i & 3) == {s} else " for s, w in zip(shifts, others))
        return f"({''.join(cases)}{last})"

    return ", ".join(one(j) for j in range(width))


words: Any = Words(anywhere=False)
words_anywhere: Any = Words(anywhere=True)


@device
def keep(x, word, scale, count):
    """`x`, scaled if it is kept: `count` of the 2**32 words are those of a dropped element."""
    return x * scale if word >= count else T(0)


keep_pack = lanes(keep, "xx..")

# -- dropout alone --------------------------------------------------------------------------------


@kernel
def dropout_kernel(
    x: Elements, y: Elements, scale: Number, count: Size, o0: Size, o1: Size, s0: Size, s1: Size,
    n: Size, aligned: Int,
) -> None:  # fmt: skip
    """y = x, dropped or scaled, for a stream (o0, o1, s0, s1)."""
    i = thread() * LANES
    step = threads() * LANES
    while i < n:
        drawn = words(i, o0, o1, s0, s1)
        kept = keep_pack(read_pack(x, i, n - i, aligned), drawn, scale, count)
        write_pack(y, i, kept, n - i, aligned)
        i += step


def _numbers(p: float, seed: int, offset: int) -> tuple[Any, ...]:
    """What a kernel is told of the mask: the factor, how many words drop, and the stream."""
    return kept_scale(p), dropped(p), *stream(seed, offset)


def launch_dropout(x: Array, p: float, seed: int, offset: int) -> Array:
    """An array whose elements lie in a row, dropped or scaled."""
    gpu, storage = machine(x), storage_of(x)
    y = gpu.empty(x.shape, x.dtype)
    if x.size:
        gpu.run(
            dropout_kernel[storage], gpu.flat(x.size, pack_size(storage)),
            x, y, *_numbers(p, seed, offset), x.size, gpu.aligned(x, y),
        )  # fmt: skip
    return y


# -- after a product ------------------------------------------------------------------------------


@kernel
def after_forward_kernel(
    x: Elements, bias: Elements, residual: Elements, y: Elements, biased: Int, adds: Int,
    scale: Number, count: Size, o0: Size, o1: Size, s0: Size, s1: Size, rows: Size, columns: Size,
    tile: Int, chunk: Size, aligned: Int,
) -> None:  # fmt: skip
    """y = f(x + bias), dropped or scaled, + residual; the bias if `biased`, that if `adds`."""
    column = (np.int64(cuda.blockIdx.x) * tile + (cuda.threadIdx.x & (tile - 1))) * LANES
    row = cuda.blockIdx.y * chunk + cuda.threadIdx.x // tile
    last = (cuda.blockIdx.y + 1) * chunk
    last = last if last < rows else rows
    left = columns - column
    if left > 0:
        b = zero_pack()
        if biased != 0:
            b = read_pack(bias, column, left, aligned)
        while row < last:
            i = row * columns + column
            z = f_pack(add_pack(read_pack(x, i, left, aligned), b))
            if count > 0:
                z = keep_pack(z, words_anywhere(i, o0, o1, s0, s1), scale, count)
            if adds != 0:
                z = add_pack(z, read_pack(residual, i, left, aligned))
            write_pack(y, i, z, left, aligned)
            row += cuda.blockDim.x // tile


@kernel
def after_backward_kernel(
    g: Elements, x: Elements, bias: Elements, gx: Elements, totals: Values, biased: Int,
    scale: Number, count: Size, o0: Size, o1: Size, s0: Size, s1: Size, rows: Size, columns: Size,
    tile: Int, chunk: Size, aligned: Int,
) -> None:  # fmt: skip
    """Row `blockIdx.y` of `totals` is the sum of the chunk's rows of `gx`."""
    share = cuda.shared.array(SHARE, T)
    thread = cuda.threadIdx.x
    width = cuda.blockDim.x
    column = (np.int64(cuda.blockIdx.x) * tile + (thread & (tile - 1))) * LANES
    row = cuda.blockIdx.y * chunk + thread // tile
    last = (cuda.blockIdx.y + 1) * chunk
    last = last if last < rows else rows
    left = columns - column
    sums = zero_pack()
    b = zero_pack()
    if biased != 0:
        b = read_pack(bias, column, left, aligned)
    if left > 0:
        while row < last:
            i = row * columns + column
            d = read_pack(g, i, left, aligned)
            if count > 0:
                d = keep_pack(d, words_anywhere(i, o0, o1, s0, s1), scale, count)
            d = local_pack(d, add_pack(read_pack(x, i, left, aligned), b))
            write_pack(gx, i, d, left, aligned)
            sums = add_pack(sums, d)
            row += width // tile
    # Lane j of all threads lies in a row, so that neighbours use different banks.
    spread(share, thread, sums, width)
    half = width >> 1
    while half >= tile:
        cuda.syncthreads()
        if thread < half:
            j = thread
            while j < LANES * width:
                share[j] += share[j + half]
                j += width
        half >>= 1
    if thread < tile:
        j = 0
        while j < LANES and j < left:
            totals[cuda.blockIdx.y * columns + column + j] = share[j * width + thread]
            j += 1


@device
def same(z):
    """The activation that does nothing."""
    return z


@device
def gradient(g, z):
    """Its derivative."""
    return g


@cache
def after_kernels(activation: str | None) -> tuple[Kernel, Kernel]:
    """Forward and backward; numbers of the activation are the default ones."""
    forward, backward = same, gradient
    if activation is not None:
        function, partial = formula(activation), formula(f"{activation}_partial")
        rule = from_result if partial.operands == ["g", "y"] else from_operand
        forward = function.plain
        backward = rule.bind(f=function.plain, df=partial.plain)
    name = activation or "linear"
    return (
        after_forward_kernel.bind(f=forward).named(f"after_forward_{name}"),
        after_backward_kernel.bind(local=backward).named(f"after_backward_{name}"),
    )


def launch_after_product(
    x: Array, bias: Array | None, residual: Array | None, activation: str | None, p: float,
    seed: int, offset: int,
) -> Array:  # fmt: skip
    """The forward of arrays whose elements lie in a row: `x` (…, C) and `bias` (C,)."""
    gpu, storage = machine(x), storage_of(x)
    y = gpu.empty(x.shape, x.dtype)
    if x.size:
        columns = x.shape[-1]
        rows = x.size // columns
        size = pack_size(storage)
        tiles = gpu.tiled(rows, columns, size)
        # Of what is not there only the address is looked at.
        b, r = (x if a is None else a for a in (bias, residual))
        gpu.run(
            after_kernels(activation)[0][storage], (tiles.across, tiles.chunks),
            x, b, r, y, bias is not None, residual is not None, *_numbers(p, seed, offset),
            rows, columns, tiles.tile, tiles.rows,
            0 if columns % size else gpu.aligned(x, b, r, y),
        )  # fmt: skip
    return y


def launch_after_product_backward(
    g: Array, x: Array, bias: Array | None, activation: str | None, p: float, seed: int, offset: int
) -> tuple[Array, Array | None]:
    """Gradients of `x` and `bias`."""
    gpu, storage = machine(x), storage_of(x)
    number = number_type(storage)
    columns = x.shape[-1]
    rows = x.size // columns if columns else 0
    size = pack_size(storage)
    tiles = gpu.tiled(rows, columns, size)
    gx = gpu.empty(x.shape, x.dtype)
    totals = gpu.empty((tiles.chunks, columns), number)
    b = x if bias is None else bias
    gpu.run(
        after_kernels(activation)[1][storage], (tiles.across, tiles.chunks),
        g, x, b, gx, totals, bias is not None, *_numbers(p, seed, offset),
        rows, columns, tiles.tile, tiles.rows, 0 if columns % size else gpu.aligned(g, x, b, gx),
    )  # fmt: skip
    if bias is None:
        return gx, None
    gb, out, bad = gpu.empty(bias.shape, bias.dtype), gpu.empty(1, number), gpu.empty(1, np.int32)
    gpu.run(
        bias_total_kernel[storage], (max(1, (columns + 31) // 32),),
        totals, gb, totals, bad, out, bad, columns, tiles.chunks, 0,
    )  # fmt: skip
    return gx, gb


# -- what they take -------------------------------------------------------------------------------


def dropout(m: Backend, x: Array, p: float = 0.5, seed: int = 0, offset: int = 0) -> Array:
    """`x` of any shape with its elements dropped or scaled."""
    return launch_dropout(in_a_row(x), p, seed, offset)


def bias_activation_dropout(
    m: Backend,
    x: Array,
    bias: Array | None = None,
    residual: Array | None = None,
    activation: str | None = None,
    p: float = 0.5,
    seed: int = 0,
    offset: int = 0,
) -> Array:
    """The forward; `x` and `residual` of shape (…, C), `bias` of shape (C,)."""
    b, r = (a if a is None else in_a_row(a) for a in (bias, residual))
    return launch_after_product(in_a_row(x), b, r, activation, p, seed, offset)


def bias_activation_dropout_backward(
    m: Backend,
    g: Array,
    x: Array,
    bias: Array | None,
    activation: str | None = None,
    p: float = 0.5,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Array, Array | None]:
    """Gradients of `x` and `bias`."""
    b = bias if bias is None else in_a_row(bias)
    return launch_after_product_backward(in_a_row(g), in_a_row(x), b, activation, p, seed, offset)


def _refuse(m: Backend, x: Any, *args: Any, **parameters: Any) -> str | None:
    return refuse_arrays(x)


def _refuse_forward(
    m: Backend,
    x: Any,
    bias: Any = None,
    residual: Any = None,
    activation: str | None = None,
    *args: Any,
    **parameters: Any,
) -> str | None:
    if activation not in BEFORE_DROPOUT:
        return f"no kernel for {activation}"
    if (why := refuse_shapes(x, x if residual is None else residual)) is not None:
        return why
    if bias is None:
        return None if x.ndim else "operands without axes"
    if (why := refuse_arrays(x, bias)) is None and (bias.ndim != 1 or x.shape[-1:] != bias.shape):
        return f"a bias of shape {bias.shape} for operands of shape {x.shape}"
    return why


def _refuse_backward(
    m: Backend, g: Any, x: Any, bias: Any, *args: Any, **parameters: Any
) -> str | None:
    return _refuse_forward(m, x, bias, g, *args, **parameters)


#: For the slots of the backend.
KERNELS = {
    "dropout": Implementation(dropout, LABEL, _refuse),
    "bias_activation_dropout": Implementation(bias_activation_dropout, LABEL, _refuse_forward),
    "bias_activation_dropout_backward": Implementation(
        bias_activation_dropout_backward, LABEL, _refuse_backward
    ),
}


def entries() -> Iterator[Entry]:
    """All that ships."""
    for storage in STORAGE:
        yield dropout_kernel[storage]
        for activation in BEFORE_DROPOUT:
            for made in after_kernels(activation):
                yield made[storage]
