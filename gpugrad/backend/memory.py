"""Buffers: one piece of memory lent out in parts, which tells when a part has been given back.

A part is lent as an array. Whoever takes a view of that array, of any depth, keeps the loan alive,
so that memory is lent again only when nobody can see into it any more. Array libraries make this
hard: they let a view refer to the first owner of its memory and to nothing in between. Each library
that has buffers therefore has a way of its own to lend.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from gpugrad.backend.base import Array, Backend

__all__ = ["ALIGNMENT", "BUFFERS", "NOTED", "Buffer", "buffer", "squares"]

#: Bytes between the places where a part may begin: a cache line, and any vector's width.
ALIGNMENT = 64

#: Elements of a gradient from which its sum of squares is worth noting.
NOTED = 1 << 19

#: Σx² of the elements of an array that was lent for a gradient, by the array's `id`: noted by the
#: kernel that wrote all of them, if it is finite. Who lends an array forgets what was noted of it.
squares: dict[int, float] = {}


class Buffer(Protocol):
    """Elements of one dtype in one piece of memory, zero in the beginning.

    Attributes
    ----------
    flat:
        The one-dimensional array of all of them.
    counts:
        Whether the references to a lent array tell who sees into it, since its views hold one.
    """

    flat: Array
    counts: bool

    def lend(self, start: int, shape: tuple[int, ...]) -> tuple[Array, Any]:
        """The part that begins at element `start`, and an object that lives as long as the loan.

        The object can be watched with a weak reference; it may be the array itself.
        """


class HostBuffer:
    """A :class:`Buffer` of NumPy arrays.

    A view refers to the last array before one that does not belong to NumPy. The memory is
    therefore given to every loan as something that is no array.
    """

    counts = True

    def __init__(self, size: int, dtype: Any, device: str = "cpu") -> None:
        self._dtype = np.dtype(dtype)
        room: Any = np.zeros(max(size, 1) * self._dtype.itemsize + ALIGNMENT, np.uint8)
        skip = -room.ctypes.data % ALIGNMENT
        self._memory: Any = (ctypes.c_char * (room.size - skip)).from_buffer(room, skip)
        self.flat = np.ndarray((size,), self._dtype, self._memory)

    def lend(self, start: int, shape: tuple[int, ...]) -> tuple[Array, Any]:
        part: Array = np.ndarray(shape, self._dtype, self._memory, start * self._dtype.itemsize)
        return part, part


class _Loan:
    """What keeps a GPU buffer while a part of it is lent."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer


class GpuBuffer:
    """A :class:`Buffer` of CuPy arrays: every loan is memory of its own, owned by the loan."""

    counts = False

    def __init__(self, size: int, dtype: Any, device: str) -> None:
        import cupy

        from gpugrad.backend import backend_for_device

        self._cupy = cupy
        self.flat = backend_for_device(device).create("zeros", size, dtype=dtype, device=device)

    def lend(self, start: int, shape: tuple[int, ...]) -> tuple[Array, Any]:
        flat, cuda = self.flat, self._cupy.cuda
        loan = _Loan(self)
        memory = cuda.UnownedMemory(
            flat.data.ptr + start * flat.itemsize,
            (flat.size - start) * flat.itemsize,
            loan,
            flat.data.device_id,
        )
        return self._cupy.ndarray(shape, flat.dtype, cuda.MemoryPointer(memory, 0)), loan


#: The libraries with buffers, by the name of their backend: what makes one of a size, a dtype and
#: a device.
BUFFERS: dict[str, Callable[[int, Any, str], Buffer]] = {"numpy": HostBuffer, "cupy": GpuBuffer}


def buffer(space: Backend, size: int, dtype: Any, device: str) -> Buffer | None:
    """A buffer in the memory of a device; None where the library has none.

    >>> from gpugrad.backend import backend_for_device
    >>> made = buffer(backend_for_device("cpu"), 8, "float32", "cpu")
    >>> part, loan = made.lend(2, (2, 2))
    >>> part[0] = 1.0
    >>> made.flat
    array([0., 0., 1., 1., 0., 0., 0., 0.], dtype=float32)
    """
    make = BUFFERS.get(space.name)
    return None if make is None else make(size, dtype, device)
