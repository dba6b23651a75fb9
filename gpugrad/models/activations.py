"""Activations by name, and the gain that keeps a signal's size behind each."""

from __future__ import annotations

from collections.abc import Callable

from gpugrad import nn
from gpugrad.errors import ParameterError

__all__ = ["ACTIVATIONS", "activation", "gain_of"]

#: What makes an activation, by its name.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "hardtanh": nn.Hardtanh,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "sigmoid": nn.Sigmoid,
    "logsigmoid": nn.LogSigmoid,
    "tanh": nn.Tanh,
}

#: Activations that do not halve the signal as a rectifier does, by the name of their gain.
_GAINS = {
    "selu": "linear",
    "softsign": "tanh",
    "hardtanh": "tanh",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "hardsigmoid": "sigmoid",
    "logsigmoid": "sigmoid",
}


def activation(name: str) -> nn.Module:
    """A new module; ParameterError, listing all names, when there is none of this one.

    >>> activation("tanh")
    Tanh()
    """
    if name not in ACTIVATIONS:
        raise ParameterError(f"activation: {name!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def gain_of(name: str) -> str:
    """What `nn.init.kaiming_normal_` takes as the nonlinearity behind a layer.

    >>> gain_of("gelu"), gain_of("selu")
    ('relu', 'linear')
    """
    return _GAINS.get(name, "relu")
