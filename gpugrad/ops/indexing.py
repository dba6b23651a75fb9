"""Reading and writing at an index, gathering and scattering, sorting."""

# A declared operation is known to return Any; what it returns is a tensor.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.backend.tape import replayable
from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import composite, linear, primitive, sample
from gpugrad.core.tensor import SCALARS, Tensor, placed_index
from gpugrad.errors import ShapeError
from gpugrad.ops.creation import arange
from gpugrad.ops.manipulation import (
    along,
    astype,
    broadcast_to,
    common_shape,
    expand_dims,
    normal_axis,
    reshape,
)
from gpugrad.ops.samples import distinct, normal

__all__ = [
    "argsort",
    "nonzero",
    "one_hot",
    "searchsorted",
    "sort",
    "take",
    "take_along_axis",
    "tril",
    "triu",
]


def subscript(x: Tensor, index: Any) -> Tensor:
    """``x[index]``: :meth:`Tensor.__getitem__`."""
    return getitem(x, placed_index(x.data, index))


_INDICES: list[tuple[Any, str]] = [
    (1, "an integer"),
    ((slice(None, None, 2), slice(3, 0, -1)), "slices"),
    ((..., None, -1), "a new axis"),
    (np.array([1, 0, 1]), "an array, an element of it twice"),
    ((np.array([[0], [1]]), slice(None), np.array([0, 3])), "two arrays around a slice"),
    (np.array([True, False]), "a mask"),
]


def _index_samples() -> list[Any]:
    return [sample(normal((2, 3, 4)), index, note=note) for index, note in _INDICES]


@linear(
    transpose=replayable(lambda g, m, x_shape, index: m.scatter_add(g, index, x_shape)),
    native="getitem",
    view=True,
    sized_by_values="index",
    samples=_index_samples,
    reference=lambda x, index: np.asarray(x)[index],
)
def getitem(m: Backend, x: Array, /, index: Any) -> Array:
    """``x[index]``, with NumPy's rules for slices, integers, None, Ellipsis, arrays and masks.

    The index holds raw arrays; ``tensor[index]`` takes tensors and lists too. Raises IndexError for
    an index outside ``x``.

    >>> import gpugrad as gg
    >>> gg.asarray([1.0, 2.0, 3.0])[1:]
    tensor([2., 3.])
    """
    ...


def _scattered(x: Any, index: Any, shape: tuple[int, ...]) -> Any:
    out = np.zeros(shape, np.asarray(x).dtype)
    np.add.at(out, index, x)
    return out


@linear(
    transpose=lambda g, m, index: m.getitem(g, index),
    native="scatter_add",
    samples=lambda: [
        sample(normal((3, 3, 4)), np.array([1, 0, 1]), (2, 3, 4)),
        sample(normal((2, 3)), (slice(0, 4, 2), slice(1, 4)), (4, 5)),
        sample(normal((2,)), np.array([False, True, True]), (3,)),
    ],
    reference=_scattered,
)
def scatter_add(m: Backend, x: Array, /, index: Any, shape: tuple[int, ...]) -> Array:
    """Zeros of ``shape`` with ``x`` added at ``index``; where an element is named twice, twice.

    The transpose of reading at ``index``.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.indexing import scatter_add
    >>> scatter_add(gg.asarray([1.0, 2.0, 3.0]), [0, 2, 0], (4,))
    tensor([4., 0., 2., 0.])
    """
    ...


def _may_repeat(index: Any) -> bool:
    """Whether an index has arrays of integers, which may name an element twice."""
    return any(
        isinstance(i, list) or (getattr(i, "shape", ()) and "bool" not in str(i.dtype))
        for i in (index if isinstance(index, tuple) else (index,))
    )


