"""Losses as modules."""

from __future__ import annotations

from typing import Any

from gpugrad.core.tensor import Tensor
from gpugrad.nn import functional as F
from gpugrad.nn.module import Module

__all__ = ["CrossEntropyLoss", "MSELoss"]


class CrossEntropyLoss(Module):
    """Cross-entropy of scores of shape [N, classes, ...] and the right classes.

    Parameters
    ----------
    weight:
        A weight for each class; moves and is saved with the module.
    ignore_index:
        Targets of this value do not count.
    reduction:
        "mean" (weighted), "sum", or "none" for the loss of every example.
    label_smoothing:
        Share of the target that is spread evenly over all classes.

    >>> import gpugrad as gg
    >>> scores = gg.tensor([[0.0, 0.0], [0.0, 0.0]])
    >>> CrossEntropyLoss()(scores, gg.tensor([0, 1]))
    tensor(0.69314718)
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Any) -> Tensor:
        loss: Tensor = F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
        return loss


class MSELoss(Module):
    """The squared difference of input and target: its mean, its sum, or with "none" as it is.

    >>> import gpugrad as gg
    >>> MSELoss()(gg.tensor([1.0, 2.0]), gg.tensor([1.0, 4.0]))
    tensor(2.)
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, input: Tensor, target: Any) -> Tensor:
        loss: Tensor = F.mse_loss(input, target, reduction=self.reduction)
        return loss
