"""A record, and the parameters of a model, as scalars and histograms for TensorBoard."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from gpugrad.health.record import SCALARS, STATISTICS, Record

__all__ = ["Board", "write", "write_histograms"]


class Board(Protocol):
    """What can be written to: the TensorBoard of `gpugrad.cli.tensorboard`, or one like it."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """One number for each name."""

    def histogram(self, name: str, array: Any, step: int) -> None:
        """How the elements of an array are distributed."""


def write(board: Board, record: Record, *, since: int = 0) -> int:
    """Write the rows of a record that come after step `since`; returns the last step written.

    Every statistic of a layer is a curve `health/<statistic>/<layer>`, so that the layers of one
    statistic stand side by side, every scalar one of `health/`. The logarithms of the layers'
    gradient norms make a histogram of each step, whose width shows how unlike they are. What is
    not known is left out.

    Called again with what it returned, it writes what has come since.

    >>> class Shown:
    ...     def scalars(self, values, step):
    ...         print(step, values)
    ...     def histogram(self, name, array, step):
    ...         print(step, name, array)
    >>> record = Record(["0"], ["Linear"])
    >>> record.append(5, {"gradient_norm": [0.25]}, {"loss": 2.0})
    >>> write(Shown(), record)
    5 {'health/loss': 2.0, 'health/gradient_norm/0': 0.25}
    5 health/log10_gradient_norm [-0.60206]
    5
    """
    values, scalars = record.values, record.scalars
    for row in np.flatnonzero(record.steps > since).tolist():
        step = since = int(record.steps[row])
        found = {f"health/{name}": float(scalars[name][row]) for name in SCALARS}
        for name in STATISTICS:
            numbers = values[name][row].tolist()
            found |= {f"health/{name}/{a}": v for a, v in zip(record.layers, numbers)}
        known = {name: v for name, v in found.items() if v == v}
        if known:
            board.scalars(known, step)
        norms = values["gradient_norm"][row]
        norms = norms[np.isfinite(norms) & (norms > 0)]
        if norms.size:
            board.histogram("health/log10_gradient_norm", np.log10(norms), step)
    return since


def write_histograms(board: Board, model: Any, step: int) -> None:
    """Write how the elements of every parameter of a model, and of its gradient, are distributed.

    They are copied to the host: call it now and then, not in every step.
    """
    for name, parameter in model.named_parameters():
        board.histogram(f"parameters/{name}", parameter.detach().cpu().numpy(), step)
        if parameter.grad is not None:
            board.histogram(f"gradients/{name}", parameter.grad.detach().cpu().numpy(), step)
