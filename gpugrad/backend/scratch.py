"""Host memory for large results, kept and used again.

The operating system hands out memory page by page, each cleared when it is first touched: for a
result that is written once, that costs as much as computing it. A training step makes the same
results over and over, so that blocks of memory that came back are lent again.

>>> x = empty((1024, 1024), "float32")
>>> where = x.ctypes.data
>>> del x
>>> empty((1024, 1024), "float32").ctypes.data == where
True
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections import OrderedDict
from threading import RLock
from typing import Any

import numpy as np

__all__ = ["LIMIT", "THRESHOLD", "empty", "is_whole", "release"]

#: Bytes from which a result comes from here: below, the C library keeps pages by itself.
THRESHOLD = 1 << 20

#: Bytes that may lie idle, `GPUGRAD_HOST_CACHE`; what came back first goes first.
LIMIT = int(os.environ.get("GPUGRAD_HOST_CACHE", 1 << 30))


class _Blocks:
    """Idle blocks by size."""

    def __init__(self) -> None:
        # A block may come back while another is being taken: the collector runs anywhere.
        self.lock = RLock()
        self.idle: OrderedDict[int, tuple[int, mmap.mmap]] = OrderedDict()
        self.by_size: dict[int, list[int]] = {}
        self.bytes = 0

    def take(self, size: int) -> mmap.mmap:
        with self.lock:
            keys = self.by_size.get(size)
            if keys:
                key = keys.pop()
                self.bytes -= size
                return self.idle.pop(key)[1]
        # Private: after a fork, parent and child each write to their own.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
        block = mmap.mmap(-1, size, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def give_back(self, size: int, block: mmap.mmap) -> None:
        dropped = []
        with self.lock:
            key = id(block)
            self.idle[key] = (size, block)
            self.by_size.setdefault(size, []).append(key)
            self.bytes += size
            while self.bytes > LIMIT:
                oldest, (bytes_, old) = self.idle.popitem(last=False)
                self.by_size[bytes_].remove(oldest)
                self.bytes -= bytes_
                dropped.append(old)


_blocks = _Blocks()


def _after_fork() -> None:
    """The child has its own copy of every page; only the lock may be held by nobody."""
    _blocks.lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Loan:
    """What an array from here refers to as its base; when it dies, nobody sees the memory."""

    __slots__ = ()
    block: mmap.mmap  # in the dictionary of the subclass

    def __del__(self) -> None:
        if not sys.is_finalizing():
            _blocks.give_back(ctypes.sizeof(self), self.block)  # type: ignore[arg-type]


_types: dict[int, Any] = {}


def _loan_type(size: int) -> Any:
    if size not in _types:
        _types[size] = type("Loan", (Loan, ctypes.c_char * size), {})
    return _types[size]


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """As `numpy.empty`; a large array is in memory that was in use before, where there is some."""
    kind = np.dtype(dtype)
    nbytes = math.prod(shape) * kind.itemsize
    if nbytes < THRESHOLD:
        return np.empty(shape, kind)
    size = _size_class(nbytes)
    block = _blocks.take(size)
    loan = _loan_type(size).from_buffer(block)
    out: np.ndarray[Any, Any] = np.ndarray(shape, kind, loan)
    loan.block = block
    # The array's views refer to the array, and it alone to the loan.
    return out


def is_whole(x: np.ndarray[Any, Any]) -> bool:
    """Whether `x` is an array from here, and not a view of one."""
    return isinstance(x.base, Loan)


def release() -> None:
    """Hand the idle blocks back to the operating system."""
    with _blocks.lock:
        _blocks.idle.clear()
        _blocks.by_size.clear()
        _blocks.bytes = 0


def _size_class(nbytes: int) -> int:
    """`nbytes` rounded up to one of eight sizes between two powers of two, in whole pages."""
    step = max(mmap.PAGESIZE, 1 << (nbytes.bit_length() - 4))
    return -(-nbytes // step) * step
