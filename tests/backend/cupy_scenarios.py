"""What ``gpugrad.backend.cupy`` does, played with a stand-in for CuPy; one scenario per process.

``python -m tests.backend.cupy_scenarios NAME`` plays one; a broken assertion is a failure.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import gpugrad as gg
from gpugrad.backend import DeviceInfo, backend_for_device, describe, is_usable
from gpugrad.errors import DeviceError, DTypeError
from tests.backend.fake_cupy import install

close = np.testing.assert_allclose
rng = np.random.default_rng(0)


def error_of(call: Callable[[], Any], kind: type[Exception] = DeviceError) -> str:
    try:
        call()
    except kind as error:
        return " ".join((str(error), *getattr(error, "__notes__", ())))
    raise AssertionError(f"no {kind.__name__}")


def unusable(*words: str) -> None:
    """Every way to ask for the GPU says the same, and reports do not raise."""
    text = error_of(lambda: gg.tensor([1.0], device="cuda"))
    for word in words:
        assert word in text, text
    assert not is_usable("cuda")
    info = next(b for b in describe() if b.name == "cupy")
    assert not info.usable
    assert info.reason in text
    assert info.devices == ()


def no_driver() -> None:
    install(error=(35, "cudaErrorInsufficientDriver"), driver=0)
    unusable("CuPy 14.0.0 is installed", "no NVIDIA driver", "'cpu'")


def old_driver() -> None:
    install(error=(35, "cudaErrorInsufficientDriver"), driver=12040)
    unusable("knows CUDA 12.4", "needs 13.2", "gpugrad[cuda12]")


def no_device() -> None:
    install(error=(100, "cudaErrorNoDevice"))
    os.environ["CUDA_VISIBLE_DEVICES"] = "7"
    unusable("finds no GPU", "CUDA_VISIBLE_DEVICES is '7'", "nvidia-smi")


def no_device_counted() -> None:
    install(gpus=0)
    unusable("finds no GPU")


def other_error() -> None:
    install(error=(999, "cudaErrorUnknown"))
    unusable("cannot be used", "cudaErrorUnknown")


def broken_libraries() -> None:
    install(broken=True)
    unusable("cannot compute", "libnvrtc.so.13", "[ctk]")


def not_installed() -> None:
    sys.modules["cupy"] = None  # type: ignore[assignment]
    unusable("cupy is not installed", "pip install 'gpugrad[cuda13]'")


def not_importable() -> None:
    class Broken:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:
            if name == "cupy":
                raise ImportError("libcublas.so.13: cannot open shared object file")

    sys.meta_path.insert(0, Broken)  # type: ignore[arg-type]
    unusable("installed but does not import", "libcublas.so.13")


def one_gpu() -> None:
    cupy = install(gpus=1)
    m = backend_for_device("cuda:0")
    assert m.bind(m.dtype) == m.dtype, "one GPU pays for no guard"
    info = next(b for b in describe() if b.name == "cupy")
    assert info.usable
    assert info.version == "14.0.0"
    assert info.devices == (DeviceInfo("cuda:0", "Fake GPU", 2**30),)
    assert m.devices() == ["cuda:0"]
    assert is_usable("cuda")
    assert not is_usable("cuda:1")
    assert "only GPU" in error_of(lambda: gg.tensor(1.0, device="cuda:1"))
    for bad in ("cuda:x", "cuda:-1", "cuda:"):
        assert "names no GPU" in error_of(partial(gg.tensor, 1.0, device=bad))
    every_function(m)
    training(cupy, "cuda")
    sharing(cupy, m)


def every_function(m: Any) -> None:
    """What the backend adds to CuPy, against NumPy's own."""
    host = rng.normal(size=(3, 4))
    x = m.asarray(host, device="cuda")
    read = m.to_host
    assert m.device(x) == "cuda:0"
    assert m.dtype("float32") is m.dtype(np.float32)
    assert m.numpy_dtype(x) == np.float64
    assert m.nbytes(x) == 96
    assert m.pi == np.pi
    assert m.native_device(None) is None
    m.synchronize()

    for name, args in (("zeros", ((2, 3),)), ("full", ((2,), 7.0)), ("arange", (5,)), ("eye", (3,)),
                       ("linspace", (0.0, 1.0, 5))):  # fmt: skip
        for device in (None, "cuda:0", m.native_device("cuda")):
            made = getattr(m, name)(*args, dtype=np.float32, device=device)
            close(read(made), getattr(np, name)(*args, dtype=np.float32))
            assert made.dtype == np.float32
        close(read(m.create(name, *args, dtype="float32", device="cuda:0")), read(made))
    close(read(m.ones_like(x)), np.ones((3, 4)))

    close(read(m.clip(x)), host)
    assert m.clip(x) is not x
    close(read(m.clip(x, -0.5)), np.clip(host, -0.5, None))
    close(read(m.clip(x, min=-0.5, max=0.5)), np.clip(host, -0.5, 0.5))
    index = np.argsort(host, axis=-1)
    close(read(m.take_along_axis(x, m.asarray(index))), np.sort(host))
    close(read(m.reshape(x, (4, 3))), host.reshape(4, 3))
    close(read(m.reshape(x, shape=(12,), copy=True)), host.ravel())
    assert m.astype(x, np.dtype("float32")).dtype == np.float32
    assert m.astype(x, np.dtype("float64"), copy=False) is x
    close(read(m.astype(x, np.dtype("float32"), device="cuda:0")), host.astype(np.float32))
    for name in ("var", "std"):
        close(read(getattr(m, name)(x, axis=0, correction=1.0, keepdims=True)),
              getattr(np, name)(host, axis=0, correction=1.0, keepdims=True))  # fmt: skip
    assert read(m.count_nonzero(x, axis=0, keepdims=True)).shape == (1, 4)
    ties = np.array([2.0, 1.0, 2.0, 3.0, 1.0])
    t = m.asarray(ties)
    close(read(m.sort(t)), np.sort(ties))
    close(read(m.sort(t, descending=True)), np.sort(ties)[::-1])
    assert read(m.argsort(t)).tolist() == [1, 4, 0, 2, 3]
    assert read(m.argsort(t, descending=True)).tolist() == [3, 0, 2, 1, 4]
    assert read(m.searchsorted(m.sort(t), 2.0)).item() == 2
    rows = m.unstack(x, axis=1)
    assert len(rows) == 4
    close(read(rows[1]), host[:, 1])
    close(read(m.vecdot(x, x)), np.vecdot(host, host))
    for dtype in ("float64", "float32", "float16"):
        y = m.erf(m.asarray(host, dtype=dtype))
        assert y.dtype == dtype
        close(read(y), np.vectorize(__import__("math").erf)(host), atol=1e-3)
    close(read(m.sum_to(x, (1, 4))), host.sum(0, keepdims=True))
    linear_algebra(m, host)
    close(read(m.fft.ifft(m.fft.fft(x))), host, atol=1e-12)
    indexing(m, host)


