"""What a tutorial on back-propagation says about graphs, as examples that run.

Forward values go from left to right, gradients come back from right to left: each node multiplies
the value E from upstream by its local derivative and hands it on.
"""

from fractions import Fraction
from itertools import pairwise
from math import prod

import numpy as np
import pytest

import gpugrad as gg


def leaf(*values: float) -> gg.Tensor:
    return gg.tensor(list(values), requires_grad=True)


def on_edges(g, node) -> list[tuple[float, float, float]]:
    """(forward value, gradient handed back, local derivative) of every edge into a node."""
    return [(e.value.item(), e.gradient.item(), e.local.item()) for e in g.inputs(node)]


# -- addition -------------------------------------------------------------------------------------


def test_addition_keeps_nothing() -> None:
    x, y = leaf(1.0, 2.0, 3.0), leaf(4.0, 5.0, 6.0)
    g = gg.graph(x + y)
    (add,) = g.operations
    assert add.operation == "add"
    assert add.saved == ()
    assert add.saved_bytes == 0
    assert g.saved_bytes == 0


def test_addition_passes_the_upstream_value_to_both_sides() -> None:
    upstream = np.array([0.5, -2.0, 7.0])
    x, y = leaf(1.0, 2.0, 3.0), leaf(4.0, 5.0, 6.0)
    g = gg.graph(x + y, gradient=upstream)
    assert [edge.gradient.tolist() for edge in g.inputs(g.operations[0])] == [[0.5, -2.0, 7.0]] * 2
    assert [edge.local.tolist() for edge in g.inputs(g.operations[0])] == [[1.0, 1.0, 1.0]] * 2


# -- multiplication -------------------------------------------------------------------------------


def test_multiplication_keeps_both_inputs() -> None:
    x, y = leaf(1.0, 2.0, 3.0), leaf(4.0, 5.0, 6.0)
    g = gg.graph(x * y)
    (multiply,) = g.operations
    assert {s.name: s.nbytes for s in multiply.saved} == {"a": 24, "b": 24}
    assert multiply.saved_bytes == g.saved_bytes == 48


def test_multiplication_hands_on_the_flipped_input() -> None:
    upstream = np.array([1.0, 10.0, 100.0])
    x, y = leaf(1.0, 2.0, 3.0), leaf(4.0, 5.0, 6.0)
    g = gg.graph(x * y, gradient=upstream)
    to_x, to_y = g.inputs(g.operations[0])
    assert to_x.local.tolist() == [4.0, 5.0, 6.0]
    assert to_y.local.tolist() == [1.0, 2.0, 3.0]
    assert to_x.gradient.tolist() == [4.0, 50.0, 600.0]
    assert to_y.gradient.tolist() == [1.0, 20.0, 300.0]


@pytest.mark.parametrize("side", ["a", "b"])
def test_multiplication_keeps_only_the_other_input_of_the_side_that_wants_a_gradient(side) -> None:
    x, constant = leaf(1.0, 2.0, 3.0), gg.tensor([4.0, 5.0, 6.0])
    g = gg.graph(x * constant if side == "a" else constant * x)
    (multiply,) = g.operations
    (saved,) = multiply.saved
    assert saved.name == ("b" if side == "a" else "a")
    assert saved.constant
    assert saved.nbytes == multiply.saved_bytes == g.saved_bytes == 24
    assert multiply.constants[saved.name].tolist() == [4.0, 5.0, 6.0]


def test_a_square_keeps_its_input_once() -> None:
    x = leaf(1.0, 2.0, 3.0)
    g = gg.graph(x * x)
    assert [s.nbytes for s in g.operations[0].saved] == [24, 24]
    assert g.operations[0].saved_bytes == 24


# -- the chain rule -------------------------------------------------------------------------------


def test_the_chain_rule_multiplies_local_derivatives() -> None:
    """z = t**2 with t = x + y: dz/dx = dz/dt * dt/dx = 2 (x + y) * 1."""
    x, y = 1.5, 2.5
    g = gg.graph(lambda x, y: (x + y) ** 2, x, y, gradients=True)
    add, square = g.operations
    assert square.gradient.item() == 1.0
    assert on_edges(g, square) == [(x + y, 2 * (x + y), 2 * (x + y))]
    assert add.gradient.item() == 2 * (x + y)
    assert on_edges(g, add) == [(x, 2 * (x + y), 1.0), (y, 2 * (x + y), 1.0)]
    assert g["x"].gradient.item() == 2 * (x + y) * 1.0
    # One backward pass gives every derivative, and it is the product along the path.
    assert (
        g["x"].gradient.item() == g.inputs(square)[0].local.item() * g.inputs(add)[0].local.item()
    )


