"""What gradient health refuses, and what it finds."""

from __future__ import annotations

from typing import Any

from gpugrad.errors import GpugradError, ParameterError

__all__ = ["AnomalyError", "HealthError", "RecordError"]


class HealthError(ParameterError):
    """A model, an optimiser or a setting that cannot be watched."""


class RecordError(HealthError):
    """A record that does not fit its layers, or a file that holds none."""


class AnomalyError(GpugradError, FloatingPointError):
    """A NaN or an infinity, where it first appeared.

    Attributes
    ----------
    operation:
        The name of the operation that made it out of finite numbers.
    where:
        "forward", "backward", or "update".
    line:
        The line of the user's code that ran the operation, as "file:line: text"; "" if unknown.
    layer:
        The path of the layer in the model, with its class; "" outside of every layer.
    inputs:
        What went in: for each array its shape, dtype, smallest and largest finite element, and how
        many are NaN or infinite.
    step:
        The number of the training step, counted from 1; None where nobody counts.
    """

    def __init__(
        self,
        message: str,
        *,
        operation: str = "",
        where: str = "forward",
        line: str = "",
        layer: str = "",
        inputs: tuple[Any, ...] = (),
        step: int | None = None,
    ) -> None:
        super().__init__(message)
        self.operation = operation
        self.where = where
        self.line = line
        self.layer = layer
        self.inputs = inputs
        self.step = step
