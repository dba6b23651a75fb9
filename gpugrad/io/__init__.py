"""Checkpoints, and the packing of training state into them."""

from __future__ import annotations

from gpugrad.io.checkpoint import check_matches, load, save
from gpugrad.io.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointWriteError,
)
from gpugrad.io.state import pack, unpack

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointWriteError",
    "check_matches",
    "load",
    "pack",
    "save",
    "unpack",
]
