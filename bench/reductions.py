"""Sums and their like."""

from __future__ import annotations

from typing import Any

from gpugrad.bench.workload import Workload, kernel, normal, product, squares

SIZES = squares(64, 512, 2048)


def one(random: Any, *shape: int) -> tuple[list[Any], list[Any]]:
    return normal(random, shape), []


def logsumexp(np: Any, x: Any) -> Any:
    most = np.max(x, axis=-1, keepdims=True)
    return np.log(np.sum(np.exp(x - most), axis=-1)) + most[:, 0]


WORKLOADS: tuple[Workload, ...] = (
    kernel(
        "sum", "of the columns",
        sizes=SIZES, arrays=one,
        ours=lambda gg, x: gg.sum(x, axis=0),
        torch=lambda torch, x: torch.sum(x, 0),
        plain=lambda np, x: np.sum(x, axis=0),
        covers=("ops/reductions", "kernels/cpu/reduce"),
        moved=lambda *n: product(*n), flops=lambda *n: product(*n),
    ),
    kernel(
        "var", "of the rows",
        sizes=SIZES, arrays=one,
        ours=lambda gg, x: gg.var(x, axis=-1),
        torch=lambda torch, x: torch.var(x, -1, correction=0),
        plain=lambda np, x: np.var(x, axis=-1),
        covers=("ops/reductions", "kernels/cpu/reductions"),
        moved=lambda *n: 3 * product(*n), flops=lambda *n: 6 * product(*n),
    ),
    kernel(
        "logsumexp", "of the rows",
        sizes=SIZES, arrays=one,
        ours=lambda gg, x: gg.logsumexp(x, axis=-1),
        torch=lambda torch, x: torch.logsumexp(x, -1),
        plain=logsumexp,
        covers=("ops/reductions", "kernels/cpu/reductions"),
        moved=lambda *n: 3 * product(*n),
    ),
    kernel(
        "cumulative sum", "along the rows",
        sizes=SIZES, arrays=one,
        ours=lambda gg, x: gg.cumulative_sum(x, axis=-1),
        torch=lambda torch, x: torch.cumsum(x, -1),
        jax=lambda jax, x: jax.numpy.cumsum(x, -1),
        covers=("ops/reductions", "kernels/cpu/scan"),
        moved=lambda *n: 4 * product(*n), flops=lambda *n: 2 * product(*n),
    ),
)  # fmt: skip
