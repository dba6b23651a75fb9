"""Normalisation, forward and backward with the gradients of weight and bias, float32.

``python bench/norm.py [--quick] [--json PATH]``. Two threads. Layer norm of 8192x1024 against every
peer; RMS norm, a residual before layer norm, group and batch norm of images against PyTorch. The
contenders take turns in one process and agree on all results before anything is timed.
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

ROWS, IMAGES = (8192, 1024), (64, 64, 56, 56)
QUICK_ROWS, QUICK_IMAGES = (256, 128), (8, 8, 14, 14)

#: What layer norm has to reach, against PyTorch's best.
SPEED_UP = 1.5

GROUPS = 8

Run = Callable[[], tuple[Any, ...]]


def shapes(case: str, quick: bool) -> tuple[tuple[int, ...], int]:
    """The shape of the operand, and the length of weight and bias."""
    images = case in ("group norm", "batch norm")
    shape = (QUICK_IMAGES if quick else IMAGES) if images else (QUICK_ROWS if quick else ROWS)
    return shape, shape[1]


def inputs(case: str, quick: bool) -> list[Any]:
    """x, weight, bias, the gradient from above, and a residual."""
    import numpy as np

    shape, size = shapes(case, quick)
    rng = np.random.default_rng(0)
    made = (rng.standard_normal(s, dtype=np.float32) for s in (shape, size, size, shape, shape))
    return list(made)


def own_forward(case: str) -> Callable[..., Any]:
    import gpugrad as gg

    return {
        "layer norm": lambda x, w, b, r: gg.layer_norm(x, w, b),
        "rms norm": lambda x, w, b, r: gg.rms_norm(x, w),
        "residual, layer norm": lambda x, w, b, r: gg.add_layer_norm(x, r, w, b),
        "group norm": lambda x, w, b, r: gg.group_norm(x, w, b, groups=GROUPS),
        "batch norm": lambda x, w, b, r: gg.batch_norm(x, w, b)[0],
    }[case]


def torch_forward(case: str, size: int) -> Callable[..., Any]:
    from torch.nn import functional as F

    def with_residual(x: Any, w: Any, b: Any, r: Any) -> Any:
        total = x + r
        return F.layer_norm(total, (size,), w, b), total

    return {
        "layer norm": lambda x, w, b, r: F.layer_norm(x, (size,), w, b),
        "rms norm": lambda x, w, b, r: F.rms_norm(x, (size,), w, 1e-5),
        "residual, layer norm": with_residual,
        "group norm": lambda x, w, b, r: F.group_norm(x, GROUPS, w, b),
        "batch norm": lambda x, w, b, r: F.batch_norm(x, None, None, w, b, training=True),
    }[case]


CASES = ("layer norm", "rms norm", "residual, layer norm", "group norm", "batch norm")


def results(y: Any, x: Any, w: Any, b: Any) -> tuple[Any, ...]:
    return tuple(v for v in (y, x.grad, w.grad, b.grad) if v is not None)


def with_gpugrad(case: str, quick: bool, mode: str) -> Run:
    import gpugrad as gg

    x, w, b, g, r = (gg.tensor(v) for v in inputs(case, quick))
    for v in (x, w, b):
        v.requires_grad_()
    forward = own_forward(case)

    def run() -> tuple[Any, ...]:
        x.grad = w.grad = b.grad = None
        with gg.use_kernels(mode):
            y = forward(x, w, b, r)
            if isinstance(y, tuple):
                y, total = y
                total.backward(g, retain_graph=True)
            y.backward(g)
        return tuple(v.data for v in results(y.detach(), x, w, b))

    return run


def with_torch(case: str, quick: bool, compiled: bool) -> Run:
    import torch

    torch.set_num_threads(2)
    x, w, b, g, r = (torch.tensor(v) for v in inputs(case, quick))
    for v in (x, w, b):
        v.requires_grad_()
    forward = torch_forward(case, shapes(case, quick)[1])
    if compiled:
        forward = torch.compile(forward)

    def run() -> tuple[Any, ...]:
        x.grad = w.grad = b.grad = None
        y = forward(x, w, b, r)
        if isinstance(y, tuple):
            torch.autograd.backward(y, (g, g))
            y = y[0]
        else:
            y.backward(g)
        return results(y.detach(), x, w, b)

    return run


def with_jax(quick: bool) -> Run:
    import jax

    def norm(x: Any, w: Any, b: Any) -> Any:
        d = x - x.mean(-1, keepdims=True)
        return d * jax.lax.rsqrt((d * d).mean(-1, keepdims=True) + 1e-5) * w + b

    def both(x: Any, w: Any, b: Any, g: Any) -> tuple[Any, ...]:
        y, back = jax.vjp(norm, x, w, b)
        return y, *back(g)

    arrays = [jax.numpy.asarray(v) for v in inputs("layer norm", quick)[:4]]
    compiled = jax.jit(both)
    return lambda: tuple(jax.block_until_ready(compiled(*arrays)))


def contenders(case: str, quick: bool) -> dict[str, Run]:
    """Everybody that is installed, by name."""
    found: dict[str, Run] = {
        "gpugrad": with_gpugrad(case, quick, "require"),
        "gpugrad, kernels off": with_gpugrad(case, quick, "off"),
    }
    if importlib.util.find_spec("torch"):
        found["torch eager"] = with_torch(case, quick, compiled=False)
        found["torch.compile"] = with_torch(case, quick, compiled=True)
    if case == "layer norm" and importlib.util.find_spec("jax"):
        found["jax.jit"] = with_jax(quick)
    return found


def agree(case: str, runs: dict[str, Run]) -> None:
    """Raise unless all contenders compute the same."""
    import numpy as np

    own = [np.asarray(v) for v in runs["gpugrad"]()]
    for name, run in runs.items():
        for k, (a, b) in enumerate(zip(own, run(), strict=True)):
            # Gradients of weight and bias are sums of up to 200,000 terms of size 1.
            near = 1e-4 if k < 2 else 1e-5 * (a.size and own[0].size / a.size) ** 0.5 + 1e-3
            worst = float(np.abs(a - np.asarray(b)).max())
            if not worst <= near * max(1.0, float(np.abs(a).max())):
                raise RuntimeError(f"{case}: {name} disagrees on result {k} by {worst}")


def measure(quick: bool) -> dict[str, Any]:
    """Seconds per turn of everybody, case by case."""
    found = {}
    for case in CASES:
        runs = contenders(case, quick)
        agree(case, runs)
        found[case] = common.alternate(runs, rounds=3 if quick else 11)
    return found


def best_of(seconds: dict[str, list[float]], prefix: str) -> str | None:
    """The quickest contender whose name starts so."""
    names = [name for name in seconds if name.startswith(prefix)]
    return min(names, key=lambda n: common.spread(seconds[n])["median"], default=None)


def report(quick: bool) -> dict[str, Any]:
    found = common.measure(__file__, *(["--quick"] if quick else []), threads=2, timeout=1200)
    rows, verdicts = [], []
    for case, seconds in found.items():
        own = seconds["gpugrad"]
        rows += [
            {"case": case, "contender": name, **common.spread(s, 1e3),
             "over gpugrad": common.ratio(s, own)["median"]}
            for name, s in seconds.items()
        ]  # fmt: skip
        best = best_of(seconds, "torch")
        what = f"{case}, forward and backward, over PyTorch's best"
        if best is None:
            verdicts.append(common.not_run(what, "PyTorch is not installed"))
        else:
            limit = SPEED_UP if case == "layer norm" else 1.0
            gained = common.ratio(seconds[best], own)["median"]
            verdicts.append(common.verdict(f"{what} ({best})", gained, limit, "x", at_least=True))
    return {"benchmark": "norm", "quick": quick, "threads": 2, **common.provenance(),
            "results": found, "verdicts": verdicts, "table": common.table(rows)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small arrays: a check, no result")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        common.write_json(options.measure, measure(options.quick))
        return
    common.finish(report(options.quick), options.json)


if __name__ == "__main__":
    main()
