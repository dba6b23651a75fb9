"""Activations as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpugrad.backend import as_dtype, backend_for_device
from gpugrad.core.tensor import Parameter, Tensor
from gpugrad.nn import functional as F
from gpugrad.nn.module import Module

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "GLU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "LogSoftmax",
    "Mish",
    "PReLU",
    "ReLU",
    "ReLU6",
    "SELU",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softmin",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
    "Threshold",
]


def name_of(module: Module) -> str | None:
    """The activation that `module` is and does nothing besides, by the name that layers take.

    >>> name_of(GELU("tanh")), name_of(LeakyReLU(0.2))
    ('gelu_tanh', None)
    """
    found = _NAMES.get(type(module))  # a subclass may compute something else
    if found is None or module._hooks:
        return None
    return found if isinstance(found, str) else found(module)


def _show(**values: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


class ReLU(Module):
    """The positive part; the derivative at 0 is 0.

    >>> import gpugrad as gg
    >>> ReLU()(gg.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input)


class ReLU6(Module):
    """The positive part, at most 6."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu6(input)


class LeakyReLU(Module):
    """The input where positive, `negative_slope` times the input elsewhere."""

    def __init__(self, negative_slope: float = 0.01) -> None:
        super().__init__()
        self.negative_slope = negative_slope

    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(input, self.negative_slope)

    def extra_repr(self) -> str:
        return _show(negative_slope=self.negative_slope)


class ELU(Module):
    """The input where positive, alpha·(eˣ − 1) elsewhere."""

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, input: Tensor) -> Tensor:
        return F.elu(input, self.alpha)

    def extra_repr(self) -> str:
        return _show(alpha=self.alpha)


class CELU(Module):
    """The input where positive, alpha·(e^(x/alpha) − 1) elsewhere."""

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, input: Tensor) -> Tensor:
        return F.celu(input, self.alpha)

    def extra_repr(self) -> str:
        return _show(alpha=self.alpha)


class SELU(Module):
    """A scaled ELU that keeps mean 0 and variance 1 from layer to layer."""

    def forward(self, input: Tensor) -> Tensor:
        return F.selu(input)


class GELU(Module):
    """x·Φ(x), Φ being the normal distribution function; `approximate="tanh"` is quicker."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class SiLU(Module):
    """x·sigmoid(x)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(input)


class Mish(Module):
    """x·tanh(softplus(x))."""

    def forward(self, input: Tensor) -> Tensor:
        return F.mish(input)


class Softplus(Module):
    """ln(1 + e^(beta·x))/beta; the input itself where beta·x is above `threshold`."""

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        super().__init__()
        self.beta = beta
        self.threshold = threshold

    def forward(self, input: Tensor) -> Tensor:
        return F.softplus(input, self.beta, self.threshold)

    def extra_repr(self) -> str:
        return _show(beta=self.beta, threshold=self.threshold)


class Hardtanh(Module):
    """The input brought into [min_val, max_val]."""

    def __init__(self, min_val: float = -1.0, max_val: float = 1.0) -> None:
        super().__init__()
        self.min_val = min_val
        self.max_val = max_val

    def forward(self, input: Tensor) -> Tensor:
        return F.hardtanh(input, self.min_val, self.max_val)

    def extra_repr(self) -> str:
        return _show(min_val=self.min_val, max_val=self.max_val)


class Hardswish(Module):
    """x·relu6(x + 3)/6."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardswish(input)


class Hardsigmoid(Module):
    """relu6(x + 3)/6."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardsigmoid(input)


class Sigmoid(Module):
    """1/(1 + e⁻ˣ)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.sigmoid(input)


class LogSigmoid(Module):
    """ln sigmoid(x), without overflow."""

    def forward(self, input: Tensor) -> Tensor:
        return F.logsigmoid(input)


class Tanh(Module):
    """The hyperbolic tangent."""

    def forward(self, input: Tensor) -> Tensor:
        return F.tanh(input)


