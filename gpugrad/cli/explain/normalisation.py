"""Normalisation of activations."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpugrad import nn, optim
from gpugrad.cli.explain.book import Book
from gpugrad.cli.explain.nets import DTYPE, deep, digits, train, watched
from gpugrad.health.page_charts import number

DEPTH, WIDTH, STEPS = 20, 32, 100
GAINS = {"weights too small": 0.5, "weights too large": 3.0}
NORMS: dict[str, Any] = {
    "none": None,
    "BatchNorm": lambda: nn.BatchNorm1d(WIDTH, dtype=DTYPE),
    "LayerNorm": lambda: nn.LayerNorm(WIDTH, dtype=DTYPE),
}


def show(book: Book) -> dict[str, Any]:
    """Tell the chapter; returns the figures that it found."""
    book.say(
        "The slope of an activation depends on where its inputs lie, and their size depends on all "
        "weights before them: again a product. Normalisation takes the mean away and divides by "
        "the standard deviation, in every layer anew: BatchNorm for each unit over the batch, "
        "LayerNorm for each example over the units. Whatever the weights do, what goes into an "
        "activation has mean 0 and spread 1."
    )
    x, labels = digits(512)
    spreads: dict[tuple[str, str], Any] = {}
    saturated: dict[tuple[str, str], float] = {}
    ratios: dict[tuple[str, str], float] = {}
    accuracies: dict[tuple[str, str], float] = {}
    lines = {}
    shown = (0, 9, 19)
    for title, gain in GAINS.items():
        rows = []
        for name, norm in NORMS.items():
            net = deep(DEPTH, nn.Tanh, gain, norm, WIDTH)
            record = watched(net, x, labels)
            of = np.array(record.kinds) == "Tanh"
            spread = record.values["activation_std"][0][of].astype(np.float64)
            flat = float(record.values["saturated"][0][of].mean())
            norms = record.values["gradient_norm"][0][np.array(record.kinds) == "Linear"]
            ratios[title, name] = float(norms[0] / norms[-1])
            course = train(net, x, labels, STEPS, optim.Adam(net.parameters(), 1e-3))
            spreads[title, name], saturated[title, name] = spread, flat
            accuracies[title, name] = course.accuracy
            rows.append((
                name, *(number(spread[i], 2) for i in shown), f"{flat:.0%}",
                number(ratios[title, name], 2), number(course.losses[-1]), f"{course.accuracy:.0%}",
            ))  # fmt: skip
            if title == "weights too small":
                lines[name] = (np.arange(1, DEPTH + 1), spread)
        book.head(f"{DEPTH} layers with tanh, {title}: standard deviation {gain:g}/√inputs")
        book.table(
            ("", *(f"layer {i + 1}" for i in shown), "saturated", "gradient", "loss", "accuracy"),
            rows,
        )
    book.say(
        "Layer by layer: the standard deviation of what the activations put out, before training. "
        "Saturated: the share of outputs where tanh is so flat that its slope is below 1/100. "
        "Gradient: its norm at the first layer, divided by that at the last. Loss and accuracy: "
        f"after {STEPS} steps of Adam at a learning rate of 0.001 on 512 digits."
    )
    faded = number(spreads["weights too small", "none"][-1], 2)
    weak, strong = (number(ratios[title, "none"], 2) for title in GAINS)
    book.say(
        "Without normalisation the weights decide. Small ones let the values fade, to a spread of "
        f"{faded} in the last layer: all inputs look alike to it, and next to nothing comes back "
        f"(×{weak}). Large ones push the values to the flat ends of tanh, "
        f"{saturated['weights too large', 'none']:.0%} of them, and what comes back through the "
        f"others is multiplied by large weights (×{strong}). With BatchNorm or LayerNorm the "
        "spread is the same in all layers, whatever the weights, and the net learns."
    )
    small_ones = ", ".join(
        f"{name} {share:.0%}" for (title, name), share in accuracies.items() if "small" in title
    )
    book.say(
        f"Accuracy from small weights: {small_ones}. Plain nets that are far deeper need short "
        "cuts around their layers as well."
    )
    book.picture("spread of the activations, weights too small", lines, x_label="layer", log=True)
    return {"spreads": spreads, "saturated": saturated, "ratios": ratios, "accuracies": accuracies}
