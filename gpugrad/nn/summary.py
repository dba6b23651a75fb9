"""A table of a net: what its modules return, own, compute and keep for the backward pass."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from itertools import pairwise
from typing import Any

import numpy as np

from gpugrad.backend import SPACES, is_array
from gpugrad.core.calls import each_call
from gpugrad.core.conversion import asarray, tensor
from gpugrad.core.graph import next_seq
from gpugrad.core.modes import enable_grad
from gpugrad.core.primitive import Primitive
from gpugrad.core.tensor import Tensor
from gpugrad.core.view import graph
from gpugrad.errors import ParameterError
from gpugrad.nn.activations import name_of
from gpugrad.nn.containers import Sequential
from gpugrad.nn.costs import Cost, cost_of
from gpugrad.nn.module import Module
from gpugrad.nn.random import Generator, default_generator
from gpugrad.ops import zeros

__all__ = ["Row", "Summary", "summary"]


@dataclass(frozen=True)
class Row:
    """One module of a :class:`Summary`. All numbers leave out what has a row of its own.

    Attributes
    ----------
    path:
        Its path in the net, "" for the net itself; the first one, if it has several.
    class_name:
        The name of its class.
    output_shapes:
        Shapes of the tensors that its last call returned; empty if it was not called.
    calls:
        How often it was called.
    parameters:
        How many numbers there are in its parameters. A shared parameter counts where it is first.
    trainable:
        How many of them are trained.
    multiply_adds:
        Of the products in its forward pass.
    flops:
        Floating-point operations: two for each multiply-add, and those on single elements.
    parameter_bytes:
        Memory of its parameters.
    activation_bytes:
        Memory that its operations keep for the backward pass, besides parameters and buffers.
    shared:
        A pair for each parameter that counts elsewhere: its name, and the path that it counts for.
    joined:
        The path of the layer that computed this activation in its own operation, or "".
    """

    path: str
    class_name: str
    output_shapes: tuple[tuple[int, ...], ...]
    calls: int
    parameters: int
    trainable: int
    multiply_adds: int
    flops: int
    parameter_bytes: int
    activation_bytes: int
    shared: tuple[tuple[str, str], ...] = ()
    joined: str = ""

    @property
    def depth(self) -> int:
        """How many modules it lies in."""
        return self.path.count(".") + 1 if self.path else 0


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` found: `rows`, one :class:`Row` per module, and their sums."""

    rows: tuple[Row, ...]

    @property
    def total_parameters(self) -> int:
        """Numbers in all parameters."""
        return sum(row.parameters for row in self.rows)

    @property
    def trainable_parameters(self) -> int:
        """Those that are trained."""
        return sum(row.trainable for row in self.rows)

    @property
    def total_multiply_adds(self) -> int:
        """Multiply-adds of all products."""
        return sum(row.multiply_adds for row in self.rows)

    @property
    def total_flops(self) -> int:
        """Floating-point operations of the forward pass."""
        return sum(row.flops for row in self.rows)

    @property
    def parameter_bytes(self) -> int:
        """Memory of all parameters."""
        return sum(row.parameter_bytes for row in self.rows)

    @property
    def activation_bytes(self) -> int:
        """Memory kept for the backward pass, besides parameters and buffers."""
        return sum(row.activation_bytes for row in self.rows)

    def __str__(self) -> str:
        head = (
            "module", "class", "output", "parameters", "trainable", "mult-adds", "FLOPs",
            "kept bytes", "remarks",
        )  # fmt: skip
        table = [head, *map(_cells, self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.rjust(width) if 2 < i < len(head) - 1 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            ).rstrip()
            for row in table
        ]
        return "\n".join((
            *lines,
            f"{self.total_parameters:,} parameters ({_memory(self.parameter_bytes)}), "
            f"{self.trainable_parameters:,} trainable",
            f"{self.total_flops:,} FLOPs with {self.total_multiply_adds:,} multiply-adds",
            f"{_memory(self.activation_bytes)} kept for the backward pass",
        ))  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    shapes = ", ".join(map(str, row.output_shapes)) if row.calls else "not called"
    trained = "" if not row.parameters else "no" if not row.trainable else "yes"
    if 0 < row.trainable < row.parameters:
        trained = f"{row.trainable:,}"
    remarks = [f"{name} is {other}" for name, other in row.shared]
    remarks += [f"computed in {row.joined}"] if row.joined else []
    remarks += [f"{row.calls} calls"] if row.calls > 1 else []
    numbers = (row.multiply_adds, row.flops, row.activation_bytes)
    return (
        row.path or "(net)", row.class_name, shapes, f"{row.parameters:,}", trained,
        *(f"{n:,}" for n in numbers), ", ".join(remarks),
    )  # fmt: skip


