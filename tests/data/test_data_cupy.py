"""Copies to a GPU: beside the work there, on a stream of their own, from pinned memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[2]

log: list[str] = []
pinned: list[int] = []  # addresses


class Event:
    def __init__(self, disable_timing: bool = False) -> None:
        assert disable_timing
        self.done = False


class Stream:
    made = 0

    def __init__(self, name: str = "copies", non_blocking: bool = False) -> None:
        assert non_blocking == (name == "copies")
        self.name = name
        Stream.made += 1

    def record(self, event: Event) -> Event:
        log.append(f"{self.name} record {id(event)}")
        return event

    def wait_event(self, event: Event) -> None:
        log.append(f"{self.name} wait {id(event)}")


def install(gpus: int) -> Any:
    """The stand-in for CuPy, with the parts that copies need."""
    from tests.backend.fake_cupy import install, ndarray

    cupy = install(gpus)
    compute = Stream("compute")
    cupy.cuda.Stream, cupy.cuda.Event = Stream, Event
    cupy.cuda.get_current_stream = lambda: compute

    def copied(self: Any, host: np.ndarray, stream: Stream) -> None:
        assert self.data.device_id == cupy.cuda.runtime.current
        assert host.ctypes.data in pinned
        log.append(f"{stream.name} copy {self.data.device_id}")
        self._host[...] = host

    def empty_pinned(shape: Any, dtype: Any) -> np.ndarray:
        out = np.empty(shape, dtype)
        pinned.append(out.ctypes.data)
        return out

    ndarray.set = copied  # type: ignore[attr-defined]
    sys.modules["cupyx"].empty_pinned = empty_pinned  # type: ignore[attr-defined]
    return cupy


def play(gpus: int, device: str, workers: int) -> None:
    """What a loader does; a broken assertion is a failure."""
    cupy = install(gpus)
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    loader = DataLoader(TensorDataset(x, y), 2, device=device, num_workers=workers)
    place = int(device.partition(":")[2] or 0)
    found = []
    for step, (inputs, labels) in enumerate(loader):
        assert inputs.device == f"cuda:{place}"
        if step == 0:
            assert sum("copies copy" in line for line in log) == 4, "one batch is copied ahead"
        log.append(f"step {step}")
        found.append((inputs, labels))
    assert cupy.cuda.runtime.current == 0
    np.testing.assert_array_equal(np.concatenate([a.data._host for a, _ in found]), x)
    np.testing.assert_array_equal(np.concatenate([b.data._host for _, b in found]), y)
    assert Stream.made == 2, "one stream for all copies"
    # Each copy waits for what the memory was used for, and each step for its copies.
    for i, line in enumerate(log):
        if "copies copy" in line:
            assert line.endswith(str(place))
            before, waits, after = log[i - 2], log[i - 1], log[i + 1]
            assert before.replace("compute record", "copies wait") == waits
            arrived = after.removeprefix("copies record ")
            assert f"compute wait {arrived}" in log[i:]
    copies = [i for i, line in enumerate(log) if "copies copy" in line]
    assert log.index("step 0") < copies[4] < log.index("step 1"), "the third batch"

    from gpugrad.backend import backend_for_device

    space = backend_for_device(device)
    under_way = space._copies[place]._under_way
    assert len(under_way) == 6, "host memory stays until it has been read"
    for event, _ in under_way:
        event.done = True
    space.copy_async(space.pinned(x), device)()
    assert len(under_way) == 1
    empty = np.zeros((0, 2))
    assert space.pinned(empty) is empty


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("gpus", "device"), [(1, "cuda"), (2, "cuda:1"), (2, "cuda:0")])
def test_copies_run_ahead(gpus: int, device: str, workers: int) -> None:
    code = f"from tests.data.test_data_cupy import play; play({gpus}, {device!r}, {workers})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_other_libraries_copy_at_once() -> None:
    from gpugrad.backend import backend_for_device

    cpu = backend_for_device("cpu")
    x = np.arange(3)
    assert cpu.pinned(x) is x
    assert cpu.copy_async(x)().tolist() == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_the_gpu(workers: int) -> None:
    x = np.random.default_rng(0).standard_normal((4096, 512)).astype(np.float32)
    y = np.arange(4096)
    loader = DataLoader(TensorDataset(x, y), 64, device="cuda:0", num_workers=workers)
    weight = gg.tensor(np.ones((512, 512), np.float32), device="cuda:0")
    seen, labels = [], []
    for inputs, targets in loader:
        for _ in range(20):  # work under which the next copies run
            work = inputs @ weight
        del work
        seen.append(gg.sum(inputs * 1.0, axis=1))
        labels.append(targets)
        del inputs
    found = np.concatenate([part.cpu().numpy() for part in seen])
    np.testing.assert_allclose(found, x.sum(axis=1), rtol=1e-3, atol=1e-3)
    assert np.concatenate([part.cpu().numpy() for part in labels]).tolist() == y.tolist()
