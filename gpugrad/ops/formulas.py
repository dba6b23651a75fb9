"""Activations and their derivatives, each written once, for arrays, tensors and compiled loops.

``m`` is a namespace: that of an array library, gpugrad's own when a derivative is recorded itself,
or a module of scalar functions that a compiler turns into a loop. So the text below stays within
``m.exp``, ``m.where`` and their like, comparisons, arithmetic and Python numbers.

``name(m, x, ...)`` is the value. ``name_partial(m, g, ...)`` is ``g`` times the derivative, and its
arguments say what must be kept for it: the operand ``x``, or only the result ``y``.

Three habits keep every order of derivative right and every intermediate result finite. Exponents
are never positive. What is smooth is put together by ``where`` from pieces that agree with it on
both sides, not from ``abs`` and ``maximum``, whose derivative at the seam is a convention. And what
would overflow is clamped where the result no longer depends on it.
"""

# ruff: noqa: D103 - what a formula computes is said once, where it is declared
from __future__ import annotations

from typing import Any

SQRT_HALF = 0.5**0.5
TWO_OVER_SQRT_PI = 1.1283791670955126
SQRT_TWO_OVER_PI = TWO_OVER_SQRT_PI * SQRT_HALF

#: Where the Gaussian has vanished in every floating-point format: exp(-40**2 / 2) is 0.
FAR = 40.0


def _clamped(m: Any, x: Any, bound: float) -> Any:
    return m.minimum(m.maximum(x, -bound), bound)


# -- the error function and the Gaussian -----------------------------------------------------------


def erf_partial(m: Any, g: Any, x: Any) -> Any:
    t = _clamped(m, x, FAR)
    return g * (TWO_OVER_SQRT_PI * m.exp(-t * t))


def gelu(m: Any, x: Any) -> Any:
    """``x`` times the normal distribution function."""
    return 0.5 * x * (1.0 + m.erf(SQRT_HALF * x))


def gelu_partial(m: Any, g: Any, x: Any) -> Any:
    t = _clamped(m, x, FAR)
    density = (0.5 * SQRT_TWO_OVER_PI) * m.exp(-0.5 * t * t)
    return g * (0.5 * (1.0 + m.erf(SQRT_HALF * x)) + t * density)


CUBIC = 0.044715  # the coefficient of Hendrycks and Gimpel, arXiv:1606.08415


def _gelu_tanh_inner(m: Any, t: Any) -> Any:
    return m.tanh(SQRT_TWO_OVER_PI * t * (1.0 + CUBIC * t * t))


def gelu_tanh(m: Any, x: Any) -> Any:
    """The approximation of :func:`gelu` by a hyperbolic tangent."""
    return 0.5 * x * (1.0 + _gelu_tanh_inner(m, _clamped(m, x, FAR)))


def gelu_tanh_partial(m: Any, g: Any, x: Any) -> Any:
    t = _clamped(m, x, FAR)
    y = _gelu_tanh_inner(m, t)
    slope = SQRT_TWO_OVER_PI * (1.0 + 3.0 * CUBIC * t * t)
    return g * (0.5 * (1.0 + y) + 0.5 * t * (1.0 - y * y) * slope)


# -- sigmoid and its family ------------------------------------------------------------------------


def _minus_abs(m: Any, x: Any) -> Any:
    return m.where(x >= 0, -x, x)


def sigmoid(m: Any, x: Any) -> Any:
    e = m.exp(_minus_abs(m, x))
    return m.where(x >= 0, 1.0, e) / (1.0 + e)


def sigmoid_partial(m: Any, g: Any, y: Any) -> Any:
    return g * y * (1.0 - y)


def tanh_partial(m: Any, g: Any, y: Any) -> Any:
    return g * (1.0 - y * y)


def logsigmoid(m: Any, x: Any) -> Any:
    return m.where(x >= 0, 0.0, x) - m.log1p(m.exp(_minus_abs(m, x)))


def logsigmoid_partial(m: Any, g: Any, x: Any) -> Any:
    return g * sigmoid(m, -x)


