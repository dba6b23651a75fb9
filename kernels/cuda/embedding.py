"""Rows of a table, and the gradient of the table: no two threads add to one element.

The places are sorted by the row they name, those of one row in their own order. Then every element
of the gradient is written once, by one thread: the sum of its terms in that order, or zero. So the
result is the same bit for bit on every run.

Nobody looks for indices that are no row. Such a place reads NaN, and its gradient goes nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gpugrad.backend import Backend
from gpugrad.backend.bounds import check_rows
from gpugrad.backend.kernels import Kernel as Implementation
from gpugrad.kernels.cuda.blockwide import add
from gpugrad.kernels.cuda.elementwise import LABEL, in_a_row, refuse_arrays
from gpugrad.kernels.cuda.language import (
    LANES,
    Elements,
    Int,
    Longs,
    Size,
    cuda,
    device,
    kernel,
    lanes,
    pack_size,
    read_pack,
    write_pack,
    zero_pack,
)
from gpugrad.kernels.cuda.launch import Entry, machine, storage_of
from gpugrad.kernels.template import STORAGE, T

Array = Any


@device
def missing(x):
    """What is read where there is no row."""
    return T(np.nan)


@device
def over(total, terms):
    """A mean, of a sum."""
    return total / terms


add_pack = lanes(add, "xx")
missing_pack = lanes(missing, "x")
over_pack = lanes(over, "x.")


@kernel
def gather_kernel(
    weight: Elements, out: Elements, indices: Longs, rows: Size, places: Size, columns: Size,
    tile: Int, chunk: Size, aligned: Int,
) -> None:  # fmt: skip
    """Row k of `out` is row `indices[k]` of `weight`, for all places k."""
    column = (np.int64(cuda.blockIdx.x) * tile + (cuda.threadIdx.x & (tile - 1))) * LANES
    place = cuda.blockIdx.y * chunk + cuda.threadIdx.x // tile
    last = (cuda.blockIdx.y + 1) * chunk
    last = last if last < places else places
    left = columns - column
    if left > 0:
        while place < last:
            row = indices[place]
            x = missing_pack(zero_pack())
            if row >= 0 and row < rows:
                x = read_pack(weight, row * columns + column, left, aligned)
            write_pack(out, place * columns + column, x, left, aligned)
            place += cuda.blockDim.x // tile


@kernel
def sum_rows_kernel(
    g: Elements, out: Elements, order: Longs, starts: Longs, rows: Size, columns: Size,
    padding: Size, by_frequency: Int, tile: Int, chunk: Size, aligned: Int,
) -> None:  # fmt: skip
    """Row r of `out` is the sum of the rows `order[starts[r]:starts[r + 1]]` of `g`."""
    column = (np.int64(cuda.blockIdx.x) * tile + (cuda.threadIdx.x & (tile - 1))) * LANES
    row = cuda.blockIdx.y * chunk + cuda.threadIdx.x // tile
    last = (cuda.blockIdx.y + 1) * chunk
    last = last if last < rows else rows
    left = columns - column
    if left > 0:
        while row < last:
            k = starts[row]
            end = k if row == padding else starts[row + 1]
            terms = end - k
            total = zero_pack()
            # Four rows are on their way at a time.
            while k + 4 <= end:
                a = read_pack(g, order[k] * columns + column, left, aligned)
                b = read_pack(g, order[k + 1] * columns + column, left, aligned)
                c = read_pack(g, order[k + 2] * columns + column, left, aligned)
                d = read_pack(g, order[k + 3] * columns + column, left, aligned)
                total = add_pack(add_pack(add_pack(add_pack(total, a), b), c), d)
                k += 4
            while k < end:
                a = read_pack(g, order[k] * columns + column, left, aligned)
                total = add_pack(total, a)
                k += 1
            if by_frequency != 0 and terms > 0:
                total = over_pack(total, T(terms))
            write_pack(out, row * columns + column, total, left, aligned)
            row += cuda.blockDim.x // tile


def launch_gather(indices: Array, weight: Array) -> Array:
    """The rows of `weight` (V, D) that `indices`, int64 of any shape, name; all in a row."""
    gpu, storage = machine(weight), storage_of(weight)
    rows, columns = weight.shape
    out = gpu.empty((*indices.shape, columns), weight.dtype)
    if out.size:
        size = pack_size(storage)
        tiles = gpu.tiled(indices.size, columns, size)
        gpu.run(
            gather_kernel[storage], (tiles.across, tiles.chunks), weight, out, indices, rows,
            indices.size, columns, tiles.tile, tiles.rows,
            0 if columns % size else gpu.aligned(weight, out),
        )  # fmt: skip
    return out


def launch_sum_rows(
    g: Array, order: Array, starts: Array, rows: int, padding: int, by_frequency: bool
) -> Array:
    """Sums of rows of `g` (…, D): see :func:`sum_rows_kernel`."""
    gpu, storage = machine(g), storage_of(g)
    columns = g.shape[-1]
    out = gpu.empty((rows, columns), g.dtype)
    if out.size:
        size = pack_size(storage)
        tiles = gpu.tiled(rows, columns, size)
        gpu.run(
            sum_rows_kernel[storage], (tiles.across, tiles.chunks), g, out, order, starts, rows,
            columns, padding, by_frequency, tiles.tile, tiles.rows,
            0 if columns % size else gpu.aligned(g, out),
        )  # fmt: skip
    return out


def _numbers(m: Backend, indices: Array) -> Array:
    return in_a_row(m.astype(indices, m.dtype("int64"), copy=False))


def embedding(
    m: Backend,
    indices: Array,
    weight: Array,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Array:
    """The rows of `weight`, shape (V, D), that `indices` of any shape name."""
    check_rows("embedding", m, indices, weight.shape[0])
    return launch_gather(_numbers(m, indices), in_a_row(weight))


def embedding_backward(
    m: Backend,
    indices: Array,
    g: Array,
    rows: int,
    padding_row: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Array:
    """The gradient of a table of `rows` rows, for `g` of shape (*indices.shape, D)."""
    flat = m.reshape(_numbers(m, indices), (-1,))
    order = m.astype(m.argsort(flat, stable=True), m.dtype("int64"), copy=False)
    every = m.create("arange", rows + 1, dtype="int64", device=m.device(g))
    starts = m.searchsorted(m.take(flat, order, axis=0), every)
    padding = -1 if padding_row is None else padding_row
    starts = m.astype(starts, m.dtype("int64"), copy=False)
    return launch_sum_rows(in_a_row(g), order, starts, rows, padding, scale_grad_by_freq)


def _refuse(m: Backend, indices: Any, weight: Any, *args: Any, **parameters: Any) -> str | None:
    if getattr(getattr(indices, "dtype", None), "kind", "") not in ("i", "u"):
        return "indices that are no array of integers"
    if getattr(weight, "ndim", 0) != 2:
        return "a table without two axes"
    return refuse_arrays(weight)


def _refuse_backward(m: Backend, indices: Any, g: Any, *args: Any, **parameters: Any) -> str | None:
    return refuse_arrays(g)


#: For the slots of the backend.
KERNELS = {
    "embedding": Implementation(embedding, LABEL, _refuse),
    "embedding_backward": Implementation(embedding_backward, LABEL, _refuse_backward),
}


def entries() -> Iterator[Entry]:
    """All that ships."""
    for storage in STORAGE:
        yield gather_kernel[storage]
        yield sum_rows_kernel[storage]
