"""A chain of small layers in one call, and all its gradients in another.

What Python takes for a call would be more than what one small layer takes. A chain has enough work
for all threads: the rows of the batch are divided, and each thread takes its rows through all
layers without waiting for the others. So it goes back, too; after that the layers are divided, for
the gradients of weights and biases are sums over all rows.

How the rows are divided does not depend on the number of threads, and results do not, either.

Parameters are read, and their gradients written, where they lie: a table has their addresses. The
same arrays come again in the next step, so tables are kept.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.backend.tape import replayable
from gpugrad.kernels.cpu.compile import CpuTemplate, in_a_row, numpy_storage, parallel, serial
from gpugrad.kernels.cpu.elementwise import LABEL
from gpugrad.kernels.cpu.gemm import GRAIN, available, rows_product
from gpugrad.kernels.cpu.linear import (
    _beside,
    _forward_rows,
    _in_place,
    _sum_rows,
    _with_bias,
)
from gpugrad.kernels.cpu.memory import address, copy, matrix, size_of, vector
from gpugrad.kernels.formula import formula
from gpugrad.kernels.template import Placeholder, T, read, write
from gpugrad.ops import formulas

Array = np.ndarray[Any, Any]

#: Rows of the batch that one thread takes through all layers. OpenBLAS multiplies by the transpose
#: of a small matrix half as fast when there are a few rows more.
PIECE = 16

#: Tables that are kept, about: one for each net, and one for its gradients.
KEPT = 16

df: Any = Placeholder("df")


@serial
def _through(g, told, gz):
    for i in range(gz.size):
        write(gz, i, df(read(g, i), read(told, i)))


@serial
def _forward_piece(rows, a, b, x, table, widths, results, told, y, ends):
    size = size_of(T(0))
    source = x + a * widths[0] * size
    layers = table.shape[0]
    before = 0  # elements of the layers before, for all rows
    for k in range(layers):
        inputs, outputs = widths[k], widths[k + 1]
        here = (before + a * outputs) * size
        last = y + a * outputs * size
        bare = ends and k == layers - 1
        z = matrix(last if bare else told + here, b - a, outputs)
        weight = matrix(table[k, 0], outputs, inputs)
        rows_product(matrix(source, b - a, inputs), False, weight, True, z)
        if bare:
            _with_bias(z, vector(table[k, 1], outputs), z, 0, b - a)
            return
        source = results + here
        out = matrix(source, b - a, outputs)
        _forward_rows(z, vector(table[k, 1], outputs), out, 0, b - a)
        before += rows * outputs
    copy(source, y + a * widths[layers] * size, (b - a) * widths[layers])


@parallel
def _forward(rows, x, table, widths, results, told, y, ends):
    pieces = (rows + PIECE - 1) // PIECE
    for piece in prange(pieces):
        a, b = piece * rows // pieces, (piece + 1) * rows // pieces
        _forward_piece(rows, a, b, x, table, widths, results, told, y, ends)


@serial
def _backward_piece(rows, a, b, first, g, table, widths, told, gz, gx, ends):
    """From the gradient of the result to that of what each layer's activation is applied to."""
    size = size_of(T(0))
    layers = table.shape[0]
    before = 0
    for k in range(layers - 1):
        before += rows * widths[k + 1]
    outputs = widths[layers]
    here = (before + a * outputs) * size
    source = g + a * outputs * size  # of what the gradient has come to
    for step in range(layers):
        k = layers - 1 - step
        n = (b - a) * outputs
        if ends and step == 0:
            copy(source, gz + here, n)
        else:
            _through(vector(source, n), vector(told + here, n), vector(gz + here, n))
        inputs = widths[k]
        before -= rows * inputs
        if k > first:  # in the place of the layer before
            source = gz + (before + a * inputs) * size
        elif gx != 0:
            source = gx + a * inputs * size
        else:
            return
        rows_product(matrix(gz + here, b - a, outputs), False,
                     matrix(table[k, 0], outputs, inputs), False,
                     matrix(source, b - a, inputs))  # fmt: skip
        outputs = inputs
        here = (before + a * outputs) * size


@serial
def _gradients(rows, x, k, before, homes, widths, results, gz):
    """Of one layer's weight and bias, those that have a home."""
    size = size_of(T(0))
    inputs, outputs = widths[k], widths[k + 1]
    g = matrix(gz + before * size, rows, outputs)
    if homes[k, 0] != 0:
        source = x if k == 0 else results + (before - rows * inputs) * size
        gw = matrix(homes[k, 0], outputs, inputs)
        rows_product(g, True, matrix(source, rows, inputs), False, gw)
    if homes[k, 1] != 0:
        gb = vector(homes[k, 1], outputs)
        part, total = np.zeros(outputs, T), np.zeros(outputs)
        _sum_rows(g, part, total, 0, rows)
        for j in range(outputs):
            gb[j] = total[j]


