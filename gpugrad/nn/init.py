"""Initial values of parameters, under PyTorch's names.

Every function fills its tensor in place, outside the graph, and returns it. Random numbers come
from `generator` or, without one, from the default generator that `gpugrad.manual_seed` seeds; they
are the same on every backend.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gpugrad.core.conversion import tensor
from gpugrad.core.modes import no_grad
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.nn.random import Generator, draws_from

__all__ = [
    "calculate_gain",
    "constant_",
    "kaiming_normal_",
    "kaiming_uniform_",
    "normal_",
    "ones_",
    "orthogonal_",
    "uniform_",
    "xavier_normal_",
    "xavier_uniform_",
    "zeros_",
]

Mode = Literal["fan_in", "fan_out"]

#: The factor that keeps the scale of a signal through an activation; PyTorch's choices.
_GAINS = {
    "linear": 1.0,
    "conv1d": 1.0,
    "conv2d": 1.0,
    "conv3d": 1.0,
    "conv_transpose1d": 1.0,
    "conv_transpose2d": 1.0,
    "conv_transpose3d": 1.0,
    "sigmoid": 1.0,
    "tanh": 5 / 3,
    "relu": math.sqrt(2),
    "selu": 3 / 4,
}


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """The recommended gain of an activation; `param` is the slope of a leaky ReLU.

    >>> calculate_gain("tanh")
    1.6666666666666667
    """
    if nonlinearity == "leaky_relu":
        slope = 0.01 if param is None else param
        return math.sqrt(2 / (1 + slope**2))
    if nonlinearity not in _GAINS:
        raise ParameterError(
            f"no gain is known for {nonlinearity!r}; known are {', '.join((*_GAINS, 'leaky_relu'))}"
        )
    return _GAINS[nonlinearity]


def _fill(x: Tensor, values: NDArray[np.float64] | float) -> Tensor:
    with no_grad():
        if isinstance(values, np.ndarray):
            x[...] = tensor(values.astype(x.dtype, copy=False), device=x.device)
        else:
            x[...] = values
    return x


def uniform_(
    tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: Generator | None = None
) -> Tensor:
    """Fill with numbers drawn evenly from [a, b).

    >>> import gpugrad as gg
    >>> x = uniform_(gg.tensor([0.0] * 1000), -1.0, 1.0, Generator(0))
    >>> bool(gg.max(x) < 1.0), bool(gg.min(x) >= -1.0)
    (True, True)
    """
    return _fill(tensor, a + (b - a) * draws_from(generator).uniform(tensor.shape))


def normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Generator | None = None
) -> Tensor:
    """Fill with numbers from the normal distribution of `mean` and standard deviation `std`."""
    return _fill(tensor, mean + std * draws_from(generator).normal(tensor.shape))


def constant_(tensor: Tensor, val: float) -> Tensor:
    """Fill with one value."""
    return _fill(tensor, val)


def zeros_(tensor: Tensor) -> Tensor:
    """Fill with zeros."""
    return _fill(tensor, 0.0)


def ones_(tensor: Tensor) -> Tensor:
    """Fill with ones."""
    return _fill(tensor, 1.0)


def _fans(x: Tensor) -> tuple[int, int]:
    """How many inputs and outputs one element of the result, and of the input, is joined to."""
    if x.ndim < 2:
        raise ShapeError(
            f"fan-in and fan-out need a tensor of at least 2 dimensions, this one has shape "
            f"{x.shape}; fill a bias with zeros_ or uniform_"
        )
    field = math.prod(x.shape[2:])
    return x.shape[1] * field, x.shape[0] * field


def xavier_uniform_(
    tensor: Tensor, gain: float = 1.0, generator: Generator | None = None
) -> Tensor:
    """Uniform within ±gain·√(6/(fan_in + fan_out)): keeps variance forward and backward.

    Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks"
    (2010).
    """
    bound = gain * math.sqrt(6 / sum(_fans(tensor)))
    return uniform_(tensor, -bound, bound, generator)


def xavier_normal_(tensor: Tensor, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Normal with standard deviation gain·√(2/(fan_in + fan_out)); see `xavier_uniform_`."""
    return normal_(tensor, 0.0, gain * math.sqrt(2 / sum(_fans(tensor))), generator)


def _kaiming_std(x: Tensor, a: float, mode: str, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ParameterError(f"mode is 'fan_in' or 'fan_out', got {mode!r}")
    fan = _fans(x)[mode == "fan_out"]
    return calculate_gain(nonlinearity, a) / math.sqrt(fan)


def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0,
    mode: Mode = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator | None = None,
) -> Tensor:
    """Uniform within ±gain·√(3/fan): keeps variance through rectifiers.

    `a` is the negative slope of the rectifier that follows. He et al., "Delving deep into
    rectifiers" (2015).
    """
    bound = math.sqrt(3) * _kaiming_std(tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound, generator)


def kaiming_normal_(
    tensor: Tensor,
    a: float = 0,
    mode: Mode = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator | None = None,
) -> Tensor:
    """Normal with standard deviation gain/√fan; see `kaiming_uniform_`."""
    return normal_(tensor, 0.0, _kaiming_std(tensor, a, mode, nonlinearity), generator)


def orthogonal_(tensor: Tensor, gain: float = 1, generator: Generator | None = None) -> Tensor:
    """A (semi-)orthogonal matrix times `gain`; axes after the first count as one.

    Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep linear neural
    networks" (2013).
    """
    _fans(tensor)
    rows = tensor.shape[0]
    columns = math.prod(tensor.shape[1:])
    flat = draws_from(generator).normal((max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(flat)
    q = q * np.sign(np.diagonal(r))  # makes the distribution uniform
    q = q if rows >= columns else q.T
    return _fill(tensor, gain * q.reshape(tensor.shape))
