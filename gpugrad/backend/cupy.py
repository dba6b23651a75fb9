"""CuPy arrays, on CUDA GPUs.

Importing this module imports CuPy; :func:`make` then tries the GPU. Nothing here reads a value back
to the host but :meth:`CupyBackend.to_host`, and, because their result has as many elements as a
mask has true ones, indexing with boolean arrays and ``nonzero``.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial, wraps
from threading import Lock
from typing import Any

import cupy
import cupyx
import numpy as np

from gpugrad.backend.base import Array, Backend, DeviceInfo, as_dtype, is_basic
from gpugrad.backend.kernels import Slot
from gpugrad.errors import DeviceError

#: Functions of the standard that make an array from nothing, or like another one.
_CREATION = frozenset(
    ("arange", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like",
     "zeros", "zeros_like")
)  # fmt: skip

#: DLPack's numbers for memory: ordinary and pinned host memory, GPU memory, managed memory.
_HOST_MEMORY, _GPU_MEMORY = (1, 3), (2, 13)


class CupyBackend(Backend):
    """CuPy's main namespace, with what it lacks of the Array API standard.

    ``"cuda"`` is the first GPU. Arrays are made where the device string says, and operations run
    where their operands are.

    CuPy wraps an integer index that is out of bounds around, where NumPy raises: to check it the
    host would have to read it.
    """

    def __init__(self) -> None:
        super().__init__("cupy", cupy, "cuda", (cupy.ndarray,))
        self.linalg = _Linalg(cupy.linalg, self.bind)
        self.fft = _Part(cupy.fft, self.bind)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name in _CREATION:
            value = partial(self._create, value)
        if callable(value) and not isinstance(value, type):
            value = self.bind(value)
        self.__dict__[name] = value
        return value

    @cached_property
    def slots(self) -> Mapping[str, Slot]:  # type: ignore[override]
        from gpugrad.kernels.cuda import SLOTS  # a table; nothing is loaded before it is needed

        return SLOTS

    # -- dtypes: CuPy's are NumPy's ----------------------------------------------------------------

    def find_dtype(self, dtype: Any) -> np.dtype[Any]:
        return as_dtype(dtype)

    def numpy_dtype(self, x: Array) -> np.dtype[Any]:
        return x.dtype  # type: ignore[no-any-return]

    def set_product_precision(self, precision: str) -> None:
        from cupy._core import _routines_linalg as products

        exact = precision == "highest"
        kind = products.COMPUTE_TYPE_FP32 if exact else products.COMPUTE_TYPE_TF32
        products.set_compute_type(np.float32, kind)

    # -- arrays and where they live ----------------------------------------------------------------

    def native_device(self, device: str | None) -> Any:
        if device is None:
            return None
        prefix, _, number = device.partition(":")
        count = self.device_count()
        if prefix != "cuda" or not (number.isdecimal() or device == "cuda"):
            raise DeviceError(f"{device!r} names no GPU; write 'cuda' or 'cuda:N'")
        if int(number or 0) >= count:
            have = "'cuda:0' is the only GPU" if count == 1 else (
                f"the {count} GPUs are 'cuda:0' to 'cuda:{count - 1}'")  # fmt: skip
            raise DeviceError(f"{device!r} does not exist on this machine: {have}")
        return cupy.cuda.Device(int(number or 0))

    def device(self, x: Array) -> str:
        return f"cuda:{x.data.device_id}"

    def device_count(self) -> int:
        """How many GPUs there are; with one, nothing ever has to be switched."""
        return 1

    def devices(self) -> list[str]:
        return [f"cuda:{i}" for i in range(self.device_count())]

    def describe_devices(self) -> tuple[DeviceInfo, ...]:
        found = []
        for i in range(self.device_count()):
            properties = cupy.cuda.runtime.getDeviceProperties(i)
            found.append(
                DeviceInfo(f"cuda:{i}", properties["name"].decode(), properties["totalGlobalMem"])
            )
        return tuple(found)

    def _on(self, place: Any) -> AbstractContextManager[Any]:
        """Run on the device ``place``; None stays on the current one."""
        return nullcontext()

    def _create(self, function: Callable[..., Array], *args: Any, device: Any = None,
                **options: Any) -> Array:  # fmt: skip
        """``function`` of CuPy with the standard's ``device=``, which CuPy does not have."""
        with self._on(self.native_device(device) if isinstance(device, str) else device):
            return function(*args, **options)

    def create(
        self, name: str, *args: Any, dtype: Any = None, device: str | None = None, **kwargs: Any
    ) -> Array:
        return self._create(
            getattr(cupy, name), *args, dtype=self.dtype(dtype), device=device, **kwargs
        )

    def asarray(
        self, data: Any, dtype: Any = None, device: Any = None, copy: bool | None = None
    ) -> Array:
        with self._on(self.native_device(device) if isinstance(device, str) else device):
            return cupy.asarray(data, dtype=self.dtype(dtype), copy=copy)

    def from_dlpack(self, x: Any, /, *, device: Any = None, copy: bool | None = None) -> Array:
        # CuPy hands its current stream to the producer, which orders its own work before it.
        kind = x.__dlpack_device__()[0]
        if kind in _GPU_MEMORY:
            out = cupy.from_dlpack(x, copy=copy)
            return out if device is None else self.asarray(out, device=device)
        if kind not in _HOST_MEMORY:
            raise DeviceError(f"from_dlpack: memory of DLPack device type {kind} is not CUDA's")
        if copy is False:
            raise DeviceError(
                "from_dlpack: the array is in host memory and would have to be copied to the GPU; "
                "leave copy=False out"
            )
        return self.asarray(np.from_dlpack(x), device=device)

    def to_host(self, x: Array) -> np.ndarray[Any, Any]:
        return cupy.asnumpy(x)  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        cupy.cuda.Device().synchronize()

    def pinned(self, host: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if not host.size:
            return host
        out: np.ndarray[Any, Any] = cupyx.empty_pinned(host.shape, host.dtype)
        out[...] = host
        return out

    def copy_async(
        self, host: np.ndarray[Any, Any], device: str | None = None
    ) -> Callable[[], Array]:
        place = cupy.cuda.Device() if device is None else self.native_device(device)
        with self._on(place):
            stream = self._copies[int(place)]
            return stream.copy(np.ascontiguousarray(host), partial(self._on, place))

    def read_async(self, x: Array) -> Callable[[], np.ndarray[Any, Any]]:
        if not x.size:
            return super().read_async(x)
        return self._copies[int(self.native_device(self.device(x)))].read(x)

    @cached_property
    def _copies(self) -> defaultdict[int, _CopyStream]:
        """The stream of each GPU that copies run on."""
        return defaultdict(_CopyStream)

    def storage(self, x: Array) -> Any:
        while x.base is not None:
            x = x.base
        return x

    def is_view(self, x: Array) -> bool:
        return x.base is not None

    # -- the standard's functions that CuPy lacks or spells in another way -------------------------

    def clip(self, x: Array, /, min: Any = None, max: Any = None) -> Array:
        return x.copy() if min is None and max is None else cupy.clip(x, min, max)

    def take_along_axis(self, x: Array, indices: Array, /, *, axis: int = -1) -> Array:
        return cupy.take_along_axis(x, indices, axis)

    def reshape(
        self, x: Array, /, shape: int | tuple[int, ...], *, copy: bool | None = None
    ) -> Array:
        return cupy.reshape(x, shape, copy=copy)

    def astype(self, x: Array, dtype: Any, /, *, copy: bool = True, device: Any = None) -> Array:
        out = cupy.astype(x, dtype, copy=copy)
        return out if device is None else self.asarray(out, device=device)

    def var(self, x: Array, /, *, axis: Any = None, correction: float = 0.0,
            keepdims: bool = False) -> Array:  # fmt: skip
        return cupy.var(x, axis=axis, ddof=correction, keepdims=keepdims)

    def std(self, x: Array, /, *, axis: Any = None, correction: float = 0.0,
            keepdims: bool = False) -> Array:  # fmt: skip
        return cupy.std(x, axis=axis, ddof=correction, keepdims=keepdims)

    def count_nonzero(self, x: Array, /, *, axis: Any = None, keepdims: bool = False) -> Array:
        return cupy.sum(x != 0, axis=axis, keepdims=keepdims)

    # CuPy sorts by radix or merge, so its sorts are stable with or without being asked.

    def sort(self, x: Array, /, *, axis: int = -1, descending: bool = False,
             stable: bool = True) -> Array:  # fmt: skip
        out = cupy.sort(x, axis=axis)
        return cupy.flip(out, axis=axis) if descending else out

    def argsort(self, x: Array, /, *, axis: int = -1, descending: bool = False,
                stable: bool = True) -> Array:  # fmt: skip
        if not descending:
            return cupy.argsort(x, axis=axis)
        # Sorted from the far end, so that equal elements keep their order.
        return x.shape[axis] - 1 - cupy.flip(cupy.argsort(cupy.flip(x, axis=axis), axis=axis),
                                             axis=axis)  # fmt: skip

    def searchsorted(self, x1: Array, x2: Any, /, *, side: str = "left",
                     sorter: Array | None = None) -> Array:  # fmt: skip
        return cupy.searchsorted(x1, cupy.asarray(x2), side=side, sorter=sorter)

    def unstack(self, x: Array, /, *, axis: int = 0) -> tuple[Array, ...]:
        return tuple(cupy.moveaxis(x, axis, 0)[i] for i in range(x.shape[axis]))

    def vecdot(self, x1: Array, x2: Array, /, *, axis: int = -1) -> Array:
        return cupy.sum(cupy.conj(x1) * x2, axis=axis)

    # -- operations that the standard lacks --------------------------------------------------------

    def setitem(self, x: Array, index: Any, value: Any) -> None:
        if isinstance(value, np.ndarray) and value.ndim:
            raise DeviceError(
                f"setitem: an array on the CPU (numpy, shape {value.shape}) does not go into one "
                f"on {self.device(x)} by itself; move it with .to({self.device(x)!r})"
            )
        x[index] = cupy.asarray(value, dtype=x.dtype) if isinstance(value, list | tuple) else value

    def scatter_add(self, g: Array, index: Any, shape: tuple[int, ...]) -> Array:
        """As in the base class. Slices and integers give the same bits on every run.

        Arrays of indices add floating-point numbers by atomic additions, whose order, and so
        whose last bit, differs between runs where an index repeats.
        """
        if is_basic(index):
            out = cupy.zeros(shape, dtype=g.dtype)
            out[index] = g
            return out
        return _atomically(g, index, shape)

    def scatter_add_along_axis(
        self, g: Array, indices: Array, shape: tuple[int, ...], axis: int
    ) -> Array:
        """As in the base class; atomic additions, as in :meth:`scatter_add`."""
        ndim = len(shape)
        grid = [
            cupy.arange(n).reshape((1,) * i + (n,) + (1,) * (ndim - i - 1))
            for i, n in enumerate(indices.shape)
        ]
        grid[axis] = indices
        return _atomically(g, tuple(grid), shape)

    def matmul(self, a: Array, b: Array) -> Array:
        if max(a.ndim, b.ndim) > 2 and a.dtype == b.dtype and a.dtype.kind == "V":
            # CuPy multiplies single matrices of bfloat16, and no stacks of them.
            return cupy.matmul(a.astype(np.float32), b.astype(np.float32)).astype(a.dtype)
        return cupy.matmul(a, b)

    def erf(self, x: Array) -> Array:
        from cupyx.scipy.special import erf  # a tenth of a second that most programs do not need

        if x.dtype.itemsize == 2:  # half precision would come out in double, bfloat16 not at all
            return erf(x.astype(np.float32)).astype(x.dtype)
        return erf(x)


def _atomically(g: Array, index: Any, shape: tuple[int, ...]) -> Array:
    """Zeros with ``g`` added at ``index``, in a dtype that CUDA has atomic additions for."""
    kind, size = g.dtype.kind, g.dtype.itemsize
    if kind == "c":
        return _atomically(g.real, index, shape) + 1j * _atomically(g.imag, index, shape)
    if kind in "biu":  # adding two's complements is adding unsigned numbers
        wide = g.astype(np.int64).view(np.uint64)
    elif size == 2:  # many small terms: half precision would stop growing
        wide = g.astype(np.float32)
    else:
        wide = g
    out = cupy.zeros(shape, dtype=wide.dtype)
    cupyx.scatter_add(out, index, wide)
    return out.view(np.int64).astype(g.dtype) if kind in "biu" else out.astype(g.dtype, copy=False)


class _CopyStream:
    """A stream of one GPU for copies from and to the host, beside the stream that computes."""

    def __init__(self) -> None:
        self._stream = cupy.cuda.Stream(non_blocking=True)
        # Host memory must not be used again before it has been read.
        self._under_way: deque[tuple[Any, Any]] = deque()
        self._lock = Lock()

    def copy(
        self, host: np.ndarray[Any, Any], here: Callable[[], AbstractContextManager[Any]]
    ) -> Callable[[], Array]:
        """Begin to copy ``host`` to the current GPU, which ``here`` makes current again."""
        self._forget()
        # The memory belongs to the stream that computes, which may still use what was in it: the
        # copy begins when all that is queued there by now is done.
        out = cupy.empty(host.shape, dtype=host.dtype)
        self._stream.wait_event(_event(cupy.cuda.get_current_stream()))
        out.set(host, stream=self._stream)
        arrived = _event(self._stream)
        self._under_way.append((arrived, host))

        def receive() -> Array:
            with here():
                cupy.cuda.get_current_stream().wait_event(arrived)
            return out

        return receive

    def _forget(self) -> None:
        """Let go of the memory of copies that are done."""
        with self._lock:
            while self._under_way and self._under_way[0][0].done:
                self._under_way.popleft()

    def read(self, x: Array) -> Callable[[], np.ndarray[Any, Any]]:
        """Begin to copy an array of the current GPU to the host."""
        self._forget()
        x = cupy.ascontiguousarray(x)
        host: np.ndarray[Any, Any] = cupyx.empty_pinned(x.shape, x.dtype)
        self._stream.wait_event(_event(cupy.cuda.get_current_stream()))
        x.get(stream=self._stream, out=host, blocking=False)
        arrived = _event(self._stream)
        # The memory of `x` is not given away before it has been read.
        self._under_way.append((arrived, (x, host)))

        def receive() -> np.ndarray[Any, Any]:
            arrived.synchronize()
            return host

        return receive


def _event(stream: Any) -> Any:
    return stream.record(cupy.cuda.Event(disable_timing=True))


# -- extensions of the standard --------------------------------------------------------------------


class _Part:
    """A part of CuPy's namespace, ``linalg`` or ``fft``."""

    def __init__(self, part: Any, bind: Callable[..., Any]) -> None:
        self._part = part
        self._bind = bind
        for name in dir(type(self)):
            if not name.startswith("_"):
                self.__dict__[name] = bind(getattr(self, name))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self._part, name)
        self.__dict__[name] = self._bind(value) if callable(value) else value
        return self.__dict__[name]


