"""Normalisation in Numba's simulator: test_norm.py runs this file with it on."""

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

from gpugrad.kernels.cuda import launch, norm, norm_launch
from gpugrad.kernels.cuda.simulator import SimulatedGpu
from tests.kernels.cuda import norm_checks as checks
from tests.kernels.cuda.checks import DTYPES


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    # What is short for a warp is a matter of speed alone; here a row of 80 is long.
    monkeypatch.setattr(norm_launch, "SHORT", 40)
    gpu = SimulatedGpu()
    monkeypatch.setitem(launch.STAND_INS, np.ndarray, gpu)
    return gpu


@pytest.mark.parametrize("storage", DTYPES)
def test_all_storages(storage):
    checks.check_norm("layer", storage, residual=True)
    checks.check_norm("rms", storage, shape=(3, 48))
    checks.check_norm("group", storage, shape=(2, 4, 5), groups=2)
    checks.check_batch(storage, shape=(2, 3, 16))


def check_all():
    launch.STAND_INS[np.ndarray].threads = 64
    checks.check_batch("float32", shape=(3, 3, 44))
    checks.check_norm("group", "float32", shape=(2, 4, 44), groups=2)
    checks.check_norm("group", "float32", shape=(2, 4, 13), groups=2, residual=True)
    for shape, shift in (((5, 13), 1), ((3, 80), 0)):
        checks.check_norm("layer", "float32", shape=shape, shift=shift)
        checks.check_norm("rms", "float32", shape=shape, residual=True)
    checks.check_large_mean()
    checks.check_nan()


# -- a test of these tests: a kernel with one operator changed fails them -------------------------

#: Either has the same result: who writes.
EQUAL = ("lane != 0",)


def mutants():
    """One operator of every body, which its name decides."""
    for name, thing in vars(norm).items():
        function = getattr(thing, "function", None)
        if not isinstance(thing, Template) or inspect.getmodule(function) is not norm:
            continue
        choices = [n for n in range(operators(thing)) if not changed(thing, n)[1].endswith(EQUAL)]
        if choices and not thing.bound:
            number = choices[zlib.crc32(name.encode()) % len(choices)]
            yield pytest.param(thing, number, id=name)


def test_the_kernels_as_they_are_pass():
    check_all()


@pytest.mark.parametrize(("template", "number"), list(mutants()))
def test_a_changed_operator_is_noticed(template, number):
    with mutated(template, number) as what:
        try:
            check_all()
        except (AssertionError, IndexError):
            return
    pytest.fail(f"nobody noticed {what}")
