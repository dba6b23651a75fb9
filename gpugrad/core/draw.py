"""Pictures of a graph: Graphviz, Mermaid, and a plain table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpugrad.backend import SPACES
from gpugrad.errors import GpugradError

if TYPE_CHECKING:
    from gpugrad.core.picture import Graph, GraphEdge, GraphNode, Saved

__all__ = ["MAX_NODES", "DrawingError", "dot", "mermaid", "render", "table"]

#: Of more nodes than this a picture folds the middle.
MAX_NODES = 200

#: Values with more elements than this are not written out.
WRITTEN = 4

FORWARD, BACKWARD, LOCAL, QUIET, TITLE = "#1857a4", "#b3261e", "#2e7d32", "#6b6b6b", "#111111"

#: A line of a label: its colour, and its text.
Line = tuple[str, str]


class DrawingError(GpugradError, RuntimeError):
    """A picture that cannot be made here; the message says what to install."""


# -- words ----------------------------------------------------------------------------------------


def shape_text(shape: Sequence[int] | None, dtype: Any) -> str:
    """``float64[3, 4]``; the parts that are not known are left out."""
    return f"{dtype or ''}{'' if shape is None else list(shape)}"


def value_text(value: Any) -> str:
    """A small value written out; "" for one that is too large, or not known."""
    if value is None:
        return ""
    if not hasattr(value, "data"):  # a Python number
        return _clean(value)
    if math.prod(value.shape) > WRITTEN:
        return ""
    host = SPACES[type(value.data)].to_host(value.data)
    text = np.array2string(host, separator=", ", formatter={"float_kind": lambda v: f"{v:.6g}"})
    return " ".join(text.split())


def bytes_text(n: float) -> str:
    """``48 B``, ``1.2 kB``, ``3.4 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            break
        n /= 1000
    return f"{n:.3g} {unit}" if unit != "B" else f"{n} B"


