"""Another library by registration, and memory shared with other libraries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import Backend, backend_of, register_backend
from gpugrad.errors import DeviceError, GraphError
from tests.backend.counting import forget_backend
from tests.backend.cupy_scenarios import net

# -- JAX: arrays that cannot change ----------------------------------------------------------------


class JaxBackend(Backend):
    """What it takes to differentiate JAX's arrays with gpugrad."""

    mutable = False

    def __init__(self, jnp: Any) -> None:
        super().__init__("jax", jnp, "jax", (type(jnp.zeros(())),))

    def find_dtype(self, dtype: Any) -> Any:
        return np.dtype(dtype)

    def numpy_dtype(self, x: Any) -> Any:
        return np.dtype(x.dtype)

    def is_view(self, x: Any) -> bool:
        return False  # nobody can change it

    def setitem_copy(self, x: Any, index: Any, value: Any) -> Any:
        return x.at[index].set(value)

    def scatter_add(self, g: Any, index: Any, shape: tuple[int, ...]) -> Any:
        return self.xp.zeros(shape, dtype=g.dtype).at[index].add(g)


@pytest.fixture
def jax_device() -> Iterator[str]:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    register_backend(JaxBackend(jax.numpy))
    yield "jax"
    forget_backend("jax")
    jax.config.update("jax_enable_x64", before)


def test_registered_library_has_the_gradients_of_numpy(jax_device: str) -> None:
    for here, there in zip(net("cpu"), net(jax_device), strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-12)


def test_second_order_on_a_registered_library(jax_device: str) -> None:
    x = gg.tensor([0.3, -0.7], device=jax_device, requires_grad=True)
    gg.sum(gg.sin(x) * x).backward(create_graph=True)
    first = x.grad
    x.grad = None
    gg.sum(first).backward()
    host = np.array([0.3, -0.7])
    np.testing.assert_allclose(x.grad.numpy(), 2 * np.cos(host) - host * np.sin(host), rtol=1e-12)


def test_inplace_on_immutable_arrays_makes_new_ones(jax_device: str) -> None:
    x = gg.tensor([1.0, 2.0], device=jax_device)
    before = x.data
    x += 1.0
    x[0] = 9.0
    assert x.tolist() == [9.0, 3.0]
    assert np.asarray(before).tolist() == [1.0, 2.0]
    w = gg.tensor([1.0, 2.0], device=jax_device, requires_grad=True)
    (w * w).sum().backward()
    first = w.grad.data
    (w * w).sum().backward()
    assert w.grad.tolist() == [4.0, 8.0]
    assert np.asarray(first).tolist() == [2.0, 4.0]


# -- DLPack ----------------------------------------------------------------------------------------


def address(x: np.ndarray) -> int:
    return x.ctypes.data


def test_dlpack_with_numpy_shares_memory_both_ways() -> None:
    host = np.arange(6.0).reshape(2, 3)
    x = gg.from_dlpack(host)
    assert address(x.data) == address(host)
    assert address(np.from_dlpack(x)) == address(host)
    assert address(gg.from_dlpack(x).data) == address(host)
    assert address(gg.from_dlpack(host, copy=True).data) != address(host)
    assert address(gg.from_dlpack(host, device="cpu", copy=False).data) == address(host)
    host[0, 0] = 7.0
    assert x.tolist()[0][0] == 7.0


def test_dlpack_keeps_strides() -> None:
    host = np.arange(12.0).reshape(3, 4)[:, ::2]
    x = gg.from_dlpack(host)
    assert x.data.strides == host.strides
    assert address(x.data) == address(host)


def test_dlpack_refuses_a_tensor_with_a_graph() -> None:
    x = gg.tensor([1.0], requires_grad=True)
    for call in (lambda: np.from_dlpack(x), lambda: gg.from_dlpack(x)):
        with pytest.raises(GraphError, match=r"tensor\.detach\(\)"):
            call()
    assert address(np.from_dlpack(x.detach())) == address(x.data)


def test_dlpack_to_a_missing_gpu_says_so() -> None:
    class OnGpu:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

    from gpugrad.backend import is_usable

    if is_usable("cuda"):
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match="cuda"):
        gg.from_dlpack(OnGpu())


@pytest.mark.torch
def test_dlpack_with_torch_shares_memory_both_ways() -> None:
    import torch

    t = torch.arange(6.0).reshape(2, 3)
    x = gg.from_dlpack(t)
    assert address(x.data) == t.data_ptr()
    x.requires_grad_()
    (x * x).sum().backward()
    assert torch.from_dlpack(x.grad).tolist() == (2 * t).tolist()
    y = gg.tensor([1.0, 2.0])
    assert torch.from_dlpack(y).data_ptr() == address(y.data)
    with pytest.raises(DeviceError, match=r"require gradient|requires_grad"):
        gg.from_dlpack(torch.ones(2, requires_grad=True))
    with pytest.raises(GraphError, match="DLPack"):
        torch.from_dlpack(x)


def test_dlpack_refuses_what_numpy_cannot_hold() -> None:
    class Refusing:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("a tile engine keeps this")

    with pytest.raises(DeviceError, match="Refusing cannot be shared: a tile engine"):
        gg.from_dlpack(Refusing())


def test_half_precision_sums_in_float32() -> None:
    x = np.full(4096, 1.0, dtype=np.float16)
    space = backend_of(x)
    assert space.sum_to(x, (1,)).tolist() == [4096.0]
    assert space.sum_to(x, (1,)).dtype == np.float16
    assert space.scatter_add(x, np.zeros(4096, dtype=int), (1,)).tolist() == [4096.0]
    big = np.full(3, 32767, dtype=np.int16)
    assert space.sum_to(big, ()) == 3 * 32767, "integers of two bytes are not half precision"
