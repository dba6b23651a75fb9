"""Kernels as plain Python, a thread of the host for each of the GPU's: to test logic without a GPU.

Numba's simulator (`NUMBA_ENABLE_CUDASIM=1`, set before Numba is imported) lacks shuffles, pointers,
half precision and 16-byte accesses; here they are. It shows neither races nor wrong alignment.
"""

from __future__ import annotations

import math
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from gpugrad.errors import KernelError
from gpugrad.kernels.cuda.language import Kernel, pack_size
from gpugrad.kernels.cuda.launch import Entry, Machine
from gpugrad.kernels.template import arithmetic

__all__ = ["SIMULATOR", "SimulatedGpu", "run"]


class _Current:
    """The `cuda` of a body: whatever the thread that asks is running in."""

    def __getattr__(self, name: str) -> Any:
        from numba.cuda.simulator import kernel

        return getattr(kernel._get_kernel_context(), name)


_exchanged: dict[int, Any] = {}


def _shuffle(x: Any, mask: int) -> Any:
    # All threads of a block come here together, which a GPU asks of a warp only.
    thread: Any = threading.current_thread()
    _exchanged[thread.thread_id] = x
    thread.syncthreads()
    found = _exchanged[thread.thread_id ^ mask]
    thread.syncthreads()
    return found


def _from_bfloat16(bits: Any) -> Any:
    return np.uint32(int(bits) << 16).view(np.float32)


def _to_bfloat16(x: Any) -> Any:
    bits = int(np.float32(x).view(np.uint32))
    if math.isnan(x):
        return np.uint16(0x7FFF)
    # To nearest, ties to even.
    return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF)


def _from_float16(bits: Any) -> Any:
    return np.float32(np.uint16(bits).view(np.float16))


def _to_float16(x: Any) -> Any:
    return np.float16(x).view(np.uint16)


_HALVES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "float16": (_from_float16, _to_float16),
    "bfloat16": (_from_bfloat16, _to_bfloat16),
}


def _same(x: Any) -> Any:
    return x


class _Simulator:
    """The target `simulator` of `kernels/template.py`."""

    name = "simulator"

    def placeholder(self, name: str, storage: str) -> Any:
        number = getattr(np, arithmetic(storage))
        integer = np.int64 if number is np.float64 else np.int32
        width = pack_size(storage)
        widen, narrow = _HALVES.get(storage, (_same, _same))

        def read(a: Any, i: Any) -> Any:
            if not 0 <= i < a.size:
                raise IndexError(f"element {i} of an array of {a.size}")
            return widen(a[int(i)])

        def write(a: Any, i: Any, x: Any) -> None:
            if type(x) is not number:
                raise TypeError(f"a {type(x).__name__} where {number.__name__} is computed in")
            if not 0 <= i < a.size:
                raise IndexError(f"element {i} of an array of {a.size}")
            a[int(i)] = narrow(x)

        def load(a: Any, i: Any) -> Any:
            return tuple(read(a, i + j) for j in range(width))

        def store(a: Any, i: Any, pack: Any) -> None:
            for j, x in enumerate(pack):
                write(a, i + j, x)

        return {
            "cuda": _Current(), "T": number, "I": integer, "LANES": width, "shuffle": _shuffle,
            "read": read, "write": write, "load": load, "store": store,
            "where": lambda c, a, b: a if c else b,
            "maximum": np.maximum, "minimum": np.minimum, "sqrt": np.sqrt, "floor": np.floor,
            "absolute": abs,
            "to_bits": lambda x: number(x).view(integer),
            "from_bits": lambda i: integer(i).view(number),
        }[name]  # fmt: skip

    def compile(self, function: Callable[..., Any], role: str, storage: str) -> Any:
        return function


SIMULATOR = _Simulator()


def run(
    kernel: Kernel, storage: str, grid: tuple[int, ...], block: tuple[int, ...], *args: Any
) -> None:
    """Run a kernel on NumPy arrays, which it changes in place; half precision as uint16."""
    from numba import config, cuda

    if not config.ENABLE_CUDASIM:
        raise KernelError("the simulator is off; set NUMBA_ENABLE_CUDASIM=1 before Numba is loaded")
    body = kernel.instance(SIMULATOR, storage)

    def quiet(*arguments: Any) -> None:
        # Each thread has NumPy's settings for itself. A GPU does not warn of overflow.
        with np.errstate(all="ignore"):
            body(*arguments)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # threads wait for each other most of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cuda.jit(quiet)[grid, block](*args)
    finally:
        sys.setswitchinterval(interval)


def _memory(x: Any) -> Any:
    """What a pointer to the array points to: its elements in a row, half precision as bits."""
    if not x.flags.c_contiguous:
        raise ValueError("a kernel is given an array whose elements do not lie in a row")
    row = x.reshape(-1)
    return row.view(np.uint16) if x.dtype.itemsize == 2 else row


class SimulatedGpu(Machine):
    """A GPU of one block of a warp at a time, with NumPy arrays for memory."""

    threads = 32
    wave = 2
    parts = 2
    chunks = 2

    def empty(self, shape: Any, dtype: Any) -> Any:
        # What is not written shows.
        out = np.empty(shape, dtype)
        out.view(np.uint8 if out.ndim else out.dtype)[...] = 0x7F
        return out

    def address(self, x: Any) -> int:
        return int(x.ctypes.data)

    def run(self, entry: Entry, blocks: tuple[int, ...], *args: Any) -> None:
        given = [_memory(a) if isinstance(a, np.ndarray) else a for a in args]
        for i, cast in entry.casts:
            given[i] = cast(given[i])
        run(entry.kernel, entry.storage, blocks, (self.threads,), *given)
