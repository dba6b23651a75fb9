"""Whole training steps: forward, loss, backward, clipping by the global norm, AdamW.

``python bench/steps.py [--quick] [--only NAME,…] [--json PATH]``. Two threads, float32. Each
contender has a process of its own and they take turns; all begin with the same parameters and
batches, and must have the same losses in the first four steps before anything is timed. The nets of
gpugrad and of PyTorch are made by one text: only what it is given as `nn` differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

THREADS = 2
CLIP, LR = 1.0, 1e-3
BATCHES = 4

Arrays = dict[str, Any]
#: One step, giving the loss as something that can be made a number later.
Step = Callable[[], Any]


@dataclass(frozen=True)
class Workload:
    """A net and its data.

    Attributes
    ----------
    net:
        The module, from a library's `nn`.
    data:
        Inputs and targets, of NumPy, from a generator.
    jax:
        The net's result from parameters by name and inputs, with `jax` and `jax.numpy`; None if
        nobody has written it.
    least:
        How many times as fast as the best peer it must be.
    shape:
        What the result of the net is reshaped to before the loss, `(-1, classes)`; None if nothing.
    without:
        Contenders that cannot take part.
    """

    net: Callable[[Any], Any]
    data: Callable[[Any], tuple[Any, Any]]
    jax: Callable[[Any, Any, Arrays, Any], Any] | None
    least: float
    without: tuple[str, ...] = ()


# -- the nets --------------------------------------------------------------------------------------


def mlp(nn: Any) -> Any:
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def mlp_data(random: Any) -> tuple[Any, Any]:
    return random.standard_normal((128, 784), dtype="float32"), random.integers(0, 10, 128)


def mlp_jax(jax: Any, jnp: Any, p: Arrays, x: Any) -> Any:
    for i in (0, 2):
        x = jax.nn.relu(x @ p[f"{i}.weight"].T + p[f"{i}.bias"])
    return x @ p["4.weight"].T + p["4.bias"]


DEPTH = 100


def deep(nn: Any) -> Any:
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def deep_data(random: Any) -> tuple[Any, Any]:
    return random.standard_normal((64, 64), dtype="float32"), random.integers(0, 10, 64)


def deep_jax(jax: Any, jnp: Any, p: Arrays, x: Any) -> Any:
    for i in range(0, 2 * DEPTH, 2):
        x = jnp.tanh(x @ p[f"{i}.weight"].T + p[f"{i}.bias"])
    return x @ p[f"{2 * DEPTH}.weight"].T + p[f"{2 * DEPTH}.bias"]


def cnn(nn: Any) -> Any:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def cnn_data(random: Any) -> tuple[Any, Any]:
    return random.standard_normal((64, 1, 28, 28), dtype="float32"), random.integers(0, 10, 64)


def cnn_jax(jax: Any, jnp: Any, p: Arrays, x: Any) -> Any:
    for i in (0, 2):
        x = jax.lax.conv(x, p[f"{i}.weight"], (1, 1), "VALID")
        x = jax.nn.relu(x + p[f"{i}.bias"][:, None, None])
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    x = jax.nn.relu(x.reshape(x.shape[0], -1) @ p["6.weight"].T + p["6.bias"])
    return x @ p["8.weight"].T + p["8.bias"]


WORKLOADS = {
    "mlp": Workload(mlp, mlp_data, mlp_jax, 1.3),
    "deep": Workload(deep, deep_data, deep_jax, 1.5),
    # PyTorch 2.13 compiles gradients of zero for what is before the pool.
    "cnn": Workload(cnn, cnn_data, cnn_jax, 1.6, without=("torch.compile, fused",)),
}


# -- the contenders --------------------------------------------------------------------------------


def initial(shapes: dict[str, tuple[int, ...]]) -> Arrays:
    """Parameters for everybody: normal, with a variance of 1 / fan-in for what has one."""
    import numpy as np

    random = np.random.default_rng(7)
    made = {}
    for name, shape in shapes.items():
        x = random.standard_normal(shape, dtype=np.float32)
        if len(shape) < 2:
            made[name] = np.float32(0.01) * x + np.float32(name.endswith("norm.weight"))
        else:
            made[name] = x / np.float32(math.sqrt(math.prod(shape[1:])))
    return made


def batches(work: Workload) -> list[tuple[Any, Any]]:
    import numpy as np

    random = np.random.default_rng(11)
    return [work.data(random) for _ in range(BATCHES)]


def with_gpugrad(work: Workload, mode: str = "auto") -> Step:
    import gpugrad as gg
    from gpugrad import nn

    net = work.net(nn)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    net.load_state_dict({k: gg.tensor(x) for k, x in initial(shapes).items()}, strict=False)
    optimizer = gg.optim.AdamW(net.parameters(), lr=LR)
    data = [(gg.tensor(x), gg.tensor(t)) for x, t in batches(work)]
    number = 0

    def step() -> Any:
        nonlocal number
        x, target = data[number % BATCHES]
        number += 1
        with gg.use_kernels(mode):
            optimizer.zero_grad()
            y = net(x)
            loss = nn.functional.cross_entropy(y.reshape((-1, y.shape[-1])), target.reshape(-1))
            loss.backward()
            optimizer.step(clip=CLIP)
        return loss

    return step


def with_torch(work: Workload, fused: bool = False, compiled: bool = False) -> Step:
    import torch
    from torch import nn

    torch.set_num_threads(THREADS)
    net = work.net(nn)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    state = {k: torch.from_numpy(x) for k, x in initial(shapes).items()}
    net.load_state_dict(state, strict=False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, fused=fused)
    data = [(torch.from_numpy(x), torch.from_numpy(t)) for x, t in batches(work)]
    run = torch.compile(net) if compiled else net
    number = 0

    def step() -> Any:
        nonlocal number
        x, target = data[number % BATCHES]
        number += 1
        optimizer.zero_grad()
        y = run(x)
        loss = nn.functional.cross_entropy(y.reshape(-1, y.shape[-1]), target.reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        return loss.detach()

    return step


def with_jax(work: Workload) -> Step:
    import jax
    import jax.numpy as jnp

    from gpugrad import nn

    assert work.jax is not None
    net = partial(work.jax, jax, jnp)
    shapes = {name: p.shape for name, p in work.net(nn).named_parameters()}
    params = {name: jnp.asarray(x) for name, x in initial(shapes).items()}
    data = [(jnp.asarray(x), jnp.asarray(t)) for x, t in batches(work)]
    beta1, beta2, eps, decay = 0.9, 0.999, 1e-8, 1e-2

    def loss_of(params: Arrays, x: Any, target: Any) -> Any:
        y = net(params, x)
        shares = jax.nn.log_softmax(y.reshape(-1, y.shape[-1]))
        return -jnp.take_along_axis(shares, target.reshape(-1, 1), 1).mean()

    def update(state: Any, x: Any, target: Any) -> Any:
        params, means, squares, n = state
        loss, grads = jax.value_and_grad(loss_of)(params, x, target)
        norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in grads.values()))
        factor = jnp.minimum(CLIP / (norm + 1e-6), 1.0)
        n = n + 1
        new: list[Arrays] = [{}, {}, {}]
        for k, p in params.items():
            g = factor * grads[k]
            m = beta1 * means[k] + (1 - beta1) * g
            v = beta2 * squares[k] + (1 - beta2) * jnp.square(g)
            root = jnp.sqrt(v / (1 - beta2**n)) + eps
            p = p * (1 - LR * decay) - LR / (1 - beta1**n) * m / root
            for kept, value in zip(new, (p, m, v), strict=True):
                kept[k] = value
        return (*new, n), loss

    zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(2)]
    state = (params, *zeros, jnp.float32(0))
    compiled = jax.jit(update, donate_argnums=0)
    number = 0

    def step() -> Any:
        nonlocal state, number
        state, loss = jax.block_until_ready(compiled(state, *data[number % BATCHES]))
        number += 1
        return loss

    return step


#: Everybody, by name: the library that has to be installed, and what makes the contender.
CONTENDERS: dict[str, tuple[str, Callable[[Workload], Step]]] = {
    "gpugrad": ("numpy", with_gpugrad),
    "gpugrad, kernels off": ("numpy", partial(with_gpugrad, mode="off")),
    "torch": ("torch", with_torch),
    "torch, fused": ("torch", partial(with_torch, fused=True)),
    "torch.compile, fused": ("torch", partial(with_torch, fused=True, compiled=True)),
    "jax.jit": ("jax", with_jax),
}


def serve(contender: str, workload: str) -> None:
    """Be a contender; the answer is the losses of the first four steps."""
    step = CONTENDERS[contender][1](WORKLOADS[workload])
    common.serve(step, lambda: [float(step()) for _ in range(BATCHES)])


def measure(workload: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of everybody who is installed, in each round."""
    work = WORKLOADS[workload]
    commands = {
        name: ["--serve", name, "--only", workload]
        for name, (library, _) in CONTENDERS.items()
        if importlib.util.find_spec(library)
        and (library != "jax" or work.jax)
        and name not in work.without
    }
    seconds, answers = common.alternate_processes(
        __file__, commands, rounds=rounds, threads=THREADS
    )
    for name, losses in answers.items():
        worst = max(abs(a - b) for a, b in zip(losses, answers["gpugrad"], strict=True))
        if not worst <= 1e-3:  # a hundred layers make differences grow
            raise RuntimeError(f"{workload}: {name} has losses {losses}, not {answers['gpugrad']}")
    return seconds


