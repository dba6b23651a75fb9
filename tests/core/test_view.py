"""The graph as data, as text and as a picture."""

import dataclasses
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.core import draw
from gpugrad.core.modes import gate
from gpugrad.errors import (
    DTypeError,
    FreedGraphError,
    GraphError,
    InplaceError,
    ShapeError,
)

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")


def leaf(*values: float, **options) -> gg.Tensor:
    return gg.tensor(list(values), requires_grad=True, **options)


# -- nodes and edges ------------------------------------------------------------------------------


def test_nodes_and_edges_in_the_order_of_computation() -> None:
    x, y = leaf(1.0, 2.0), leaf(3.0, 4.0)
    z = gg.sum((x + y) * y, axis=0)
    g = gg.graph(z, names={"x": x, "y": y})
    assert [(n.id, n.kind, n.operation, n.name) for n in g] == [
        (0, "leaf", None, "x"),
        (1, "leaf", None, "y"),
        (2, "operation", "add", None),
        (3, "operation", "multiply", None),
        (4, "operation", "sum", None),
    ]
    assert [(e.source, e.target, e.operand) for e in g.edges] == [
        (0, 2, "a"), (1, 2, "b"), (2, 3, "a"), (1, 3, "b"), (3, 4, "x"),
    ]  # fmt: skip
    assert g.outputs == (4,)
    assert len(g) == 5
    assert g[4] is g.nodes[4]
    assert g[4].parameters["axis"] == 0
    assert g[3].operands == ("a", "b")
    assert g["y"].id == 1
    assert [e.target for e in g.uses(1)] == [2, 3]
    assert [e.source for e in g.inputs(g[3])] == [2, 1]
    numbers = [n.number for n in g.operations]
    assert numbers == sorted(numbers)
    assert all(n.number == 0 for n in g.leaves)


def test_ids_are_the_same_in_every_run() -> None:
    def picture() -> str:
        return gg.graph(lambda x, y: (x * y + x) * (y + 1.0), 2.0, 3.0).to_dot()

    assert picture() == picture()


def test_nothing_can_be_changed() -> None:
    g = gg.graph(leaf(1.0) * 2.0)
    for thing in (g, g.nodes[0], g.edges[0], g.nodes[1].saved[0]):
        field = dataclasses.fields(thing)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field, None)


def test_a_leaf_is_a_graph() -> None:
    x = leaf(1.0, 2.0)
    g = gg.graph(x)
    assert len(g) == 1
    assert g.outputs == (0,)
    assert g.nodes[0].value.tolist() == [1.0, 2.0]
    assert "leaf 0" in g.to_dot()
    assert str(g).endswith("1 leaf, 0 operations, 0 bytes saved")


def test_several_outputs_share_one_graph() -> None:
    x = leaf(2.0, 3.0)
    t = x * x
    g = gg.graph((t, gg.sum(t)), gradient=([1.0, 10.0], 100.0))
    assert len(g.find("multiply")) == 1
    assert g.outputs == (1, 2)
    assert g.nodes[0].gradient.tolist() == [2 * 2.0 * 101, 2 * 3.0 * 110]


def test_a_primitive_with_several_results() -> None:
    x = leaf(2.0, 3.0)
    a, b = gg.unstack(x)
    g = gg.graph(a * b, names={"first": a}, gradients=True)
    assert [(n.kind, n.shape) for n in g if n.kind == "output"] == [("output", ()), ("output", ())]
    assert g["first"].gradient.item() == 3.0
    assert "first = %1[0]" in str(g)
    assert "multiply(first, %3)" in str(g)
    assert g.nodes[0].gradient.tolist() == [3.0, 2.0]
    check_dot(g.to_dot())
    check_mermaid(g.to_mermaid())


def test_operands_of_a_variadic_primitive() -> None:
    x, y = leaf(1.0), leaf(2.0)
    g = gg.graph(gg.concat([x, gg.tensor([5.0]), y]), gradient=[1.0, 2.0, 3.0])
    assert [(e.operand, e.gradient.tolist()) for e in g.edges] == [
        ("parts[0]", [1.0]), ("parts[2]", [3.0]),
    ]  # fmt: skip
    assert g.operations[0].operands == ("parts[0]", "parts[1]", "parts[2]")


def test_a_graph_that_was_recorded_by_a_backward_pass() -> None:
    x = leaf(2.0)
    gg.sum(x * x * x).backward(create_graph=True)
    g = gg.graph(gg.sum(x.grad), names={"x": x}, gradients=True)
    assert g["x"].gradient.tolist() == [12.0]


