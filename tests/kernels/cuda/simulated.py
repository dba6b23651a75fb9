"""Kernels in Numba's simulator: test_simulator.py runs this file with the simulator on.

Its threads are threads of the host, and slow: it is here to agree with `coroutines.py`, on some
kernels of every family.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from gpugrad.errors import KernelError

if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    pytest.skip("Numba's simulator is off", allow_module_level=True)

from gpugrad.kernels.cuda import compiler, elementwise, launch
from gpugrad.kernels.cuda.simulator import SimulatedGpu
from tests.kernels.cuda import (
    checks,
    norm_checks,
    optimizer_checks,
    recurrent_checks,
    rows,
    softmax_checks,
)
from tests.kernels.cuda.checks import DTYPES


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    gpu = SimulatedGpu()
    monkeypatch.setitem(launch.STAND_INS, np.ndarray, gpu)
    return gpu


@pytest.mark.parametrize("storage", DTYPES)
def test_maps_and_sums(storage):
    checks.check_map("geglu_gate_partial", storage, count=37)
    checks.check_map("gelu", storage, count=9, shift=1)
    checks.check_summary(storage, 150)


def test_every_family():
    checks.check_bias("tanh", "float32", shape=(9, 12))
    checks.check_bias_counts()
    softmax_checks.check_softmax("softmax", "float32")
    softmax_checks.check_softmax("log_softmax", "float32", shape=(2, 5, 3), axis=1)
    softmax_checks.check_loss("float32", label_smoothing=0.2, weighted=True)
    norm_checks.check_norm("layer", "float32", residual=True)
    norm_checks.check_batch("float32", shape=(2, 3, 16))
    rows.check_after_product("gelu", "float32")
    rows.check_embedding("float32", padding_row=4)
    rows.check_outside()
    recurrent_checks.check_step("lstm", "float32")
    recurrent_checks.check_step_backward("gru", "float32", missing=(1,))
    optimizer_checks.check_step(optimizer_checks.ADAMW, "float32", size=40, steps=1)


def test_two_warps_in_a_block(machine):
    machine.threads = 64
    checks.check_summary("float32", 300)
    checks.check_bias("tanh", "float32", shape=(9, 12))


def test_wrong_types_and_indices_are_seen(machine):
    x = np.ones(8, np.float32)
    entry = elementwise.map_of("relu")["float32"]
    with pytest.raises(IndexError):
        machine.run(entry, (1,), x, x.copy(), 0.0, 0.0, 9, 0)
    with pytest.raises(TypeError, match="float64 where float32"):
        machine.run(entry, (1,), x.astype("float64"), x, 0.0, 0.0, 8, 0)


def test_numba_is_no_compiler_now():
    assert "simulator" in compiler.survey()["numba"]
    with pytest.raises(KernelError, match="no compiler for CUDA kernels is usable"):
        elementwise.map_of("relu")["float32"].compiled()
