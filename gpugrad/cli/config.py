"""What a training run is made of, and the net that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gpugrad import nn, optim
from gpugrad.errors import GpugradError

__all__ = ["ACTIVATIONS", "DTYPES", "OPTIMIZERS", "Config", "ConfigError", "build_net", "build_optimizer"]

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

OPTIMIZERS = ("sgd", "adamw")
DTYPES = ("float32", "float64")


class ConfigError(GpugradError, ValueError):
    """Options of a run that cannot be."""


@dataclass(frozen=True)
class Config:
    """Everything that decides the course of a run; it is stored with every checkpoint.

    `depth` counts hidden layers of `width` units each; `clip` bounds the global norm of the
    gradients, 0 leaves them as they are. `momentum` is for sgd alone.
    """

    data: str
    width: int = 256
    depth: int = 2
    activation: str = "relu"
    epochs: int = 12
    batch_size: int = 64
    lr: float = 1e-3
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.01
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
        for name, known in (
            ("activation", ACTIVATIONS),
            ("optimizer", OPTIMIZERS),
            ("dtype", DTYPES),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"{option(name)} is {value!r}; choose from {', '.join(known)}")


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
        net.append(nn.Linear(features, config.width, dtype=config.dtype))
        net.append(ACTIVATIONS[config.activation]())
        features = config.width
    return net.append(nn.Linear(features, classes, dtype=config.dtype))


def build_optimizer(config: Config, net: nn.Module) -> optim.Optimizer:
    """The optimiser that a run asks for."""
    if config.optimizer == "sgd":
        return optim.SGD(
            net.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        )
    return optim.AdamW(net.parameters(), config.lr, weight_decay=config.weight_decay)