# -- what is known --------------------------------------------------------------------------------


def test_values_come_from_what_was_saved() -> None:
    x, y, k = leaf(1.0, 2.0), leaf(3.0, 4.0), gg.tensor([5.0, 6.0])
    t = (x + y) * k  # saves k only
    g = gg.graph(gg.exp(t), names={"k": k})
    add, multiply, exp = g.operations
    assert g.leaves[0].value is None
    assert add.value is None
    assert multiply.value is None
    assert exp.value.tolist() == np.exp(t.data).tolist()
    assert multiply.constants["b"].tolist() == [5.0, 6.0]
    assert multiply.saved[0].label == "k"
    # Element-wise operations on equal shapes keep no shapes, yet the graph knows them.
    assert {(n.shape, n.dtype) for n in g} == {((2,), np.dtype("float64"))}


def test_a_function_keeps_every_value() -> None:
    g = gg.graph(lambda x, y: gg.sum(x + y) + 1.0, gg.tensor([1.0, 2.0]), 3.0)
    assert all(n.value is not None for n in g.operations)


def test_arguments_of_a_function() -> None:
    given = leaf(1.0, 2.0)

    def f(weights, scale, *rest, power):
        return gg.sum(weights * scale * rest[0] + rest[1]) ** power

    g = gg.graph(lambda w, s, *rest: f(w, s, *rest, power=2), given, 3.0, np.ones(2), 7)
    assert [n.name for n in g.leaves] == ["w", "s", "rest[0]"]  # 7 is an integer, and a constant
    assert g["w"].value.tolist() == [1.0, 2.0]
    assert given.grad is None
    renamed = gg.graph(lambda w: w * 2.0, given, names={"weights": given})
    assert renamed.leaves[0].name == "w"


def test_a_function_without_a_signature() -> None:
    assert gg.graph(max, leaf(1.0), leaf(2.0)).leaves[0].name is None


def test_names_can_be_all_local_variables() -> None:
    x, y, count, _hidden = leaf(1.0), leaf(2.0), 3, leaf(4.0)
    t = x * y
    g = gg.graph(t * count * _hidden, names=locals())
    assert sorted(n.name or "" for n in g) == ["", "", "", "t", "x", "y"]
    assert "t = multiply(x, y)" in str(g)
    with pytest.raises(KeyError, match="names="):
        g["nobody"]


def test_structure_only() -> None:
    for g in (
        gg.graph(lambda x: x * x + 2.0, np.ones(3), values=False),
        gg.graph(leaf(1.0, 1.0, 1.0) * leaf(1.0, 1.0, 1.0) + 2.0, values=False),
    ):
        assert all(n.value is None for n in g)
        assert all(e.value is None for e in g.edges)
        assert all(s.value is None for n in g for s in n.saved)
        assert [s.shape for s in g.find("multiply")[0].saved] == [(3,), (3,)]
        check_dot(g.to_dot())


def test_the_collected_gradient_of_a_leaf() -> None:
    x = leaf(3.0)
    y = gg.sum(x * x)
    y.backward(retain_graph=True)
    g = gg.graph(y, names={"x": x})
    assert g["x"].grad.tolist() == [6.0]
    assert g["x"].gradient is None
    assert ".grad [6]" in g.to_dot()


def test_broadcasting_and_promotion_are_undone_on_edges() -> None:
    x, y = gg.tensor(np.ones((3, 1), "float32"), requires_grad=True), leaf(1.0, 2.0)
    g = gg.graph(gg.sum(x * y), gradients=True)
    to_x, to_y = g.inputs(g.find("multiply")[0])
    assert [to_x.shape, to_y.shape] == [(3, 1), (2,)]
    assert [to_x.dtype, to_y.dtype] == [np.dtype("float32"), np.dtype("float64")]
    assert to_x.gradient.dtype == np.dtype("float32")
    assert to_x.gradient.tolist() == [[3.0]] * 3
    assert to_x.local.shape == (3, 2)


# -- bytes ----------------------------------------------------------------------------------------


def test_an_array_counts_once() -> None:
    x, v, w = leaf(1.0, 2.0, 3.0), leaf(1.0, 1.0, 1.0), leaf(2.0, 2.0, 2.0)
    g = gg.graph(x * v + x * w)
    assert list(g.saved_bytes_by_node.values()) == [48, 48, 0]
    assert g.saved_bytes == 72


