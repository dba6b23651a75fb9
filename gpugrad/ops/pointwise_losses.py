"""Losses that compare each number with its target: of values, of probabilities, of directions."""

# A declared operation is known to return Any; what it returns is a tensor.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.core.actions import check
from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import composite, differentiable, primitive, sample
from gpugrad.core.tensor import Tensor
from gpugrad.errors import OutOfRangeError, ParameterError, ShapeError
from gpugrad.ops import formulas
from gpugrad.ops.losses import check_reduction, reduced, together
from gpugrad.ops.reductions import counting_dtype, sum
from gpugrad.ops.samples import distinct, normal, positive, uniform

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "gaussian_nll_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "mse_loss",
    "smooth_l1_loss",
]


def pair(name: str, input: Any, target: Any) -> tuple[Tensor, Tensor]:
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


def _mean_by_weight(
    name: str, loss: str, x: Tensor, target: Tensor, weight: Any, reduction: str
) -> Tensor:
    """A formula of each element times ``weight``; its mean is over the weight of all elements."""
    if weight is None:
        return _loss(name, loss, x, target, reduction)
    each = pointwise_loss(x, target, None, loss)
    weight = together(each, weight)[1]
    if weight.shape != x.shape:
        raise ShapeError(
            f"{name}: weight of shape {weight.shape} for an input of shape {x.shape}; it needs "
            "one number for each element"
        )
    whole = reduced(name, each * weight, "sum" if reduction == "mean" else reduction)
    return whole / sum(weight) if reduction == "mean" else whole


@check
def _refuse_elements(name: str, x: Array, low: float, high: float, bad: Any, what: str) -> None:
    """Name the first element that is ``bad``.

    Between ``low`` and ``high`` none is, which the extremes tell without a temporary.
    """
    if not x.size or (x.min() >= low and x.max() <= high):
        return
    found = np.asarray(bad(x))
    if found.any():
        place = tuple(int(i[0]) for i in np.nonzero(found)) if found.ndim else ()
        raise OutOfRangeError(f"{name}: {x[place]} at {list(place)} {what}")


def _negative(variance: Array) -> Any:
    return variance < 0


def _no_probability(p: Array) -> Any:
    return ~((p >= 0) & (p <= 1))


def _reference(loss: Any) -> Any:
    """A NumPy reference from the loss of each element."""

    def whole(input: Any, target: Any, reduction: str = "mean", **kw: Any) -> Any:
        each = loss(np.asarray(input), np.asarray(target), **kw)
        return each if reduction == "none" else getattr(np, reduction)(each)

    return whole


# -- the loss of each element, and what becomes of all --------------------------------------------

#: By its formula, how many numbers beside the operands a loss takes.
FORMULAS = {
    "squared_error": 0,
    "absolute_error": 0,
    "huber": 1,
    "smooth_l1": 1,
    "gaussian_nll": 0,
    "binary_cross_entropy": 0,
    "logit_cross_entropy": 0,
    "divergence": 0,
    "log_divergence": 0,
}

_OPERANDS = ("x", "target", "variance")


def partial_of(loss: str, operand: str) -> Any:
    """The formula of a derivative, and which operands it is told."""
    made = getattr(formulas, f"{loss}_{operand}_partial")
    names = made.__code__.co_varnames[: made.__code__.co_argcount]
    return made, [n for n in _OPERANDS if n in names]


def _in_float32(m: Any, *arrays: Any) -> Any:
    """The arrays, those of two-byte floats in float32; None stays."""
    return [
        x if x is None or counting_dtype(m, x) == x.dtype else m.astype(x, counting_dtype(m, x))
        for x in arrays
    ]


