"""Exploding gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpugrad import nn, optim
from gpugrad import ops as gg
from gpugrad.cli.explain.book import Book
from gpugrad.cli.explain.nets import deep, digits, train, watched
from gpugrad.cli.explain.product import chain, term_by_term
from gpugrad.core.tensor import Tensor
from gpugrad.health.page_charts import number

DEPTH, GAIN = 30, 2.0


def show(book: Book) -> dict[str, Any]:
    """Tell the chapter; returns the figures that it found."""
    book.say(
        "A net is a graph of nodes and edges. Forward, values run from left to right; backward, "
        "each node takes what comes from upstream, multiplies it by its local derivative, and "
        "hands it on. An addition node passes it on as it is. A multiplication node multiplies it "
        "by its other input. What arrives at the start is a product of all local derivatives."
    )
    back = chain(book, 1.1, ".5f")
    book.head("A two-layer net, term by term")
    book.say(
        "The gradients of W1 and b1, the parameters furthest from the error E, are products too: "
        "the value from upstream, the slopes of the activations, the weights of the later layer. "
        "The slope of ReLU is 1, and the weights here are above 1, so the products grow:"
    )
    products, grads = term_by_term(book, gg.relu, "relu", 3.0)
    book.say("The last column is what the backward pass left in .grad: the same numbers.")

    book.head(f"{DEPTH} layers")
    x, labels = digits(256)
    signal = _signal(deep(DEPTH, nn.ReLU, GAIN), x, labels)
    # The last layer has other sizes than the rest.
    growth = float((signal[0] / signal[-2]) ** (1 / (DEPTH - 1)))
    book.say(
        f"Now {DEPTH} layers of 32 units with ReLU, with weights of standard deviation "
        f"{GAIN:g}/√32. Half of the units are off, so a layer multiplies the size of what comes "
        f"back by about {GAIN:g}·√½ = {GAIN * math.sqrt(0.5):.2f}. Measured: ×{growth:.2f} a "
        f"layer, so that {number(signal[0] / signal[-2])} times as much arrives at the first layer "
        "as leaves the last one."
    )
    net = deep(DEPTH, nn.ReLU, GAIN).to("float32")
    course = train(
        net, x.astype("float32"), labels, 20, optim.SGD(net.parameters(), lr=0.01)
    )  # 32 bits, as nets are trained
    went = ", ".join(number(v) for v in course.losses)
    book.say(
        "A step along such a gradient throws the parameters far off, and the next one further. "
        f"Trained in float32 with SGD, the loss goes {went}. Clip the gradients (gpugrad explain "
        "clipping), or start with weights that keep the size: a standard deviation of √(2/inputs) "
        "for ReLU."
    )
    good = _signal(deep(DEPTH, nn.ReLU, math.sqrt(2)), x, labels)
    layers = np.arange(1, DEPTH + 2)
    book.picture(
        "gradient that arrives at each layer's output (root mean square)",
        {f"weights {GAIN:g}/√32": (layers, signal), "√2/√32": (layers, good)},
        x_label="layer, from the input to the loss",
        log=True,
    )
    return {"back": back, "products": products, "grads": grads, "signal": signal, "growth": growth,
            "good": good, "losses": course.losses}  # fmt: skip


def _signal(net: nn.Module, x: Tensor, labels: Tensor) -> NDArray[Any]:
    """The backward signal at the layers with weights, the first one first."""
    record = watched(net, x, labels)
    linear = np.array(record.kinds) == "Linear"
    return np.asarray(record.values["signal"][0][linear], np.float64)
