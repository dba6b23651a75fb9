"""Exponentials, logarithms, tanh and erf for compiled loops, without branches.

One text serves every target and both arithmetic types, whose constants differ. There are no calls,
no tables and no integer divisions, and cases are selected, not branched to, so that a compiler can
turn the loop around a function into vector instructions. The sums are ordered for their rounding: a
compiler may contract a product and a sum to one rounding, but it must not reorder.

Over the whole range, subnormal numbers included, the errors in units in the last place of a result
are at most these (float32: every number was tried; float64: 30 million, 0.3 million for erf):

========  ====  ====  =====  ====  ======  ======
type      exp   log   tanh   erf   log1p   expm1
========  ====  ====  =====  ====  ======  ======
float32   1.1   1.0   1.3    1.4   1.6     1.3
float64   1.1   1.1   1.3    1.4   1.6     1.3
========  ====  ====  =====  ====  ======  ======

Infinities, NaN and the sign of zero are those of IEEE 754.

The polynomials were fitted by Remez's exchange algorithm with 50 digits, weighted for the relative
error of the function that they are part of. Coefficients stand lowest power first. Those of float64
were rounded as they are, those of float32 one after the other, with the rest fitted anew each time.
The errors stated are those after rounding, for float32 and, in parentheses, float64.

>>> from gpugrad.kernels.cpu.compile import CPU
>>> round(tanh.instance(CPU, "float64")(1.0), 12)
0.761594155956
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpugrad.kernels.template import (
    I,
    T,
    Target,
    Template,
    absolute,
    arithmetic,
    device,
    from_bits,
    to_bits,
    where,
)
from gpugrad.kernels.trace import text_template

__all__ = ["erf", "exp", "expm1", "log", "log1p", "tanh"]


class Typed(Template):
    """One value, or one template, for each arithmetic type: an instance is filled in with its own.

    Parameters
    ----------
    float32, float64:
        A constant of that type (or of the integer type as wide), or a template.
    """

    def __init__(self, float32: Any, float64: Any) -> None:
        self.name = "typed"
        self._values = {"float32": float32, "float64": float64}

    def instance(self, target: Target, storage: str) -> Any:
        value = self._values[arithmetic(storage)]
        return value.instance(target, storage) if isinstance(value, Template) else value


def _number(float32: float, float64: float) -> Any:
    return Typed(np.float32(float32), np.float64(float64))


def _bits(value: float) -> Any:
    return Typed(np.float32(value).view(np.int32), np.float64(value).view(np.int64))


def _polynomial(name: str, *, float32: tuple[float, ...], float64: tuple[float, ...]) -> Any:
    """Horner's rule, spelt out: a loop over 20 numbers would not be unrolled."""

    def spelt(name: str, coefficients: tuple[float, ...]) -> Template:
        *rest, last = coefficients
        lines = [f"p = T({last!r})", *(f"p = p * z + T({c!r})" for c in reversed(rest)), "return p"]
        return text_template(f"def {name}(z):\n    " + "\n    ".join(lines), name)

    return Typed(spelt(f"{name}32", float32), spelt(f"{name}64", float64))


# -- the format -----------------------------------------------------------------------------------

INF = math.inf
NAN = math.nan

#: Bits of the fraction: the exponent is above them.
FRACTION = Typed(np.int32(23), np.int64(52))
BIAS = _number(127, 1023)
SIGN = _bits(-0.0)
EXPONENT = _bits(math.inf)
ONE = _bits(1.0)
TWO = _bits(2.0)

#: What is added to a number below 2**22 (2**51) to leave a whole number in the lowest bits.
ROUND = _number(1.5 * 2.0**23, 1.5 * 2.0**52)

#: ln 2 in two parts. The first ends in as many zeros as an exponent has digits, so that its product
#: with one is exact.
LN2_HIGH = _number(float.fromhex("0x1.62e4p-1"), float.fromhex("0x1.62e42fefa3800p-1"))
LN2_LOW = _number(float.fromhex("0x1.7f7d1cf79abcap-20"), float.fromhex("0x1.ef35793c76730p-45"))
LOG2_E = 1.4426950408889634


@device
def nearest(x):
    """The nearest whole number, for magnitudes below 2**22 (2**51)."""
    return (x + ROUND) - ROUND


@device
def power(n):
    """2 to the whole number `n`, from the smallest normal number to infinity."""
    return from_bits(I(to_bits(n + (ROUND + BIAS)) << FRACTION))


@device
def with_sign(magnitude, x):
    """`magnitude` with the sign of `x`."""
    return from_bits(I(to_bits(magnitude) | (to_bits(x) & SIGN)))


# -- exponentials ---------------------------------------------------------------------------------

