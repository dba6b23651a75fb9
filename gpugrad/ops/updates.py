"""Update rules of optimisers and of averages, each written once, for arrays and compiled loops.

A rule is a formula as in :mod:`gpugrad.ops.formulas`: ``update(m, p, g, …)`` takes one parameter,
its gradient, what it keeps between steps, and numbers, and returns the new parameter followed by
the new state. It works element by element, so that it may be run on any part of the arrays at a
time. Keyword-only arguments are flags: they are known when a loop is compiled, and choose between
variants of the text.

What is the same for every element is computed once in a step, by the rule's second formula, from
``step``, which counts from 1 and may be an array on the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["RULES", "Rule"]


def _decayed(p: Any, g: Any, decay: Any, decays: bool) -> Any:
    """The gradient of the loss with ``decay/2·p²`` added to it."""
    return g + decay * p if decays else g


# -- gradient descent ------------------------------------------------------------------------------


def sgd(
    m: Any, p: Any, g: Any, velocity: Any, gain: Any, lr: Any, momentum: Any, decay: Any, *,
    moves: bool, nesterov: bool, decays: bool,
) -> Any:  # fmt: skip
    """With momentum as Sutskever et al. (2013) write it."""
    g = _decayed(p, g, decay, decays)
    if not moves:
        return (p - lr * g,)
    velocity = momentum * velocity + gain * g
    change = g + momentum * velocity if nesterov else velocity
    return p - lr * change, velocity


def sgd_made(m: Any, step: Any, dampening: Any) -> Any:
    """The first gradient enters the momentum whole."""
    return (m.where(step == 1, step, 1.0 - dampening),)


# -- division by a running size --------------------------------------------------------------------


def adam(
    m: Any, p: Any, g: Any, mean: Any, square: Any, rate: Any, floor: Any,
    beta1: Any, gain1: Any, beta2: Any, gain2: Any, decay: Any, *, decays: bool, decoupled: bool,
) -> Any:  # fmt: skip
    """Kingma and Ba (2015); decoupled, of Loshchilov and Hutter (2019)."""
    if not decoupled:
        g = _decayed(p, g, decay, decays)
    mean = beta1 * mean + gain1 * g
    square = beta2 * square + gain2 * (g * g)
    change = rate * (mean / (m.sqrt(square) + floor))
    if decoupled and decays:
        change = change + decay * p
    return p - change, mean, square


def adam_made(m: Any, step: Any, lr: Any, eps: Any, log_beta1: Any, log_beta2: Any) -> Any:
    """Both moments began at zero; what corrects them is 1 - beta**step, precise for small steps."""
    root = m.sqrt(-m.expm1(step * log_beta2))
    return -lr * root / m.expm1(step * log_beta1), eps * root


def rmsprop(
    m: Any, p: Any, g: Any, square: Any, mean: Any, velocity: Any, lr: Any,
    alpha: Any, gain: Any, eps: Any, momentum: Any, decay: Any, *,
    centered: bool, moves: bool, decays: bool,
) -> Any:  # fmt: skip
    """Tieleman and Hinton (2012); centered, as Graves (2013) writes it."""
    g = _decayed(p, g, decay, decays)
    square = alpha * square + gain * (g * g)
    size = square
    if centered:
        mean = alpha * mean + gain * g
        size = square - mean * mean
        size = m.where(size < 0, 0.0, size)  # by rounding only; NaN stays
    change = g / (m.sqrt(size) + eps)
    if moves:
        velocity = change = momentum * velocity + change
    kept = [square, *([mean] if centered else []), *([velocity] if moves else [])]
    return (p - lr * change, *kept)


def adagrad(
    m: Any, p: Any, g: Any, total: Any, rate: Any, eps: Any, decay: Any, *, decays: bool
) -> Any:
    """Duchi, Hazan and Singer (2011)."""
    g = _decayed(p, g, decay, decays)
    total = total + g * g
    return p - rate * (g / (m.sqrt(total) + eps)), total


def adagrad_made(m: Any, step: Any, lr: Any, lr_decay: Any) -> Any:
    return (lr / (1.0 + (step - 1.0) * lr_decay),)


# -- signs -----------------------------------------------------------------------------------------


def lion(
    m: Any, p: Any, g: Any, mean: Any, lr: Any, beta1: Any, gain1: Any, beta2: Any, gain2: Any,
    decay: Any, *, decays: bool,
) -> Any:  # fmt: skip
    """Chen et al. (2023), arXiv:2302.06675."""
    blend = beta1 * mean + gain1 * g
    sign = m.where(blend > 0, 1.0, m.where(blend < 0, -1.0, blend))  # NaN stays
    change = lr * sign
    if decays:
        change = change + decay * p
    return p - change, beta2 * mean + gain2 * g


# -- averages --------------------------------------------------------------------------------------


def average(m: Any, p: Any, g: Any, keep: Any, share: Any) -> Any:
    """A running average ``p`` takes over a share of ``g``; of what is not kept nothing is left.

    ``keep`` and ``share`` add up to 1. Where both arguments are the same, so is the result.
    """
    return (m.where(keep == 0, g, p + share * (g - p)),)


def ema_made(m: Any, step: Any, gain: Any) -> Any:
    """The first value is the average; each later one enters with ``gain``."""
    share = m.where(step == 1, step, gain)
    return 1.0 - share, share


def mean_made(m: Any, step: Any) -> Any:
    """All values count the same."""
    share = 1.0 / step
    return 1.0 - share, share


# -- the table -------------------------------------------------------------------------------------


class Rule:
    """One row: a formula, and how its arguments are come by.

    Attributes
    ----------
    update:
        ``update(m, p, g, *states, *made, *numbers, **flags)``.
    prepare:
        ``prepare(m, step, …)``, whose results are the arguments ``made``; None where there are
        none.
    states:
        Name of a state → the flag that it is there for, or None for always. One that is not there
        is given as None.
    made, numbers, flags:
        Names of arguments, in order.
    prepares:
        Names of the numbers that ``prepare`` takes after ``step``.
    """

    def __init__(
        self,
        update: Callable[..., Any],
        states: Mapping[str, str | None],
        prepare: Callable[..., Any] | None = None,
        made: tuple[str, ...] = (),
    ) -> None:
        self.update = update
        self.prepare = prepare
        self.states = dict(states)
        self.made = made
        takes = inspect.signature(update).parameters.values()
        self.flags = tuple(p.name for p in takes if p.kind is p.KEYWORD_ONLY)
        known = {"m", "p", "g", *states, *made, *self.flags}
        self.numbers = tuple(p.name for p in takes if p.name not in known)
        self.prepares = (
            tuple(inspect.signature(prepare).parameters)[2:] if prepare is not None else ()
        )

    def kept(self, flags: Mapping[str, bool]) -> tuple[str, ...]:
        """The states that are there under these flags."""
        return tuple(s for s, flag in self.states.items() if flag is None or flags[flag])


#: Every update rule by name.
RULES = {
    "sgd": Rule(sgd, {"velocity": "moves"}, sgd_made, ("gain",)),
    "adam": Rule(adam, {"mean": None, "square": None}, adam_made, ("rate", "floor")),
    "rmsprop": Rule(rmsprop, {"square": None, "mean": "centered", "velocity": "moves"}),
    "adagrad": Rule(adagrad, {"total": None}, adagrad_made, ("rate",)),
    "lion": Rule(lion, {"mean": None}),
    "ema": Rule(average, {}, ema_made, ("keep", "share")),
    "mean": Rule(average, {}, mean_made, ("keep", "share")),
}
