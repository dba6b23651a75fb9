"""Arithmetic: sums, products, powers, roots, rounding and bounds, element by element."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.core.primitive import PASS, composite, differentiable, elementwise, sample
from gpugrad.ops import samples
from gpugrad.ops.samples import distinct, normal, uniform

__all__ = [
    "add", "subtract", "multiply", "divide", "floor_divide", "remainder", "pow",
    "negative", "positive", "abs", "sign", "sqrt", "square", "reciprocal", "hypot", "copysign",
    "minimum", "maximum", "clip", "floor", "ceil", "round", "trunc", "real", "imag", "conj",
]  # fmt: skip


def _pairs(first: Any, second: Any) -> Any:
    """Samples of a binary operation: equal shapes, broadcast pairs, and Python numbers."""
    return lambda: [
        sample(first((2, 3), 0), second((2, 3), 1)),
        sample(first((3, 1), 2), second((1, 4), 3), note="broadcast"),
        sample(first((), 4), second(3, 5), note="0-d operand"),
        sample(first(3, 6), 2.0, note="Python number"),
        sample(2.0, second(3, 7), note="Python number"),
    ]


def _apart(shape: Any, seed: int = 0) -> Any:
    """Numbers that tie with no Python number and no value of ``distinct``."""
    return distinct(shape, seed) + 0.07


# -- the four operations ---------------------------------------------------------------------------


@elementwise(
    partials=(PASS, PASS),
    native="add",
    samples=_pairs(normal, normal),
)
def add(m: Backend, a: Array, b: Array, /) -> Array:
    """The sum ``a + b``; its node passes the gradient on and keeps nothing.

    >>> import gpugrad as gg
    >>> gg.add(gg.tensor([1.0, 2.0]), 10.0)
    tensor([11., 12.])
    """


@elementwise(
    partials=(PASS, lambda g: -g),
    native="subtract",
    samples=_pairs(normal, normal),
)
def subtract(m: Backend, a: Array, b: Array, /) -> Array:
    """The difference ``a - b``.

    >>> import gpugrad as gg
    >>> gg.subtract(gg.tensor([1.0, 2.0]), 10.0)
    tensor([-9., -8.])
    """


@elementwise(
    partials=(lambda g, b: g * b, lambda g, a: g * a),
    native="multiply",
    samples=_pairs(normal, normal),
)
def multiply(m: Backend, a: Array, b: Array, /) -> Array:
    """The product ``a * b``; its node keeps the other operand of each that wants a gradient.

    >>> import gpugrad as gg
    >>> gg.multiply(gg.tensor([1.0, 2.0]), gg.tensor([3.0, 4.0]))
    tensor([3., 8.])
    """


@elementwise(
    partials=(lambda g, b: g / b, lambda g, b, y: -g * y / b),
    native="divide",
    samples=_pairs(normal, samples.positive),
)
def divide(m: Backend, a: Array, b: Array, /) -> Array:
    """The quotient ``a / b``.

    >>> import gpugrad as gg
    >>> gg.divide(1.0, gg.tensor([2.0, 4.0]))
    tensor([0.5 , 0.25])
    """


@elementwise(
    partials=(lambda g: -g,),
    native="negative",
    samples=lambda: [sample(normal((2, 3)))],
)
def negative(m: Backend, x: Array, /) -> Array:
    """``x`` with the opposite sign.

    >>> import gpugrad as gg
    >>> gg.negative(gg.tensor([1.0, -2.0]))
    tensor([-1.,  2.])
    """


@elementwise(
    partials=(PASS,),
    native="positive",
    samples=lambda: [sample(normal((2, 3)))],
)
def positive(m: Backend, x: Array, /) -> Array:
    """A copy of ``x``: what ``+x`` means for an array.

    >>> import gpugrad as gg
    >>> gg.positive(gg.tensor([1.0, -2.0]))
    tensor([ 1., -2.])
    """


# -- quotients with remainder ----------------------------------------------------------------------


@elementwise(
    partials=(lambda g, m: m.zeros_like(g), lambda g, m: m.zeros_like(g)),
    native="floor_divide",
    samples=_pairs(_apart, samples.positive),
)
def floor_divide(m: Backend, a: Array, b: Array, /) -> Array:
    """The quotient ``a / b`` rounded down. Its derivative is zero wherever it has one.

    >>> import gpugrad as gg
    >>> gg.floor_divide(gg.tensor([7.0, -7.0]), 2.0)
    tensor([ 3., -4.])
    """


@elementwise(
    partials=(PASS, lambda g, m, a, b: -g * m.floor_divide(a, b)),
    native="remainder",
    samples=_pairs(_apart, samples.positive),
)
def remainder(m: Backend, a: Array, b: Array, /) -> Array:
    """What is left of ``a`` after ``a // b`` times ``b``, with the sign of ``b``.

    >>> import gpugrad as gg
    >>> gg.remainder(gg.tensor([7.0, -7.0]), 4.0)
    tensor([3., 1.])
    """


# -- powers and roots ------------------------------------------------------------------------------


def _pow_base(g: Any, m: Any, a: Any, b: Any) -> Any:
    """``g * b * a**(b - 1)``, without the 0 * inf that a zero exponent makes of a zero base."""
    if isinstance(b, (int, float)):
        return g * (b * a ** (b - 1)) if b else m.zeros_like(g)
    # One less than b only after where has made it a float: unsigned zeros would wrap around.
    return g * b * a ** (m.where((a == 0) & (b == 0), 2.0, b) - 1)


def _pow_exponent(g: Any, m: Any, a: Any, y: Any) -> Any:
    """``g * y * log(a)``, which is 0 where the base is 0."""
    if isinstance(a, (int, float)):
        a = m.full_like(y, a)
    zero = a == 0
    return g * m.where(zero, 0.0, y) * m.log(m.where(zero, 1.0, a))


@elementwise(
    partials=(_pow_base, _pow_exponent),
    samples=lambda: [
        sample(samples.positive((2, 3), 0), normal((2, 3), 1)),
        sample(samples.positive((3, 1), 2), normal((1, 4), 3), note="broadcast"),
        sample(normal(4, 4), 2, note="square of any sign"),
        sample(normal(4, 5), 3.0, note="cube of any sign"),
        sample(normal(4, 6), 0, note="exponent zero"),
        sample(normal(4, 7), 1, note="exponent one"),
        sample(samples.positive(4, 8), -1.5, note="negative exponent"),
        sample(2.0, normal(3, 9), note="Python base"),
        sample(np.array([0.0, 0.0, 0.0]), np.array([0.0, 1.0, 2.0]), smooth=False, note="base 0"),
        sample(np.array([0.0, -1.0]), 2, smooth=False, note="square at zero and below"),
        sample(0.0, np.array([1.0, 2.0]), smooth=False, note="Python base zero"),
    ],
    reference=np.power,
)
def pow(m: Backend, a: Array, b: Array, /) -> Array:
    """``a`` to the power ``b``.

    The gradient of the base is finite at zero and below for a whole exponent of at least one, and
    zero for the exponent zero. The gradient of the exponent is zero where the base is zero, and
    NaN, as the logarithm, where it is negative.

    >>> import gpugrad as gg
    >>> x = gg.tensor([-3.0, 0.0], requires_grad=True)
    >>> gg.sum(gg.pow(x, 2)).backward()
    >>> x.grad
    tensor([-6.,  0.])
    """
    return a**b  # the operator takes the libraries' short cuts for whole exponents


@elementwise(
    partials=(lambda g, y: 0.5 * g / y,),
    native="sqrt",
    samples=lambda: [sample(samples.positive((2, 3)))],
)
def sqrt(m: Backend, x: Array, /) -> Array:
    """The square root of ``x``. Its derivative at zero is infinite.

    >>> import gpugrad as gg
    >>> gg.sqrt(gg.tensor([4.0, 9.0]))
    tensor([2., 3.])
    """


@elementwise(
    partials=(lambda g, x: g * (2.0 * x),),
    native="square",
    samples=lambda: [sample(normal((2, 3)))],
)
def square(m: Backend, x: Array, /) -> Array:
    """``x`` times ``x``.

    >>> import gpugrad as gg
    >>> gg.square(gg.tensor([2.0, -3.0]))
    tensor([4., 9.])
    """


@elementwise(
    partials=(lambda g, y: -g * y * y,),
    native="reciprocal",
    samples=lambda: [sample(samples.positive((2, 3)))],
)
def reciprocal(m: Backend, x: Array, /) -> Array:
    """One divided by ``x``.

    >>> import gpugrad as gg
    >>> gg.reciprocal(gg.tensor([2.0, -4.0]))
    tensor([ 0.5 , -0.25])
    """


def _share(g: Any, m: Any, part: Any, y: Any) -> Any:
    """``g * part / y``, and 0 where ``y`` is 0."""
    return g * (part / m.where(y == 0, 1.0, y))


@elementwise(
    partials=(lambda g, m, a, y: _share(g, m, a, y), lambda g, m, b, y: _share(g, m, b, y)),
    native="hypot",
    samples=_pairs(normal, normal),
)
def hypot(m: Backend, a: Array, b: Array, /) -> Array:
    """The length of the vector ``(a, b)``, without overflow on the way.

    At the origin, where there is no derivative, the gradient is zero.

    >>> import gpugrad as gg
    >>> gg.hypot(gg.tensor(3.0), gg.tensor(4.0))
    tensor(5.)
    """


# -- signs -----------------------------------------------------------------------------------------


@elementwise(
    partials=(lambda g, m, x: g * m.sign(x),),
    native="abs",
    samples=lambda: [
        sample(distinct((2, 3))),
        sample(np.array([-1.0, 0.0, 2.0]), smooth=False, note="kink"),
    ],
)
def abs(m: Backend, x: Array, /) -> Array:
    """The absolute value of ``x``. At zero the derivative is taken to be 0.

    >>> import gpugrad as gg
    >>> gg.abs(gg.tensor([-1.0, 2.0]))
    tensor([1., 2.])
    """


@elementwise(
    partials=(lambda g, m: m.zeros_like(g),),
    native="sign",
    samples=lambda: [
        sample(distinct((2, 3))),
        sample(np.array([-1.0, 0.0, 2.0]), smooth=False, note="step"),
    ],
)
def sign(m: Backend, x: Array, /) -> Array:
    """-1, 0 or 1, as ``x`` is negative, zero or positive. The gradient is zero.

    >>> import gpugrad as gg
    >>> gg.sign(gg.tensor([-3.0, 0.0, 2.0]))
    tensor([-1.,  0.,  1.])
    """


@elementwise(
    partials=(lambda g, m, a, y: g * (m.sign(a) * m.sign(y)), lambda g, m: m.zeros_like(g)),
    native="copysign",
    samples=_pairs(distinct, _apart),
)
def copysign(m: Backend, a: Array, b: Array, /) -> Array:
    """The magnitude of ``a`` with the sign of ``b``. Where ``a`` is zero, so is its gradient.

    >>> import gpugrad as gg
    >>> gg.copysign(gg.tensor([1.0, -2.0]), -1.0)
    tensor([-1., -2.])
    """


# -- bounds ----------------------------------------------------------------------------------------


def _winner(g: Any, m: Any, tie: Any, lost: Any) -> Any:
    """The gradient of an operand: none where it lost, and half where both are equal.

    Written so that a NaN, which neither ties nor loses, keeps its gradient and is seen above.
    """
    return m.where(tie, 0.5 * g, m.where(lost, 0.0, g))


def _extremum_samples() -> Any:
    return [
        *_pairs(distinct, _apart)(),
        sample(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0]), smooth=False, note="a tie"),
    ]


@elementwise(
    partials=(
        lambda g, m, a, b: _winner(g, m, a == b, a > b),
        lambda g, m, a, b: _winner(g, m, a == b, a < b),
    ),
    native="minimum",
    samples=_extremum_samples,
)
def minimum(m: Backend, a: Array, b: Array, /) -> Array:
    """The smaller of ``a`` and ``b``. The gradient goes to it; equal operands get half each.

    >>> import gpugrad as gg
    >>> gg.minimum(gg.tensor([1.0, 5.0]), 3.0)
    tensor([1., 3.])
    """


@elementwise(
    partials=(
        lambda g, m, a, b: _winner(g, m, a == b, a < b),
        lambda g, m, a, b: _winner(g, m, a == b, a > b),
    ),
    native="maximum",
    samples=_extremum_samples,
)
def maximum(m: Backend, a: Array, b: Array, /) -> Array:
    """The larger of ``a`` and ``b``. The gradient goes to it; equal operands get half each.

    >>> import gpugrad as gg
    >>> gg.maximum(gg.tensor([1.0, 5.0]), 3.0)
    tensor([3., 5.])
    """


def _inside(g: Any, m: Any, x: Any, min: Any, max: Any) -> Any:
    """The gradient of what is clipped: passed on within the bounds and on them."""
    if min is not None:
        g = m.where(x >= min, g, 0.0)
    if max is not None:
        g = m.where(x <= max, g, 0.0)
    return g


def _at_min(g: Any, m: Any, x: Any, min: Any, max: Any) -> Any:
    g = m.where(x < min, g, 0.0)
    return g if max is None else m.where(min < max, g, 0.0)


def _at_max(g: Any, m: Any, x: Any, min: Any, max: Any) -> Any:
    beyond = x > max
    return m.where(beyond if min is None else beyond | (min > max), g, 0.0)


def _clip_samples() -> Any:
    return [
        sample(distinct((2, 3)), -0.5, 0.5),
        sample(distinct(4), None, 0.5, note="upper bound only"),
        sample(distinct(4), -0.5, None, note="lower bound only"),
        sample(distinct(4), distinct(4, 1) - 1.2, distinct(4, 2) + 1.3, note="array bounds"),
        sample(distinct((3, 1)), distinct((1, 4), 3) - 1.2, 0.7, note="broadcast"),
        sample(np.array([-1.0, 0.0, 1.0]), -1.0, 1.0, smooth=False, note="on the bounds"),
    ]


@elementwise(
    partials=(_inside, _at_min, _at_max),
    samples=_clip_samples,
    reference=np.clip,
)
def clamp(m: Backend, x: Array, min: Array, max: Array, /) -> Array:
    """``x`` held between ``min`` and ``max``, all three operands: the primitive behind ``clip``.

    >>> import gpugrad as gg
    >>> gg.clip(gg.tensor([-2.0, 0.5]), -1.0, 1.0)
    tensor([-1. ,  0.5])
    """
    return m.clip(x, min, max)


@composite(
    samples=lambda: [*_clip_samples(), sample(distinct(3), smooth=True, note="no bounds")],
    reference=lambda x, min=None, max=None: (
        x if min is None and max is None else np.clip(x, min, max)
    ),
)
def clip(x: Any, /, min: Any = None, max: Any = None) -> Any:
    """``x`` held between ``min`` and ``max``.

    A bound is None, a number or an array that broadcasts with ``x``. The gradient of ``x`` passes
    within the bounds and on them. An array bound gets the gradient where it took the place of
    ``x``. Where ``min`` exceeds ``max``, the result is ``max``. All this is as in PyTorch.

    >>> import gpugrad as gg
    >>> gg.clip(gg.tensor([-2.0, 0.5, 3.0]), -1.0, 1.0)
    tensor([-1. ,  0.5,  1. ])
    """
    if min is None and max is None:
        return differentiable.positive(x)
    return differentiable.clamp(x, min, max)


# -- rounding --------------------------------------------------------------------------------------


def _steps() -> Any:
    return [
        sample(uniform(6, -0.45, 0.45) + np.arange(-3.0, 3.0)),
        sample(np.array([-1.5, -0.5, 0.5, 2.0]), smooth=False, note="steps"),
    ]


def _broken_steps() -> Any:
    return [
        sample(uniform(6, 0.05, 0.95) + np.arange(-3.0, 3.0)),
        sample(np.array([-1.5, -0.5, 0.5, 2.0]), smooth=False, note="steps"),
    ]


@elementwise(
    partials=(lambda g, m: m.zeros_like(g),),
    native="floor",
    samples=_broken_steps,
)
def floor(m: Backend, x: Array, /) -> Array:
    """The largest whole number not above ``x``. The gradient is zero.

    >>> import gpugrad as gg
    >>> gg.floor(gg.tensor([1.7, -1.2]))
    tensor([ 1., -2.])
    """


@elementwise(
    partials=(lambda g, m: m.zeros_like(g),),
    native="ceil",
    samples=_broken_steps,
)
def ceil(m: Backend, x: Array, /) -> Array:
    """The smallest whole number not below ``x``. The gradient is zero.

    >>> import gpugrad as gg
    >>> gg.ceil(gg.tensor([1.2, -1.7]))
    tensor([ 2., -1.])
    """


@elementwise(
    partials=(lambda g, m: m.zeros_like(g),),
    native="round",
    samples=_steps,
)
def round(m: Backend, x: Array, /) -> Array:
    """The whole number nearest to ``x``, the even one of two. The gradient is zero.

    >>> import gpugrad as gg
    >>> gg.round(gg.tensor([0.5, 1.5, -1.7]))
    tensor([ 0.,  2., -2.])
    """


@elementwise(
    partials=(lambda g, m: m.zeros_like(g),),
    native="trunc",
    samples=_broken_steps,
)
def trunc(m: Backend, x: Array, /) -> Array:
    """``x`` without its fractional part. The gradient is zero.

    >>> import gpugrad as gg
    >>> gg.trunc(gg.tensor([1.7, -1.7]))
    tensor([ 1., -1.])
    """


# -- complex numbers, which are computed with but not differentiated -------------------------------


def _complex_samples() -> Any:
    return [
        sample(normal((2, 3))),
        sample(normal((2, 3), 1) + 1j * normal((2, 3), 2), smooth=False, note="complex"),
    ]


def _is_complex(m: Backend, x: Array) -> bool:
    return m.numpy_dtype(x).kind == "c"


@elementwise(partials=(PASS,), samples=_complex_samples, reference=np.real)
def real(m: Backend, x: Array, /) -> Array:
    """The real part of ``x``; real numbers pass as they are, and so does their gradient.

    >>> import gpugrad as gg
    >>> gg.real(gg.tensor([1.0 + 2.0j, 3.0]))
    tensor([1., 3.])
    """
    return m.positive(m.real(x) if _is_complex(m, x) else x)


@elementwise(partials=(lambda g, m: m.zeros_like(g),), samples=_complex_samples, reference=np.imag)
def imag(m: Backend, x: Array, /) -> Array:
    """The imaginary part of ``x``, zero for real numbers.

    >>> import gpugrad as gg
    >>> gg.imag(gg.tensor([1.0 + 2.0j, 3.0]))
    tensor([2., 0.])
    """
    return m.positive(m.imag(x)) if _is_complex(m, x) else m.zeros_like(x)


@elementwise(partials=(PASS,), samples=_complex_samples, reference=np.conj)
def conj(m: Backend, x: Array, /) -> Array:
    """The complex conjugate of ``x``; real numbers pass as they are, and so does their gradient.

    >>> import gpugrad as gg
    >>> gg.conj(gg.tensor([1.0 + 2.0j]))
    tensor([1.-2.j], dtype=complex128)
    """
    return m.conj(x) if _is_complex(m, x) else m.positive(x)
