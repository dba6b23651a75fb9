"""Optimisers and schedules, with PyTorch's names, defaults and trajectories, and the loss scale.

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

from gpugrad.optim import lr_scheduler
from gpugrad.optim.algorithms import SGD, Adagrad, Adam, AdamW, Lion, RMSprop
from gpugrad.optim.averaging import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)
from gpugrad.optim.errors import OptimizerError
from gpugrad.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
    WarmupCosineLR,
)
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
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
    "WarmupCosineLR",
    "lr_scheduler",
]
