"""Attention block by block: the one text behind every operation of its kind, and its gradients.

The scores of all queries for all keys would be a matrix that grows with the square of the length.
It is never made: a block of queries meets one block of keys after the other, and what has been
averaged so far is scaled down when a better key turns up (Rabe and Staats, arXiv:2112.05682; Dao
et al., arXiv:2205.14135). All that is kept is the result and, for each query, the logarithm of the
sum of its exponentials, from which the backward pass finds every block again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpugrad.backend import Array
from gpugrad.backend.attention import scale_of, scores_shape
from gpugrad.backend.random import ROUNDS, dropped, kept_scale, philox_round, stream
from gpugrad.core.primitive import differentiable
from gpugrad.errors import DTypeError, ShapeError
from gpugrad.ops.reductions import counting_dtype

#: Queries and keys of a block.
BLOCK = 256

NAME = "scaled_dot_product_attention"


# -- scores, and what is done to them -------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """How scores become shares of the values.

    Attributes
    ----------
    m:
        The namespace.
    batch, queries, keys:
        The shape of all scores: (*batch, queries, keys).
    mask:
        None, or an array that broadcasts to that shape: True where a query sees a key, or numbers
        that are added to the scores.
    is_causal:
        Whether query i sees the keys up to number i only.
    scale:
        What products are multiplied with.
    dropout_p, seed, offset:
        The dropout of the shares, as in :func:`gpugrad.dropout`.
    """

    m: Any
    batch: tuple[int, ...]
    queries: int
    keys: int
    mask: Array | None
    is_causal: bool
    scale: float
    dropout_p: float
    seed: int
    offset: int

    def blocks(self) -> list[tuple[slice, slice]]:
        """Blocks of queries and keys some of which see each other, by the first key."""
        return [
            (slice(i, min(i + BLOCK, self.queries)), slice(j, min(j + BLOCK, self.keys)))
            for j in range(0, self.keys, BLOCK)
            for i in range(j // BLOCK * BLOCK if self.is_causal else 0, self.queries, BLOCK)
        ]

    def masked(self, s: Array, rows: slice, columns: slice) -> Array:
        """Scores of a block, minus infinity where a query does not see a key."""
        m = self.m
        if self.mask is not None:
            block = part(self.mask, rows, columns)
            if is_boolean(self.mask):
                s = m.where(block, s, -math.inf)
            else:
                s = s + (block if block.dtype == s.dtype else m.astype(block, s.dtype))
        if self.is_causal and columns.stop - 1 > rows.start:
            i, j = self._places(rows, columns, s)
            s = m.where(j <= i, s, -math.inf)
        return s

    def thinned(self, shares: Array, rows: slice, columns: slice) -> Array:
        """Shares of a block after dropout; the transpose of that too."""
        if self.dropout_p == 0:
            return shares
        words = self._words(rows, columns, shares)
        kept = shares * kept_scale(self.dropout_p)
        return self.m.where(words >= dropped(self.dropout_p), kept, 0.0)

    def _arange(self, start: int, stop: int, like: Array) -> Array:
        m = self.m
        if m is differentiable:
            m, like = like.backend, like.data
        return m.create("arange", start, stop, dtype="int64", device=m.device(like))

    def _places(self, rows: slice, columns: slice, like: Array) -> tuple[Array, Array]:
        i = self._arange(rows.start, rows.stop, like)
        return i[:, None], self._arange(columns.start, columns.stop, like)

    def _words(self, rows: slice, columns: slice, like: Array) -> Array:
        """The words of the stream that belong to a block's places among all scores."""
        m = self.m
        i, j = self._places(rows, columns, like)
        count = math.prod(self.batch)
        number = m.reshape(self._arange(0, count, like), (*self.batch, 1, 1))
        place = (number * self.queries + i) * self.keys + j
        block = place >> 2
        state = (block & 0xFFFFFFFF, block >> 32, *stream(self.seed, self.offset))
        for _ in range(ROUNDS):
            state = philox_round(*state)
        lane = place & 3
        even = m.where(lane == 0, state[0], state[2])
        odd = m.where(lane == 1, state[1], state[3])
        return m.where((lane & 1) == 0, even, odd)


