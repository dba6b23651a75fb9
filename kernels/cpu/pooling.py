"""The largest element or the mean of every window, and their gradients.

Channels lie last, as in :mod:`gpugrad.kernels.cpu.convolution`: each place of a window is then a
row of elements that are compared, or added, side by side. What a window's largest element was is
kept as the number of its place, in one byte.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu.compile import numpy_storage, parallel, serial
from gpugrad.kernels.cpu.elementwise import LABEL
from gpugrad.kernels.cpu.memory import (
    address,
    channels_last,
    clear,
    places_inside,
    pointer,
    size_of,
)
from gpugrad.kernels.template import T, where

Array = np.ndarray[Any, Any]

# A shape is (images, rows, columns, channels, rows and columns of the result, of the kernel,
# strides, first places of the first window: negative in a border, dilations).


# -- the largest element --------------------------------------------------------------------------


@serial
def _four(x0, x1, x2, x3, y, winner, n):
    """Of four rows."""
    a, b = pointer(x0, T(0)), pointer(x1, T(0))
    c, d = pointer(x2, T(0)), pointer(x3, T(0))
    best, which = pointer(y, T(0)), pointer(winner, np.int8(0))
    for i in range(n):
        # In NumPy's order: a NaN wins, and the first of equals.
        x, k = a[i], np.int8(0)
        better = (b[i] > x) | ((b[i] != b[i]) & (x == x))
        x, k = where(better, b[i], x), where(better, np.int8(1), k)
        better = (c[i] > x) | ((c[i] != c[i]) & (x == x))
        x, k = where(better, c[i], x), where(better, np.int8(2), k)
        better = (d[i] > x) | ((d[i] != d[i]) & (x == x))
        x, k = where(better, d[i], x), where(better, np.int8(3), k)
        best[i] = x
        which[i] = k


@serial
def _begin(x, y, winner, k, n):
    a, best, which = pointer(x, T(0)), pointer(y, T(0)), pointer(winner, np.int8(0))
    for i in range(n):
        best[i] = a[i]
        which[i] = k


@serial
def _compare(x, y, winner, k, n):
    a, best, which = pointer(x, T(0)), pointer(y, T(0)), pointer(winner, np.int8(0))
    for i in range(n):
        better = (a[i] > best[i]) | ((a[i] != a[i]) & (best[i] == best[i]))
        best[i] = where(better, a[i], best[i])
        which[i] = where(better, k, which[i])


@serial
def _max_row(shape, image, r, y, winner):
    """One row of results of an image."""
    _, h, w, c, _, places, kh, kw, sh, sw, top, left, dh, dw = shape
    size = size_of(T(0))
    row = r * sh + top
    i0, i1 = places_inside(row, dh, kh, h)
    for place in range(places):
        column = place * sw + left
        j0, j1 = places_inside(column, dw, kw, w)
        best, which = y + place * c * size, winner + place * c
        if kh == 2 and kw == 2 and i1 - i0 == 2 and j1 - j0 == 2:
            x = image + (row * w + column) * c * size
            right, down = dw * c * size, dh * w * c * size
            _four(x, x + right, x + down, x + down + right, best, which, c)
            continue
        for i in range(i0, i1):
            for j in range(j0, j1):
                x = image + ((row + i * dh) * w + column + j * dw) * c * size
                if i == i0 and j == j0:
                    _begin(x, best, which, np.int8(i * kw + j), c)
                else:
                    _compare(x, best, which, np.int8(i * kw + j), c)


@parallel
def _max_forward(shape, x, y, winner):
    n, h, w, c, rows, places = shape[:6]
    size = size_of(T(0))
    for item in prange(n):
        for r in range(rows):
            at = (item * rows + r) * places * c
            _max_row(shape, x + item * h * w * c * size, r, y + at * size, winner + at)


@serial
def _put_four(g, winner, x0, x1, x2, x3, n):
    """Spread a row of gradients over four rows that no other window has."""
    up, which = pointer(g, T(0)), pointer(winner, np.int8(0))
    a, b = pointer(x0, T(0)), pointer(x1, T(0))
    c, d = pointer(x2, T(0)), pointer(x3, T(0))
    for i in range(n):
        x, k = up[i], which[i]
        a[i] = where(k == 0, x, T(0))
        b[i] = where(k == 1, x, T(0))
        c[i] = where(k == 2, x, T(0))
        d[i] = where(k == 3, x, T(0))


@serial
def _put(g, winner, x, k, n):
    up, which, a = pointer(g, T(0)), pointer(winner, np.int8(0)), pointer(x, T(0))
    for i in range(n):
        a[i] += where(which[i] == k, up[i], T(0))


@serial
def _max_back_row(shape, image, r, g, winner, alone):
    """Add one row of gradients to an image; with `alone` its windows are of four, and apart."""
    _, h, w, c, _, places, kh, kw, sh, sw, top, left, dh, dw = shape
    size = size_of(T(0))
    row = r * sh + top
    i0, i1 = places_inside(row, dh, kh, h)
    for place in range(places):
        column = place * sw + left
        up, which = g + place * c * size, winner + place * c
        if alone:
            x = image + (row * w + column) * c * size
            _put_four(up, which, x, x + c * size, x + w * c * size, x + (w + 1) * c * size, c)
            continue
        j0, j1 = places_inside(column, dw, kw, w)
        for i in range(i0, i1):
            for j in range(j0, j1):
                x = image + ((row + i * dh) * w + column + j * dw) * c * size
                _put(up, which, x, np.int8(i * kw + j), c)


@parallel
def _max_backward(shape, g, winner, gx, alone, full):
    n, h, w, c, rows, places = shape[:6]
    size = size_of(T(0))
    for item in prange(n):
        image = gx + item * h * w * c * size
        if not full:
            clear(image, h * w * c)
        for r in range(rows):
            at = (item * rows + r) * places * c
            _max_back_row(shape, image, r, g + at * size, winner + at, alone)


# -- means ----------------------------------------------------------------------------------------


@serial
def _add(x, y, n):
    a, b = pointer(x, T(0)), pointer(y, T(0))
    for i in range(n):
        b[i] += a[i]


@serial
def _add_share(x, y, divisor, n):
    a, b = pointer(x, T(0)), pointer(y, T(0))
    for i in range(n):
        b[i] += a[i] / divisor


@serial
def _divide(y, divisor, n):
    a = pointer(y, T(0))
    for i in range(n):
        a[i] /= divisor


@serial
def _mean_of_four(x0, x1, x2, x3, y, divisor, n):
    """Of four rows."""
    a, b = pointer(x0, T(0)), pointer(x1, T(0))
    c, d = pointer(x2, T(0)), pointer(x3, T(0))
    out = pointer(y, T(0))
    for i in range(n):
        out[i] = (a[i] + b[i] + c[i] + d[i]) / divisor


@serial
def _share_of_four(x0, x1, x2, x3, g, divisor, n):
    """Spread a row of gradients over four rows that no other window has."""
    a, b = pointer(x0, T(0)), pointer(x1, T(0))
    c, d = pointer(x2, T(0)), pointer(x3, T(0))
    up = pointer(g, T(0))
    for i in range(n):
        x = up[i] / divisor
        a[i] = x
        b[i] = x
        c[i] = x
        d[i] = x


@serial
def _mean_row(shape, image, r, y, divisor, back, alone):
    """One row of results from an image; `back`: one row of gradients to it.

    With `alone` windows are of four elements, and apart.
    """
    _, h, w, c, _, places, kh, kw, sh, sw, top, left, _, _ = shape
    size = size_of(T(0))
    row = r * sh + top
    i0, i1 = places_inside(row, 1, kh, h)
    if not back and not alone:
        clear(y, places * c)
    for place in range(places):
        column = place * sw + left
        if alone:
            x = image + (row * w + column) * c * size
            right, down, at = c * size, w * c * size, y + place * c * size
            if back:
                _share_of_four(x, x + right, x + down, x + down + right, at, divisor, c)
            else:
                _mean_of_four(x, x + right, x + down, x + down + right, at, divisor, c)
            continue
        j0, j1 = places_inside(column, 1, kw, w)
        for i in range(i0, i1):
            for j in range(j0, j1):
                x = image + ((row + i) * w + column + j) * c * size
                if back:
                    _add_share(y + place * c * size, x, divisor, c)
                else:
                    _add(x, y + place * c * size, c)
    if not back and not alone:
        _divide(y, divisor, places * c)


@parallel
def _means(shape, x, y, divisor, back, alone, full):
    n, h, w, c, rows, places = shape[:6]
    size = size_of(T(0))
    for item in prange(n):
        image = x + item * h * w * c * size
        if back and not full:
            clear(image, h * w * c)
        for r in range(rows):
            at = y + (item * rows + r) * places * c * size
            _mean_row(shape, image, r, at, divisor, back, alone)


# -- launching ------------------------------------------------------------------------------------


@lru_cache(1024)
def _shape(shape: Any, out: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """The numbers of a call, with a second axis where there is one only."""
    lead, zero = ((1,), (0,)) if len(kernel) == 1 else ((), ())
    n, c, *sizes = shape
    return (
        n, *lead, *sizes, c, *lead, *out, *lead, *kernel, *lead, *stride,
        *zero, *(-low for low, _ in padding), *lead, *dilation,
    )  # fmt: skip


def _inner(x: Array) -> Array:
    return channels_last(x[:, :, None] if x.ndim == 3 else x)


def _outer(y: Array, axes: int) -> Array:
    seen = y.transpose(0, 3, 1, 2)
    return seen if axes == 2 else seen[:, :, 0]


@lru_cache(1024)
def _places(shape: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, ...]:
    return tuple(
        (n + low + high - d * (k - 1) - 1) // s + 1
        for n, k, s, (low, high), d in zip(shape[2:], kernel, stride, padding, dilation)
    )


def max_pool(
    m: Backend, x: Array, kernel: Any, stride: Any, padding: Any, dilation: Any
) -> tuple[Array, Array]:
    """The forward, and the places of the largest elements in their windows."""
    if x.dtype.itemsize == 2:
        y, winner = max_pool(m, x.astype(np.float32), kernel, stride, padding, dilation)
        return y.astype(x.dtype), winner
    out = _places(x.shape, kernel, stride, padding, dilation)
    shape = _shape(x.shape, out, kernel, stride, padding, dilation)
    own = _inner(x)
    results = (shape[0], *shape[4:6], shape[3])
    y, winner = empty(results, x.dtype), empty(results, np.int8)
    _max_forward[numpy_storage(x.dtype)](shape, address(own), address(y), address(winner))
    return _outer(y, len(out)), _outer(winner, len(out))


def max_pool_backward(
    m: Backend, g: Array, winner: Array, shape: Any, kernel: Any, stride: Any, padding: Any,
    dilation: Any,
) -> Array:  # fmt: skip
    """The gradient of the input."""
    if g.dtype.itemsize == 2:
        wide = g.astype(np.float32)
        return max_pool_backward(m, wide, winner, shape, kernel, stride, padding, dilation).astype(
            g.dtype
        )
    numbers = _shape(shape, g.shape[2:], kernel, stride, padding, dilation)
    n, h, w, c = numbers[:4]
    top, own = _inner(g), np.ascontiguousarray(_last(winner))
    gx = empty((n, h, w, c), g.dtype)
    _max_backward[numpy_storage(g.dtype)](
        numbers, address(top), address(own), address(gx), *_apart(numbers)
    )
    return _outer(gx, len(kernel))


def _apart(shape: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether windows are of 2×2 elements, none in two of them; and whether each is in one."""
    h, w, _, rows, places = shape[1:6]
    apart = shape[6:] == (2, 2, 2, 2, 0, 0, 1, 1) and 2 * rows <= h and 2 * places <= w
    return apart, apart and 2 * rows == h and 2 * places == w