def test_views_of_one_memory_count_no_more_than_it_has() -> None:
    memory = np.arange(6.0)
    x = leaf(1.0, 1.0, 1.0, 1.0)
    g = gg.graph(x * gg.asarray(memory[:4]) + x * gg.asarray(memory[2:]))
    assert list(g.saved_bytes_by_node.values()) == [32, 32, 0]
    assert g.saved_bytes == memory.nbytes
    spread = np.broadcast_to(np.float64(2.0), (4,))
    assert gg.graph(x * gg.asarray(spread)).saved_bytes <= 32


def test_numbers_and_shapes_take_no_bytes() -> None:
    x = leaf(1.0, 2.0)
    g = gg.graph(gg.sum(x * 2.0))
    assert g.saved_bytes == 0
    assert g.find("multiply")[0].constants == {"b": 2.0}
    (shape,) = [s for s in g.find("sum")[0].saved if s.name == "x_shape"]
    assert shape.value == (2,)
    assert shape.shape is None


# -- the backward pass on the side ----------------------------------------------------------------


def test_looking_changes_nothing() -> None:
    x = leaf(1.0, 2.0)
    called: list[gg.Tensor] = []
    t = x * x

    def hook(gradient: gg.Tensor) -> gg.Tensor:
        called.append(gradient)
        return gradient * 100.0

    t.register_hook(hook)
    y = gg.sum(t)
    g = gg.graph(y, gradients=True)
    assert g.leaves[0].gradient.tolist() == [2.0, 4.0]
    assert (x.grad, called) == (None, [])
    y.backward()
    assert len(called) == 1
    assert x.grad.tolist() == [200.0, 400.0]
    assert g.leaves[0].gradient.tolist() == [2.0, 4.0]


def test_a_gradient_to_start_from() -> None:
    y = leaf(1.0, 2.0) * 3.0
    assert gg.graph(y, gradient=[1.0, 2.0]).leaves[0].gradient.tolist() == [3.0, 6.0]
    with pytest.raises(GraphError, match="gradient="):
        gg.graph(y, gradients=True)
    with pytest.raises(ShapeError):
        gg.graph(y, gradient=[1.0])
    with pytest.raises(ShapeError, match="1 gradients for 2"):
        gg.graph((y, y), gradient=[[1.0, 2.0]])


def test_local_derivatives_are_worked_out_for_small_results_only() -> None:
    g = gg.graph(lambda x: gg.sum(gg.exp(x)), np.zeros(65), gradients=True)
    assert g.inputs(g.find("exp")[0])[0].local is None
    assert g.inputs(g.find("sum")[0])[0].local is None  # no element-wise operation
    g = gg.graph(lambda x: gg.sum(gg.exp(x)), np.zeros(64), gradients=True)
    assert g.inputs(g.find("exp")[0])[0].local.tolist() == [1.0] * 64


def test_an_array_changed_in_place_is_found() -> None:
    x, k = leaf(1.0), gg.tensor([2.0])
    y = x * k
    k += 1.0
    with pytest.raises(InplaceError, match="multiply"):
        gg.graph(y, gradients=True)


# -- what cannot be looked at ---------------------------------------------------------------------


def test_errors() -> None:
    x = leaf(1.0)
    with pytest.raises(GraphError, match="requires_grad"):
        gg.graph(gg.tensor([1.0]) * 2.0)
    with pytest.raises(DTypeError, match="ndarray"):
        gg.graph(np.ones(2))
    with pytest.raises(DTypeError, match="float"):
        gg.graph(lambda x: 1.0, x)
    with pytest.raises(GraphError, match="tuple"):
        gg.graph(x, x)
    with pytest.raises(GraphError, match="no tensor"):
        gg.graph(())


def test_a_released_graph() -> None:
    x = leaf(1.0)
    t = x * x
    y = gg.sum(t)
    y.backward()
    for released in (y, t):
        with pytest.raises(FreedGraphError, match="retain_graph"):
            gg.graph(released)


def test_a_failing_function_leaves_no_trace() -> None:
    def fails(x):
        raise ZeroDivisionError

    before = len(gate)
    with pytest.raises(ZeroDivisionError):
        gg.graph(fails, 1.0)
    assert len(gate) == before
    with gg.no_grad(), pytest.raises(GraphError):
        gg.graph(lambda x: x * x, 1.0)


