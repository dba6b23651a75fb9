"""Batches from examples: equal parts of every example stacked into one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpugrad.backend import SPACES, scratch
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.data.errors import DataError

__all__ = ["default_collate", "default_convert"]


def default_collate(batch: Sequence[Any]) -> Any:
    """One batch of examples that are built alike.

    Tensors, arrays and numbers become one tensor with an axis more, in front; strings, bytes and
    None a list; tuples and dicts are gone through part by part. Python floats become float64,
    Python integers int64.

    Raises DataError when shapes or types differ, or nothing is known of a type: a `collate_fn` of
    your own then says what a batch is.

    >>> default_collate([(np.zeros(2), 3), (np.ones(2), 4)])
    (tensor([[0., 0.],
            [1., 1.]]), tensor([3, 4]))
    """
    if not len(batch):
        raise DataError("default_collate: a batch of no examples")
    first = batch[0]
    if any(isinstance(x, Tensor) for x in batch):
        return _stacked_tensors(batch)
    if isinstance(first, np.ndarray | np.generic):
        return tensor_of(_stacked([np.asarray(x) for x in batch]))
    if isinstance(first, bool | int | float):
        return tensor_of(np.asarray(batch))
    if isinstance(first, str | bytes) or first is None:
        return list(batch)
    if isinstance(first, Mapping):
        if any(x.keys() != first.keys() for x in batch):
            raise DataError("default_collate: examples are dicts with different keys")
        return {key: default_collate([x[key] for x in batch]) for key in first}
    if isinstance(first, tuple | list):
        if any(len(x) != len(first) for x in batch):
            raise DataError(
                f"default_collate: examples have {sorted({len(x) for x in batch})} parts"
            )
        parts = [default_collate(part) for part in zip(*batch)]
        kind = type(first)
        return kind(*parts) if hasattr(first, "_fields") else kind(parts)
    raise DataError(
        f"default_collate: no batch can be made of {type(first).__name__}; give the loader a "
        "collate_fn"
    )


def default_convert(example: Any) -> Any:
    """An example with its arrays as tensors, of the same memory; the rest stays as it is."""
    if isinstance(example, np.ndarray | np.generic):
        return tensor_of(np.asarray(example))
    if isinstance(example, Mapping):
        return {key: default_convert(value) for key, value in example.items()}
    if isinstance(example, tuple) and hasattr(example, "_fields"):
        return type(example)(*map(default_convert, example))
    if isinstance(example, tuple | list):
        return type(example)(map(default_convert, example))
    return example


def _stacked_tensors(batch: Sequence[Any]) -> Tensor:
    raw = [x.data if isinstance(x, Tensor) else np.asarray(x) for x in batch]
    if all(isinstance(x, np.ndarray | np.generic) for x in raw):
        return tensor_of(_stacked([np.asarray(x) for x in raw]))
    _check_alike(raw)
    return tensor_of(SPACES[type(raw[0])].stack(raw, axis=0))


def _stacked(arrays: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    _check_alike(arrays)
    out = scratch.empty((len(arrays), *arrays[0].shape), arrays[0].dtype)
    return np.stack(arrays, axis=0, out=out)


def _check_alike(arrays: Sequence[Any]) -> None:
    first = arrays[0]
    if first.dtype.kind in "OUSMm":
        raise DataError(f"default_collate: {first.dtype} is no numeric type; use a collate_fn")
    for i, x in enumerate(arrays):
        if x.shape != first.shape or x.dtype != first.dtype:
            raise DataError(
                f"default_collate: number 0 of the batch is {first.dtype} of shape "
                f"{tuple(first.shape)}, number {i} is {x.dtype} of shape {tuple(x.shape)}; make "
                "them equal, or pad them in a collate_fn"
            )