def is_boolean(mask: Array) -> bool:
    """Whether a mask says what is seen, rather than what is added."""
    return _dtype_name(mask) == "bool"


def _dtype_name(x: Array) -> str:
    return str(x.dtype).rpartition(".")[2]


def part(mask: Array, rows: slice, columns: slice) -> Array:
    """The part of a mask that belongs to a block; axes of length 1 belong to all."""
    return mask[
        ...,
        rows if mask.shape[-2] > 1 else slice(None),
        columns if mask.shape[-1] > 1 else slice(None),
    ]


def _wide(m: Any, x: Array) -> Array:
    """`x` in float32 where its own dtype is too short to add up in."""
    kind = counting_dtype(m, x)
    return x if x.dtype == kind else m.astype(x, kind)


def _turned(m: Any, x: Array) -> Array:
    return m.matrix_transpose(x)


# -- what does not fit ----------------------------------------------------------------------------


def _explain(query: Array, key: Array, value: Array, attn_mask: Array | None) -> ShapeError:
    q, k, v = (tuple(x.shape) for x in (query, key, value))
    met = f"{NAME}: query of shape {q}, key {k}, value {v}"
    if min(len(q), len(k), len(v)) < 2:
        return ShapeError(f"{met}: each needs two axes at least, (..., length, features)")
    if q[-1] != k[-1]:
        return ShapeError(
            f"{met}: a query has {q[-1]} features and a key {k[-1]}; project both to the same "
            "number"
        )
    if k[-2] != v[-2]:
        return ShapeError(f"{met}: there are {k[-2]} keys and {v[-2]} values; each key needs one")
    try:
        batch = np.broadcast_shapes(q[:-2], k[:-2], v[:-2])
    except ValueError:
        return ShapeError(
            f"{met}: the axes before the last two, {q[:-2]}, {k[:-2]} and {v[:-2]}, do not "
            "broadcast; with fewer heads of keys than of queries, pass enable_gqa=True"
        )
    assert attn_mask is not None
    if len(attn_mask.shape) < 2:
        return ShapeError(
            f"{met}: attn_mask of shape {tuple(attn_mask.shape)} has no axes for queries and keys; "
            "reshape it to two axes, of length 1 where all are alike"
        )
    return ShapeError(
        f"{met}: attn_mask of shape {tuple(attn_mask.shape)} does not broadcast to "
        f"{(*batch, q[-2], k[-2])}, (..., queries, keys); reshape it, or give it axes of length 1"
    )


def prepared(
    m: Any,
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None,
    is_causal: bool,
    scale: float | None,
    dropout: tuple[float, int, int],
) -> Shares:
    """How the scores of these operands become shares; raises where they do not fit together."""
    shape = scores_shape(query, key, value, attn_mask)
    if shape is None:
        raise _explain(query, key, value, attn_mask)
    dtypes = [_dtype_name(x) for x in (query, key, value)]
    if len({*dtypes}) > 1 or "float" not in dtypes[0]:
        raise DTypeError(
            f"{NAME}: query is {dtypes[0]}, key {dtypes[1]}, value {dtypes[2]}; all three must be "
            "of one floating-point dtype, convert with .to(dtype)"
        )
    kind = "bool" if attn_mask is None else _dtype_name(attn_mask)
    if kind != "bool" and "float" not in kind:
        raise DTypeError(
            f"{NAME}: attn_mask is {kind}; it is boolean (True where a query sees a "
            "key) or floating-point (added to the scores): convert it with .to(dtype)"
        )
    factor = scale_of(query, scale)
    *batch, queries, keys = shape
    return Shares(m, tuple(batch), queries, keys, attn_mask, is_causal, factor, *dropout)


# -- block by block -------------------------------------------------------------------------------


