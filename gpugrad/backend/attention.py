"""What attention's generic text and its kernels must agree on: the shape and scale of scores."""

from __future__ import annotations

import math

import numpy as np

from gpugrad.backend.base import Array


def scores_shape(
    query: Array, key: Array, value: Array, attn_mask: Array | None
) -> tuple[int, ...] | None:
    """The shape of all scores, (*batch, queries, keys); None if operands do not fit together."""
    q, k, v = query.shape, key.shape, value.shape
    if min(len(q), len(k), len(v)) < 2 or q[-1] != k[-1] or k[-2] != v[-2]:
        return None
    batches = [q[:-2], k[:-2], v[:-2]]
    size = (q[-2], k[-2])
    try:
        if attn_mask is not None:
            if len(attn_mask.shape) < 2:
                return None
            batches.append(attn_mask.shape[:-2])
            if np.broadcast_shapes(attn_mask.shape[-2:], size) != size:
                return None
        return (*np.broadcast_shapes(*batches), *size)
    except ValueError:
        return None


def scale_of(query: Array, scale: float | None) -> float:
    """What products are multiplied with: 1/sqrt(features) unless something else is asked for."""
    return 1.0 / math.sqrt(query.shape[-1] or 1) if scale is None else float(scale)


def heads_of(x: Array, count: int, heads: int) -> tuple[Array, ...]:
    """Views (..., heads, length, features) of `count` equal parts of the last axis."""
    *lead, length, width = x.shape
    apart = x.reshape(*lead, length, count, heads, width // (count * heads))
    return tuple(apart[..., i, :, :].swapaxes(-2, -3) for i in range(count))


def packed_misfit(qkv: Array, attn_mask: Array | None, heads: int) -> str | None:
    """Why kernels cannot take query, key and value from one array, if they cannot."""
    if qkv.ndim < 2 or heads < 1 or qkv.shape[-1] % (3 * heads) or qkv.shape[-1] == 0:
        return f"{qkv.shape} of {heads} heads"
    if qkv.ndim > 3:
        return f"{qkv.ndim} axes"
    query, key, value = heads_of(qkv, 3, heads)
    shape = scores_shape(query, key, value, attn_mask)
    if shape is not None and shape[:-2] != query.shape[:-2]:
        assert attn_mask is not None
        return f"a mask of shape {attn_mask.shape}, which makes more of {qkv.shape}"
    return None