# -- size -----------------------------------------------------------------------------------------


def test_a_hundred_thousand_nodes() -> None:
    x = leaf(1.0)
    y = x
    for _ in range(100_000):
        y = y + x
    g = gg.graph(gg.sum(y), gradients=True)
    assert len(g) == 100_002
    assert g.leaves[0].gradient.tolist() == [100_001.0]
    for text in (str(g), g.to_dot(), g.to_mermaid()):
        assert len(text) < 200_000
        assert "99802 nodes folded" in text
    assert "99802 operations" in g.to_mermaid()
    assert "1 leaf, 100001 operations" in g.to_dot()


def test_folding_keeps_both_ends() -> None:
    def chain(x):
        for _ in range(10):
            x = x * 1.5
        return x

    g = gg.graph(chain, 1.0)
    text = g.to_dot(max_nodes=4)
    check_dot(text)
    assert re.findall(r"^  (\w+) \[", text, re.MULTILINE) == [
        "node", "edge", "n0", "n1", "n9", "n10", "folded", "y0",
    ]  # fmt: skip
    assert "n1 -> folded" in text
    assert "folded -> n9" in text
    assert "7 nodes folded" in text
    check_mermaid(g.to_mermaid(max_nodes=4))
    shared = gg.graph(lambda x, w: x * w * w * w * w, 1.0, 2.0)  # w is saved once
    assert shared.saved_bytes == 8 * 5
    assert "saving at most 40 B" in shared.to_dot(max_nodes=2)
    assert "folded" not in g.to_dot(max_nodes=11)
    with pytest.raises(draw.DrawingError, match="max_nodes"):
        g.to_dot(max_nodes=1)


# -- text -----------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_operation() -> None:
    x, w = gg.tensor(np.ones((2, 3)), requires_grad=True), leaf(1.0, 2.0, 3.0)
    g = gg.graph(gg.sum(x * w + 1.0, axis=0), names={"x": x, "w": w})
    lines = str(g).splitlines()
    assert len(lines) == 1 + 3 + 1
    assert "gradient" not in lines[0]  # none is known
    assert re.fullmatch(r" 2  %2 = multiply\(x, w\) +float64\[2, 3\] .* a .*, b .* 72", lines[1])
    assert re.fullmatch(r" 3  %3 = add\(%2, const\) .* nothing +0", lines[2])
    assert re.fullmatch(r" 4  %4 = sum\(%3, axis=0\) .* x_shape \(2, 3\).* 0", lines[3])
    assert lines[-1] == "2 leaves, 3 operations, 72 bytes saved"
    known = gg.graph(lambda a, b: a * b, 2.0, 3.0, gradients=True)
    assert [line.split()[:5] for line in str(known).splitlines()[:3]] == [
        ["id", "operation", "output", "value", "gradient"],
        ["0", "a", "float64[]", "2", "3"],
        ["1", "b", "float64[]", "3", "2"],
    ]
    assert repr(g) == "<Graph: 2 leaves, 3 operations, 72 bytes saved>"


def check_dot(text: str) -> None:
    """Every line is a statement of a digraph, and labels are well-formed markup."""
    import xml.dom.minidom as xml

    first, *lines, last = text.splitlines()
    assert (first, last) == ("digraph gpugrad {", "}")
    for line in lines:
        assert re.fullmatch(r"  (\w+( -> \w+)?( \[.*\])?|rankdir.*|label=.*);", line), line
    for label in re.findall(r"label=<(.*)>(?:\]|;)", text):
        xml.parseString(f"<x>{label}</x>")
    if shutil.which("dot"):
        run = subprocess.run(
            ["dot", "-Tsvg"], input=text.encode(), capture_output=True, check=False
        )
        assert run.returncode == 0, run.stderr.decode()
        assert b"Warning" not in run.stderr, run.stderr.decode()


def check_mermaid(text: str) -> None:
    """Every line is a statement of a flowchart, and a label holds no bare sign of its syntax."""
    first, *lines = text.splitlines()
    assert first == "flowchart LR"
    label = r'"(?:<b>|</b>|<br/>|#\d+;|[^"<>#;&`{}|])*"'
    node = rf"  \w+(\[{label}\]|\(\({label}\)\)|\({label}\)):::\w+"
    for line in lines:
        assert re.fullmatch(rf"{node}|  \w+ -->(\|{label}\|)? \w+|  classDef .*", line), line


