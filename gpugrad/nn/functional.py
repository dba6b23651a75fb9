"""Operations under PyTorch's names and signatures: `import gpugrad.nn.functional as F`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gpugrad import ops
from gpugrad.backend.random import check_probability
from gpugrad.core.autocast import is_autocast_enabled
from gpugrad.core.modes import no_grad
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.nn.module import write
from gpugrad.nn.random import Generator, draws_from
from gpugrad.ops import linalg, normalization
from gpugrad.ops.convolution import conv1d, conv2d
from gpugrad.ops.losses import cross_entropy, nll_loss
from gpugrad.ops.pointwise_losses import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    gaussian_nll_loss,
    huber_loss,
    kl_div,
    l1_loss,
    mse_loss,
    smooth_l1_loss,
)
from gpugrad.ops.pooling import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    avg_pool1d,
    avg_pool2d,
    max_pool1d,
    max_pool2d,
)
from gpugrad.ops.similarity import cosine_embedding_loss, cosine_similarity
from gpugrad.ops.transposed import conv_transpose1d, conv_transpose2d

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "avg_pool1d",
    "avg_pool2d",
    "batch_norm",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "celu",
    "conv1d",
    "conv2d",
    "conv_transpose1d",
    "conv_transpose2d",
    "cosine_embedding_loss",
    "cosine_similarity",
    "cross_entropy",
    "dropout",
    "elu",
    "embedding",
    "flatten",
    "gaussian_nll_loss",
    "gelu",
    "glu",
    "group_norm",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "logsigmoid",
    "max_pool1d",
    "max_pool2d",
    "mish",
    "mse_loss",
    "nll_loss",
    "prelu",
    "relu",
    "relu6",
    "rms_norm",
    "scaled_dot_product_attention",
    "selu",
    "sigmoid",
    "silu",
    "smooth_l1_loss",
    "softmax",
    "softmin",
    "softplus",
    "softshrink",
    "softsign",
    "tanh",
    "tanhshrink",
    "threshold",
]


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """input·weightᵀ + bias, for a weight of shape [out_features, in_features].

    With `activation`, a name such as `"relu"` or `"gelu_tanh"`, that is applied too: product, bias
    and activation are then one operation, with one backward call for all three gradients.
    """
    if activation is None:
        return linalg.linear(input, weight, bias)  # type: ignore[no-any-return]
    if bias is None:
        bias = ops.zeros(weight.shape[:1], dtype=weight.dtype, device=weight.device)
    slots = input.backend.slots
    has_one = "linear_activation" in slots
    if not has_one and "bias_activation" in slots and not is_autocast_enabled():
        # Where the product is a library's, all that follows it is one kernel.
        product = linalg.linear(input, weight)
        return ops.bias_activation(product, bias, activation)  # type: ignore[no-any-return]
    return linalg.linear_activation(input, weight, bias, activation)  # type: ignore[no-any-return]


def check_dense(max_norm: float | None, sparse: bool) -> None:
    """Raise ParameterError for the options of PyTorch's embedding that there are not."""
    if max_norm is not None:
        raise ParameterError(
            f"embedding: max_norm={max_norm} would change the table while it is read; shorten its "
            "rows after each step, under no_grad()"
        )
    if sparse:
        raise ParameterError(
            "embedding: sparse=True asks for a sparse gradient; gradients are dense, leave it out"
        )


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """The rows of a table, `weight` of shape [rows, features], that the indices `input` name.

    `padding_idx` is a row without a gradient; `scale_grad_by_freq` divides the gradient of each row
    by how often it is named. `max_norm` and `sparse` are refused with ParameterError: a forward
    pass changes no parameter, and gradients are dense.

    >>> import gpugrad as gg
    >>> embedding(gg.tensor([1, 1]), gg.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[3., 4.],
            [3., 4.]])
    """
    check_dense(max_norm, sparse)
    return ops.embedding(input, weight, padding_idx, scale_grad_by_freq)  # type: ignore[no-any-return]


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


def threshold(input: Tensor, threshold: float, value: float) -> Tensor:
    """The input where it exceeds `threshold`, `value` elsewhere."""
    return ops.threshold(input, threshold, value)  # type: ignore[no-any-return]


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """The input moved by `lambd` towards zero, and 0 within `lambd` of it."""
    return ops.softshrink(input, lambd)  # type: ignore[no-any-return]


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """The input, and 0 within `lambd` of zero."""
    return ops.hardshrink(input, lambd)  # type: ignore[no-any-return]


def tanhshrink(input: Tensor) -> Tensor:
    """The input less its hyperbolic tangent."""
    return ops.tanhshrink(input)  # type: ignore[no-any-return]


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """The first half along `dim` times the sigmoid of the second."""
    return ops.glu(input, dim)  # type: ignore[no-any-return]


