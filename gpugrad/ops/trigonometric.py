"""Trigonometric and hyperbolic functions and their inverses, element by element."""

from __future__ import annotations

from typing import Any

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.core.primitive import elementwise, sample
from gpugrad.ops import formulas
from gpugrad.ops.samples import normal, uniform

__all__ = [
    "sin", "cos", "tan", "asin", "acos", "atan", "atan2",
    "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
]  # fmt: skip


@elementwise(
    partials=(lambda g, m, x: g * m.cos(x),),
    native="sin",
    samples=lambda: [sample(normal((2, 3)))],
)
def sin(m: Backend, x: Array, /) -> Array:
    """The sine of ``x``, an angle in radians.

    >>> import gpugrad as gg
    >>> gg.sin(gg.tensor([0.0, 1.0]))
    tensor([0.        , 0.84147098])
    """


@elementwise(
    partials=(lambda g, m, x: -g * m.sin(x),),
    native="cos",
    samples=lambda: [sample(normal((2, 3)))],
)
def cos(m: Backend, x: Array, /) -> Array:
    """The cosine of ``x``, an angle in radians.

    >>> import gpugrad as gg
    >>> gg.cos(gg.tensor([0.0, 1.0]))
    tensor([1.        , 0.54030231])
    """


@elementwise(
    partials=(lambda g, y: g * (1.0 + y * y),),
    native="tan",
    samples=lambda: [sample(uniform((2, 3), -1.2, 1.2))],
)
def tan(m: Backend, x: Array, /) -> Array:
    """The tangent of ``x``, an angle in radians.

    >>> import gpugrad as gg
    >>> gg.tan(gg.tensor([0.0, 1.0]))
    tensor([0.        , 1.55740772])
    """


@elementwise(
    partials=(lambda g, m, x: g / m.sqrt((1.0 - x) * (1.0 + x)),),
    native="asin",
    samples=lambda: [sample(uniform((2, 3), -0.9, 0.9))],
)
def asin(m: Backend, x: Array, /) -> Array:
    """The angle between -pi/2 and pi/2 whose sine is ``x``.

    >>> import gpugrad as gg
    >>> gg.asin(gg.tensor([0.0, 1.0]))
    tensor([0.        , 1.57079633])
    """


@elementwise(
    partials=(lambda g, m, x: -g / m.sqrt((1.0 - x) * (1.0 + x)),),
    native="acos",
    samples=lambda: [sample(uniform((2, 3), -0.9, 0.9))],
)
def acos(m: Backend, x: Array, /) -> Array:
    """The angle between 0 and pi whose cosine is ``x``.

    >>> import gpugrad as gg
    >>> gg.acos(gg.tensor([0.0, 1.0]))
    tensor([1.57079633, 0.        ])
    """


def _inverse_of_square_plus_one(m: Any, x: Any) -> Any:
    """``1 / (1 + x*x)``; by way of the root, because ``x*x`` may overflow."""
    r = m.hypot(x, 1.0)
    return 1.0 / r / r


@elementwise(
    partials=(lambda g, m, x: g * _inverse_of_square_plus_one(m, x),),
    native="atan",
    samples=lambda: [sample(normal((2, 3)))],
)
def atan(m: Backend, x: Array, /) -> Array:
    """The angle between -pi/2 and pi/2 whose tangent is ``x``.

    >>> import gpugrad as gg
    >>> gg.atan(gg.tensor([0.0, 1.0]))
    tensor([0.        , 0.78539816])
    """


def _turn(g: Any, m: Any, other: Any, a: Any, b: Any) -> Any:
    """``g * other / (a*a + b*b)``, which is 0 at the origin."""
    r = m.hypot(a, b)
    r = m.where(r == 0, 1.0, r)
    return g * (other / r / r)


@elementwise(
    partials=(
        lambda g, m, a, b: _turn(g, m, b, a, b),
        lambda g, m, a, b: -_turn(g, m, a, a, b),
    ),
    native="atan2",
    samples=lambda: [
        sample(normal((2, 3)), normal((2, 3), 1)),
        sample(normal((3, 1), 2), normal((1, 4), 3), note="broadcast"),
        sample(normal(3, 4), 2.0, note="Python number"),
        sample(2.0, normal(3, 5), note="Python number"),
    ],
)
def atan2(m: Backend, a: Array, b: Array, /) -> Array:
    """The angle from the first axis to the point with ordinate ``a`` and abscissa ``b``.

    At the origin, where there is no derivative, the gradient is zero.

    >>> import gpugrad as gg
    >>> gg.atan2(gg.tensor(1.0), gg.tensor(-1.0))
    tensor(2.35619449)
    """


@elementwise(
    partials=(lambda g, m, x: g * m.cosh(x),),
    native="sinh",
    samples=lambda: [sample(normal((2, 3)))],
)
def sinh(m: Backend, x: Array, /) -> Array:
    """The hyperbolic sine of ``x``.

    >>> import gpugrad as gg
    >>> gg.sinh(gg.tensor([0.0, 1.0]))
    tensor([0.        , 1.17520119])
    """


@elementwise(
    partials=(lambda g, m, x: g * m.sinh(x),),
    native="cosh",
    samples=lambda: [sample(normal((2, 3)))],
)
def cosh(m: Backend, x: Array, /) -> Array:
    """The hyperbolic cosine of ``x``.

    >>> import gpugrad as gg
    >>> gg.cosh(gg.tensor([0.0, 1.0]))
    tensor([1.        , 1.54308063])
    """


@elementwise(
    partials=(fusible(formulas.tanh_partial),),
    native="tanh",
    samples=lambda: [sample(normal((2, 3)))],
)
def tanh(m: Backend, x: Array, /) -> Array:
    """The hyperbolic tangent of ``x``; its node keeps the result only.

    >>> import gpugrad as gg
    >>> gg.tanh(gg.tensor([0.0, 1.0]))
    tensor([0.        , 0.76159416])
    """


@elementwise(
    partials=(lambda g, m, x: g / m.hypot(x, 1.0),),
    native="asinh",
    samples=lambda: [sample(normal((2, 3)))],
)
def asinh(m: Backend, x: Array, /) -> Array:
    """The number whose hyperbolic sine is ``x``.

    >>> import gpugrad as gg
    >>> gg.asinh(gg.tensor([0.0, 1.0]))
    tensor([0.        , 0.88137359])
    """


@elementwise(
    partials=(lambda g, m, x: g / (m.sqrt(x - 1.0) * m.sqrt(x + 1.0)),),
    native="acosh",
    samples=lambda: [sample(uniform((2, 3), 1.2, 4.0))],
)
def acosh(m: Backend, x: Array, /) -> Array:
    """The number of at least 0 whose hyperbolic cosine is ``x``.

    >>> import gpugrad as gg
    >>> gg.acosh(gg.tensor([1.0, 2.0]))
    tensor([0.       , 1.3169579])
    """


@elementwise(
    partials=(lambda g, x: g / ((1.0 - x) * (1.0 + x)),),
    native="atanh",
    samples=lambda: [sample(uniform((2, 3), -0.9, 0.9))],
)
def atanh(m: Backend, x: Array, /) -> Array:
    """The number whose hyperbolic tangent is ``x``.

    >>> import gpugrad as gg
    >>> gg.atanh(gg.tensor([0.0, 0.5]))
    tensor([0.        , 0.54930614])
    """
