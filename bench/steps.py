"""Whole training steps: forward, loss, backward, clipping by the global norm, AdamW.

``python bench/steps.py [--quick] [--only NAME,…] [--json PATH]``. All begin with the same
parameters and batches, and must have the same losses in the first four steps. The nets of gpugrad
and of PyTorch are made by one text: only what it is given as `nn` differs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpugrad.bench import workload
from gpugrad.bench.workload import Contender, Job, Maker, Workload

CLIP, LR = 1.0, 1e-3
BETA1, BETA2, EPS, DECAY = 0.9, 0.999, 1e-8, 1e-2
#: Batches that take turns, and steps whose losses are compared.
BATCHES = 4

Arrays = dict[str, Any]
#: The net of a size, made of a library's modules.
Net = Callable[..., Any]
#: Inputs and targets, of NumPy, from a generator and a size.
Data = Callable[..., tuple[Any, Any]]
#: The net's result from `jax`, a size, parameters by name and inputs.
JaxNet = Callable[[Any, tuple[Any, ...], Arrays, Any], Any]


# -- the frame ------------------------------------------------------------------------------------


def step(
    name: str, what: str, *, net: Net, data: Data, jax: JaxNet | None = None, **options: Any
) -> Workload:
    """A workload of training steps; see the names above for its parts."""
    makers: dict[str, Maker] = {
        "gpugrad": partial(_with_gpugrad, net, data),
        "torch": partial(_with_torch, net, data),
    }
    if jax is not None:
        makers["jax"] = partial(_with_jax, net, data, jax)
    tolerance = options.pop("tolerance", 1e-4)
    return Workload(
        name=name, what=what, makers=makers, kind="step", tolerance=tolerance, compiles=True,
        **options,
    )  # fmt: skip


def initial(shapes: dict[str, tuple[int, ...]]) -> Arrays:
    """Parameters for everybody: normal, with a variance of 1 / fan-in for what has one."""
    import numpy as np

    random = np.random.default_rng(7)
    made = {}
    for name, shape in shapes.items():
        x = random.standard_normal(shape, dtype=np.float32)
        if len(shape) < 2:
            gain = "norm" in name and name.endswith("weight")
            made[name] = np.float32(0.01) * x + np.float32(gain)
        else:
            made[name] = x / np.float32(math.sqrt(math.prod(shape[1:])))
    return made


def batches(data: Data, size: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    import numpy as np

    random = np.random.default_rng(11)
    return [data(random, *size) for _ in range(BATCHES)]


def losses(run: Callable[[], Any]) -> Job:
    """The job of steps that give their loss."""
    return Job(run, lambda: [[float(run()) for _ in range(BATCHES)]])


def _with_gpugrad(net: Net, data: Data, size: tuple[Any, ...], who: Contender) -> Job:
    import gpugrad as gg
    from gpugrad import nn

    model = net(nn, *size)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    model.load_state_dict({k: gg.tensor(x) for k, x in initial(shapes).items()}, strict=False)
    model.to(who.device)
    optimizer = gg.optim.AdamW(model.parameters(), lr=LR)
    rows = [
        (gg.tensor(x, device=who.device), gg.tensor(t, device=who.device))
        for x, t in batches(data, size)
    ]
    number = 0

    def update(x: Any, target: Any) -> Any:
        optimizer.zero_grad()
        y = model(x)
        loss = nn.functional.cross_entropy(y.reshape((-1, y.shape[-1])), target.reshape(-1))
        loss.backward()
        optimizer.step(clip=CLIP)
        return loss.detach()

    compiled = who.variant == "compiled"
    function = gg.compile(update) if compiled else update

    def run() -> Any:
        nonlocal number
        x, target = rows[number % BATCHES]
        number += 1
        with gg.use_kernels("auto" if compiled else who.variant):
            return function(x, target)

    return losses(run)


def _with_torch(net: Net, data: Data, size: tuple[Any, ...], who: Contender) -> Job:
    import torch
    from torch import nn

    workload.start_torch()
    model = net(nn, *size)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    state = {k: torch.from_numpy(x) for k, x in initial(shapes).items()}
    model.load_state_dict(state, strict=False)
    model.to(who.device)
    fused = who.variant in ("fused", "compiled")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=fused or None)
    rows = [
        (torch.tensor(x, device=who.device), torch.tensor(t, device=who.device))
        for x, t in batches(data, size)
    ]
    forward = workload.compiled(model, who)
    number = 0

    def run() -> Any:
        nonlocal number
        x, target = rows[number % BATCHES]
        number += 1
        optimizer.zero_grad()
        y = forward(x)
        loss = nn.functional.cross_entropy(y.reshape(-1, y.shape[-1]), target.reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.detach()

    return losses(run)


def adamw(jnp: Any, state: Any, grads: Any) -> Any:
    """Clipping by the norm and AdamW on dictionaries of arrays, for JAX: the next state."""
    params, means, squares, n = state
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in grads.values()))
    factor = jnp.minimum(CLIP / (norm + 1e-6), 1.0)
    n = n + 1
    new: tuple[Arrays, Arrays, Arrays] = ({}, {}, {})
    for k, p in params.items():
        g = factor * grads[k]
        m = BETA1 * means[k] + (1 - BETA1) * g
        v = BETA2 * squares[k] + (1 - BETA2) * jnp.square(g)
        root = jnp.sqrt(v / (1 - BETA2**n)) + EPS
        p = p * (1 - LR * DECAY) - LR / (1 - BETA1**n) * m / root
        for kept, value in zip(new, (p, m, v)):
            kept[k] = value
    return *new, n


def start_adamw(jax: Any, params: Arrays) -> Any:
    """The state before the first step."""
    zeros = [jax.tree.map(jax.numpy.zeros_like, params) for _ in range(2)]
    return (params, *zeros, jax.numpy.float32(0))


def _with_jax(net: Net, data: Data, forward: JaxNet, size: tuple[Any, ...], who: Contender) -> Job:
    import jax
    import jax.numpy as jnp

    from gpugrad import nn

    shapes = {name: p.shape for name, p in net(nn, *size).named_parameters()}
    params = {name: jnp.asarray(x) for name, x in initial(shapes).items()}
    rows = [(jnp.asarray(x), jnp.asarray(t)) for x, t in batches(data, size)]

    def loss_of(params: Arrays, x: Any, target: Any) -> Any:
        y = forward(jax, size, params, x)
        shares = jax.nn.log_softmax(y.reshape(-1, y.shape[-1]))
        return -jnp.take_along_axis(shares, target.reshape(-1, 1), 1).mean()

    def update(state: Any, x: Any, target: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(state[0], x, target)
        return adamw(jnp, state, grads), loss

    state = start_adamw(jax, params)
    function = jax.jit(update, donate_argnums=0)
    number = 0

    def run() -> Any:
        nonlocal state, number
        state, loss = jax.block_until_ready(function(state, *rows[number % BATCHES]))
        number += 1
        return loss

    return losses(run)


def jax_linear(p: Arrays, name: str, x: Any) -> Any:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


# -- the nets -------------------------------------------------------------------------------------


def mlp(nn: Any, rows: int, width: int) -> Any:
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def mlp_data(random: Any, rows: int, width: int) -> tuple[Any, Any]:
    return random.standard_normal((rows, 784), dtype="float32"), random.integers(0, 10, rows)


def mlp_jax(jax: Any, size: tuple[Any, ...], p: Arrays, x: Any) -> Any:
    for i in (0, 2):
        x = jax.nn.relu(jax_linear(p, f"{i}", x))
    return jax_linear(p, "4", x)


def deep(nn: Any, depth: int, rows: int) -> Any:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def deep_data(random: Any, depth: int, rows: int) -> tuple[Any, Any]:
    return random.standard_normal((rows, 64), dtype="float32"), random.integers(0, 10, rows)


def deep_jax(jax: Any, size: tuple[Any, ...], p: Arrays, x: Any) -> Any:
    last = 2 * size[0]
    for i in range(0, last, 2):
        x = jax.numpy.tanh(jax_linear(p, f"{i}", x))
    return jax_linear(p, f"{last}", x)


def cnn(nn: Any, rows: int) -> Any:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def cnn_data(random: Any, rows: int) -> tuple[Any, Any]:
    images = random.standard_normal((rows, 1, 28, 28), dtype="float32")
    return images, random.integers(0, 10, rows)


def cnn_jax(jax: Any, size: tuple[Any, ...], p: Arrays, x: Any) -> Any:
    for i in (0, 2):
        x = jax.lax.conv(x, p[f"{i}.weight"], (1, 1), "VALID")
        x = jax.nn.relu(x + p[f"{i}.bias"][:, None, None])
    low = -jax.numpy.inf
    x = jax.lax.reduce_window(x, low, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    x = jax.nn.relu(jax_linear(p, "6", x.reshape(x.shape[0], -1)))
    return jax_linear(p, "8", x)


WORKLOADS: tuple[Workload, ...] = (
    step(
        "step of an MLP", "784 to 10 by two hidden layers: rows, units",
        sizes={"16, 64": (16, 64), "128, 512": (128, 512)},
        net=mlp, data=mlp_data, jax=mlp_jax, least=1.3,
        flops=lambda rows, width: 6 * rows * (784 * width + width**2 + 10 * width),
    ),
    step(
        "step of a deep MLP", "layers of 64 units with tanh: layers, rows",
        sizes={"10, 8": (10, 8), "100, 64": (100, 64)},
        net=deep, data=deep_data, jax=deep_jax, least=1.5,
        flops=lambda depth, rows: 6 * rows * 64 * (64 * depth + 10),
        tolerance=1e-3,  # a hundred layers make differences grow
    ),
    step(
        "step of a CNN", "two convolutions and two layers, on 28×28",
        sizes={"4 images": (4,), "64 images": (64,)},
        net=cnn, data=cnn_data, jax=cnn_jax, least=1.6,
        flops=lambda n: 6 * n * (26**2 * 32 * 9 + 24**2 * 64 * 288 + 9216 * 128 + 1280),
        without={"torch-compile":
                 "PyTorch 2.13 compiles gradients of zero for what is before the pool"},
    ),
)  # fmt: skip


if __name__ == "__main__":
    from gpugrad.bench.family import main

    main(__doc__, "steps")
