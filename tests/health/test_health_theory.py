"""Mean-field theory: against integrals that are known, and against wide nets that are measured."""

import math

import numpy as np
import pytest

import gpugrad as gg
from bench.health_grid import scales
from gpugrad import nn
from gpugrad.errors import ParameterError
from gpugrad.health.theory import (
    correlation_map,
    critical_sigma_w,
    length_map,
    mean_field,
    sigmas,
    slope_moment,
)


def test_relu_has_closed_forms():
    for q in (1e-6, 1.0, 1e4):
        assert length_map("relu", q, 1.3, 0.2) == pytest.approx(1.3**2 * q / 2 + 0.04, rel=1e-9)
        assert slope_moment("relu", q) == pytest.approx(0.5, rel=1e-9)
    assert mean_field("relu", 1.5).chi == pytest.approx(1.5**2 / 2)
    assert mean_field("relu", 1.5).length == math.inf
    assert mean_field("relu", 1.0).length == 0.0
    assert mean_field("relu", math.sqrt(2)).phase == "critical"
    # Of the arc-cosine kernel; Cho and Saul (2009).
    for c in (-0.5, 0.0, 0.3, 0.9):
        angle = math.acos(c)
        exact = (math.sin(angle) + (math.pi - angle) * c) / math.pi
        assert correlation_map("relu", c, 2.0, math.sqrt(2)) == pytest.approx(exact, abs=2e-5)


def test_the_error_function_has_closed_forms():
    # Williams (1997): the mean of erf(u)² over u of variance q.
    for q in (0.1, 1.0, 7.0):
        exact = 2 / math.pi * math.asin(2 * q / (1 + 2 * q))
        assert length_map(gg.erf, q, 1.0) == pytest.approx(exact, rel=1e-9)
        slope = 4 / math.pi / math.sqrt(1 + 4 * q)
        assert slope_moment(gg.erf, q) == pytest.approx(slope, rel=1e-9)


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "gelu", "silu", "selu", "softplus", "elu"])
def test_integrals_agree_with_random_numbers(name):
    z = np.random.default_rng(0).standard_normal(400_000)
    x = gg.tensor(1.7**0.5 * z, requires_grad=True)
    y = getattr(nn.functional, name)(x)
    y.sum().backward()
    square = float((y.detach().numpy() ** 2).mean())
    assert length_map(name, 1.7, 1.0) == pytest.approx(square, rel=0.02)
    assert slope_moment(name, 1.7) == pytest.approx(float((x.grad.numpy() ** 2).mean()), rel=0.02)


def test_fixed_points_are_fixed():
    for sigma_w, sigma_b in ((0.9, 0.3), (1.3, 0.1), (2.5, 0.3), (4.0, 0.0)):
        field = mean_field("tanh", sigma_w, sigma_b)
        q, c = field.length, field.correlation
        assert length_map("tanh", q, sigma_w, sigma_b) == pytest.approx(q, rel=1e-6)
        assert correlation_map("tanh", c, q, sigma_w, sigma_b) == pytest.approx(c, abs=1e-6)
        assert (field.phase == "chaotic") == (c < 1) == (field.chi > 1)
        # The slope of the correlation map at its fixed point, by differences.
        h = -1e-3 if c == 1 else 1e-3
        slope = (correlation_map("tanh", c + h, q, sigma_w, sigma_b) - c) / h
        assert math.exp(-1 / field.xi_correlation) == pytest.approx(slope, abs=3e-3)


def test_the_transition_of_tanh():
    assert mean_field("tanh", 0.99).phase == "ordered"
    assert mean_field("tanh", 1.01).phase == "chaotic"
    assert critical_sigma_w("tanh") == pytest.approx(1, abs=1e-3)
    biased = critical_sigma_w("tanh", 0.3)
    assert biased is not None and biased > 1.1
    assert mean_field("tanh", biased, 0.3).gain == pytest.approx(1, abs=1e-3)
    assert critical_sigma_w(lambda x: 0.01 * x) is None


def test_activations_may_be_modules_and_functions():
    leaky = mean_field(nn.LeakyReLU(0.2), 1.2)
    assert leaky.chi == pytest.approx(1.2**2 * (1 + 0.04) / 2)
    assert mean_field(lambda x: 3 * x, 0.5, 0.1).gain == pytest.approx(1.5)
    with pytest.raises(ParameterError, match="is no function of"):
        mean_field("tangent", 1.0)
    with pytest.raises(ParameterError, match="sigma_b=-1"):
        mean_field("tanh", 1.0, -1)


def test_scales_of_weights():
    rng = np.random.default_rng(0)
    w, b = sigmas(rng.normal(0, 2 / 30, (500, 900)), rng.normal(0, 0.3, 500))
    assert w == pytest.approx(2.0, rel=0.01)
    assert b == pytest.approx(0.3, rel=0.1)
    assert sigmas(rng.normal(0, 1, (50, 3, 5, 5)))[0] == pytest.approx(math.sqrt(75), rel=0.05)


@pytest.mark.parametrize(("sigma_w", "sigma_b"), [(0.8, 0.1), (4.0, 0.3)])
def test_wide_tanh_nets_have_the_predicted_depth_scales(sigma_w, sigma_b):
    found = scales(sigma_w, sigma_b, width=800, depth=16, seeds=2)
    assert found.gradient == pytest.approx(found.gradient_theory, rel=0.05)
    if mean_field("tanh", sigma_w, sigma_b).phase == "ordered":
        # In the chaotic phase correlations are too noisy for nets of this size: see the benchmark.
        assert found.correlation == pytest.approx(found.correlation_theory, rel=0.05)
