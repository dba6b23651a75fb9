"""Blocks of a transformer: attention and a feed-forward net, each with a residual and a norm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from gpugrad import ops
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError
from gpugrad.nn import functional as F
from gpugrad.nn.activations import name_of
from gpugrad.nn.attention import MultiheadAttention
from gpugrad.nn.containers import ModuleList
from gpugrad.nn.layers import Dropout, Linear
from gpugrad.nn.module import Module
from gpugrad.nn.normalization import LayerNorm
from gpugrad.nn.random import Generator

__all__ = ["TransformerDecoderLayer", "TransformerEncoder", "TransformerEncoderLayer"]

Activation = str | Callable[[Tensor], Tensor]

#: Functions that a linear layer applies to its own result.
_FUSED: dict[Any, str] = {F.relu: "relu", F.gelu: "gelu", F.silu: "silu", F.tanh: "tanh",
                          F.mish: "mish", F.sigmoid: "sigmoid"}  # fmt: skip


def _activation(layer: str, activation: Activation) -> Callable[[Tensor], Tensor]:
    if not isinstance(activation, str):
        return activation
    if activation not in ("relu", "gelu"):
        raise ParameterError(
            f'{layer}: activation={activation!r} is neither "relu" nor "gelu"; give another one as '
            "a function or a module"
        )
    return F.relu if activation == "relu" else F.gelu


def normed_sum(norm: Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """``norm(x + residual)`` and the sum, in one operation where the norm is a plain LayerNorm."""
    if type(norm) is not LayerNorm or norm._hooks or x.shape != residual.shape:
        total = x + residual
        return norm(total), total
    axes = len(norm.normalized_shape)
    return ops.add_layer_norm(  # type: ignore[no-any-return]
        x, residual, norm.weight, norm.bias, axes=axes, eps=norm.eps
    )


class _Block(Module):
    """What encoder and decoder layers share: attention to itself, and the feed-forward net."""

    activation: Callable[[Tensor], Tensor]
    self_attn: MultiheadAttention
    dropout1: Dropout
    dropout2: Dropout

    def _make(
        self, d_model: int, nhead: int, dim_feedforward: int, dropout: float,
        activation: Activation, layer_norm_eps: float, batch_first: bool, norm_first: bool,
        bias: bool, attentions: tuple[str, ...], generator: Generator | None, **kind: Any,
    ) -> None:  # fmt: skip
        for name in attentions:
            attention = MultiheadAttention(
                d_model, nhead, dropout, bias, batch_first=batch_first, generator=generator, **kind
            )
            self.add_module(name, attention)
        self.linear1 = Linear(d_model, dim_feedforward, bias, **kind)
        self.dropout = Dropout(dropout, generator=generator)
        self.linear2 = Linear(dim_feedforward, d_model, bias, **kind)
        self.norm_first = norm_first
        count = len(attentions) + 1
        for i in range(1, count + 1):
            self.add_module(f"norm{i}", LayerNorm(d_model, layer_norm_eps, bias=bias, **kind))
        for i in range(1, count + 1):
            self.add_module(f"dropout{i}", Dropout(dropout, generator=generator))
        self.activation = _activation(type(self).__name__, activation)

    def _feed_forward(self, x: Tensor, last: Module) -> Tensor:
        act = self.activation
        name = name_of(act) if isinstance(act, Module) else _FUSED.get(act)
        if name is None:
            x = act(self.linear1(x))
        else:
            x = self.linear1(x, activation=name)
        return last(self.linear2(self.dropout(x)))  # type: ignore[no-any-return]

    def _attend(
        self, attention: Module, drop: Module, x: Tensor, memory: Tensor | None,
        mask: Tensor | None, padding: Tensor | None, is_causal: bool,
    ) -> Tensor:  # fmt: skip
        memory = x if memory is None else memory
        y, _ = attention(
            x, memory, memory, key_padding_mask=padding, need_weights=False, attn_mask=mask,
            is_causal=is_causal,
        )  # fmt: skip
        return drop(y)  # type: ignore[no-any-return]

    def _run(self, x: Tensor, steps: list[Callable[[Tensor], Tensor]]) -> Tensor:
        """Each step with its residual, and its norm before or after it."""
        norms = [getattr(self, f"norm{i}") for i in range(1, len(steps) + 1)]
        if not self.norm_first:
            for step, norm in zip(steps, norms, strict=True):
                x = normed_sum(norm, step(x), x)[0]
            return x
        y = norms[0](x)
        for step, norm in zip(steps, norms[1:], strict=False):
            y, x = normed_sum(norm, step(y), x)
        return x + steps[-1](y)


class TransformerEncoderLayer(_Block):
    """Attention of a sequence to itself, then a feed-forward net; each with residual and norm.

    Names, defaults and results are PyTorch's. With `norm_first` each norm stands before its block
    (Xiong et al., arXiv:2002.04745), else after the residual (Vaswani et al., arXiv:1706.03762).

    Parameters
    ----------
    d_model, nhead:
        Width and heads, see :class:`MultiheadAttention`.
    dim_feedforward:
        Width within the feed-forward net.
    dropout:
        Of the weights of attention, within the feed-forward net, and after both.
    activation:
        `"relu"`, `"gelu"`, or a function or module.
    batch_first:
        Whether sequences are [batch, length, width] rather than [length, batch, width].

    >>> import gpugrad as gg
    >>> layer = TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    >>> layer(gg.ones((3, 5, 8), dtype="float32")).shape
    (3, 5, 8)
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: str | None = None,
        dtype: Any = None,
        *,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        self._make(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, ("self_attn",), generator, device=device, dtype=dtype,
        )  # fmt: skip

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self._attend(
                self.self_attn, self.dropout1, x, None, src_mask, src_key_padding_mask, is_causal
            )

        return self._run(src, [attend, lambda x: self._feed_forward(x, self.dropout2)])


