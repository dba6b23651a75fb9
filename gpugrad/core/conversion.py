"""From data to tensors: numbers, arrays of any library, and memory that others share."""

from __future__ import annotations

from typing import Any

from gpugrad.backend import SPACES, Array, backend_for_device, is_array
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.errors import DeviceError, DTypeError, ShapeError


def tensor(
    data: Any, *, dtype: Any = None, device: str | None = None, requires_grad: bool = False
) -> Tensor:
    """A tensor with a copy of ``data``.

    Parameters
    ----------
    data:
        Numbers, nested sequences, an array of any known library, or a tensor (its graph is left
        behind).
    dtype:
        As NumPy names it; default: that of ``data`` (float64 for Python floats, as in NumPy).
    device:
        ``"cpu"``, ``"cuda:0"``; default: where ``data`` is, and the CPU for Python numbers.
    requires_grad:
        Collect gradients here.

    Raises
    ------
    DTypeError
        ``requires_grad`` with a dtype that has no derivative, or data that is not numeric.
    DeviceError
        The device cannot be used here; the message says what is missing.

    >>> import gpugrad as gg
    >>> gg.tensor([[1.0, 2.0], [3.0, 4.0]], dtype="float32")
    tensor([[1., 2.],
            [3., 4.]], dtype=float32)
    """
    out = tensor_of(_array(data, dtype, device, copy=True))
    return out.requires_grad_() if requires_grad else out


def asarray(
    obj: Any, /, *, dtype: Any = None, device: str | None = None, copy: bool | None = None
) -> Tensor:
    """A tensor of ``obj`` that shares its memory where that is possible.

    As :func:`tensor`, without the copy; ``copy=True`` asks for one and ``copy=False`` refuses one.
    A change made to shared memory from outside, not through a tensor, goes unnoticed: between a
    forward and its backward pass it makes the gradients those of the changed values.
    A tensor comes back as it is, graph included, when nothing has to change.

    >>> import numpy as np, gpugrad as gg
    >>> host = np.zeros(2)
    >>> x = gg.asarray(host)
    >>> host[0] = 7.0
    >>> x
    tensor([7., 0.])
    """
    if isinstance(obj, Tensor) and not copy:
        return obj.to(device, dtype) if (device or dtype is not None) else obj
    return tensor_of(_array(obj, dtype, device, copy=copy))


def from_dlpack(x: Any, /, *, device: str | None = None, copy: bool | None = None) -> Tensor:
    """A tensor that shares the memory of any object with ``__dlpack__``, without a copy.

    >>> import numpy as np, gpugrad as gg
    >>> gg.from_dlpack(np.arange(3.0))
    tensor([0., 1., 2.])
    """
    host = x.__dlpack_device__()[0] in (1, 3)  # ordinary and pinned memory
    space = backend_for_device(device or ("cpu" if host else "cuda"))
    try:
        return tensor_of(space.from_dlpack(x, device=device, copy=copy))
    except BufferError as error:  # what the protocol raises for an export that cannot be
        raise DeviceError(f"from_dlpack: {type(x).__name__} cannot be shared: {error}") from error


def _array(data: Any, dtype: Any, device: str | None, copy: bool | None) -> Array:
    if isinstance(data, Tensor):
        data = data.data

    here = SPACES[type(data)] if is_array(data) else None
    space = backend_for_device(device) if device else here or backend_for_device("cpu")
    if here is not None and here is not space:
        data = here.to_host(data)
    if device is None and here is not None:
        device = here.device(data)
    if here is None and isinstance(data, list | tuple):
        data = _plain(data)
    try:
        out = space.asarray(data, dtype=dtype, device=device, copy=copy)
    except (TypeError, ValueError) as error:
        if isinstance(error, DTypeError | ShapeError):
            raise
        raise DTypeError(
            f"tensor: cannot make an array of {type(data).__name__}: {error}"
        ) from error
    if getattr(out.dtype, "kind", "f") in "OUSMm" or getattr(out.dtype, "names", None):
        raise DTypeError(f"tensor: {out.dtype} is not a numeric dtype; pass numbers or booleans")
    return out


def _plain(data: Any) -> Any:
    """Nested lists with the tensors in them unpacked."""
    if isinstance(data, Tensor):
        return data.detach().cpu().numpy()
    if isinstance(data, list | tuple):
        return [_plain(x) for x in data]
    return data
