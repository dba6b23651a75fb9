"""Minibatches: a data set cut into index-selected pieces, in an order a seed decides."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpugrad.data.errors import DataError

__all__ = ["batches"]


def batches(
    x: NDArray[Any],
    y: NDArray[Any],
    batch_size: int,
    *,
    rng: np.random.Generator | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Iterate once over `x` and `y` in minibatches of `batch_size` examples.

    `x` has shape [N, ...] and `y` shape [N, ...]; each item is a pair of copies of shapes
    [batch_size, ...], the last one shorter when `batch_size` does not divide N, or left out with
    `drop_last`. With `shuffle` the order is one permutation drawn from `rng` at the call, not at
    the first batch, so an epoch is a function of the generator's state at the call: store
    `rng.bit_generator.state` before the call and setting it again brings the same epoch back.
    To go on within that epoch, pass over the batches already done with `itertools.islice`.

    Raises `DataError` when `x` and `y` differ in length, or nothing would be yielded, and
    `TypeError` or `ValueError` for an unusable `rng` or `batch_size`.

    >>> x, y = np.arange(10.0).reshape(5, 2), np.arange(5)
    >>> rng = np.random.default_rng(0)
    >>> state = rng.bit_generator.state
    >>> first = [labels.tolist() for _, labels in batches(x, y, 2, rng=rng)]
    >>> rng.bit_generator.state = state
    >>> first == [labels.tolist() for _, labels in batches(x, y, 2, rng=rng)]
    True
    >>> [len(labels) for _, labels in batches(x, y, 2, shuffle=False)]
    [2, 2, 1]
    """
    size = _batch_size(batch_size)
    if len(x) != len(y):
        raise DataError(f"x has {len(x)} examples and y has {len(y)}; they must pair up")
    if len(x) == 0:
        raise DataError("x and y hold no examples")
    if drop_last and len(x) < size:
        raise DataError(
            f"drop_last leaves no batch at all: {len(x)} examples are fewer than batch_size={size}"
        )
    if shuffle:
        if not isinstance(rng, np.random.Generator):
            raise TypeError(
                f"shuffling needs rng=numpy.random.default_rng(seed), got {type(rng).__name__}; "
                "or pass shuffle=False"
            )
        order = rng.permutation(len(x))
    else:
        order = np.arange(len(x))
    stop = len(x) - len(x) % size if drop_last else len(x)
    return _select(x, y, size, order[:stop])


def _select(
    x: NDArray[Any], y: NDArray[Any], size: int, order: NDArray[np.intp]
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    # Apart from `batches`, so that its checks and its draw happen at the call.
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield x[chosen], y[chosen]


def _batch_size(value: int) -> int:
    if isinstance(value, bool):
        raise TypeError("batch_size must be an integer, got bool")
    size = operator.index(value)
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    return size
