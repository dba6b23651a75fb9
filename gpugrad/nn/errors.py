"""What can be wrong with a module or its state, one exception class per kind."""

from __future__ import annotations

from gpugrad.errors import GpugradError

__all__ = ["ModuleError", "StateDictError"]


class ModuleError(GpugradError, TypeError):
    """A module that is put together wrongly: a bad name, a tensor in a parameter's place."""


class StateDictError(GpugradError, ValueError):
    """A state that does not fit the module, or the optimiser, that was to take it.

    `missing`, `unexpected`, `wrong_shape` and `wrong_dtype` list the names of the tensors. Nothing
    was changed when this is raised.
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
