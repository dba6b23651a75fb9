"""Bias and GELU (tanh) of a 4096x4096 float32 matrix, forward and backward with bias gradient.

``python bench/bias_gelu.py [--quick] [--json PATH]``. Two threads. The contenders take turns in one
process and agree on all three results before anything is timed.
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

SIZE, QUICK_SIZE = 4096, 512

#: What the kernels have to reach, against the best peer.
SPEED_UP = 3.5

Run = Callable[[], tuple[Any, ...]]


def inputs(size: int) -> tuple[Any, Any, Any]:
    """x, bias and the gradient from above."""
    import numpy as np

    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, size, size), dtype=np.float32)
    return x, rng.standard_normal(size, dtype=np.float32), g


def with_gpugrad(size: int, mode: str) -> Run:
    import gpugrad as gg

    x, bias, g = (gg.tensor(v) for v in inputs(size))
    x.requires_grad_()
    bias.requires_grad_()

    def run() -> tuple[Any, ...]:
        x.grad = bias.grad = None
        with gg.use_kernels(mode):
            y = gg.bias_activation(x, bias, activation="gelu_tanh")
            y.backward(g)
        return y.data, x.grad.data, bias.grad.data

    return run


def with_torch(size: int, compiled: bool) -> Run:
    import torch

    torch.set_num_threads(2)
    x, bias, g = (torch.tensor(v) for v in inputs(size))
    x.requires_grad_()
    bias.requires_grad_()

    def forward(x: Any, bias: Any) -> Any:
        return torch.nn.functional.gelu(x + bias, approximate="tanh")

    if compiled:
        forward = torch.compile(forward)

    def run() -> tuple[Any, ...]:
        x.grad = bias.grad = None
        y = forward(x, bias)
        y.backward(g)
        return y.detach(), x.grad, bias.grad

    return run


def with_jax(size: int) -> Run:
    import jax

    def both(x: Any, bias: Any, g: Any) -> tuple[Any, ...]:
        y, back = jax.vjp(lambda x, bias: jax.nn.gelu(x + bias, approximate=True), x, bias)
        return y, *back(g)

    x, bias, g = (jax.numpy.asarray(v) for v in inputs(size))
    compiled = jax.jit(both)
    return lambda: tuple(jax.block_until_ready(compiled(x, bias, g)))


def contenders(size: int) -> dict[str, Run]:
    """Everybody that is installed, by name."""
    found: dict[str, Run] = {
        "gpugrad": with_gpugrad(size, "require"),
        "gpugrad, kernels off": with_gpugrad(size, "off"),
    }
    if importlib.util.find_spec("torch"):
        found["torch eager"] = with_torch(size, compiled=False)
        found["torch.compile"] = with_torch(size, compiled=True)
    if importlib.util.find_spec("jax"):
        found["jax.jit"] = with_jax(size)
    return found


def agree(runs: dict[str, Run]) -> None:
    """Raise unless all contenders compute the same."""
    import numpy as np

    own = [np.asarray(v) for v in runs["gpugrad"]()]
    for name, run in runs.items():
        for what, a, b in zip(("y", "x.grad", "bias.grad"), own, run(), strict=True):
            # A bias gradient is a sum of thousands of terms of size 1.
            near = 2e-3 if what == "bias.grad" else 1e-5
            worst = float(np.abs(a - np.asarray(b)).max())
            if not worst <= near * max(1.0, float(np.abs(a).max())):
                raise RuntimeError(f"{name} disagrees on {what} by {worst}")


def measure(quick: bool) -> dict[str, Any]:
    """Seconds per turn of everybody."""
    runs = contenders(QUICK_SIZE if quick else SIZE)
    agree(runs)
    return common.alternate(runs, rounds=3 if quick else 9)


def report(quick: bool) -> dict[str, Any]:
    seconds = common.measure(__file__, *(["--quick"] if quick else []), threads=2)
    own = seconds["gpugrad"]
    rows = [
        {"contender": name, **common.spread(s, 1e3), "over gpugrad": common.ratio(s, own)["median"]}
        for name, s in seconds.items()
    ]
    peers = [n for n in seconds if not n.startswith("gpugrad")]
    best = min(peers, key=lambda n: sorted(seconds[n])[len(seconds[n]) // 2], default=None)
    what = "bias+GELU forward and backward, over the best peer"
    verdicts = [
        common.verdict(f"{what} ({best})", common.ratio(seconds[best], own)["median"], SPEED_UP,
                       "x", at_least=True)
        if best else common.not_run(what, "no peer is installed")
    ]  # fmt: skip
    return {"benchmark": "bias_gelu", "quick": quick, "threads": 2, **common.provenance(),
            "results": seconds, "verdicts": verdicts, "table": common.table(rows)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small matrix: a check, no result")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        common.write_json(options.measure, measure(options.quick))
        return
    common.finish(report(options.quick), options.json)


if __name__ == "__main__":
    main()
