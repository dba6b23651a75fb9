"""What a look at the graph returns: nodes and edges as data, and the ways to draw them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gpugrad.core import draw
from gpugrad.core.tensor import Tensor

__all__ = ["Graph", "GraphEdge", "GraphNode", "Saved"]


@dataclass(frozen=True, eq=False, slots=True)
class Saved:
    """One thing that a node keeps for its derivative rule.

    Attributes
    ----------
    name:
        The name it has in the rule: an operand, ``y`` for the result, ``x_shape``.
    shape, dtype:
        Of an array; None for a number or a shape.
    nbytes:
        Bytes that its elements take; 0 for what is not an array.
    value:
        The array as a tensor outside the graph, the number, or the shape.
    constant:
        Whether it is an operand that wants no gradient.
    label:
        The name of that constant, when ``names`` has it.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: np.dtype[Any] | None
    nbytes: int
    value: Any
    constant: bool
    label: str | None


@dataclass(frozen=True, eq=False, slots=True)
class GraphNode:
    """A leaf, an operation, or one output of an operation that has several.

    Attributes
    ----------
    id:
        Its place in ``Graph.nodes``: inputs come before what is computed from them, so the same
        program gives the same numbers.
    kind:
        ``"leaf"``, ``"operation"`` or ``"output"``.
    operation:
        The name of the primitive; None for a leaf.
    number:
        Creation number: operations that were recorded later have a greater one. 0 for a leaf.
    name:
        What the result is called, when ``names`` has it.
    operands:
        What the operation calls its inputs, in order. Each is an edge, or a constant.
    parameters:
        The operation's parameters in this call (``axis``, …).
    saved:
        What it keeps for the backward pass.
    saved_bytes:
        Bytes of the arrays among them; an array that is kept under two names counts once.
    shape, dtype, value:
        Of the result; None where the graph does not know it.
    gradient:
        The value E that arrives from upstream: the derivative of the output with respect to this
        node's result. Known when gradients were asked for.
    grad:
        What earlier backward passes left in ``.grad`` of a leaf.
    """

    id: int
    kind: str
    operation: str | None
    number: int
    name: str | None
    operands: tuple[str, ...]
    parameters: Mapping[str, Any]
    saved: tuple[Saved, ...]
    saved_bytes: int
    shape: tuple[int, ...] | None
    dtype: np.dtype[Any] | None
    value: Tensor | None
    gradient: Tensor | None
    grad: Tensor | None

    @property
    def constants(self) -> dict[str, Any]:
        """Operands that want no gradient and were saved, by name."""
        return {s.name: s.value for s in self.saved if s.constant}


@dataclass(frozen=True, eq=False, slots=True)
class GraphEdge:
    """A value on its way from the node that made it to an operation that uses it.

    Attributes
    ----------
    source, target:
        Ids of the two nodes.
    operand:
        What the target calls the value.
    shape, dtype, value:
        Of the value that goes forward.
    gradient:
        What comes back along this edge: the value that reaches the target from upstream times the
        local derivative. A value that is used twice receives two, and adds them up.
    local:
        The local derivative of an element-wise target with respect to this operand (its rule
        with an upstream value of 1), where the result is small.
    """

    source: int
    target: int
    operand: str
    shape: tuple[int, ...] | None
    dtype: np.dtype[Any] | None
    value: Tensor | None
    gradient: Tensor | None
    local: Tensor | None


