"""Reductions: sums, means, extremes, products, and their running versions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.core.primitive import linear, primitive, sample
from gpugrad.ops.manipulation import along
from gpugrad.ops.samples import distinct, normal, positive

__all__ = [
    "all",
    "any",
    "argmax",
    "argmin",
    "count_nonzero",
    "cumulative_prod",
    "cumulative_sum",
    "logsumexp",
    "max",
    "mean",
    "min",
    "prod",
    "std",
    "sum",
    "var",
]

Axis = int | tuple[int, ...] | None

# The names of this module shadow Python's; nothing below uses those.


def _several(axis: Any) -> Any:
    return axis if isinstance(axis, tuple | list) else (axis,)


def kept_shape(shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """The shape that a reduction over ``axis`` leaves when it keeps the axes."""
    if axis is None:
        return (1,) * len(shape)
    ndim = len(shape)
    gone = {a % ndim for a in _several(axis)}
    return tuple(1 if i in gone else n for i, n in enumerate(shape))


def reduced_size(shape: tuple[int, ...], axis: Axis) -> int:
    """How many elements go into each element of the result."""
    if axis is None:
        return math.prod(shape)
    return math.prod(shape[a] for a in _several(axis))


def _keep(y: Array, m: Backend, x_shape: tuple[int, ...], axis: Axis, keepdims: bool) -> Array:
    """A reduced array with the axes put back, at length one."""
    return y if keepdims else m.reshape(y, kept_shape(x_shape, axis))


def _in_float32(
    m: Backend, x: Array, compute: Callable[[Array], Array], asked: Any = None
) -> Array:
    """``compute(x)``, in float32 for two-byte floats unless another dtype was asked for."""
    dtype = m.numpy_dtype(x)
    if asked is not None or dtype.itemsize != 2 or dtype.kind in "iu":
        return compute(x)
    return m.astype(compute(m.astype(x, m.dtype("float32"))), x.dtype)


def counting_dtype(m: Any, x: Array) -> Any:
    """The dtype to count elements of ``x`` in: its own, or float32 where that has two bytes."""
    return m.dtype("float32") if getattr(x.dtype, "itemsize", 8) == 2 else x.dtype


_AXES: list[dict[str, Any]] = [
    {},
    {"axis": 1},
    {"axis": -1, "keepdims": True},
    {"axis": (0, 2)},
    {"axis": (), "keepdims": True},
]


def _samples(make: Callable[..., Any] = normal) -> list[Any]:
    return [*(sample(make((2, 3, 4)), **kw) for kw in _AXES), sample(make(()), note="0-d")]


# -- sums -----------------------------------------------------------------------------------------


def _sum_transpose(
    g: Array, m: Backend, x_shape: tuple[int, ...], x_dtype: Any, axis: Axis, dtype: Any,
    keepdims: bool,
) -> Array:  # fmt: skip
    if dtype is not None:
        g = m.astype(g, x_dtype)
    return m.broadcast_to(_keep(g, m, x_shape, axis, keepdims), x_shape)


@linear(
    transpose=_sum_transpose,
    samples=lambda: [
        *_samples(),
        sample(normal((2, 3)), axis=0, dtype="float64"),
        sample(normal((0, 3)), axis=0, note="nothing to add up"),
    ],
)
def sum(
    m: Backend, x: Array, /, axis: Axis = None, dtype: Any = None, keepdims: bool = False
) -> Array:
    """The sum of the elements along ``axis``: an integer, several, or by default all.

    Half precision is added up in float32. Booleans and small integers are added up as int64, as in
    NumPy; ``dtype`` asks for another dtype.

    >>> import gpugrad as gg
    >>> gg.sum(gg.asarray([[1.0, 2.0], [3.0, 4.0]]), axis=0)
    tensor([4., 6.])
    """
    kw = {"axis": axis, "dtype": m.dtype(dtype), "keepdims": keepdims}
    return _in_float32(m, x, lambda x: m.sum(x, **kw), dtype)


def _mean(m: Backend, x: Array, axis: Axis, keepdims: bool) -> Array:
    return m.sum(x, axis=axis, keepdims=keepdims) / reduced_size(x.shape, axis)


def _mean_transpose(
    g: Array, m: Backend, x_shape: tuple[int, ...], x_dtype: Any, axis: Axis, keepdims: bool
) -> Array:
    n = reduced_size(x_shape, axis) or 1
    wide = counting_dtype(m, g)  # a half cannot hold a large n
    g = g / n if wide == g.dtype else m.astype(m.astype(g, wide) / n, x_dtype)
    return m.broadcast_to(_keep(g, m, x_shape, axis, keepdims), x_shape)


@linear(
    transpose=_mean_transpose,
    samples=_samples,
)
def mean(m: Backend, x: Array, /, axis: Axis = None, keepdims: bool = False) -> Array:
    """The arithmetic mean of the elements along ``axis``; in float32 inside for half precision.

    >>> import gpugrad as gg
    >>> gg.mean(gg.asarray([[1.0, 2.0], [3.0, 4.0]]), axis=1)
    tensor([1.5, 3.5])
    """
    return _in_float32(m, x, lambda x: _mean(m, x, axis, keepdims))


def _var(m: Backend, x: Array, axis: Axis, correction: float, keepdims: bool) -> Array:
    d = x - _mean(m, x, axis, True)
    n = reduced_size(x.shape, axis) - correction
    return m.sum(d * d, axis=axis, keepdims=keepdims) / (n if n > 0 else 0)


@fusible
def var_backward(
    m: Any, x: Array, g: Array, axis: Axis, correction: float, keepdims: bool
) -> Array:
    """The gradient of the operand of :func:`var`."""
    n = reduced_size(x.shape, axis) - correction
    d: Array = x - m.mean(x, axis=axis, keepdims=True)
    return _keep(g, m, x.shape, axis, keepdims) * d * (2 / n if n > 0 else math.nan)


def _var_vjp(
    g: Array, m: Backend, x: Array, axis: Axis, correction: float, keepdims: bool
) -> Array:
    return var_backward(m, x, g, axis, correction, keepdims)


def _numpy_var(x: Any, axis: Axis = None, correction: float = 0, keepdims: bool = False) -> Any:
    return np.var(x, axis=axis, ddof=correction, keepdims=keepdims)


@primitive(
    vjps=(_var_vjp,),
    samples=lambda: [*_samples(), sample(normal((2, 3)), axis=1, correction=1)],
    reference=_numpy_var,
)
def var(
    m: Backend, x: Array, /, axis: Axis = None, correction: float = 0, keepdims: bool = False
) -> Array:
    """The variance of the elements along ``axis``.

    The squared distances from the mean, added up and divided by their number minus ``correction``:
    0 for the population variance (the default, as in NumPy), 1 for the unbiased estimate.

    >>> import gpugrad as gg
    >>> gg.var(gg.asarray([1.0, 2.0, 3.0]), correction=1)
    tensor(1.)
    """
    return _in_float32(m, x, lambda x: _var(m, x, axis, correction, keepdims))


def _std_vjp(
    g: Array, m: Backend, x: Array, y: Array, axis: Axis, correction: float, keepdims: bool
) -> Array:
    g = m.where(y == 0, 0.0, g / (2 * m.where(y == 0, 1.0, y)))
    return _var_vjp(g, m, x, axis, correction, keepdims)


@primitive(
    vjps=(_std_vjp,),
    samples=lambda: [
        *(sample(normal((2, 3, 4)), **kw) for kw in _AXES[:-1]),
        sample(normal((2, 3)), axis=1, correction=1),
        sample(np.ones((2, 3)), smooth=False, note="the derivative is taken as 0 where std is 0"),
    ],
    reference=lambda *args, **kw: np.sqrt(_numpy_var(*args, **kw)),
)
def std(
    m: Backend, x: Array, /, axis: Axis = None, correction: float = 0, keepdims: bool = False
) -> Array:
    """The standard deviation of the elements along ``axis``: the square root of :func:`var`.

    Where it is zero its derivative, which does not exist, is taken as zero.

    >>> import gpugrad as gg
    >>> gg.std(gg.asarray([1.0, 3.0]))
    tensor(1.)
    """
    return _in_float32(m, x, lambda x: m.sqrt(_var(m, x, axis, correction, keepdims)))


# -- extremes ------------------------------------------------------------------------------------


def _extreme_vjp(g: Array, m: Backend, x: Array, y: Array, axis: Axis, keepdims: bool) -> Array:
    return extreme_backward(m, x, y, g, axis, keepdims)


@fusible
def extreme_backward(m: Any, x: Array, y: Array, g: Array, axis: Axis, keepdims: bool) -> Array:
    """The gradient in equal shares to all elements that are the extreme; a NaN is the extreme."""
    chosen = (x == _keep(y, m, x.shape, axis, keepdims)) | (x != x)
    chosen = m.astype(chosen, counting_dtype(m, x))
    share: Array = chosen / m.sum(chosen, axis=axis, keepdims=True)
    return _keep(g, m, x.shape, axis, keepdims) * share


_TIES = sample([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]], axis=1, smooth=False, note="ties share equally")


@primitive(
    vjps=(_extreme_vjp,),
    native="max",
    samples=lambda: [*_samples(distinct), _TIES],
)
def max(m: Backend, x: Array, /, axis: Axis = None, keepdims: bool = False) -> Array:
    """The largest of the elements along ``axis``.

    NaN if there is one among them. The gradient goes to the largest element; elements that are
    equally large share it equally. Raises ShapeError when there is no element.

    >>> import gpugrad as gg
    >>> gg.max(gg.asarray([[1.0, 5.0], [3.0, 2.0]]), axis=1)
    tensor([5., 3.])
    """
    ...


@primitive(
    vjps=(_extreme_vjp,),
    native="min",
    samples=lambda: [*_samples(distinct), _TIES],
)
def min(m: Backend, x: Array, /, axis: Axis = None, keepdims: bool = False) -> Array:
    """The smallest of the elements along ``axis``.

    NaN if there is one among them. The gradient goes to the smallest element; elements that are
    equally small share it equally. Raises ShapeError when there is no element.

    >>> import gpugrad as gg
    >>> gg.min(gg.asarray([[1.0, 5.0], [3.0, 2.0]]), axis=1)
    tensor([1., 2.])
    """
    ...


@primitive(
    native="argmax",
    samples=lambda: [
        sample(distinct((2, 3)), smooth=False),
        sample(distinct((2, 3)), axis=-1, keepdims=True, smooth=False),
    ],
)
def argmax(m: Backend, x: Array, /, axis: int | None = None, keepdims: bool = False) -> Array:
    """Where the largest element along ``axis`` is; the first place when there are several.

    By default the place in the flattened array.

    >>> import gpugrad as gg
    >>> gg.argmax(gg.asarray([1.0, 5.0, 3.0]))
    tensor(1)
    """
    ...


@primitive(
    native="argmin",
    samples=lambda: [
        sample(distinct((2, 3)), smooth=False),
        sample(distinct((2, 3)), axis=-1, keepdims=True, smooth=False),
    ],
)
def argmin(m: Backend, x: Array, /, axis: int | None = None, keepdims: bool = False) -> Array:
    """Where the smallest element along ``axis`` is; the first place when there are several.

    By default the place in the flattened array.

    >>> import gpugrad as gg
    >>> gg.argmin(gg.asarray([4.0, 5.0, 3.0]))
    tensor(2)
    """
    ...


# -- products -------------------------------------------------------------------------------------


def _others(x: Array, m: Backend) -> Array:
    """For each element along the last axis, the product of all the others.

    Elements are multiplied in pairs: the others of an element are its partner and the others of
    its pair. Nothing is divided, so that zeros, one or several, make no exception at any order.
    """
    n = x.shape[-1]
    if n < 2:
        return m.ones_like(x)
    half = n // 2
    parts = [m.getitem(x, (..., slice(i * half, (i + 1) * half))) for i in (0, 1)]
    rest = [m.getitem(x, (..., slice(2 * half, n)))] * (n % 2)
    outside = _others(m.concat([parts[0] * parts[1], *rest], axis=-1), m)
    pairs = m.getitem(outside, (..., slice(0, half)))
    single = [m.getitem(outside, (..., slice(half, None)))] * (n % 2)
    return m.concat([pairs * parts[1], pairs * parts[0], *single], axis=-1)


def _prod_vjp(g: Array, m: Backend, x: Array, axis: Axis, dtype: Any, keepdims: bool) -> Array:
    if dtype is not None:
        g = m.astype(g, x.dtype)
    ndim = x.ndim
    gone = range(ndim) if axis is None else _several(axis)
    last = tuple(a % ndim for a in gone)
    order = (*(a for a in range(ndim) if a not in last), *last)
    moved = m.permute_dims(x, order)
    flat = (*moved.shape[: ndim - len(last)], reduced_size(x.shape, axis))
    others = m.reshape(_others(m.reshape(moved, flat), m), moved.shape)
    back = tuple(sorted(range(ndim), key=order.__getitem__))
    return _keep(g, m, x.shape, axis, keepdims) * m.permute_dims(others, back)


@primitive(
    vjps=(_prod_vjp,),
    samples=lambda: [
        *_samples(positive),
        sample([[0.0, 2.0, 3.0], [0.0, 0.0, 3.0]], axis=1, note="zeros"),
        sample(positive((2, 3)), axis=0, dtype="float64"),
    ],
)
def prod(
    m: Backend, x: Array, /, axis: Axis = None, dtype: Any = None, keepdims: bool = False
) -> Array:
    """The product of the elements along ``axis``; in float32 inside for half precision.

    The derivative is exact where elements are zero, and so are its derivatives.

    >>> import gpugrad as gg
    >>> x = gg.tensor([0.0, 2.0, 3.0], requires_grad=True)
    >>> gg.prod(x).backward()
    >>> x.grad
    tensor([6., 0., 0.])
    """
    kw = {"axis": axis, "dtype": m.dtype(dtype), "keepdims": keepdims}
    return _in_float32(m, x, lambda x: m.prod(x, **kw), dtype)


# -- truth and counting ---------------------------------------------------------------------------


@primitive(
    native="any",
    samples=lambda: [
        sample([[False, True], [False, False]], smooth=False),
        sample([[False, True], [False, False]], axis=1, smooth=False),
    ],
)
def any(m: Backend, x: Array, /, axis: Axis = None, keepdims: bool = False) -> Array:
    """Whether any element along ``axis`` is true (for numbers: not zero).

    >>> import gpugrad as gg
    >>> gg.any(gg.asarray([[False, True], [False, False]]), axis=1)
    tensor([ True, False])
    """
    ...


@primitive(
    native="all",
    samples=lambda: [
        sample([[True, True], [False, True]], smooth=False),
        sample([[True, True], [False, True]], axis=1, keepdims=True, smooth=False),
    ],
)
def all(m: Backend, x: Array, /, axis: Axis = None, keepdims: bool = False) -> Array:
    """Whether all elements along ``axis`` are true (for numbers: not zero).

    >>> import gpugrad as gg
    >>> gg.all(gg.asarray([[True, True], [False, True]]), axis=1)
    tensor([ True, False])
    """
    ...


@primitive(
    samples=lambda: [
        sample([[0.0, 1.0], [2.0, 3.0]], smooth=False),
        sample([[0.0, 1.0], [2.0, 3.0]], axis=0, keepdims=True, smooth=False),
    ],
)
def count_nonzero(m: Backend, x: Array, /, axis: Axis = None, keepdims: bool = False) -> Array:
    """How many elements along ``axis`` are not zero.

    >>> import gpugrad as gg
    >>> gg.count_nonzero(gg.asarray([0, 1, 0, 2]))
    tensor(2)
    """
    return m.sum(m.astype(x != 0, m.dtype("int64")), axis=axis, keepdims=keepdims)


# -- log of a sum of exponentials -----------------------------------------------------------------


def _finite(y: Array, m: Backend) -> Array:
    return m.where(m.isfinite(y), y, 0.0)


def _logsumexp(m: Backend, x: Array, axis: Axis, keepdims: bool) -> Array:
    shift = _finite(m.max(x, axis=axis, keepdims=True), m)
    total = m.sum(m.exp(x - shift), axis=axis, keepdims=keepdims)
    empty = total == 0
    y = m.log(m.where(empty, 1.0, total)) + (shift if keepdims else m.reshape(shift, total.shape))
    return m.where(empty, -math.inf, y)


def _logsumexp_vjp(g: Array, m: Backend, x: Array, y: Array, axis: Axis, keepdims: bool) -> Array:
    return logsumexp_backward(m, x, y, g, axis, keepdims)


@fusible
def logsumexp_backward(m: Any, x: Array, y: Array, g: Array, axis: Axis, keepdims: bool) -> Array:
    """The gradient of the operand of :func:`logsumexp`."""
    inside: Array = m.exp(x - _keep(_finite(y, m), m, x.shape, axis, keepdims))
    return _keep(g, m, x.shape, axis, keepdims) * inside


def _numpy_logsumexp(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    x = np.asarray(x)
    with np.errstate(divide="ignore"):
        y = np.log(np.sum(np.exp(x), axis=axis, keepdims=keepdims))
    return np.asarray(y)


@primitive(
    vjps=(_logsumexp_vjp,),
    samples=lambda: [
        *_samples(),
        sample([[-math.inf, -math.inf], [0.0, -math.inf]], axis=1, smooth=False,
               note="a row without any weight"),
    ],
    reference=_numpy_logsumexp,
)  # fmt: skip
def logsumexp(m: Backend, x: Array, /, axis: Axis = None, keepdims: bool = False) -> Array:
    """The logarithm of the sum of the exponentials of the elements along ``axis``.

    The largest element is taken out first, so that nothing overflows. A row of -inf gives -inf and
    the gradient zero.

    >>> import gpugrad as gg
    >>> gg.logsumexp(gg.asarray([1000.0, 1000.0]))
    tensor(1000.69314718)
    """
    return _in_float32(m, x, lambda x: _logsumexp(m, x, axis, keepdims))


# -- running sums and products --------------------------------------------------------------------


def _only_axis(x_shape: tuple[int, ...], axis: int | None) -> int:
    return 0 if axis is None else axis % len(x_shape)


@fusible
def cumulative_sum_backward(m: Backend, g: Array, axis: int) -> Array:
    """The running sum from the end: the gradient of the operand."""
    return m.flip(m.cumulative_sum(m.flip(g, axis=axis), axis=axis), axis=axis)


def _cumulative_sum_transpose(
    g: Array, m: Backend, x_shape: tuple[int, ...], x_dtype: Any, axis: int | None, dtype: Any,
    include_initial: bool,
) -> Array:  # fmt: skip
    axis = _only_axis(x_shape, axis)
    if dtype is not None:
        g = m.astype(g, x_dtype)
    if include_initial:
        g = m.getitem(g, along(axis, slice(1, None)))
    return cumulative_sum_backward(m, g, axis)


@linear(
    transpose=_cumulative_sum_transpose,
    samples=lambda: [
        sample(normal((4,))),
        sample(normal((2, 3)), axis=-1),
        sample(normal((2, 3)), axis=0, include_initial=True),
    ],
)
def cumulative_sum(
    m: Backend,
    x: Array,
    /,
    axis: int | None = None,
    dtype: Any = None,
    include_initial: bool = False,
) -> Array:
    """The running sum along ``axis``, which only a one-dimensional ``x`` may leave out.

    ``include_initial`` puts a zero in front.

    >>> import gpugrad as gg
    >>> gg.cumulative_sum(gg.asarray([1, 2, 3]))
    tensor([1, 3, 6])
    """
    kw = {"axis": axis, "dtype": m.dtype(dtype), "include_initial": include_initial}
    return _in_float32(m, x, lambda x: m.cumulative_sum(x, **kw), dtype)


def _cumulative_prod_vjp(
    g: Array, m: Backend, x: Array, axis: int | None, dtype: Any, include_initial: bool
) -> Array:
    """With p the running product before i and s_i = g_i + x_{i+1} s_{i+1}: the gradient is p s.

    The recurrence is solved in log2(n) steps, each of which joins twice as many terms as the step
    before. Nothing is divided.
    """
    axis = _only_axis(x.shape, axis)
    n = x.shape[axis]
    if dtype is not None:
        g = m.astype(g, x.dtype)
    if include_initial:
        g = m.getitem(g, along(axis, slice(1, None)))

    def later(v: Array, step: int) -> Array:
        rest = m.getitem(v, along(axis, slice(step, None)))
        none = m.zeros_like(m.getitem(v, along(axis, slice(0, step))))
        return m.concat([rest, none], axis=axis)

    s, factor = g, later(x, 1)
    step = 1
    while step < n:
        s = s + factor * later(s, step)
        factor = factor * later(factor, step)
        step *= 2
    before = m.cumulative_prod(x, axis=axis, include_initial=True)
    return m.getitem(before, along(axis, slice(0, n))) * s


@primitive(
    vjps=(_cumulative_prod_vjp,),
    samples=lambda: [
        sample(positive((5,))),
        sample(positive((2, 3)), axis=-1, include_initial=True),
        sample([[1.0, 0.0, 3.0, 0.0, 2.0]], axis=1, note="zeros"),
    ],
)
def cumulative_prod(
    m: Backend,
    x: Array,
    /,
    axis: int | None = None,
    dtype: Any = None,
    include_initial: bool = False,
) -> Array:
    """The running product along ``axis``, which only a one-dimensional ``x`` may leave out.

    ``include_initial`` puts a one in front. The derivative is exact where elements are zero.

    >>> import gpugrad as gg
    >>> gg.cumulative_prod(gg.asarray([1, 2, 3, 4]))
    tensor([ 1,  2,  6, 24])
    """
    kw = {"axis": axis, "dtype": m.dtype(dtype), "include_initial": include_initial}
    return _in_float32(m, x, lambda x: m.cumulative_prod(x, **kw), dtype)
