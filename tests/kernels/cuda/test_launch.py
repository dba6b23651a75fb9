"""Launching: which text is loaded, where, how often, and with which grid and arguments."""

from __future__ import annotations

import sys
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpugrad.errors import KernelError
from gpugrad.kernels import disk
from gpugrad.kernels.cuda import bias, elementwise, launch, reduce
from gpugrad.kernels.cuda.launch import Entry, Machine
from tests.kernels.cuda.fake_gpu import FakeArray, FakeDriver


def install(monkeypatch, driver):
    monkeypatch.setitem(sys.modules, "cupy", driver.module())
    monkeypatch.setattr(launch, "_gpus", {})
    return driver


@pytest.fixture
def driver(monkeypatch, tmp_path):
    monkeypatch.setenv("GPUGRAD_CACHE_DIR", str(tmp_path))
    return install(monkeypatch, FakeDriver())


def relu(x):
    return elementwise.map_implementation("relu").run(None, x)


def test_a_shipped_kernel_is_loaded_once(driver):
    x = FakeArray((1000, 3), "float32")
    for _ in range(3):
        y = relu(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    ((device, text),) = driver.loaded
    assert device == 0
    assert text.decode().rstrip("\0") == elementwise.map_of("relu")["float32"].shipped()
    assert len(driver.launched) == 3
    name, blocks, threads, arguments = driver.launched[0]
    assert (name, blocks, threads) == ("map_relu_float32", (3,), (256,))
    assert arguments[0] is x
    assert [type(a) for a in arguments[2:]] == [np.float32, np.float32, int, np.int32]
    assert arguments[4:] == [3000, 1]


def test_addresses_decide_about_packs(driver):
    relu(FakeArray(100, "float32", address=0x1004))
    relu(FakeArray(100, "float16", address=0x1008))
    relu(FakeArray(100, "float64", address=0x1010))
    assert [arguments[-1] for *_, arguments in driver.launched] == [0, 0, 1]


def test_numbers_are_of_the_arithmetic_type(driver):
    for dtype in ("float64", ml_dtypes.bfloat16):
        elementwise.map_implementation("softplus").run(None, FakeArray(8, dtype), 2, threshold=1)
    (*_, first), (*_, second) = driver.launched
    assert [type(a) for a in first[2:4]] == [np.float64] * 2
    assert [type(a) for a in second[2:4]] == [np.float32] * 2
    assert first[2:4] == [2, 1]


def test_empty_arrays_are_not_launched(driver):
    assert relu(FakeArray((0, 5), "float32")).shape == (0, 5)
    assert driver.launched == []


def test_every_gpu_has_functions_of_its_own(monkeypatch):
    driver = install(monkeypatch, FakeDriver(gpus=2))
    for number in (0, 1, 0, 1):
        y = relu(FakeArray(8, "float32", device=number))
        assert y.data.device_id == number
        assert driver.current == 0
    assert [device for device, _ in driver.loaded] == [0, 1]
    assert len(driver.launched) == 4


def test_what_the_driver_says_is_passed_on(driver):
    driver.refuses = "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"
    with pytest.raises(KernelError, match=r"map_relu_float32.*UNSUPPORTED_PTX_VERSION.*12\.0"):
        relu(FakeArray(8, "float32"))
    driver.refuses = ""
    relu(FakeArray(8, "float32"))


def test_arrays_elsewhere_are_refused():
    with pytest.raises(KernelError, match="ndarray"):
        reduce.launch_summary(np.ones(3, np.float32))


def test_warm_up_loads_and_launches_nothing(driver):
    launch.warm_up(reduce.entries())
    assert len(driver.loaded) == 6
    assert driver.launched == []
    reduce.launch_summary(FakeArray(10, "float32"))
    assert len(driver.loaded) == 6


def test_threads_load_a_kernel_once(driver):
    gate = threading.Barrier(8)
    x = FakeArray(8, "float32")

    def work():
        gate.wait()
        for _ in range(20):
            relu(x)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(driver.loaded) == 1
    assert len(driver.launched) == 160


def test_a_launch_costs_the_host_little(driver):
    gpu = launch.machine(FakeArray(8, "float32"))
    entry = reduce.summary_kernel["float32"]
    arguments = (None, None, None, None, 8, 1)
    gpu.run(entry, (1,), *arguments)
    best = min(_time(lambda: gpu.run(entry, (1,), *arguments)) for _ in range(20))
    assert best < 12e-6


def _time(call, count=200):
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


# -- which text -----------------------------------------------------------------------------------


@pytest.fixture
def unshipped(driver, monkeypatch):
    """An entry that does not ship, and how often its compiler was called."""
    calls = []

    def compiled(self, architecture=launch.ARCHITECTURE):
        calls.append(architecture)
        return f"// {len(calls)}\n.visible .entry {self.name}("

    monkeypatch.setattr(Entry, "shipped", lambda self: None)
    monkeypatch.setattr(Entry, "compiled", compiled)
    return calls


def fresh():
    return Entry(reduce.summary_kernel, "float32")


def test_what_is_compiled_is_kept_on_disk(unshipped, tmp_path):
    text = fresh().ptx()
    assert fresh().ptx() == text
    assert unshipped == [(8, 0)]
    (path,) = (tmp_path / "cuda").iterdir()
    assert path.name.startswith("summary_kernel_float32-")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(""),
        lambda path: path.write_text(path.read_text()[:-5]),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: path.write_text(path.read_text().replace("entry", "enter")),
    ],
    ids=["empty", "cut", "binary", "changed"],
)
def test_a_damaged_file_is_made_again(unshipped, tmp_path, damage):
    fresh().ptx()
    (path,) = (tmp_path / "cuda").iterdir()
    damage(path)
    assert fresh().ptx().startswith("// 2")
    assert fresh().ptx().startswith("// 2")


