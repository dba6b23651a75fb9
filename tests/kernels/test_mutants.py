"""A test of the tests: a kernel with a changed operator no longer agrees with the generic text."""

import importlib
import zlib

import numpy as np
import pytest

import gpugrad as gg
from tests.kernels.mutation import bodies, mutated, operators
from tests.kernels.parity import run


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def compare(function, *arrays, **parameters):
    """Results and gradients with kernels and without."""
    got = run("require", function, *arrays, **parameters)
    want = run("off", function, *arrays, **parameters)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def elementwise():
    x = random(3 * 8192 + 5)
    compare(gg.gelu, x)
    compare(gg.swiglu, x, x[::-1].copy())
    compare(gg.bias_activation, random(70, 33), random(33, seed=1), activation="tanh")


def bias():
    from gpugrad.backend import backend_for_device
    from gpugrad.ops.fused import bias_activation_backward

    m = backend_for_device("cpu")
    g, x, b = random(200, 60), random(200, 60, seed=1), random(60, seed=2)
    g[3, 4] = np.nan
    seen = []
    for mode in ("require", "off"):
        with gg.use_kernels(mode):
            seen.append(bias_activation_backward(m, g, x, b, "silu", True))
            seen[-1] += bias_activation_backward(m, g[9:], x[9:], b, "silu", True)
    for a, w in zip(*seen):
        np.testing.assert_allclose(a, w, rtol=1e-4, atol=1e-4)
    compare(gg.bias_activation, x, b, activation="tanh")
    compare(gg.bias_activation, x, b, activation="gelu")


#: What is run against the kernels of a module.
CHECKS = {"cpu.elementwise": elementwise, "cpu.bias": bias}


def mutants():
    """One operator of every body that has some; which one, its name decides."""
    for family in CHECKS:
        module = importlib.import_module(f"gpugrad.kernels.{family}")
        for name, template in bodies(module).items():
            count = operators(template)
            if count:
                number = zlib.crc32(name.encode()) % count
                yield pytest.param(family, template, number, id=f"{family}.{name}")


@pytest.mark.parametrize("family", CHECKS)
def test_the_kernels_as_they_are_pass(family):
    CHECKS[family]()


@pytest.mark.parametrize(("family", "template", "number"), list(mutants()))
def test_a_changed_operator_is_noticed(family, template, number):
    with mutated(template, number) as what:
        try:
            with np.errstate(all="ignore"):
                CHECKS[family]()
        except AssertionError:
            return
    pytest.fail(f"nobody noticed {what}")
