"""The text of a program: what a trace did, line by line, forward and backward."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from gpugrad.backend import SPACES, Array, bind
from gpugrad.backend.kernels import Settled
from gpugrad.core import graph
from gpugrad.core.codegen import implement, normalise
from gpugrad.core.graph import (
    HOOKED,
    Node,
    Pick,
    destination,
    mutations,
)
from gpugrad.core.primitive import FACETS, HOME, PASS, Rule, is_ours
from gpugrad.core.rules import fit
from gpugrad.core.steps import Action, End, Name, Same, Step, Walk, Wrapped, Write, source_of
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.core.trace import Trace
from gpugrad.errors import CompileError, GraphError

__all__ = ["Writer"]


class Writer:
    """Writes the text of a program, and finds what its names stand for."""

    def __init__(self, trace: Trace, earlier: Trace, outputs: Sequence[Tensor]) -> None:
        self.trace = trace
        self.scope: dict[str, Any] = {
            "destination": destination, "fit": fit, "plus": graph.plus, "joined": _joined,
            "into": _into, "normalise": normalise, "write": _write, "copy": _copy,
            "tensor_of": tensor_of, "there": _there,
        }  # fmt: skip
        #: Rules by name that choose among kernels anew in each call.
        self.open_rules: dict[str, Any] = {}
        self._constants: dict[int, str] = {}
        self.tensors: list[Tensor] = []
        self._sources: dict[Name, Any] = {}
        for name, found in trace.captured.items():
            source = source_of(earlier.captured[name], found)
            if isinstance(source, Tensor):
                self.tensors.append(source)
            self._sources[name] = source
        self.names = [self._output(x) for x in outputs]
        #: Tensors whose nodes the way back ends at; a number is that of an input.
        self.ends: list[Tensor | int] = []
        self.differentiable: list[int] = []
        self.kept: list[Name] = []
        self._steps = {
            id(step.node): step
            for step in trace.steps
            if isinstance(step, Step) and step.node is not None
        }
        self._grads: dict[str, str] = {}  # variable → "some", "none" for perhaps None, "own"
        self._ends: dict[int, str] = {}  # node where the way back ends → its name
        self._arriving: dict[int, Name] = {}  # likewise → the name of what arrives there
        self._since = trace.since
        self._variables: set[str] = set()
        #: The nodes that a function uses which runs backward itself, as it comes by them.
        self._nodes: dict[str, str] = {}
        #: The lines of each walk, by its identity, and the names from the way there in them.
        self._walks: dict[int, tuple[list[list[str]], list[Name]]] = {}
        for step in trace.steps:
            if isinstance(step, Walk):
                self._add_walk(step)
        back = None if trace.acts else self._backward(outputs)
        self.text = self._forward() + ("\n\n" + back if back else "")

    def _output(self, x: Tensor) -> Name:
        return self.trace.names[id(x.data)]

    def _bound(self, base: str, value: Any) -> str:
        """A name in the program's scope for an object."""
        if id(value) not in self._constants:
            name, number = base, 1
            while name in self.scope:
                number += 1
                name = f"{base}_{number}"
            self.scope[name] = value
            self._constants[id(value)] = name
        return self._constants[id(value)]

    def _write(self, value: Any) -> str:
        """An expression of the program."""
        if isinstance(value, Name):
            return str(value)
        if isinstance(value, End):
            return self._node(value.value)
        if isinstance(value, Same):
            kind = type(value.value).__name__.lower()
            return self._bound(kind if kind.isidentifier() else "c1", value.value)
        if isinstance(value, Wrapped):
            return f"tensor_of({value.name})"
        if type(value) is dict:
            pairs = (f"{self._write(key)}: {self._write(x)}" for key, x in value.items())
            return "{" + ", ".join(pairs) + "}"
        if isinstance(value, tuple) and type(value) is tuple:
            return f"({_listed([self._write(x) for x in value])})"
        if type(value) is list:
            return "[" + ", ".join(self._write(x) for x in value) + "]"
        if type(value) is slice:
            return f"slice({', '.join(map(self._write, (value.start, value.stop, value.step)))})"
        plain = type(value) in (int, bool, str, type(None)) or value is Ellipsis
        if plain or (type(value) is float and math.isfinite(value)):
            return repr(value)
        return self._bound("c1", value)

    # -- forward ----------------------------------------------------------------------------------

    def _forward(self) -> str:
        trace = self.trace
        head = [f"def forward({', '.join(f'x{i}' for i in range(len(trace.inputs)))}):"]
        for i, (generator, _) in enumerate(trace.draws):
            head.append(f"    s{i}, o{i} = {self._bound('generator', generator)}.stream()")
        loads: dict[int, list[str]] = {}  # those of a tensor that has a new array since a step
        for name, source in self._sources.items():
            if isinstance(source, Tensor):
                line = f"    {name} = {self._bound(f'tensor_{name}', source)}.data"
                loads.setdefault(trace.captured[name].after, []).append(line)
            else:
                self.scope[name] = source
        stays = {*self.names, *self.kept}
        blocks = [loads.pop(0, [])]
        needed = self._needed(stays)
        for i, step in enumerate(trace.steps):
            blocks.append(loads.pop(i, []))
            if i not in needed:
                continue
            if isinstance(step, Walk):
                blocks += self._walks[id(step)][0]
            else:
                blocks.append(self._lines(step))
        blocks.append(loads.pop(len(trace.steps), []))  # what is only returned
        results = [
            f"copy({name})" if self._is_constant(name) else name for name in self.names
        ]  # fmt: skip
        mine: set[str] = {
            name
            for step in trace.steps
            if isinstance(step, Step | Action)
            for name in (*step.results, *self._aux(step))
        }
        mine |= self._variables
        lines = [*head, *(f"    {p} = {found}" for p, found in self._nodes.items())]
        lines += _released(blocks, mine - stays)
        return "\n".join((*lines, f"    return [{', '.join(results)}], [{', '.join(self.kept)}]"))

    def _needed(self, stays: set[Name]) -> set[int]:
        """The numbers of the steps whose results somebody asks for, and of what changes things."""
        asked = {*stays}
        found: set[int] = set()
        for i, step in reversed([*enumerate(self.trace.steps)]):
            if isinstance(step, Write):
                asked |= {*_names_in((step.target, step.index, step.value))}
            elif isinstance(step, Walk):
                asked |= {*self._walks[id(step)][1], *_names_in([g for _, g in step.seeds])}
            elif isinstance(step, Action):
                asked |= {*_names_in((step.args, step.kwargs))}
            elif asked.isdisjoint(step.results) and asked.isdisjoint(self._aux(step)):
                continue
            else:
                asked |= {*_names_in((*step.operands, *step.parameters.values()))}
            found.add(i)
        return found

    def _lines(self, step: Step | Write | Action) -> list[str]:
        """The lines of what is no walk."""
        lines: list[str] = []
        if isinstance(step, Write):
            values = (step.target, step.index, step.value)
            lines.append(f"    write({', '.join(map(self._write, values))})")
        elif isinstance(step, Action):
            given = [self._write(x) for x in step.args]
            given += [f"{name}={self._write(x)}" for name, x in step.kwargs.items()]
            call = f"{self._bound(step.function.__name__, step.function)}({', '.join(given)})"
            lines += [f"    {name} = {call}.data" for name in step.results] or [f"    {call}"]
        else:
            self._add_step(lines, step)
        return lines

    def _add_step(self, lines: list[str], step: Step) -> None:
        made, kind = step.made, step.kind
        space = SPACES[kind]
        if made.native is None and made.name in space.slots:
            found = space.bind(partial(Settled(made.name, made.forward), space))
        else:
            found = made.implementations.get(kind) or implement(made, kind)
        values = [self._write(x) for x in step.operands]
        values += [f"{name}={self._write(x)}" for name, x in step.parameters.items()]
        call = f"{self._bound(made.name, found)}({', '.join(values)})"
        (first, *_) = names = step.results
        if made.outputs != 1:
            lines.append(f"    {_listed(names)} = {call}")
        elif made.aux:
            lines.append(f"    {_listed((first, *self._aux(step)))} = {call}")
        else:
            lines.append(f"    {first} = {call}")
        if made.outputs == 1 and step.shapes == [()] and "device" not in made.parameters:
            lines.append(f"    {first} = normalise({first}, {self._bound('kind', kind)})")

    @staticmethod
    def _aux(step: Any) -> list[Name]:
        if not isinstance(step, Step):
            return []
        return [Name(f"{step.results[0]}_{name}") for name in step.made.aux]

    # -- backward ---------------------------------------------------------------------------------

    def _backward(self, outputs: Sequence[Tensor]) -> str | None:
        """The text of the way back; None if there is none."""
        body: list[list[str]] = [[]]
        waiting: dict[int, Any] = {}
        several = len(outputs) > 1
        seeds = []
        for i, y in enumerate(outputs):
            if y._node is not None:
                self.differentiable.append(i)
                variable = self._arrive(waiting, y._node, outputs)
                seeds.append((i, variable))
        if not seeds:
            return None
        for i, variable in seeds:
            value = f"g.get({i})" if several else "g"
            self._add_to(body[0], variable, value, several)
        self._add_nodes(body, waiting)
        ends = [*self._ends.values()]
        kept = [*dict.fromkeys(self.kept)]
        self.kept = kept
        lines = ["def backward(g, kept, ends):"]
        if kept:
            lines += [f"    {_listed(kept)} = kept", "    kept.clear()"]
        lines.append(f"    {_listed(ends)} = ends")
        mine = {x for x in self._grads if not x.startswith("g_p")}
        lines += _released(body, mine | {*kept} - {*self.trace.captured})
        lines.append(f"    return {_listed([f'({p}, g_{p})' for p in ends])}")
        return "\n".join(lines)

    def _add_nodes(self, blocks: list[list[str]], waiting: dict[int, Any]) -> None:
        """The lines of all nodes that wait, and of those behind them."""
        while waiting:
            node = max(waiting.values(), key=lambda n: n.seq)
            del waiting[id(node)]
            blocks.append(self._node_lines(waiting, node))

    def _add_walk(self, step: Walk) -> None:
        """The lines of a walk that the function itself runs."""
        self.kept, self._grads = [], {}
        self._since = max(step.since, self.trace.since)
        self._arriving = {id(end): name for end, name in step.ends}
        blocks: list[list[str]] = [[]]
        waiting: dict[int, Any] = {}
        for seed, g in step.seeds:
            variable = self._arrive(waiting, seed, [])
            # Whoever keeps a gradient may change it.
            value = f"copy({g})" if self._is_constant(g) else g
            self._add_to(blocks[0], variable, value, False)
        self._add_nodes(blocks, waiting)
        perhaps = [name for _, name in step.ends if self._grads[name] == "none"]
        blocks.append([f"    there({name})" for name in perhaps])
        self._walks[id(step)] = blocks, self.kept
        self._variables |= {*self._grads}
        self.kept = []

    def _node(self, leaf: Any) -> str:
        """The name of a leaf in a function that runs backward itself."""
        if id(leaf) not in self._ends:
            for name, source in self._sources.items():
                if isinstance(source, Tensor) and source._node is leaf:
                    p = self._ends[id(leaf)] = f"p{len(self._ends)}"
                    self._nodes[p] = f"{self._bound(f'tensor_{name}', source)}._node"
                    break
            else:
                raise CompileError(
                    f"compile: {self.trace.name} keeps a gradient in .grad of a tensor that is an "
                    "argument, or that it makes itself; use gg.grad, and return the gradient"
                )
        return self._ends[id(leaf)]

    def _arrive(self, waiting: dict[int, Any], parent: Any, tensors: Sequence[Any]) -> str:
        """The variable of the gradient that a node of the graph gets."""
        index = ""
        if isinstance(parent, Pick) and parent.seq > self._since:
            index = f"_{parent.index}"
            parent = parent.p0
        if parent.seq > self._since:
            step = self._steps.get(id(parent))
            if step is None or parent.kind == HOOKED:
                what = "a hook of a tensor" if parent.kind == HOOKED else parent.primitive.name
                raise CompileError(
                    f"compile: {self.trace.name} has {what} in its graph, which runs Python on the "
                    "way back; leave it out of the function, or call the function as it is"
                )
            waiting[id(parent)] = parent
            return f"g_{step.results[int(index[1:]) if index else 0]}"
        if self.trace.acts:
            return self._arriving.get(id(parent)) or self._refused(parent)
        if id(parent) not in self._ends:
            self._ends[id(parent)] = f"p{len(self._ends)}"
            self.ends.append(self._end(parent, tensors))
        return f"g_{self._ends[id(parent)]}"

    def _refused(self, end: Any) -> str:
        """A variable that nothing arrives at; an error where the walk goes on outside."""
        if end.seq:
            raise CompileError(
                f"compile: {self.trace.name} runs a backward pass that goes on outside of it; "
                "detach what it is given, or leave backward() outside, too"
            )
        return "g_"

    def _end(self, parent: Any, tensors: Sequence[Any]) -> Tensor | int:
        """The tensor whose node this is where the way back ends, or the number of an input."""
        tensor = next((x for x in tensors if x is not None and x._node is parent), None)
        if tensor is None:
            raise CompileError(
                f"compile: {self.trace.name} gives a tensor another place in the graph (+= on one "
                "that is recorded); write x = x + y"
            )
        for i, x in enumerate(self.trace.inputs):
            if x is tensor or x._node is parent:
                return i
        name = self.trace.sources[id(tensor.data)]
        source = self._sources[name]
        assert isinstance(source, Tensor)
        return source

    def _add_to(self, lines: list[str], variable: str, value: str, perhaps: bool) -> None:
        """Add a gradient to a variable, as the walk through a graph adds them."""
        state = self._grads.get(variable)
        if state is None:
            lines.append(f"    {variable} = {value}")
            self._grads[variable] = "none" if perhaps else "some"
        elif perhaps or state == "none":
            lines.append(f"    {variable} = joined({variable}, {value})")
            self._grads[variable] = "none" if perhaps and state == "none" else "some"
        elif state == "own":
            lines.append(f"    {variable} = into({variable}, {value})")
        else:
            lines.append(f"    {variable} = plus({variable}, {value})")
            self._grads[variable] = "own"

    def _node_lines(self, waiting: dict[int, Any], node: Node) -> list[str]:
        """The lines of one node."""
        lines: list[str] = []
        step = self._steps[id(node)]
        made = step.made
        arrived = [f"g_{name}" for name in step.results]
        known = [x for x in arrived if x in self._grads]
        several = made.outputs != 1
        perhaps = all(self._grads[x] == "none" for x in known)
        g = arrived[0]
        if several:
            g = "[" + ", ".join(x if x in known else "None" for x in arrived) + "]"
        parents = dict(node.parents())
        metas = node.metas() if made.fits else None
        targets = {i: self._arrive(waiting, parent, step.tensors) for i, parent in parents.items()}
        body: list[str] = []
        if perhaps:  # then what it would have reached may stay without
            lines += [f"    {x} = None" for x in dict.fromkeys(targets.values())
                      if x not in self._grads]  # fmt: skip
            self._grads |= {x: "none" for x in targets.values() if x not in self._grads}
            lines.append(f"    if {' or '.join(f'{x} is not None' for x in known)}:")
        if made.joint is not None:
            values = self._values(step, node, made.joint.names, g)
            call = self._rule(f"{made.name}_vjp", made.joint)
            body.append(f"    r = {call}({values})")
            others = not is_ours(made.forward)  # theirs may be None where one is needed
            for i, target in targets.items():
                value = self._fitted(f"r[{i}]", metas, i, others)
                self._add_to(body, target, value, perhaps or others)
            body.append("    del r")
        else:
            assert made.rules is not None
            for i, target in targets.items():
                rule = made.rules[i]
                if rule is None:
                    continue
                if rule.function is PASS:
                    value = g
                else:
                    name = self._rule(f"{made.name}_vjp{i}", rule)
                    value = f"{name}({self._values(step, node, rule.names, g)})"
                self._add_to(body, target, self._fitted(value, metas, i, False), perhaps)
        return lines + ([f"    {x}" for x in body] if perhaps else body)

    def _rule(self, name: str, rule: Rule) -> str:
        settled = getattr(rule.function, "settled", None)
        if settled is None:
            return self._bound(name, bind(rule.function))
        found = self._bound(name, bind(settled()))
        self.open_rules[found] = bind(rule.function)
        return found

    def _fitted(self, value: str, metas: Any, i: int, perhaps: bool) -> str:
        if metas is None:
            return value
        meta = self._bound("meta", metas[i])
        return f"None if {value} is None else fit({value}, {meta})" if perhaps else (
            f"fit({value}, {meta})"
        )  # fmt: skip

    def _values(self, step: Step, node: Node, names: Sequence[str], g: str) -> str:
        """What a rule asks for, as the arguments of its call."""
        made = step.made
        saved = node.saved()
        parents = dict(node.parents())
        operands = dict(zip(made.operands, step.operands))
        found = []
        for name in names:
            if name == "g":
                found.append(g)
            elif name == "m":
                found.append(self._bound("m", SPACES[step.kind]))
            elif name == "needs":
                found.append(self._write(tuple(node.mask)))  # type: ignore[attr-defined]
            elif name in made.parameters:
                found.append(self._kept(step.parameters[name]))
            elif name.endswith(HOME) and name not in saved:
                if made.variadic:
                    over = range(len(step.operands))
                    homes = [self._home(parents.get(i)) for i in over]
                    found.append(f"[{', '.join(homes)}]")
                else:
                    i = made.operands.index(name.removesuffix(HOME))
                    found.append(self._home(parents.get(i)))
            elif name == "y":
                several = made.outputs != 1
                found.append(self._kept(tuple(step.results) if several else step.results[0]))
            elif name in made.aux:
                found.append(self._kept(self._aux(step)[made.aux.index(name)]))
            elif name in operands:
                value = step.operands if made.variadic else operands[name]
                found.append(self._kept(value))
            else:  # what is known of an operand without its elements
                assert name.endswith(FACETS[1:]), name
                found.append(self._write(saved[name]))
        return ", ".join(found)

    def _home(self, parent: Any) -> str:
        if self.trace.acts:
            known = isinstance(parent, graph.Leaf) and parent.home is not None
            return f"destination({self._node(parent)})" if known else "None"
        number = self._ends.get(id(parent))
        return "None" if number is None else f"destination({number})"

    def _kept(self, value: Any) -> str:
        """An expression of the way back: its names are kept for it."""
        for name in _names_in(value):
            if not self._is_constant(name):
                self.kept.append(name)
        return self._write(value)

    def _is_constant(self, name: Name) -> bool:
        """Whether it is an array that is the same in every call."""
        return name in self._sources and not isinstance(self._sources[name], Tensor)


