"""Training that can tell afterwards where a NaN came from: steps are kept, and run once more."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np

from gpugrad.backend import SPACES
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.health.anomaly import detect_anomaly
from gpugrad.health.errors import AnomalyError, HealthError
from gpugrad.health.statistics import NONFINITE, moments
from gpugrad.nn.module import Module
from gpugrad.nn.random import Generator, default_generator

__all__ = ["guard"]

Loss = TypeVar("Loss")


class guard(Generic[Loss]):
    """A training step that says where a NaN or an infinity came from, at next to no cost.

    It is called as the step is. Whether the loss is finite is noted on the device, and looked at
    every so many steps, together with the parameters. When something went wrong, everything is set
    back to what it was at the last look, the steps since are run again, and the first bad one in
    the full mode of `gpugrad.health.detect_anomaly`, which names operation, line, and layer.

    Parameters
    ----------
    step:
        Clears the gradients, runs forward, backward and the update, and returns the loss. It must
        do the same again when it is given the same; what it draws comes from gpugrad's generators.
    stateful:
        All that it changes: the model, the optimiser, and a scaler, a scheduler or generators if
        there are any. Whatever has `state_dict` and `load_state_dict`, and `Generator`. The default
        generator need not be given.
    every:
        Steps between two looks. The arguments of so many steps are kept, and one copy of the state.

    Attributes
    ----------
    steps:
        How many have been made.

    Raises
    ------
    AnomalyError
        By the step at which it looks, and by `look`; its `step` is the number of the bad one. The
        model is then as it was before that step.
    HealthError
        For a step that is no function, an object without a state, and when no model is given.

    >>> import gpugrad as gg
    >>> from gpugrad import nn
    >>> model = nn.Linear(2, 1)
    >>> _ = nn.init.ones_(model.weight)
    >>> optimizer = gg.optim.SGD(model.parameters(), lr=0.1)
    >>> def step(x):
    ...     optimizer.zero_grad()
    ...     loss = gg.log(model(x)).mean()
    ...     loss.backward()
    ...     optimizer.step()
    ...     return loss
    >>> with guard(step, model, optimizer) as guarded:
    ...     for scale in (3.0, 2.0, -9.0, 2.0):
    ...         loss = guarded(gg.full((4, 2), scale, dtype="float32"))
    Traceback (most recent call last):
    gpugrad.health.errors.AnomalyError: log, forward: 4 of 4 elements of the result are NaN...
    """

    def __init__(self, step: Callable[..., Loss], *stateful: Any, every: int = 50) -> None:
        if not callable(step):
            raise HealthError(f"guard: a step is a function, not {type(step).__name__}")
        for x in stateful:
            if not (isinstance(x, Generator) or hasattr(x, "load_state_dict")):
                raise HealthError(
                    f"guard: {type(x).__name__} has no state_dict and load_state_dict; give what "
                    "the step changes: model, optimiser, scaler"
                )
        self._models = [x for x in stateful if isinstance(x, Module)]
        if not self._models:
            raise HealthError("guard: give the model that the step trains, and its optimiser")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise HealthError(f"guard: every={every!r}; it is a number of steps, 1 or more")
        self.steps = 0
        self._step = step
        self._stateful = (*stateful, default_generator)
        self._every = every
        self._before: list[Any] = []
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._bad: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Loss:
        if not self._calls:
            self._before = self._state()
        with np.errstate(all="ignore"):  # what overflows is told of here
            loss = self._step(*args, **kwargs)
        self.steps += 1
        self._calls.append((args, kwargs))
        bad = _bad(loss)
        self._bad = bad if self._bad is None else self._bad | bad
        if len(self._calls) == self._every:
            self.look()
        return loss

    def look(self) -> None:
        """See whether anything has gone wrong since the last look; the host waits."""
        if self._calls:
            if not self._fine(self._bad):
                self._replay()
            self._calls, self._before, self._bad = [], [], None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.look()

    def _fine(self, bad: Any) -> bool:
        """Whether no loss was bad, and all parameters are finite."""
        if bool(bad if isinstance(bad, bool) else SPACES[type(bad)].to_host(bad)):
            return False
        for p in (p for model in self._models for p in model.parameters()):
            m = SPACES[type(p.data)]
            if m.to_host(m.bind(moments)(m, p.data))[0, NONFINITE]:
                return False
        return True

    def _replay(self) -> None:
        """Find the first step that goes wrong, and say where it does."""
        first = self.steps - len(self._calls) + 1
        calls, self._calls = self._calls, []
        self._restore(self._before)
        for number, (args, kwargs) in enumerate(calls, first):
            before = self._state()
            with np.errstate(all="ignore"):
                loss = self._step(*args, **kwargs)
            if self._fine(_bad(loss)):
                continue
            self._restore(before)
            scales = any(hasattr(x, "get_scale") for x in self._stateful)
            try:
                with detect_anomaly(infinite=not scales):
                    self._step(*args, **kwargs)
            except AnomalyError as error:
                error.step = number
                error.add_note(f"gpugrad: in step {number}, run again")
                raise
            finally:
                self._restore(before)
            raise AnomalyError(
                f"step {number}: forward and backward are finite, and the update makes parameters "
                "infinite or NaN; lower the learning rate, or clip the gradients",
                operation="update",
                where="update",
                step=number,
            )
        raise AnomalyError(
            f"steps {first} to {self.steps}: a loss or a parameter was not finite, and is when the "
            "steps are run again; they depend on something that guard was not given",
            where="unknown",
        )

    def _state(self) -> list[Any]:
        return [
            x.state if isinstance(x, Generator) else _copied(x.state_dict()) for x in self._stateful
        ]

    def _restore(self, states: list[Any]) -> None:
        for x, state in zip(self._stateful, states):
            if isinstance(x, Generator):
                x.state = state
            else:
                x.load_state_dict(_copied(state))


def _bad(loss: Any) -> Any:
    """Whether a loss is not finite: a 0-d array on its device, or a truth value."""
    if isinstance(loss, Tensor):
        m = SPACES[type(loss.data)]
        return m.bind(lambda m, x: ~m.all(m.isfinite(x)))(m, loss.data)
    return isinstance(loss, float) and not math.isfinite(loss)


def _copied(x: Any) -> Any:
    """A state with copies of its tensors."""
    if isinstance(x, Tensor):
        m = x.backend
        return tensor_of(m.asarray(x.data, device=x.device, copy=True))
    if isinstance(x, dict):
        return {k: _copied(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(_copied(v) for v in x)
    return x
