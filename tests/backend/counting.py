"""An array library without a GPU that behaves as one does: nothing reaches the host unnoticed.

Its arrays hide a NumPy array. They refuse every implicit conversion, where CuPy would wait for the
GPU without a word, and the library counts what a GPU program pays for: kernel launches, uploads,
and host reads through the one official door, ``Backend.to_host``.

>>> import gpugrad as gg
>>> from tests.backend.counting import counting
>>> with counting() as counts:
...     x = gg.tensor([1.0, 2.0], device="counting", requires_grad=True)
...     (x * x).sum().backward()
...     counts.host_reads
0
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar, NoReturn

import numpy as np

import gpugrad.backend as backends
from gpugrad.backend.base import Backend
from gpugrad.backend.numpy import NumpyBackend

#: Functions that only look at memory in another way: no kernel runs.
VIEWS = frozenset(
    ("broadcast_arrays", "broadcast_to", "expand_dims", "flip", "matrix_transpose", "moveaxis",
     "permute_dims", "reshape", "squeeze", "swapaxes", "transpose", "unstack")
)  # fmt: skip

_numpy = NumpyBackend()


class Array:
    """An array on no host: it has operators and a shape, and no way out."""

    __slots__ = ("__weakref__", "_host")
    __array_ufunc__ = None
    library: ClassVar[Library]

    def __init__(self, host: np.ndarray) -> None:
        self._host = host

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("implicit conversion of a device array to the host is not allowed")

    __array__ = __bool__ = __int__ = __float__ = __complex__ = __index__ = _refuse
    __iter__ = __contains__ = item = tolist = _refuse
    __hash__ = object.__hash__

    shape = property(lambda self: self._host.shape)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    dtype = property(lambda self: self._host.dtype)

    @property
    def T(self) -> Array:
        return self.library.wrap(self._host.T)

    @property
    def mT(self) -> Array:
        return self.library.wrap(self._host.mT)

    def __len__(self) -> int:
        return len(self._host)

    def __repr__(self) -> str:
        return f"<array {self.dtype}{list(self.shape)} on a device>"

    def __getitem__(self, index: Any) -> Array:
        return self.library.launch("getitem", operator.getitem, self, self.library.upload(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.library.launch("setitem", operator.setitem, self, self.library.upload(index), value)


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_BITWISE = ("and_", "or_", "xor", "lshift", "rshift")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def _binary(name: str) -> None:
    function = getattr(operator, name)

    def forward(self: Array, other: Any) -> Any:
        return self.library.launch(name, function, self, other)

    def reflected(self: Array, other: Any) -> Any:
        return self.library.launch(name, function, other, self)

    def inplace(self: Array, other: Any) -> Array:
        self.library.launch(name, lambda x, y: getattr(operator, f"i{name}")(x, y), self, other)
        return self

    bare = name.rstrip("_")
    setattr(Array, f"__{bare}__", forward)
    if name not in _COMPARISONS:
        setattr(Array, f"__r{bare}__", reflected)
        if bare not in ("and", "or"):
            setattr(Array, f"__i{bare}__", inplace)


for _name in (*_ARITHMETIC, *_BITWISE, *_COMPARISONS):
    _binary(_name)
for _name in ("neg", "pos", "abs", "invert"):

    def _unary(self: Array, _name: str = _name) -> Any:
        return self.library.launch(_name, getattr(operator, _name), self)

    setattr(Array, f"__{_name}__", _unary)


class Library:
    """NumPy's namespace over :class:`Array`, with counters."""

    __version__ = np.__version__

    def __init__(self, part: Any = np, array: type[Array] = Array, root: Library | None = None):
        self._part = part
        self._array = array
        self._root = root or self
        self.clear()

    def clear(self) -> None:
        """Set every counter to zero."""
        self.host_reads = self.uploads = self.launches = 0
        self.names: Counter[str] = Counter()

    def wrap(self, value: Any) -> Any:
        if isinstance(value, np.ndarray | np.generic):
            return self._array(np.asarray(value))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.wrap, value))
        if isinstance(value, list | tuple):
            return type(value)(map(self.wrap, value))
        return value

    def unwrap(self, value: Any) -> Any:
        if isinstance(value, Array):
            return value._host
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError(f"unsupported type {type(value)}: a NumPy array beside a device array")
        if isinstance(value, list | tuple):
            return type(value)(map(self.unwrap, value))
        return value

    def upload(self, index: Any) -> Any:
        """An index with its NumPy arrays sent to the device, which device libraries do too."""
        if isinstance(index, tuple):
            return tuple(map(self.upload, index))
        if isinstance(index, list | np.ndarray):
            self._root.uploads += 1
            return self.wrap(np.asarray(index))
        return index

    def launch(self, name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        raw = [self.unwrap(a) for a in args]
        options = {k: self.unwrap(v) for k, v in kwargs.items()}
        root = self._root
        root.names[name] += 1
        if name not in VIEWS and not (name == "getitem" and backends.base.is_basic(args[1])):
            root.launches += 1
        return root.wrap(function(*raw, **options))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        if isinstance(value, ModuleType):  # linalg, fft
            return Library(value, self._array, self._root)
        if not callable(value) or isinstance(value, type):
            return value
        return lambda *args, **kwargs: self._root.launch(name, value, *args, **kwargs)


class CountingBackend(Backend):
    """The backend of a :class:`Library`."""

    def __init__(self) -> None:
        self.counts = Array.library = Library()
        super().__init__("counting", self.counts, "counting", (Array,))

    def find_dtype(self, dtype: Any) -> Any:
        return np.dtype(dtype)

    def numpy_dtype(self, x: Any) -> Any:
        return x.dtype

    def asarray(self, data: Any, dtype: Any = None, device: Any = None, copy: Any = None) -> Any:
        if not isinstance(data, Array):
            self.counts.uploads += 1
            return Array(np.array(data, dtype=dtype))
        if copy or (dtype is not None and np.dtype(dtype) != data.dtype):
            self.counts.launches += 1
        return Array(np.array(data._host, dtype=dtype, copy=copy))

    def create(
        self, name: str, *args: Any, dtype: Any = None, device: Any = None, **kw: Any
    ) -> Any:
        return getattr(self.counts, name)(*args, dtype=dtype, **kw)

    def to_host(self, x: Any) -> np.ndarray:
        self.counts.host_reads += 1
        return x._host.copy()  # type: ignore[no-any-return]

    def storage(self, x: Any) -> Any:
        return _numpy.storage(x._host)

    def is_view(self, x: Any) -> bool:
        return _numpy.is_view(x._host)

    def scatter_add(self, g: Any, index: Any, shape: tuple[int, ...]) -> Any:
        index = self.counts.upload(index)
        return self.counts.launch("scatter_add", _numpy.scatter_add, g, index, shape)

    def scatter_add_along_axis(self, g: Any, indices: Any, shape: Any, axis: int) -> Any:
        return self.counts.launch(
            "scatter_add_along_axis", _numpy.scatter_add_along_axis, g, indices, shape, axis
        )

    def erf(self, x: Any) -> Any:
        return self.counts.launch("erf", _numpy.erf, x)


def forget_backend(name: str) -> None:
    """Take a registered backend away again."""
    backends._registered[:] = [b for b in backends._registered if b.name != name]
    backends.SPACES.clear()
    for drop in backends._listeners:
        drop()


@contextmanager
def counting() -> Iterator[Library]:
    """Device ``"counting"`` for the length of a ``with`` block; its counters."""
    backend = CountingBackend()
    backends.register_backend(backend)
    try:
        yield backend.counts
    finally:
        forget_backend(backend.name)
