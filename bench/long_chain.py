"""Long chains: time per node and peak memory of graphs with up to a million nodes.

``python bench/long_chain.py [--quick] [--json PATH]``. Every library and every length has a fresh
process; memory is counted beyond what the imports and a warm-up left. After the measured pass the
same graph is built again and dropped without a backward pass: freeing a chain must not recurse.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpugrad.bench import common

LENGTHS = (10_000, 100_000, 1_000_000)
QUICK_LENGTHS = (10_000, 50_000)
#: Time per node at the longest chain over that at the shortest: linear up to cache misses.
GROWTH = 2.0
MIB = 2**20

#: name → (shape, one step, nodes that a step records)
CHAINS: dict[str, tuple[tuple[int, ...], Callable[[Any, Any, Any], Any], int]] = {
    "x*a+b on 8x8": ((8, 8), lambda y, a, b: y * a + b, 2),
    "x*x+b on 8x8": ((8, 8), lambda y, a, b: y * y + b, 2),
    "x+b on scalars": ((), lambda y, a, b: y + b, 1),
}  # fmt: skip
LIBRARIES = ("gpugrad", "torch")


def leaves(library: str, shape: tuple[int, ...]) -> tuple[Any, Any, Any, Any]:
    """x, a, b and the gradient from above in one library; only x wants a gradient.

    The values are fixed points of the steps, where the slope is 1 (0.5*0.5 + 0.25 = 0.5, a = 1), or
    grow by 0.25 a step; all stay finite over a million steps.
    """
    import numpy as np

    x, a, b, g = (np.full(shape, v, np.float32) for v in (0.5, 1.0, 0.25, 1.0))
    if library == "torch":
        import torch

        torch.set_num_threads(1)
        tensor = [torch.from_numpy(np.atleast_1d(v).reshape(v.shape)) for v in (x, a, b, g)]
        return (tensor[0].requires_grad_(), *tensor[1:])
    import gpugrad as gg

    return (gg.tensor(x, requires_grad=True), gg.tensor(a), gg.tensor(b), gg.tensor(g))


def one_pass(library: str, chain: str, nodes: int, backward: bool = True) -> tuple[float, float]:
    """Seconds forward and backward (or, without, to drop the graph)."""
    shape, step, per_step = CHAINS[chain]
    x, a, b, g = leaves(library, shape)
    start = time.perf_counter()
    y = x
    for _ in range(nodes // per_step):
        y = step(y, a, b)
    middle = time.perf_counter()
    if backward:
        y.backward(g)
    else:
        del y
    end = time.perf_counter()
    if backward and x.grad is None:
        raise SystemExit("no gradient arrived")
    return middle - start, end - middle


def measure(library: str, chain: str, nodes: int) -> dict[str, Any]:
    """One library, one chain, one length, in this process."""
    one_pass(library, chain, 1000)
    before = common.resident()
    exact = common.forget_peak()
    forward, backward = one_pass(library, chain, nodes)
    peak = common.peak_resident() - before
    after = common.resident() - before
    _, drop = one_pass(library, chain, nodes, backward=False)
    return {
        "library": library, "chain": chain, "nodes": nodes,
        "forward_us": common.round_to(forward / nodes * 1e6),
        "backward_us": common.round_to(backward / nodes * 1e6),
        "drop_us": common.round_to(drop / nodes * 1e6),
        "peak_MiB": common.round_to(peak / MIB), "left_MiB": common.round_to(after / MIB),
        "peak_reset": exact,
    }  # fmt: skip


def report(quick: bool) -> dict[str, Any]:
    """A fresh process per library and length, the libraries taking turns."""
    lengths = QUICK_LENGTHS if quick else LENGTHS
    chains = list(CHAINS)[:1] if quick else list(CHAINS)
    libraries = [n for n in LIBRARIES if importlib.util.find_spec(n)]
    found = [
        common.measure(__file__, "--library", library, "--chain", chain, "--nodes", str(nodes))
        for chain in chains
        for nodes in lengths
        for library in libraries
    ]
    return {"benchmark": "long_chain", "quick": quick, "threads": 1, **common.provenance(),
            "results": found, "verdicts": verdicts(found),
            "table": common.table(found, COLUMNS)}  # fmt: skip


COLUMNS = ("chain", "library", "nodes", "forward_us", "backward_us", "drop_us", "peak_MiB")


def verdicts(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Memory below PyTorch's at the longest chain, and time per node that does not grow."""
    out = []
    for chain in dict.fromkeys(r["chain"] for r in found):
        rows = {(r["library"], r["nodes"]): r for r in found if r["chain"] == chain}
        lengths = sorted({n for _, n in rows})
        own = [rows["gpugrad", n] for n in lengths]
        if ("torch", lengths[-1]) in rows:
            theirs = rows["torch", lengths[-1]]["peak_MiB"]
            out.append(common.verdict(f"{chain}: peak memory at {lengths[-1]:,} nodes",
                                      own[-1]["peak_MiB"], theirs, "MiB"))  # fmt: skip
        else:
            out.append(common.not_run(f"{chain}: peak memory", "PyTorch is not installed"))
        for way in ("forward_us", "backward_us"):
            growth = own[-1][way] / own[0][way]
            out.append(common.verdict(f"{chain}: {way.removesuffix('_us')} time per node, longest "
                                      "over shortest", growth, GROWTH, "x"))  # fmt: skip
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short chains: a check, not a result")
    parser.add_argument("--json", help="write the report to this file")
    for name in ("--measure", "--library", "--chain", "--nodes"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        nodes = int(options.nodes)
        common.write_json(options.measure, measure(options.library, options.chain, nodes))
        return
    common.finish(report(options.quick), options.json)


if __name__ == "__main__":
    main()
