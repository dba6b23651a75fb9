"""Which implementation every operation of a call got, and why: :func:`explain`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

from gpugrad.backend.kernels import Choice, note_choices
from gpugrad.core import codegen

_changing = Lock()


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` saw.

    Attributes
    ----------
    result:
        What the function returned.
    choices:
        One :class:`Choice` per call of an operation, forward and backward, in order: its
        ``operation``, its ``implementation`` (``"generic"`` or the label of a kernel) and the
        ``reason``.
    """

    result: Any
    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        rows = [("operation", "implementation", "reason")]
        rows += [(c.operation, c.implementation, c.reason) for c in self.choices]
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{a:{first}}  {b:{second}}  {c}".rstrip() for a, b, c in rows)


def explain(function: Callable[..., Any]) -> Callable[..., Explanation]:
    """A function that runs ``function`` and tells which implementation each operation got.

    Derivatives are told of when the function runs them (``loss.backward()``).

    >>> import gpugrad as gg
    >>> print(gg.explain(gg.relu)(gg.tensor([-1.0, 2.0])))
    operation  implementation  reason
    relu       generic         fewer than 16384 elements
    """

    def explained(*args: Any, **kwargs: Any) -> Explanation:
        with _changing:
            codegen.watching.append(None)
            codegen.forget()
        try:
            with note_choices() as choices:
                result = function(*args, **kwargs)
        finally:
            with _changing:
                codegen.watching.pop()
                codegen.forget()
        return Explanation(result, tuple(choices))

    return explained
