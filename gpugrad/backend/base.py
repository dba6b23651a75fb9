"""What the engine asks of an array library: the protocol every backend fills in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from gpugrad.backend import tape
from gpugrad.backend.kernels import Slot, gate
from gpugrad.backend.special import erf
from gpugrad.errors import DTypeError

Array = Any
DType = Any


@dataclass(frozen=True)
class DeviceInfo:
    """A device that arrays can live on.

    Attributes
    ----------
    device:
        The string that names it: ``"cpu"``, ``"cuda:0"``.
    name:
        What its maker calls it.
    memory:
        Its memory in bytes; 0 when not known.
    """

    device: str
    name: str
    memory: int = 0


class Backend:
    """An array library seen through one interface.

    An instance stands for the namespace ``m`` of a derivative rule: it offers the functions of the
    Array API standard under their own names (taken from ``xp``), and the few operations that the
    standard lacks, which subclasses override where their library has something faster.

    Parameters
    ----------
    name:
        What the library is called in messages and in :func:`gpugrad.explain`.
    xp:
        The Array API namespace that owns the arrays.
    prefix:
        First part of the device strings that lead here: ``"cpu"``, ``"cuda"``.
    types:
        The array classes of the library.
    """

    #: Forwards of declared primitives by name: what a rule calls when the library has no such
    #: function (``m.softmax``).
    extras: ClassVar[dict[str, Callable[..., Any]]] = {}

    #: Functions by name in the place of the library's own, where these do not do.
    own: ClassVar[dict[str, Callable[..., Any]]] = {}

    #: Where the operations that this library has fused kernels for find them.
    slots: Mapping[str, Slot] = MappingProxyType({})

    #: False where an array cannot be changed after it was made (JAX).
    mutable = True

    #: Whether arrays lie in host memory, where looking at their elements costs no waiting.
    on_host = False

    def __init__(self, name: str, xp: Any, prefix: str, types: tuple[type, ...]) -> None:
        self.name = name
        self.xp = xp
        self.prefix = prefix
        self.types = types
        self._dtypes: dict[Any, DType] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "xp":
            raise AttributeError(name)
        try:
            value = self.own[name] if name in self.own else getattr(self.xp, name)
        except AttributeError:
            if name not in self.extras:
                raise
            value = partial(self._extra, name)
        if name in self.slots:
            value = self.fused(name, value)
        self.__dict__[name] = value  # the next look-up is an ordinary attribute
        return value

    def _extra(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call the forward of a primitive; looked up each time, for it may be declared again."""
        return self.extras[name](self, *args, **kwargs)

    def fused(self, name: str, generic: Callable[..., Any]) -> Callable[..., Any]:
        """``generic``, a function of raw arrays, or in its place a kernel of the slot."""
        slot = self.slots[name]

        def without_space(m: Backend, *args: Any, **kwargs: Any) -> Any:
            return generic(*args, **kwargs)

        if tape.is_replayable(generic):
            tape.replayable(without_space)

        def choose(*args: Any, **kwargs: Any) -> Any:
            # What `choice` would find out for a small operand, without its calls.
            if not gate and not tape.gate and getattr(args[0], "size", 0) < slot.at_least:
                return generic(*args, **kwargs)
            return slot.choice(without_space, self, args, kwargs)(self, *args, **kwargs)

        return choose

    def __repr__(self) -> str:
        return f"<backend {self.name}>"

    # -- dtypes: users speak NumPy's, the library may have its own ---------------------------

    def dtype(self, dtype: Any) -> DType:
        """The library's dtype for a NumPy-style ``dtype``; None stays None."""
        if dtype is None:
            return None
        try:
            return self._dtypes[dtype]
        except KeyError:
            found = self._dtypes[dtype] = self.find_dtype(dtype)
            return found

    def find_dtype(self, dtype: Any) -> DType:
        try:
            name = as_dtype(dtype).name
        except TypeError:
            return dtype  # already the library's own
        try:
            return getattr(self.xp, name)
        except AttributeError:
            raise DTypeError(f"{self.name} has no dtype {name}") from None

    def numpy_dtype(self, x: Array) -> np.dtype[Any]:
        """The NumPy dtype that describes the elements of ``x``."""
        return np.dtype(str(x.dtype).rpartition(".")[2])

    def set_product_precision(self, precision: str) -> None:
        """How exactly products of float32 are computed: `"highest"`, `"high"` or `"medium"`."""

    # -- arrays and where they live -------------------------------------------------------------

    def asarray(
        self, data: Any, dtype: Any = None, device: str | None = None, copy: bool | None = None
    ) -> Array:
        """An array of this library on ``device`` (a string such as ``"cuda:0"``)."""
        return self.xp.asarray(
            data, dtype=self.dtype(dtype), device=self.native_device(device), copy=copy
        )

    def create(
        self, name: str, *args: Any, dtype: Any = None, device: str | None = None, **kwargs: Any
    ) -> Array:
        """An array on ``device`` from the library's creation function ``name`` (``"zeros"``)."""
        make = getattr(self.xp, name)
        place = self.native_device(device)
        return make(*args, dtype=self.dtype(dtype), device=place, **kwargs)

    def devices(self) -> list[str]:
        """The devices that can be used now, the default one first."""
        return [self.prefix]

    def native_device(self, device: str | None) -> Any:
        """The library's own object for a device string; None means its default."""
        return None

    def device(self, x: Array) -> str:
        """The device string of an array."""
        return self.prefix

    def to_device(self, x: Array, device: str) -> Array:
        """A copy of ``x`` on ``device``: an array of the library that the device belongs to."""
        from gpugrad.backend import backend_for_device

        target = backend_for_device(device)
        if target is self:
            return self.asarray(x, device=device, copy=True)
        return target.asarray(self.to_host(x), device=device)

    def describe_devices(self) -> tuple[DeviceInfo, ...]:
        """What the devices of this library are, where it can say so."""
        return ()

    def from_dlpack(
        self, x: Any, /, *, device: str | None = None, copy: bool | None = None
    ) -> Array:
        """An array that shares the memory of ``x``, any object with ``__dlpack__``.

        On another device than ``x``, or with ``copy=True``, it is a copy.
        """
        options = {} if copy is None else {"copy": copy}
        if device is not None:
            options["device"] = self.native_device(device)
        return self.xp.from_dlpack(x, **options)

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of arrays, made to run on the device of its operands.

        Most libraries do so anyway and get it back as it is. One that computes on a current device,
        of several, switches that around the call.
        """
        return function

    def to_host(self, x: Array) -> np.ndarray[Any, Any]:
        """A NumPy array with the elements of ``x``. The one place where the host waits."""
        return np.asarray(x)

    def synchronize(self) -> None:
        """Wait until all queued work is done."""

    def pinned(self, host: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """``host`` in memory that the device reads by itself; as it is where there is none."""
        return host

    def copy_async(
        self, host: np.ndarray[Any, Any], device: str | None = None
    ) -> Callable[[], Array]:
        """Begin to copy ``host`` to ``device``, beside the work that is queued there.

        Work that is queued after a call of the function that comes back sees the copy, which the
        function returns. Until then ``host`` must stay as it is.
        """
        copy = self.asarray(host, device=device)
        return lambda: copy

    def read_async(self, x: Array) -> Callable[[], np.ndarray[Any, Any]]:
        """Begin to bring the elements of ``x`` to the host, behind the work that is queued there.

        The function that comes back waits until they have arrived, and returns them. A library that
        cannot copy beside its work reads at once.
        """
        host = self.to_host(x)
        return lambda: host

    def storage(self, x: Array) -> Any:
        """The object that owns the memory of ``x``: views of one buffer share it."""
        return x

    def is_view(self, x: Array) -> bool:
        """Whether ``x`` may share its memory with another array (True when not known)."""
        return True

    def nbytes(self, x: Array) -> int:
        """Bytes that the elements of ``x`` take."""
        return int(math.prod(x.shape)) * self.numpy_dtype(x).itemsize

    # -- operations that the standard lacks -------------------------------------------------------

    def sum_to(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Sum ``x`` down to ``shape``: the transpose of broadcasting from ``shape``.

        Half precision is summed in float32. ``x`` itself comes back when there is nothing to sum.
        """
        have = x.shape
        if have == shape:
            return x
        lead = len(have) - len(shape)
        axes = tuple(range(lead)) + tuple(
            lead + i for i, n in enumerate(shape) if n == 1 and have[lead + i] != 1
        )
        out = self.half_safe(self.xp.sum, x, axes)
        return out if out.shape == shape else self.xp.reshape(out, shape)

    def half_safe(self, reduce: Any, x: Array, axes: tuple[int, ...]) -> Array:
        """``reduce`` over ``axes`` with the axes kept, in float32 for two-byte floats."""
        dtype = self.numpy_dtype(x)
        if dtype.itemsize == 2 and dtype.kind not in "iu":  # bfloat16 is of kind V
            wide = self.xp.astype(x, self.dtype("float32"))
            return self.xp.astype(reduce(wide, axis=axes, keepdims=True), x.dtype)
        return reduce(x, axis=axes, keepdims=True)

    def getitem(self, x: Array, index: Any) -> Array:
        """``x[index]``, NumPy's rules: slices, integers, integer and boolean arrays."""
        return x[index]

    def setitem(self, x: Array, index: Any, value: Any) -> None:
        """``x[index] = value`` in place."""
        x[index] = value

    def setitem_copy(self, x: Array, index: Any, value: Any) -> Array:
        """A copy of ``x`` with ``value`` at ``index``; immutable libraries override it."""
        out = self.asarray(x, device=self.device(x), copy=True)
        self.setitem(out, index, value)
        return out

    def scatter_add(self, g: Array, index: Any, shape: tuple[int, ...]) -> Array:
        """Zeros of ``shape`` with ``g`` added at ``index``; repeated indices add up.

        The transpose of :meth:`getitem`.
        """
        raise NotImplementedError(f"the {self.name} backend has no scatter_add")

    def scatter_add_along_axis(
        self, g: Array, indices: Array, shape: tuple[int, ...], axis: int
    ) -> Array:
        """Zeros of ``shape`` with ``g`` added where ``take_along_axis`` would read."""
        raise NotImplementedError(f"the {self.name} backend has no scatter_add_along_axis")

    def erf(self, x: Array) -> Array:
        """The error function, element by element; half precision by way of float32."""
        if self.numpy_dtype(x).itemsize == 2:
            return self.xp.astype(erf(self, self.xp.astype(x, self.dtype("float32"))), x.dtype)
        return erf(self, x)

    def standard_normal(self, seed: int, shape: tuple[int, ...], dtype: Any, device: str) -> Array:
        """Normal deviates from NumPy's Philox stream of ``seed``: the same on every backend."""
        generator = np.random.Generator(np.random.Philox(seed))
        host = generator.standard_normal(shape, dtype=np.float64)
        return self.asarray(host.astype(np.dtype(dtype)), device=device)


def as_dtype(dtype: Any) -> np.dtype[Any]:
    """As `numpy.dtype`, which knows the name `"bfloat16"` once ml_dtypes is imported."""
    if isinstance(dtype, str) and dtype == "bfloat16":
        import ml_dtypes  # noqa: F401
    found: np.dtype[Any] = np.dtype(dtype)
    return found


def is_basic(index: Any) -> bool:
    """Whether an index is slices, integers, None and Ellipsis only: no element is named twice."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(
        part is None
        or part is Ellipsis
        or (isinstance(part, int | slice | np.integer) and not isinstance(part, bool))
        for part in parts
    )
