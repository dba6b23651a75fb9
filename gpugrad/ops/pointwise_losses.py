"""Losses that compare each number with its target: of values, of probabilities, of directions."""

# A declared operation is known to return Any; what it returns is a tensor.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import composite, differentiable, primitive, sample
from gpugrad.core.tensor import Tensor
from gpugrad.errors import OutOfRangeError, ParameterError, ShapeError
from gpugrad.ops.losses import reduced, together
from gpugrad.ops.reductions import sum
from gpugrad.ops.samples import distinct, normal, positive, uniform

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cosine_embedding_loss",
    "cosine_similarity",
    "gaussian_nll_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "mse_loss",
    "smooth_l1_loss",
]


def _pair(name: str, input: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Both as tensors of one shape."""
    input, target = together(input, target)
    if input.shape != target.shape:
        raise ShapeError(
            f"{name}: input of shape {input.shape} and target of shape {target.shape} must agree; "
            "reshape one of them (broadcasting here is nearly always a mistake)"
        )
    return input, target


def _weighted(name: str, loss: Tensor, weight: Any) -> Tensor:
    """``loss`` times a weight that broadcasts to its shape."""
    if weight is None:
        return loss
    shape = np.shape(weight) if not hasattr(weight, "shape") else tuple(weight.shape)
    try:
        fits = np.broadcast_shapes(shape, loss.shape) == loss.shape
    except ValueError:
        fits = False
    if not fits:
        raise ShapeError(
            f"{name}: weight of shape {shape} does not broadcast to the input's {loss.shape}; "
            "give a number for each element, or axes of size 1"
        )
    return loss * weight


def _mean_by_weight(name: str, loss: Tensor, weight: Any, reduction: str) -> Tensor:
    """``loss`` times ``weight``; its mean is over the weight of all elements."""
    if weight is None:
        return reduced(name, loss, reduction)
    weight = together(loss, weight)[1]
    if weight.shape != loss.shape:
        raise ShapeError(
            f"{name}: weight of shape {weight.shape} for an input of shape {loss.shape}; it needs "
            "one number for each element"
        )
    loss = reduced(name, loss * weight, "sum" if reduction == "mean" else reduction)
    return loss / sum(weight) if reduction == "mean" else loss


def _refuse_elements(name: str, x: Tensor, bad: Any, what: str) -> None:
    """Name the first element that is ``bad``; where looking costs no waiting."""
    if not x.backend.on_host:
        return
    found = np.asarray(bad(x.data))
    if found.any():
        place = tuple(int(i[0]) for i in np.nonzero(found)) if found.ndim else ()
        raise OutOfRangeError(f"{name}: {x.data[place]} at {list(place)} {what}")


def _reference(loss: Any) -> Any:
    """A NumPy reference from the loss of each element."""

    def whole(input: Any, target: Any, reduction: str = "mean", **kw: Any) -> Any:
        each = loss(np.asarray(input), np.asarray(target), **kw)
        return each if reduction == "none" else getattr(np, reduction)(each)

    return whole


# -- values ---------------------------------------------------------------------------------------


def _two_samples(**options: Any) -> list[Any]:
    x, t = distinct((3, 4)), np.zeros((3, 4))
    return [sample(x, t, reduction=r, **options) for r in ("mean", "sum", "none")]


@composite(samples=_two_samples, reference=_reference(lambda x, t: (x - t) ** 2))
def mse_loss(input: Any, target: Any, reduction: str = "mean", weight: Any = None) -> Tensor:
    """The square of the difference, averaged over all elements unless ``reduction`` differs.

    A ``weight``, a number for each element, multiplies the squares; the mean is then their sum over
    the sum of the weights.

    >>> import gpugrad as gg
    >>> gg.mse_loss(gg.asarray([1.0, 3.0]), gg.asarray([1.0, 1.0]))
    tensor(2.)
    """
    input, target = _pair("mse_loss", input, target)
    return _mean_by_weight("mse_loss", differentiable.square(input - target), weight, reduction)


@composite(samples=_two_samples, reference=_reference(lambda x, t: abs(x - t)))
def l1_loss(input: Any, target: Any, reduction: str = "mean", weight: Any = None) -> Tensor:
    """The absolute difference, averaged over all elements unless ``reduction`` differs.

    Where the two are equal the derivative is taken as zero. ``weight`` is as in :func:`mse_loss`.

    >>> import gpugrad as gg
    >>> gg.l1_loss(gg.asarray([1.0, 3.0]), gg.asarray([1.0, 1.0]))
    tensor(1.)
    """
    input, target = _pair("l1_loss", input, target)
    return _mean_by_weight("l1_loss", abs(input - target), weight, reduction)


def _huber(d: Tensor, delta: float) -> Tensor:
    """Half the square of ``d`` up to ``delta``, continued by its tangents."""
    size = abs(d)
    return differentiable.where(size <= delta, 0.5 * d * d, delta * (size - 0.5 * delta))


def _numpy_huber(x: Any, t: Any, delta: float = 1.0) -> Any:
    d = abs(x - t)
    return np.where(d <= delta, 0.5 * d * d, delta * (d - 0.5 * delta))


@composite(
    samples=lambda: [*_two_samples(), *_two_samples(delta=0.7)],
    reference=_reference(_numpy_huber),
)
def huber_loss(
    input: Any, target: Any, reduction: str = "mean", delta: float = 1.0, weight: Any = None
) -> Tensor:
    """Half the square of differences up to ``delta``, linear beyond (Huber, 1964).

    ``weight``, a number for each element, multiplies the losses; the mean is over their number.

    >>> import gpugrad as gg
    >>> gg.huber_loss(gg.asarray([0.5, 3.0]), gg.asarray([0.0, 0.0]), reduction="none")
    tensor([0.125, 2.5  ])
    """
    if not delta > 0:
        raise ParameterError(f"huber_loss: delta must be positive, got {delta!r}")
    input, target = _pair("huber_loss", input, target)
    loss = _weighted("huber_loss", _huber(input - target, delta), weight)
    return reduced("huber_loss", loss, reduction)


@composite(
    samples=lambda: [*_two_samples(), *_two_samples(beta=0.7), *_two_samples(beta=0.0)],
    reference=_reference(
        lambda x, t, beta=1.0: _numpy_huber(x, t, beta) / beta if beta else abs(x - t)
    ),
)
def smooth_l1_loss(input: Any, target: Any, reduction: str = "mean", beta: float = 1.0) -> Tensor:
    """The absolute difference, with a parabola in place of the kink for differences below ``beta``.

    It is :func:`huber_loss` divided by ``beta``, and :func:`l1_loss` for ``beta=0``.

    >>> import gpugrad as gg
    >>> gg.smooth_l1_loss(gg.asarray([0.5, 3.0]), gg.asarray([0.0, 0.0]), reduction="none")
    tensor([0.125, 2.5  ])
    """
    if not beta >= 0:
        raise ParameterError(f"smooth_l1_loss: beta must not be negative, got {beta!r}")
    input, target = _pair("smooth_l1_loss", input, target)
    d = input - target
    return reduced("smooth_l1_loss", _huber(d, beta) / beta if beta else abs(d), reduction)


def _numpy_gaussian(
    x: Any, t: Any, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Any:
    var = np.maximum(var, eps)
    loss = 0.5 * (np.log(var) + (x - t) ** 2 / var + full * math.log(2 * math.pi))
    return loss if reduction == "none" else getattr(np, reduction)(loss)


@composite(
    samples=lambda: [
        sample(normal((3, 4)), normal((3, 4), 1), positive((3, 4))),
        sample(normal((3, 4)), normal((3, 4), 1), positive((3, 1)), True, reduction="none"),
    ],
    reference=_numpy_gaussian,
)
def gaussian_nll_loss(
    input: Any,
    target: Any,
    var: Any,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """The negative log-density of ``target`` under a normal distribution around ``input``.

    Parameters
    ----------
    input, target:
        Expectations, and what was observed, of one shape.
    var:
        Variances: a number, the shape of ``input``, that shape with one axis of size 1, or that
        shape without its last axis.
    full:
        With the constant ½·ln 2π.
    eps:
        Variances below count as this much; their gradient is that of this much, too.
    reduction:
        ``"mean"``, ``"sum"``, ``"none"``.

    >>> import gpugrad as gg
    >>> gg.gaussian_nll_loss(gg.asarray([1.0]), gg.asarray([3.0]), gg.asarray([2.0]))
    tensor(1.34657359)
    """
    name = "gaussian_nll_loss"
    x, t = _pair(name, input, target)
    var = differentiable.full_like(x, var) if isinstance(var, int | float) else asarray(var)
    if not eps > 0:
        raise ParameterError(f"{name}: eps must be positive, got {eps!r}")
    if var.shape != x.shape:
        if var.shape == x.shape[:-1]:
            var = differentiable.expand_dims(var, axis=-1)
        unlike = [b for a, b in zip(x.shape, var.shape) if a != b]
        if var.ndim != x.ndim or unlike != [1]:
            raise ShapeError(
                f"{name}: var of shape {var.shape} for an input of shape {x.shape}; it needs that "
                "shape, or one axis of size 1"
            )
    _refuse_elements(name, var, lambda v: v < 0, "is no variance: it is negative")
    var = var + (differentiable.maximum(var.detach(), eps) - var.detach())
    loss = 0.5 * (differentiable.log(var) + differentiable.square(x - t) / var)
    return reduced(name, loss + 0.5 * math.log(2 * math.pi) if full else loss, reduction)


# -- probabilities --------------------------------------------------------------------------------

#: Logarithms of probabilities are at least this, so that no loss is infinite.
LEAST_LOG = -100.0

#: Nor is a derivative: the variance p·(1 - p) that divides it is at least 1e-12, which PyTorch has
#: in single precision.
LEAST_VARIANCE = float(np.float32(1e-12))


def _log(m: Any, p: Any) -> Any:
    """The logarithm of ``p``, at least :data:`LEAST_LOG`; NaN stays."""
    tiny = p <= math.exp(LEAST_LOG)
    return m.where(tiny, LEAST_LOG, m.log(m.where(tiny, 1.0, p)))


def _log_of_rest(m: Any, p: Any) -> Any:
    """The logarithm of ``1 - p``, at least :data:`LEAST_LOG`; NaN stays."""
    sure = p >= 1.0
    return m.where(sure, LEAST_LOG, m.log1p(-m.where(sure, 0.0, p)))


@primitive(
    vjps=(
        lambda g, m, p, target: g * (p - target) / m.maximum(p * (1.0 - p), LEAST_VARIANCE),
        lambda g, m, p: g * (_log_of_rest(m, p) - _log(m, p)),
    ),
    samples=lambda: [
        sample(uniform((3, 4)), uniform((3, 4), seed=1)),
        sample(np.array([0.0, 1.0, 0.0]), np.array([0.0, 1.0, 1.0]), smooth=False, note="sure"),
    ],
    reference=lambda p, t: (
        -(t * np.maximum(np.log(p), LEAST_LOG) + (1 - t) * np.maximum(np.log1p(-p), LEAST_LOG))
    ),
)
def binary_entropies(m: Backend, p: Array, target: Array, /) -> Array:
    """What :func:`binary_cross_entropy` gives for each element.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.pointwise_losses import binary_entropies
    >>> binary_entropies(gg.asarray([0.5, 1.0]), gg.asarray([1.0, 0.0]))
    tensor([  0.69314718, 100.        ])
    """
    return (target - 1.0) * _log_of_rest(m, p) - target * _log(m, p)


def _numpy_bce(p: Any, t: Any, weight: Any = None, reduction: str = "mean") -> Any:
    loss = -(t * np.log(p) + (1 - t) * np.log1p(-p)) * (1.0 if weight is None else weight)
    return loss if reduction == "none" else getattr(np, reduction)(loss)


@composite(
    samples=lambda: [
        sample(uniform((3, 4)), uniform((3, 4), seed=1)),
        sample(uniform((3, 4)), uniform((3, 4), seed=1), positive((3, 1)), "none"),
    ],
    reference=_numpy_bce,
)
def binary_cross_entropy(
    input: Any, target: Any, weight: Any = None, reduction: str = "mean"
) -> Tensor:
    """The cross-entropy of independent yes-or-no questions, from probabilities.

    Parameters
    ----------
    input, target:
        Probabilities of a yes, as predicted and as they are, of one shape. Their logarithms count
        as -100 at least.
    weight:
        Broadcasts to that shape: how much each element counts.
    reduction:
        ``"mean"`` over all elements, ``"sum"``, ``"none"``.

    Raises
    ------
    OutOfRangeError
        On the CPU: an input that is no probability, by its place. On a GPU nobody looks, because
        the host would have to wait. :func:`binary_cross_entropy_with_logits` takes any number, and
        is more exact.

    >>> import gpugrad as gg
    >>> gg.binary_cross_entropy(gg.asarray([0.5, 0.0]), gg.asarray([1.0, 0.0]))
    tensor(0.34657359)
    """
    name = "binary_cross_entropy"
    p, t = _pair(name, input, target)
    _refuse_elements(
        name, p, lambda p: ~((p >= 0) & (p <= 1)),
        "is no probability, a number from 0 to 1; for logits there is "
        "binary_cross_entropy_with_logits",
    )  # fmt: skip
    return reduced(name, _weighted(name, binary_entropies(p, t), weight), reduction)


def _numpy_bce_with_logits(
    x: Any, t: Any, weight: Any = None, reduction: str = "mean", pos_weight: Any = None
) -> Any:
    p = 1 / (1 + np.exp(-x))
    yes, each = (1.0 if w is None else w for w in (pos_weight, weight))
    loss = -each * (yes * t * np.log(p) + (1 - t) * np.log(1 - p))
    return loss if reduction == "none" else loss.mean()


@composite(
    samples=lambda: [
        sample(normal((3, 4)), uniform((3, 4), seed=1)),
        sample(normal((3, 4)), uniform((3, 4), seed=1), None, "mean", positive(4)),
        sample(normal((3, 4)), uniform((3, 4), seed=1), positive((3, 1)), "none"),
    ],
    reference=_numpy_bce_with_logits,
)
def binary_cross_entropy_with_logits(
    input: Any,
    target: Any,
    weight: Any = None,
    reduction: str = "mean",
    pos_weight: Any = None,
) -> Tensor:
    """The cross-entropy of independent yes-or-no questions, from logits.

    Parameters
    ----------
    input, target:
        Logits, and the probabilities of a yes, of one shape.
    weight:
        Broadcasts to that shape: how much each element counts.
    reduction:
        ``"mean"`` over all elements, ``"sum"``, ``"none"``.
    pos_weight:
        Broadcasts to that shape: how much a yes counts in comparison with a no.

    >>> import gpugrad as gg
    >>> gg.binary_cross_entropy_with_logits(gg.asarray([0.0, 1000.0]), gg.asarray([1.0, 1.0]))
    tensor(0.34657359)
    """
    name = "binary_cross_entropy_with_logits"
    x, t = _pair(name, input, target)
    log_p = differentiable.logsigmoid(x)
    if pos_weight is not None:
        log_p = log_p * (_weighted(name, t, pos_weight - 1.0) + 1.0)
    loss = _weighted(name, (1.0 - t) * x - log_p, weight)
    return reduced(name, loss, reduction)


def _numpy_kl_div(x: Any, t: Any, reduction: str = "mean", log_target: bool = False) -> Any:
    log_t = t if log_target else np.log(np.where(t == 0, 1.0, t))
    loss = (np.exp(t) if log_target else t) * (log_t - x)
    if reduction == "batchmean":
        return loss.sum() / len(x)
    return loss if reduction == "none" else getattr(np, reduction)(loss)


@composite(
    samples=lambda: [
        sample(normal((3, 4)), uniform((3, 4))),
        sample(normal((3, 4)), normal((3, 4), 1), "batchmean", log_target=True),
        sample(normal(3), np.array([0.0, 0.4, 0.6]), "none", smooth=False, note="no such outcome"),
    ],
    reference=_numpy_kl_div,
)
def kl_div(input: Any, target: Any, reduction: str = "mean", log_target: bool = False) -> Tensor:
    """The Kullback-Leibler divergence of ``target`` from ``input``, term by term.

    Parameters
    ----------
    input:
        Log-probabilities, as from ``log_softmax``.
    target:
        Probabilities, of the same shape; with ``log_target`` their logarithms. A probability of
        zero adds nothing.
    reduction:
        ``"batchmean"``, the sum over the size of the first axis, is the divergence of
        distributions. ``"mean"`` is over all elements, and so depends on the number of outcomes;
        ``"sum"``; ``"none"``.

    >>> import gpugrad as gg
    >>> gg.kl_div(gg.log(gg.asarray([[0.25, 0.75]])), gg.asarray([[0.0, 1.0]]), "batchmean")
    tensor(0.28768207)
    """
    if reduction not in ("mean", "sum", "none", "batchmean"):
        raise ParameterError(
            f"kl_div: reduction is 'batchmean', 'mean', 'sum' or 'none', not {reduction!r}"
        )
    x, t = _pair("kl_div", input, target)
    if log_target:
        loss = differentiable.exp(t) * (t - x)
    else:
        loss = t * (differentiable.log(differentiable.where(t == 0, 1.0, t)) - x)
    if reduction == "batchmean":
        return sum(loss) / x.shape[0] if x.ndim else loss
    return reduced("kl_div", loss, reduction)


# -- directions -----------------------------------------------------------------------------------


def _numpy_cosine(a: Any, b: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    a, b = np.broadcast_arrays(a, b)
    sizes = [np.maximum(np.sqrt((x * x).sum(dim)), eps) for x in (a, b)]
    return (a * b).sum(dim) / (sizes[0] * sizes[1])


@composite(
    samples=lambda: [
        sample(normal((3, 4)), normal((3, 4), 1)),
        sample(normal((3, 4)), normal((1, 4), 1), dim=0, note="broadcast"),
    ],
    reference=_numpy_cosine,
)
def cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """The cosine of the angle between vectors along ``dim``, after broadcasting.

    Vectors shorter than ``eps`` count as that long.

    >>> import gpugrad as gg
    >>> gg.cosine_similarity(gg.asarray([[3.0, 4.0]]), gg.asarray([[1.0, 0.0]]))
    tensor([0.6])
    """
    x1, x2 = together(x1, x2)
    x1, x2 = differentiable.broadcast_arrays(x1, x2)
    least = eps * eps
    squares = (sum(x * x, axis=dim) for x in (x1, x2))
    a, b = (differentiable.sqrt(differentiable.maximum(s, least)) for s in squares)
    return sum(x1 * x2, axis=dim) / (a * b)


def _numpy_cosine_embedding(
    a: Any, b: Any, t: Any, margin: float = 0.0, reduction: str = "mean"
) -> Any:
    cos = _numpy_cosine(a, b, -1)
    loss = np.where(t > 0, 1 - cos, np.maximum(cos - margin, 0.0))
    return loss if reduction == "none" else getattr(np, reduction)(loss)


@composite(
    samples=lambda: [
        sample(normal((4, 3)), normal((4, 3), 1), np.array([1, -1, 1, -1])),
        sample(normal(3), normal(3, 1), np.array(1), 0.1, "none", note="one pair"),
    ],
    reference=_numpy_cosine_embedding,
)
def cosine_embedding_loss(
    input1: Any, input2: Any, target: Any, margin: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """How far vectors that belong together point apart, and others together.

    Parameters
    ----------
    input1, input2:
        Vectors, of shape (batch, features), or (features,).
    target:
        1 where the two belong together: the loss is 1 - cos. -1 where they do not: it is cos less
        ``margin``, zero at least. Shape (batch,), or ().
    margin:
        From -1 to 1; 0 to 0.5 is common.
    reduction:
        ``"mean"``, ``"sum"``, ``"none"``.

    >>> import gpugrad as gg
    >>> a, b = gg.asarray([[3.0, 4.0]]), gg.asarray([[1.0, 0.0]])
    >>> gg.cosine_embedding_loss(a, b, gg.asarray([-1]), margin=0.5)
    tensor(0.1)
    """
    name = "cosine_embedding_loss"
    a, b = _pair(name, input1, input2)
    t = together(a, target)[1]
    if a.ndim not in (1, 2) or t.shape != a.shape[:-1]:
        raise ShapeError(
            f"{name}: inputs of shape {a.shape} and a target of shape {t.shape}; they are (batch, "
            "features) and (batch,), or (features,) and ()"
        )
    tiny = 1e-12
    size = (sum(a * a, axis=-1) + tiny) * (sum(b * b, axis=-1) + tiny)
    cos = sum(a * b, axis=-1) / differentiable.sqrt(size)
    apart = differentiable.relu(cos - margin)
    loss = differentiable.where(t == 1, 1.0 - cos, differentiable.where(t == -1, apart, 0.0))
    return reduced(name, loss, reduction)
