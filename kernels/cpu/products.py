"""Matrix products of NumPy arrays, on the threads of the one pool.

What is computed by NumPy itself: dtypes other than float32 and float64, and everything where NumPy
has another BLAS than OpenBLAS. An operand none of whose axes is contiguous is copied. A result goes
straight into the array given for it, and is added to what that holds if so wanted.
"""

from __future__ import annotations

import math
import threading
from threading import RLock
from typing import Any

import numpy as np
from numba import types

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel, kernel_mode
from gpugrad.backend.scratch import empty
from gpugrad.backend.tape import call, gate, replayable
from gpugrad.errors import DTypeError, ParameterError, ShapeError
from gpugrad.kernels.cpu import pool
from gpugrad.kernels.cpu.compile import VECTOR
from gpugrad.kernels.cpu.direct import LARGEST
from gpugrad.kernels.cpu.gemm import GRAIN, available, gemm, many, one

__all__ = ["available", "gemm", "matmul"]

LABEL = "openblas, one pool"

Array = np.ndarray[Any, Any]

_compiling = RLock()


class _Compiled:
    """The products of one dtype, compiled once for all layouts: strides are read when they run."""

    def __init__(self, storage: str) -> None:
        pool.start()
        self._storage = storage
        self._launch: pool.Launch = many[storage]
        self._threaded = False
        self._room = types.Array(getattr(types, storage), 1, "C")
        self.one = self._fixed(one[storage], 2)
        self.alone = self._fixed(self._launch.alone, 4, types.int64, self._room)

    @property
    def many(self) -> pool.Launch:
        """Compiled for threads when the first large product comes."""
        if not self._threaded:
            with _compiling:
                if not self._threaded:
                    self._fixed(self._launch.threaded, 4, types.int64, self._room)
                    self._threaded = True
        return self._launch

    def _fixed(self, dispatcher: Any, axes: int, *more: Any) -> Any:
        real = getattr(types, self._storage)
        operand = types.Array(real, axes, "A", readonly=True, aligned=False)
        out = types.Array(real, axes, "A", aligned=False)
        dispatcher.compile((operand, operand, out, real, *more))
        dispatcher.disable_compile()
        return dispatcher


class _ByDtype(dict[Any, "_Compiled | None"]):
    def __missing__(self, dtype: Any) -> _Compiled | None:
        takes = dtype in (np.float32, np.float64) and dtype.isnative and available() is None
        with _compiling:
            if dtype not in self:
                self[dtype] = _Compiled(dtype.name) if takes else None
            return self[dtype]


_compiled = _ByDtype()


def matmul(
    a: Array,
    b: Array,
    /,
    out: Array | None = None,
    *,
    accumulate: bool = False,
) -> Array:
    """The product of two arrays, as `numpy.matmul` defines it.

    Parameters
    ----------
    a, b:
        Of at least one axis. Matrices lie in the last two; the axes before them broadcast.
    out:
        Where to put the result: an array of its shape and dtype, with any strides.
    accumulate:
        Add the product to what `out` holds.

    Returns
    -------
    `out`, or a new array. Arrays that are not both float32 or both float64 are left to NumPy.

    Raises ShapeError when the shapes do not fit, DTypeError for an `out` of another dtype.

    >>> import numpy as np
    >>> from gpugrad.kernels.cpu.products import matmul
    >>> total = np.ones((2, 2), np.float32)
    >>> matmul(np.eye(2, dtype=np.float32), total.copy(), total, accumulate=True)
    array([[2., 2.],
           [2., 2.]], dtype=float32)
    """
    compiled = _compiled[a.dtype]
    if compiled is None or a.dtype != b.dtype:
        return _by_numpy(a, b, out, accumulate)
    left, right = a.shape, b.shape
    if len(left) == 2 == len(right) and left[1] == right[0]:
        # The common case, without the general one's price.
        made = None
        if out is None:
            if not accumulate:
                made = np.empty((left[0], right[1]), a.dtype)
        elif out.shape == (left[0], right[1]) and out.dtype == a.dtype and out.flags.writeable:
            made = out
        if made is not None:
            beta = 1.0 if accumulate else 0.0
            if left[0] * left[1] * right[1] >= 2 * GRAIN:
                threads = pool.get_num_threads()
                run = compiled.many if threads > 1 else compiled.alone
                if not run(_stack(a), _stack(b), _stack(made), beta, threads, _room(b)):
                    return made
            elif not compiled.one(a, b, made, beta):
                return made
    return _general(compiled, a, b, out, accumulate)