def _block_of_queries(shares: Shares, q: Array, k: Array, v: Array, rows: slice) -> Any:
    """Results of some queries, and the logarithm of the sum of each one's exponentials."""
    m = shares.m
    size = (*shares.batch, rows.stop - rows.start)
    make = {"dtype": counting_dtype(m, q), "device": m.device(q)}
    top = m.create("full", (*size, 1), -math.inf, **make)
    total = m.create("zeros", (*size, 1), **make)
    y = m.create("zeros", (*size, v.shape[-1]), **make)
    part_q = _wide(m, q[..., rows, :]) * shares.scale
    stop = min(rows.stop, shares.keys) if shares.is_causal else shares.keys
    for j in range(0, stop, BLOCK):
        columns = slice(j, min(j + BLOCK, shares.keys))
        s = m.matmul(part_q, _turned(m, _wide(m, k[..., columns, :])))
        s = shares.masked(s, rows, columns)
        best = m.maximum(top, m.max(s, axis=-1, keepdims=True))
        # Where nothing has been seen yet, there is nothing to be relative to.
        base = m.where(best == -math.inf, 0.0, best)
        p = m.exp(s - base)
        shrunk = m.exp(top - base)
        total = total * shrunk + m.sum(p, axis=-1, keepdims=True)
        p = shares.thinned(p, rows, columns)
        y = y * shrunk + m.matmul(p, _wide(m, v[..., columns, :]))
        top = best
    # A query that sees nothing gets zeros; from infinity, its shares are found to be zeros again.
    blind = total == 0.0
    y = y / m.where(blind, 1.0, total)
    lse = m.where(blind, math.inf, top + m.log(m.where(blind, 1.0, total)))
    return y, lse


