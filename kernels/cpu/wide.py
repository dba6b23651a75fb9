"""A chain of large layers in one call, and all its gradients in another.

Between two kernels that use all of the caches, what Python does is slow: its code and its objects
have to come from far away. Here a whole net goes forward with none of it in between, and back.
Each layer is divided among the threads by itself. Each thread computes its part of the product,
bias and activation in its cache; going back, its part of the gradient of what is below, what the
activation there makes of it, and blocks of the weight's gradient with the sums of their squares.
All operands but one are taken where they lie (`kernels/cpu/direct.py`). Forward, that one is the
weight, which is packed; or, where the batch is smaller, the batch, and results have a row for each
feature until they are turned.

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
from gpugrad.backend.memory import squares
from gpugrad.backend.scratch import empty
from gpugrad.backend.tape import call, replayable
from gpugrad.kernels.cpu import layers as small
from gpugrad.kernels.cpu import pool
from gpugrad.kernels.cpu.bias import CHUNKS
from gpugrad.kernels.cpu.compile import CpuTemplate, in_a_row, numpy_storage, parallel, serial
from gpugrad.kernels.cpu.direct import LARGEST, direct
from gpugrad.kernels.cpu.elementwise import LABEL
from gpugrad.kernels.cpu.gemm import GRAIN
from gpugrad.kernels.cpu.linear import (
    STRETCH,
    _add,
    _add_bias,
    _beside,
    _in_place,
    _sum_rows,
)
from gpugrad.kernels.cpu.memory import address, copy, matrix, size_of, turn, vector
from gpugrad.kernels.cpu.microkernel import pack_turned, packed_shape, panel
from gpugrad.kernels.cpu.products import workspace
from gpugrad.kernels.cpu.weight_gradient import LEAST, compute_unit, units
from gpugrad.kernels.formula import formula
from gpugrad.kernels.template import Placeholder, T, device, read, write

__all__ = ["KERNELS", "layers", "layers_backward"]

Array = np.ndarray[Any, Any]

#: Elements of a weight below which OpenBLAS is quicker, whatever the number of rows.
NARROWEST = 1 << 10

#: Rows that are worth being summed by themselves.
PIECE = 16

#: Elements that one thread is done with before others are awake, and multiply-adds that another is
#: worth.
FEW, SHARE = 1 << 13, 1 << 18

df: Any = Placeholder("df")
f: Any = Placeholder("f")
finish_row: Any = Placeholder("finish_row")
partial_row: Any = Placeholder("partial_row")


@device
def _part(side, part, parts):
    """Where a thread's part of so many rows or columns begins and ends: in whole panels."""
    width = panel()
    panels = (side + width - 1) // width
    low, high = panels * part // parts, panels * (part + 1) // parts
    return min(low * width, side), min(high * width, side)


