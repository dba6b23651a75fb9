"""What a training run is made of, and the net that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpugrad import nn, optim
from gpugrad.errors import GpugradError

__all__ = [
    "ACTIVATIONS",
    "DEFAULTS",
    "DTYPES",
    "OPTIMIZERS",
    "Config",
    "ConfigError",
    "build_net",
    "build_optimizer",
    "make_config",
    "option",
]

#: Activations by the name that `--activation` takes.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "gelu": nn.GELU,
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

OPTIMIZERS = ("sgd", "adamw")
DTYPES = ("float32", "float64")


class ConfigError(GpugradError, ValueError):
    """Options of a run that cannot be."""


@dataclass(frozen=True)
class Config:
    """Everything that decides the course of a run; it is stored with every checkpoint.

    `depth` counts hidden layers of `width` units each. The learning rate is multiplied by
    `lr_decay` after every epoch, whatever their number, so that a run can be made longer. `clip`
    bounds the global norm of the gradients, 0 leaves them as they are. `momentum` is for sgd alone.
    """

    data: str
    width: int = 256
    depth: int = 3
    activation: str = "relu"
    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-3
    lr_decay: float = 1.0
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.01
    label_smoothing: float = 0.1
    clip: float = 1.0
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, least in (
            ("width", 1),
            ("depth", 0),
            ("epochs", 1),
            ("batch_size", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{option(name)} is {value}; it must be at least {least}")
        for name in ("lr", "momentum", "weight_decay", "clip"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"{option(name)} is {value}; it must be finite and zero or more")
        for name in ("lr_decay", "label_smoothing"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{option(name)} is {value}; it must be from 0 to 1")
        for name, known in (
            ("activation", ACTIVATIONS),
            ("optimizer", OPTIMIZERS),
            ("dtype", DTYPES),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"{option(name)} is {value!r}; choose from {', '.join(known)}")


#: Data sets that ask for other numbers than the rest.
DEFAULTS: dict[str, dict[str, Any]] = {
    "fashion-mnist": {"epochs": 10, "lr_decay": 0.85},
}


def make_config(data: str, given: Mapping[str, Any]) -> Config:
    """The configuration for a data set, with its own defaults where nothing is given.

    >>> make_config("fashion-mnist", {"width": 64}).epochs
    10
    """
    return Config(**{**DEFAULTS.get(data, {}), **given, "data": data})


def option(name: str) -> str:
    """A field of the configuration as it is written on the command line."""
    return "--" + name.replace("_", "-")


def build_net(config: Config, features: int, classes: int) -> nn.Sequential:
    """A multilayer perceptron from `features` inputs to `classes` scores, newly initialised.

    >>> build_net(Config("digits", width=32, depth=1), 64, 10)
    Sequential(
      (0): Linear(in_features=64, out_features=32, bias=True)
      (1): ReLU()
      (2): Linear(in_features=32, out_features=10, bias=True)
    )
    """
    net = nn.Sequential()
    for _ in range(config.depth):
        net.append(_linear(config, features, config.width))
        net.append(ACTIVATIONS[config.activation]())
        features = config.width
    return net.append(_linear(config, features, classes))


def _linear(config: Config, features: int, outputs: int) -> nn.Linear:
    # The layer's own start shrinks the signal by √6 a layer, which trains worse on small data.
    layer = nn.Linear(features, outputs, dtype=config.dtype)
    nn.init.kaiming_normal_(layer.weight, nonlinearity=_GAINS.get(config.activation, "relu"))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def build_optimizer(config: Config, net: nn.Module) -> optim.Optimizer:
    """The optimiser that a run asks for."""
    if config.optimizer == "sgd":
        return optim.SGD(
            net.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        )
    return optim.AdamW(net.parameters(), config.lr, weight_decay=config.weight_decay)
