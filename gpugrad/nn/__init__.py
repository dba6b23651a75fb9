"""Nets: modules, layers, losses and initial values, with PyTorch's names and semantics."""

from __future__ import annotations

from gpugrad.core.tensor import Parameter
from gpugrad.nn import functional, init, utils
from gpugrad.nn.activations import (
    CELU,
    ELU,
    GELU,
    SELU,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    LogSigmoid,
    LogSoftmax,
    Mish,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Softsign,
    Tanh,
)
from gpugrad.nn.containers import ModuleList, Sequential
from gpugrad.nn.errors import ModuleError, StateDictError
from gpugrad.nn.layers import Dropout, Embedding, Flatten, Identity, Linear
from gpugrad.nn.losses import CrossEntropyLoss, MSELoss
from gpugrad.nn.module import IncompatibleKeys, Module
from gpugrad.nn.normalization import BatchNorm1d, BatchNorm2d, GroupNorm, LayerNorm, RMSNorm
from gpugrad.nn.random import Generator, default_generator, manual_seed

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "SELU",
    "BatchNorm1d",
    "BatchNorm2d",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "Flatten",
    "Generator",
    "GroupNorm",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "Identity",
    "IncompatibleKeys",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LogSigmoid",
    "LogSoftmax",
    "MSELoss",
    "Mish",
    "Module",
    "ModuleError",
    "ModuleList",
    "Parameter",
    "RMSNorm",
    "ReLU",
    "ReLU6",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Softsign",
    "StateDictError",
    "Tanh",
    "default_generator",
    "functional",
    "init",
    "manual_seed",
    "utils",
]