def forward(shares: Shares, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """The result, and for each query the logarithm of the sum of its exponentials.

    That is infinity for a query that sees nothing.
    """
    m = shares.m
    found = [
        _block_of_queries(shares, q, k, v, slice(i, min(i + BLOCK, shares.queries)))
        for i in range(0, max(shares.queries, 1), BLOCK)
    ]
    y, lse = (f[0] if len(f) == 1 else m.concat(f, axis=-2) for f in zip(*found, strict=True))
    return y if y.dtype == q.dtype else m.astype(y, q.dtype), lse[..., 0]


def backward(
    shares: Shares, g: Array, q: Array, k: Array, v: Array, y: Array, lse: Array,
    needs: Sequence[bool],
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients of query, key and value, not summed over what was broadcast; of the mask too.

    With P the shares, D = g·vᵀ, and d the sum of P·D over the keys, which is that of g·y over the
    features: those of the scores are P·(D - d).
    """
    m = shares.m
    level = m.sum(_wide(m, g) * _wide(m, y), axis=-1, keepdims=True)
    sums: dict[tuple[str, int], Array] = {}

    def add(name: str, start: int, x: Array) -> None:
        have = sums.get((name, start))
        sums[name, start] = x if have is None else have + x

    tiles: dict[tuple[int, int], Array] = {}
    for rows, columns in shares.blocks():
        g_, q_ = (_wide(m, x[..., rows, :]) for x in (g, q))
        k_, v_ = (_wide(m, x[..., columns, :]) for x in (k, v))
        q_ = q_ * shares.scale
        s = shares.masked(m.matmul(q_, _turned(m, k_)), rows, columns)
        p = m.exp(s - lse[..., rows, None])
        if needs[2]:
            add("v", columns.start, m.matmul(_turned(m, shares.thinned(p, rows, columns)), g_))
        if needs[0] or needs[1] or needs[3]:
            d = shares.thinned(m.matmul(g_, _turned(m, v_)), rows, columns)
            gs = p * (d - level[..., rows, :])
            if needs[0]:
                add("q", rows.start, m.matmul(gs, k_))
            if needs[1]:
                add("k", columns.start, m.matmul(_turned(m, gs), q_))
            if needs[3]:
                _add_tile(m, tiles, shares.mask, gs, rows, columns)

    def whole(name: str, x: Array, factor: float = 1.0) -> Array:
        length, features = x.shape[-2:]
        make = {"dtype": counting_dtype(m, x), "device": m.device(x)}
        pieces = []
        for i in range(0, max(length, 1), BLOCK):
            size = (*shares.batch, min(BLOCK, length - i), features)
            found = sums.get((name, i))
            pieces.append(m.create("zeros", size, **make) if found is None else found * factor)
        made = pieces[0] if len(pieces) == 1 else m.concat(pieces, axis=-2)
        return made if made.dtype == x.dtype else m.astype(made, x.dtype)

    return (
        whole("q", q, shares.scale) if needs[0] else None,
        whole("k", k) if needs[1] else None,
        whole("v", v) if needs[2] else None,
        _mask_gradient(shares, tiles, q) if needs[3] else None,
    )


def _add_tile(
    m: Any, tiles: dict[tuple[int, int], Array], mask: Any, gs: Array, rows: slice, columns: slice
) -> None:
    """Add a block's gradients of scores to those of the part of the mask that it saw."""
    seen = part(mask, rows, columns).shape
    gs = m.sum_to(gs, (1,) * (gs.ndim - len(seen)) + tuple(seen))
    place = (
        rows.start if mask.shape[-2] > 1 else 0,
        columns.start if mask.shape[-1] > 1 else 0,
    )
    tiles[place] = tiles[place] + gs if place in tiles else gs


def _mask_gradient(shares: Shares, tiles: dict[tuple[int, int], Array], q: Array) -> Array:
    m, mask = shares.m, shares.mask
    assert mask is not None
    lines = []
    for i in range(0, max(mask.shape[-2], 1), BLOCK):
        line = []
        for j in range(0, max(mask.shape[-1], 1), BLOCK):
            if (i, j) not in tiles:  # behind the diagonal
                seen = part(mask, slice(i, i + BLOCK), slice(j, j + BLOCK)).shape
                make = {"dtype": counting_dtype(m, q), "device": m.device(q)}
                tiles[i, j] = m.create("zeros", tuple(seen), **make)
            line.append(m.reshape(tiles[i, j], (-1, *tiles[i, j].shape[-2:])))
        lines.append(line[0] if len(line) == 1 else m.concat(line, axis=-1))
    made = lines[0] if len(lines) == 1 else m.concat(lines, axis=-2)
    return m.reshape(made, tuple(mask.shape))


def _all_shares(shares: Shares, q: Any, k: Any) -> Any:
    """Every share at once; zeros for a query that sees nothing."""
    m = shares.m
    s = m.matmul(q, _turned(m, k)) * shares.scale
    s = shares.masked(s, slice(0, shares.queries), slice(0, shares.keys))
    blind = m.all(s == -math.inf, axis=-1, keepdims=True)
    return m.where(blind, 0.0, m.softmax(m.where(blind, 0.0, s), axis=-1))


def recorded(
    shares: Shares, g: Any, q: Any, k: Any, v: Any, needs: Sequence[bool]
) -> tuple[Any, ...]:
    """The gradients as differentiable operations on all scores at once."""
    m, dtype = shares.m, q.dtype
    g, q, k, v = (_wide(m, x) for x in (g, q, k, v))

    def thinned(x: Any) -> Any:
        if shares.dropout_p == 0:
            return x
        return m.dropout(x, shares.dropout_p, shares.seed, shares.offset)

    p = _all_shares(shares, q, k)
    gq = gk = gv = gs = None
    if needs[2]:
        gv = m.matmul(_turned(m, thinned(p)), g)
    if needs[0] or needs[1] or needs[3]:
        d = thinned(m.matmul(g, _turned(m, v)))
        gs = p * (d - m.sum(p * d, axis=-1, keepdims=True))
        gq = m.matmul(gs, k) * shares.scale if needs[0] else None
        gk = m.matmul(_turned(m, gs), q) * shares.scale if needs[1] else None
    found = (gq, gk, gv, gs if needs[3] else None)
    return tuple(x if x is None or x.dtype == dtype else m.astype(x, dtype) for x in found)
