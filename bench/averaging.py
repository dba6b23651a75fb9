"""An exponential average of a net's weights: 10 million float32 elements, and 2000 tiny tensors.

``python bench/averaging.py [--quick] [--json PATH]``. Two threads. The contenders take turns, each
in a process of its own, and agree on the averages after three updates. The parameters belong to an
optimiser, as they do in training.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

#: Number of tensors, elements of each; and for a quick check.
CASES = {
    "10 M elements in 50 tensors": ((50, 200_000), (50, 2_000)),
    "2000 tensors of 4 elements": ((2000, 4), (200, 4)),
}

#: What has to be reached, over the best peer.
LEAST = 1.0
DECAY = 0.99
THREADS = 2

#: One update, and the averages as NumPy arrays.
Contender = tuple[Callable[[], Any], Callable[[], list[Any]]]


def arrays(count: int, size: int) -> list[Any]:
    """So many float32 vectors."""
    import numpy as np

    return list(np.random.default_rng(0).standard_normal((count, size), dtype=np.float32))


def with_gpugrad(count: int, size: int, mode: str) -> Contender:
    import gpugrad as gg
    from gpugrad import nn

    net = nn.Module()
    for i, x in enumerate(arrays(count, size)):
        setattr(net, f"p{i}", nn.Parameter(gg.tensor(x)))
    optimizer = gg.optim.SGD(net.parameters(), lr=0.1)
    average = gg.optim.get_ema_multi_avg_fn(DECAY)
    averaged = gg.optim.AveragedModel(net, multi_avg_fn=average)
    averaged.update_parameters(net)
    with gg.no_grad():
        for p in net.parameters():
            p[...] = p * 0.5

    def step() -> None:
        with gg.use_kernels(mode):
            averaged.update_parameters(net)

    def averages() -> list[Any]:
        assert optimizer is not None  # it holds the buffers
        return [p.detach().numpy() for p in averaged.parameters()]

    return step, averages


def with_torch(count: int, size: int) -> Contender:
    import torch
    from torch.optim import swa_utils

    torch.set_num_threads(THREADS)
    net = torch.nn.Module()
    for i, x in enumerate(arrays(count, size)):
        setattr(net, f"p{i}", torch.nn.Parameter(torch.tensor(x)))
    average = swa_utils.get_ema_multi_avg_fn(DECAY)
    averaged = swa_utils.AveragedModel(net, multi_avg_fn=average)
    averaged.update_parameters(net)
    with torch.no_grad():
        for p in net.parameters():
            p *= 0.5
    return partial(averaged.update_parameters, net), lambda: [
        p.detach().numpy() for p in averaged.parameters()
    ]


#: Everybody, by name: the library that has to be installed, and what makes the contender.
CONTENDERS: dict[str, tuple[str, Callable[..., Contender]]] = {
    "gpugrad": ("numpy", partial(with_gpugrad, mode="require")),
    "gpugrad, kernels off": ("numpy", partial(with_gpugrad, mode="off")),
    "torch": ("torch", with_torch),
}


def serve(name: str, count: int, size: int) -> None:
    """Be the contender `name`; the answer is some of the averages after three updates."""
    import numpy as np

    step, averages = CONTENDERS[name][1](count, size)

    def answer() -> list[float]:
        for _ in range(3):
            step()
        flat = np.concatenate([np.ravel(p) for p in averages()])
        return [float(x) for x in flat[:: flat.size // 200]]

    common.serve(step, answer)


def measure(count: int, size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per turn of everybody who is installed."""
    commands = {
        name: ["--serve", name, "--count", str(count), "--size", str(size)]
        for name, (library, _) in CONTENDERS.items()
        if importlib.util.find_spec(library)
    }
    seconds, answers = common.alternate_processes(
        __file__, commands, rounds=rounds, threads=THREADS
    )
    for name, found in answers.items():
        worst = max(abs(a - b) for a, b in zip(answers["gpugrad"], found, strict=True))
        if not worst <= 1e-6:
            raise RuntimeError(f"{name} disagrees by {worst}")
    return seconds


def report(quick: bool) -> dict[str, Any]:
    seconds = {
        case: measure(*sizes[quick], rounds=2 if quick else 15) for case, sizes in CASES.items()
    }
    rows, verdicts = [], []
    for case, timed in seconds.items():
        own = timed["gpugrad"]
        rows += [
            {"case": case, "contender": name, **common.spread(s, 1e3),
             "over gpugrad": common.ratio(s, own)["median"]}
            for name, s in timed.items()
        ]  # fmt: skip
        what = f"average of weights, {case}, over torch"
        verdicts.append(
            common.verdict(what, common.ratio(timed["torch"], own)["median"], LEAST, "x",
                           at_least=True)
            if "torch" in timed else common.not_run(what, "torch is not installed")
        )  # fmt: skip
    return {"benchmark": "averaging", "quick": quick, "threads": THREADS, **common.provenance(),
            "results": seconds, "verdicts": verdicts, "table": common.table(rows)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small tensors: a check, no result")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, options.count, options.size)
        return
    common.finish(report(options.quick), options.json)


if __name__ == "__main__":
    main()
