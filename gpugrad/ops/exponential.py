"""Exponentials, logarithms and the error function, element by element."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.core.primitive import elementwise, sample
from gpugrad.ops import formulas
from gpugrad.ops.samples import normal, positive

__all__ = ["exp", "expm1", "log", "log1p", "log2", "log10", "logaddexp", "erf"]


@elementwise(
    partials=(lambda g, y: g * y,),
    native="exp",
    samples=lambda: [sample(normal((2, 3)))],
)
def exp(m: Backend, x: Array, /) -> Array:
    """e to the power ``x``; its derivative is the result itself.

    >>> import gpugrad as gg
    >>> gg.exp(gg.tensor([0.0, 1.0]))
    tensor([1.        , 2.71828183])
    """


@elementwise(
    partials=(lambda g, y: g * (y + 1.0),),
    native="expm1",
    samples=lambda: [sample(normal((2, 3))), sample(normal(4) * 1e-9, note="tiny")],
)
def expm1(m: Backend, x: Array, /) -> Array:
    """``exp(x) - 1``, exact to the last digits for small ``x`` too.

    >>> import gpugrad as gg
    >>> gg.expm1(gg.tensor(1e-12)).item()
    1.0000000000005e-12
    """


@elementwise(
    partials=(lambda g, x: g / x,),
    native="log",
    samples=lambda: [sample(positive((2, 3)))],
)
def log(m: Backend, x: Array, /) -> Array:
    """The natural logarithm of ``x``.

    >>> import gpugrad as gg
    >>> gg.log(gg.tensor([1.0, 10.0]))
    tensor([0.        , 2.30258509])
    """


@elementwise(
    partials=(lambda g, x: g / (1.0 + x),),
    native="log1p",
    samples=lambda: [sample(positive((2, 3)) - 1.2), sample(normal(4) * 1e-9, note="tiny")],
)
def log1p(m: Backend, x: Array, /) -> Array:
    """``log(1 + x)``, exact to the last digits for small ``x`` too.

    >>> import gpugrad as gg
    >>> gg.log1p(gg.tensor(1e-12)).item()
    9.999999999995e-13
    """


@elementwise(
    partials=(lambda g, x: g / (x * math.log(2.0)),),
    native="log2",
    samples=lambda: [sample(positive((2, 3)))],
)
def log2(m: Backend, x: Array, /) -> Array:
    """The logarithm of ``x`` to the base 2.

    >>> import gpugrad as gg
    >>> gg.log2(gg.tensor([1.0, 8.0]))
    tensor([0., 3.])
    """


@elementwise(
    partials=(lambda g, x: g / (x * math.log(10.0)),),
    native="log10",
    samples=lambda: [sample(positive((2, 3)))],
)
def log10(m: Backend, x: Array, /) -> Array:
    """The logarithm of ``x`` to the base 10.

    >>> import gpugrad as gg
    >>> gg.log10(gg.tensor([1.0, 1000.0]))
    tensor([0., 3.])
    """


def _weight(g: Any, m: Any, part: Any, y: Any) -> Any:
    """``g * exp(part - y)``, and 0 where both terms were exp(-inf)."""
    return g * m.exp(part - m.where(y == -math.inf, 0.0, y))


@elementwise(
    partials=(lambda g, m, a, y: _weight(g, m, a, y), lambda g, m, b, y: _weight(g, m, b, y)),
    native="logaddexp",
    samples=lambda: [
        sample(normal((2, 3)), normal((2, 3), 1)),
        sample(normal((3, 1), 2), normal((1, 4), 3), note="broadcast"),
        sample(normal(3, 4), 2.0, note="Python number"),
        sample(normal(3) + 800.0, normal(3, 5) + 800.0, note="no overflow"),
        sample(
            np.array([-math.inf, -math.inf]), np.array([1.0, -math.inf]), smooth=False,
            note="masked terms",
        ),
    ],
)  # fmt: skip
def logaddexp(m: Backend, a: Array, b: Array, /) -> Array:
    """``log(exp(a) + exp(b))`` without overflow on the way.

    >>> import gpugrad as gg
    >>> gg.logaddexp(gg.tensor(1000.0), gg.tensor(1000.0))
    tensor(1000.69314718)
    """


@elementwise(
    partials=(fusible(formulas.erf_partial),),
    native="erf",
    samples=lambda: [
        sample(normal((2, 3))),
        sample(3.0 * normal(5, 1), note="tails"),
        sample(normal(4) * 1e-9, note="tiny"),
    ],
    reference=np.vectorize(math.erf, otypes=[np.float64]),
)
def erf(m: Backend, x: Array, /) -> Array:
    """The error function: twice the integral of ``exp(-t**2)`` from 0 to ``x``, over sqrt(pi).

    >>> import gpugrad as gg
    >>> gg.erf(gg.tensor([0.0, 1.0]))
    tensor([0.        , 0.84270079])
    """