def softplus(m: Any, x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    z = beta * x
    bent = (m.where(z >= 0, z, 0.0) + m.log1p(m.exp(_minus_abs(m, z)))) / beta
    return m.where(z > threshold, x, bent)


def softplus_partial(m: Any, g: Any, x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    z = beta * x
    return m.where(z > threshold, g, g * sigmoid(m, z))


def silu(m: Any, x: Any) -> Any:
    return x * sigmoid(m, x)


def silu_partial(m: Any, g: Any, x: Any) -> Any:
    s = sigmoid(m, x)
    return g * (s * (1.0 + x * (1.0 - s)))


def mish(m: Any, x: Any) -> Any:
    return x * m.tanh(softplus(m, x))


def mish_partial(m: Any, g: Any, x: Any) -> Any:
    t = m.tanh(softplus(m, x))
    return g * (t + x * (1.0 - t * t) * sigmoid(m, x))


# -- bends made of exponentials --------------------------------------------------------------------


def _negative_part(m: Any, x: Any) -> Any:
    return m.where(x > 0, 0.0, x)


def elu(m: Any, x: Any, alpha: float = 1.0) -> Any:
    return m.where(x > 0, x, alpha * m.expm1(_negative_part(m, x)))


def elu_partial(m: Any, g: Any, x: Any, alpha: float = 1.0) -> Any:
    return m.where(x > 0, g, g * (alpha * m.exp(_negative_part(m, x))))


def celu(m: Any, x: Any, alpha: float = 1.0) -> Any:
    return m.where(x > 0, x, alpha * m.expm1(_negative_part(m, x) / alpha))


def celu_partial(m: Any, g: Any, x: Any, alpha: float = 1.0) -> Any:
    return m.where(x > 0, g, g * m.exp(_negative_part(m, x) / alpha))


# The fixed point of mean 0 and variance 1 of Klambauer et al., arXiv:1706.02515.
SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946


def selu(m: Any, x: Any) -> Any:
    return SELU_SCALE * elu(m, x, SELU_ALPHA)


def selu_partial(m: Any, g: Any, x: Any) -> Any:
    return SELU_SCALE * elu_partial(m, g, x, SELU_ALPHA)


# -- pieces of straight lines ----------------------------------------------------------------------
#
# A comparison with NaN is false. The conditions below name the elements whose gradient is cut, so
# that a NaN hands its gradient on and is found where it arose.


def relu(m: Any, x: Any) -> Any:
    return m.maximum(x, 0)


def relu_partial(m: Any, g: Any, y: Any) -> Any:
    return m.where(y <= 0, 0.0, g)


def relu_squared(m: Any, x: Any) -> Any:
    y = relu(m, x)
    return y * y


def relu_squared_partial(m: Any, g: Any, x: Any) -> Any:
    return g * (2.0 * m.where(x <= 0, 0.0, x))


def leaky_relu(m: Any, x: Any, negative_slope: float = 0.01) -> Any:
    return m.where(x > 0, x, negative_slope * x)


def leaky_relu_partial(m: Any, g: Any, x: Any, negative_slope: float = 0.01) -> Any:
    return m.where(x > 0, g, negative_slope * g)


def threshold(m: Any, x: Any, threshold: float, value: float) -> Any:
    return m.where(x <= threshold, value, x)


def threshold_partial(m: Any, g: Any, x: Any, threshold: float) -> Any:
    return m.where(x <= threshold, 0.0, g)


def hardtanh(m: Any, x: Any, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    return m.minimum(m.maximum(x, min_val), max_val)


def hardtanh_partial(m: Any, g: Any, x: Any, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    return m.where((x <= min_val) | (x >= max_val), 0.0, g)


def relu6(m: Any, x: Any) -> Any:
    return hardtanh(m, x, 0.0, 6.0)


def relu6_partial(m: Any, g: Any, x: Any) -> Any:
    return hardtanh_partial(m, g, x, 0.0, 6.0)


def hardsigmoid(m: Any, x: Any) -> Any:
    return relu6(m, x + 3.0) / 6.0


def hardsigmoid_partial(m: Any, g: Any, x: Any) -> Any:
    return hardtanh_partial(m, g / 6.0, x, -3.0, 3.0)


def hardswish(m: Any, x: Any) -> Any:
    return x * hardsigmoid(m, x)


def hardswish_partial(m: Any, g: Any, x: Any) -> Any:
    inner = m.where(x >= 3.0, g, g * (x / 3.0 + 0.5))
    return m.where(x <= -3.0, 0.0, inner)


# -- shrinkage -------------------------------------------------------------------------------------


def softsign(m: Any, x: Any) -> Any:
    return x / (1.0 + m.abs(x))


def softsign_partial(m: Any, g: Any, x: Any) -> Any:
    d = 1.0 + m.abs(x)
    return g / d / d


def tanhshrink(m: Any, x: Any) -> Any:
    return x - m.tanh(x)


def tanhshrink_partial(m: Any, g: Any, x: Any) -> Any:
    t = m.tanh(x)
    return g * t * t


def softshrink(m: Any, x: Any, lambd: float = 0.5) -> Any:
    return x - _clamped(m, x, lambd)


def hardshrink(m: Any, x: Any, lambd: float = 0.5) -> Any:
    return m.where(m.abs(x) <= lambd, 0.0, x)


def shrink_partial(m: Any, g: Any, x: Any, lambd: float = 0.5) -> Any:
    """Of both :func:`softshrink` and :func:`hardshrink`."""
    return m.where(m.abs(x) <= lambd, 0.0, g)


# -- gates: an activation of one operand times the other (Shazeer, arXiv:2002.05202) ---------------


def swiglu(m: Any, gate: Any, value: Any) -> Any:
    return silu(m, gate) * value


def swiglu_gate_partial(m: Any, g: Any, gate: Any, value: Any) -> Any:
    return silu_partial(m, g * value, gate)


def swiglu_value_partial(m: Any, g: Any, gate: Any) -> Any:
    return g * silu(m, gate)


def geglu(m: Any, gate: Any, value: Any) -> Any:
    return gelu(m, gate) * value


def geglu_gate_partial(m: Any, g: Any, gate: Any, value: Any) -> Any:
    return gelu_partial(m, g * value, gate)


def geglu_value_partial(m: Any, g: Any, gate: Any) -> Any:
    return g * gelu(m, gate)


def geglu_tanh(m: Any, gate: Any, value: Any) -> Any:
    return gelu_tanh(m, gate) * value


def geglu_tanh_gate_partial(m: Any, g: Any, gate: Any, value: Any) -> Any:
    return gelu_tanh_partial(m, g * value, gate)


def geglu_tanh_value_partial(m: Any, g: Any, gate: Any) -> Any:
    return g * gelu_tanh(m, gate)


# -- losses of an element, from what it is and what it should be -----------------------------------
#
# `name_x_partial` and `name_target_partial` are the two derivatives. Of a function of x - target
# they are opposite.


def squared_error(m: Any, x: Any, target: Any) -> Any:
    d = x - target
    return d * d


def squared_error_x_partial(m: Any, g: Any, x: Any, target: Any) -> Any:
    return g * (2.0 * (x - target))


def squared_error_target_partial(m: Any, g: Any, x: Any, target: Any) -> Any:
    return squared_error_x_partial(m, g, target, x)


def absolute_error(m: Any, x: Any, target: Any) -> Any:
    return m.abs(x - target)


def absolute_error_x_partial(m: Any, g: Any, x: Any, target: Any) -> Any:
    d = x - target
    return g * m.where(d > 0, 1.0, m.where(d < 0, -1.0, 0.0 * d))


def absolute_error_target_partial(m: Any, g: Any, x: Any, target: Any) -> Any:
    return absolute_error_x_partial(m, g, target, x)


def huber(m: Any, x: Any, target: Any, delta: float = 1.0) -> Any:
    """Half the square of the difference up to ``delta``, continued by its tangents."""
    d = x - target
    size = m.abs(d)
    return m.where(size <= delta, 0.5 * d * d, delta * (size - 0.5 * delta))


def huber_x_partial(m: Any, g: Any, x: Any, target: Any, delta: float = 1.0) -> Any:
    d = x - target
    return g * m.where(d > delta, delta, m.where(d < -delta, -delta, d))


def huber_target_partial(m: Any, g: Any, x: Any, target: Any, delta: float = 1.0) -> Any:
    return huber_x_partial(m, g, target, x, delta)


def smooth_l1(m: Any, x: Any, target: Any, beta: float = 1.0) -> Any:
    return huber(m, x, target, beta) / beta


def smooth_l1_x_partial(m: Any, g: Any, x: Any, target: Any, beta: float = 1.0) -> Any:
    return huber_x_partial(m, g / beta, x, target, beta)


def smooth_l1_target_partial(m: Any, g: Any, x: Any, target: Any, beta: float = 1.0) -> Any:
    return smooth_l1_x_partial(m, g, target, x, beta)


def gaussian_nll(m: Any, x: Any, target: Any, variance: Any) -> Any:
    """Less a constant, the negative log-density under a normal distribution around x."""
    d = x - target
    return 0.5 * (m.log(variance) + d * d / variance)


def gaussian_nll_x_partial(m: Any, g: Any, x: Any, target: Any, variance: Any) -> Any:
    return g * ((x - target) / variance)


def gaussian_nll_target_partial(m: Any, g: Any, x: Any, target: Any, variance: Any) -> Any:
    return gaussian_nll_x_partial(m, g, target, x, variance)


def gaussian_nll_variance_partial(m: Any, g: Any, x: Any, target: Any, variance: Any) -> Any:
    d = x - target
    return g * (0.5 * (1.0 - d * d / variance) / variance)


#: Logarithms of probabilities are at least this, so that no loss is infinite. What has a smaller
#: one is below exp(-100), which is written out as a number that single precision holds.
LEAST_LOG = -100.0
LEAST_PROBABILITY = 3.720075976020836e-44

#: Nor is a derivative: the variance p·(1 - p) that divides it is at least 1e-12 in single
#: precision, as in PyTorch.
LEAST_VARIANCE = 9.999999960041972e-13


def _log(m: Any, p: Any) -> Any:
    """The logarithm of ``p``, at least :data:`LEAST_LOG`; NaN stays."""
    tiny = p <= LEAST_PROBABILITY
    return m.where(tiny, LEAST_LOG, m.log(m.where(tiny, 1.0, p)))


def _log_of_rest(m: Any, p: Any) -> Any:
    """The logarithm of ``1 - p``, at least :data:`LEAST_LOG`; NaN stays."""
    sure = p >= 1.0
    return m.where(sure, LEAST_LOG, m.log1p(-m.where(sure, 0.0, p)))


def binary_cross_entropy(m: Any, x: Any, target: Any) -> Any:
    """Of a probability."""
    return (target - 1.0) * _log_of_rest(m, x) - target * _log(m, x)


def binary_cross_entropy_x_partial(m: Any, g: Any, x: Any, target: Any) -> Any:
    return g * (x - target) / m.maximum(x * (1.0 - x), LEAST_VARIANCE)


def binary_cross_entropy_target_partial(m: Any, g: Any, x: Any) -> Any:
    return g * (_log_of_rest(m, x) - _log(m, x))


def logit_cross_entropy(m: Any, x: Any, target: Any) -> Any:
    """Of the logit of a probability."""
    return (1.0 - target) * x - logsigmoid(m, x)


def logit_cross_entropy_x_partial(m: Any, g: Any, x: Any, target: Any) -> Any:
    return g * (sigmoid(m, x) - target)


def logit_cross_entropy_target_partial(m: Any, g: Any, x: Any) -> Any:
    return -g * x


def divergence(m: Any, x: Any, target: Any) -> Any:
    """Of a probability from one whose logarithm is x."""
    return target * (m.log(m.where(target == 0, 1.0, target)) - x)


def divergence_x_partial(m: Any, g: Any, target: Any) -> Any:
    return -g * target


def divergence_target_partial(m: Any, g: Any, x: Any, target: Any) -> Any:
    none = target == 0
    return g * (m.log(m.where(none, 1.0, target)) - x + m.where(none, 0.0 * target, 1.0))


def log_divergence(m: Any, x: Any, target: Any) -> Any:
    """Of a probability from another, both by their logarithms."""
    return m.exp(target) * (target - x)


def log_divergence_x_partial(m: Any, g: Any, target: Any) -> Any:
    return -g * m.exp(target)


def log_divergence_target_partial(m: Any, g: Any, x: Any, target: Any) -> Any:
    return g * (m.exp(target) * (target - x + 1.0))