@fusible
def pointwise_loss_backward(
    m: Any, x: Array, target: Array, variance: Array | None, g: Array, loss: str, reduction: str,
    number: float, needs: tuple[bool, ...],
) -> tuple[Array | None, ...]:  # fmt: skip
    """Gradients of those operands that need one."""
    dtypes = [None if v is None else v.dtype for v in (x, target, variance)]
    g, *operands = _in_float32(m, g, x, target, variance)
    if reduction == "mean":
        g = g / (math.prod(x.shape) or 1)
    told = dict(zip(_OPERANDS, operands))
    found: list[Any] = []
    for operand, dtype, need in zip(_OPERANDS, dtypes, (*needs, False)):
        if not need:
            found.append(None)
            continue
        partial, names = partial_of(loss, operand)
        slope = partial(m, g, *(told[n] for n in names), *[number] * FORMULAS[loss])
        slope = m.broadcast_to(slope, x.shape)
        found.append(slope if slope.dtype == dtype else m.astype(slope, dtype))
    return tuple(found[: len(needs)])


def _pointwise_vjp(
    g: Array, m: Any, x: Array, target: Array, variance: Array | None, loss: str, reduction: str,
    number: float, needs: tuple[bool, ...],
) -> Any:  # fmt: skip
    return pointwise_loss_backward(m, x, target, variance, g, loss, reduction, number, needs)


def _pointwise_samples() -> list[Any]:
    x, t, p = distinct((3, 4)), np.zeros((3, 4)), uniform((3, 4), seed=1)
    return [
        *(sample(x, t, None, name, r) for name in ("squared_error", "absolute_error")
          for r in ("none", "mean")),
        *(sample(x, t, None, name, r, 0.7) for name in ("huber", "smooth_l1")
          for r in ("sum", "none")),
        sample(normal((3, 4)), normal((3, 4), 1), positive((3, 4)), "gaussian_nll", "mean"),
        sample(uniform((3, 4)), p, None, "binary_cross_entropy", "mean"),
        sample(np.array([0.0, 1.0, 0.0]), np.array([0.0, 1.0, 1.0]), None, "binary_cross_entropy",
               smooth=False, note="sure"),
        sample(normal((3, 4)), p, None, "logit_cross_entropy", "sum"),
        sample(normal((3, 4)), p, None, "divergence", "mean"),
        sample(normal((3, 4)), normal((3, 4), 1), None, "log_divergence", "sum"),
    ]  # fmt: skip


def _numpy_pointwise(
    x: Any, t: Any, v: Any, loss: str, reduction: str = "none", number: float = 1.0
) -> Any:
    d = abs(x - t)
    bent = np.where(d <= number, 0.5 * d * d, number * (d - 0.5 * number))
    with np.errstate(all="ignore"):
        each = {
            "squared_error": lambda: d**2,
            "absolute_error": lambda: d,
            "huber": lambda: bent,
            "smooth_l1": lambda: bent / number,
            "gaussian_nll": lambda: 0.5 * (np.log(v) + d**2 / v),
            "binary_cross_entropy": lambda: (
                -t * np.maximum(np.log(x), -100.0) - (1 - t) * np.maximum(np.log1p(-x), -100.0)
            ),
            "logit_cross_entropy": lambda: np.logaddexp(0.0, x) - t * x,
            "divergence": lambda: t * (np.log(t) - x),
            "log_divergence": lambda: np.exp(t) * (t - x),
        }[loss]()
    return each if reduction == "none" else getattr(np, reduction)(each)


@primitive(
    vjp=_pointwise_vjp,
    samples=_pointwise_samples,
    reference=_numpy_pointwise,
)
def pointwise_loss(
    m: Backend,
    x: Array,
    target: Array,
    variance: Array | None = None,
    /,
    loss: str = "squared_error",
    reduction: str = "none",
    number: float = 0.0,
) -> Array:
    """A formula of each element and its target, and the mean or the sum of all of them.

    Parameters
    ----------
    x, target:
        Of one shape. Half precision is computed, and added up, in float32.
    variance:
        Of that shape; for ``"gaussian_nll"`` alone.
    loss:
        Which formula of ``gpugrad.ops.formulas``: a key of ``FORMULAS``.
    reduction:
        ``"mean"``, ``"sum"``, ``"none"``.
    number:
        What the formula takes beside the operands, if it does: Huber's delta.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.pointwise_losses import pointwise_loss
    >>> pointwise_loss(gg.asarray([0.5, 3.0]), gg.asarray([0.0, 0.0]), loss="huber", number=1.0)
    tensor([0.125, 2.5  ])
    """
    known = m.numpy_dtype(x)
    half = known.itemsize == 2 and known.kind not in "iu" and x.dtype == target.dtype
    operands = [v for v in _in_float32(m, x, target, variance) if v is not None]
    y = getattr(formulas, loss)(m, *operands, *[number] * FORMULAS[loss])
    if reduction != "none":
        y = m.sum(y)
    if reduction == "mean":
        y = y / math.prod(x.shape)
    return m.astype(y, x.dtype) if half else y


