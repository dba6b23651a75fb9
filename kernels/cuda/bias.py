"""Bias and activation in one pass, and its backward: both gradients and statistics in one pass.

The backward reads and writes memory once: the gradient of the operand, its sum of squares, how many
of its elements are not finite, and the gradient of the bias. A block leaves the sums of its rows
behind, and a second kernel adds them up, always in one order.

A block stands over `tile` packs of columns and `chunk` rows. Its threads keep their columns, so a
bias is read once and its gradient is summed in registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel as Implementation
from gpugrad.kernels.cuda.blockwide import add, block_count, block_sum, not_finite
from gpugrad.kernels.cuda.elementwise import LABEL, in_a_row, refuse_arrays, refuse_shapes
from gpugrad.kernels.cuda.language import (
    LANES,
    Elements,
    Int,
    Ints,
    Kernel,
    Size,
    Values,
    cuda,
    device,
    elements_of,
    fold,
    kernel,
    lanes,
    pack_size,
    read_pack,
    spread,
    write_pack,
    zero_pack,
)
from gpugrad.kernels.cuda.launch import Entry, Machine, machine, number_type, storage_of
from gpugrad.kernels.cuda.reduce import add_square
from gpugrad.kernels.formula import formula
from gpugrad.kernels.template import STORAGE, I, Placeholder, T, write

Array = Any

#: What can stand behind a bias: formulas whose numbers, if any, have default values.
BIASED = (
    "relu", "relu6", "relu_squared", "leaky_relu", "elu", "selu", "celu", "gelu", "gelu_tanh",
    "silu", "mish", "softplus", "hardtanh", "hardswish", "hardsigmoid", "sigmoid", "tanh",
    "softsign", "logsigmoid",
)  # fmt: skip


f: Any = Placeholder("f")
df: Any = Placeholder("df")
local: Any = Placeholder("local")

add_pack = lanes(add, "xx")
f_pack = lanes(f, "x")
local_pack = lanes(local, "xx")
squares_of = fold(add_square, ".x")
not_finite_of = fold(not_finite, ".x")

#: A pack for each thread of a block.
SHARE = elements_of(Machine.threads)


@kernel
def bias_forward_kernel(
    x: Elements, bias: Elements, y: Elements, rows: Size, columns: Size, tile: Int, chunk: Size,
    aligned: Int,
) -> None:  # fmt: skip
    """y = f(x + bias)."""
    column = (np.int64(cuda.blockIdx.x) * tile + (cuda.threadIdx.x & (tile - 1))) * LANES
    row = cuda.blockIdx.y * chunk + cuda.threadIdx.x // tile
    last = (cuda.blockIdx.y + 1) * chunk
    last = last if last < rows else rows
    left = columns - column
    if left > 0:
        b = read_pack(bias, column, left, aligned)
        while row < last:
            i = row * columns + column
            z = add_pack(read_pack(x, i, left, aligned), b)
            write_pack(y, i, f_pack(z), left, aligned)
            row += cuda.blockDim.x // tile


@kernel
def bias_backward_kernel(
    g: Elements, x: Elements, bias: Elements, gx: Elements, totals: Values, squares: Values,
    bad: Ints, rows: Size, columns: Size, tile: Int, chunk: Size, aligned: Int,
) -> None:  # fmt: skip
    """Row `blockIdx.y` of `totals` is the sum of the chunk's rows of `gx`."""
    scratch = cuda.shared.array(32, T)
    share = cuda.shared.array(SHARE, T)
    thread = cuda.threadIdx.x
    width = cuda.blockDim.x
    column = (np.int64(cuda.blockIdx.x) * tile + (thread & (tile - 1))) * LANES
    row = cuda.blockIdx.y * chunk + thread // tile
    last = (cuda.blockIdx.y + 1) * chunk
    last = last if last < rows else rows
    left = columns - column
    b = read_pack(bias, column, left, aligned)
    sums = zero_pack()
    total = T(0)
    count = I(0)
    if left > 0:
        while row < last:
            i = row * columns + column
            z = add_pack(read_pack(x, i, left, aligned), b)
            d = local_pack(read_pack(g, i, left, aligned), z)
            write_pack(gx, i, d, left, aligned)
            sums = add_pack(sums, d)
            total = squares_of(total, d)
            count = not_finite_of(count, d)
            row += width // tile
    total = block_sum(total, scratch)
    count = block_count(count, scratch)
    if thread == 0:
        squares[cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x] = total
        bad[cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x] = count
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


