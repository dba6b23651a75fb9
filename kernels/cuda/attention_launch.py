"""Attention, forward and backward: what operands the kernels take, and how they are launched.

Operands are read where they are, by strides: heads of one projection are not copied. Only where
features do not lie one after the other is an operand brought in order first.
"""

from __future__ import annotations

from math import prod
from typing import Any

from gpugrad.backend import Backend
from gpugrad.backend.attention import heads_of, packed_misfit, scale_of, scores_shape
from gpugrad.backend.kernels import Kernel as Implementation
from gpugrad.backend.random import dropped, kept_scale, stream
from gpugrad.kernels.cuda.attention import (
    ROLES,
    WIDTHS,
    attention_gradient_kernel,
    attention_kernel,
)
from gpugrad.kernels.cuda.elementwise import LABEL, refuse_arrays
from gpugrad.kernels.cuda.language import Kernel, pack_size
from gpugrad.kernels.cuda.launch import machine, number_type, storage_of
from gpugrad.kernels.cuda.tiles import ACROSS, ADDED, EACH, NONE, SEEN

Array = Any

#: Features of a key or a value that there are kernels for.
MOST = max(WIDTHS)


# -- where operands are ---------------------------------------------------------------------------


def _steps(x: Array) -> tuple[int, ...]:
    """Strides in elements; 0 along axes of length 1, where nobody steps."""
    size = x.dtype.itemsize
    return tuple(s // size if n > 1 else 0 for s, n in zip(x.strides, x.shape))


def _in_order(x: Array) -> Array:
    """An operand whose last axis is contiguous, and none of whose axes runs backwards."""
    steps = _steps(x)
    return x if steps[-1] == min(x.shape[-1], 2) - 1 and min(steps) >= 0 else x.copy()


def _placed(m: Backend, x: Array, batch: tuple[int, ...]) -> Array:
    """`x` with two axes for the batch, of length 1 where it is broadcast."""
    own = x.shape[:-2]
    if len(batch) <= 2:
        return x.reshape((1,) * (2 - len(own)) + x.shape) if len(own) < 2 else x
    own = (1,) * (len(batch) - len(own)) + own
    head = own[:-1]
    if head != batch[:-1] and prod(head) != 1:
        head = batch[:-1]
        x = m.broadcast_to(x, (*head, own[-1], *x.shape[-2:]))
    return x.reshape(prod(head), own[-1], *x.shape[-2:])


class _Call:
    """What forward and backward of one set of operands are told alike."""

    def __init__(
        self, m: Backend, query: Array, key: Array, value: Array, attn_mask: Array | None,
        is_causal: bool, scale: float | None, dropout_p: float, seed: int, offset: int,
    ) -> None:  # fmt: skip
        shape = scores_shape(query, key, value, attn_mask)
        assert shape is not None
        *batch, self.queries, self.keys = shape
        self.m = m
        self.batch = tuple(batch)
        self.heads = batch[-1] if batch else 1
        self.matrices = prod(batch)
        self.gpu, self.storage = machine(query), storage_of(query)
        self.number = number_type(self.storage)
        self.features, self.out = query.shape[-1], value.shape[-1]
        self.operands = [self.placed(x) for x in (query, key, value)]
        kind, mask = NONE, query
        steps: tuple[int, ...] = (0, 0, 0, 0)
        if attn_mask is not None:
            kind = SEEN if attn_mask.dtype == bool else ADDED
            mask = attn_mask if kind == SEEN else attn_mask.astype(self.number, copy=False)
            mask = mask if min(_steps(mask)) >= 0 else mask.copy()
            mask = _placed(m, mask, self.batch)
            steps = _steps(mask)
        #: Of a mask that is not there, or of the other kind, only the address is looked at.
        self.mask = mask
        self.numbers = (
            *steps, kind, is_causal, scale_of(query, scale), kept_scale(dropout_p),
            dropped(dropout_p), *stream(seed, offset),
        )  # fmt: skip

    def placed(self, x: Array) -> Array:
        """An operand as kernels read it."""
        return _placed(self.m, _in_order(x), self.batch)

    def empty(self, like: Array, length: int, features: int) -> Array:
        """Room for a result; where heads of `like` lie side by side, so do its own."""
        if len(self.batch) not in (1, 2) or like.flags.c_contiguous:
            return self.gpu.empty((*self.batch, length, features), like.dtype)
        outer = self.batch[:-1]
        made = self.gpu.empty((*outer, length, self.batch[-1], features), like.dtype)
        return made.swapaxes(-2, -3)

    def run(
        self, kernel: Kernel, arrays: list[Array], values: tuple[Array, ...], sizes: tuple[int, ...]
    ) -> None:
        """Launch a kernel with blocks for all own rows, the first of `sizes`.

        It is told the strides of `arrays`, but not those of `values`, whose elements lie in a row.
        """
        own = self.gpu.threads // ACROSS * EACH
        blocks = (sizes[0] + own - 1) // own * self.matrices
        if not blocks:
            return
        steps = [step for x in arrays for step in _steps(x)[:3]]
        packs = pack_size(self.storage)
        aligned = 0 if any(step % packs for step in steps) else self.gpu.aligned(*arrays)
        self.gpu.run(
            kernel[self.storage], (blocks,), *arrays, *values, self.mask, self.mask,
            self.matrices, self.heads, *sizes, *steps, *self.numbers, aligned,
        )  # fmt: skip


def _width(columns: int) -> int:
    return next(most for most in WIDTHS if columns <= most)


def forward(m: Backend, query: Array, key: Array, value: Array, y: Array | None, *more: Any) -> Any:
    """The result, in `y` if that is given, and each query's logarithm of a sum."""
    call = _Call(m, query, key, value, *more)
    made = call.empty(query, call.queries, call.out) if y is None else y
    lse = call.gpu.empty((*call.batch, call.queries), call.number)
    call.run(
        attention_kernel(_width(call.out)), [*call.operands, _placed(m, made, call.batch)], (lse,),
        (call.queries, call.keys, call.features, call.out),
    )  # fmt: skip
    return made, lse


def backward(
    m: Backend, g: Array, query: Array, key: Array, value: Array, y: Array, lse: Array, needs: Any,
    places: Any, *more: Any,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients that `needs` asks for, in `places` where there are some."""
    call = _Call(m, query, key, value, *more)
    q, k, v = call.operands
    g_, y_ = call.placed(g), call.placed(y)
    level = call.gpu.empty((*call.batch, call.queries), call.number)
    lengths = {"query": (call.queries, call.keys), "key": (call.keys, call.queries)}
    lengths["value"] = lengths["key"]
    # The gradient of the values comes with what the others need of the results.
    made: dict[str, Array] = {}
    for i, name, own, passing, first, second, x in (
        (2, "value", k, q, v, g_, g_),
        (0, "query", q, k, g_, v, k),
        (1, "key", k, q, v, g_, q),
    ):
        if not (needs[i] or (name == "value" and any(needs[:2]))):
            continue
        like, columns = (query, key, value)[i], x.shape[-1]
        made[name] = call.empty(like, lengths[name][0], columns) if places is None else places[i]
        call.run(
            attention_gradient_kernel(name, _width(columns)),
            [own, passing, first, second, x, y_, _placed(m, made[name], call.batch)],
            (lse, level), (*lengths[name], call.features, call.out, columns),
        )  # fmt: skip
    return tuple(made[name] if need else None for name, need in zip(ROLES, needs))


# -- what they take -------------------------------------------------------------------------------


def _refuse(
    m: Backend, query: Any, key: Any, value: Any, attn_mask: Any = None, *parameters: Any,
    **options: Any,
) -> str | None:  # fmt: skip
    if why := refuse_arrays(query, key, value):
        return why
    if attn_mask is not None and not (
        hasattr(attn_mask, "dtype") and (attn_mask.dtype == bool or storage_of(attn_mask))
    ):
        return f"a mask of {getattr(attn_mask, 'dtype', type(attn_mask).__name__)}"
    if scores_shape(query, key, value, attn_mask) is None:
        return "operands that do not fit together"
    if not 0 < query.shape[-1] <= MOST or not 0 < value.shape[-1] <= MOST:
        return (
            f"{query.shape[-1]} features of a key and {value.shape[-1]} of a value; there are "
            f"kernels for 1 to {MOST}"
        )
    return None


def _attention(
    m: Backend, query: Array, key: Array, value: Array, attn_mask: Array | None = None,
    is_causal: bool = False, scale: float | None = None, dropout_p: float = 0.0, seed: int = 0,
    offset: int = 0,
) -> Any:  # fmt: skip
    more = (attn_mask, is_causal, scale, dropout_p, seed, offset)
    return forward(m, query, key, value, None, *more)


def _attention_backward(
    m: Backend, g: Array, query: Array, key: Array, value: Array, attn_mask: Array | None,
    y: Array, lse: Array, needs: Any, is_causal: bool = False, scale: float | None = None,
    dropout_p: float = 0.0, seed: int = 0, offset: int = 0,
) -> Any:  # fmt: skip
    more = (attn_mask, is_causal, scale, dropout_p, seed, offset)
    return *backward(m, g, query, key, value, y, lse, needs, None, *more), None


def _refuse_backward(
    m: Backend, g: Any, query: Any, key: Any, value: Any, attn_mask: Any, y: Any, lse: Any,
    needs: Any, *parameters: Any, **options: Any,
) -> str | None:  # fmt: skip
    if needs[3]:
        return "a gradient of the mask is wanted"
    return refuse_arrays(query, g, y) or _refuse(m, query, key, value, attn_mask)


def _packed(
    m: Backend, qkv: Array, attn_mask: Array | None = None, heads: int = 1,
    is_causal: bool = False, scale: float | None = None, dropout_p: float = 0.0, seed: int = 0,
    offset: int = 0,
) -> Any:  # fmt: skip
    y = machine(qkv).empty((*qkv.shape[:-1], qkv.shape[-1] // 3), qkv.dtype)
    more = (attn_mask, is_causal, scale, dropout_p, seed, offset)
    _, lse = forward(m, *heads_of(qkv, 3, heads), *heads_of(y, 1, heads), *more)
    return y, lse


def _refuse_packed(
    m: Backend, qkv: Any, attn_mask: Any = None, heads: int = 1, *parameters: Any, **options: Any
) -> str | None:
    if why := refuse_arrays(qkv):
        return why
    if why := packed_misfit(qkv, attn_mask, heads):
        return why
    return _refuse(m, *heads_of(qkv, 3, heads), attn_mask)


def _packed_backward(
    m: Backend, g: Array, qkv: Array, attn_mask: Array | None, y: Array, lse: Array, heads: int,
    needs: Any, is_causal: bool = False, scale: float | None = None, dropout_p: float = 0.0,
    seed: int = 0, offset: int = 0,
) -> Any:  # fmt: skip
    gqkv = machine(qkv).empty(qkv.shape, qkv.dtype)
    more = (attn_mask, is_causal, scale, dropout_p, seed, offset)
    backward(
        m, *heads_of(g, 1, heads), *heads_of(qkv, 3, heads), *heads_of(y, 1, heads), lse,
        (True, True, True), heads_of(gqkv, 3, heads), *more,
    )  # fmt: skip
    return gqkv, None


def _refuse_packed_backward(
    m: Backend, g: Any, qkv: Any, attn_mask: Any, y: Any, lse: Any, heads: int, needs: Any,
    *parameters: Any, **options: Any,
) -> str | None:  # fmt: skip
    if needs[1]:
        return "a gradient of the mask is wanted"
    return refuse_arrays(qkv, g, y) or _refuse_packed(m, qkv, attn_mask, heads)


#: For the slots of the backend.
KERNELS = {
    "attention": Implementation(_attention, LABEL, _refuse),
    "attention_backward": Implementation(_attention_backward, LABEL, _refuse_backward),
    "packed_attention": Implementation(_packed, LABEL, _refuse_packed),
    "packed_attention_backward": Implementation(_packed_backward, LABEL, _refuse_packed_backward),
}
