"""A training step of a recurrent net: forward, loss, backward, clipping by the norm, AdamW.

``python bench/recurrent.py [--quick] [--only NAME,…] [--json PATH]``. Two threads, float32: a layer
of 256 units over 64 steps of 64 features, 32 sequences at a time, whose last state is classified.
Each contender has a process of its own and they take turns; all begin with the same parameters, and
must have the same losses in the first four steps before anything is timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

#: Hidden units, features, steps, batch, classes; and for a quick check.
SIZES = ((256, 64, 64, 32, 10), (16, 8, 5, 4, 3))

#: Rows of weights for each unit, by layer.
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}

#: What has to be reached with the first: times as fast as the best peer.
LEAST = 1.25
CLIP, LR = 1.0, 1e-3
THREADS = 2

#: One step, giving the loss as something that can be made a number later.
Step = Callable[[], Any]


def inputs(kind: str, sizes: tuple[int, ...]) -> tuple[dict[str, Any], Any, Any]:
    """Parameters by name, a batch and its classes."""
    import numpy as np

    hidden, features, steps, batch, classes = sizes
    rows, random = GATES[kind] * hidden, np.random.default_rng(0)
    shapes = {
        "layer.weight_ih_l0": (rows, features), "layer.weight_hh_l0": (rows, hidden),
        "layer.bias_ih_l0": (rows,), "layer.bias_hh_l0": (rows,),
        "head.weight": (classes, hidden), "head.bias": (classes,),
    }  # fmt: skip
    bound = 1 / math.sqrt(hidden)
    params = {k: random.uniform(-bound, bound, s).astype(np.float32) for k, s in shapes.items()}
    x = random.standard_normal((steps, batch, features), dtype=np.float32)
    return params, x, random.integers(0, classes, batch)


def net_of(nn: Any, kind: str, sizes: tuple[int, ...]) -> Any:
    """The net, made of the modules of a library."""
    hidden, features, _, _, classes = sizes

    class Net(nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(nn, kind)(features, hidden)
            self.head = nn.Linear(hidden, classes)

        def forward(self, x: Any) -> Any:
            output, _ = self.layer(x)
            return self.head(output[-1])

    return Net()


def with_gpugrad(kind: str, sizes: tuple[int, ...], mode: str = "auto") -> Step:
    import gpugrad as gg
    from gpugrad import nn

    params, data, classes = inputs(kind, sizes)
    net = net_of(nn, kind, sizes)
    net.load_state_dict(params)
    optimizer = gg.optim.AdamW(net.parameters(), lr=LR)
    x, target = gg.tensor(data), gg.tensor(classes)

    def step() -> Any:
        with gg.use_kernels(mode):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), target)
            loss.backward()
            optimizer.step(clip=CLIP)
        return loss

    return step


def with_torch(
    kind: str, sizes: tuple[int, ...], fused: bool = False, compiled: bool = False
) -> Step:
    import torch

    torch.set_num_threads(THREADS)
    params, data, classes = inputs(kind, sizes)
    net = net_of(torch.nn, kind, sizes)
    net.load_state_dict({k: torch.tensor(v) for k, v in params.items()})
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, fused=fused or None)
    x, target = torch.tensor(data), torch.tensor(classes)
    run = torch.compile(net) if compiled else net

    def step() -> Any:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(run(x), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        return loss

    return step


def with_jax(kind: str, sizes: tuple[int, ...]) -> Step:
    import jax
    import jax.numpy as jnp

    params, data, classes = inputs(kind, sizes)
    hidden = sizes[0]

    def cell(state: Any, p: Any, q: Any) -> Any:
        if kind == "RNN":
            return (jnp.tanh(p + q),)
        if kind == "GRU":
            (r, z, n), (qr, qz, qn) = jnp.split(p, 3, -1), jnp.split(q, 3, -1)
            r, z = jax.nn.sigmoid(r + qr), jax.nn.sigmoid(z + qz)
            return ((1 - z) * jnp.tanh(n + r * qn) + z * state[0],)
        i, f, g, o = jnp.split(p + q, 4, -1)
        c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    def loss_of(w: dict[str, Any]) -> Any:
        p = x @ w["layer.weight_ih_l0"].T + w["layer.bias_ih_l0"]

        def walk(state: Any, pt: Any) -> Any:
            q = state[0] @ w["layer.weight_hh_l0"].T + w["layer.bias_hh_l0"]
            return cell(state, pt, q), None

        zeros = jnp.zeros((x.shape[1], hidden))
        state, _ = jax.lax.scan(walk, (zeros, zeros)[: 2 if kind == "LSTM" else 1], p)
        shares = jax.nn.log_softmax(state[0] @ w["head.weight"].T + w["head.bias"])
        return -jnp.take_along_axis(shares, target[:, None], 1).mean()

    def update(w: Any, mean: Any, square: Any, n: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(w)
        norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in grads.values()))
        factor = jnp.minimum(CLIP / (norm + 1e-6), 1.0)
        n = n + 1
        new: tuple[dict[str, Any], ...] = ({}, {}, {})
        for k, g in grads.items():
            m = 0.9 * mean[k] + 0.1 * factor * g
            v = 0.999 * square[k] + 0.001 * jnp.square(factor * g)
            change = m / (1 - 0.9**n) / (jnp.sqrt(v / (1 - 0.999**n)) + 1e-8)
            for part, value in zip(new, (w[k] * (1 - LR * 0.01) - LR * change, m, v)):
                part[k] = value
        return (*new, n), loss

    x, target = jnp.asarray(data), jnp.asarray(classes)
    w = {k: jnp.asarray(v) for k, v in params.items()}
    zeros = {k: jnp.zeros_like(v) for k, v in w.items()}
    state = (w, zeros, {k: jnp.zeros_like(v) for k, v in w.items()}, jnp.float32(0))
    made = jax.jit(update, donate_argnums=(0, 1, 2, 3))

    def step() -> Any:
        nonlocal state
        state, loss = jax.block_until_ready(made(*state))
        return loss

    return step


#: Everybody, by name: the library that has to be installed, and what makes the contender.
CONTENDERS: dict[str, tuple[str, Callable[..., Step]]] = {
    "gpugrad": ("numpy", with_gpugrad),
    "gpugrad, kernels off": ("numpy", partial(with_gpugrad, mode="off")),
    "torch": ("torch", with_torch),
    "torch, fused": ("torch", partial(with_torch, fused=True)),
    "torch.compile": ("torch", partial(with_torch, fused=True, compiled=True)),
    "jax.jit": ("jax", with_jax),
}


def serve(name: str, kind: str, quick: bool) -> None:
    """Be the contender `name`; the answer is the losses of the first four steps."""
    step = CONTENDERS[name][1](kind, SIZES[quick])
    common.serve(step, lambda: [float(step()) for _ in range(4)])


def measure(kind: str, quick: bool) -> dict[str, list[float]]:
    """Seconds per turn of everybody who is installed."""
    commands = {
        name: ["--serve", name, "--kind", kind, *["--quick"] * quick]
        for name, (library, _) in CONTENDERS.items()
        if importlib.util.find_spec(library)
    }
    seconds, losses = common.alternate_processes(
        __file__, commands, rounds=2 if quick else 15, threads=THREADS
    )
    for name, found in losses.items():
        worst = max(abs(a - b) for a, b in zip(losses["gpugrad"], found, strict=True))
        if not worst <= 1e-4:
            raise RuntimeError(f"{kind}: {name} disagrees: losses {found}")
    return seconds


def report(quick: bool, kinds: tuple[str, ...] = tuple(GATES)) -> dict[str, Any]:
    rows, verdicts, seconds = [], [], {}
    for kind in kinds:
        seconds[kind] = timed = measure(kind, quick)
        own = timed["gpugrad"]
        rows += [
            {"case": f"{kind}, ms", "contender": name, **common.spread(s, 1e3),
             "over gpugrad": common.ratio(s, own)["median"]}
            for name, s in timed.items()
        ]  # fmt: skip
        peers = [name for name in timed if not name.startswith("gpugrad")]
        if not peers:
            verdicts.append(common.not_run(f"a step of {kind}", "no peer is installed"))
            continue
        best = min(peers, key=lambda name: sorted(timed[name])[len(timed[name]) // 2])
        verdicts.append(
            common.verdict(f"a step of {kind}, over {best}",
                           common.ratio(timed[best], own)["median"], LEAST, "x", at_least=True)
        )  # fmt: skip
    return {"benchmark": "recurrent", "quick": quick, "threads": THREADS, **common.provenance(),
            "results": seconds, "verdicts": verdicts, "table": common.table(rows)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small net: a check, no result")
    parser.add_argument("--only", help="layers, with commas between them")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, options.kind, options.quick)
        return
    kinds = tuple(options.only.split(",")) if options.only else tuple(GATES)
    common.finish(report(options.quick, kinds), options.json)


if __name__ == "__main__":
    main()