def linear_algebra(m: Any, host: np.ndarray) -> None:
    x = m.asarray(host)
    read = m.to_host
    square = host @ host.T + np.eye(3)
    s = m.asarray(square)
    for name, options in (
        ("cholesky", {}), ("cholesky", {"upper": True}), ("diagonal", {"offset": 1}),
        ("matrix_norm", {}), ("matrix_norm", {"ord": 1, "keepdims": True}),
        ("matrix_rank", {}), ("matrix_rank", {"rtol": 0.5}), ("pinv", {}), ("pinv", {"rtol": 1e-9}),
        ("svdvals", {}), ("trace", {"offset": 1}), ("inv", {}), ("det", {}),
        *(("vector_norm", {"axis": 0, "ord": p}) for p in (0, 1, 2, 3, np.inf, -np.inf)),
        ("vector_norm", {"keepdims": True}),
    ):  # fmt: skip
        close(read(getattr(m.linalg, name)(s, **options)),
              getattr(np.linalg, name)(square, **options), rtol=1e-9, err_msg=name)  # fmt: skip
    rtol = m.asarray(np.array(0.5))
    assert read(m.linalg.matrix_rank(s, rtol=rtol)) == np.linalg.matrix_rank(square, rtol=0.5)
    close(read(m.linalg.outer(x[0], x[1])), np.outer(host[0], host[1]))
    close(
        read(m.linalg.tensordot(x, s, axes=((0,), (0,)))), np.tensordot(host, square, ((0,), (0,)))
    )
    close(read(m.linalg.vecdot(x, x)), np.vecdot(host, host))
    error_of(lambda: m.linalg.no_such_function, AttributeError)
    error_of(lambda: m.linalg._private, AttributeError)


