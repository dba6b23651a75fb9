"""A GPU that is none, for dry runs: every line of the check runs, and no figure means anything.

It is the tests' stand-in for CuPy, which computes with NumPy, with what the check asks for besides:
events, streams, memory, modules of PTX. A kernel of ours is looked up in the text that ships and
its arguments are held against the entry's parameters; it computes nothing.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections import Counter
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

#: Bytes of this GPU. More than `GPU_FAKE_MEMORY` of them at once are refused, as on a GPU.
MEMORY = 80 * 2**30


class OutOfMemoryError(MemoryError):
    """As CuPy's."""


class DeviceSynchronized(RuntimeError):
    """As CuPy's: something would have waited for the GPU where that is not allowed."""


class Counts:
    """What was launched and read: by our own kernels, and by the library."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.kernels: Counter[str] = Counter()
        self.host_reads = 0
        self.reads_allowed = True

    def clear(self) -> None:
        self.library.clear()
        self.kernels.clear()
        self.host_reads = 0

    @property
    def launches(self) -> int:
        return sum(self.kernels.values()) + int(self.library.launches)

    def read(self) -> None:
        if not self.reads_allowed:
            raise DeviceSynchronized("a host read where none is allowed")
        self.host_reads += 1


class _Event:
    def __init__(self, **_: Any) -> None:
        self.time = 0.0
        self.done = False

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing runs behind our back."""


