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