def _memory(size: int) -> str:
    """Bytes in the unit that suits them."""
    number, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop(0)
    return f"{size} bytes" if units[0] == "bytes" else f"{number:.1f} {units[0]}"


def summary(model: Module, *inputs: Any, depth: int | None = None) -> Summary:
    """Run a net once, and tell of every module what it returns, owns, computes and keeps.

    Parameters
    ----------
    model:
        The net. It runs forward in the mode that it is in: batch normalisation and dropout compute,
        and keep, other things in training. Afterwards everything is as before: buffers, gradients,
        hooks, and the states of the default generator and of those that modules hold.
    inputs:
        What to call it with. A tensor or an array; a shape, a tuple, for zeros of float32; a pair
        of shape and dtype for other zeros, `((8, 32), "int64")` for tokens; None; or a tuple of
        these. Zeros are made where the first parameter is.
    depth:
        Show modules down to this depth only, the net's own being 0; what lies deeper is counted in
        the row of the module around it. Default: all.

    Returns
    -------
    A :class:`Summary`: print it, or read its rows and totals. In each column the rows add up to the
    total.

    Counted are the operations that run, recorded or not. Those of a product or a convolution, of
    attention and of a recurrent layer are two per multiply-add, and one per element for a bias and
    an activation; a gate of a recurrent cell adds up its products and biases and has one function.
    Element-wise operations and reductions count 1 per element, pooling as many as its window has
    places, softmax and cross-entropy 5, layer and group normalisation 7, RMS normalisation 4, batch
    normalisation 4, and in training 8 besides the running averages. Moving and looking up is free,
    an embedding too. Masks take nothing off.

    Memory is that of the arrays that the recorded graph holds, each counted once, for the module
    that keeps it first. Inputs are among them where their values are needed for a derivative.

    `Sequential` computes a layer and the activation behind it as one operation: what this keeps is
    then in the layer's row, and the activation's own row says so. Where an activation, or another
    module, is computed by the module around it, its row says "not called".

    Raises ParameterError for an input that is none of these, and what the net raises.

    >>> import gpugrad.nn as nn
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> found = summary(net, (3, 8))
    >>> print(found)
    module  class       output  parameters  trainable  mult-adds  FLOPs  kept bytes  remarks
    (net)   Sequential  (3, 2)           0                     0      0           0
    0       Linear      (3, 4)          36        yes         96    204         144
    1       ReLU        (3, 4)           0                     0     12           0  computed in 0
    2       Linear      (3, 2)          10        yes         24     54           0
    46 parameters (184 bytes), 46 trainable
    270 FLOPs with 120 multiply-adds
    144 bytes kept for the backward pass
    >>> found.total_flops == 2 * 3 * (8 * 4 + 4 * 2) + 3 * (4 + 4 + 2)
    True
    """
    if depth is not None and depth < 0:
        raise ParameterError(f"summary: depth={depth}; it is 0 for the whole net alone, or more")
    if not inputs and _wants_input(model):
        raise ParameterError(
            f"summary: {type(model).__name__} needs an input to run on; give the shape of one, "
            "such as summary(model, (8, 32))"
        )
    first = next(model.parameters(), None)
    device = "cpu" if first is None else first.device
    values = [_input(x, device) for x in inputs]
    run = _Run(model)
    with _as_before(run.modules), run.watched(), enable_grad():
        run.find_kept(model(*values))
    rows = run.rows()
    return Summary(tuple(rows if depth is None else _folded(rows, depth)))


# -- what the net is called with ------------------------------------------------------------------


def _wants_input(model: Module) -> bool:
    """Whether `forward` has an argument that must be given."""
    forward = getattr(model, "forward", None)
    if forward is None:
        return False  # the call says so
    named = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    parameters = signature(forward).parameters.values()
    return any(p.kind in named and p.default is Parameter.empty for p in parameters)


