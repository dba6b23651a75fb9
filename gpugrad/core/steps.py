"""What a trace is made of: operations and other steps, and where their values come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpugrad.backend import SPACES, Array
from gpugrad.core.primitive import Primitive
from gpugrad.core.settings import exact
from gpugrad.core.tensor import Tensor

__all__ = [
    "Action",
    "Captured",
    "End",
    "Expression",
    "Name",
    "Same",
    "Step",
    "Walk",
    "Wrapped",
    "Write",
    "source_of",
]


class Name(str):
    """A variable of a program: `x0` an input, `w0` what comes from outside, `t0` a result."""

    __slots__ = ()


@dataclass(frozen=True, eq=False)
class Same:
    """An object from outside that is to be the very same one in every call."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class End(Same):
    """A leaf of the graph, where gradients end."""


@dataclass(frozen=True)
class Wrapped:
    """A tensor of an array that has a name."""

    name: Name


#: A value as a program comes by it: a name, a constant, one of the above, or a tuple, list, slice
#: or dictionary of such.
Expression = Any


@dataclass
class Step:
    """One operation.

    Attributes
    ----------
    kind:
        The array class that it ran for.
    operands, parameters:
        What went into it.
    results:
        What came out: one name, or several.
    shapes:
        Of the results.
    tensors:
        The operands that are tensors, and None for the others.
    node:
        What the graph has for it, if anything.
    place:
        Where it was called: file and line.
    """

    made: Primitive
    kind: type
    operands: list[Expression]
    parameters: dict[str, Expression]
    results: list[Name]
    shapes: list[tuple[int, ...]]
    tensors: list[Tensor | None]
    node: Any
    place: str

    def said(self) -> tuple[Any, ...]:
        """What must be the same in every call."""
        return self.made.name, exact(self.operands), exact(self.parameters), self.shapes


@dataclass
class Write:
    """A change of an array in place: `target[index] = value`."""

    target: Name
    index: Expression
    value: Expression
    place: str

    def said(self) -> tuple[Any, ...]:
        """What must be the same in every call."""
        return "a change in place", self.target, exact(self.index), exact(self.value)


@dataclass
class Walk:
    """A walk back through what has been recorded.

    Attributes
    ----------
    seeds:
        Nodes that it began at, with their gradients.
    since:
        The creation number of the last node that it did not go behind.
    ends:
        Where it ended, and the names of what arrived there.
    """

    seeds: list[tuple[Any, Expression]]
    since: int
    ends: list[tuple[Any, Name]]
    place: str

    def said(self) -> tuple[Any, ...]:
        """What must be the same in every call."""
        return "a backward pass", [g for _, g in self.seeds], [name for _, name in self.ends]


@dataclass
class Action:
    """A call of a function that changes something beside its results, or looks for errors."""

    function: Callable[..., Any]
    args: Expression
    kwargs: Expression
    results: list[Name]
    place: str

    def said(self) -> tuple[Any, ...]:
        """What must be the same in every call."""
        given = exact(self.args), exact(self.kwargs)
        return self.function.__qualname__, self.function, given, len(self.results)


@dataclass
class Captured:
    """An array from outside of the function, and the tensors that it was met in."""

    name: Name
    array: Array
    place: str
    tensors: list[Tensor] = field(default_factory=list)
    written: bool = False
    #: Whether it was made of no other array: zeros, a list of numbers.
    made: bool = False
    #: How many steps came before it; 0 where none of them could have changed which array it is.
    after: int = 0

    def note(self, tensor: Tensor) -> None:
        """Add a tensor that has the array."""
        if all(tensor is not x for x in self.tensors):
            self.tensors.append(tensor)


def source_of(before: Captured, now: Captured) -> Tensor | Array | None:
    """Where a captured array comes from in every call.

    A tensor whose array it is; or the array itself, if it was the same one in both calls or had the
    same elements. None if neither holds.
    """
    for x in now.tensors:
        if any(x is y for y in before.tensors):
            return x
    if now.array is before.array:
        return now.array
    made = any(x._node is not None for x in now.tensors)
    if made or now.written or not _equal(before.array, now.array):
        return None
    return now.array


def _equal(a: Array, b: Array) -> bool:
    if type(a) is not type(b) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    space = SPACES[type(a)]
    same = a.dtype.kind in "fc" if hasattr(a.dtype, "kind") else False
    return bool(np.array_equal(space.to_host(a), space.to_host(b), equal_nan=same))
