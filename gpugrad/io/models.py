"""Weights of a model in safetensors, as PyTorch and Hugging Face lay them out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpugrad.core.tensor import Tensor
from gpugrad.io.checkpoint import load, save
from gpugrad.io.errors import CheckpointError
from gpugrad.nn.module import IncompatibleKeys, Module

__all__ = ["load_model", "save_model"]


def save_model(
    model: Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the parameters and buffers of `model` to one safetensors file, as :func:`save` does.

    A tensor that the model has under several names is stored once, under the first, and the
    metadata map each other name to it, as PyTorch's files do.

    >>> import pathlib, tempfile
    >>> from gpugrad import nn
    >>> net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(net, pathlib.Path(folder, "net.safetensors"))
    ...     load_model(other, pathlib.Path(folder, "net.safetensors"))
    IncompatibleKeys(missing_keys=[], unexpected_keys=[])
    >>> bool((net.weight == other.weight).all())
    True
    """
    state = model.state_dict()
    notes = {"format": "pt", **(metadata or {})}
    for first, *others in _shared(model):
        for name in others:
            del state[name]
            notes[name] = first
    save(path, state, notes)


def load_model(
    model: Module, path: str | os.PathLike[str], strict: bool = True, convert: bool = False
) -> IncompatibleKeys:
    """Copy tensors of safetensors files into `model`; `path` as for :func:`gpugrad.io.load`.

    Everything is checked before anything is changed. A name that the file lacks is no matter where
    the model shares its tensor with a name that is there. `strict` is that of
    `Module.load_state_dict`. With `convert`, floating-point numbers of another type than the
    model's become the model's, as when half-precision weights are wanted in float32.

    Raises what :func:`gpugrad.io.load` raises; CheckpointError when the file has two different
    tensors for one of the model's; and `gpugrad.nn.StateDictError`, which lists everything that
    does not fit.
    """
    tensors: dict[str, Any] = load(path)[0]
    for names in _shared(model):
        given = [name for name in names if name in tensors]
        for name in given[1:]:
            if not _same(tensors[given[0]], tensors[name]):
                raise CheckpointError(
                    f"{path}: {given[0]} and {name} differ, and are one tensor in "
                    f"{type(model).__name__}; leave one out of the file, or untie them"
                )
        if given:
            tensors |= dict.fromkeys(names, tensors[given[0]])
    if convert:
        own = model.state_dict()
        for name in own.keys() & tensors.keys():
            tensors[name] = _converted(tensors[name], own[name].dtype)
    return model.load_state_dict(tensors, strict)


def _shared(model: Module) -> Iterator[list[str]]:
    """The names of every parameter or buffer that the model has under several."""
    saved = model.state_dict().keys()
    names: dict[int, list[str]] = {}
    named: tuple[Iterator[tuple[str, Tensor]], ...] = (
        iter(model.named_parameters(remove_duplicate=False)),
        iter(model.named_buffers(remove_duplicate=False)),
    )
    for pairs in named:
        for name, value in pairs:
            if name in saved:
                names.setdefault(id(value), []).append(name)
    return (group for group in names.values() if len(group) > 1)


def _same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _converted(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    # bfloat16 and float8 are of kind V, which has no other numbers here.
    return x.astype(dtype) if x.dtype.kind in "fV" and dtype.kind in "fV" else x
