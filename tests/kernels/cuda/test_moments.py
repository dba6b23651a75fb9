"""Moments on the GPU, without one: PTX run in Python, its launches, and what is uploaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.clip import norms
from gpugrad.health import statistics
from gpugrad.kernels.cuda import assembly, launch, moments
from gpugrad.kernels.cuda.build import entries
from tests.kernels.cuda import moments_checks as checks
from tests.kernels.cuda import offline
from tests.kernels.cuda.checks import DTYPES
from tests.kernels.cuda.fake_gpu import FakeArray, FakeDriver
from tests.kernels.cuda.ptx_machine import PtxGpu

NUMPY = backend_for_device("cpu")


@pytest.fixture
def machine(monkeypatch):
    gpu = PtxGpu()
    monkeypatch.setitem(launch.STAND_INS, np.ndarray, gpu)
    return gpu


@pytest.mark.parametrize("storage", DTYPES)
def test_parts(machine, storage):
    machine.threads = 64 if storage == "float32" else 32
    checks.check_parts(storage, shift=1)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("size", [0, 3, 64, 801])
def test_any_size(machine, storage, size):
    checks.check_whole(storage, size, shift=size % 3)


def test_at_the_ends_of_the_range(machine):
    checks.check_range("float32")


def test_no_digits_are_lost(machine):
    checks.check_digits("float32")


def test_arrays_of_any_shape(machine):
    x = checks.inputs("float32", 120, 3).reshape(4, 5, 6)
    for laid in (x, x[:, ::2], x.T, np.asarray(x[1, 2, 3])):
        got = moments.moments(NUMPY, np.asarray(laid))
        np.testing.assert_allclose(got, statistics.moments(NUMPY, np.array(laid)), rtol=1e-10)


@pytest.mark.parametrize("storage", DTYPES)
def test_norms_of_one_gradient(machine, storage):
    """As clipping asks for them; accuracy is a matter of the kernels of `gradient.py`."""
    x = checks.spoilt(storage, 90)
    for laid in (np.nan_to_num(x, posinf=3, neginf=-3), x, x[:0], x[::2]):
        for name in ("sum_of_squares", "max_abs", "nonfinite_count"):
            kernel = moments.KERNELS[name]
            assert kernel.refuse(NUMPY, laid) is None
            got = kernel.run(NUMPY, laid)
            with gg.use_kernels("off"), np.errstate(all="ignore"):
                want = getattr(norms, name)(NUMPY, laid)
            assert got.shape == ()
            np.testing.assert_allclose(got, want, rtol=1e-5)
            if name == "sum_of_squares":  # no second look is needed
                assert got.dtype == np.float64


def test_numbers_are_columns_of_the_statistics():
    assert moments.NUMBERS == statistics.MOMENTS


def test_chunks_cover_every_part_once():
    gpu = launch.Machine()
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 10**6, 50)
    bounds = np.stack((starts, starts + rng.integers(0, 10**5, 50)), axis=1)
    bounds[7] = 12, 12
    bounds[9] = 3, 3 * 10**9
    table, count = moments.tabulated(bounds, gpu, 4)
    chunks, first, sizes = np.split(table, [2 * count, 2 * count + 51])
    chunks = chunks.reshape(-1, 2)
    assert first[0] == 0 and first[-1] == count
    assert sizes.tolist() == (bounds[:, 1] - bounds[:, 0]).tolist()
    for part, (a, b) in enumerate(bounds):
        mine = chunks[first[part] : first[part + 1]]
        assert 1 <= len(mine) <= gpu.parts
        assert (mine[0, 0], mine[-1, 1]) == (a, b)
        assert np.array_equal(mine[1:, 0], mine[:-1, 1])
        assert np.all((mine[1:, 0] - a) % 4 == 0)


# -- launches and uploads --------------------------------------------------------------------------


class Uploads:
    """A backend that notes what it uploads."""

    def __init__(self):
        self.uploads = []

    def device(self, x):
        return f"cuda:{x.data.device_id}"

    def asarray(self, host, device):
        self.uploads.append(host)
        return FakeTable(host.shape, host.dtype)


class FakeTable(FakeArray):
    def __getitem__(self, part):
        return FakeTable(self.size - part.start, self.dtype, self.data.ptr + 8 * part.start)

    def view(self, dtype):
        return FakeTable(self.size, dtype, self.data.ptr)


FakeTable.__module__ = FakeArray.__module__


@pytest.fixture
def driver(monkeypatch):
    driver = FakeDriver()
    module = driver.module()
    module.empty = lambda shape, dtype: FakeTable(shape, dtype)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(launch, "_gpus", {})
    moments._table.cache_clear()
    yield driver
    moments._table.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("parts", [1, 3, 2000])
def test_two_launches_and_one_upload_for_any_number_of_parts(driver, dtype, parts):
    ends = 16 * np.arange(parts + 1)
    bounds = np.stack((ends[:-1], ends[1:]), axis=1)
    m, x = Uploads(), FakeArray(16 * parts, dtype)
    assert moments.KERNELS["moments"].refuse(m, x, bounds=bounds) is None
    for _ in range(3):
        out = moments.moments(m, x, bounds=bounds.copy())
    assert (out.shape, out.dtype) == ((parts, 8), np.float64)
    first, second = driver.launched[-2:]
    assert first[:2] == (f"moments_kernel_{dtype}", (parts,))
    assert second[:2] == ("moments_total_kernel_float64", (parts,))
    assert len(driver.launched) == 3 * 2
    assert len(m.uploads) == 1
    table, of_parts = first[3][1], second[3][2]
    assert of_parts.data.ptr - table.data.ptr == 8 * 2 * parts
    moments.moments(m, x, bounds=bounds + 16)
    assert len(m.uploads) == 2


@pytest.mark.parametrize(("size", "blocks"), [(0, 1), (1, 1), (8193, 2), (2**33, 1024)])
def test_one_part_needs_no_upload(driver, size, blocks):
    m = Uploads()
    moments.moments(m, FakeArray(size, "float32"))
    assert [grid for _, grid, *_ in driver.launched] == [(blocks,), (1,)]
    chunk = driver.launched[0][3][5]
    assert chunk * blocks >= size and chunk % (256 * 4) == 0
    assert not m.uploads


#: A monitored step on the stand-in for CuPy, which must be the only one of its process.
MONITORED = """
import sys
from bench import gpu_fake
counts = gpu_fake.install()
import gpugrad as gg
from gpugrad import nn
from gpugrad.health import Monitor
model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(int(sys.argv[1])))).to("cuda:0")
optimizer = gg.optim.AdamW(model.parameters())
monitor = Monitor(model, optimizer, every=1).start()
for _ in range(4):
    counts.clear()
    optimizer.zero_grad()
    model(gg.ones((4, 8), dtype="float32", device="cuda:0")).sum().backward()
    optimizer.step(clip=1.0)
    monitor.step()
print(counts.host_reads, counts.library.uploads,
      *(counts.kernels[f"moments_{name}"] for name in ("kernel_float32", "total_kernel_float64")))
"""


@pytest.mark.parametrize("layers", [2, 30])
def test_a_monitored_step(layers):
    """Two launches for each output and its gradient, and two each for all parameters, all gradients
    and all updates; tables are uploaded in the first steps."""
    root = Path(__file__).parents[3]
    found = subprocess.run([sys.executable, "-c", MONITORED, str(layers)], capture_output=True,
                           text=True, check=True, cwd=root)  # fmt: skip
    assert found.stdout.split() == ["0", "0", *2 * [str(2 * layers + 3)]]


def test_other_arrays_are_refused():
    refuse = moments.KERNELS["moments"].refuse
    assert "int32" in refuse(None, FakeArray(3, "int32"))


# -- the text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", DTYPES)
def test_memory_is_read_in_16_bytes(storage):
    text = (launch.SHIPPED / "moments.ptx").read_text(encoding="utf-8")
    found = offline.accesses(assembly.section(text, f"moments_kernel_{storage}"), storage)
    assert found == (1, 0)
    assert set(entries("moments")) >= {f"moments_kernel_{storage}"}
