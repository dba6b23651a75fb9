"""What can be wrong with a checkpoint, one exception class per kind."""

from __future__ import annotations

from gpugrad.errors import GpugradError

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CheckpointWriteError",
]


class CheckpointError(GpugradError, ValueError):
    """A checkpoint that cannot be used; the base of every error `gpugrad.io` raises about one."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the path."""


class CheckpointCorruptError(CheckpointError):
    """The bytes of a checkpoint contradict its format or its checksums."""


class CheckpointWriteError(CheckpointError, OSError):
    """A checkpoint could not be written; the message says what became of the previous one."""
