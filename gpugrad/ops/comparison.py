"""Comparisons, logic, bits and the choice between two values."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.core.primitive import elementwise, sample
from gpugrad.ops.samples import normal

__all__ = [
    "equal", "not_equal", "less", "less_equal", "greater", "greater_equal",
    "logical_and", "logical_or", "logical_xor", "logical_not",
    "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_invert",
    "bitwise_left_shift", "bitwise_right_shift",
    "isfinite", "isinf", "isnan", "signbit", "nextafter", "where",
]  # fmt: skip


def _numbers() -> Any:
    a = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, np.inf]])
    return [
        sample(a, np.array([[1.0, 2.0, -0.5], [0.0, 3.5, np.inf]]), smooth=False),
        sample(a[:, :1], a[:1], smooth=False, note="broadcast"),
        sample(a, 0.5, smooth=False, note="Python number"),
        sample(np.array([np.nan, 1.0]), np.array([np.nan, 1.0]), smooth=False, note="NaN"),
    ]


def _truths() -> Any:
    a = np.array([True, True, False, False])
    b = np.array([True, False, True, False])
    return [sample(a, b, smooth=False), sample(a[:, None], b, smooth=False, note="broadcast")]


def _bits() -> Any:
    a = np.array([[0, 1, 5], [-1, 12, 7]])
    return [
        sample(a, np.array([[1, 3, 6], [2, 10, 0]]), smooth=False),
        sample(a, 3, smooth=False, note="Python number"),
    ]


def _special() -> Any:
    return [sample(np.array([1.0, -0.0, np.inf, -np.inf, np.nan]), smooth=False)]


# -- comparisons -----------------------------------------------------------------------------------


@elementwise(partials=None, native="equal", samples=_numbers)
def equal(m: Backend, a: Array, b: Array, /) -> Array:
    """Where ``a`` equals ``b``.

    >>> import gpugrad as gg
    >>> gg.equal(gg.tensor([1.0, 2.0]), 2.0)
    tensor([False,  True])
    """


@elementwise(partials=None, native="not_equal", samples=_numbers)
def not_equal(m: Backend, a: Array, b: Array, /) -> Array:
    """Where ``a`` differs from ``b``.

    >>> import gpugrad as gg
    >>> gg.not_equal(gg.tensor([1.0, 2.0]), 2.0)
    tensor([ True, False])
    """


@elementwise(partials=None, native="less", samples=_numbers)
def less(m: Backend, a: Array, b: Array, /) -> Array:
    """Where ``a`` is less than ``b``.

    >>> import gpugrad as gg
    >>> gg.less(gg.tensor([1.0, 2.0]), 2.0)
    tensor([ True, False])
    """


@elementwise(partials=None, native="less_equal", samples=_numbers)
def less_equal(m: Backend, a: Array, b: Array, /) -> Array:
    """Where ``a`` is less than ``b`` or equal to it.

    >>> import gpugrad as gg
    >>> gg.less_equal(gg.tensor([1.0, 3.0]), 2.0)
    tensor([ True, False])
    """


@elementwise(partials=None, native="greater", samples=_numbers)
def greater(m: Backend, a: Array, b: Array, /) -> Array:
    """Where ``a`` is greater than ``b``.

    >>> import gpugrad as gg
    >>> gg.greater(gg.tensor([1.0, 3.0]), 2.0)
    tensor([False,  True])
    """


@elementwise(partials=None, native="greater_equal", samples=_numbers)
def greater_equal(m: Backend, a: Array, b: Array, /) -> Array:
    """Where ``a`` is greater than ``b`` or equal to it.

    >>> import gpugrad as gg
    >>> gg.greater_equal(gg.tensor([1.0, 2.0]), 2.0)
    tensor([False,  True])
    """


# -- logic -----------------------------------------------------------------------------------------


@elementwise(partials=None, native="logical_and", samples=_truths)
def logical_and(m: Backend, a: Array, b: Array, /) -> Array:
    """Where both ``a`` and ``b`` are true.

    >>> import gpugrad as gg
    >>> gg.logical_and(gg.tensor([True, True]), gg.tensor([True, False]))
    tensor([ True, False])
    """


@elementwise(partials=None, native="logical_or", samples=_truths)
def logical_or(m: Backend, a: Array, b: Array, /) -> Array:
    """Where ``a`` or ``b`` or both are true.

    >>> import gpugrad as gg
    >>> gg.logical_or(gg.tensor([True, False]), gg.tensor([False, False]))
    tensor([ True, False])
    """


@elementwise(partials=None, native="logical_xor", samples=_truths)
def logical_xor(m: Backend, a: Array, b: Array, /) -> Array:
    """Where exactly one of ``a`` and ``b`` is true.

    >>> import gpugrad as gg
    >>> gg.logical_xor(gg.tensor([True, True]), gg.tensor([True, False]))
    tensor([False,  True])
    """


@elementwise(
    partials=None,
    native="logical_not",
    samples=lambda: [sample(np.array([True, False]), smooth=False)],
)
def logical_not(m: Backend, x: Array, /) -> Array:
    """Where ``x`` is false.

    >>> import gpugrad as gg
    >>> gg.logical_not(gg.tensor([True, False]))
    tensor([False,  True])
    """


# -- bits ------------------------------------------------------------------------------------------


@elementwise(partials=None, native="bitwise_and", samples=lambda: [*_bits(), *_truths()])
def bitwise_and(m: Backend, a: Array, b: Array, /) -> Array:
    """The bits set in both ``a`` and ``b``, integers or booleans.

    >>> import gpugrad as gg
    >>> gg.bitwise_and(gg.tensor([6, 5]), 3)
    tensor([2, 1])
    """


@elementwise(partials=None, native="bitwise_or", samples=lambda: [*_bits(), *_truths()])
def bitwise_or(m: Backend, a: Array, b: Array, /) -> Array:
    """The bits set in ``a`` or ``b`` or both, integers or booleans.

    >>> import gpugrad as gg
    >>> gg.bitwise_or(gg.tensor([6, 5]), 3)
    tensor([7, 7])
    """


@elementwise(partials=None, native="bitwise_xor", samples=lambda: [*_bits(), *_truths()])
def bitwise_xor(m: Backend, a: Array, b: Array, /) -> Array:
    """The bits set in exactly one of ``a`` and ``b``, integers or booleans.

    >>> import gpugrad as gg
    >>> gg.bitwise_xor(gg.tensor([6, 5]), 3)
    tensor([5, 6])
    """


@elementwise(
    partials=None,
    native="bitwise_invert",
    samples=lambda: [
        sample(np.array([0, 5, -3]), smooth=False),
        sample(np.array([True, False]), smooth=False),
    ],
)
def bitwise_invert(m: Backend, x: Array, /) -> Array:
    """Every bit of ``x``, integers or booleans, turned over.

    >>> import gpugrad as gg
    >>> gg.bitwise_invert(gg.tensor([0, 5]))
    tensor([-1, -6])
    """


@elementwise(
    partials=None,
    native="bitwise_left_shift",
    samples=lambda: [sample(np.array([1, 5, -3]), np.array([0, 2, 3]), smooth=False)],
)
def bitwise_left_shift(m: Backend, a: Array, b: Array, /) -> Array:
    """The bits of ``a`` moved ``b`` places up.

    >>> import gpugrad as gg
    >>> gg.bitwise_left_shift(gg.tensor([1, 5]), 2)
    tensor([ 4, 20])
    """


@elementwise(
    partials=None,
    native="bitwise_right_shift",
    samples=lambda: [sample(np.array([1, 20, -3]), np.array([0, 2, 1]), smooth=False)],
)
def bitwise_right_shift(m: Backend, a: Array, b: Array, /) -> Array:
    """The bits of ``a`` moved ``b`` places down; the sign stays.

    >>> import gpugrad as gg
    >>> gg.bitwise_right_shift(gg.tensor([4, 20]), 2)
    tensor([1, 5])
    """


# -- what kind of number ---------------------------------------------------------------------------


@elementwise(partials=None, native="isfinite", samples=_special)
def isfinite(m: Backend, x: Array, /) -> Array:
    """Where ``x`` is neither infinite nor NaN.

    >>> import gpugrad as gg
    >>> gg.isfinite(gg.tensor([1.0, float("inf"), float("nan")]))
    tensor([ True, False, False])
    """


@elementwise(partials=None, native="isinf", samples=_special)
def isinf(m: Backend, x: Array, /) -> Array:
    """Where ``x`` is infinite.

    >>> import gpugrad as gg
    >>> gg.isinf(gg.tensor([1.0, float("inf"), float("nan")]))
    tensor([False,  True, False])
    """


@elementwise(partials=None, native="isnan", samples=_special)
def isnan(m: Backend, x: Array, /) -> Array:
    """Where ``x`` is NaN, not a number.

    >>> import gpugrad as gg
    >>> gg.isnan(gg.tensor([1.0, float("inf"), float("nan")]))
    tensor([False, False,  True])
    """


@elementwise(partials=None, native="signbit", samples=_special)
def signbit(m: Backend, x: Array, /) -> Array:
    """Where ``x`` carries a minus sign, -0.0 included.

    >>> import gpugrad as gg
    >>> gg.signbit(gg.tensor([1.0, -0.0]))
    tensor([False,  True])
    """


@elementwise(partials=None, native="nextafter", samples=_numbers)
def nextafter(m: Backend, a: Array, b: Array, /) -> Array:
    """The floating-point number next to ``a`` on the way to ``b``. It has no derivative.

    >>> import gpugrad as gg
    >>> gg.nextafter(gg.tensor(1.0), 2.0).item()
    1.0000000000000002
    """


# -- choice ----------------------------------------------------------------------------------------


@elementwise(
    partials=(
        None,
        lambda g, m, condition: m.where(condition, g, 0.0),
        lambda g, m, condition: m.where(condition, 0.0, g),
    ),
    native="where",
    samples=lambda: [
        sample(normal((2, 3)) > 0, normal((2, 3), 1), normal((2, 3), 2)),
        sample(normal((3, 1)) > 0, normal((1, 4), 1), normal((), 2), note="broadcast"),
        sample(normal(4) > 0, normal(4, 1), 0.0, note="Python number"),
        sample(normal(4) > 0, 1.0, normal(4, 2), note="Python number"),
    ],
)
def where(m: Backend, condition: Array, a: Array, b: Array, /) -> Array:
    """``a`` where ``condition`` holds and ``b`` elsewhere; the gradient takes the same way.

    >>> import gpugrad as gg
    >>> x = gg.tensor([-1.0, 2.0])
    >>> gg.where(x > 0, x, 0.0)
    tensor([0., 2.])
    """