def _input(value: Any, device: str) -> Any:
    if value is None:
        return None
    if isinstance(value, Tensor):  # a leaf of its own: what lies behind it is not the net's
        return value.detach().requires_grad_(value.requires_grad)
    if isinstance(value, tuple):
        if _is_shape(value):
            return zeros(value, dtype="float32", device=device)
        if len(value) == 2 and _is_shape(value[0]) and isinstance(value[1], str | type | np.dtype):
            return zeros(value[0], dtype=value[1], device=device)
        return tuple(_input(x, device) for x in value)
    if is_array(value):
        return asarray(value)
    raise ParameterError(
        f"summary: an input is a tensor, an array, a shape such as (8, 32), or a shape with a "
        f'dtype such as ((8, 32), "int64"), not {value!r}'
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(n, int | np.integer) and not isinstance(n, bool) for n in value
    )


# -- the run --------------------------------------------------------------------------------------


@contextmanager
def _as_before(modules: Sequence[Module]) -> Iterator[None]:
    """Let modules change their buffers and draw random numbers, and undo it."""
    generators = {id(default_generator): default_generator}
    buffers: dict[int, Tensor] = {}
    held: list[tuple[Module, str, Tensor]] = []
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, Generator):
                generators[id(value)] = value
        for name, buffer in module._own_buffers():
            buffers[id(buffer)] = buffer
            held.append((module, name, buffer))
    states = [(generator, generator.state) for generator in generators.values()]
    arrays = [(buffer, buffer.data) for buffer in buffers.values()]
    try:
        for buffer, _ in arrays:
            buffer.data = tensor(buffer.detach()).data
        yield
    finally:
        for buffer, array in arrays:
            buffer.data = array
        for module, name, buffer in held:
            vars(module)[name] = buffer
        for generator, state in states:
            generator.state = state


