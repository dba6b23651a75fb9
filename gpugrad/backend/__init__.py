"""Which library owns an array, and which library a device string names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpugrad.backend.base import Array, Backend, DeviceInfo, as_dtype
from gpugrad.backend.kernels import Kernel, Slot
from gpugrad.backend.numpy import NumpyBackend
from gpugrad.errors import DeviceError, DTypeError

__all__ = [
    "Array",
    "Backend",
    "BackendInfo",
    "DeviceInfo",
    "as_dtype",
    "backend_for_device",
    "backend_of",
    "describe",
    "is_usable",
    "register_backend",
    "register_kernel",
]


@dataclass(frozen=True)
class _Lazy:
    """A backend that is made on first use, so that nobody pays for a library by not using it."""

    package: str  # the top-level package of the array class
    prefix: str
    module: str
    install: str


_LAZY = (
    _Lazy(
        "cupy",
        "cuda",
        "gpugrad.backend.cupy",
        "pip install 'gpugrad[cuda13]', or 'gpugrad[cuda12]' if the NVIDIA driver is older",
    ),
    _Lazy(
        "array_api_strict",
        "strict",
        "gpugrad.backend.strict",
        "pip install array-api-strict",
    ),
)

_registered: list[Backend] = []
_listeners: list[Callable[[], None]] = []


class _ByType(dict[type, Backend]):
    """Array class → backend; a class not met before is looked up by its bases."""

    def __missing__(self, cls: type) -> Backend:
        for base in cls.__mro__:
            for backend in _registered:
                if base in backend.types:
                    self[cls] = backend
                    return backend
            package = base.__module__.partition(".")[0]
            for lazy in _LAZY:
                if package == lazy.package:
                    backend = _load(lazy)
                    if issubclass(cls, backend.types):
                        self[cls] = backend
                        return backend
        raise DTypeError(
            f"{cls.__module__}.{cls.__qualname__} is not an array of a known library; convert it "
            "with gpugrad.tensor(), or add its library with gpugrad.register_backend()"
        )


#: The one look-up on the hot path: ``SPACES[type(array)]`` is the namespace ``m`` of the rules.
SPACES = _ByType()


def _load(lazy: _Lazy) -> Backend:
    try:
        backend: Backend = importlib.import_module(lazy.module).make()
    except ImportError as error:
        if (error.name or "").partition(".")[0] == lazy.package:
            raise DeviceError(
                f"{lazy.prefix}: {lazy.package} is not installed; {lazy.install}"
            ) from error
        raise DeviceError(
            f"{lazy.prefix}: {lazy.package} is installed but does not import: {error}"
        ) from error
    known = next((b for b in _registered if b.name == backend.name), None)
    return known or register_backend(backend)


def register_backend(backend: Backend) -> Backend:
    """Let tensors hold the arrays of one more library.

    Parameters
    ----------
    backend:
        An instance of :class:`gpugrad.backend.Backend` or of a subclass that fills in what the
        library does in its own way. Registering a second backend of the same name replaces the
        first.

    Returns
    -------
    The backend, so that the call can be the last line of a factory.
    """
    _registered[:] = [b for b in _registered if b.name != backend.name]
    _registered.append(backend)
    SPACES.clear()
    for forget in _listeners:
        forget()
    return backend


def register_kernel(device: str, operation: str, kernel: Kernel) -> None:
    """Let an operation run a kernel on the arrays of a device's library.

    Parameters
    ----------
    device:
        A device string: ``"cpu"`` for NumPy, ``"cuda"`` for CuPy.
    operation:
        The name of a primitive, or of a function made with :func:`gpugrad.fusible`.
    kernel:
        It is asked before the kernels that are there, and may refuse.

    >>> import gpugrad as gg
    >>> @gg.elementwise(partials=(lambda g: 3.0 * g,))
    ... def triple(m, x, /):
    ...     return 3.0 * x
    >>> gg.register_kernel("cpu", "triple", gg.Kernel(lambda m, x: x + x + x, "by sums"))
    >>> gg.explain(triple)(gg.tensor(2.0)).choices[0].implementation
    'by sums'
    """
    backend = backend_for_device(device)
    found = backend.slots.get(operation)
    if found is None:
        backend.slots = {**backend.slots, operation: Slot(operation, "", 0, [kernel])}
    else:
        found.add(kernel)
    vars(backend).pop(operation, None)  # a look-up that was kept
    for forget in _listeners:
        forget()


def bind(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of arrays, made to run on their device in every library that needs telling."""
    for backend in _registered:
        function = backend.bind(function)
    return function