class _Linalg(_Part):
    """CuPy's ``linalg``, with what it lacks of the standard's."""

    def cholesky(self, x: Array, /, *, upper: bool = False) -> Array:
        out = cupy.linalg.cholesky(x)
        return cupy.conj(cupy.matrix_transpose(out)) if upper else out

    def diagonal(self, x: Array, /, *, offset: int = 0) -> Array:
        return cupy.diagonal(x, offset, -2, -1)

    def matrix_norm(self, x: Array, /, *, keepdims: bool = False, ord: Any = "fro") -> Array:
        return cupy.linalg.norm(x, ord=ord, axis=(-2, -1), keepdims=keepdims)

    def matrix_rank(self, x: Array, /, *, rtol: Any = None) -> Array:
        values = self.svdvals(x)
        if rtol is None:
            rtol = max(x.shape[-2:]) * float(np.finfo(values.dtype).eps)
        elif isinstance(rtol, cupy.ndarray):
            rtol = rtol[..., None]
        return cupy.sum(values > rtol * cupy.max(values, axis=-1, keepdims=True), axis=-1)

    def outer(self, x1: Array, x2: Array, /) -> Array:
        return cupy.outer(x1, x2)

    def pinv(self, x: Array, /, *, rtol: Any = None) -> Array:
        if rtol is None:
            rtol = max(x.shape[-2:]) * float(np.finfo(x.dtype).eps)
        return cupy.linalg.pinv(x, rtol)

    def svdvals(self, x: Array, /) -> Array:
        return cupy.linalg.svd(x, compute_uv=False)

    def tensordot(self, x1: Array, x2: Array, /, *, axes: Any = 2) -> Array:
        return cupy.tensordot(x1, x2, axes=axes)

    def trace(self, x: Array, /, *, offset: int = 0, dtype: Any = None) -> Array:
        return cupy.trace(x, offset, -2, -1, dtype=dtype)

    def vecdot(self, x1: Array, x2: Array, /, *, axis: int = -1) -> Array:
        return cupy.sum(cupy.conj(x1) * x2, axis=axis)

    def vector_norm(
        self, x: Array, /, *, axis: Any = None, keepdims: bool = False, ord: float = 2
    ) -> Array:
        # CuPy's own norm reduces with one block; these are ordinary reductions.
        size = cupy.abs(x)
        options = {"axis": axis, "keepdims": keepdims}
        if ord == np.inf:
            return cupy.max(size, **options)
        if ord == -np.inf:
            return cupy.min(size, **options)
        if ord == 0:
            return cupy.sum(size != 0, **options).astype(size.dtype)
        if ord == 1:
            return cupy.sum(size, **options)
        if ord == 2:
            return cupy.sqrt(cupy.sum(size * size, **options))
        return cupy.sum(size**ord, **options) ** (1 / ord)


