"""A product of many factors, and a two-layer net by hand: what explodes and what vanishes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpugrad.cli.explain.book import Book
from gpugrad.core.conversion import tensor
from gpugrad.core.tensor import Tensor
from gpugrad.core.view import graph
from gpugrad.health.page_charts import number

__all__ = ["chain", "term_by_term"]

#: Multiplications in a row.
LENGTH = 100


def chain(book: Book, factor: float, form: str) -> NDArray[Any]:
    """A hundred multiplications in a graph; what each hands back, from the last to the first.

    `form` says how to write numbers.
    """
    x = tensor(1.0, dtype="float64", requires_grad=True)
    y = x
    for _ in range(LENGTH):
        y = y * factor
    seen = graph(y, gradients=True)
    y.backward()
    made = sum(node.operation == "multiply" for node in seen.nodes)
    book.lines(
        f"x = gg.tensor(1.0, requires_grad=True)\ny = x\nfor _ in range({LENGTH}):\n"
        f"    y = y * {factor}\ny.backward()"
    )
    book.say(
        f"That is a graph of {made} multiplication nodes. Forward, each multiplies what comes in "
        f"by {factor}. Backward, each takes the value E from upstream, multiplies it by its local "
        f"derivative, which for a multiplication is the other, flipped input, {factor}, and hands "
        "it on. So the factor is applied a hundred times in either direction:"
    )
    # Nodes stand in the order of the computation, the leaf first.
    back = np.array([node.gradient.item() for node in reversed(seen.nodes) if node.gradient])
    rows = [(k, format(back[k], form)) for k in (0, 1, 2, 3, 10, 20, 50, LENGTH)]
    book.table(("nodes passed on the way back", "gradient there"), rows)
    book.lines(
        f"y      = {format(y.item(), form)}\nx.grad = {format(_known(x.grad).item(), form)}\n"
        f"{factor}^{LENGTH} = {format(factor**LENGTH, form)}"
    )
    return back


def term_by_term(
    book: Book, activation: Callable[[Tensor], Tensor], name: str, scale: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Print the gradients of a two-layer net as products; returns the products and `.grad`.

    Every factor is read from the graph: the value from upstream and the slopes as the engine has
    computed them, weights and inputs as they are.
    """
    rng = np.random.default_rng(3)
    x = tensor([0.7, -1.2])
    W1, b1, w2, b2 = (
        tensor(scale * rng.uniform(0.5, 1.0, shape), requires_grad=True)
        for shape in ((2, 2), (2,), (2,), ())
    )
    z1 = W1 @ x + b1
    h = activation(z1)
    z2 = w2 @ h + b2
    y = activation(z2)
    E = (y - 1.0) ** 2 / 2
    seen = graph(E, names={"h": h, "y": y}, gradients=True)
    E.backward()

    def slope(result: str) -> NDArray[Any]:
        (edge,) = seen.inputs(seen[result])
        return np.atleast_1d(_known(edge.local).numpy())

    upstream = _known(seen["y"].gradient).item()
    first, (second,) = slope("h"), slope("y")
    book.lines(
        f"z1 = W1 x + b1     h = φ(z1)     z2 = w2 · h + b2     y = φ(z2)\n"
        f"φ = {name}{'':{max(1, 15 - len(name))}}E = (y - 1)²/2\n\n"
        "∂E/∂b1[j]    = ∂E/∂y · φ'(z2) · w2[j] · φ'(z1[j])\n"
        "∂E/∂W1[j, i] = ∂E/∂y · φ'(z2) · w2[j] · φ'(z1[j]) · x[i]"
    )
    of_bias, of_weights = _known(b1.grad), _known(W1.grad)
    rows, products, grads = [], [], []
    for j in range(2):
        terms = (upstream, second, w2[j].item(), first[j])
        for i in (None, 0, 1):
            last = () if i is None else (x[i].item(),)
            products.append(float(np.prod((*terms, *last))))
            grads.append((of_bias[j] if i is None else of_weights[j, i]).item())
            rows.append((
                f"b1[{j}]" if i is None else f"W1[{j}, {i}]",
                *(number(t, 4) for t in terms), number(last[0], 4) if last else "",
                number(products[-1], 6), number(grads[-1], 6),
            ))  # fmt: skip
    book.table(
        ("", "∂E/∂y", "φ'(z2)", "w2[j]", "φ'(z1[j])", "x[i]", "product", ".grad"),
        rows,
    )
    return np.array(products), np.array(grads)


def _known(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "a backward pass has just left one"
    return gradient
