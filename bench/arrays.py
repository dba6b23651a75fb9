"""What moves elements without computing: indices, joins, changes of layout."""

from __future__ import annotations

from typing import Any

from gpugrad.bench.workload import Workload, kernel, normal, product, squares

SIZES = squares(64, 512, 2048)


def places(random: Any, rows: int, columns: int) -> tuple[list[Any], list[Any]]:
    return normal(random, (rows, columns)), [random.integers(0, columns, (rows, columns))]


def pair(random: Any, *shape: int) -> tuple[list[Any], list[Any]]:
    return normal(random, shape, shape), []


def steps(random: Any, rows: int, columns: int) -> tuple[list[Any], list[Any]]:
    return normal(random, (rows // 16, 16, columns)), []


WORKLOADS: tuple[Workload, ...] = (
    kernel(
        "slice", "every other row of x, from the second",
        sizes=SIZES,
        arrays=lambda random, *shape: (normal(random, shape), []),
        ours=lambda gg, x: x[1::2],
        torch=lambda torch, x: x[1::2],
        plain=lambda np, x: x[1::2],
        covers=("ops/indexing",), moved=lambda *n: 1.5 * product(*n),
    ),
    kernel(
        "take along axis", "x at places of each row",
        sizes=SIZES, arrays=places,
        ours=lambda gg, x, index: gg.take_along_axis(x, index, axis=1),
        torch=lambda torch, x, index: torch.gather(x, 1, index),
        jax=lambda jax, x, index: jax.numpy.take_along_axis(x, index, 1),
        covers=("ops/indexing", "kernels/cpu/gather"),
        # An index has twice the bytes of an element.
        moved=lambda *n: 8 * product(*n),
    ),
    kernel(
        "concat", "x and y, one beside the other",
        sizes=SIZES, arrays=pair,
        ours=lambda gg, x, y: gg.concat([x, y], axis=1),
        torch=lambda torch, x, y: torch.cat([x, y], 1),
        plain=lambda np, x, y: np.concatenate([x, y], axis=1),
        covers=("ops/joining",), moved=lambda *n: 8 * product(*n),
    ),
    kernel(
        "transposed copy", "axes in another order, then flattened",
        sizes=SIZES, arrays=steps,
        ours=lambda gg, x: gg.permute_dims(x, (1, 0, 2)).reshape((-1,)),
        torch=lambda torch, x: x.permute(1, 0, 2).reshape(-1),
        plain=lambda np, x: np.reshape(np.transpose(x, (1, 0, 2)), (-1,)),
        covers=("ops/manipulation", "kernels/cpu/layout"), moved=lambda *n: 2 * product(*n),
    ),
)  # fmt: skip