class _Run:
    """One forward pass, and what it shows of every module."""

    def __init__(self, model: Module) -> None:
        self.paths, self.modules = map(list, zip(*model.named_modules()))
        self.index = {id(module): i for i, module in enumerate(self.modules)}
        count = len(self.modules)
        self.calls = [0] * count
        self.shapes: list[tuple[tuple[int, ...], ...]] = [()] * count
        self.costs = [Cost()] * count
        self.kept = [0] * count
        self.joined: dict[int, int] = {}  # activation → layer
        # Modules at work, outermost first, each with the activation that it computes besides. What
        # hooks of the net do is the net's own.
        self.stack: list[tuple[int, int | None]] = [(0, None)]
        # From which creation number on which module is at work: the graph's nodes tell theirs.
        self.since: list[int] = []
        self.at_work: list[int] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Follow the calls of all modules, and of all operations.

        A forward hook would keep layers and activations apart that else are one operation, so each
        module gets a forward of its own for a while, which notes when it begins and ends.
        """
        before = [vars(module).get("forward") for module in self.modules]
        try:
            for i, module in enumerate(self.modules):
                if hasattr(module, "forward"):
                    vars(module)["forward"] = self._noted(i, module.forward)
            self._mark()
            with each_call(self._notice):
                yield
        finally:
            for module, forward in zip(self.modules, before):
                if forward is not None:
                    vars(module)["forward"] = forward
                else:
                    vars(module).pop("forward", None)

    def _noted(self, i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            joined = self._follower(i, kwargs.get("activation"))
            self.stack.append((i, joined))
            self._mark()
            try:
                y = forward(*args, **kwargs)
            finally:
                self.stack.pop()
                self._mark()
            for k in (i,) if joined is None else (i, joined):
                self.calls[k] += 1
                self.shapes[k] = tuple(x.shape for x in _tensors(y))
            if joined is not None:
                self.joined[joined] = i
            return y

        return noted

    def _mark(self) -> None:
        self.since.append(next_seq())
        self.at_work.append(self.stack[-1][0])

    def _follower(self, i: int, activation: str | None) -> int | None:
        """The activation behind layer `i` that a `Sequential` has it compute, if there is one."""
        around = self.modules[self.stack[-1][0]]
        if activation is None or not isinstance(around, Sequential):
            return None
        children = list(around)
        for layer, behind in pairwise(children):
            if layer is self.modules[i] and name_of(behind) == activation:
                return self.index[id(behind)]
        return None

    def _notice(
        self, made: Primitive, operands: Any, parameters: dict[str, Any], results: Any
    ) -> None:
        i, joined = self.stack[-1]
        cost = cost_of(made, operands, parameters, results)
        if joined is not None:
            self.costs[joined] += Cost(activation=cost.activation)
            cost = cost._replace(activation=0)
        self.costs[i] += cost

    def find_kept(self, outputs: Any) -> None:
        """Read from the graph of the net's results what its operations keep.

        Memory counts for the first that keeps it; views of one memory no more than that has.
        """
        roots = [y for y in _tensors(outputs) if y.requires_grad]
        if not roots:
            return
        counted: set[int] = set()
        sizes: dict[int, int] = {}
        owned = [_storage(x.data) for m in self.modules for _, x in _own(m)]
        owners = {id(owner): owner for owner in owned}  # held, so that an id stays its own
        own = {*owners}
        nodes = graph(roots).nodes
        for node in sorted(nodes, key=lambda node: node.number):
            if node.number < self.since[0]:
                continue
            i = self.at_work[bisect_right(self.since, node.number) - 1]
            for x in _arrays([saved.value for saved in node.saved]):
                owner = _storage(x)
                if id(owner) in own or id(x) in counted:
                    continue
                owners[id(owner)] = owner
                counted.add(id(x))
                space = SPACES[type(x)]
                before = sizes.get(id(owner), 0)
                size = before + space.nbytes(x)
                if is_array(owner):
                    size = min(size, SPACES[type(owner)].nbytes(owner))
                sizes[id(owner)] = size
                self.kept[i] += size - before

    def rows(self) -> list[Row]:
        """What was found, by module."""
        first: dict[int, str] = {}
        return [self._row(i, first) for i in range(len(self.modules))]

    def _row(self, i: int, first: dict[int, str]) -> Row:
        module, path = self.modules[i], self.paths[i]
        own, shared = [], []
        for name, p in module._own_parameters():
            if id(p) in first:
                shared.append((name, first[id(p)]))
            else:
                first[id(p)] = f"{path}.{name}" if path else name
                own.append(p)
        return Row(
            path, type(module).__name__, self.shapes[i], self.calls[i],
            parameters=sum(p.size for p in own),
            trainable=sum(p.size for p in own if p.requires_grad),
            multiply_adds=self.costs[i].multiply_adds,
            flops=self.costs[i].flops,
            parameter_bytes=sum(p.nbytes for p in own),
            activation_bytes=self.kept[i],
            shared=tuple(shared),
            joined=self.paths[self.joined[i]] if i in self.joined else "",
        )  # fmt: skip


def _own(module: Module) -> Iterator[tuple[str, Tensor]]:
    yield from module._own_parameters()
    yield from module._own_buffers()


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in what a module returned, which may be nested."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for part in value for x in _tensors(part)] if isinstance(value, list | tuple) else []


def _arrays(value: Any) -> list[Any]:
    """The arrays in what nodes keep: tensors, arrays, and lists of them."""
    if isinstance(value, Tensor):
        return [value.data]
    if isinstance(value, list | tuple):
        return [x for part in value for x in _arrays(part)]
    return [value] if is_array(value) else []


def _storage(x: Any) -> Any:
    return SPACES[type(x)].storage(x)


def _folded(rows: Sequence[Row], depth: int) -> list[Row]:
    """The rows down to a depth, with what lies deeper counted in them."""
    out: dict[str, Row] = {}
    for row in rows:
        if row.depth <= depth:
            out[row.path] = row
            continue
        path = ".".join(row.path.split(".")[:depth])
        around = out[path]
        inside = f"{path}." if path else ""
        names = tuple((f"{row.path}.{name}".removeprefix(inside), p) for name, p in row.shared)
        out[path] = replace(
            around,
            parameters=around.parameters + row.parameters,
            trainable=around.trainable + row.trainable,
            multiply_adds=around.multiply_adds + row.multiply_adds,
            flops=around.flops + row.flops,
            parameter_bytes=around.parameter_bytes + row.parameter_bytes,
            activation_bytes=around.activation_bytes + row.activation_bytes,
            shared=around.shared + names,
        )
    return list(out.values())
