"""Declaring a primitive: forward, derivative, what it saves, samples and words, in one place.

The forward of a primitive is an ordinary function ``f(m, operands..., /, parameters...)``: ``m`` is
the namespace of the array library, the positional-only arguments after it are the arrays that can
be differentiated, everything behind the ``/`` is a plain parameter (an axis, a flag).

A *rule* is a function whose argument names say what it needs, and a recorded node saves exactly
that:

=================  ============================================================================
``g``              the gradient that arrives from above (for a jvp rule: ``t``, the tangent)
``m``              the namespace: the array library's, or gpugrad's own when the derivative is
                   itself recorded, so that one text serves every order
an operand         that operand's array, under the name it has in the forward; of a variadic one,
                   the list of all, and so it is with what follows
``y``              the result
``x_shape``        the shape of operand ``x`` (nothing else of it is kept)
``x_dtype``        its dtype
``x_device``       where it lives, a device string
``x_home``         an array to write the gradient of ``x`` into and return, or None (raw gradients
                   of leaves whose optimiser keeps memory for them)
a parameter        the value it was called with
an ``aux`` name    an array that the forward returned beside its result
``needs``          (joint rules) a tuple of booleans: which operands want a gradient
=================  ============================================================================
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from keyword import iskeyword
from types import SimpleNamespace
from typing import Any

from gpugrad.backend import Backend
from gpugrad.errors import DeclarationError

#: The differentiable operations under their own names: the ``m`` of a rule whose result is
#: recorded. Declaring a primitive puts it here; :func:`composite` adds functions made of them.
differentiable = SimpleNamespace(slots={})


def PASS(g: Any) -> Any:
    """The rule of an addition node: hand the gradient on as it is, and save nothing."""
    return g


#: What a rule can ask of an operand ``x``: itself, ``x_shape``, ``x_dtype``, ``x_device``.
FACETS = ("", "_shape", "_dtype", "_device")

#: What a rule can be given of an operand besides, when it runs: nothing is saved for it.
HOME = "_home"

#: Names that a rule or the generated code around it gives a meaning of its own.
RESERVED = frozenset({
    "SCALARS", "SPACES", "Tensor", "aux", "cast_operands", "casting_",
    "complex", "error", "fail", "foreign", "forward", "g",
    "gate_", "implement", "implementations", "isinstance", "kind", "kind_of", "kwargs", "lift",
    "key_", "lift_all", "m", "made", "meta_of", "n", "needs", "next_seq", "node_class", "nodes",
    "normalise",
    "parents", "record", "records", "same", "t", "y",
})  # fmt: skip

#: The generated code's names for arrays, graph nodes and node classes.
_NUMBERED = re.compile("[pu][0-9]+|(default|node)_.*")

#: Every primitive by name.
registry: dict[str, Primitive] = {}

#: Every composite (a public function made of primitives) by name.
composites: dict[str, Composite] = {}


@dataclass(frozen=True)
class Sample:
    """One set of arguments to try an operation on.

    Attributes
    ----------
    args:
        Operands. A tuple of integers in a :class:`Normal`, or nested lists and arrays as they are.
    kwargs:
        Parameters.
    smooth:
        False when finite differences do not apply (a kink, an integer result).
    note:
        What the sample is there to show.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    smooth: bool = True
    note: str = ""


def sample(*args: Any, smooth: bool = True, note: str = "", **kwargs: Any) -> Sample:
    """A :class:`Sample` written as the call it stands for."""
    return Sample(args, kwargs, smooth, note)


class Rule:
    """A derivative rule and the names it asks for."""

    __slots__ = ("function", "names")

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.names = tuple(inspect.signature(function).parameters)


@dataclass(eq=False)
class Primitive:
    """One differentiable operation. Made by the decorators of this module."""

    name: str
    forward: Callable[..., Any]
    doc: str
    operands: tuple[str, ...]
    variadic: bool
    parameters: dict[str, inspect.Parameter]
    native: str | None = None
    rules: tuple[Rule | None, ...] | None = None
    joint: Rule | None = None
    jvps: tuple[Rule | None, ...] | None = None
    elementwise: bool = False
    linear: bool = False
    broadcasts: bool = False
    view: bool = False
    aux: tuple[str, ...] = ()
    outputs: int | str = 1
    advice: str = ""
    samples: Sequence[Sample] | Callable[[], Sequence[Sample]] = ()
    reference: Callable[..., Any] | None = None
    function: Callable[..., Any] = field(init=False, repr=False)
    implementations: dict[type, Callable[..., Any]] = field(init=False, repr=False)
    #: Whether the shape of the result depends on the values of an operand, or the name of the
    #: parameter whose boolean arrays it depends on.
    sized_by_values: bool | str = False
    #: The function's generated text, compiled at the first call.
    text: Any = field(default=None, init=False, repr=False)

    @property
    def differentiable(self) -> bool:
        return self.rules is not None or self.joint is not None

    @property
    def fits(self) -> bool:
        """Whether gradients are brought to the shape and dtype of their operands.

        The rule of an operation that leaves shapes alone, or is linear, gets both right by itself;
        when somebody else wrote it, it is looked at, because a wrong one would go unnoticed.
        """
        if self.linear or (self.elementwise and len(self.operands) == 1):
            return not is_ours(self.forward)
        return self.broadcasts

    @property
    def may_broadcast(self) -> bool:
        """Whether it depends on the call if gradients must be brought to their operands' shape.

        It does in a binary element-wise operation of ours: only after broadcasting or promotion.
        """
        return self.elementwise and len(self.operands) == 2 and is_ours(self.forward)

    def saved_names(self, mask: Sequence[bool]) -> tuple[str, ...]:
        """What a node saves when the operands in ``mask`` want a gradient, in a fixed order."""
        if self.joint is not None:
            wanted = set(self.joint.names)
        else:
            assert self.rules is not None
            wanted = set()
            for i, rule in enumerate(self.rules):
                if rule is not None and (self.variadic or mask[i]):
                    wanted.update(rule.names)
            for i, rule in enumerate(self.jvps or ()):
                if rule is not None and (self.variadic or mask[i]):
                    wanted.update(rule.names)
        known = [n + s for n in self.operands for s in FACETS]
        return tuple(n for n in (*known, "y", *self.aux) if n in wanted)

    def __repr__(self) -> str:
        return f"<primitive {self.name}>"


