"""What can be wrong with a checkpoint, one exception class per kind."""

from __future__ import annotations

from gpugrad.errors import GpugradError

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointMismatchError",
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


class CheckpointMismatchError(CheckpointError):
    """A checkpoint whose tensors are not those of the model.

    `missing`, `unexpected`, `wrong_shape` and `wrong_dtype` list the names of the tensors.
    """

    def __init__(
        self,
        message: str,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        wrong_shape: tuple[str, ...] = (),
        wrong_dtype: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, missing, unexpected, wrong_shape, wrong_dtype)
        self.missing = missing
        self.unexpected = unexpected
        self.wrong_shape = wrong_shape
        self.wrong_dtype = wrong_dtype

    def __str__(self) -> str:
        return str(self.args[0])