# -- several GPUs ----------------------------------------------------------------------------------


def _place_of(values: Iterable[Any]) -> int | None:
    """The GPU of the arrays among ``values``; None without any, DeviceError when they differ."""
    found: int | None = None
    for x in values:
        if isinstance(x, cupy.ndarray):
            place = x.data.device_id
        elif isinstance(x, list | tuple):
            place = _place_of(x)
        elif isinstance(x, dict):
            place = _place_of(x.values())
        else:
            continue
        if found is None:
            found = place
        elif place is not None and place != found:
            raise DeviceError(
                f"operands are on 'cuda:{found}' and 'cuda:{place}'; move one with "
                f".to('cuda:{found}')"
            )
    return found


class SeveralGpus(CupyBackend):
    """CuPy on a machine with several GPUs: every function runs where its operands are.

    CuPy allocates on a current device, whatever its operands. Functions are wrapped here to switch
    it, and to refuse operands on two GPUs.
    """

    #: Methods that launch nothing, or switch by themselves.
    _plain = frozenset(
        ("bind", "copy_async", "describe_devices", "device", "device_count", "devices", "dtype",
         "find_dtype", "from_dlpack", "is_view", "native_device", "nbytes", "numpy_dtype", "pinned",
         "storage", "synchronize", "to_host")
    )  # fmt: skip

    def __init__(self, count: int) -> None:
        self._count = count
        self._used: set[int] = set()
        super().__init__()
        for name in dir(type(self)):
            if not name.startswith("_") and name not in self._plain:
                value = getattr(self, name)
                if callable(value) and not isinstance(value, _Part):
                    self.__dict__[name] = self.bind(value)

    def device_count(self) -> int:
        return self._count

    def _on(self, place: Any) -> AbstractContextManager[Any]:
        if place is None:
            return nullcontext()
        self._used.add(int(place))
        return cupy.cuda.Device(int(place))  # type: ignore[no-any-return]

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def there(*args: Any, **options: Any) -> Any:
            place = _place_of((*args, *options.values()))
            if place is None:
                return function(*args, **options)
            with self._on(place):
                return function(*args, **options)

        return there

    def synchronize(self) -> None:
        # The other GPUs have nothing to wait for, and asking them would set them up first.
        for place in sorted(self._used):
            cupy.cuda.Device(place).synchronize()


