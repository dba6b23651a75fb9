"""Softmax and its logarithm: rows in memory, tiles of rows side by side, and their gradients."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import softmax as family
from gpugrad.ops.activations import softmax_backward
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, EPS, layouts, run, wide

NUMPY = backend_for_device("cpu")
FUNCTIONS = [gg.softmax, gg.log_softmax]
NAMES = ["softmax", "log_softmax"]
PIECE = family.PIECE

#: Shapes and axes: rows of one piece and of several, tiles narrower and wider than one, and many
#: rows shorter than a vector.
AXES = [
    ((13, 37), -1), ((5, 1), 1), ((1, 7), -1), ((9,), 0), ((3, PIECE), 1), ((2, PIECE + 1), -1),
    ((2, 3 * PIECE - 5), 1), ((4, 3, 5), -1), ((4, 3, 5), 1), ((4, 3, 5), 0), ((37, 13), 0),
    ((700, 70), 0), ((2, 3, 1500), 1), ((2, 11, 3, 5), -3), ((6, 4, 1, 1), 1),
    ((300, 5), -1), ((40, 20, 3), 2),
]  # fmt: skip


def operands(shape, dtype, scale=3.0):
    rng = np.random.default_rng(len(shape))
    return [(s * rng.standard_normal(shape)).astype(DTYPES[dtype]) for s in (scale, 1.0)]


def close(function, got, true, x, g, axis, dtype):
    """Within the errors of one exponential, one sum and one rounding to the storage."""
    eps = max(EPS[dtype], EPS["float64"])
    inner = EPS["float32"] if dtype != "float64" else eps
    spread = wide(x).max(axis, keepdims=True) - wide(x).min(axis, keepdims=True)
    slack = inner * (16.0 + 2.0 * spread) + 2.0 * eps
    # A gradient is a difference with a sum over the row.
    above = 1.0 + np.abs(wide(g)).sum(axis, keepdims=True)
    assert got[0].shape == got[1].shape == x.shape
    assert got[0].dtype == got[1].dtype == DTYPES[dtype]
    tiny = 2.0**-25 if dtype == "float16" else 0.0  # half of what comes after 0
    sums = 4.0 * inner if function is gg.log_softmax else tiny
    assert np.all(np.abs(wide(got[0]) - true[0]) <= slack * np.abs(true[0]) + sums)
    assert np.all(np.abs(wide(got[1]) - true[1]) <= slack * above)


@pytest.mark.parametrize(("shape", "axis"), AXES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
def test_parity(function, dtype, shape, axis):
    x, g = operands(shape, dtype)
    got = run("require", function, x, g=g, axis=axis)
    # The gradient is told the result as it is stored.
    y = wide(got[0])
    total = (wide(g) * (y if function is gg.softmax else 1.0)).sum(axis, keepdims=True)
    shared = y * (wide(g) - total) if function is gg.softmax else wide(g) - np.exp(y) * total
    true = run("off", function, wide(x), g=wide(g), axis=axis)
    close(function, got, [true[0], shared], x, g, axis, dtype)


@pytest.mark.parametrize(("shape", "axis"), AXES)
@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
def test_the_generic_text_says_the_same(function, shape, axis):
    x, g = operands(shape, "float64")
    got = run("require", function, x, g=g, axis=axis)
    want = run("off", function, x, g=g, axis=axis)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
def test_layouts(function, axis):
    x, g = operands((31, 18), "float32")
    want = run("require", function, x, g=g, axis=axis)
    for name, laid in layouts(x):
        # Rows along memory and rows across it are summed in another order.
        ulps = 8 if name == "transposed" else 0
        got = run("require", function, laid, g=g, axis=axis)
        for a, w in zip(got, want):
            np.testing.assert_allclose(a, w, rtol=ulps * EPS["float32"], atol=ulps * 1e-7)
    for name, laid in layouts(g):
        got = run("require", function, x, g=laid, axis=axis)
        for a, w in zip(got, want):
            np.testing.assert_allclose(a, w, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
def test_rows_of_a_transposed_view_are_rows(function):
    x, g = operands((5, 7, 300), "float32")
    want = run("require", function, x, g=g)
    turned = run(
        "require", function, x.transpose(0, 2, 1), g=g.transpose(0, 2, 1), axis=1
    )  # fmt: skip
    for a, w in zip(turned, want):
        assert np.array_equal(a, w.transpose(0, 2, 1))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 3), (0,)])
@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
def test_no_elements(function, shape):
    x = np.zeros(shape, "float32")
    y, gx = run("require", function, x, g=x, axis=min(1, len(shape) - 1))
    assert y.shape == gx.shape == shape


# -- values out of the ordinary --------------------------------------------------------------------

INF, NAN = np.inf, np.nan


def rows_out_of_the_ordinary(dtype):
    """Rows of three pieces each, by what is special about them."""
    rng = np.random.default_rng(0)
    plain = rng.standard_normal(3 * PIECE)
    found = {}

    def special(name, where, value):
        found[name] = plain.copy()
        found[name][where] = value

    special("masked at the start", slice(0, PIECE + 3), -INF)
    special("masked at the end", slice(PIECE - 3, None), -INF)
    special("masked piece", slice(PIECE, 2 * PIECE), -INF)
    special("all masked", slice(None), -INF)
    for place in (0, PIECE + 1, 3 * PIECE - 1):
        special(f"infinite at {place}", place, INF)
        for sign in (1.0, -1.0):
            special(f"NaN of sign {sign} at {place}", place, np.copysign(NAN, sign))
    special("NaN in a masked piece", slice(0, PIECE), -INF)
    found["NaN in a masked piece"][7] = np.copysign(NAN, -1.0)
    special("masked but one", slice(1, None), -INF)
    high = 1e30 if dtype in ("float32", "float64") else 6e4
    special("one far above", 2 * PIECE + 5, high)
    special("one far above the others, at the start", 5, high)
    special("all far below", slice(None), -high)
    special("large", slice(None), plain + 1e4)
    found["a step up at every piece"] = plain + np.repeat([0.0, 20.0, 100.0], PIECE)
    found["a step down at every piece"] = plain - np.repeat([0.0, 20.0, 100.0], PIECE)
    found["steps up that stay in reach"] = plain + np.repeat([0.0, 12.0, 24.0], PIECE)
    return {name: row.astype(DTYPES[dtype]) for name, row in found.items()}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
def test_values_out_of_the_ordinary(function, dtype, axis):
    rows = rows_out_of_the_ordinary(dtype)
    x = np.stack(list(rows.values()), 1 - axis)
    with gg.use_kernels("require"):
        y = wide(function(gg.asarray(x), axis=axis).data)
    with np.errstate(invalid="ignore", over="ignore"), gg.use_kernels("off"):
        true = function(gg.asarray(wide(x)), axis=axis).data
    slack = 2 * EPS[dtype] + (1e-5 if dtype != "float64" else 1e-12)
    for name, a, t in zip(rows, np.moveaxis(y, axis, 1), np.moveaxis(true, axis, 1)):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(t), err_msg=name)
        # Shares below the least number of the storage are 0, and their logarithms are not -inf.
        np.testing.assert_allclose(a, t, rtol=slack, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
def test_a_nan_stays_in_its_row(function, axis):
    x, g = operands((6, 6), "float32")
    x[2, 3] = g[4, 1] = NAN
    y, gx = run("require", function, x, g=g, axis=axis)
    bad_y, bad_g = np.zeros((2, 6, 6), bool)
    bad_y[(slice(None), 3) if axis == 0 else 2] = True
    bad_g[(slice(None), 1) if axis == 0 else 4] = True
    assert np.array_equal(np.isnan(y), bad_y)
    if function is gg.log_softmax:
        assert np.array_equal(np.isnan(gx), bad_y | bad_g)
    else:
        assert np.array_equal(np.isnan(gx), bad_y | bad_g)


def test_shares_add_up_to_one():
    x, _ = operands((4, 50_000), "float32")
    for axis, rows in ((1, x), (0, x.T.copy())):
        with gg.use_kernels("require"):
            y = wide(gg.softmax(gg.asarray(rows), axis=axis).data)
        np.testing.assert_allclose(y.sum(axis), 1.0, rtol=1e-6)


# -- derivatives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
def test_derivatives_of_every_kind(function, axis):
    x = np.random.default_rng(5).standard_normal((4, 5))
    with gg.use_kernels("require"):
        gg.check_grads(lambda z: function(z, axis=axis), (gg.tensor(x),), order=2)
        t = np.random.default_rng(6).standard_normal((4, 5))
        _, forward = gg.jvp(lambda z: function(z, axis=axis), (gg.tensor(x),), (gg.tensor(t),))
    step = 1e-6
    with gg.use_kernels("off"):
        high, low = (function(gg.tensor(x + s * t), axis=axis).data for s in (step, -step))
    np.testing.assert_allclose(forward.data, (high - low) / (2 * step), rtol=1e-7, atol=1e-9)


# -- the machine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
def test_any_number_of_threads_gives_the_same_bits(function, axis):
    from numba import get_num_threads, set_num_threads

    x, g = operands((500, 900), "float32")
    before = get_num_threads()
    seen = []
    try:
        for threads in [*range(1, before + 1), 1]:
            set_num_threads(threads)
            seen.append(run("require", function, x, g=g, axis=axis))
    finally:
        set_num_threads(before)
    for other in seen[1:]:
        assert all(np.array_equal(a, w) for a, w in zip(other, seen[0]))


def test_refusals():
    x = np.zeros((2, 3), "float32")
    with gg.use_kernels("require"):
        for bad, words in (
            (lambda: gg.softmax(gg.asarray(x), axis=(0, 1)), r"axis \(0, 1\) of 2"),
            (lambda: gg.softmax(gg.tensor(1.0)), "axis -1 of 0"),
            (lambda: gg.log_softmax(gg.asarray(x.astype(int))), "no kernel for int64"),
        ):
            with pytest.raises(KernelError, match=words):
                bad()
        with pytest.raises(KernelError, match="operands of float32 and float64"):
            softmax_backward(NUMPY, x, x.astype("float64"))


@pytest.mark.parametrize("storage", ["float32", "float64"])
def test_loops_are_vectorised(storage):
    a, b, c, d = np.ones((4, 64), storage)
    one = a[0]
    for loop, args in {
        family._greatest_and_sum_exp: (a, one),
        family._sum_exp: (a, one),
        family.write_share: (a, b, one, one),
        family._write_log_share: (a, b, one, one),
        family._raise: (a, b),
        family._add_exp: (a, b, c),
        family._write_shares: (a, b, c, d),
        family._write_log_shares: (a, b, c, d),
    }.items():
        assert packed(assembly(loop[storage], *args)) >= 1, loop
    for name in ("softmax_backward", "log_softmax_backward"):
        rows, tiles = family.LOOPS[name].bodies
        for loop, args in {
            rows: (a, b, c, 0, ()),
            rows.bound["sum_terms"]: (a, b),
            tiles.bound["add_terms"]: (a, b, c),
            tiles.bound["write_partials"]: (a, b, c, d),
        }.items():
            assert packed(assembly(loop[storage], *args)) >= 1, loop


def test_the_search_for_the_greatest_is_vectorised():
    text = assembly(family._greatest["float32"], np.ones(64, "float32"))
    assert any(name in text for name in ("vpmaxsd", "smax\t", "vpcmpgtd")), text
