import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import DeviceError, ParameterError, ShapeError

DEVICES = ["cpu", "strict:device1"]


@pytest.mark.parametrize("device", [None, *DEVICES])
@pytest.mark.parametrize("dtype", [None, "float32", np.int64, gg.complex64])
@pytest.mark.parametrize(
    ("name", "args", "kw"),
    [
        ("zeros", (3,), {}),
        ("ones", ((2, 3),), {}),
        ("full", ((2,), 7), {}),
        ("arange", (4,), {}),
        ("arange", (1, 8, 3), {}),
        ("arange", (4.0,), {}),
        ("linspace", (0.0, 3.0, 4), {}),
        ("linspace", (0.0, 3.0, 3), {"endpoint": False}),
        ("eye", (3,), {}),
        ("eye", (2, 3), {"k": 1}),
    ],
)
def test_creation_is_numpys(name, args, kw, dtype, device) -> None:
    y = getattr(gg, name)(*args, **kw, dtype=dtype, device=device)
    expected = getattr(np, name)(*args, **kw, dtype=dtype or float if name == "eye" else dtype)
    assert y.device == (device or "cpu")
    assert y.dtype == expected.dtype
    assert not y.requires_grad
    np.testing.assert_array_equal(y.backend.to_host(y.data), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["zeros_like", "ones_like", "empty_like", "full_like"])
def test_like_another(name: str, device: str) -> None:
    x = gg.tensor([[1, 2]], dtype="int32", device=device)
    args = (3,) if name == "full_like" else ()
    like = getattr(gg, name)
    assert (like(x, *args).dtype, like(x, *args).device) == (np.int32, device)
    assert like(x, *args, dtype="float32").dtype == np.float32
    moved = like(x, *args, device="cpu")
    assert (moved.dtype, moved.device, moved.shape) == (np.int32, "cpu", (1, 2))
    assert like([1.0, 2.0], *args).dtype == np.float64


def test_devices_that_are_not_there() -> None:
    with pytest.raises(DeviceError, match="'tpu'"):
        gg.zeros(3, device="tpu")


@pytest.mark.parametrize("indexing", ["xy", "ij"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_meshgrid_is_numpys(n: int, indexing: str) -> None:
    arrays = [np.arange(k + 2.0) for k in range(n)]
    for mine, numpys in zip(gg.meshgrid(*arrays, indexing=indexing),
                            np.meshgrid(*arrays, indexing=indexing), strict=True):  # fmt: skip
        np.testing.assert_array_equal(mine.numpy(), numpys)


def test_meshgrid_checks() -> None:
    with pytest.raises(ParameterError, match="'xy' or 'ij'"):
        gg.meshgrid([1.0], indexing="yx")
    with pytest.raises(ShapeError, match="one axis each"):
        gg.meshgrid(gg.ones((2, 2)))


# -- dtypes ---------------------------------------------------------------------------------------


def test_dtypes_are_numpys() -> None:
    for name in ["bool", "int8", "uint64", "float16", "float32", "complex128"]:
        assert getattr(gg, name) == np.dtype(name)
    assert (gg.pi, gg.e, gg.inf, gg.newaxis) == (np.pi, np.e, np.inf, None)
    assert gg.nan != gg.nan


def test_bfloat16_when_its_package_is_there() -> None:
    pytest.importorskip("ml_dtypes")
    from gpugrad.ops import dtypes

    assert dtypes.bfloat16.itemsize == 2
    assert float(gg.finfo(dtypes.bfloat16).eps) == 2.0**-7
    x = gg.ones(3, dtype=dtypes.bfloat16).requires_grad_()
    (x * x).sum().backward()
    assert x.grad.dtype == dtypes.bfloat16


def test_what_is_known_about_dtypes() -> None:
    x = gg.tensor([1.0], dtype="float32")
    assert gg.finfo(x).bits == 32
    assert gg.iinfo(gg.tensor([1], dtype="int16")).max == 32767
    assert gg.result_type(x, 1.0) == gg.result_type(x, gg.int8) == np.float32
    assert gg.result_type(x, gg.tensor([1.0])) == np.float64
    assert gg.can_cast(x, "float64")
    assert not gg.can_cast("float64", "int8")
    assert gg.isdtype(x.dtype, ("integral", "real floating"))
    assert not gg.isdtype("bool", "numeric")


def test_the_namespace_describes_itself() -> None:
    info = gg.__array_namespace_info__()
    assert info.default_device() == "cpu"
    assert info.devices()[0] == "cpu"
    assert info.default_dtypes()["real floating"] == gg.zeros(1).dtype
    assert info.default_dtypes()["integral"] == gg.arange(1).dtype
    assert set(info.dtypes(kind="real floating")) == {"float32", "float64"}
    assert set(info.dtypes()) >= {"bool", "int8", "complex64"}
    assert info.capabilities()["boolean indexing"] is True
    with pytest.raises(ParameterError, match="'float'"):
        info.dtypes(kind="float")
