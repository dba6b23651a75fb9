"""Convolutions: kernels against the generic text, in every layout and storage."""

# mypy: disable-error-code="call-arg, misc, index"

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import convolution as family
from gpugrad.kernels.cpu import pool, windows
from gpugrad.kernels.cpu.memory import address, channels_last
from gpugrad.ops.convolution import convolution, convolution_backward
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, EPS, layouts, run, wide

NUMPY = backend_for_device("cpu")

#: Input, weight, and what differs from stride 1, no padding, dilation 1, one group.
CASES = {
    "28x28": ((2, 1, 28, 28), (32, 1, 3, 3), {}),
    "wide": ((3, 32, 13, 14), (70, 32, 3, 3), {}),
    "padding": ((2, 5, 9, 8), (7, 5, 3, 3), {"padding": ((1, 1), (1, 1))}),
    "uneven padding": ((2, 5, 6, 6), (7, 5, 3, 3), {"padding": ((4, 3), (0, 3))}),
    "stride": ((2, 3, 9, 11), (5, 3, 3, 2), {"stride": (2, 3), "padding": ((1, 1), (2, 0))}),
    "dilation": ((2, 3, 9, 11), (5, 3, 3, 2), {"dilation": (2, 3)}),
    "stride and dilation": ((1, 3, 9, 11), (5, 3, 2, 2), {"stride": (2, 1), "dilation": (1, 2)}),
    "1x1": ((2, 16, 5, 6), (8, 16, 1, 1), {}),
    "1x1, stride": ((2, 16, 5, 6), (8, 16, 1, 1), {"stride": (2, 2)}),
    "groups": ((2, 6, 9, 8), (4, 3, 3, 3), {"groups": 2, "padding": ((1, 1), (1, 1))}),
    "groups, stride": ((2, 6, 9, 8), (9, 2, 3, 2), {"groups": 3, "stride": (2, 2)}),
    "alone": ((2, 20, 9, 8), (20, 1, 3, 4), {"groups": 20, "padding": ((1, 1), (1, 2))}),
    "alone, stride": ((2, 20, 9, 8), (20, 1, 3, 3), {"groups": 20, "stride": (2, 1)}),
    "alone, two each": ((2, 6, 9, 8), (12, 1, 3, 3), {"groups": 6}),
    "one axis": ((3, 4, 19), (6, 4, 5), {"stride": (2,), "padding": ((2, 1),)}),
    "one place": ((4, 3, 3, 3), (5, 3, 3, 3), {}),
    "many images": ((37, 2, 5, 5), (3, 2, 3, 3), {"padding": ((1, 1), (1, 1))}),
    "tiles": ((3, 32, 14, 16), (48, 32, 3, 3), {}),
    "tiles, padding": ((2, 48, 13, 16), (32, 48, 3, 3), {"padding": ((1, 1), (1, 1))}),
    "tiles, uneven padding": ((4, 32, 5, 7), (32, 32, 3, 3), {"padding": ((0, 4), (2, 1))}),
    "tiles, large": ((1, 32, 45, 47), (32, 32, 3, 3), {"padding": ((1, 0), (0, 2))}),
    "tiles, many images": ((37, 32, 6, 6), (32, 32, 3, 3), {}),
}


def options(weight, activation=None, **given):
    axes = len(weight) - 2
    usual = {"stride": (1,) * axes, "padding": ((0, 0),) * axes, "dilation": (1,) * axes}
    return {**usual, "groups": 1, "activation": activation, **given}


