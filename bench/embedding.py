"""Rows of a table, at places drawn evenly or as words are in a text."""

from __future__ import annotations

from functools import partial
from typing import Any

from gpugrad.bench.workload import Workload, kernel, normal

#: Rows, columns, places.
SIZES = {"500×32, 2000": (500, 32, 2000), "8192×256, 2048": (8192, 256, 2048),
         "32768×512, 8192": (32768, 512, 8192)}  # fmt: skip


def table(even: bool, random: Any, rows: int, columns: int, places: int) -> Any:
    import numpy as np

    # The n-th most frequent word with a probability of 1/n.
    share = np.ones(rows) if even else 1 / np.arange(1.0, rows + 1)
    index = random.choice(rows, places, p=share / share.sum())
    return normal(random, (rows, columns)), [index]


def lookup(name: str, what: str, even: bool) -> Workload:
    return kernel(
        name, what,
        sizes=SIZES,
        arrays=partial(table, even),
        ours=lambda gg, table, index: gg.embedding(index, table),
        torch=lambda torch, table, index: torch.nn.functional.embedding(index, table),
        plain=lambda np, table, index: table[index],
        covers=("ops/embeddings", "kernels/cpu/embedding", "kernels/cuda/embedding"),
        # Rows are read and written; so are those of the gradient; the rest of that is zeros.
        moved=lambda rows, columns, places: columns * (3 * places + rows),
        least=1.5, variant=even,
    )  # fmt: skip


WORKLOADS: tuple[Workload, ...] = (
    lookup("embedding", "table[index], every row as likely", even=True),
    lookup("embedding of words", "table[index], the n-th row with a chance of 1/n", even=False),
)
