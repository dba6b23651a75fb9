"""Layer, RMS and group normalisation: each row is read from memory once, forward and backward.

What shares a mean is a row: the last axes of the operand, or a group of channels. Threads take rows
a few at a time, and all passes over them find them in the cache.

Gradients of weight and bias are sums over all rows. Rows are cut into chunks, as many whatever the
number of threads, and the sums of the chunks are added up in order: results are the same bit for
bit from run to run and on any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu.compile import CpuTemplate, numpy_storage, parallel, storage_view
from gpugrad.kernels.cpu.elementwise import LABEL, refuse_arrays
from gpugrad.kernels.cpu.rows import (
    add_rows,
    alone,
    as_it_is,
    as_zero,
    fold_rows,
    from_zero,
    group_levels,
    invert,
    keep_rows,
    row_gradients,
    row_mean_squares,
    row_moments,
    scale_rows,
    scale_segments,
    segment_gradients,
    segment_sums,
    to_bias,
    to_both,
    to_none,
    to_weight,
    with_more,
)
from gpugrad.kernels.moments import from_mean
from gpugrad.kernels.template import arithmetic

Array = np.ndarray[Any, Any]

#: Elements that a thread takes at a time: they are read several times, from its nearest cache.
BLOCK = 8192

#: Pieces that rows are cut into for the gradient of the weight, and rows of a piece at most.
CHUNKS, LONGEST = 64, 512


@parallel
def _forward(
    x, residual, total, weight, bias, y, mean,
    rest, rstd, eps,
):  # fmt: skip
    rows, n = total.shape
    per = max(1, BLOCK // n)
    for block in prange((rows + per - 1) // per):
        i = block * per
        k = min(i + per, rows)
        add_rows(x[i:k], residual[i:k], total[i:k])
        row_moments(total[i:k], mean[i:k], rest[i:k], rstd[i:k])
        invert(rstd[i:k], eps)
        scale_rows(total[i:k], mean[i:k], rest[i:k], rstd[i:k], weight, bias, y[i:k])


@parallel
def _backward(
    g, x, weight, mean, rest, rstd, known,
    eps, also, gx, weights, biases, gweight, gbias,
):  # fmt: skip
    rows, n = x.shape
    chunks = weights.shape[0]
    per = max(1, BLOCK // n)
    for chunk in prange(chunks):
        last = (chunk + 1) * rows // chunks
        for i in range(chunk * rows // chunks, last, per):
            k = min(i + per, last)
            if not known:
                row_moments(x[i:k], mean[i:k], rest[i:k], rstd[i:k])
                invert(rstd[i:k], eps)
            row_gradients(
                g[i:k], x[i:k], weight, mean[i:k], rest[i:k], rstd[i:k], also[i:k], gx[i:k],
                weights[chunk], biases[chunk],
            )  # fmt: skip
    fold_rows(weights, gweight)
    fold_rows(biases, gbias)


@parallel
def _forward_groups(
    x, residual, total, segments, weight, bias, y,
    mean, rest, rstd, eps,
):  # fmt: skip
    rows, n = total.shape
    per = segments.shape[0] // rows
    lot = max(1, BLOCK // n)
    for block in prange((rows + lot - 1) // lot):
        i = block * lot
        k = min(i + lot, rows)
        add_rows(x[i:k], residual[i:k], total[i:k])
        row_moments(total[i:k], mean[i:k], rest[i:k], rstd[i:k])
        invert(rstd[i:k], eps)
        p, q = i * per, k * per
        scale_segments(segments[p:q], p, per, mean, rest, rstd, weight, bias, y[p:q])


@parallel
def _backward_groups(
    g, x, segments, weight, mean, rest, rstd,
    known, eps, also, gx, sums, products, level,
    slope,
):  # fmt: skip
    rows, n = x.shape
    per = segments.shape[0] // rows
    lot = max(1, BLOCK // n)
    for block in prange((rows + lot - 1) // lot):
        i = block * lot
        k = min(i + lot, rows)
        if not known:
            row_moments(x[i:k], mean[i:k], rest[i:k], rstd[i:k])
            invert(rstd[i:k], eps)
        p, q = i * per, k * per
        segment_sums(
            g[p:q], segments[p:q], p, per, mean, rest, rstd, sums[p:q], products[p:q]
        )  # fmt: skip
        if gx.size > 0:
            group_levels(sums[p:q], products[p:q], p, per, weight, n, level[i:k], slope[i:k])
            segment_gradients(
                g[p:q], segments[p:q], p, per, mean, rest, rstd, weight, level, slope, also[p:q],
                gx[p:q],
            )  # fmt: skip


# -- for Python -----------------------------------------------------------------------------------


@cache
def _row_forward(centred: bool, joined: bool) -> CpuTemplate:
    return _forward.bind(
        add_rows=add_rows if joined else keep_rows,
        row_moments=row_moments if centred else row_mean_squares,
        scale_rows=scale_rows.bind(centre=from_mean if centred else from_zero),
    )


@cache
def _row_backward(centred: bool, joined: bool, weight: bool, bias: bool) -> CpuTemplate:
    into = {(0, 0): to_none, (1, 0): to_weight, (0, 1): to_bias, (1, 1): to_both}
    gradients = row_gradients.bind(
        centre=from_mean if centred else from_zero,
        level_of=as_it_is if centred else as_zero,
        collect=into[weight, bias],
        plus=with_more if joined else alone,
    )
    found = row_moments if centred else row_mean_squares
    return _backward.bind(row_moments=found, row_gradients=gradients)


@cache
def _group_forward(joined: bool) -> CpuTemplate:
    return _forward_groups.bind(add_rows=add_rows if joined else keep_rows)


@cache
def _group_backward(joined: bool) -> CpuTemplate:
    return _backward_groups.bind(
        segment_gradients=segment_gradients.bind(plus=with_more if joined else alone)
    )


def kind_of(x: Array) -> Any:
    """The dtype that elements of `x` are computed in."""
    return np.dtype(arithmetic(numpy_storage(x.dtype)))


def matrix(x: Array, *shape: int) -> Array:
    """The elements of `x` as kernels read them, in order; a copy if they do not lie in order."""
    x = np.ascontiguousarray(x)
    # An array that is read-only is of a type of its own, to be compiled for.
    return storage_view((x if x.flags.writeable else x.copy()).reshape(shape))


def vector(x: Array | None, size: int, dtype: Any, fill: float) -> Array:
    """A weight or bias as kernels read it; where there is none, `fill` everywhere."""
    return matrix(np.full(size, fill, dtype) if x is None else x, size)


def folded(parts: Array) -> Array:
    """The sum of the rows of a matrix, in their order, in double precision."""
    out = np.empty(parts.shape[1], parts.dtype)
    fold_rows[parts.dtype.name](parts, out)
    return out


class _Rows:
    """How an operand is cut: into `rows` of `n` elements, each in segments of `length`.

    Over the last `axes`, or over `groups` of channels. `parameter` is the shape of the weight, and
    `kept` that of the statistics.
    """

    def __init__(self, x: Array, axes: int = 0, groups: int = 0) -> None:
        lead = x.shape[: x.ndim - axes] if axes else (x.shape[0], groups)
        self.parameter = x.shape[x.ndim - axes :] if axes else x.shape[1:2]
        self.kept = (*lead, *(1,) * (axes or 2))
        self.rows = prod(lead)
        self.n = prod(self.parameter) if axes else x.shape[1] // groups * prod(x.shape[2:])
        self.length = 0 if axes else prod(x.shape[2:])


def _forward_of(
    cut: _Rows, x: Array, residual: Array | None, weight: Array | None, bias: Array | None,
    eps: float, centred: bool = True,
) -> tuple[Array, ...]:  # fmt: skip
    """The result, what was normalised, and the statistics."""
    y = empty(x.shape, x.dtype)
    total = x if residual is None else empty(x.shape, x.dtype)
    kind = kind_of(x)
    names = 3 if centred else 1
    if x.size == 0:
        rstd = np.full(cut.kept, 1.0 / np.sqrt(kind.type(eps)), kind)
        return y, total, *(np.zeros(cut.kept, kind) for _ in range(names - 1)), rstd
    statistics = [np.empty(cut.kept, kind) for _ in range(names)]
    rows = [v.reshape(-1) for v in statistics]
    seen = matrix(x, cut.rows, cut.n)
    summed = seen if residual is None else matrix(total, cut.rows, cut.n)
    beside = seen if residual is None else matrix(residual, cut.rows, cut.n)
    size = prod(cut.parameter)
    parameters = vector(weight, size, x.dtype, 1.0), vector(bias, size, x.dtype, 0.0)
    out = matrix(y, cut.rows, cut.n)
    last = (*(rows if centred else rows * 3), kind.type(eps))
    storage, joined = numpy_storage(x.dtype), residual is not None
    if cut.length:
        cells = summed.reshape(-1, cut.length), *parameters, out.reshape(-1, cut.length)
        _group_forward(joined)[storage](seen, beside, summed, *cells, *last)
    else:
        _row_forward(centred, joined)[storage](seen, beside, summed, *parameters, out, *last)
    return y, total, *statistics


def _gradients_of(
    cut: _Rows, g: Array, x: Array, weight: Array | None, statistics: Sequence[Array] | None,
    eps: float, needs: Sequence[bool], also: Array | None, centred: bool = True,
) -> tuple[Array | None, ...]:  # fmt: skip
    """Gradients of the operand and the parameters, as far as they are needed."""
    kind, storage = kind_of(x), numpy_storage(x.dtype)
    gx = empty(x.shape, x.dtype) if needs[0] else None
    if x.size == 0:
        none = (np.zeros(cut.parameter, x.dtype) if need else None for need in needs[1:])
        return gx, *none
    rows, n = cut.rows, cut.n
    known = statistics is not None
    moments = [np.empty(rows, kind) for _ in range(3)] if statistics is None else [
        v.reshape(-1) for v in statistics
    ]  # fmt: skip
    moments = moments if centred else moments[-1:] * 3
    up, seen = matrix(g, rows, n), matrix(x, rows, n)
    out = storage_view(np.empty((0, n), x.dtype)) if gx is None else matrix(gx, rows, n)
    joined = also is not None and gx is not None
    more = matrix(also, rows, n) if also is not None and gx is not None else out
    w = vector(weight, prod(cut.parameter), x.dtype, 1.0)
    number = kind.type(eps)
    if cut.length:
        sums, products = np.empty((2, x.shape[0], x.shape[1]), kind)
        levels = np.empty((2, rows), kind)
        up, segments, out, more = (v.reshape(-1, cut.length) for v in (up, seen, out, more))
        _group_backward(joined)[storage](
            up, seen, segments, w, *moments, known, number, more, out, sums.reshape(-1),
            products.reshape(-1), *levels,
        )  # fmt: skip
        parameters = (products, sums)
        return gx, *(
            folded(v).astype(x.dtype) if need else None for v, need in zip(parameters, needs[1:])
        )
    wanted = [*needs[1:], False][:2]
    chunks = min(rows, max(1, -(-rows // LONGEST), min(CHUNKS, x.size // (2 * BLOCK))))
    parts = [np.zeros((chunks, n if need else 0), kind) for need in wanted]
    found = [np.empty(part.shape[1], x.dtype) for part in parts]
    _row_backward(centred, joined, *wanted)[storage](
        up, seen, w, *moments, known, number, more, out, *parts, *map(storage_view, found)
    )
    return gx, *(v.reshape(cut.parameter) if need else None for v, need in zip(found, needs[1:]))


# -- operations -----------------------------------------------------------------------------------


def _cut(x: Array, axes: int = 1, groups: int = 0) -> _Rows:
    return _Rows(x, groups=groups) if groups else _Rows(x, axes)


def _forward_kernel(centred: bool = True, residual: bool = False) -> Kernel:
    """Kernel of an operation on x, a residual if so, weight and, if `centred`, bias."""

    def run(m: Backend, x: Array, *more: Any, eps: float = 1e-5, **size: int) -> Any:
        beside = more[0] if residual else None
        weight, bias = (*more[residual:], None, None)[:2]
        cut = _cut(x, **size)
        y, total, *statistics = _forward_of(cut, x, beside, weight, bias, eps, centred)
        return (y, total) if residual else (y, *statistics)

    def refuse(m: Backend, x: Any, *more: Any, eps: float = 1e-5, **size: int) -> str | None:
        return refuse_arrays(x, *more[:residual]) or _refuse_size(x, more[residual:], **size)

    return Kernel(run, LABEL, refuse)


def _backward_kernel(centred: bool = True, of: str = "axes") -> Kernel:
    """Kernel of a backward function, of an operation with a parameter `axes` or `groups`."""

    def run(
        m: Backend, g: Array, x: Array, weight: Array | None, statistics: Sequence[Array] | None,
        size: int, eps: float, needs: Sequence[bool], also: Array | None = None,
    ) -> tuple[Array | None, ...]:  # fmt: skip
        cut = _cut(x, **{of: size})
        return _gradients_of(cut, g, x, weight, statistics, eps, needs, also, centred)

    def refuse(
        m: Backend, g: Any, x: Any, weight: Any, statistics: Any, size: int, eps: float,
        needs: Any, also: Any = None,
    ) -> str | None:  # fmt: skip
        alike = (g, x) if also is None else (g, x, also)
        return refuse_arrays(*alike) or _refuse_size(x, (weight,), **{of: size})

    return Kernel(run, LABEL, refuse)


def _refuse_size(
    x: Array, parameters: Sequence[Any], axes: int = 1, groups: int | None = None
) -> str | None:
    if groups is None:
        if not 1 <= axes <= x.ndim:
            return f"{axes} axes of {x.ndim}"
        return refuse_parameters(x, x.shape[x.ndim - axes :], parameters)
    if x.ndim < 2 or groups < 1 or x.shape[1] % groups:
        return f"{groups} groups in the shape {x.shape}"
    return refuse_parameters(x, x.shape[1:2], parameters)


def refuse_parameters(x: Array, shape: tuple[int, ...], parameters: Sequence[Any]) -> str | None:
    """Why weight and bias cannot be read along with `x`."""
    for p in parameters:
        if p is not None and (not isinstance(p, np.ndarray) or p.dtype != x.dtype):
            return f"a weight or bias of {getattr(p, 'dtype', type(p).__name__)} beside {x.dtype}"
        if p is not None and p.shape != shape:
            return f"a weight or bias of shape {p.shape} where {shape} is needed"
    return None


KERNELS = {
    "layer_norm": _forward_kernel(),
    "layer_norm_backward": _backward_kernel(),
    "add_layer_norm": _forward_kernel(residual=True),
    "rms_norm": _forward_kernel(centred=False),
    "rms_norm_backward": _backward_kernel(centred=False),
    "add_rms_norm": _forward_kernel(centred=False, residual=True),
    "group_norm": _forward_kernel(),
    "group_norm_backward": _backward_kernel(of="groups"),
    "add_group_norm": _forward_kernel(residual=True),
}