def _written(g: Array, m: Backend, v_shape: tuple[int, ...], index: Any) -> Array:
    whole = g
    g = m.getitem(g, index)
    if _may_repeat(index):
        # Where the index names an element twice, only the value written last is in the result.
        number = m.astype(m.reshape(m.ones_like(g), (-1,)), m.dtype("int64"))
        number = m.reshape(m.cumulative_sum(number, axis=0), g.shape)
        written = m.put_index(m.astype(m.zeros_like(whole), m.dtype("int64")), number, index)
        g = m.where(m.getitem(written, index) == number, g, 0.0)
    lead = len(v_shape) - g.ndim  # NumPy lets a value have more axes, of length one
    return m.reshape(g, (1,) * lead + tuple(g.shape)) if lead > 0 else g


def _put(x: Any, v: Any, index: Any) -> Any:
    out = np.array(x)
    out[index] = v
    return out


@primitive(
    vjps=(lambda g, m, index: m.put_index(g, 0.0, index), _written),
    samples=lambda: [
        sample(normal((2, 3), 0), normal((3,), 1), 1),
        sample(normal((2, 3), 0), normal((2, 1), 1), (slice(None), slice(1, None))),
        sample(normal((2, 3), 0), 0.5, np.array([[True, False, True], [False, True, False]])),
    ],
    reference=_put,
)
def put_index(m: Backend, x: Array, v: Array, /, index: Any) -> Array:
    """A copy of ``x`` with ``v`` at ``index``: ``x[index] = v`` without changing ``x``.

    ``v`` broadcasts to what the index names. Where an index names an element twice, the value that
    comes last stays and gets the gradient; on a GPU it is not said which one comes last.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.indexing import put_index
    >>> put_index(gg.zeros(3), 5.0, 1)
    tensor([0., 5., 0.])
    """
    if type(v) not in SCALARS and v.dtype != x.dtype:
        v = m.astype(v, x.dtype)
    return m.setitem_copy(x, index, v)


# -- gathering along one axis ---------------------------------------------------------------------


@composite(
    samples=lambda: [
        sample(normal((3, 4)), np.array([2, 0, 2]), axis=0),
        sample(normal((3, 4)), np.array([[1, 3], [0, -1]]), axis=1),
        sample(normal((3, 4)), np.array([11, 0]), note="of the flattened array"),
    ],
    reference=np.take,
)
def take(x: Any, indices: Any, /, axis: int | None = None) -> Tensor:
    """The elements of ``x`` at ``indices`` along ``axis``; of the flattened array by default.

    >>> import gpugrad as gg
    >>> gg.take(gg.asarray([[1, 2], [3, 4]]), gg.asarray([1, 1]), axis=0)
    tensor([[3, 4],
            [3, 4]])
    """
    x = asarray(x)
    if axis is None:
        x = reshape(x, (x.size,))
        axis = 0
    if isinstance(indices, list | tuple):
        indices = list(indices)  # a tuple would index one axis after the other
    return subscript(x, along(normal_axis(axis, x.ndim, "take"), indices))


def _add_along(m: Any, g: Array, indices: Array, shape: tuple[int, ...], axis: int) -> Array:
    added: Array = m.scatter_add_along_axis(g, indices, shape, axis)
    return added


# A backend has this as a method, which does not look for kernels.
_added_along = fusible(_add_along, "scatter_add_along_axis")


@primitive(
    vjps=(
        lambda g, m, indices, x_shape, axis: _added_along(m, g, indices, x_shape, axis),
        None,
    ),
    jvps=(lambda t, m, indices, axis: m.take_along_axis(t, indices, axis=axis), None),
    samples=lambda: [
        sample(normal((3, 4)), np.array([[0, 0], [3, 1], [2, -1]]), axis=1),
        sample(normal((3, 4)), np.array([[2, 0, 1, 2]]), axis=0),
    ],
    reference=lambda x, indices, axis: np.take_along_axis(x, indices, axis),
)
def gather(m: Backend, x: Array, indices: Array, /, axis: int) -> Array:
    """:func:`take_along_axis` for shapes that agree off the axis: what it records.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.indexing import gather
    >>> gather(gg.asarray([[1, 2], [3, 4]]), gg.asarray([[1], [0]]), axis=1)
    tensor([[2],
            [3]])
    """
    return m.take_along_axis(x, indices, axis=axis)


