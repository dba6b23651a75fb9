"""NumPy arrays, on the CPU."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np

from gpugrad.backend import scratch
from gpugrad.backend.base import Array, Backend, DeviceInfo, as_dtype, is_basic
from gpugrad.backend.kernels import Slot, fusible
from gpugrad.backend.tape import call, gate, note, replayable, spoil

#: Elements of a temporary array that stays in the processor's cache.
_BLOCK = 8192

#: Elements of an array from which it pays to look at how it lies in memory before it is copied;
#: and where it does so in runs of at least so many, which one thread is quick to copy.
_LARGE, _VERY_LARGE, _RUN = 1 << 16, 1 << 19, 16


@replayable
def _matmul(a: Array, b: Array) -> Array:
    """`numpy.matmul`; two-byte floats, for which there is no BLAS, are added up in float32."""
    if a.dtype.itemsize != 2 or a.dtype.kind in "iu" or a.dtype != b.dtype:
        if not gate:
            return np.matmul(a, b)
        out = np.asarray(np.matmul(a, b))
        note(np.matmul, (a, b, out))
        return out
    spoil("products of two-byte floats")
    return np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(a.dtype)


class NumpyBackend(Backend):
    """NumPy 2's main namespace is an Array API namespace already."""

    own: ClassVar[dict[str, Callable[..., Any]]] = {"matmul": _matmul}
    on_host = True

    def __init__(self) -> None:
        super().__init__("numpy", np, "cpu", (np.ndarray, np.generic))

    @cached_property
    def slots(self) -> Mapping[str, Slot]:  # type: ignore[override]
        from gpugrad.kernels.cpu import SLOTS  # a table; nothing is compiled before it is needed

        return SLOTS

    def find_dtype(self, dtype: Any) -> np.dtype[Any]:
        return as_dtype(dtype)

    def numpy_dtype(self, x: Array) -> np.dtype[Any]:
        return x.dtype  # type: ignore[no-any-return]

    def asarray(
        self, data: Any, dtype: Any = None, device: str | None = None, copy: bool | None = None
    ) -> Array:
        out = np.array(data, dtype=dtype, copy=copy, subok=False)
        if not out.dtype.isnative and copy is not False:  # bytes in the order of another machine
            out = out.astype(out.dtype.newbyteorder("="))
        return out

    def describe_devices(self) -> tuple[DeviceInfo, ...]:
        try:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):  # not a POSIX system
            memory = 0
        return (DeviceInfo("cpu", platform.processor() or platform.machine() or "CPU", memory),)

    def from_dlpack(
        self, x: Any, /, *, device: str | None = None, copy: bool | None = None
    ) -> Array:
        options: dict[str, Any] = {} if copy is None else {"copy": copy}
        if device is not None and x.__dlpack_device__()[0] not in _HOST_MEMORY:
            options["device"] = "cpu"
        return np.from_dlpack(x, **options)

    def reshape(
        self, x: Array, /, shape: int | tuple[int, ...], *, copy: bool | None = None
    ) -> Array:
        if copy is not None:
            return x.reshape(shape, copy=copy)
        if x.size >= _LARGE and not x.flags.c_contiguous:
            x = self._in_order(x, shape)
        return x.reshape(shape)

    def _in_order(self, x: Array, shape: int | tuple[int, ...]) -> Array:
        """``x``, or a copy of it where a view cannot have the shape and a kernel may be quicker."""
        try:
            return x.reshape(shape, copy=False)
        except ValueError:  # no view of it has this shape
            layout = exchange(x)
        return x if layout is None else exchanged_copy(self, x, *layout)

    def sum_to(self, x: Array, shape: tuple[int, ...]) -> Array:
        if x.shape == shape:
            return x
        lead = x.ndim - len(shape)
        if x.shape[lead:] != shape or x.dtype.itemsize < 4:
            return super().sum_to(x, shape)
        # The common case, a bias: what `numpy.sum` does, without its two layers of Python.
        return np.asarray(np.add.reduce(x, axis=tuple(range(lead))))

    def storage(self, x: Array) -> Any:
        while isinstance(x.base, np.ndarray):
            x = x.base
        return x

    def is_view(self, x: Array) -> bool:
        if not isinstance(x, np.ndarray) or not x.flags.writeable:
            return True
        return not (x.flags.owndata or scratch.is_whole(x))

    def scatter_add(self, g: Array, index: Any, shape: tuple[int, ...]) -> Array:
        if is_basic(index):
            out = np.zeros(shape, dtype=g.dtype)
            call(_put, out, index, g)
            return out
        spoil("elements that are added up by their indices")
        return _add_at(g, index, shape)

    def scatter_add_along_axis(
        self, g: Array, indices: Array, shape: tuple[int, ...], axis: int
    ) -> Array:
        grid = list(np.ogrid[tuple(slice(n) for n in indices.shape)])
        grid[axis] = indices
        return _add_at(g, tuple(grid), shape)

    def erf(self, x: Array) -> Array:
        if x.size <= _BLOCK:
            return super().erf(x)
        # Sixty passes over the elements: block by block they find them in the cache.
        flat = x.reshape(-1)
        out = np.concatenate([super(NumpyBackend, self).erf(flat[i : i + _BLOCK])
                              for i in range(0, flat.size, _BLOCK)])  # fmt: skip
        return out.reshape(x.shape)


