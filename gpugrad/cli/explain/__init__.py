"""`gpugrad explain`: the subject of gradient health as small runs, each with a picture."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gpugrad.backend.kernels import use_kernels
from gpugrad.backend.threads import get_num_threads
from gpugrad.cli.explain.book import Book
from gpugrad.errors import GpugradError

__all__ = ["CHAPTERS", "Chapter", "ChapterError", "contents", "tell"]


class ChapterError(GpugradError, ValueError):
    """A chapter that there is not."""


@dataclass(frozen=True)
class Chapter:
    """One subject. The module of its name has `show(book)`, which returns the figures it found."""

    title: str
    about: str


CHAPTERS = {
    "exploding": Chapter(
        "Gradients that explode", "a product of a hundred factors above 1; a two-layer net by hand"
    ),
    "vanishing": Chapter(
        "Gradients that vanish", "the same with factors below 1: why sigmoid layers stop learning"
    ),
    "clipping": Chapter("Clipping", "a recurrent net whose gradients explode, with and without"),
    "relu": Chapter("ReLU in place of sigmoid", "depth 4, 20 and 100: who still learns"),
    "normalisation": Chapter(
        "Normalising activations", "what layers put out with and without, and who learns"
    ),
    "rnn": Chapter(
        "Where the remedies fail", "long memory in a plain recurrent net, and what gates change"
    ),
}


def contents() -> Table:
    """The chapters, one a line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, chapter in CHAPTERS.items():
        table.add_row(f"[bold]{name}[/]", f"{chapter.title}: {chapter.about}")
    return table


def tell(name: str, console: Console, out: Path | None = None) -> dict[str, Any]:
    """Run a chapter, print it, and write its page into the folder `out`; returns its figures.

    Raises ChapterError for a name that is none.
    """
    key = {"normalization": "normalisation"}.get(name.lower(), name.lower())
    if key not in CHAPTERS:
        raise ChapterError(f"there is no chapter {name!r}; there are {', '.join(CHAPTERS)}")
    book = Book(console, CHAPTERS[key].title)
    chapter = importlib.import_module(f"{__name__}.{key}")
    get_num_threads()  # who owns the threads then keeps BLAS from splitting products this small
    # Nets this small gain nothing from kernels, and would wait for them to be compiled.
    with use_kernels("off"):
        figures: dict[str, Any] = chapter.show(book)
    if out is not None:
        console.print(f"\n{book.save(out, key)}", soft_wrap=True)
    return figures