def report(quick: bool, only: str = "") -> dict[str, Any]:
    rows, verdicts, results = [], [], {}
    for workload in only.split(",") if only else WORKLOADS:
        results[workload] = timed = measure(workload, rounds=2 if quick else 15)
        own = timed["gpugrad"]
        rows += [
            {"step, ms": workload, "contender": name, **common.spread(s, 1e3),
             "over gpugrad": common.ratio(s, own)["median"]}
            for name, s in timed.items()
        ]  # fmt: skip
        peers = {name: s for name, s in timed.items() if not name.startswith("gpugrad")}
        if not peers:
            verdicts.append(common.not_run(f"step of {workload}", "no peer is installed"))
            continue
        best = min(peers, key=lambda name: sorted(peers[name])[len(peers[name]) // 2])
        speed_up = common.ratio(peers[best], own)["median"]
        verdicts.append(common.verdict(f"step of {workload}, over {best}", speed_up,
                                       WORKLOADS[workload].least, "x", at_least=True))  # fmt: skip
    return {"benchmark": "steps", "quick": quick, "threads": THREADS, **common.provenance(),
            "results": results, "verdicts": verdicts, "table": common.table(rows)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: a check, no result")
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, options.only)
    else:
        common.finish(report(options.quick, options.only), options.json)


if __name__ == "__main__":
    main()
