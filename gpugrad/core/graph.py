"""The computational graph: nodes, leaves, and what has changed since they were made."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Any, ClassVar, Protocol

from gpugrad.backend import SPACES, Array, bind, on_register
from gpugrad.core.primitive import Primitive
from gpugrad.errors import FreedGraphError, InplaceError

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
    #: :func:`gpugrad.core.rules.pullback`.
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


# -- sums of gradients ----------------------------------------------------------------------------

#: ``+`` and ``+=``; with several GPUs they run on that of their operands (:func:`backend.bind`).
plus: Callable[[Any, Any], Any] = operator.add
add_into: Callable[[Any, Any], Any] = operator.iadd


def _rebind() -> None:
    global plus, add_into
    plus, add_into = bind(operator.add), bind(operator.iadd)


on_register(_rebind)

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


def describe(node: Node) -> str:
    """A node's operation, for messages."""
    return "an output" if isinstance(node, Pick) else node.primitive.name


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
