"""Rows of a table by their numbers: the first layer of a model of words."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.bounds import check_rows
from gpugrad.backend.kernels import fusible
from gpugrad.core.primitive import primitive, sample
from gpugrad.core.tensor import raw_index
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.ops.reductions import counting_dtype
from gpugrad.ops.samples import normal

__all__ = ["embedding"]


def row_of_padding(padding_idx: int | None, rows: int) -> int | None:
    """``padding_idx`` counted from the start; ParameterError when it is no row of the table.

    >>> row_of_padding(-1, 10)
    9
    """
    if padding_idx is None or 0 <= padding_idx < rows:
        return padding_idx
    if -rows <= padding_idx < 0:
        return padding_idx + rows
    raise ParameterError(
        f"embedding: padding_idx={padding_idx} is none of the {rows} rows; it is a row's number, "
        "counted from the end if negative, or None"
    )


@fusible
def embedding_backward(
    m: Any,
    indices: Any,
    g: Any,
    rows: int,
    padding_row: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Any:
    """The gradient of the table: its rows' sums over the places that read them, in their order.

    Two-byte floats are added up in float32. With ``scale_grad_by_freq`` each sum is divided by the
    number of its terms; ``padding_row`` gets none.
    """
    dtype, index = g.dtype, raw_index(indices)
    if padding_row is not None:
        g = m.where(m.expand_dims(indices != padding_row, axis=-1), g, m.zeros_like(g))
    if not scale_grad_by_freq:
        return m.scatter_add(g, index, (rows, g.shape[-1]))
    wide = counting_dtype(m, g)
    ones = m.astype(m.ones_like(indices), wide)
    counts = m.maximum(m.scatter_add(ones, index, (rows,)), 1.0)
    total = m.scatter_add(m.astype(g, wide), index, (rows, g.shape[-1]))
    return m.astype(total / m.expand_dims(counts, axis=-1), dtype)


def _embedding_vjp(
    g: Array, m: Any, indices: Array, weight_shape: tuple[int, ...], padding_idx: int | None,
    scale_grad_by_freq: bool,
) -> Array:  # fmt: skip
    rows = weight_shape[0]
    padding_row = row_of_padding(padding_idx, rows)
    return embedding_backward(m, indices, g, rows, padding_row, scale_grad_by_freq)


def _samples() -> list[Any]:
    table, words = normal((5, 3)), np.array([[1, 4, 1], [0, 1, 3]])
    return [
        sample(words, table),
        sample(np.array(2), table, note="a single index"),
        sample(np.zeros((0, 2), np.int32), table, note="no indices"),
        sample(words, table, padding_idx=1, smooth=False, note="padding gets no gradient"),
        sample(words, table, padding_idx=-1, scale_grad_by_freq=True, smooth=False),
    ]


def _reference(
    indices: Any, weight: Any, padding_idx: int | None = None, scale_grad_by_freq: bool = False
) -> Any:
    return np.asarray(weight)[indices]


@primitive(vjps=(None, _embedding_vjp), samples=_samples, reference=_reference)
def embedding(
    m: Backend,
    indices: Array,
    weight: Array,
    /,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Array:
    """The rows of a table that ``indices`` name.

    Parameters
    ----------
    indices:
        Integers of any shape, from 0 to rows - 1.
    weight:
        The table, shape (rows, features).
    padding_idx:
        A row that gets no gradient, counted from the end if negative. It is read like any other.
    scale_grad_by_freq:
        Divide each row's gradient by how often ``indices`` name it.

    Returns
    -------
    Shape (\\*indices.shape, features), the dtype of ``weight``. The gradient is a table, in which
    two-byte floats were added up in float32; on the CPU it is the same bit for bit on any number
    of threads.

    Raises
    ------
    ShapeError, DTypeError
        A table without two axes, indices that are no integers.
    ParameterError
        ``padding_idx`` is no row.
    OutOfRangeError
        On the CPU: an index that is no row, by its place. On a GPU nobody looks, because the host
        would have to wait.

    >>> import gpugrad as gg
    >>> gg.embedding([2, 0], gg.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    tensor([[5., 6.],
            [1., 2.]])
    """
    if weight.ndim != 2:
        raise ShapeError(
            f"embedding: weight of shape {tuple(weight.shape)}; a table has two axes, "
            "(rows, features)"
        )
    rows, features = weight.shape
    row_of_padding(padding_idx, rows)
    check_rows("embedding", m, indices, rows)
    found = m.take(weight, m.reshape(indices, (-1,)), axis=0)
    return m.reshape(found, (*indices.shape, features))