@dataclass(eq=False)
class Composite:
    """A public function made of primitives; it has samples and a reference as they have."""

    name: str
    function: Callable[..., Any]
    samples: Sequence[Sample] | Callable[[], Sequence[Sample]] = ()
    reference: Callable[..., Any] | None = None


def composite(
    *,
    samples: Sequence[Sample] | Callable[[], Sequence[Sample]],
    reference: Callable[..., Any] | None = None,
    name: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function made of primitives, so that rules and the test harness find it."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        key = name or function.__name__
        _claim(key, function)
        composites[key] = Composite(key, function, samples, reference)
        setattr(differentiable, key, function)
        return function

    return register


def elementwise(
    *,
    partials: Sequence[Callable[..., Any] | None] | None,
    native: str | None = None,
    samples: Sequence[Sample] | Callable[[], Sequence[Sample]] = (),
    reference: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare an element-wise primitive.

    A partial is a rule for one operand that returns ``g`` times the derivative with respect to it.
    Its Jacobian is diagonal, so the same rule multiplies gradients going back and tangents going
    forward. Broadcasting and promotion are undone by the engine, never by a rule.

    Parameters
    ----------
    partials:
        One rule per operand; None for an operand that has no derivative (a condition). None in
        place of the tuple declares an operation without any derivative (a comparison).
    native:
        The name of the array library's own function, if it is the whole forward: the body of the
        declaration is then ``...`` and a call goes straight to the library.
    samples, reference:
        Arguments to try it on, and a NumPy function that says what should come out.
    """
    return _declare(rules=partials, native=native, samples=samples, reference=reference,
                    elementwise=True, broadcasts=True)  # fmt: skip


def linear(
    *,
    transpose: Callable[..., Any],
    native: str | None = None,
    view: bool = False,
    sized_by_values: bool | str = False,
    advice: str = "",
    samples: Sequence[Sample] | Callable[[], Sequence[Sample]] = (),
    reference: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a primitive that is linear in its one operand.

    ``transpose`` is its vjp rule; its jvp is the forward itself. ``view=True`` says that the result
    may share the operand's memory. ``sized_by_values`` and ``advice`` as for :func:`primitive`.
    """
    return _declare(rules=(transpose,), native=native, samples=samples, reference=reference,
                    linear=True, view=view, sized_by_values=sized_by_values,
                    advice=advice)  # fmt: skip


def primitive(
    *,
    vjps: Sequence[Callable[..., Any] | None] | None = None,
    vjp: Callable[..., Any] | None = None,
    jvps: Sequence[Callable[..., Any] | None] | None = None,
    native: str | None = None,
    broadcasts: bool = True,
    view: bool = False,
    aux: Sequence[str] = (),
    outputs: int | str = 1,
    sized_by_values: bool | str = False,
    advice: str = "",
    samples: Sequence[Sample] | Callable[[], Sequence[Sample]] = (),
    reference: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare any other primitive.

    Parameters
    ----------
    vjps:
        One rule per operand, None where there is no derivative.
    vjp:
        In place of ``vjps``: one joint rule that returns the gradients of all operands at once (a
        tuple, None where ``needs`` is False), for work that they share. A primitive with a
        variadic operand (``*arrays``) takes this form.
    jvps:
        One rule per operand that names ``t``, its tangent, and returns that operand's share of the
        result's tangent. Left out, forward mode transposes the vjp.
    broadcasts:
        Whether the engine sums a gradient down to its operand's shape and casts it to its dtype;
        True unless rules always return the right shape.
    aux:
        Names of arrays that the forward returns beside its result, ``return y, mask``, for the
        rules. They count as constants.
    outputs:
        Number of results, when the forward returns a tuple of several; ``"many"`` when it depends
        on the call. The joint rule's ``g`` is then a list with a gradient or None for each.
    sized_by_values:
        Whether the shape of the result depends on the values of an operand; or the name of the
        parameter whose boolean arrays it depends on.
    advice:
        What to do about shapes that do not fit: the end of the error message.
    """
    if vjps is not None and vjp is not None:
        raise DeclarationError("give vjps (a rule per operand) or vjp (one joint rule), not both")
    return _declare(rules=vjps, joint=vjp, jvps=jvps, native=native, samples=samples,
                    reference=reference, broadcasts=broadcasts, view=view, aux=tuple(aux),
                    outputs=outputs, sized_by_values=sized_by_values,
                    advice=advice)  # fmt: skip


def _declare(
    *,
    rules: Sequence[Callable[..., Any] | None] | None,
    joint: Callable[..., Any] | None = None,
    jvps: Sequence[Callable[..., Any] | None] | None = None,
    **options: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def declare(forward: Callable[..., Any]) -> Callable[..., Any]:
        name = forward.__name__.removesuffix("_")
        _claim(name, forward)
        operands, variadic, parameters = _read_signature(name, forward)
        made = Primitive(
            name=name,
            forward=forward,
            doc=inspect.getdoc(forward) or "",
            operands=operands,
            variadic=variadic,
            parameters=parameters,
            rules=None if rules is None else tuple(r and Rule(r) for r in rules),
            joint=joint and Rule(joint),
            jvps=None if jvps is None else tuple(r and Rule(r) for r in jvps),
            **options,
        )
        _check(made)
        from gpugrad.core.codegen import build  # the engine's half; it needs Tensor, which needs us

        build(made)
        registry[name] = made
        setattr(differentiable, name, made.function)
        return made.function

    return declare


def is_ours(function: Any) -> bool:
    """Whether it is one of the library, and not of a user."""
    return str(getattr(function, "__module__", "")).startswith("gpugrad.")


def _claim(name: str, function: Callable[..., Any]) -> None:
    """Refuse a name of the library's own to others: rules here are written with it."""
    taken = is_ours(getattr(differentiable, name, None)) or hasattr(Backend, name)
    if taken and not is_ours(function):
        raise DeclarationError(
            f"{name}: gpugrad has an operation of this name, with which other derivatives are "
            "computed; give yours another one"
        )


def _read_signature(
    name: str, forward: Callable[..., Any]
) -> tuple[tuple[str, ...], bool, dict[str, inspect.Parameter]]:
    first, *rest = inspect.signature(forward).parameters.values()
    if first.name != "m":
        raise DeclarationError(f"{name}: the first argument of a forward is m, the namespace")
    operands = tuple(p.name for p in rest if p.kind is p.POSITIONAL_ONLY)
    variadic = [p.name for p in rest if p.kind is p.VAR_POSITIONAL]
    if bool(operands) == bool(variadic):
        raise DeclarationError(
            f"{name}: operands are the positional-only arguments, f(m, a, b, /, axis=None), "
            "or one *arrays, f(m, *arrays, axis=0)"
        )
    parameters = {p.name: p for p in rest if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return operands or tuple(variadic), bool(variadic), parameters


def _check(made: Primitive) -> None:
    """Refuse a declaration whose rules ask for something that does not exist."""
    names = {*made.operands, *made.parameters}
    taken = {n for n in names if n in RESERVED or _NUMBERED.fullmatch(n)}
    if made.variadic:
        taken |= {"arrays"} & {*made.parameters}
    if taken:
        raise DeclarationError(
            f"{made.name}: {sorted(taken)} are names of the engine's own; choose others for "
            "operands and parameters"
        )
    for n in made.operands:
        for facet in (*FACETS[1:], HOME):
            if n + facet in names:
                raise DeclarationError(
                    f"{made.name}: {n + facet!r} is what a rule calls the {facet[1:]} of {n!r}; "
                    "give the argument another name"
                )
    count = len(made.operands)
    for kind, rules in (("derivative rule", made.rules), ("jvp rule", made.jvps)):
        if rules is not None and len(rules) != count:
            raise DeclarationError(
                f"{made.name}: {len(rules)} {kind}s for {count} operands {made.operands}; "
                "give one per operand, None where there is no derivative"
            )
    if made.variadic and made.rules is not None:
        raise DeclarationError(f"{made.name}: a variadic primitive takes one joint rule, vjp=")
    if made.outputs != 1 and (made.rules is not None or made.aux):
        raise DeclarationError(f"{made.name}: several outputs take one joint rule and no aux")
    known = {n + s for n in made.operands for s in (*FACETS, HOME)}
    known |= {"m", "g", "t", "y", "needs", *made.parameters, *made.aux}
    for rule in (*(made.rules or ()), made.joint, *(made.jvps or ())):
        for n in rule.names if rule is not None else ():
            if n not in known:
                raise DeclarationError(
                    f"{made.name}: a rule names {n!r}, which is neither an operand, nor a "
                    f"parameter, nor one of m, g, t, y, needs; known here: {sorted(known)}"
                )
    if not made.name.isidentifier() or iskeyword(made.name):
        raise DeclarationError(f"{made.name}: declare an operation by a def with a name to call it")
