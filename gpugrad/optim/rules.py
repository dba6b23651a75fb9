"""What optimisers call things, and what the update rules do: states, flags and numbers.

The rules themselves are in :mod:`gpugrad.ops.updates`. Hyperparameters and the names of states are
PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from operator import itemgetter
from typing import Any

from gpugrad.ops import updates

__all__ = ["OTHERS", "RULES", "Told", "UpdateRule"]

Group = Mapping[str, Any]


@dataclass(frozen=True)
class UpdateRule:
    """One optimiser's way to a row of :data:`gpugrad.ops.updates.RULES`.

    Attributes
    ----------
    rule:
        The row.
    states:
        Name of a state in the row → its name here.
    flags, numbers:
        The row's flags, and its numbers, given the hyperparameters of a group.
    initial:
        What state arrays are filled with in the beginning.
    """

    rule: str
    states: Mapping[str, str]
    flags: Callable[[Group], dict[str, bool]]
    numbers: Callable[[Group], dict[str, float]]
    initial: Callable[[Group], float] = lambda group: 0.0

    def state(self, group: Group) -> tuple[str, ...]:
        """Names of the arrays that are kept for a parameter of this group."""
        return _names(self.rule, tuple(self.states.items()), tuple(self.flags(group).items()))


#: Entries of a parameter group that are no hyperparameters.
OTHERS = frozenset(("params", "param_names", "name", "clip", "initial_lr"))

#: Types of hyperparameters that do not change by themselves.
_PLAIN = frozenset((bool, int, float, str, type(None)))


class Told:
    """What a rule is told of a parameter group: found out again when a hyperparameter has changed.

    Attributes
    ----------
    names, flags, numbers:
        What the rule's `state`, `flags` and `numbers` give.
    """

    names: tuple[str, ...]
    flags: dict[str, bool]
    numbers: dict[str, float]

    def __init__(self, rule: UpdateRule, group: Group) -> None:
        self._rule = rule
        self._pick = itemgetter(*(name for name in group if name not in OTHERS))
        self._values: Any = None
        self.read(group)

    def read(self, group: Group) -> Told:
        """Itself, for the group as it is now."""
        values = self._pick(group)
        if self._values is None or values != self._values:
            rule = self._rule
            self.names, self.flags, self.numbers = (
                rule.state(group), rule.flags(group), rule.numbers(group),
            )  # fmt: skip
            self._values = values if _is_plain(values) else None
        return self


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if type(value) is tuple else type(value) in _PLAIN


@cache
def _names(
    rule: str, states: tuple[tuple[str, str], ...], flags: tuple[tuple[str, bool], ...]
) -> tuple[str, ...]:
    names = dict(states)
    return tuple(names[name] for name in updates.RULES[rule].kept(dict(flags)))


def _decays(group: Group) -> bool:
    return bool(group["weight_decay"])


def _sgd_flags(group: Group) -> dict[str, bool]:
    return {
        "moves": bool(group["momentum"]),
        "nesterov": bool(group["nesterov"]),
        "decays": _decays(group),
    }


def _sgd(group: Group) -> dict[str, float]:
    return {
        "lr": float(group["lr"]),
        "momentum": float(group["momentum"]),
        "dampening": float(group["dampening"]),
        "decay": float(group["weight_decay"]),
    }


def _betas(group: Group) -> dict[str, float]:
    """The share of the past in two means, and of the present: exact where one is nearly 1."""
    beta1, beta2 = map(float, group["betas"])
    return {"beta1": beta1, "gain1": 1 - beta1, "beta2": beta2, "gain2": 1 - beta2}


def _adam(group: Group, decoupled: bool) -> dict[str, float]:
    lr, decay, betas = float(group["lr"]), float(group["weight_decay"]), _betas(group)
    return {
        **betas,
        "lr": lr,
        "eps": float(group["eps"]),
        "decay": lr * decay if decoupled else decay,
        "log_beta1": _log(betas["beta1"]),
        "log_beta2": _log(betas["beta2"]),
    }


def _log(x: float) -> float:
    return math.log(x) if x else -math.inf


def _rmsprop_flags(group: Group) -> dict[str, bool]:
    return {
        "centered": bool(group["centered"]),
        "moves": bool(group["momentum"]),
        "decays": _decays(group),
    }


def _rmsprop(group: Group) -> dict[str, float]:
    alpha = float(group["alpha"])
    return {
        "lr": float(group["lr"]),
        "alpha": alpha,
        "gain": 1 - alpha,
        "eps": float(group["eps"]),
        "momentum": float(group["momentum"]),
        "decay": float(group["weight_decay"]),
    }


def _adagrad(group: Group) -> dict[str, float]:
    return {
        "lr": float(group["lr"]),
        "lr_decay": float(group["lr_decay"]),
        "eps": float(group["eps"]),
        "decay": float(group["weight_decay"]),
    }


def _lion(group: Group) -> dict[str, float]:
    lr = float(group["lr"])
    return {**_betas(group), "lr": lr, "decay": lr * float(group["weight_decay"])}


_MOMENTS = {"mean": "exp_avg", "square": "exp_avg_sq"}

#: By the name that an optimiser's class gives.
RULES = {
    "sgd": UpdateRule("sgd", {"velocity": "momentum_buffer"}, _sgd_flags, _sgd),
    "adam": UpdateRule(
        "adam", _MOMENTS, lambda group: {"decays": _decays(group), "decoupled": False},
        partial(_adam, decoupled=False),
    ),
    "adamw": UpdateRule(
        "adam", _MOMENTS, lambda group: {"decays": _decays(group), "decoupled": True},
        partial(_adam, decoupled=True),
    ),
    "rmsprop": UpdateRule(
        "rmsprop",
        {"square": "square_avg", "mean": "grad_avg", "velocity": "momentum_buffer"},
        _rmsprop_flags, _rmsprop,
    ),
    "adagrad": UpdateRule(
        "adagrad", {"total": "sum"}, lambda group: {"decays": _decays(group)}, _adagrad,
        lambda group: float(group["initial_accumulator_value"]),
    ),
    "lion": UpdateRule(
        "lion", {"mean": "exp_avg"}, lambda group: {"decays": _decays(group)}, _lion
    ),
}  # fmt: skip
