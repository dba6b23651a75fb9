"""Whole nets, ready to train: perceptrons, convolutional, residual and recurrent nets, and GPT."""

from __future__ import annotations

from gpugrad.models.convolutional import CNN
from gpugrad.models.gpt import GPT
from gpugrad.models.mlp import MLP
from gpugrad.models.recurrent import RecurrentLM
from gpugrad.models.residual import ResNet

__all__ = ["CNN", "GPT", "MLP", "RecurrentLM", "ResNet"]
