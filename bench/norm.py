"""Normalisation, with the gradients of weight and bias."""

from __future__ import annotations

import math
from typing import Any

from gpugrad.bench.workload import Workload, kernel, normal

ROWS = {"256×128": (256, 128), "1024×1024": (1024, 1024), "8192×1024": (8192, 1024)}
IMAGES = {"8×8×14×14": (8, 8, 14, 14), "16×64×28×28": (16, 64, 28, 28),
          "32×64×56×56": (32, 64, 56, 56)}  # fmt: skip
GROUPS = 8


def operands(random: Any, *shape: int) -> tuple[list[Any], list[Any]]:
    """x, weight and bias."""
    features = shape[1]
    return normal(random, shape, (features,), (features,)), []


def with_residual(random: Any, *shape: int) -> tuple[list[Any], list[Any]]:
    (x, weight, bias), _ = operands(random, *shape)
    return [x, weight, bias], normal(random, shape)


def layer_norm(np: Any, x: Any, weight: Any, bias: Any) -> Any:
    d = x - np.mean(x, axis=-1, keepdims=True)
    return d / np.sqrt(np.mean(d * d, axis=-1, keepdims=True) + 1e-5) * weight + bias


def torch_residual(torch: Any, x: Any, weight: Any, bias: Any, residual: Any) -> Any:
    total = x + residual
    return torch.nn.functional.layer_norm(total, weight.shape, weight, bias), total


def norm(name: str, what: str, passes: int, **options: Any) -> Workload:
    """`passes`: how often an array of the size of x is read or written."""
    images = options.pop("images", False)
    return kernel(
        name, what,
        sizes=IMAGES if images else ROWS,
        moved=lambda *shape: passes * math.prod(shape),
        flops=lambda *shape: 20 * math.prod(shape),
        # Gradients of weight and bias are sums of up to 200,000 terms of size 1.
        **{"arrays": operands, "tolerance": 2e-3, "least": 1.0} | options,
    )  # fmt: skip


WORKLOADS: tuple[Workload, ...] = (
    norm(
        "layer norm", "of the last axis", 5,
        ours=lambda gg, x, w, b: gg.layer_norm(x, w, b),
        torch=lambda torch, x, w, b: torch.nn.functional.layer_norm(x, w.shape, w, b),
        plain=layer_norm,
        covers=("ops/normalization", "kernels/cpu/norm", "kernels/cuda/norm"),
        least=1.5,
    ),
    norm(
        "RMS norm", "of the last axis, without a bias", 5,
        arrays=lambda random, *shape: (normal(random, shape, shape[1:]), []),
        ours=lambda gg, x, w: gg.rms_norm(x, w),
        torch=lambda torch, x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-5),
        plain=lambda np, x, w: x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * w,
        covers=("kernels/cpu/norm", "kernels/cuda/norm"),
    ),
    norm(
        "residual, layer norm", "x + r and its layer norm, with gradients of both", 8,
        arrays=with_residual,
        ours=lambda gg, x, w, b, r: gg.add_layer_norm(x, r, w, b),
        torch=torch_residual,
        jax=lambda jax, x, w, b, r: (layer_norm(jax.numpy, x + r, w, b), x + r),
        covers=("kernels/cpu/norm", "kernels/cuda/norm"),
    ),
    norm(
        "group norm", "of images in 8 groups of channels", 5, images=True,
        ours=lambda gg, x, w, b: gg.group_norm(x, w, b, groups=GROUPS),
        torch=lambda torch, x, w, b: torch.nn.functional.group_norm(x, GROUPS, w, b),
        covers=("kernels/cpu/norm", "kernels/cuda/norm"),
    ),
    norm(
        "batch norm", "of images, in training", 5, images=True,
        ours=lambda gg, x, w, b: gg.batch_norm(x, w, b)[0],
        torch=lambda torch, x, w, b: torch.nn.functional.batch_norm(
            x, None, None, w, b, training=True),
        covers=("kernels/cpu/batch_norm", "kernels/cuda/norm"),
    ),
)  # fmt: skip