def _clean(text: object, limit: int = 40) -> str:
    """One line of printable text."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _call(node: GraphNode) -> str:
    """``sum(axis=0)``: the operation and the parameters that say something."""
    if node.kind == "output":
        return f"{node.operation} [{node.parameters['index']}]"
    said = _settings(node)
    return f"{node.operation}({', '.join(said)})" if said else str(node.operation)


def _settings(node: GraphNode) -> list[str]:
    """The parameters that were given: None and False are what most are when they were not."""
    return [f"{k}={_clean(v, 24)}" for k, v in node.parameters.items()
            if v is not None and v is not False]  # fmt: skip


def _saved_text(saved: Saved) -> str:
    """``a float64[3]``, ``x_shape (3, 4)``, ``b 2.0``."""
    if saved.shape is None:
        return f"{saved.name} {_clean(saved.value, 24)}"
    return f"{saved.name} {shape_text(saved.shape, saved.dtype)}"


def summary(graph: Graph) -> str:
    """One line: how many leaves and operations, and what they keep."""
    return _count(graph.nodes) + f", {graph.saved_bytes} bytes saved"


def _count(nodes: Iterable[GraphNode]) -> str:
    kinds = [n.kind for n in nodes]
    leaves, made = kinds.count("leaf"), kinds.count("operation")
    return f"{leaves} lea{'f' if leaves == 1 else 'ves'}, {made} operation{'s' * (made != 1)}"


# -- labels ---------------------------------------------------------------------------------------


def _node_lines(graph: Graph, node: GraphNode) -> list[Line]:
    lines: list[Line] = []
    if node.kind == "leaf":
        lines.append((TITLE, _clean(node.name or f"leaf {node.id}")))
        lines.append((QUIET, shape_text(node.shape, node.dtype)))
        lines.append((FORWARD, value_text(node.value)))
        if node.gradient is not None:
            lines.append((BACKWARD, _mark("gradient ", value_text(node.gradient))))
        elif node.grad is not None:
            lines.append((BACKWARD, _mark(".grad ", value_text(node.grad))))
        return _filled(lines)
    lines.append((TITLE, _call(node)))
    if node.name:
        lines.append((TITLE, f"= {_clean(node.name)}"))
    if node.kind == "operation":
        for saved in node.saved:
            if saved.constant:
                name = saved.label or saved.name
                said = value_text(saved.value) or shape_text(saved.shape, saved.dtype)
                lines.append((FORWARD, f"{_clean(name)} = {said}"))
        arrays = ", ".join(s.name for s in node.saved if s.shape is not None)
        if arrays:
            lines.append((QUIET, f"saves {_clean(arrays)}: {bytes_text(node.saved_bytes)}"))
        else:
            lines.append((QUIET, "saves no array" if node.saved else "saves nothing"))
        lines.extend((LOCAL, _mark(f"∂/∂{edge.operand} = ", value_text(edge.local)))
                     for edge in graph.inputs(node))  # fmt: skip
    if len(graph.uses(node)) > 1:
        lines.append((BACKWARD, _mark("sum ← ", value_text(node.gradient))))
    return _filled(lines)


def _edge_lines(graph: Graph, edge: GraphEdge) -> list[Line]:
    # A leaf's box tells its shape and value already, and a lone operand needs no name.
    told = graph.nodes[edge.source].kind == "leaf" and edge.value is not None
    kind = "" if told else shape_text(edge.shape, edge.dtype)
    name = edge.operand if len(graph.inputs(edge.target)) > 1 else ""
    return _filled([
        (QUIET, ": ".join(filter(None, (name, kind)))),
        (FORWARD, _mark("→ ", "" if told else value_text(edge.value))),
        (BACKWARD, _mark("← ", value_text(edge.gradient))),
    ])  # fmt: skip


def _output_lines(graph: Graph, node: GraphNode) -> list[Line]:
    return _filled([
        (TITLE, _clean(node.name or "output")),
        (QUIET, shape_text(node.shape, node.dtype)),
        (FORWARD, value_text(node.value)),
    ])  # fmt: skip


def _seed_lines(node: GraphNode) -> list[Line]:
    return _filled([(BACKWARD, _mark("← ", value_text(node.gradient)))])


def _mark(mark: str, text: str) -> str:
    return mark + text if text else ""


def _filled(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line[1]]


# -- large graphs ---------------------------------------------------------------------------------


class _Picture:
    """What is drawn: all of a small graph; of a large one both ends, and one box for the middle."""

    def __init__(self, graph: Graph, max_nodes: int) -> None:
        if max_nodes < 2:
            raise DrawingError(f"max_nodes is at least 2, not {max_nodes}")
        count = len(graph)
        head = count if count <= max_nodes else max_nodes // 2
        tail = count if count <= max_nodes else count - (max_nodes - head)
        self.nodes = [*graph.nodes[:head], *graph.nodes[tail:]]
        self.head = head
        self.folded = graph.nodes[head:tail]
        # Nodes may share what they save: their sum can exceed the whole.
        self.folded_bytes = min(sum(n.saved_bytes for n in self.folded), graph.saved_bytes)
        self.edges: list[tuple[str, str, list[Line]]] = []
        bundles: dict[tuple[str, str], int] = {}

        def key(i: int) -> str:
            return "folded" if head <= i < tail else f"n{i}"

        for edge in graph.edges:
            ends = key(edge.source), key(edge.target)
            if "folded" not in ends:
                self.edges.append((*ends, _edge_lines(graph, edge)))
            elif ends[0] != ends[1]:
                bundles[ends] = bundles.get(ends, 0) + 1
        for (source, target), n in bundles.items():
            self.edges.append((source, target, [(QUIET, f"{n} edges")] if n > 1 else []))
        self.outputs = [
            (key(i), f"y{k}", graph.nodes[i])
            for k, i in enumerate(graph.outputs)
            if graph.nodes[i].kind != "leaf"
        ]

    @property
    def note(self) -> list[Line]:
        """What stands in the box for the middle."""
        return [
            (TITLE, f"… {len(self.folded)} nodes folded …"),
            (QUIET, _count(self.folded)),
            (QUIET, f"saving at most {bytes_text(self.folded_bytes)}"),
            (QUIET, "max_nodes= draws more"),
        ]


# -- Graphviz -------------------------------------------------------------------------------------


_SHAPES = {
    "leaf": 'shape=box, fillcolor="#e8f0fb"',
    "operation": 'shape=ellipse, fillcolor="#fff7e0", margin="0.02,0.02"',
    "output": 'shape=box, style="rounded,filled", fillcolor="#fff7e0"',
    "folded": 'shape=box, style="dashed,filled", fillcolor="#f4f4f4"',
}


def dot(graph: Graph, max_nodes: int = MAX_NODES) -> str:
    """The text of the picture in Graphviz's language."""
    picture = _Picture(graph, max_nodes)
    caption: list[Line] = [(QUIET, summary(graph))]
    if any(n.gradient is not None for n in graph.nodes):
        caption += [(FORWARD, "→ forward value"), (BACKWARD, "← gradient from upstream"),
                    (LOCAL, "∂ local derivative")]  # fmt: skip
    legend = " &#160; ".join(_html([line], bold=False) for line in caption)
    out = [
        "digraph gpugrad {",
        "  rankdir=LR; nodesep=0.35; ranksep=0.5; labelloc=b; fontname=Helvetica; fontsize=10;",
        f"  label=<{legend}>;",
        '  node [fontname=Helvetica, fontsize=11, style=filled, color="#8a8a8a"];',
        '  edge [fontname=Helvetica, fontsize=10, color="#8a8a8a", arrowsize=0.7];',
    ]
    for node in picture.nodes:
        label = _html(_node_lines(graph, node), bold=True)
        out.append(f"  n{node.id} [{_SHAPES[node.kind]}, label=<{label}>];")
    if picture.folded:
        label = _html(picture.note, bold=True)
        out.append(f"  folded [{_SHAPES['folded']}, label=<{label}>];")
    for source, name, node in picture.outputs:
        label = _html(_output_lines(graph, node), bold=True)
        out.append(f'  {name} [shape=box, fillcolor="#e6f4e6", label=<{label}>];')
        out.append(f"  {source} -> {name}{_dot_label(_seed_lines(node))};")
    for source, target, lines in picture.edges:
        out.append(f"  {source} -> {target}{_dot_label(lines)};")
    out.append("}")
    return "\n".join(out)


