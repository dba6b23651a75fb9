"""Node classes: one for each primitive and each set of operands that want a gradient.

A class has exactly the slots that its rules name, and methods that call the rules on them without
reading the declaration. What has no such class is a :class:`gpugrad.core.rules.GenericNode`.
"""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from typing import Any

from gpugrad.backend import SPACES, bind, on_register
from gpugrad.core.graph import FREED, MANY, PAIR, SINGLE, Node, destination
from gpugrad.core.primitive import HOME, PASS, Primitive, is_ours
from gpugrad.core.rules import fit

__all__ = [
    "FIT",
    "compiled",
    "has_joint_class",
    "has_rule_classes",
    "mask_of",
    "node_class",
    "saved_value",
]

#: Added to the mask of a node class that undoes broadcasting.
FIT = 256


def has_rule_classes(made: Primitive) -> bool:
    """Whether its function makes nodes of classes with a rule for each operand."""
    return (made.rules is not None and not made.aux and made.outputs == 1
            and len(made.operands) <= 3)  # fmt: skip


def has_joint_class(made: Primitive) -> bool:
    """Whether its function makes nodes of classes with one joint rule.

    What the rules of others return is looked at, which generic nodes do.
    """
    return (made.joint is not None and not made.variadic and made.outputs == 1
            and len(made.operands) < 8 and is_ours(made.forward))  # fmt: skip


def node_class(made: Primitive, key: int) -> type[Node]:
    """The node class for a mask of operands that want a gradient (plus FIT: undo broadcasting).

    It becomes the global ``node_<key>`` of the primitive's function, which asks here only once.
    """
    scope: dict[str, Any] = {
        "Node": Node, "SINGLE": SINGLE, "PAIR": PAIR, "MANY": MANY, "FREED": FREED, "fit": fit,
        "made": made, "SPACES": SPACES, "destination": destination,
    }  # fmt: skip

    def rebind() -> None:
        rules = {f"rule{i}": r for i, r in enumerate(made.rules or ())} | {"joint": made.joint}
        scope.update({name: bind(r.function) for name, r in rules.items() if r is not None})

    rebind()
    on_register(rebind)
    text = _joint_source(made, key) if made.joint is not None else _rules_source(made, key)
    exec(compiled(text, f"<gpugrad {made.name} node {key}>"), scope)
    cls: type[Node] = scope["Recorded"]
    cls.__name__ = cls.__qualname__ = f"{made.name}_{key}"
    made.function.__globals__[f"node_{key}"] = cls
    return cls


def compiled(text: str, filename: str) -> Any:
    """Code whose lines tracebacks can show."""
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    return compile(text, filename, "exec")


def mask_of(made: Primitive, key: int) -> tuple[bool, ...]:
    """Which operands want a gradient, from the key of a node class."""
    return tuple(bool(key >> i & 1) for i in range(len(made.operands)))


def _values(made: Primitive, key: int, rule_names: Sequence[str]) -> str:
    """What a rule asks for, as the arguments of the call in a method of the node."""
    mask = mask_of(made, key)
    wanted = [i for i, on in enumerate(mask) if on]
    names = made.saved_names(mask)
    order = list(made.parameters)
    values = []
    for n in rule_names:
        if n == "g":
            values.append("g")
        elif n == "m":
            values.append("SPACES[g.__class__]")
        elif n == "needs":
            values.append("self.mask")
        elif n in order:
            values.append(f"self.kw[{order.index(n)}]")
        elif n.endswith(HOME) and n not in names:
            operand = made.operands.index(n.removesuffix(HOME))
            wants = operand in wanted
            values.append(f"destination(self.p{wanted.index(operand)})" if wants else "None")
        else:
            values.append(f"self.s_{n}")
    return ", ".join(values)


