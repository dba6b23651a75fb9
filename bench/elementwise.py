"""Functions of elements, one from each file of ops/ that has them."""

from __future__ import annotations

from typing import Any

from gpugrad.bench.workload import Workload, kernel, normal, product, squares

SIZES = squares(64, 512, 2048)


def pair(random: Any, *shape: int) -> tuple[list[Any], list[Any]]:
    return normal(random, shape, shape), []


def one(random: Any, *shape: int) -> tuple[list[Any], list[Any]]:
    return normal(random, shape), []


def huber_loss(np: Any, x: Any, t: Any) -> Any:
    d = np.abs(x - t)
    return np.mean(np.where(d < 1, d * d / 2, d - 0.5))


WORKLOADS: tuple[Workload, ...] = (
    kernel(
        "add, multiply", "x·y + x",
        sizes=SIZES, arrays=pair, covers=("ops/arithmetic",),
        ours=lambda gg, x, y: x * y + x,
        torch=lambda torch, x, y: x * y + x,
        plain=lambda np, x, y: x * y + x,
        # Reads both and writes the sum; reads g and both and writes both gradients.
        moved=lambda *n: 8 * product(*n), flops=lambda *n: 5 * product(*n),
    ),
    kernel(
        "exp", "exp(x)",
        sizes=SIZES, arrays=one, covers=("ops/exponential", "kernels/cpu/elementwise"),
        ours=lambda gg, x: gg.exp(x),
        torch=lambda torch, x: torch.exp(x),
        plain=lambda np, x: np.exp(x),
        moved=lambda *n: 5 * product(*n),
    ),
    kernel(
        "tanh", "tanh(x)",
        sizes=SIZES, arrays=one, covers=("ops/trigonometric",),
        ours=lambda gg, x: gg.tanh(x),
        torch=lambda torch, x: torch.tanh(x),
        plain=lambda np, x: np.tanh(x),
        moved=lambda *n: 5 * product(*n),
    ),
    kernel(
        "where", "x if x < y, else y",
        sizes=SIZES, arrays=pair, covers=("ops/comparison", "kernels/cpu/select"),
        ours=lambda gg, x, y: gg.where(x < y, x, y),
        torch=lambda torch, x, y: torch.where(x < y, x, y),
        plain=lambda np, x, y: np.where(x < y, x, y),
        moved=lambda *n: 6 * product(*n),
    ),
    kernel(
        "SiLU", "x·σ(x)",
        sizes=SIZES, arrays=one,
        covers=("ops/activations", "kernels/cpu/elementwise", "kernels/cuda/elementwise"),
        ours=lambda gg, x: gg.silu(x),
        torch=lambda torch, x: torch.nn.functional.silu(x),
        plain=lambda np, x: x / (1 + np.exp(-x)),
        moved=lambda *n: 5 * product(*n),
    ),
    kernel(
        "Huber loss", "mean of x²/2 where |x − t| < 1, of |x − t| − 1/2 elsewhere",
        sizes=SIZES, covers=("ops/pointwise_losses", "kernels/cpu/losses"),
        arrays=lambda random, *n: (normal(random, n), normal(random, n)),
        ours=lambda gg, x, t: gg.huber_loss(x, t),
        torch=lambda torch, x, t: torch.nn.functional.huber_loss(x, t),
        plain=huber_loss,
        moved=lambda *n: 5 * product(*n),
    ),
    kernel(
        "cosine similarity", "of the rows of two arrays",
        sizes=SIZES, covers=("ops/similarity",),
        arrays=lambda random, *n: (normal(random, n), normal(random, n)),
        ours=lambda gg, x, y: gg.cosine_similarity(x, y),
        torch=lambda torch, x, y: torch.nn.functional.cosine_similarity(x, y),
        moved=lambda *n: 6 * product(*n),
    ),
)  # fmt: skip
