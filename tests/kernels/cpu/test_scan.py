"""Running sums and products: parity, exactness, layouts, threads, vectors, refusals."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend.kernels import note_choices
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import pool, scan
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, EPS, layouts, run, wide

FUNCTIONS = {"sum": gg.cumulative_sum, "prod": gg.cumulative_prod}

#: Shapes and axes; with several pieces and an incomplete one, and along every kind of axis.
CASES = [
    ((70,), None), ((1, 1), 0), ((5, 7, 9), 1), ((5, 7, 9), 0), ((5, 7, 9), -1), ((3, 1300), 1),
    ((2, 70, 600), 1), ((2, 70_000), 1), ((300, 20), 1), ((20, 1), 0),
]  # fmt: skip


def normal(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


def near(x, dtype):
    """Factors whose products neither vanish nor explode."""
    return (1 + wide(x) / np.sqrt(4 * x.size)).astype(DTYPES[dtype])


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums(dtype, initial):
    """What is stored is off by its rounding, and by a share of double precision."""
    for shape, axis in CASES:
        x, options = normal(shape, dtype), {"axis": axis, "include_initial": initial}
        g = normal(gg.cumulative_sum(gg.asarray(x), **options).shape, dtype, 1)
        got = run("require", gg.cumulative_sum, x, g=g, **options)
        true = run("off", gg.cumulative_sum, wide(x), g=wide(g), **options)
        for a, t in zip(got, true, strict=True):
            assert a.dtype == DTYPES[dtype] and a.shape == t.shape
            np.testing.assert_allclose(
                wide(a), t, rtol=1.01 * EPS[dtype], atol=1e-10, err_msg=f"{shape} {axis}"
            )


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype, initial):
    for shape, axis in CASES:
        x = near(normal(shape, dtype), dtype)
        options = {"axis": axis, "include_initial": initial}
        with gg.use_kernels("require"):
            got = gg.cumulative_prod(gg.asarray(x), **options).data
        with gg.use_kernels("off"):
            true = gg.cumulative_prod(gg.asarray(wide(x)), **options).data
        assert got.dtype == DTYPES[dtype] and got.shape == true.shape
        np.testing.assert_allclose(
            wide(got), true, rtol=1.01 * EPS[dtype], atol=1e-10, err_msg=f"{shape} {axis}"
        )


def test_gradients_of_products():
    x = near(normal((6, 50)), "float32")
    for axis in (0, 1):
        got, true = (run(mode, gg.cumulative_prod, a, axis=axis)
                     for mode, a in (("require", x), ("off", wide(x))))  # fmt: skip
        for a, t in zip(got, true, strict=True):
            np.testing.assert_allclose(a, t, rtol=1e-5)


def test_a_product_does_not_overflow_on_the_way():
    """In another order these would be 0, infinity, or NaN."""
    x = np.array([[1e200, 1e-200, 1e-200, 1e200], [0.0, 1e200, 1e200, 1.0]])
    with gg.use_kernels("require"):
        got = gg.cumulative_prod(gg.asarray(x), axis=1).data
    np.testing.assert_allclose(got, [[1e200, 1, 1e-200, 1], [0, 0, 0, 0]], rtol=1e-15)


@pytest.mark.parametrize("function", FUNCTIONS.values())
def test_infinities_and_nan(function):
    x = np.ones((5, 40), np.float32)
    x[0, 7], x[1, 3], x[2, 9], x[2, 20], x[3, 30] = np.inf, np.nan, np.inf, -np.inf, 0
    for a, axis in ((x, 1), (np.ascontiguousarray(x.T), 0)):
        with np.errstate(invalid="ignore"):
            got, want = (run(mode, function, a, axis=axis)[0] for mode in ("require", "off"))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("function", FUNCTIONS.values())
def test_layouts(function):
    x = near(normal((40, 50)), "float32")
    want = [run("require", function, x, axis=axis) for axis in (0, 1)]
    for layout, laid in layouts(x):
        for axis in (0, 1):
            got = run("require", function, laid, axis=axis)
            assert all(np.array_equal(a, b) for a, b in zip(got, want[axis])), layout


def test_threads_change_no_bit():
    x, before = near(normal((9, 70_000)), "float32"), pool.get_num_threads()
    try:
        for function in FUNCTIONS.values():
            for axis in (0, 1):
                found = []
                for n in (1, before):
                    pool.set_num_threads(n)
                    with gg.use_kernels("auto"), note_choices() as log:
                        found.append(function(gg.asarray(x), axis=axis).data.tobytes())
                    assert [c.implementation for c in log] == ["numba cpu"]
                assert found[0] == found[-1]
    finally:
        pool.set_num_threads(before)


def test_the_second_derivative():
    x = gg.tensor(normal((3, 5), "float64"))
    gg.check_grads(lambda x: gg.cumulative_sum(x * x, axis=1), (x,), order=2)


def test_loops_are_vectorised():
    x, total, room = np.ones(64, np.float32), np.ones(64), np.ones(scan.STRETCH)
    for loop, arguments in (
        (scan._sum_row, (x, x, 0.0, False, room)),
        (scan._total, (x,)),
        (scan._sum_line, (x, x, total)),
        (scan._product_line, (x, x, total)),
    ):
        assert packed(assembly(loop["float32"], *arguments)) > 2, loop


def test_refusals_are_told():
    x = gg.tensor(normal((3, 4)))
    with gg.use_kernels("require"):
        with pytest.raises(KernelError, match="nothing to compute"):
            gg.cumulative_sum(x[:0], axis=1)
        with pytest.raises(KernelError, match="is to be added up as float64"):
            gg.cumulative_sum(x, axis=1, dtype="float64")
        found = gg.cumulative_sum(gg.asarray([2**62, 3]), include_initial=True)  # NumPy's own
        with pytest.raises(KernelError, match="no axis 2 of 2"):
            gg.cumulative_prod(x, axis=2)
    np.testing.assert_array_equal(found.numpy(), [0, 2**62, 2**62 + 3])