def _rules_source(made: Primitive, key: int) -> str:
    """The text of a class with a rule for each operand."""
    assert made.rules is not None
    wanted = [i for i, on in enumerate(mask_of(made, key)) if on]

    def call(i: int) -> str:
        rule = made.rules[i]  # type: ignore[index]
        assert rule is not None
        if rule.function is PASS:
            text = "g"
        else:
            text = f"rule{i}({_values(made, key, rule.names)})"
        return f"fit({text}, self.meta[{i}])" if key >= FIT else text

    if len(wanted) == 1:
        result = call(wanted[0])
    elif len(wanted) == 2:
        result = f"(self.p0, {call(wanted[0])}, self.p1, {call(wanted[1])})"
    else:
        result = "(" + ", ".join(f"(self.p{k}, {call(i)})" for k, i in enumerate(wanted)) + ")"
    kind = ("SINGLE", "PAIR", "MANY")[len(wanted) - 1]
    return _class_source(made, key, kind, "", result)


def _joint_source(made: Primitive, key: int) -> str:
    """The text of a class with one rule for all operands, and a method that fills its slots."""
    assert made.joint is not None
    mask = mask_of(made, key)
    wanted = [i for i, on in enumerate(mask) if on]

    def brought(i: int) -> str:
        if key < FIT:
            return f"r[{i}]"
        return f"None if r[{i}] is None else fit(r[{i}], self.meta[{i}])"

    result = "(" + "".join(f"(self.p{k}, {brought(i)}), " for k, i in enumerate(wanted)) + ")"
    before = f"r = joint({_values(made, key, made.joint.names)})"
    lines = ["    def fill(self, parents, arrays, y, aux, kw):"]
    lines += [f"        self.p{k} = parents[{i}]" for k, i in enumerate(wanted)]
    lines += [f"        self.s_{n} = {saved_value(made, n)}" for n in made.saved_names(mask)]
    lines += ["        self.kw = kw"] * bool(made.parameters)
    return _class_source(made, key, "MANY", before, result) + "\n".join(lines) + "\n"


def saved_value(made: Primitive, name: str, array: str = "arrays[{}]") -> str:
    """The expression for what a node saves, in terms of the operands' arrays."""
    if name == "y":
        return "y"
    if name in made.aux:
        return f"aux[{made.aux.index(name)}]"
    for i, operand in enumerate(made.operands):
        u = array.format(i)
        if name == operand:
            return u
        if name == f"{operand}_shape":
            return f"getattr({u}, 'shape', ())" if made.joint else f"{u}.shape"
        if name == f"{operand}_dtype":
            return f"getattr({u}, 'dtype', None)" if made.joint else f"{u}.dtype"
        if name == f"{operand}_device":
            return f"SPACES[{u}.__class__].device({u})"
    raise AssertionError(name)


def _class_source(made: Primitive, key: int, kind: str, before: str, result: str) -> str:
    """The text of a class whose rules give `result`, pairs of parent and gradient."""
    mask = mask_of(made, key)
    wanted = [i for i, on in enumerate(mask) if on]
    names = made.saved_names(mask)
    order = list(made.parameters)
    fits = key >= FIT
    slots = [f"p{i}" for i in range(len(wanted))] + [f"s_{n}" for n in names]
    has_meta = fits or made.joint is not None
    slots += ["kw"] * bool(order) + ["meta"] * has_meta
    drop = " = ".join(f"self.{s}" for s in slots)
    parents = ", ".join(f"({i}, self.p{k})" for k, i in enumerate(wanted))
    saved = ", ".join(f"{n!r}: self.s_{n}" for n in names)
    kw = ", ".join(f"{n!r}: self.kw[{k}]" for k, n in enumerate(order))
    before = f"        {before}\n" if before else ""
    return f"""\
class Recorded(Node):
    __slots__ = {tuple(slots)!r}
    kind = {kind}
    primitive = made
    mask = {mask!r}
    def vjp(self, g):
{before}        return {result}
    def pop(self, g):
{before}        out = {result}
        self.seq = FREED
        {drop} = None
        return out
    def clear(self):
        self.seq = FREED
        {drop} = None
    def parents(self):
        return [{parents}]
    def saved(self):
        return {{{saved}}}
    def parameters(self):
        return {{{kw}}}
    def metas(self):
        return {"self.meta" if has_meta else "None"}
"""
