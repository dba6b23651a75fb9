"""Steps of an optimiser in Numba's simulator: test_optimizer.py runs this file with it on."""

from __future__ import annotations

import inspect
import os
import zlib

import numpy as np
import pytest

from gpugrad.kernels.template import Template
from tests.kernels.mutation import changed, mutated, operators

if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    pytest.skip("Numba's simulator is off", allow_module_level=True)

from gpugrad.kernels.cuda import gradient, launch, optimizer
from gpugrad.kernels.cuda.simulator import SimulatedGpu
from tests.kernels.cuda import optimizer_checks as checks
from tests.kernels.cuda.optimizer_checks import ADAMW, DTYPES, FULL, LION


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Two blocks of a warp."""
    gpu = SimulatedGpu()
    monkeypatch.setitem(launch.STAND_INS, np.ndarray, gpu)
    return gpu


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("variant", FULL, ids=str)
def test_every_rule_and_storage(variant, storage):
    checks.check_step(variant, storage, steps=1)


@pytest.mark.parametrize("size", [0, 1, 7, 300, 1001])
@pytest.mark.parametrize("storage", DTYPES)
def test_sizes(storage, size):
    checks.check_step(LION, storage, size=size, steps=1)


@pytest.mark.parametrize("storage", DTYPES)
def test_misaligned(storage):
    checks.check_step(ADAMW, storage, size=301, shift=1, steps=1)


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "zero"])
def test_trouble(nonfinite):
    checks.check_trouble(ADAMW, "float32", nonfinite)


@pytest.mark.parametrize("storage", DTYPES)
def test_the_ends_of_the_range(storage):
    checks.check_infinity(storage)
    checks.check_zeros(storage)
    checks.check_range(storage, finite_only=True, values=slice(3))


def test_two_warps_in_a_block(machine):
    machine.threads = 64
    checks.check_step(ADAMW, "float32", size=1100, steps=1)


# -- a test of these tests: a kernel with one operator changed fails them -------------------------


def check_gradient():
    mixed = np.resize(np.array([3e38, 1e-45, 1e-13, 1.0], np.float32), 90)
    checks.check_norm(mixed)
    checks.check_norm(np.full(90, 1e-30, np.float32))
    checks.check_norm(np.full(700, np.nan, np.float32))
    for places in ([7], [60, 3]):
        mixed[places] = np.inf
        checks.check_norm(mixed, finite_only=True)
    checks.check_seams()
    checks.check_float64_range([1e300, 1e-300])
    checks.check_infinity("float32")
    checks.check_many(launch.STAND_INS[np.ndarray])
    checks.check_accuracy(launch.STAND_INS[np.ndarray])


def check_optimizer():
    checks.check_trouble(("rmsprop", (True, True, True)), "float32", "skip")
    checks.check_step(("sgd", (False, False, True)), "float32", steps=1, nonfinite="zero")
    checks.check_step(("adagrad", (True,)), "float32", steps=1, bound=1e9)
    checks.check_update(ADAMW, "float32")


CHECKS = {gradient: check_gradient, optimizer: check_optimizer}


#: Changes that change no result, or let a loop run for ever.
HARMLESS = (
    "threadIdx.x != 0",  # all threads have the results
    "i < parts",
    "i < n",
    "exponent != 255 + 896",
)


def mutants():
    """One operator of every body, which its name decides."""
    for module, check in CHECKS.items():
        for name, thing in vars(module).items():
            function = getattr(thing, "function", None)
            if not isinstance(thing, Template) or inspect.getmodule(function) is not module:
                continue
            told = {n: changed(thing, n)[1] for n in range(operators(thing))}
            choices = [n for n, what in told.items() if not any(h in what for h in HARMLESS)]
            if choices and not thing.bound:
                number = choices[zlib.crc32(name.encode()) % len(choices)]
                yield pytest.param(thing, number, check, id=name)


@pytest.mark.parametrize("check", CHECKS.values())
def test_the_kernels_as_they_are_pass(check):
    check()


@pytest.mark.parametrize(("template", "number", "check"), list(mutants()))
def test_a_changed_operator_is_noticed(template, number, check):
    with mutated(template, number) as what:
        try:
            check()
        except (AssertionError, IndexError, ValueError):
            return
    pytest.fail(f"nobody noticed {what}")
