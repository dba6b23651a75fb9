"""One array seen otherwise: reshaping, permuting, broadcasting, casting, moving to a device."""

# A declared operation is known to return Any; what it returns is a tensor.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import PASS, composite, linear, sample
from gpugrad.core.tensor import Tensor
from gpugrad.errors import DTypeError, ShapeError
from gpugrad.ops.samples import normal

__all__ = [
    "astype",
    "broadcast_arrays",
    "broadcast_to",
    "copy",
    "expand_dims",
    "flip",
    "matrix_transpose",
    "moveaxis",
    "permute_dims",
    "reshape",
    "roll",
    "squeeze",
    "sum_to",
    "to_device",
]

Axes = int | tuple[int, ...]


def normal_axis(axis: int, ndim: int, name: str) -> int:
    """``axis`` counted from the front; ShapeError when there is no such axis."""
    if not -ndim <= axis < ndim:
        raise ShapeError(f"{name}: axis {axis} is out of bounds for an array of {ndim} dimensions")
    return axis % ndim


def along(axis: int, index: Any) -> tuple[Any, ...]:
    """The index that applies ``index`` to one axis (counted from the front) and leaves the rest."""
    return (*(slice(None),) * axis, index)


# -- one array ------------------------------------------------------------------------------------


@linear(
    transpose=lambda g, m, x_shape: m.reshape(g, x_shape),
    view=True,
    samples=lambda: [
        sample(normal((2, 3)), (3, 2)),
        sample(normal((2, 3, 4)), (4, -1), note="-1 stands for what is left"),
        sample(normal((0, 3)), (3, 0)),
        sample(normal(()), (1, 1)),
        sample(normal((2, 2)), -1),
    ],
    advice="The number of elements must stay; -1 for one axis stands for what is left",
)
def reshape(m: Backend, x: Array, /, shape: Axes) -> Array:
    """The same elements, in C order, under another shape.

    One length may be -1: it is worked out from the others. Raises ShapeError when the numbers of
    elements differ.

    >>> import gpugrad as gg
    >>> gg.reshape(gg.arange(6), (2, -1))
    tensor([[0, 1, 2],
            [3, 4, 5]])
    """
    if not isinstance(shape, tuple):
        shape = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    return m.reshape(x, shape)


