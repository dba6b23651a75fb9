"""Programs run again as what they launch: see :mod:`gpugrad.backend.tape`.

A program that leaves no graph uses up all of its memory before it returns. Where all that it does
is done by launches, it is recorded once; from then on its launches are made again, in memory that
is kept for them, with other inputs put in their places. Actions are called as they are, but for
gradients: a leaf gets its gradient back where it lies.

A step is run from its text instead while things are not as they were: while somebody holds a
gradient, say, that it would write over.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Collection, Sequence
from functools import partial
from inspect import unwrap
from sys import getrefcount
from threading import get_ident
from types import CodeType
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

from gpugrad.backend.kernels import Settled
from gpugrad.backend.memory import squares
from gpugrad.backend.tape import Tape, address, arrays_in, is_replayable
from gpugrad.core.graph import Leaf, destination
from gpugrad.core.tensor import Tensor, deposit, tensor_of

__all__ = ["Replay", "record"]

#: Bytes of results that are copied without a thought.
SMALL = 1 << 18

#: Bytes that are kept for all programs together: there is one for each shape of arguments.
TOTAL = 1 << 28

#: Functions of programs that change what they are given.
CHANGES = ("into", "write")

_deposit = unwrap(deposit)

Bounds = tuple[int, int]
Maker = Callable[[Sequence[Any], Sequence[int]], Any]


class Replay:
    """What a program launches.

    Parameters
    ----------
    recorder:
        What was found out while it ran.
    had:
        Identities of the leaves that had a gradient before.
    inputs, outputs:
        The arrays that it ran with, and those that it returned.

    Attributes
    ----------
    nbytes, total:
        Bytes that it keeps, and that all of them do.
    """

    nbytes = total = 0

    def __init__(
        self, recorder: _Recorder, had: set[int], inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> None:
        tape = recorder.tape
        self._thread = get_ident()
        self._busy = False
        self._outputs = list(outputs)
        self._kept = list(tape.kept.values())
        self.nbytes = tape.nbytes
        Replay.total += self.nbytes
        self._sizes = [x.itemsize for x in inputs]
        bounds = [byte_bounds(x) for x in inputs]
        #: Functions with their arguments, and what makes those that depend on the inputs.
        self._calls = []
        for function, given in tape.calls:
            args, makers = [*given], _makers(given, bounds)
            for i, _ in makers:
                args[i] = None
            self._calls.append((function, args, makers))
        leaves = recorder.leaves
        recorder.forget()
        self._leaves = [
            (leaf, leaf.home, weakref.ref(leaf.home.lent()), id(leaf) in had, *_references(leaf))
            for leaf in leaves
        ]

    def run(self, inputs: Sequence[Any]) -> list[Any] | None:
        """The results for these inputs; None if the program has to be run from its text."""
        if self._busy or self._thread != get_ident():
            return None
        places = []
        for x, size in zip(inputs, self._sizes):
            place = address(x)
            if place % size or not x.flags.writeable:
                return None
            places.append(place)
        for leaf, home, there, had, of_grad, of_array in self._leaves:
            if leaf.home is not home or leaf.extra is not None or home.lent() is not there():
                return None
            if leaf.grad is None:
                of_grad, of_array = 0, of_array - 1
            elif not had or leaf.grad.data is not there():
                return None
            if _references(leaf) != (of_grad, of_array):
                return None
        self._busy = True
        try:
            for function, args, makers in self._calls:
                for i, make in makers:
                    args[i] = make(inputs, places)
                function(*args)
                for i, _ in makers:
                    args[i] = None
        finally:
            self._busy = False
        return [x.copy(order="K") for x in self._outputs]

    def __del__(self) -> None:
        Replay.total -= self.nbytes


def _references(leaf: Any) -> tuple[int, int]:
    """How many there are to a gradient, and to its memory: more than usual if somebody looks."""
    of_array = getrefcount(leaf.home.lent())
    return (0 if leaf.grad is None else getrefcount(leaf.grad)), of_array


def record(
    code: CodeType,
    text: str,
    scope: dict[str, Any],
    actions: Collection[Any],
    tensors: Sequence[Tensor],
    inputs: Sequence[Any],
) -> tuple[list[Any], Replay | str]:
    """Run a program, and find out what it launches.

    Parameters
    ----------
    code, text, scope:
        The program, and what its names stand for.
    actions:
        The functions in it that are actions.
    tensors:
        Those from outside.
    inputs:
        The arrays to run it with.

    Returns
    -------
    The arrays that it returns, and what is to be run from now on; or why that cannot be.
    """
    outside = [x.data for x in tensors]
    recorder = _Recorder({id(x) for x in (*outside, *inputs)}, actions)
    leaves = [x._node for x in tensors if type(x._node) is Leaf]
    had = {id(leaf) for leaf in leaves if leaf.grad is not None}
    called = {*re.findall(r"\b(\w+)\(", text)}
    watched = {
        name: recorder.watched(name, x) if name in called else x for name, x in scope.items()
    }
    exec(code, watched)
    try:
        with recorder.tape:
            outputs, _ = watched["forward"](*inputs)
        trouble = recorder.tape.trouble or _trouble(recorder, outside, inputs, outputs)
        if trouble is not None:
            return outputs, trouble
        return [x.copy(order="K") for x in outputs], Replay(recorder, had, inputs, outputs)
    finally:
        recorder.forget()
        watched.clear()  # a function refers to its globals, and they to it


def _trouble(
    recorder: _Recorder, outside: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]
) -> str | None:
    """Why what was recorded is not to be run again, if it is not."""
    if {id(leaf.home.lent()) for leaf in recorder.leaves} != {*recorder.homes}:
        return "gradients that are written in their places and not kept there"
    for i, x in enumerate(inputs):
        if not (x.flags.c_contiguous and x.flags.aligned and x.flags.writeable):
            return "an argument that does not lie in a row, or is read-only"
        if any(np.may_share_memory(x, y) for y in (*outside, *inputs[:i])):
            return "arguments that share memory, with parameters or with each other"
    for y in outputs:
        if not isinstance(y, np.ndarray) or y.nbytes > SMALL:
            return "a result that is large"
        if any(np.may_share_memory(x, y) for x in (*outside, *inputs, *recorder.all_homes())):
            return "a result that shares memory with something"
    if Replay.total + recorder.tape.nbytes > TOTAL:
        return f"more than {TOTAL >> 20} MiB to be kept for all programs"
    bounds = [byte_bounds(x) for x in inputs]
    for _, args in recorder.tape.calls:
        for table in args:
            if not isinstance(table, np.ndarray) or table.dtype.kind not in "iu":
                continue
            if _within(table, bounds)[0] is None and any(
                np.any((table >= low) & (table < high)) for low, high in bounds
            ):
                return "a table of addresses of arguments"
    return None


def _makers(args: Sequence[Any], bounds: Sequence[Bounds]) -> list[tuple[int, Maker]]:
    """What makes the arguments anew that lie within inputs, with their numbers."""
    found = ((i, _maker(value, bounds)) for i, value in enumerate(args))
    return [(i, make) for i, make in found if make is not None]


def _maker(value: Any, bounds: Sequence[Bounds]) -> Maker | None:
    if isinstance(value, tuple | list):
        parts = _makers(value, bounds)
        if not parts:
            return None
        kind, rest = type(value), [*value]
        for i, _ in parts:
            rest[i] = None  # nothing of an input is kept

        def make(inputs: Sequence[Any], places: Sequence[int]) -> Any:
            made = [*rest]
            for i, part in parts:
                made[i] = part(inputs, places)
            return kind(made)

        return make
    k, offset = _within(value, bounds)
    if k is None:
        return None
    if isinstance(value, np.ndarray):
        shape, dtype, strides = value.shape, value.dtype, value.strides
        return lambda inputs, places: np.ndarray(shape, dtype, inputs[k], offset, strides)
    return lambda inputs, places: places[k] + offset


def _within(value: Any, bounds: Sequence[Bounds]) -> tuple[int | None, int]:
    """The number of the input that an address or an array lies in, and how far behind its start."""
    if isinstance(value, np.ndarray):
        place = address(value)
    elif type(value) is int:
        place = value
    else:
        return None, 0
    for k, (low, high) in enumerate(bounds):
        if low <= place < high:
            return k, place - low
    return None, 0


class _Recorder:
    """Runs a program while its launches are noted.

    Attributes
    ----------
    leaves:
        Leaves that got a gradient.
    homes:
        Weak references to the arrays where these lie, by identity: who holds them is looked at.
    constants:
        Arrays that were filled before all launches, likewise.
    """

    def __init__(self, others: set[int], actions: Collection[Any]) -> None:
        self.tape = Tape(others)
        self.actions = actions
        self.leaves: list[Any] = []
        self.homes: dict[int, Any] = {}
        self.constants: dict[int, Any] = {}

    def watched(self, name: str, function: Any) -> Any:
        """What is called in the place of a function that the text of a program calls."""
        if function is destination:
            return self._destination
        if function is _deposit:
            return self._deposited
        if function in self.actions:
            return partial(self._act, name, function)
        inner = function.func if isinstance(function, partial) else function
        if isinstance(inner, Settled):
            return partial(self._settled, name, function, inner)
        if name == "copy":
            return self._constant
        if name == "there":
            return function
        declared = self._declared if is_replayable(function) else self._whole
        return partial(declared, name, function)

    def _constant(self, x: Any) -> Any:
        """A copy of what is the same in every run, and of a copy that nobody changes."""
        copy = x.copy()
        self.constants[id(copy)] = copy
        return copy

    def _settled(
        self, name: str, function: Any, settled: Settled, *args: Any, **kwargs: Any
    ) -> Any:
        """Call what has chosen a kernel, whose launches are noted if that is all that it does."""
        if is_replayable(settled.chosen):
            return self._declared(name, function, *args, **kwargs)
        return self._whole(name, function, *args, **kwargs)

    def _declared(self, name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        if not all(x.flags.carray for x in arrays_in((args, kwargs))):
            return self._whole(name, function, *args, **kwargs)  # it may be copied unnoticed
        found, holds = self.tape.attempt(function, *args, **kwargs)
        return found if holds else self._noted(name, function, found, args, kwargs)

    def _whole(self, name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        found = self.tape.apart(function, *args, **kwargs)
        return self._noted(name, function, found, args, kwargs)

    def _noted(self, name: str, function: Any, found: Any, args: Any, kwargs: Any) -> Any:
        """The results of a function that is to be called again, and copied to where they are now.

        What only looks at its operands in another way has nothing to do again.
        """
        several = isinstance(found, tuple | list)
        results = [np.asarray(x) if isinstance(x, np.generic) else x
                   for x in (found if several else [found])]  # fmt: skip
        given = arrays_in(args)
        new = [
            None if x is None or any(np.may_share_memory(x, y) for y in given) else _owner(x)
            for x in results
        ]
        made = [x for x in new if x is not None]
        kept = any(np.may_share_memory(x, y) for x in arrays_in(results) for y in self.all_homes())
        if name in CHANGES and id(args[0]) in self.constants:
            self.tape.spoil(f"{name} changes a constant")
        if made or name in CHANGES or (kept and name != "fit"):
            known = all(isinstance(x, np.ndarray) and x.flags.writeable for x in made)
            if not known or arrays_in(kwargs) or sum(x.nbytes for x in made) > SMALL:
                self.tape.spoil(f"{name} is not made of launches")
            self.tape.note(_again, (partial(function, **kwargs), args, tuple(new)))
        return (tuple(results) if isinstance(found, tuple) else results) if several else results[0]

    def _destination(self, leaf: Any) -> Any:
        array = destination(leaf)
        if array is not None:
            self._know(array)
        return array

    def _know(self, array: Any) -> None:
        """Note that an array is where a gradient lies."""
        self.tape.others.add(id(array))
        self.homes[id(array)] = weakref.ref(array)

    def all_homes(self) -> list[Any]:
        return [array for there in self.homes.values() if (array := there()) is not None]

    def _deposited(self, borrowed: Any, owned: Any, given: Any = ()) -> None:
        found = {**owned, **borrowed}
        before = [leaf.grad is None and leaf.home is not None for leaf in found]
        self.tape.apart(_deposit, borrowed, owned, given)
        if given or not all(before) or any(leaf.extra is not None for leaf in found):
            self.tape.spoil("gradients that are added to others, or belong to no optimiser")
            return
        for leaf, g in found.items():
            array = leaf.home.lent()
            if leaf.grad.data is not array:
                self.tape.spoil("gradients that do not lie where an optimiser wants them")
                return
            if g is not array:
                self._know(array)
                self.tape.note(np.copyto, (array, g))
        self.leaves += found
        self.tape.note(_restore, (list(found),))

    def _act(self, name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.tape.note(partial(function, **kwargs), args)
        found = self.tape.apart(function, *args, **kwargs)
        if found is not None:
            self.tape.spoil(f"what {name} returns is used")
        return found

    def forget(self) -> None:
        """Let go of what it holds, so that references can be counted."""
        self.tape.calls.clear()
        self.tape.kept.clear()
        self.homes.clear()
        self.constants.clear()


def _again(function: Any, args: Any, results: Any) -> None:
    """Call a function, and copy its results where they are not None."""
    found = function(*args)
    for x, y in zip(results, found if isinstance(found, tuple | list) else [found]):
        if x is not None:
            np.copyto(x, _owner(y))


def _owner(x: Any) -> Any:
    """The array itself, or the one whose elements it repeats."""
    while not x.flags.writeable and isinstance(getattr(x, "base", None), np.ndarray):
        x = x.base
    return x


def _restore(leaves: Sequence[Any]) -> None:
    """Give leaves the gradients that have been written for them."""
    for leaf in leaves:
        array = leaf.home.lent()
        leaf.grad = tensor_of(array)
        leaf.squares = squares.pop(id(array), None)
