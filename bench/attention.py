"""Attention forward and backward, from one projection's heads, against PyTorch's.

``python bench/attention.py [--quick] [--json PATH]``. float32, two threads, causal and not. The
contenders take turns, each in a process of its own, and must agree on the gradient. Two of them are
gpugrad: `F.scaled_dot_product_attention` on views of the projection, and the operation that takes
the projection as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

#: Batch, heads, length, features of a head, causality; and for a quick check.
CASES = {
    "16 x 4 heads, 64 x 32, causal": ((16, 4, 64, 32, True), (2, 2, 16, 8, True)),
    "2 x 4 heads, 1024 x 64, causal": ((2, 4, 1024, 64, True), (1, 2, 64, 8, True)),
    "2 x 4 heads, 1024 x 64": ((2, 4, 1024, 64, False), (1, 2, 64, 8, False)),
}

THREADS = 2

Sizes = tuple[Any, ...]
#: One pass; it returns the gradient of the projection.
Pass = Callable[[], Any]


def operands(sizes: Sizes) -> tuple[Any, Any]:
    """The projection, (batch, length, 3·heads·features), and the gradient of the result."""
    batch, heads, length, features, _ = sizes
    rng = np.random.default_rng(0)
    width = heads * features
    return (rng.standard_normal((batch, length, 3 * width), dtype=np.float32),
            rng.standard_normal((batch, length, width), dtype=np.float32))  # fmt: skip


def on_views(library: Any, unstack: Callable[..., Any], sizes: Sizes) -> Pass:
    """The same words for both libraries; `unstack` cuts an array along an axis."""
    batch, heads, length, features, is_causal = sizes
    x, g = (library.tensor(v) for v in operands(sizes))
    x.requires_grad_()
    attention = library.nn.functional.scaled_dot_product_attention

    def run() -> Any:
        x.grad = None
        parts = x.reshape((batch, length, 3, heads, features))
        q, k, v = unstack(library.moveaxis(parts, 3, 1), 3)
        y = attention(q, k, v, is_causal=is_causal)
        library.moveaxis(y, 1, 2).reshape((batch, length, heads * features)).backward(g)
        return x.grad

    return run


def with_gpugrad(sizes: Sizes) -> Pass:
    import gpugrad as gg

    return on_views(gg, lambda x, axis: gg.unstack(x, axis=axis), sizes)


def with_packed(sizes: Sizes) -> Pass:
    import gpugrad as gg
    from gpugrad.ops.attention import packed_attention

    _, heads, _, _, is_causal = sizes
    x, g = (gg.tensor(v) for v in operands(sizes))
    x.requires_grad_()

    def run() -> Any:
        x.grad = None
        packed_attention(x, heads=heads, is_causal=is_causal).backward(g)
        return x.grad

    return run


def with_torch(sizes: Sizes) -> Pass:
    import torch

    torch.set_num_threads(THREADS)
    return on_views(torch, torch.unbind, sizes)


#: Everybody, by name: the library that has to be installed, and what makes the contender.
CONTENDERS: dict[str, tuple[str, Callable[[Sizes], Pass]]] = {
    "gpugrad, packed": ("numpy", with_packed),
    "gpugrad": ("numpy", with_gpugrad),
    "torch": ("torch", with_torch),
}


def serve(name: str, case: str, quick: bool) -> None:
    """Be the contender `name`; the answer is some of the gradient."""
    run = CONTENDERS[name][1](CASES[case][quick])

    def answer() -> list[float]:
        flat = run().detach().numpy().reshape(-1)
        return [float(x) for x in flat[:: max(1, flat.size // 200)]]

    common.serve(run, answer)


def measure(case: str, quick: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds per pass of everybody who is installed."""
    commands = {
        name: ["--serve", name, "--case", case, *(["--quick"] if quick else [])]
        for name, (library, _) in CONTENDERS.items()
        if importlib.util.find_spec(library)
    }
    seconds, answers = common.alternate_processes(
        __file__, commands, rounds=rounds, threads=THREADS
    )
    for name, found in answers.items():
        worst = max(abs(a - b) for a, b in zip(answers["gpugrad"], found, strict=True))
        if not worst <= 1e-4:
            raise RuntimeError(f"{name} disagrees by {worst}")
    return seconds


def report(quick: bool) -> dict[str, Any]:
    results = {case: measure(case, quick, rounds=2 if quick else 15) for case in CASES}
    rows, verdicts = [], []
    for case, timed in results.items():
        own = timed["gpugrad"]
        rows += [
            {"case": case, "contender": name, **common.spread(s, 1e3),
             "over gpugrad": common.ratio(s, own)["median"]}
            for name, s in timed.items()
        ]  # fmt: skip
        what = f"attention, {case}"
        verdicts.append(
            common.verdict(f"{what}, torch over gpugrad",
                           common.ratio(timed["torch"], own)["median"], 1.0, "x", at_least=True)
            if "torch" in timed else common.not_run(what, "torch is not installed")
        )  # fmt: skip
    return {"benchmark": "attention", "quick": quick, "threads": THREADS, **common.provenance(),
            "results": results, "verdicts": verdicts,
            "table": common.table(rows)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small operands: a check, no result")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, options.case, options.quick)
        return
    common.finish(report(options.quick), options.json)


if __name__ == "__main__":
    main()
