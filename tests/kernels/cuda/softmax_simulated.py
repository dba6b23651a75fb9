"""Softmax and cross-entropy in Numba's simulator: test_softmax.py runs this file with it on."""

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

from gpugrad.kernels.cuda import cross_entropy, launch, softmax
from gpugrad.kernels.cuda.simulator import SimulatedGpu
from tests.kernels.cuda import softmax_checks as checks
from tests.kernels.cuda.checks import DTYPES

NAMES = ("softmax", "log_softmax")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    # What is short for a warp is a matter of speed alone; here a row of 80 is long.
    monkeypatch.setattr(softmax, "SHORT", 40)
    gpu = SimulatedGpu()
    monkeypatch.setitem(launch.STAND_INS, np.ndarray, gpu)
    return gpu


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_softmax(name, storage):
    checks.check_softmax(name, storage)
    checks.check_softmax(name, storage, shape=(3, 48))
    checks.check_softmax(name, storage, shape=(2, 5, 3), axis=1)


def check_softmaxes():
    machine = launch.STAND_INS[np.ndarray]
    machine.threads = 64
    for name in NAMES:
        checks.check_softmax(name, "float32", shape=(9, 13), shift=1)
        checks.check_softmax(name, "float32", shape=(3, 150))
        checks.check_softmax(name, "float32", shape=(3, 5, 50), axis=1)
        checks.check_special(name, "float32")


@pytest.mark.parametrize("storage", DTYPES)
def test_cross_entropy(storage):
    checks.check_loss(storage)
    checks.check_loss(storage, shape=(3, 48), reduction="none", label_smoothing=0.2, weighted=True)
    checks.check_loss(storage, shape=(2, 5, 3), reduction="sum", label_smoothing=0.2)


def check_losses():
    machine = launch.STAND_INS[np.ndarray]
    machine.threads = 64
    smooth = {"label_smoothing": 0.2}
    checks.check_loss("float32", shape=(9, 13))
    checks.check_loss("float32", shape=(9, 13), weighted=True, reduction="none", **smooth)
    checks.check_loss("float32", shape=(5, 150), shift=1, **smooth)
    checks.check_loss("float32", shape=(5, 150), weighted=True, reduction="sum", ignore_index=2)
    checks.check_loss("float32", shape=(3, 5, 50), weighted=True, **smooth)
    checks.check_loss("float32", shape=(3, 5, 50), reduction="none")
    checks.check_special_losses(label_smoothing=0.2)
    checks.check_no_class()


# -- a test of these tests: a kernel with one operator changed fails them -------------------------

CHECKS = {softmax: check_softmaxes, cross_entropy: check_losses}

#: Either has the same result: which of two equal numbers is taken, who of many writes it, and
#: whether packs are worked on twice (the machine that runs PTX sees that they are not aligned).
EQUAL = ("b <= a", "lane != 0", "threadIdx.x != 0", "31 != 0", "width + LANES")


def mutants():
    """One operator of every body, which its name decides."""
    for module, check in CHECKS.items():
        for name, thing in vars(module).items():
            function = getattr(thing, "function", None)
            if not isinstance(thing, Template) or inspect.getmodule(function) is not module:
                continue
            choices = [
                n for n in range(operators(thing)) if not changed(thing, n)[1].endswith(EQUAL)
            ]
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
        except (AssertionError, IndexError):
            return
    pytest.fail(f"nobody noticed {what}")