#: (exp(r) - 1 - r) / r**2 for |r| <= ln(2) / 2. In exp(r) - 1 an error of 2**-26.1 (2**-54.7).
exp_series = _polynomial(
    "exp_series",
    float32=(
        0.4999999701976776, 0.1666654646396637, 0.04166743904352188, 0.008366256952285767,
        0.0013870331458747387,
    ),
    float64=(
        0.5000000000000006, 0.16666666666666588, 0.04166666666657661, 0.008333333333389648,
        0.0013888888931616044, 0.00019841269718847, 2.480150520821093e-05, 2.7557407627168995e-06,
        2.7626065369617643e-07, 2.5053770693459703e-08,
    ),
)  # fmt: skip

# Beyond these the results are infinity and 0, and -1.
EXP_HIGHEST = _number(89.0, 710.0)
EXP_LOWEST = _number(-104.0, -746.0)
EXPM1_LOWEST = _number(-18.0, -38.0)

#: Below it, expm1(x) is x to the last digit.
TINY = _number(2.0**-26, 2.0**-55)


@device
def split(x):
    """A whole `n`, `high` and `low`: x is n ln(2) + high - low, and |high - low| <= ln(2) / 2.

    `high` is exact.
    """
    n = nearest(x * T(LOG2_E))
    return n, x - n * LN2_HIGH, n * LN2_LOW


@device
def exp_parts(x):
    """A whole `n` and `p`: exp(x) is (1 + p) 2**n."""
    n, high, low = split(x)
    r = high - low
    return n, r + r * r * exp_series(r)


@device
def exp(x):
    """e to the power `x`."""
    z = where(x > EXP_HIGHEST, EXP_HIGHEST, x)
    n, p = exp_parts(where(z < EXP_LOWEST, EXP_LOWEST, z))
    # In two steps: 2**n alone may be subnormal or overflow where the product does not.
    half = nearest(n * T(0.5))
    return ((T(1) + p) * power(half)) * power(n - half)


@device
def expm1(x):
    """exp(x) - 1, without cancellation."""
    z = where(x > EXP_HIGHEST, EXP_HIGHEST, x)
    n, high, low = split(where(z < EXPM1_LOWEST, EXPM1_LOWEST, z))
    r = high - low
    # Half the result, for 2**n may overflow. High alone cancels 2**n - 1, and does it exactly.
    half = power(n - T(1))
    y = T(2) * (((half - T(0.5)) + half * high) + half * (r * r * exp_series(r) - low))
    return where(absolute(x) < TINY, x, y)


#: tanh(x) / x - 1 over z = x**2, divided by z, for |x| <= 0.6. In tanh an error of 2**-28.2
#: (2**-56.8).
tanh_near = _polynomial(
    "tanh_near",
    float32=(
        -0.33333298563957214, 0.13331936299800873, -0.05378435179591179, 0.020796282216906548,
        -0.005894261412322521,
    ),
    float64=(
        -0.33333333333333126, 0.1333333333329966, -0.0539682539492945, 0.021869488002538996,
        -0.008863226777182761, 0.0035920373773741907, -0.0014552153541604169,
        0.0005871883785144863, -0.0002303967576206453, 7.931388951750328e-05,
        -1.7178694515270077e-05,
    ),
)  # fmt: skip

#: From here on tanh is 1.
TANH_FAR = _number(10.0, 20.0)


@device
def tanh(x):
    """The hyperbolic tangent; its magnitude is never above 1."""
    t = absolute(x)
    t = where(t > TANH_FAR, TANH_FAR, t)
    z = t * t
    near = t + t * z * tanh_near(z)
    n, p = exp_parts(t + t)
    scale = power(n)
    far = T(1) - T(2) / ((scale + T(1)) + scale * p)
    return with_sign(where(t < T(0.6), near, far), x)


# -- logarithms -----------------------------------------------------------------------------------

#: (f - log(1 + f)) / f**2 for 1 + f within [1 / sqrt(2), sqrt(2)]. In log(1 + f) an error of
#: 2**-27.6 (2**-54.9).
log_series = _polynomial(
    "log_series",
    float32=(
        0.49999988079071045, -0.333333283662796, 0.25001591444015503, -0.20001646876335144,
        0.16608625650405884, -0.1418897658586502, 0.13254038989543915, -0.1286172866821289,
        0.07543548941612244,
    ),
    float64=(
        0.5000000000000003, -0.33333333333333026, 0.2499999999997492, -0.2000000000008519,
        0.16666666671355423, -0.14285714279622144, 0.12499999604510388, -0.1111111109886795,
        0.10000017938565277, -0.09090927447451427, 0.08332864086783774, -0.07691433086897889,
        0.07149937582459011, -0.06685934837874574, 0.061943640432399964, -0.056589710410221455,
        0.05678116804295989, -0.06529532037067265, 0.06006096008961852, -0.02617394881188431,
    ),
)  # fmt: skip

