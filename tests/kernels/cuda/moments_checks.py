"""What moments of the parts of an array must be, whatever runs the kernels: see checks.py."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.health import statistics
from gpugrad.kernels.cuda import moments
from tests.kernels.cuda.checks import DTYPES, inputs
from tests.kernels.cuda.optimizer_checks import at

NUMPY = backend_for_device("cpu")

#: How far sums of these few elements may be from the true ones, as a share of those of magnitudes.
SUMS = {"float16": 2.0**-40, "bfloat16": 2.0**-40, "float32": 2.0**-40, "float64": 2.0**-50}

#: Parts that begin and end anywhere, overlap, and are empty.
APART = np.array(
    [[0, 64], [64, 64], [70, 210], [201, 203], [10, 300], [3, 600], [5, 5], [600, 601]]
)


def exact(part):
    """Sum, sum of magnitudes and sum of squares of finite elements, without rounding but the
    last."""
    those = [Fraction(float(v)) for v in part if np.isfinite(v)]
    sums = sum(those), sum(map(abs, those)), sum(v * v for v in those)
    return [rounded(s) for s in sums]


def rounded(x):
    try:
        return float(x)
    except OverflowError:
        return math.inf


def check(x, bounds=None, shift=0, low=-0.5, high=0.75, **options):
    """All numbers of all parts: those that are counted as the generic text has them, sums exact."""
    storage = str(x.dtype)
    laid = at(x, shift)
    options = {"bounds": bounds, "low": low, "high": high, **options}
    got = moments.moments(NUMPY, laid, **options)
    with gg.use_kernels("off"), np.errstate(all="ignore"):
        want = statistics.moments(NUMPY, x, **options)
    assert (got.shape, got.dtype) == (want.shape, np.float64)
    counted = [0, 3, 4, 5, 6, 7]
    np.testing.assert_array_equal(got[:, counted], want[:, counted])
    for row, (a, b) in zip(got, [[0, x.size]] if bounds is None else bounds):
        total, size, squares = exact(x.reshape(-1)[a:b])
        assert abs(row[1] - total) <= SUMS[storage] * size
        assert row[2] == squares or abs(row[2] - squares) <= SUMS[storage] * squares
    return got


def spoilt(storage, size, seed=0):
    """With zeros and with elements that are not finite."""
    x = inputs(storage, size, seed)
    x[::7], x[1::11] = 0, -0.0
    bad = {5: math.nan, 9: math.inf, size // 2: -math.inf, size - 1: math.nan}
    for place, value in bad.items():
        if 0 <= place < size:
            x[place] = value
    return x


def check_parts(storage, shift=0):
    check(spoilt(storage, 601), APART, shift)
    check(spoilt(storage, 601), APART[:1], shift)
    assert check(spoilt(storage, 601), APART[:0], shift).shape == (0, 8)


def check_whole(storage, size, shift=0):
    check(spoilt(storage, size), shift=shift)
    if size:
        check(inputs(storage, size, 1), low=-math.inf, high=math.inf)


#: Magnitudes whose squares their type cannot hold, and on both sides of where levels change.
RANGE = {
    "float16": [6e4, 6e-8, 1.0],
    "bfloat16": [3e38, 1e-38, 1e20, 1e-20, 1.0],
    "float32": [3.4e38, 1e-45, 1e-38, 1e20, 1e-20, 1.0, 2.0**45, 2.0**-50, 3e13, 8e-16],
    "float64": [1e150, 1e-150, 1e200, 1e-200, 1e305, 5e-324, 1.0, 2.0**450, 2.0**-470],
}


def check_range(storage):
    """Great elements, small ones, and both together, in either order."""
    values = np.array(RANGE[storage], DTYPES[storage])
    for value in values:
        alike = np.zeros(70, DTYPES[storage])
        alike[::3] = value
        alike[40:] *= -1
        check(alike)
        check(alike[:2])
    mixed = np.resize(values, 150)
    check(mixed)
    check(np.sort(mixed))
    check(np.sort(mixed)[::-1].copy())
    for a, b in itertools.pairwise(values):
        check(np.repeat(np.array([a, b]), [75, 2]))


def check_digits(storage):
    """What single precision would lose: the variance of elements far from zero."""
    x = (1000 + 0.01 * np.random.default_rng(0).standard_normal(900)).astype(DTYPES[storage])
    row = check(x)[0]
    if storage in ("float32", "float64"):
        variance = row[2] / x.size - (row[1] / x.size) ** 2
        np.testing.assert_allclose(variance, x.astype("float64").var(), rtol=1e-3)
    check(np.resize(np.array([1, 1e-3, 1e-4], DTYPES[storage]), 700))
    check(np.resize(np.array([1, -1], DTYPES[storage]), 700) + inputs(storage, 700, 2) / 4096)
