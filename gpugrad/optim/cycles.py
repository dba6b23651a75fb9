"""Schedules that restart, that rise before they fall, and that look at the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, SupportsFloat

from gpugrad.core.actions import action
from gpugrad.optim.optimizer import Optimizer
from gpugrad.optim.schedulers import LRScheduler

__all__ = ["CosineAnnealingWarmRestarts", "OneCycleLR", "ReduceLROnPlateau"]

Numbers = list[float]


class CosineAnnealingWarmRestarts(LRScheduler):
    """Half a cosine wave from the learning rate to `eta_min`, again and again.

    Loshchilov and Hutter (2017), arXiv:1608.03983.

    Parameters
    ----------
    T_0:
        Epochs until the first restart.
    T_mult:
        Each cycle is this many times as long as the one before.
    eta_min:
        The lowest learning rate.

    `step()` may be given a fraction of an epoch, `epoch + i / batches`, and then be called after
    every batch.

    >>> import gpugrad as gg
    >>> optimizer = gg.optim.SGD([gg.tensor([1.0], requires_grad=True)], lr=0.5)
    >>> schedule = CosineAnnealingWarmRestarts(optimizer, T_0=2)
    >>> for epoch in range(4):
    ...     print(schedule.get_last_lr())
    ...     schedule.step()
    [0.5]
    [0.25]
    [0.5]
    [0.25]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        T_0: int,
        T_mult: int = 1,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.T_0 = self._count("T_0", T_0)
        self.T_mult = self._count("T_mult", T_mult)
        self.eta_min = self._number("eta_min", eta_min)
        #: How far the cycle has come, and how long it is.
        self.T_cur: float = last_epoch
        self.T_i = self.T_0
        super().__init__(optimizer, last_epoch)

    @action
    def step(self, epoch: float | None = None) -> None:
        """Set the learning rates of the next epoch, or those of a given one, also a fraction."""
        self._check_groups(len(self.base_lrs))
        if epoch is None and self.last_epoch >= 0:
            epoch = self.last_epoch + 1
            self.T_cur += 1
        else:
            epoch = self._number("epoch", epoch or 0)
            self.T_cur, self.T_i = epoch, self.T_0
        if self.T_mult == 1:
            self.T_cur %= self.T_i
        while self.T_cur >= self.T_i:
            self.T_cur -= self.T_i
            self.T_i *= self.T_mult
        self._step_count += 1
        self.last_epoch = math.floor(epoch)
        self._write(self.get_lr())

    def get_lr(self) -> list[float]:
        factor = (1 + math.cos(math.pi * self.T_cur / self.T_i)) / 2
        return [self.eta_min + (base - self.eta_min) * factor for base in self.base_lrs]


