"""Pictures of a record for papers and notebooks, drawn by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpugrad.errors import GpugradError
from gpugrad.health.errors import HealthError
from gpugrad.health.page_thin import Columns
from gpugrad.health.record import STATISTICS, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "FigureError",
    "clipping",
    "heat_map",
    "loss",
    "ranges",
    "signal",
    "update_ratios",
]

Array = NDArray[Any]

#: Columns of a picture at most: more cannot be told apart.
COLUMNS = 800

#: Statistics that are shares, from 0 to 1; the others are shown on a logarithmic scale.
SHARES = ("saturated", "dead", "gradient_zeros")
SIGNED = ("parameter_min", "parameter_max", "activation_mean", "activation_min", "activation_max")


class FigureError(GpugradError, RuntimeError):
    """matplotlib is not there; the message says how to install it."""


def heat_map(record: Record, statistic: str = "gradient_norm") -> Figure:
    """A statistic of every layer over the steps: layers from top to bottom, a colour for a value.

    Parameters
    ----------
    record:
        What to draw.
    statistic:
        A name of :data:`gpugrad.health.STATISTICS`. Each column shows the greatest value of its
        steps, on a logarithmic scale unless the statistic is a share or has a sign. Cells with NaN
        or infinite gradients are red, and those where nothing is known are empty.

    Returns a `matplotlib.figure.Figure`, which belongs to no window: `figure.savefig("a.svg")`.

    Raises HealthError when nothing is recorded of the statistic, and FigureError without
    matplotlib.

    >>> record = Record(["0", "1"], ["Linear", "Linear"])
    >>> for step in range(1, 9):
    ...     record.append(step, {"gradient_norm": [0.1 / step, 1.0 / step]}, {})
    >>> heat_map(record).axes[0].get_title()  # doctest: +SKIP
    'gradient_norm'
    """
    if statistic not in STATISTICS:
        raise HealthError(
            f"heat_map: {statistic!r} is no statistic; there are {', '.join(STATISTICS)}"
        )
    values = _of(record, statistic)
    broken = np.isinf(values)
    if statistic.startswith("gradient"):
        broken |= record.values["gradient_nonfinite"] > 0
    layers = np.flatnonzero((~np.isnan(values) | broken).any(0))
    columns = Columns.of(record.steps, COLUMNS)
    shown = columns.greatest(np.where(broken, np.nan, values)[:, layers]).T
    spoilt = columns.any(broken[:, layers]).T
    figure, (axes,) = _figure(1, height=max(2.5, min(9.0, 1.2 + 0.22 * len(layers))))
    from matplotlib.colors import ListedColormap, LogNorm, Normalize

    norm: Any = None
    if statistic in SHARES:
        norm = Normalize(0, 1)
    elif statistic not in SIGNED and (positive := shown[shown > 0]).size:
        norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.001))
    extent = (columns.first - 0.5, columns.last + 0.5, len(layers) - 0.5, -0.5)
    image = axes.imshow(
        shown, aspect="auto", interpolation="nearest", cmap="viridis", norm=norm, extent=extent
    )
    if spoilt.any():
        axes.imshow(
            np.ma.masked_equal(spoilt, False), aspect="auto", interpolation="nearest",
            cmap=ListedColormap(["#ff1f6b"]), extent=extent,
        )  # fmt: skip
    every = max(1, math.ceil(len(layers) / 30))
    axes.set_yticks(range(0, len(layers), every), [record.layers[i] for i in layers[::every]])
    axes.set_xlabel("step")
    axes.set_title(statistic)
    figure.colorbar(image, ax=axes)
    return figure


def loss(record: Record) -> Figure:
    """The loss over the steps; errors as of :func:`heat_map`."""
    values = _of(record, "loss")
    figure, (axes,) = _figure(1)
    axes.plot(record.steps, values, linewidth=1)
    known = values[np.isfinite(values)]
    if known.size and known.min() > 0 and known.max() > 50 * known.min():
        axes.set_yscale("log")
    _labels(axes, "loss")
    return figure


def clipping(record: Record) -> Figure:
    """Norm of the gradients before clipping, and the coefficient; errors as of :func:`heat_map`."""
    norm = _of(record, "norm")
    figure, (upper, lower) = _figure(2)
    upper.plot(record.steps, norm, linewidth=1, color="C1")
    upper.set_yscale("log")
    _labels(upper, "norm before clipping")
    lower.plot(record.steps, record.scalars["coefficient"], linewidth=1, color="C4")
    lower.axhline(1.0, linestyle="--", color="grey", linewidth=1)
    _labels(lower, "clip coefficient")
    return figure


def update_ratios(record: Record) -> Figure:
    """How far steps move each layer, relative to its norm, and the guide at 0.001.

    Errors as of :func:`heat_map`.
    """
    values = _of(record, "update_ratio")
    figure, (axes,) = _figure(1)
    _per_layer(axes, record, values)
    axes.axhline(1e-3, linestyle="--", color="grey", linewidth=1)
    _labels(axes, "|change| / |parameters|")
    return figure


def signal(record: Record) -> Figure:
    """The backward signal from layer to layer, at first and in the end.

    Errors as of :func:`heat_map`.
    """
    values = _of(record, "signal")
    layers = np.flatnonzero((~np.isnan(values)).any(0))
    rows = np.flatnonzero((~np.isnan(values)).any(1))
    figure, (axes,) = _figure(1)
    for row in dict.fromkeys((int(rows[0]), int(rows[-1]))):
        axes.plot(values[row, layers], marker=".", label=f"step {record.steps[row]}")
    axes.set_yscale("log")
    every = max(1, math.ceil(len(layers) / 12))
    names = [record.layers[i] for i in layers[::every]]
    axes.set_xticks(range(0, len(layers), every), names, rotation=45, ha="right")
    axes.set_ylabel("rms of ∂loss/∂output")
    axes.legend()
    return figure


def ranges(
    record: Record,
    of: Literal["activation", "parameter"] = "activation",
    layers: Sequence[str] | None = None,
) -> Figure:
    """From least to greatest value, or parameter, of every layer over the steps; a panel each.

    Parameters
    ----------
    of:
        `"activation"`, with mean and standard deviation, or `"parameter"`.
    layers:
        Paths of the layers to show; by default all that are known, up to 16 over the whole depth.

    Errors as of :func:`heat_map`, and HealthError for a layer that is not there.
    """
    if of not in ("activation", "parameter"):
        raise HealthError(f"ranges: of={of!r}; it is 'activation' or 'parameter'")
    low, high = _of(record, f"{of}_min"), _of(record, f"{of}_max")
    if layers is None:
        known = np.flatnonzero((~np.isnan(low)).any(0))
        pick = np.unique(np.rint(np.linspace(0, len(known) - 1, 16)).astype(int))
        chosen = known[pick].tolist()
    else:
        if missing := [name for name in layers if name not in record.layers]:
            raise HealthError(f"ranges: there is no layer {', '.join(missing)} in the record")
        chosen = [record.layers.index(name) for name in layers]
    figure, panels = _figure(len(chosen), columns=2 if len(chosen) <= 4 else 4)
    steps = record.steps
    for axes, i in zip(panels, chosen):
        axes.fill_between(steps, low[:, i], high[:, i], alpha=0.3, linewidth=0)
        if of == "activation":
            mean, std = (record.values[f"activation_{s}"][:, i] for s in ("mean", "std"))
            axes.fill_between(steps, mean - std, mean + std, alpha=0.4, linewidth=0, color="C1")
            axes.plot(steps, mean, linewidth=1, color="C1")
        axes.set_title(f"{record.layers[i]} {record.kinds[i]}", fontsize="small")
    return figure


def _of(record: Record, name: str) -> Array:
    """The values of a statistic or scalar; HealthError when none is known."""
    values = record.values[name] if name in STATISTICS else record.scalars[name]
    if not values.size or np.isnan(values).all():
        raise HealthError(f"the record has no {name}")
    return values


def _figure(panels: int, height: float = 3.2, columns: int = 1) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FigureError(
            "figures need matplotlib, which is not installed; pip install 'gpugrad[plots]', or "
            "write a page with gpugrad.health.report, which needs nothing"
        ) from None
    rows = math.ceil(panels / columns)
    height = height if rows == 1 else 2.1 * rows
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=columns > 1 or rows > 1, squeeze=False).ravel()
    for empty in axes[panels:]:
        empty.remove()
    return figure, list(axes[:panels])


def _labels(axes: Axes, name: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(name)


def _per_layer(axes: Axes, record: Record, values: Array) -> None:
    from matplotlib import colormaps

    layers = np.flatnonzero((~np.isnan(values)).any(0)).tolist()
    for k, i in enumerate(layers):
        colour = colormaps["viridis"](k / max(1, len(layers) - 1))
        label = record.layers[i] if len(layers) <= 10 else None
        axes.plot(record.steps, values[:, i], linewidth=1, color=colour, label=label)
    axes.set_yscale("log")
    if len(layers) <= 10:
        axes.legend(fontsize="small", ncols=2)
