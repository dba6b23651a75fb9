"""Attention, forward and backward, without the matrix of all scores.

A block of queries meets one block of keys after the other. The scores of two blocks lie in the
nearest cache, keys down and queries across: so what concerns all keys of a query, its greatest
score and the sum of its exponentials, is found for a vector of queries at a time, and the products
on either side take their operands where they are. Only the block of queries, and that of their
gradients, are turned around once (`kernels/cpu/microkernel.py`).

Forward, a block of queries is one thread's; backward, so are some keys of a head, all of them where
there are heads enough. No sum depends on the number of threads.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.attention import heads_of, packed_misfit, scale_of, scores_shape
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.random import dropped, kept_scale, stream
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu.compile import numpy_storage, parallel, serial
from gpugrad.kernels.cpu.elementwise import LABEL
from gpugrad.kernels.cpu.gemm import _address
from gpugrad.kernels.cpu.memory import size_of
from gpugrad.kernels.cpu.microkernel import panel, product
from gpugrad.kernels.cpu.products import _four_axes
from gpugrad.kernels.cpu.scores import (
    ADDED,
    NONE,
    SEEN,
    clear,
    differentiate,
    differentiate_thinned,
    draw_kept,
    finish,
    levels,
    masked,
    row_at,
    scale_rows,
    soften,
    thin,
    turn,
)
from gpugrad.kernels.template import T, arithmetic, device

Array = np.ndarray[Any, Any]

#: Queries and keys of a block. The scores of both, and those of their gradients, take 32 KiB.
QUERIES, KEYS = 32, 128

#: Heads from which there is no need to cut one: each thread of many has some.
ENOUGH = 8

#: Keys of a head that are worth a thread.
RANGE = 4 * KEYS

# -- forward --------------------------------------------------------------------------------------


@serial
def _forward_block(q, k, v, y, lse, mask, sizes, drop, numbers, b, h, i):
    """A block of queries of a head, from number `i` on."""
    heads, queries, keys, features, out, is_causal = sizes
    scale, factor = numbers
    width = panel()
    n = min(QUERIES, queries - i)
    stop = min(keys, i + n) if is_causal else keys
    packed = np.empty((QUERIES + width) * features, T)
    turn(row_at(q, b, h, i), q[3], n, features, scale, packed)
    tile = np.empty((KEYS, QUERIES), T)
    kept = np.empty((KEYS if drop[0] else 0, QUERIES), T)
    acc = np.zeros((QUERIES, out), T)
    base, shrunk = np.empty(QUERIES, T), np.empty(QUERIES, T)
    top, total = np.full(QUERIES, T(-np.inf)), np.zeros(QUERIES, T)
    for j in range(0, stop, KEYS):
        m = min(KEYS, stop - j)
        product(
            m, n, 1, features, row_at(k, b, h, j), (k[3], 0, 1), _address(packed),
            (0, width, features * width), _address(tile), QUERIES, False,
        )  # fmt: skip
        masked(tile, m, n, mask, b, h, i, j, is_causal)
        soften(tile, m, n, top, base, total, shrunk)
        if drop[0]:
            start = ((b * heads + h) * queries + i) * keys + j
            draw_kept(kept, m, n, start, keys, drop, factor)
            thin(tile, kept, m, n)
        if j:
            scale_rows(acc, n, out, shrunk)
        product(
            n, out, 1, m, _address(tile), (1, 0, QUERIES), row_at(v, b, h, j), (0, v[3], width),
            _address(acc), out, j > 0,
        )  # fmt: skip
    sums = lse[(b * heads + h) * queries + i :]
    finish(acc, n, out, top, total, row_at(y, b, h, i), y[3], sums)


@device
def _dealt(unit, count):
    """Number `unit` of `count` parts, in turn from the front and from the back.

    With causality the last have the most work; so threads, each with some in a row, have alike.
    """
    half = unit // 2
    return half if unit % 2 == 0 else count - 1 - half


@serial
def _forward_unit(q, k, v, y, lse, mask, sizes, drop, numbers, count, unit):
    """One block of queries, of the `count` that each head has."""
    head, i = unit // count, _dealt(unit % count, count) * QUERIES
    heads = sizes[0]
    _forward_block(q, k, v, y, lse, mask, sizes, drop, numbers, head // heads, head % heads, i)


@parallel
def _forward(q, k, v, y, lse, mask, sizes, drop, numbers, units, count):
    for unit in prange(units):
        _forward_unit(q, k, v, y, lse, mask, sizes, drop, numbers, count, unit)


# -- backward -------------------------------------------------------------------------------------


@serial
def _backward_range(operands, gradients, lse, mask, sizes, drop, numbers, b, h, first, last):
    """Gradients of the keys from `first` to `last` of a head, and their share of the queries'."""
    g, q, k, v, y = operands
    gq, gk, gv = gradients
    heads, queries, keys, features, out, is_causal = sizes
    scale, factor = numbers
    width = panel()
    turned_q = np.empty((QUERIES + width) * features, T)
    turned_g = np.empty((QUERIES + width) * out, T)
    tile, other = np.empty((KEYS, QUERIES), T), np.empty((KEYS, QUERIES), T)
    kept = np.empty((KEYS if drop[0] else 0, QUERIES), T)
    level = np.empty(QUERIES, T)
    if gk[0]:
        clear(row_at(gk, b, h, first), gk[3], last - first, features)
    if gv[0]:
        clear(row_at(gv, b, h, first), gv[3], last - first, out)
    for i in range(0, queries, QUERIES):
        n = min(QUERIES, queries - i)
        stop = min(last, i + n) if is_causal else last
        if stop <= first:
            if gq[0]:
                clear(row_at(gq, b, h, i), gq[3], n, features)
            continue
        at_g, at_q = row_at(g, b, h, i), row_at(q, b, h, i)
        turn(at_q, q[3], n, features, scale, turned_q)
        turn(at_g, g[3], n, out, T(1), turned_g)
        levels((at_g, g[3]), (row_at(y, b, h, i), y[3]), n, out, level)
        sums = lse[(b * heads + h) * queries + i :]
        for j in range(first, stop, KEYS):
            m = min(KEYS, stop - j)
            at_k = row_at(k, b, h, j)
            product(
                m, n, 1, features, at_k, (k[3], 0, 1), _address(turned_q),
                (0, width, features * width), _address(tile), QUERIES, False,
            )  # fmt: skip
            masked(tile, m, n, mask, b, h, i, j, is_causal)
            product(
                m, n, 1, out, row_at(v, b, h, j), (v[3], 0, 1), _address(turned_g),
                (0, width, out * width), _address(other), QUERIES, False,
            )  # fmt: skip
            if drop[0]:
                start = ((b * heads + h) * queries + i) * keys + j
                draw_kept(kept, m, n, start, keys, drop, factor)
                differentiate_thinned(tile, other, kept, m, n, sums, level, scale)
            else:
                differentiate(tile, other, m, n, sums, level, scale)
            if gv[0]:
                product(
                    m, out, 1, n, _address(tile), (QUERIES, 0, 1), at_g, (0, g[3], width),
                    row_at(gv, b, h, j), gv[3], True,
                )  # fmt: skip
            if gk[0]:
                product(
                    m, features, 1, n, _address(other), (QUERIES, 0, 1), at_q, (0, q[3], width),
                    row_at(gk, b, h, j), gk[3], True,
                )  # fmt: skip
            if gq[0]:
                product(
                    n, features, 1, m, _address(other), (1, 0, QUERIES), at_k, (0, k[3], width),
                    row_at(gq, b, h, i), gq[3], j > first,
                )  # fmt: skip


