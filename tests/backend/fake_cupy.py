"""A stand-in for CuPy over NumPy, to run ``gpugrad.backend.cupy`` where there is no GPU.

It is as strict as CuPy or stricter: no implicit conversion, no ``device=`` argument, CuPy's own
signatures, the functions that CuPy lacks are absent, and an operation on an array that is not on
the current device is an error. :func:`install` puts it in the place of CuPy, in a process that has
not imported it yet.
"""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from gpugrad.backend.base import is_basic
from tests.backend.counting import VIEWS, Array, Library

ABSENT = frozenset(("unstack", "vecdot"))
LINALG = frozenset(
    ("cholesky", "cross", "det", "eigh", "eigvalsh", "inv", "matmul", "matrix_power",
     "matrix_rank", "matrix_transpose", "norm", "pinv", "qr", "slogdet", "solve", "svd")
)  # fmt: skip


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int, name: str) -> None:
        super().__init__(f"{name}: what the driver says")
        self.status = status


class Runtime:
    """The machine: its GPUs, the current one, and what is wrong with it."""

    CUDARuntimeError = CUDARuntimeError

    def __init__(self, gpus: int, driver: int, error: tuple[int, str] | None) -> None:
        self.gpus, self.driver, self.error = gpus, driver, error
        self.current = 0
        self.synchronized: list[int] = []

    def getDeviceCount(self) -> int:
        if self.error:
            raise CUDARuntimeError(*self.error)
        return self.gpus

    def driverGetVersion(self) -> int:
        return self.driver

    def runtimeGetVersion(self) -> int:
        return 13020

    def getDeviceProperties(self, i: int) -> dict[str, Any]:
        return {"name": b"Fake GPU", "totalGlobalMem": 2**30 * (i + 1)}


runtime: Runtime


class Device:
    def __init__(self, id: int | None = None) -> None:
        self.id = runtime.current if id is None else id

    def __int__(self) -> int:
        return self.id

    def __enter__(self) -> Device:
        self._before, runtime.current = runtime.current, self.id
        return self

    def __exit__(self, *_: object) -> None:
        runtime.current = self._before

    def synchronize(self) -> None:
        runtime.synchronized.append(self.id)


_owners: WeakValueDictionary[int, ndarray] = WeakValueDictionary()


class ndarray(Array):
    __slots__ = ("data",)

    def __init__(self, host: np.ndarray, place: int | None = None) -> None:
        super().__init__(host)
        self.data = SimpleNamespace(device_id=runtime.current if place is None else place)
        if host.base is None:
            _owners[id(host)] = self

    @property
    def base(self) -> ndarray | None:
        root = self._host
        while isinstance(root.base, np.ndarray):
            root = root.base
        return None if root is self._host else _owners.get(id(root))

    real = property(lambda self: self.library.launch("real", np.real, self))
    imag = property(lambda self: self.library.launch("imag", np.imag, self))

    def astype(self, dtype: Any, copy: bool = True) -> Any:
        if not copy and self.dtype == dtype:
            return self
        return self.library.launch("astype", np.astype, self, np.dtype(dtype))

    def view(self, dtype: Any) -> Any:
        return self.library.launch("view", lambda x: x.view(dtype), self)

    def reshape(self, *shape: Any) -> Any:
        return self.library.launch("reshape", lambda x: x.reshape(*shape), self)

    def copy(self) -> Any:
        return self.library.launch("copy", np.copy, self)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.data.device_id

    def __dlpack__(self, *, stream: int, max_version: Any = None, copy: Any = None) -> Any:
        assert stream > 0, "the consumer names the stream it will work on"
        return self._host.copy() if copy else self._host


ndarray.__module__ = "cupy"