class OneCycleLR(LRScheduler):
    """One cycle: the learning rate rises to `max_lr` and falls far below where it began.

    Smith and Topin (2018), arXiv:1708.07120. `step()` is to be called after every batch.

    Parameters
    ----------
    max_lr:
        The highest learning rate: a number, or one for each group.
    total_steps:
        Steps of the cycle; or `epochs` times `steps_per_epoch`.
    pct_start:
        The share of the cycle that rises.
    anneal_strategy:
        "cos" or "linear".
    cycle_momentum:
        Let momentum, or the first of the betas, fall from `max_momentum` to `base_momentum` while
        the learning rate rises, and the other way round.
    div_factor:
        The learning rate begins at `max_lr / div_factor`,
    final_div_factor:
        and ends at this fraction of where it began.
    three_phase:
        Fall in as many steps as it rose to where it began, and in the rest to the end.

    >>> import gpugrad as gg
    >>> optimizer = gg.optim.Adam([gg.tensor([1.0], requires_grad=True)])
    >>> schedule = OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
    >>> for _ in range(2):
    ...     schedule.step()
    >>> schedule.get_last_lr(), optimizer.param_groups[0]["betas"]
    ([0.5], (0.85, 0.999))
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | Sequence[float],
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        cycle_momentum: bool = True,
        base_momentum: float | Sequence[float] = 0.85,
        max_momentum: float | Sequence[float] = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        self._attach(optimizer)
        if total_steps is None:
            if epochs is None or steps_per_epoch is None:
                self._refuse("its length is missing; give total_steps, or epochs and "
                             "steps_per_epoch")  # fmt: skip
            steps_per_epoch = self._count("steps_per_epoch", steps_per_epoch)
            total_steps = self._count("epochs", epochs) * steps_per_epoch
        if anneal_strategy not in ("cos", "linear"):
            self._refuse(f"anneal_strategy is 'cos' or 'linear', not {anneal_strategy!r}")
        self.total_steps = self._count("total_steps", total_steps)
        self.pct_start = self._number("pct_start", pct_start, 0, 1)
        self.anneal_strategy = anneal_strategy
        self.cycle_momentum = cycle_momentum
        self.three_phase = three_phase
        self.max_lrs = self._numbers("max_lr", max_lr)
        starts = [lr / self._length("div_factor", div_factor) for lr in self.max_lrs]
        self.min_lrs = [lr / self._length("final_div_factor", final_div_factor) for lr in starts]
        self.base_momentums = self._numbers("base_momentum", base_momentum, 1)
        self.max_momentums = self._numbers("max_momentum", max_momentum, 1)
        if cycle_momentum and not {"momentum", "betas"} & optimizer.defaults.keys():
            self._refuse(
                f"{type(optimizer).__name__} has neither momentum nor betas; pass "
                "cycle_momentum=False"
            )
        if last_epoch == -1:
            for group, lr in zip(self._groups(), starts):
                group["initial_lr"] = lr
        super().__init__(optimizer, last_epoch)

    def _phases(self) -> list[tuple[float, Numbers, Numbers, Numbers, Numbers]]:
        """Of each phase the last step, and at both ends the learning rates and the momentums."""
        rise, last = self.pct_start * self.total_steps, self.total_steps - 1
        start, top, bottom = self.base_lrs, self.max_lrs, self.min_lrs
        low, high = self.base_momentums, self.max_momentums
        up = (rise - 1, start, top, high, low)
        if not self.three_phase:
            return [up, (last, top, bottom, low, high)]
        return [up, (2 * rise - 2, top, start, low, high), (last, start, bottom, high, high)]

    def get_lr(self) -> list[float]:
        step, phases = self.last_epoch, self._phases()
        if step > self.total_steps:
            self._refuse(
                f"this is step {step} of {self.total_steps}; make the cycle longer, or step() once "
                "for each batch"
            )
        number = next((i for i, phase in enumerate(phases) if step <= phase[0]), len(phases) - 1)
        begin = phases[number - 1][0] if number else 0.0
        end, *ends = phases[number]
        # The call after the last step is part of the usual loop, and leaves everything as it is.
        share = min((step - begin) / (end - begin), 1.0) if end > begin else 1.0
        rates, momentums = (
            [self._between(a, b, share) for a, b in zip(*pair)] for pair in (ends[:2], ends[2:])
        )
        if self.cycle_momentum:
            for group, momentum in zip(self._groups(), momentums):
                if "betas" in group:
                    group["betas"] = (momentum, *group["betas"][1:])
                else:
                    group["momentum"] = momentum
        return rates

    def _between(self, start: float, end: float, share: float) -> float:
        if self.anneal_strategy == "linear":
            return start + (end - start) * share
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


class ReduceLROnPlateau(LRScheduler):
    """The learning rate times `factor` when a measure has stopped getting better.

    Parameters
    ----------
    mode:
        Whether better is less, "min", or more, "max".
    patience:
        How many epochs without an improvement are borne; the next one reduces.
    threshold, threshold_mode:
        What counts as an improvement: by this share of the best, "rel", or by this much, "abs".
    cooldown:
        How many epochs after a reduction are not counted.
    min_lr:
        The lowest learning rate: a number, or one for each group.
    eps:
        Reductions by no more than this are not made.

    >>> import gpugrad as gg
    >>> optimizer = gg.optim.SGD([gg.tensor([1.0], requires_grad=True)], lr=0.5)
    >>> schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    >>> for loss in (1.0, 0.9, 0.95, 0.94):
    ...     schedule.step(loss)
    >>> schedule.get_last_lr()
    [0.25]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float | Sequence[float] = 0,
        eps: float = 1e-8,
    ) -> None:
        self._attach(optimizer)
        if mode not in ("min", "max"):
            self._refuse(f"mode is 'min' or 'max', not {mode!r}")
        if threshold_mode not in ("rel", "abs"):
            self._refuse(f"threshold_mode is 'rel' or 'abs', not {threshold_mode!r}")
        if not isinstance(factor, Real) or not 0 <= factor < 1:
            self._refuse(f"factor is {factor!r}; it must be at least 0 and below 1")
        self.mode = mode
        self.factor = float(factor)
        self.patience = self._number("patience", patience)
        self.threshold = self._number("threshold", threshold)
        self.threshold_mode = threshold_mode
        self.cooldown = self._number("cooldown", cooldown)
        self.min_lrs = self._numbers("min_lr", min_lr)
        self.eps = self._number("eps", eps)
        self.best = math.inf if mode == "min" else -math.inf
        self.cooldown_counter = 0
        self.num_bad_epochs = 0
        self.last_epoch = 0
        self._last_lr = [float(group["lr"]) for group in self._groups()]

    @action
    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # type: ignore[override]
        """Take note of a measure, a number or a tensor, which the host waits for.

        One that is NaN is no improvement.
        """
        self._check_groups(len(self.min_lrs))
        value = float(metrics)
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        if self._is_better(value):
            self.best = value
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        rates = [float(group["lr"]) for group in self._groups()]
        if self.num_bad_epochs > self.patience:
            lower = [max(lr * self.factor, least) for lr, least in zip(rates, self.min_lrs)]
            rates = [b if a - b > self.eps else a for a, b in zip(rates, lower)]
            self.cooldown_counter = self.cooldown
            self.num_bad_epochs = 0
        self._write(rates)

    def _is_better(self, value: float) -> bool:
        sign = 1 if self.mode == "min" else -1
        if self.threshold_mode == "rel":
            bound = self.best * (1 - sign * self.threshold)
        else:
            bound = self.best - sign * self.threshold
        return bool(value < bound if sign > 0 else value > bound)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        if len(state["min_lrs"]) != len(self.min_lrs):
            self._refuse(f"the state has {len(state['min_lrs'])} min_lrs")