def on_register(forget: Callable[[], None]) -> None:
    """Call ``forget`` whenever the set of backends changes, to drop what was looked up before."""
    _listeners.append(forget)


def backend_of(x: Any) -> Backend:
    """The backend that owns the array ``x``; DTypeError when no library claims it."""
    return SPACES[type(x)]


def is_array(x: Any) -> bool:
    """Whether some backend owns ``x``."""
    try:
        SPACES[type(x)]
    except DTypeError:
        return False
    return True


def backend_for_device(device: str) -> Backend:
    """The backend that a device string leads to.

    ``"cpu"`` is NumPy, ``"cuda"`` and ``"cuda:N"`` are CuPy on GPU N. Raises DeviceError for a
    string that names no backend, and for a device that cannot be used here (saying what is
    missing).
    """
    prefix = device.partition(":")[0] if isinstance(device, str) else device
    for backend in _registered:
        if backend.prefix == prefix:
            return backend
    for lazy in _LAZY:
        if lazy.prefix == prefix:
            return _load(lazy)
    known = dict.fromkeys(("cpu", "cuda", *(b.prefix for b in _registered)))
    raise DeviceError(
        f"no backend for device {device!r}; devices are strings such as "
        + ", ".join(map(repr, known))
    )


@dataclass(frozen=True)
class BackendInfo:
    """What :func:`describe` says of one array library.

    Attributes
    ----------
    name, prefix, version:
        The library, the first part of its device strings, and its version ("" when not known).
    devices:
        What it can compute on here.
    usable:
        Whether it can be used here.
    reason:
        Why not: what is missing, and how to get it.
    """

    name: str
    prefix: str
    version: str
    devices: tuple[DeviceInfo, ...]
    usable: bool
    reason: str = ""


def describe() -> list[BackendInfo]:
    """Every array library, its devices, and why it cannot be used where it cannot.

    Libraries that were not needed so far are imported and tried. Nothing is raised: a library that
    fails is described by its error.
    """
    problems: dict[str, tuple[str, str]] = {}
    for lazy in _LAZY:
        try:
            if not any(b.prefix == lazy.prefix for b in _registered):
                _load(lazy)
        except Exception as error:
            problems[lazy.package] = (lazy.prefix, str(error) or repr(error))
    found = []
    for backend in _registered:
        try:
            devices, reason = backend.describe_devices(), ""
        except Exception as error:
            devices, reason = (), f"{backend.prefix}: {error}"
        version = str(getattr(backend.xp, "__version__", ""))
        found.append(
            BackendInfo(backend.name, backend.prefix, version, devices, not reason, reason)
        )
    for package, (prefix, reason) in problems.items():
        version = str(getattr(sys.modules.get(package), "__version__", ""))
        found.append(BackendInfo(package, prefix, version, (), False, reason))
    return found


def is_usable(device: str) -> bool:
    """Whether tensors can be made on ``device`` here; :func:`describe` says why not.

    >>> from gpugrad.backend import is_usable
    >>> is_usable("cpu"), is_usable("abacus")
    (True, False)
    """
    try:
        backend_for_device(device).native_device(device)
    except DeviceError:
        return False
    return True


register_backend(NumpyBackend())