@serial
def _starts(rows, widths):
    """Elements before the results of each layer. In a parallel function zeros would be a loop of
    all threads."""
    starts = np.zeros(widths.size - 1, np.int64)
    for k in range(starts.size - 1):
        starts[k + 1] = starts[k] + rows * widths[k + 1]
    return starts


@parallel
def _backward(rows, first, g, x, table, homes, widths, results, told, gz, gx, ends):
    layers = table.shape[0]
    pieces = (rows + PIECE - 1) // PIECE
    for piece in prange(pieces):
        a, b = piece * rows // pieces, (piece + 1) * rows // pieces
        _backward_piece(rows, a, b, first, g, table, widths, told, gz, gx, ends)
    starts = _starts(rows, widths)
    for k in prange(first, layers):
        _gradients(rows, x, k, starts[k], homes, widths, results, gz)


class _Loops(NamedTuple):
    """What an activation needs."""

    from_result: bool
    forward: CpuTemplate
    backward: CpuTemplate


@cache
def _loops(activation: str) -> _Loops:
    forward, partial = formula(activation), formula(f"{activation}_partial")
    from_result = partial.operands == ["g", "y"]
    rows = _forward_rows.bind(
        forward_row=(_in_place if from_result else _beside).bind(f=forward.plain)
    )
    through = _through.bind(df=partial.plain)
    return _Loops(
        from_result,
        _forward.bind(_forward_piece=_forward_piece.bind(_forward_rows=rows)),
        _backward.bind(_backward_piece=_backward_piece.bind(_through=through)),
    )


# -- tables ----------------------------------------------------------------------------------------

#: Stands for an array that is not there.
_NONE: Array = np.empty(0)


class _Tables:
    """What was found out about lists of arrays, as long as the very same arrays come again.

    None of them is kept alive, nor does it look as if somebody held it.
    """

    def __init__(self, make: Callable[[Sequence[Array]], Any]) -> None:
        self._make = make
        self._kept: dict[tuple[int, int], tuple[list[Any], Any]] = {}

    def of(self, arrays: Sequence[Array]) -> Any:
        key = id(arrays[0]), len(arrays)
        known = self._kept.get(key)
        if known is not None:
            for array, there in zip(arrays, known[0]):
                if there() is not array:
                    break
            else:
                return known[1]
        found = self._make(arrays)
        if found.lasts:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            self._kept[key] = [weakref.ref(x) for x in arrays], found
        return found


class _Parameters(NamedTuple):
    """Weights and biases, in turn.

    Attributes
    ----------
    why:
        Why there are no kernels for them; None if there are.
    addresses, widths:
        A row for each layer, and the features before the first layer and after each.
    features:
        After all layers together.
    largest:
        Elements of the largest weight.
    key:
        The widths, to look something up by.
    copies:
        What was copied, to lie in a row; there is then another address the next time.
    """

    why: str | None
    dtype: Any = None
    addresses: Array = _NONE
    widths: Array = _NONE
    inputs: int = 0
    outputs: int = 0
    features: int = 0
    largest: int = 0
    key: bytes = b""
    copies: tuple[Array, ...] = ()

    @property
    def lasts(self) -> bool:
        return self.why is None and not self.copies


def _find_parameters(arrays: Sequence[Array]) -> _Parameters:
    widths: list[int] = []
    for weight, bias in zip(arrays[::2], arrays[1::2]):
        if not isinstance(weight, np.ndarray) or not isinstance(bias, np.ndarray):
            return _Parameters("parameters that are no arrays")
        if weight.dtype != arrays[0].dtype or bias.dtype != weight.dtype:
            return _Parameters(f"parameters of {weight.dtype} and {bias.dtype}")
        widths = widths or list(weight.shape[-1:])
        if weight.ndim != 2 or weight.shape[1] != widths[-1] or bias.shape != weight.shape[:1]:
            return _Parameters(f"shapes {weight.shape} and {bias.shape}")
        widths.append(weight.shape[0])
    rows = [in_a_row(x) for x in arrays]
    return _Parameters(
        None,
        arrays[0].dtype,
        np.array([address(x) for x in rows]).reshape(-1, 2),
        np.array(widths),
        widths[0],
        widths[-1],
        sum(widths[1:]),
        max(x.size for x in arrays[::2]),
        np.array(widths, np.int64).tobytes(),
        tuple(row for row, x in zip(rows, arrays) if row is not x),
    )


class _Homes(NamedTuple):
    addresses: Array
    lasts: bool


def _find_homes(arrays: Sequence[Array]) -> _Homes:
    found = [0 if x is _NONE else address(x) for x in arrays]
    return _Homes(np.array(found).reshape(-1, 2), True)


