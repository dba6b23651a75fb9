"""A decoder of the GPT kind."""

from __future__ import annotations

import math
from typing import Any

from gpugrad import nn
from gpugrad import ops as gg
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.nn.random import default_generator
from gpugrad.nn.transformer import normed_sum
from gpugrad.ops.attention import packed_attention

__all__ = ["GPT"]


class Attention(nn.Module):
    """Every position looks at those before it."""

    def __init__(self, width: int, heads: int, dropout: float, dtype: Any = None) -> None:
        super().__init__()
        if width % heads:
            raise ParameterError(f"GPT: width {width} is no multiple of {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width, dtype=dtype)
        self.proj = nn.Linear(width, width, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        drawn = default_generator.stream() if p else (0, 0)
        y = packed_attention(
            self.qkv(x), heads=self.heads, is_causal=True, dropout_p=p, seed=drawn[0],
            offset=drawn[1],
        )  # fmt: skip
        return self.proj(y)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and two layers, each added to what it was computed from, after normalisation."""

    def __init__(self, width: int, heads: int, dropout: float, dtype: Any = None) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width, dtype=dtype)
        self.attn = Attention(width, heads, dropout, dtype)
        self.ln2 = nn.LayerNorm(width, dtype=dtype)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, dtype=dtype),
            nn.GELU("tanh"),
            nn.Linear(4 * width, width, dtype=dtype),
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y, x = normed_sum(self.ln2, self.drop(self.attn(self.ln1(x))), x)
        return x + self.drop(self.mlp(y))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Learned embeddings of tokens and positions, blocks of attention, and scores of next tokens.

    Parameters
    ----------
    vocabulary, context:
        How many tokens there are, and the most that it can look back upon.
    width, depth, heads:
        Features of a position, blocks, and heads of attention in each.
    dropout:
        Share of attention and of what is added by each half of a block that is dropped in training.
    checkpoint:
        Compute the blocks again on the way back instead of keeping what is in them.

    The scores are products with the embedding, which is therefore one parameter with the head
    (weight tying; Press and Wolf, arXiv:1608.05859). Radford et al., "Language models are
    unsupervised multitask learners" (2019); its initial values.

    Tokens [N, T] give scores [N, T, vocabulary]. ShapeError for a T greater than the context.

    >>> import gpugrad as gg
    >>> net = GPT(30, context=8, width=16, depth=1, heads=2)
    >>> net(gg.zeros((2, 5), dtype="int64")).shape
    (2, 5, 30)
    """

    def __init__(
        self,
        vocabulary: int,
        context: int = 64,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        checkpoint: bool = False,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.context = context
        self.checkpoint = checkpoint
        self.tokens = nn.Embedding(vocabulary, width, dtype=dtype)
        self.positions = nn.Embedding(context, width, dtype=dtype)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, dtype) for _ in range(depth))
        self.ln = nn.LayerNorm(width, dtype=dtype)
        self.head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
        self.head.weight = self.tokens.weight
        for name, p in self.named_parameters():
            if p.ndim == 2:
                last = name.endswith(("proj.weight", "mlp.2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * depth) if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[-1]
        if length > self.context:
            raise ShapeError(
                f"GPT: {length} tokens for a context of {self.context}; pass the last "
                f"{self.context} of them"
            )
        places = gg.arange(length, device=tokens.device)
        x = self.drop(self.tokens(tokens) + self.positions(places))
        for block in self.blocks:
            x = nn.utils.checkpoint(block, x) if self.checkpoint else block(x)
        return self.head(self.ln(x))  # type: ignore[no-any-return]