class Softsign(Module):
    """x/(1 + |x|)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softsign(input)


class Softmax(Module):
    """eˣ over its sum along `dim`, by default the last axis."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim)

    def extra_repr(self) -> str:
        return _show(dim=self.dim)


class LogSoftmax(Module):
    """The logarithm of softmax along `dim`, by default the last axis, without overflow."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return F.log_softmax(input, self.dim)

    def extra_repr(self) -> str:
        return _show(dim=self.dim)


class Softmin(Module):
    """Softmax of the negated input along `dim`, by default the last axis."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return F.softmin(input, self.dim)

    def extra_repr(self) -> str:
        return _show(dim=self.dim)


class Threshold(Module):
    """The input where it exceeds `threshold`, `value` elsewhere."""

    def __init__(self, threshold: float, value: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.value = value

    def forward(self, input: Tensor) -> Tensor:
        return F.threshold(input, self.threshold, self.value)

    def extra_repr(self) -> str:
        return _show(threshold=self.threshold, value=self.value)


class _Shrink(Module):
    def __init__(self, lambd: float = 0.5) -> None:
        super().__init__()
        self.lambd = lambd

    def extra_repr(self) -> str:
        return _show(lambd=self.lambd)


class Softshrink(_Shrink):
    """The input moved by `lambd` towards zero, and 0 within `lambd` of it."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softshrink(input, self.lambd)


class Hardshrink(_Shrink):
    """The input, and 0 within `lambd` of zero."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardshrink(input, self.lambd)


class Tanhshrink(Module):
    """The input less its hyperbolic tangent."""

    def forward(self, input: Tensor) -> Tensor:
        return F.tanhshrink(input)


class GLU(Module):
    """The first half along `dim` times the sigmoid of the second (arXiv:1612.08083).

    >>> import gpugrad as gg
    >>> GLU()(gg.tensor([3.0, 0.0]))
    tensor([1.5])
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return F.glu(input, self.dim)

    def extra_repr(self) -> str:
        return _show(dim=self.dim)


class PReLU(Module):
    """The input where positive, a learned factor times it elsewhere.

    One factor, or one for each of `num_parameters` channels, which are axis 1 of the input; they
    start at `init`. He et al., arXiv:1502.01852.

    >>> import gpugrad as gg
    >>> PReLU()(gg.tensor([-2.0, 3.0])).detach()
    tensor([-0.5,  3. ])
    """

    def __init__(
        self,
        num_parameters: int = 1,
        init: float = 0.25,
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_parameters = num_parameters
        self.init = init
        host = np.full(num_parameters, init, as_dtype(dtype or "float32"))
        self.weight = Parameter(backend_for_device(device or "cpu").asarray(host, device=device))

    def forward(self, input: Tensor) -> Tensor:
        return F.prelu(input, self.weight)

    def extra_repr(self) -> str:
        return _show(num_parameters=self.num_parameters)


#: Activations that can be a step of another operation: their names there, for the numbers that
#: they have there.
_NAMES: dict[type[Module], str | Callable[[Any], str | None]] = {
    ReLU: "relu",
    ReLU6: "relu6",
    LeakyReLU: lambda a: "leaky_relu" if a.negative_slope == 0.01 else None,
    ELU: lambda a: "elu" if a.alpha == 1 else None,
    CELU: lambda a: "celu" if a.alpha == 1 else None,
    SELU: "selu",
    GELU: lambda a: {"none": "gelu", "tanh": "gelu_tanh"}.get(a.approximate),
    SiLU: "silu",
    Mish: "mish",
    Softplus: lambda a: "softplus" if (a.beta, a.threshold) == (1, 20) else None,
    Hardtanh: lambda a: "hardtanh" if (a.min_val, a.max_val) == (-1, 1) else None,
    Hardswish: "hardswish",
    Hardsigmoid: "hardsigmoid",
    Sigmoid: "sigmoid",
    LogSigmoid: "logsigmoid",
    Tanh: "tanh",
    Softsign: "softsign",
}
