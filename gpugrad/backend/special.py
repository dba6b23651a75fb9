"""Special functions that the Array API standard lacks, made of those that it has."""

from __future__ import annotations

from typing import Any

# W. J. Cody, "Rational Chebyshev approximations for the error function", Mathematics of Computation
# 23 (1969), 631-637: numerators and denominators, highest power first. Below SPLIT, erf(x) is x
# times a quotient in x*x; above, 1 - erf(x) is exp(-x*x) times a quotient in x. Cody has a third
# interval, from 4 on, for the tail's relative error: next to 1 it is below the last digit.
SPLIT = 0.46875
_NEAR = (
    (1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2,
     3.77485237685302021e2, 3.20937758913846947e3),
    (1.0, 2.36012909523441209e1, 2.44024637934444173e2,
     1.28261652607737228e3, 2.84423683343917062e3),
)  # fmt: skip
_FAR = (
    (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0,
     6.61191906371416295e1, 2.98635138197400131e2, 8.81952221241769090e2,
     1.71204761263407058e3, 2.05107837782607147e3, 1.23033935479799725e3),
    (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2,
     1.62138957456669019e3, 3.29079923573345963e3, 4.36261909014324716e3,
     3.43936767414372164e3, 1.23033935480374942e3),
)  # fmt: skip

#: From here on erf is 1 in float64.
_SATURATED = 6.0


def _quotient(coefficients: tuple[tuple[float, ...], tuple[float, ...]], z: Any) -> Any:
    """The rational function at ``z``, numerator and denominator by Horner's rule."""
    values = []
    for first, second, *rest in coefficients:
        value = first * z
        value += second
        for c in rest:  # in place where the library can: a third of the memory traffic
            value *= z
            value += c
        values.append(value)
    return values[0] / values[1]


def erf(m: Any, x: Any) -> Any:
    """The error function of ``x``, float32 or float64, to about two units in the last place."""
    t = m.minimum(m.abs(x), _SATURATED)
    near = t < SPLIT
    s = m.where(near, x, 0.0)
    inner = s * _quotient(_NEAR, s * s)
    outer = 1.0 - m.exp(-t * t) * _quotient(_FAR, t)
    return m.where(near, inner, m.where(x < 0, -outer, outer))
