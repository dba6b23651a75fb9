"""How kernel bodies become machine code on the CPU, and where that is kept on disk.

Loops are split in two, because a compiler turns a loop into vector instructions only where it sees
through it: a *serial* function runs over one-dimensional slices and is compiled on its own; a
*parallel* function hands blocks of the work to it from several threads.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, ClassVar

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.extending import intrinsic

from gpugrad.backend.tape import call
from gpugrad.errors import KernelError
from gpugrad.kernels import template
from gpugrad.kernels.cpu import pool
from gpugrad.kernels.disk import cache_folder
from gpugrad.kernels.template import Template, arithmetic

__all__ = ["CPU", "VECTOR", "copied", "parallel", "serial", "storage_view"]

#: Vector instructions need leave to add up in another order; NaN and infinity keep their meaning.
LOOP = {"contract", "reassoc", "nsz"}

#: Scalar functions compensate their rounding errors: nothing may be reordered in them.
SCALAR = {"contract"}


class _Cpu:
    """The target `cpu`: Numba's compiler, a dispatcher for every instance."""

    name = "cpu"

    def placeholder(self, name: str, storage: str) -> Any:
        width = arithmetic(storage)
        if name == "T":
            return getattr(np, width)
        if name == "I":
            return np.int64 if width == "float64" else np.int32
        if name in ("read", "write"):
            return _ACCESS[name, storage]
        if name in ("to_bits", "from_bits"):
            return _BITS[name, width]
        return _PLAIN[name]

    def compile(self, function: Callable[..., Any], role: str, storage: str) -> Any:
        if storage == "float16" and "f16c" not in _host_features():
            raise KernelError(
                f"{function.__name__}: this processor cannot convert float16 (no F16C); "
                "compute in float32"
            )
        pool.start()  # a serial loop may call BLAS, whose threads are not to change between calls
        options: dict[str, Any] = {"error_model": "numpy", "nogil": True}
        if role == "device":
            # LLVM's own judgement stops at some size, and a loop with a call in it is scalar.
            return njit(fastmath=SCALAR, forceinline=True, **options)(function)
        if role == "serial":
            # In a caller's loop it would be compiled as a part of that, and no longer vectorised.
            return _kept(function, inline="never", **options)
        if role == "parallel":
            alone = FunctionType(
                function.__code__, function.__globals__, f"{function.__name__}_alone"
            )
            alone.__qualname__, alone.__module__ = alone.__name__, function.__module__
            return pool.Launch(_kept(function, parallel=True, **options), _kept(alone, **options))
        raise KernelError(f"{function.__name__}: the CPU has no kernels of role {role!r}")


def _kept(function: Callable[..., Any], **options: Any) -> Any:
    """A loop whose machine code is kept on disk."""
    made = njit(fastmath=LOOP, **options)(function)
    made._cache = _Cache(function)
    return made


CPU = _Cpu()


class CpuTemplate(Template):
    """A body for the CPU: `body["float32"]` is its dispatcher for arrays of that storage."""

    def __getitem__(self, storage: str) -> Any:
        return self.instance(CPU, storage)

    def bind(self, **templates: Template) -> CpuTemplate:
        return super().bind(**templates)  # type: ignore[return-value]


def serial(function: Callable[..., Any]) -> CpuTemplate:
    """A loop over one-dimensional arrays that is compiled to vector instructions."""
    return CpuTemplate(function, "serial")


def parallel(function: Callable[..., Any]) -> CpuTemplate:
    """A loop over blocks of the work, `for block in prange(…)`, that calls serial functions."""
    return CpuTemplate(function, "parallel")