def _last(x: Array) -> Array:
    return (x[:, :, None] if x.ndim == 3 else x).transpose(0, 2, 3, 1)


def window_mean(
    m: Backend, x: Array, kernel: Any, stride: Any, padding: Any, divisor: float
) -> Array:
    """Sums over windows, divided."""
    if x.dtype.itemsize == 2:
        wide = x.astype(np.float32)
        return window_mean(m, wide, kernel, stride, padding, divisor).astype(x.dtype)
    still = (1,) * len(kernel)
    out = _places(x.shape, kernel, stride, padding, still)
    shape = _shape(x.shape, out, kernel, stride, padding, still)
    own = _inner(x)
    y = empty((shape[0], *shape[4:6], shape[3]), x.dtype)
    _means[numpy_storage(x.dtype)](
        shape, address(own), address(y), x.dtype.type(divisor), False, *_apart(shape)
    )
    return _outer(y, len(out))


def window_mean_backward(
    m: Backend, g: Array, shape: Any, kernel: Any, stride: Any, padding: Any, divisor: float
) -> Array:
    """The gradient of the input."""
    if g.dtype.itemsize == 2:
        wide = g.astype(np.float32)
        return window_mean_backward(m, wide, shape, kernel, stride, padding, divisor).astype(
            g.dtype
        )
    still = (1,) * len(kernel)
    numbers = _shape(shape, g.shape[2:], kernel, stride, padding, still)
    n, h, w, c = numbers[:4]
    top = _inner(g)
    gx = empty((n, h, w, c), g.dtype)
    _means[numpy_storage(g.dtype)](
        numbers, address(gx), address(top), g.dtype.type(divisor), True, *_apart(numbers)
    )
    return _outer(gx, len(kernel))


