"""The optimisers, with PyTorch's names, defaults and trajectories."""

from __future__ import annotations

import math
from typing import Any

from gpugrad.core.tensor import Tensor
from gpugrad.optim.errors import OptimizerError
from gpugrad.optim.optimizer import Group, Optimizer, Params

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Lion", "RMSprop"]


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum, Nesterov's or the plain one.

    Parameters
    ----------
    params:
        As for every optimiser: see `Optimizer`.
    lr:
        Learning rate.
    momentum:
        Share of the last step that goes into the next.
    dampening:
        The gradient enters the momentum with 1 − dampening.
    weight_decay:
        Adds this times the parameter to its gradient.
    nesterov:
        Look ahead along the momentum; needs momentum and no dampening.

    >>> import gpugrad as gg
    >>> w = gg.tensor([4.0], requires_grad=True)
    >>> optimizer = SGD([w], lr=0.25)
    >>> gg.sum(w * w).backward()
    >>> optimizer.step()
    >>> w.tolist()
    [2.0]
    """

    rule = "sgd"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
            },
        )

    def check(self, group: Group) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            _at_least_zero(type(self).__name__, name, group[name])
        dampening = _number(type(self).__name__, "dampening", group["dampening"])
        if not math.isfinite(dampening):
            raise OptimizerError(f"SGD: dampening is {dampening}; it must be finite")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise OptimizerError("SGD: nesterov needs a positive momentum and zero dampening")


class Adam(Optimizer):
    """Adam: steps divided by a running estimate of each gradient's size.

    `weight_decay` adds to the gradient, and so is divided too; `AdamW` keeps it apart.

    >>> import gpugrad as gg
    >>> w = gg.tensor([4.0], requires_grad=True)
    >>> optimizer = Adam([w], lr=0.5)
    >>> gg.sum(w * w).backward()
    >>> optimizer.step()
    >>> round(w.item(), 6)
    3.5
    """

    rule = "adam"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def check(self, group: Group) -> None:
        who = type(self).__name__
        for name in ("lr", "eps", "weight_decay"):
            _at_least_zero(who, name, group[name])
        _betas(who, group)


class AdamW(Adam):
    """Adam with weight decay apart from the gradient: each step shrinks p by lr·weight_decay·p.

    >>> import gpugrad as gg
    >>> w = gg.tensor([4.0], requires_grad=True)
    >>> optimizer = AdamW([w], lr=0.5, weight_decay=0.5)
    >>> gg.sum(w * w).backward()
    >>> optimizer.step()
    >>> round(w.item(), 6)
    2.5
    """

    rule = "adamw"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)


class RMSprop(Optimizer):
    """Gradients divided by a running estimate of their size (Tieleman and Hinton, 2012).

    Parameters
    ----------
    params:
        As for every optimiser: see `Optimizer`.
    lr:
        Learning rate.
    alpha:
        Share of the past in the running mean of squares.
    eps:
        Added to the estimated size.
    weight_decay:
        Adds this times the parameter to its gradient.
    momentum:
        Share of the last step that goes into the next.
    centered:
        Divide by the standard deviation: the mean is estimated, too (Graves, 2013).

    >>> import gpugrad as gg
    >>> w = gg.tensor([4.0], requires_grad=True)
    >>> optimizer = RMSprop([w], lr=0.5, alpha=0.75)
    >>> gg.sum(w * w).backward()
    >>> optimizer.step()
    >>> round(w.item(), 6)
    3.0
    """

    rule = "rmsprop"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "alpha": alpha,
                "eps": eps,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "centered": centered,
            },
        )

    def check(self, group: Group) -> None:
        who = type(self).__name__
        for name in ("lr", "alpha", "eps", "weight_decay", "momentum"):
            _at_least_zero(who, name, group[name])
        if group["alpha"] > 1:
            raise OptimizerError(f"{who}: alpha is {group['alpha']}; it must be at most 1")


class Adagrad(Optimizer):
    """Gradients divided by the root of the sum of all their squares so far (Duchi et al., 2011).

    Parameters
    ----------
    params:
        As for every optimiser: see `Optimizer`.
    lr, lr_decay:
        Step n has the learning rate lr/(1 + (n − 1)·lr_decay).
    weight_decay:
        Adds this times the parameter to its gradient.
    initial_accumulator_value:
        What the sums of squares begin with.
    eps:
        Added to the root.

    >>> import gpugrad as gg
    >>> w = gg.tensor([4.0], requires_grad=True)
    >>> optimizer = Adagrad([w], lr=0.5)
    >>> gg.sum(w * w).backward()
    >>> optimizer.step()
    >>> round(w.item(), 6)
    3.5
    """

    rule = "adagrad"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "lr_decay": lr_decay,
                "eps": eps,
                "weight_decay": weight_decay,
                "initial_accumulator_value": initial_accumulator_value,
            },
        )

    def check(self, group: Group) -> None:
        for name in ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"):
            _at_least_zero(type(self).__name__, name, group[name])


class Lion(Optimizer):
    """Steps of one size in the direction of the sign of a mean gradient (Chen et al., 2023).

    arXiv:2302.06675, algorithm 2. The paper advises a learning rate 3 to 10 times smaller than
    AdamW's, and a weight decay as much larger.

    Parameters
    ----------
    params:
        As for every optimiser: see `Optimizer`.
    lr:
        Learning rate: what every element changes by.
    betas:
        Share of the past in the mean that gives the sign, and in the mean that is kept.
    weight_decay:
        Each step shrinks p by lr·weight_decay·p.

    >>> import gpugrad as gg
    >>> w = gg.tensor([4.0, -4.0], requires_grad=True)
    >>> optimizer = Lion([w], lr=0.5)
    >>> gg.sum(w * w).backward()
    >>> optimizer.step()
    >>> w.tolist()
    [3.5, -3.5]
    """

    rule = "lion"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def check(self, group: Group) -> None:
        who = type(self).__name__
        for name in ("lr", "weight_decay"):
            _at_least_zero(who, name, group[name])
        _betas(who, group)


def _betas(who: str, group: Group) -> None:
    try:
        beta1, beta2 = group["betas"]
    except (TypeError, ValueError):
        raise OptimizerError(f"{who}: betas is a pair of numbers, got {group['betas']!r}") from None
    for i, beta in enumerate((beta1, beta2), 1):
        if not 0 <= _number(who, f"beta{i}", beta) < 1:
            raise OptimizerError(f"{who}: beta{i} is {beta}; it must be at least 0 and below 1")


def _number(who: str, name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        raise OptimizerError(
            f"{who}: {name} is a tensor, which every step would have to wait for; give a number, "
            "such as its .item()"
        )
    try:
        return float(value)
    except (TypeError, ValueError):
        raise OptimizerError(f"{who}: {name} is a number, not {value!r}") from None


def _at_least_zero(who: str, name: str, value: Any) -> None:
    number = _number(who, name, value)
    if not 0 <= number < math.inf:
        raise OptimizerError(f"{who}: {name} is {number}; it must be finite and zero or more")