class FakeLibrary(Library):
    def unwrap(self, value: Any) -> Any:
        if isinstance(value, ndarray) and value.data.device_id != runtime.current:
            raise ValueError(
                f"Array device must be same as the current device: array device = "
                f"{value.data.device_id} while current = {runtime.current}"
            )
        return super().unwrap(value)

    def launch(self, name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs or "correction" in kwargs or "descending" in kwargs:
            raise TypeError(f"{name}() got an unexpected keyword argument")
        out = super().launch(name, function, *args, **kwargs)
        arrays = [a for a in args if isinstance(a, ndarray)]
        view = name in VIEWS or (name == "getitem" and is_basic(args[1]))
        if view and arrays and isinstance(out, ndarray):
            out.data.device_id = arrays[0].data.device_id
        return out


def _main(library: FakeLibrary) -> ModuleType:
    def launched(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return library.launch(function.__name__, function, *args, **kwargs)

        return call

    # CuPy's own signatures, where NumPy's are wider.
    def clip(a, a_min, a_max, out=None):
        return np.clip(a, a_min, a_max)

    def take_along_axis(a, indices, axis):
        return np.take_along_axis(a, indices, axis)

    def reshape(a, newshape, order="C", *, copy=None):
        return np.reshape(a, newshape, order=order, copy=copy)

    def var(a, axis=None, dtype=None, out=None, ddof=0, keepdims=False):
        return np.var(a, axis, dtype, ddof=ddof, keepdims=keepdims)

    def std(a, axis=None, dtype=None, out=None, ddof=0, keepdims=False):
        return np.std(a, axis, dtype, ddof=ddof, keepdims=keepdims)

    def sort(a, axis=-1, kind=None):
        return np.sort(a, axis, kind="stable")

    def argsort(a, axis=-1, kind=None):
        return np.argsort(a, axis, kind="stable")

    def searchsorted(a, v, side="left", sorter=None):
        assert isinstance(v, np.ndarray)
        return np.searchsorted(a, v, side, sorter)

    def count_nonzero(a, axis=None):
        return np.count_nonzero(a, axis)

    module = ModuleType("cupy")
    for function in (clip, take_along_axis, reshape, var, std, sort, argsort,
                     searchsorted, count_nonzero):  # fmt: skip
        setattr(module, function.__name__, launched(function))

    def asarray(a: Any, dtype: Any = None, order: Any = None, *, copy: Any = None) -> Any:
        if not isinstance(a, ndarray):
            if copy is False:
                raise ValueError("cannot avoid a copy")
            host = np.array(a, dtype=dtype)
            if host.dtype == object:
                raise ValueError("Unsupported dtype object")
            return ndarray(host)
        moves = a.data.device_id != runtime.current
        if copy is False and moves:
            raise ValueError("cannot avoid a copy")
        if not moves and not copy and dtype in (None, a.dtype):
            return a
        return ndarray(np.array(a._host, dtype=dtype, copy=True))

    def from_dlpack(array: Any, *, device: Any = None, copy: Any = None) -> Any:
        assert device is None
        kind, place = array.__dlpack_device__()
        assert kind in (2, 13)
        return ndarray(array.__dlpack__(stream=1, max_version=(1, 0), copy=copy), place)

    def missing(name: str) -> Any:
        if name.startswith("__") or name in ABSENT:
            raise AttributeError(name)
        return getattr(library, name)

    module.__dict__.update(
        __version__="14.0.0", __path__=[], __getattr__=missing, ndarray=ndarray, asarray=asarray,
        astype=lambda x, dtype, /, *, copy=True: x.astype(dtype, copy),
        asnumpy=lambda x: x._host.copy(), from_dlpack=from_dlpack, _library=library,
        linalg=_linalg(library), fft=Library(np.fft, ndarray, library),
        cuda=SimpleNamespace(runtime=runtime, Device=Device),
    )  # fmt: skip
    return module


def _linalg(library: FakeLibrary) -> Any:
    part = Library(np.linalg, ndarray, library)

    def pinv(a: Any, rcond: float = 1e-15) -> Any:
        return library.launch("pinv", np.linalg.pinv, a, rcond)

    def missing(name: str) -> Any:
        if name not in LINALG:
            raise AttributeError(name)
        return getattr(part, name)

    out = ModuleType("cupy.linalg")
    out.__dict__.update(__getattr__=missing, pinv=pinv)
    return out


def _cupyx(library: FakeLibrary) -> dict[str, ModuleType]:
    def scatter_add(a: Any, slices: Any, value: Any) -> None:
        known = (np.int32, np.float16, np.float32, np.float64, np.uint32, np.uint64)
        if a.dtype.type not in known:
            raise TypeError("scatter_add only supports int32, float16, float32, float64, ...")
        library.launch("scatter_add", np.add.at, a, library.upload(slices), value)

    def erf(x: Any) -> Any:
        out = np.float64 if x.dtype == np.float16 else x.dtype
        return library.launch("erf", lambda h: np.vectorize(math.erf)(h).astype(out), x)

    names = ("cupyx", "cupyx.scipy", "cupyx.scipy.special")
    modules = {name: ModuleType(name) for name in names}
    modules["cupyx"].scatter_add = scatter_add  # type: ignore[attr-defined]
    modules["cupyx.scipy.special"].erf = erf  # type: ignore[attr-defined]
    return modules


def install(
    gpus: int = 1,
    *,
    driver: int = 13020,
    error: tuple[int, str] | None = None,
    broken: bool = False,
) -> ModuleType:
    """Put the stand-in where ``import cupy`` finds it."""
    global runtime
    assert "cupy" not in sys.modules
    runtime = Runtime(gpus, driver, error)
    library = ndarray.library = FakeLibrary(np, ndarray)
    module = _main(library)
    if broken:

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise OSError("libnvrtc.so.13: cannot open shared object file")

        module.zeros = fail  # type: ignore[attr-defined]
    sys.modules["cupy"] = module
    sys.modules.update(_cupyx(library))
    return module
