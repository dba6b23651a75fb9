"""Schedules of the learning rate, with PyTorch's names, defaults and trajectories.

A schedule writes the learning rate of every parameter group when it is made, and anew at each call
of `step()`, after the optimiser's. `last_epoch` counts these calls from 0: epochs or steps, as the
training loop calls it. Everything is Python numbers; nothing is read from the device.

There are two kinds. Some say what the rate of an epoch is, given the initial one, which is kept in
the group as `"initial_lr"`. Others say what it is multiplied by from one epoch to the next: these
also work together, in a `ChainedScheduler` or by calling `step()` of several.

>>> import gpugrad as gg
>>> w = gg.tensor([1.0], requires_grad=True)
>>> optimizer = gg.optim.SGD([w], lr=0.5)
>>> schedule = StepLR(optimizer, step_size=2, gamma=0.1)
>>> for epoch in range(4):
...     print(schedule.get_last_lr())
...     schedule.step()
[0.5]
[0.5]
[0.05]
[0.05]
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from gpugrad.core.actions import action
from gpugrad.optim.errors import OptimizerError
from gpugrad.optim.optimizer import Group, Optimizer

__all__ = [
    "ConstantLR",
    "CosineAnnealingLR",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "PolynomialLR",
    "StepLR",
]

Rate = Callable[[int], float]


def _is_real(value: Any) -> bool:
    return isinstance(value, Real)


class LRScheduler:
    """The base of every schedule; subclasses define `get_lr`.

    Parameters
    ----------
    optimizer:
        Whose learning rates to set.
    last_epoch:
        The last epoch that was made, where training goes on with an optimiser whose state was
        loaded. Loading the schedule's own state is simpler.

    Attributes
    ----------
    last_epoch:
        The epoch whose learning rates are set: 0 when the schedule has just been made.
    base_lrs:
        The initial learning rate of each group.
    """

    optimizer: Optimizer
    base_lrs: list[float]
    _last_lr: list[float]

    #: Attributes that are no state: objects that a checkpoint cannot hold.
    _transient: tuple[str, ...] = ("optimizer",)

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        self._attach(optimizer)
        self.last_epoch = last_epoch
        for i, group in enumerate(self._groups()):
            if last_epoch == -1:
                group.setdefault("initial_lr", float(group["lr"]))
            elif "initial_lr" not in group:
                self._refuse(
                    f"group {i} has no 'initial_lr' for last_epoch={last_epoch}; load the "
                    "optimiser's state first, or leave last_epoch out and load the schedule's"
                )
        self.base_lrs = [float(group["initial_lr"]) for group in self._groups()]
        self._begin()

    def _attach(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            self._refuse(f"an optimiser is needed, not {type(optimizer).__name__}")
        self.optimizer = optimizer

    def _groups(self) -> list[Group]:
        return self.optimizer.param_groups

    def _refuse(self, why: str) -> None:
        raise OptimizerError(f"{type(self).__name__}: {why}")

    def _number(self, name: str, value: Any, low: float = 0, high: float = math.inf) -> Any:
        """The value as a Python number; OptimizerError unless it lies between the two, included."""
        if not _is_real(value) or not low <= value <= high or value == math.inf:
            limit = f"from {low} to {high}" if high < math.inf else f"finite and {low} or more"
            self._refuse(f"{name} is {value!r}; it must be a number, {limit}")
        return int(value) if isinstance(value, Integral) else float(value)

    def _length(self, name: str, value: Any) -> Any:
        """The value as a Python number; OptimizerError unless it is above zero."""
        if not _is_real(value) or not 0 < value < math.inf:
            self._refuse(f"{name} is {value!r}; it must be a number above 0")
        return int(value) if isinstance(value, Integral) else float(value)

    def _count(self, name: str, value: Any) -> int:
        """The value as a Python number; OptimizerError unless it is a whole one above zero."""
        if not isinstance(value, Integral) or value < 1:
            self._refuse(f"{name} is {value!r}; it must be a whole number, 1 or more")
        return int(value)

    def _per_group(self, name: str, value: Any) -> list[Any]:
        """A value for each group, given one for each or one for all."""
        if not isinstance(value, list | tuple):
            return [value] * len(self._groups())
        if len(value) != len(self._groups()):
            self._refuse(f"{name} has {len(value)} values for {len(self._groups())} groups")
        return list(value)

    def _numbers(self, name: str, value: Any, high: float = math.inf) -> list[float]:
        """A number for each group, given one for each or one for all."""
        return [self._number(name, number, 0, high) for number in self._per_group(name, value)]

    # -- what subclasses define -------------------------------------------------------------------

    def get_lr(self) -> list[float]:
        """The learning rates of `last_epoch`, given those of the epoch before; for subclasses."""
        raise NotImplementedError(f"{type(self).__name__} does not define get_lr()")

    def _closed_form(self) -> list[float]:
        """The learning rates of `last_epoch`, whatever they are now."""
        return self.get_lr()

    # -- steps ------------------------------------------------------------------------------------

    _initial = False

    def _begin(self) -> None:
        """The first step, which leaves rates alone that go on from what they were."""
        self._step_count = 0
        self._initial = True
        try:
            self.step()
        finally:
            del self._initial

    def _restart(self) -> None:
        """Begin anew, from the initial learning rates."""
        for group, lr in zip(self._groups(), self.base_lrs):
            group["lr"] = lr
        self._rewind()
        self._begin()

    def _rewind(self) -> None:
        """Go back to before the beginning."""
        self.last_epoch = -1

    @action
    def step(self, epoch: int | None = None) -> None:
        """Set the learning rates of the next epoch, or those of a given one."""
        self._check_groups(len(self.base_lrs))
        self._step_count += 1
        if epoch is None:
            self.last_epoch += 1
            self._write(self.get_lr())
        else:
            self.last_epoch = epoch
            self._write(self._closed_form())

    def _write(self, rates: Sequence[float]) -> None:
        rates = [float(rate) for rate in rates]
        for i, rate in enumerate(rates):
            if not 0 <= rate < math.inf:
                self._refuse(
                    f"the learning rate of group {i} in epoch {self.last_epoch} would be {rate}; "
                    "it must be finite and zero or more"
                )
        for group, rate in zip(self._groups(), rates):
            group["lr"] = rate
        self._last_lr = rates

    def _check_groups(self, known: int) -> None:
        """Raise OptimizerError if the optimiser has other groups than when this was made."""
        if known != len(self._groups()):
            self._refuse(
                f"it is for {known} parameter groups, and the optimiser now has "
                f"{len(self._groups())}; make it after the last add_param_group()"
            )

    def get_last_lr(self) -> list[float]:
        """The learning rates that were set last, one for each group."""
        return list(self._last_lr)

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimiser, as numbers, strings and lists of them."""
        return {
            name: list(value) if isinstance(value, list) else value
            for name, value in vars(self).items()
            if name not in self._transient
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; the optimiser's state is to be loaded besides.

        Raises OptimizerError, and changes nothing, for the state of another kind of schedule, or of
        another number of groups.
        """
        self._check_state(state_dict)
        self._load(state_dict)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        mine = self.state_dict()
        if mine.keys() != state.keys():
            missing, unknown = sorted(mine.keys() - state), sorted(state.keys() - mine)
            self._refuse(
                f"the state is of another schedule: missing {missing}, unexpected {unknown}"
            )
        for name in ("base_lrs", "_last_lr"):
            if name in mine and len(state[name]) != len(mine[name]):
                self._refuse(
                    f"the state is for {len(state[name])} parameter groups, here are "
                    f"{len(mine[name])}"
                )

    def _load(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, list(value) if isinstance(value, list | tuple) else value)

    def __repr__(self) -> str:
        hidden = (*self._transient, "base_lrs")
        options = {k: v for k, v in vars(self).items() if k not in hidden and k[0] != "_"}
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in options.items())})"


# -- functions ------------------------------------------------------------------------------------


class _OfFunctions(LRScheduler):
    """A schedule of functions of the epoch, one for each group."""

    _transient = ("optimizer", "lr_lambdas")

    def __init__(
        self, optimizer: Optimizer, lr_lambda: Rate | Sequence[Rate], last_epoch: int = -1
    ) -> None:
        self._attach(optimizer)
        self.lr_lambdas: list[Rate] = self._per_group("lr_lambda", lr_lambda)
        for function in self.lr_lambdas:
            if not callable(function):
                self._refuse(f"lr_lambda is a function of the epoch, not {function!r}")
        super().__init__(optimizer, last_epoch)


class LambdaLR(_OfFunctions):
    """The initial learning rate times a function of the epoch; one function, or one for each group.

    Functions are not part of the state.

    >>> import gpugrad as gg
    >>> optimizer = gg.optim.SGD([gg.tensor([1.0], requires_grad=True)], lr=0.5)
    >>> schedule = LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    >>> schedule.step()
    >>> schedule.get_last_lr()
    [0.25]
    """

    def get_lr(self) -> list[float]:
        return [base * f(self.last_epoch) for base, f in zip(self.base_lrs, self.lr_lambdas)]


class MultiplicativeLR(_OfFunctions):
    """The last learning rate times a function of the epoch, from the second epoch on.

    Functions are not part of the state.

    >>> import gpugrad as gg
    >>> optimizer = gg.optim.SGD([gg.tensor([1.0], requires_grad=True)], lr=0.5)
    >>> schedule = MultiplicativeLR(optimizer, lambda epoch: 0.5)
    >>> schedule.step()
    >>> schedule.get_last_lr()
    [0.25]
    """

    def get_lr(self) -> list[float]:
        rates = [group["lr"] for group in self._groups()]
        if self._initial:
            return rates
        return [rate * f(self.last_epoch) for rate, f in zip(rates, self.lr_lambdas)]

    def _restart(self) -> None:
        """Go on from the learning rates that there are."""
        self.step(0)


# -- products -------------------------------------------------------------------------------------


class _Product(LRScheduler):
    """What is above `eta_min` is the initial rate times a factor that depends on the epoch.

    From one epoch to the next it is multiplied by the ratio of two factors, so that rates that
    others have changed go on from what they are.
    """

    eta_min: float = 0.0

    def _factor(self, epoch: int) -> float:
        """The share of the initial rate in an epoch."""
        raise NotImplementedError

    def _ratio(self, epoch: int) -> float | None:
        """This factor over the one before; None if that was zero."""
        before = self._factor(epoch - 1)
        return self._factor(epoch) / before if before else None

    def get_lr(self) -> list[float]:
        if self._initial and self.last_epoch > 0:
            return [group["lr"] for group in self._groups()]
        ratio = self._ratio(self.last_epoch) if self.last_epoch else self._factor(0)
        if ratio is None:
            return self._closed_form()
        if ratio == 1:
            return [group["lr"] for group in self._groups()]
        low = self.eta_min
        return [low + (group["lr"] - low) * ratio for group in self._groups()]

    def _closed_form(self) -> list[float]:
        low, factor = self.eta_min, self._factor(self.last_epoch)
        return [low + (base - low) * factor for base in self.base_lrs]


class _Power(_Product):
    """The factor is a power of `gamma`."""

    gamma: float

    def _exponent(self, epoch: int) -> int:
        raise NotImplementedError

    def _factor(self, epoch: int) -> float:
        return float(self.gamma ** self._exponent(epoch))

    def _ratio(self, epoch: int) -> float:
        # Exact, and there however small the factors have become.
        return float(self.gamma ** (self._exponent(epoch) - self._exponent(epoch - 1)))


class StepLR(_Power):
    """The learning rate times `gamma` every `step_size` epochs.

    >>> import gpugrad as gg
    >>> optimizer = gg.optim.SGD([gg.tensor([1.0], requires_grad=True)], lr=0.5)
    >>> schedule = StepLR(optimizer, step_size=1, gamma=0.5)
    >>> schedule.step()
    >>> schedule.get_last_lr()
    [0.25]
    """

    def __init__(
        self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1
    ) -> None:
        self.step_size = self._count("step_size", step_size)
        self.gamma = self._number("gamma", gamma)
        super().__init__(optimizer, last_epoch)

    def _exponent(self, epoch: int) -> int:
        return epoch // self.step_size


class MultiStepLR(_Power):
    """The learning rate times `gamma` at each of some epochs.

    >>> import gpugrad as gg
    >>> optimizer = gg.optim.SGD([gg.tensor([1.0], requires_grad=True)], lr=0.5)
    >>> schedule = MultiStepLR(optimizer, milestones=[1, 20], gamma=0.5)
    >>> schedule.step()
    >>> schedule.get_last_lr()
    [0.25]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Iterable[int],
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        self.milestones = sorted(self._number("milestone", epoch) for epoch in milestones)
        self.gamma = self._number("gamma", gamma)
        super().__init__(optimizer, last_epoch)

    def _exponent(self, epoch: int) -> int:
        return bisect_right(self.milestones, epoch)


class ExponentialLR(_Power):
    """The learning rate times `gamma` in every epoch.

    >>> import gpugrad as gg
    >>> optimizer = gg.optim.SGD([gg.tensor([1.0], requires_grad=True)], lr=0.5)
    >>> schedule = ExponentialLR(optimizer, gamma=0.5)
    >>> schedule.step()
    >>> schedule.get_last_lr()
    [0.25]
    """

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = self._number("gamma", gamma)
        super().__init__(optimizer, last_epoch)

    def _exponent(self, epoch: int) -> int:
        return epoch


class ConstantLR(_Product):
    """The learning rate times `factor` until epoch `total_iters`, then the whole.

    >>> import gpugrad as gg
    >>> optimizer = gg.optim.SGD([gg.tensor([1.0], requires_grad=True)], lr=0.5)
    >>> ConstantLR(optimizer, factor=0.5, total_iters=10).get_last_lr()
    [0.25]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        factor: float = 1.0 / 3,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        self.factor = self._number("factor", factor, 0, 1)
        self.total_iters = self._length("total_iters", total_iters)
        super().__init__(optimizer, last_epoch)

    def _factor(self, epoch: int) -> float:
        return self.factor if epoch < self.total_iters else 1.0


class LinearLR(_Product):
    """The learning rate times a factor that goes evenly from one to another: a warm-up.

    Parameters
    ----------
    start_factor:
        In epoch 0; above 0, at most 1.
    end_factor:
        From epoch `total_iters` on; from 0 to 1.

    >>> import gpugrad as gg
    >>> optimizer = gg.optim.SGD([gg.tensor([1.0], requires_grad=True)], lr=0.5)
    >>> schedule = LinearLR(optimizer, start_factor=0.5, total_iters=2)
    >>> schedule.step()
    >>> schedule.get_last_lr()
    [0.375]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        self.start_factor = self._number("start_factor", start_factor, 0, 1)
        if not start_factor:
            self._refuse("start_factor is 0, where training would not begin; it must be above")
        self.end_factor = self._number("end_factor", end_factor, 0, 1)
        self.total_iters = self._length("total_iters", total_iters)
        super().__init__(optimizer, last_epoch)

    def _factor(self, epoch: int) -> float:
        way = min(epoch, self.total_iters) / self.total_iters
        return float(self.start_factor + (self.end_factor - self.start_factor) * way)


class PolynomialLR(_Product):
    """The learning rate falls to zero in `total_iters` epochs, as a power of what is left of them.

    >>> import gpugrad as gg
    >>> optimizer = gg.optim.SGD([gg.tensor([1.0], requires_grad=True)], lr=0.5)
    >>> schedule = PolynomialLR(optimizer, total_iters=4)
    >>> schedule.step()
    >>> schedule.get_last_lr()
    [0.375]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_iters: int = 5,
        power: float = 1.0,
        last_epoch: int = -1,
    ) -> None:
        self.total_iters = self._length("total_iters", total_iters)
        self.power = self._number("power", power)
        super().__init__(optimizer, last_epoch)

    def _factor(self, epoch: int) -> float:
        return float((1 - min(epoch, self.total_iters) / self.total_iters) ** self.power)


class CosineAnnealingLR(_Product):
    """Half a cosine wave from the learning rate to `eta_min` in `T_max` epochs, and back.

    Loshchilov and Hutter (2017), arXiv:1608.03983, without the restarts.

    >>> import gpugrad as gg
    >>> optimizer = gg.optim.SGD([gg.tensor([1.0], requires_grad=True)], lr=0.5)
    >>> schedule = CosineAnnealingLR(optimizer, T_max=2, eta_min=0.25)
    >>> schedule.step()
    >>> schedule.get_last_lr()
    [0.375]
    """

    def __init__(
        self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1
    ) -> None:
        self.T_max = self._length("T_max", T_max)
        self.eta_min = self._number("eta_min", eta_min)
        super().__init__(optimizer, last_epoch)

    def _factor(self, epoch: int) -> float:
        return (1 + math.cos(math.pi * epoch / self.T_max)) / 2
