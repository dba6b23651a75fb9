"""New tensors: filled, counted, and shaped like others."""

# A declared operation is known to return Any; what it returns is a tensor.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from typing import Any

import numpy as np

from gpugrad.backend import Backend, backend_for_device
from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import composite, sample
from gpugrad.core.tensor import Tensor, raw_index, tensor_of
from gpugrad.core.trace import tell_made
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.ops.manipulation import broadcast_arrays, reshape
from gpugrad.ops.samples import normal

__all__ = [
    "arange",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "linspace",
    "meshgrid",
    "ones",
    "ones_like",
    "zeros",
    "zeros_like",
]

Shape = int | tuple[int, ...]


def _made(name: str, *args: Any, dtype: Any, device: str | None, **kwargs: Any) -> Tensor:
    """A tensor from the library's own creation function, on ``device``."""
    space = backend_for_device(device or "cpu")
    return tell_made(tensor_of(space.create(name, *args, dtype=dtype, device=device, **kwargs)))


@composite(samples=lambda: [sample((2, 3), smooth=False)])
def zeros(shape: Shape, *, dtype: Any = None, device: str | None = None) -> Tensor:
    """A tensor of zeros; float64 by default, as in NumPy.

    >>> import gpugrad as gg
    >>> gg.zeros(2)
    tensor([0., 0.])
    """
    return _made("zeros", shape, dtype=dtype or np.float64, device=device)


@composite(samples=lambda: [sample((2, 3), smooth=False)])
def ones(shape: Shape, *, dtype: Any = None, device: str | None = None) -> Tensor:
    """A tensor of ones; float64 by default, as in NumPy.

    >>> import gpugrad as gg
    >>> gg.ones((1, 2), dtype="float32")
    tensor([[1., 1.]], dtype=float32)
    """
    return _made("ones", shape, dtype=dtype or np.float64, device=device)


def empty(shape: Shape, *, dtype: Any = None, device: str | None = None) -> Tensor:
    """A tensor whose elements are whatever the memory held; float64 by default, as in NumPy.

    >>> import gpugrad as gg
    >>> gg.empty((2, 3)).shape
    (2, 3)
    """
    return _made("empty", shape, dtype=dtype or np.float64, device=device)


@composite(samples=lambda: [sample((2, 3), 1.5, smooth=False), sample((2,), 3, smooth=False)])
def full(shape: Shape, fill_value: Any, *, dtype: Any = None, device: str | None = None) -> Tensor:
    """A tensor with every element equal to ``fill_value``, and of its dtype by default.

    >>> import gpugrad as gg
    >>> gg.full((2,), 7)
    tensor([7, 7])
    """
    return _made("full", shape, fill_value, dtype=dtype, device=device)


@composite(
    samples=lambda: [
        sample(4, smooth=False),
        sample(1, 7, 2, smooth=False),
        sample(0.0, 1.0, 0.25, smooth=False),
    ]
)
def arange(
    start: float,
    /,
    stop: float | None = None,
    step: float = 1,
    *,
    dtype: Any = None,
    device: str | None = None,
) -> Tensor:
    """Numbers ``step`` apart from ``start`` up to, not including, ``stop``.

    With one argument they go from zero up to it. Of the dtype of the arguments by default.

    >>> import gpugrad as gg
    >>> gg.arange(1, 7, 2)
    tensor([1, 3, 5])
    """
    if stop is None:
        start, stop = type(start)(0), start
    return _made("arange", start, stop, step, dtype=dtype, device=device)


@composite(
    samples=lambda: [
        sample(0.0, 1.0, 5, smooth=False),
        sample(0.0, 1.0, 4, endpoint=False, smooth=False),
    ]
)
def linspace(
    start: float,
    stop: float,
    /,
    num: int = 50,
    *,
    dtype: Any = None,
    device: str | None = None,
    endpoint: bool = True,
) -> Tensor:
    """``num`` numbers at equal distances from ``start`` to ``stop``.

    ``endpoint=False`` leaves ``stop`` itself out.

    >>> import gpugrad as gg
    >>> gg.linspace(0.0, 1.0, 5)
    tensor([0.  , 0.25, 0.5 , 0.75, 1.  ])
    """
    return _made("linspace", start, stop, num, dtype=dtype, device=device, endpoint=endpoint)


