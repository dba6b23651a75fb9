"""A step of training on a library that refuses implicit conversion reads nothing back."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_of
from tests.backend.counting import counting
from tests.backend.cupy_scenarios import net


@pytest.mark.parametrize(
    "convert",
    [np.asarray, bool, int, float, complex, operator.index, list, iter, np.float64, np.sin,
     lambda x: 1.0 in x, lambda x: np.ones(1) + x],
)  # fmt: skip
def test_arrays_refuse_every_way_out(convert) -> None:
    with counting():
        x = gg.tensor([1.0], device="counting").data
        with pytest.raises(TypeError):
            convert(x)


def mlp(device: str, steps: int = 3) -> tuple[list[gg.Tensor], list[gg.Tensor]]:
    """Two layers, softmax cross-entropy by hand, clipping by norm and SGD, all on the device."""
    r = np.random.default_rng(0)
    x = gg.tensor(r.normal(size=(8, 5)), device=device)
    labels = gg.tensor(np.eye(3)[r.integers(0, 3, 8)], device=device)
    weights = [gg.tensor(r.normal(size=s), device=device, requires_grad=True)
               for s in ((5, 6), (6,), (6, 3), (3,))]  # fmt: skip
    losses = []
    for _ in range(steps):
        w1, b1, w2, b2 = weights
        z = gg.tanh(x @ w1 + b1) @ w2 + b2
        z = z - gg.max(z, axis=1, keepdims=True)
        loss = (gg.log(gg.sum(gg.exp(z), axis=1)) - gg.sum(z * labels, axis=1)).mean()
        losses.append(loss.detach())
        loss.backward()
        with gg.no_grad():
            squares: Any = [gg.sum(w.grad * w.grad) for w in weights]  # type: ignore[operator]
            total = gg.sqrt(sum(squares[1:], squares[0]))
            scale = gg.minimum(1.0 / total, 1.0)
            for w in weights:
                w -= w.grad * (0.1 * scale)
                w.grad = None
    return [w.detach() for w in weights], losses


def test_training_step_reads_nothing_and_is_right() -> None:
    weights, losses = mlp("cpu")
    with counting() as counts:
        counts.clear()
        there, there_losses = mlp("counting")
        assert counts.host_reads == 0
        assert counts.launches > 0
        assert counts.uploads == 6, "the batch, the labels and four weights"
        for a, b in zip((*weights, *losses), (*there, *there_losses), strict=True):
            np.testing.assert_allclose(b.numpy(), a.numpy(), rtol=1e-12)
        assert counts.host_reads == 7, "and the counter does count"


def test_launches_do_not_grow_from_step_to_step() -> None:
    with counting() as counts:
        mlp("counting", 1)
        one = counts.launches
        counts.clear()
        mlp("counting", 4)
        assert counts.launches <= 4 * one


def test_indexing_and_broadcasting_read_nothing() -> None:
    with counting() as counts:
        net("counting")
        assert counts.host_reads == 3, "the three results that it returns"


def test_views_launch_nothing() -> None:
    with counting() as counts:
        x = gg.tensor(np.zeros((2, 3)), device="counting").data
        space = backend_of(x)
        counts.clear()
        space.reshape(x, (3, 2))
        space.broadcast_to(x, (4, 2, 3))
        space.getitem(x, (slice(None), 0))
        assert counts.launches == 0
        space.getitem(x, [1, 0])
        assert (counts.launches, counts.uploads) == (1, 1)