NASTY = ['a "b" <c> & #35; `d`', "end", "x]; y[", "back\\slash", "new\nline\x00", "{|}", "δ→π", ">"]


@pytest.mark.parametrize("name", NASTY)
def test_names_are_escaped(name: str) -> None:
    x, k = leaf(1.0, 2.0), gg.tensor([3.0, 4.0])
    g = gg.graph(gg.sum(x * k), names={name: x, name + "2": k}, gradients=True)
    check_dot(g.to_dot())
    check_mermaid(g.to_mermaid())
    assert len(str(g).splitlines()) == 5


def test_a_picture_shows_what_is_known() -> None:
    g = gg.graph(lambda x, y: gg.sum(x * y, axis=0), np.array([1.0, 2.0]), 3.5, gradients=True)
    for text in (g.to_dot(), g.to_mermaid()):
        for word in ("float64[2]", "[1, 2]", "3.5", "multiply", "saves a, b: 24 B", "sum(axis=0)",
                     "→ [3.5, 7]", "← 3", "gradient 3", "∂/∂a = [3.5, 3.5]"):  # fmt: skip
            assert word in text, word
    text = gg.graph(lambda x: gg.sum(x * 2.0 + 1.0), np.ones(2)).to_dot()
    assert text.count("saves no array") == 2  # a number, a shape
    assert text.count("saves nothing") == 1  # the addition
    large = gg.graph(lambda x: gg.sum(x * 2.0), np.arange(1000.0)).to_dot()
    assert "float64[1000]" in large
    assert "998" not in large


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1200, "1.2 kB"), (3.4e6, "3.4 MB"), (2e12, "2e+03 GB")],
)
def test_bytes_read_well(n: float, text: str) -> None:
    assert draw.bytes_text(n) == text


# -- pictures -------------------------------------------------------------------------------------


@needs_dot
def test_svg_and_files(tmp_path) -> None:
    g = gg.graph(lambda price, count: price * count, 2.0, 3.0, gradients=True)
    svg = g.to_svg()
    assert "<svg" in svg
    assert "price" in svg
    assert g._repr_svg_() is not None
    assert g._repr_mimebundle_()["image/svg+xml"].count("<svg") == 1
    assert g._repr_mimebundle_()["text/plain"] == str(g)
    assert g.save(tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in g.save(str(tmp_path / "a.SVG")).read_bytes()


def test_text_files(tmp_path) -> None:
    g = gg.graph(lambda x: x * x, 2.0)
    assert g.save(tmp_path / "a.dot").read_text(encoding="utf-8") == g.to_dot() + "\n"
    assert g.save(tmp_path / "a.mmd").read_text(encoding="utf-8") == g.to_mermaid() + "\n"
    assert g.save(tmp_path / "a.txt").read_text(encoding="utf-8") == str(g) + "\n"
    with pytest.raises(draw.DrawingError, match=r"\.jpg.*\.svg"):
        g.save(tmp_path / "a.jpg")


def test_without_the_python_package(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "graphviz", None)
    g = gg.graph(lambda x: x * x, 2.0)
    with pytest.raises(draw.DrawingError, match=r"Python package graphviz.*pip install graphviz"):
        g.to_svg()
    bundle = g._repr_mimebundle_()
    assert bundle == {"text/plain": str(g), "text/vnd.mermaid": g.to_mermaid()}
    assert g._repr_svg_() is None


def test_without_the_program(monkeypatch, tmp_path) -> None:
    pytest.importorskip("graphviz")
    monkeypatch.setenv("PATH", str(tmp_path))
    g = gg.graph(lambda x: x * x, 2.0)
    with pytest.raises(draw.DrawingError, match=r"program dot.*apt install graphviz"):
        g.to_svg()
    assert "text/vnd.mermaid" in g._repr_mimebundle_()


# -- other libraries ------------------------------------------------------------------------------


def test_arrays_of_another_library() -> None:
    strict = pytest.importorskip("array_api_strict")
    x = gg.tensor(strict.asarray([1.0, 2.0], device=strict.Device("device1")), requires_grad=True)
    g = gg.graph(gg.sum(x * x + 1.0), names={"x": x}, gradients=True)
    assert g["x"].gradient.device == x.device
    assert g["x"].gradient.tolist() == [2.0, 4.0]
    assert "gradient [2, 4]" in g.to_dot()
    assert g.saved_bytes == 16