class _Stream:
    def __init__(self, **_: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        """Nothing runs behind our back."""

    def wait_event(self, event: Any) -> None:
        pass

    def record(self, event: Any) -> Any:
        event.record()
        return event


_STREAM = _Stream()

#: Bytes of a parameter of a PTX entry, and what an argument for it may be.
_TAKES: dict[str, tuple[Any, ...]] = {
    "u64": (int, np.int64), "u32": (np.int32,), "f32": (np.float32,), "f64": (np.float64, float),
    "b64": (int, np.int64), "b32": (np.int32,), "s32": (np.int32,), "s64": (int, np.int64),
}  # fmt: skip


class _Module:
    counts: Counts
    array: type

    def load(self, text: bytes) -> None:
        assert text.endswith(b"\0")
        self._text = text.decode().rstrip("\0")

    def get_function(self, name: str) -> Any:
        head = re.search(rf"\.entry {re.escape(name)}\((.*?)\)", self._text, re.DOTALL)
        if head is None:
            raise RuntimeError(f"CUDA_ERROR_NOT_FOUND: {name}")
        parameters = re.findall(r"\.param \.(\w+) ", head[1])

        def launch(blocks: tuple[int, ...], threads: tuple[int, ...], arguments: list[Any]) -> None:
            assert len(arguments) == len(parameters), f"{name}: {len(arguments)} arguments"
            assert all(0 < b < 2**31 for b in blocks), f"{name}: grid {blocks}"
            for i, (kind, given) in enumerate(zip(parameters, arguments, strict=True)):
                fits = isinstance(given, (self.array, *_TAKES[kind]))
                assert fits, f"{name}: argument {i} is a {type(given).__name__} for a {kind}"
            self.counts.kernels[name] += 1

        return launch


class _Memory:
    """Memory that somebody else owns, as an array without a library."""

    def __init__(self, address: int, size: int, owner: Any, device: int) -> None:
        self.host = (ctypes.c_char * size).from_address(address)
        self.host._owner = owner  # type: ignore[attr-defined]


class _MemoryHook:
    """Nothing is allocated here; the check's hook is only entered and left."""

    def __enter__(self) -> _MemoryHook:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def install() -> Counts:
    """Be CuPy from now on in this process, which must not have imported it yet."""
    from tests.backend import fake_cupy

    cupy = fake_cupy.install(gpus=1)
    array, library, runtime = fake_cupy.ndarray, cupy._library, fake_cupy.runtime
    counts = _Module.counts = Counts(library)
    cupy.counts_of_stand_in = counts  # type: ignore[attr-defined]
    _Module.array = array
    _complete(array, cupy, counts)
    runtime.memGetInfo = lambda: (MEMORY, MEMORY)  # type: ignore[attr-defined]
    runtime.getDevice = lambda: runtime.current  # type: ignore[attr-defined]
    runtime.getDeviceProperties = lambda i: {  # type: ignore[method-assign]
        "name": b"no GPU: a stand-in", "totalGlobalMem": MEMORY, "multiProcessorCount": 132,
        "l2CacheSize": 2**16,
    }  # fmt: skip
    fake_cupy.Device.attributes = {"MultiProcessorCount": 132}  # type: ignore[attr-defined]
    fake_cupy.Device.compute_capability = "90"  # type: ignore[attr-defined]
    fake_cupy.Device.use = lambda self: None  # type: ignore[attr-defined]
    pool = SimpleNamespace(
        free_all_blocks=lambda: None, used_bytes=lambda: 0, total_bytes=lambda: 0
    )
    cupy.__spec__ = ModuleSpec("cupy", None)
    cupy.is_available = lambda: True  # type: ignore[attr-defined]
    cupy.get_default_memory_pool = lambda: pool  # type: ignore[attr-defined]
    vars(cupy.cuda).update(
        Event=_Event, Stream=_Stream, get_current_stream=lambda: _STREAM,
        get_elapsed_time=lambda a, b: 1e3 * (b.time - a.time), MemoryHook=_MemoryHook,
        set_allocator=lambda allocator: None, UnownedMemory=_Memory,
        MemoryPointer=lambda memory, offset: memory, function=SimpleNamespace(Module=_Module),
        memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
    )  # fmt: skip
    _products(cupy)
    cupyx = sys.modules["cupyx"]

    @contextmanager
    def allow_synchronize(allow: bool) -> Any:
        before, counts.reads_allowed = counts.reads_allowed, allow
        try:
            yield
        finally:
            counts.reads_allowed = before

    cupyx.allow_synchronize = allow_synchronize  # type: ignore[attr-defined]
    cupyx.DeviceSynchronized = DeviceSynchronized  # type: ignore[attr-defined]
    cupyx.empty_pinned = np.empty  # type: ignore[attr-defined]
    return counts


def _complete(array: Any, cupy: Any, counts: Counts) -> None:
    """What kernels and the check ask of arrays, besides what the stand-in has."""
    init, most = array.__init__, int(os.environ.get("GPU_FAKE_MEMORY", MEMORY))

    def new(self: Any, host: Any, place: Any = None, memory: Any = None) -> None:
        if memory is not None:  # as CuPy's: shape, dtype, where it lies
            host, place = np.ndarray(host, place, memory.host), None
        if host.nbytes > most:
            raise OutOfMemoryError(f"Out of memory allocating {host.nbytes:,} bytes")
        init(self, host, place)
        self.data.ptr = host.ctypes.data
        self.data.copy_from_device_async = lambda source, size: None

    def read(x: Any) -> np.ndarray:
        counts.read()
        return x._host.copy()  # type: ignore[no-any-return]

    array.__init__ = new
    for name in ("nbytes", "itemsize", "strides", "flags"):
        setattr(array, name, property(attrgetter(f"_host.{name}")))
    array.get = read
    array.set = lambda self, value, stream=None: np.copyto(self._host, value)
    array.fill = lambda self, value: self.library.launch("fill", np.ndarray.fill, self, value)
    for name in ("all", "any", "max", "mean", "min", "ravel", "sum", "swapaxes", "transpose"):
        setattr(array, name, _method(name))
    cupy.asnumpy = read
    for name in ("empty", "empty_like"):
        setattr(cupy, name, _zeros(name, array))


def _method(name: str) -> Any:
    """A method of NumPy's arrays; one that only looks at memory in another way is no launch."""
    function = getattr(np.ndarray, name)
    counted = "reshape" if name == "ravel" else name

    def method(self: Any, *args: Any, **options: Any) -> Any:
        return self.library.launch(counted, function, self, *args, **options)

    return method


def _zeros(name: str, array: Any) -> Any:
    """`name` of NumPy, but what no kernel has written is the same in every run."""
    function = getattr(np, name.replace("empty", "zeros"))

    def create(*args: Any, **options: Any) -> Any:
        return array(function(*(x._host if isinstance(x, array) else x for x in args), **options))

    return create


def _products(cupy: Any) -> None:
    """Where the backend asks which arithmetic products are made with."""
    core, routines = ModuleType("cupy._core"), ModuleType("cupy._core._routines_linalg")
    routines.COMPUTE_TYPE_FP32, routines.COMPUTE_TYPE_TF32 = 1, 2  # type: ignore[attr-defined]
    routines.set_compute_type = lambda dtype, kind: None  # type: ignore[attr-defined]
    core._routines_linalg = routines  # type: ignore[attr-defined]
    sys.modules.update({"cupy._core": core, "cupy._core._routines_linalg": routines})
