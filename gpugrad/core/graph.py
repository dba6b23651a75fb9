"""The computational graph: nodes, leaves, and the walk that runs it backward."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush, heappushpop
from itertools import count
from typing import Any, ClassVar, Protocol

from gpugrad.backend import SPACES, Array, Backend, bind, on_register
from gpugrad.core.primitive import FACETS, HOME, Primitive, Rule, differentiable
from gpugrad.errors import DeclarationError, DTypeError, FreedGraphError, InplaceError, ShapeError

#: What the walk has to do with a node.
LEAF, SINGLE, PAIR, MANY, HOOKED = range(5)

#: The creation number of a node whose saved arrays were released.
FREED = -1

next_seq: Callable[[], int] = count(1).__next__


class Leaf:
    """Where a gradient ends up: the graph's side of a tensor that was made with requires_grad."""

    __slots__ = ("extra", "grad", "home", "seq", "squares")
    kind: ClassVar[int] = LEAF

    def __init__(self) -> None:
        self.seq = 0
        self.grad: Any = None
        self.extra: Extra | None = None
        #: Memory that an optimiser keeps for the gradient, or None.
        self.home: Home | None = None
        #: Σg² of the gradient, where the kernel that wrote it found it out and nobody has added to
        #: it or looked at it since. Whoever is shown the gradient may change it.
        self.squares: float | None = None


class Home(Protocol):
    """Memory for one gradient, lent to one array at a time."""

    def take(self) -> Array | None:
        """The memory, to be written to; None while anybody still sees into it."""

    def keep(self, g: Array) -> Array | None:
        """`g` there: itself when it was written there, a copy else; None if that cannot be."""


def destination(parent: Any) -> Array | None:
    """Where a rule may write the gradient of ``parent``, an array of its shape and dtype, or None.

    Only the first gradient of a leaf has such a place. The rule writes every element, and returns
    this array as the gradient.
    """
    if parent.kind != LEAF or parent.home is None or parent.grad is not None:
        return None
    if parent.extra is not None and parent.extra.hooks:
        return None
    home: Home = parent.home
    return home.take()


class Extra:
    """What only a few nodes have: hooks, and a gradient kept on request."""

    __slots__ = ("grad", "hooks", "retain")

    def __init__(self) -> None:
        self.hooks: dict[int, Callable[[Any], Any]] = {}
        self.retain = False
        self.grad: Any = None


class Node:
    """One recorded operation.

    It holds its parents and the arrays that its rule names, never a tensor it produced. Subclasses
    with one slot per saved array are generated for each primitive (see ``codegen``).
    """

    __slots__ = ("extra", "seq")
    kind: ClassVar[int] = MANY
    seq: int
    extra: Extra
    primitive: ClassVar[Primitive]
    #: ``pull(g, wrap)``, the pairs (parent, gradient) of a node that has no rules; see
    #: :func:`pullback`.
    pull: ClassVar[Any] = None

    def vjp(self, g: Any) -> Any:
        """The gradients of the parents, raw arrays.

        Kind SINGLE: the gradient of the one parent ``p0``. Kind PAIR: parent, gradient, parent,
        gradient. Kind MANY: a sequence of pairs (parent, gradient), where a gradient may be None.
        """
        raise NotImplementedError

    def pop(self, g: Any) -> Any:
        """:meth:`vjp`, releasing parents and saved arrays on the way."""
        raise NotImplementedError

    def clear(self) -> None:
        """Drop parents and saved arrays, unread."""
        raise NotImplementedError

    def parents(self) -> list[tuple[int, Any]]:
        """(operand index, parent) for every operand that wants a gradient."""
        raise NotImplementedError

    def saved(self) -> dict[str, Any]:
        """What the node keeps, by the name its rule gives it."""
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """The values of the primitive's parameters in this call."""
        raise NotImplementedError

    def metas(self) -> tuple[Any, ...] | None:
        """(shape, dtype) of every operand and, last, the shape of the result; None if all equal."""
        raise NotImplementedError


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


