"""Clipping by the global norm, and AdamW: 10 million float32 elements, and 2000 tiny tensors.

``python bench/optimizer.py [--quick] [--json PATH]``. Two threads. The contenders take turns,
each in a process of its own, and agree on the parameters after three steps. Gradients are there
already, where a backward pass of each library leaves them.
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

#: What has to be reached: over the best peer, and over PyTorch's default.
BEST, DEFAULT = 2.0, 20.0
CLIP, LR = 1.0, 1e-3
THREADS = 2

Step = Callable[[], Any]
#: One step, and the parameters as NumPy arrays.
Contender = tuple[Step, Callable[[], list[Any]]]


def arrays(count: int, size: int, seed: int) -> list[Any]:
    """So many float32 vectors."""
    import numpy as np

    return list(np.random.default_rng(seed).standard_normal((count, size), dtype=np.float32))


def with_gpugrad(count: int, size: int, mode: str) -> Contender:
    import gpugrad as gg

    params = [gg.tensor(x, requires_grad=True) for x in arrays(count, size, 0)]
    optimizer = gg.optim.AdamW(params, lr=LR)
    for p, g in zip(params, arrays(count, size, 1), strict=True):
        p.backward(gg.tensor(g))

    def step() -> None:
        with gg.use_kernels(mode):
            optimizer.step(clip=CLIP)

    return step, lambda: [p.detach().numpy() for p in params]


def with_torch(count: int, size: int, compiled: bool = False, **options: bool) -> Contender:
    import torch

    torch.set_num_threads(THREADS)
    params = [torch.tensor(x, requires_grad=True) for x in arrays(count, size, 0)]
    optimizer = torch.optim.AdamW(params, lr=LR, **options)
    for p, g in zip(params, arrays(count, size, 1), strict=True):
        p.grad = torch.tensor(g)
    foreach = options.get("foreach")

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, CLIP, foreach=foreach)
        optimizer.step()

    return torch.compile(step) if compiled else step, lambda: [p.detach().numpy() for p in params]


def with_jax(count: int, size: int) -> Contender:
    import jax
    import jax.numpy as jnp

    beta1, beta2, eps, decay = 0.9, 0.999, 1e-8, 1e-2

    def update(state: Any, grads: Any) -> Any:
        params, means, squares, n = state
        norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in grads))
        factor = jnp.minimum(CLIP / (norm + 1e-6), 1.0)
        n = n + 1
        kept: list[tuple[Any, Any, Any]] = []
        for p, m, v, g in zip(params, means, squares, grads, strict=True):
            m = beta1 * m + (1 - beta1) * factor * g
            v = beta2 * v + (1 - beta2) * jnp.square(factor * g)
            root = jnp.sqrt(v / (1 - beta2**n)) + eps
            kept.append((p * (1 - LR * decay) - LR / (1 - beta1**n) * m / root, m, v))
        params, means, squares = (list(x) for x in zip(*kept, strict=True))
        return params, means, squares, n

    grads = [jnp.asarray(g) for g in arrays(count, size, 1)]
    params = [jnp.array(p) for p in arrays(count, size, 0)]
    zeros = [[jnp.zeros_like(p) for p in params] for _ in range(2)]
    state = (params, *zeros, jnp.float32(0))
    compiled = jax.jit(update, donate_argnums=0)

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(compiled(state, grads))

    return step, lambda: list(state[0])


#: Everybody, by name: the library that has to be installed, what makes the contender, and whether
#: it can do with thousands of tensors, for which compilers take minutes.
CONTENDERS: dict[str, tuple[str, Callable[..., Contender], bool]] = {
    "gpugrad": ("numpy", partial(with_gpugrad, mode="require"), True),
    "gpugrad, kernels off": ("numpy", partial(with_gpugrad, mode="off"), True),
    "torch, default": ("torch", with_torch, True),
    "torch, foreach": ("torch", partial(with_torch, foreach=True), True),
    "torch, fused": ("torch", partial(with_torch, fused=True), True),
    "torch.compile": ("torch", partial(with_torch, compiled=True), False),
    "jax.jit": ("jax", with_jax, False),
}


def serve(name: str, count: int, size: int) -> None:
    """Be the contender `name`; the answer is some of the parameters after three steps."""
    import numpy as np

    step, params = CONTENDERS[name][1](count, size)

    def answer() -> list[float]:
        for _ in range(3):
            step()
        flat = np.concatenate([np.ravel(p) for p in params()])
        return [float(x) for x in flat[:: flat.size // 200]]

    common.serve(step, answer)


def agree(answers: dict[str, list[float]]) -> None:
    """Raise unless everybody has the same parameters after three steps."""
    for name, found in answers.items():
        worst = max(abs(a - b) for a, b in zip(answers["gpugrad"], found, strict=True))
        if not worst <= 1e-5:
            raise RuntimeError(f"{name} disagrees by {worst}")


def measure(count: int, size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per turn of everybody who is installed."""
    commands = {
        name: ["--serve", name, "--count", str(count), "--size", str(size)]
        for name, (library, _, many) in CONTENDERS.items()
        if importlib.util.find_spec(library) and (many or count <= 100)
    }
    seconds, answers = common.alternate_processes(
        __file__, commands, rounds=rounds, threads=THREADS
    )
    agree(answers)
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
        peers = [n for n in timed if not n.startswith("gpugrad")]
        wanted = {
            "best": (min(peers, key=lambda n: sorted(timed[n])[len(timed[n]) // 2], default=None),
                     BEST),
            "default": ("torch, default" if "torch, default" in timed else None, DEFAULT),
        }  # fmt: skip
        peer, least = wanted["best" if case.startswith("10 M") else "default"]
        what = f"clip + AdamW, {case}"
        verdicts.append(
            common.verdict(f"{what}, over {peer}", common.ratio(timed[peer], own)["median"], least,
                           "x", at_least=True)
            if peer else common.not_run(what, "no peer is installed")
        )  # fmt: skip
    return {"benchmark": "optimizer", "quick": quick, "threads": THREADS, **common.provenance(),
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