def normal(shape, seed, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


def operands(x, weight, dtype="float64"):
    return [normal(x, 0, dtype), normal(weight, 1, dtype), normal(weight[0], 2, dtype)]


def results(mode, arrays, g=None, **kwargs):
    """Value and gradients; `g` is drawn when it is not given."""
    if g is None:
        with gg.use_kernels("off"):
            shape = convolution(*(gg.asarray(a) for a in arrays), **kwargs).shape
        g = normal(shape, 3).astype(arrays[0].dtype)
    return run(mode, convolution, *arrays, g=g, **kwargs)


def agree(got, want, tol):
    for a, w in zip(got, want, strict=True):
        assert a.shape == w.shape
        scale = max(1.0, float(abs(wide(w)).max(initial=0.0)))
        np.testing.assert_allclose(wide(a), wide(w), rtol=0, atol=tol * scale)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("case", CASES)
def test_parity(case, activation):
    x, weight, given = CASES[case]
    kwargs = options(weight, activation, **given)
    arrays = operands(x, weight)
    agree(results("require", arrays, **kwargs), results("off", arrays, **kwargs), 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_single_precision(case):
    x, weight, given = CASES[case]
    kwargs = options(weight, "relu", **given)
    arrays = operands(x, weight, "float32")
    got = results("require", arrays, **kwargs)
    assert all(a.dtype == np.float32 for a in got)
    y = got[0]
    # Where the sign of a sum is decided by its last bit, a gradient is there or not.
    want = results("off", [wide(a) for a in arrays], **kwargs)
    assert np.mean((y > 0) != (want[0] > 0)) < 1e-3
    agree(got[:1], want[:1], 64 * EPS["float32"])
    plain = options(weight, None, **given)
    agree(results("require", arrays, **plain),
          results("off", [wide(a) for a in arrays], **plain), 256 * EPS["float32"])  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    x, weight, given = CASES["padding"]
    arrays = operands(x, weight, dtype)
    kwargs = options(weight, "gelu", **given)
    got = results("require", arrays, **kwargs)
    assert all(a.dtype == DTYPES[dtype] for a in got)
    agree(got, results("off", [wide(a) for a in arrays], **kwargs), 8 * EPS[dtype])


def test_without_a_bias():
    x, weight, given = CASES["padding"]
    arrays = operands(x, weight)[:2]
    for activation in (None, "relu"):
        kwargs = options(weight, activation, **given)

        def plain(x, w, kwargs=kwargs):
            return convolution(x, w, None, **kwargs)

        agree(run("require", plain, *arrays), run("off", plain, *arrays), 1e-12)


@pytest.mark.parametrize("case", ["padding", "tiles, padding"])
def test_layouts(case):
    x, weight, given = CASES[case]
    kwargs = options(weight, "relu", **given)
    arrays = operands(x, weight)
    g = normal((x[0], weight[0], *x[2:]), 5)
    want = results("require", arrays, g=g, **kwargs)
    for number in range(2):
        for name, laid in layouts(arrays[number]):
            changed = [laid if i == number else a for i, a in enumerate(arrays)]
            got = results("require", changed, g=g, **kwargs)
            assert all(np.array_equal(a, w) for a, w in zip(got, want)), (number, name)
    for name, laid in layouts(g):
        got = results("require", arrays, g=laid, **kwargs)
        assert all(np.array_equal(a, w) for a, w in zip(got, want)), name


def test_results_lie_with_the_channels_last():
    x, weight, given = CASES["wide"]
    y = results("require", operands(x, weight), **options(weight, "relu", **given))
    for a in y[:2]:
        assert a.transpose(0, 2, 3, 1).flags.c_contiguous
        assert channels_last(a).base is not None and np.shares_memory(channels_last(a), a)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 40, 33, 5), (3, 1, 4, 4), (2, 5, 1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_turning(shape, dtype):
    x = normal(shape, 0, dtype)
    want = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    for name, laid in layouts(x):
        got = channels_last(laid)
        assert got.flags.c_contiguous and np.array_equal(got, want), name


@pytest.mark.parametrize("case", ["padding", "tiles, padding"])
def test_only_what_is_needed(case):
    x, weight, given = CASES[case]
    arrays, kwargs = operands(x, weight), options(weight, None, **given)
    g = normal((x[0], weight[0], *x[2:]), 5)
    del kwargs["activation"]
    everything = results("off", arrays, g=g, **kwargs)[1:]
    for needs in np.ndindex(2, 2, 2):
        wanted = tuple(map(bool, needs))
        with gg.use_kernels("require"):
            got = convolution_backward(
                NUMPY, g, *arrays, None, activation=None, needs=wanted, **kwargs
            )
        for a, w, there in zip(got, everything, wanted, strict=True):
            assert (a is not None) == there
            if there:
                np.testing.assert_allclose(a, w, 1e-11, 1e-11)


@pytest.mark.parametrize("case", ["padding", "groups", "alone", "one axis", "tiles"])
@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("dense", [True, False])
def test_gradients_go_where_they_are_wanted(case, mode, dense):
    x, weight, given = CASES[case]
    arrays, kwargs = operands(x, weight), options(weight, None, **given)
    with gg.use_kernels("off"):
        y = convolution(*(gg.asarray(a) for a in arrays), **kwargs)
    g = normal(y.shape, 5)
    home = np.full((*weight[:-1], weight[-1] * (1 if dense else 2)), np.nan)
    home = home if dense else home[..., ::2]
    bias_home = np.full(2 * weight[0], np.nan)[:: 1 if dense else 2][: weight[0]]
    call = {k: v for k, v in kwargs.items() if k != "activation"}
    with gg.use_kernels(mode):
        got = convolution_backward(
            NUMPY, g, *arrays, None, activation=None, needs=(dense, True, True),
            weight_home=home, bias_home=bias_home, **call,
        )  # fmt: skip
    assert got[1] is home and got[2] is bias_home
    want = results("off", arrays, g=g, **kwargs)
    np.testing.assert_allclose(home, want[2], 1e-11, 1e-11)
    np.testing.assert_allclose(bias_home, want[3], 1e-11, 1e-11)


@pytest.mark.parametrize(
    "case", ["wide", "many images", "tiles, padding", "tiles, many images", "stride", "alone"]
)
def test_threads_change_no_bit(case):
    x, weight, given = CASES[case]
    arrays, kwargs = operands(x, weight, "float32"), options(weight, "relu", **given)
    before = pool.get_num_threads()
    found = []
    try:
        for n in (1, before):
            pool.set_num_threads(n)
            found.append([a.view(np.int32) for a in results("require", arrays, **kwargs)])
    finally:
        pool.set_num_threads(before)
    for alone, together in zip(*found, strict=True):
        np.testing.assert_array_equal(alone, together)


def test_loops_are_vectorised():
    x = np.ones(64, np.float32)
    a = [address(x)] * 3
    kernel = family._with_finish(family._forward, "relu", False)
    finish = kernel.bound["finish"]["float32"]
    assert packed(assembly(finish, *a, 64)) > 4
    slope = family._with_slope(family._backward, "relu").bound["slope"]["float32"]
    assert packed(assembly(slope, *a, a[0], 64)) > 4
    alone = windows._alone_nine["float32"]
    assert packed(assembly(alone, a[0], 4, 4, a[1], a[2], 8, 2, 8, 8)) > 9
    sums = windows._alone_sums["float32"]
    assert packed(assembly(sums, *a, 8, 2, 8)) > 2


def test_what_there_is_no_kernel_for():
    x, w = np.ones((1, 2, 3, 3, 3)), np.ones((1, 2, 2, 2, 2))
    kwargs = {"stride": (1,) * 3, "padding": ((0, 0),) * 3, "dilation": (1,) * 3}
    with gg.use_kernels("require"), pytest.raises(KernelError, match="3 axes; there are kernels"):
        convolution(gg.asarray(x), gg.asarray(w), None, **kwargs)
    narrow = gg.asarray(np.ones((1, 2, 3, 3), np.float32))
    with gg.use_kernels("require"), pytest.raises(KernelError, match="weight of float64"):
        convolution(narrow, gg.asarray(np.ones((1, 2, 2, 2))), None)
    assert convolution(narrow, gg.asarray(np.ones((1, 2, 2, 2))), None).dtype == np.float64


def test_an_empty_batch():
    y = convolution(gg.zeros((0, 2, 5, 5)), gg.ones((3, 2, 3, 3)), gg.ones((3,)))
    assert y.shape == (0, 3, 3, 3)
