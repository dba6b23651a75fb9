"""Steps of recurrent layers on the GPU, without one: their PTX run in Python."""

from __future__ import annotations

import numpy as np
import pytest

from gpugrad.kernels.cuda import launch
from gpugrad.kernels.cuda import recurrent as family
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