class Pick(Node):
    """One output of a primitive that has several."""

    __slots__ = ("index", "p0")
    kind = SINGLE

    def __init__(self, parent: Node, index: int) -> None:
        self.seq = next_seq()
        self.p0: Any = parent
        self.index = index

    @property
    def primitive(self) -> Primitive:  # type: ignore[override]
        return self.p0.primitive  # type: ignore[no-any-return]

    def vjp(self, g: Any) -> Any:
        return Bundle({self.index: g})

    def pop(self, g: Any) -> Any:
        self.clear()
        return Bundle({self.index: g})

    def clear(self) -> None:
        self.seq = FREED
        self.p0 = None

    def parents(self) -> list[tuple[int, Any]]:
        return [(0, self.p0)] if self.p0 is not None else []

    def saved(self) -> dict[str, Any]:
        return {}

    def parameters(self) -> dict[str, Any]:
        return {"index": self.index}

    def metas(self) -> tuple[Any, ...] | None:
        return None


class Bundle(dict[int, Any]):
    """Gradients of some of a node's outputs; adding two bundles adds output by output."""

    def __add__(self, other: Bundle) -> Bundle:
        out = Bundle(self)
        for i, g in other.items():
            out[i] = plus(out[i], g) if i in out else g
        return out


# -- in-place changes -----------------------------------------------------------------------------


class Mark:
    """When one array's memory was last changed in place; `group` when that of many was at once."""

    __slots__ = ("group", "owner", "stamp")

    def __init__(self, owner: Any = None, group: Mark | None = None) -> None:
        self.stamp = 0
        self.owner = owner  # a weak reference, where there can be one
        self.group = group


class _Mutations:
    """When the memory of an array was last changed in place, in creation numbers."""

    def __init__(self) -> None:
        self.last = 0  # the newest change: nodes made later need no check
        self.when: dict[int, Mark] = {}

    def mark(self, x: Array) -> None:
        """Note that the memory of ``x`` has changed."""
        owner = SPACES[type(x)].storage(x)
        found = self.when.get(id(owner)) or self._watch(owner)
        found.stamp = self.last = next_seq()

    def join(self, x: Array, group: Mark) -> None:
        """Let :meth:`mark_all` of a group speak for the memory of ``x`` too."""
        owner = SPACES[type(x)].storage(x)
        found = self.when.get(id(owner)) or self._watch(owner)
        found.group = group

    def mark_all(self, group: Mark) -> None:
        """Note that the memory of every array in a group has changed."""
        group.stamp = self.last = next_seq()

    def _watch(self, owner: Any) -> Mark:
        key = id(owner)
        when = self.when
        try:
            ref = weakref.ref(owner, lambda _: when.pop(key, None))
        except TypeError:  # cannot be watched: keep it, so that its id stays its own
            ref = owner
        when[key] = found = Mark(ref)
        return found

    def after(self, x: Any, seq: int) -> bool:
        """Whether the memory of ``x`` has changed since the creation number ``seq``."""
        try:
            owner = SPACES[type(x)].storage(x)
        except TypeError:
            return False
        found = self.when.get(id(owner))
        if found is None:
            return False
        return found.stamp > seq or (found.group is not None and found.group.stamp > seq)


mutations = _Mutations()


class _Lent:
    """Which arrays are parts of a buffer that others have parts of, too: homes of gradients."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[Any, Array, int]] = {}

    def note(self, x: Array, buffer: Array, start: int) -> None:
        """Note that ``x`` lies in a buffer, the one-dimensional array of all its elements."""
        key, parts = id(x), self._parts
        parts[key] = weakref.ref(x, lambda _: parts.pop(key, None)), buffer, start

    def parts(self, arrays: Sequence[Array]) -> list[tuple[Any, Array, int] | None]:
        """Of each array that was lent a reference to it, its buffer, and the number of its first
        element there; None of another."""
        get = self._parts.get
        return [get(id(x)) for x in arrays]


lent = _Lent()


def check_alive(node: Node) -> None:
    """Raise when ``node`` was released, or when an array that it saved has changed since."""
    if node.seq == FREED:
        raise FreedGraphError(
            f"backward: the saved arrays of {describe(node)} were released by an earlier backward "
            "pass; call the first backward with retain_graph=True to run through this graph again"
        )
    for name, value in {**node.parameters(), **node.saved()}.items():
        for x in _arrays_in(value):
            if mutations.after(x, node.seq):
                raise InplaceError(
                    f"backward of {node.primitive.name}: its saved array {name!r} of shape "
                    f"{tuple(x.shape)} was changed in place after it was saved; make the change "
                    "after backward(), or out of place (x = x + 1 in place of x += 1)"
                )


def _arrays_in(value: Any) -> Iterator[Any]:
    """The arrays in a saved value or a parameter (an index is a tuple that may hold some)."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _arrays_in(part)
    elif hasattr(value, "shape"):
        yield value


