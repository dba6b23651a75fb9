"""Whether vectors point the same way, and a loss for those that should."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpugrad.core.primitive import composite, differentiable, sample
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ShapeError
from gpugrad.ops.losses import reduced, together
from gpugrad.ops.pointwise_losses import pair
from gpugrad.ops.reductions import sum
from gpugrad.ops.samples import normal

__all__ = ["cosine_embedding_loss", "cosine_similarity"]


def _numpy_cosine(a: Any, b: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    a, b = np.broadcast_arrays(a, b)
    sizes = [np.maximum(np.sqrt((x * x).sum(dim)), eps) for x in (a, b)]
    return (a * b).sum(dim) / (sizes[0] * sizes[1])


@composite(
    samples=lambda: [
        sample(normal((3, 4)), normal((3, 4), 1)),
        sample(normal((3, 4)), normal((1, 4), 1), dim=0, note="broadcast"),
    ],
    reference=_numpy_cosine,
)
def cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """The cosine of the angle between vectors along ``dim``, after broadcasting.

    Vectors shorter than ``eps`` count as that long.

    >>> import gpugrad as gg
    >>> gg.cosine_similarity(gg.asarray([[3.0, 4.0]]), gg.asarray([[1.0, 0.0]]))
    tensor([0.6])
    """
    x1, x2 = together(x1, x2)
    x1, x2 = differentiable.broadcast_arrays(x1, x2)
    least = eps * eps
    squares = (sum(x * x, axis=dim) for x in (x1, x2))
    a, b = (differentiable.sqrt(differentiable.maximum(s, least)) for s in squares)
    return sum(x1 * x2, axis=dim) / (a * b)  # type: ignore[no-any-return]


def _numpy_cosine_embedding(
    a: Any, b: Any, t: Any, margin: float = 0.0, reduction: str = "mean"
) -> Any:
    cos = _numpy_cosine(a, b, -1)
    loss = np.where(t > 0, 1 - cos, np.maximum(cos - margin, 0.0))
    return loss if reduction == "none" else getattr(np, reduction)(loss)


@composite(
    samples=lambda: [
        sample(normal((4, 3)), normal((4, 3), 1), np.array([1, -1, 1, -1])),
        sample(normal(3), normal(3, 1), np.array(1), 0.1, "none", note="one pair"),
    ],
    reference=_numpy_cosine_embedding,
)
def cosine_embedding_loss(
    input1: Any, input2: Any, target: Any, margin: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """How far vectors that belong together point apart, and others together.

    Parameters
    ----------
    input1, input2:
        Vectors, of shape (batch, features), or (features,).
    target:
        1 where the two belong together: the loss is 1 - cos. -1 where they do not: it is cos less
        ``margin``, zero at least. Shape (batch,), or ().
    margin:
        From -1 to 1; 0 to 0.5 is common.
    reduction:
        ``"mean"``, ``"sum"``, ``"none"``.

    >>> import gpugrad as gg
    >>> a, b = gg.asarray([[3.0, 4.0]]), gg.asarray([[1.0, 0.0]])
    >>> gg.cosine_embedding_loss(a, b, gg.asarray([-1]), margin=0.5)
    tensor(0.1)
    """
    name = "cosine_embedding_loss"
    a, b = pair(name, input1, input2)
    t = together(a, target)[1]
    if a.ndim not in (1, 2) or t.shape != a.shape[:-1]:
        raise ShapeError(
            f"{name}: inputs of shape {a.shape} and a target of shape {t.shape}; they are (batch, "
            "features) and (batch,), or (features,) and ()"
        )
    tiny = 1e-12
    size = (sum(a * a, axis=-1) + tiny) * (sum(b * b, axis=-1) + tiny)
    cos = sum(a * b, axis=-1) / differentiable.sqrt(size)
    apart = differentiable.relu(cos - margin)
    loss = differentiable.where(t == 1, 1.0 - cos, differentiable.where(t == -1, apart, 0.0))
    return reduced(name, loss, reduction)