@serial
def _backward_unit(operands, gradients, lse, mask, sizes, drop, numbers, ranges, step, unit):
    """One range of one head's keys, of the `ranges` that each head is cut into."""
    heads, keys = sizes[0], sizes[2]
    gq, gk, gv = gradients
    head, part = unit // ranges, _dealt(unit % ranges, ranges)
    # Each range has queries' gradients of its own, `step` elements apart, to be summed later.
    address = gq[0] + part * step * size_of(T(0)) if gq[0] else gq[0]
    span = (keys + ranges - 1) // ranges
    _backward_range(
        operands, ((address, gq[1], gq[2], gq[3]), gk, gv), lse, mask, sizes, drop, numbers,
        head // heads, head % heads, min(part * span, keys), min(part * span + span, keys),
    )  # fmt: skip


# The compiler takes no tuples of tuples into a parallel loop.
@parallel
def _backward(
    g, q, k, v, y, gq, gk, gv, lse, mask, sizes, drop, numbers, units, ranges, step,
):  # fmt: skip
    for unit in prange(units):
        _backward_unit(
            (g, q, k, v, y), (gq, gk, gv), lse, mask, sizes, drop, numbers, ranges, step, unit
        )


# -- what the backend calls -----------------------------------------------------------------------

NOWHERE = (0, 0, 0, 0)


