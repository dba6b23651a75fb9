"""Pooling: kernels against the generic text, in every layout and storage."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import pool, pooling
from gpugrad.kernels.cpu.memory import address
from gpugrad.ops.pooling import max_pool, window_mean
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, EPS, layouts, run, wide

#: Input, kernel, stride, padding, dilation.
CASES = {
    "2x2": ((3, 70, 8, 10), (2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    "2x2, places left over": ((3, 7, 7, 9), (2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    "2x2, overlapping": ((2, 5, 9, 11), (2, 2), (1, 1), ((1, 0), (0, 0)), (1, 1)),
    "3x3": ((2, 5, 9, 11), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1)),
    "dilation": ((2, 5, 9, 11), (3, 2), (2, 1), ((1, 2), (0, 1)), (1, 2)),
    "2x2, dilation": ((2, 5, 9, 11), (2, 2), (2, 2), ((0, 0), (0, 0)), (2, 3)),
    "gaps": ((2, 5, 9, 11), (2, 2), (3, 4), ((0, 0), (0, 0)), (1, 1)),
    "one axis": ((2, 5, 12), (3,), (2,), ((1, 1),), (2,)),
    "one channel": ((2, 1, 6, 6), (2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    "whole planes": ((2, 20, 6, 5), (6, 5), (6, 5), ((0, 0), (0, 0)), (1, 1)),
}


def calls(case):
    """Both operations of a case: function and parameters."""
    _, kernel, stride, padding, dilation = CASES[case]
    shared = {"kernel": kernel, "stride": stride, "padding": padding}
    yield max_pool, {**shared, "dilation": dilation}
    yield window_mean, {**shared, "divisor": 3.0}


def normal(shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


def results(mode, function, x, parameters, g=None):
    if g is None:
        with gg.use_kernels("off"):
            shape = function(gg.asarray(x), **parameters).shape
        g = normal(shape, 1).astype(x.dtype)
    return run(mode, function, x, g=g, **parameters)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    x = normal(CASES[case][0], dtype=dtype)
    for function, parameters in calls(case):
        got = results("require", function, x, parameters)
        want = results("off", function, wide(x), parameters)
        for a, w in zip(got, want, strict=True):
            assert a.dtype == DTYPES[dtype] and a.shape == w.shape
            np.testing.assert_allclose(wide(a), w, rtol=0, atol=16 * EPS[dtype] * 4)


@pytest.mark.parametrize("case", ["2x2", "3x3", "2x2, dilation"])
def test_nan_infinity_and_ties(case):
    x = np.random.default_rng(0).integers(0, 3, CASES[case][0]).astype("float32")
    x[0, 0, 1, 1], x[0, 1, :4, :4], x[0, 2, 0, 0] = np.nan, -np.inf, np.inf
    x[1, 0, 0, :2] = np.nan
    function, parameters = next(calls(case))
    got = results("require", function, x, parameters)
    want = results("off", function, x, parameters)
    np.testing.assert_array_equal(got[0], want[0])
    # Where windows overlap, gradients are added up in another order.
    np.testing.assert_allclose(got[1], want[1], rtol=0, atol=8 * EPS["float32"])
    assert np.array_equal(got[1] == 0, want[1] == 0)


@pytest.mark.parametrize("case", ["2x2", "3x3", "one axis"])
def test_layouts(case):
    x = normal(CASES[case][0])
    for function, parameters in calls(case):
        want = results("require", function, x, parameters)
        g = normal(want[0].shape, 1)
        for name, laid in layouts(x):
            got = results("require", function, laid, parameters, g)
            assert all(np.array_equal(a, w) for a, w in zip(got, want)), name
        for name, laid in layouts(g):
            got = results("require", function, x, parameters, laid)
            assert all(np.array_equal(a, w) for a, w in zip(got, want)), name


def test_threads_change_no_bit():
    x = normal(CASES["2x2"][0], dtype="float32")
    before = pool.get_num_threads()
    try:
        for function, parameters in calls("2x2"):
            found = []
            for n in (1, before):
                pool.set_num_threads(n)
                got = results("require", function, x, parameters)
                found.append([a.tobytes() for a in got])
            assert found[0] == found[-1]
    finally:
        pool.set_num_threads(before)


def test_loops_are_vectorised():
    a = [address(np.ones(64, np.float32))] * 6
    w = address(np.ones(64, np.int8))
    assert packed(assembly(pooling._four["float32"], *a[:5], w, 64)) > 4
    assert packed(assembly(pooling._compare["float32"], a[0], a[1], w, np.int8(1), 64)) > 2
    assert packed(assembly(pooling._add["float32"], a[0], a[1], 64)) > 2
    assert packed(assembly(pooling._mean_of_four["float32"], *a[:5], np.float32(4), 64)) > 3
    assert packed(assembly(pooling._share_of_four["float32"], *a[:5], np.float32(4), 64)) > 0
    # Selected, not computed: moved in vectors under a mask.
    text = assembly(pooling._put_four["float32"], a[0], w, *a[1:5], 64)
    assert any(word in text for word in ("vmovups", "stp\tq", "vmovaps", "vblendvps"))


def test_what_there_is_no_kernel_for():
    x = gg.asarray(normal((1, 2, 13, 13)))
    with gg.use_kernels("require"):
        with pytest.raises(KernelError, match="a kernel of 144 places"):
            max_pool(x, (12, 12), (1, 1), ((0, 0), (0, 0)), (1, 1))
        with pytest.raises(KernelError, match="windows that lie in the border"):
            max_pool(x, (2, 2), (1, 1), ((2, 0), (0, 0)), (1, 1))
        # From one side of the only element to the other.
        with pytest.raises(KernelError, match="windows that lie in the border"):
            max_pool(x[:, :, :1], (2, 2), (1, 1), ((1, 1), (0, 0)), (2, 1))