def indexing(m: Any, host: np.ndarray) -> None:
    x = m.asarray(host)
    read = m.to_host
    twice = m.asarray(np.array([0, 2, 0]))
    close(read(m.getitem(x, twice)), host[[0, 2, 0]])
    close(read(m.getitem(x, [0, 2])), host[[0, 2]])
    y = m.asarray(x, copy=True)
    m.setitem(y, (slice(None), 1), 5.0)
    m.setitem(y, 0, [1.0, 2.0, 3.0, 4.0])
    m.setitem(y, 2, m.getitem(x, 2))
    m.setitem(y, (1, 1), np.array(6.0))
    close(read(y)[0], [1, 2, 3, 4])
    assert read(y)[1, 1] == 6.0
    text = error_of(lambda: m.setitem(y, 0, np.ones(4)))
    assert "on the CPU" in text
    assert "cuda:0" in text
    for dtype in (bool, "int8", "int32", "int64", "uint64", "float16", "float32", "float64",
                  "complex64", "complex128"):  # fmt: skip
        g = np.ones((3, 4), dtype=dtype)
        if np.dtype(dtype).kind == "c":
            g = g * (1 + 2j)
        if np.dtype(dtype).kind == "i":
            g = -g
        g = g.astype(dtype)
        out = m.scatter_add(m.asarray(g), twice, (3, 4))
        assert out.dtype == np.dtype(dtype)
        expected = np.zeros((3, 4), dtype=dtype)
        np.add.at(expected, [0, 2, 0], g)
        close(read(out), expected)
    many = np.zeros(4096, dtype=np.int64)
    ones = m.asarray(np.ones(4096, dtype=np.float16))
    assert read(m.scatter_add(ones, m.asarray(many), (2,)))[0] == 4096, (
        "half precision sticks at 2048"
    )
    basic = read(m.scatter_add(m.getitem(x, (slice(1, 3), 0)), (slice(1, 3), 0), (3, 4)))
    close(basic[1:, 0], host[1:, 0])
    assert basic.sum() == basic[1:, 0].sum()
    index = np.array([[0, 0], [1, 2], [3, 3]])
    out = m.scatter_add_along_axis(m.asarray(np.ones((3, 2))), m.asarray(index), (3, 4), 1)
    close(read(out), [[2, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 2]])


def net(device: str) -> tuple[np.ndarray, ...]:
    """Loss and gradients of a small net, with every way back: matmul, broadcast, index, reduce."""
    r = np.random.default_rng(1)
    x = gg.tensor(r.normal(size=(5, 3)), device=device)
    w = gg.tensor(r.normal(size=(3, 4)), device=device, requires_grad=True)
    b = gg.tensor(r.normal(size=4), device=device, requires_grad=True)
    h = gg.tanh(x @ w + b)
    picked = h[[0, 1, 1]] * 2.0 + h[2:]
    loss = (picked * picked).mean() + (b * b).sum() + gg.exp(w).mean()
    loss.backward()
    loss2 = (w * w).sum()
    loss2.backward()  # adds to the first gradients in place
    assert w.grad.device == w.device
    assert b.grad.device == b.device
    return tuple(t.numpy() for t in (loss.detach(), w.grad, b.grad))


def training(cupy: Any, device: str) -> None:
    for here, there in zip(net("cpu"), net(device), strict=True):
        close(there, here, rtol=1e-12)
    assert cupy.cuda.runtime.current == 0, "the current device is left as it was"


def sharing(cupy: Any, m: Any) -> None:
    x = gg.tensor(np.arange(6.0), device="cuda")
    assert m.storage(m.getitem(x.data, slice(2, 4))) is x.data
    assert m.is_view(m.getitem(x.data, slice(2, 4)))
    assert not m.is_view(x.data)
    assert np.shares_memory(gg.from_dlpack(x).data._host, x.data._host)
    assert not np.shares_memory(gg.from_dlpack(x, copy=True).data._host, x.data._host)
    assert gg.from_dlpack(x, device="cuda").device == "cuda:0"
    uploaded = gg.from_dlpack(np.arange(3.0), device="cuda:0")
    assert uploaded.device == "cuda:0"
    assert uploaded.tolist() == [0.0, 1.0, 2.0]
    text = error_of(lambda: gg.from_dlpack(np.arange(3.0), device="cuda", copy=False))
    assert "copy=False" in text

    class Metal:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 8, 0

    assert "device type 8" in error_of(lambda: gg.from_dlpack(Metal()))

    host = gg.tensor(np.arange(6.0))
    for call in (lambda: x + host, lambda: host + x, lambda: x + np.arange(6.0)):
        text = error_of(call)
        for word in ("add", "numpy on cpu", "cupy on cuda:0", ".to("):
            assert word in text, text
    assert "float32" in str((x.to("float32") * np.float32(2)).dtype)
    assert (x.to("float32") * 2.0).dtype == np.float32, "Python's numbers are weak"
    assert (x * x).sum().data.shape == ()
    assert "does not become a NumPy array" in error_of(lambda: np.asarray(x))
    error_of(lambda: gg.tensor([object()], device="cuda"), DTypeError)
    back = x.cpu()
    assert back.device == "cpu"
    assert back.tolist() == list(range(6))
    assert "cuda:0" in repr(x)


