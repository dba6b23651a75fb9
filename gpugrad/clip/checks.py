"""What norms and clipping refuse before they look at an array."""

from __future__ import annotations

import math
from typing import Any

from gpugrad.errors import ParameterError

__all__ = ["check_bound", "check_norm_type", "number"]

#: Below this order the norm of a long vector overflows: n equal elements have the norm n^(1/p)·|x|.
LOWEST = 0.5


def number(value: Any, name: str) -> float:
    """`value` as a float; ParameterError when it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ParameterError(f"{name} is a number, not {type(value).__name__}") from None


def check_bound(value: Any, name: str = "max_norm") -> float:
    """`value` as a float; ParameterError when it is negative or NaN.

    >>> check_bound(1)
    1.0
    """
    bound = number(value, name)
    if not bound >= 0:
        raise ParameterError(f"{name} is {bound}; it must be zero or more")
    return bound


def check_norm_type(value: Any) -> float:
    """`value` as a float; ParameterError unless it is 0.5 or more, or infinite.

    >>> check_norm_type("inf")
    inf
    """
    p = number(value, "norm_type")
    if not p > 0:
        raise ParameterError(
            f"norm_type is {p}; it must be {LOWEST} or more, or inf for the greatest magnitude"
        )
    if p < LOWEST:
        power = f"{1 / p:g}" if math.isfinite(1 / p) else "1/norm_type"
        raise ParameterError(
            f"norm_type is {p}; below {LOWEST} norms of ordinary gradients overflow (n equal "
            f"elements have n^{power} times the magnitude of one), so clipping by them would only "
            f"ever give zeros; use {LOWEST} or more"
        )
    return p
