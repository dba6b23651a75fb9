"""Arrays joined, split, repeated and padded."""

# A declared operation is known to return Any; what it returns is a tensor.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import composite, differentiable, primitive, sample
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.ops.manipulation import Axes, along, broadcast_to, expand_dims, normal_axis, reshape
from gpugrad.ops.samples import normal

__all__ = ["concat", "pad", "repeat", "split", "stack", "tile", "unstack"]


def _concat_vjp(
    g: Array, m: Backend, parts_shape: list[tuple[int, ...]], axis: int | None,
    needs: tuple[bool, ...],
) -> list[Array | None]:  # fmt: skip
    grads: list[Array | None] = []
    start = 0
    for shape, needed in zip(parts_shape, needs):
        stop = start + (math.prod(shape) if axis is None else shape[axis])
        part = m.getitem(g, along((axis or 0) % g.ndim, slice(start, stop))) if needed else None
        grads.append(m.reshape(part, shape) if needed and axis is None else part)
        start = stop
    return grads


@primitive(
    vjp=_concat_vjp,
    samples=lambda: [
        sample(normal((2, 3), 0), normal((1, 3), 1)),
        sample(normal((2, 3), 0), normal((2, 1), 1), normal((2, 2), 2), axis=-1),
        sample(normal((2, 3), 0), normal((2,), 1), axis=None, note="flattened first"),
    ],
    reference=lambda *arrays, axis=0: np.concatenate(arrays, axis=axis),
    advice="Arrays join along an axis when they agree in all others: slice, pad or reshape them",
)
def concatenate(m: Backend, *parts: Array, axis: int | None = 0) -> Array:
    """The arrays joined along an axis they have: what :func:`concat` records.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.joining import concatenate
    >>> concatenate(gg.asarray([1, 2]), gg.asarray([3]))
    tensor([1, 2, 3])
    """
    return m.concat(parts, axis=axis)


@composite(
    samples=lambda: [sample([normal((2, 3), 0), normal((1, 3), 1)], axis=0)],
    reference=np.concatenate,
)
def concat(arrays: Sequence[Any], /, *, axis: int | None = 0) -> Tensor:
    """The arrays joined along an axis that they have; ``axis=None`` flattens them first.

    All shapes agree except along ``axis``; ShapeError otherwise.

    >>> import gpugrad as gg
    >>> gg.concat([gg.asarray([1, 2]), gg.asarray([3])])
    tensor([1, 2, 3])
    """
    return concatenate(*_sequence(arrays), axis=axis)


def _sequence(arrays: Any) -> Sequence[Any]:
    """Several arrays; a single one stands for its parts along the first axis, as in NumPy."""
    return unstack(arrays) if hasattr(arrays, "shape") else arrays


def _stack_vjp(g: Array, m: Backend, axis: int, needs: tuple[bool, ...]) -> list[Array | None]:
    axis %= g.ndim
    return [m.getitem(g, along(axis, i)) if n else None for i, n in enumerate(needs)]


@primitive(
    vjp=_stack_vjp,
    samples=lambda: [
        sample(normal((2, 3), 0), normal((2, 3), 1)),
        sample(normal((2,), 0), normal((2,), 1), normal((2,), 2), axis=-1),
    ],
    reference=lambda *arrays, axis=0: np.stack(arrays, axis=axis),
)
def stacked(m: Backend, *parts: Array, axis: int = 0) -> Array:
    """The arrays joined along a new axis: what :func:`stack` records.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.joining import stacked
    >>> stacked(gg.asarray([1, 2]), gg.asarray([3, 4]), axis=1)
    tensor([[1, 3],
            [2, 4]])
    """
    return m.stack(parts, axis=axis)


@composite(
    samples=lambda: [sample([normal((2, 3), 0), normal((2, 3), 1)], axis=1)],
    reference=np.stack,
)
def stack(arrays: Sequence[Any], /, *, axis: int = 0) -> Tensor:
    """The arrays, which have one shape, joined along a new axis.

    >>> import gpugrad as gg
    >>> gg.stack([gg.asarray([1, 2]), gg.asarray([3, 4])])
    tensor([[1, 2],
            [3, 4]])
    """
    return stacked(*_sequence(arrays), axis=axis)