def storage_view(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`x` as kernels read it: two-byte floats as their bits, the rest as it is."""
    return x.view(np.uint16) if x.dtype.itemsize == 2 else x


def in_a_row(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`x` as compiled loops take it: its elements one after the other, aligned, in C's order.

    A copy if need be. An array that is read-only is given as one that is not, which nobody writes
    to: for Numba it is another type, and every loop would be compiled once more.
    """
    if not x.flags.c_contiguous or not x.flags.aligned:
        x = copied(x)
    elif not x.flags.writeable:
        x = np.asarray(_Writable(x))
    return storage_view(x)


def copied(x: np.ndarray[Any, Any], dtype: Any = None) -> np.ndarray[Any, Any]:
    """A copy whose elements lie one after the other, of another type perhaps."""
    made = np.empty(x.shape, x.dtype if dtype is None else dtype)
    call(_assign, made, x)
    return made


def _assign(made: np.ndarray[Any, Any], x: np.ndarray[Any, Any]) -> None:
    made[...] = x


class _Writable:
    """The memory of a read-only array, as NumPy's array interface tells of it."""

    def __init__(self, x: np.ndarray[Any, Any]) -> None:
        self.owner = x
        address, _ = x.__array_interface__["data"]
        self.__array_interface__ = {**x.__array_interface__, "data": (address, False)}


@cache
def _host_features() -> frozenset[str]:
    found = llvmlite.binding.get_host_cpu_features()
    features = {name for name, there in found.items() if there}
    machine = llvmlite.binding.get_process_triple().partition("-")[0]
    # Every 64-bit Arm converts half precision.
    return frozenset(features | {"f16c"} if machine in ("aarch64", "arm64") else features)


def _vector_bytes() -> int:
    features = _host_features()
    return 64 if "avx512f" in features else 32 if "avx2" in features else 16


#: Bytes of this processor's vectors. Any compiler target can do with any number.
VECTOR = _vector_bytes()


# -- placeholders ---------------------------------------------------------------------------------

_device = njit(fastmath=SCALAR, forceinline=True, error_model="numpy", nogil=True)


@_device
def _where(c: Any, a: Any, b: Any) -> Any:
    return a if c else b


@_device
def _maximum(a: Any, b: Any) -> Any:
    return a if (a >= b) | (a != a) else b


@_device
def _minimum(a: Any, b: Any) -> Any:
    return a if (a <= b) | (a != a) else b


_PLAIN = {
    "sqrt": np.sqrt, "floor": np.floor, "absolute": abs,
    "where": _where, "maximum": _maximum, "minimum": _minimum,
}  # fmt: skip


def _reinterpret(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.bitcast(args[0], context.get_value_type(signature.return_type))


@intrinsic
def _to_int32(typing: Any, x: Any) -> Any:
    return types.int32(types.float32), _reinterpret


@intrinsic
def _to_int64(typing: Any, x: Any) -> Any:
    return types.int64(types.float64), _reinterpret


@intrinsic
def _to_float32(typing: Any, x: Any) -> Any:
    return types.float32(types.int32), _reinterpret


@intrinsic
def _to_float64(typing: Any, x: Any) -> Any:
    return types.float64(types.int64), _reinterpret


_BITS = {
    ("to_bits", "float32"): _to_int32, ("from_bits", "float32"): _to_float32,
    ("to_bits", "float64"): _to_int64, ("from_bits", "float64"): _to_float64,
}  # fmt: skip


@intrinsic
def _widen_half(typing: Any, x: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), code


@intrinsic
def _narrow_half(typing: Any, x: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), code


@_device
def _read(a: Any, i: Any) -> Any:
    return a[i]


@_device
def _write(a: Any, i: Any, x: Any) -> None:
    a[i] = x


@_device
def _read_half(a: Any, i: Any) -> Any:
    return _widen_half(a[i])


@_device
def _write_half(a: Any, i: Any, x: Any) -> None:
    a[i] = _narrow_half(x)


@_device
def _read_bfloat(a: Any, i: Any) -> Any:
    return _to_float32(np.int32(np.int32(a[i]) << np.int32(16)))


@_device
def _write_bfloat(a: Any, i: Any, x: Any) -> None:
    bits = _to_int32(x)
    # To nearest, ties to even; a NaN is made quiet, lest rounding carry it into infinity.
    odd = (bits >> np.int32(16)) & np.int32(1)
    near = (bits + np.int32(0x7FFF) + odd) >> np.int32(16)
    a[i] = np.uint16(near if x == x else (bits >> np.int32(16)) | np.int32(0x40))


_ACCESS = {
    ("read", "float32"): _read, ("write", "float32"): _write,
    ("read", "float64"): _read, ("write", "float64"): _write,
    ("read", "float16"): _read_half, ("write", "float16"): _write_half,
    ("read", "bfloat16"): _read_bfloat, ("write", "bfloat16"): _write_bfloat,
}  # fmt: skip

# -- the cache on disk ----------------------------------------------------------------------------


@cache
def _stamp() -> str:
    """A digest of what takes part in every kernel: the compiler, and this file's functions."""
    digest = hashlib.sha256(f"{np.__version__} {numba.__version__}".encode())
    for path in (__file__, template.__file__):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


class _Locator(_CacheLocator):  # type: ignore[misc]
    """A name of its own for each text of a kernel: nothing is ever out of date."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def get_cache_path(self) -> str:
        return str(cache_folder() / "cpu" / _stamp())

    def get_source_stamp(self) -> str:
        return _stamp()

    def get_disambiguator(self) -> str:
        digest = hashlib.sha256()
        _describe(self._function, digest)
        return digest.hexdigest()[:16]

    @classmethod
    def from_function(cls, function: Callable[..., Any], path: str) -> _Locator:
        return cls(function)


def _describe(function: Any, digest: Any) -> None:
    """Feed a digest with all that a body is made of: its code, what it calls, its constants.

    A file's age would not do: a body's pieces stand in many files, and some are generated.
    """
    digest.update(f"{function.__name__} ".encode())
    for name in sorted(_describe_code(function.__code__, digest)):
        value = function.__globals__.get(name)
        inner = getattr(value, "py_func", None) or getattr(value, "_defn", None)
        if inner is not None:  # a compiled function, or an intrinsic
            _describe(inner, digest)
        elif isinstance(value, FunctionType):
            _describe_code(value.__code__, digest)
        elif isinstance(value, int | float | np.generic | str | tuple):
            digest.update(f"{name}={type(value).__name__} {value!r} ".encode())
        elif isinstance(value, np.ndarray):
            digest.update(value.tobytes())


def _describe_code(code: CodeType, digest: Any) -> set[str]:
    """Feed a digest with a code object and those within; the names that they mention."""
    digest.update(code.co_code + repr(code.co_names).encode())
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _describe_code(constant, digest)
        else:
            digest.update(f"{constant!r} ".encode())
    return names


#: Told before a kernel is compiled that is not on disk.
_log = logging.getLogger("gpugrad.kernels")


class _Impl(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes: ClassVar[list[type]] = [_Locator]


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache in a folder of ours, safe for processes that write at the same time."""

    _impl_class = _Impl

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = super().load_overload(sig, target_context)
        if found is None:
            _log.info("compiling %s", self._py_func.__name__)
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        # A cache that cannot be written (a read-only home) costs time, not the result.
        try:
            with _alone(Path(self._cache_path)):
                super().save_overload(sig, data)
        except OSError:
            self.disable()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: two processes must not give one name to two results."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: files there cannot be replaced while they are open
        yield
        return
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def numpy_storage(dtype: np.dtype[Any]) -> str:
    """The name of the storage that an array's dtype is; "" for one that kernels do not take."""
    name = dtype.name
    return name if name in template.STORAGE and dtype.isnative else ""
