"""Moments of parts of an array: parity, every layout, the same bits on any number of threads."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.backend.kernels import note_choices
from gpugrad.health.statistics import NONFINITE, SQUARES, SUM, moments
from gpugrad.kernels.cpu import moments as kernel
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, layouts, wide

NUMPY = backend_for_device("cpu")


def run(mode, x, **options):
    with gg.use_kernels(mode):
        return moments(NUMPY, x, **options)


def truth(x, low=-np.inf, high=np.inf):
    x = wide(x).ravel()
    fine = x[np.isfinite(x)]
    return [x.size, fine.sum(), (fine * fine).sum(), fine.min(initial=np.inf),
            fine.max(initial=-np.inf), x.size - fine.size, (x == 0).sum(),
            ((x <= low) | (x >= high)).sum()]  # fmt: skip


def test_there_is_a_slot() -> None:
    with note_choices() as log:
        moments(NUMPY, np.ones(1000, np.float32))
    assert [(c.operation, c.implementation) for c in log] == [("moments", "numba cpu")]


@pytest.mark.parametrize("size", [0, 1, 2, 31, 8191, 8192, 8193, 100_003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity(dtype, size) -> None:
    x = np.random.default_rng(size).standard_normal(size).astype(DTYPES[dtype])
    for spoilt in (False, True):
        if spoilt:
            x[::7], x[1::7], x[2::7], x[3::7] = np.nan, np.inf, -np.inf, 0
        got, generic = (run(mode, x, low=-0.5, high=1.0) for mode in ("require", "off"))
        assert got.shape == generic.shape == (1, 8) and got.dtype == generic.dtype == np.float64
        np.testing.assert_allclose(got[0], truth(x, -0.5, 1.0), rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(got, generic, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts(dtype) -> None:
    x = np.random.default_rng(0).standard_normal(50_000).astype(DTYPES[dtype])
    x[777] = np.inf
    bounds = np.array([[0, 1], [1, 1], [5, 20_000], [20_000, 20_064], [0, 50_000]])
    for those in (bounds, bounds[:3], bounds[:0]):
        got, generic = (run(mode, x, bounds=those) for mode in ("require", "off"))
        assert got.shape == generic.shape == (len(those), 8)
        np.testing.assert_allclose(got, generic, rtol=1e-12, atol=1e-9)
        for row, (a, b) in zip(got, those):
            np.testing.assert_allclose(row, truth(x[a:b]), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout(dtype) -> None:
    x = np.random.default_rng(1).standard_normal((5, 60, 70)).astype(DTYPES[dtype])
    for layout, laid in layouts(x):
        got = run("require", laid, low=-1.0)
        np.testing.assert_allclose(got[0], truth(x, -1.0), rtol=1e-12, atol=1e-9, err_msg=layout)
    one = np.asarray(x[3, 4, 5])
    np.testing.assert_allclose(run("require", one)[0], truth(one))


def test_sums_neither_overflow_nor_lose_the_variance() -> None:
    big = np.full(20_000, 3e38, np.float32)
    assert run("require", big)[0, SQUARES] == pytest.approx(2e4 * 9e76, rel=1e-6)
    assert run("require", np.full(9, 1e-40, np.float32))[0, SQUARES] > 0
    x = (1000 + 0.01 * np.random.default_rng(0).standard_normal(100_000)).astype(np.float32)
    row = run("require", x)[0]
    variance = row[SQUARES] / x.size - (row[SUM] / x.size) ** 2
    assert variance == pytest.approx(wide(x).var(), rel=1e-3)


def test_the_same_bits_on_any_number_of_threads() -> None:
    x = np.random.default_rng(3).standard_normal(300_001).astype(np.float32)
    before = gg.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            gg.set_num_threads(threads)
            found += [run("require", x).tobytes() for _ in range(3)]
    finally:
        gg.set_num_threads(before)
    assert len(set(found)) == 1


def test_other_arrays_are_refused() -> None:
    with note_choices() as log:
        got = moments(NUMPY, np.arange(1000))
    assert log[0].implementation == "generic" and "int64" in log[0].reason
    assert got[0, SUM] == 499_500 and got[0, NONFINITE] == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_loop_is_vectorised(dtype) -> None:
    text = assembly(kernel._count[dtype], np.ones(10, dtype), -1.0, 1.0, np.empty(8))
    assert packed(text) > 10
