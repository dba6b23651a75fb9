"""What a chapter is written with: text, tables and pictures, for the terminal and for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from gpugrad.errors import GpugradError
from gpugrad.health.page_charts import Axis, Line, chart, document

__all__ = ["Book", "BookError", "plot"]

Array = NDArray[Any]

#: Signs and colours of the lines of a plot, in their order.
SIGNS = "●○×+◆◇"
COLOURS = ("blue", "dark_orange3", "green", "magenta", "red", "yellow4")

#: Columns of text at most, for it to be readable on a wide terminal.
WIDTH = 92


class BookError(GpugradError, OSError):
    """A page that could not be written."""


class Book:
    """Prints a chapter as it is told, and keeps it for a page.

    Parameters
    ----------
    console:
        Where it is printed.
    title:
        Of the chapter.
    """

    def __init__(self, console: Console, title: str) -> None:
        self.console = console
        self.title = title
        self._page: list[str] = [f"<header><h1>{escape(title)}</h1></header>"]
        self.width = min(WIDTH, console.width)
        console.print(Rule(f"[bold]{title}", align="left"), width=self.width)

    def say(self, text: str) -> None:
        """A paragraph; line breaks in it mean nothing."""
        text = " ".join(text.split())
        self._page.append(f"<p>{escape(text)}</p>")
        self.console.print(Padding(Text(text), (1, 0, 0, 0)), width=self.width)

    def head(self, text: str) -> None:
        """A heading."""
        self._page.append(f"<section><h2>{escape(text)}</h2></section>")
        self.console.print(Padding(Text(text, style="bold"), (1, 0, 0, 0)), width=self.width)

    def lines(self, text: str) -> None:
        """Lines that stay as they are, such as formulas."""
        self._page.append(f"<pre>{escape(text)}</pre>")
        self.console.print(Padding(Text(text, style="cyan"), (1, 0, 0, 4)), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table; the first column stands to the left, the others to the right."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for i, name in enumerate(columns):
            table.add_column(Text(name), justify="right" if i else "left")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self.console.print(Padding(table, (1, 0, 0, 2)), width=max(self.width, 80))
        head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
        body = "".join(
            f'<tr><th scope="row">{escape(str(row[0]))}</th>'
            + "".join(f"<td>{escape(str(cell))}</td>" for cell in row[1:])
            + "</tr>"
            for row in rows
        )
        self._page.append(
            f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def picture(
        self,
        title: str,
        lines: Mapping[str, tuple[Any, Any]],
        *,
        x_label: str,
        log: bool = False,
    ) -> None:
        """A plot of (x, y) for each name: drawn in signs here, as a chart on the page."""
        series = {k: (np.asarray(x), np.asarray(y, np.float64)) for k, (x, y) in lines.items()}
        self.console.print(
            Padding(plot(title, series, x_label, log, self.width - 2), (1, 0, 0, 0)),
            soft_wrap=True,
        )
        marks = [Line(name, x, y, i % 6 + 1) for i, (name, (x, y)) in enumerate(series.items())]
        self._page.append(
            f'<section class="picture"><h2>{escape(title)}</h2>'
            + chart(marks, label=title, x_label=x_label, log=log, height=300)
            + "</section>"
        )

    def save(self, folder: Path, name: str) -> Path:
        """Write the page into a folder, which is made if need be; BookError when it cannot be."""
        path = folder / f"{name}.html"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(document(self.title, "\n".join(self._page)), encoding="utf-8")
        except OSError as error:
            raise BookError(f"{path} could not be written: {error.strerror or error}") from error
        return path


def plot(
    title: str,
    lines: Mapping[str, tuple[Array, Array]],
    x_label: str = "",
    log: bool = False,
    width: int = 80,
    height: int = 15,
) -> Text:
    """A plot in signs, one for each line, so that it can be read without colours.

    What is not finite, and with `log` what is not positive, is left out.

    >>> print(plot("y", {"a": (np.arange(3), np.array([0.0, 1.0, 2.0]))}, "x", width=12, height=3))
    y
    ● a
      |        ●
      |    ●
    0 |●
       0       2
       x
    """
    y_axis = Axis.over([y for _, y in lines.values()], log)
    known = [x[np.isfinite(y_axis.place(y))] for x, y in lines.values()]
    places = [float(v) for x in known for v in x]
    x_axis = Axis(min(places, default=0), max(places, default=1))
    if x_axis.high <= x_axis.low:
        x_axis = Axis(x_axis.low - 0.5, x_axis.high + 0.5)
    ticks: dict[int, str] = {}
    for place, label in y_axis.ticks(height // 2 + 1):
        ticks.setdefault(round((1 - place) * (height - 1)), label)
    margin = max((len(label) for label in ticks.values()), default=0)
    columns = max(4, width - margin - 2)
    grid: list[list[tuple[str, str]]] = [[(" ", "")] * columns for _ in range(height)]
    for i, (x, y) in enumerate(lines.values()):
        top = (1 - y_axis.place(y)) * (height - 1)
        left = x_axis.place(x) * (columns - 1)
        for row, column in zip(top.tolist(), left.tolist()):
            if row == row and column == column:
                grid[round(row)][round(column)] = SIGNS[i % 6], COLOURS[i % 6]
    text = Text(title, style="bold")
    for i, name in enumerate(lines):
        text.append(f"{'   ' if i else chr(10)}{SIGNS[i % 6]} {name}", style=COLOURS[i % 6])
    for r, row in enumerate(grid):
        text.append(f"\n{ticks.get(r, ''):>{margin}} |", style="dim")
        line = Text()
        for sign, colour in row:
            line.append(sign, style=colour)
        line.rstrip()
        text.append_text(line)
    ends = [f"{v:g}" for v in (x_axis.low, x_axis.high)]
    gap = max(1, columns - len(ends[0]) - len(ends[1]))
    text.append(f"\n{'':{margin}}  {ends[0]}{'':{gap}}{ends[1]}", style="dim")
    if x_label:
        text.append(f"\n{'':{margin}}  {x_label}", style="dim")
    return text
