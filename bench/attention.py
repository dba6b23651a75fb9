"""Attention, from the heads of one projection."""

from __future__ import annotations

import math
from typing import Any

from gpugrad.bench.workload import Workload, kernel, normal

#: Batch, heads, length, features of a head.
SIZES = {"2×2, 16×8": (2, 2, 16, 8), "16×4, 64×32": (16, 4, 64, 32),
         "2×4, 1024×64": (2, 4, 1024, 64)}  # fmt: skip


def projection(random: Any, batch: int, heads: int, length: int, features: int) -> Any:
    return normal(random, (batch, length, 3, heads, features)), []


def attention(name: str, what: str, is_causal: bool) -> Workload:
    def by_views(library: Any, x: Any, unstack: Any) -> Any:
        """Heads are views of the projection, as in most nets; the same words for both libraries."""
        q, k, v = unstack(library.moveaxis(x, 3, 1))
        y = library.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return library.moveaxis(y, 1, 2)

    def with_jax(jax: Any, x: Any) -> Any:
        q, k, v = (x[:, :, i] for i in range(3))
        s = jax.numpy.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(x.shape[-1])
        if is_causal:
            s = jax.numpy.where(jax.numpy.tri(s.shape[-1], dtype=bool), s, -jax.numpy.inf)
        return jax.numpy.einsum("bhij,bjhd->bihd", jax.nn.softmax(s), v)

    share = 0.5 if is_causal else 1.0
    return kernel(
        name, what,
        sizes=SIZES,
        arrays=projection,
        ours=lambda gg, x: by_views(gg, x, lambda x: gg.unstack(x, axis=3)),
        torch=lambda torch, x: by_views(torch, x, lambda x: torch.unbind(x, 3)),
        jax=with_jax,
        covers=("ops/attention", "kernels/cpu/attention", "kernels/cuda/attention"),
        moved=lambda b, h, n, d: 11 * b * h * n * d,
        # Two products forward; backward five, one of them to have the scores again.
        flops=lambda b, h, n, d: share * 14 * b * h * n * n * d,
        least=1.0, variant=not is_causal,
    )  # fmt: skip


WORKLOADS: tuple[Workload, ...] = (
    attention("attention, causal", "of 3 projections in one array, to places before", True),
    attention("attention", "of 3 projections in one array, to all places", False),
)
