"""Operations under PyTorch's names and signatures: `import gpugrad.nn.functional as F`."""

from __future__ import annotations

import math

from gpugrad import ops
from gpugrad.core.conversion import tensor
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.nn.random import Generator, draws_from
from gpugrad.ops import linalg
from gpugrad.ops.losses import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    l1_loss,
    mse_loss,
    nll_loss,
    smooth_l1_loss,
)

__all__ = [
    "binary_cross_entropy_with_logits",
    "celu",
    "check_probability",
    "cross_entropy",
    "dropout",
    "elu",
    "flatten",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "huber_loss",
    "l1_loss",
    "leaky_relu",
    "linear",
    "log_softmax",
    "logsigmoid",
    "mish",
    "mse_loss",
    "nll_loss",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "smooth_l1_loss",
    "softmax",
    "softplus",
    "softsign",
    "tanh",
]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input·weightᵀ + bias, for a weight of shape [out_features, in_features]."""
    return linalg.linear(input, weight, bias)  # type: ignore[no-any-return]


# -- activations ---------------------------------------------------------------------------------


def relu(input: Tensor) -> Tensor:
    """The positive part."""
    return ops.relu(input)  # type: ignore[no-any-return]


def relu6(input: Tensor) -> Tensor:
    """The positive part, at most 6."""
    return ops.relu6(input)  # type: ignore[no-any-return]


def leaky_relu(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    """The input where positive, `negative_slope` times the input elsewhere."""
    return ops.leaky_relu(input, negative_slope=negative_slope)  # type: ignore[no-any-return]


def elu(input: Tensor, alpha: float = 1.0) -> Tensor:
    """The input where positive, alpha·(eˣ − 1) elsewhere."""
    return ops.elu(input, alpha=alpha)  # type: ignore[no-any-return]


def selu(input: Tensor) -> Tensor:
    """A scaled `elu` that keeps mean 0 and variance 1 from layer to layer."""
    return ops.selu(input)  # type: ignore[no-any-return]


def celu(input: Tensor, alpha: float = 1.0) -> Tensor:
    """The input where positive, alpha·(e^(x/alpha) − 1) elsewhere."""
    return ops.celu(input, alpha=alpha)  # type: ignore[no-any-return]


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """x·Φ(x), Φ being the normal distribution function; `approximate="tanh"` is quicker."""
    return ops.gelu(input, approximate=approximate)  # type: ignore[no-any-return]


def silu(input: Tensor) -> Tensor:
    """x·sigmoid(x)."""
    return ops.silu(input)  # type: ignore[no-any-return]


def mish(input: Tensor) -> Tensor:
    """x·tanh(softplus(x))."""
    return ops.mish(input)  # type: ignore[no-any-return]


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """ln(1 + e^(beta·x))/beta; the input itself where beta·x is above `threshold`."""
    return ops.softplus(input, beta=beta, threshold=threshold)  # type: ignore[no-any-return]


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    """The input brought into [min_val, max_val]."""
    return ops.hardtanh(input, min_val=min_val, max_val=max_val)  # type: ignore[no-any-return]


def hardswish(input: Tensor) -> Tensor:
    """x·relu6(x + 3)/6."""
    return ops.hardswish(input)  # type: ignore[no-any-return]


def hardsigmoid(input: Tensor) -> Tensor:
    """relu6(x + 3)/6."""
    return ops.hardsigmoid(input)  # type: ignore[no-any-return]


def sigmoid(input: Tensor) -> Tensor:
    """1/(1 + e⁻ˣ)."""
    return ops.sigmoid(input)  # type: ignore[no-any-return]


def logsigmoid(input: Tensor) -> Tensor:
    """ln sigmoid(x), without overflow."""
    return ops.logsigmoid(input)  # type: ignore[no-any-return]


def tanh(input: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return ops.tanh(input)  # type: ignore[no-any-return]


def softsign(input: Tensor) -> Tensor:
    """x/(1 + |x|)."""
    return ops.softsign(input)  # type: ignore[no-any-return]


def softmax(input: Tensor, dim: int = -1) -> Tensor:
    """eˣ over its sum along `dim`."""
    return ops.softmax(input, axis=dim)  # type: ignore[no-any-return]


def log_softmax(input: Tensor, dim: int = -1) -> Tensor:
    """The logarithm of `softmax`, without overflow."""
    return ops.log_softmax(input, axis=dim)  # type: ignore[no-any-return]


# -- shape and noise -----------------------------------------------------------------------------


def flatten(input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """The input with the axes from `start_dim` to `end_dim`, both included, joined into one.

    >>> import gpugrad as gg
    >>> flatten(gg.tensor([[[1.0, 2.0], [3.0, 4.0]]]), start_dim=1)
    tensor([[1., 2., 3., 4.]])
    """
    shape = input.shape
    count = max(len(shape), 1)
    start, end = (d + count if d < 0 else d for d in (start_dim, end_dim))
    if not 0 <= start <= end < count:
        raise ShapeError(
            f"flatten: axes from {start_dim} to {end_dim} of a tensor of shape {shape}; they must "
            "exist, and the first must not lie behind the last"
        )
    joined = math.prod(shape[start : end + 1])
    return ops.reshape(  # type: ignore[no-any-return]
        input, (*shape[:start], joined, *shape[end + 1 :])
    )


def check_probability(p: float) -> None:
    """Raise ParameterError unless `p` is a number from 0 to 1."""
    if not 0 <= p <= 1:
        raise ParameterError(f"dropout: p is a probability from 0 to 1, got {p}")


def dropout(
    input: Tensor, p: float = 0.5, training: bool = True, *, generator: Generator | None = None
) -> Tensor:
    """The input with each element set to zero with probability `p`, and the rest times 1/(1−p).

    The mask is a function of the generator's seed and of how many arrays it has drawn. It is made
    on the host and sent to the input's device; nothing is read back.

    >>> import gpugrad as gg
    >>> dropout(gg.tensor([1.0, 2.0]), training=False)
    tensor([1., 2.])
    """
    check_probability(p)
    if not training or p == 0:
        return input
    keep = 1 - p
    kept = draws_from(generator).uniform(input.shape) < keep
    mask = kept.astype(input.dtype)
    if keep:
        mask *= 1 / keep
    return input * tensor(mask, device=input.device)