def _dot_label(lines: list[Line]) -> str:
    return f" [label=<{_html(lines, bold=False)}>]" if lines else ""


#: ``html.escape``, without the import.
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})


def _html(lines: list[Line], bold: bool) -> str:
    """Lines as the label language of Graphviz: coloured, the first of a node bold."""
    rows = []
    for i, (colour, text) in enumerate(lines):
        row = text.translate(_ENTITIES)
        if bold and i == 0:
            row = f"<B>{row}</B>"
        rows.append(f'<FONT COLOR="{colour}">{row}</FONT>')
    return "<BR/>".join(rows)


def render(text: str, form: str) -> bytes:
    """The picture that Graphviz makes of ``text``; DrawingError when it is not installed."""
    try:
        import graphviz
    except ImportError:
        raise DrawingError(
            "drawing needs the Python package graphviz, which is not installed: pip install "
            "graphviz (and the program dot: apt install graphviz, brew install graphviz, or "
            "conda install graphviz). to_dot() and to_mermaid() need neither"
        ) from None
    try:
        return graphviz.Source(text).pipe(format=form)  # type: ignore[no-any-return]
    except graphviz.ExecutableNotFound:
        raise DrawingError(
            "drawing needs Graphviz' program dot, which is not on the PATH: apt install graphviz, "
            "brew install graphviz, or conda install graphviz (the Python package is there). "
            "to_dot() and to_mermaid() do without"
        ) from None
    except (graphviz.CalledProcessError, OSError) as error:
        raise DrawingError(f"Graphviz' program dot failed: {error}") from error


# -- Mermaid --------------------------------------------------------------------------------------