def _ready(x: Array, batch: tuple[int, ...]) -> Array:
    """An operand of four axes that loops can read: aligned rows of contiguous elements."""
    if x.dtype.itemsize == 2:
        x = x.astype(np.float32)
    elif x.strides[-1] != x.itemsize or not x.flags.aligned:
        x = np.ascontiguousarray(x)
        x = x if x.flags.aligned else x.copy()
    return _four_axes(x, batch)


def _where(x: Array) -> tuple[int, ...]:
    size = x.itemsize
    return (x.ctypes.data, *(s // size if n > 1 else 0 for s, n in zip(x.strides[:3], x.shape)))


def _where_mask(mask: Array | None, real: Any, batch: tuple[int, ...]) -> tuple[Any, Any]:
    """What loops are told of a mask, and what must stay alive meanwhile."""
    if mask is None:
        return (NONE, 0, 0, 0, 0, 0), None
    kind = SEEN if mask.dtype == bool else ADDED
    x = mask.view(np.uint8) if kind == SEEN else mask.astype(real, copy=False)
    if not x.flags.aligned:
        x = x.copy()
    x = _four_axes(x, batch)
    strides = (s // x.itemsize if n > 1 else 0 for s, n in zip(x.strides, x.shape))
    return (kind, x.ctypes.data, *strides), x


def _like(x: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """An array for a result; where heads of `x` lie side by side, so do its own."""
    if not 3 <= len(shape) <= 4 or x.flags.c_contiguous:
        return empty(shape, dtype)
    return empty((*shape[:-3], shape[-2], shape[-3], shape[-1]), dtype).swapaxes(-2, -3)


class _Call:
    """What forward and backward of one set of operands are told alike."""

    def __init__(
        self, query: Array, key: Array, value: Array, attn_mask: Array | None, is_causal: bool,
        scale: float | None, dropout_p: float, seed: int, offset: int,
    ) -> None:  # fmt: skip
        shape = scores_shape(query, key, value, attn_mask)
        assert shape is not None
        *batch, queries, keys = shape
        self.batch = tuple(batch)
        self.storage = arithmetic(numpy_storage(query.dtype))
        self.operands = [_ready(x, self.batch) for x in (query, key, value)]
        outer = 1 if len(batch) < 2 else prod(batch[:-1])
        heads = batch[-1] if batch else 1
        self.many = outer
        self.heads = heads
        self.sizes = (heads, queries, keys, query.shape[-1], value.shape[-1], int(is_causal))
        self.mask, self._mask = _where_mask(attn_mask, self.storage, self.batch)
        number = getattr(np, self.storage)
        self.drop = (dropped(dropout_p), *stream(seed, offset))
        self.numbers = (number(scale_of(query, scale)), number(kept_scale(dropout_p)))

    def result(self, like: Array, length: int, features: int) -> tuple[Array, Array]:
        """An array for a result, and what loops write to."""
        made = _like(like, (*self.batch, length, features), self.storage)
        return made, _four_axes(made, self.batch)


def forward(query: Array, key: Array, value: Array, y: Array | None, *more: Any) -> Any:
    """The result, in `y` if that is given, and each query's logarithm of a sum."""
    call = _Call(query, key, value, *more)
    heads, queries, _, _, out, _ = call.sizes
    storage = call.storage
    count = -(-queries // QUERIES)
    if y is None or y.dtype != storage:
        made, target = call.result(query, queries, out)
    else:
        made, target = y, _four_axes(y, call.batch)
    lse = np.empty((*call.batch, queries), storage)
    q, k, v = call.operands
    _forward[storage](
        _where(q), _where(k), _where(v), _where(target), lse.reshape(-1), call.mask, call.sizes,
        call.drop, call.numbers, call.many * heads * count, count,
    )  # fmt: skip
    if made is not y and y is not None:
        y[...] = made
        made = y
    return made if made.dtype == query.dtype else made.astype(query.dtype), lse


def backward(
    g: Array, query: Array, key: Array, value: Array, y: Array, lse: Array, needs: Any,
    places: Any, *more: Any,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients that `needs` asks for, in `places` where there are some."""
    call = _Call(query, key, value, *more)
    heads, queries, keys, features, out, _ = call.sizes
    storage, batch = call.storage, call.batch
    q, k, v = call.operands
    g_, y_ = (_ready(x, batch) for x in (g, y))
    made: list[Any] = [None, None, None]
    where_: list[Any] = [NOWHERE] * 3
    count = call.many * heads
    ranges = 1 if count >= ENOUGH else max(1, min(-(-keys // RANGE), ENOUGH // max(count, 1)))
    parts = None
    for i, x in enumerate((query, key, value)):
        if not needs[i]:
            continue
        length, width = (queries, keys, keys)[i], (features, features, out)[i]
        if places is not None and places[i].dtype == storage:
            made[i], target = places[i], _four_axes(places[i], batch)
        else:
            made[i], target = call.result(x, length, width)
        where_[i] = _where(target)
        if i == 0 and ranges > 1:
            parts = empty((ranges, call.many, heads, queries, features), storage)
            where_[0], total = _where(parts[0]), target
    _backward[storage](
        *map(_where, (g_, q, k, v, y_)), *where_, lse.reshape(-1), call.mask,
        call.sizes, call.drop, call.numbers, count * ranges, ranges, count * queries * features,
    )  # fmt: skip
    if parts is not None:
        parts.sum(axis=0, out=total)
    for i, x in enumerate(made):
        if x is not None and x.dtype != query.dtype:
            made[i] = x.astype(query.dtype)
    return tuple(made)


def refuse(
    m: Backend, query: Any, key: Any, value: Any, attn_mask: Any = None, *parameters: Any,
    **options: Any,
) -> str | None:  # fmt: skip
    """Why there is no kernel for these operands."""
    for x in (query, key, value):
        if not isinstance(x, np.ndarray):
            return f"a {type(x).__name__} among the operands; kernels take arrays"
        if not numpy_storage(x.dtype) or x.dtype != query.dtype:
            return f"operands of {query.dtype} and {x.dtype}"
    if attn_mask is not None and (
        not isinstance(attn_mask, np.ndarray)
        or not (attn_mask.dtype == bool or numpy_storage(attn_mask.dtype))
    ):
        return f"a mask of {getattr(attn_mask, 'dtype', type(attn_mask).__name__)}"
    if scores_shape(query, key, value, attn_mask) is None:
        return "operands that do not fit together"
    return None


def _run(
    m: Backend, query: Array, key: Array, value: Array, attn_mask: Array | None = None,
    is_causal: bool = False, scale: float | None = None, dropout_p: float = 0.0, seed: int = 0,
    offset: int = 0,
) -> Any:  # fmt: skip
    more = (attn_mask, is_causal, scale, dropout_p, seed, offset)
    return forward(query, key, value, None, *more)


def _run_backward(
    m: Backend, g: Array, query: Array, key: Array, value: Array, attn_mask: Array | None,
    y: Array, lse: Array, needs: Any, is_causal: bool = False, scale: float | None = None,
    dropout_p: float = 0.0, seed: int = 0, offset: int = 0,
) -> Any:  # fmt: skip
    more = (attn_mask, is_causal, scale, dropout_p, seed, offset)
    return *backward(g, query, key, value, y, lse, needs, None, *more), None


def _refuse_backward(
    m: Backend, g: Any, query: Any, key: Any, value: Any, attn_mask: Any, y: Any, lse: Any,
    needs: Any, *parameters: Any, **options: Any,
) -> str | None:  # fmt: skip
    if needs[3]:
        return "a gradient of the mask is wanted"
    if g.dtype != query.dtype:
        return f"operands of {query.dtype} and {g.dtype}"
    return refuse(m, query, key, value, attn_mask)


def _run_packed(
    m: Backend, qkv: Array, attn_mask: Array | None = None, heads: int = 1,
    is_causal: bool = False, scale: float | None = None, dropout_p: float = 0.0, seed: int = 0,
    offset: int = 0,
) -> Any:  # fmt: skip
    three = heads_of(qkv, 3, heads)
    y = empty((*qkv.shape[:-1], qkv.shape[-1] // 3), qkv.dtype)
    more = (attn_mask, is_causal, scale, dropout_p, seed, offset)
    _, lse = forward(*three, *heads_of(y, 1, heads), *more)
    return y, lse


def _refuse_packed(
    m: Backend, qkv: Any, attn_mask: Any = None, heads: int = 1, *parameters: Any, **options: Any
) -> str | None:
    if not isinstance(qkv, np.ndarray):
        return f"a {type(qkv).__name__} among the operands; kernels take arrays"
    if why := packed_misfit(qkv, attn_mask, heads):
        return why
    return refuse(m, *heads_of(qkv, 3, heads), attn_mask)


def _run_packed_backward(
    m: Backend, g: Array, qkv: Array, attn_mask: Array | None, y: Array, lse: Array, heads: int,
    needs: Any, is_causal: bool = False, scale: float | None = None, dropout_p: float = 0.0,
    seed: int = 0, offset: int = 0,
) -> Any:  # fmt: skip
    gqkv = empty(qkv.shape, qkv.dtype)
    more = (attn_mask, is_causal, scale, dropout_p, seed, offset)
    three, places = heads_of(qkv, 3, heads), heads_of(gqkv, 3, heads)
    wanted = (True, True, True)
    found = backward(
        *heads_of(g, 1, heads), *three, *heads_of(y, 1, heads), lse, wanted, places, *more
    )  # fmt: skip
    if found[0] is not places[0]:
        for place, x in zip(places, found, strict=True):
            place[...] = x
    return gqkv, None


def _refuse_packed_backward(
    m: Backend, g: Any, qkv: Any, attn_mask: Any, y: Any, lse: Any, heads: int, needs: Any,
    *parameters: Any, **options: Any,
) -> str | None:  # fmt: skip
    if needs[1]:
        return "a gradient of the mask is wanted"
    if g.dtype != qkv.dtype:
        return f"operands of {qkv.dtype} and {g.dtype}"
    return _refuse_packed(m, qkv, attn_mask, heads)


KERNELS = {
    "attention": Kernel(_run, LABEL, refuse),
    "attention_backward": Kernel(_run_backward, LABEL, _refuse_backward),
    "packed_attention": Kernel(_run_packed, LABEL, _refuse_packed),
    "packed_attention_backward": Kernel(_run_packed_backward, LABEL, _refuse_packed_backward),
}