#: The smallest normal number, and a power of 2 that makes normal numbers of subnormal ones.
NORMAL = _number(2.0**-126, 2.0**-1022)
LIFT = _number(2.0**23, 2.0**52)
LIFTED = _number(23, 52)

#: Added to the bits of x, it carries into the exponent from sqrt(2) on, not from 2 on.
CARRY = Typed(
    np.float32(1).view(np.int32) - np.float32(0.5**0.5).view(np.int32),
    np.float64(1).view(np.int64) - np.float64(0.5**0.5).view(np.int64),
)


@device
def exponent_bits(x):
    """The biased exponent of `x` > 0, in its place, for a significand around 1."""
    return I((to_bits(x) + CARRY) & EXPONENT)


@device
def exponent(bits, bias):
    """The exponent as a number: put into the lowest bits of one, from where `ROUND` is taken."""
    return from_bits(I((bits >> FRACTION) | to_bits(ROUND))) - (ROUND + bias)


@device
def log_sum(k, f):
    """k ln(2) + log(1 + f)."""
    return k * LN2_HIGH + (f - (f * f * log_series(f) - k * LN2_LOW))


@device
def with_ends(y, x, pole):
    """`y`, the logarithm of x - pole, where `x` is above the pole and finite."""
    y = where(x < T(INF), y, x)
    return where(x > pole, y, where(x == pole, T(-INF), T(NAN)))


@device
def log(x):
    """The natural logarithm."""
    z = where(x > T(0), x, T(1))
    small = z < NORMAL
    z = z * where(small, LIFT, T(1))
    bits = exponent_bits(z)
    k = exponent(bits, where(small, BIAS + LIFTED, BIAS))
    f = from_bits(I(to_bits(z) - (bits - ONE))) - T(1)
    return with_ends(log_sum(k, f), x, T(0))


@device
def log1p(x):
    """log(1 + x), without cancellation."""
    z = where(x > T(-1), x, T(0))
    bits = exponent_bits(T(1) + z)
    k = exponent(bits, BIAS)
    # With 1 + x = 2**k (1 + f): f is 2**-k x + (2**-k - 1), and so free of the rounding of 1 + x.
    # 2**-k may be subnormal, its double is not.
    shift = bits - ONE
    f = from_bits(I(to_bits(z) - shift)) + (from_bits(I(TWO - shift)) * T(0.5) - T(1))
    # A sum with zero would lose the sign of -0.
    return where(x == T(0), x, with_ends(log_sum(k, f), x, T(-1)))


# -- the error function ---------------------------------------------------------------------------

#: erf(x) / x - 1 over z = x**2, for |x| <= 1. In erf an error of 2**-29.0 (2**-55.0).
erf_near = _polynomial(
    "erf_near",
    float32=(
        0.12837916612625122, -0.3761262595653534, 0.11283578723669052, -0.02685343660414219,
        0.005187504924833775, -0.0008002169197425246, 7.824893691577017e-05,
    ),
    float64=(
        0.12837916709551256, -0.3761263890318352, 0.11283791670944177, -0.02686617064311044,
        0.005223977606111695, -0.0008548325929040596, 0.00012055293569785643,
        -1.4924712180745697e-05, 1.6447130222734414e-06, -1.620630433585351e-07,
        1.3710942848944955e-08, -7.779403400764669e-10,
    ),
)  # fmt: skip

#: -log(1 - erf(t)) for 1 <= t <= 4 (6). In erf an error of 2**-25.9 (2**-56.5).
erf_far = _polynomial(
    "erf_far",
    float32=(
        0.002619177335873246, 1.1176211833953857, 0.6542402505874634, 0.08879955857992172,
        -0.01483178697526455, 0.0011572135845199227,
    ),
    float64=(
        5.028049660903215e-07, 1.1283740899158456, 0.6366436260869779, 0.10270344512397521,
        -0.018990189668482205, -0.00041061268776790397, 0.001915927208319192,
        -0.000770630058500517, 0.00013504201325282428, 2.027083170320622e-05,
        -2.2824142239877032e-05, 8.667669108448066e-06, -2.1357975843723054e-06,
        3.733244514957061e-07, -4.6425709789362356e-08, 3.934514410363474e-09,
        -2.0451046418401476e-10, 4.928990680032652e-12,
    ),
)  # fmt: skip

#: From here on erf is 1.
ERF_FAR = _number(4.0, 6.0)


@device
def erf(x):
    """The error function; its magnitude is never above 1."""
    t = absolute(x)
    t = where(t > ERF_FAR, ERF_FAR, t)
    near = t + t * erf_near(t * t)
    n, p = exp_parts(-erf_far(t))
    scale = power(n)
    far = (T(1) - scale) - scale * p
    return with_sign(where(t < T(1), near, far), x)
