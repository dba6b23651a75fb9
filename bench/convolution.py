"""Layers of convolutional nets, forward and all gradients: convolution with bias and ReLU.

``python bench/convolution.py [--quick] [--json PATH]``. Two threads, float32. Inputs are results of
another layer, and lie in memory as each library leaves them. The contenders take turns, each in a
process of its own, and agree on the gradients before anything is timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

#: Channels, rows and columns, outputs, kernel, stride, padding, dilation, groups.
CASES = {
    "3x3, 32 to 64": (32, 26, 64, 3, 1, 0, 1, 1),
    "3x3, 64": (64, 56, 64, 3, 1, 1, 1, 1),
    "3x3, 512, 7x7 places": (512, 7, 512, 3, 1, 1, 1, 1),
    "3x3, stride 2": (128, 28, 256, 3, 2, 1, 1, 1),
    "1x1": (256, 28, 64, 1, 1, 0, 1, 1),
    "7x7, 3 channels": (3, 112, 64, 7, 2, 3, 1, 1),
    "each channel alone": (128, 28, 128, 3, 1, 1, 1, 128),
    "dilated": (64, 28, 64, 3, 1, 2, 2, 1),
    "4 groups": (128, 28, 128, 3, 1, 1, 1, 4),
}
BATCH, QUICK_BATCH = 16, 1

#: What the kernels have to reach, against PyTorch: over all cases, and in each.
SPEED_UP, LEAST = 1.1, 0.8
THREADS = 2

#: A run, and gradients of input, weight and bias.
Contender = tuple[Callable[[], Any], Callable[[], list[Any]]]


def inputs(case: str, batch: int) -> tuple[Any, Any, Any]:
    """What goes into the layer before: images, and weight and bias."""
    import numpy as np

    c, places, o, kernel, *_, groups = CASES[case]
    rng = np.random.default_rng(0)
    shapes = ((batch, c, places, places), (o, c // groups, kernel, kernel), (o,))
    x, w, b = (rng.standard_normal(s, dtype=np.float32) for s in shapes)
    return x, w / np.float32(math.sqrt(w[0].size)), b


def with_gpugrad(case: str, batch: int, mode: str = "require") -> Contender:
    import gpugrad as gg
    from gpugrad.nn import functional as F

    x, w, b = (gg.tensor(a) for a in inputs(case, batch))
    if mode == "require":  # as a layer before would leave it
        x = gg.asarray(x.data.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2))
    leaves = [a.requires_grad_() for a in (x, w, b)]
    options = CASES[case][4:]
    g = None

    def run() -> None:
        nonlocal g
        for a in leaves:
            a.grad = None
        with gg.use_kernels(mode):
            y = F.conv2d(*leaves, *options, activation="relu")
            g = gg.asarray(0 * y.data + 1) if g is None else g
            y.backward(g)

    return run, lambda: [a.grad.numpy() for a in leaves]


def with_torch(case: str, batch: int) -> Contender:
    import torch

    torch.set_num_threads(THREADS)
    leaves = [torch.tensor(a, requires_grad=True) for a in inputs(case, batch)]
    options = CASES[case][4:]
    g = None

    def run() -> None:
        nonlocal g
        for a in leaves:
            a.grad = None
        y = torch.relu(torch.nn.functional.conv2d(*leaves, *options))
        g = torch.ones_like(y) if g is None else g
        y.backward(g)

    return run, lambda: [a.grad.numpy() for a in leaves]


def with_jax(case: str, batch: int) -> Contender:
    import jax

    stride, padding, dilation, groups = CASES[case][4:]

    def layer(x: Any, w: Any, b: Any) -> Any:
        y = jax.lax.conv_general_dilated(
            x, w, (stride,) * 2, ((padding,) * 2,) * 2, rhs_dilation=(dilation,) * 2,
            feature_group_count=groups,
        )  # fmt: skip
        return jax.nn.relu(y + b[:, None, None]).sum()

    compiled = jax.jit(jax.grad(layer, argnums=(0, 1, 2)))
    arrays = [jax.numpy.asarray(a) for a in inputs(case, batch)]
    return lambda: jax.block_until_ready(compiled(*arrays)), lambda: list(compiled(*arrays))


#: Everybody, by name: the library that has to be installed, and what makes the contender.
CONTENDERS: dict[str, tuple[str, Callable[[str, int], Contender]]] = {
    "gpugrad": ("numpy", with_gpugrad),
    "gpugrad, kernels off": ("numpy", lambda case, batch: with_gpugrad(case, batch, "off")),
    "torch eager": ("torch", with_torch),
    "jax.jit": ("jax", with_jax),
}


def serve(name: str, case: str, batch: int) -> None:
    """Be a contender; the answer is some elements of the three gradients."""
    import numpy as np

    run, gradients = CONTENDERS[name][1](case, batch)

    def answer() -> list[float]:
        run()
        flat = [np.ravel(g) for g in gradients()]
        return [float(x) for g in flat for x in g[:: max(1, g.size // 50)]]

    common.serve(run, answer)


def measure(case: str, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per turn of everybody who is installed."""
    commands = {
        name: ["--serve", name, "--case", case, "--batch", str(batch)]
        for name, (library, _) in CONTENDERS.items()
        if importlib.util.find_spec(library)
    }
    seconds, answers = common.alternate_processes(
        __file__, commands, rounds=rounds, threads=THREADS
    )
    own = answers["gpugrad"]
    for name, found in answers.items():
        for a, b in zip(own, found, strict=True):
            if not abs(a - b) <= 1e-3 * (1 + abs(a)):
                raise RuntimeError(f"{case}: {name} disagrees by {abs(a - b)}")
    return seconds


def report(quick: bool) -> dict[str, Any]:
    batch = QUICK_BATCH if quick else BATCH
    cases = list(CASES)[:1] if quick else list(CASES)
    results = {case: measure(case, batch, rounds=2 if quick else 9) for case in cases}
    rows, speed_ups = [], {}
    for case, timed in results.items():
        own = timed["gpugrad"]
        rows += [
            {"case": case, "contender": name, **common.spread(s, 1e3),
             "over gpugrad": common.ratio(s, own)["median"]}
            for name, s in timed.items()
        ]  # fmt: skip
        if "torch eager" in timed:
            speed_ups[case] = common.ratio(timed["torch eager"], own)["median"]
    what = "convolution layers over PyTorch"
    if speed_ups:
        mean = math.exp(sum(map(math.log, speed_ups.values())) / len(speed_ups))
        worst = min(speed_ups, key=lambda case: speed_ups[case])
        verdicts = [
            common.verdict(f"{what}, geometric mean", mean, SPEED_UP, "x", at_least=True),
            common.verdict(f"{what}, least ({worst})", speed_ups[worst], LEAST, "x",
                           at_least=True),
        ]  # fmt: skip
    else:
        verdicts = [common.not_run(what, "PyTorch is not installed")]
    return {"benchmark": "convolution", "quick": quick, "threads": THREADS, **common.provenance(),
            "results": results, "verdicts": verdicts, "table": common.table(rows)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small layer: a check, no result")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, options.case, options.batch)
    else:
        common.finish(report(options.quick), options.json)


if __name__ == "__main__":
    main()
