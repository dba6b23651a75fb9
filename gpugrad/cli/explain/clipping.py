"""Clipping."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpugrad import nn, optim
from gpugrad.cli.explain.book import Book
from gpugrad.cli.explain.sequences import Reader, average
from gpugrad.core.conversion import tensor
from gpugrad.core.modes import no_grad
from gpugrad.health.page_charts import number
from gpugrad.nn import functional as F
from gpugrad.nn.random import manual_seed

LENGTH, STEPS, LR, CLIP, WEIGHT, WIDTH = 50, 200, 0.01, 1.0, 1.1, 16


def show(book: Book) -> dict[str, Any]:
    """Tell the chapter; returns the figures that it found."""
    book.say(
        f"A recurrent net applies the same weights at every step of a sequence: {LENGTH} steps are "
        f"{LENGTH} layers. This one has ReLU and starts with {WEIGHT} times the identity as its "
        f"recurrent weights, so that what came first arrives {WEIGHT}^{LENGTH} = "
        f"{WEIGHT**LENGTH:.0f} times as large, and gradients with it. It is to tell the mean of "
        "the numbers it reads."
    )
    book.lines(
        "norm        = √(sum of all g²)\ncoefficient = min(1, bound / norm)\n"
        "g           = coefficient · g       # the direction stays, the length is bounded"
    )
    losses, norms, coefficients = {}, {}, {}
    for name, bound in (("without", math.inf), (f"clipped at {CLIP:g}", CLIP)):
        losses[name], norms[name], coefficients[name] = _train(bound)
    free, clipped = losses
    steps = (1, 2, 3, 4, 5, 10, 50, STEPS)
    book.table(
        ("step", "loss without", "norm", "loss clipped", "norm", "coefficient"),
        [
            (
                k,
                *(number(a[k - 1]) if k <= len(a) else "stopped"
                  for a in (losses[free], norms[free])),
                number(losses[clipped][k - 1]),
                number(norms[clipped][k - 1]),
                number(coefficients[clipped][k - 1]),
            )
            for k in steps
        ],
    )  # fmt: skip
    used = float((coefficients[clipped] < 1).mean())
    book.say(
        f"Both start with a norm of {number(norms[free][0])}. Without clipping the first step, "
        f"{LR} times such a gradient, ruins the weights: after {len(losses[free])} steps the loss "
        f"is {number(losses[free][-1])}. With the bound the same net in the same order of examples "
        f"comes to a loss of {number(np.median(losses[clipped][-20:]))}. {used:.0%} of the steps "
        f"were clipped, the first to {number(coefficients[clipped][0])} of its gradient, the last "
        f"to {number(coefficients[clipped][-1])}: as the net gets better, it needs less."
    )
    book.say(
        "Clipping cures what explodes. It makes no gradient larger: what vanishes stays away "
        "(gpugrad explain rnn). In gpugrad the norm is taken and the coefficient applied in the "
        f"step itself: optimizer.step(clip={CLIP})."
    )
    lines = {name: (np.arange(1, len(y) + 1), y) for name, y in losses.items()}
    lines["coefficient"] = (np.arange(1, STEPS + 1), coefficients[clipped])
    book.picture("loss, and the clip coefficient", lines, x_label="step", log=True)
    return {"losses": list(losses.values()), "norms": list(norms.values()),
            "coefficients": coefficients[clipped], "clipped": used}  # fmt: skip


def _train(bound: float) -> tuple[Any, Any, Any]:
    """Loss, norm before clipping and coefficient of every step, until the loss is not finite."""
    manual_seed(0)
    net = Reader(nn.RNN, 1, 1, WIDTH, nonlinearity="relu")
    with no_grad():
        net.cell.weight_hh_l0[...] = tensor(WEIGHT * np.eye(WIDTH, dtype=np.float32))
    optimizer = optim.SGD(net.parameters(), lr=LR)
    rng = np.random.default_rng(0)
    found = []
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(STEPS):
            x, y = average(32, LENGTH, rng)
            optimizer.zero_grad()
            loss = F.mse_loss(net(x), y)
            loss.backward()
            optimizer.step(clip=bound)
            norm, coefficient = optimizer.last_norm, optimizer.last_coefficient
            assert norm is not None
            used = 1.0 if coefficient is None else coefficient.item()
            found.append((loss.item(), norm.item(), used))
            if not math.isfinite(found[-1][0]):
                break
    losses, norms, coefficients = np.array(found).T
    return losses, norms, coefficients
