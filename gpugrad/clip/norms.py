"""The norm of many arrays taken as one vector, on their device.

Three reductions of one array are made for kernels to take their places: `sum_of_squares`, `max_abs`
and `nonfinite_count`. Everything else is a few operations on what they return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gpugrad.backend import SPACES, Array, Backend, backend_for_device
from gpugrad.backend.kernels import fusible
from gpugrad.clip.checks import check_norm_type
from gpugrad.clip.rows import rows_of
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.errors import DeviceError, DTypeError

__all__ = [
    "cast",
    "check_one_place",
    "max_abs",
    "nonfinite_count",
    "norm_dtype",
    "norm_of",
    "norm_over",
    "scalar_tensor",
    "sum_of_squares",
    "total_norm",
    "unit_norms",
    "widen",
]

#: More than `FEW` arrays of at most `SMALL` elements are put into a row before they are reduced.
SMALL, FEW = 1024, 8

#: Squares that are added up in one go: more of them would wear single precision down.
BLOCK = 8192


def total_norm(tensors: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all elements of all tensors taken as one vector, as a 0-d tensor.

    Nothing is read from the device, and the same tensors give the same bits on every run. Powers
    neither overflow nor vanish where the norm itself does not. The norm of no tensors is 0; one NaN
    among the elements makes it NaN.

    Parameters
    ----------
    tensors:
        Of any shapes, real or complex, all on one device.
    norm_type:
        Any number from 0.5 on, or infinity for the greatest magnitude.

    Returns
    -------
    A tensor of the widest of their dtypes, and float32 at least.

    Raises
    ------
    ParameterError
        For another order.
    DTypeError
        For integers and booleans.
    DeviceError
        When the tensors are in different places.

    >>> import gpugrad as gg
    >>> total_norm([gg.tensor([3.0]), gg.tensor([[0.0, 4.0]])])
    tensor(5.)
    """
    p = check_norm_type(norm_type)
    arrays = [x.data for x in tensors]
    if not arrays:
        return tensor_of(backend_for_device("cpu").asarray(0.0, dtype="float32"))
    check_one_place(arrays)
    # What lies between parts of a buffer is zero, and changes no norm.
    rows, alone = rows_of(arrays)
    if rows:
        runs = [run for row in rows for run in row.arrays()]
        arrays = runs + [arrays[i] for i in alone]
    kind = type(arrays[0])
    return scalar_tensor(norm_of(SPACES[kind], arrays, p), kind)


def norm_of(m: Backend, arrays: Sequence[Array], p: float = 2.0) -> Array:
    """:func:`total_norm` of raw arrays of one library: a 0-d array. There must be one at least."""
    return m.bind(_norm_of)(m, list(arrays), p)  # a list: where its arrays are, it runs


@np.errstate(all="ignore")  # a norm that overflows is handled, or is what the caller asked for
def _norm_of(m: Backend, arrays: list[Array], p: float) -> Array:
    name = max((norm_dtype(m, x) for x in arrays), key=("float32", "float64").index)
    dtype = m.dtype(name)
    filled = _together(m, [x for x in arrays if math.prod(x.shape)])
    if not filled:
        return cast(m, m.sum(widen(m, arrays[0])), dtype)
    if p == math.inf:
        return cast(m, _gather(m, m.max, [max_abs(m, x) for x in filled]), dtype)
    if p == 1:
        return cast(m, _gather(m, m.sum, [m.sum(m.abs(widen(m, x))) for x in filled]), dtype)
    if p != 2:
        return cast(m, _norm_of_norms(m, filled, p), dtype)

    squares = [sum_of_squares(m, x) for x in filled]
    total = _gather(m, m.sum, squares)
    if min(m.numpy_dtype(s).itemsize for s in squares) > np.dtype(name).itemsize:
        return cast(m, m.sqrt(total), dtype)
    return _root(m, cast(m, total, dtype), lambda: cast(m, _norm_of_norms(m, filled, p), dtype))


def _root(m: Backend, squares: Array, again: Callable[[], Array]) -> Array:
    """The roots of sums of squares; of those at the ends of the range, what `again` computes."""
    limits = np.finfo(m.numpy_dtype(squares))
    exact = (squares >= float(limits.smallest_normal / limits.eps)) & (squares < math.inf)
    # In host memory a look at the sums costs nothing; elsewhere it would be a wait, so both are
    # there to select from.
    if isinstance(squares, np.ndarray | np.generic):
        return m.sqrt(squares) if exact.all() else again()
    return m.where(exact, m.sqrt(squares), again())


def unit_norms(m: Backend, x: Array) -> Array:
    """The norm of each element of the first axis over all the others, which keep a length of 1.

    Of an array with fewer than two axes, its norm.
    """
    if len(x.shape) < 2:
        return _norm_of(m, [x], 2)
    wide = widen(m, x)
    rows = m.reshape(wide, (x.shape[0], -1))
    squares = m.reshape(m.vecdot(rows, rows), (x.shape[0],) + (1,) * (len(x.shape) - 1))
    axes = tuple(range(1, len(x.shape)))
    return _root(m, squares, lambda: norm_over(m, wide, 2, axes, keepdims=True))