def mermaid(graph: Graph, max_nodes: int = MAX_NODES) -> str:
    """The text of the picture as a Mermaid flowchart."""
    picture = _Picture(graph, max_nodes)
    out = ["flowchart LR"]
    for node in picture.nodes:
        label = _mermaid(_node_lines(graph, node), bold=True)
        left, right = {"leaf": "[]", "operation": ("((", "))"), "output": "()"}[node.kind]
        out.append(f"  n{node.id}{left}{label}{right}:::{node.kind}")
    if picture.folded:
        out.append(f"  folded[{_mermaid(picture.note, bold=True)}]:::folded")
    links = list(picture.edges)
    for source, name, node in picture.outputs:
        out.append(f"  {name}[{_mermaid(_output_lines(graph, node), bold=True)}]:::result")
        links.append((source, name, _seed_lines(node)))
    for source, target, lines in links:
        label = f"|{_mermaid(lines, bold=False)}|" if lines else ""
        out.append(f"  {source} -->{label} {target}")
    for name, fill in (("leaf", "#e8f0fb"), ("operation", "#fff7e0"), ("output", "#fff7e0"),
                       ("folded", "#f4f4f4"), ("result", "#e6f4e6")):  # fmt: skip
        out.append(f"  classDef {name} fill:{fill},stroke:#8a8a8a,color:{TITLE}")
    return "\n".join(out)


def _mermaid(lines: list[Line], bold: bool) -> str:
    """Lines as one quoted Mermaid label; every sign with a meaning of its own becomes an entity."""
    rows = ["".join(c if c.isalnum() or c in _PLAIN else f"#{ord(c)};" for c in text)
            for _, text in lines]  # fmt: skip
    if bold:
        rows[0] = f"<b>{rows[0]}</b>"
    return '"' + "<br/>".join(rows) + '"'


_PLAIN = frozenset(" .,:=/()[]+-_→←∂…")


# -- the table ------------------------------------------------------------------------------------


def table(graph: Graph, max_nodes: int = MAX_NODES) -> str:
    """One line for each operation: inputs, output, what it saves, bytes.

    Values and gradients of few elements have columns where they are known, and leaves have lines
    where their gradients are.
    """
    picture = _Picture(graph, max_nodes)
    rows = [("id", "operation", "output", "value", "gradient", "saves", "bytes")]
    gap = None
    for node in picture.nodes:
        if picture.folded and node.id >= picture.head and gap is None:
            gap = len(rows)
        known = value_text(node.value), value_text(node.gradient)
        made = shape_text(node.shape, node.dtype) or "?"
        if node.kind != "leaf":
            saves = ", ".join(map(_saved_text, node.saved)) or "nothing"
            line = _line(graph, node)
            rows.append((str(node.id), line, made, *known, saves, str(node.saved_bytes)))
        elif known[1]:
            rows.append((str(node.id), _clean(_reference(node)), made, *known, "", ""))
    columns = [
        c for c in zip(*rows, strict=True) if any(c[1:]) or c[0] not in ("value", "gradient")
    ]
    widths = [max(map(len, column)) for column in columns]
    numbers = (0, len(columns) - 1)  # these stand to the right
    lines = [
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in zip(*columns, strict=True)
    ]
    if gap is not None:
        lines.insert(gap, f"… {len(picture.folded)} nodes folded ({_count(picture.folded)}) …")
    return "\n".join([*lines, summary(graph)])


def _line(graph: Graph, node: GraphNode) -> str:
    """``t = multiply(x, %3)``: inputs in order; a constant that was not saved has no value here."""
    if node.kind == "output":
        (edge,) = graph.inputs(node)
        whole = _reference(graph.nodes[edge.source])
        return f"{_clean(_reference(node))} = {whole}[{node.parameters['index']}]"
    inputs = {s.name: s.label or _constant(s) for s in node.saved if s.constant}
    inputs |= {e.operand: _reference(graph.nodes[e.source]) for e in graph.inputs(node)}
    words = [_clean(inputs.get(name, "const")) for name in node.operands]
    words += _settings(node)
    return f"{_clean(_reference(node))} = {node.operation}({', '.join(words)})"


def _constant(saved: Saved) -> str:
    return value_text(saved.value) or shape_text(saved.shape, saved.dtype)


def _reference(node: GraphNode) -> str:
    return node.name or f"%{node.id}"
