"""Attention as a layer: projections of queries, keys and values, and of what comes out."""

from __future__ import annotations

import math
from typing import Any

from gpugrad import ops
from gpugrad.backend.random import check_probability
from gpugrad.core.tensor import Tensor
from gpugrad.errors import DTypeError, ParameterError, ShapeError
from gpugrad.nn import functional as F
from gpugrad.nn import init
from gpugrad.nn.layers import Linear, _empty
from gpugrad.nn.module import Module, Parameter
from gpugrad.nn.random import Generator, draws_from
from gpugrad.ops.attention import packed_attention

__all__ = ["MultiheadAttention"]


class MultiheadAttention(Module):
    """Attention of several heads at once, each with projections of its own.

    The weights of the three projections are one parameter, `in_proj_weight` of shape
    [3·embed_dim, embed_dim], or three if keys or values have another width. Names, defaults and
    initial distributions are PyTorch's, and so is the meaning of masks: True, or a number that is
    added, hides a key. Vaswani et al., "Attention is all you need" (arXiv:1706.03762).

    Without `need_weights` scores are computed block by block, in memory linear in the length, and
    a query that sees nothing gets zeros; weights that are asked for are a matrix, in which such a
    query has NaN.

    Parameters
    ----------
    embed_dim:
        Width of the queries and of the result; a multiple of `num_heads`.
    dropout:
        The share of the weights that is dropped in training.
    bias:
        Whether the four projections have one.
    add_bias_kv, add_zero_attn:
        Add one more key and value: a learned one, or zeros.
    kdim, vdim:
        Widths of keys and values; `embed_dim` if None.
    batch_first:
        Whether arguments are [batch, length, width] rather than [length, batch, width].
    generator:
        What dropout draws from; the default one if None.

    >>> import gpugrad as gg
    >>> layer = MultiheadAttention(8, 2, batch_first=True)
    >>> x = gg.ones((3, 5, 8), dtype="float32")
    >>> y, weights = layer(x, x, x)
    >>> y.shape, weights.shape
    ((3, 5, 8), (3, 5, 5))
    """

    in_proj_weight: Parameter | None
    in_proj_bias: Parameter | None
    bias_k: Parameter | None
    bias_v: Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: str | None = None,
        dtype: Any = None,
        *,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ParameterError(
                f"MultiheadAttention({embed_dim}, {num_heads}): embed_dim is a positive multiple "
                "of num_heads, each head takes an equal part of it"
            )
        check_probability(dropout)
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        self.generator = generator
        if self.kdim == embed_dim == self.vdim:
            self.in_proj_weight = _empty((3 * embed_dim, embed_dim), device, dtype)
            self.q_proj_weight = self.k_proj_weight = self.v_proj_weight = None
        else:
            self.in_proj_weight = None
            self.q_proj_weight = _empty((embed_dim, embed_dim), device, dtype)
            self.k_proj_weight = _empty((embed_dim, self.kdim), device, dtype)
            self.v_proj_weight = _empty((embed_dim, self.vdim), device, dtype)
        self.in_proj_bias = _empty((3 * embed_dim,), device, dtype) if bias else None
        self.bias_k = _empty((1, 1, embed_dim), device, dtype) if add_bias_kv else None
        self.bias_v = _empty((1, 1, embed_dim), device, dtype) if add_bias_kv else None
        self.out_proj = Linear(embed_dim, embed_dim, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draw the weights anew, and set biases to zero."""
        weights = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        for weight in weights:
            if weight is not None:
                init.xavier_uniform_(weight, generator=generator)
        self.out_proj.reset_parameters(generator)
        if self.in_proj_bias is not None and self.out_proj.bias is not None:
            init.zeros_(self.in_proj_bias)
            init.zeros_(self.out_proj.bias)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                init.xavier_normal_(extra, generator=generator)

    # -- forward ----------------------------------------------------------------------------------

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What the queries find, and with `need_weights` how much of each value they took.

        Parameters
        ----------
        query, key, value:
            [length, batch, width], with `batch_first` [batch, length, width], or [length, width].
        key_padding_mask:
            [batch, keys], or [keys]: True for a key that nobody sees, or numbers added to its
            scores.
        attn_mask:
            [queries, keys] or [batch·heads, queries, keys]: True for a key that a query does not
            see, or numbers added to the scores.
        average_attn_weights:
            Weights of shape [batch, queries, keys], rather than [batch, heads, queries, keys].
        is_causal:
            That `attn_mask` hides exactly the keys behind each query, so that it need not be looked
            at; or, without a mask, that they are to be hidden.
        """
        batched = query.ndim == 3
        self._check(query, key, value)
        shared = query is key and key is value
        if not batched:
            query, key, value = (ops.expand_dims(x, axis=0) for x in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = ops.expand_dims(key_padding_mask, axis=0)
        elif not self.batch_first:
            query, key, value = (ops.moveaxis(x, 0, 1) for x in (query, key, value))
        sizes = (query.shape[0], query.shape[1], key.shape[1])
        mask, causal = self._mask(
            sizes, key_padding_mask, attn_mask, is_causal, need_weights, query.dtype, query.device
        )
        p = self.dropout if self.training else 0.0
        extra = self.bias_k is not None or self.add_zero_attn
        weights = None
        if shared and self.in_proj_weight is not None and not extra and not need_weights:
            qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            seed, offset = draws_from(self.generator).stream() if p else (0, 0)
            y = packed_attention(
                qkv, mask, self.num_heads, causal, dropout_p=p, seed=seed, offset=offset
            )
        else:
            q, k, v = self._projected(query, key, value)
            if need_weights:
                y, weights = self._with_weights(q, k, v, mask, p)
            else:
                y = F.scaled_dot_product_attention(
                    q, k, v, mask, p, causal, generator=self.generator
                )
            y = ops.moveaxis(y, 1, 2)
            y = ops.reshape(y, (*y.shape[:2], self.embed_dim))
        y = self.out_proj(y)
        if weights is not None and average_attn_weights:
            weights = ops.mean(weights, axis=1)
        if not batched:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else ops.moveaxis(y, 0, 1), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raise ShapeError unless the three fit the layer and each other."""
        q, k, v = query.shape, key.shape, value.shape
        order = "[batch, length, width]" if self.batch_first else "[length, batch, width]"
        axis = 0 if self.batch_first else 1
        met = f"query of shape {q}, key {k}, value {v}"
        if len(q) not in (2, 3) or len(k) != len(q) or len(v) != len(q):
            raise ShapeError(f"{met}: each is {order}, or all of them are [length, width]")
        wanted = (self.embed_dim, self.kdim, self.vdim)
        if (q[-1], k[-1], v[-1]) != wanted:
            raise ShapeError(
                f"{met}: their last axes have {(q[-1], k[-1], v[-1])} elements, the layer takes "
                f"{wanted}; give it embed_dim={q[-1]}, kdim={k[-1]}, vdim={v[-1]}"
            )
        if k[:-1] != v[:-1] or (len(q) == 3 and q[axis] != k[axis]):
            raise ShapeError(
                f"{met}: there must be a value for each key, and batches of one size ({order}); "
                "is batch_first right?"
            )

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of all heads, [batch, heads, length, head_dim]."""
        if self.in_proj_weight is not None:
            weights = ops.split(self.in_proj_weight, 3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else ops.split(self.in_proj_bias, 3)
        q, k, v = map(F.linear, (query, key, value), weights, biases)
        if self.bias_k is not None and self.bias_v is not None:
            size = (k.shape[0], 1, self.embed_dim)
            k, v = (
                ops.concat([x, ops.broadcast_to(more, size)], axis=1)
                for x, more in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            zeros = ops.zeros((k.shape[0], 1, self.embed_dim), dtype=k.dtype, device=k.device)
            k, v = (ops.concat([x, zeros], axis=1) for x in (k, v))

        def apart(x: Tensor) -> Tensor:
            x = ops.reshape(x, (*x.shape[:2], self.num_heads, self.head_dim))
            return ops.moveaxis(x, 2, 1)  # type: ignore[no-any-return]

        return apart(q), apart(k), apart(v)

    def _with_weights(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float
    ) -> tuple[Tensor, Tensor]:
        scores = (q * (1.0 / math.sqrt(self.head_dim))) @ k.mT
        if mask is not None:
            seen = mask.dtype.kind == "b"
            scores = ops.where(mask, scores, -math.inf) if seen else scores + mask
        weights = F.dropout(ops.softmax(scores), p, generator=self.generator)
        return weights @ v, weights

    # -- masks ------------------------------------------------------------------------------------

    def _mask(
        self, sizes: tuple[int, int, int], padding: Tensor | None, mask: Tensor | None,
        is_causal: bool, need_weights: bool, dtype: Any, device: str,
    ) -> tuple[Tensor | None, bool]:  # fmt: skip
        """The two masks as one of attention's own, (batch, heads, queries, keys), and causality."""
        batch, queries, keys = sizes
        if padding is not None:
            self._check_mask("key_padding_mask", padding, [(batch, keys)])
            padding = ops.reshape(padding, (batch, 1, 1, keys))
        if mask is not None:
            stacked = (batch * self.num_heads, queries, keys)
            self._check_mask("attn_mask", mask, [(queries, keys), stacked])
            if mask.ndim == 3:
                mask = ops.reshape(mask, (batch, self.num_heads, queries, keys))
        if is_causal and (mask is None or (padding is None and not need_weights)):
            mask = None
            if need_weights:
                everything = ops.ones((queries, keys), dtype="bool", device=device)
                mask = ops.logical_not(ops.tril(everything))
        else:
            is_causal = False
        if mask is not None and padding is not None:
            if mask.dtype.kind == "b" == padding.dtype.kind:
                mask = ops.logical_or(mask, padding)
            else:
                mask = _added(mask, dtype) + _added(padding, dtype)
        elif padding is not None:
            mask = padding
        if mask is None:
            return None, is_causal
        more = (self.bias_k is not None) + self.add_zero_attn
        if more:
            shown = ops.zeros((*mask.shape[:-1], more), dtype=mask.dtype, device=mask.device)
            mask = ops.concat([mask, shown], axis=-1)
        return ops.logical_not(mask) if mask.dtype.kind == "b" else mask, is_causal

    def _check_mask(self, name: str, mask: Tensor, shapes: list[tuple[int, ...]]) -> None:
        if mask.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ShapeError(f"{name} of shape {mask.shape}; it takes one of shape {wanted}")
        if mask.dtype.kind in "iuc":
            raise DTypeError(
                f"{name} is {mask.dtype}; it is boolean (True hides) or floating-point (added to "
                "the scores): convert it with .to(dtype)"
            )

    def label(self) -> str:
        return f"{type(self).__name__} {self.embed_dim} in {self.num_heads}"


def _added(mask: Tensor, dtype: Any) -> Tensor:
    """A mask as numbers that are added to the scores."""
    if mask.dtype.kind != "b":
        return mask
    zeros = ops.zeros(mask.shape, dtype=dtype, device=mask.device)
    return ops.where(mask, -math.inf, zeros)  # type: ignore[no-any-return]
