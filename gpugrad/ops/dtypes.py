"""Data types, what is known about them, and the constants of the namespace."""

from __future__ import annotations

import builtins
import math
from typing import Any

import numpy as np

from gpugrad.backend import as_dtype, backend_for_device
from gpugrad.core.primitive import differentiable
from gpugrad.core.tensor import Tensor
from gpugrad.errors import DeviceError, ParameterError

__all__ = [
    "__array_namespace_info__",
    "bool",
    "can_cast",
    "complex64",
    "complex128",
    "e",
    "finfo",
    "float16",
    "float32",
    "float64",
    "iinfo",
    "inf",
    "int8",
    "int16",
    "int32",
    "int64",
    "isdtype",
    "nan",
    "newaxis",
    "pi",
    "result_type",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
]

bool = np.dtype("bool")
int8 = np.dtype("int8")
int16 = np.dtype("int16")
int32 = np.dtype("int32")
int64 = np.dtype("int64")
uint8 = np.dtype("uint8")
uint16 = np.dtype("uint16")
uint32 = np.dtype("uint32")
uint64 = np.dtype("uint64")
float16 = np.dtype("float16")
float32 = np.dtype("float32")
float64 = np.dtype("float64")
complex64 = np.dtype("complex64")
complex128 = np.dtype("complex128")

pi = math.pi
e = math.e
inf = math.inf
nan = math.nan
newaxis = None


def __getattr__(name: str) -> Any:
    if name == "bfloat16":  # NumPy knows it once ml_dtypes, which need not be there, is imported
        return as_dtype(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _dtype(x: Any) -> Any:
    """The dtype of a tensor or an array; anything else as it is."""
    if isinstance(x, Tensor):
        return x.dtype
    return x.dtype if isinstance(x, np.ndarray | np.generic) else x


def finfo(type: Any, /) -> Any:
    """The limits of a floating-point dtype, or of a tensor's: eps, max, min, smallest_normal, bits.

    >>> import gpugrad as gg
    >>> float(gg.finfo(gg.float32).eps)
    1.1920928955078125e-07
    """
    dtype = np.dtype(_dtype(type))
    if dtype.kind == "V":  # bfloat16 and its like
        import ml_dtypes

        return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return np.finfo(dtype)


def iinfo(type: Any, /) -> Any:
    """The limits of an integer dtype, or of a tensor's: max, min, bits.

    >>> import gpugrad as gg
    >>> gg.iinfo("int8").max
    127
    """
    return np.iinfo(_dtype(type))


def isdtype(dtype: Any, kind: Any) -> builtins.bool:
    """Whether ``dtype`` is of ``kind``: a dtype, a name such as ``"real floating"``, or several.

    >>> import gpugrad as gg
    >>> gg.isdtype(gg.float32, "real floating"), gg.isdtype(gg.int8, ("bool", "unsigned integer"))
    (True, False)
    """
    return np.isdtype(np.dtype(dtype), kind)


def result_type(*arrays_and_dtypes: Any) -> np.dtype[Any]:
    """The dtype that combining tensors, dtypes and Python scalars gives.

    Python scalars are weak: they change the kind of the result at most.

    >>> import gpugrad as gg
    >>> gg.result_type(gg.asarray([1.0], dtype="float32"), 2.0, gg.int8)
    dtype('float32')
    """
    return np.result_type(*map(_dtype, arrays_and_dtypes))


def can_cast(from_: Any, to: Any, /) -> builtins.bool:
    """Whether promotion may turn the dtype (or the tensor's) ``from_`` into ``to``.

    >>> import gpugrad as gg
    >>> gg.can_cast(gg.float32, gg.float64), gg.can_cast(gg.float64, gg.float32)
    (True, False)
    """
    return np.can_cast(_dtype(from_), to)


_KINDS: dict[str, tuple[str, ...]] = {
    "bool": ("bool",),
    "signed integer": ("int8", "int16", "int32", "int64"),
    "unsigned integer": ("uint8", "uint16", "uint32", "uint64"),
    "real floating": ("float32", "float64"),
    "complex floating": ("complex64", "complex128"),
}
_KINDS["integral"] = _KINDS["signed integer"] + _KINDS["unsigned integer"]
_KINDS["numeric"] = _KINDS["integral"] + _KINDS["real floating"] + _KINDS["complex floating"]


class _Info:
    """What the standard's inspection functions tell about this namespace."""

    def capabilities(self) -> dict[str, Any]:
        """Boolean masks and shapes that depend on values work; there is no limit on dimensions."""
        return {"boolean indexing": True, "data-dependent shapes": True, "max dimensions": 64}

    def default_device(self) -> str:
        return "cpu"

    def default_dtypes(self, *, device: str | None = None) -> dict[str, np.dtype[Any]]:
        return {"real floating": float64, "complex floating": complex128, "integral": int64,
                "indexing": int64}  # fmt: skip

    def dtypes(
        self, *, device: str | None = None, kind: str | tuple[str, ...] | None = None
    ) -> dict[str, np.dtype[Any]]:
        kinds = ("bool", "numeric") if kind is None else (kind,) if isinstance(kind, str) else kind
        unknown = [k for k in kinds if k not in _KINDS]
        if unknown:
            raise ParameterError(f"dtypes: kind {unknown[0]!r} is not one of {sorted(_KINDS)}")
        return {name: np.dtype(name) for k in kinds for name in _KINDS[k]}

    def devices(self) -> list[str]:
        """The CPU and, where CuPy can use them, the GPUs."""
        try:
            return ["cpu", *backend_for_device("cuda").devices()]
        except DeviceError:
            return ["cpu"]


def __array_namespace_info__() -> _Info:
    """The inspection interface of the Array API standard.

    >>> import gpugrad as gg
    >>> gg.__array_namespace_info__().default_device()
    'cpu'
    """
    return _Info()


def _same(dtype: Any) -> Any:
    """A dtype in a rule whose result is recorded: NumPy's description is the common language."""
    return dtype


differentiable.dtype = _same
