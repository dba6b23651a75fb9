"""Scalar functions for compiled loops: units in the last place, special values, vector code."""

import math
import re
from decimal import Decimal, localcontext

import numpy as np
import pytest
from numba import njit

from gpugrad.kernels import scalars
from gpugrad.kernels.cpu.compile import CPU, serial
from gpugrad.kernels.template import Placeholder, Template, read, write
from tests.kernels.cpu.assembly import assembly, packed

NAMES = scalars.__all__

#: What the module promises, in units in the last place.
LIMITS = {
    "float32": {"exp": 1.1, "log": 1.0, "tanh": 1.3, "erf": 1.4, "log1p": 1.6, "expm1": 1.3},
    "float64": {"exp": 1.1, "log": 1.1, "tanh": 1.3, "erf": 1.4, "log1p": 1.6, "expm1": 1.3},
}

f = Placeholder("f")


@serial
def apply(x, out):
    for i in range(x.size):
        write(out, i, f(read(x, i)))


class Uncontracted:
    """The CPU where every product is rounded before it is added to."""

    name = "cpu, uncontracted"
    placeholder = staticmethod(CPU.placeholder)

    def compile(self, function, role, storage):
        return njit(error_model="numpy")(function)


class Interpreted:
    """Python on NumPy's scalars, as in the simulator of a GPU."""

    name = "python"

    def placeholder(self, name, storage):
        bits = {"float32": np.int32, "float64": np.int64}[storage]
        return {
            "T": getattr(np, storage), "I": bits, "absolute": abs,
            "to_bits": lambda x: x.view(bits), "from_bits": lambda i: i.view(storage),
            "where": lambda c, a, b: a if c else b,
        }[name]  # fmt: skip

    def compile(self, function, role, storage):
        return function


TARGETS = {"contracted": CPU, "uncontracted": Uncontracted(), "interpreted": Interpreted()}


def evaluate(name, x, target):
    template = getattr(scalars, name)
    if target == "interpreted":
        function = template.instance(TARGETS[target], x.dtype.name)
        return np.array([function(v) for v in x], x.dtype)
    loop = apply.bind(f=template).instance(TARGETS[target], x.dtype.name)
    out = np.empty_like(x)
    loop(x, out)
    return out


# -- where to look ---------------------------------------------------------------------------------


def around(centres, dtype, width):
    """The neighbours of some numbers, both sides, and of their opposites."""
    bits = np.int32 if dtype == "float32" else np.int64
    centres = np.asarray(centres, dtype)
    near = (centres.view(bits)[:, None] + np.arange(-width, width + 1, dtype=bits)).view(dtype)
    near = near[~np.isnan(near)]  # below 0 and above infinity
    return np.concatenate([near, -near])


def seams(dtype, width):
    """Where a branch-free piece ends, and where a result over- or underflows."""
    info = np.finfo(dtype)
    largest, smallest = math.log(info.max), math.log(info.tiny)
    whole = np.arange(1, math.ceil(-smallest / math.log(2)) + info.nmant + 3)
    halves = (whole - 0.5) * math.log(2)  # ties of n = x / ln(2); halved, of tanh's
    with np.errstate(over="ignore"):
        roots = np.ldexp(math.sqrt(0.5), np.arange(info.minexp - info.nmant, info.maxexp + 1))
    last = [largest, -smallest, -smallest + info.nmant * math.log(2), info.nmant * math.log(2)]
    ends = [0.6, 1.0, 4.0, 6.0, 10.0, 18.0, 20.0, 38.0, 89.0, 104.0, 710.0, 746.0, *last]
    ends += [float(info.tiny), float(info.eps) / 8, float(info.max)]
    tails = np.sqrt(whole[whole < 60] * math.log(2))  # near the ties of erf's
    centres = np.concatenate([halves, halves / 2, roots, np.abs(roots - 1), ends, tails])
    return around(centres[centres < float(info.max)], dtype, width)


