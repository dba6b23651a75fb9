"""Schedules made of others: one after the other, or all at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from gpugrad.core.actions import action
from gpugrad.optim.cycles import ReduceLROnPlateau
from gpugrad.optim.optimizer import Optimizer
from gpugrad.optim.schedulers import CosineAnnealingLR, LinearLR, LRScheduler

__all__ = ["ChainedScheduler", "SequentialLR", "WarmupCosineLR"]


class _Several(LRScheduler):
    """A schedule made of others of one optimiser."""

    _schedulers: list[LRScheduler]
    _transient = ("optimizer", "_schedulers")

    def _take(self, optimizer: Optimizer | None, schedulers: Sequence[LRScheduler]) -> None:
        self._schedulers = list(schedulers)
        if not self._schedulers:
            self._refuse("there are no schedules")
        for i, scheduler in enumerate(self._schedulers):
            if not isinstance(scheduler, LRScheduler):
                self._refuse(f"number {i} is no schedule, but {type(scheduler).__name__}")
            if isinstance(scheduler, ReduceLROnPlateau):
                self._refuse(
                    f"number {i} is ReduceLROnPlateau, whose step() takes a measure; step it apart"
                )
        optimizer = optimizer or self._schedulers[0].optimizer
        self._attach(optimizer)
        for i, scheduler in enumerate(self._schedulers):
            if scheduler.optimizer is not optimizer:
                self._refuse(f"number {i}, {type(scheduler).__name__}, is of another optimiser")

    def _restart(self) -> None:
        for group in self._groups():
            group["lr"] = group["initial_lr"]
        self._rewind()
        self._begin()

    def _rewind(self) -> None:
        for scheduler in self._schedulers:
            scheduler._rewind()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "_schedulers": [s.state_dict() for s in self._schedulers]}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        theirs = state["_schedulers"]
        if len(theirs) != len(self._schedulers):
            self._refuse(f"the state has {len(theirs)} schedules, here are {len(self._schedulers)}")
        for scheduler, one in zip(self._schedulers, theirs):
            scheduler._check_state(one)

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load({name: value for name, value in state.items() if name != "_schedulers"})
        for scheduler, one in zip(self._schedulers, state["_schedulers"]):
            scheduler._load(one)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._schedulers))})"


class SequentialLR(_Several):
    """One schedule after the other, each from its beginning at its milestone.

    Parameters
    ----------
    schedulers:
        Of one optimiser.
    milestones:
        The epochs in which all but the first begin.

    >>> import gpugrad as gg
    >>> from gpugrad.optim import ConstantLR, ExponentialLR
    >>> optimizer = gg.optim.SGD([gg.tensor([1.0], requires_grad=True)], lr=0.5)
    >>> parts = [ConstantLR(optimizer, factor=0.5, total_iters=9), ExponentialLR(optimizer, 0.5)]
    >>> schedule = SequentialLR(optimizer, parts, milestones=[2])
    >>> for epoch in range(4):
    ...     print(schedule.get_last_lr())
    ...     schedule.step()
    [0.25]
    [0.25]
    [0.5]
    [0.25]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Sequence[LRScheduler],
        milestones: Sequence[int],
        last_epoch: int = -1,
    ) -> None:
        self._take(optimizer, schedulers)
        self._milestones = list(milestones)
        if len(self._milestones) != len(self._schedulers) - 1:
            self._refuse(
                f"{len(self._schedulers)} schedules need {len(self._schedulers) - 1} milestones, "
                f"the epochs in which all but the first begin; got {self._milestones}"
            )
        if self._milestones != sorted(self._milestones):
            self._refuse(f"milestones {self._milestones} must rise")
        if last_epoch != -1:
            self._refuse("last_epoch must be -1; to go on, load the state of this schedule")
        self._restart()

    def _begin(self) -> None:
        self.last_epoch = 0
        first = self._schedulers[bisect_right(self._milestones, 0)]
        first._begin()
        self._last_lr = first.get_last_lr()

    @action
    def step(self) -> None:  # type: ignore[override]
        """Set the learning rates of the next epoch."""
        self.last_epoch += 1
        number = bisect_right(self._milestones, self.last_epoch)
        current = self._schedulers[number]
        if number and self._milestones[number - 1] == self.last_epoch:
            current._restart()
        else:
            current.step()
        self._last_lr = current.get_last_lr()


class ChainedScheduler(_Several):
    """Several schedules at once, their factors multiplied.

    For schedules that say what a learning rate is multiplied by from one epoch to the next.

    >>> import gpugrad as gg
    >>> from gpugrad.optim import ConstantLR, ExponentialLR
    >>> optimizer = gg.optim.SGD([gg.tensor([1.0], requires_grad=True)], lr=0.5)
    >>> parts = [ConstantLR(optimizer, factor=0.5, total_iters=9), ExponentialLR(optimizer, 0.5)]
    >>> schedule = ChainedScheduler(parts)
    >>> schedule.step()
    >>> schedule.get_last_lr()
    [0.125]
    """

    def __init__(
        self, schedulers: Sequence[LRScheduler], optimizer: Optimizer | None = None
    ) -> None:
        self._take(optimizer, schedulers)
        self._note()

    def _note(self) -> None:
        self._last_lr = [group["lr"] for group in self._groups()]

    def _begin(self) -> None:
        for scheduler in self._schedulers:
            scheduler._begin()
        self._note()

    @action
    def step(self) -> None:  # type: ignore[override]
        """Set the learning rates of the next epoch."""
        for scheduler in self._schedulers:
            scheduler.step()
        self._note()


class WarmupCosineLR(SequentialLR):
    """A linear warm-up, then half a cosine wave down to `eta_min`, where it stays.

    A `LinearLR` followed by a `CosineAnnealingLR`; `step()` is to be called after every batch.

    Parameters
    ----------
    warmup_steps:
        Steps until the learning rate is reached; 0 for none.
    total_steps:
        Steps until `eta_min` is reached, the warm-up among them.
    start_factor:
        The share of the learning rate to begin with; if left out, one part in `warmup_steps`.

    >>> import gpugrad as gg
    >>> optimizer = gg.optim.SGD([gg.tensor([1.0], requires_grad=True)], lr=0.5)
    >>> schedule = WarmupCosineLR(optimizer, warmup_steps=2, total_steps=4)
    >>> for epoch in range(6):
    ...     print(schedule.get_last_lr())
    ...     schedule.step()
    [0.25]
    [0.375]
    [0.5]
    [0.25]
    [0.0]
    [0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        total_steps: int,
        start_factor: float | None = None,
        eta_min: float = 0.0,
    ) -> None:
        warmup_steps = self._number("warmup_steps", warmup_steps)
        self.total_steps = self._count("total_steps", total_steps)
        if warmup_steps >= total_steps:
            self._refuse(
                f"warmup_steps is {warmup_steps} of {total_steps}; it must leave some for the wave"
            )
        # Without a warm-up, the wave begins at milestone 0, and the line before it is never used.
        line = LinearLR(
            optimizer, start_factor or 1 / max(warmup_steps, 1), total_iters=max(warmup_steps, 1)
        )
        wave = CosineAnnealingLR(optimizer, total_steps - warmup_steps, eta_min)
        super().__init__(optimizer, [line, wave], [warmup_steps])

    @action
    def step(self) -> None:  # type: ignore[override]
        """Set the learning rates of the next step."""
        if self.last_epoch < self.total_steps:
            super().step()
        else:
            self.last_epoch += 1
