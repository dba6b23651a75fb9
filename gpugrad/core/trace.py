"""What a function of tensors does, operation by operation: the record that a program is made of.

A trace is taken while the function runs as usual. Two of them, of two calls, say what a program may
rely on: what is the same in both stays the same, and what differs has not been computed by
operations.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from threading import RLock
from types import FrameType
from typing import Any, NoReturn

import numpy as np

from gpugrad.backend import SPACES, Array, Backend, is_array
from gpugrad.core.actions import tracing
from gpugrad.core.autocast import NARROWS, cast_operands
from gpugrad.core.codegen import intercepted, kind_of, lift, plain
from gpugrad.core.graph import Leaf, Pick, check_alive, mutations, next_seq, reachable
from gpugrad.core.primitive import Primitive, differentiable
from gpugrad.core.settings import State
from gpugrad.core.steps import (
    Action,
    Captured,
    End,
    Expression,
    Name,
    Same,
    Step,
    Walk,
    Wrapped,
    Write,
    source_of,
)
from gpugrad.core.tensor import SCALARS, Tensor, tensor_of
from gpugrad.core.walk import on_walk, walk
from gpugrad.errors import CompileError

__all__ = ["Trace", "active", "instead", "noticing", "refuse", "tell_made"]


#: What else is to be told to a trace: called with it, for the length of it.
noticing: list[Callable[[Any], AbstractContextManager[Any]]] = []

#: Operations are intercepted for one trace at a time.
_turn = RLock()


@contextmanager
def instead(owner: type, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Let `around(method, self, ...)` be called in the place of a method, inside the block."""
    before = owner.__dict__.get(name)
    found = getattr(owner, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(found, self, *args, **kwargs)

    setattr(owner, name, method)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def tell_made(x: Tensor) -> Tensor:
    """`x`, a tensor that was made of no other array; a trace may take it for a constant."""
    if tracing.trace is not None:
        tracing.trace.note_made(x.data)
    return x


def active() -> bool:
    """Whether this thread's operations are being traced."""
    return tracing.trace is not None


def refuse(what: str, instead: str) -> NoReturn:
    """Raise for what the function that is being traced does, and a program cannot."""
    trace: Trace = tracing.trace
    trace.refuse(what, instead)


class Trace:
    """One call of a function.

    Attributes
    ----------
    inputs:
        Tensors that stand for the arguments, in order; the arrays are views of theirs, so that each
        is an array of its own.
    since:
        The creation number before the first node.
    captured, steps, draws:
        What came from outside; what was done, in order; and which generators were asked for random
        numbers, with what they gave.
    modules:
        Modules that were called or may be, by identity, and how they were.
    watched:
        Whether somebody has a hook there: then Python has to run each time.
    acts:
        Whether it runs a backward pass, or an action.
    """

    def __init__(self, name: str, function: Any, tensors: Sequence[Tensor]) -> None:
        self.name = name
        self.function = function
        self.names: dict[int, Name] = {}
        self.sources: dict[int, Name] = {}
        self._arrays: list[Array] = []  # kept, so that each identity stays its own
        self.captured: dict[Name, Captured] = {}
        self.steps: list[Step | Write | Walk | Action] = []
        self.draws: list[tuple[Any, tuple[int, int]]] = []
        self.modules: dict[int, State] = {}
        self.made: set[int] = set()
        self.watched = False
        self.inputs: list[Tensor] = []
        self._found: list[tuple[Tensor, Array, Any]] = []  # tensors as they were when they came
        for i, x in enumerate(tensors):
            space = SPACES[type(x.data)]
            array = space.bind(space.xp.reshape)(x.data, x.data.shape)
            self._call(array, Name(f"x{i}"))
            # A node of its own, too, where there is one.
            twin = tensor_of(array, None if x._node is None else differentiable.identity(x)._node)
            self.inputs.append(twin)
            self._found.append((twin, twin.data, twin._node))
        self.since = next_seq()
        self._results = 0
        self._inside = self._writing = self._busy = False
        self.acts = False
        self._walked: dict[int, Any] = {}  # nodes that a walk has used up, by identity
        self._trouble: str | None = None

    # -- while the function runs ----------------------------------------------------------------

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take the trace of what this thread does inside the block."""
        with _turn, ExitStack() as stack:
            stack.enter_context(intercepted(_around))
            stack.enter_context(instead(Tensor, "_write", _write))
            stack.enter_context(instead(Tensor, "detach", _detach))
            for name in ("mark", "mark_all"):
                stack.enter_context(instead(type(mutations), name, _mark))
            for space in {SPACES[kind] for kind in SPACES if kind in SPACES[kind].types}:
                stack.enter_context(instead(type(space), "to_host", _to_host))
            for notice in noticing:
                stack.enter_context(notice(self))
            on_walk.append(self._walk)
            stack.callback(on_walk.remove, self._walk)
            tracing.trace = self
            try:
                yield
            finally:
                tracing.trace = None
            self._look_for_changes()

    def _look_for_changes(self) -> None:
        """Find what the function has set, which a program would not set again."""
        for state in self.modules.values():
            if name := state.differs():
                self._trouble = (
                    f"it sets {name!r} of a {type(state.owner).__name__}; change the elements of a "
                    "buffer in place (buffer[...] = value), or return the value"
                )
        self._look_for_new_arrays()

    def _look_for_new_arrays(self) -> None:
        for tensor, array, node in self._found:
            if tensor.data is not array or tensor._node is not node:
                self._trouble = (
                    f"a tensor from outside, of shape {tensor.shape}, gets another array or place "
                    "in the graph (.data =, requires_grad_, += on one that is recorded); return a "
                    "new tensor"
                )

    def operation(self, made: Primitive, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and note it."""
        function: Any = made.function
        given = inspect.signature(function).bind(*args, **kwargs)
        given.apply_defaults()
        parameters = {name: given.arguments[name] for name in made.parameters}
        operands: Sequence[Any] = (
            given.arguments[made.operands[0]]
            if made.variadic
            else [given.arguments[name] for name in made.operands]
        )
        if made.name in NARROWS:
            operands = cast_operands(made, operands)
        operands = [
            x if isinstance(x, Tensor) or type(x) in SCALARS else
            tensor_of(self._lifted(made, x, [y for y in operands if y is not x]))
            for x in operands
        ]  # fmt: skip
        if made.sized_by_values is True:
            self.refuse(f"calls {made.name}", _NO_SIZE)
        place = _place()
        expressions = [self.expression(x, place) for x in operands]
        if made.sized_by_values and _has_mask(parameters[str(made.sized_by_values)]):
            self.refuse(f"takes elements by a boolean array ({made.name})", _NO_SIZE)
        written = {name: self.expression(value, place) for name, value in parameters.items()}
        self._note_draw(written)
        self._inside = True
        try:
            y = plain(made)(*operands, **parameters)
        finally:
            self._inside = False
        several = isinstance(y, tuple)
        results = y if several else (y,)
        arrays = [x.data if isinstance(x, Tensor) else x for x in operands]
        node = next((r._node for r in results if r._node is not None), None)
        step = Step(
            made, kind_of(arrays[0], arrays[1:]), expressions, written, [], [], [],
            node.p0 if several and isinstance(node, Pick) else node, place,
        )  # fmt: skip
        for result in results:
            self._result(result, step.results)
            step.shapes.append(tuple(result.data.shape))
        step.tensors = [x if isinstance(x, Tensor) else None for x in operands]
        self.steps.append(step)
        return y

    def _result(self, x: Tensor, names: list[Name]) -> None:
        """Give the array of a result the next name."""
        name = Name(f"t{self._results}")
        self._results += 1
        self._call(x.data, name)
        names.append(name)

    def _lifted(self, made: Primitive, x: Any, peers: list[Any]) -> Any:
        array = lift(made, x, peers)
        return array if is_array(x) else tell_made(tensor_of(array)).data

    def write(self, target: Tensor, index: Any, value: Any) -> None:
        """Note a change in place, which is about to be made."""
        place = _place()
        name = self.expression(target, place)
        if name in self.captured:
            self.captured[name].written = True
        self.steps.append(
            Write(name, self.expression(index, place), self.expression(value, place), place)
        )

    def act(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run an action, and note it."""
        if self._busy or self._inside:
            return function(*args, **kwargs)
        args, kwargs = _listed(args), _listed(kwargs)
        place = _place()
        step = Action(function, self._given(args, place), self._given(kwargs, place), [], place)
        self._look_for_new_arrays()
        with self._acting():
            found = function(*args, **kwargs)
        if isinstance(found, Tensor):
            self._result(found, step.results)
        self.steps.append(step)
        # What an action has changed is not what operations come upon.
        self._found = [(x, x.data, x._node) for x, *_ in self._found]
        return found

    def checked(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Note what looked at elements, and found nothing wrong."""
        if not (self._busy or self._inside):
            place = _place()
            given = self._given(_listed(args), place), self._given(_listed(kwargs), place)
            self.steps.append(Action(function, *given, [], place))

    @contextmanager
    def _acting(self) -> Iterator[None]:
        """Note nothing of what happens inside the block."""
        self.acts = self._inside = self._writing = self._busy = True
        try:
            yield
        finally:
            self._inside = self._writing = self._busy = False

    def _given(self, value: Any, place: str) -> Expression:
        """What an action was given."""
        if isinstance(value, Tensor):
            name = self.names.get(id(value.data))
            known = name is not None and name not in self.captured
            return Wrapped(name) if known else Same(value)  # type: ignore[arg-type]
        if isinstance(value, Leaf):
            met = (x for found in self.captured.values() for x in found.tensors)
            if all(x._node is not value for x in met):
                self.refuse(
                    "keeps a gradient in .grad of a tensor that is an argument, or that it does "
                    "not use itself", "let gg.grad return it, or call backward outside"
                )  # fmt: skip
            return End(value)
        if type(value) in (tuple, list):
            return type(value)(self._given(x, place) for x in value)
        if type(value) is dict:
            return {
                self._given(key, place) if isinstance(key, Leaf) else key: self._given(x, place)
                for key, x in value.items()
            }
        if type(value) in (*SCALARS, str):
            return value
        return self.expression(value, place) if is_array(value) else Same(value)

    def _walk(self, seeds: Any, retain: bool, wrap: Any, since: int) -> Any:
        """Run a walk in the place of :func:`gpugrad.core.walk.walk`, and note it."""
        if tracing.trace is not self or self._inside:
            return None
        if wrap is not None:
            self.refuse(
                "records its backward pass", "derivatives of derivatives are for functions that "
                "are not compiled"
            )  # fmt: skip
        place = _place()
        passed = [*reachable([seed for seed, _ in seeds], since)]
        for node in passed:
            if id(node) in self._walked:
                node.clear()
                check_alive(node)
        step = Walk([(seed, self.expression(g, place)) for seed, g in seeds], since, [], place)
        with self._acting():  # its nodes are still needed: to write down what was done
            borrowed, owned = walk(seeds, retain=True, since=since)
        for end, g in (*borrowed.items(), *owned.items()):
            name = Name(f"g{self._results}")
            self._results += 1
            self._call(g, name)
            step.ends.append((end, name))
        if not retain:
            self._walked |= {id(node): node for node in passed if node.seq > since}
        self.steps.append(step)
        return borrowed, owned

    def release(self) -> None:
        """Release what walks have used up, as they would have done."""
        for node in self._walked.values():
            node.clear()
        self._walked.clear()

    def draw(self, generator: Any, pair: tuple[int, int]) -> None:
        """Note that a generator named a draw."""
        if not self._busy:
            self.draws.append((generator, pair))

    def module(self, module: Any, watched: bool) -> None:
        """Note that a module is called, or may be."""
        if id(module) not in self.modules:
            self.modules[id(module)] = State(module)
        self.watched = self.watched or watched

    def note_made(self, array: Array) -> None:
        """Note an array that was made of no other one."""
        self.made.add(id(array))
        self._arrays.append(array)  # so that its identity stays its own

    def refuse(self, what: str, instead: str) -> NoReturn:
        """Raise for what a program cannot do."""
        raise CompileError(f"compile: {self.name} {what} at {_place()}; {instead}")

    def read(self) -> None:
        """Refuse to look at a value."""
        if not self._inside:
            raise CompileError(
                f"compile: {self.name} looks at the value of a tensor at {_place()} (item, numpy, "
                "if, print, ...); a program runs without looking, so return the tensor and look at "
                "it outside, or choose with gg.where"
            )

    # -- names ------------------------------------------------------------------------------------

    def _call(self, array: Array, name: Name) -> None:
        """Give an array a name."""
        self.names[id(array)] = name
        self.sources.setdefault(id(array), name)
        self._arrays.append(array)

    def _note_draw(self, parameters: dict[str, Expression]) -> None:
        """Put the numbers of a draw, which are others each time, in the place of what they were."""
        if "seed" in parameters and "offset" in parameters:
            pair = parameters["seed"], parameters["offset"]
            for i, (_, drawn) in enumerate(self.draws):
                if drawn == pair:
                    parameters["seed"], parameters["offset"] = Name(f"s{i}"), Name(f"o{i}")

    def expression(self, value: Any, place: str) -> Expression:
        """How a program comes by a value that an operation was given."""
        if isinstance(value, Tensor):
            name = self._named(value.data, place)
            if name in self.captured:
                self.captured[name].note(value)
                self._found.append((value, value.data, value._node))
            return name
        if type(value) is tuple:
            return tuple(self.expression(x, place) for x in value)
        if type(value) is list:
            return [self.expression(x, place) for x in value]
        if type(value) is slice:
            parts = (value.start, value.stop, value.step)
            return slice(*(self.expression(x, place) for x in parts))
        if type(value) not in SCALARS and not isinstance(value, np.generic) and is_array(value):
            return self._named(value, place)
        return value

    def _named(self, array: Array, place: str) -> Name:
        if id(array) not in self.names:
            name = Name(f"w{len(self.captured)}")
            made = id(array) in self.made
            after = len(self.steps) if self.acts else 0
            self.captured[name] = Captured(name, array, place, made=made, after=after)
            self._call(array, name)
        return self.names[id(array)]

    # -- two of them ------------------------------------------------------------------------------

    def result(self, y: Tensor) -> None:
        """Note what the function returned: an array that no operation made belongs to the caller.

        Who may change it, so that a copy is kept to compare with.
        """
        known = id(y.data) in self.names
        name = self.expression(y, "its end")
        if not known:
            space = SPACES[type(y.data)]
            copy = space.asarray(y.data, device=space.device(y.data), copy=True)
            self.captured[name].array = copy

    def state(self) -> Any:
        """The modes of modules and the kinds of captured arrays: calls are alike if these are."""
        modules = tuple(state.key() for state in self.modules.values())
        kinds = tuple((x.array.shape, str(x.array.dtype)) for x in self.captured.values())
        return modules, kinds

    def digest(self) -> list[int]:
        """Tells inputs from others by their elements."""
        return [hash(SPACES[type(x.data)].to_host(x.data).tobytes()) for x in self.inputs]

    def forget(self) -> None:
        """Keep what the next trace is compared with, and none of what was computed."""
        self.seen = self.digest()
        self._found.clear()
        self.inputs.clear()
        self._arrays.clear()
        self.names.clear()
        self.sources.clear()
        for step in self.steps:
            if isinstance(step, Step):
                step.tensors, step.node = [], None
            elif isinstance(step, Walk):
                step.seeds = [(None, g) for _, g in step.seeds]
                step.ends = [(None, name) for _, name in step.ends]

    def difference(self, earlier: Trace) -> str | None:
        """What the function did otherwise in an earlier call, or beside operations; or None."""
        if self._trouble is not None:
            return self._trouble
        if [id(g) for g, _ in earlier.draws] != [id(g) for g, _ in self.draws]:
            return "other generators of random numbers were asked; make them outside"
        for a, b in zip(earlier.steps, self.steps):
            if a.said() != b.said():
                if _told(a) == _told(b):
                    return f"at {b.place} {_told(b)} is for other objects than the one before"
                return f"at {b.place} there was {_told(a)}, and then {_told(b)}"
        if len(earlier.steps) != len(self.steps):
            return f"there were {len(earlier.steps)} operations, and then {len(self.steps)}"
        for name, found in self.captured.items():
            before = earlier.captured[name]
            if source_of(before, found) is None:
                what = "changed in place" if found.written else "used"
                return (
                    f"what is {what} at {found.place}, of shape {tuple(found.array.shape)}, is "
                    "made anew in each call by other means than operations"
                )
        return None

    def may_be_constant(self, earlier: Trace) -> bool:
        """Whether what was equal in both calls does not follow from inputs that were equal, too."""
        doubtful = any(
            not found.made and source_of(earlier.captured[name], found) is found.array
            and found.array is not earlier.captured[name].array
            for name, found in self.captured.items()
        )  # fmt: skip
        return not doubtful or not self.inputs or earlier.seen != self.digest()


_NO_SIZE = "how many there are depends on values, and a program has fixed shapes; use gg.where"


def _has_mask(value: Any) -> bool:
    """Whether a boolean array is among the values of a parameter."""
    if isinstance(value, tuple | list):
        return any(map(_has_mask, value))
    return str(getattr(value, "dtype", "")).rpartition(".")[2] == "bool"


def _listed(value: Any) -> Any:
    """Arguments with a list in the place of what can be gone through once."""
    if isinstance(value, dict):
        return {name: _listed(x) for name, x in value.items()}
    if type(value) is tuple:
        return tuple(map(_listed, value))
    return list(value) if isinstance(value, Iterator) else value


def _told(step: Step | Write | Walk | Action) -> str:
    """A step in a message."""
    if isinstance(step, Walk):
        return "a backward pass"
    if isinstance(step, Action):
        name = step.function.__qualname__
        return "keeping gradients in .grad" if name == "deposit" else f"a call of {name}"
    if isinstance(step, Write):
        return f"{step.target}[{step.index}] = {step.value}"
    values = [*map(str, step.operands), *(f"{k}={v}" for k, v in step.parameters.items())]
    return f"{step.made.name}({', '.join(values)})"


# -- what stands in the place of others ------------------------------------------------------------


def _around(made: Primitive, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    trace = tracing.trace
    if trace is None or trace._inside:
        return plain(made)(*args, **kwargs)
    return trace.operation(made, args, kwargs)


def _write(found: Callable[..., Any], target: Tensor, name: str, index: Any, value: Any) -> None:
    trace = tracing.trace
    if trace is None or trace._busy:
        found(target, name, index, value)
        return
    trace.write(target, index, value)
    trace._writing = True
    try:
        found(target, name, index, value)
    finally:
        trace._writing = False


def _detach(found: Callable[..., Any], x: Tensor) -> Any:
    if tracing.trace is not None and not tracing.trace._busy:
        tracing.trace.expression(x, _place())  # what is returned has its array, and not its place
    return found(x)


def _mark(found: Callable[..., Any], changes: Any, what: Any) -> Any:
    trace = tracing.trace
    if trace is not None and not trace._writing:
        trace._trouble = (
            "an array was changed in place by other means than indexing, +=, optimisers and "
            "clipping; do that outside of the function"
        )
    return found(changes, what)


def _to_host(found: Callable[..., Any], space: Backend, x: Array) -> Any:
    if tracing.trace is not None:
        tracing.trace.read()
    return found(space, x)


_HERE = str(Path(__file__).resolve().parents[1])


def _place() -> str:
    """File and line of the caller outside of the library; of the outermost one if there is none."""
    frame: FrameType | None = sys._getframe(1)
    found = ""
    while frame is not None:
        found = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        if not frame.f_code.co_filename.startswith((_HERE, "<gpugrad")):
            break
        frame = frame.f_back
    return found
