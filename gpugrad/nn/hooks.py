"""Hooks on a module's backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpugrad.core.hooks import gate
from gpugrad.core.tensor import Tensor

__all__ = ["Watch"]

Hook = Callable[..., Any]
Grads = tuple[Any, ...]


class Watch:
    """One forward of a module whose gradients somebody wants to see.

    What goes in and what comes out passes a gate each, so that the gradients of all outputs are
    there when the first hooks are called, and those of all inputs for the others.
    """

    def __init__(self, module: Any, hooks: Sequence[Hook], pre_hooks: Sequence[Hook]) -> None:
        self.module = module
        self.hooks = hooks
        self.pre_hooks = pre_hooks
        self.arrived: Grads | None = None
        self.has_inputs = False

    def enter(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of the forward."""
        self.has_inputs = any(_flows(x) for x in args)
        return _through(args, self._computed)

    def leave(self, out: Any) -> Any:
        """The result of the forward."""
        if isinstance(out, tuple):
            passed = _through(out, self._arrive)
            return type(out)(*passed) if hasattr(out, "_fields") else passed
        return _through((out,), self._arrive)[0]

    def _arrive(self, grads: Grads) -> Grads:
        for hook in self.pre_hooks:
            changed = hook(self.module, grads)
            if changed is not None:
                grads = changed if isinstance(changed, tuple) else (changed,)
        self.arrived = grads
        if not self.has_inputs:
            self._computed(())
        return grads

    def _computed(self, grads: Grads) -> Grads:
        for hook in self.hooks:
            changed = hook(self.module, grads, self.arrived)
            if changed is not None:
                grads = changed if isinstance(changed, tuple) else (changed,)
        return grads


def _flows(x: Any) -> bool:
    return isinstance(x, Tensor) and x._node is not None


def _through(values: tuple[Any, ...], hook: Callable[[Grads], Grads]) -> tuple[Any, ...]:
    """The values behind a gate, whose hook is told a gradient for each, or None."""
    places = [i for i, x in enumerate(values) if _flows(x)]

    def told(grads: Grads) -> Grads:
        seen: list[Any] = [None] * len(values)
        for i, g in zip(places, grads):
            seen[i] = g
        found = hook(tuple(seen))
        if len(found) != len(values):
            return found  # the gate says what is wrong
        return tuple(found[i] for i in places)

    passed = list(values)
    for i, x in zip(places, gate([values[i] for i in places], told)):
        passed[i] = x
    return tuple(passed)