def test_a_bill() -> None:
    """Three pens and five books, with tax: every intermediate value, and what each one is worth."""

    def total(pen, pens, book, books, tax):
        return (pen * pens + book * books) * tax

    g = gg.graph(total, 4.0, 3.0, 20.0, 5.0, 1.25, gradients=True)
    pens, books, add, taxed = g.operations
    assert [n.operation for n in g.operations] == ["multiply", "multiply", "add", "multiply"]
    # Forward, from left to right.
    assert [n.value.item() for n in g.operations] == [12.0, 100.0, 112.0, 140.0]
    # Backward, from right to left: (forward value, gradient, local derivative) on every edge.
    assert taxed.gradient.item() == 1.0
    assert on_edges(g, taxed) == [(112.0, 1.25, 1.25), (1.25, 112.0, 112.0)]
    assert on_edges(g, add) == [(12.0, 1.25, 1.0), (100.0, 1.25, 1.0)]
    assert on_edges(g, books) == [(20.0, 6.25, 5.0), (5.0, 25.0, 20.0)]
    assert on_edges(g, pens) == [(4.0, 3.75, 3.0), (3.0, 5.0, 4.0)]
    assert {n.name: n.gradient.item() for n in g.leaves} == {
        "pen": 3.75, "pens": 5.0, "book": 6.25, "books": 25.0, "tax": 112.0,
    }  # fmt: skip
    # The addition keeps nothing, each multiplication its two numbers.
    assert list(g.saved_bytes_by_node.values()) == [16, 16, 0, 16]


def test_a_value_used_twice_adds_up_what_comes_back() -> None:
    g = gg.graph(lambda x: x * x + x, 3.0, gradients=True)
    assert [e.gradient.item() for e in g.uses(g["x"])] == [3.0, 3.0, 1.0]
    assert g["x"].gradient.item() == 7.0


# -- products that explode and vanish -------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "told", "digits"),
    [("1.1", 13780.61234, "13780.61234"), ("0.9", 0.000026561398, "2.656139889e-05")],
)
def test_a_hundred_factors_explode_or_vanish(factor: str, told: float, digits: str) -> None:
    def layers(x):
        for _ in range(100):
            x = x * float(factor)
        return x

    g = gg.graph(layers, 1.0, gradients=True)
    assert len(g.operations) == 100
    exact = float(Fraction(factor) ** 100)
    value, gradient = g.operations[-1].value.item(), g["x"].gradient.item()
    assert value == pytest.approx(exact, rel=1e-13)
    assert gradient == pytest.approx(exact, rel=1e-13)
    assert f"{value:.10g}" == f"{gradient:.10g}" == digits
    assert value == pytest.approx(told, rel=1e-7)
    # The product is visible on the way: each node hands on its factor times what it was given.
    for node in g.operations:
        (edge,) = g.inputs(node)
        assert edge.local.item() == float(factor)
        assert edge.gradient.item() == node.gradient.item() * float(factor)
    assert prod(g.inputs(n)[0].local.item() for n in g.operations) == pytest.approx(
        exact, rel=1e-13
    )


def test_the_first_layer_gets_the_product_of_what_lies_behind_it() -> None:
    """loss = sum(tanh(x W1 + b1) W2 + b2): the gradient of W1 and b1, factor by factor."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 4))
    w1, b1, w2, b2 = (gg.tensor(rng.normal(size=s), requires_grad=True)
                      for s in ((4, 3), (3,), (3, 2), (2,)))  # fmt: skip

    h = gg.tanh(gg.matmul(gg.tensor(x), w1) + b1)
    loss = gg.sum(gg.matmul(h, w2) + b2)
    names = {"W1": w1, "b1": b1, "W2": w2, "b2": b2, "h": h}
    g = gg.graph(loss, names=names, gradients=True)

    e = np.ones((5, 2))  # what the sum hands to every element
    activation = 1 - np.tanh(x @ w1.data + b1.data) ** 2  # tanh's local derivative
    behind = (e @ w2.data.T) * activation  # later weights times derivative of the activation
    assert np.allclose(g["W1"].gradient.data, x.T @ behind, rtol=1e-12)
    assert np.allclose(g["b1"].gradient.data, behind.sum(axis=0), rtol=1e-12)

    # Every factor of that product stands on the graph.
    second, tanh = g.find("matmul")[1], g["h"]
    assert np.allclose(g.inputs(second)[0].gradient.data, e @ w2.data.T, rtol=1e-12)
    (edge,) = g.inputs(tanh)
    assert np.allclose(edge.local.data, activation, rtol=1e-12)
    assert np.allclose(edge.gradient.data, behind, rtol=1e-12)
    assert np.allclose(edge.gradient.data, tanh.gradient.data * edge.local.data, rtol=1e-12)

    # And it is what training gets.
    loss.backward()
    for name in ("W1", "b1", "W2", "b2"):
        assert np.allclose(names[name].grad.data, g[name].gradient.data, rtol=1e-12)


@pytest.mark.parametrize(("scale", "trend"), [(1.5, "explodes"), (0.5, "vanishes")])
def test_depth_multiplies_weights(scale: float, trend: str) -> None:
    """With weights above one the gradient grows toward the first layer, below one it shrinks."""

    def net(x):
        for _ in range(20):
            x = gg.matmul(x, scale * np.eye(3))
        return gg.sum(x)

    g = gg.graph(net, np.ones((1, 3)), gradients=True)
    norms = [float(np.linalg.norm(n.gradient.data)) for n in g.find("matmul")]  # first layer first
    ratios = [a / b for a, b in pairwise(norms)]
    assert ratios == pytest.approx([scale] * 19)
    assert (norms[0] > 1000 * norms[-1]) == (trend == "explodes")
    assert (norms[0] < norms[-1] / 1000) == (trend == "vanishes")