@gg.primitive(vjp=lambda g, a, b: (g * b, g * a))
def with_joint_rule(m: Any, a: Any, b: Any, /) -> Any:
    """A product whose rule is written with operators, for both operands at once."""
    return a * b


def two_gpus() -> None:
    cupy = install(gpus=2)
    runtime = cupy.cuda.runtime
    # Rules met before the GPUs were known are bound to them afterwards.
    net("cpu")
    m = backend_for_device("cuda:1")
    every_function(m)
    training(cupy, "cuda:0")
    training(cupy, "cuda:1")
    assert [d.device for d in m.describe_devices()] == ["cuda:0", "cuda:1"]
    assert "'cuda:0' to 'cuda:1'" in error_of(lambda: gg.tensor(1.0, device="cuda:2"))

    x = gg.tensor(np.arange(3.0), device="cuda:0", requires_grad=True)
    y = gg.tensor(np.arange(3.0), device="cuda:1", requires_grad=True)
    text = error_of(lambda: x * y)
    for word in ("cuda:0", "cuda:1", "multiply", ".to("):
        assert word in text, text
    for made in (gg.zeros((2,), device="cuda:1"), gg.zeros_like(y), y * 2.0, y[1:], y.sum(),
                 gg.concat([y, y]), y.to("float32")):  # fmt: skip
        assert made.device == "cuda:1"
        assert runtime.current == 0
    assert m.zeros_like(y.data).data.device_id == 1
    assert m.zeros((2,), device=m.native_device("cuda:1")).data.device_id == 1
    assert m.linalg.vector_norm(y.data).data.device_id == 1
    error_of(lambda: m.concat([x.data, y.data]))

    moved = x.to("cuda:1")
    assert moved.device == "cuda:1"
    (moved * y).sum().backward()
    assert x.grad.device == "cuda:0"
    assert y.grad.device == "cuda:1"
    assert x.grad.tolist() == y.grad.tolist() == [0.0, 1.0, 2.0]
    z = gg.tensor(np.arange(3.0), device="cuda:1", requires_grad=True)
    a, b, c = gg.unstack(z)
    (a * b + b * c + c * a).backward()  # gradients of the outputs arrive twice
    assert z.grad.device == "cuda:1"
    assert z.grad.tolist() == [3.0, 2.0, 1.0]
    z.grad = None
    with_joint_rule(z, z + 1.0).sum().backward()
    assert z.grad.device == "cuda:1"
    assert z.grad.tolist() == [1.0, 3.0, 5.0]
    dx = gg.grad(lambda t: gg.sum(gg.sin(t) * t))(y.detach())
    assert dx.device == "cuda:1"
    with gg.no_grad():
        y += 1.0
        y[0] = 9.0
    assert y.tolist() == [9.0, 2.0, 3.0]

    runtime.synchronized.clear()
    m.synchronize()
    assert runtime.synchronized == [0, 1]

    class Foreign:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 1

        def __dlpack__(self, *, stream: int, max_version: Any, copy: Any) -> np.ndarray:
            return np.arange(2.0)

    assert gg.from_dlpack(Foreign()).device == "cuda:1"
    assert gg.from_dlpack(Foreign(), device="cuda:0").device == "cuda:0"


SCENARIOS = {
    f.__name__: f
    for f in (no_driver, old_driver, no_device, no_device_counted, other_error, broken_libraries,
              not_installed, not_importable, one_gpu, two_gpus)
}  # fmt: skip

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]]()