def _bounds(sections: Any, n: int) -> list[slice]:
    """The slices that ``sections`` cuts an axis of length ``n`` into."""
    if isinstance(sections, int):
        if sections < 1 or n % sections:
            raise ShapeError(
                f"split: {n} elements do not divide into {sections} equal parts; pass the indices "
                "to cut at"
            )
        cuts = list(range(0, n + 1, n // sections)) if n else [0] * (sections + 1)
    else:
        cuts = [0, *(int(i) for i in sections), n]
    return [slice(*slice(a, b).indices(n)[:2]) for a, b in pairwise(cuts)]


def _split_vjp(
    g: list[Array | None], m: Backend, x_shape: tuple[int, ...], sections: Any, axis: int
) -> tuple[Array]:
    axis %= len(x_shape)
    bounds = _bounds(sections, x_shape[axis])
    found = [(part, b) for part, b in zip(g, bounds) if part is not None]
    if len(found) == len(bounds) and all(b.start <= b.stop for b in bounds):
        return (m.concat([part for part, _ in found], axis=axis),)
    spread = [m.scatter_add(part, along(axis, b), x_shape) for part, b in found]
    return (builtins.sum(spread[1:], start=spread[0]),)


@primitive(
    vjp=_split_vjp,
    broadcasts=False,
    view=True,
    outputs="many",
    samples=lambda: [
        sample(normal((4, 3)), 2),
        sample(normal((3, 5)), (1, 3), axis=-1, note="cut before elements 1 and 3"),
        sample(normal((4,)), (3, 1), note="parts may overlap or be empty, as in NumPy"),
    ],
    reference=np.split,
)
def split(m: Backend, x: Array, /, sections: Any, axis: int = 0) -> tuple[Array, ...]:
    """``x`` cut along ``axis`` into a tuple of parts, as NumPy does it.

    ``sections`` is a number of equal parts (ShapeError when it does not divide the length), or the
    indices to cut at. The parts may share memory with ``x``.

    >>> import gpugrad as gg
    >>> gg.split(gg.asarray([1, 2, 3, 4]), [1, 3])
    (tensor([1]), tensor([2, 3]), tensor([4]))
    """
    axis = normal_axis(axis, x.ndim, "split")
    return tuple(m.getitem(x, along(axis, b)) for b in _bounds(sections, x.shape[axis]))


def _unstack_vjp(g: list[Array | None], m: Backend, axis: int) -> tuple[Array]:
    zero = m.zeros_like(next(part for part in g if part is not None))
    return (m.stack([zero if part is None else part for part in g], axis=axis),)


@primitive(
    vjp=_unstack_vjp,
    broadcasts=False,
    view=True,
    outputs="many",
    samples=lambda: [sample(normal((2, 3))), sample(normal((2, 3)), axis=-1)],
    reference=lambda x, axis=0: tuple(np.moveaxis(x, axis, 0)),
)
def unstack(m: Backend, x: Array, /, axis: int = 0) -> tuple[Array, ...]:
    """The parts of ``x`` along ``axis``, without that axis: the inverse of :func:`stack`.

    >>> import gpugrad as gg
    >>> gg.unstack(gg.asarray([[1, 2], [3, 4]]))
    (tensor([1, 2]), tensor([3, 4]))
    """
    axis = normal_axis(axis, x.ndim, "unstack")
    return tuple(m.getitem(x, along(axis, i)) for i in range(x.shape[axis]))


# -- repeated and padded ---------------------------------------------------------------------------


@composite(
    samples=lambda: [
        sample(normal((2, 3)), (2, 2)),
        sample(normal((2, 3)), (2,)),
        sample(normal((3,)), (2, 2)),
    ],
    reference=np.tile,
)
def tile(x: Any, repetitions: Axes, /) -> Tensor:
    """``x`` laid out ``repetitions`` times along each axis, like tiles.

    >>> import gpugrad as gg
    >>> gg.tile(gg.asarray([1, 2]), (2,))
    tensor([1, 2, 1, 2])
    """
    times = (repetitions,) if isinstance(repetitions, int) else tuple(repetitions)
    x = asarray(x)
    ndim = max(x.ndim, len(times))
    shape = (1,) * (ndim - x.ndim) + x.shape
    times = (1,) * (ndim - len(times)) + times
    x = reshape(x, tuple(k for n in shape for k in (1, n)))
    x = broadcast_to(x, tuple(k for pair in zip(times, shape) for k in pair))
    return reshape(x, tuple(r * n for r, n in zip(times, shape)))


@composite(
    samples=lambda: [
        sample(normal((2, 3)), 2, axis=1),
        sample(normal((2, 3)), 2, note="of the flattened array"),
        sample(normal((2, 3)), (1, 0, 3), axis=-1, note="every element its own number of times"),
    ],
    reference=np.repeat,
)
def repeat(x: Any, repeats: Any, /, *, axis: int | None = None) -> Tensor:
    """``x`` with each element along ``axis`` repeated ``repeats`` times, one after the other.

    ``repeats`` is a number for all elements, or one number for each.

    >>> import gpugrad as gg
    >>> gg.repeat(gg.asarray([1, 2]), 2)
    tensor([1, 1, 2, 2])
    """
    x = asarray(x)
    if axis is None:
        x = reshape(x, (x.size,))
        axis = 0
    axis = normal_axis(axis, x.ndim, "repeat")
    shape = x.shape
    if isinstance(repeats, int):
        x = broadcast_to(
            expand_dims(x, axis=axis + 1), (*shape[: axis + 1], repeats, *shape[axis + 1 :])
        )
        return reshape(x, (*shape[:axis], shape[axis] * repeats, *shape[axis + 1 :]))
    times = [int(r) for r in (repeats.tolist() if hasattr(repeats, "tolist") else repeats)]
    if len(times) not in (1, shape[axis]):
        raise ShapeError(
            f"repeat: {len(times)} repeats for the {shape[axis]} elements along axis {axis}; give "
            "one number, or one per element"
        )
    return differentiable.take(x, np.repeat(np.arange(shape[axis]), times), axis=axis)


@composite(
    samples=lambda: [
        sample(normal((2, 3)), ((1, 2), (0, 1))),
        sample(normal((2, 3)), 1, constant_values=0.5),
        sample(normal((3, 4)), ((2, 1), (1, 3)), mode="reflect"),
        sample(normal((2, 3)), (1, 2), mode="edge"),
    ],
    reference=np.pad,
)
def pad(x: Any, pad_width: Any, mode: str = "constant", *, constant_values: float = 0) -> Tensor:
    """``x`` with elements added before and after each axis.

    Parameters
    ----------
    x:
        An array of any shape.
    pad_width:
        As in NumPy: one number, one pair (before, after), or one pair for each axis.
    mode:
        ``"constant"``, or one that repeats elements of ``x``: ``"edge"``, ``"reflect"``,
        ``"symmetric"``, ``"wrap"``.
    constant_values:
        What to add in mode constant, a number.

    >>> import gpugrad as gg
    >>> gg.pad(gg.asarray([1.0, 2.0]), (1, 2))
    tensor([0., 1., 2., 0., 0.])
    """
    x = asarray(x)
    ndim = x.ndim
    try:
        widths = np.broadcast_to(np.asarray(pad_width), (ndim, 2)).tolist()
    except ValueError:
        raise ShapeError(
            f"pad: pad_width {pad_width!r} does not fit {ndim} axes; give one number, a pair "
            "(before, after), or a pair for each axis"
        ) from None
    if any(w < 0 for pair in widths for w in pair):
        raise ParameterError(f"pad: widths must not be negative, got {pad_width!r}")
    if mode == "constant":
        shape = tuple(n + lo + hi for n, (lo, hi) in zip(x.shape, widths))
        middle = tuple(slice(lo, lo + n) for n, (lo, _) in zip(x.shape, widths))
        if constant_values == 0:
            return differentiable.scatter_add(x, middle, shape)
        frame = differentiable.full(shape, constant_values, dtype=x.dtype, device=x.device)
        return differentiable.put_index(frame, x, middle)
    if mode not in ("edge", "reflect", "symmetric", "wrap"):
        raise ParameterError(
            f"pad: mode {mode!r} is not known; use 'constant', 'edge', 'reflect', 'symmetric' or "
            "'wrap'"
        )
    for axis, width in enumerate(widths):
        if width != [0, 0]:
            index = np.pad(np.arange(x.shape[axis]), width, mode=mode)  # type: ignore[call-overload]
            x = differentiable.take(x, index, axis=axis)
    return x