def every_exponent(dtype, fractions):
    """Numbers with every exponent there is, subnormal ones included, and both signs."""
    bits, uint = (23, np.uint32) if dtype == "float32" else (52, np.uint64)
    exponents = np.arange((np.finfo(dtype).maxexp - np.finfo(dtype).minexp) + 2)
    random = np.random.default_rng(0).integers(0, 1 << bits, (2, exponents.size, fractions))
    edges = np.array([0, 1, 2, (1 << bits) - 2, (1 << bits) - 1])
    random[:, :, : min(fractions, edges.size)] = edges[:fractions]
    signs = np.array([0, 1])[:, None, None] << (np.dtype(dtype).itemsize * 8 - 1 - bits)
    return (((signs | exponents[:, None]) << bits) | random).astype(uint).view(dtype).ravel()


def in_the_open(dtype, n):
    """Numbers of ordinary size, where all that is interesting happens."""
    rng = np.random.default_rng(1)
    wide = -math.log(np.finfo(dtype).smallest_subnormal) + 2
    bounds = [(-wide, wide), (-20, 20), (-7, 7), (-2, 2), (-0.7, 0.7), (0.3, 3)]
    return np.concatenate([rng.uniform(a, b, n) for a, b in bounds]).astype(dtype)


# -- float32 ---------------------------------------------------------------------------------------

EXACT = {name: getattr(np, name) for name in NAMES if name != "erf"}
EXACT["erf"] = lambda x: np.array([math.erf(v) for v in x.tolist()])


def ulps(y, exact):
    """The error of float32 results in units in the last place of the exact, float64 ones."""
    top = 2.0**128  # what infinity stands for
    exact = np.clip(exact, -top, top)
    y = np.clip(y.astype(np.float64), -top, top)
    last = np.ldexp(1.0, np.maximum(np.frexp(np.abs(exact))[1] - 1, -126) - 23)
    error = np.abs(y - exact) / np.minimum(last, 2.0**104)
    both_nan = np.isnan(y) & np.isnan(exact)
    return np.where(both_nan, 0.0, np.where(np.isnan(error), np.inf, error))


X32 = np.concatenate(
    [every_exponent("float32", 256), seams("float32", 24), in_the_open("float32", 40_000)]
)


def test_samples_cover_every_exponent():
    exponents = np.unique(X32[np.isfinite(X32)].view(np.uint32) >> 23)
    assert np.array_equal(exponents, [*range(255), *range(256, 511)])


@pytest.mark.parametrize("target", ["contracted", "uncontracted"])
@pytest.mark.parametrize("name", NAMES)
def test_float32(name, target):
    y = evaluate(name, X32, target)
    with np.errstate(all="ignore"):
        exact = EXACT[name](X32.astype(np.float64))
    error = ulps(y, exact)
    worst = int(np.argmax(error))
    assert error[worst] <= LIMITS["float32"][name], (X32[worst], y[worst], exact[worst])
    real = ~np.isnan(exact)
    assert np.array_equal(np.signbit(y[real]), np.signbit(exact[real]))


def test_ulps_of_known_errors():
    one = np.array([1.0])
    assert ulps(np.float32([1.0]), one + 2.0**-24)[0] == 0.5
    assert ulps(np.float32([1.0]), one - 2.0**-25)[0] == 0.5
    assert ulps(np.float32([0.0]), one * 2.0**-149)[0] == 1.0
    assert ulps(np.float32([np.inf]), one * (2.0**128 - 2.0**104))[0] == 1.0
    assert ulps(np.float32([np.nan]), one)[0] == np.inf
    assert ulps(np.float32([1.0]), one * np.nan)[0] == np.inf


# -- float64 ---------------------------------------------------------------------------------------
#
# Against decimal numbers of 60 digits: no library has more than float64 on every platform.


def exact_exp(x):
    return (-x if x < -800 else x).exp() if abs(x) <= 800 else Decimal("Infinity" if x > 0 else 0)


