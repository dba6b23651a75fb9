"""Attention: each query's average of values, weighted by how well its key fits.

What is computed is written once, block by block, in :mod:`gpugrad.ops.shares`.
"""

# A declared operation is known to return Any; what it returns is a tensor.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.attention import scale_of
from gpugrad.backend.kernels import fusible
from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import composite, differentiable, primitive, sample
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ShapeError
from gpugrad.ops import shares
from gpugrad.ops.manipulation import reshape
from gpugrad.ops.samples import normal

__all__ = ["scaled_dot_product_attention"]


# -- the operation --------------------------------------------------------------------------------


def _numpy_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, is_causal: bool = False,
    scale: float | None = None, dropout_p: float = 0.0, seed: int = 0, offset: int = 0,
) -> Any:  # fmt: skip
    from gpugrad.ops.random import _numpy_dropout

    s = query @ np.swapaxes(key, -1, -2) * scale_of(query, scale)
    if attn_mask is not None:
        s = np.where(attn_mask, s, -np.inf) if attn_mask.dtype == bool else s + attn_mask
    if is_causal:
        s = np.where(np.tri(*s.shape[-2:], dtype=np.bool_), s, -np.inf)
    top = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(top == -np.inf, 0.0, top))
    total = p.sum(-1, keepdims=True)
    return _numpy_dropout(p / np.where(total == 0, 1, total), dropout_p, seed, offset) @ value


def _samples() -> list[Any]:
    q, k, v = normal((2, 3, 4), 0), normal((2, 5, 4), 1), normal((2, 5, 2), 2)
    seen = np.array([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]], bool)
    square = [normal((2, 2, 4, 3), i) for i in range(3)]
    return [
        sample(q, k, v),
        sample(*square, is_causal=True),
        sample(q, k, v, scale=0.3, is_causal=True, note="more keys than queries"),
        sample(q, k, v, seen, note="a boolean mask"),
        sample(q, k, v, normal((2, 3, 5), 3), note="a mask that is added"),
        sample(q, k, v, normal((3, 1), 3), note="a mask that broadcasts"),
        sample(q, k, v, seen & (np.arange(3)[:, None] != 1), note="a query that sees nothing"),
        sample(*square, dropout_p=0.4, seed=7, offset=1 << 33, is_causal=True, note="dropout"),
        sample(q, k[0], v[0], note="shared keys"),
        sample(q[:1], k[:, None], v[:, None], note="axes that broadcast"),
        sample(q[0], k[0], v[0], note="one matrix each"),
        sample(q[:, :0], k, v, note="no queries"),
        sample(q, k[:, :0], v[:, :0], note="no keys"),
    ]


