"""Moments, sums of exponentials, extremes: parity, layouts, large means, threads, vectors."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend.kernels import note_choices
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import pool, reductions
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, EPS, layouts, run, wide

FUNCTIONS = {"var": gg.var, "std": gg.std, "logsumexp": gg.logsumexp}
#: Shapes and axes; with several pieces and an incomplete one, and along every kind of axis.
CASES = [
    ((5, 7, 9), (0, 1)), ((150, 300), 0), ((5, 7, 9), -1), ((5, 7, 9), 0), ((5, 7, 9), None),
    ((5, 7, 9), 1), ((3, 9000), 1), ((3, 9000), None), ((5, 7, 9), (2, 1)), ((2, 70, 3), 1),
    ((1, 1), 0),
]  # fmt: skip


def normal(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_parity(name, dtype):
    # Two-byte floats are read and written by the same functions in rows and in tiles.
    some = {"float16": CASES[2:9:2], "bfloat16": CASES[:2]}
    for shape, axis in some.get(dtype, CASES):
        x = normal(shape, dtype)
        for keepdims in (False, True):
            options = {"axis": axis, "keepdims": keepdims}
            got = run("require", FUNCTIONS[name], x, **options)
            true = run("off", FUNCTIONS[name], wide(x), **options)
            for a, t in zip(got, true, strict=True):
                assert a.dtype == DTYPES[dtype] and a.shape == t.shape
                tiny = 2.0**-24 if dtype == "float16" else 0.0
                # Of a gradient: the distance from the mean is as exact as the greatest element.
                near = 32 * EPS[dtype] * np.abs(t).max() + tiny
                np.testing.assert_allclose(wide(a), t, rtol=0, atol=near, err_msg=f"{shape} {axis}")


@pytest.mark.parametrize("function", [gg.max, gg.min])
def test_extremes_share_among_equals(function):
    x = np.round(2 * normal((30, 70)))
    x[3, 4], x[5] = np.nan, np.inf
    for dtype in DTYPES:
        y = x.astype(DTYPES[dtype])
        for axis in (1, None, (0, 1)):
            with np.errstate(invalid="ignore"):  # which the greatest of bfloat16 warns of
                got, want = (run(mode, function, y, axis=axis) for mode in ("require", "off"))
            for a, b in zip(got, want, strict=True):
                assert a.dtype == DTYPES[dtype]
                np.testing.assert_allclose(wide(a), wide(b), rtol=2 * EPS[dtype])
    with gg.use_kernels("require"), pytest.raises(KernelError, match="not along the last axes"):
        run("require", function, x, axis=0)


@pytest.mark.parametrize("correction", [1, 3, 9])
def test_corrections(correction):
    x = normal((20, 9))
    with np.errstate(all="ignore"):
        got, want = (
            run(mode, gg.var, x, axis=1, correction=correction) for mode in ("require", "off")
        )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "axis"), [((5, 500), 1), ((5, 9000), 1), ((300, 20), 0)])
def test_a_small_variance_beside_a_large_mean(shape, axis):
    x = (1e4 + 1e-2 * np.random.default_rng(1).standard_normal(shape)).astype("float32")
    got, true = run("require", gg.var, x, axis=axis), run("off", gg.var, wide(x), axis=axis)
    for a, t in zip(got, true, strict=True):
        np.testing.assert_allclose(a, t, rtol=0, atol=2e-6 * np.abs(t).max())


@pytest.mark.parametrize("axis", [0, 1])
def test_masks_infinities_and_nan(axis):
    x = normal((6, 5000))
    x[0] = x[1, :4500] = -np.inf
    x[2, 4800], x[3, 17], x[4, 3] = np.inf, np.nan, -np.nan
    x[5] = 1000.0
    x = x if axis == 1 else np.ascontiguousarray(x.T)
    with np.errstate(all="ignore"):
        got, want = (run(mode, gg.logsumexp, x, axis=axis) for mode in ("require", "off"))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_layouts(name):
    x = normal((40, 50))
    want = [run("require", FUNCTIONS[name], x, axis=axis) for axis in (0, 1)]
    for layout, laid in layouts(x):
        for axis in (0, 1):
            got = run("require", FUNCTIONS[name], laid, axis=axis)
            assert all(np.array_equal(a, b) for a, b in zip(got, want[axis])), layout


def test_threads_change_no_bit():
    x, before = normal((30, 9000)), pool.get_num_threads()
    try:
        for function in (gg.var, gg.logsumexp):
            for axis in (0, 1, None):
                found = []
                for n in (1, before):
                    pool.set_num_threads(n)
                    with note_choices() as log:
                        found.append([a.tobytes() for a in run("auto", function, x, axis=axis)])
                    assert [c.implementation for c in log] == ["numba cpu"] * 2
                assert found[0] == found[-1]
    finally:
        pool.set_num_threads(before)


def test_loops_are_vectorised():
    x, t, n = np.ones(64, np.float32), np.ones(64, np.float32), np.float32(1)
    for loop, arguments in (
        (reductions._sum, (x,)),
        (reductions._deviations, (x, n)),
        (reductions._add_deviations, (x, t, t, t)),
        (reductions._spread_level, (x, t, n, n, n)),
        (reductions._spread.bind(f=reductions._share), (x, t, n, n, n)),
        (reductions._spread_line.bind(f=reductions._share), (x, t, t, t, t)),
        (reductions._spread_to_extreme, (x, t, n, n, n)),
    ):
        assert packed(assembly(loop["float32"], *arguments)) > 2, loop


def test_refusals_are_told():
    x = gg.tensor(normal((3, 4, 5)))
    with gg.use_kernels("require"):
        with pytest.raises(KernelError, match="not side by side"):
            gg.var(x, axis=(0, 2))
        with pytest.raises(KernelError, match="nothing to compute"):
            gg.logsumexp(x[:0], axis=1)
