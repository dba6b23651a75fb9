"""Vanishing gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpugrad import nn, optim
from gpugrad import ops as gg
from gpugrad.cli.explain.book import Book
from gpugrad.cli.explain.nets import deep, digits, gradient_norms, linear_layers, train
from gpugrad.cli.explain.product import chain, term_by_term
from gpugrad.health.page_charts import number

DEPTH, STEPS = 10, 150


def show(book: Book) -> dict[str, Any]:
    """Tell the chapter; returns the figures that it found."""
    book.say(
        "What arrives at the first layer is a product of the local derivatives of all layers "
        "behind it. Where most factors are below 1, next to nothing arrives:"
    )
    back = chain(book, 0.9, ".18f")
    book.head("A two-layer net, term by term")
    book.say(
        "The slope of the sigmoid is at most 1/4, and smaller away from 0. Each layer brings one "
        "more such factor into the gradients of W1 and b1:"
    )
    products, grads = term_by_term(book, gg.sigmoid, "sigmoid", 1.0)
    book.say("The last column is what the backward pass left in .grad: the same numbers.")

    book.head(f"{DEPTH} layers")
    x, labels = digits(512)
    net = deep(DEPTH, nn.Sigmoid)
    norms = gradient_norms(net, x, labels)
    growth = float((norms[1] / norms[-2]) ** (1 / (len(norms) - 3)))
    book.say(
        f"{DEPTH} layers of 32 units with the sigmoid: a layer multiplies the gradient by "
        f"{growth:.2f} on the way back, from {number(norms[-1])} at the last layer to "
        f"{number(norms[0])} at the first."
    )
    before = [m.weight.detach().numpy().copy() for m in linear_layers(net)]
    course = train(net, x, labels, STEPS, optim.SGD(net.parameters(), lr=0.1))
    moved = np.array([
        np.linalg.norm(m.weight.detach().numpy() - old) / np.linalg.norm(old)
        for m, old in zip(linear_layers(net), before)
    ])  # fmt: skip
    book.table(
        ("layer", "gradient norm", f"moved in {STEPS} steps"),
        [(i + 1, number(norms[i]), f"{100 * moved[i]:.2g} %") for i in range(len(norms))],
    )
    book.say(
        f"After {STEPS} steps of SGD the first layer is where it was: the layers far from the loss "
        f"do not learn. The loss went from {course.losses[0]:.2f} to {course.losses[-1]:.2f}, and "
        f"guessing costs {np.log(10):.2f}. What helps: an activation whose slope is 1 (gpugrad "
        "explain relu), and normalised activations (gpugrad explain normalisation)."
    )
    layers = np.arange(1, len(norms) + 1)
    book.picture(
        "gradient norm of each layer, and how far it moved",
        {"gradient norm": (layers, norms), "moved": (layers, moved)},
        x_label="layer, from the input to the loss",
        log=True,
    )
    return {"back": back, "products": products, "grads": grads, "norms": norms, "growth": growth,
            "moved": moved, "losses": course.losses}  # fmt: skip