@kernel
def bias_total_kernel(
    totals: Values, gb: Elements, squares: Values, bad: Ints, out: Values, out_bad: Ints,
    columns: Size, chunks: Int, parts: Int,
) -> None:  # fmt: skip
    """The sums of the chunks to the bias' gradient, 32 columns to a block; the first block also
    puts together what was found of `gx`."""
    scratch = cuda.shared.array(32, T)
    share = cuda.shared.array(SHARE, T)
    thread = cuda.threadIdx.x
    column = np.int64(cuda.blockIdx.x) * 32 + (thread & 31)
    total = T(0)
    if column < columns:
        chunk = thread >> 5
        while chunk < chunks:
            total += totals[chunk * columns + column]
            chunk += cuda.blockDim.x >> 5
    share[thread] = total
    half = cuda.blockDim.x >> 1
    while half >= 32:
        cuda.syncthreads()
        if thread < half:
            share[thread] += share[thread + half]
        half >>= 1
    if thread < 32 and column < columns:
        write(gb, column, share[thread])
    if cuda.blockIdx.x == 0:
        total = T(0)
        count = I(0)
        i = thread
        while i < parts:
            total += squares[i]
            count = I(count + bad[i])
            i += cuda.blockDim.x
        total = block_sum(total, scratch)
        count = block_count(count, scratch)
        if thread == 0:
            out[0] = total
            out_bad[0] = count


@device
def from_operand(g: Any, z: Any) -> Any:
    """The derivative of an activation that is told its operand."""
    return df(g, z)


@device
def from_result(g: Any, z: Any) -> Any:
    """The derivative of one that is told its result."""
    return df(g, f(z))


@cache
def bias_kernels(activation: str) -> tuple[Kernel, Kernel]:
    """Forward and backward; numbers of the activation are the default ones."""
    forward, partial = formula(activation), formula(f"{activation}_partial")
    rule = from_result if partial.operands == ["g", "y"] else from_operand
    bound = rule.bind(f=forward.plain, df=partial.plain)
    return (
        bias_forward_kernel.bind(f=forward.plain).named(f"bias_forward_{activation}"),
        bias_backward_kernel.bind(local=bound).named(f"bias_backward_{activation}"),
    )


def launch_bias_activation(x: Array, bias: Array, activation: str) -> Array:
    """activation(x + bias) of `x` (…, C) and `bias` (C,), whose elements lie in a row."""
    gpu, storage = machine(x), storage_of(x)
    y = gpu.empty(x.shape, x.dtype)
    if x.size:
        columns = bias.size
        rows = x.size // columns
        size = pack_size(storage)
        tiles = gpu.tiled(rows, columns, size)
        aligned = 0 if columns % size else gpu.aligned(x, bias, y)
        gpu.run(
            bias_kernels(activation)[0][storage], (tiles.across, tiles.chunks),
            x, bias, y, rows, columns, tiles.tile, tiles.rows, aligned,
        )  # fmt: skip
    return y


