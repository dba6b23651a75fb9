"""Whether operations are recorded: ``no_grad`` and ``enable_grad``, one setting per thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from inspect import iscoroutinefunction, isgeneratorfunction
from types import TracebackType
from typing import Any, Protocol, TypeVar

from gpugrad.errors import GraphError

F = TypeVar("F", bound=Callable[..., Any])

#: Not empty while any thread is inside one of the contexts below. Operations look at this list
#: first, which costs a nanosecond, and at the thread's own setting only when it is not empty.
gate: list[None] = []


class Kept(Protocol):
    """Where results go that are to be looked at: a list, or what passes for one."""

    def append(self, result: Any, /) -> None:
        """Take a result, whose node is not there yet."""


class _ThreadState(threading.local):
    recording = True
    off = False  # by a plain call of set_grad_enabled, outside of any block
    kept: Kept | None = None


_state = _ThreadState()


def is_grad_enabled() -> bool:
    """Whether this thread records operations for a backward pass.

    >>> import gpugrad as gg
    >>> with gg.no_grad():
    ...     gg.is_grad_enabled()
    False
    """
    return _state.recording


def records(result: Any) -> bool:
    """:func:`is_grad_enabled`, asked by an operation; :class:`keep_results` notes its result."""
    if _state.kept is not None:
        _state.kept.append(result)
    return _state.recording


def keeps_results() -> bool:
    """Whether this thread is inside of :class:`keep_results`."""
    return _state.kept is not None


class keep_results:
    """Collect every result that this thread records inside the block, for a look at the graph.

    It rides on :data:`gate`, so nothing is paid for it elsewhere. `into` is a list by default.
    """

    def __init__(self, into: Any = None) -> None:
        self._into = [] if into is None else into

    def __enter__(self) -> Any:
        gate.append(None)
        self._before = _state.kept
        _state.kept = self._into
        return self._into

    def __exit__(self, *_: object) -> None:
        _state.kept = self._before
        gate.pop()


class _Mode:
    """A setting for the length of a ``with`` block or of a decorated function."""

    def __init__(self, mode: bool) -> None:
        self._mode = mode
        self._before: list[bool] = []

    def __enter__(self) -> None:
        gate.append(None)
        self._before.append(_state.recording)
        _state.recording = self._mode

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _state.recording = self._before.pop()
        gate.pop()

    def __call__(self, function: F) -> F:
        mode = self._mode
        if isgeneratorfunction(function) or iscoroutinefunction(function):
            raise GraphError(
                f"{type(self).__name__}: {function.__name__} only starts to run after its call, "
                "when the setting is gone; use a with block inside it"
            )

        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with _Mode(mode):
                return function(*args, **kwargs)

        return wrapped  # type: ignore[return-value]


class no_grad(_Mode):
    """Do not record: results have no graph and keep nothing alive.

    A context manager and, called first, a decorator: ``@gg.no_grad()``.

    >>> import gpugrad as gg
    >>> x = gg.tensor(2.0, requires_grad=True)
    >>> with gg.no_grad():
    ...     (x * x).requires_grad
    False
    """

    def __init__(self) -> None:
        super().__init__(False)


class enable_grad(_Mode):
    """Record again inside a ``no_grad`` block.

    >>> import gpugrad as gg
    >>> x = gg.tensor(2.0, requires_grad=True)
    >>> with gg.no_grad(), gg.enable_grad():
    ...     (x * x).requires_grad
    True
    """

    def __init__(self) -> None:
        super().__init__(True)


class set_grad_enabled(_Mode):
    """Record operations, or do not: from now on, in a ``with`` block, or in a decorated function.

    As in PyTorch, a plain call takes effect at once and stays; used for a block or as a decorator,
    what was set before comes back. The setting belongs to the current thread.

    >>> import gpugrad as gg
    >>> x = gg.tensor(2.0, requires_grad=True)
    >>> with gg.set_grad_enabled(False):
    ...     (x * x).requires_grad
    False
    """

    def __init__(self, mode: bool) -> None:
        super().__init__(bool(mode))
        self._found: bool | None = _state.recording
        _switch(self._mode)

    def _undo(self) -> None:
        if self._found is not None:
            _switch(self._found)
            self._found = None

    def __enter__(self) -> None:
        self._undo()
        super().__enter__()

    def __call__(self, function: F) -> F:
        self._undo()
        return super().__call__(function)


def _switch(mode: bool) -> None:
    """Set this thread's mode until further notice, holding the gate open while it is off."""
    if _state.off == mode:
        _state.off = not mode
        if mode:
            gate.pop()
        else:
            gate.append(None)
    _state.recording = mode
