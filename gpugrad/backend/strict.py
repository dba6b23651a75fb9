"""array-api-strict arrays: the standard and nothing else, on devices that are no host.

The library runs on NumPy but hides it, which shows on any machine whether code written for the
standard stays inside it: ``"strict:device1"`` refuses to become a NumPy array, as a GPU does.
"""

from __future__ import annotations

from typing import Any

import array_api_strict
import numpy as np

from gpugrad.backend.base import Array, Backend, DeviceInfo, as_dtype
from gpugrad.backend.numpy import NumpyBackend
from gpugrad.errors import DeviceError, DTypeError

_HOST = "CPU_DEVICE"
_Array = type(array_api_strict.zeros(()))  # the library exports neither class
_DType = type(array_api_strict.float32)
_numpy = NumpyBackend()


class StrictBackend(Backend):
    """Only what the standard lacks goes through the NumPy array inside, and stays on its device."""

    def __init__(self) -> None:
        super().__init__("array_api_strict", array_api_strict, "strict", (_Array,))

    # -- dtypes -----------------------------------------------------------------------------------

    def dtype(self, dtype: Any) -> Any:
        # The cache is not for the library's own dtypes: comparing one with NumPy's warns.
        if isinstance(dtype, _DType):
            return dtype
        return super().dtype(dtype)

    def find_dtype(self, dtype: Any) -> Any:
        name = as_dtype(dtype).name
        try:
            return getattr(array_api_strict, name)
        except AttributeError:
            raise DTypeError(f"array_api_strict has no {name}; use float32 or float64") from None

    def numpy_dtype(self, x: Array) -> np.dtype[Any]:
        return x._array.dtype  # type: ignore[no-any-return]

    # -- arrays and where they live ---------------------------------------------------------------

    def asarray(
        self, data: Any, dtype: Any = None, device: str | None = None, copy: bool | None = None
    ) -> Array:
        if isinstance(data, np.generic):
            data = np.asarray(data)  # the standard knows Python scalars only
        place = self.native_device(device)
        here = data.device if isinstance(data, _Array) else array_api_strict.Device(_HOST)
        if hasattr(data, "dtype") and place is not None and place != here:
            if copy is False:
                raise ValueError("an array on another device cannot be shared without a copy")
            copy = True  # two devices share no memory
        return array_api_strict.asarray(data, dtype=self.dtype(dtype), device=place, copy=copy)

    def native_device(self, device: str | None) -> Any:
        if device is None:
            return None
        name = device.partition(":")[2] or _HOST
        try:
            return array_api_strict.Device(name)
        except ValueError:
            raise DeviceError(
                f"{device!r} is not a device of array_api_strict; its devices are "
                "'strict:CPU_DEVICE', 'strict:device1' and 'strict:device2'"
            ) from None

    def devices(self) -> list[str]:
        return [f"strict:{name}" for name in (_HOST, "device1", "device2")]

    def describe_devices(self) -> tuple[DeviceInfo, ...]:
        return tuple(DeviceInfo(name, "NumPy behind the standard") for name in self.devices())

    def device(self, x: Array) -> str:
        return f"strict:{x.device._device}"

    def to_host(self, x: Array) -> np.ndarray[Any, Any]:
        return x._array.copy()  # type: ignore[no-any-return]

    def storage(self, x: Array) -> Any:
        return _numpy.storage(x._array)

    def is_view(self, x: Array) -> bool:
        return _numpy.is_view(x._array)

    # -- operations that the standard lacks, or has for fewer arguments ---------------------------

    def take(self, x: Array, indices: Array, /, *, axis: int | None = None) -> Array:
        return _wrap(np.take(x._array, _inner(indices, x), axis=axis), x)

    def getitem(self, x: Array, index: Any) -> Array:
        return _wrap(x._array[_inner(index, x)], x)

    def setitem(self, x: Array, index: Any, value: Any) -> None:
        x._array[_inner(index, x)] = _inner(value, x)

    def scatter_add(self, g: Array, index: Any, shape: tuple[int, ...]) -> Array:
        return _wrap(_numpy.scatter_add(g._array, _inner(index, g), shape), g)

    def scatter_add_along_axis(
        self, g: Array, indices: Array, shape: tuple[int, ...], axis: int
    ) -> Array:
        return _wrap(_numpy.scatter_add_along_axis(g._array, _inner(indices, g), shape, axis), g)


def _inner(value: Any, peer: Array) -> Any:
    """An index or a value with NumPy arrays in it; DeviceError when it is not where ``peer`` is."""
    if isinstance(value, tuple):
        return tuple(_inner(v, peer) for v in value)
    if not isinstance(value, _Array):
        return value
    if value.device != peer.device:
        raise DeviceError(
            f"arrays on {value.device._device} and on {peer.device._device} cannot be combined; "
            "move one with .to(device)"
        )
    return value._array


def _wrap(value: Any, peer: Array) -> Array:
    """``value`` as an array of the library on the device of ``peer``, sharing its memory."""
    return array_api_strict.asarray(np.asarray(value), device=peer.device)


def make() -> StrictBackend:
    """The backend, with the library set to the version of the standard that gpugrad speaks."""
    if array_api_strict.get_array_api_strict_flags()["api_version"] < "2024.12":
        array_api_strict.set_array_api_strict_flags(api_version="2024.12")
    return StrictBackend()
