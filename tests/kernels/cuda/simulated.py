"""Kernels in Numba's simulator: test_simulator.py runs this file with the simulator on."""

from __future__ import annotations

import inspect
import os
import zlib

import numpy as np
import pytest

from gpugrad.errors import KernelError
from gpugrad.kernels.template import T, Template
from tests.kernels.mutation import changed, mutated, operators

if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    pytest.skip("Numba's simulator is off", allow_module_level=True)

from gpugrad.kernels.cuda import bias, blockwide, compiler, elementwise, launch, reduce
from gpugrad.kernels.cuda.blockwide import block_total
from gpugrad.kernels.cuda.language import Int, Values, cuda, kernel
from gpugrad.kernels.cuda.simulator import SimulatedGpu
from tests.kernels.cuda import checks
from tests.kernels.cuda.checks import DTYPES


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    gpu = SimulatedGpu()
    monkeypatch.setitem(launch.STAND_INS, np.ndarray, gpu)
    return gpu


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("name", ["gelu", "tanh_partial", "geglu_gate_partial"])
def test_maps(name, storage):
    checks.check_map(name, storage, count=37)
    checks.check_map(name, storage, count=9, shift=1)


@pytest.mark.parametrize(
    ("activation", "storage", "shape"),
    [
        ("relu", "float32", (5, 13)),
        ("tanh", "float64", (70, 8)),
        ("mish", "bfloat16", (9, 16)),
        ("gelu", "float16", (4, 9)),
        ("gelu", "float32", (0, 3)),
    ],
)
def test_bias_and_activation(activation, storage, shape):
    checks.check_bias(activation, storage, shape=shape)


def test_bias_counts():
    checks.check_bias_counts()


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("count", [0, 700])
def test_summary(storage, count):
    checks.check_summary(storage, count)


def test_summary_counts():
    checks.check_summary_counts("bfloat16", count=70)


def test_two_warps_in_a_block(machine):
    machine.threads = 64
    checks.check_summary("float32", 700)
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


# -- a test of these tests: a kernel with one operator changed fails them -------------------------


@kernel
def total_kernel(parts: Values, out: Values, count: Int) -> None:
    scratch = cuda.shared.array(32, T)
    total = block_total(parts, count, scratch)
    if cuda.threadIdx.x < 40:
        out[cuda.threadIdx.x] = total


def check_reduce():
    machine = launch.STAND_INS[np.ndarray]
    machine.threads = 64
    checks.check_summary("float32", 300)
    checks.check_summary_counts("float32", count=70)
    parts, out = checks.inputs("float32", 100, 6), np.zeros(40, np.float32)
    machine.run(total_kernel["float32"], (1,), parts, out, 100)
    np.testing.assert_allclose(out, parts.sum(dtype="float64"), rtol=1e-5)


def check_elementwise():
    for name in ("gelu", "tanh_partial", "geglu_gate_partial"):
        checks.check_map(name, "float32", count=300)
        checks.check_map(name, "float32", count=301, shift=1)


def check_bias():
    checks.check_bias("gelu", "float32", shape=(70, 12))
    checks.check_bias("tanh", "float32", shape=(9, 140))
    checks.check_bias("tanh", "float32", shape=(9, 13))
    checks.check_bias_counts()


CHECKS = {reduce: check_reduce, elementwise: check_elementwise, bias: check_bias, blockwide: None}


#: Every thread has the result then, and it does not matter which of them writes it.
WRITER = ("lane != 0", "thread != 0", "cuda.threadIdx.x != 0")


def mutants():
    """One operator of every body, which its name decides."""
    for module, check in CHECKS.items():
        for name, thing in vars(module).items():
            function = getattr(thing, "function", None)
            if not isinstance(thing, Template) or inspect.getmodule(function) is not module:
                continue
            count = operators(thing)
            choices = [n for n in range(count) if not changed(thing, n)[1].endswith(WRITER)]
            if choices and not thing.bound:
                number = choices[zlib.crc32(name.encode()) % len(choices)]
                yield pytest.param(thing, number, check or check_reduce, id=name)


@pytest.mark.parametrize("check", [c for c in CHECKS.values() if c])
def test_the_kernels_as_they_are_pass(check):
    check()


@pytest.mark.parametrize(("template", "number", "check"), list(mutants()))
def test_a_changed_operator_is_noticed(template, number, check):
    with mutated(template, number) as what:
        try:
            check()
        except (AssertionError, IndexError):
            return
    pytest.fail(f"nobody noticed {what}")
