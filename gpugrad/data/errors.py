"""What can be wrong with data, one exception class per kind."""

from __future__ import annotations

from typing import Any

from gpugrad.errors import GpugradError

__all__ = [
    "DataCorruptError",
    "DataError",
    "DataLoaderError",
    "DataNotFoundError",
    "NonFiniteDataError",
]


class DataError(GpugradError, ValueError):
    """Data that cannot be used; the base of every error `gpugrad.data` raises about data."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A data set that is not where it was looked for; the message says how to get it."""


class DataCorruptError(DataError):
    """A file whose bytes contradict its format: truncated, damaged, or of another kind."""


class DataLoaderError(DataError, RuntimeError):
    """A batch that could not be loaded; `__cause__` is what the data set raised.

    `index` is that of the example at fault, None where it is not known; `indices` are those of the
    whole batch.
    """

    def __init__(self, message: str, index: Any, indices: tuple[Any, ...] = ()) -> None:
        super().__init__(message, index, indices)
        self.index = index
        self.indices = indices

    def __str__(self) -> str:
        return str(self.args[0])


class NonFiniteDataError(DataError):
    """Features that hold NaN or infinity.

    `array` names the array, `count` says how many of its values are not finite, and `first_index`
    is the index of the first of them.
    """

    def __init__(self, array: str, count: int, size: int, first_index: tuple[int, ...]) -> None:
        super().__init__(array, count, size, first_index)
        self.array = array
        self.count = count
        self.size = size
        self.first_index = first_index

    def __str__(self) -> str:
        return (
            f"{self.array}: {self.count} of {self.size} values are NaN or infinite, the first at "
            f"index {self.first_index}; drop or impute those examples before training"
        )
