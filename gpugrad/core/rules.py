"""Running the derivative rules of one node, as they were declared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpugrad.backend import SPACES, Array, Backend, bind
from gpugrad.core.graph import FREED, Bundle, Node, Pick, destination, next_seq
from gpugrad.core.primitive import FACETS, HOME, Primitive, Rule, differentiable
from gpugrad.errors import DeclarationError, DTypeError, ShapeError


class GenericNode(Node):
    """A node for what has no generated class: variadic operands, joint rules, several outputs."""

    __slots__ = ("_metas", "_parameters", "_parents", "_saved", "mask", "outputs", "primitive")
    primitive: Primitive  # type: ignore[misc]

    def __init__(
        self,
        primitive: Primitive,
        parents: tuple[Any, ...],
        saved: dict[str, Any],
        parameters: dict[str, Any],
        metas: tuple[Any, ...],
    ) -> None:
        self.seq = next_seq()
        self.primitive = primitive
        self.mask = tuple([p is not None for p in parents])
        self._parents = parents
        self._saved = saved
        self._parameters = parameters
        self._metas = metas
        self.outputs = 1

    def vjp(self, g: Any) -> Any:
        return pullback(self, g, None)

    def pop(self, g: Any) -> Any:
        out = pullback(self, g, None)
        self.clear()
        return out

    def clear(self) -> None:
        self.seq = FREED
        self._parents = ()
        self._saved = {}
        self._parameters = {}

    def parents(self) -> list[tuple[int, Any]]:
        return [(i, p) for i, p in enumerate(self._parents) if p is not None]

    def saved(self) -> dict[str, Any]:
        return self._saved

    def parameters(self) -> dict[str, Any]:
        return self._parameters

    def metas(self) -> tuple[Any, ...] | None:
        return self._metas


def evaluate(node: Node, rule: Rule, g: Any, wrap: Callable[..., Any] | None) -> Any:
    """Run a rule of ``node`` on ``g``: on raw arrays, or on tensors when ``wrap`` makes them."""
    saved = node.saved()
    parameters = node.parameters()
    parents = dict(node.parents())
    operands = node.primitive.operands
    values: list[Any] = []
    for name in rule.names:
        if name in ("g", "t"):
            values.append(g)
        elif name == "m":
            values.append(differentiable if wrap is not None else _space_of(g, saved))
        elif name == "needs":
            values.append(node.mask)  # type: ignore[attr-defined]
        elif name in parameters:
            values.append(parameters[name])
        elif name.endswith(HOME) and name not in saved:
            if node.primitive.variadic:
                over = range(len(node.mask))  # type: ignore[attr-defined]
                values.append([_home_of(parents.get(i), wrap) for i in over])
            else:
                parent = parents.get(operands.index(name.removesuffix(HOME)))
                values.append(_home_of(parent, wrap))
        elif wrap is None or (name not in operands and name.endswith(FACETS[1:])):
            values.append(saved[name])
        elif name == "y" and node.primitive.outputs != 1:
            values.append(tuple(wrap(y, Pick(node, i)) for i, y in enumerate(saved[name])))
        elif name == "y":
            values.append(wrap(saved[name], node))
        elif node.primitive.variadic and name == operands[0]:
            values.append([wrap(x, parents.get(i)) for i, x in enumerate(saved[name])])
        elif not hasattr(saved[name], "shape"):  # a Python scalar, or None for a missing operand
            values.append(saved[name])
        elif name in operands:
            values.append(wrap(saved[name], parents.get(operands.index(name))))
        else:
            values.append(wrap(saved[name], None))
    return bind(rule.function)(*values)


def _home_of(parent: Any, wrap: Callable[..., Any] | None) -> Array | None:
    """:func:`destination` of an operand's parent, where there is one and gradients are raw."""
    return None if wrap is not None or parent is None else destination(parent)