@fusible
def attention_backward(
    m: Any, g: Any, query: Any, key: Any, value: Any, attn_mask: Any, y: Any, lse: Any,
    needs: Sequence[bool], is_causal: bool = False, scale: float | None = None,
    dropout_p: float = 0.0, seed: int = 0, offset: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of query, key, value and mask, in the shape of all scores' batch; None unneeded."""
    dropout = (dropout_p, seed, offset)
    plan = shares.prepared(m, query, key, value, attn_mask, is_causal, scale, dropout)
    if m is differentiable:  # what was kept beside the result would count as a constant
        return shares.recorded(plan, g, query, key, value, needs)
    return shares.backward(plan, g, query, key, value, y, lse, needs)


def _attention_vjp(
    g: Any, m: Any, query: Any, key: Any, value: Any, attn_mask: Any, y: Any, lse: Any,
    is_causal: bool, scale: float | None, dropout_p: float, seed: int, offset: int, needs: Any,
) -> tuple[Any, ...]:  # fmt: skip
    return attention_backward(
        m, g, query, key, value, attn_mask, y, lse, needs, is_causal, scale, dropout_p, seed, offset
    )


@primitive(vjp=_attention_vjp, aux=("lse",), samples=_samples, reference=_numpy_attention)
def attention(
    m: Backend,
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    /,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Array, Array]:
    """``softmax(query @ key.T * scale) @ value``, without the matrix in the middle.

    Parameters
    ----------
    query, key, value:
        Shapes (..., queries, features), (..., keys, features), (..., keys, out) of one dtype; the
        axes before the last two broadcast. Half precision is computed in float32.
    attn_mask:
        Broadcasts to (..., queries, keys): True where a query sees a key, or numbers added to the
        scores. A query that sees no key gets zeros.
    is_causal:
        Let query i see the keys up to number i only.
    scale:
        1/sqrt(features) if None.
    dropout_p, seed, offset:
        Dropout of the shares, the element (..., i, j) of all of them by the mask of
        :func:`gpugrad.dropout`; drawn again in the backward pass.

    Returns
    -------
    Shape (..., queries, out), the dtype of ``query``. Memory grows with queries plus keys: kept for
    the backward pass are the operands, the result and a number for each query. Raises ShapeError
    or DTypeError, naming all sides, when operands do not fit together.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.attention import attention
    >>> x = gg.asarray([[1.0, 0.0], [0.0, 1.0]])
    >>> attention(x, x, x, is_causal=True, scale=0.0)
    tensor([[1. , 0. ],
            [0.5, 0.5]])
    """
    dropout = (dropout_p, seed, offset)
    plan = shares.prepared(m, query, key, value, attn_mask, is_causal, scale, dropout)
    return shares.forward(plan, query, key, value)


_declared: Any = attention
_attend = fusible(_declared.primitive.forward, "attention")


# -- heads side by side ---------------------------------------------------------------------------


def _heads(m: Any, qkv: Any, heads: int) -> tuple[Any, ...]:
    """Views (..., heads, length, features) of the three thirds of the last axis."""
    *lead, length, width = qkv.shape
    x = m.reshape(qkv, (*lead, length, 3, heads, width // (3 * heads)))
    return tuple(m.moveaxis(x[..., i, :, :], -2, -3) for i in range(3))


def _joined(m: Any, y: Any) -> Any:
    """(..., heads, length, features) as (..., length, heads·features)."""
    y = m.moveaxis(y, -3, -2)
    return m.reshape(y, (*y.shape[:-2], y.shape[-2] * y.shape[-1]))


@fusible
def packed_attention_backward(
    m: Any, g: Any, qkv: Any, attn_mask: Any, y: Any, lse: Any, heads: int, needs: Sequence[bool],
    is_causal: bool = False, scale: float | None = None, dropout_p: float = 0.0, seed: int = 0,
    offset: int = 0,
) -> tuple[Any, Any]:  # fmt: skip
    """Gradients of qkv and of the mask."""

    def apart(x: Any) -> Any:
        *lead, width = x.shape
        return m.moveaxis(m.reshape(x, (*lead, heads, width // heads)), -2, -3)

    q, k, v = _heads(m, qkv, heads)
    *three, gmask = attention_backward(
        m, apart(g), q, k, v, attn_mask, apart(y), lse,
        (needs[0], needs[0], needs[0], needs[1]), is_causal, scale, dropout_p, seed, offset,
    )  # fmt: skip
    gqkv = m.concat([_joined(m, x) for x in three], axis=-1) if needs[0] else None
    return gqkv, gmask


def _packed_vjp(
    g: Any, m: Any, qkv: Any, attn_mask: Any, y: Any, lse: Any, heads: int, is_causal: bool,
    scale: float | None, dropout_p: float, seed: int, offset: int, needs: Any,
) -> tuple[Any, Any]:  # fmt: skip
    return packed_attention_backward(
        m, g, qkv, attn_mask, y, lse, heads, needs, is_causal, scale, dropout_p, seed, offset
    )


def _numpy_packed(qkv: Any, attn_mask: Any = None, heads: int = 1, **options: Any) -> Any:
    q, k, v = _heads(np, qkv, heads)
    y = _numpy_attention(q, k, v, attn_mask, **options)
    return _joined(np, y)


@primitive(
    vjp=_packed_vjp,
    aux=("lse",),
    samples=lambda: [
        sample(normal((2, 4, 12)), heads=2, is_causal=True),
        sample(normal((4, 6)), note="one head of one sequence"),
        sample(normal((2, 3, 12)), normal((2, 1, 3, 3), 1), heads=2, note="a mask that is added"),
        sample(normal((2, 3, 12)), np.tri(3, dtype=bool), heads=4, scale=1.0, dropout_p=0.3,
               seed=5, note="a boolean mask and dropout"),
        sample(normal((0, 3, 6)), heads=2, note="an empty batch"),
        sample(normal((1, 3, 6)), normal((2, 1, 3, 3), 1), note="a mask for each of two"),
    ],
    reference=_numpy_packed,
)  # fmt: skip
def packed_attention(
    m: Backend,
    qkv: Array,
    attn_mask: Array | None = None,
    /,
    heads: int = 1,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Array, Array]:
    """:func:`attention` of a sequence to itself, from one projection to all heads' operands.

    Parameters
    ----------
    qkv:
        Shape (..., length, 3·heads·features): queries, keys and values side by side, in each third
        one head after the other. Its gradient is one array as well.
    attn_mask:
        Broadcasts to (..., heads, length, length).
    heads:
        A divisor of a third of the last axis.

    Returns
    -------
    Shape (..., length, heads·features).

    >>> import gpugrad as gg
    >>> from gpugrad.ops.attention import packed_attention
    >>> packed_attention(gg.ones((5, 24)), heads=4).shape
    (5, 8)
    """
    check_packed(qkv, heads)
    y, lse = _attend(
        m, *_heads(m, qkv, heads), attn_mask, is_causal, scale, dropout_p, seed, offset
    )
    return _joined(m, y), lse


def check_packed(qkv: Array, heads: int) -> None:
    """Raise unless the last axis holds three operands of so many heads."""
    if qkv.ndim < 2 or heads < 1 or qkv.shape[-1] % (3 * heads):
        raise ShapeError(
            f"packed_attention: qkv of shape {tuple(qkv.shape)} for {heads} heads; it is (..., "
            "length, 3*heads*features), queries, keys and values side by side"
        )


# -- under PyTorch's name -------------------------------------------------------------------------


def _numpy_sdpa(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    seed: int = 0, offset: int = 0,
) -> Any:  # fmt: skip
    if enable_gqa:
        each = query.shape[-3] // key.shape[-3]
        key, value = np.repeat(key, each, axis=-3), np.repeat(value, each, axis=-3)
    return _numpy_attention(query, key, value, attn_mask, is_causal, scale, dropout_p, seed, offset)


@composite(
    samples=lambda: [
        sample(*(normal((2, 3, 4), i) for i in range(3))),
        sample(*(normal((2, 3, 4), i) for i in range(3)), None, 0.5, True, seed=3),
        sample(normal((2, 4, 3, 2), 0), normal((2, 2, 5, 2), 1), normal((2, 2, 5, 3), 2),
               normal((4, 3, 5), 3), enable_gqa=True, note="two queries to a key"),
        sample(normal((4, 3, 2), 0), normal((1, 3, 2), 1), normal((1, 3, 2), 2),
               normal((3, 3), 3), enable_gqa=True, dropout_p=0.3, seed=2, note="one key for all"),
    ],
    reference=_numpy_sdpa,
)  # fmt: skip
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    seed: int = 0,
    offset: int = 0,
) -> Tensor:
    """``dropout(softmax(query @ key.T * scale + attn_mask)) @ value``, in memory linear in length.

    Parameters
    ----------
    query, key, value:
        Shapes (..., queries, features), (..., keys, features), (..., keys, out), one floating-point
        dtype; the axes before the last two broadcast.
    attn_mask:
        Broadcasts to (..., queries, keys). Boolean: True where a query sees a key. Numbers: added
        to the scores. A query that sees nothing gets zeros.
    dropout_p:
        The share of the weights that is dropped, whoever calls: this function knows no training.
    is_causal:
        Query i sees the keys up to number i. With a mask, what both let it see.
    scale:
        1/sqrt(features) if None.
    enable_gqa:
        Let key and value have fewer heads, axis -3, than the query: a divisor of its number, each
        shared by queries that follow each other.
    seed, offset:
        The stream that dropout draws from, as in :func:`gpugrad.dropout`;
        :func:`gpugrad.nn.functional.scaled_dot_product_attention` takes them from a generator.

    Returns
    -------
    Shape (..., queries, out). Scores are computed block by block, forward and backward; only a
    gradient that is itself recorded, for a higher order, takes all of them at once.

    Raises
    ------
    ShapeError, DTypeError
        Operands that do not fit together, with all their shapes and what to do.

    >>> import gpugrad as gg
    >>> x = gg.asarray([[1.0, 0.0], [0.0, 1.0]])
    >>> gg.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.0)
    tensor([[1. , 0. ],
            [0.5, 0.5]])
    """
    query, key, value = asarray(query), asarray(key), asarray(value)
    mask = None if attn_mask is None else asarray(attn_mask)
    if mask is not None and mask.ndim < 2:
        mask = reshape(mask, (1,) * (2 - mask.ndim) + mask.shape)
    more = (is_causal, scale, dropout_p, seed, offset)
    if not enable_gqa:
        return attention(query, key, value, mask, *more)
    heads, shared = _groups(query, key, value)
    each = heads // shared

    def apart(x: Tensor, *inner: int) -> Tensor:
        return reshape(x, (*x.shape[:-3], *inner, *x.shape[-2:]))

    if mask is not None and mask.ndim > 2:
        mask = apart(mask, *((shared, each) if mask.shape[-3] == heads else (1, 1)))
    y = attention(
        apart(query, shared, each), apart(key, shared, 1), apart(value, shared, 1), mask, *more
    )
    return reshape(y, (*y.shape[:-4], heads, *y.shape[-2:]))


def _groups(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int]:
    """Heads of the query, and of key and value."""
    shapes = [x.shape for x in (query, key, value)]
    if min(map(len, shapes)) >= 3:
        heads, shared, same = (s[-3] for s in shapes)
        if shared == same > 0 and heads % shared == 0:
            return heads, shared
    raise ShapeError(
        f"scaled_dot_product_attention: enable_gqa=True with query of shape {shapes[0]}, key "
        f"{shapes[1]}, value {shapes[2]}; axis -3 counts heads, of key and value equally many, a "
        "divisor of the query's"
    )