def _together(m: Backend, arrays: list[Array]) -> list[Array]:
    """The arrays, many small ones as one: their number would cost more than their elements."""
    found: list[Array] = []
    small: dict[Any, list[Array]] = {}
    for x in arrays:
        if math.prod(x.shape) > SMALL:
            found.append(x)
        else:
            small.setdefault(x.dtype, []).append(x)
    for alike in small.values():
        if len(alike) > FEW:
            alike = [m.concat([m.reshape(x, (-1,)) for x in alike])]
        found += alike
    return found


def _norm_of_norms(m: Backend, arrays: list[Array], p: float) -> Array:
    return _gather(m, lambda norms: norm_over(m, norms, p), [norm_over(m, x, p) for x in arrays])


def _gather(m: Backend, combine: Callable[[Array], Array], parts: list[Array]) -> Array:
    """One number of several; the stack promotes, so float32 and float64 give float64."""
    return parts[0] if len(parts) == 1 else combine(m.stack(parts))


def norm_over(
    m: Backend, x: Array, p: float, axes: tuple[int, ...] | None = None, keepdims: bool = False
) -> Array:
    """The norm over some axes, of magnitudes divided by their greatest.

    So no power overflows, and none that counts vanishes.
    """
    size = m.abs(widen(m, x))
    top = m.max(size, axis=axes, keepdims=True)
    # By its root, twice: libraries that multiply by the reciprocal may flush that of `top` to zero.
    root = m.sqrt(m.where((top > 0) & (top < math.inf), top, m.ones_like(top)))
    share = size / root / root
    total = m.sum(share * share if p == 2 else share**p, axis=axes, keepdims=keepdims)
    root = root if keepdims else m.reshape(root, total.shape)
    return root * (m.sqrt(total) if p == 2 else total ** (1 / p)) * root


# -- one array -------------------------------------------------------------------------------------


@fusible
def sum_of_squares(m: Backend, x: Array, /) -> Array:
    """Σ|x|², a 0-d array of float32 at least.

    A kernel for narrower elements that returns float64 promises that the sum neither overflows nor
    vanishes: the norm then needs no second look.
    """
    flat = m.reshape(widen(m, x), (-1,))
    n = math.prod(flat.shape)
    if n <= BLOCK:
        return m.vecdot(flat, flat)  # one pass, nothing allocated
    rows = m.reshape(flat[: n - n % BLOCK], (-1, BLOCK))
    rest = flat[n - n % BLOCK :]
    return m.sum(m.vecdot(rows, rows)) + m.vecdot(rest, rest)


@fusible
def max_abs(m: Backend, x: Array, /) -> Array:
    """The greatest |x|, a 0-d array of float32 at least; NaN if there is one. 0 of no elements."""
    if not math.prod(x.shape):
        return m.sum(widen(m, x))
    wide = widen(m, x)
    return m.maximum(m.max(wide), -m.min(wide))


@fusible
def nonfinite_count(m: Backend, x: Array, /) -> Array:
    """How many elements are NaN or infinite, a 0-d array of integers."""
    return m.sum(m.astype(~m.isfinite(widen(m, x)), m.dtype("int32")))


def norm_dtype(m: Backend, x: Array) -> str:
    """The dtype that the norm of an array is computed and returned in; DTypeError for integers."""
    dtype = m.numpy_dtype(x)
    if dtype.kind not in "fcV" or dtype.names:  # bfloat16 is of kind V
        raise DTypeError(
            f"total_norm: {dtype} has no norm to clip by; convert the tensor with .to('float32')"
        )
    return "float64" if dtype.itemsize > (8 if dtype.kind == "c" else 4) else "float32"


def widen(m: Backend, x: Array) -> Array:
    """`x` as real numbers of four bytes at least: magnitudes of complex ones, half ones as float32.

    >>> from gpugrad.backend import backend_of
    >>> import numpy as np
    >>> x = np.array([3 + 4j, 1])
    >>> widen(backend_of(x), x).tolist()
    [5.0, 1.0]
    """
    dtype = m.numpy_dtype(x)
    if dtype.kind == "c":
        return m.abs(x)
    return m.astype(x, m.dtype("float32")) if dtype.itemsize < 4 else x


def cast(m: Backend, x: Array, dtype: Any) -> Array:
    """A 0-d array of the library's `dtype`, also of what NumPy returns for one."""
    return x if x.dtype == dtype else m.astype(m.asarray(x), dtype)


# -- between tensors and arrays --------------------------------------------------------------------


def check_one_place(arrays: Sequence[Array]) -> None:
    """Raise DeviceError unless all arrays belong to one library and are on one device."""
    places = {(SPACES[type(x)].name, SPACES[type(x)].device(x)) for x in arrays}
    if len(places) > 1:
        met = ", ".join(f"{name} on {device}" for name, device in sorted(places))
        raise DeviceError(
            f"total_norm: tensors live in different places ({met}); take the norm of each place's "
            "own tensors, bring the norms together with .to(device), and take the norm of those"
        )


def scalar_tensor(y: Array, kind: type) -> Tensor:
    """A 0-d tensor of `y`, an array of a kind or what a library returns in the place of one."""
    return tensor_of(y if type(y) is kind else SPACES[kind].asarray(y))
