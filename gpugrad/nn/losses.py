"""Losses as modules."""

from __future__ import annotations

from typing import Any

from gpugrad.core.tensor import Tensor
from gpugrad.nn import functional as F  # noqa: N812
from gpugrad.nn.module import Module

__all__ = ["CrossEntropyLoss", "MSELoss"]


class MSELoss(Module):
    """The squared difference of input and target: its mean, its sum, or with "none" as it is.

    >>> import gpugrad as gg
    >>> MSELoss()(gg.tensor([1.0, 2.0]), gg.tensor([1.0, 4.0]))
    tensor(2.)
    """

    def __init__(self, reduction: F.Reduction = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, input: Tensor, target: Any) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)