def _inverse(axes: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes ``axes``."""
    back = [0] * len(axes)
    for i, axis in enumerate(axes):
        back[axis] = i
    return tuple(back)


@linear(
    transpose=lambda g, m, axes: m.permute_dims(g, _inverse(axes)),
    native="permute_dims",
    view=True,
    samples=lambda: [
        sample(normal((2, 3, 4)), (2, 0, 1)),
        sample(normal((2, 3, 4)), (-1, 0, 1)),
        sample(normal((2, 3)), (1, 0)),
        sample(normal(()), ()),
    ],
)
def permute_dims(m: Backend, x: Array, /, axes: tuple[int, ...]) -> Array:
    """The axes of ``x`` in another order: axis ``i`` of the result is ``axes[i]`` of ``x``.

    >>> import gpugrad as gg
    >>> gg.permute_dims(gg.zeros((2, 3, 4)), (2, 0, 1)).shape
    (4, 2, 3)
    """
    ...


@linear(
    transpose=lambda g, m: m.matrix_transpose(g),
    native="matrix_transpose",
    view=True,
    samples=lambda: [sample(normal((2, 3))), sample(normal((4, 2, 3)))],
)
def matrix_transpose(m: Backend, x: Array, /) -> Array:
    """Every matrix in ``x``, a stack of matrices in its last two axes, transposed.

    >>> import gpugrad as gg
    >>> gg.matrix_transpose(gg.asarray([[1, 2], [3, 4]]))
    tensor([[1, 3],
            [2, 4]])
    """
    ...


@linear(
    transpose=lambda g, m, x_shape: m.reshape(g, x_shape),
    native="expand_dims",
    view=True,
    samples=lambda: [
        sample(normal((2, 3)), axis=0),
        sample(normal((2, 3)), axis=-1),
        sample(normal(()), axis=0),
    ],
)
def expand_dims(m: Backend, x: Array, /, axis: int = 0) -> Array:
    """``x`` with a new axis of length one at ``axis``.

    >>> import gpugrad as gg
    >>> gg.expand_dims(gg.asarray([1, 2]), axis=1).shape
    (2, 1)
    """
    ...


@linear(
    transpose=lambda g, m, x_shape: m.reshape(g, x_shape),
    view=True,
    samples=lambda: [
        sample(normal((1, 3, 1)), axis=0),
        sample(normal((1, 3, 1)), axis=(0, -1)),
        sample(normal((1, 3, 1)), note="every axis of length one"),
    ],
)
def squeeze(m: Backend, x: Array, /, axis: Axes | None = None) -> Array:
    """``x`` without the axes ``axis``, which have length one; without all of those by default.

    Raises ShapeError when an axis that is named is longer.

    >>> import gpugrad as gg
    >>> gg.squeeze(gg.zeros((1, 3, 1)), axis=0).shape
    (3, 1)
    """
    if axis is None:
        axis = tuple(i for i, n in enumerate(x.shape) if n == 1)
    return m.squeeze(x, axis=axis)


@linear(
    transpose=lambda g, m, x_shape: m.sum_to(g, x_shape),
    native="broadcast_to",
    view=True,
    samples=lambda: [
        sample(normal((3,)), (2, 3)),
        sample(normal((2, 1, 3)), (2, 4, 3)),
        sample(normal(()), (2, 2)),
        sample(normal((2, 3)), (2, 3)),
    ],
)
def broadcast_to(m: Backend, x: Array, /, shape: tuple[int, ...]) -> Array:
    """``x`` repeated, without a copy, to fill ``shape`` by the rules of broadcasting.

    >>> import gpugrad as gg
    >>> gg.broadcast_to(gg.asarray([1, 2]), (2, 2))
    tensor([[1, 2],
            [1, 2]])
    """
    ...


def _sum_to(x: Any, shape: tuple[int, ...]) -> Any:
    x = np.asarray(x)
    lead = x.ndim - len(shape)
    ones = tuple(lead + i for i, n in enumerate(shape) if n == 1 and x.shape[lead + i] != 1)
    return x.sum(axis=(*range(lead), *ones), keepdims=True).reshape(shape)


@linear(
    transpose=lambda g, m, x_shape: m.broadcast_to(g, x_shape),
    native="sum_to",
    view=True,
    samples=lambda: [
        sample(normal((2, 3)), (3,)),
        sample(normal((2, 4, 3)), (2, 1, 3)),
        sample(normal((2, 3)), ()),
        sample(normal((2, 3)), (1, 1)),
        sample(normal((2, 3)), (2, 3), note="nothing to sum"),
    ],
    reference=_sum_to,
)
def sum_to(m: Backend, x: Array, /, shape: tuple[int, ...]) -> Array:
    """``x`` summed over the axes that broadcasting from ``shape`` would repeat.

    The transpose of :func:`broadcast_to`. Half precision is summed in float32.

    >>> import gpugrad as gg
    >>> gg.sum_to(gg.ones((2, 3)), (3,))
    tensor([2., 2., 2.])
    """
    ...


@linear(
    transpose=lambda g, m, axis: m.flip(g, axis=axis),
    native="flip",
    view=True,
    samples=lambda: [
        sample(normal((2, 3)), axis=1),
        sample(normal((2, 3)), axis=(0, -1)),
        sample(normal((2, 3))),
    ],
)
def flip(m: Backend, x: Array, /, axis: Axes | None = None) -> Array:
    """``x`` with the order of its elements reversed along ``axis``; along all axes by default.

    >>> import gpugrad as gg
    >>> gg.flip(gg.asarray([1, 2, 3]))
    tensor([3, 2, 1])
    """
    ...


def _unroll(g: Array, m: Backend, shift: Axes, axis: Axes | None) -> Array:
    back = -shift if isinstance(shift, int) else tuple(-s for s in shift)
    return m.roll(g, back, axis=axis)


@linear(
    transpose=_unroll,
    native="roll",
    samples=lambda: [
        sample(normal((2, 3)), 1, axis=1),
        sample(normal((2, 3)), (1, -2), axis=(0, 1)),
        sample(normal((2, 3)), 2, note="along the flattened array"),
    ],
)
def roll(m: Backend, x: Array, /, shift: Axes, axis: Axes | None = None) -> Array:
    """``x`` with its elements moved ``shift`` places along ``axis``; the last come in first.

    >>> import gpugrad as gg
    >>> gg.roll(gg.asarray([1, 2, 3]), 1)
    tensor([3, 1, 2])
    """
    ...


@linear(
    transpose=PASS,
    samples=lambda: [sample(normal((2, 3)))],
)
def copy(m: Backend, x: Array, /) -> Array:
    """A copy of ``x`` that shares no memory with it, connected to it in the graph.

    >>> import gpugrad as gg
    >>> gg.copy(gg.asarray([1.0, 2.0]))
    tensor([1., 2.])
    """
    return m.asarray(x, device=m.device(x), copy=True)


def _uncast(g: Array, m: Backend, x_dtype: Any) -> Array:
    if getattr(g.dtype, "kind", "f") == "c" and getattr(x_dtype, "kind", "f") != "c":
        raise DTypeError(
            f"astype: a gradient of {g.dtype} arrived at an operand of {x_dtype}; gradients "
            "through complex numbers are not supported"
        )
    return m.astype(g, x_dtype)


@linear(
    transpose=_uncast,
    samples=lambda: [sample(normal((2, 3)), "float64")],
    reference=lambda x, dtype: np.asarray(x).astype(dtype),
)
def cast(m: Backend, x: Array, /, dtype: Any) -> Array:
    """A copy of ``x`` whose elements have ``dtype``: what :func:`astype` records.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.manipulation import cast
    >>> cast(gg.asarray([1.5, 2.0]), "float32").dtype
    dtype('float32')
    """
    return m.astype(x, m.dtype(dtype))


@composite(
    samples=lambda: [
        sample(normal((2, 3)), "float64"),
        sample(normal((2, 3)), "int32", smooth=False),
    ],
    reference=lambda x, dtype: np.asarray(x).astype(dtype),
)
def astype(x: Any, dtype: Any, /, *, copy: bool = True, device: str | None = None) -> Tensor:
    """``x`` with elements of another dtype.

    A gradient is cast back on its way. Integers and booleans have no derivative, so that a cast to
    them leaves the graph. With ``copy=False`` a tensor that has the dtype already is returned as it
    is.

    >>> import gpugrad as gg
    >>> gg.astype(gg.asarray([1.5, -2.5]), gg.int64)
    tensor([ 1, -2])
    """
    x = asarray(x)
    raw = x.backend.dtype(dtype)
    if copy or raw != x.data.dtype:
        x = cast(x, raw)
        if x.dtype.kind in "biu":
            x = x.detach()
    return x if device is None else x.to(device)


@linear(
    transpose=lambda g, m, x_device: m.to_device(g, x_device),
    samples=lambda: [sample(normal((2, 3)), device="cpu")],
    reference=lambda x, device: x,
)
def to_device(m: Backend, x: Array, /, device: str) -> Array:
    """A copy of ``x`` in the memory of ``device``, a string such as ``"cpu"`` or ``"cuda:0"``.

    Its gradient goes back to where ``x`` is. Raises DeviceError for a device that does not exist or
    cannot be used here.

    >>> import gpugrad as gg
    >>> gg.to_device(gg.asarray([1.0]), "cpu").device
    'cpu'
    """
    return m.to_device(x, device)


# -- made of the above ----------------------------------------------------------------------------


@composite(
    samples=lambda: [
        sample(normal((2, 3, 4)), 0, -1),
        sample(normal((2, 3, 4)), (0, 1), (2, 0)),
    ],
    reference=np.moveaxis,
)
def moveaxis(x: Any, source: Axes, destination: Axes, /) -> Tensor:
    """``x`` with the axes ``source`` moved to the places ``destination``, the rest in order.

    >>> import gpugrad as gg
    >>> gg.moveaxis(gg.zeros((2, 3, 4)), 0, -1).shape
    (3, 4, 2)
    """
    x = asarray(x)
    ndim = x.ndim
    old, new = (
        [normal_axis(a, ndim, "moveaxis") for a in ((axes,) if isinstance(axes, int) else axes)]
        for axes in (source, destination)
    )
    if len(old) != len(new) or len({*old}) != len(old) or len({*new}) != len(new):
        raise ShapeError(
            f"moveaxis: source {source} and destination {destination} need one place for each axis "
            "and no axis twice"
        )
    order = [a for a in range(ndim) if a not in old]
    for place, axis in sorted(zip(new, old)):
        order.insert(place, axis)
    return permute_dims(x, tuple(order))


@composite(
    samples=lambda: [sample(normal((3,), 0), normal((2, 1), 1))],
    reference=lambda *arrays: tuple(np.broadcast_arrays(*arrays)),
)
def broadcast_arrays(*arrays: Any) -> tuple[Tensor, ...]:
    """The arrays, each broadcast to the one shape that all of them fit into.

    >>> import gpugrad as gg
    >>> [x.shape for x in gg.broadcast_arrays(gg.zeros(3), gg.zeros((2, 1)))]
    [(2, 3), (2, 3)]
    """
    tensors = [asarray(x) for x in arrays]
    shape = common_shape("broadcast_arrays", *(x.shape for x in tensors))
    return tuple(broadcast_to(x, shape) for x in tensors)


def common_shape(name: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that ``shapes`` broadcast to; ShapeError naming them when there is none."""
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        raise ShapeError(
            f"{name}: shapes {' and '.join(map(str, shapes))} do not broadcast together; from the "
            "last axis backward, sizes must be equal or one of them 1"
        ) from None