#: Gradients that are not arrays; the second is added when tensors exist (see ``tensor``).
NOT_IN_PLACE: set[type] = {Bundle}


# -- rules ----------------------------------------------------------------------------------------


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


# -- sums of gradients ----------------------------------------------------------------------------

#: ``+`` and ``+=``; with several GPUs they run on that of their operands (:func:`backend.bind`).
plus: Callable[[Any, Any], Any] = operator.add
add_into: Callable[[Any, Any], Any] = operator.iadd


def _rebind() -> None:
    global plus, add_into
    plus, add_into = bind(operator.add), bind(operator.iadd)


on_register(_rebind)

# -- the walk -------------------------------------------------------------------------------------

#: Told of the nodes that a walk begins at, and where it ends, before it begins.
on_walk: list[Callable[[list[Any], int], None]] = []


def walk(
    seeds: Sequence[tuple[Any, Any]],
    *,
    retain: bool,
    wrap: Callable[..., Any] | None = None,
    since: int = 0,
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Run the graph backward from ``seeds``, pairs (node, gradient).

    Nodes run in falling order of creation, which is an order in which every consumer of a value
    runs before its producer. A heap holds the nodes that wait while more than one branch is
    pending; along a plain chain it stays empty and nothing is looked up. The first gradient that
    reaches a node is borrowed as it is, the second makes a sum that the walk owns, and only such a
    sum is added to in place.

    Pending gradients live in dictionaries of this call, so several threads may walk one retained
    graph, and a hook may start a walk of its own.

    Parameters
    ----------
    retain:
        Keep the saved arrays for another walk.
    wrap:
        ``wrap(array, node)`` makes a tensor: gradients are then tensors, recorded themselves.
    since:
        Run only nodes created after this number; the walk ends at older ones as at leaves.

    Returns
    -------
    Two dictionaries from where the walk ended to gradient: borrowed ones, and sums that are owned.
    """
    if on_walk:
        for notice in on_walk:
            notice([seed for seed, _ in seeds], since)
    borrowed: dict[Any, Any] = {}
    owned: dict[Any, Any] = {}
    heap: list[tuple[int, Any]] = []
    for seed, g in seeds:
        if seed.seq == FREED:
            check_alive(seed)
        if seed in borrowed:
            borrowed[seed] = plus(borrowed[seed], g)
        else:
            borrowed[seed] = g
            if seed.seq > since:
                heappush(heap, (-seed.seq, seed))
    plain = wrap is None
    changed = mutations.last
    owned_get = owned.get
    node: Any = None
    try:
        while heap:
            node = heappop(heap)[1]
            g = owned.pop(node) if node in owned else borrowed.pop(node)
            while True:  # along a chain, without touching the heap
                if node.seq < changed:
                    check_alive(node)
                kind = node.kind
                if kind == SINGLE and plain:
                    parent = node.p0
                    g = node.vjp(g) if retain else node.pop(g)
                    if not heap and parent.seq > since:
                        node = parent
                        continue
                    pairs: Any = ((parent, g),)
                elif kind == PAIR and plain:
                    parent, pg, side, sg = node.vjp(g) if retain else node.pop(g)
                    if side.seq <= since and not heap and parent.seq > since:
                        # a chain with a leaf at its side, such as a weight
                        total = owned_get(side)
                        if total is not None:
                            add_into(total, sg)
                        else:
                            _deliver(side, sg, borrowed, owned)
                        node = parent
                        g = pg
                        continue
                    pairs = ((parent, pg), (side, sg))
                elif kind == HOOKED:
                    g = run_hooks(node.extra, g, wrap)
                    changed = mutations.last
                    pairs = pullback(node, g, wrap)
                    if not retain:
                        node.clear()
                elif plain:
                    pairs = node.vjp(g) if retain else node.pop(g)
                else:
                    pairs = pullback(node, g, wrap)
                    if not retain:
                        node.clear()

                hand = None  # one waiting node outside the heap
                hand_g: Any = None
                for parent, pg in pairs:
                    total = owned_get(parent)
                    if total is not None:
                        if pg is not None:
                            add_into(total, pg)
                    elif pg is None:
                        continue
                    elif parent in borrowed:
                        _deliver(parent, pg, borrowed, owned)
                    elif parent.seq <= since:
                        borrowed[parent] = pg
                    elif hand is None:
                        hand = parent
                        hand_g = pg
                    elif hand is parent:
                        hand_g = plus(hand_g, pg)
                    else:
                        borrowed[parent] = pg
                        heappush(heap, (-parent.seq, parent))
                if hand is None:
                    break
                if heap and -heap[0][0] > hand.seq:
                    borrowed[hand] = hand_g
                    node = heappushpop(heap, (-hand.seq, hand))[1]
                    g = owned.pop(node) if node in owned else borrowed.pop(node)
                else:
                    node = hand
                    g = hand_g
    except Exception as error:
        if node is not None and not isinstance(error, FreedGraphError | InplaceError):
            error.add_note(f"gpugrad: in the backward pass of {describe(node)}")
        raise
    for end in (*borrowed, *owned):
        if end.seq == FREED:
            check_alive(end)
    return borrowed, owned


def _deliver(parent: Any, g: Any, borrowed: dict[Any, Any], owned: dict[Any, Any]) -> None:
    """Leave a first or second gradient with ``parent``; a sum that ``+=`` can change is owned."""
    if parent not in borrowed:
        borrowed[parent] = g
        return
    total = plus(borrowed[parent], g)
    if type(total) in NOT_IN_PLACE or total.shape == () or not SPACES[type(total)].mutable:
        borrowed[parent] = total
    else:
        del borrowed[parent]
        owned[parent] = total


def describe(node: Node) -> str:
    """A node's operation, for messages."""
    return "an output" if isinstance(node, Pick) else node.primitive.name


def run_hooks(extra: Extra, g: Any, wrap: Callable[..., Any] | None) -> Any:
    """Hand a gradient to the hooks of its node; each may return another in its place.

    What goes on is a copy: hooks and ``.grad`` keep what they were given.
    """
    tensor = through_hooks(extra.hooks, differentiable.as_tensor(g))
    if extra.retain:
        extra.grad = tensor if extra.grad is None else extra.grad + tensor
    out = differentiable.copy(tensor)
    return out.data if wrap is None else out


def through_hooks(hooks: dict[int, Callable[[Any], Any]], g: Any) -> Any:
    """The tensor ``g`` after all hooks have seen it, of the shape and dtype that it had."""
    for hook in list(hooks.values()):
        before = next_seq()
        out = hook(g)
        if mutations.last > before and mutations.after(g.data, before):
            raise InplaceError(
                "register_hook: a hook changed its gradient in place, which other branches of the "
                "graph may share; return the new gradient (return g * 2 in place of g *= 2)"
            )
        if out is None:
            continue
        out = differentiable.as_tensor(out)
        shape = getattr(out.data, "shape", None)
        if shape is None:
            raise DTypeError(
                f"register_hook: a hook returns a tensor or None, not {type(out.data).__name__}"
            )
        if shape != g.shape:
            raise ShapeError(
                f"register_hook: a hook returned shape {tuple(shape)} for a gradient of shape "
                f"{g.shape}; they must be equal"
            )
        g = out if out.dtype == g.dtype else differentiable.astype(out, g.dtype)
    return g


_hooked: dict[type, type] = {}


def extra_of(node: Any) -> Extra:
    """The :class:`Extra` of a node or leaf, made on first use.

    A node with hooks changes its class to one of kind HOOKED, so that the walk pays for hooks only
    where there are any.
    """
    if isinstance(node, Leaf):
        if node.extra is None:
            node.extra = Extra()
        return node.extra
    cls = type(node)
    if cls.kind != HOOKED:
        node.extra = Extra()
        if cls not in _hooked:
            _hooked[cls] = type(cls.__name__, (cls,), {"__slots__": (), "kind": HOOKED})
        node.__class__ = _hooked[cls]
    return node.extra  # type: ignore[no-any-return]


def reachable(roots: Sequence[Any], since: int = 0) -> Iterator[Any]:
    """Every node and leaf below ``roots``, in falling order of creation; leaves come last.

    Nodes not created after ``since`` are given, but not looked behind.
    """
    seen = set(roots)
    heap = [(-node.seq, id(node), node) for node in seen]
    heap.sort()
    while heap:
        node = heappop(heap)[2]
        yield node
        if node.seq == FREED:
            check_alive(node)
        if node.seq <= since:
            continue
        for _, parent in node.parents():
            if parent not in seen:
                seen.add(parent)
                heappush(heap, (-parent.seq, id(parent), parent))