def _stack(x: Array) -> Array:
    """A matrix as a batch of one."""
    return x[None, None]


class _Rooms(threading.local):
    """Memory of each thread for a matrix that is packed, kept: new pages cost more than packing."""

    def __init__(self) -> None:
        self.by_dtype = {np.dtype(name): empty((0,), name) for name in ("float32", "float64")}


_rooms = _Rooms()


def workspace(dtype: Any, size: int) -> Array:
    """At least so many elements that this thread may write to until it asks for them again."""
    have = _rooms.by_dtype[dtype]
    if have.size < size:
        have = _rooms.by_dtype[dtype] = empty((size,), dtype)
    return have


def _room(b: Array) -> Array:
    """Where a right operand may be packed, if its rows do not lie in a row."""
    if b.strides[-1] == b.itemsize or b.nbytes > LARGEST:
        return _rooms.by_dtype[b.dtype][:0]
    return workspace(b.dtype, b.shape[-2] * (b.shape[-1] + 2 * VECTOR))


def _general(
    compiled: _Compiled,
    a: Array,
    b: Array,
    out: Array | None,
    accumulate: bool,
) -> Array:
    """The same for any number of axes, any size and any layout."""
    shape, batch = _result_shape(a, b)
    given = _check_out(out, shape, a.dtype, accumulate)
    made = np.empty(shape, a.dtype) if given is None else given
    left = a if a.ndim > 1 else a[None]
    right = b if b.ndim > 1 else b[:, None]
    target = made if b.ndim > 1 else made[..., None]
    target = target if a.ndim > 1 else target[..., None, :]
    k = left.shape[-1]
    if target.size == 0 or k == 0:
        if not accumulate:
            target[...] = 0
    elif not _written(compiled, left, right, target, batch, accumulate):
        # BLAS cannot write there: no contiguous axis, or an operand lies in the same memory.
        fresh = _general(compiled, a, b, None, False)
        np.add(made, fresh, out=made) if accumulate else np.copyto(made, fresh)
    return made if made.ndim or given is not None else made[()]


def _written(
    compiled: _Compiled,
    a: Array,
    b: Array,
    out: Array,
    batch: tuple[int, ...],
    accumulate: bool,
) -> bool:
    """Put the product into `out`, if BLAS can write there. All arrays have two axes or more."""
    if b.ndim == 2 < a.ndim and a.flags.c_contiguous and out.flags.c_contiguous:
        # The rows of all the matrices on the left follow each other, as those of one.
        a, out, batch = a.reshape(-1, a.shape[-1]), out.reshape(-1, out.shape[-1]), ()
    if len(batch) > 2 and not out.flags.c_contiguous:
        return False
    work = out.size * a.shape[-1]
    threads = pool.get_num_threads() if work >= 2 * GRAIN else 1
    run = compiled.many if threads > 1 else compiled.alone
    more = (1.0 if accumulate else 0.0, threads, _room(b))
    left, right, target = (_four_axes(x, batch) for x in (a, b, out))
    found = run(left, right, target, *more)
    if 0 < found < 4:
        left = left.copy() if found & 1 else left
        right = right.copy() if found & 2 else right
        found = run(left, right, target, *more)
    return not found