def softmin(input: Tensor, dim: int = -1) -> Tensor:
    """Softmax of the negated input."""
    return softmax(-input, dim)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """The input where positive, `weight` times it elsewhere.

    `weight` has one element, or one for each channel, which are axis 1 of the input. He et al.,
    arXiv:1502.01852. Raises ShapeError when they do not fit.

    >>> import gpugrad as gg
    >>> prelu(gg.tensor([-2.0, 3.0]), gg.tensor([0.5]))
    tensor([-1.,  3.])
    """
    channels = input.shape[1] if input.ndim > 1 else 1
    if weight.ndim > 1 or weight.size not in (1, channels):
        raise ShapeError(
            f"prelu: weight of shape {weight.shape} for input of shape {input.shape}; it needs 1 "
            f"element, or one for each of the {channels} channels in axis 1"
        )
    if weight.size > 1:
        weight = weight.reshape((-1,) + (1,) * (input.ndim - 2))
    return ops.where(input > 0, input, weight * input)  # type: ignore[no-any-return]


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


# -- normalisation -------------------------------------------------------------------------------


def _last_axes(operation: str, input: Tensor, normalized_shape: Sequence[int] | int) -> int:
    """How many axes `normalized_shape` names; ShapeError unless they are the last of the input."""
    wanted = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not wanted or input.shape[-len(wanted) :] != wanted:
        raise ShapeError(
            f"{operation}: input of shape {input.shape} for normalized_shape {wanted}, which are "
            "the sizes of the last axes; reshape the input, or change normalized_shape"
        )
    return len(wanted)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The last axes brought to mean 0 and variance 1 together, times `weight`, plus `bias`."""
    axes = _last_axes("layer_norm", input, normalized_shape)
    return ops.layer_norm(input, weight, bias, axes=axes, eps=eps)  # type: ignore[no-any-return]


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """The input over the root of its mean square on the last axes, times `weight`.

    `eps=None` stands for the resolution of the dtype that is computed in: float32 at least.
    """
    axes = _last_axes("rms_norm", input, normalized_shape)
    if eps is None:
        eps = float(np.finfo("float64" if input.dtype == np.float64 else "float32").eps)
    return ops.rms_norm(input, weight, axes=axes, eps=eps)  # type: ignore[no-any-return]


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Each group of channels, axis 1, brought to mean 0 and variance 1; then weight and bias."""
    return ops.group_norm(  # type: ignore[no-any-return]
        input, weight, bias, groups=num_groups, eps=eps
    )


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Each channel, axis 1, brought to mean 0 and variance 1; then weight and bias.

    With `training` by the moments of the batch, of which the running ones, if given, take over a
    share of `momentum`, in place (the variance unbiased); else by the running ones.
    """
    if not training:
        if running_mean is None or running_var is None:
            raise ParameterError(
                "batch_norm: without training, running_mean and running_var are needed; give them, "
                "or training=True for the moments of the batch"
            )
        return ops.batch_norm_inference(  # type: ignore[no-any-return]
            input, running_mean, running_var, weight, bias, eps=eps
        )
    count = math.prod(input.shape[:1] + input.shape[2:])
    if count == 1:
        raise ShapeError(
            f"batch_norm: input of shape {input.shape} has one value per channel, whose variance "
            "says nothing; train with larger batches, or call eval() to use the running averages"
        )
    with no_grad():
        mean, rest, var = normalization.batch_moments(input)
    y = normalization.batch_norm_training(
        input, weight, bias, eps=eps, moments=(mean.data, rest.data, var.data)
    )
    if count:
        with no_grad():
            _take_over(running_mean, mean, momentum)
            _take_over(running_var, var * (count / (count - 1)), momentum)
    return y  # type: ignore[no-any-return]


def _take_over(running: Tensor | None, new: Tensor, share: float | Tensor) -> None:
    """Let a running average take over a share of a new value."""
    if running is not None:
        if running.shape != new.shape:
            raise ShapeError(
                f"batch_norm: running averages of shape {running.shape} for {new.shape[0]} "
                "channels; they hold one element per channel"
            )
        new = new.to(dtype=running.dtype)
        write(running, running + share * (new - running))


# -- attention -----------------------------------------------------------------------------------


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """softmax(query·keyᵀ·scale + attn_mask)·value, in memory that is linear in the length.

    :func:`gpugrad.scaled_dot_product_attention`, its dropout drawn from a generator.

    >>> import gpugrad as gg
    >>> x = gg.ones((2, 4, 5, 8))
    >>> scaled_dot_product_attention(x, x, x, is_causal=True).shape
    (2, 4, 5, 8)
    """
    check_probability(dropout_p)
    seed, offset = draws_from(generator).stream() if dropout_p else (0, 0)
    return ops.scaled_dot_product_attention(  # type: ignore[no-any-return]
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        seed=seed, offset=offset,
    )  # fmt: skip


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


def dropout(
    input: Tensor, p: float = 0.5, training: bool = True, *, generator: Generator | None = None
) -> Tensor:
    """The input with each element set to zero with probability `p`, and the rest times 1/(1−p).

    What is dropped is a function of the generator's seed and of how many arrays it has drawn, the
    same on every device. It is decided where the input is, and decided again in the backward pass:
    no mask is stored or moved.

    >>> import gpugrad as gg
    >>> dropout(gg.tensor([1.0, 2.0]), training=False)
    tensor([1., 2.])
    """
    check_probability(p)
    if not training or p == 0:
        return input
    return ops.dropout(input, p, *draws_from(generator).stream())  # type: ignore[no-any-return]