# -- is there a GPU? -------------------------------------------------------------------------------


def make() -> CupyBackend:
    """The backend, once a GPU has computed something; DeviceError says what is missing.

    CuPy installs and imports without a GPU, so only use tells.
    """
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as error:
        raise DeviceError(_what_is_missing(error)) from error
    if not count:
        raise DeviceError(_no_gpu())
    try:
        cupy.add(cupy.zeros(1, dtype=np.float32), 1)
    except Exception as error:
        raise DeviceError(
            f"cuda: CuPy {cupy.__version__} finds {count} GPU(s) but cannot compute on them: "
            f"{error}. If CUDA libraries are missing, they come with pip install "
            "'cupy-cuda13x[ctk]' (or 'cupy-cuda12x[ctk]')"
        ) from error
    return CupyBackend() if count == 1 else SeveralGpus(count)


def _what_is_missing(error: Exception) -> str:
    status = getattr(error, "status", None)
    if status == 100:  # cudaErrorNoDevice
        return _no_gpu()
    if status == 35:  # cudaErrorInsufficientDriver
        driver = cupy.cuda.runtime.driverGetVersion()
        if not driver:
            return (
                f"cuda: CuPy {cupy.__version__} is installed, but there is no NVIDIA driver on "
                "this machine; install one, or use device 'cpu'"
            )
        return (
            f"cuda: the NVIDIA driver knows CUDA {_version(driver)}, and CuPy {cupy.__version__} "
            f"needs {_version(cupy.cuda.runtime.runtimeGetVersion())}; update the driver, or "
            "install CuPy for an older CUDA: pip install 'gpugrad[cuda12]'"
        )
    return f"cuda: the GPU cannot be used: {error}"


def _no_gpu() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    return f"cuda: the NVIDIA driver finds no GPU{why}; see nvidia-smi, or use device 'cpu'"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