@dataclass(frozen=True, eq=False)
class Graph:
    """What :func:`graph` returns: nodes and edges, and pictures of them.

    ``print(graph)`` shows a table, a notebook shows the picture. ``graph[3]`` and ``graph["x"]``
    are nodes by id and by name, ``len(graph)`` counts nodes.

    Attributes
    ----------
    nodes, edges:
        In the order of computation.
    outputs:
        Ids of the nodes that the graph was asked for.
    saved_bytes:
        Bytes that the graph keeps for the backward pass. What several nodes keep counts once, and
        overlapping views count no more than the memory they share.
    """

    nodes: tuple[GraphNode, ...]
    edges: tuple[GraphEdge, ...]
    outputs: tuple[int, ...]
    saved_bytes: int

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[GraphNode]:
        return iter(self.nodes)

    def __getitem__(self, key: int | str) -> GraphNode:
        if isinstance(key, str):
            for node in self.nodes:
                if node.name == key:
                    return node
            raise KeyError(f"{key}: no node of this name; pass names= to graph()")
        return self.nodes[key]

    @property
    def saved_bytes_by_node(self) -> dict[int, int]:
        """Bytes that each operation keeps, by id."""
        return {n.id: n.saved_bytes for n in self.operations}

    @property
    def leaves(self) -> list[GraphNode]:
        """The nodes that nothing was computed for, in the order of their first use."""
        return [n for n in self.nodes if n.kind == "leaf"]

    @property
    def operations(self) -> list[GraphNode]:
        """The nodes that are operations, in the order of computation."""
        return [n for n in self.nodes if n.kind == "operation"]

    def find(self, operation: str) -> list[GraphNode]:
        """The nodes of one operation, in the order of computation."""
        return [n for n in self.operations if n.operation == operation]

    def inputs(self, node: GraphNode | int) -> list[GraphEdge]:
        """The edges into a node, in the order of its operands."""
        return self._into.get(node if isinstance(node, int) else node.id, [])

    def uses(self, node: GraphNode | int) -> list[GraphEdge]:
        """The edges out of a node."""
        return self._out_of.get(node if isinstance(node, int) else node.id, [])

    @cached_property
    def _into(self) -> dict[int, list[GraphEdge]]:
        found: dict[int, list[GraphEdge]] = {}
        for edge in self.edges:
            found.setdefault(edge.target, []).append(edge)
        return found

    @cached_property
    def _out_of(self) -> dict[int, list[GraphEdge]]:
        found: dict[int, list[GraphEdge]] = {}
        for edge in self.edges:
            found.setdefault(edge.source, []).append(edge)
        return found

    # -- pictures ---------------------------------------------------------------------------------

    def to_text(self, *, max_nodes: int = draw.MAX_NODES) -> str:
        """A table with one line for each operation."""
        return draw.table(self, max_nodes)

    def to_dot(self, *, max_nodes: int = draw.MAX_NODES) -> str:
        """The graph in Graphviz's language; beyond ``max_nodes`` nodes the middle is folded."""
        return draw.dot(self, max_nodes)

    def to_mermaid(self, *, max_nodes: int = draw.MAX_NODES) -> str:
        """The graph as a Mermaid flowchart, for Markdown pages."""
        return draw.mermaid(self, max_nodes)

    def to_svg(self, *, max_nodes: int = draw.MAX_NODES) -> str:
        """The picture as SVG.

        Raises DrawingError when Graphviz or its Python package is missing, and says which.
        """
        return draw.render(self.to_dot(max_nodes=max_nodes), "svg").decode()

    def save(self, path: str | Path, *, max_nodes: int = draw.MAX_NODES) -> Path:
        """Write the picture to a file; its suffix (.dot, .mmd, .svg, .png, .txt) says how."""
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in (".svg", ".png"):
            content = draw.render(self.to_dot(max_nodes=max_nodes), suffix[1:])
        else:
            writers = {".dot": self.to_dot, ".mmd": self.to_mermaid, ".txt": self.to_text}
            if suffix not in writers:
                raise draw.DrawingError(
                    f"save: no format for the suffix {suffix!r}; use .dot, .mmd, .svg, .png or .txt"
                )
            content = (writers[suffix](max_nodes=max_nodes) + "\n").encode()
        path.write_bytes(content)
        return path

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return f"<Graph: {draw.summary(self)}>"

    def _repr_svg_(self) -> str | None:
        try:
            return self.to_svg()
        except draw.DrawingError:
            return None

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        svg = self._repr_svg_()
        picture = {"text/vnd.mermaid": self.to_mermaid()} if svg is None else {"image/svg+xml": svg}
        return {"text/plain": str(self), **picture}
