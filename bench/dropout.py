"""Dropout, alone and behind bias and GELU with a residual; a tenth is dropped.

Everybody draws numbers of their own, so that only the share that is kept and its scale can agree.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from gpugrad.bench.bias import gelu
from gpugrad.bench.workload import Workload, kernel, normal, squares

SHARE = 0.1


@cache
def generator() -> Any:
    import gpugrad as gg

    return gg.Generator(0)


def ours(gg: Any, x: Any) -> Any:
    seed, offset = generator().stream()
    return gg.dropout(x, p=SHARE, seed=seed, offset=offset)


def ours_fused(gg: Any, x: Any, b: Any, residual: Any) -> Any:
    seed, offset = generator().stream()
    return gg.bias_activation_dropout(
        x, b, residual, activation="gelu_tanh", p=SHARE, seed=seed, offset=offset
    )


def drop(jax: Any, x: Any) -> Any:
    # A key that the compiler does not know, so that it cannot draw the numbers beforehand.
    key = jax.random.key(jax.numpy.asarray(x.ravel()[0] * 1e6, "int32"))
    return jax.numpy.where(jax.random.bernoulli(key, 1 - SHARE, x.shape), x / (1 - SHARE), 0)


def shares(results: list[Any], operands: list[Any]) -> list[Any]:
    """The share that is kept, forward and backward, and by how much it is scaled."""
    y, gradient, x = *results, *operands
    kept, scale = y != 0, y / x
    return [kept.mean(), (gradient != 0).mean(), ((gradient != 0) != kept).mean(),
            scale[kept].mean(), scale[kept].std()]  # fmt: skip


def shares_fused(results: list[Any], operands: list[Any]) -> list[Any]:
    y, gradient, _, passed = results
    moved = gradient != 0
    # A number that is 0 already looks like a dropped one.
    return [moved.mean(), ((y != operands[2]) != moved).mean(), passed.std()]


WORKLOADS: tuple[Workload, ...] = (
    kernel(
        "dropout", "a tenth of x is 0, the rest x/0.9",
        sizes=squares(64, 512, 2048),
        arrays=lambda random, *shape: (normal(random, shape), []),
        ours=ours,
        torch=lambda torch, x: torch.nn.functional.dropout(x, SHARE),
        jax=drop,
        answer=shares, tolerance=0.04, least=2.0,
        covers=("ops/random", "kernels/cpu/dropout", "kernels/cuda/dropout"),
        moved=lambda rows, columns: 4 * rows * columns,
    ),
    kernel(
        "bias + GELU + dropout + residual", "dropout of GELU(x + b), and r",
        sizes=squares(64, 512, 2048),
        arrays=lambda random, rows, columns: (
            normal(random, (rows, columns), (columns,), (rows, columns)), []),
        ours=ours_fused,
        torch=lambda torch, x, b, r: torch.nn.functional.dropout(
            torch.nn.functional.gelu(x + b, approximate="tanh"), SHARE) + r,
        jax=lambda jax, x, b, r: drop(jax, gelu(jax.numpy, x + b)) + r,
        answer=shares_fused, tolerance=0.04, least=2.0,
        covers=("ops/random", "kernels/cpu/dropout", "kernels/cuda/dropout"),
        moved=lambda rows, columns: 6 * rows * columns,
        flops=lambda rows, columns: 45 * rows * columns,
    ),
)  # fmt: skip
