"""Checkpoints, and the packing of training state into them."""

from __future__ import annotations

from gpugrad.io.checkpoint import load, save
from gpugrad.io.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWriteError,
)
from gpugrad.io.state import pack, unpack

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CheckpointWriteError",
    "load",
    "pack",
    "save",
    "unpack",
]
