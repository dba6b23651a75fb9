"""Bias and activation in one pass, and its backward: both gradients and statistics in one pass.

The rows are cut into at most `CHUNKS` chunks, whatever the number of threads. Each chunk sums its
rows' gradients for the bias, and the sums of the chunks are added in order: the result is the same
bit for bit from run to run and on any number of cores.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu.compile import CpuTemplate, numpy_storage, parallel, serial, storage_view
from gpugrad.kernels.cpu.elementwise import BLOCK, LABEL
from gpugrad.kernels.formula import formula
from gpugrad.kernels.template import Placeholder, T, device, read, to_bits, where, write

Array = np.ndarray[Any, Any]

#: Pieces that the rows are cut into for the bias gradient: enough for any number of cores here.
CHUNKS = 64

f: Any = Placeholder("f")
df: Any = Placeholder("df")
local: Any = Placeholder("local")
row: Any = Placeholder("row")


# What an activation's derivative is told: the operand, or the result.
@device
def _from_operand(g: Any, z: Any) -> Any:
    return df(g, z)


@device
def _from_result(g: Any, z: Any) -> Any:
    return df(g, f(z))


@serial
def _forward_row(x: Array, bias: Array, y: Array) -> None:
    for j in range(x.size):
        write(y, j, f(read(x, j) + read(bias, j)))


@parallel
def _forward(x: Array, bias: Array, y: Array) -> None:
    rows = x.shape[0]
    per = max(1, BLOCK // max(1, x.shape[1]))
    for block in prange((rows + per - 1) // per):
        for i in range(block * per, min(block * per + per, rows)):
            row(x[i], bias, y[i])


@serial
def _backward_row(g: Array, x: Array, bias: Array, gx: Array, total: Array, seen: Array) -> None:
    squares = T(0)
    bad = T(0)  # counted as a float: Numba adds int32 in 64 bits
    # An exponent of all ones, which infinity and NaN have and nothing else.
    ones = to_bits(T(np.inf))
    for j in range(g.size):
        d = local(read(g, j), read(x, j) + read(bias, j))
        write(gx, j, d)
        total[j] += d
        squares += d * d
        bad += where((to_bits(d) & ones) == ones, T(1), T(0))
    seen[0] += squares
    seen[1] += bad


@parallel
def _backward(g: Array, x: Array, bias: Array, gx: Array, totals: Array, seen: Array) -> None:
    rows = x.shape[0]
    chunks = totals.shape[0]
    for chunk in prange(chunks):
        for i in range(chunk * rows // chunks, (chunk + 1) * rows // chunks):
            row(g[i], x[i], bias, gx[i], totals[chunk], seen[chunk])


@cache
def _loops(activation: str) -> tuple[CpuTemplate, CpuTemplate]:
    forward, partial = formula(activation), formula(f"{activation}_partial")
    rule = _from_result if partial.operands == ["g", "y"] else _from_operand
    bound = rule.bind(f=forward.plain, df=partial.plain)
    return (
        _forward.bind(row=_forward_row.bind(f=forward.plain)),
        _backward.bind(row=_backward_row.bind(local=bound)),
    )


def _matrix(x: Array, columns: int) -> Array:
    return storage_view(np.ascontiguousarray(x).reshape(-1, columns))


def bias_activation(m: Backend, x: Array, bias: Array, activation: str) -> Array:
    """The forward; `x` of shape (…, C), `bias` of shape (C,)."""
    y = empty(x.shape, x.dtype)
    columns = bias.size
    kernel = _loops(activation)[0][numpy_storage(x.dtype)]
    if not x.size:
        return y
    kernel(_matrix(x, columns), storage_view(np.ascontiguousarray(bias)), _matrix(y, columns))
    return y


def bias_activation_backward(
    m: Backend, g: Array, x: Array, bias: Array, activation: str, statistics: bool = False,
    bias_home: Array | None = None,
) -> tuple[Array, ...]:  # fmt: skip
    """Gradients of `x` and `bias`; with `statistics` also Σg² and the bad elements of the first."""
    storage = numpy_storage(x.dtype)
    wide = np.float64 if storage == "float64" else np.float32
    columns = bias.size
    rows = x.size // columns if columns else 0
    gx = empty(x.shape, x.dtype)
    chunks = max(1, min(CHUNKS, rows))
    totals = np.zeros((chunks, columns), wide)
    seen = np.zeros((chunks, 2))
    kernel = _loops(activation)[1][storage]
    if x.size:
        kernel(
            _matrix(g, columns), _matrix(x, columns), storage_view(np.ascontiguousarray(bias)),
            _matrix(gx, columns), totals, seen,
        )  # fmt: skip
    gb = np.empty(bias.shape, bias.dtype) if bias_home is None else bias_home
    gb[...] = totals.sum(axis=0, dtype=np.float64)
    return (gx, gb, seen.sum(axis=0)) if statistics else (gx, gb)


def _refuse(x: Any, bias: Any) -> str | None:
    if not isinstance(bias, np.ndarray) or not isinstance(x, np.ndarray):
        return "operands that are not arrays"
    if not numpy_storage(x.dtype) or x.dtype != bias.dtype:
        return f"no kernel for {x.dtype} with a bias of {bias.dtype}"
    if bias.ndim != 1 or x.shape[-1:] != bias.shape:
        return f"a bias of shape {bias.shape} for operands of shape {x.shape}"
    return None


def _refuse_forward(m: Backend, x: Any, bias: Any, activation: str) -> str | None:
    return _refuse(x, bias)


def _refuse_backward(
    m: Backend, g: Any, x: Any, bias: Any, activation: str, *options: Any, **others: Any
) -> str | None:
    if g.dtype != x.dtype or g.shape != x.shape:
        return f"a gradient of {g.dtype}{list(g.shape)} for operands of {x.dtype}{list(x.shape)}"
    return _refuse(x, bias)


KERNELS = {
    "bias_activation": Kernel(bias_activation, LABEL, _refuse_forward),
    "bias_activation_backward": Kernel(bias_activation_backward, LABEL, _refuse_backward),
}