def _four_axes(x: Array, batch: tuple[int, ...]) -> Array:
    """`x` with two axes for the batch, of length 1 where it is broadcast."""
    own = x.shape[:-2]
    if len(batch) <= 2:
        return x[(None,) * (2 - len(own))]
    own = (1,) * (len(batch) - len(own)) + own
    head = own[:-1]
    if head != batch[:-1] and math.prod(head) != 1:
        head = batch[:-1]
        x = np.broadcast_to(x, (*head, own[-1], *x.shape[-2:]))
    return x.reshape(math.prod(head), own[-1], *x.shape[-2:])


def _result_shape(a: Array, b: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of a product, and the part of it that counts matrices."""
    met = f"matmul: shapes {a.shape} and {b.shape}"
    if a.ndim == 0 or b.ndim == 0:
        raise ShapeError(f"{met}: a 0-d operand has no axis to sum over; multiply it instead")
    if a.shape[-1] != b.shape[max(b.ndim - 2, 0)]:
        raise ShapeError(
            f"{met} do not fit: {a.shape[-1]} columns meet {b.shape[max(b.ndim - 2, 0)]} rows"
        )
    one, other = a.shape[:-2], b.shape[:-2]
    if not all(p == q or p == 1 or q == 1 for p, q in zip(one[::-1], other[::-1])):
        raise ShapeError(f"{met} do not fit: the stacks {one} and {other} do not broadcast")
    batch = np.broadcast_shapes(one, other) if one and other else one or other
    return (*batch, *a.shape[-2:-1], *(b.shape[-1:] if b.ndim > 1 else ())), batch


def _check_out(
    out: Array | None, shape: tuple[int, ...], dtype: Any, accumulate: bool
) -> Array | None:
    if out is None:
        if accumulate:
            raise ParameterError("matmul: accumulate=True needs an array to add to; give it as out")
    elif out.shape != shape:
        raise ShapeError(f"matmul: out has shape {out.shape}, and the product {shape}")
    elif out.dtype != dtype:
        raise DTypeError(f"matmul: out holds {out.dtype}, and the product is {dtype}")
    elif not out.flags.writeable:
        raise ParameterError("matmul: out is read-only; give an array that can be written to")
    return out


def _by_numpy(a: Array, b: Array, out: Array | None, accumulate: bool) -> Array:
    """What compiled products do not take: other dtypes, and a NumPy with another BLAS."""
    if out is None:
        shape, _ = _result_shape(a, b)
        _check_out(None, shape, None, accumulate)
        made: Array = np.matmul(a, b)
    elif accumulate:
        made = np.add(out, np.matmul(a, b), out=out)
    else:
        made = np.matmul(a, b, out=out)
    return made


# -- the slot -------------------------------------------------------------------------------------


def refuse(m: Backend, a: Any, b: Any) -> str | None:
    """Why NumPy is the better choice for these operands."""
    for x in (a, b):
        if not isinstance(x, np.ndarray) or x.ndim == 0:
            return f"a {type(x).__name__} without axes among the operands"
    if a.dtype != b.dtype:
        return f"operands of {a.dtype} and {b.dtype}"
    if _compiled[a.dtype] is None:
        return available() or f"no products for {a.dtype}"
    if a.size * b.shape[-1] < 2 * GRAIN and kernel_mode() != "require":
        return "so few multiply-adds that NumPy is as quick"
    return None


@replayable
def _run(m: Backend, a: Array, b: Array) -> Array:
    if not gate:
        return matmul(a, b)
    out = np.empty(_result_shape(a, b)[0], a.dtype)
    call(matmul, a, b, out)
    return out


def _refuse_into(m: Backend, a: Any, b: Any, out: Any) -> str | None:
    return refuse(m, a, b)


def _run_into(m: Backend, a: Array, b: Array, out: Array) -> Array:
    return matmul(a, b, out=out)


KERNELS = {
    "matmul": Kernel(_run, LABEL, refuse),
    "matmul_into": Kernel(_run_into, LABEL, _refuse_into),
}
