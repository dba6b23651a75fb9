"""Programs: what a trace did, as two straight pieces of Python, forward and backward.

The first computes from left to right, one line for each operation. The second goes back from right
to left, one line for each derivative: what the walk through a graph would do is known before it is
done, so there is no graph, no node but one, and nothing to look up. Of a function that runs
backward itself there is one piece, and no graph at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpugrad.backend import Array
from gpugrad.backend.kernels import kernel_mode
from gpugrad.core.graph import (
    FREED,
    MANY,
    Node,
    Pick,
    check_alive,
    next_seq,
)
from gpugrad.core.nodes import compiled
from gpugrad.core.primitive import Primitive
from gpugrad.core.replay import Replay, record
from gpugrad.core.settings import settings
from gpugrad.core.steps import Action, Step
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.core.trace import Trace
from gpugrad.core.writer import Writer
from gpugrad.errors import GraphError

__all__ = ["Program"]

#: How often launches are recorded: again when what they were for has been replaced, which is seen
#: by so many runs in a row for which they did not do.
RECORDS, MISSES = 4, 3


class Program:
    """A traced function, to be run again.

    Parameters
    ----------
    trace, earlier:
        Traces of two calls that did the same.
    outputs:
        The tensors that the function returned in the first of them.

    Attributes
    ----------
    text:
        The program, to be read.
    tensors:
        The tensors from outside whose arrays it uses.
    """

    def __init__(self, trace: Trace, earlier: Trace, outputs: Sequence[Tensor]) -> None:
        self.name = trace.name
        self.modules = list(trace.modules.values())
        self._settings = settings[0]
        self.mode = kernel_mode()
        self.generators = [generator for generator, _ in trace.draws]
        #: Whether it does more than to compute.
        self.acts = trace.acts
        for step in trace.steps:
            if isinstance(step, Step) and step.node is not None and not trace.acts:
                check_alive(step.node)  # what a call changes in place after it was saved
        writer = Writer(trace, earlier, outputs)
        self.tensors = writer.tensors
        self._leaves = [x._node is not None for x in self.tensors]
        self._arrays = [x.data for x in self.tensors]
        self._kinds = [_kind(x.data) for x in self.tensors]
        self.ends = writer.ends
        #: The same, where none is an input.
        self._fixed = [x for x in writer.ends if isinstance(x, Tensor)]
        if len(self._fixed) < len(self.ends):
            self._fixed = []
        self.differentiable = writer.differentiable
        self.kept = writer.kept
        self.text = writer.text
        self.shapes = [tuple(y.shape) for y in outputs]
        self._code = compiled(self.text, f"<gpugrad program {trace.name}>")
        self._open = writer.scope | writer.open_rules
        exec(self._code, writer.scope)
        self.forward: Callable[..., tuple[list[Array], list[Array]]] = writer.scope["forward"]
        self.backward: Callable[..., Any] | None = writer.scope.get("backward")
        self._scope = writer.scope
        self._actions = {step.function for step in trace.steps if isinstance(step, Action)}
        #: What is run in the place of the text, or why there is no such thing.
        self.replay: Replay | str = "it has not been run yet"
        met = [x.data for x in (*trace.inputs, *self.tensors, *outputs)]
        met += [found.array for found in trace.captured.values()]
        host = all(isinstance(x, np.ndarray) for x in met)
        usable = host and self.backward is None and not self.generators
        self._records, self._runs, self._misses = (RECORDS if usable else 0), 0, 0

    def holds(self) -> bool:
        """Whether modules and tensors from outside are as they were when it was made."""
        if self._settings != settings[0]:
            if any(state.differs() for state in self.modules):
                return False
            self._settings = settings[0]
        arrays = self._arrays
        for i, x in enumerate(self.tensors):
            if (x._node is not None) is not self._leaves[i]:
                return False
            if x.data is not arrays[i]:  # another array will do, if it is of the same kind
                if _kind(x.data) != self._kinds[i]:
                    return False
                arrays[i] = x.data
                self._misses = MISSES
        return True

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs."""
        given = [x.data for x in inputs]
        if self.backward is None:
            return [tensor_of(x) for x in self._replayed(given)]
        arrays, kept = self.forward(*given)
        node = Run(self, kept, [x._node for x in self._fixed or self._ends_of(inputs)])
        if self.differentiable == [0] and len(arrays) == 1:
            return [tensor_of(arrays[0], node)]
        return [
            tensor_of(x, Pick(node, i) if i in self.differentiable else None)
            for i, x in enumerate(arrays)
        ]

    def _replayed(self, inputs: list[Array]) -> list[Array]:
        """The arrays that it returns: by its launches alone, if they are known, or by its text."""
        if not isinstance(self.replay, str):
            if self._misses < MISSES:
                found = self.replay.run(inputs)
                if found is not None:
                    self._misses = 0
                    return found
                self._misses += 1
            if self._misses >= MISSES:
                self.replay, self._runs, self._misses = "things have changed", 0, 0
        elif self._records:
            self._runs += 1
            if self._runs > 1:  # kernels have been chosen, and what they look up has been found
                arrays, self.replay = record(
                    self._code, self.text, self._scope, self._actions, self.tensors, inputs
                )
                self._records = 0 if isinstance(self.replay, str) else self._records - 1
                self._misses = 0
                return arrays
        arrays, _ = self.forward(*inputs)
        return arrays

    def pull(self, g: Any, kept: list[Array], ends: list[Any]) -> Any:
        """The way back. It has settled for kernels that suit what lies in a row, in its mode."""
        assert self.backward is not None
        if self.mode == kernel_mode() and _lies_in_a_row(g):
            return self.backward(g, kept, ends)
        if "backward" not in self._open:
            exec(self._code, self._open)
        return self._open["backward"](g, kept, ends)

    def _ends_of(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [inputs[x] if isinstance(x, int) else x for x in self.ends]


def _kind(x: Array) -> tuple[Any, ...]:
    return type(x), x.shape, x.dtype, getattr(x, "strides", None)


def _lies_in_a_row(g: Any) -> bool:
    """Whether a gradient from outside, or each of several, does."""
    if isinstance(g, dict):
        return all(map(_lies_in_a_row, g.values()))
    flags = getattr(g, "flags", None)
    return flags is None or bool(flags.c_contiguous)


_PROGRAM = Primitive("program", lambda m: None, "", ("inputs",), True, {}, outputs="many")


class Run(Node):
    """One run of a program in the graph: a single node, whatever the program does."""

    __slots__ = ("ends", "kept", "outputs", "program")
    kind = MANY
    primitive = _PROGRAM

    def __init__(self, program: Program, kept: list[Array], ends: list[Any]) -> None:
        self.program: Any = program
        self.kept = kept
        self.ends = ends
        self.outputs = len(program.differentiable)
        self.seq = next_seq()

    def vjp(self, g: Any) -> Any:
        return self.program.pull(g, [*self.kept], self.ends)

    def pop(self, g: Any) -> Any:
        pull, kept, ends = self.program.pull, self.kept, self.ends
        self.clear()
        return pull(g, kept, ends)

    def pull(self, g: Any, wrap: Callable[..., Any] | None) -> Any:
        """The pairs of parent and gradient, of arrays only."""
        if wrap is not None:
            raise GraphError(
                f"backward: derivatives of derivatives of {self.program.name} were asked for, "
                "which is compiled; call the function that was given to gg.compile instead"
            )
        return self.vjp(g)

    def clear(self) -> None:
        self.seq = FREED
        self.program = None
        self.kept = []
        self.ends = []

    @property
    def mask(self) -> tuple[bool, ...]:
        return (True,) * len(self.ends)

    def parents(self) -> list[tuple[int, Any]]:
        return list(enumerate(self.ends))

    def saved(self) -> dict[str, Any]:
        return dict(zip(self.program.kept, self.kept)) if self.program is not None else {}

    def parameters(self) -> dict[str, Any]:
        return {}

    def metas(self) -> tuple[Any, ...] | None:
        shapes = self.program.shapes
        return (*(None for _ in self.ends), shapes[0] if len(shapes) == 1 else tuple(shapes))