def _space_of(g: Any, saved: dict[str, Any]) -> Backend:
    """The namespace of a gradient, which for several outputs is a list with gaps."""
    candidates = g if isinstance(g, list) else [g]
    return next(SPACES[type(x)] for x in candidates if x is not None)


def fit(g: Any, meta: tuple[Any, Any]) -> Any:
    """Undo broadcasting and promotion: bring a gradient to its operand's shape and dtype."""
    shape, dtype = meta
    try:
        have = g.shape
    except AttributeError:
        raise DTypeError(
            f"backward: a rule returned {type(g).__name__}; it must return an array (zeros where "
            "the derivative vanishes)"
        ) from None
    if have != shape:
        check_summable(have, shape)
        g = SPACES[g.__class__].sum_to(g, shape)
    if g.dtype != dtype:
        space = SPACES[g.__class__]
        if space.numpy_dtype(g).kind == "c":
            raise DTypeError(
                f"backward: a gradient of {g.dtype} arrived at an operand of {dtype}; gradients "
                "through complex numbers are not supported"
            )
        g = space.astype(g, dtype)
    return g


def check_summable(have: tuple[int, ...], want: tuple[int, ...]) -> None:
    """Raise ShapeError unless ``have`` is a shape that ``want`` broadcasts to."""
    lead = len(have) - len(want)
    if lead < 0 or any(n not in (1, have[lead + i]) for i, n in enumerate(want)):
        raise ShapeError(
            f"backward: a rule returned a gradient of shape {have} for an operand of shape {want}; "
            "it must have the operand's shape, or one that the operand broadcasts to"
        )


def _fit_recorded(g: Any, meta: tuple[Any, Any]) -> Any:
    shape, dtype = meta
    if g.data.shape != shape:
        check_summable(g.data.shape, shape)
        g = differentiable.sum_to(g, shape)
    if g.data.dtype != dtype:
        g = differentiable.astype(g, dtype)
    return g


def pullback(node: Node, g: Any, wrap: Callable[..., Any] | None) -> list[tuple[Any, Any]]:
    """The pairs (parent, gradient) of any node, read from its declaration.

    The generated classes do the same on raw arrays without reading anything; this is the path for
    gradients that are recorded themselves (``wrap`` makes the tensors), and for generic nodes.
    """
    if isinstance(node, Pick):
        return [(node.p0, Bundle({node.index: g}))]
    if node.pull is not None:
        return node.pull(g, wrap)  # type: ignore[no-any-return]
    return by_rules(node, g, wrap)


def by_rules(node: Node, g: Any, wrap: Callable[..., Any] | None) -> list[tuple[Any, Any]]:
    """:func:`pullback` of a node whose primitive has rules."""
    made = node.primitive
    parents = node.parents()
    metas = node.metas()
    if made.outputs != 1:
        g = [g.get(i) for i in range(node.outputs)]  # type: ignore[attr-defined]
    if made.joint is not None:
        grads = evaluate(node, made.joint, g, wrap)
        wanted = len(node.mask)  # type: ignore[attr-defined]
        if not isinstance(grads, tuple | list) or len(grads) != wanted:
            got = len(grads) if isinstance(grads, tuple | list) else type(grads).__name__
            raise DeclarationError(
                f"{made.name}: its joint rule returned {got}, and not {wanted} gradients in a "
                "tuple, one per operand (None where there is none)"
            )
        if not made.fits:
            return [(p, grads[i]) for i, p in parents]
        found = [(i, p, grads[i]) for i, p in parents]
    else:
        assert made.rules is not None
        found = [
            (i, p, evaluate(node, rule, g, wrap))
            for i, p in parents
            if (rule := made.rules[i]) is not None
        ]
    if made.fits and metas is not None:
        bring = fit if wrap is None else _fit_recorded
        return [(p, x if x is None else bring(x, metas[i])) for i, p, x in found]
    return [(p, x) for _, p, x in found]