def _scattered_along(x: Any, indices: Any, shape: tuple[int, ...], axis: int) -> Any:
    out = np.zeros(shape)
    for at in np.ndindex(np.shape(indices)):
        to = list(at)
        to[axis] = indices[at]
        out[tuple(to)] += x[at]
    return out


@primitive(
    vjps=(lambda g, m, indices, axis: m.take_along_axis(g, indices, axis=axis), None),
    jvps=(
        lambda t, m, indices, shape, axis: _added_along(m, t, indices, shape, axis),
        None,
    ),
    samples=lambda: [
        sample(normal((3, 2)), np.array([[0, 0], [3, 1], [2, 3]]), (3, 4), 1),
        sample(normal((2, 3)), np.array([[0, 1, 0], [0, 1, 1]]), (2, 3), 0),
    ],
    reference=_scattered_along,
)
def scatter_add_along_axis(
    m: Backend, x: Array, indices: Array, /, shape: tuple[int, ...], axis: int
) -> Array:
    """Zeros of ``shape`` with ``x`` added where :func:`take_along_axis` reads with ``indices``.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.indexing import scatter_add_along_axis
    >>> scatter_add_along_axis(gg.asarray([[1.0, 2.0]]), gg.asarray([[2, 2]]), (1, 3), 1)
    tensor([[0., 0., 3.]])
    """
    return m.scatter_add_along_axis(x, indices, shape, axis)


@composite(
    samples=lambda: [
        sample(normal((3, 4)), np.array([[0, 0], [3, 1], [2, -1]]), axis=1),
        sample(normal((3, 4)), np.array([[2, 0]]), note="indices broadcast off the axis"),
    ],
    reference=lambda x, indices, axis=-1: np.take_along_axis(x, indices, axis),
)
def take_along_axis(x: Any, indices: Any, /, *, axis: int = -1) -> Tensor:
    """The elements of ``x`` that ``indices`` name along ``axis``, place by place.

    Off the axis the shapes of ``x`` and ``indices`` broadcast together. It reads what
    :func:`argsort` and, with ``keepdims=True``, :func:`argmax` found.

    >>> import gpugrad as gg
    >>> x = gg.asarray([[3, 1, 2]])
    >>> gg.take_along_axis(x, gg.argsort(x, axis=1), axis=1)
    tensor([[1, 2, 3]])
    """
    x = asarray(x)
    space = x.backend
    indices = placed_index(x.data, indices)
    axis = normal_axis(axis, x.ndim, "take_along_axis")
    if indices.ndim != x.ndim:
        raise ShapeError(
            f"take_along_axis: x has {x.ndim} axes and indices {indices.ndim}; they need the same "
            "number, use expand_dims"
        )
    mine, theirs = list(x.shape), list(indices.shape)
    n, k = mine[axis], theirs[axis]
    mine[axis] = theirs[axis] = 1
    if mine != theirs:
        common = list(common_shape("take_along_axis", tuple(mine), tuple(theirs)))
        x = broadcast_to(x, (*common[:axis], n, *common[axis + 1 :]))
        indices = space.broadcast_to(indices, (*common[:axis], k, *common[axis + 1 :]))
    return gather(x, indices, axis)


# -- order ----------------------------------------------------------------------------------------


@primitive(
    samples=lambda: [
        sample(distinct((2, 5)), smooth=False),
        sample(distinct((3, 2)), axis=0, descending=True, smooth=False),
        sample([1.0, 0.0, 1.0, 0.0], descending=True, smooth=False, note="ties keep their order"),
    ],
    reference=lambda x, axis=-1, descending=False, stable=True: np.argsort(
        -np.asarray(x) if descending else x, axis=axis, stable=stable
    ),
)
def argsort(
    m: Backend, x: Array, /, axis: int = -1, descending: bool = False, stable: bool = True
) -> Array:
    """The indices that put ``x`` in order along ``axis``.

    Elements that are equal keep their order.

    >>> import gpugrad as gg
    >>> gg.argsort(gg.asarray([3.0, 1.0, 2.0]))
    tensor([1, 2, 0])
    """
    if not descending:
        return m.argsort(x, axis=axis, stable=True)
    order = m.argsort(m.flip(x, axis=axis), axis=axis, stable=True)
    return x.shape[axis] - 1 - m.flip(order, axis=axis)