def launch_bias_activation_backward(
    g: Array, x: Array, bias: Array, activation: str, bias_home: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """Gradients of `x` and `bias`; of `x` also Σg² and how many are bad, in arrays of one.

    The gradient of `bias` is written into `bias_home` if that is given.
    """
    gpu, storage = machine(x), storage_of(x)
    number = number_type(storage)
    columns = bias.size
    rows = x.size // columns if columns else 0
    size = pack_size(storage)
    tiles = gpu.tiled(rows, columns, size)
    blocks = tiles.across * tiles.chunks
    gx = gpu.empty(x.shape, x.dtype)
    gb = gpu.empty(bias.shape, bias.dtype) if bias_home is None else bias_home
    totals = gpu.empty((tiles.chunks, columns), number)
    squares, bad = gpu.empty(blocks, number), gpu.empty(blocks, np.int32)
    out, out_bad = gpu.empty(1, number), gpu.empty(1, np.int32)
    aligned = 0 if columns % size else gpu.aligned(g, x, bias, gx)
    gpu.run(
        bias_kernels(activation)[1][storage], (tiles.across, tiles.chunks),
        g, x, bias, gx, totals, squares, bad, rows, columns, tiles.tile, tiles.rows, aligned,
    )  # fmt: skip
    gpu.run(
        bias_total_kernel[storage], (max(1, (columns + 31) // 32),),
        totals, gb, squares, bad, out, out_bad, columns, tiles.chunks, blocks,
    )  # fmt: skip
    return gx, gb, out, out_bad


def bias_activation(m: Backend, x: Array, bias: Array, activation: str = "gelu") -> Array:
    """The forward; `x` of shape (…, C), `bias` of shape (C,)."""
    return launch_bias_activation(in_a_row(x), in_a_row(bias), activation)


def bias_activation_backward(
    m: Backend,
    g: Array,
    x: Array,
    bias: Array,
    activation: str,
    statistics: bool = False,
    bias_home: Array | None = None,
) -> tuple[Array, ...]:
    """Gradients of `x` and `bias`; with `statistics` also Σg² and the bad ones of the first."""
    gx, gb, squares, bad = launch_bias_activation_backward(
        in_a_row(g), in_a_row(x), in_a_row(bias), activation, bias_home
    )
    if not statistics:
        return gx, gb
    wide = m.dtype("float64")
    return gx, gb, m.concat([m.astype(squares, wide), m.astype(bad, wide)])


def sum_over_rows(m: Backend, g: Array, shape: tuple[int, ...], home: Array | None = None) -> Array:
    """The sum over all axes but the last, into `home` if that is given: rows are chunks of one."""
    gpu, storage = machine(g), storage_of(g)
    g = in_a_row(g)
    (columns,) = shape
    gb = gpu.empty(shape, g.dtype) if home is None else home
    out, bad = gpu.empty(1, g.dtype), gpu.empty(1, np.int32)
    gpu.run(
        bias_total_kernel[storage], (max(1, (columns + 31) // 32),),
        g, gb, out, bad, out, bad, columns, g.size // columns if columns else 0, 0,
    )  # fmt: skip
    return gb


def _refuse_rows(m: Backend, g: Any, shape: tuple[int, ...], home: Any = None) -> str | None:
    why = refuse_arrays(g)
    if why is None and storage_of(g) not in ("float32", "float64"):
        return f"sums of {g.dtype}, which are of another type"
    if why is None and g.shape[-1:] != shape:
        return f"sums of shape {shape} of operands of shape {g.shape}"
    if why is None and g.size > Machine.chunks * shape[0]:
        return f"more than {Machine.chunks} rows"
    return why


def _refuse_bias(m: Backend, x: Any, bias: Any, activation: str = "gelu") -> str | None:
    why = refuse_arrays(x, bias)
    if why is None and (bias.ndim != 1 or x.shape[-1:] != bias.shape):
        return f"a bias of shape {bias.shape} for operands of shape {x.shape}"
    if why is None and activation not in BIASED:
        return f"no kernel for {activation}"
    return why


def _refuse_bias_backward(
    m: Backend, g: Any, x: Any, bias: Any, activation: str, *options: Any, **others: Any
) -> str | None:
    return refuse_shapes(g, x) or _refuse_bias(m, x, bias, activation)


#: For the slots of the backend.
KERNELS = {
    "bias_activation": Implementation(bias_activation, LABEL, _refuse_bias),
    "bias_activation_backward": Implementation(
        bias_activation_backward, LABEL, _refuse_bias_backward
    ),
    "sum_over_rows": Implementation(sum_over_rows, LABEL, _refuse_rows),
}


def entries() -> Iterator[Entry]:
    """All that ships."""
    for storage in STORAGE:
        for name in BIASED:
            for made in bias_kernels(name):
                yield made[storage]
        yield bias_total_kernel[storage]