def _listed(names: Sequence[str]) -> str:
    """Names as Python writes a tuple, without its brackets."""
    return ", ".join(names) + "," * (len(names) == 1)


def _names_in(value: Any) -> list[Name]:
    if isinstance(value, Name):
        return [value]
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, tuple | list):
        return [name for x in value for name in _names_in(x)]
    return []


def _released(blocks: Sequence[Sequence[str]], names: set[str]) -> list[str]:
    """The lines of all blocks; each variable is released behind the last block that names it."""
    seen: set[str] = set()
    found: list[str] = []
    for block in reversed(blocks):
        words = set(re.findall(r"\w+", "\n".join(block))) & names - seen
        seen |= words
        found += [f"    del {', '.join(sorted(words))}"] * bool(words)
        found += reversed(block)
    return found[::-1]


# -- what programs call ----------------------------------------------------------------------------


def _joined(total: Any, g: Any) -> Any:
    """The sum of two gradients, each of which may be None."""
    return total if g is None else g if total is None else graph.plus(total, g)


def _into(total: Any, g: Any) -> Any:
    """The sum of a gradient that nobody else sees and another."""
    if total.shape == () or not SPACES[type(total)].mutable:
        return graph.plus(total, g)
    graph.add_into(total, g)
    return total


def _copy(x: Array) -> Array:
    space = SPACES[type(x)]
    return space.asarray(x, device=space.device(x), copy=True)


def _there(g: Any) -> None:
    """Refuse a gradient that is not there, and was when the program was made."""
    if g is None:
        raise GraphError("a compiled backward pass: a rule gives None where it gave a gradient")


def _write(target: Array, index: Any, value: Any) -> None:
    SPACES[type(target)].setitem(target, index, value)
    mutations.mark(target)
