"""Dropout, alone and after a product with bias, activation and residual: one pass over memory.

The random words of a few thousand elements at a time are made in the nearest cache and used there,
so the mask never reaches memory; the backward pass makes them again. Which word an element gets
depends on its place alone, so the division of the work does not matter.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.random import dropped, kept_scale, stream
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu import bias as products
from gpugrad.kernels.cpu.compile import CpuTemplate, numpy_storage, parallel, serial, storage_view
from gpugrad.kernels.cpu.elementwise import BLOCK, LABEL, flat, refuse_arrays
from gpugrad.kernels.random import philox_block
from gpugrad.kernels.template import Placeholder, T, arithmetic, device, read, where, write
from gpugrad.ops import formulas

Array = np.ndarray[Any, Any]

#: Elements whose words are made at a time: with operands and results they fit the nearest cache.
SPAN = 2048

#: Words of the blocks that the first and the last element are of, which other elements use.
SPARE = 6

forward_row: Any = Placeholder("forward_row")
forward_rows: Any = Placeholder("forward_rows")
backward_row: Any = Placeholder("backward_row")
backward_rows: Any = Placeholder("backward_rows")
finish: Any = Placeholder("finish")


# -- the mask -------------------------------------------------------------------------------------


@serial
def _draw(words, first, stream):
    """The words of whole blocks of a stream, from number `first` on."""
    o0, o1, s0, s1 = stream
    for b in range(words.size // 4):
        w0, w1, w2, w3 = philox_block(first + b, o0, o1, s0, s1)
        words[4 * b] = w0
        words[4 * b + 1] = w1
        words[4 * b + 2] = w2
        words[4 * b + 3] = w3


@device
def _words(room, start, count, stream):
    """The words of elements from number `start` on, as many as `room` holds without the spare ones.

    `count` is how many of the 2**32 words stand for an element that is dropped. If none does, there
    is nothing to draw.
    """
    if count == 0:
        room[:] = 0xFFFFFFFF
        return room
    skipped = start % 4
    _draw(room[: (skipped + room.size - SPARE + 3) // 4 * 4], start // 4, stream)
    return room[skipped:]


@device
def _limit(count):
    """What a word is above when its element is kept: 2**32, for everything, is no word."""
    return np.uint32(max(count - 1, 0))


@serial
def _keep(x, none, words, y, limit, scale):
    for i in range(y.size):
        write(y, i, where(words[i] > limit, read(x, i) * scale, T(0)))


@serial
def _keep_and_add(x, residual, words, y, limit, scale):
    for i in range(y.size):
        kept = where(words[i] > limit, read(x, i) * scale, T(0))
        write(y, i, kept + read(residual, i))


# -- dropout alone --------------------------------------------------------------------------------


@parallel
def _dropout(x, y, scale, count, stream):
    limit = _limit(count)
    for span in prange((y.size + SPAN - 1) // SPAN):
        i = span * SPAN
        words = _words(np.empty(SPAN + SPARE, np.uint32), i, count, stream)
        _keep(x[i : i + SPAN], x, words, y[i : i + SPAN], limit, scale)


def _numbers(storage: str, p: float, seed: int, offset: int) -> tuple[Any, ...]:
    """What a loop is told: the factor, how many words drop an element, and the stream."""
    number = getattr(np, arithmetic(storage))
    return number(kept_scale(p)), dropped(p), stream(seed, offset)


def dropout(m: Backend, x: Array, p: float = 0.5, seed: int = 0, offset: int = 0) -> Array:
    """`x` of any shape with its elements dropped or scaled."""
    y = empty(x.shape, x.dtype)
    storage = numpy_storage(x.dtype)
    _dropout[storage](flat(x), flat(y), *_numbers(storage, p, seed, offset))
    return y


# -- after a product ------------------------------------------------------------------------------


@device
def _same(z):
    return z


@device
def _gradient(g, z):
    return g


@cache
def _rows(activation: str | None) -> tuple[CpuTemplate, CpuTemplate]:
    """The loops over a row that `kernels/cpu/bias.py` has for an activation, and those for none."""
    if activation is None:
        return products._forward_row.bind(f=_same), products._backward_row.bind(local=_gradient)
    forward, backward = products._loops(activation)
    return forward.bound["row"], backward.bound["row"]  # type: ignore[return-value]


# Of a matrix, some rows: as many at a time as make a span, or one in pieces if it is longer. Either
# way their elements lie in a row.


@serial
def _forward_rows(x, bias, residual, y, first, last, scale, count, stream):
    columns = x.shape[1]
    limit = _limit(count)
    room = np.empty(SPAN + SPARE, np.uint32)
    z = np.empty(min(columns, SPAN), x.dtype)
    step = max(1, SPAN // columns)
    for top in range(first, last, step):
        bottom = min(top + step, last)
        for left in range(0, columns, SPAN):
            own = room[: (bottom - top) * min(columns - left, SPAN) + SPARE]
            words = _words(own, top * columns + left, count, stream)
            for i in range(top, bottom):
                forward_row(x[i, left : left + SPAN], bias[left : left + SPAN], z)
                finish(
                    z,
                    residual[i, left : left + SPAN],
                    words[(i - top) * columns :],
                    y[i, left : left + SPAN],
                    limit,
                    scale,
                )


@parallel
def _forward(x, bias, residual, y, scale, count, stream):
    rows = x.shape[0]
    per = max(1, BLOCK // x.shape[1])
    for block in prange((rows + per - 1) // per):
        last = min(block * per + per, rows)
        forward_rows(x, bias, residual, y, block * per, last, scale, count, stream)


@serial
def _backward_rows(g, x, bias, gx, total, seen, first, last, scale, count, stream):
    columns = x.shape[1]
    limit = _limit(count)
    room = np.empty(SPAN + SPARE, np.uint32)
    gz = np.empty(min(columns, SPAN), x.dtype)
    step = max(1, SPAN // columns)
    for top in range(first, last, step):
        bottom = min(top + step, last)
        for left in range(0, columns, SPAN):
            own = room[: (bottom - top) * min(columns - left, SPAN) + SPARE]
            words = _words(own, top * columns + left, count, stream)
            for i in range(top, bottom):
                kept = gz[: columns - left]
                mine = words[(i - top) * columns :]
                _keep(g[i, left : left + SPAN], g[i], mine, kept, limit, scale)
                backward_row(
                    kept,
                    x[i, left : left + SPAN],
                    bias[left : left + SPAN],
                    gx[i, left : left + SPAN],
                    total[left : left + SPAN],
                    seen,
                )


@parallel
def _backward(g, x, bias, gx, totals, seen, scale, count, stream):
    rows = x.shape[0]
    chunks = totals.shape[0]
    for chunk in prange(chunks):
        backward_rows(
            g, x, bias, gx, totals[chunk], seen[chunk], chunk * rows // chunks,
            (chunk + 1) * rows // chunks, scale, count, stream,
        )  # fmt: skip


@cache
def _loops(activation: str | None, adds: bool) -> tuple[CpuTemplate, CpuTemplate]:
    forward, backward = _rows(activation)
    rows = _forward_rows.bind(forward_row=forward, finish=_keep_and_add if adds else _keep)
    return (
        _forward.bind(forward_rows=rows),
        _backward.bind(backward_rows=_backward_rows.bind(backward_row=backward)),
    )


def _matrix(x: Array, columns: int) -> Array:
    return storage_view(np.ascontiguousarray(x).reshape(-1, columns))


def _vector(bias: Array | None, x: Array) -> Array:
    return flat(np.zeros(x.shape[-1:], x.dtype) if bias is None else bias)


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
    y = empty(x.shape, x.dtype)
    if not x.size:
        return y
    storage, columns = numpy_storage(x.dtype), x.shape[-1]
    rows = _matrix(x, columns)
    # A residual that is not there is not read.
    other = rows if residual is None else _matrix(residual, columns)
    kernel = _loops(activation, residual is not None)[0][storage]
    kernel(rows, _vector(bias, x), other, _matrix(y, columns), *_numbers(storage, p, seed, offset))
    return y


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
    storage, columns = numpy_storage(x.dtype), x.shape[-1]
    rows = x.size // columns if columns else 0
    gx = empty(x.shape, x.dtype)
    chunks = max(1, min(products.CHUNKS, rows))
    totals = np.zeros((chunks, columns), arithmetic(storage))
    if x.size:
        _loops(activation, False)[1][storage](
            _matrix(g, columns), _matrix(x, columns), _vector(bias, x), _matrix(gx, columns),
            totals, np.zeros((chunks, 2)), *_numbers(storage, p, seed, offset),
        )  # fmt: skip
    if bias is None:
        return gx, None
    return gx, totals.sum(axis=0, dtype=np.float64).astype(bias.dtype)


# -- what they take -------------------------------------------------------------------------------


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
    if activation is not None and not hasattr(formulas, f"{activation}_partial"):
        return f"no formula for {activation!r}"
    if (why := refuse_arrays(x, x if residual is None else residual)) is not None:
        return why
    if bias is None:
        return "operands without axes" if not x.ndim else None
    if not isinstance(bias, np.ndarray) or bias.dtype != x.dtype:
        return f"no kernel for {x.dtype} with a bias of {getattr(bias, 'dtype', type(bias))}"
    if bias.ndim != 1 or x.shape[-1:] != bias.shape:
        return f"a bias of shape {bias.shape} for operands of shape {x.shape}"
    return None


def _refuse_backward(
    m: Backend, g: Any, x: Any, bias: Any, *args: Any, **parameters: Any
) -> str | None:
    return _refuse_forward(m, x, bias, g, *args, **parameters)


KERNELS = {
    "dropout": Kernel(dropout, LABEL, _refuse),
    "bias_activation_dropout": Kernel(bias_activation_dropout, LABEL, _refuse_forward),
    "bias_activation_dropout_backward": Kernel(
        bias_activation_dropout_backward, LABEL, _refuse_backward
    ),
}