def test_other_versions_and_architectures_are_kept_apart(unshipped, monkeypatch):
    fresh().ptx()
    fresh().ptx((7, 5))
    monkeypatch.setattr(launch, "_makers", lambda: "another compiler")
    fresh().ptx()
    assert unshipped == [(8, 0), (7, 5), (8, 0)]


def test_a_folder_that_cannot_be_written_costs_time_only(unshipped, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GPUGRAD_CACHE_DIR", str(tmp_path / "file"))
    assert fresh().ptx().startswith("// 1")
    assert fresh().ptx().startswith("// 2")


def test_files_appear_whole(tmp_path):
    path = tmp_path / "new" / "text"
    disk.write_text(path, "α\n" * 1000)
    assert disk.read_text(path) == "α\n" * 1000
    assert [p.name for p in path.parent.iterdir()] == ["text"]


def test_an_older_gpu_gets_its_own_text(unshipped, monkeypatch):
    install(monkeypatch, FakeDriver(capability="75"))
    reduce.launch_summary(FakeArray(8, "float32"))
    assert set(unshipped) == {(7, 5)}


def test_a_newer_gpu_gets_what_ships(monkeypatch):
    driver = install(monkeypatch, FakeDriver(capability="120"))
    reduce.launch_summary(FakeArray(8, "float32"))
    assert all(b".target sm_80" in text for _, text in driver.loaded)


def test_a_kernel_that_cannot_be_compiled_is_an_error(driver, monkeypatch):
    monkeypatch.setattr(Entry, "shipped", lambda self: None)

    def compiled(self, architecture):
        raise KernelError("what the compiler says")

    monkeypatch.setattr(Entry, "compiled", compiled)
    with pytest.raises(KernelError, match="what the compiler says"):
        reduce.launch_summary(FakeArray(8, "float32"))
    assert driver.launched == []


# -- grids ----------------------------------------------------------------------------------------

LANES = st.sampled_from([2, 4, 8])


@given(st.integers(0, 2**40), LANES)
def test_flat_grids(n, lanes):
    machine = Machine()
    (blocks,) = machine.flat(n, lanes)
    assert 1 <= blocks <= machine.wave
    # Just as many as have something to do, up to that.
    assert blocks == 1 or (blocks - 1) * machine.threads * lanes < n
    assert blocks == machine.wave or blocks * machine.threads * lanes >= n
    (parts,) = machine.divided(n, lanes)
    assert 1 <= parts <= machine.parts


@given(st.integers(0, 2**31), st.integers(1, 2**20), LANES)
def test_tiled_grids(rows, columns, lanes):
    machine = Machine()
    tiles = machine.tiled(rows, columns, lanes)
    assert tiles.tile in (1, 2, 4, 8, 16, 32)
    assert tiles.across * tiles.tile * lanes >= columns
    assert (tiles.across - 1) * tiles.tile * lanes < columns
    assert tiles.chunks * tiles.rows >= rows
    assert 1 <= tiles.chunks <= machine.chunks <= 65535
    assert tiles.chunks == 1 or tiles.across * tiles.chunks <= machine.blocks


def test_grids_of_reductions_do_not_depend_on_the_gpu(driver):
    gpu = launch.machine(FakeArray(8, "float32"))
    assert gpu.wave != Machine.wave
    assert gpu.divided(10**9, 4) == Machine().divided(10**9, 4)


def test_statistics_ride_along(driver):
    x, b = FakeArray((4, 4096, 512), "float16"), FakeArray(512, "float16")
    gx, gb, squares, bad = bias.launch_bias_activation_backward(x, x, b, "gelu")
    assert (gx.shape, gb.shape, squares.dtype, bad.dtype) == (x.shape, (512,), "f4", "i4")
    assert [name for name, *_ in driver.launched] == [
        "bias_backward_gelu_float16", "bias_total_kernel_float16",
    ]  # fmt: skip


def test_a_sum_over_rows_is_one_launch_where_it_is_wanted(driver):
    g, home = FakeArray((4, 128, 10), "float32"), FakeArray(10, "float32", address=0x2000)
    kernel = bias.KERNELS["sum_over_rows"]
    assert kernel.refuse(None, g, (10,), home) is None
    assert kernel.run(None, g, (10,), home) is home
    ((name, blocks, _, arguments),) = driver.launched
    assert (name, blocks) == ("bias_total_kernel_float32", (1,))
    assert arguments[0] is g and arguments[1] is home
    assert "more than 512 rows" in kernel.refuse(None, FakeArray((513, 10), "float32"), (10,))
    assert "float16" in kernel.refuse(None, FakeArray((5, 10), "float16"), (10,))
    assert "(2, 10)" in kernel.refuse(None, FakeArray((3, 2, 10), "float32"), (2, 10))


# -- what is refused ------------------------------------------------------------------------------


def test_refusals_say_why():
    x, y = FakeArray((2, 3), "float32"), FakeArray((3,), "float32")
    implementation = elementwise.KERNELS["swiglu"]
    assert implementation.refuse(None, x, x) is None
    assert "broadcast" in str(implementation.refuse(None, x, y))
    assert "float16" in str(implementation.refuse(None, x, FakeArray((2, 3), "float16")))
    assert "int32" in str(implementation.refuse(None, *(FakeArray(3, "int32"),) * 2))
    assert "float" in str(implementation.refuse(None, 1.0, x))
    gelu = elementwise.KERNELS["gelu"]
    assert gelu.refuse(None, x, approximate="tanh") is None
    assert gelu.refuse(None, x, "none") is None
    assert "approximate='sinh'" in str(gelu.refuse(None, x, approximate="sinh"))
    backward = bias.KERNELS["bias_activation_backward"]
    assert backward.refuse(None, x, x, y, "relu") is None
    assert "bias of shape (2,)" in str(backward.refuse(None, x, x, FakeArray(2, "float32"), "relu"))
    assert "threshold" in str(backward.refuse(None, x, x, y, "threshold"))
    assert "broadcast" in str(backward.refuse(None, y, x, y, "relu"))