_parameters = _Tables(_find_parameters)
_homes = _Tables(_find_homes)


def parameters_of(arrays: Sequence[Array]) -> _Parameters:
    """What there is to know of weights and biases, in turn."""
    found: _Parameters = _parameters.of(arrays)
    return found


def homes_of(
    parameters: Sequence[Array], homes: Sequence[Array | None], needs: Sequence[bool]
) -> tuple[list[Array | None], Array]:
    """Where gradients of parameters go, None for one that nobody needs, and their addresses."""
    found = [
        (np.empty(p.shape, p.dtype) if home is None else home) if need else _NONE
        for p, home, need in zip(parameters, homes, needs)
    ]
    return [None if home is _NONE else home for home in found], _homes.of(found).addresses


# -- what the backend calls ------------------------------------------------------------------------


@replayable
def layers(
    m: Backend, *arrays: Array, activation: str = "relu", ends: bool = False
) -> tuple[Array, Array]:
    """The forward, and what its backward is told."""
    x, loops = arrays[0], _loops(activation)
    known = parameters_of(arrays[1:])
    shape = (*x.shape[:-1], known.outputs)
    rows, dtype = math.prod(shape[:-1]), x.dtype
    x = in_a_row(x)
    y = empty(shape, dtype)
    total = rows * (known.features - known.outputs * ends)
    kept = empty((total if loops.from_result else 2 * total,), dtype)
    results = address(kept)
    told = results if loops.from_result else results + total * dtype.itemsize
    loops.forward[numpy_storage(dtype)](
        rows, address(x), known.addresses, known.widths, results, told, address(y), ends
    )
    return y, kept


@replayable
def layers_backward(
    m: Backend, g: Array, arrays: Sequence[Array], kept: Array, activation: str, ends: bool,
    needs: tuple[bool, ...], arrays_home: Sequence[Array | None],
) -> list[Array | None]:  # fmt: skip
    """Gradients of all operands that are needed."""
    loops = _loops(activation)
    x, *parameters = arrays
    known = parameters_of(parameters)
    rows, dtype = math.prod(x.shape[:-1]), x.dtype
    total = rows * (known.features - known.outputs * ends)
    gz = empty((rows * known.features,), dtype)
    gx = empty(x.shape, dtype) if needs[0] else None
    homes, places = homes_of(parameters, arrays_home[1:], needs[1:])
    x, g = in_a_row(x), in_a_row(g)
    results = address(kept)
    told = results if loops.from_result else results + total * dtype.itemsize
    loops.backward[numpy_storage(dtype)](
        rows, max(needs.index(True) - 1, 0) // 2, address(g), address(x), known.addresses, places,
        known.widths, results, told, address(gz), 0 if gx is None else address(gx), ends,
    )  # fmt: skip
    return [gx, *homes]


def refuse_chain(
    m: Backend, *arrays: Any, activation: str = "relu", ends: bool = False
) -> str | None:
    """Why these are no chain for compiled loops, whatever their sizes."""
    x = arrays[0]
    if not isinstance(x, np.ndarray) or x.dtype not in _TAKEN:
        return "no array of a dtype that there are kernels for"
    if available():
        return available()
    if f"{activation}_partial" not in vars(formulas):
        return f"no activation {activation!r}"
    if len(arrays) < 3 or not len(arrays) % 2:
        return f"{len(arrays) - 1} parameters"
    known = parameters_of(arrays[1:])
    if known.why is not None:
        return known.why
    if x.dtype != known.dtype or x.shape[-1:] != (known.inputs,):
        return f"{x.dtype} of shape {x.shape} for {known.inputs} features of {known.dtype}"
    return None


def _refuse(m: Backend, *arrays: Any, **parameters: Any) -> str | None:
    if why := refuse_chain(m, *arrays, **parameters):
        return why
    if math.prod(arrays[0].shape[:-1]) * parameters_of(arrays[1:]).largest >= 2 * GRAIN:
        return "layers that are worth being divided each by itself"
    return None


def backward_of(refuse: Callable[..., str | None]) -> Callable[..., str | None]:
    """The refusal of a backward from that of its forward."""

    def refuse_backward(
        m: Backend, g: Any, arrays: Sequence[Any], kept: Any, activation: str, ends: bool,
        needs: Any, arrays_home: Any,
    ) -> str | None:  # fmt: skip
        if not isinstance(g, np.ndarray) or g.dtype != arrays[0].dtype:
            return "a gradient that is no array of the operands' dtype"
        return refuse(m, *arrays, activation=activation, ends=ends)

    return refuse_backward


_TAKEN = {np.dtype("float32"), np.dtype("float64")}

#: Large layers have others: see `kernels/cpu/wide.py`.
FORWARD = Kernel(layers, LABEL, _refuse)
BACKWARD = Kernel(layers_backward, LABEL, backward_of(_refuse))