@composite(
    samples=lambda: [
        sample(distinct((2, 5))),
        sample(distinct((3, 2)), axis=0, descending=True),
    ],
    reference=lambda x, axis=-1, descending=False: (
        -np.sort(-x, axis=axis) if descending else np.sort(x, axis=axis)
    ),
)
def sort(x: Any, /, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Tensor:
    """``x`` in order along ``axis``, smallest first unless ``descending``.

    The gradient of an element goes to the place it came from.

    >>> import gpugrad as gg
    >>> gg.sort(gg.asarray([3.0, 1.0, 2.0]))
    tensor([1., 2., 3.])
    """
    order = argsort(x, axis=axis, descending=descending, stable=stable)
    return take_along_axis(x, order, axis=axis)


@primitive(
    native="searchsorted",
    samples=lambda: [
        sample([1.0, 2.0, 3.0], [0.5, 2.0, 9.0], smooth=False),
        sample([1.0, 2.0, 3.0], [0.5, 2.0, 9.0], side="right", smooth=False),
    ],
)
def searchsorted(m: Backend, x1: Array, x2: Array, /, side: str = "left") -> Array:
    """Where the elements of ``x2`` belong in the sorted one-dimensional array ``x1``.

    An element equal to some of ``x1`` goes before them, or after them with ``side="right"``.

    >>> import gpugrad as gg
    >>> gg.searchsorted(gg.asarray([1.0, 2.0, 3.0]), gg.asarray([2.0, 9.0]))
    tensor([1, 3])
    """
    ...


@primitive(
    native="nonzero",
    outputs="many",
    sized_by_values=True,
    samples=lambda: [sample([[0.0, 1.0], [2.0, 0.0]], smooth=False)],
)
def nonzero(m: Backend, x: Array, /) -> Array:
    """The indices of the elements that are not zero, one array for each axis.

    On a GPU the host waits for their number.

    >>> import gpugrad as gg
    >>> gg.nonzero(gg.asarray([0, 7, 0, 9]))
    (tensor([1, 3]),)
    """
    ...


@composite(
    samples=lambda: [sample(np.array([2, 0]), 3, smooth=False)],
    reference=lambda indices, num_classes: np.eye(num_classes)[indices],
)
def one_hot(indices: Any, num_classes: int, /, *, dtype: Any = None) -> Tensor:
    """A one at each index along a new last axis of length ``num_classes``, zeros elsewhere.

    An index outside 0 … ``num_classes`` - 1 gives zeros only. float64 by default.

    >>> import gpugrad as gg
    >>> gg.one_hot(gg.asarray([2, 0]), 3)
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    """
    indices = asarray(indices)
    classes = arange(num_classes, dtype=indices.dtype, device=indices.device)
    return astype(expand_dims(indices, axis=-1) == classes, dtype or np.float64)


# -- triangles ------------------------------------------------------------------------------------


@linear(
    transpose=lambda g, m, k: m.tril(g, k=k),
    native="tril",
    samples=lambda: [sample(normal((3, 3))), sample(normal((2, 3, 4)), k=1)],
)
def tril(m: Backend, x: Array, /, k: int = 0) -> Array:
    """The lower triangles of the matrices in ``x``: zero above the ``k``-th diagonal.

    >>> import gpugrad as gg
    >>> gg.tril(gg.ones((2, 2)))
    tensor([[1., 0.],
            [1., 1.]])
    """
    ...


@linear(
    transpose=lambda g, m, k: m.triu(g, k=k),
    native="triu",
    samples=lambda: [sample(normal((3, 3))), sample(normal((2, 3, 4)), k=1)],
)
def triu(m: Backend, x: Array, /, k: int = 0) -> Array:
    """The upper triangles of the matrices in ``x``: zero below the ``k``-th diagonal.

    >>> import gpugrad as gg
    >>> gg.triu(gg.ones((2, 2)))
    tensor([[1., 1.],
            [0., 1.]])
    """
    ...
