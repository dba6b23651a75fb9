"""Transposed convolutions: kernels against the generic text, in every layout and storage."""

# mypy: disable-error-code="call-arg, misc, index"

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import pool
from gpugrad.kernels.cpu import transposed as family
from gpugrad.kernels.cpu.memory import address
from gpugrad.ops.transposed import (
    border,
    transposed_convolution,
    transposed_convolution_backward,
)
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, EPS, layouts, run, wide

NUMPY = backend_for_device("cpu")

#: Input, weight, and what differs from stride 1, no padding, dilation 1, one group; `more` is the
#: output padding.
CASES = {
    "4x4, stride 2": ((3, 8, 7, 6), (8, 5, 4, 4), {"stride": (2, 2), "padding": (1, 1)}),
    "wide": ((2, 32, 7, 9), (32, 70, 4, 4), {"stride": (2, 2), "padding": (1, 1)}),
    "stride 1": ((2, 5, 4, 6), (5, 7, 3, 3), {"padding": (1, 0)}),
    "2x2, stride 2": ((2, 5, 4, 6), (5, 7, 2, 2), {"stride": (2, 2)}),
    "gaps": ((2, 5, 4, 3), (5, 4, 2, 1), {"stride": (3, 2), "more": (2, 1)}),
    "more": ((2, 5, 4, 3), (5, 4, 3, 3), {"stride": (2, 2), "padding": (1, 0), "more": (1, 1)}),
    "uneven": ((2, 3, 5, 4), (3, 4, 3, 4), {"stride": (2, 3), "padding": (2, 1)}),
    "dilation": ((2, 3, 5, 4), (3, 4, 3, 2), {"dilation": (2, 3), "padding": (1, 1)}),
    "both": ((2, 3, 5, 4), (3, 4, 3, 4), {"stride": (2, 3), "dilation": (2, 2), "more": (1, 1)}),
    "groups": ((2, 6, 5, 4), (6, 4, 3, 4), {"stride": (2, 2), "groups": 2, "padding": (1, 1)}),
    "alone": ((2, 20, 5, 4), (20, 1, 4, 4), {"stride": (2, 2), "groups": 20, "padding": (1, 1)}),
    "alone, 3x3": ((2, 20, 5, 4), (20, 1, 3, 3), {"groups": 20}),
    "one axis": ((3, 4, 9), (4, 6, 5), {"stride": (2,), "padding": (1,)}),
    "one place": ((4, 3, 1, 1), (3, 5, 3, 3), {}),
    "many images": ((37, 2, 3, 3), (2, 3, 3, 3), {"stride": (2, 2), "padding": (1, 1)}),
    "one image": ((1, 16, 14, 14), (16, 8, 4, 4), {"stride": (2, 2), "padding": (1, 1)}),
}


def options(x, weight, more=0, **given):
    axes = len(x) - 2
    used = {"stride": (1,) * axes, "padding": (0,) * axes, "dilation": (1,) * axes} | given
    each = zip(x[2:], used["stride"], used["padding"], used["dilation"], weight[2:])
    more = more or (0,) * axes
    out = tuple((n - 1) * s - 2 * p + d * (k - 1) + q + 1 for (n, s, p, d, k), q in zip(each, more))
    return {"out": out, "groups": 1, **used}


def normal(shape, seed, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


def operands(case, dtype="float64"):
    """Arrays, the gradient of the result, options."""
    x, weight, given = CASES[case]
    kwargs = options(x, weight, **given)
    outputs = kwargs["groups"] * weight[1]
    arrays = [normal(x, 0, dtype), normal(weight, 1, dtype), normal(outputs, 2, dtype)]
    return arrays, normal((x[0], outputs, *kwargs["out"]), 3, dtype), kwargs


def agree(got, want, tol):
    for a, w in zip(got, want, strict=True):
        assert a.shape == w.shape
        scale = max(1.0, float(abs(wide(w)).max(initial=0.0)))
        np.testing.assert_allclose(wide(a), wide(w), rtol=0, atol=tol * scale)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tol"), [
    ("float64", 1e-12), ("float32", 256 * EPS["float32"]),
    ("float16", 8 * EPS["float16"]), ("bfloat16", 8 * EPS["bfloat16"]),
])  # fmt: skip
def test_parity(case, dtype, tol):
    arrays, g, kwargs = operands(case, dtype)
    got = run("require", transposed_convolution, *arrays, g=g, **kwargs)
    assert all(a.dtype == DTYPES[dtype] for a in got)
    wider = [wide(a) for a in arrays]
    agree(got, run("off", transposed_convolution, *wider, g=wide(g), **kwargs), tol)


