"""Every function of the Array API standard, through every backend, against NumPy."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from gpugrad.backend import backend_for_device
from tests.backend import standard
from tests.backend.counting import counting


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("strict:device1", marks=pytest.mark.skipif(
            not importlib.util.find_spec("array_api_strict"),
            reason="array_api_strict is not installed")),
        "counting",
        pytest.param("cuda:0", marks=pytest.mark.gpu),
    ]
)  # fmt: skip
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with counting() if request.param == "counting" else nullcontext():
        yield request.param


def sent(value: Any, space: Any, device: str) -> Any:
    if isinstance(value, np.ndarray):
        return space.asarray(value, device=device)
    if isinstance(value, list):
        return [sent(v, space, device) for v in value]
    return value


def compare(space: Any, device: str, got: Any, expected: Any) -> None:
    if isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            compare(space, device, a, b)
        return
    expected = np.asarray(expected)
    assert isinstance(got, space.types), "a result is an array of the library, 0-d ones included"
    assert space.device(got) == device
    assert tuple(got.shape) == expected.shape
    host = space.to_host(got)
    if expected.dtype.kind in "fc":
        assert host.dtype == expected.dtype
        np.testing.assert_allclose(host, expected, rtol=1e-12, atol=1e-12)
    else:
        assert host.dtype.kind == expected.dtype.kind
        np.testing.assert_array_equal(host, expected)


def numbered(cases: list[Any]) -> list[str]:
    return [f"{name}-{i}" for i, (name, _, _) in enumerate(cases)]


@pytest.mark.parametrize(
    ("name", "args", "kwargs"), standard.CASES, ids=numbered(standard.CASES)
)  # fmt: skip
def test_function(device: str, name: str, args: Any, kwargs: Any) -> None:
    space = backend_for_device(device)
    got = getattr(space, name)(*(sent(a, space, device) for a in args), **kwargs)
    expected = getattr(np, name)(*args, **kwargs)
    if name == "unique_values":  # in whatever order
        got, expected = space.sort(got), np.sort(expected)
    compare(space, device, got, expected)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"), standard.LINALG_CASES, ids=numbered(standard.LINALG_CASES)
)  # fmt: skip
def test_linalg(device: str, name: str, args: Any, kwargs: Any) -> None:
    space = backend_for_device(device)
    got = getattr(space.linalg, name)(*(sent(a, space, device) for a in args), **kwargs)
    compare(space, device, got, getattr(np.linalg, name)(*args, **kwargs))


def test_every_function_has_a_case() -> None:
    cases = {name for name, _, _ in standard.CASES}
    # no case: values that are arbitrary, dtypes in and out, or a test of their own
    apart = {"asarray", "empty", "empty_like", "from_dlpack", "arange", "eye", "full", "linspace",
             "ones", "zeros", "astype", "can_cast", "finfo", "iinfo", "isdtype",
             "result_type"}  # fmt: skip
    assert cases | apart == set(standard.FUNCTIONS)
    assert {n for n, _, _ in standard.LINALG_CASES} | {"eigh", "qr", "svd"} == set(standard.LINALG)


@pytest.mark.parametrize(
    ("name", "args"),
    [("arange", (5,)), ("eye", (3,)), ("full", ((2,), 7.0)), ("linspace", (0.0, 1.0, 5)),
     ("ones", ((2, 3),)), ("zeros", ((2, 3),)), ("empty", ((2, 3),))],
)  # fmt: skip
def test_creation(device: str, name: str, args: Any) -> None:
    space = backend_for_device(device)
    got = space.create(name, *args, dtype="float32", device=device)
    assert space.device(got) == device
    host = space.to_host(got)
    assert host.dtype == np.float32
    if name != "empty":
        np.testing.assert_allclose(host, getattr(np, name)(*args, dtype=np.float32))


@pytest.mark.parametrize("dtype", standard.DTYPES)
def test_dtypes(device: str, dtype: str) -> None:
    space = backend_for_device(device)
    x = space.asarray([0, 1], dtype=dtype, device=device)
    assert space.numpy_dtype(x) == np.dtype(dtype)
    assert x.dtype == space.dtype(dtype) == space.dtype(np.dtype(dtype)) == space.dtype(x.dtype)
    assert space.nbytes(x) == 2 * np.dtype(dtype).itemsize
    y = space.astype(space.asarray([0, 1], dtype="int32", device=device), space.dtype(dtype))
    assert y.dtype == x.dtype
    assert space.isdtype(x.dtype, x.dtype)
    assert space.result_type(x, x) == x.dtype
    assert space.dtype(None) is None


def test_python_scalars_are_weak(device: str) -> None:
    space = backend_for_device(device)
    x = space.asarray([1.0, 2.0], dtype="float32", device=device)
    for y in (x * 2, 2.0 * x, x + 0.5, space.maximum(x, 0.0), space.where(x > 1, x, 0.0)):
        assert y.dtype == x.dtype


# -- against the CuPy that is installed, which needs no GPU ---------------------------------------


@pytest.fixture(scope="module")
def cupy_space() -> Any:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    from gpugrad.backend.cupy import CupyBackend

    return CupyBackend()  # make() would ask for a GPU


def test_cupy_namespace_is_complete(cupy_space: Any) -> None:
    """A function that CuPy gains or loses shows here."""
    names = (*standard.FUNCTIONS, *standard.CONSTANTS, *standard.DTYPES)
    missing = [n for n in names if not hasattr(cupy_space, n)]
    missing += [f"linalg.{n}" for n in standard.LINALG if not hasattr(cupy_space.linalg, n)]
    missing += [f"fft.{n}" for n in standard.FFT if not hasattr(cupy_space.fft, n)]
    assert not missing


def test_cupy_functions_take_the_standards_keywords(cupy_space: Any) -> None:
    strict = pytest.importorskip("array_api_strict", reason="its signatures are the standard's")
    refused = []
    for space, reference, names in (
        (cupy_space, strict, standard.FUNCTIONS),
        (cupy_space.linalg, strict.linalg, standard.LINALG),
        (cupy_space.fft, strict.fft, standard.FFT),
    ):
        for name in names:
            try:
                ours = inspect.signature(getattr(space, name)).parameters
            except ValueError:  # a ufunc, which takes what the standard's function takes
                continue
            if any(p.kind is p.VAR_KEYWORD for p in ours.values()):
                continue
            theirs = inspect.signature(getattr(reference, name)).parameters.values()
            refused += [
                f"{name}({p.name}=)"
                for p in theirs
                if p.kind is p.KEYWORD_ONLY and p.name not in ours
            ]
    # Without a use here: frequencies are made on the current device, in float64.
    assert sorted(refused) == [
        "fftfreq(device=)", "fftfreq(dtype=)", "rfftfreq(device=)", "rfftfreq(dtype=)"
    ]  # fmt: skip
