"""Policies inside `optimizer.step`: what they do by hand, and nothing read from the device."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn, optim
from gpugrad.backend import backend_of
from gpugrad.clip import AGC, AutoClip, GlobalNorm, TensorNorm, Value, ZClip, norm_of
from tests.backend.counting import counting

SHAPES = [(4, 3), (4,), (), (2, 5)]
POLICIES = {
    "norm": lambda: GlobalNorm(0.7),
    "norm 1": lambda: GlobalNorm(0.7, 1),
    "norm 3": lambda: GlobalNorm(0.7, 3),
    "norm inf": lambda: GlobalNorm(0.7, np.inf),
    "value": lambda: Value(0.3),
    "tensor norm": lambda: TensorNorm(0.5),
    "agc": lambda: AGC(0.1),
    "autoclip": lambda: AutoClip(20.0, window=6),
    "zclip": lambda: ZClip(1.0, 0.9, warmup=4),
}


def gradients(step, dtype):
    rng = np.random.default_rng(step)
    return [np.array(rng.standard_normal(s) * (1 + step % 5), dtype) for s in SHAPES]


def trained(policy, dtype, device="cpu", steps=20):
    rng = np.random.default_rng(99)
    params = [
        nn.Parameter(gg.tensor(np.array(rng.standard_normal(s), dtype), device=device))
        for s in SHAPES
    ]
    optimizer = optim.SGD(params, lr=0.1)
    for step in range(steps):
        for p, g in zip(params, gradients(step, dtype)):
            p.grad = gg.tensor(g, device=device)
        optimizer.step(clip=policy)
    return params


def by_hand(policy, dtype, steps=20):
    rng = np.random.default_rng(99)
    params = [np.array(rng.standard_normal(s), dtype) for s in SHAPES]
    m = backend_of(params[0])
    for step in range(steps):
        grads = gradients(step, dtype)
        if hasattr(policy, "coefficient"):
            factor = policy.coefficient(m, norm_of(m, grads, policy.norm_type))
            grads = [g * factor for g in grads]
        else:
            policy.apply(m, params, grads)
        params = [p - np.dtype(dtype).type(0.1) * g for p, g in zip(params, grads)]
    return params


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_step_clips_as_by_hand(name, dtype) -> None:
    want = by_hand(POLICIES[name](), dtype)
    unclipped = by_hand(GlobalNorm(np.inf), dtype)
    assert any(not np.allclose(a, b, rtol=1e-3) for a, b in zip(want, unclipped))
    for have, expected in zip(trained(POLICIES[name](), dtype), want):
        tolerance = 1e-12 if dtype == "float64" else 2e-5
        assert np.allclose(have.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_is_read_in_a_step(name) -> None:
    with counting() as counts:
        params = trained(POLICIES[name](), "float32", "counting")
        assert counts.host_reads == 0
        want = trained(POLICIES[name](), "float32")
        for a, b in zip(params, want):
            assert np.allclose(a.tolist(), b.tolist(), rtol=1e-5, atol=1e-6)
