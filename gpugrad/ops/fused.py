"""Steps of a layer that one kernel does in one pass over memory.

Each is an ordinary primitive whose forward is a composition of other operations; a backend may
have a kernel in its slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.core.primitive import primitive, sample
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.ops import formulas
from gpugrad.ops.samples import distinct, normal

__all__ = ["bias_activation"]


@dataclass(frozen=True)
class Activation:
    """The two formulas of an activation; `from_result` says what its derivative is told."""

    forward: Callable[..., Any]
    partial: Callable[..., Any]
    from_result: bool = False

    def backward(self, m: Any, g: Any, z: Any) -> Any:
        return self.partial(m, g, self.forward(m, z) if self.from_result else z)


def _tanh(m: Any, x: Any) -> Any:
    return m.tanh(x)


#: Every activation that can follow a bias: those that need no numbers of their own.
ACTIVATIONS = {
    "relu": Activation(formulas.relu, formulas.relu_partial, from_result=True),
    "relu6": Activation(formulas.relu6, formulas.relu6_partial),
    "relu_squared": Activation(formulas.relu_squared, formulas.relu_squared_partial),
    "leaky_relu": Activation(formulas.leaky_relu, formulas.leaky_relu_partial),
    "elu": Activation(formulas.elu, formulas.elu_partial),
    "selu": Activation(formulas.selu, formulas.selu_partial),
    "celu": Activation(formulas.celu, formulas.celu_partial),
    "gelu": Activation(formulas.gelu, formulas.gelu_partial),
    "gelu_tanh": Activation(formulas.gelu_tanh, formulas.gelu_tanh_partial),
    "silu": Activation(formulas.silu, formulas.silu_partial),
    "mish": Activation(formulas.mish, formulas.mish_partial),
    "softplus": Activation(formulas.softplus, formulas.softplus_partial),
    "hardtanh": Activation(formulas.hardtanh, formulas.hardtanh_partial),
    "hardswish": Activation(formulas.hardswish, formulas.hardswish_partial),
    "hardsigmoid": Activation(formulas.hardsigmoid, formulas.hardsigmoid_partial),
    "sigmoid": Activation(formulas.sigmoid, formulas.sigmoid_partial, from_result=True),
    "tanh": Activation(_tanh, formulas.tanh_partial, from_result=True),
    "softsign": Activation(formulas.softsign, formulas.softsign_partial),
    "logsigmoid": Activation(formulas.logsigmoid, formulas.logsigmoid_partial),
}


def activation_named(operation: str, name: str) -> Activation:
    """The activation ``name``; ParameterError, listing all, when there is none."""
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ParameterError(
            f"{operation}: no activation {name!r}; there are {', '.join(ACTIVATIONS)}"
        ) from None


@fusible
def bias_activation_backward(
    m: Any, g: Any, x: Any, bias: Any, activation: str, statistics: bool = False,
    bias_home: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of ``x`` and ``bias``, the second into ``bias_home`` if that is given.

    With ``statistics`` a third array: the sum of squares of the first gradient, and how many of its
    elements are not finite.
    """
    gx = ACTIVATIONS[activation].backward(m, g, x + bias)
    gb = m.sum_to(gx, bias.shape)
    if bias_home is not None:
        m.setitem(bias_home, ..., gb)
        gb = bias_home
    if not statistics:
        return gx, gb
    wide = m.astype(gx, m.dtype("float64"))
    bad = m.astype(~m.isfinite(gx), m.dtype("float64"))
    return gx, gb, m.stack([m.sum(wide * wide), m.sum(bad)])


def _bias_activation_vjp(m: Any, g: Any, x: Any, bias: Any, activation: str, bias_home: Any) -> Any:
    return bias_activation_backward(m, g, x, bias, activation, bias_home=bias_home)


def _samples() -> Any:
    x, b = normal((4, 3), 0), normal(3, 1)
    return [
        *(sample(x, b, activation=name) for name in ("gelu", "gelu_tanh", "silu", "tanh")),
        sample(distinct((4, 3)), np.zeros(3), activation="relu"),
        sample(normal((2, 4, 3), 2), b, activation="sigmoid", note="more axes"),
        sample(normal(3, 3), b, activation="mish", note="one row"),
        sample(normal((0, 3), 3), b, activation="mish", note="no rows"),
    ]


def reference(x: Any, bias: Any, activation: str) -> Any:
    """What a bias and an activation make of ``x``, by NumPy."""
    from gpugrad.backend import backend_for_device

    return ACTIVATIONS[activation].forward(backend_for_device("cpu"), x + bias)


@primitive(vjp=_bias_activation_vjp, samples=_samples, reference=reference)
def bias_activation(m: Backend, x: Array, bias: Array, /, activation: str = "gelu") -> Array:
    """``activation(x + bias)``: what follows the product in a layer.

    Parameters
    ----------
    x:
        Shape (..., features).
    bias:
        Shape (features,), the dtype of ``x``.
    activation:
        A name: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"tanh"``, ``"sigmoid"``, and
        the others of ``gpugrad.ops.fused.ACTIVATIONS``, with their default numbers.

    Returns
    -------
    The shape and dtype of ``x``. The sum is not kept for the backward pass; it is computed again.

    >>> import gpugrad as gg
    >>> gg.bias_activation(gg.tensor([[-1.0, 2.0]]), gg.tensor([0.5, 0.5]), activation="relu")
    tensor([[0. , 2.5]])
    """
    chosen = activation_named("bias_activation", activation)
    if bias.ndim != 1 or x.shape[-1:] != bias.shape:
        raise ShapeError(
            f"bias_activation: x of shape {tuple(x.shape)} and bias of shape {tuple(bias.shape)}; "
            "a bias has one axis, as long as the last axis of x"
        )
    y = chosen.forward(m, x + bias)
    return y if y.dtype == x.dtype else m.astype(y, x.dtype)
