"""array-api-strict: what the standard refuses still works, and no array leaves its device."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device, backend_of
from gpugrad.errors import DeviceError, DTypeError
from tests.backend.cupy_scenarios import net

strict = pytest.importorskip("array_api_strict", reason="array_api_strict is not installed")

DEVICE = "strict:device1"


@pytest.fixture
def space():
    return backend_for_device(DEVICE)


def test_speaks_a_standard_that_is_new_enough() -> None:
    assert strict.get_array_api_strict_flags()["api_version"] >= "2024.12"


@pytest.mark.parametrize("name", ["CPU_DEVICE", "device1", "device2"])
def test_device_strings(name: str, space) -> None:
    x = gg.tensor([1.0, 2.0], device=f"strict:{name}")
    assert x.device == f"strict:{name}"
    assert x.data.device == strict.Device(name)
    assert backend_of(x.data) is space
    assert x.numpy().tolist() == [1.0, 2.0]


def test_default_and_unknown_device() -> None:
    assert gg.tensor(1.0, device="strict").device == "strict:CPU_DEVICE"
    with pytest.raises(DeviceError, match="'strict:device9' is not a device"):
        gg.tensor(1.0, device="strict:device9")


def test_reading_is_a_copy(space) -> None:
    x = space.asarray([1.0, 2.0], device=DEVICE)
    space.to_host(x)[0] = 7.0
    assert space.to_host(x).tolist() == [1.0, 2.0]


def test_devices_share_no_memory(space) -> None:
    host = np.zeros(2)
    x = space.asarray(host, device=DEVICE)
    y = space.asarray(x, device="strict:device2")
    host[0] = 1.0
    space.setitem(x, 0, 2.0)
    assert space.to_host(y).tolist() == [0.0, 0.0]
    assert space.to_host(x).tolist() == [2.0, 0.0]
    assert space.storage(space.asarray(x)) is space.storage(x), "one device does share"
    with pytest.raises(ValueError, match="without a copy"):
        space.asarray(host, device=DEVICE, copy=False)


def test_dtypes_come_from_any_spelling(space) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # comparing the library's dtypes with NumPy's warns
        for spelling in ("float32", np.float32, np.dtype("float32"), strict.float32):
            assert space.dtype(spelling) is strict.float32
    assert space.dtype(bool) is strict.bool
    with pytest.raises(DTypeError, match="no float16"):
        space.dtype("float16")


def test_indexing_that_the_standard_lacks(space) -> None:
    host = np.arange(12.0).reshape(3, 4)
    x = space.asarray(host, device=DEVICE)
    rows = space.asarray([0, 2, 2], device=DEVICE)
    mask = space.asarray(host > 5, device=DEVICE)
    numpy_rows = np.array([0, 2, 2])
    for index, expected in (
        (rows, numpy_rows), ((rows, slice(None), None), (numpy_rows, slice(None), None)),
        ((rows, 1), (numpy_rows, 1)), (mask, host > 5), (0, 0), (slice(0, 99), slice(0, 99)),
        ([0, 2], [0, 2]), (numpy_rows, numpy_rows), ((Ellipsis, rows), (Ellipsis, numpy_rows)),
    ):  # fmt: skip
        got = space.getitem(x, index)
        assert space.device(got) == DEVICE
        np.testing.assert_array_equal(space.to_host(got), host[expected])
    y = space.asarray(x, copy=True)
    space.setitem(y, (rows, 1), space.asarray([1.0, 2.0, 3.0], device=DEVICE))
    assert space.to_host(y)[:, 1].tolist() == [1.0, 5.0, 3.0]
    two = space.take(x, space.asarray([[0, 1], [2, 0]], device=DEVICE), axis=0)
    assert two.shape == (2, 2, 4)
    added = space.scatter_add(space.getitem(x, rows), rows, (3, 4))
    np.testing.assert_array_equal(space.to_host(added)[2], 2 * host[2])
    along = space.asarray(np.zeros((3, 2), dtype=int), device=DEVICE)
    out = space.scatter_add_along_axis(
        space.asarray(np.ones((3, 2)), device=DEVICE), along, (3, 4), 1
    )
    assert space.to_host(out)[:, 0].tolist() == [2.0, 2.0, 2.0]


def test_index_on_another_device_is_an_error(space) -> None:
    x = space.asarray([1.0, 2.0], device=DEVICE)
    elsewhere = space.asarray([0], device="strict:device2")
    for call in (
        lambda: space.getitem(x, elsewhere), lambda: space.setitem(x, 0, elsewhere),
        lambda: space.take(x, elsewhere), lambda: space.scatter_add(x, (elsewhere,), (3,)),
    ):  # fmt: skip
        with pytest.raises(DeviceError, match=r"device2 and on device1.*\.to\(device\)"):
            call()


def test_views_share_their_storage(space) -> None:
    x = space.asarray(np.zeros((3, 4)), device=DEVICE, copy=True)
    view = space.getitem(x, slice(1, 3))
    assert space.is_view(view)
    assert not space.is_view(x)
    assert space.storage(view) is space.storage(x)


def test_net_has_the_gradients_of_numpy() -> None:
    for here, there in zip(net("cpu"), net(DEVICE), strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-12)


def test_operands_on_two_devices_are_an_error_that_names_both() -> None:
    x = gg.tensor([1.0, 2.0], device="strict:device1")
    y = gg.tensor([1.0, 2.0], device="strict:device2")
    with pytest.raises(DeviceError) as caught:
        x * y
    text = str(caught.value)
    assert text.startswith("multiply:")
    assert "strict:device1" in text
    assert "strict:device2" in text
    with pytest.raises(DeviceError, match=r"numpy on cpu.*array_api_strict on strict:device1"):
        gg.tensor([1.0, 2.0]) + x
    assert (x * y.to(DEVICE)).tolist() == [1.0, 4.0]


def test_gradient_crosses_devices() -> None:
    x = gg.tensor([1.0, 2.0], requires_grad=True)
    (x.to(DEVICE) * gg.tensor([3.0, 4.0], device=DEVICE)).to("strict:device2").sum().backward()
    assert x.grad.device == "cpu"
    assert x.grad.tolist() == [3.0, 4.0]
