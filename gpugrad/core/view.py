"""A look at the graph: reads nodes, edges, what each node keeps, values and gradients."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gpugrad.backend import SPACES, is_array
from gpugrad.core.conversion import tensor
from gpugrad.core.graph import FREED, Bundle, Leaf, Node, Pick, check_alive, mutations
from gpugrad.core.modes import keep_results
from gpugrad.core.picture import Graph, GraphEdge, GraphNode, Saved
from gpugrad.core.rules import GenericNode, evaluate, pullback
from gpugrad.core.tensor import Tensor, seed, tensor_of
from gpugrad.errors import DTypeError, FreedGraphError, GraphError, ShapeError

__all__ = ["Graph", "graph"]

#: Local derivatives of results with more elements than this are not worked out.
SMALL = 64


def graph(
    y: Any,
    /,
    *args: Any,
    names: Mapping[str, Any] | None = None,
    values: bool = True,
    gradients: bool = False,
    gradient: Any = None,
) -> Graph:
    """The computational graph behind a result, as data and as a picture.

    Parameters
    ----------
    y:
        A tensor, or a tuple or list of tensors. Or a function, which is called with ``args`` while
        every intermediate result is kept: its graph knows all values. Python floats and floating
        arrays among ``args`` become leaves, tensors are taken as they are, and the function's own
        argument names name them.
    names:
        Names of tensors for the picture, ``{"x": x}``. ``names=locals()`` works, because what is
        not a tensor and what begins with an underscore is passed over.
    values:
        Keep the values that are known. False looks at structure only: the result then holds no
        array, but for gradients.
    gradients:
        Run a backward pass and note what it hands from node to node. Nothing else changes: the
        graph is retained, ``.grad`` stays as it is, and hooks are not called.
    gradient:
        What this pass starts from (one for each tensor, when there are several); 1 for tensors of
        one element. Implies ``gradients``.

    Raises
    ------
    GraphError
        When nothing was recorded.
    FreedGraphError
        When a backward pass has released the graph.

    >>> import gpugrad as gg
    >>> g = gg.graph(lambda x, y: (x + y) * y, 2.0, 3.0, gradients=True)
    >>> print(g)
    id  operation             output     value  gradient  saves                     bytes
     0  x                     float64[]  2      3
     1  y                     float64[]  3      8
     2  %2 = add(x, y)        float64[]  5      3         nothing                       0
     3  %3 = multiply(%2, y)  float64[]  15     1         a float64[], b float64[]     16
    2 leaves, 2 operations, 16 bytes saved
    >>> [(edge.operand, edge.value.item(), edge.gradient.item()) for edge in g.inputs(3)]
    [('a', 5.0, 3.0), ('b', 3.0, 5.0)]
    >>> g["y"].gradient.item()
    8.0
    """
    labels = dict(names or {})
    kept: list[Any] = []
    if callable(y) and not isinstance(y, Tensor):
        operands, own = _operands(y, args)
        labels = {**own, **labels}
        if values:
            with keep_results() as kept:
                y = y(*operands)
        else:
            y = y(*operands)
    elif args:
        raise GraphError("graph: arguments are for a function; pass several tensors as a tuple")
    several = isinstance(y, tuple | list)
    roots = list(y) if several else [y]
    for root in roots:
        if not isinstance(root, Tensor):
            raise DTypeError(f"graph: a tensor is needed, not {type(root).__name__}")
        if root._node is None:
            raise GraphError(
                "graph: this tensor has no graph; set requires_grad=True on an input before "
                "computing it, outside of no_grad()"
            )
    if not roots:
        raise GraphError("graph: there is no tensor to look at")
    known = [t for t in labels.values() if isinstance(t, Tensor)]
    look = _Look([t._node for t in roots], {k: v for k, v in labels.items() if k[:1] != "_"})
    look.find_values([*kept, *known, *roots])
    if gradients or gradient is not None:
        starts = list(gradient) if several and gradient is not None else [gradient] * len(roots)
        if len(starts) != len(roots):
            raise ShapeError(f"graph: {len(starts)} gradients for {len(roots)} tensors")
        look.run_backward([seed(t, g, False) for t, g in zip(roots, starts, strict=True)])
    return look.result(values)


def _operands(
    function: Callable[..., Any], args: Sequence[Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a function, floating numbers and arrays as leaves, and their names."""
    operands = [tensor(x, requires_grad=True) if _is_floating(x) else x for x in args]
    try:
        bound = inspect.signature(function).bind(*operands).arguments
    except (TypeError, ValueError):  # no signature, or a call that will say so itself
        return operands, {}
    named: dict[str, Any] = {}
    for name, value in bound.items():
        if isinstance(value, tuple):
            named.update({f"{name}[{i}]": v for i, v in enumerate(value)})
        else:
            named[name] = value
    return operands, named


