"""A chain of large layers in one call, and all its gradients in another.

Between two kernels that use all of the caches, what Python does is slow: its code and its objects
have to come from far away. Here a whole net goes forward with none of it in between, and back.
Each layer is divided among the threads by itself: weights are packed, then each thread computes
its part of the product, bias and activation in its cache; going back, first what the activation
makes of the gradient, then both products. All are taken where they lie (`kernels/cpu/direct.py`).

How the work is divided changes no bit of the results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu import layers as small
from gpugrad.kernels.cpu import pool
from gpugrad.kernels.cpu.bias import CHUNKS
from gpugrad.kernels.cpu.compile import CpuTemplate, in_a_row, numpy_storage, parallel, serial
from gpugrad.kernels.cpu.direct import LARGEST, direct
from gpugrad.kernels.cpu.elementwise import LABEL
from gpugrad.kernels.cpu.gemm import GRAIN, STRIP
from gpugrad.kernels.cpu.layers import matrix, vector
from gpugrad.kernels.cpu.linear import (
    _add_bias,
    _backward_row,
    _backward_rows,
    _beside,
    _in_place,
    _sum_rows,
)
from gpugrad.kernels.cpu.memory import address, size_of
from gpugrad.kernels.cpu.microkernel import pack_turned, packed_shape, panel
from gpugrad.kernels.cpu.weight_gradient import LEAST
from gpugrad.kernels.formula import formula
from gpugrad.kernels.template import Placeholder, T, device

__all__ = ["KERNELS", "layers", "layers_backward"]

Array = np.ndarray[Any, Any]

#: Elements of a weight below which OpenBLAS is quicker, whatever the number of rows.
NARROWEST = 1 << 10

finish_row: Any = Placeholder("finish_row")


@device
def _part(side, part, parts):
    """Where a thread's part of so many rows or columns begins and ends: in whole panels."""
    strips = (side + STRIP - 1) // STRIP
    low, high = strips * part // parts, strips * (part + 1) // parts
    return min(low * STRIP, side), min(high * STRIP, side)


