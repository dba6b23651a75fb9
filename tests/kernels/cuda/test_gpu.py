"""The same checks on a GPU, and what only a GPU can show: streams, threads, time, size."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from gpugrad.kernels.cuda import bias, elementwise, launch, reduce
from gpugrad.kernels.formula import APPROXIMATE, PLAIN, approximated
from tests.kernels.cuda import checks
from tests.kernels.cuda.checks import DTYPES

pytestmark = pytest.mark.gpu

MAPS = sorted({*PLAIN, *(one for n in APPROXIMATE for one in approximated(n).values())})


@pytest.fixture
def cupy():
    import cupy

    return cupy


def to_gpu(x, shift=0):
    """A copy on the GPU that begins `shift` elements after an aligned address."""
    import cupy

    whole = cupy.empty(x.size + shift, x.dtype)
    row = whole[shift:]
    row.set(np.ascontiguousarray(x).reshape(-1))
    return row.reshape(x.shape)


def to_host(x):
    import cupy

    return cupy.asnumpy(x)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("name", MAPS)
def test_maps(name, storage):
    checks.check_map(name, storage, to_gpu, to_host, count=4099)
    checks.check_map(name, storage, lambda x: to_gpu(x, 1), to_host, count=77)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("activation", bias.BIASED)
def test_bias_and_activation(activation, storage):
    checks.check_bias(activation, storage, to_gpu, to_host, shape=(70, 512))


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (3000, 3), (4, 4100), (0, 5), (300, 257)])
def test_bias_of_any_shape(storage, shape):
    checks.check_bias("gelu_tanh", storage, to_gpu, to_host, shape=shape)
    checks.check_bias("gelu_tanh", storage, lambda x: to_gpu(x, 1), to_host, shape=shape)


def test_bias_counts():
    checks.check_bias_counts(to_gpu, to_host)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 1000, 10**6 + 3])
def test_summary(storage, count):
    checks.check_summary(storage, count, to_gpu, to_host)
    checks.check_summary(storage, count, lambda x: to_gpu(x, 3), to_host)


@pytest.mark.parametrize("storage", DTYPES)
def test_summary_counts(storage):
    checks.check_summary_counts(storage, to_gpu, to_host, count=10**5)


def test_half_norm():
    checks.check_half_norm(to_gpu, to_host)


def test_one_nan_among_ten_million(cupy):
    x = cupy.zeros(10**7, np.float32)
    x[7_654_321] = np.nan
    assert int(reduce.launch_summary(x).bad[0]) == 1


def test_results_are_the_same_bit_for_bit(cupy):
    x = to_gpu(checks.inputs("float32", 10**7, 0))
    g, b = (
        to_gpu(checks.inputs("float32", 2**20, 1)).reshape(2**12, -1),
        to_gpu(np.ones(2**8, "f4")),
    )

    def everything():
        found = [*reduce.launch_summary(x), *bias.launch_bias_activation_backward(g, g, b, "gelu")]
        return [to_host(part).tobytes() for part in found]

    first = everything()
    for _ in range(10):
        assert everything() == first


def test_two_streams(cupy):
    """Work on one stream is not ordered after work on another, and does not disturb it."""
    arrays = [to_gpu(checks.inputs("float32", 10**6, seed)) for seed in (0, 1)]
    want = [to_host(reduce.launch_summary(x).squares) for x in arrays]
    cupy.cuda.Device().synchronize()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in arrays]
    found: list = [[], []]
    for _ in range(50):
        for stream, x, out in zip(streams, arrays, found):
            with stream:
                out.append(reduce.launch_summary(x).squares)
    for stream in streams:
        stream.synchronize()
    for out, right in zip(found, want):
        assert all((to_host(x) == right).all() for x in out)


def test_two_threads(cupy):
    x = to_gpu(checks.inputs("float32", 10**5, 0))
    want = to_host(reduce.launch_summary(x).squares)
    wrong = []

    def work():
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for _ in range(100):
                found = reduce.launch_summary(x).squares
                stream.synchronize()
                if (to_host(found) != want).any():
                    wrong.append(found)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_launches_can_be_captured(cupy):
    x = to_gpu(np.arange(1000, dtype=np.float32))
    launch.warm_up([elementwise.map_of("relu")["float32"]])
    with cupy.cuda.Stream(non_blocking=True) as stream:
        y = elementwise.map_implementation("relu").run(None, x)
        stream.begin_capture()
        launch.machine(x).run(
            elementwise.map_of("relu")["float32"], (4,), x, y, 0.0, 0.0, x.size, 1
        )
        graph = stream.end_capture()
        y[...] = -1
        graph.launch()
        stream.synchronize()
    assert (to_host(y) == np.arange(1000)).all()


def test_a_launch_costs_the_host_little(cupy):
    x = to_gpu(np.ones(1024, np.float32))
    y = cupy.empty_like(x)
    gpu, entry = launch.machine(x), elementwise.map_of("relu")["float32"]

    def once(count=300):
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        for _ in range(count):
            gpu.run(entry, (1,), x, y, 0.0, 0.0, 1024, 1)
        return (time.perf_counter() - start) / count

    once()
    assert min(once() for _ in range(10)) < 12e-6


def test_more_elements_than_31_bits_can_count(cupy):
    count = 2**31 + 11
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < 5 * 2 * count:
        pytest.skip("too little memory on this GPU")
    x = cupy.zeros(count, np.float16)
    x[-1], x[2**31 - 1] = 3, -4
    squares, peak, bad = (to_host(part)[0] for part in reduce.launch_summary(x))
    assert (squares, peak, bad) == (25, 4, 0)
    y = elementwise.map_implementation("relu_squared").run(None, x)
    assert float(y[-1]) == 9
    assert float(y[2**31 - 1]) == 0
