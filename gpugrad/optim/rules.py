"""Update rules: one row each, a formula over arrays and the state it keeps.

A rule is `update(m, p, g, *state, **hyper)`: `m` is the namespace, `p` a parameter, `g` its
gradient, then the state arrays in the order of the row, then the numbers of the parameter group and
`step`, which counts from 1 since the state was made. It writes with in-place operators, so that it
updates the memory where arrays can change, and returns the arrays for where they cannot. It works
element by element, so that it may be run on any part of the arrays at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpugrad.backend import Array, Backend

__all__ = ["RULES", "UpdateRule"]


@dataclass(frozen=True)
class UpdateRule:
    """One row of the table.

    Attributes
    ----------
    update:
        The formula.
    state:
        Names of the arrays that it keeps for a parameter, zero in the beginning, given the numbers
        of the group.
    """

    update: Callable[..., tuple[Array, ...]]
    state: Callable[[Mapping[str, Any]], tuple[str, ...]]


def sgd(
    m: Backend, p: Array, g: Array, velocity: Array | None = None, /, *, step: int, lr: float,
    momentum: float, dampening: float, weight_decay: float, nesterov: bool,
) -> tuple[Array, ...]:  # fmt: skip
    """Gradient descent, with momentum as Sutskever et al. (2013) write it."""
    if weight_decay:
        g = g + weight_decay * p
    if velocity is None:
        p -= lr * g
        return (p,)
    velocity *= momentum
    velocity += g if step == 1 or not dampening else (1 - dampening) * g
    p -= lr * (g + momentum * velocity if nesterov else velocity)
    return p, velocity


def adam(
    m: Backend, p: Array, g: Array, mean: Array, square: Array, /, *, step: int, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float,
) -> tuple[Array, ...]:  # fmt: skip
    """Adam (Kingma and Ba, 2015); weight decay is part of the gradient."""
    if weight_decay:
        g = g + weight_decay * p
    beta1, beta2 = betas
    mean *= beta1
    mean += (1 - beta1) * g
    square *= beta2
    square += (1 - beta2) * (g * g)
    # Both moments began at zero; what corrects them stands outside, once in place of per element.
    root = math.sqrt(1 - beta2**step)
    p -= (lr * root / (1 - beta1**step)) * (mean / (m.sqrt(square) + eps * root))
    return p, mean, square


def adamw(
    m: Backend, p: Array, g: Array, mean: Array, square: Array, /, *, step: int, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float,
) -> tuple[Array, ...]:  # fmt: skip
    """Adam with weight decay beside the gradient (Loshchilov and Hutter, 2019)."""
    if weight_decay:
        p *= 1 - lr * weight_decay
    return adam(m, p, g, mean, square, step=step, lr=lr, betas=betas, eps=eps, weight_decay=0.0)


def _moments(group: Mapping[str, Any]) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq")


#: Every update rule by name.
RULES = {
    "sgd": UpdateRule(sgd, lambda group: ("momentum_buffer",) if group["momentum"] else ()),
    "adam": UpdateRule(adam, _moments),
    "adamw": UpdateRule(adamw, _moments),
}
