"""Rows of a table, and the gradient of the table: no two threads add to one element.

The places are put in the order of the rows they name by counting, those of one row in their own
order. Then every element of the gradient is written once, by one thread: the sum of its terms in
that order, or zero. So the result is the same bit for bit on any number of threads, and equal to
that of adding the terms up one after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.bounds import check_rows
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu.compile import numpy_storage, parallel, serial, storage_view
from gpugrad.kernels.cpu.elementwise import BLOCK, LABEL, refuse_arrays
from gpugrad.kernels.template import T, device, read, write

Array = np.ndarray[Any, Any]

#: Parts that the rows are divided into, about equal in work.
PARTS = 64

#: The one instance of a loop that computes nothing with the elements, whatever they are stored as.
MOVED = "float32"

#: Columns that a thread works on at a time: of a row that most places name, each has a share.
WIDTH = 256

# -- reading --------------------------------------------------------------------------------------


@serial
def _copy(x, y):
    for j in range(y.size):
        y[j] = x[j]


@parallel
def _gather(indices, weight, out):
    per = max(1, BLOCK // max(1, weight.shape[1]))
    for block in prange((indices.size + per - 1) // per):
        for i in range(block * per, min(block * per + per, indices.size)):
            _copy(weight[indices[i]], out[i])


def embedding(
    m: Backend,
    indices: Array,
    weight: Array,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Array:
    """The rows of `weight`, shape (V, D), that `indices` of any shape name."""
    check_rows("embedding", m, indices, weight.shape[0])
    out = empty((*indices.shape, weight.shape[1]), weight.dtype)
    if out.size:
        _gather[MOVED](_numbers(indices), _table(weight), _table(out))
    return out


def _numbers(indices: Array) -> Array:
    """The indices in a row, of one of two types."""
    kind = np.int32 if indices.dtype == np.int32 else np.int64
    return np.ascontiguousarray(indices, dtype=kind).reshape(-1)


def _table(x: Array) -> Array:
    return storage_view(np.ascontiguousarray(x).reshape(-1, x.shape[-1]))


# -- the gradient ---------------------------------------------------------------------------------


@serial
def _sort(indices, starts, order, padding):
    """Places by row: those of row `r` are `order[starts[r]:starts[r + 1]]`, in their own order."""
    for i in range(indices.size):
        if indices[i] != padding:
            starts[indices[i] + 2] += 1
    for r in range(2, starts.size):
        starts[r] += starts[r - 1]
    # Entry r + 1 counts up from the beginning of row r to its end, the beginning of row r + 1.
    for i in range(indices.size):
        if indices[i] != padding:
            order[starts[indices[i] + 1]] = i
            starts[indices[i] + 1] += 1


@device
def _boundary(starts, rows, part, parts):
    """The first row of a part. To write a row is half the work of a term: that is only read."""
    work = (rows + 2 * starts[rows]) * part // parts
    low, high = 0, rows
    while low < high:
        middle = (low + high) // 2
        if middle + 2 * starts[middle] < work:
            low = middle + 1
        else:
            high = middle
    return low


@serial
def _first(g, total):
    for j in range(g.size):
        total[j] = read(g, j)


@serial
def _add(g, total):
    for j in range(g.size):
        total[j] += read(g, j)


@serial
def _store(total, out, terms):
    for j in range(out.size):
        write(out, j, total[j] / terms)


@serial
def _clear(out):
    out[:] = 0


@serial
def _sum_rows(g, starts, order, out, first, last, left, by_frequency):
    """Some rows of the gradient, `WIDTH` columns of them."""
    total = np.empty(WIDTH, T)
    for row in range(first, last):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            _clear(out[row, left : left + WIDTH])
            continue
        _first(g[order[begin], left : left + WIDTH], total)
        for k in range(begin + 1, end):
            _add(g[order[k], left : left + WIDTH], total)
        terms = T(end - begin) if by_frequency else T(1)
        _store(total, out[row, left : left + WIDTH], terms)


@parallel
def _sum(g, starts, order, out, by_frequency):
    rows, columns = out.shape
    parts = min(PARTS, rows)
    across = (columns + WIDTH - 1) // WIDTH
    for piece in prange(parts * across):
        part, left = piece % parts, piece // parts * WIDTH
        first, last = _boundary(starts, rows, part, parts), _boundary(starts, rows, part + 1, parts)
        _sum_rows(g, starts, order, out, first, last, left, by_frequency)


def embedding_backward(
    m: Backend,
    indices: Array,
    g: Array,
    rows: int,
    padding_row: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Array:
    """The gradient of a table of `rows` rows, for `g` of shape (*indices.shape, D)."""
    out = empty((rows, g.shape[-1]), g.dtype)
    if out.size:
        starts = np.zeros(rows + 2, np.int64)
        order = np.empty(indices.size, np.int64)
        padding = -1 if padding_row is None else padding_row
        _sort[MOVED](_numbers(indices), starts, order, padding)
        _sum[numpy_storage(g.dtype)](_table(g), starts, order, _table(out), scale_grad_by_freq)
    return out


# -- what they take -------------------------------------------------------------------------------


def _refuse(m: Backend, indices: Any, weight: Any, *args: Any, **parameters: Any) -> str | None:
    if not isinstance(indices, np.ndarray) or indices.dtype.kind not in "iu":
        return "indices that are no array of integers"
    if getattr(weight, "ndim", 0) != 2:
        return "a table without two axes"
    return refuse_arrays(weight)


def _refuse_backward(m: Backend, indices: Any, g: Any, *args: Any, **parameters: Any) -> str | None:
    return refuse_arrays(g)


KERNELS = {
    "embedding": Kernel(embedding, LABEL, _refuse),
    "embedding_backward": Kernel(embedding_backward, LABEL, _refuse_backward),
}
