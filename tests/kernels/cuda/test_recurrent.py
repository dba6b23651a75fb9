"""Steps of recurrent layers on the GPU, without one: their PTX run in Python."""

from __future__ import annotations

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend.numpy import NumpyBackend
from gpugrad.core.primitive import registry
from gpugrad.kernels.cuda import SLOTS, launch
from gpugrad.kernels.cuda import recurrent as family
from gpugrad.ops import recurrent
from tests.kernels.cuda import recurrent_checks as checks
from tests.kernels.cuda.fake_gpu import FakeArray
from tests.kernels.cuda.ptx_machine import PtxGpu

SHAPES = [(1, 1), (5, 13), (3, 16), (0, 4), (40, 5)]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    gpu = PtxGpu()
    monkeypatch.setitem(launch.STAND_INS, np.ndarray, gpu)
    return gpu


@pytest.mark.parametrize("storage", family.STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", checks.LAYERS)
def test_steps(kind, shape, storage):
    checks.check_step(kind, storage, shape=shape)
    checks.check_step_backward(kind, storage, shape=shape)


@pytest.mark.parametrize("kind", checks.LAYERS)
def test_any_alignment(kind):
    checks.check_step(kind, "float32", shift=1)
    checks.check_step_backward(kind, "float32", shift=3)


@pytest.mark.parametrize(
    ("kind", "missing"),
    [("rnn", (0,)), ("rnn", (1,)), ("lstm", (1,)), ("gru", (1,)), ("gru", (2,)), ("gru", (1, 2))],
)
def test_summands_that_are_not_there(kind, missing):
    checks.check_step_backward(kind, "float32", missing=missing)


def test_relu():
    checks.check_step("rnn", "float32", nonlinearity="relu")
    checks.check_step_backward("rnn", "float32", nonlinearity="relu")


def test_strides_over_more_than_a_grid(machine):
    checks.check_step("lstm", "float32", shape=(9, 50))
    machine.threads, machine.wave = 32, 2
    checks.check_step("gru", "float32", shape=(9, 50))
    checks.check_step_backward("gru", "float32", shape=(9, 50))


def device():
    """NumPy's arrays with the GPU's kernels for steps."""
    m = NumpyBackend()
    m.__dict__["slots"] = {name: slot for name, slot in SLOTS.items() if "_step" in name}
    return m


@pytest.mark.parametrize("kind", checks.LAYERS)
def test_a_step_of_a_layer_is_one_launch(kind, machine, monkeypatch):
    """Beside its product; forward and back, with the results of the generic text."""
    launched = []
    run = type(machine).run

    def noted(self, entry, *args):
        launched.append(entry.name)
        run(self, entry, *args)

    monkeypatch.setattr(type(machine), "run", noted)
    random, shares = np.random.default_rng(0), checks.LAYERS[kind][0] * 3
    shapes = [(4, 2, 5), (shares, 5), (shares, 3), (shares,), (shares,)]
    args = [random.standard_normal(s) for s in shapes]
    g = random.standard_normal((4, 2, 3))
    seen = []
    for m, mode in ((device(), "require"), (NumpyBackend(), "off")):
        with gg.use_kernels(mode):
            found = registry[f"{kind}_layer"].forward(m, *args)
            if kind == "lstm":
                given = (found[4], found[3], args[2], None, g, None, None, None, None, True, True)
            elif kind == "gru":
                given = (found[2], found[0], args[2], None, g, None, None, True, True)
            else:
                given = (found[0], args[2], g, None, "tanh", True, True)
            seen.append([*found, *getattr(recurrent, f"{kind}_backward")(m, *given)])
    assert len(launched) == 8
    for a, b in zip(*seen):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_refusals():
    kernels = family.KERNELS
    x, half = FakeArray((2, 3), np.dtype("float32")), FakeArray((2, 3), np.dtype("float16"))
    assert kernels["lstm_step"].refuse(None, x, x, x) is None
    assert "not computed in float16" in kernels["lstm_step"].refuse(None, half, half, half)
    assert "float32 and float16" in kernels["gru_step"].refuse(None, x, half, x)
    assert kernels["rnn_step"].refuse(None, x, x, "relu") is None
    assert "no kernel for 'gelu'" in kernels["rnn_step"].refuse(None, x, x, "gelu")
    assert kernels["rnn_step_backward"].refuse(None, x, None, x, "tanh") is None
    backward = kernels["gru_step_backward"].refuse
    assert backward(None, x, x, None, None, x, None) is None
    assert "gates of single steps" in backward(None, x, x, None, None, x, x)
