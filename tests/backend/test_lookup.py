"""Which library owns an array, what a device string leads to, and what is said when it cannot."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import backend as backends
from gpugrad.backend import (
    Backend,
    BackendInfo,
    backend_for_device,
    backend_of,
    describe,
    is_usable,
)
from gpugrad.errors import DeviceError, DTypeError
from tests.backend.counting import Array, CountingBackend, counting, forget_backend


def test_import_loads_no_array_library_but_numpy() -> None:
    code = (
        "import sys, gpugrad as gg\n"
        "x = gg.tensor([1.0], requires_grad=True)\n"
        "(x * x).sum().backward()\n"
        "print([m for m in ('cupy', 'cupyx', 'array_api_strict') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_numpy_arrays_and_scalars_have_one_backend() -> None:
    assert backend_of(np.zeros(2)) is backend_of(np.float32(1)) is backend_for_device("cpu")

    class Sub(np.ndarray):
        pass

    assert backend_of(np.zeros(2).view(Sub)) is backend_for_device("cpu")


def test_unknown_class_is_named() -> None:
    with pytest.raises(DTypeError, match="object is not an array of a known library"):
        backend_of(object())
    assert not backends.is_array(object())


@pytest.mark.parametrize("device", ["gpu", "abacus:1"])
def test_unknown_device_is_named(device: str) -> None:
    with pytest.raises(DeviceError, match="'cpu', 'cuda'"):
        gg.tensor(1.0, device=device)
    assert not is_usable(device)


def test_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_backend("array_api_strict")
    monkeypatch.delitem(sys.modules, "gpugrad.backend.strict", raising=False)
    monkeypatch.setitem(sys.modules, "array_api_strict", None)
    with pytest.raises(DeviceError, match="not installed; pip install array-api-strict"):
        gg.tensor(1.0, device="strict:device1")
    info = next(b for b in describe() if b.name == "array_api_strict")
    assert info == BackendInfo("array_api_strict", "strict", "", (), False, info.reason)
    monkeypatch.undo()
    sys.modules.pop("gpugrad.backend.strict", None)


def test_describe_lists_the_cpu() -> None:
    info = next(b for b in describe() if b.name == "numpy")
    assert info.usable
    assert info.version == np.__version__
    assert [d.device for d in info.devices] == ["cpu"]
    assert info.devices[0].memory >= 0


def test_describe_never_raises() -> None:
    class Broken(Backend):
        def describe_devices(self):
            raise OSError("the bus caught fire")

    backends.register_backend(Broken("broken", np, "broken", ()))
    try:
        info = next(b for b in describe() if b.name == "broken")
    finally:
        forget_backend("broken")
    assert not info.usable
    assert info.reason == "broken: the bus caught fire"


def test_registering_again_replaces() -> None:
    with counting():
        first = backend_for_device("counting")
        x = gg.tensor([1.0, 2.0], device="counting")
        assert (x + x).tolist() == [2.0, 4.0]
        second = backends.register_backend(CountingBackend())
        assert backend_of(x.data) is second is not first
        (x + x).tolist()
        assert second.counts.names["add"] == 1, "implementations are looked up again"
    with pytest.raises(DTypeError, match="known library"):
        backend_of(x.data)
    assert Array.__module__ == "tests.backend.counting"


def test_mixed_libraries_are_an_error_that_names_both() -> None:
    with counting():
        x = gg.tensor([1.0, 2.0], device="counting")
        for other in (gg.tensor([1.0, 2.0]), np.array([1.0, 2.0])):
            for call in (lambda o=other: x + o, lambda o=other: gg.add(o, x)):
                with pytest.raises(DeviceError) as caught:
                    call()
                text = str(caught.value)
                assert text.startswith("add:")
                assert "numpy on cpu" in text
                assert "counting on counting" in text
                assert ".to(device)" in text
        with pytest.raises(DeviceError, match="concat"):
            gg.concat([x, gg.tensor([1.0])])


def test_scalars_and_lists_go_to_the_device_of_their_neighbour() -> None:
    with counting() as counts:
        x = gg.tensor([1.0, 2.0], device="counting")
        for y in (x + 1.0, 1.0 + x, x + np.float64(1), gg.add(x, [1.0, 1.0]), np.float64(1) + x):
            assert y.device == "counting"
        assert counts.host_reads == 0
        assert (x + 1.0).tolist() == [2.0, 3.0]
        assert counts.host_reads == 1
