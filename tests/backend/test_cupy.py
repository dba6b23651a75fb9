"""The CuPy backend: played with a stand-in everywhere, and for real where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device, describe, is_usable
from gpugrad.core.graph import mutations
from gpugrad.errors import DeviceError
from tests.backend import cupy_scenarios as play

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", play.SCENARIOS)
def test_scenario(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.backend.cupy_scenarios", name],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# -- the CuPy that is installed, without a GPU -----------------------------------------------------


def raw_array(cupy: Any, shape: tuple[int, ...]) -> Any:
    """An array over memory that nobody will touch: enough for shapes, views and owners."""
    memory = cupy.cuda.UnownedMemory(4096, 4096, None, device_id=3)
    return cupy.ndarray(shape, dtype="f4", memptr=cupy.cuda.MemoryPointer(memory, 0))


def test_arrays_have_owners_that_can_be_watched() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    from gpugrad.backend.cupy import CupyBackend

    space = CupyBackend()
    x = raw_array(cupy, (3, 4))
    assert space.device(x) == "cuda:3"
    assert space.nbytes(x) == 48
    assert not space.is_view(x)
    for view in (x[1:], x.T, x[1:][0], x.reshape(12), cupy.broadcast_to(x, (2, 3, 4))):
        assert space.is_view(view)
        assert space.storage(view) is x
    assert weakref.ref(x)() is x, "in-place changes are noted by owner, without keeping it alive"


def test_inplace_marks_end_with_their_array() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    from gpugrad.backend import SPACES
    from gpugrad.backend.cupy import CupyBackend

    SPACES[cupy.ndarray] = CupyBackend()
    try:
        x = raw_array(cupy, (3,))
        mutations.mark(x[1:])
        assert mutations.after(x, 0)
        before = len(mutations.when)
        del x
        assert len(mutations.when) == before - 1
    finally:
        SPACES.clear()


def test_without_a_gpu_the_error_says_what_is_missing() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    if is_usable("cuda"):
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match=r"driver|GPU"):
        gg.tensor([1.0], device="cuda:0")
    info = next(b for b in describe() if b.name == "cupy")
    assert not info.usable
    assert info.version


# -- with a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_every_function_of_the_backend() -> None:
    play.every_function(backend_for_device("cuda:0"))


@pytest.mark.gpu
def test_net_has_the_gradients_of_numpy() -> None:
    for here, there in zip(play.net("cpu"), play.net("cuda:0"), strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-12)


@pytest.mark.gpu
def test_step_never_waits_for_the_gpu() -> None:
    import cupy

    def step() -> None:
        h = gg.tanh(x @ w)[1:]
        (h * h).mean().backward()
        (w * 2.0).sum().backward()

    w = gg.tensor(np.ones((3, 4)), device="cuda:0", requires_grad=True)
    x = gg.tensor(np.ones((5, 3)), device="cuda:0")
    big = cupy.ones((8192, 8192), dtype=cupy.float32)
    out = big @ big
    step()  # kernels are compiled, memory is in the pool
    stream = cupy.cuda.get_current_stream()
    stream.synchronize()
    for _ in range(100):  # a second of work or so, which a step that waits would have to sit out
        cupy.matmul(big, big, out=out)
    step()
    assert not stream.done, "the host has waited for the GPU"
    stream.synchronize()
    assert w.grad is not None


@pytest.mark.gpu
def test_reads_wait_for_the_current_stream() -> None:
    import cupy

    with cupy.cuda.Stream(non_blocking=True):
        x = gg.ones((1 << 22,), device="cuda:0")
        for _ in range(50):
            x = x + 1.0
        assert x[-1].item() == 51.0
    backend_for_device("cuda:0").synchronize()


@pytest.mark.gpu
def test_dlpack_shares_gpu_memory() -> None:
    import cupy

    x = gg.tensor(np.arange(4.0), device="cuda:0")
    assert gg.from_dlpack(x).data.data.ptr == x.data.data.ptr
    assert cupy.from_dlpack(x).data.ptr == x.data.data.ptr
    assert gg.from_dlpack(x, copy=True).data.data.ptr != x.data.data.ptr
    assert gg.from_dlpack(x, device="cpu").tolist() == [0.0, 1.0, 2.0, 3.0]
    assert gg.from_dlpack(np.arange(3.0), device="cuda:0").device == "cuda:0"


@pytest.mark.gpu
@pytest.mark.torch
def test_dlpack_with_torch_on_the_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    t = torch.arange(4.0, device="cuda")
    assert gg.from_dlpack(t).data.data.ptr == t.data_ptr()
    x = gg.tensor([1.0, 2.0], device="cuda:0")
    assert torch.from_dlpack(x).data_ptr() == x.data.data.ptr


@pytest.mark.gpu
def test_libraries_do_not_mix_by_themselves() -> None:
    x = gg.tensor(np.arange(3.0), device="cuda:0")
    for other in (np.arange(3.0), gg.tensor(np.arange(3.0))):
        with pytest.raises(DeviceError, match=r"cuda:0.*cpu|cpu.*cuda:0"):
            x + other
    with pytest.raises(DeviceError, match="does not become a NumPy array"):
        np.asarray(x)
    with pytest.raises(DeviceError, match="does not exist"):
        gg.tensor(1.0, device="cuda:99")


@pytest.mark.gpu
def test_two_gpus() -> None:
    space = backend_for_device("cuda")
    if len(space.devices()) < 2:
        pytest.skip("one GPU")
    for here, there in zip(play.net("cpu"), play.net("cuda:1"), strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-12)
    x = gg.tensor([1.0, 2.0], device="cuda:0", requires_grad=True)
    y = gg.tensor([3.0, 4.0], device="cuda:1", requires_grad=True)
    with pytest.raises(DeviceError, match=r"cuda:0.*cuda:1"):
        x * y
    (x.to("cuda:1") * y).sum().backward()
    assert (x.grad.device, y.grad.device) == ("cuda:0", "cuda:1")
    assert x.grad.tolist() == [3.0, 4.0]
