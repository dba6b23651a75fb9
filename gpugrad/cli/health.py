"""What `gpugrad health` does, and the live view of `gpugrad train --live`."""

from __future__ import annotations

import webbrowser
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.text import Text

from gpugrad.cli.display import Display
from gpugrad.cli.training import Reading, Run
from gpugrad.health import board
from gpugrad.health.live import LiveView, view
from gpugrad.health.page import read_record, report
from gpugrad.health.verdict import judge

__all__ = ["LiveWatch", "show"]


def show(
    console: Console,
    run: Path,
    out: Path | None = None,
    events: Path | None = None,
    *,
    open_: bool = False,
) -> Path:
    """Print what is wrong with a run, write the report on it, and return where that is.

    Parameters
    ----------
    run:
        A folder with a record, or the file.
    out:
        The page to write; by default it lies beside the record.
    events:
        A folder to write the record to, too, for TensorBoard.
    open_:
        Show the page in the browser.
    """
    record = read_record(run)
    if len(record):
        console.print(Text(str(judge(record))), soft_wrap=True)
        console.print(view(record, headline=False))
    else:
        console.print("no step was recorded")
    title = run.resolve().name if run.is_dir() else run.stem
    page = report(record, out or _beside(run), title=title)
    console.print(str(page), soft_wrap=True, markup=False)
    if events is not None:
        from gpugrad.cli.tensorboard import TensorBoard

        with TensorBoard(events) as log:
            board.write(log, record)
        console.print(f"tensorboard --logdir {events}", soft_wrap=True, markup=False)
    if open_:
        webbrowser.open(page.resolve().as_uri())
    return page


def _beside(run: Path) -> Path:
    return run / "health.html" if run.is_dir() else run.with_suffix(".html")


class LiveWatch:
    """Keeps the health of a run's layers in view while it trains; a line for every epoch."""

    def __init__(self, console: Console, run: Run) -> None:
        self._console, self._run = console, run
        config = run.config
        self._display = Display(console, config.epochs, run.epoch, run.task.unit, bar=False)
        self._stack = ExitStack()
        self._view: LiveView | None = None

    def reading(self, reading: Reading) -> None:
        """Draw what has been recorded."""
        monitor = self._run.monitor
        if monitor is None or not self._console.is_terminal:
            return
        if self._view is None:
            self._view = self._stack.enter_context(LiveView(monitor.record, self._console))
        self._view.update()

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Say how an epoch ended, above the view."""
        self._display.epoch(row)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
