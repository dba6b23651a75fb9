"""Sigmoid against ReLU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpugrad import nn, optim
from gpugrad.cli.explain.book import Book
from gpugrad.cli.explain.nets import deep, digits, gradient_norms, train
from gpugrad.health.page_charts import number

#: Depth → the learning rate that suits it.
DEPTHS = {4: 1e-2, 20: 3e-3, 100: 3e-4}
STEPS = 100

#: Name → activation, and the gain of the weights that suits it.
ACTIVATIONS: dict[str, tuple[Any, float]] = {
    "sigmoid": (nn.Sigmoid, 1.0),
    "relu": (nn.ReLU, math.sqrt(2)),
}


def show(book: Book) -> dict[str, Any]:
    """Tell the chapter; returns the figures that it found."""
    book.say(
        "On the way back an activation multiplies the gradient by its slope. That of the sigmoid "
        "is at most 1/4. That of ReLU is 1 wherever a unit is on, and 0 where it is off: through "
        "the units that are on, the gradient passes as it is."
    )
    x, labels = digits(512)
    ratios: dict[tuple[str, int], float] = {}
    accuracies: dict[tuple[str, int], float] = {}
    lines = {}
    rows = []
    for name, (activation, gain) in ACTIVATIONS.items():
        for depth, lr in DEPTHS.items():
            net = deep(depth, activation, gain)
            norms = gradient_norms(net, x, labels)
            course = train(net, x, labels, STEPS, optim.Adam(net.parameters(), lr))
            ratios[name, depth] = float(norms[0] / norms[-1])
            accuracies[name, depth] = course.accuracy
            rows.append((
                f"{name}, {depth} layers", number(norms[0]), number(norms[-1]),
                number(ratios[name, depth]), f"{course.losses[-1]:.3f}", f"{course.accuracy:.0%}",
            ))  # fmt: skip
            if depth == max(DEPTHS):
                lines[f"{name}, {depth} layers"] = (np.arange(1, len(norms) + 1), norms)
    book.table(
        ("", "first layer", "last layer", "first / last", "loss", "accuracy"),
        rows,
    )
    book.say(
        f"The first three columns are gradient norms before training. Then {STEPS} steps of Adam "
        "on 512 digits, the deeper the net the smaller the learning rate; guessing is right in one "
        "of ten."
    )
    book.say(
        f"At depth 20 the sigmoid's first layer gets {number(ratios['sigmoid', 20])} of what the "
        f"last one gets, and the net does not learn; with ReLU the ratio is "
        f"{number(ratios['relu', 20])}, and it is right in {accuracies['relu', 20]:.0%}. At depth "
        "100 ReLU's gradient still arrives, but learning is slow: with depth a plain net makes all "
        "inputs alike, which no activation cures. Normalisation and short cuts around layers do "
        "(gpugrad explain normalisation)."
    )
    book.picture(
        "gradient norm of each layer", lines, x_label="layer, from the input to the loss", log=True
    )
    return {"ratios": ratios, "accuracies": accuracies}