def exchange(x: Array) -> tuple[int, int, int, int] | None:
    """How two blocks of axes of ``x`` have changed places in memory, where that is all.

    In memory the elements are (items, rows, columns, run), in ``x`` (items, columns, rows, run).
    None for any other layout, for what is no number of four or eight bytes, for short runs, and
    for runs of less than :data:`_VERY_LARGE` elements in all.
    """
    if not (x.flags.aligned and x.dtype.itemsize in (4, 8) and x.dtype.kind in "fiuc"):
        return None
    return _exchange(x.shape, x.strides, x.dtype.itemsize)


@lru_cache(1024)
def _exchange(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> tuple[int, int, int, int] | None:
    axes = [i for i, n in enumerate(shape) if n != 1]
    order = sorted(axes, key=lambda i: -strides[i])
    moved = [k for k, (i, j) in enumerate(zip(axes, order)) if i != j]
    dense = itemsize
    for i in reversed(order):
        if strides[i] != dense:
            return None
        dense *= shape[i]
    if not moved:
        return None
    first, behind = moved[0], moved[-1] + 1
    middle = axes.index(order[first])
    if order[first:behind] != axes[middle:behind] + axes[first:middle]:
        return None
    items, columns, rows, run = (
        math.prod(shape[i] for i in axes[a:b])
        for a, b in ((0, first), (first, middle), (middle, behind), (behind, len(axes)))
    )
    pays = run == 1 or (run >= _RUN and dense >= _VERY_LARGE * itemsize)
    return (items, rows, columns, run) if pays else None


@fusible
def exchanged_copy(m: Backend, x: Array, items: int, rows: int, columns: int, run: int) -> Array:
    """The elements of ``x`` in C's order, from what :func:`exchange` says of it."""
    return np.ascontiguousarray(x)


def _put(out: Array, index: Any, g: Array) -> None:
    out[index] = g


def _add_at(g: Array, index: Any, shape: tuple[int, ...]) -> Array:
    """Zeros with ``g`` added at ``index``; half precision adds in float32, where sums can grow."""
    half = g.dtype.itemsize == 2 and g.dtype.kind not in "iu"
    out = np.zeros(shape, dtype=np.float32 if half else g.dtype)
    np.add.at(out, index, g)
    return out.astype(g.dtype) if half else out


#: DLPack's numbers for ordinary and pinned host memory.
_HOST_MEMORY = (1, 3)
