"""What follows a backward pass: clipping by the global norm and AdamW, and averages of weights.

Gradients are there already, where a backward pass of each library leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpugrad.bench import workload
from gpugrad.bench.steps import CLIP, LR, adamw, start_adamw
from gpugrad.bench.workload import Contender, Job, Workload

AVERAGE = 0.99
STEPS = 3

#: Number of tensors, elements of each.
LARGE = {"50 of 2000": (50, 2_000), "50 of 20,000": (50, 20_000), "50 of 200,000": (50, 200_000)}
MANY = {"200 of 4": (200, 4), "2000 of 4": (2000, 4)}

Size = tuple[Any, ...]


def arrays(size: Size, seed: int) -> list[Any]:
    """So many float32 vectors."""
    import numpy as np

    return list(np.random.default_rng(seed).standard_normal(size, dtype=np.float32))


def after_steps(run: Callable[[], Any], parameters: Callable[[], Sequence[Any]]) -> Job:
    """The job whose answer is the parameters after three steps."""

    def answer() -> list[Any]:
        import numpy as np

        for _ in range(STEPS):
            run()
        return [np.concatenate([np.ravel(p) for p in parameters()])]

    return Job(run, answer)


# -- clip and AdamW -------------------------------------------------------------------------------


def step_gpugrad(size: Size, who: Contender) -> Job:
    import gpugrad as gg

    params = [gg.tensor(x, device=who.device, requires_grad=True) for x in arrays(size, 0)]
    optimizer = gg.optim.AdamW(params, lr=LR)
    for p, g in zip(params, arrays(size, 1), strict=True):
        p.backward(gg.tensor(g, device=who.device))

    def run() -> None:
        with gg.use_kernels(who.variant):
            optimizer.step(clip=CLIP)

    return after_steps(run, lambda: [p.detach().numpy() for p in params])


def step_torch(size: Size, who: Contender) -> Job:
    import torch

    workload.start_torch()
    params = [torch.tensor(x, device=who.device, requires_grad=True) for x in arrays(size, 0)]
    fused = who.variant == "fused"
    optimizer = torch.optim.AdamW(params, lr=LR, fused=fused or None)
    for p, g in zip(params, arrays(size, 1), strict=True):
        p.grad = torch.tensor(g, device=who.device)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()

    run = workload.compiled(step, who)
    return after_steps(run, lambda: [p.detach().cpu().numpy() for p in params])


def step_jax(size: Size, who: Contender) -> Job:
    import jax
    import jax.numpy as jnp

    # JAX sorts by name.
    grads = {f"{i:06}": jnp.asarray(g) for i, g in enumerate(arrays(size, 1))}
    state = start_adamw(jax, {f"{i:06}": jnp.array(p) for i, p in enumerate(arrays(size, 0))})
    function = jax.jit(lambda state, grads: adamw(jnp, state, grads), donate_argnums=0)

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(function(state, grads))

    return after_steps(run, lambda: list(state[0].values()))


# -- an exponential average -----------------------------------------------------------------------


def average_gpugrad(size: Size, who: Contender) -> Job:
    import gpugrad as gg
    from gpugrad import nn

    net = nn.Module()
    for i, x in enumerate(arrays(size, 0)):
        setattr(net, f"p{i}", nn.Parameter(gg.tensor(x, device=who.device)))
    optimizer = gg.optim.SGD(net.parameters(), lr=0.1)  # parameters lie in its buffers
    averaged = gg.optim.AveragedModel(net, multi_avg_fn=gg.optim.get_ema_multi_avg_fn(AVERAGE))
    averaged.update_parameters(net)
    with gg.no_grad():
        for p in net.parameters():
            p[...] = p * 0.5

    def run() -> None:
        with gg.use_kernels(who.variant):
            averaged.update_parameters(net)

    def averages() -> list[Any]:
        assert optimizer is not None
        return [p.detach().numpy() for p in averaged.parameters()]

    return after_steps(run, averages)


def average_torch(size: Size, who: Contender) -> Job:
    import torch
    from torch.optim import swa_utils

    workload.start_torch()
    net = torch.nn.Module()
    for i, x in enumerate(arrays(size, 0)):
        setattr(net, f"p{i}", torch.nn.Parameter(torch.tensor(x, device=who.device)))
    averaged = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(AVERAGE))
    averaged.update_parameters(net)
    with torch.no_grad():
        for p in net.parameters():
            p *= 0.5
    return after_steps(
        lambda: averaged.update_parameters(net),
        lambda: [p.detach().cpu().numpy() for p in averaged.parameters()],
    )


TOO_MANY = {"torch-compile": "it takes minutes for so many tensors",
            "jax": "it takes minutes for so many tensors"}  # fmt: skip
COVERS = ("kernels/cpu/optimizer", "kernels/cuda/optimizer")
ADAMW = {"gpugrad": step_gpugrad, "torch": step_torch, "jax": step_jax}
NOTHING_FUSED = {"torch-fused": "there is no optimiser in it",
                 "torch-compile": "it calls one fused operation"}  # fmt: skip

WORKLOADS: tuple[Workload, ...] = (
    Workload(
        name="clip + AdamW", what="10 million parameters: tensors of so many elements",
        sizes=LARGE, makers=ADAMW, kind="step", covers=COVERS, tolerance=1e-5, least=2.0,
        # Reads p, g, m, v, and g once more for the norm; writes p, m, v.
        moved=lambda count, size: 8 * count * size,
    ),
    Workload(
        name="clip + AdamW, many tensors", what="tensors of so many elements",
        sizes=MANY, makers=ADAMW, kind="step", covers=COVERS, tolerance=1e-5,
        without=TOO_MANY,
    ),
    Workload(
        name="average of weights", what="0.99·average + 0.01·weights: tensors of so many elements",
        sizes=LARGE, makers={"gpugrad": average_gpugrad, "torch": average_torch}, kind="step",
        tolerance=1e-5, without=NOTHING_FUSED, least=1.0,
        moved=lambda count, size: 3 * count * size,
    ),
)  # fmt: skip
