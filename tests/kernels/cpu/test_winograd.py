"""Winograd's convolutions: where they are taken, and what is peculiar to them.

That they agree with the generic text is in `test_convolution.py`, beside other convolutions.
"""

import numpy as np
import pytest

from gpugrad.kernels.cpu import winograd
from gpugrad.kernels.cpu.convolution import call_of
from tests.kernels.cpu.test_convolution import CASES, operands, options, results

TILED = [name for name in CASES if name.startswith("tiles")]


def call(x, weight, **given):
    chosen = {k: v for k, v in options(weight, **given).items() if k != "activation"}
    return call_of(x, weight, **chosen)


@pytest.mark.parametrize("storage", ["float32", "float64"])
def test_where_it_is_taken(storage):
    for name, (x, weight, given) in CASES.items():
        taken = winograd.suits(call(x, weight, **given), storage)
        assert taken == name.startswith("tiles"), name


@pytest.mark.parametrize(
    ("x", "weight", "given", "why"),
    [
        ((8, 64, 16, 16), (64, 64, 3, 3), {"stride": (2, 2)}, "strides"),
        ((8, 64, 16, 16), (64, 64, 3, 3), {"dilation": (1, 2)}, "dilation"),
        ((8, 64, 16, 16), (64, 32, 3, 3), {"groups": 2}, "groups"),
        ((8, 64, 16, 16), (64, 64, 3, 2), {}, "windows of 3×2"),
        ((8, 64, 256), (64, 64, 3), {}, "one axis"),
        ((8, 64, 16, 16), (60, 64, 3, 3), {}, "outputs that are no whole vectors"),
        ((8, 60, 16, 16), (64, 60, 3, 3), {}, "channels that are no whole vectors"),
        ((64, 16, 16, 16), (16, 16, 3, 3), {}, "few channels"),
        ((64, 64, 5, 5), (64, 64, 3, 3), {}, "three by three places, of two tiles by two"),
        ((2, 64, 6, 6), (64, 64, 3, 3), {"padding": ((1, 1), (1, 1))}, "few tiles"),
    ],
)
def test_where_it_is_not_taken(x, weight, given, why):
    assert not winograd.suits(call(x, weight, **given), "float32"), why
    assert winograd.suits(call((8, 64, 16, 16), (64, 64, 3, 3)), "float32")


@pytest.mark.parametrize("case", TILED)
def test_small_integers_are_exact(case):
    x, weight, given = CASES[case]
    rng = np.random.default_rng(0)
    # The quarters of the weights' basis are exact, too.
    arrays = [rng.integers(-4, 5, shape).astype(np.float32) for shape in (x, weight, weight[0])]
    kwargs = options(weight, "relu", **given)
    rows = call(x, weight, **given)
    g = rng.integers(-4, 5, (x[0], weight[0], rows.rows, rows.places)).astype(np.float32)
    got = results("require", arrays, g=g, **kwargs)
    want = results("off", [a.astype(np.float64) for a in arrays], g=g.astype(np.float64), **kwargs)
    for a, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, w)


@pytest.mark.parametrize("case", TILED)
def test_errors_are_of_the_size_of_those_of_a_direct_sum(case):
    x, weight, given = CASES[case]
    arrays, kwargs = operands(x, weight, "float32"), options(weight, **given)
    found = results("require", arrays, **kwargs)
    direct = results("off", arrays, **kwargs)
    exact = results("off", [a.astype(np.float64) for a in arrays], **kwargs)
    for a, d, e in zip(found, direct, exact, strict=True):
        error, usual = (np.sqrt(np.mean((b - e) ** 2)) for b in (a, d))
        assert error < 4 * usual + 1e-7


def test_what_is_not_finite_stays_in_its_tile():
    x, weight, _ = CASES["tiles"]
    arrays = operands(x, weight, "float32")
    clean = results("require", arrays, **options(weight))[0]
    arrays[0][1, 5, 7, 8] = np.nan
    y = results("require", arrays, **options(weight))[0]
    reached = ~np.isfinite(y)
    window = np.zeros_like(reached)
    window[1, :, 5:8, 6:9] = True
    tiles = np.zeros_like(reached)
    tiles[1, :, 4:8, 6:10] = True
    assert (reached | ~window).all(), "all whose window it is in"
    assert (tiles | ~reached).all(), "none of another tile"
    np.testing.assert_array_equal(y[~tiles], clean[~tiles])


def test_a_result_does_not_depend_on_the_rest_of_the_batch():
    x, weight, given = CASES["tiles, many images"]
    arrays, kwargs = operands(x, weight, "float32"), options(weight, **given)
    whole = results("require", arrays, **kwargs)
    some = results("require", [arrays[0][5:24], *arrays[1:]], **kwargs)
    np.testing.assert_array_equal(whole[0][5:24], some[0])
