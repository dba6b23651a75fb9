"""Norms of gradients, and clipping by them, without reading a value from the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from gpugrad.backend import SPACES, Array, Backend, backend_for_device
from gpugrad.core.graph import mutations
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.errors import DeviceError, ParameterError

__all__ = [
    "check_bound",
    "check_norm_type",
    "clip_by_norm_",
    "clip_by_value_",
    "coefficient",
    "scale_",
    "total_norm",
]


def total_norm(tensors: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all elements of all tensors taken as one vector, as a 0-d tensor.

    `norm_type` is any positive number, or infinity for the greatest magnitude. Half precision is
    accumulated, and returned, in float32. The norm of no tensors is 0. All tensors live on one
    device, and the norm stays there.

    >>> import gpugrad as gg
    >>> total_norm([gg.tensor([3.0]), gg.tensor([[0.0, 4.0]])])
    tensor(5.)
    """
    p = check_norm_type(norm_type)
    arrays = [x.data for x in tensors]
    if not arrays:
        return tensor_of(backend_for_device("cpu").asarray(0.0, dtype="float32"))
    space = SPACES[type(arrays[0])]
    _check_one_place(arrays)
    return _scalar(space.bind(_norm)(*arrays, space=space, p=p), arrays[0])


def _norm(*arrays: Array, space: Backend, p: float) -> Array:
    shares = [_share(space, x, p) for x in arrays if math.prod(x.shape)]
    if not shares:
        return space.sum(_wide(space, arrays[0]))
    # Promotes as it goes, so that the norm of float32 and float64 tensors is float64.
    total = shares[0]
    for share in shares[1:]:
        total = space.maximum(total, share) if p == math.inf else total + share
    if p == 2:
        return space.sqrt(total)
    return total if p in (1, math.inf) else total ** (1 / p)


def _share(space: Backend, x: Array, p: float) -> Array:
    """What one array adds to the norm: its sum of powers, or its greatest magnitude."""
    flat = space.reshape(_wide(space, x), (-1,))
    if p == 2:
        return space.vecdot(flat, flat)  # one pass, nothing allocated
    if p == math.inf:
        return space.max(space.abs(flat))
    if p == 1:
        return space.sum(space.abs(flat))
    return space.sum(space.abs(flat) ** p)


def _wide(space: Backend, x: Array) -> Array:
    return space.astype(x, space.dtype("float32")) if space.numpy_dtype(x).itemsize == 2 else x


def coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by: min(1, max_norm/(norm + 1e-6)), on the device.

    >>> import gpugrad as gg
    >>> coefficient(gg.tensor(4.0), 1.0).item() < 0.25, coefficient(gg.tensor(0.5), 1.0).item()
    (True, 1.0)
    """
    bound = check_bound(max_norm)
    space = SPACES[type(norm.data)]
    share = space.bind(lambda x: space.minimum(bound / (x + 1e-6), 1.0))
    return _scalar(share(norm.data), norm.data)


def scale_(tensors: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply every tensor in place by a 0-d tensor on the same device."""
    for x in tensors:
        space = SPACES[type(x.data)]
        _changed(x, space.bind(_scaled)(x.data, space.astype(factor.data, x.data.dtype)))


def _scaled(x: Array, factor: Array) -> Array:
    x *= factor
    return x


def clip_by_norm_(tensors: Sequence[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale all tensors in place so that their total norm is at most `max_norm`.

    Returns the norm before clipping, on the device: nothing is read, whether or not it is clipped.
    A norm that is NaN makes every element NaN; an infinite norm makes finite elements 0 and
    infinite ones NaN.

    >>> import gpugrad as gg
    >>> x = gg.tensor([3.0, 4.0])
    >>> clip_by_norm_([x], 1.0)
    tensor(5.)
    >>> [round(v, 4) for v in x.tolist()]
    [0.6, 0.8]
    """
    bound = check_bound(max_norm)
    norm = total_norm(tensors, norm_type)
    scale_(tensors, coefficient(norm, bound))
    return norm


def clip_by_value_(tensors: Iterable[Tensor], clip_value: float) -> None:
    """Bring every element in place into [-clip_value, clip_value]; NaN stays NaN.

    >>> import gpugrad as gg
    >>> x = gg.tensor([-3.0, 0.5])
    >>> clip_by_value_([x], 1.0)
    >>> x
    tensor([-1. ,  0.5])
    """
    bound = check_bound(clip_value, "clip_value")
    for x in tensors:
        space = SPACES[type(x.data)]
        clipped = space.clip(x.data, -bound, bound)
        if space.mutable:
            space.setitem(x.data, ..., clipped)
            clipped = x.data
        _changed(x, clipped)


def check_bound(value: float, name: str = "max_norm") -> float:
    """`value` as a float; ParameterError when it is negative or NaN."""
    try:
        bound = float(value)
    except (TypeError, ValueError):
        raise ParameterError(f"{name} is a number, not {type(value).__name__}") from None
    if not bound >= 0:
        raise ParameterError(f"{name} is {bound}; it must be zero or more")
    return bound


def check_norm_type(value: float) -> float:
    """`value` as a float; ParameterError unless it is positive or infinite."""
    try:
        p = float(value)
    except (TypeError, ValueError):
        raise ParameterError(f"norm_type is a number, not {value!r}") from None
    if not p > 0:
        raise ParameterError(
            f"norm_type is {p}; it must be positive, or inf for the greatest magnitude"
        )
    return p


def _check_one_place(arrays: Sequence[Array]) -> None:
    places = {(SPACES[type(x)].name, SPACES[type(x)].device(x)) for x in arrays}
    if len(places) > 1:
        met = ", ".join(f"{name} on {device}" for name, device in sorted(places))
        raise DeviceError(
            f"total_norm: tensors live in different places ({met}); take the norm of each place's "
            "own tensors, or move them together"
        )


def _scalar(y: Any, like: Array) -> Tensor:
    """A 0-d tensor of `y`, for which some libraries return a scalar object of their own."""
    return tensor_of(y if type(y) is type(like) else SPACES[type(like)].asarray(y))


def _changed(x: Tensor, data: Array) -> None:
    if data is not x.data:  # a library whose arrays do not change
        x.data = data
    else:
        mutations.mark(data)
