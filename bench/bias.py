"""Bias and activation in one pass."""

from __future__ import annotations

import math
from typing import Any

from gpugrad.bench.workload import Workload, kernel, normal, squares


def gelu(np: Any, x: Any) -> Any:
    """By tanh."""
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


WORKLOADS: tuple[Workload, ...] = (
    kernel(
        "bias + GELU", "GELU by tanh of x + b, with the gradient of b",
        sizes=squares(64, 512, 4096),
        arrays=lambda random, rows, columns: (
            normal(random, (rows, columns), (columns,)), []),
        ours=lambda gg, x, b: gg.bias_activation(x, b, activation="gelu_tanh"),
        torch=lambda torch, x, b: torch.nn.functional.gelu(x + b, approximate="tanh"),
        plain=lambda np, x, b: gelu(np, x + b),
        covers=("ops/fused", "kernels/cpu/bias", "kernels/cuda/bias"),
        moved=lambda rows, columns: 5 * rows * columns,
        flops=lambda rows, columns: 40 * rows * columns,
        # A gradient of a bias is a sum of thousands of terms of size 1.
        tolerance=2e-3, least=3.5,
    ),
)  # fmt: skip