class TransformerDecoderLayer(_Block):
    """As :class:`TransformerEncoderLayer`, with attention to a `memory` before the last block.

    >>> import gpugrad as gg
    >>> layer = TransformerDecoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    >>> x, memory = gg.ones((3, 5, 8), dtype="float32"), gg.ones((3, 7, 8), dtype="float32")
    >>> layer(x, memory, tgt_is_causal=True).shape
    (3, 5, 8)
    """

    multihead_attn: MultiheadAttention
    dropout3: Dropout

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: str | None = None,
        dtype: Any = None,
        *,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        self._make(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, ("self_attn", "multihead_attn"), generator, device=device,
            dtype=dtype,
        )  # fmt: skip

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self._attend(
                self.self_attn, self.dropout1, x, None, tgt_mask, tgt_key_padding_mask,
                tgt_is_causal,
            )  # fmt: skip

        def look_up(x: Tensor) -> Tensor:
            return self._attend(
                self.multihead_attn, self.dropout2, x, memory, memory_mask,
                memory_key_padding_mask, memory_is_causal,
            )  # fmt: skip

        return self._run(tgt, [attend, look_up, lambda x: self._feed_forward(x, self.dropout3)])


class TransformerEncoder(Module):
    """So many copies of a layer, one after the other, and a norm at the end if one is given.

    The copies start with equal parameters, as in PyTorch. `is_causal=None` finds out whether the
    mask is causal where looking at it costs no waiting, on the CPU. `enable_nested_tensor` and
    `mask_check` concern a short cut that there is not here; they change nothing.

    >>> import gpugrad as gg
    >>> layer = TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    >>> TransformerEncoder(layer, 2)(gg.ones((3, 5, 8), dtype="float32")).shape
    (3, 5, 8)
    """

    def __init__(
        self,
        encoder_layer: Module,
        num_layers: int,
        norm: Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__()
        self.layers = ModuleList([copy.deepcopy(encoder_layer) for _ in range(num_layers)])
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if is_causal is None:
            is_causal = mask is not None and _is_causal(mask)
        for layer in self.layers:
            src = layer(
                src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal
            )
        return src if self.norm is None else self.norm(src)


def _is_causal(mask: Tensor) -> bool:
    if mask.device != "cpu" or mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
        return False
    hidden = ~np.tri(mask.shape[0], dtype=np.bool_)
    if mask.dtype.kind == "b":
        return bool(np.array_equal(mask.data, hidden))
    return bool(np.array_equal(mask.data, np.where(hidden, -np.inf, 0.0)))
