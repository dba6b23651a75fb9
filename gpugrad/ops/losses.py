"""Losses for classes, and what all losses have in common."""

# A declared operation is known to return Any; what it returns is a tensor.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.core.actions import check
from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import composite, differentiable, primitive, sample
from gpugrad.core.tensor import Tensor, raw_index
from gpugrad.errors import DTypeError, OutOfRangeError, ParameterError, ShapeError
from gpugrad.ops.manipulation import expand_dims, squeeze
from gpugrad.ops.reductions import counting_dtype, mean, sum
from gpugrad.ops.samples import normal, uniform

__all__ = ["cross_entropy", "nll_loss"]


def check_reduction(name: str, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ParameterError(f"{name}: reduction is 'mean', 'sum' or 'none', not {reduction!r}")


def reduced(name: str, loss: Tensor, reduction: str) -> Tensor:
    """``loss``, one number per element, as its mean, its sum, or as it is."""
    check_reduction(name, reduction)
    if reduction == "none":
        return loss
    return (mean if reduction == "mean" else sum)(loss)


def together(input: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Both as tensors; a target of plain numbers goes where the input is."""
    input = asarray(input)
    return input, asarray(target, device=None if hasattr(target, "shape") else input.device)


# -- classes --------------------------------------------------------------------------------------


def _check_classes(name: str, input: Array, target: Array, weight: Array | None) -> None:
    shape = (*input.shape[:1], *input.shape[2:])
    if tuple(target.shape) != shape:
        raise ShapeError(
            f"{name}: input of shape {tuple(input.shape)}, (batch, classes, ...), takes one class "
            f"index per element, a target of shape {shape}; got {tuple(target.shape)}"
        )
    if weight is not None and tuple(weight.shape) != tuple(input.shape[1:2]):
        raise ShapeError(
            f"{name}: weight of shape {tuple(weight.shape)} for {input.shape[1]} classes; it needs "
            f"one element per class, ({input.shape[1]},)"
        )


@check
def _check_range(name: str, target: Array, ignore_index: int, classes: int) -> None:
    """Name the first target that is no class."""
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bad.any():
        place = tuple(int(i[0]) for i in np.nonzero(bad)) if target.ndim else ()
        raise OutOfRangeError(
            f"{name}: target {target[place]} at {list(place)} is no class; they are 0 to "
            f"{classes - 1}, and {ignore_index} is ignored"
        )


def _picked(m: Any, z: Array, index: Array) -> Array:
    """The element of ``z`` along its class axis that ``index`` names."""
    chosen = m.take_along_axis(z, m.expand_dims(index, axis=1), axis=1)
    return m.squeeze(chosen, axis=1)


def _counted(
    m: Any, input: Array, target: Array, weight: Array | None, ignore_index: int
) -> tuple[Array, Array, Array]:
    """Which targets count (1 or 0), a class index for each of them, and what each weighs.

    The first and the last are added up, for which two-byte floats are too short.
    """
    valid = target != ignore_index
    index = m.where(valid, target, 0)
    counts = m.astype(valid, counting_dtype(m, input))
    weights = counts if weight is None else counts * m.getitem(weight, raw_index(index))
    return counts, index, weights


@fusible
def class_cross_entropy_backward(
    m: Any,
    input: Array,
    g: Array,
    target: Array,
    weight: Array | None,
    largest: Array,
    total: Array,
    counted: Array,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Array:
    """With t the target distribution times the class weights: softmax times sum(t), less t.

    ``largest`` and ``total`` save a kernel a pass over the logits. They count as constants when
    this is recorded, so the text itself starts from the logits.
    """
    counts, index, weights = _counted(m, input, target, weight, ignore_index)
    if reduction == "mean":
        g = g / counted
    row = (1.0 - label_smoothing) * g * weights
    at = m.expand_dims(index, axis=1)
    t = m.scatter_add_along_axis(m.expand_dims(row, axis=1), at, tuple(input.shape), 1)
    if label_smoothing:
        classes = input.shape[1]
        spread = g * counts * (label_smoothing / classes)
        if weight is None:
            row = row + spread * classes
            t = t + m.expand_dims(spread, axis=1)
        else:
            row = row + spread * m.sum(weight)
            t = t + m.expand_dims(spread, axis=1) * _per_class(m, weight, input.ndim)
    kept = m.where(m.expand_dims(counts != 0, axis=1), input, 0.0)  # padding may hold NaN
    return m.softmax(kept, axis=1) * m.expand_dims(row, axis=1) - t


def _per_class(m: Any, weight: Array, ndim: int) -> Array:
    """``weight`` along axis 1 of an array of ``ndim`` axes."""
    return m.reshape(weight, (-1, *(1,) * (ndim - 2)))


def _class_samples() -> list[Any]:
    x, t = normal((4, 3)), np.array([0, 2, 1, 2])
    deep, classes = normal((2, 3, 2, 2), 1), np.array([[[0, 1], [2, 2]], [[1, 1], [0, -100]]])
    weight = np.array([0.5, 1.0, 2.0])
    return [
        sample(x, t),
        sample(x, t, weight, reduction="sum"),
        sample(x, np.array([0, -100, 1, 2]), note="one target ignored"),
        sample(deep, classes, weight, note="a class for each of several places"),
        sample(deep, classes, weight, reduction="none", label_smoothing=0.2),
        sample(x, t, label_smoothing=0.1),
        sample(x + 800.0, t, ignore_index=2, smooth=False, note="no overflow"),
    ]


def _numpy_cross_entropy(
    input: Any, target: Any, weight: Any = None, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    rows = np.moveaxis(np.asarray(input), 1, -1)
    rows = rows - rows.max(-1, keepdims=True)
    logp = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    classes = rows.shape[-1]
    w = np.ones(classes) if weight is None else np.asarray(weight)
    valid = np.asarray(target) != ignore_index
    q = np.eye(classes)[np.where(valid, target, 0)]
    share = (q * w).sum(-1) * valid
    q = (1 - label_smoothing) * q + label_smoothing / classes
    loss = -(q * w * logp).sum(-1) * valid
    if reduction == "none":
        return loss
    return loss.sum() / (share.sum() if reduction == "mean" else 1.0)


@primitive(
    vjps=(class_cross_entropy_backward, None, None),
    aux=("largest", "total", "counted"),
    samples=_class_samples,
    reference=_numpy_cross_entropy,
)
def class_cross_entropy(
    m: Backend,
    input: Array,
    target: Array,
    weight: Array | None = None,
    /,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Cross-entropy with class indices: what :func:`cross_entropy` records for them.

    Its node keeps the logits and the targets, and of the size of the targets the largest logit and
    the sum of the exponentials, relative to it; nothing of the size of the logits besides. Targets
    are taken to be classes: :func:`cross_entropy` has looked.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.losses import class_cross_entropy
    >>> class_cross_entropy(gg.asarray([[0.0, 0.0]]), gg.asarray([1]))
    tensor(0.69314718)
    """
    _check_classes("cross_entropy", input, target, weight)
    classes = input.shape[1]
    dtype = input.dtype
    if m.numpy_dtype(input).itemsize == 2:
        input = m.astype(input, m.dtype("float32"))
    counts, index, weights = _counted(m, input, target, weight, ignore_index)
    counted = m.sum(weights)
    largest = m.max(input, axis=1)
    z = input - m.expand_dims(largest, axis=1)
    total = m.sum(m.exp(z), axis=1)
    log_total = m.log(total)
    valid = counts != 0
    loss = m.where(valid, log_total - _picked(m, z, index), 0.0) * weights
    if label_smoothing:
        if weight is None:
            even = log_total * classes - m.sum(z, axis=1)
        else:
            even = log_total * m.sum(weight) - m.sum(z * _per_class(m, weight, z.ndim), axis=1)
        even = m.where(valid, even, 0.0)
        loss = (1.0 - label_smoothing) * loss + (label_smoothing / classes) * even
    if reduction != "none":
        loss = m.sum(loss)
        if reduction == "mean":
            loss = loss / counted
    # What is ignored counts as a row of zeros, here and in kernels, which do not look at it.
    kept = m.where(valid, largest, 0.0), m.where(valid, total, float(classes)), counted
    return (loss if loss.dtype == dtype else m.astype(loss, dtype), *kept)


def _probabilities_samples() -> list[Any]:
    p = uniform((4, 3), seed=1)
    return [
        sample(normal((4, 3)), np.array([0, 2, 1, 2])),
        sample(normal(3), np.array(1), note="a single element, without a batch"),
        sample(normal((4, 3)), p / p.sum(1, keepdims=True), note="a distribution over classes"),
        sample(normal((4, 3)), p, np.array([0.5, 1.0, 2.0]), label_smoothing=0.1, reduction="none"),
    ]


def _numpy_either(input: Any, target: Any, weight: Any = None, **kw: Any) -> Any:
    input, target = np.asarray(input), np.asarray(target)
    if target.dtype.kind in "iu":
        if input.ndim == 1:
            return _numpy_cross_entropy(input[None], target[None], weight, **kw)
        return _numpy_cross_entropy(input, target, weight, **kw)
    epsilon, classes = kw.get("label_smoothing", 0.0), input.shape[1]
    q = (1 - epsilon) * target + epsilon / classes
    logp = input - np.log(np.exp(input).sum(1, keepdims=True))
    loss = -(q * logp * (1.0 if weight is None else weight)).sum(1)
    return loss if kw.get("reduction") == "none" else loss.mean()


@composite(samples=_probabilities_samples, reference=_numpy_either)
def cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross-entropy of logits with classes or with distributions over classes.

    Parameters
    ----------
    input:
        Logits, shape (batch, classes, ...), or (classes,) for a single element.
    target:
        Integers: the index of the right class, shape (batch, ...). Floating-point numbers: a
        probability for every class, the shape of ``input``.
    weight:
        Shape (classes,): how much each class counts. Default: all the same.
    ignore_index:
        Class index that adds nothing, neither to the loss nor to its gradient.
    reduction:
        ``"mean"`` divides by the weight of all targets that count (for distributions: by their
        number), ``"sum"``, ``"none"``.
    label_smoothing:
        The share of the target that is spread evenly over all classes, from 0 to 1 (Szegedy et
        al., arXiv:1512.00567).

    Raises
    ------
    ShapeError, DTypeError
        Shapes or dtypes that do not fit, as the message says.
    OutOfRangeError
        On the CPU: a target that is no class, by its place. On a GPU nobody looks, because the
        host would have to wait.

    >>> import gpugrad as gg
    >>> gg.cross_entropy(gg.asarray([[2.0, 0.0], [0.0, 2.0]]), gg.asarray([0, 1]))
    tensor(0.12692801)
    """
    check_reduction("cross_entropy", reduction)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ParameterError(
            f"cross_entropy: label_smoothing is a share from 0 to 1, not {label_smoothing!r}"
        )
    input, target = together(input, target)
    if not input.ndim:
        raise ShapeError("cross_entropy: input needs an axis of classes, got a 0-d tensor")
    if input.ndim == 1:
        loss = cross_entropy(expand_dims(input, axis=0), expand_dims(target, axis=0), weight,
                             ignore_index, reduction, label_smoothing)  # fmt: skip
        return squeeze(loss, axis=0) if reduction == "none" else loss
    if target.dtype.kind in "iu":
        weight = None if weight is None else together(input, weight)[1]
        _check_classes("cross_entropy", input, target, weight)
        if input.backend.on_host:  # where looking costs no waiting
            _check_range("cross_entropy", target.data, ignore_index, input.shape[1])
        return class_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    if target.dtype.kind == "b":
        raise DTypeError("cross_entropy: target holds class indices or probabilities, not booleans")
    if target.shape != input.shape:
        raise ShapeError(
            f"cross_entropy: input of shape {input.shape} and probabilities of shape "
            f"{target.shape} must agree; class indices must be integers"
        )
    classes = input.shape[1]
    if label_smoothing:
        target = target * (1.0 - label_smoothing) + label_smoothing / classes
    terms = target * differentiable.log_softmax(input, axis=1)
    if weight is not None:
        terms = terms * _per_class(differentiable, weight, input.ndim)
    return reduced("cross_entropy", -sum(terms, axis=1), reduction)


def _numpy_nll(input: Any, target: Any, weight: Any = None) -> Any:
    valid = target >= 0
    w = (np.ones(input.shape[1]) if weight is None else weight)[target * valid] * valid
    return -(w * input[np.arange(len(target)), target * valid]).sum() / w.sum()


@composite(
    samples=lambda: [
        sample(np.log(uniform((4, 3))), np.array([0, 2, 1, 2])),
        sample(np.log(uniform((4, 3))), np.array([0, -100, 1, 2]), np.array([0.5, 1.0, 2.0])),
    ],
    reference=_numpy_nll,
)
def nll_loss(
    input: Any,
    target: Any,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The negative of the log-probabilities that ``input`` gives to the right classes.

    ``input`` holds log-probabilities, shape (batch, classes, ...) or (classes,); the rest is as in
    :func:`cross_entropy`, which takes logits and, as targets, probabilities too.

    >>> import gpugrad as gg
    >>> gg.nll_loss(gg.asarray([[-0.5, -1.0]]), gg.asarray([1]))
    tensor(1.)
    """
    check_reduction("nll_loss", reduction)
    input, target = together(input, target)
    weight = None if weight is None else asarray(weight)
    if not input.ndim:
        raise ShapeError("nll_loss: input needs an axis of classes, got a 0-d tensor")
    if input.ndim == 1:
        loss = nll_loss(expand_dims(input, axis=0), expand_dims(target, axis=0), weight,
                        ignore_index, reduction)  # fmt: skip
        return squeeze(loss, axis=0) if reduction == "none" else loss
    if target.dtype.kind not in "iu":
        raise DTypeError(
            f"nll_loss: target holds class indices, integers, not {target.dtype}; probabilities "
            "are for cross_entropy, which takes logits"
        )
    _check_classes("nll_loss", input, target, weight)
    if input.backend.on_host:
        _check_range("nll_loss", target.data, ignore_index, input.shape[1])
    counts, index, weights = _counted(differentiable, input, target, weight, ignore_index)
    loss = differentiable.where(counts != 0, -_picked(differentiable, input, index), 0.0) * weights
    if reduction == "none":
        return loss
    return sum(loss) / sum(weights) if reduction == "mean" else sum(loss)
