"""Losses as modules: the functions of `nn.functional`, with their options kept."""

# A declared operation is known to return Any; what it returns is a tensor.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from typing import Any

from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError
from gpugrad.nn import functional as F
from gpugrad.nn.module import Module

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CosineEmbeddingLoss",
    "CosineSimilarity",
    "CrossEntropyLoss",
    "GaussianNLLLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "MSELoss",
    "NLLLoss",
    "SmoothL1Loss",
]


class _Loss(Module):
    """A loss, and how its elements become one number."""

    #: What `reduction` may be.
    reductions: tuple[str, ...] = ("mean", "sum", "none")

    def __init__(self, reduction: str) -> None:
        super().__init__()
        if reduction not in self.reductions:
            raise ParameterError(
                f"{type(self).__name__}: reduction is one of {', '.join(self.reductions)}, not "
                f"{reduction!r}"
            )
        self.reduction = reduction


# -- of classes -----------------------------------------------------------------------------------


class CrossEntropyLoss(_Loss):
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
        super().__init__(reduction)
        if not 0.0 <= label_smoothing <= 1.0:
            raise ParameterError(
                f"CrossEntropyLoss: label_smoothing is a share from 0 to 1, not {label_smoothing!r}"
            )
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Any) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class NLLLoss(_Loss):
    """What `CrossEntropyLoss` is, of log-probabilities, such as `LogSoftmax` gives.

    >>> import gpugrad as gg
    >>> NLLLoss()(gg.tensor([[-0.5, -1.0]]), gg.tensor([1]))
    tensor(1.)
    """

    weight: Tensor | None

    def __init__(
        self, weight: Tensor | None = None, *, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__(reduction)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index

    def forward(self, input: Tensor, target: Any) -> Tensor:
        return F.nll_loss(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )


# -- of probabilities -----------------------------------------------------------------------------


class BCELoss(_Loss):
    """Cross-entropy of independent yes-or-no questions, from probabilities.

    `weight` broadcasts to the input; it moves and is saved with the module.

    >>> import gpugrad as gg
    >>> BCELoss()(gg.tensor([0.5]), gg.tensor([1.0]))
    tensor(0.69314718)
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, *, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Any) -> Tensor:
        return F.binary_cross_entropy(input, target, self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(_Loss):
    """Cross-entropy of independent yes-or-no questions, from logits.

    `weight` and `pos_weight`, how much a yes counts in comparison with a no, broadcast to the
    input; they move and are saved with the module.

    >>> import gpugrad as gg
    >>> BCEWithLogitsLoss()(gg.tensor([0.0]), gg.tensor([1.0]))
    tensor(0.69314718)
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
    ) -> None:
        super().__init__(reduction)
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)

    def forward(self, input: Tensor, target: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class KLDivLoss(_Loss):
    """The divergence of target distributions from log-probabilities; "batchmean" is the true mean.

    With `log_target` the targets are logarithms, too.

    >>> import gpugrad as gg
    >>> KLDivLoss(reduction="batchmean")(gg.log(gg.tensor([[0.5, 0.5]])), gg.tensor([[0.0, 1.0]]))
    tensor(0.69314718)
    """

    reductions = ("mean", "sum", "none", "batchmean")

    def __init__(self, *, reduction: str = "mean", log_target: bool = False) -> None:
        super().__init__(reduction)
        self.log_target = log_target

    def forward(self, input: Tensor, target: Any) -> Tensor:
        return F.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


# -- of values ------------------------------------------------------------------------------------


class MSELoss(_Loss):
    """The squared difference of input and target: its mean, its sum, or with "none" as it is.

    >>> import gpugrad as gg
    >>> MSELoss()(gg.tensor([1.0, 2.0]), gg.tensor([1.0, 4.0]))
    tensor(2.)
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(reduction)

    def forward(self, input: Tensor, target: Any) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)


class L1Loss(_Loss):
    """The absolute difference of input and target.

    >>> import gpugrad as gg
    >>> L1Loss()(gg.tensor([1.0, 2.0]), gg.tensor([1.0, 4.0]))
    tensor(1.)
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(reduction)

    def forward(self, input: Tensor, target: Any) -> Tensor:
        return F.l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(_Loss):
    """The absolute difference, with a parabola for those below `beta`.

    >>> import gpugrad as gg
    >>> SmoothL1Loss(reduction="none")(gg.tensor([0.5, 3.0]), gg.tensor([0.0, 0.0]))
    tensor([0.125, 2.5  ])
    """

    def __init__(self, *, reduction: str = "mean", beta: float = 1.0) -> None:
        super().__init__(reduction)
        if not beta >= 0:
            raise ParameterError(f"SmoothL1Loss: beta must not be negative, got {beta!r}")
        self.beta = beta

    def forward(self, input: Tensor, target: Any) -> Tensor:
        return F.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(_Loss):
    """Half the squared difference up to `delta`, linear beyond.

    >>> import gpugrad as gg
    >>> HuberLoss("none", delta=2.0)(gg.tensor([0.5, 3.0]), gg.tensor([0.0, 0.0]))
    tensor([0.125, 4.   ])
    """

    def __init__(self, reduction: str = "mean", delta: float = 1.0) -> None:
        super().__init__(reduction)
        if not delta > 0:
            raise ParameterError(f"HuberLoss: delta must be positive, got {delta!r}")
        self.delta = delta

    def forward(self, input: Tensor, target: Any) -> Tensor:
        return F.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class GaussianNLLLoss(_Loss):
    """The negative log-density of targets under normal distributions, their variance an input.

    >>> import gpugrad as gg
    >>> GaussianNLLLoss()(gg.tensor([1.0]), gg.tensor([3.0]), gg.tensor([2.0]))
    tensor(1.34657359)
    """

    def __init__(self, *, full: bool = False, eps: float = 1e-6, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.full = full
        self.eps = eps

    def forward(self, input: Tensor, target: Any, var: Any) -> Tensor:
        return F.gaussian_nll_loss(
            input, target, var, full=self.full, eps=self.eps, reduction=self.reduction
        )


# -- of directions --------------------------------------------------------------------------------


class CosineSimilarity(Module):
    """The cosine of the angle between vectors along `dim`.

    >>> import gpugrad as gg
    >>> CosineSimilarity()(gg.tensor([[3.0, 4.0]]), gg.tensor([[1.0, 0.0]]))
    tensor([0.6])
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x1: Tensor, x2: Any) -> Tensor:
        return F.cosine_similarity(x1, x2, self.dim, self.eps)


class CosineEmbeddingLoss(_Loss):
    """1 - cos of pairs whose target is 1, and cos less `margin` of those whose target is -1.

    >>> import gpugrad as gg
    >>> a, b = gg.tensor([[3.0, 4.0]]), gg.tensor([[1.0, 0.0]])
    >>> CosineEmbeddingLoss(margin=0.5)(a, b, gg.tensor([-1]))
    tensor(0.1)
    """

    def __init__(self, margin: float = 0.0, *, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.margin = margin

    def forward(self, input1: Tensor, input2: Any, target: Any) -> Tensor:
        return F.cosine_embedding_loss(
            input1, input2, target, margin=self.margin, reduction=self.reduction
        )