def exact_expm1(x):
    if abs(x) < Decimal("1e-15"):
        return x + x * x / 2 + x * x * x / 6 + x**4 / 24
    return exact_exp(x) - 1


def exact_log(x):
    return Decimal("NaN") if x < 0 else x.ln()


def exact_log1p(x):
    if abs(x) < Decimal("1e-15"):
        return x - x * x / 2 + x * x * x / 3 - x**4 / 4
    return exact_log(1 + x)


def exact_tanh(x):
    if abs(x) < Decimal("1e-12"):
        return x - x * x * x / 3 + 2 * x**5 / 15
    e = exact_exp(-2 * abs(x))
    return ((1 - e) / (1 + e)).copy_sign(x)


def exact_erf(x):
    if abs(x) > 7:
        return Decimal(1).copy_sign(x)
    term, total, n = x, x, 0
    while abs(term) > abs(total) * Decimal("1e-40"):
        n += 1
        term = -term * x * x / n
        total += term / (2 * n + 1)
    pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
    return 2 * total / pi.sqrt()


def decimal_ulps(y, exact):
    """The error of one float64 result in units in the last place."""
    if exact.is_nan() or math.isnan(y):
        return 0.0 if exact.is_nan() and math.isnan(y) else math.inf
    rounded = float(exact)
    if math.isinf(rounded) or math.isinf(y):
        return 0.0 if rounded == y else math.inf
    below = abs(rounded)
    if Decimal(below) > abs(exact):
        below = math.nextafter(below, 0.0)
    return float(abs(Decimal(y) - exact) / Decimal(math.ulp(below)))


@pytest.fixture(scope="module")
def x64():
    seam = seams("float64", 1)
    x = np.concatenate([every_exponent("float64", 1), in_the_open("float64", 400)])
    return np.concatenate([x, np.random.default_rng(2).permutation(seam)[:4000]])


@pytest.mark.parametrize("name", NAMES)
def test_float64(name, x64):
    exact = globals()[f"exact_{name}"]
    x = x64[np.isfinite(x64) & (x64 != 0)]
    results = [evaluate(name, x, target) for target in ("contracted", "uncontracted")]
    with localcontext(prec=60):
        for v, *ys in zip(x.tolist(), *(y.tolist() for y in results)):
            true = exact(Decimal(v))
            for y in ys:
                assert decimal_ulps(y, true) <= LIMITS["float64"][name], (v, y, true)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_agrees_with_the_library(name):
    library = getattr(math, name)
    with localcontext(prec=60):
        for v in (-0.75, -1e-13, 1e-16, 1e-200, 0.3, 0.99, 2.5, 17.0):
            if name != "log" or v > 0:
                true = globals()[f"exact_{name}"](Decimal(v))
                assert math.isclose(float(true), library(v), rel_tol=1e-15), v


# -- special values --------------------------------------------------------------------------------