@device
def _parts(threads, work):
    """How many threads so many multiply-adds are worth."""
    return min(threads, max(1, work // GRAIN))


@serial
def _finish(z, bias, y, rows, low, high, outputs, activated):
    """Bias and activation of a block of columns."""
    size = size_of(T(0))
    n = high - low
    b = vector(bias + low * size, n)
    for i in range(rows):
        at = (i * outputs + low) * size
        if activated:
            finish_row(vector(z + at, n), b, vector(y + at, n))
        else:
            _add_bias(vector(z + at, n), b, vector(y + at, n))


@serial
def _layer(rows, inputs, outputs, source, packed, bias, z, y, activated, part, parts):
    """One thread's part of a layer."""
    size, width = size_of(T(0)), panel()
    if outputs > rows:
        low, high = _part(outputs, part, parts)
        if low < high:
            direct(rows, high - low, inputs, source, inputs, 1, packed + low * inputs * size,
                   width, inputs * width, z + low * size, outputs, False)  # fmt: skip
            _finish(z, bias, y, rows, low, high, outputs, activated)
    else:
        low, high = _part(rows, part, parts)
        if low < high:
            at = low * outputs * size
            direct(high - low, outputs, inputs, source + low * inputs * size, inputs, 1, packed,
                   width, inputs * width, z + at, outputs, False)  # fmt: skip
            _finish(z + at, bias, y + at, high - low, 0, outputs, outputs, activated)


@parallel
def _forward(rows, x, table, widths, results, told, y, ends, room, threads):
    size, width = size_of(T(0)), panel()
    layers, source, before = table.shape[0], x, 0
    for k in range(layers):
        inputs, outputs = widths[k], widths[k + 1]
        weight, bias = table[k, 0], table[k, 1]
        activated = k < layers - 1 or not ends
        z = told + before * size if activated else y
        out = results + before * size if activated else y
        for p in prange((outputs + width - 1) // width):
            pack_turned(weight + p * width * inputs * size, inputs, min(width, outputs - p * width),
                        inputs, room + p * width * inputs * size, width)  # fmt: skip
        parts = _parts(threads, rows * inputs * outputs)
        for part in prange(parts):
            _layer(rows, inputs, outputs, source, room, bias, z, out, activated, part, parts)
        source = out
        before += rows * outputs


@serial
def _through(rows, outputs, g, told, gz, activated, total, chunk, chunks):
    """What the activation makes of some rows of the gradient, and their sum."""
    a, b = chunk * rows // chunks, (chunk + 1) * rows // chunks
    part = np.zeros(outputs, T)
    above = matrix(g, rows, outputs)
    if activated:
        _backward_rows(above, matrix(told, rows, outputs), matrix(gz, rows, outputs), part, total,
                       a, b)  # fmt: skip
    else:
        _sum_rows(above, part, total, a, b)


@serial
def _add_to(total, part):
    for j in range(total.size):
        total[j] += part[j]


@serial
def _gradients(rows, inputs, outputs, gz, source, weight, gx, gw, part, parts):
    """One thread's part of the gradients of a layer's input and of its weight, where wanted."""
    size, width = size_of(T(0)), panel()
    if gx != 0 and inputs > rows:
        low, high = _part(inputs, part, parts)
        if low < high:
            direct(rows, high - low, outputs, gz, outputs, 1, weight + low * size, inputs, width,
                   gx + low * size, inputs, False)  # fmt: skip
    elif gx != 0:
        low, high = _part(rows, part, parts)
        if low < high:
            direct(high - low, inputs, outputs, gz + low * outputs * size, outputs, 1, weight,
                   inputs, width, gx + low * inputs * size, inputs, False)  # fmt: skip
    if gw != 0 and inputs > outputs:
        low, high = _part(inputs, part, parts)
        if low < high:
            direct(outputs, high - low, rows, gz, 1, outputs, source + low * size, inputs, width,
                   gw + low * size, inputs, False)  # fmt: skip
    elif gw != 0:
        low, high = _part(outputs, part, parts)
        if low < high:
            direct(high - low, inputs, rows, gz + low * size, 1, outputs, source, inputs, width,
                   gw + low * inputs * size, inputs, False)  # fmt: skip


@parallel
def _backward(
    rows, first, g, x, table, homes, widths, results, told, gz, gx, ends, room, threads
):  # fmt: skip
    size = size_of(T(0))
    layers, above = table.shape[0], g
    before = 0
    for k in range(layers if not ends else layers - 1):
        before += rows * widths[k + 1]
    for step in range(layers - first):
        k = layers - 1 - step
        inputs, outputs = widths[k], widths[k + 1]
        activated = k < layers - 1 or not ends
        if activated:
            before -= rows * outputs
        # Gradients of results and of what activations are applied to, by turns.
        here = gz if activated else above
        chunks = min(CHUNKS, rows)
        totals = np.zeros((chunks, outputs))
        for chunk in prange(chunks):
            _through(rows, outputs, above, told + before * size, here, activated, totals[chunk],
                     chunk, chunks)  # fmt: skip
        if homes[k, 1] != 0:
            for chunk in range(1, chunks):
                _add_to(totals[0], totals[chunk])
            bias = vector(homes[k, 1], outputs)
            for j in range(outputs):
                bias[j] = totals[0, j]
        source = x if k == 0 else results + (before - rows * inputs) * size
        below = gx if k == 0 else room
        if k == first and k > 0:
            below = 0
        parts = _parts(threads, rows * inputs * outputs)
        for part in prange(parts):
            _gradients(rows, inputs, outputs, here, source, table[k, 0], below, homes[k, 0], part,
                       parts)  # fmt: skip
        above = below


class _Loops(NamedTuple):
    """What an activation needs."""

    from_result: bool
    forward: CpuTemplate
    backward: CpuTemplate


@cache
def _loops(activation: str) -> _Loops:
    forward, partial = formula(activation), formula(f"{activation}_partial")
    from_result = partial.operands == ["g", "y"]
    row = (_in_place if from_result else _beside).bind(f=forward.plain)
    rows = _backward_rows.bind(backward_row=_backward_row.bind(df=partial.plain))
    return _Loops(
        from_result,
        _forward.bind(_layer=_layer.bind(_finish=_finish.bind(finish_row=row))),
        _backward.bind(_through=_through.bind(_backward_rows=rows)),
    )


# -- what the backend calls ------------------------------------------------------------------------


def layers(
    m: Backend, *arrays: Array, activation: str = "relu", ends: bool = False
) -> tuple[Array, Array]:
    """The forward, and what its backward is told."""
    x, loops = arrays[0], _loops(activation)
    known = small.parameters_of(arrays[1:])
    shape = (*x.shape[:-1], known.outputs)
    rows, dtype = math.prod(shape[:-1]), x.dtype
    x = in_a_row(x)
    y = empty(shape, dtype)
    storage = numpy_storage(dtype)
    total = rows * (known.features - known.outputs * ends)
    kept = empty((total if loops.from_result else 2 * total,), dtype)
    if not ends:  # the result is among what is kept
        y = kept[total - rows * known.outputs : total].reshape(shape)
    results = address(kept)
    told = results if loops.from_result else results + total * dtype.itemsize
    room = empty((_room(known.widths.tobytes(), storage),), dtype)
    loops.forward[storage](
        rows, address(x), known.addresses, known.widths, results, told, address(y), ends,
        address(room), pool.get_num_threads(),
    )  # fmt: skip
    return y, kept


@lru_cache(1024)
def _room(widths: bytes, storage: str) -> int:
    """Elements of the largest weight in panels."""
    features = np.frombuffer(widths, np.int64).tolist()
    return max(math.prod(packed_shape(*shape, storage)) for shape in pairwise(features))


def layers_backward(
    m: Backend, g: Array, arrays: Sequence[Array], kept: Array, activation: str, ends: bool,
    needs: tuple[bool, ...], arrays_home: Sequence[Array | None],
) -> list[Array | None]:  # fmt: skip
    """Gradients of all operands that are needed."""
    loops = _loops(activation)
    x, *parameters = arrays
    known = small.parameters_of(parameters)
    rows, dtype = math.prod(x.shape[:-1]), x.dtype
    total = rows * (known.features - known.outputs * ends)
    gx = empty(x.shape, dtype) if needs[0] else None
    homes, places = small.homes_of(parameters, arrays_home[1:], needs[1:])
    x, g = in_a_row(x), in_a_row(g)
    results = address(kept)
    told = results if loops.from_result else results + total * dtype.itemsize
    widest = int(known.widths.max())
    gz, room = empty((rows * widest,), dtype), empty((rows * widest,), dtype)
    loops.backward[numpy_storage(dtype)](
        rows, max(needs.index(True) - 1, 0) // 2, address(g), address(x), known.addresses,
        places, known.widths, results, told, address(gz), 0 if gx is None else address(gx), ends,
        address(room), pool.get_num_threads(),
    )  # fmt: skip
    return [gx, *homes]


def _refuse(m: Backend, *arrays: Any, activation: str = "relu", ends: bool = False) -> str | None:
    if not LARGEST:
        return "short vectors, with which OpenBLAS is quicker"
    if why := small.refuse_chain(m, *arrays, activation=activation, ends=ends):
        return why
    known = small.parameters_of(arrays[1:])
    rows, itemsize = math.prod(arrays[0].shape[:-1]), arrays[0].dtype.itemsize
    if known.largest < NARROWEST or rows * known.largest < 2 * GRAIN:
        return "layers that are too small to be divided each by itself"
    if known.largest >= LEAST or rows * int(known.widths.max()) * itemsize > LARGEST:
        return "a layer that is worth a call of its own"
    return None


KERNELS = {
    "layers": [small.FORWARD, Kernel(layers, LABEL, _refuse)],
    "layers_backward": [
        small.BACKWARD,
        Kernel(layers_backward, LABEL, small.backward_of(_refuse)),
    ],
}
