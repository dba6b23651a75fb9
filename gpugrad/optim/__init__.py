"""Optimisers, with PyTorch's names, defaults and trajectories, and the loss scale.

A step owns the order unscale, norm, clip, skip, update, on the device:

>>> import gpugrad as gg
>>> from gpugrad import nn
>>> net = nn.Linear(3, 1)
>>> optimizer = gg.optim.AdamW(net.named_parameters(), lr=0.1)
>>> net(gg.ones((2, 3))).sum().backward()
>>> optimizer.step(clip=1.0, nonfinite="skip")
>>> optimizer.skipped.item()
0
"""

from __future__ import annotations

from gpugrad.optim.algorithms import SGD, Adagrad, Adam, AdamW, Lion, RMSprop
from gpugrad.optim.errors import OptimizerError
from gpugrad.optim.optimizer import Optimizer
from gpugrad.optim.rules import RULES, UpdateRule
from gpugrad.optim.scaler import GradScaler, ScalerError

__all__ = [
    "RULES",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "GradScaler",
    "Lion",
    "Optimizer",
    "OptimizerError",
    "RMSprop",
    "ScalerError",
    "UpdateRule",
]
