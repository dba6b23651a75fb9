"""Changing gradients: multiplied by one number, or brought into an interval."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from gpugrad.backend import SPACES, Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.clip.checks import check_bound
from gpugrad.clip.norms import cast, norm_dtype, scalar_tensor, total_norm, widen
from gpugrad.clip.rows import rows_of
from gpugrad.core.graph import mutations
from gpugrad.core.tensor import Tensor

__all__ = [
    "QUIET",
    "clip_by_norm_",
    "clip_by_value_",
    "clipped",
    "coefficient",
    "ratio",
    "scale_",
    "scaled",
]

#: Elements of half precision that are widened at a time.
PORTION = 1 << 26

#: NumPy says nothing: a bound beyond the range of a dtype is an infinite one, and what an infinite
#: norm does to gradients is documented.
QUIET = partial(np.errstate, all="ignore")


def coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by: min(1, max_norm/(norm + 1e-6)), on the device.

    Raises ParameterError for a bound that is negative or NaN.

    >>> import gpugrad as gg
    >>> coefficient(gg.tensor(4.0), 1.0).item() < 0.25, coefficient(gg.tensor(0.5), 1.0).item()
    (True, 1.0)
    """
    bound = check_bound(max_norm)
    space = SPACES[type(norm.data)]
    with QUIET():
        return scalar_tensor(space.bind(ratio)(space, norm.data, bound), type(norm.data))


def ratio(m: Backend, norm: Array, bound: Array | float) -> Array:
    """:func:`coefficient` of raw arrays; as in PyTorch, 1e-6 stands between it and 0/0."""
    return m.minimum(bound / (norm + 1e-6), 1.0)


def scale_(tensors: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply every tensor in place by a 0-d tensor on the same device.

    Half precision is multiplied in float32, and rounded once. Gradients that lie beside each other
    in an optimiser's memory are multiplied together.

    >>> import gpugrad as gg
    >>> x = gg.tensor([3.0, 4.0])
    >>> scale_([x], gg.tensor(0.5))
    >>> x
    tensor([1.5, 2. ])
    """
    tensors = list(tensors)
    rows, alone = rows_of([x.data for x in tensors])
    with QUIET():
        for row in rows:
            space = SPACES[type(row.buffer)]
            times = space.bind(scaled)
            for run in row.arrays():
                for part in _portions(space, run):
                    times(space, part, factor.data)
            # Zero times NaN is NaN. Where a look at the factor would be a wait, nobody looks.
            if not (space.on_host and factor.data == factor.data):
                row.clean()
        for i in alone:
            x = tensors[i]
            space = SPACES[type(x.data)]
            _changed(x, space.bind(scaled)(space, x.data, factor.data))
    if rows:
        left = set(alone)
        for i, x in enumerate(tensors):
            if i not in left:
                mutations.mark(x.data)


def _portions(m: Backend, run: Array) -> Iterator[Array]:
    """A run; one that is multiplied in another dtype in portions, which are there twice."""
    if m.numpy_dtype(run).itemsize > 2 or run.size <= PORTION:
        yield run
        return
    for start in range(0, run.size, PORTION):
        yield m.getitem(run, slice(start, start + PORTION))


@fusible
def scaled(m: Backend, x: Array, factor: Array, /) -> Array:
    """`x` times a 0-d factor, or one that fits; `x` itself where arrays can change."""
    factor = cast(m, factor, m.dtype(norm_dtype(m, x)))
    if m.numpy_dtype(x).itemsize > 2:
        x *= factor
        return x
    return _stored(m, x, widen(m, x) * factor)


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
    with QUIET():
        for x in tensors:
            space = SPACES[type(x.data)]
            _changed(x, space.bind(clipped)(space, x.data, bound))


def clipped(m: Backend, x: Array, bound: float) -> Array:
    """`x` brought into [-bound, bound]; `x` itself where arrays can change."""
    return _stored(m, x, m.clip(x, -bound, bound))


def _stored(m: Backend, x: Array, value: Array) -> Array:
    if not m.mutable:
        return m.astype(value, x.dtype)
    m.setitem(x, ..., value)
    return x


def _changed(x: Tensor, data: Array) -> None:
    if data is not x.data:  # a library whose arrays do not change
        x.data = data
    else:
        mutations.mark(data)
