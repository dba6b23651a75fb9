"""Launches on a tape: noted while they run, to be run again with nothing in between.

Before it launches compiled code, a kernel finds out shapes, addresses and how to divide the work.
In a training step all of that is the same as in the step before, and the launches alone do what the
step does, as long as its memory stays where it is. A kernel that is :func:`replayable` promises so:
what it does to elements it does by launches, and by calls through :func:`call`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from threading import local
from typing import Any, TypeVar

import numpy as np

__all__ = [
    "LIMIT",
    "Tape",
    "address",
    "arrays_in",
    "call",
    "gate",
    "is_replayable",
    "keep",
    "note",
    "replayable",
    "spoil",
    "zeros",
]

F = TypeVar("F", bound=Callable[..., Any])

#: Bytes that a tape may keep. A step that needs more is long beside what lies between its launches.
LIMIT = 1 << 26

#: Not empty while some thread records; looked at first.
gate: list[None] = []


class _Recording(local):
    tape: Tape | None = None


_recording = _Recording()


class Tape:
    """What was launched in a block.

    Attributes
    ----------
    calls:
        Functions with their arguments, in order.
    kept:
        Arrays whose addresses may be among the arguments.
    nbytes:
        What these hold.
    others:
        Identities of arrays that belong to somebody else, and are not to be kept.
    trouble:
        Why it cannot be run again; None if it can.
    """

    def __init__(self, others: set[int]) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.kept: dict[int, Any] = {}
        self.others = others
        self.trouble: str | None = None
        self.nbytes = 0
        self._attempting = self._failed = False

    def __enter__(self) -> Tape:
        gate.append(None)
        self._before = _recording.tape
        _recording.tape = self
        return self

    def __exit__(self, *_: object) -> None:
        _recording.tape = self._before
        gate.pop()

    def note(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Add a call that is about to be made."""
        if self.trouble is None:
            self.calls.append((function, args))
            for x in arrays_in(args):
                self.keep(x)

    def keep(self, x: Any) -> None:
        """Keep an array whose address is asked for."""
        while isinstance(x.base, np.ndarray):
            x = x.base
        if self.trouble is None and id(x) not in self.others and id(x) not in self.kept:
            self.kept[id(x)] = x
            self.nbytes += x.nbytes
            if self.nbytes > LIMIT:
                self._attempting = False
                self.spoil(f"more than {LIMIT >> 20} MiB to be kept")

    def spoil(self, why: str) -> None:
        """Give up, and keep nothing; in an attempt, only that."""
        if self._attempting:
            self._failed = True
        elif self.trouble is None:
            self.trouble = why
            self.calls.clear()
            self.kept.clear()

    def attempt(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        """Call what is replayable; whether it was this time, and its calls are noted."""
        before = len(self.calls)
        self._attempting, self._failed = True, False
        try:
            found = function(*args, **kwargs)
        finally:
            self._attempting = False
        if self._failed:
            del self.calls[before:]
        return found, not self._failed

    def apart(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call what is none of this tape's business, as if it did not record."""
        _recording.tape = None
        gate.pop()
        try:
            return function(*args, **kwargs)
        finally:
            gate.append(None)
            _recording.tape = self


def arrays_in(value: Any) -> list[Any]:
    """The NumPy arrays in a value, in tuples, lists and dictionaries."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [x for part in value for x in arrays_in(part)]


def note(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Note a launch, if this thread records."""
    if _recording.tape is not None:
        _recording.tape.note(function, args)


def keep(x: np.ndarray[Any, Any]) -> None:
    """Keep an array, if this thread records."""
    if _recording.tape is not None:
        _recording.tape.keep(x)


#: NumPy's C interface puts an array's address behind what each Python object begins with.
_AT: Any = ctypes.c_ssize_t.from_address
_BEHIND = object.__basicsize__


def address(x: np.ndarray[Any, Any]) -> int:
    """Where the first element of an array is: `x.ctypes.data`, which takes eight times as long."""
    if gate:
        keep(x)
    found: int = _AT(id(x) + _BEHIND).value
    return found


def call(function: Callable[..., Any], *args: Any) -> None:
    """Call a function that changes elements, or something else, in a replayable kernel."""
    tape = _recording.tape if gate else None
    if tape is None:
        function(*args)
    else:
        tape.note(function, args)
        tape.apart(function, *args)


def zeros(shape: Any, dtype: Any) -> np.ndarray[Any, Any]:
    """`numpy.zeros` that a replayable kernel adds to: they are zeros again in each run."""
    made: np.ndarray[Any, Any] = np.zeros(shape, dtype)
    if gate:
        note(made.fill, (0,))
        keep(made)
    return made


def spoil(why: str) -> None:
    """Say that a call of a replayable kernel is none that can be run again."""
    if _recording.tape is not None:
        _recording.tape.spoil(why)


def replayable(run: F) -> F:
    """Declare that a kernel does nothing but to launch, and to :func:`call`.

    It may not look at elements, nor keep what it is given.
    """
    run.replayable = True  # type: ignore[attr-defined]
    return run


def is_replayable(run: Any) -> bool:
    """Whether that has been declared."""
    return getattr(run, "replayable", False)