def _is_floating(x: Any) -> bool:
    if isinstance(x, Tensor) or not is_array(x):
        return isinstance(x, float)
    return SPACES[type(x)].numpy_dtype(x).kind == "f"


class _Look:
    """One reading of the engine's graph."""

    def __init__(self, roots: list[Any], names: Mapping[str, Any]) -> None:
        self.roots = roots
        self.nodes = _in_order(roots)
        self.ids = {node: i for i, node in enumerate(self.nodes)}
        self.values: dict[Any, Any] = {}
        self.shapes: dict[Any, Any] = {}
        self.dtypes: dict[Any, Any] = {}
        self.gradients: dict[Any, Any] = {}
        self.handed: dict[tuple[Any, int], Any] = {}
        self.locals: dict[tuple[Any, int], Any] = {}
        self.node_names: dict[Any, str] = {}
        self.array_names: dict[int, str] = {}
        for name, t in names.items():
            if isinstance(t, Tensor):
                if t._node is not None:
                    self.node_names.setdefault(t._node, name)
                self.array_names.setdefault(id(t.data), name)

    # -- forward: what is known of every result ------------------------------------------------

    def find_values(self, tensors: Sequence[Tensor]) -> None:
        """Gather arrays and shapes: from tensors at hand, and from what nodes saved."""
        for t in tensors:
            if t._node is not None:
                self.values[t._node] = t.data
        for node in self.nodes:
            if isinstance(node, Leaf):
                continue
            if isinstance(node, Pick):
                self.shapes[node] = node.p0.metas()[-1][node.index]
                continue
            made, saved, metas = node.primitive, node.saved(), node.metas()
            if is_array(saved.get("y")):
                self.values.setdefault(node, saved["y"])
            if metas is not None and made.outputs == 1:
                self.shapes[node] = metas[-1]
                if made.elementwise:
                    found = [_numpy_dtype(m[1]) for m in metas[:-1] if m is not None]
                    self.dtypes[node] = np.result_type(*found)
            for i, parent in node.parents():
                value = _operand(made, saved, i)
                if is_array(value):
                    self.values.setdefault(parent, value)
                if metas is not None and metas[i] is not None:
                    self.shapes[parent] = metas[i][0]
                    self.dtypes[parent] = _numpy_dtype(metas[i][1])
                elif not made.variadic:
                    shape = saved.get(made.operands[i] + "_shape")
                    if shape is not None:
                        self.shapes[parent] = shape
        for node, value in self.values.items():
            self._note(node, value)
        self._spread()

    def _note(self, node: Any, value: Any) -> None:
        self.shapes[node] = tuple(value.shape)
        self.dtypes[node] = SPACES[type(value)].numpy_dtype(value)

    def _spread(self) -> None:
        """An element-wise node without metas has operands and result of one shape and dtype."""
        same = [
            n for n in self.nodes
            if isinstance(n, Node) and not isinstance(n, Pick | GenericNode)
            and n.primitive.elementwise and n.metas() is None
        ]  # fmt: skip
        for node in (*same, *reversed(same)):
            group = [node, *(p for _, p in node.parents())]
            for known in (self.shapes, self.dtypes):
                value = next((known[n] for n in group if n in known), None)
                if value is not None:
                    for n in group:
                        known.setdefault(n, value)

    # -- backward ---------------------------------------------------------------------------------

    def run_backward(self, seeds: list[Any]) -> None:
        """Walk backward, noting what every edge carries; the graph and ``.grad`` stay untouched."""
        pending = self.gradients
        for root, g in zip(self.roots, seeds, strict=True):
            pending[root] = pending[root] + g if root in pending else g
        for node in reversed(self.nodes):
            if node not in pending or isinstance(node, Leaf):
                continue
            if node.seq < mutations.last:
                check_alive(node)
            upstream = pending[node]
            pairs = pullback(node, upstream, None)
            for (i, parent), (_, g) in zip(node.parents(), pairs, strict=True):
                if g is None:
                    continue
                self.handed[node, i] = g
                pending[parent] = pending[parent] + g if parent in pending else g
            if not isinstance(node, Pick) and node.primitive.elementwise:
                self._find_locals(node, upstream)
        for node, g in pending.items():
            if is_array(g):
                self._note(node, g)

    def _find_locals(self, node: Node, upstream: Any) -> None:
        rules = node.primitive.rules
        if rules is None or math.prod(upstream.shape) > SMALL:
            return
        one = SPACES[type(upstream)].ones_like(upstream)
        for i, _ in node.parents():
            rule = rules[i]
            if rule is not None:
                self.locals[node, i] = evaluate(node, rule, one, None)

    # -- the result -------------------------------------------------------------------------------

    def result(self, keep: bool) -> Graph:
        nodes, edges = [], []
        held: list[Any] = []
        for node, i in self.ids.items():
            operation = isinstance(node, Node)
            inner = operation and not isinstance(node, Pick)
            saved = self._saved(node, held, keep) if inner else ((), 0)
            grad = None
            if isinstance(node, Leaf):
                node.squares, grad = None, node.grad
            nodes.append(GraphNode(
                id=i,
                kind="leaf" if not operation else "operation" if inner else "output",
                operation=node.primitive.name if operation else None,
                number=node.seq,
                name=self.node_names.get(node),
                operands=_operand_names(node) if inner else (),
                parameters=dict(node.parameters()) if operation else {},
                saved=saved[0],
                saved_bytes=saved[1],
                shape=self.shapes.get(node),
                dtype=self.dtypes.get(node),
                value=_shown(self.values.get(node)) if keep else None,
                gradient=_shown(self.gradients.get(node)),
                grad=None if grad is None else grad.detach(),
            ))  # fmt: skip
            for k, parent in node.parents() if operation else ():
                edges.append(GraphEdge(
                    source=self.ids[parent],
                    target=i,
                    operand=_operand_name(node, k),
                    shape=self.shapes.get(parent),
                    dtype=self.dtypes.get(parent),
                    value=_shown(self.values.get(parent)) if keep else None,
                    gradient=_shown(self.handed.get((node, k))),
                    local=_shown(self.locals.get((node, k))),
                ))  # fmt: skip
        outputs = tuple(self.ids[root] for root in self.roots)
        return Graph(tuple(nodes), tuple(edges), outputs, _footprint(held))

    def _saved(self, node: Any, held: list[Any], keep: bool) -> tuple[tuple[Saved, ...], int]:
        made = node.primitive
        wanted = {_operand_name(node, i) for i, _ in node.parents()}
        found, arrays = [], []
        for key, value in node.saved().items():
            listed = (made.variadic and key == made.operands[0]) or (
                key == "y" and made.outputs != 1
            )
            for i, x in enumerate(value) if listed else ((0, value),):
                name = f"{key}[{i}]" if listed else key
                constant = name not in wanted and key in made.operands and x is not None
                if is_array(x):
                    arrays.append(x)
                    space = SPACES[type(x)]
                    found.append(Saved(
                        name, tuple(x.shape), space.numpy_dtype(x), space.nbytes(x),
                        tensor_of(x) if keep else None, constant, self.array_names.get(id(x)),
                    ))  # fmt: skip
                else:
                    found.append(Saved(name, None, None, 0, x, constant, None))
        held.extend(arrays)
        return tuple(found), _footprint(arrays)