def _loss(
    name: str, loss: str, x: Tensor, target: Tensor, reduction: str, number: float = 0.0,
    weight: Any = None,
) -> Tensor:  # fmt: skip
    """A formula of each element, weighted if there is a weight, and reduced."""
    check_reduction(name, reduction)
    if weight is None:
        return pointwise_loss(x, target, None, loss, reduction, number)
    each = pointwise_loss(x, target, None, loss, "none", number)
    return reduced(name, _weighted(name, each, weight), reduction)


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
    input, target = pair("mse_loss", input, target)
    return _mean_by_weight("mse_loss", "squared_error", input, target, weight, reduction)


@composite(samples=_two_samples, reference=_reference(lambda x, t: abs(x - t)))
def l1_loss(input: Any, target: Any, reduction: str = "mean", weight: Any = None) -> Tensor:
    """The absolute difference, averaged over all elements unless ``reduction`` differs.

    Where the two are equal the derivative is taken as zero. ``weight`` is as in :func:`mse_loss`.

    >>> import gpugrad as gg
    >>> gg.l1_loss(gg.asarray([1.0, 3.0]), gg.asarray([1.0, 1.0]))
    tensor(1.)
    """
    input, target = pair("l1_loss", input, target)
    return _mean_by_weight("l1_loss", "absolute_error", input, target, weight, reduction)


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
    input, target = pair("huber_loss", input, target)
    return _loss("huber_loss", "huber", input, target, reduction, delta, weight)


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
    input, target = pair("smooth_l1_loss", input, target)
    loss = "smooth_l1" if beta else "absolute_error"
    return _loss("smooth_l1_loss", loss, input, target, reduction, beta)


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
    x, t = pair(name, input, target)
    var = differentiable.full_like(x, var) if isinstance(var, int | float) else asarray(var)
    check_reduction(name, reduction)
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
    if var.backend.on_host:  # where looking costs no waiting
        _refuse_elements(
            name, var.data, 0.0, math.inf, _negative, "is no variance: it is negative"
        )  # fmt: skip
    var = var + (differentiable.maximum(var.detach(), eps) - var.detach())
    if var.shape != x.shape:
        var = differentiable.broadcast_to(var, x.shape)
    loss = pointwise_loss(x, t, var, "gaussian_nll", reduction)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi) * (x.size if reduction == "sum" else 1)
    return loss


# -- probabilities --------------------------------------------------------------------------------


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
    p, t = pair(name, input, target)
    if p.backend.on_host:
        _refuse_elements(
            name, p.data, 0.0, 1.0, _no_probability,
            "is no probability, a number from 0 to 1; for logits there is "
            "binary_cross_entropy_with_logits",
        )  # fmt: skip
    return _loss(name, "binary_cross_entropy", p, t, reduction, weight=weight)


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
    x, t = pair(name, input, target)
    if pos_weight is None:
        return _loss(name, "logit_cross_entropy", x, t, reduction, weight=weight)
    log_p = differentiable.logsigmoid(x) * (_weighted(name, t, pos_weight - 1.0) + 1.0)
    return reduced(name, _weighted(name, (1.0 - t) * x - log_p, weight), reduction)


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
    x, t = pair("kl_div", input, target)
    loss = "log_divergence" if log_target else "divergence"
    if reduction == "batchmean":
        return _loss("kl_div", loss, x, t, "sum") / (x.shape[0] if x.ndim else 1)
    return _loss("kl_div", loss, x, t, reduction)
