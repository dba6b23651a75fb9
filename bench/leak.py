"""Leaks: memory of 10,000 training steps with Python's cycle collector switched off.

``python bench/leak.py [--quick] [--json PATH]``. A graph without reference cycles is freed by
reference counts alone, so memory at step 500 and at the last step must be the same.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpugrad.bench import common

STEPS, SETTLED = 10_000, 500
#: The smallest leak, one tensor a step, is 56 bytes and its array 160 more: 2 MiB over 9,500 steps.
#: Python's allocator gives memory back in arenas of 1 MiB, so less than that is noise.
TOLERANCE_MIB = 1.0
MIB = 2**20


def objects() -> Counter[str]:
    """Objects of the library that are alive, by class."""
    return Counter(
        type(x).__qualname__
        for x in gc.get_objects()
        if str(type(x).__module__).partition(".")[0] == "gpugrad" and not isinstance(x, type)
    )


def measure(steps: int) -> dict[str, Any]:
    """Train a small net without the collector and watch this process grow."""
    import numpy as np

    import gpugrad as gg
    from gpugrad import nn, optim

    gc.collect()
    gc.disable()
    rng = np.random.default_rng(0)
    x = gg.tensor(rng.standard_normal((32, 16), dtype=np.float32))
    y = gg.tensor(rng.integers(0, 4, 32))
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = optim.AdamW(net.parameters(), lr=1e-3)

    def step() -> Any:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step(clip=1.0)
        return loss

    marks = []
    settled = 0
    alive: Counter[str] = Counter()
    first = step().item()
    start = time.perf_counter()
    for i in range(1, steps + 1):
        loss = step()
        if i == min(SETTLED, steps // 2):
            alive = objects()
            settled = common.resident()
        if i % max(1, steps // 20) == 0:
            marks.append([i, common.round_to(common.resident() / MIB, 6)])
    seconds = time.perf_counter() - start
    end = common.resident()
    later = objects()
    unreachable = gc.collect()
    return {
        "steps": steps, "seconds": common.round_to(seconds),
        "first_loss": first, "last_loss": loss.item(),
        "resident_MiB": {"settled": common.round_to(settled / MIB, 6),
                         "end": common.round_to(end / MIB, 6)},
        "growth_MiB": common.round_to((end - settled) / MIB),
        "objects": {"settled": alive.total(), "end": later.total()},
        "grown_classes": {k: [alive[k], n] for k, n in later.items() if n > alive[k]},
        "in_cycles": unreachable,
        "marks": marks,
    }  # fmt: skip


def report(quick: bool) -> dict[str, Any]:
    """Measure in a process of its own and judge."""
    found = common.measure(__file__, *(["--quick"] if quick else []))
    rows = [{"step": "settled", "MiB": found["resident_MiB"]["settled"],
             "gpugrad objects": found["objects"]["settled"]},
            {"step": found["steps"], "MiB": found["resident_MiB"]["end"],
             "gpugrad objects": found["objects"]["end"]}]  # fmt: skip
    return {
        "benchmark": "leak", "quick": quick, "threads": 1, **common.provenance(),
        "results": found,
        "verdicts": [
            common.verdict(f"memory growth over {found['steps']:,} steps, collector off",
                           found["growth_MiB"], TOLERANCE_MIB, "MiB"),
            common.verdict("more gpugrad objects at the end than when settled",
                           found["objects"]["end"] - found["objects"]["settled"], 0, ""),
        ],
        "table": common.table(rows),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps: a check, not a result")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        common.write_json(options.measure, measure(1000 if options.quick else STEPS))
        return
    common.finish(report(options.quick), options.json)


if __name__ == "__main__":
    main()
