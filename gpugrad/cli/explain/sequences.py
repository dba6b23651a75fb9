"""Recurrent nets and the tasks that they are given."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpugrad import nn
from gpugrad.core.conversion import tensor
from gpugrad.core.tensor import Tensor

__all__ = ["Reader", "average", "first_sign"]


class Reader(nn.Module):
    """A recurrent layer that reads a sequence, and a layer that answers from its last state."""

    def __init__(self, cell: Any, inputs: int, outputs: int, width: int, **options: Any) -> None:
        super().__init__()
        self.cell = cell(inputs, width, batch_first=True, **options)
        self.head = nn.Linear(width, outputs, dtype=options.get("dtype"))

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.cell(x)
        return self.head(states[:, -1])  # type: ignore[no-any-return]


def average(count: int, length: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of numbers from 0 to 1, and twice their mean: [N, T, 1] and [N, 1], float32."""
    x = rng.uniform(0, 1, (count, length, 1)).astype(np.float32)
    return tensor(x), tensor(2 * x.mean(axis=1))


def first_sign(count: int, length: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of ±1, whose first step is marked by a 1 beside it, and whether that is positive.

    All that follows is noise: the answer has to be kept to the end.
    """
    x = np.zeros((count, length, 2))
    x[:, :, 0] = rng.choice([-1.0, 1.0], (count, length))
    x[:, 0, 1] = 1
    return tensor(x), tensor((x[:, 0, 0] > 0).astype(np.int64))
