"""Cross-entropy with 32768 classes, forward and backward: time, and memory beyond the logits.

``python bench/softmax.py [--quick] [--json PATH]``. Two threads, float32. For the time the
contenders take turns in one process, and agree before anything is timed; every turn ends with a
new gradient, as in training. For the memory each has a process of its own: the most that it has
resident while it works, beyond what it has after a first turn.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

#: Rows and classes; and for a quick check.
LOSS = ((4096, 32768), (64, 1000))
SOFTMAX = ((8192, 1024), (64, 100))

#: What has to be reached: times as fast as PyTorch at its best, and so much of its memory.
SPEED_UP, SHARE = 2.0, 0.5

#: Forward and backward, giving the loss (or nothing) and the gradient; and forgetting the gradient.
Turn = Callable[[], tuple[float, Any]]
Contender = tuple[Turn, Callable[[], None]]


def inputs(shape: tuple[int, int]) -> tuple[Any, Any]:
    """Logits and classes."""
    import numpy as np

    random = np.random.default_rng(0)
    return random.standard_normal(shape, dtype=np.float32), random.integers(0, shape[1], shape[0])


def with_gpugrad(case: str, shape: tuple[int, int], mode: str = "require") -> Contender:
    import gpugrad as gg

    logits, classes = inputs(shape)
    x, target = gg.asarray(logits).requires_grad_(), gg.asarray(classes)
    g = gg.asarray(logits[::-1].copy()) if case == "softmax" else None

    def turn() -> tuple[float, Any]:
        x.grad = None
        with gg.use_kernels(mode):
            if g is not None:
                gg.softmax(x).backward(g)
                return 0.0, x.grad
            loss = gg.cross_entropy(x, target)
            loss.backward()
        return loss.item(), x.grad

    def forget() -> None:
        x.grad = None

    return turn, forget


def with_torch(case: str, shape: tuple[int, int], compiled: bool = False) -> Contender:
    import torch

    torch.set_num_threads(2)
    logits, classes = inputs(shape)
    x, target = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(classes)
    g = torch.from_numpy(logits[::-1].copy()) if case == "softmax" else None
    softmax, cross_entropy = torch.nn.functional.softmax, torch.nn.functional.cross_entropy
    if compiled:
        softmax = torch.compile(lambda x, dim: torch.nn.functional.softmax(x, dim))
        cross_entropy = torch.compile(lambda x, t: torch.nn.functional.cross_entropy(x, t))

    def turn() -> tuple[float, Any]:
        x.grad = None
        if g is not None:
            softmax(x, -1).backward(g)
            return 0.0, x.grad
        loss = cross_entropy(x, target)
        loss.backward()
        return loss.item(), x.grad

    def forget() -> None:
        x.grad = None

    return turn, forget


def with_jax(case: str, shape: tuple[int, int]) -> Contender:
    import jax
    import jax.numpy as jnp

    logits, classes = inputs(shape)
    x, target, g = jnp.asarray(logits), jnp.asarray(classes), jnp.asarray(logits[::-1])

    def loss_of(x: Any) -> Any:
        if case == "softmax":
            return jnp.vdot(jax.nn.softmax(x), g)
        shares = jax.nn.log_softmax(x)
        return -jnp.take_along_axis(shares, target[:, None], 1).mean()

    both = jax.jit(jax.value_and_grad(loss_of))
    kept: list[Any] = []

    def turn() -> tuple[float, Any]:
        kept.clear()
        loss, gradient = jax.block_until_ready(both(x))
        kept.append(gradient)
        return 0.0 if case == "softmax" else float(loss), gradient

    return turn, kept.clear


#: Everybody, by name: the library that has to be installed, and what makes the contender.
CONTENDERS: dict[str, tuple[str, Callable[..., Contender]]] = {
    "gpugrad": ("numpy", with_gpugrad),
    "gpugrad, kernels off": ("numpy", partial(with_gpugrad, mode="off")),
    "torch": ("torch", with_torch),
    "torch.compile": ("torch", partial(with_torch, compiled=True)),
    "jax.jit": ("jax", with_jax),
}


def installed() -> list[str]:
    """The names of those that can take part."""
    return [name for name, (library, _) in CONTENDERS.items() if importlib.util.find_spec(library)]


def agree(found: dict[str, Turn]) -> None:
    """Raise unless everybody has the same loss and gradient."""
    import numpy as np

    loss, gradient = found["gpugrad"]()
    gradient = gradient.numpy()
    for name, turn in found.items():
        other, theirs = turn()
        wrong = np.abs(gradient[::17] - np.asarray(theirs)[::17]).max()
        if not (abs(loss - other) <= 1e-4 and wrong <= 1e-5 * np.abs(gradient).max()):
            raise RuntimeError(f"{name} disagrees: a loss of {other}, not {loss}; {wrong}")


def measure_time(case: str, shape: tuple[int, int], quick: bool) -> dict[str, list[float]]:
    """Seconds per turn of everybody."""
    made = {name: CONTENDERS[name][1](case, shape) for name in installed()}
    turns = {name: turn for name, (turn, _) in made.items()}
    agree(turns)

    def alone(name: str) -> Callable[[], Any]:
        turn, forget = made[name]

        # Gradients of others take no memory meanwhile; giving it back is a part of the turn.
        def run() -> None:
            turn()
            forget()

        return run

    return common.alternate({name: alone(name) for name in made}, rounds=3 if quick else 11)


def measure_memory(name: str, shape: tuple[int, int]) -> dict[str, Any]:
    """Bytes beyond the inputs at the peak of one turn."""
    turn, forget = CONTENDERS[name][1]("cross-entropy", shape)
    turn()
    forget()
    gc.collect()
    if name.startswith("gpugrad"):  # what is kept to be used again is taken, too
        from gpugrad.backend import scratch

        scratch.release()
    before = common.resident()
    exact = common.forget_peak()
    turn()
    return {"bytes": common.peak_resident() - before, "exact": exact}


def report(quick: bool) -> dict[str, Any]:
    flags = ["--quick"] if quick else []
    rows, verdicts, seconds = [], [], {}
    for case, shapes in {"cross-entropy": LOSS, "softmax": SOFTMAX}.items():
        seconds[case] = timed = common.measure(__file__, *flags, "--case", case, threads=2)
        for name, s in timed.items():
            over = common.ratio(s, timed["gpugrad"])["median"]
            size = "{}×{}".format(*shapes[quick])
            rows.append({"case": f"{case} {size}, ms", "contender": name,
                         **common.spread(s, 1e3), "over gpugrad": over})  # fmt: skip
    memory = {
        name: common.measure(__file__, *flags, "--memory", name, threads=2)["bytes"]
        for name in installed()
    }
    own, logits = max(memory["gpugrad"], 1), 4 * LOSS[quick][0] * LOSS[quick][1]
    rows += [
        {"case": "cross-entropy, memory in sizes of the logits", "contender": name,
         "median": common.round_to(used / logits), "over gpugrad": common.round_to(used / own)}
        for name, used in memory.items()
    ]  # fmt: skip
    timed = seconds["cross-entropy"]
    peers = [name for name in timed if name.startswith("torch")]
    if peers:
        best = min(peers, key=lambda name: sorted(timed[name])[len(timed[name]) // 2])
        speed_up = common.ratio(timed[best], timed["gpugrad"])["median"]
        verdicts = [
            common.verdict(f"softmax + cross-entropy, over {best}", speed_up, SPEED_UP, "x",
                           at_least=True),
            common.verdict("its peak memory, of PyTorch's", own / memory["torch"], SHARE, "x"),
        ]  # fmt: skip
    else:
        verdicts = [common.not_run("softmax + cross-entropy", "no peer is installed")]
    return {"benchmark": "softmax", "quick": quick, "threads": 2, **common.provenance(),
            "results": {"seconds": seconds, "bytes": memory}, "verdicts": verdicts,
            "table": common.table(rows)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small arrays: a check, no result")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure and options.memory:
        found: Any = measure_memory(options.memory, LOSS[options.quick])
        common.write_json(options.measure, found)
    elif options.measure:
        shapes = LOSS if options.case == "cross-entropy" else SOFTMAX
        found = measure_time(options.case, shapes[options.quick], options.quick)
        common.write_json(options.measure, found)
    else:
        common.finish(report(options.quick), options.json)


if __name__ == "__main__":
    main()
