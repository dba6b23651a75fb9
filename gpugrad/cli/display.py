"""How a run is shown: a bar on a terminal, plain lines anywhere else, and a table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from gpugrad.cli.training import Reading, Run, Watch

__all__ = ["Display", "Logged", "result_table"]


class Display:
    """Shows readings as they come; use it as a context manager around the training.

    On a terminal one bar moves, unless `bar` is False; into a file or a pipe goes one line per
    epoch.
    """

    def __init__(
        self, console: Console, epochs: int, done: int, unit: str = "samples", *, bar: bool = True
    ) -> None:
        self.console = console
        self.unit = unit
        self.epochs = epochs
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if bar and console.is_terminal:
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(
                "", total=epochs, completed=done, epoch=f"{done}/{epochs}", text=""
            )

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def reading(self, reading: Reading) -> None:
        """Move the bar."""
        if self._bar:
            self._bar.update(
                self._task,
                completed=reading.epoch - 1 + reading.step / reading.steps,
                epoch=f"{reading.epoch}/{self.epochs}",
                text=(
                    f"loss {reading.loss:.4f}  accuracy {reading.accuracy:.1%}  "
                    f"norm {reading.grad_norm:.3g}  {reading.samples_per_second:,.0f} {self.unit}/s"
                ),
            )

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Say how an epoch ended."""
        if not self._bar:
            self.console.print(
                f"epoch {row['epoch']}/{self.epochs}: loss {row['loss']:.4f}, "
                f"train {row['train_accuracy']:.2%}, test {row['test_accuracy']:.2%}, "
                f"gradient norm {row['grad_norm']:.3g}, {row['seconds']:.2f} s, "
                f"{row['samples_per_second']:,.0f} {self.unit}/s",
                soft_wrap=True,
                highlight=False,
            )


class Logged:
    """Hands what a watch is told to TensorBoard, too."""

    def __init__(self, watch: Watch, log: Any, run: Run) -> None:
        self._watch, self._log, self._run = watch, log, run

    def _at(self, epoch: int, step: int) -> int:
        return epoch * self._run.steps + step

    def reading(self, reading: Reading) -> None:
        self._watch.reading(reading)
        self._log.scalars(
            {
                "loss/train": reading.loss,
                "accuracy/train": reading.accuracy,
                "gradient/norm": reading.grad_norm,
                "learning_rate": reading.lr,
                "samples_per_second": reading.samples_per_second,
            },
            self._at(reading.epoch - 1, reading.step),
        )

    def epoch(self, row: Mapping[str, Any]) -> None:
        self._watch.epoch(row)
        at = self._at(row["epoch"], 0)
        self._log.scalars(
            {"loss/test": row["test_loss"], "accuracy/test": row["test_accuracy"]}, at
        )
        for name, p in self._run.net.named_parameters():
            self._log.histogram(name, p.detach().cpu().numpy(), at)


def result_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line per epoch: loss, accuracies, norm of the gradient before clipping, time."""
    table = Table(title=title)
    for name in ("epoch", "loss", "train acc.", "test acc.", "grad norm", "max norm", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["epoch"]),
            f"{row['loss']:.4f}",
            f"{row['train_accuracy']:.2%}",
            f"{row['test_accuracy']:.2%}",
            f"{row['grad_norm']:.3g}",
            f"{row['grad_norm_max']:.3g}",
            f"{row['seconds']:.2f}",
        )
    return table
