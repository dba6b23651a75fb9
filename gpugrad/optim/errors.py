"""What an optimiser refuses."""

from __future__ import annotations

from gpugrad.errors import ParameterError

__all__ = ["OptimizerError"]


class OptimizerError(ParameterError):
    """Parameters that cannot be trained, or hyperparameters outside their range."""
