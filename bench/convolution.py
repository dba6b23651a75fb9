"""Layers of convolutional nets: convolution with bias and ReLU, its transpose, pooling.

Images are results of another layer, and lie in memory as each library leaves them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from gpugrad.bench.workload import Workload, kernel, normal

#: Images of the sizes; the other numbers of a case stay.
BATCHES = (1, 16)

NOT_COMPILED = {"torch-compile": "left out for time: it calls the same library for convolutions"}


def operands(
    channels: int, places: int, outputs: int, kernel_size: int, groups: int, random: Any, batch: int
) -> tuple[list[Any], list[Any]]:
    x, w, b = normal(
        random, (batch, places, places, channels),
        (outputs, channels // groups, kernel_size, kernel_size), (outputs,),
    )  # fmt: skip
    # Channels next to each other, as a layer of gpugrad leaves them; others copy into their order.
    return [x.transpose(0, 3, 1, 2), w / math.sqrt(w[0].size), b], []


def convolution(
    name: str, channels: int, places: int, outputs: int, kernel_size: int,
    stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1, variant: bool = True,
) -> Workload:  # fmt: skip
    options = (stride, padding, dilation, groups)
    after = (places + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1

    def with_jax(jax: Any, x: Any, w: Any, b: Any) -> Any:
        y = jax.lax.conv_general_dilated(
            x, w, (stride,) * 2, ((padding,) * 2,) * 2, rhs_dilation=(dilation,) * 2,
            feature_group_count=groups,
        )  # fmt: skip
        return jax.nn.relu(y + b[:, None, None])

    taps = channels // groups * kernel_size**2
    return kernel(
        f"convolution, {name}",
        f"ReLU of {channels} channels of {places}×{places} to {outputs}",
        sizes={f"{batch} image{'s' * (batch > 1)}": (batch,) for batch in BATCHES},
        arrays=partial(operands, channels, places, outputs, kernel_size, groups),
        ours=lambda gg, x, w, b: gg.nn.functional.conv2d(x, w, b, *options, activation="relu"),
        torch=lambda torch, x, w, b: torch.relu(torch.nn.functional.conv2d(x, w, b, *options)),
        jax=with_jax,
        covers=("ops/convolution", "kernels/cpu/convolution", "kernels/cpu/winograd"),
        moved=lambda n: 3 * n * (channels * places**2 + outputs * after**2)
        + 3 * outputs * taps,
        flops=lambda n: 6 * n * outputs * after**2 * taps,
        tolerance=2e-3, least=0.8, variant=variant,
        without=NOT_COMPILED,
    )  # fmt: skip


def images(random: Any, batch: int) -> tuple[list[Any], list[Any]]:
    (x,) = normal(random, (batch, 24, 24, 64))
    return [x.transpose(0, 3, 1, 2)], []


def pooling(name: str, function: str, what: str, passes: float, jax: Any = None) -> Workload:
    return kernel(
        name, what,
        sizes={f"{batch} image{'s' * (batch > 1)}": (batch,) for batch in BATCHES},
        arrays=images,
        ours=lambda gg, x: getattr(gg.nn.functional, function)(x, 2),
        torch=lambda torch, x: getattr(torch.nn.functional, function)(x, 2),
        jax=jax,
        covers=("ops/pooling", "kernels/cpu/pooling"),
        moved=lambda n: passes * n * 64 * 24 * 24,
    )  # fmt: skip


def jax_max(jax: Any, x: Any) -> Any:
    return jax.lax.reduce_window(
        x, -jax.numpy.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"
    )


def jax_mean(jax: Any, x: Any) -> Any:
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return total / 4


def transposed(random: Any, batch: int) -> tuple[list[Any], list[Any]]:
    x, w, b = normal(random, (batch, 14, 14, 64), (64, 32, 4, 4), (32,))
    return [x.transpose(0, 3, 1, 2), w / 32, b], []


WORKLOADS: tuple[Workload, ...] = (
    convolution("3×3", 64, 56, 64, 3, padding=1, variant=False),
    convolution("3×3, 512 channels", 512, 7, 512, 3, padding=1),
    convolution("stride 2", 128, 28, 256, 3, stride=2, padding=1),
    convolution("1×1", 256, 28, 64, 1),
    convolution("7×7 of 3 channels", 3, 112, 64, 7, stride=2, padding=3),
    convolution("each channel alone", 128, 28, 128, 3, padding=1, groups=128),
    convolution("dilated", 64, 28, 64, 3, padding=2, dilation=2),
    convolution("4 groups", 128, 28, 128, 3, padding=1, groups=4),
    kernel(
        "transposed convolution", "64 channels of 14×14 to 32 of 28×28, 4×4, stride 2",
        sizes={f"{batch} image{'s' * (batch > 1)}": (batch,) for batch in BATCHES},
        arrays=transposed,
        ours=lambda gg, x, w, b: gg.nn.functional.conv_transpose2d(x, w, b, 2, 1),
        torch=lambda torch, x, w, b: torch.nn.functional.conv_transpose2d(x, w, b, 2, 1),
        covers=("ops/transposed", "kernels/cpu/transposed"),
        moved=lambda n: 3 * n * (64 * 14 * 14 + 32 * 28 * 28) + 3 * 64 * 32 * 16,
        flops=lambda n: 6 * n * 64 * 14 * 14 * 32 * 16,
        tolerance=2e-3,
        without=NOT_COMPILED,
    ),
    pooling("max pooling", "max_pool2d", "of windows of 2×2", 2.75, jax_max),
    pooling("average pooling", "avg_pool2d", "of windows of 2×2", 2.5, jax_mean),
)  # fmt: skip
