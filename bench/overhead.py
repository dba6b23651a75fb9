"""Eager overhead: a chain of 1000 x (x*a+b) on 8x8 float32, forward and backward, one thread.

``python bench/overhead.py [--quick] [--json PATH]``. One operation is one x*a+b, both ways. The
contenders take turns within one run, and agree on values and gradients before anything is timed.
Time is processor time of the one thread.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpugrad.bench import common

LENGTH = 1000
SHAPE = (8, 8)

#: What the eager engine has to reach: a share of PyTorch's time, and the same as a speed-up.
SHARE_OF_TORCH = 5 / 16
SPEED_UP = 2.5

#: Which of x, a, b want a gradient.
VARIANTS = {"x": (True, False, False), "x, a, b": (True, True, True)}

Result = tuple[Any, ...]
Pass = Callable[[], Result]


def inputs() -> list[Any]:
    """x, a, b and the gradient from above; a is near 1, so that a thousand factors stay finite."""
    import numpy as np

    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, *SHAPE), dtype=np.float32)
    a = (1 + 1e-3 * rng.standard_normal(SHAPE)).astype(np.float32)
    b = (1e-2 * rng.standard_normal(SHAPE)).astype(np.float32)
    return [x, a, b, g]


def with_gpugrad(wants: tuple[bool, ...]) -> Pass:
    import gpugrad as gg

    *arrays, seed = inputs()
    x, a, b = (gg.tensor(v, requires_grad=w) for v, w in zip(arrays, wants, strict=True))
    g = gg.tensor(seed)

    def run() -> Result:
        for leaf in (x, a, b):
            leaf.grad = None
        y = x
        for _ in range(LENGTH):
            y = y * a + b
        y.backward(g)
        return (y.detach(), *(leaf.grad for leaf in (x, a, b) if leaf.requires_grad))

    return run


def with_torch(wants: tuple[bool, ...]) -> Pass:
    import torch

    torch.set_num_threads(1)
    *arrays, seed = [torch.from_numpy(v) for v in inputs()]
    x, a, b = (v.requires_grad_(w) for v, w in zip(arrays, wants, strict=True))

    def run() -> Result:
        for leaf in (x, a, b):
            leaf.grad = None
        y = x
        for _ in range(LENGTH):
            y = y * a + b
        y.backward(seed)
        return (y.detach(), *(leaf.grad for leaf in (x, a, b) if leaf.requires_grad))

    return run


def with_autograd(wants: tuple[bool, ...]) -> Pass:
    from autograd import make_vjp

    *arrays, g = inputs()
    moving = [v for v, w in zip(arrays, wants, strict=True) if w]
    fixed = [v for v, w in zip(arrays, wants, strict=True) if not w]

    def chain(values: tuple[Any, ...]) -> Any:
        y, a, b = [*values, *fixed]
        for _ in range(LENGTH):
            y = y * a + b
        return y

    def run() -> Result:
        vjp, y = make_vjp(chain)(tuple(moving))
        return (y, *vjp(g))

    return run


def with_mygrad(wants: tuple[bool, ...]) -> Pass:
    mg = importlib.import_module("mygrad")

    *arrays, g = inputs()
    x, a, b = (mg.tensor(v, constant=not w) for v, w in zip(arrays, wants, strict=True))

    def run() -> Result:
        for leaf in (x, a, b):
            leaf.null_grad()
        y = x
        for _ in range(LENGTH):
            y = y * a + b
        y.backward(g)
        return (y.data, *(leaf.grad for leaf, w in zip((x, a, b), wants, strict=True) if w))

    return run


def with_numpy(wants: tuple[bool, ...]) -> Pass:
    """What remains when somebody writes both passes out: the floor under any engine on NumPy."""
    x, a, b, seed = inputs()

    def only_x() -> Result:
        y = x
        for _ in range(LENGTH):
            y = y * a + b
        g = seed
        for _ in range(LENGTH):
            g = g * a
        return y, g

    def all_three() -> Result:
        y = x
        kept = []
        for _ in range(LENGTH):
            kept.append(y)
            y = y * a + b
        g = seed
        b_grad = a_grad = 0
        for _ in range(LENGTH):
            b_grad = b_grad + g
            a_grad = a_grad + g * kept.pop()
            g = g * a
        return y, g, a_grad, b_grad

    return all_three if wants[1] else only_x


CONTENDERS: dict[str, Callable[[tuple[bool, ...]], Pass]] = {
    "gpugrad": with_gpugrad,
    "torch": with_torch,
    "autograd": with_autograd,
    "mygrad": with_mygrad,
    "numpy": with_numpy,
}


def as_numpy(value: Any) -> Any:
    import numpy as np

    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


def agreement(results: dict[str, Result], tolerance: float = 1e-4) -> dict[str, float]:
    """Greatest difference of each contender from NumPy by hand, as a share of the largest element.

    float32 sums of a thousand terms, taken in different orders, differ by up to 1e-5 or so; beyond
    ``tolerance`` somebody computed something else, and the comparison stops.
    """
    import numpy as np

    truth = [as_numpy(v) for v in results["numpy"]]
    worst = {}
    for name, result in results.items():
        found = [as_numpy(v) for v in result]
        if [v.shape for v in found] != [v.shape for v in truth]:
            raise SystemExit(f"{name} gives {len(found)} results of other shapes; no comparison")
        gaps = [
            np.max(np.abs(f - t)) / np.max(np.abs(t)) for f, t in zip(found, truth, strict=True)
        ]
        worst[name] = float(np.max(gaps))  # NaN stays NaN, which max() would lose
        if not worst[name] <= tolerance:
            raise SystemExit(f"{name} differs from NumPy by {worst[name]:.2g}; no comparison")
    return worst


def measure(rounds: int) -> dict[str, Any]:
    """All contenders that are installed, both variants; microseconds per operation."""
    found: dict[str, Any] = {"length": LENGTH, "shape": SHAPE, "rounds": rounds, "variants": {}}
    names = [n for n in CONTENDERS if importlib.util.find_spec(n)]
    for variant, wants in VARIANTS.items():
        runs = {name: CONTENDERS[name](wants) for name in names}
        agree = agreement({name: run() for name, run in runs.items()})
        # One thread: on a quiet machine this is the time on the wall, on a busy one it stays so.
        seconds = common.alternate(runs, rounds, clock=time.process_time)
        entry: dict[str, Any] = {"contenders": {}}
        for name in names:
            entry["contenders"][name] = {
                "us_per_op": common.spread(seconds[name], 1e6 / LENGTH),
                "difference": common.round_to(agree[name], 2),
            }
            if "torch" in names:
                entry["contenders"][name]["share_of_torch"] = common.ratio(
                    seconds[name], seconds["torch"]
                )
        found["variants"][variant] = entry
    return found


def verdicts(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether gpugrad stays under its share of PyTorch's time."""
    out = []
    for variant, entry in found["variants"].items():
        what = f"chain of x*a+b, gradients of {variant}"
        own = entry["contenders"]["gpugrad"]
        if "share_of_torch" not in own:
            out.append(common.not_run(what, "PyTorch is not installed"))
            continue
        share = own["share_of_torch"]["median"]
        out.append(common.verdict(f"{what}: time, PyTorch = 16", 16 * share, 16 * SHARE_OF_TORCH,
                                  ""))  # fmt: skip
        out.append(common.verdict(f"{what}: times as fast as PyTorch", 1 / share, SPEED_UP, "x",
                                  at_least=True))  # fmt: skip
    return out


def tables(found: dict[str, Any]) -> str:
    """One table per variant."""
    text = []
    for variant, entry in found["variants"].items():
        rows = [
            {"contender": name,
             "µs per operation": c["us_per_op"]["median"],
             "quartiles": f"{c['us_per_op']['q1']:.3g} to {c['us_per_op']['q3']:.3g}",
             "PyTorch = 1": c.get("share_of_torch", {}).get("median"),
             "difference": c["difference"]}
            for name, c in entry["contenders"].items()
        ]  # fmt: skip
        text.append(f"gradients of {variant}\n\n{common.table(rows)}")
    return "\n\n".join(text)


def report(quick: bool) -> dict[str, Any]:
    """Measure in a process of its own, with one thread, and judge."""
    found = common.measure(__file__, *(["--quick"] if quick else []))
    return {"benchmark": "overhead", "quick": quick, "threads": 1, **common.provenance(),
            "results": found, "verdicts": verdicts(found), "table": tables(found)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: a check, not a result")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        common.write_json(options.measure, measure(rounds=3 if options.quick else 60))
        return
    common.finish(report(options.quick), options.json)


if __name__ == "__main__":
    main()
