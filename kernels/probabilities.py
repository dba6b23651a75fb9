"""What softmax and its kin compute of one element and of one row, for every target.

A *row* is what shares add up to 1 over. Two numbers say all of it: its greatest element, and the
sum of the exponentials of its elements less the greatest.

The target of a cross-entropy is a distribution over the classes times the classes' weights: a
*point* at its own class, and *even* at every class. A share `certain` of it is at the point, and
`spread` times a class's weight at each class.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from gpugrad.kernels import template
from gpugrad.kernels.template import exp, log

__all__ = [
    "distribution",
    "log_share",
    "log_softmax_partial",
    "log_softmax_term",
    "loss",
    "mismatch",
    "share",
    "shifted",
    "smoothing",
    "softmax_partial",
    "softmax_term",
]

#: Bodies call what it makes, whose type says nothing of that.
device: Any = template.device

# -- elements -------------------------------------------------------------------------------------
# Sums are written here, in the order that their rounding asks for, and not in loops, where a
# compiler may have leave to reorder: `largest + log_total`, say, is rounded to the digits of the
# greater.


@device
def share(x, largest, scale):
    """The exponential of an element less the greatest, scaled."""
    return exp(x - largest) * scale


@device
def log_share(x, largest, log_total):
    """The logarithm of an element's share."""
    return (x - largest) - log_total


@device
def softmax_term(g, y):
    """What an element adds to the total that :func:`softmax_partial` is told."""
    return g * y


@device
def softmax_partial(g, y, total):
    """The gradient of an element, from those of the shares and from its own share."""
    return y * (g - total)


@device
def log_softmax_term(g, y):
    """What an element adds to the total that :func:`log_softmax_partial` is told."""
    return g


@device
def log_softmax_partial(g, y, total):
    """The gradient of an element, from those of the logarithms and from its own."""
    return g - exp(y) * total


@device
def shifted(x, largest, w):
    """An element less the greatest, weighted."""
    return (x - largest) * w


# -- rows -----------------------------------------------------------------------------------------


@device
def loss(z, largest, total, shifts, w, certain, spread, all_weights):
    """The loss of a row with the logit `z` at its class; `shifts` is the sum of all `shifted`."""
    log_total = log(total)
    return spread * (log_total * all_weights - shifts) - certain * w * log_share(
        z, largest, log_total
    )


@device
def distribution(g, w, total, certain, spread, all_weights):
    """`g` times a row's target, its point and even part; and what exponentials are scaled by."""
    point = certain * g * w
    even = spread * g
    return point, even, (point + even * all_weights) / total


# -- what kernels are told of targets -------------------------------------------------------------


def smoothing(label_smoothing: float, classes: int) -> tuple[float, float]:
    """`certain` and `spread`.

    >>> smoothing(0.25, 5)
    (0.75, 0.05)
    """
    return 1.0 - label_smoothing, label_smoothing / classes


@cache
def _counts(dtype: Any) -> bool:
    """Whether a dtype, of any library, is one of whole numbers."""
    return str(dtype).strip("u") in ("int8", "int16", "int32", "int64")


def mismatch(input: Any, target: Any, weight: Any, ignore_index: Any) -> str | None:
    """Why logits, targets, and weights of the classes are nothing for a kernel; arrays, all."""
    if not _counts(target.dtype):
        return f"targets of {target.dtype}"
    if not -(2**63) <= ignore_index < 2**63:
        return f"{ignore_index} to be ignored, which is no int64"
    if input.ndim < 2 or tuple(target.shape) != (*input.shape[:1], *input.shape[2:]):
        return f"targets of shape {target.shape} for logits of shape {input.shape}"
    if not input.shape[1]:
        return "no classes"
    if weight is not None and tuple(weight.shape) != tuple(input.shape[1:2]):
        return f"weights of shape {weight.shape} for {input.shape[1]} classes"
    return None
