"""Which implementation an operation gets: its generic text, or a fused kernel of the backend.

An operation that a backend has kernels for has a *slot* there, under the operation's name. The
choice is one function with one order, :meth:`Slot.choice`:

1. mode ``"off"``: the generic text;
2. fewer elements than the slot is worth loading for: the generic text;
3. the first kernel of the slot that does not refuse these operands;
4. mode ``"require"``: an error that says why each kernel refused;
5. the generic text.

Recording for a higher order comes before all of them: a derivative that is recorded itself is
written in differentiable operations, which have slots of their own. What is chosen depends on the
operands and on the mode alone, never on what ran before, so that a run can be repeated.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from functools import cached_property, partial, wraps
from typing import Any, TypeVar

from gpugrad.backend import tape
from gpugrad.errors import KernelError, ParameterError

__all__ = ["Choice", "Kernel", "Slot", "fusible", "kernel_mode", "use_kernels"]

F = TypeVar("F", bound=Callable[..., Any])

MODES = ("off", "auto", "require")


@dataclass(frozen=True)
class Kernel:
    """One fused implementation of an operation.

    Attributes
    ----------
    run:
        ``run(m, *operands, **parameters)`` on raw arrays, with the results of the generic text.
    label:
        What it is called in :func:`gpugrad.explain`: ``"numba cpu"``.
    refuse:
        Called like ``run``: why it cannot take these operands (dtype, layout, size), or None.
    """

    run: Callable[..., Any]
    label: str
    refuse: Callable[..., Any] = lambda *args, **kwargs: None


@dataclass(frozen=True)
class Choice:
    """What one call got: see :func:`gpugrad.explain`."""

    operation: str
    implementation: str
    reason: str


@dataclass
class Slot:
    """The place of an operation's kernels in one backend.

    Attributes
    ----------
    name:
        The operation.
    module:
        Where its kernels are: a module with a mapping ``KERNELS`` from operation to a
        :class:`Kernel` or a list of them. It is imported when a kernel is first wanted.
    at_least:
        Elements of the first operand below which the generic text is as quick.
    given:
        The kernels themselves, where they are in no module.
    """

    name: str
    module: str
    at_least: int = 0
    given: InitVar[Sequence[Kernel] | None] = None

    def __post_init__(self, given: Sequence[Kernel] | None) -> None:
        if given is not None:
            self.kernels = list(given)

    @cached_property
    def kernels(self) -> list[Kernel]:
        """The kernels, in the order in which they are asked."""
        found = importlib.import_module(self.module).KERNELS[self.name]
        return [found] if isinstance(found, Kernel) else list(found)

    def add(self, kernel: Kernel) -> None:
        """Put a kernel before the others."""
        self.kernels = [kernel, *self.kernels]

    def takes(self, m: Any, *args: Any, **kwargs: Any) -> bool:
        """Whether there is a kernel for these operands."""
        return any(kernel.refuse(m, *args, **kwargs) is None for kernel in self.kernels)

    def choice(
        self, generic: Callable[..., Any], m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        """The one choice: a kernel's function, or ``generic``, for the same arguments.

        It would be the same for other operands that lie as these do.
        """
        mode = "auto"
        if gate:
            mode = _state.mode
        if mode == "off":
            return self._generic(generic, "kernels are switched off")
        if mode == "auto" and getattr(args[0], "size", 0) < self.at_least:
            return self._generic(generic, f"fewer than {self.at_least} elements")
        refusals = []
        for kernel in self.kernels:
            why = kernel.refuse(m, *args, **kwargs)
            if why is None:
                if gate and _state.log is not None:
                    _state.log.append(Choice(self.name, kernel.label, "operands fit"))
                if tape.gate:
                    _tell(self.name, kernel.run)
                return kernel.run
            refusals.append(f"{kernel.label}: {why}")
        reason = "; ".join(refusals)
        if mode == "require":
            raise KernelError(
                f"{self.name}: no kernel takes these operands ({reason}); change them, or allow "
                'the generic text with use_kernels("auto")'
            )
        return self._generic(generic, reason)

    def _generic(self, generic: Callable[..., Any], why: str) -> Callable[..., Any]:
        if gate and _state.log is not None:
            _state.log.append(Choice(self.name, "generic", why))
        if tape.gate:
            _tell(self.name, generic)
        return generic


def _tell(name: str, chosen: Callable[..., Any]) -> None:
    """Tell a tape what has been chosen, which it has no use for if it does more than to launch."""
    if not tape.is_replayable(chosen):
        tape.spoil(f"{name}, which is not made of launches")


class Settled:
    """A function with a slot that always gets operands that lie alike: the first choice holds.

    Parameters
    ----------
    name:
        The slot.
    generic:
        As in :func:`fusible`.
    """

    def __init__(self, name: str, generic: Callable[..., Any]) -> None:
        self.name = name
        self.generic = generic
        self.chosen: Callable[..., Any] | None = None

    def __call__(self, m: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = self.chosen
        if chosen is None:
            slot = m.slots.get(self.name)
            chosen = self.generic if slot is None else slot.choice(self.generic, m, args, kwargs)
            self.chosen = chosen
        return chosen(m, *args, **kwargs)


def slots(package: str, families: Mapping[str, tuple[int, tuple[str, ...]]]) -> dict[str, Slot]:
    """Slots from a table: module of a package → (at_least, operations)."""
    return {
        name: Slot(name, f"{package}.{module}", at_least)
        for module, (at_least, names) in families.items()
        for name in names
    }


def fusible(generic: F, name: str | None = None) -> F:
    """Give a function of arrays a slot: where a backend has kernels for its name, they may run.

    Parameters
    ----------
    generic:
        ``f(m, *operands, **parameters)`` over a namespace ``m``. It stays what the function means:
        what it computes without a kernel, and what is recorded for a higher order.
    name:
        The slot; by default the function's own name.
    """
    key = name or generic.__name__

    @wraps(generic)
    def chosen(m: Any, *args: Any, **kwargs: Any) -> Any:
        slot = m.slots.get(key)
        if slot is None:
            return generic(m, *args, **kwargs)
        return slot.choice(generic, m, args, kwargs)(m, *args, **kwargs)

    chosen.settled = partial(Settled, key, generic)  # type: ignore[attr-defined]
    return chosen  # type: ignore[return-value]


# -- the mode -------------------------------------------------------------------------------------

#: Not empty while some thread has a mode of its own, or notes choices; looked at first.
gate: list[None] = []


def _start() -> str:
    mode = os.environ.get("GPUGRAD_KERNELS", "auto")
    if mode not in MODES:
        raise ParameterError(f"GPUGRAD_KERNELS is {mode!r}; it must be one of {', '.join(MODES)}")
    if mode != "auto":
        gate.append(None)
    return mode


class _ThreadState(threading.local):
    mode = _start()
    log: list[Choice] | None = None


_state = _ThreadState()


def kernel_mode() -> str:
    """The mode of this thread: ``"off"``, ``"auto"`` or ``"require"``."""
    return _state.mode


class use_kernels:
    """Choose, for a block, whether fused kernels run.

    Parameters
    ----------
    mode:
        ``"auto"``, the default: where one fits and pays. ``"off"``: never. ``"require"``: wherever
        the backend has one, whatever the size; operands that it cannot take are an error. The
        environment variable ``GPUGRAD_KERNELS`` sets the mode that a program starts in.

    >>> import gpugrad as gg
    >>> with gg.use_kernels("off"):
    ...     gg.relu(gg.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise ParameterError(f"use_kernels: {mode!r} is no mode; use {', '.join(MODES)}")
        self._mode = mode
        self._before: list[str] = []

    def __enter__(self) -> None:
        self._before.append(_state.mode)
        _state.mode = self._mode
        if self._mode != "auto":  # which is what is done where nobody looks at modes
            gate.append(None)

    def __exit__(self, *_: object) -> None:
        _state.mode = self._before.pop()
        if self._mode != "auto":
            gate.pop()


class note_choices:
    """Collect the choices that this thread makes inside the block."""

    def __enter__(self) -> list[Choice]:
        gate.append(None)
        self._before = _state.log
        log: list[Choice] = []
        _state.log = log
        return log

    def __exit__(self, *_: object) -> None:
        _state.log = self._before
        gate.pop()


def is_noted() -> bool:
    """Whether this thread keeps a list of choices."""
    return _state.log is not None


def note(choice: Choice) -> None:
    """Add a choice to this thread's list, if it keeps one."""
    if _state.log is not None:
        _state.log.append(choice)