def test_without_a_bias():
    (x, w, _), g, kwargs = operands("uneven")

    def plain(x, w):
        return transposed_convolution(x, w, None, **kwargs)

    agree(run("require", plain, x, w, g=g), run("off", plain, x, w, g=g), 1e-12)


@pytest.mark.parametrize("case", ["4x4, stride 2", "one axis"])
def test_layouts(case):
    arrays, g, kwargs = operands(case)
    want = run("require", transposed_convolution, *arrays, g=g, **kwargs)
    for number in range(3):
        for name, laid in layouts(arrays[number]):
            changed = [laid if i == number else a for i, a in enumerate(arrays)]
            got = run("require", transposed_convolution, *changed, g=g, **kwargs)
            assert all(np.array_equal(a, w) for a, w in zip(got, want)), (number, name)
    for name, laid in layouts(g):
        got = run("require", transposed_convolution, *arrays, g=laid, **kwargs)
        assert all(np.array_equal(a, w) for a, w in zip(got, want)), name


@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_only_what_is_needed_and_where_it_is_wanted(mode, dtype):
    (x, w, b), g, kwargs = operands("groups", dtype)
    wider = [wide(a) for a in (x, w, b)]
    _, *everything = run("off", transposed_convolution, *wider, g=wide(g), **kwargs)
    used = {k: kwargs[k] for k in ("stride", "padding", "dilation")}
    used["padding"] = border(x.shape[2:], w.shape[2:], kwargs["out"], **used)
    for needs in np.ndindex(2, 2, 2):
        wanted = tuple(map(bool, needs))
        homes = [np.full(np.repeat(a, 2, axis=-1).shape, np.nan, a.dtype)[..., ::2] for a in (w, b)]
        with gg.use_kernels(mode):
            got = transposed_convolution_backward(
                NUMPY, g, x, w, **used, groups=kwargs["groups"], needs=wanted,
                weight_home=homes[0], bias_home=homes[1],
            )  # fmt: skip
        for a, want, there, home in zip(got, everything, wanted, [None, *homes], strict=True):
            assert (a is not None) == there
            if there:
                agree([a], [want], 1e-11 if dtype == "float64" else 16 * EPS[dtype])
                assert home is None or a is home


@pytest.mark.parametrize("case", ["wide", "many images", "one image", "alone"])
def test_threads_change_no_bit(case):
    arrays, g, kwargs = operands(case, "float32")
    before = pool.get_num_threads()
    found = []
    try:
        for n in (1, before):
            pool.set_num_threads(n)
            got = run("require", transposed_convolution, *arrays, g=g, **kwargs)
            found.append([a.tobytes() for a in got])
    finally:
        pool.set_num_threads(before)
    assert found[0] == found[-1]


def test_the_bias_is_added_in_vectors():
    x = np.ones(64, np.float32)
    assert packed(assembly(family._add["float32"], address(x), address(x), 64)) > 2


def test_what_there_is_no_kernel_for():
    x, w = gg.ones((1, 2, 3, 3, 3)), gg.ones((2, 1, 2, 2, 2))
    each = {"stride": (1,) * 3, "padding": (0,) * 3, "dilation": (1,) * 3}
    with gg.use_kernels("require"), pytest.raises(KernelError, match="3 axes; there are kernels"):
        transposed_convolution(x, w, None, (4, 4, 4), **each)
    narrow, double = gg.ones((1, 2, 5), dtype="float32"), gg.ones((2, 3, 2), dtype="float64")
    given = ((6,), (1,), (0,), (1,))
    with gg.use_kernels("require"), pytest.raises(KernelError, match="weight of float64"):
        transposed_convolution(narrow, double, None, *given)
    assert transposed_convolution(narrow, double, None, *given).dtype == np.float64