@composite(samples=lambda: [sample(3, smooth=False), sample(2, 3, k=1, smooth=False)])
def eye(
    n_rows: int,
    n_cols: int | None = None,
    /,
    *,
    k: int = 0,
    dtype: Any = None,
    device: str | None = None,
) -> Tensor:
    """A matrix with ones on its ``k``-th diagonal and zeros elsewhere; float64 by default.

    >>> import gpugrad as gg
    >>> gg.eye(2)
    tensor([[1., 0.],
            [0., 1.]])
    """
    return _made("eye", n_rows, n_cols, k=k, dtype=dtype or np.float64, device=device)


# -- like another array ---------------------------------------------------------------------------


def _like(name: str, x: Any, *args: Any, dtype: Any, device: str | None) -> Tensor:
    """A tensor in the image of ``x``: its shape, and its dtype and device unless told otherwise."""
    x = asarray(x)
    space: Backend = x.backend
    if device is None:
        options = {} if dtype is None else {"dtype": space.dtype(dtype)}
        return tell_made(tensor_of(getattr(space, name)(x.data, *args, **options)))
    return _made(name.removesuffix("_like"), x.shape, *args, dtype=dtype or x.dtype, device=device)


@composite(samples=lambda: [sample(normal((2, 3)), smooth=False)])
def zeros_like(x: Any, /, *, dtype: Any = None, device: str | None = None) -> Tensor:
    """Zeros in the shape of ``x``, with its dtype and on its device by default.

    >>> import gpugrad as gg
    >>> gg.zeros_like(gg.asarray([1.5, 2.5]))
    tensor([0., 0.])
    """
    return _like("zeros_like", x, dtype=dtype, device=device)


@composite(samples=lambda: [sample(normal((2, 3)), smooth=False)])
def ones_like(x: Any, /, *, dtype: Any = None, device: str | None = None) -> Tensor:
    """Ones in the shape of ``x``, with its dtype and on its device by default.

    >>> import gpugrad as gg
    >>> gg.ones_like(gg.asarray([3, 4]))
    tensor([1, 1])
    """
    return _like("ones_like", x, dtype=dtype, device=device)


def empty_like(x: Any, /, *, dtype: Any = None, device: str | None = None) -> Tensor:
    """Whatever the memory held in the shape of ``x``, with its dtype and on its device by default.

    >>> import gpugrad as gg
    >>> gg.empty_like(gg.asarray([1.5, 2.5])).shape
    (2,)
    """
    return _like("empty_like", x, dtype=dtype, device=device)


@composite(samples=lambda: [sample(normal((2, 3)), 2.5, smooth=False)])
def full_like(
    x: Any, /, fill_value: Any, *, dtype: Any = None, device: str | None = None
) -> Tensor:
    """``fill_value`` in the shape of ``x``, with its dtype and on its device by default.

    >>> import gpugrad as gg
    >>> gg.full_like(gg.asarray([1.0, 2.0]), 7)
    tensor([7., 7.])
    """
    return _like("full_like", x, raw_index(fill_value), dtype=dtype, device=device)


@composite(
    samples=lambda: [
        sample([1.0, 2.0], [3.0, 4.0, 5.0]),
        sample([1.0, 2.0], [3.0, 4.0, 5.0], indexing="ij"),
    ],
    reference=lambda *arrays, indexing="xy": tuple(np.meshgrid(*arrays, indexing=indexing)),
)
def meshgrid(*arrays: Any, indexing: str = "xy") -> tuple[Tensor, ...]:
    """The coordinates of the grid that one-dimensional arrays span, one array for each of them.

    With ``indexing="xy"`` the second array runs along the first axis, as in a plot; with ``"ij"``
    array ``i`` runs along axis ``i``.

    >>> import gpugrad as gg
    >>> x, y = gg.meshgrid(gg.asarray([1, 2]), gg.asarray([3, 4]))
    >>> x
    tensor([[1, 2],
            [1, 2]])
    """
    if indexing not in ("xy", "ij"):
        raise ParameterError(f"meshgrid: indexing is 'xy' or 'ij', not {indexing!r}")
    n = len(arrays)
    place = [1, 0, *range(2, n)] if indexing == "xy" and n > 1 else range(n)
    tensors = [asarray(x) for x in arrays]
    if any(x.ndim > 1 for x in tensors):
        raise ShapeError(
            f"meshgrid: arrays have one axis each, got shapes {[x.shape for x in tensors]}"
        )
    return broadcast_arrays(
        *(reshape(x, tuple(-1 if a == p else 1 for a in range(n)))
          for x, p in zip(tensors, place))
    )  # fmt: skip
