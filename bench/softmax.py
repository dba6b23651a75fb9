"""Shares, and the loss that is taken of them."""

from __future__ import annotations

from typing import Any

from gpugrad.bench.workload import Workload, kernel, normal


def logits(random: Any, rows: int, classes: int) -> tuple[list[Any], list[Any]]:
    return normal(random, (rows, classes)), [random.integers(0, classes, rows)]


def log_softmax(np: Any, x: Any) -> Any:
    x = x - np.max(x, axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def cross_entropy(jax: Any, x: Any, target: Any) -> Any:
    return -jax.numpy.take_along_axis(jax.nn.log_softmax(x), target[:, None], 1).mean()


WORKLOADS: tuple[Workload, ...] = (
    kernel(
        "softmax", "of the last axis",
        sizes={"64×100": (64, 100), "512×1024": (512, 1024), "8192×1024": (8192, 1024)},
        arrays=lambda random, *shape: (normal(random, shape), []),
        ours=lambda gg, x: gg.softmax(x),
        torch=lambda torch, x: torch.nn.functional.softmax(x, -1),
        jax=lambda jax, x: jax.nn.softmax(x),
        plain=lambda np, x: np.exp(log_softmax(np, x)),
        covers=("ops/activations", "kernels/cpu/softmax", "kernels/cuda/softmax"),
        moved=lambda *shape: 5 * shape[0] * shape[1],
        flops=lambda *shape: 12 * shape[0] * shape[1],
    ),
    kernel(
        "cross-entropy", "mean over rows of the loss of the right class, from logits",
        sizes={"64×1000": (64, 1000), "1024×4096": (1024, 4096), "1024×32768": (1024, 32768)},
        arrays=logits,
        ours=lambda gg, x, target: gg.cross_entropy(x, target),
        torch=lambda torch, x, target: torch.nn.functional.cross_entropy(x, target),
        jax=cross_entropy,
        covers=("ops/losses", "kernels/cpu/cross_entropy", "kernels/cuda/cross_entropy"),
        moved=lambda rows, classes: 3 * rows * classes,
        flops=lambda rows, classes: 12 * rows * classes,
        least=2.0,
        memory=0.5,
    ),
)  # fmt: skip