def _refuse(x: Any, axes: int, kernel: Any) -> str | None:
    if not isinstance(x, np.ndarray) or not numpy_storage(x.dtype):
        return f"no kernel for {x.dtype}"
    if axes not in (1, 2) or x.ndim != axes + 2:
        return f"{axes} axes; there are kernels for one and two"
    if math.prod(kernel) >= 128:
        return f"a kernel of {math.prod(kernel)} places; one byte counts 127"
    return None if x.size else "nothing to compute"


def _fits(x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> str | None:
    why = _refuse(x, len(kernel), kernel)
    if why is None and min(_places(x.shape, kernel, stride, padding, dilation)) < 1:
        why = "no place for a window"
    return why


def _refuse_max(
    m: Backend, x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any
) -> str | None:
    why = _fits(x, kernel, stride, padding, dilation)
    if why is None and _is_outside(x.shape, kernel, stride, padding, dilation):
        return "windows that lie in the border as a whole"
    return why


@lru_cache(1024)
def _is_outside(shape: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> bool:
    """Whether a window lies in the border as a whole."""
    # A step longer than the axis may lead from the border before it to the one behind.
    return any(
        low > d * (k - 1) or high > d * (k - 1) + s - 1 or (low > 0 and n < d)
        for n, k, s, (low, high), d in zip(shape[2:], kernel, stride, padding, dilation)
    )


def _refuse_max_backward(
    m: Backend, g: Any, winner: Any, shape: Any, kernel: Any, stride: Any, padding: Any,
    dilation: Any,
) -> str | None:  # fmt: skip
    if not isinstance(winner, np.ndarray) or winner.dtype != np.int8:
        return "places that are not counted in bytes"
    return _refuse(g, len(kernel), kernel)


def _refuse_mean(
    m: Backend, x: Any, kernel: Any, stride: Any, padding: Any, divisor: float
) -> str | None:
    return _fits(x, kernel, stride, padding, (1,) * len(kernel))


def _refuse_mean_backward(
    m: Backend, g: Any, shape: Any, kernel: Any, stride: Any, padding: Any, divisor: float
) -> str | None:
    return _refuse(g, len(kernel), kernel)


KERNELS = {
    "max_pool": Kernel(max_pool, LABEL, _refuse_max),
    "max_pool_backward": Kernel(max_pool_backward, LABEL, _refuse_max_backward),
    "window_mean": Kernel(window_mean, LABEL, _refuse_mean),
    "window_mean_backward": Kernel(window_mean_backward, LABEL, _refuse_mean_backward),
}
