"""A record as it grows, in the terminal: a sparkline for every layer, and the verdict."""

from __future__ import annotations

import math
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from gpugrad.errors import GpugradError
from gpugrad.health.page_charts import number
from gpugrad.health.page_thin import Columns
from gpugrad.health.record import Record
from gpugrad.health.verdict import judge

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

__all__ = ["LiveError", "LiveView", "sparkline", "view"]

#: Layers shown at once, if the terminal is not lower.
ROWS = 24
BARS = "▁▂▃▄▅▆▇█"
TONES = {"healthy": "green", "exploding": "red", "vanishing": "red", "non-finite": "red",
         "diverging": "red"}  # fmt: skip


class LiveError(GpugradError, RuntimeError):
    """rich is not there; the message says how to install it."""


def sparkline(values: Any, width: int = 24, low: float | None = None, high: float | None = None,
              *, log: bool = True) -> str:  # fmt: skip
    """Values as a row of bars: the last of each stretch that one bar stands for.

    Parameters
    ----------
    values:
        Numbers in their order; × stands for NaN and infinity.
    width:
        Bars at most.
    low, high:
        What the lowest and the highest bar stand for; by default the least and greatest value.
    log:
        Whether bars grow with the logarithm; what is not positive then has the lowest bar.

    >>> sparkline([1, 10, 100, 1000]), sparkline([0, 1, 2, float("nan")], log=False)
    ('▁▃▆█', '▁▅█×')
    """
    x: NDArray[np.float64] = np.asarray(values, np.float64)
    if len(x) > width:
        x = x[np.rint(np.linspace(0, len(x) - 1, width)).astype(int)]
    broken = ~np.isfinite(x)
    ends = np.array([np.nan if v is None else v for v in (low, high)])
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            x, ends = (np.where(v > 0, np.log10(v), np.where(v == 0, -np.inf, np.nan))
                       for v in (x, ends))  # fmt: skip
    known = x[np.isfinite(x)]
    if not known.size:
        return "".join("×" if b else BARS[0] for b in broken)
    bottom = float(ends[0]) if math.isfinite(ends[0]) else float(known.min())
    top = float(ends[1]) if math.isfinite(ends[1]) else float(known.max())
    share = (x - bottom) / (top - bottom) if top > bottom else np.full(len(x), 0.5)
    level = np.clip(np.nan_to_num(share, neginf=0), 0, 1) * (len(BARS) - 1)
    return "".join("×" if b else BARS[int(v + 0.5)] for b, v in zip(broken, level))


def view(record: Record, *, rows: int = ROWS, width: int = 24, headline: bool = True) -> Table:
    """A table of the layers: the gradient norm over the steps as a sparkline, and its last value.

    Bars of all layers have one scale, so that a net that explodes or vanishes shows a staircase.
    Of more layers than `rows` those are left out whose neighbours are shown. The verdict is the
    `headline`. Needs rich.
    """
    _need_rich()
    from rich.table import Table
    from rich.text import Text

    title, tone = "nothing recorded yet", "dim"
    if len(record):
        title, tone = f"step {record.steps[-1]:,}", ""
        loss = record.scalars["loss"]
        if not np.isnan(loss).all():
            title += f", loss {number(loss[-1])} {sparkline(loss, width)}"
        if headline:
            worst = judge(record).findings[0]
            title, tone = f"{worst.text}\n{title}", TONES.get(worst.kind, "yellow")
    table = Table(title=Text(title, style=tone), box=None, title_justify="left", pad_edge=False)
    table.add_column("layer", no_wrap=True, overflow="ellipsis", max_width=28)
    table.add_column("gradient norm", no_wrap=True)
    for name in ("last", "update", "flat"):
        table.add_column(name, justify="right", no_wrap=True)
    if not len(record):
        return table
    v = record.values
    norms = v["gradient_norm"]
    broken = v["gradient_nonfinite"] > 0
    layers = np.flatnonzero((~np.isnan(norms) | broken).any(0))
    if len(layers) > rows:
        layers = layers[np.unique(np.rint(np.linspace(0, len(layers) - 1, rows)).astype(int))]
    columns = Columns.of(record.steps, width)
    shown = np.where(columns.any(broken), np.nan, columns.greatest(norms))
    positive = shown[np.isfinite(shown) & (shown > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (None, None)
    # What is flat, saturated or dead, is told of the activation that follows a layer.
    flat = np.fmax(v["saturated"][-1], v["dead"][-1])
    ends = [*layers[1:].tolist(), len(record.layers)]
    for i, end in zip(layers.tolist(), ends):
        after = flat[i:end]
        share = float(np.nanmax(after)) if (~np.isnan(after)).any() else math.nan
        table.add_row(
            f"{record.layers[i]} {record.kinds[i]}",
            Text(sparkline(shown[:, i], width, low, high), style="red" if broken[-1, i] else ""),
            "NaN" if broken[-1, i] else number(norms[-1, i]),
            "" if math.isnan(ratio := float(v["update_ratio"][-1, i])) else number(ratio, 2),
            "" if math.isnan(share) else f"{100 * share:.0f} %",
        )
    return table


class LiveView:
    """Keeps the table of a growing record at the bottom of the terminal.

    Parameters
    ----------
    record:
        The one that is being written.
    console:
        Of rich; by default its own.

    A context manager; call `update` when rows have come, every time if you like: it draws at most
    four times a second. LiveError without rich.

    >>> record = Record(["0"], ["Linear"])
    >>> with LiveView(record) as live:  # doctest: +SKIP
    ...     record.append(1, {"gradient_norm": [0.5]}, {"loss": 2.0})
    ...     live.update()
    """

    def __init__(self, record: Record, console: Console | None = None) -> None:
        _need_rich()
        from rich.live import Live

        self.record = record
        self._seen = -1
        self._table: RenderableType = view(record)
        self._live: Live = Live(
            console=console, get_renderable=self._render, refresh_per_second=4, transient=False
        )

    def _render(self) -> RenderableType:
        return self._table

    def update(self) -> None:
        """Take in what has come; nothing happens when nothing has."""
        last = int(self.record.steps[-1]) if len(self.record) else 0
        if last != self._seen:
            self._seen = last
            rows = max(4, min(ROWS, self._live.console.height - 6))
            self._table = view(self.record, rows=rows)

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.update()
        self._live.stop()


def _need_rich() -> None:
    try:
        import rich  # noqa: F401
    except ImportError:
        raise LiveError(
            "a view in the terminal needs rich, which is not installed; pip install 'gpugrad[cli]'"
        ) from None
