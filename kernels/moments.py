"""What normalisation computes of one element, for every target.

A mean is kept as a sum of two numbers, itself and what rounding left of it: a small deviation
beside a large mean would be lost otherwise. Differences are taken here, and not in loops, where a
compiler may have leave to reorder.
"""

from __future__ import annotations

from typing import Any

from gpugrad.kernels import template

__all__ = ["difference", "from_mean", "gradient", "rounded_off", "scaled"]

#: Bodies call what it makes, whose type says nothing of that.
device: Any = template.device


@device
def difference(x: Any, y: Any) -> Any:
    """How far `x` is from `y`."""
    return x - y


@device
def from_mean(x: Any, mean: Any, rest: Any) -> Any:
    """How far `x` is from a mean."""
    return (x - mean) - rest


@device
def rounded_off(first: Any, offset: Any, mean: Any) -> Any:
    """What rounding left of `first + offset`, which became `mean`."""
    return (first - mean) + offset


@device
def scaled(distance: Any, rstd: Any, weight: Any, bias: Any) -> Any:
    """The result, from the distance from the mean and 1/sqrt(var + eps)."""
    return distance * rstd * weight + bias


@device
def gradient(g: Any, weight: Any, y: Any, level: Any, slope: Any, rstd: Any) -> Any:
    """The gradient of an element that was normalised to `y`.

    `level` and `slope` are the means of `g * weight` and `g * weight * y` over all that share the
    mean.
    """
    return rstd * (g * weight - level - y * slope)
