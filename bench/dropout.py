"""Dropout of a 4096x4096 float32 matrix, alone and behind bias and GELU (tanh) with a residual.

``python bench/dropout.py [--quick] [--json PATH]``. Two threads, forward and backward, a tenth
dropped. The contenders take turns in one process. Each draws numbers of its own, so that only the
share that is kept and the scale can be compared before anything is timed.
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
SHARE = 0.1

#: What the kernels have to reach, against the best peer.
SPEED_UP = 2.0

ALONE, FUSED = "dropout", "bias+GELU+dropout+residual"

Run = Callable[[], tuple[Any, Any]]


def inputs(size: int) -> tuple[Any, Any, Any, Any]:
    """x, bias, residual and the gradient from above."""
    import numpy as np

    rng = np.random.default_rng(0)
    x, residual, g = rng.standard_normal((3, size, size), dtype=np.float32)
    return x, rng.standard_normal(size, dtype=np.float32), residual, g


def with_gpugrad(size: int, fused: bool, mode: str) -> Run:
    import gpugrad as gg

    x, bias, residual, g = (gg.tensor(v) for v in inputs(size))
    leaves = [x.requires_grad_(), bias.requires_grad_(), residual.requires_grad_()]
    generator = gg.Generator(0)

    def run() -> tuple[Any, Any]:
        for leaf in leaves:
            leaf.grad = None
        seed, offset = generator.stream()
        with gg.use_kernels(mode):
            if fused:
                y = gg.bias_activation_dropout(
                    x, bias, residual, activation="gelu_tanh", p=SHARE, seed=seed, offset=offset
                )
            else:
                y = gg.dropout(x, p=SHARE, seed=seed, offset=offset)
            y.backward(g)
        return y.data, x.grad.data

    return run


def with_torch(size: int, fused: bool, compiled: bool) -> Run:
    import torch

    F = torch.nn.functional
    torch.set_num_threads(2)
    torch.manual_seed(0)
    x, bias, residual, g = (torch.tensor(v) for v in inputs(size))
    leaves = [x.requires_grad_(), bias.requires_grad_(), residual.requires_grad_()]

    def alone(x: Any, bias: Any, residual: Any) -> Any:
        return F.dropout(x, SHARE)

    def after(x: Any, bias: Any, residual: Any) -> Any:
        return F.dropout(F.gelu(x + bias, approximate="tanh"), SHARE) + residual

    forward = after if fused else alone
    if compiled:
        forward = torch.compile(forward)

    def run() -> tuple[Any, Any]:
        for leaf in leaves:
            leaf.grad = None
        y = forward(*leaves)
        y.backward(g)
        return y.detach(), x.grad

    return run


def with_jax(size: int, fused: bool) -> Run:
    import jax

    def forward(key: Any, x: Any, bias: Any, residual: Any) -> Any:
        z = jax.nn.gelu(x + bias, approximate=True) if fused else x
        kept = jax.random.bernoulli(key, 1 - SHARE, x.shape)
        y = jax.numpy.where(kept, z / (1 - SHARE), 0)
        return y + residual if fused else y

    def both(key: Any, x: Any, bias: Any, residual: Any, g: Any) -> Any:
        y, back = jax.vjp(lambda *args: forward(key, *args), x, bias, residual)
        return y, *back(g)

    x, bias, residual, g = (jax.numpy.asarray(v) for v in inputs(size))
    compiled = jax.jit(both)
    keys = iter(range(1 << 30))

    def run() -> tuple[Any, Any]:
        found = compiled(jax.random.key(next(keys)), x, bias, residual, g)
        return jax.block_until_ready(found)[:2]

    return run


def contenders(size: int, fused: bool) -> dict[str, Run]:
    """Everybody that is installed, by name."""
    found = {
        "gpugrad": with_gpugrad(size, fused, "require"),
        "gpugrad, kernels off": with_gpugrad(size, fused, "off"),
    }
    if importlib.util.find_spec("torch"):
        found["torch eager"] = with_torch(size, fused, compiled=False)
        found["torch.compile"] = with_torch(size, fused, compiled=True)
    if importlib.util.find_spec("jax"):
        found["jax.jit"] = with_jax(size, fused)
    return found


def agree(runs: dict[str, Run], fused: bool) -> None:
    """Raise unless everybody drops a tenth, the same forward and backward, and scales the rest."""
    import numpy as np

    x, _, residual, _ = inputs(len(np.asarray(runs["gpugrad"]()[0])))
    for name, run in runs.items():
        y, gx = (np.asarray(v) for v in run())
        changed, moved = (y != residual, gx != 0) if fused else (y != 0, gx != 0)
        if not abs(float(moved.mean()) - (1 - SHARE)) < 0.01:
            raise RuntimeError(f"{name} keeps {moved.mean()}")
        # A number that is 0 already looks like a dropped one.
        if float((changed != moved).mean()) > 1e-5:
            raise RuntimeError(f"{name} drops other elements backward")
        if not fused and not np.allclose(y, np.where(changed, x / (1 - SHARE), 0)):
            raise RuntimeError(f"{name} scales otherwise")


def measure(quick: bool) -> dict[str, Any]:
    """Seconds per turn of everybody, for both operations."""
    found: dict[str, Any] = {}
    for what, fused in ((ALONE, False), (FUSED, True)):
        runs = contenders(QUICK_SIZE if quick else SIZE, fused)
        agree(runs, fused)
        seconds = common.alternate(runs, rounds=3 if quick else 7)
        found |= {f"{what}: {name}": s for name, s in seconds.items()}
    return found


def report(quick: bool) -> dict[str, Any]:
    seconds = common.measure(__file__, *(["--quick"] if quick else []), threads=2)
    rows, verdicts = [], []
    for what in (ALONE, FUSED):
        here = {n: s for n, s in seconds.items() if n.startswith(f"{what}: ")}
        own = here[f"{what}: gpugrad"]
        rows += [
            {"contender": name, **common.spread(s, 1e3),
             "over gpugrad": common.ratio(s, own)["median"]}
            for name, s in here.items()
        ]  # fmt: skip
        peers = [n for n in here if not n.startswith(f"{what}: gpugrad")]
        best = min(peers, key=lambda n: common.spread(seconds[n])["median"], default=None)
        told = f"{what}, forward and backward, over the best peer"
        verdicts.append(
            common.verdict(f"{told} ({best.rpartition(': ')[2]})",
                           common.ratio(seconds[best], own)["median"], SPEED_UP, "x", at_least=True)
            if best else common.not_run(told, "no peer is installed")
        )  # fmt: skip
    return {"benchmark": "dropout", "quick": quick, "threads": 2, **common.provenance(),
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
