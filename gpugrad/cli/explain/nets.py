"""The small nets and trainings that several chapters run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpugrad import nn, optim
from gpugrad.core.conversion import tensor
from gpugrad.core.tensor import Tensor
from gpugrad.data.datasets import load
from gpugrad.health.probe import observe
from gpugrad.health.record import Record
from gpugrad.nn import functional as F
from gpugrad.nn.random import Generator

__all__ = ["Course", "deep", "digits", "gradient_norms", "linear_layers", "train", "watched"]

Array = NDArray[Any]

#: Everything is computed in it: sigmoid's gradients are too small for float32 to show them.
DTYPE = "float64"


def digits(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures of digits as rows of 64 numbers of mean 0 and variance 1, and their labels."""
    data = load("digits")
    pick = np.random.default_rng(seed).permutation(len(data.train_x))[:count]
    x = data.train_x[pick].reshape(count, -1).astype(np.float64)
    x = (x - x.mean()) / x.std()
    return tensor(x), tensor(data.train_y[pick])


def deep(
    depth: int,
    activation: Callable[[], nn.Module],
    gain: float = 1.0,
    norm: Callable[[], nn.Module] | None = None,
    width: int = 32,
    seed: int = 0,
) -> nn.Sequential:
    """`depth` layers of `width` units, and a last one for ten classes.

    Weights are normally distributed with the standard deviation gain / √inputs: with a gain of 1 a
    layer alone keeps the size of what runs through it.
    """
    generator = Generator(seed)
    net = nn.Sequential()
    features = 64
    for outputs in (*[width] * depth, 10):
        layer = nn.Linear(features, outputs, dtype=DTYPE)
        nn.init.normal_(layer.weight, 0.0, gain / math.sqrt(features), generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        net.append(layer)
        if len(net) and outputs == width:
            if norm is not None:
                net.append(norm())
            net.append(activation())
        features = outputs
    return net


def linear_layers(net: nn.Module) -> list[nn.Linear]:
    """The layers with weights, from the input to the loss."""
    return [m for m in net.modules() if isinstance(m, nn.Linear)]


def gradient_norms(net: nn.Module, x: Tensor, labels: Tensor) -> Array:
    """The norm of the gradient of every layer's weights, from one backward pass."""
    net.zero_grad()
    F.cross_entropy(net(x), labels).backward()
    norms = [np.linalg.norm(m.weight.grad.numpy()) for m in linear_layers(net)]  # type: ignore[union-attr]
    net.zero_grad()
    return np.array(norms)


def watched(net: nn.Module, x: Tensor, labels: Tensor) -> Record:
    """What one forward and backward is seen to do, layer by layer."""

    def run() -> Tensor:
        loss = F.cross_entropy(net(x), labels)
        loss.backward()
        return loss  # type: ignore[no-any-return]

    record = observe(net, run)
    net.zero_grad()
    return record


@dataclass(frozen=True)
class Course:
    """What a training came to.

    Attributes
    ----------
    losses, norms:
        Of every step; the norm of all gradients, before they were clipped.
    accuracy:
        In the end, on the examples of the training.
    """

    losses: Array
    norms: Array
    accuracy: float


def train(
    net: nn.Module,
    x: Tensor,
    labels: Tensor,
    steps: int,
    optimizer: optim.Optimizer | None = None,
    clip: float = math.inf,
    batch: int = 64,
    seed: int = 0,
) -> Course:
    """Train on batches drawn anew in each step; a loss that is not finite ends it."""
    optimizer = optimizer or optim.Adam(net.parameters(), lr=1e-3)
    rng = np.random.default_rng(seed)
    losses, norms = [], []
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(steps):
            pick = tensor(rng.integers(0, len(labels), batch))
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x[pick]), labels[pick])
            loss.backward()
            optimizer.step(clip=clip)
            losses.append(loss.detach())
            norms.append(optimizer.last_norm)
            if not math.isfinite(losses[-1].item()):
                break
        net.eval()
        right = np.argmax(net(x).detach().numpy(), axis=-1) == labels.numpy()
    return Course(
        np.array([v.item() for v in losses]),
        np.array([math.nan if v is None else v.item() for v in norms]),
        float(right.mean()),
    )
