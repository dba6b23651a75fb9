"""A table of 32768 rows of 512 float32 numbers, read at 8192 places, forward and gradient.

``python bench/embedding.py [--quick] [--json PATH]``. Two threads. Places are drawn evenly, or as
words are in a text (the n-th most frequent with a probability of 1/n). The contenders take turns in
one process and agree on the gradient before anything is timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

#: Rows, columns and places.
SIZE, QUICK_SIZE = (32768, 512, 8192), (500, 32, 2000)

#: What the kernels have to reach, against PyTorch.
SPEED_UP = 1.5

Run = Callable[[], Any]


def inputs(size: tuple[int, int, int], even: bool) -> tuple[Any, Any, Any]:
    """Indices, table and the gradient from above."""
    import numpy as np

    rows, columns, places = size
    rng = np.random.default_rng(0)
    share = np.ones(rows) if even else 1 / np.arange(1.0, rows + 1)
    index = rng.choice(rows, places, p=share / share.sum())
    table = rng.standard_normal((rows, columns), dtype=np.float32)
    return index, table, rng.standard_normal((places, columns), dtype=np.float32)


def with_gpugrad(size: tuple[int, int, int], even: bool, mode: str) -> Run:
    import gpugrad as gg

    index, table, g = (gg.tensor(v) for v in inputs(size, even))
    table.requires_grad_()

    def run() -> Any:
        table.grad = None
        with gg.use_kernels(mode):
            gg.embedding(index, table).backward(g)
        return table.grad.data

    return run


def with_torch(size: tuple[int, int, int], even: bool) -> Run:
    import torch

    torch.set_num_threads(2)
    index, table, g = (torch.tensor(v) for v in inputs(size, even))
    table.requires_grad_()

    def run() -> Any:
        table.grad = None
        torch.nn.functional.embedding(index, table).backward(g)
        return table.grad

    return run


def with_jax(size: tuple[int, int, int], even: bool) -> Run:
    import jax

    def both(index: Any, table: Any, g: Any) -> Any:
        y, back = jax.vjp(lambda table: table[index], table)
        return y, *back(g)

    arrays = [jax.numpy.asarray(v) for v in inputs(size, even)]
    compiled = jax.jit(both)
    return lambda: jax.block_until_ready(compiled(*arrays))[1]


def contenders(size: tuple[int, int, int], even: bool) -> dict[str, Run]:
    """Everybody that is installed, by name."""
    found = {
        "gpugrad": with_gpugrad(size, even, "require"),
        "gpugrad, kernels off": with_gpugrad(size, even, "off"),
    }
    if importlib.util.find_spec("torch"):
        found["torch eager"] = with_torch(size, even)
    if importlib.util.find_spec("jax"):
        found["jax.jit"] = with_jax(size, even)
    return found


def agree(runs: dict[str, Run]) -> None:
    """Raise unless all contenders compute the same."""
    import numpy as np

    own = np.asarray(runs["gpugrad"]())
    for name, run in runs.items():
        worst = float(np.abs(own - np.asarray(run())).max())
        if not worst <= 1e-4 * max(1.0, float(np.abs(own).max())):
            raise RuntimeError(f"{name} disagrees by {worst}")


def measure(quick: bool) -> dict[str, Any]:
    """Seconds per turn of everybody, for both kinds of places."""
    found: dict[str, Any] = {}
    for what, even in (("even", True), ("words", False)):
        runs = contenders(QUICK_SIZE if quick else SIZE, even)
        agree(runs)
        seconds = common.alternate(runs, rounds=3 if quick else 15)
        found |= {f"{what}: {name}": s for name, s in seconds.items()}
    return found


def report(quick: bool) -> dict[str, Any]:
    seconds = common.measure(__file__, *(["--quick"] if quick else []), threads=2)
    rows, verdicts = [], []
    for kind in ("even", "words"):
        own = seconds[f"{kind}: gpugrad"]
        rows += [
            {"contender": name, **common.spread(s, 1e3),
             "over gpugrad": common.ratio(s, own)["median"]}
            for name, s in seconds.items() if name.startswith(kind)
        ]  # fmt: skip
        what, peer = f"embedding and its gradient, {kind}, over PyTorch", f"{kind}: torch eager"
        verdicts.append(
            common.verdict(what, common.ratio(seconds[peer], own)["median"], SPEED_UP, "x",
                           at_least=True)
            if peer in seconds else common.not_run(what, "PyTorch is not installed")
        )  # fmt: skip
    return {"benchmark": "embedding", "quick": quick, "threads": 2, **common.provenance(),
            "results": seconds, "verdicts": verdicts, "table": common.table(rows)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small table: a check, no result")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        common.write_json(options.measure, measure(options.quick))
        return
    common.finish(report(options.quick), options.json)


if __name__ == "__main__":
    main()
