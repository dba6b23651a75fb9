"""What watching a training costs: steps with and without a Monitor, taking turns.

``python bench/health.py [--quick] [--json PATH]``. float32, two threads. What a run pays follows
from what a recorded step takes longer, how many steps a monitor puts between two of them when it is
left to itself, and what it does in those.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

#: Share of a step's time that watching may take.
MOST = 0.03

#: Bytes that the record of a long run may take.
MEMORY = 1_000_000


def nets() -> dict[str, Callable[[], tuple[Any, Any, Any]]]:
    """Nets with a batch of inputs and targets."""
    import gpugrad as gg
    from gpugrad import models, nn

    rng = np.random.default_rng(0)

    def vectors(rows: int, features: int) -> tuple[Any, Any]:
        x = rng.standard_normal((rows, features)).astype(np.float32)
        return gg.tensor(x), gg.tensor(rng.integers(0, 10, rows))

    def mlp() -> tuple[Any, Any, Any]:
        net = nn.Sequential(
            nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
        )
        return net, *vectors(128, 784)

    def deep() -> tuple[Any, Any, Any]:
        hidden = [layer for _ in range(100) for layer in (nn.Linear(64, 64), nn.Tanh())]
        return nn.Sequential(*hidden, nn.Linear(64, 10)), *vectors(64, 64)

    def gpt() -> tuple[Any, Any, Any]:
        text = rng.integers(0, 96, (16, 65))
        net = models.GPT(96, context=64, width=128, depth=4, heads=4)
        return net, gg.tensor(text[:, :-1].copy()), gg.tensor(text[:, 1:].copy())

    def lstm() -> tuple[Any, Any, Any]:
        text = rng.integers(0, 96, (32, 65))
        net = models.RecurrentLM(96, "lstm", width=128, depth=2)
        return net, gg.tensor(text[:, :-1].copy()), gg.tensor(text[:, 1:].copy())

    return {"mlp": mlp, "deep": deep, "gpt": gpt, "lstm": lstm}


def stepper(make: Callable[[], tuple[Any, Any, Any]], **watched: Any) -> Any:
    """Training steps of a net, watched if there is something to watch with."""
    import gpugrad as gg
    from gpugrad import health, nn

    net, x, target = make()
    optimizer = gg.optim.AdamW(net.parameters(), lr=1e-4)
    monitor = health.Monitor(net, optimizer, **watched).start() if watched else None

    def step() -> None:
        optimizer.zero_grad()
        y = net(x)
        loss = nn.functional.cross_entropy(y.reshape((-1, y.shape[-1])), target.reshape(-1))
        loss.backward()
        optimizer.step(clip=1.0)
        if monitor is not None:
            monitor.step(loss)

    step.monitor = monitor  # type: ignore[attr-defined]
    return step


def measure(name: str, rounds: int, folder: str) -> dict[str, list[float]]:
    """Seconds of a step, plain and recorded."""
    make = nets()[name]
    steps = {
        "plain": stepper(make),
        "recorded": stepper(make, every=1, path=f"{folder}/{name}-recorded.jsonl"),
    }
    number = {}
    for who, step in steps.items():
        for _ in range(5):
            step()
        start = time.perf_counter()
        step()
        number[who] = max(1, int(0.05 / (time.perf_counter() - start)))
    seconds: dict[str, list[float]] = {who: [] for who in steps}
    for turn in range(rounds):
        for who in sorted(steps, reverse=turn % 2 == 1):
            start = time.perf_counter()
            for _ in range(number[who]):
                steps[who]()
            seconds[who].append((time.perf_counter() - start) / number[who])
    return seconds


def resting() -> float:
    """Seconds that a monitor takes in a step that it does not record.

    They are too few to be seen beside those of a step: what is called there is called by itself.
    """
    import gpugrad as gg
    from gpugrad import health, nn

    net = nn.Linear(1, 1)
    optimizer = gg.optim.SGD(net.parameters(), lr=0.1)
    loss = gg.tensor(1.0)

    def calls(many: int) -> float:
        options = {"clip": 1.0, "scaler": None, "nonfinite": "propagate"}
        start = time.perf_counter()
        for _ in range(many):
            optimizer._call_hooks("pre", options)
            optimizer._call_hooks("post", options)
            monitor.step(loss)
        return (time.perf_counter() - start) / many

    with health.Monitor(net, optimizer, every=10**9) as monitor:
        calls(1 << 16)  # from here on the next that is recorded is far away
        return min(calls(5000) for _ in range(10))


def gap(name: str, steps: int, folder: str) -> float:
    """Steps from one that is recorded to the next, where a monitor chooses."""
    step: Any = stepper(nets()[name], path=f"{folder}/{name}.jsonl")
    for _ in range(steps):
        step()
    found = np.diff(step.monitor.record.steps)
    return float(np.median(found[len(found) // 2 :]))


def long_run() -> int:
    """Bytes of the record of 10000 recorded steps of 100 layers."""
    from gpugrad.health import STATISTICS, Record

    record = Record([str(i) for i in range(100)])
    row = {name: np.ones(100) for name in STATISTICS}
    for step in range(1, 10_001):
        record.append(step, row, {"loss": 1.0})
    return record.nbytes


def report(quick: bool, only: Sequence[str] = ()) -> dict[str, Any]:
    rows, results, verdicts = [], {}, []
    rest = resting()
    with tempfile.TemporaryDirectory() as folder:
        for name in only or nets():
            results[name] = timed = measure(name, 3 if quick else 40, folder)
            step = statistics.median(timed["plain"])
            recorded = common.ratio(timed["recorded"], timed["plain"])["median"] - 1
            between = gap(name, 60 if quick else 4000 if name in ("mlp", "deep") else 300, folder)
            share = rest / step + recorded / between
            rows.append(
                {
                    "net": name,
                    "step, ms": round(1e3 * step, 3),
                    "recorded, ms": round(1e3 * statistics.median(timed["recorded"]), 3),
                    "not recorded, %": round(100 * rest / step, 3),
                    "recorded, %": round(100 * recorded, 1),
                    "steps between": between,
                    "in all, %": round(100 * share, 2),
                }
            )
            what = f"watching the training of {name}"
            verdicts.append(common.verdict(what, share, MOST, "of a step", at_least=False))
    verdicts.append(
        common.verdict("record of 10^4 steps of 100 layers", long_run(), MEMORY, "bytes",
                       at_least=False)
    )  # fmt: skip
    return {"benchmark": "health", "quick": quick, "threads": 2, **common.provenance(),
            "results": results, "verdicts": verdicts, "table": common.table(rows)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: a check, no result")
    parser.add_argument("--only", nargs="+", default=[], choices=list(nets()), help="these nets")
    parser.add_argument("--json", help="write the report to this file")
    options = parser.parse_args(arguments)
    common.finish(report(options.quick, options.only), options.json)


if __name__ == "__main__":
    main()
