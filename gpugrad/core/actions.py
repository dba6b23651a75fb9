"""What changes something beside its results: a step of an optimiser, gradients that are kept.

A program writes operations out, and calls actions and checks again as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import local
from typing import Any, ParamSpec, TypeVar

__all__ = ["action", "check", "tracing"]

P = ParamSpec("P")
R = TypeVar("R")


class _Tracing(local):
    trace: Any = None


#: The trace that is taken of this thread, or None; see :mod:`gpugrad.core.trace`.
tracing = _Tracing()


def action(function: Callable[P, R]) -> Callable[P, R]:
    """Declare that a function is to be called again where a program is made of its caller."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if tracing.trace is None:
            return function(*args, **kwargs)
        return tracing.trace.act(function, args, kwargs)  # type: ignore[no-any-return]

    return run


def check(function: Callable[P, None]) -> Callable[P, None]:
    """Declare a function that only looks at arrays, and raises for what is wrong in them.

    It is called with the arrays themselves, by position; a program calls it with those of each run.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        function(*args, **kwargs)
        if tracing.trace is not None:
            tracing.trace.checked(function, args, kwargs)

    return run
