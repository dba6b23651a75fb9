"""The error function against math.erf over its whole range."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device
from tests.ops.harness import DEVICES

TINY = np.logspace(-307, 0, 2001)
WHOLE = np.concatenate([np.linspace(-7.0, 7.0, 30001), TINY, -TINY])


def erf(x: np.ndarray, device: str = "cpu") -> np.ndarray:
    y = gg.erf(gg.tensor(x, device=device))
    return y.backend.to_host(y.data)


def exact(x: np.ndarray) -> np.ndarray:
    return np.array([math.erf(v) for v in x.ravel().tolist()]).reshape(x.shape)


@pytest.mark.parametrize("device", DEVICES)
def test_float64(device: str) -> None:
    np.testing.assert_allclose(erf(WHOLE, device), exact(WHOLE), rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("device", DEVICES)
def test_float32(device: str) -> None:
    x = WHOLE[(np.abs(WHOLE) > 1e-37) | (WHOLE == 0)].astype(np.float32)
    y = erf(x, device)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, exact(x), rtol=4e-7, atol=0.0)


def test_float16_by_way_of_float32() -> None:
    x = np.linspace(-5.0, 5.0, 101).astype(np.float16)
    y = erf(x)
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y, exact(x).astype(np.float16))


@pytest.mark.parametrize("device", DEVICES)
def test_special_values(device: str) -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324, 1e300, -1e300])
    y = erf(x, device)
    np.testing.assert_array_equal(y, exact(x))
    np.testing.assert_array_equal(np.signbit(y[:2]), [False, True])


def test_odd_and_monotone() -> None:
    x = np.linspace(0.0, 7.0, 5001)
    np.testing.assert_array_equal(erf(-x), -erf(x))
    assert np.all(np.diff(erf(x)) >= -2.3e-16)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (100, 201), (3, 1)])
def test_shapes(shape: Any) -> None:
    """One block, several blocks, and none."""
    x = np.random.default_rng(0).standard_normal(shape)
    for view in (x, x.T, x[..., ::-1] if x.ndim else x):
        np.testing.assert_allclose(erf(view), exact(view), rtol=1e-15)
        assert erf(view).shape == view.shape


def test_the_host_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    space = backend_for_device("strict:device1")
    x = space.asarray([0.1, 2.0], device="strict:device1")
    monkeypatch.setattr(space, "to_host", lambda x: pytest.fail("read by the host"))
    assert space.device(space.erf(x)) == "strict:device1"
