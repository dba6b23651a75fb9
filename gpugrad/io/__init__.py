"""Checkpoints in safetensors: arrays, models, and the whole state of a training run."""

from __future__ import annotations

from gpugrad.io.checkpoint import load, read_metadata, save
from gpugrad.io.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWriteError,
)
from gpugrad.io.models import load_model, save_model
from gpugrad.io.state import pack, unpack
from gpugrad.io.training import Checkpoints, collect, restore

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CheckpointWriteError",
    "Checkpoints",
    "collect",
    "load",
    "load_model",
    "pack",
    "read_metadata",
    "restore",
    "save",
    "save_model",
    "unpack",
]
