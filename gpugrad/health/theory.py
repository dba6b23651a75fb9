"""Mean-field theory of wide nets: what becomes of signals and gradients on their way.

In a net of wide layers with random weights, the pre-activations of a layer are normally
distributed, so that a layer is described by two numbers: their variance q, and the correlation c
of those that two inputs cause. Both follow a map from layer to layer, and the slopes of these maps
at their fixed points say how far signals reach, forward and backward. Weights have variance
σ_w²/fan_in, biases σ_b². Poole et al., arXiv:1606.05340; Schoenholz et al., arXiv:1611.01232.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpugrad.core.conversion import tensor
from gpugrad.core.modes import enable_grad
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError
from gpugrad.nn import functional as F

__all__ = [
    "Activation",
    "MeanField",
    "correlation_map",
    "critical_sigma_w",
    "length_map",
    "mean_field",
    "sigmas",
    "slope_moment",
]

#: An element-wise function of tensors, a module that is one, or its name in `nn.functional`.
Activation = str | Callable[[Tensor], Tensor]

Floats = NDArray[np.float64]

#: Lengths between which a fixed point is looked for; what lies beyond counts as 0 or infinite.
SHORTEST, LONGEST = 1e-10, 1e10

#: How near to 1 a slope counts as 1, and two lengths as equal.
SAME = 1e-6


@dataclass(frozen=True)
class MeanField:
    """What the theory says about nets of one activation, σ_w and σ_b.

    Attributes
    ----------
    sigma_w, sigma_b:
        Scale of weights, σ_w² = fan_in·var(W), and standard deviation of biases.
    length:
        q*, to which the variance of pre-activations tends; infinite if it grows for ever.
    correlation:
        c*, to which the correlation of two inputs' pre-activations tends: 1 in the ordered phase,
        where everything looks the same in the end, less in the chaotic one.
    chi:
        χ₁, the factor per layer on squared gradients on their way back, and on small distances
        between inputs on their way forward.
    xi_length, xi_correlation:
        Depth scales, in layers: differences of q from q* and of c from c* shrink by e over as many.
        Infinite where they do not shrink.
    """

    sigma_w: float
    sigma_b: float
    length: float
    correlation: float
    chi: float
    xi_length: float
    xi_correlation: float

    @property
    def gain(self) -> float:
        """√χ₁, the factor per layer on the size of gradients on their way back."""
        return math.sqrt(self.chi)

    @property
    def xi_gradient(self) -> float:
        """Layers over which squared gradients change by e on their way back: 1/|ln χ₁|."""
        return _scale(self.chi, grows=True)

    @property
    def phase(self) -> str:
        """`"ordered"`: gradients vanish; `"chaotic"`: they explode; `"critical"`: they stay."""
        if abs(self.chi - 1) < SAME:
            return "critical"
        return "ordered" if self.chi < 1 else "chaotic"

    def __str__(self) -> str:
        return (
            f"σ_w={self.sigma_w:.3g}, σ_b={self.sigma_b:.3g}: {self.phase}, χ={self.chi:.4g} "
            f"(gradients ×{self.gain:.4g} a layer), ξ={self.xi_gradient:.3g} layers"
        )


def mean_field(
    activation: Activation, sigma_w: float, sigma_b: float = 0.0, start: float = 1.0
) -> MeanField:
    """Fixed points, gain and depth scales of nets with this activation.

    Parameters
    ----------
    activation:
        An element-wise function of tensors, a module, or a name of `gpugrad.nn.functional`. It is
        differentiated by the library itself.
    sigma_w, sigma_b:
        σ_w and σ_b, at least 0. Raises ParameterError for others.
    start:
        The variance of the first pre-activations, which matters where there are several fixed
        points.

    >>> relu = mean_field("relu", 2**0.5)
    >>> relu.phase, round(relu.gain, 6)
    ('critical', 1.0)
    >>> mean_field("tanh", 2.5, 0.3).phase
    'chaotic'
    """
    for name, value in (("sigma_w", sigma_w), ("sigma_b", sigma_b)):
        if not (math.isfinite(value) and value >= 0):
            raise ParameterError(f"mean_field: {name}={value} is a scale, at least 0")
    f = _function(activation)
    q = _fixed_length(f, sigma_w, sigma_b, start)
    at = min(max(q, SHORTEST), LONGEST)
    chi = sigma_w**2 * _mean(_slope(f, math.sqrt(at) * _nodes()[0]) ** 2)
    h = 1e-3 * at
    slope_q = (_next_length(f, at + h, sigma_w, sigma_b) - _next_length(f, at - h, sigma_w, sigma_b)
               ) / (2 * h)  # fmt: skip
    c = 1.0 if chi <= 1 + SAME else _fixed_correlation(f, at, sigma_w, sigma_b)
    slope_c = chi if c == 1 else sigma_w**2 * _pair_mean(lambda u: _slope(f, u), at, c)
    return MeanField(sigma_w, sigma_b, q, c, chi, _scale(slope_q), _scale(slope_c))


def length_map(activation: Activation, q: float, sigma_w: float, sigma_b: float = 0.0) -> float:
    """The variance of the next layer's pre-activations, σ_w² ∫ φ(√q z)² Dz + σ_b².

    >>> round(length_map("relu", 3.0, 2**0.5), 9)
    3.0
    """
    return float(_next_length(_function(activation), q, sigma_w, sigma_b))


def correlation_map(
    activation: Activation, c: float, q: float, sigma_w: float, sigma_b: float = 0.0
) -> float:
    """The correlation in the next layer of two inputs' pre-activations of variance q each.

    >>> round(correlation_map("relu", 0.0, 1.0, 2**0.5), 4)  # 1/π
    0.3183
    """
    f = _function(activation)
    length = _next_length(f, q, sigma_w, sigma_b)
    return float((sigma_w**2 * _pair_mean(lambda u: _value(f, u), q, c) + sigma_b**2) / length)


def slope_moment(activation: Activation, q: float) -> float:
    """∫ φ'(√q z)² Dz: what an activation leaves of squared gradients.

    >>> round(slope_moment("relu", 1.0), 9)
    0.5
    """
    return float(_mean(_slope(_function(activation), math.sqrt(q) * _nodes()[0]) ** 2))


def critical_sigma_w(activation: Activation, sigma_b: float = 0.0) -> float | None:
    """The σ_w at which gradients keep their size, χ₁ = 1; None if there is none up to 20.

    >>> round(critical_sigma_w("tanh"), 3), round(critical_sigma_w("relu"), 3)
    (1.0, 1.414)
    """
    low, high = 0.05, 20.0

    def chi(sigma_w: float) -> float:
        return mean_field(activation, sigma_w, sigma_b).chi

    if chi(high) < 1:
        return None
    while high - low > 1e-6 * high:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if chi(middle) < 1 - SAME else (low, middle)
    return high


def sigmas(weight: Any, bias: Any = None) -> tuple[float, float]:
    """σ_w and σ_b of a layer: √(fan_in·mean(W²)) and the root mean square of its bias.

    `weight` is an array of shape [out, in, ...], `bias` one of any shape, or None.

    >>> sigmas(np.ones((2, 9)), np.zeros(2))
    (3.0, 0.0)
    """
    w = np.asarray(weight, dtype=np.float64)
    fan_in = w[0].size if w.ndim > 1 and len(w) else 1
    sigma_b = 0.0 if bias is None else math.sqrt(np.mean(np.asarray(bias, np.float64) ** 2))
    return math.sqrt(fan_in * np.mean(w**2)), sigma_b


# -- integrals over the normal distribution --------------------------------------------------------


@cache
def _nodes(panels: int = 60, order: int = 8, far: float = 9.0) -> tuple[Floats, Floats]:
    """Points and weights of ∫ · Dz. Short panels cope with the kinks that activations have."""
    x, w = np.polynomial.legendre.leggauss(order)
    edges = np.linspace(-far, far, panels + 1)
    half = (edges[1:] - edges[:-1])[:, None] / 2
    z = ((edges[:-1] + edges[1:])[:, None] / 2 + half * x).ravel()
    weights = (half * w).ravel() * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return z, weights / weights.sum()


def _mean(values: Floats) -> Any:
    return values @ _nodes()[1]


def _pair_mean(f: Callable[[Floats], Floats], q: float, c: float) -> float:
    """The mean of f(u)·f(v) over u and v of variance q and correlation c."""
    z, w = _nodes(panels=24)
    u = math.sqrt(q) * z
    v = math.sqrt(q) * (c * z[:, None] + math.sqrt(max(1 - c * c, 0.0)) * z)
    return float(w @ (f(u) * (f(v) @ w)))


def _next_length(f: Callable[[Tensor], Tensor], q: Any, sigma_w: float, sigma_b: float) -> Any:
    spread = np.sqrt(np.asarray(q, np.float64))[..., None] * _nodes()[0]
    return sigma_w**2 * _mean(_value(f, spread) ** 2) + sigma_b**2


# -- fixed points ----------------------------------------------------------------------------------


def _fixed_length(
    f: Callable[[Tensor], Tensor], sigma_w: float, sigma_b: float, start: float
) -> float:
    """Where the length goes from `start`: the map rises, so that it is the next fixed point."""

    def rise(q: Any) -> Any:  # relative, so that rounding does not matter
        return _next_length(f, q, sigma_w, sigma_b) / q - 1

    start = min(max(start, 2 * SHORTEST), LONGEST / 2)
    direction = rise(start)
    if abs(direction) < SAME:
        return start
    end = LONGEST if direction > 0 else SHORTEST
    lengths = np.geomspace(start, end, 400)
    beyond = np.flatnonzero(np.sign(rise(lengths)) != np.sign(direction))
    if not beyond.size:
        return math.inf if direction > 0 else 0.0
    far = lengths[beyond[0]]
    near = lengths[beyond[0] - 1]
    for _ in range(60):
        middle = math.sqrt(near * far)
        near, far = (middle, far) if rise(middle) * direction > 0 else (near, middle)
    return float(far)


def _fixed_correlation(
    f: Callable[[Tensor], Tensor], q: float, sigma_w: float, sigma_b: float
) -> float:
    """The fixed point below 1 that there is in the chaotic phase."""
    length = _next_length(f, q, sigma_w, sigma_b)
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        c = (low + high) / 2
        covariance = sigma_w**2 * _pair_mean(lambda u: _value(f, u), q, c) + sigma_b**2
        low, high = (c, high) if covariance / length > c else (low, c)
    return low


def _scale(slope: float, grows: bool = False) -> float:
    """Over how many layers a factor of `slope` a layer makes one of e."""
    if slope <= 0:
        return 0.0
    log = abs(math.log(slope)) if grows else -math.log(slope)
    return 1 / log if log > SAME else math.inf


# -- the activation --------------------------------------------------------------------------------


def _function(activation: Activation) -> Callable[[Tensor], Tensor]:
    if isinstance(activation, str):
        found = getattr(F, activation, None)
        if found is None:
            raise ParameterError(
                f"{activation!r} is no function of gpugrad.nn.functional; give a name there, a "
                "module, or an element-wise function of tensors"
            )
        return found  # type: ignore[no-any-return]
    return activation


def _value(f: Callable[[Tensor], Tensor], x: Floats) -> Floats:
    return f(tensor(x)).detach().numpy()


def _slope(f: Callable[[Tensor], Tensor], x: Floats) -> Floats:
    with enable_grad():
        u = tensor(x, requires_grad=True)
        f(u).sum().backward()
    return np.zeros_like(x) if u.grad is None else u.grad.numpy()
