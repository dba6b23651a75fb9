"""A layer: product, bias and activation, and its backward with all three gradients.

Where the products are small, each direction is one call of one compiled function on one thread:
what Python takes for a call would be more than what the work takes. Large ones are divided among
the threads by `kernels/cpu/products.py`, and what follows them row by row.

The activation works on what lies in memory already: where its derivative is told the result, the
result takes the place of the product; elsewhere the product with its bias is kept beside it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.backend.tape import call, replayable, zeros
from gpugrad.kernels.cpu import products
from gpugrad.kernels.cpu.bias import CHUNKS
from gpugrad.kernels.cpu.compile import CpuTemplate, in_a_row, numpy_storage, parallel, serial
from gpugrad.kernels.cpu.elementwise import BLOCK, LABEL
from gpugrad.kernels.cpu.gemm import GRAIN, available, rows_product
from gpugrad.kernels.cpu.weight_gradient import weight_gradient
from gpugrad.kernels.formula import formula
from gpugrad.kernels.template import Placeholder, T, read, write
from gpugrad.ops import formulas

Array = np.ndarray[Any, Any]

#: Rows whose gradients are added up in the type that is computed in; their sums are, in double.
STRETCH = 128

f: Any = Placeholder("f")
df: Any = Placeholder("df")
forward_row: Any = Placeholder("forward_row")
backward_row: Any = Placeholder("backward_row")


@serial
def _in_place(z, bias, y):
    for j in range(z.size):
        write(z, j, f(read(z, j) + read(bias, j)))


@serial
def _add_bias(z, bias, y):
    for j in range(z.size):
        write(z, j, read(z, j) + read(bias, j))


@serial
def _beside(z, bias, y):
    for j in range(z.size):
        s = read(z, j) + read(bias, j)
        write(z, j, s)
        write(y, j, f(s))


@serial
def _backward_row(g, kept, gz, total):
    for j in range(g.size):
        d = df(read(g, j), read(kept, j))
        write(gz, j, d)
        total[j] += d


@serial
def _forward_rows(z, bias, y, a, b):
    for i in range(a, b):
        forward_row(z[i], bias, y[i])


@serial
def _add(total, part):
    for j in range(total.size):
        total[j] += np.float64(part[j])
        part[j] = T(0)


@serial
def _backward_rows(g, kept, gz, part, total, a, b):
    for first in range(a, b, STRETCH):
        for i in range(first, min(first + STRETCH, b)):
            backward_row(g[i], kept[i], gz[i], part)
        _add(total, part)


# -- one call on one thread ------------------------------------------------------------------------


@serial
def _forward_small(x, weight, bias, z, y):
    rows_product(x, False, weight, True, z)
    _forward_rows(z, bias, y, 0, z.shape[0])


@serial
def _backward_small(
    g, kept, x, weight, gz, gx, gw, gb,
    needs_x, needs_weight,
):  # fmt: skip
    part, total = np.zeros(gb.size, T), np.zeros(gb.size)
    _backward_rows(g, kept, gz, part, total, 0, g.shape[0])
    for j in range(gb.size):
        gb[j] = total[j]
    if needs_x:
        rows_product(gz, False, weight, False, gx)
    if needs_weight:
        rows_product(gz, True, x, False, gw)


# -- many rows on all threads ----------------------------------------------------------------------


@parallel
def _forward_large(z, bias, y):
    rows = z.shape[0]
    per = max(1, BLOCK // max(1, z.shape[1]))
    for block in prange((rows + per - 1) // per):
        _forward_rows(z, bias, y, block * per, min(block * per + per, rows))


@parallel
def _backward_large(g, kept, gz, parts, totals):
    rows, chunks = g.shape[0], totals.shape[0]
    for chunk in prange(chunks):
        a, b = chunk * rows // chunks, (chunk + 1) * rows // chunks
        _backward_rows(g, kept, gz, parts[chunk], totals[chunk], a, b)


@serial
def _sum_rows(g, part, total, a, b):
    for first in range(a, b, STRETCH):
        for i in range(first, min(first + STRETCH, b)):
            _add_row(part, g[i])
        _add(total, part)


@serial
def _add_row(part, row):
    for j in range(row.size):
        part[j] += read(row, j)


@parallel
def _sum_chunks(g, parts, totals):
    rows, chunks = g.shape[0], totals.shape[0]
    for chunk in prange(chunks):
        a, b = chunk * rows // chunks, (chunk + 1) * rows // chunks
        _sum_rows(g, parts[chunk], totals[chunk], a, b)


class _Loops(NamedTuple):
    """What an activation needs."""

    from_result: bool
    forward_small: CpuTemplate
    forward_large: CpuTemplate
    backward_small: CpuTemplate
    backward_large: CpuTemplate


@cache
def _loops(activation: str) -> _Loops:
    forward, partial = formula(activation), formula(f"{activation}_partial")
    from_result = partial.operands == ["g", "y"]
    rows = _forward_rows.bind(
        forward_row=(_in_place if from_result else _beside).bind(f=forward.plain)
    )
    back = _backward_rows.bind(backward_row=_backward_row.bind(df=partial.plain))
    return _Loops(
        from_result,
        _forward_small.bind(_forward_rows=rows),
        _forward_large.bind(_forward_rows=rows),
        _backward_small.bind(_backward_rows=back),
        _backward_large.bind(_backward_rows=back),
    )


_with_bias = _forward_rows.bind(forward_row=_add_bias)
_linear_small = _forward_small.bind(_forward_rows=_with_bias)
_linear_large = _forward_large.bind(_forward_rows=_with_bias)


# -- what the backend calls ------------------------------------------------------------------------


def _is_small(rows: int, weight: Array) -> bool:
    return rows * weight.size < 2 * GRAIN


@replayable
def linear(m: Backend, x: Array, weight: Array, bias: Array | None = None) -> Array:
    """A layer without an activation."""
    features, inputs = weight.shape
    flat = x if x.ndim == 2 else x.reshape(-1, inputs)
    z = empty((flat.shape[0], features), x.dtype)
    if bias is None:
        call(products.matmul, flat, weight.T, z)
    elif _is_small(flat.shape[0], weight):
        small = _linear_small[numpy_storage(x.dtype)]
        call(small, in_a_row(flat), in_a_row(weight), in_a_row(bias), z, z)
    else:
        call(products.matmul, flat, weight.T, z)
        _linear_large[numpy_storage(x.dtype)](z, in_a_row(bias), z)
    return z if x.ndim == 2 else z.reshape((*x.shape[:-1], features))


@replayable
def sum_over_rows(m: Backend, g: Array, shape: tuple[int, ...], home: Array | None = None) -> Array:
    """The sum over all axes but the last."""
    rows = in_a_row(g).reshape(-1, shape[0])
    out = np.empty(shape, g.dtype) if home is None else home
    chunks = max(1, min(CHUNKS, rows.shape[0]))
    totals = zeros((chunks, *shape), np.float64)
    parts = zeros((chunks, *shape), g.dtype)
    _sum_chunks[numpy_storage(g.dtype)](rows, parts, totals)
    call(_add_chunks, totals, out)
    return out


def _add_chunks(totals: Array, out: Array) -> None:
    out[...] = np.add.reduce(totals, axis=0)


@replayable
def linear_activation(
    m: Backend, x: Array, weight: Array, bias: Array, activation: str = "relu"
) -> tuple[Array, Array]:
    """The forward, and what its backward is told."""
    loops = _loops(activation)
    features, inputs = weight.shape
    flat = x if x.ndim == 2 else x.reshape(-1, inputs)
    shape = (flat.shape[0], features)
    z = empty(shape, x.dtype)
    y = z if loops.from_result else empty(shape, x.dtype)
    bias = in_a_row(bias)
    if _is_small(shape[0], weight):
        small = loops.forward_small[numpy_storage(x.dtype)]
        call(small, in_a_row(flat), in_a_row(weight), bias, z, y)
    else:
        call(products.matmul, flat, weight.T, z)
        loops.forward_large[numpy_storage(x.dtype)](z, bias, y)
    if x.ndim != 2:
        shape = (*x.shape[:-1], features)
        z, y = z.reshape(shape), y.reshape(shape)
    return y, y if loops.from_result else z


@replayable
def linear_activation_backward(
    m: Backend, g: Array, x: Array, weight: Array, bias: Array, kept: Array, activation: str,
    needs: tuple[bool, ...], weight_home: Array | None, bias_home: Array | None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """Gradients of `x`, `weight` and `bias`, those that are needed."""
    loops = _loops(activation)
    features, inputs = weight.shape
    if x.ndim != 2:
        x_shape, x = x.shape, x.reshape(-1, inputs)
        g, kept = g.reshape(-1, features), kept.reshape(-1, features)
    else:
        x_shape = x.shape
    rows, dtype = x.shape[0], x.dtype
    g, kept = in_a_row(g), in_a_row(kept)
    gz = empty(g.shape, dtype)
    gx = empty(x.shape, dtype) if needs[0] else gz
    gw = weight_home
    gb = np.empty(features, dtype) if bias_home is None else bias_home
    if _is_small(rows, weight):
        if gw is None:
            gw = empty(weight.shape, dtype) if needs[1] else gz
        call(
            loops.backward_small[numpy_storage(dtype)],
            g, kept, in_a_row(x), in_a_row(weight), gz, gx, gw, gb, needs[0], needs[1],
        )  # fmt: skip
    else:
        chunks = max(1, min(CHUNKS, rows))
        totals = zeros((chunks, features), np.float64)
        parts = zeros((chunks, features), dtype)
        loops.backward_large[numpy_storage(dtype)](g, kept, gz, parts, totals)
        call(_add_chunks, totals, gb)
        if needs[0]:
            call(products.matmul, gz, weight, gx)
        if needs[1]:
            gw = weight_gradient(m, gz, x, weight_home)
    return gx.reshape(x_shape) if needs[0] else None, gw if needs[1] else None, gb


def _refuse(m: Backend, x: Any, weight: Any, bias: Any, activation: str = "relu") -> str | None:
    for array in (x, weight, bias):
        if not isinstance(array, np.ndarray):
            return f"a {type(array).__name__} among the operands; kernels take arrays"
    if x.dtype != weight.dtype or x.dtype != bias.dtype or x.dtype not in _TAKEN:
        return f"no kernel for {x.dtype}, {weight.dtype} and {bias.dtype}"
    if available():
        return available()
    if f"{activation}_partial" not in vars(formulas):
        return f"no activation {activation!r}"
    fits = weight.ndim == 2 and x.ndim > 0 and bias.ndim == 1
    if not fits or x.shape[-1] != weight.shape[1] or bias.size != weight.shape[0]:
        return f"shapes {x.shape}, {weight.shape} and {bias.shape}"
    return None


def _refuse_linear(m: Backend, x: Any, weight: Any, bias: Any = None) -> str | None:
    if bias is None and isinstance(weight, np.ndarray) and weight.ndim:
        bias = weight[:, 0] if weight.ndim == 2 and weight.shape[1] else np.empty(
            weight.shape[0], weight.dtype)  # fmt: skip
    return _refuse(m, x, weight, bias)


def _refuse_sum(m: Backend, g: Any, shape: tuple[int, ...], home: Any = None) -> str | None:
    if not isinstance(g, np.ndarray) or g.dtype not in _TAKEN:
        return "no array of a dtype that there are kernels for"
    if len(shape) != 1 or g.shape[-1:] != shape or not shape[0]:
        return f"elements of shape {g.shape}, not rows of shape {shape}"
    return None


def _refuse_backward(
    m: Backend, g: Any, x: Any, weight: Any, bias: Any, kept: Any, activation: str, *_: Any
) -> str | None:
    if not isinstance(g, np.ndarray) or g.dtype != x.dtype:
        return "a gradient that is no array of the operands' dtype"
    return _refuse(m, x, weight, bias, activation)


_TAKEN = {np.dtype("float32"), np.dtype("float64")}

KERNELS = {
    "linear": Kernel(linear, LABEL, _refuse_linear),
    "sum_over_rows": Kernel(sum_over_rows, LABEL, _refuse_sum),
    "linear_activation": Kernel(linear_activation, LABEL, _refuse),
    "linear_activation_backward": Kernel(linear_activation_backward, LABEL, _refuse_backward),
}
