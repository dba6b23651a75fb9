"""Dropout and embedding in Numba's simulator: test_rows.py runs this file with it on."""

from __future__ import annotations

import os

import numpy as np
import pytest

if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    pytest.skip("Numba's simulator is off", allow_module_level=True)

from gpugrad.kernels.cuda import launch
from gpugrad.kernels.cuda.simulator import SimulatedGpu
from tests.kernels.cuda import rows
from tests.kernels.cuda.checks import DTYPES


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setitem(launch.STAND_INS, np.ndarray, SimulatedGpu())


@pytest.mark.parametrize("storage", DTYPES)
def test_dropout(storage):
    rows.check_dropout(storage)
    rows.check_dropout(storage, count=600, shift=1)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("shape", [(5, 13), (9, 16)])
def test_after_a_product(storage, shape):
    rows.check_after_product("gelu", storage, shape)


def test_what_may_be_left_out():
    rows.check_after_product(None, "float32", bias=False, adds=False)
    rows.check_after_product("relu", "float32", p=0.0, bias=False)


@pytest.mark.parametrize("storage", DTYPES)
def test_embedding(storage):
    rows.check_embedding(storage)
    rows.check_embedding(storage, shape=(70,), rows=5, columns=16, padding_row=4, by_frequency=True)


def test_indices_outside():
    rows.check_outside()
