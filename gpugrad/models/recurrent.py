"""A recurrent language model."""

from __future__ import annotations

from typing import Any

from gpugrad import nn
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError

__all__ = ["RecurrentLM"]

CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class RecurrentLM(nn.Module):
    """An embedding, recurrent layers, and scores for the next token at every step.

    Parameters
    ----------
    vocabulary:
        How many tokens there are.
    cell:
        `"rnn"`, `"lstm"` or `"gru"`.
    width, depth:
        Units of a layer, which are also the features of the embedding, and how many there are.
    dropout:
        The share of what passes from layer to layer that is dropped in training.

    Recurrent weights start orthogonal, which keeps the gradient's size over many steps (Saxe et
    al., arXiv:1312.6120), and the forget gates of an LSTM start open.

    Tokens [N, T] give scores [N, T, vocabulary].

    >>> import gpugrad as gg
    >>> RecurrentLM(30, "gru", width=8)(gg.zeros((2, 5), dtype="int64")).shape
    (2, 5, 30)
    """

    def __init__(
        self,
        vocabulary: int,
        cell: str = "lstm",
        width: int = 256,
        depth: int = 1,
        dropout: float = 0.0,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ParameterError(f"RecurrentLM: cell {cell!r} is none of {', '.join(CELLS)}")
        self.embedding = nn.Embedding(vocabulary, width, dtype=dtype)
        self.drop = nn.Dropout(dropout)
        self.recurrent = CELLS[cell](
            width,
            width,
            depth,
            batch_first=True,
            dropout=dropout if depth > 1 else 0.0,
            dtype=dtype,
        )
        self.head = nn.Linear(width, vocabulary, dtype=dtype)
        for name, p in self.recurrent.named_parameters():
            if name.startswith("weight_hh"):
                for gate in range(p.shape[0] // width):
                    nn.init.orthogonal_(p[gate * width : (gate + 1) * width].detach())
            elif name.startswith("bias_ih") and cell == "lstm":
                nn.init.ones_(p[width : 2 * width].detach())

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.recurrent(self.drop(self.embedding(tokens)))
        return self.head(self.drop(y))  # type: ignore[no-any-return]