@device
def _parts(threads, work):
    """How many threads so many multiply-adds are worth."""
    return min(threads, max(1, work // SHARE))


@device
def _chunks(rows):
    """Stretches of rows that are summed by themselves, whatever the number of threads."""
    return min(CHUNKS, (rows + PIECE - 1) // PIECE)


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
    """One thread's part of a layer: columns of the result, or rows."""
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
def _add_number(z, b):
    for j in range(z.size):
        write(z, j, read(z, j) + b)


@serial
def _activate(z, b):
    for j in range(z.size):
        write(z, j, f(read(z, j) + b))


@serial
def _finish_turned(rows, outputs, low, high, a, b, z, bias, told, y, activated):
    """Bias and activation of some results, in their place, of some rows of the batch.

    They go to `y` with a row for each of the batch, and before the activation to `told`, if that is
    another place.
    """
    size = size_of(T(0))
    here, there = z + (low * rows + a) * size, (a * outputs + low) * size
    biases = vector(bias, outputs)
    beside = told != y
    if beside or not activated:
        for j in range(low, high):
            _add_number(vector(z + (j * rows + a) * size, b - a), biases[j])
    if beside:
        turn(here, rows, high - low, b - a, told + there, outputs)
    if activated:
        for j in range(low, high):
            _activate(vector(z + (j * rows + a) * size, b - a), T(0) if beside else biases[j])
    turn(here, rows, high - low, b - a, y + there, outputs)


@serial
def _layer_turned(
    rows, inputs, outputs, weight, source, down, across, z, bias, told, y, activated, part, parts
):  # fmt: skip
    """One thread's part of a layer: some of its results, or some rows of the batch."""
    low, high, a, b = 0, outputs, 0, rows
    if outputs > rows:
        low, high = outputs * part // parts, outputs * (part + 1) // parts
    else:
        a, b = _part(rows, part, parts)
    if low < high and a < b:
        size = size_of(T(0))
        direct(high - low, b - a, inputs, weight + low * inputs * size, inputs, 1,
               source + a // panel() * across * size, down, across, z + (low * rows + a) * size,
               rows, False)  # fmt: skip
        _finish_turned(rows, outputs, low, high, a, b, z, bias, told, y, activated)


@parallel
def _forward_turned(rows, x, table, widths, results, told, y, ends, room, threads):
    """The same with a row for each feature in place of one for each of the batch.

    Weights are read where they lie then, and the batch is packed.
    """
    size, width = size_of(T(0)), panel()
    layers, before, inputs = table.shape[0], 0, widths[0]
    panels, widest = (rows + width - 1) // width, 0
    for k in range(layers):
        widest = max(widest, widths[k + 1])
    for p in prange(panels):
        pack_turned(x + p * width * inputs * size, inputs, min(width, rows - p * width), inputs,
                    room + p * width * inputs * size, width)  # fmt: skip
    source, down, across = room, width, inputs * width
    for k in range(layers):
        inputs, outputs = widths[k], widths[k + 1]
        activated = k < layers - 1 or not ends
        kept = told + before * size if activated else y
        out = results + before * size if activated else y
        z = room + (panels * width * widths[0] + k % 2 * widest * rows) * size
        parts = _parts(threads, rows * inputs * outputs)
        for part in prange(parts):
            _layer_turned(rows, inputs, outputs, table[k, 0], source, down, across, z, table[k, 1],
                          kept, out, activated, part, parts)  # fmt: skip
        source, down, across = z, rows, width
        before += rows * outputs


@serial
def _partial_row(g, told, total):
    for j in range(g.size):
        d = df(read(g, j), read(told, j))
        write(g, j, d)
        total[j] += d


@serial
def _through(width, a, b, low, high, g, told, total):
    """What the activation makes of a block of the gradient, in its place; the sums of columns."""
    size, n = size_of(T(0)), high - low
    part, sums = np.zeros(n, T), total[low:high]
    for first in range(a, b, STRETCH):
        for i in range(first, min(first + STRETCH, b)):
            at = (i * width + low) * size
            partial_row(vector(g + at, n), vector(told + at, n), part)
        _add(sums, part)


@serial
def _bias(totals, low, high, home, squares):
    """Some columns of the gradient of a bias, where it is wanted, and their squares by panels."""
    width = panel()
    if home == 0:
        return
    gb, total = vector(home, totals.shape[1]), totals[0]
    for chunk in range(1, totals.shape[0]):
        for j in range(low, high):
            total[j] += totals[chunk, j]
    for first in range(low, high, width):
        found = np.float64(0)
        for j in range(first, min(first + width, high)):
            gb[j] = total[j]
            found += np.float64(gb[j]) * np.float64(gb[j])
        squares[first // width] = found


@serial
def _below(
    rows, inputs, outputs, gz, weight, gx, told, totals, home, squares, activated, part, parts
):  # fmt: skip
    """One thread's part of the gradient of a layer's input: columns of it, or rows.

    Where an activation lies below, what that makes of the gradient takes its place. Whoever has all
    rows of some columns is done with their part of the bias, too.
    """
    size, width, chunks = size_of(T(0)), panel(), totals.shape[0]
    if inputs > rows:
        low, high = _part(inputs, part, parts)
        if low < high:
            direct(rows, high - low, outputs, gz, outputs, 1, weight + low * size, inputs, width,
                   gx + low * size, inputs, False)  # fmt: skip
            if activated:
                _through(inputs, 0, rows, low, high, gx, told, totals[0])
                _bias(totals, low, high, home, squares)
    else:
        low, high = chunks * part // parts, chunks * (part + 1) // parts
        a, b = low * rows // chunks, high * rows // chunks
        if a < b:
            direct(b - a, inputs, outputs, gz + a * outputs * size, outputs, 1, weight, inputs,
                   width, gx + a * inputs * size, inputs, False)  # fmt: skip
            for chunk in range(low, high if activated else low):
                _through(inputs, chunk * rows // chunks, (chunk + 1) * rows // chunks, 0, inputs,
                         gx, told, totals[chunk])  # fmt: skip


@serial
def _above(rows, outputs, g, told, gz, bare, total, chunk, chunks):
    """Some rows of the gradient of what the last activation is applied to, and their sum."""
    size, a, b = size_of(T(0)), chunk * rows // chunks, (chunk + 1) * rows // chunks
    if bare:
        _sum_rows(matrix(g, rows, outputs), np.zeros(outputs, T), total, a, b)
    else:
        copy(g + a * outputs * size, gz + a * outputs * size, (b - a) * outputs)
        _through(outputs, a, b, 0, outputs, gz, told, total)


# In a parallel function an array of zeros would be a loop of all threads, and so would a sum.


@serial
def _zeros(m, n):
    return np.zeros((m, n))


@serial
def _sum(x):
    total = np.float64(0)
    for i in range(x.size):
        total += x[i]
    return total


@parallel
def _backward(
    rows, first, g, x, table, homes, widths, results, told, gz, gx, ends, room, sums, threads
):  # fmt: skip
    size, width = size_of(T(0)), panel()
    layers = table.shape[0]
    k, outputs, chunks, before = layers - 1, widths[layers], _chunks(rows), 0
    for i in range(layers - 1):
        before += rows * widths[i + 1]
    totals = _zeros(chunks, outputs)
    if rows * outputs < FEW:
        for chunk in range(chunks):
            _above(rows, outputs, g, told + before * size, gz, ends, totals[chunk], chunk, chunks)
    else:
        for chunk in prange(chunks):
            _above(rows, outputs, g, told + before * size, gz, ends, totals[chunk], chunk, chunks)
    biases = _zeros(1, (outputs + width - 1) // width)[0]
    _bias(totals, 0, outputs, homes[k, 1], biases)
    # `here` is the gradient of what a layer's activation is applied to, and it goes from one of two
    # places to the other.
    here, spare = g if ends else gz, room
    while True:
        sums[k, 1] = _sum(biases)
        inputs, outputs = widths[k], widths[k + 1]
        before -= rows * inputs
        source = x if k == 0 else results + before * size
        below, bias = spare if k > first else gx if k == 0 else 0, homes[max(k, 1) - 1, 1]
        parts = _parts(threads, rows * inputs * outputs)
        totals = _zeros(1 if inputs > rows else chunks, inputs)
        biases = _zeros(1, (inputs + width - 1) // width)[0]
        squares = _zeros(1, units(outputs, inputs) if homes[k, 0] != 0 else 0)[0]
        for part in prange(parts):
            if below != 0:
                _below(rows, inputs, outputs, here, table[k, 0], below, told + before * size,
                       totals, bias, biases, k > first, part, parts)  # fmt: skip
            for unit in range(squares.size * part // parts, squares.size * (part + 1) // parts):
                compute_unit(unit, here, source, homes[k, 0], rows, outputs, inputs, squares)
        sums[k, 0] = _sum(squares)
        if k == first:
            return
        if inputs <= rows:
            _bias(totals, 0, inputs, bias, biases)
        spare = room if below == gz else gz
        here = below
        k -= 1


class _Loops(NamedTuple):
    """What an activation needs."""

    from_result: bool
    forward: CpuTemplate
    forward_turned: CpuTemplate
    backward: CpuTemplate


@cache
def _loops(activation: str) -> _Loops:
    forward, partial = formula(activation), formula(f"{activation}_partial")
    from_result = partial.operands == ["g", "y"]
    row = (_in_place if from_result else _beside).bind(f=forward.plain)
    finish = _finish_turned.bind(_activate=_activate.bind(f=forward.plain))
    through = _through.bind(partial_row=_partial_row.bind(df=partial.plain))
    return _Loops(
        from_result,
        _forward.bind(_layer=_layer.bind(_finish=_finish.bind(finish_row=row))),
        _forward_turned.bind(_layer_turned=_layer_turned.bind(_finish_turned=finish)),
        _backward.bind(_above=_above.bind(_through=through), _below=_below.bind(_through=through)),
    )


# -- what the backend calls ------------------------------------------------------------------------


class _Case(NamedTuple):
    """What follows from shapes and from the activation.

    Attributes
    ----------
    shape, rows:
        Of the result.
    results, kept:
        Elements of all results that are kept, and of all that is.
    told:
        Bytes from these results to what the derivatives of the activation are told.
    room:
        Elements that the forward needs for what it packs.
    beside:
        Elements of all gradients of one layer's results, twice.
    """

    storage: str
    forward: CpuTemplate
    backward: CpuTemplate
    shape: tuple[int, ...]
    rows: int
    results: int
    kept: int
    told: int
    room: int
    beside: int


@lru_cache(256)
def _case(shape: tuple[int, ...], dtype: Any, widths: bytes, activation: str, ends: bool) -> _Case:
    loops, storage = _loops(activation), numpy_storage(dtype)
    _, *features = around = np.frombuffer(widths, np.int64).tolist()
    rows = math.prod(shape[:-1])
    results = rows * (sum(features) - features[-1] * ends)
    # Either weights are packed, or the batch, with the results of each layer.
    turned = rows * sum(around) < sum(map(math.prod, pairwise(around)))
    room = max(math.prod(packed_shape(*pair, storage)) for pair in pairwise(around))
    if turned:
        room = math.prod(packed_shape(around[0], rows, storage)) + 2 * rows * max(features)
    return _Case(
        storage,
        loops.forward_turned if turned else loops.forward,
        loops.backward,
        (*shape[:-1], features[-1]),
        rows,
        results,
        results if loops.from_result else 2 * results,
        0 if loops.from_result else results * dtype.itemsize,
        room,
        2 * rows * max(around),
    )


@replayable
def layers(
    m: Backend, *arrays: Array, activation: str = "relu", ends: bool = False
) -> tuple[Array, Array]:
    """The forward, and what its backward is told."""
    x = arrays[0]
    dtype, known = x.dtype, small.parameters_of(arrays[1:])
    case = _case(x.shape, dtype, known.key, activation, ends)
    x, kept = in_a_row(x), empty((case.kept,), dtype)
    if ends:
        y = empty(case.shape, dtype)
    else:  # the result is among what is kept
        y = kept[case.results - case.rows * known.outputs : case.results].reshape(case.shape)
    results = address(kept)
    case.forward[case.storage](
        case.rows, address(x), known.addresses, known.widths, results, results + case.told,
        address(y), ends, address(workspace(dtype, case.room)), pool.get_num_threads(),
    )  # fmt: skip
    return y, kept


@replayable
def layers_backward(
    m: Backend, g: Array, arrays: Sequence[Array], kept: Array, activation: str, ends: bool,
    needs: tuple[bool, ...], arrays_home: Sequence[Array | None],
) -> list[Array | None]:  # fmt: skip
    """Gradients of all operands that are needed."""
    x, *parameters = arrays
    dtype, known = x.dtype, small.parameters_of(parameters)
    case = _case(x.shape, dtype, known.key, activation, ends)
    gx = empty(x.shape, dtype) if needs[0] else None
    homes, places = small.homes_of(parameters, arrays_home[1:], needs[1:])
    x, g = in_a_row(x), in_a_row(g)
    results, beside = address(kept), empty((case.beside,), dtype)
    gz, sums = address(beside), np.empty(places.shape)
    case.backward[case.storage](
        case.rows, (needs.index(True, 1) - 1) // 2 if not needs[0] else 0, address(g), address(x),
        known.addresses, places, known.widths, results, results + case.told, gz,
        0 if gx is None else address(gx), ends, gz + beside.nbytes // 2, sums,
        pool.get_num_threads(),
    )  # fmt: skip
    call(_note_squares, [None if home is None else id(home) for home in arrays_home[1:]], sums)
    return [gx, *homes]


def _note_squares(homes: Sequence[int | None], sums: Array) -> None:
    for home, total in zip(homes, sums.ravel().tolist()):
        if home is not None and total < math.inf:  # and not NaN
            squares[home] = total


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