INF, NAN = math.inf, math.nan
SPECIAL = {
    "exp": [(0.0, 1.0), (-0.0, 1.0), (INF, INF), (-INF, 0.0), (1e5, INF), (-1e5, 0.0)],
    "expm1": [(0.0, 0.0), (-0.0, -0.0), (INF, INF), (-INF, -1.0), (1e5, INF), (-1e5, -1.0)],
    "log": [(0.0, -INF), (-0.0, -INF), (1.0, 0.0), (INF, INF), (-1.0, NAN), (-INF, NAN),
            (-1e-30, NAN)],
    "log1p": [(0.0, 0.0), (-0.0, -0.0), (-1.0, -INF), (INF, INF), (-INF, NAN), (-1.5, NAN),
              (-1e30, NAN)],
    "tanh": [(0.0, 0.0), (-0.0, -0.0), (INF, 1.0), (-INF, -1.0), (50.0, 1.0), (-1e30, -1.0)],
    "erf": [(0.0, 0.0), (-0.0, -0.0), (INF, 1.0), (-INF, -1.0), (50.0, 1.0), (-1e30, -1.0)],
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_special_values(name, dtype, target):
    x, expected = np.array([*SPECIAL[name], (NAN, NAN)], dtype).T.copy()
    with np.errstate(over="ignore"):
        y = evaluate(name, x, target)
    np.testing.assert_array_equal(y, expected)
    real = ~np.isnan(expected)
    assert np.array_equal(np.signbit(y[real]), np.signbit(expected[real]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ends_of_the_range(dtype):
    info = np.finfo(dtype)
    top = np.array([math.log(info.max)], dtype)
    for name in ("exp", "expm1"):
        around_top = evaluate(name, np.sort(around(top, dtype, 8))[17:], "contracted")
        assert np.isfinite(around_top[0])
        assert np.isinf(around_top[-1])
    # Gradual underflow: the smallest number there is, and then nothing.
    last = math.log(info.smallest_subnormal)
    low = np.array([last, last - 0.6, last - 0.8], dtype)
    least = float(info.smallest_subnormal)
    assert evaluate("exp", low, "contracted").tolist() == [least, least, 0.0]


@pytest.mark.parametrize("name", ["tanh", "erf"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_odd_and_bounded(name, dtype):
    x = np.concatenate([in_the_open(dtype, 20_000), seams(dtype, 8)])
    y = evaluate(name, x, "contracted")
    np.testing.assert_array_equal(evaluate(name, -x, "contracted"), -y)
    assert np.max(np.abs(y)) == 1.0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["tanh", "expm1", "log1p"])
def test_subnormal_numbers_pass_where_the_slope_is_1(name, dtype):
    least = np.finfo(dtype).smallest_subnormal
    x = np.arange(-40, 41).astype(dtype) * least
    assert np.array_equal(evaluate(name, x, "contracted"), x)


# -- without a compiler ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name, dtype):
    """The same in every bit, in the right type, and no warning where the result is finite."""
    x = np.concatenate([every_exponent(dtype, 1), in_the_open(dtype, 100)])
    if name in ("exp", "expm1"):
        x = x[x < math.log(np.finfo(dtype).max)]
    y = evaluate(name, x, "interpreted")
    function = getattr(scalars, name).instance(TARGETS["interpreted"], dtype)
    assert type(function(x.dtype.type(0.5))) is x.dtype.type
    np.testing.assert_array_equal(y, evaluate(name, x, "uncontracted"))


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32"])
def test_narrow_storage_computes_in_float32(storage):
    constant = scalars.ROUND.instance(CPU, storage)
    assert type(constant) is np.float32
    assert constant == 1.5 * 2.0**23
    assert isinstance(scalars.ROUND, Template)


# -- vector code -----------------------------------------------------------------------------------

LIBRARY = re.compile(rf"\b(?:numba_)?(?:{'|'.join(NAMES)})f?(?:@PLT)?\b(?!_)")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_loops_are_vectorised(name, dtype):
    x = np.ones(64, dtype)
    text = assembly(apply.bind(f=getattr(scalars, name))[dtype], x, np.empty_like(x))
    series = {"exp": "exp_series", "expm1": "exp_series", "tanh": "tanh_near", "erf": "erf_far",
              "log": "log_series", "log1p": "log_series"}[name]  # fmt: skip
    terms = getattr(scalars, series)._values[dtype].text.count("p * z")
    assert packed(text) >= terms, "as many vector instructions as the longest polynomial has terms"
    assert "gather" not in text
    assert not LIBRARY.search(text)


def test_a_loop_over_the_library_would_be_noticed():
    @njit(error_model="numpy")
    def library(x, out):
        for i in range(x.size):
            out[i] = math.tanh(x[i])

    x = np.ones(64, np.float32)
    text = assembly(library, x, np.empty_like(x))
    assert LIBRARY.search(text)
    assert packed(text) == 0
