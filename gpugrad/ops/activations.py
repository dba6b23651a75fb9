"""Activation functions, under PyTorch's names and with its defaults."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import composite, differentiable, elementwise, primitive, sample
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.ops import formulas
from gpugrad.ops.samples import distinct, normal

__all__ = [
    "relu", "relu6", "relu_squared", "leaky_relu", "threshold", "hardtanh", "hardsigmoid",
    "hardswish", "elu", "selu", "celu", "sigmoid", "logsigmoid", "softplus", "silu", "mish", "gelu",
    "softsign", "tanhshrink", "softshrink", "hardshrink", "swiglu", "geglu", "glu",
    "softmax", "log_softmax",
]  # fmt: skip


def _smooth() -> Any:
    return [
        sample(normal((2, 3))),
        sample(np.array([-1000.0, 0.0, 1000.0]), smooth=False, note="far out, no overflow"),
    ]


def _bent(*kinks: float) -> Any:
    """Samples of a function with kinks: off them, and on them."""

    def make() -> Any:
        return [
            sample(distinct((3, 4)) * 1.3),
            sample(np.array([-1000.0, *kinks, 1000.0]), smooth=False, note="kinks"),
        ]

    return make


# -- straight lines --------------------------------------------------------------------------------


@elementwise(
    partials=(fusible(formulas.relu_partial),),
    samples=_bent(0.0),
    reference=lambda x: np.where(x > 0, x, 0.0),
)
def relu(m: Backend, x: Array, /) -> Array:
    """``x`` where it is positive, 0 elsewhere. At zero the derivative is taken to be 0.

    >>> import gpugrad as gg
    >>> gg.relu(gg.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """
    return formulas.relu(m, x)


@elementwise(
    partials=(fusible(formulas.relu6_partial),),
    samples=_bent(0.0, 6.0),
    reference=lambda x: np.clip(x, 0.0, 6.0),
)
def relu6(m: Backend, x: Array, /) -> Array:
    """``x`` held between 0 and 6. The derivative is 0 at both bounds.

    >>> import gpugrad as gg
    >>> gg.relu6(gg.tensor([-1.0, 2.0, 7.0]))
    tensor([0., 2., 6.])
    """
    return formulas.relu6(m, x)


@elementwise(
    partials=(fusible(formulas.relu_squared_partial),),
    samples=_bent(0.0),
    reference=lambda x: np.where(x > 0, x, 0.0) ** 2,
)
def relu_squared(m: Backend, x: Array, /) -> Array:
    """The square of ``relu(x)`` (So et al., arXiv:2109.08668).

    >>> import gpugrad as gg
    >>> gg.relu_squared(gg.tensor([-1.0, 3.0]))
    tensor([0., 9.])
    """
    return formulas.relu_squared(m, x)


@elementwise(
    partials=(fusible(formulas.leaky_relu_partial),),
    samples=lambda: [*_bent(0.0)(), sample(distinct(4), negative_slope=0.3)],
    reference=lambda x, negative_slope=0.01: np.where(x > 0, x, negative_slope * x),
)
def leaky_relu(m: Backend, x: Array, /, negative_slope: float = 0.01) -> Array:
    """``x`` where it is positive, ``negative_slope * x`` elsewhere, the derivative at 0 included.

    >>> import gpugrad as gg
    >>> gg.leaky_relu(gg.tensor([-1.0, 2.0]))
    tensor([-0.01,  2.  ])
    """
    return formulas.leaky_relu(m, x, negative_slope)


@elementwise(
    partials=(fusible(formulas.threshold_partial),),
    samples=lambda: [
        sample(distinct((2, 3)), 0.5, -2.0),
        sample(np.array([0.0, 0.5, 1.0]), 0.5, -2.0, smooth=False, note="step"),
    ],
    reference=lambda x, threshold, value: np.where(x > threshold, x, value),
)
def threshold(m: Backend, x: Array, /, threshold: float, value: float) -> Array:
    """``x`` where it exceeds ``threshold``, ``value`` elsewhere.

    >>> import gpugrad as gg
    >>> gg.threshold(gg.tensor([0.1, 0.9]), 0.5, 0.0)
    tensor([0. , 0.9])
    """
    return formulas.threshold(m, x, threshold, value)


@elementwise(
    partials=(fusible(formulas.hardtanh_partial),),
    samples=lambda: [*_bent(-1.0, 1.0)(), sample(distinct(4), min_val=-0.5, max_val=0.3)],
    reference=lambda x, min_val=-1.0, max_val=1.0: np.clip(x, min_val, max_val),
)
def hardtanh(m: Backend, x: Array, /, min_val: float = -1.0, max_val: float = 1.0) -> Array:
    """``x`` held between ``min_val`` and ``max_val``; unlike ``clip``, with derivative 0 on them.

    >>> import gpugrad as gg
    >>> gg.hardtanh(gg.tensor([-3.0, 0.5]))
    tensor([-1. ,  0.5])
    """
    return formulas.hardtanh(m, x, min_val, max_val)


@elementwise(
    partials=(fusible(formulas.hardsigmoid_partial),),
    samples=_bent(-3.0, 3.0),
    reference=lambda x: np.clip(x / 6.0 + 0.5, 0.0, 1.0),
)
def hardsigmoid(m: Backend, x: Array, /) -> Array:
    """``x / 6 + 1/2`` held between 0 and 1, with derivative 0 on the bounds.

    >>> import gpugrad as gg
    >>> gg.hardsigmoid(gg.tensor([-4.0, 0.0, 4.0]))
    tensor([0. , 0.5, 1. ])
    """
    return formulas.hardsigmoid(m, x)


@elementwise(
    partials=(fusible(formulas.hardswish_partial),),
    samples=_bent(-3.0, 3.0),
    reference=lambda x: x * np.clip(x / 6.0 + 0.5, 0.0, 1.0),
)
def hardswish(m: Backend, x: Array, /) -> Array:
    """``x * hardsigmoid(x)`` (Howard et al., arXiv:1905.02244); derivatives at -3, 3: 0 and 1.

    >>> import gpugrad as gg
    >>> gg.hardswish(gg.tensor([-4.0, 0.0, 4.0]))
    tensor([-0.,  0.,  4.])
    """
    return formulas.hardswish(m, x)


# -- exponential bends -----------------------------------------------------------------------------


def _elu(x: Any, alpha: float = 1.0) -> Any:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0)))


@elementwise(
    partials=(fusible(formulas.elu_partial),),
    samples=lambda: [*_bent(0.0)(), sample(distinct(4), alpha=0.7)],
    reference=_elu,
)
def elu(m: Backend, x: Array, /, alpha: float = 1.0) -> Array:
    """``x`` where it is positive, ``alpha * (exp(x) - 1)`` elsewhere (arXiv:1511.07289).

    At zero the derivative is ``alpha``.

    >>> import gpugrad as gg
    >>> gg.elu(gg.tensor([-1.0, 2.0]))
    tensor([-0.63212056,  2.        ])
    """
    return formulas.elu(m, x, alpha)


@elementwise(
    partials=(fusible(formulas.selu_partial),),
    samples=_bent(0.0),
    reference=lambda x: 1.0507009873554805 * _elu(x, 1.6732632423543772),
)
def selu(m: Backend, x: Array, /) -> Array:
    """``elu`` scaled so that mean 0 and variance 1 are kept from layer to layer (arXiv:1706.02515).

    >>> import gpugrad as gg
    >>> gg.selu(gg.tensor([-1.0, 2.0]))
    tensor([-1.11133074,  2.10140197])
    """
    return formulas.selu(m, x)


@elementwise(
    partials=(fusible(formulas.celu_partial),),
    samples=lambda: [*_bent(0.0)(), sample(distinct(4), alpha=0.7)],
    reference=lambda x, alpha=1.0: alpha * _elu(x / alpha),
)
def celu(m: Backend, x: Array, /, alpha: float = 1.0) -> Array:
    """``elu`` with the exponent ``x / alpha``, so that it has no kink for any alpha.

    Continuously differentiable, after Barron, arXiv:1704.07483. ``alpha`` cannot be zero.

    >>> import gpugrad as gg
    >>> gg.celu(gg.tensor([-1.0, 2.0]), alpha=2.0)
    tensor([-0.78693868,  2.        ])
    """
    if alpha == 0:
        raise ParameterError("celu: alpha divides the exponent and cannot be 0")
    return formulas.celu(m, x, alpha)


# -- sigmoid and its family ------------------------------------------------------------------------


def _sigmoid(x: Any) -> Any:
    return np.exp(-np.logaddexp(0.0, -x))


@elementwise(
    partials=(fusible(formulas.sigmoid_partial),),
    samples=_smooth,
    reference=_sigmoid,
)
def sigmoid(m: Backend, x: Array, /) -> Array:
    """The logistic function ``1 / (1 + exp(-x))``; its node keeps the result only.

    Its derivative ``y * (1 - y)`` never exceeds 1/4: the factor by which gradients vanish.

    >>> import gpugrad as gg
    >>> gg.sigmoid(gg.tensor([-1000.0, 0.0, 1000.0]))
    tensor([0. , 0.5, 1. ])
    """
    return formulas.sigmoid(m, x)


@elementwise(
    partials=(fusible(formulas.logsigmoid_partial),),
    samples=_smooth,
    reference=lambda x: -np.logaddexp(0.0, -x),
)
def logsigmoid(m: Backend, x: Array, /) -> Array:
    """The logarithm of ``sigmoid(x)``, without overflow and without the logarithm of zero.

    >>> import gpugrad as gg
    >>> gg.logsigmoid(gg.tensor([-1000.0, 0.0]))
    tensor([-1.00000000e+03, -6.93147181e-01])
    """
    return formulas.logsigmoid(m, x)


@elementwise(
    partials=(fusible(formulas.softplus_partial),),
    samples=lambda: [*_smooth(), sample(normal(4), beta=2.0, threshold=1.0)],
    reference=lambda x, beta=1.0, threshold=20.0: np.where(
        beta * x > threshold, x, np.logaddexp(0.0, beta * x) / beta
    ),
)
def softplus(m: Backend, x: Array, /, beta: float = 1.0, threshold: float = 20.0) -> Array:
    """``log(1 + exp(beta * x)) / beta``, and ``x`` itself where ``beta * x`` exceeds ``threshold``.

    >>> import gpugrad as gg
    >>> gg.softplus(gg.tensor([-1000.0, 0.0, 1000.0]))
    tensor([0.00000000e+00, 6.93147181e-01, 1.00000000e+03])
    """
    if beta == 0:
        raise ParameterError("softplus: beta is divided by and cannot be 0")
    return formulas.softplus(m, x, beta, threshold)


@elementwise(
    partials=(fusible(formulas.silu_partial),),
    samples=_smooth,
    reference=lambda x: x * _sigmoid(x),
)
def silu(m: Backend, x: Array, /) -> Array:
    """``x * sigmoid(x)``, also known as swish (arXiv:1702.03118).

    >>> import gpugrad as gg
    >>> gg.silu(gg.tensor([-1.0, 2.0]))
    tensor([-0.26894142,  1.76159416])
    """
    return formulas.silu(m, x)


@elementwise(
    partials=(fusible(formulas.mish_partial),),
    samples=_smooth,
    reference=lambda x: x * np.tanh(np.logaddexp(0.0, x)),
)
def mish(m: Backend, x: Array, /) -> Array:
    """``x * tanh(softplus(x))`` (arXiv:1908.08681).

    >>> import gpugrad as gg
    >>> gg.mish(gg.tensor([-1.0, 2.0]))
    tensor([-0.30340146,  1.94395896])
    """
    return formulas.mish(m, x)


def _approximation(operation: str, approximate: str, exact: Any, tanh: Any) -> Any:
    """The formula that ``approximate`` asks for."""
    if approximate == "none":
        return exact
    if approximate == "tanh":
        return tanh
    raise ParameterError(f"{operation}: approximate is 'none' or 'tanh', not {approximate!r}")


def _erf(x: Any) -> Any:
    from math import erf

    return np.vectorize(erf, otypes=[np.float64])(x)


def _gelu(x: Any, approximate: str = "none") -> Any:
    if approximate == "none":
        return 0.5 * x * (1.0 + _erf(x / np.sqrt(2.0)))
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


@fusible
def gelu_partial(m: Any, g: Any, x: Any, approximate: str) -> Any:
    formula = formulas.gelu_partial if approximate == "none" else formulas.gelu_tanh_partial
    return formula(m, g, x)


@elementwise(
    partials=(gelu_partial,),
    samples=lambda: [*_smooth(), *(sample(*s.args, smooth=s.smooth, approximate="tanh")
                                   for s in _smooth())],
    reference=_gelu,
)  # fmt: skip
def gelu(m: Backend, x: Array, /, approximate: str = "none") -> Array:
    """``x`` times the normal distribution function at ``x`` (arXiv:1606.08415).

    ``approximate="tanh"`` takes a hyperbolic tangent in place of the error function.

    >>> import gpugrad as gg
    >>> gg.gelu(gg.tensor([-1.0, 2.0]))
    tensor([-0.15865525,  1.95449974])
    """
    return _approximation("gelu", approximate, formulas.gelu, formulas.gelu_tanh)(m, x)


# -- shrinkage -------------------------------------------------------------------------------------


@elementwise(
    partials=(fusible(formulas.softsign_partial),),
    samples=_bent(0.0),
    reference=lambda x: x / (1.0 + np.abs(x)),
)
def softsign(m: Backend, x: Array, /) -> Array:
    """``x / (1 + abs(x))``.

    >>> import gpugrad as gg
    >>> gg.softsign(gg.tensor([-1.0, 3.0]))
    tensor([-0.5 ,  0.75])
    """
    return formulas.softsign(m, x)


@elementwise(
    partials=(fusible(formulas.tanhshrink_partial),),
    samples=_smooth,
    reference=lambda x: x - np.tanh(x),
)
def tanhshrink(m: Backend, x: Array, /) -> Array:
    """``x - tanh(x)``.

    >>> import gpugrad as gg
    >>> gg.tanhshrink(gg.tensor([-1.0, 2.0]))
    tensor([-0.23840584,  1.03597242])
    """
    return formulas.tanhshrink(m, x)


@elementwise(
    partials=(fusible(formulas.shrink_partial),),
    samples=lambda: [*_bent(-0.5, 0.5)(), sample(distinct(4), lambd=0.25)],
    reference=lambda x, lambd=0.5: np.sign(x) * np.maximum(np.abs(x) - lambd, 0.0),
)
def softshrink(m: Backend, x: Array, /, lambd: float = 0.5) -> Array:
    """``x`` moved by ``lambd`` towards zero, and 0 within ``lambd`` of it.

    >>> import gpugrad as gg
    >>> gg.softshrink(gg.tensor([-1.0, 0.2, 2.0]))
    tensor([-0.5,  0. ,  1.5])
    """
    _check_lambd("softshrink", lambd)
    return formulas.softshrink(m, x, lambd)


@elementwise(
    partials=(fusible(formulas.shrink_partial),),
    samples=lambda: [*_bent(-0.5, 0.5)(), sample(distinct(4), lambd=0.25)],
    reference=lambda x, lambd=0.5: np.where(np.abs(x) > lambd, x, 0.0),
)
def hardshrink(m: Backend, x: Array, /, lambd: float = 0.5) -> Array:
    """``x``, and 0 within ``lambd`` of zero.

    >>> import gpugrad as gg
    >>> gg.hardshrink(gg.tensor([-1.0, 0.2, 2.0]))
    tensor([-1.,  0.,  2.])
    """
    _check_lambd("hardshrink", lambd)
    return formulas.hardshrink(m, x, lambd)


def _check_lambd(operation: str, lambd: float) -> None:
    if not lambd >= 0:
        raise ParameterError(f"{operation}: lambd is a distance and cannot be {lambd!r}")


# -- gates -----------------------------------------------------------------------------------------


def _gates() -> Any:
    return [
        sample(normal((2, 3)), normal((2, 3), 1)),
        sample(normal((3, 1), 2), normal((1, 4), 3), note="broadcast"),
        sample(normal(3, 4), 2.0, note="Python number"),
    ]


@elementwise(
    partials=(fusible(formulas.swiglu_gate_partial), fusible(formulas.swiglu_value_partial)),
    samples=_gates,
    reference=lambda gate, value: gate * _sigmoid(gate) * value,
)
def swiglu(m: Backend, gate: Array, value: Array, /) -> Array:
    """``silu(gate) * value`` (Shazeer, arXiv:2002.05202).

    >>> import gpugrad as gg
    >>> gg.swiglu(gg.tensor([2.0]), gg.tensor([10.0]))
    tensor([17.61594156])
    """
    return formulas.swiglu(m, gate, value)


@fusible
def geglu_gate_partial(m: Any, g: Any, gate: Any, value: Any, approximate: str) -> Any:
    exact, tanh = formulas.geglu_gate_partial, formulas.geglu_tanh_gate_partial
    return (exact if approximate == "none" else tanh)(m, g, gate, value)


@fusible
def geglu_value_partial(m: Any, g: Any, gate: Any, approximate: str) -> Any:
    exact, tanh = formulas.geglu_value_partial, formulas.geglu_tanh_value_partial
    return (exact if approximate == "none" else tanh)(m, g, gate)


@elementwise(
    partials=(geglu_gate_partial, geglu_value_partial),
    samples=lambda: [*_gates(), sample(normal(4), normal(4, 1), approximate="tanh")],
    reference=lambda gate, value, approximate="none": _gelu(gate, approximate) * value,
)
def geglu(m: Backend, gate: Array, value: Array, /, approximate: str = "none") -> Array:
    """``gelu(gate) * value`` (Shazeer, arXiv:2002.05202).

    >>> import gpugrad as gg
    >>> gg.geglu(gg.tensor([2.0]), gg.tensor([10.0]))
    tensor([19.54499736])
    """
    formula = _approximation("geglu", approximate, formulas.geglu, formulas.geglu_tanh)
    return formula(m, gate, value)


def _halves(x: Any, axis: int) -> Any:
    a, b = np.split(x, 2, axis=axis)
    return a * _sigmoid(b)


@composite(
    samples=lambda: [sample(normal((2, 4))), sample(normal((4, 3), 1), axis=0)],
    reference=lambda x, axis=-1: _halves(x, axis),
)
def glu(x: Any, /, axis: int = -1) -> Tensor:
    """The first half of ``x`` along ``axis`` times the sigmoid of the second (arXiv:1612.08083).

    Raises ShapeError when the axis does not exist or its length is odd.

    >>> import gpugrad as gg
    >>> gg.glu(gg.tensor([3.0, 0.0]))
    tensor([1.5])
    """
    x = asarray(x)
    if not -x.ndim <= axis < x.ndim:
        raise ShapeError(f"glu: axis {axis} of a tensor of shape {x.shape}")
    half, odd = divmod(x.shape[axis], 2)
    if odd:
        raise ShapeError(
            f"glu: axis {axis} of shape {x.shape} is cut into two halves, but its length is odd"
        )
    before = (slice(None),) * (axis % x.ndim)
    value, gate = x[(*before, slice(None, half))], x[(*before, slice(half, None))]
    return value * differentiable.sigmoid(gate)  # type: ignore[no-any-return]


# -- softmax ---------------------------------------------------------------------------------------


def _shifted(m: Any, x: Any, axis: Any) -> Any:
    """``x`` minus its largest element along ``axis``, so that no exponential overflows."""
    return x - m.max(x, axis=axis, keepdims=True)


def _total(m: Any, x: Any, axis: Any) -> Any:
    return m.sum(x, axis=axis, keepdims=True)


def _rows() -> Any:
    return [
        sample(normal((3, 4))),
        sample(normal((3, 4), 1), axis=0),
        sample(normal((2, 3, 2), 2), axis=1),
        sample(normal(5, 3)),
        sample(np.array([[1000.0, 1001.0], [-1000.0, -1001.0]]), note="no overflow"),
        sample(np.array([[1.0, -np.inf, 2.0]]), smooth=False, note="partly masked"),
    ]


def _softmax(x: Any, axis: int = -1) -> Any:
    e = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return e / np.sum(e, axis=axis, keepdims=True)


@fusible
def softmax_backward(m: Any, g: Any, y: Any, axis: Any = -1) -> Any:
    """What the Jacobian of softmax, which is symmetric, makes of ``g``."""
    return y * (g - _total(m, g * y, axis))


@fusible
def log_softmax_backward(m: Any, g: Any, y: Any, axis: Any = -1) -> Any:
    """What the transposed Jacobian of log_softmax makes of ``g``."""
    return g - m.exp(y) * _total(m, g, axis)


@primitive(
    vjps=(softmax_backward,),
    jvps=(lambda t, m, y, axis: softmax_backward(m, t, y, axis),),
    broadcasts=False,
    samples=_rows,
    reference=_softmax,
)
def softmax(m: Backend, x: Array, /, axis: int = -1) -> Array:
    """``exp(x)`` over its sum along ``axis``: shares that add up to 1. Its node keeps the result.

    An element of -inf is masked out: its share and its gradient are 0.

    >>> import gpugrad as gg
    >>> gg.softmax(gg.tensor([1000.0, 1000.0]))
    tensor([0.5, 0.5])
    """
    if 0 in x.shape:  # no elements have no largest one
        return m.exp(x)
    e = m.exp(_shifted(m, x, axis))
    return e / _total(m, e, axis)


@primitive(
    vjps=(log_softmax_backward,),
    jvps=(lambda t, m, y, axis: t - _total(m, m.exp(y) * t, axis),),
    broadcasts=False,
    samples=lambda: [s for s in _rows() if s.smooth],
    reference=lambda x, axis=-1: x - np.logaddexp.reduce(x, axis=axis, keepdims=True),
)
def log_softmax(m: Backend, x: Array, /, axis: int = -1) -> Array:
    """The logarithm of ``softmax(x, axis)``, without the logarithm of zero.

    >>> import gpugrad as gg
    >>> gg.log_softmax(gg.tensor([0.0, -1000.0]))
    tensor([    0., -1000.])
    """
    if 0 in x.shape:
        return m.exp(x)
    z = _shifted(m, x, axis)
    return z - m.log(_total(m, m.exp(z), axis))