def _in_order(roots: Sequence[Any]) -> list[Any]:
    """Every node below ``roots``, inputs before what is computed from them."""
    seen: set[Any] = set()
    operations = []
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in seen or isinstance(node, Leaf):
            continue
        if node.seq == FREED:
            raise FreedGraphError(
                "graph: a backward pass has released this graph; look at it before backward(), or "
                "call backward(retain_graph=True)"
            )
        seen.add(node)
        operations.append(node)
        stack.extend(parent for _, parent in node.parents())
    operations.sort(key=lambda node: node.seq)
    order: dict[Any, None] = {}
    for node in operations:
        for _, parent in node.parents():
            order.setdefault(parent)  # a leaf stands before its first use
        order.setdefault(node)
    for root in roots:
        order.setdefault(root)
    return list(order)


def _operand(made: Any, saved: dict[str, Any], i: int) -> Any:
    """What a node saved of operand ``i``; None if nothing."""
    if made.variadic:
        listed = saved.get(made.operands[0])
        return None if listed is None else listed[i]
    return saved.get(made.operands[i])


def _operand_name(node: Any, i: int) -> str:
    return "" if isinstance(node, Pick) else _operand_names(node)[i]


def _operand_names(node: Any) -> tuple[str, ...]:
    first, *_ = names = node.primitive.operands
    if not node.primitive.variadic:
        return tuple(names)
    return tuple(f"{first}[{i}]" for i in range(len(node.mask)))


def _numpy_dtype(dtype: Any) -> np.dtype[Any]:
    return np.dtype(str(dtype).rpartition(".")[2])


def _shown(x: Any) -> Tensor | None:
    """An array as a tensor outside the graph; the gradients of several outputs are no array."""
    return None if x is None or isinstance(x, Bundle) else tensor_of(x)


def _footprint(arrays: Sequence[Any]) -> int:
    """Bytes of memory behind ``arrays``.

    An array counts once, and views of one memory count no more than that memory has.
    """
    pools: dict[int, tuple[Any, dict[int, int]]] = {}
    for x in arrays:
        space = SPACES[type(x)]
        owner = space.storage(x)
        pools.setdefault(id(owner), (owner, {}))[1][id(x)] = space.nbytes(x)
    total = 0
    for owner, views in pools.values():
        size = sum(views.values())
        total += min(size, SPACES[type(owner)].nbytes(owner)) if is_array(owner) else size
    return total
