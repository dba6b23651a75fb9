"""Transposed convolutions over two axes, or one: ordinary ones, each of some of the taps.

Along an axis of stride s the places of the result fall into s classes. Those of one class are s
apart, and see every s-th tap of the kernel, or none: they are an ordinary convolution of stride 1,
whose results :func:`gpugrad.kernels.cpu.windows.rows_of_sums` writes so far apart. Nothing is added
up in memory.

The gradient of the input is an ordinary convolution of that of the result, and the gradient of the
weights is that of this convolution. It is summed over pieces of the batch, or of the images where
they are few, whatever the number of threads, and these sums are added in order.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu import pool
from gpugrad.kernels.cpu.compile import numpy_storage, parallel, serial
from gpugrad.kernels.cpu.convolution import (
    CHUNK_BYTES,
    TOGETHER,
    call_of,
    misfit,
    narrowed,
    widened,
)
from gpugrad.kernels.cpu.elementwise import LABEL
from gpugrad.kernels.cpu.memory import address, channels_last, clear, pointer, size_of
from gpugrad.kernels.cpu.microkernel import packed_shape, panel
from gpugrad.kernels.cpu.windows import bordered, pack_panel, rows_of_sums, weight_sums
from gpugrad.kernels.template import T

Array = np.ndarray[Any, Any]

#: Bytes of a band of rows: what is read and what is written stays in a core's cache.
BAND = 1 << 18

#: Pieces whose gradients of the weights are summed apart.
CHUNKS = 8

# Addresses are integers, strides count elements.


@serial
def _add(row, out, n):
    a, b = pointer(row, T(0)), pointer(out, T(0))
    for i in range(n):
        b[i] += a[i]


@parallel
def _pack(weight, packed, classes, steps, groups, inner, outer, taps):
    """The panels of all classes of taps, which are `steps` apart."""
    size, width = size_of(T(0)), panel()
    panels = (outer + width - 1) // width
    each = groups * panels
    for unit in prange(classes.shape[0] * each):
        k, number = unit // each, unit % each
        kh, kw, start, tap = classes[k, 1], classes[k, 4], classes[k, 7], classes[k, 8]
        first = number % panels * width
        tap += (number // panels * inner * outer + first) * taps
        pack_panel(weight + tap * size,
                   packed + (start + number * kh * kw * inner * width) * size, (kh, kw), steps,
                   inner, outer * taps, min(width, outer - first), taps)  # fmt: skip


@parallel
def _forward(shape, sizes, phase, stride, corner, x, packed, classes, bias, y, band, scratch, room,
             parts):  # fmt: skip
    """Results of a batch; scratch has `room` elements for each of `parts` threads.

    The `corner` of an image with its border: rows and columns before the image, columns in all.
    """
    c, o, dh, dw, groups = shape
    n, h, w, tall, wide = sizes
    sh, sw = stride
    back, left, width = corner
    size = size_of(T(0))
    bands = (tall + band - 1) // band
    units = n * bands
    for part in prange(parts):
        for unit in range(units * part // parts, units * (part + 1) // parts):
            item, begin = unit // bands, unit % bands * band
            end = min(tall, begin + band)
            source, low = x + item * h * w * c * size, 0
            if room > 0:
                source, low = scratch + part * room * size, (begin + phase) // sh - back
                bordered(x + item * h * w * c * size, source, h, w, c, 0, left, low,
                         (end + phase + sh - 1) // sh - low, width)  # fmt: skip
            for k in range(classes.shape[0]):
                row, kh, up = classes[k, 0], classes[k, 1], classes[k, 2]
                column, kw, ahead = classes[k, 3], classes[k, 4], classes[k, 5]
                places, start = classes[k, 6], classes[k, 7]
                # Of this class's rows, `sh` apart from `row` on, those in the band.
                first = (begin - row + sh - 1) // sh
                count = (end - row + sh - 1) // sh - first
                above = first - up
                at = ((item * tall + first * sh + row) * wide + column) * o
                rows_of_sums((c, o, places, kh, kw, 1, 1, dh, dw, groups),
                             source + ((above - low) * width + left + ahead) * c * size, width * c,
                             (-above, h - above), packed + start * size, y + at * size,
                             (sh * wide * o, sw * o), count)  # fmt: skip
            if bias != 0:
                for r in range(begin, end):
                    _add(bias, y + (item * tall + r) * wide * o * size, wide * o)


@parallel
def _backward(shape, sizes, corner, wants, g, x, packed, gx, sums, weights, biases, chunks, pieces,
              scratch, room, at_once, parts):  # fmt: skip
    """Gradients of a batch; `shape` is that of the convolution of g. `wants`: input, weights, bias.

    Each image is in so many `pieces`; scratch has `room` elements for each image at a time.
    """
    n, h, w, tall, wide = sizes
    o, c, _, kh, _, sh, _, dh, _, _ = shape
    top, left, width = corner
    want_input, want_weight, want_bias = wants
    size = size_of(T(0))
    units, image = n * pieces, tall * wide * o
    for part in prange(parts):
        images = scratch + part * at_once * room * size
        for chunk in range(chunks * part // parts, chunks * (part + 1) // parts):
            total, bias = sums + chunk * weights * size, biases + chunk * wide * o * size
            clear(bias, wide * o)
            start, last = chunk * units // chunks, (chunk + 1) * units // chunks
            for unit in range(start, last, at_once):
                items = min(at_once, last - unit)
                item, piece = unit // pieces, unit % pieces
                begin, end = h * piece // pieces, h * (piece + 1) // pieces
                if want_bias:
                    first = item * tall + tall * piece // pieces
                    rows = tall * (piece + 1) // pieces - tall * piece // pieces
                    for r in range(rows + (items - 1) * tall):
                        _add(g + (first + r) * wide * o * size, bias, wide * o)
                above = begin * sh - top  # the row of g that the first window begins with
                source, step = g + (item * tall + above) * wide * o * size, image
                if room > 0:
                    for k in range(items):
                        bordered(g + (item + k) * image * size, images + k * room * size, tall,
                                 wide, o, 0, left, above,
                                 (end - begin - 1) * sh + (kh - 1) * dh + 1, width)  # fmt: skip
                    source, step = images, room
                at = (item * h + begin) * w * c * size
                if want_weight:
                    weight_sums(shape, source, width * o, step, x + at, w * c, h * w * c, total,
                                unit == start, items, end - begin)  # fmt: skip
                for k in range(items if want_input else 0):
                    rows_of_sums(shape, source + k * step * size, width * o,
                                 (-above, tall - above), packed, gx + at + k * h * w * c * size,
                                 (w * c, c), end - begin)  # fmt: skip


def _axis(kernel: int, stride: int, pad: int, dilation: int) -> list[tuple[int, ...]]:
    """The classes of an axis: (place number 0, first tap, taps, how far before the place of the
    image with the same number a window begins)."""
    step = stride // gcd(stride, dilation)
    found: list[tuple[int, ...]] = []
    for place in range(stride):
        first = next((k for k in range(step) if k * dilation % stride == place), kernel)
        count = max(0, -(-(kernel - first) // step))
        last = (first * dilation - place) // stride + (count - 1) * step * dilation // stride
        found.append((place - pad, first, count, last if count else 0))
    return found


class _Call:
    """The numbers of a call, with a second axis where there is one only."""

    def __init__(self, x: Array, weight: Array, out: Any, stride: Any, padding: Any,
                 dilation: Any, groups: int) -> None:  # fmt: skip
        if x.ndim == 3:
            x, weight = x[:, :, None], weight[:, :, None]
            out, stride, padding, dilation = (1, *out), (1, *stride), (0, *padding), (1, *dilation)
        self.x, self.weight = x, weight
        (self.tall, self.wide), self.stride, self.padding = out, stride, padding
        self.n, self.c, self.h, self.w = x.shape
        self.inner, self.outer, self.groups = self.c // groups, weight.shape[1], groups
        self.o = groups * self.outer
        sh, sw = stride
        rows, columns = (_axis(*each) for each in zip(weight.shape[2:], stride, padding, dilation))
        # The steps from one tap of a class to the next, in the kernel and in the image.
        self.steps = tuple(s // gcd(s, d) for s, d in zip(stride, dilation))
        self.dilation = tuple(d // gcd(s, d) for s, d in zip(stride, dilation))
        self.back = max(back for *_, back in rows)
        self.left = max(0, max(back for *_, back in columns) - padding[1] // sw)
        right = max(0, (self.wide + padding[1] - 1) // sw - self.w + 1)
        below = (self.tall + padding[0] - 1) // sh - self.h + 1
        self.width = self.left + self.w + right
        self.bordered = self.back > 0 or below > 0 or self.width > self.w
        self.classes = [(*r, *c) for r in rows for c in columns]

    def packed(self, storage: str) -> tuple[Array, Array]:
        """The weights of each class as the micro-kernel takes them, and the table of classes."""
        weight = np.ascontiguousarray(self.weight)
        (*_, kh, kw), (down, ahead) = weight.shape, self.steps
        taps = kh * kw
        alone = self.groups > 1 and self.inner == self.outer == 1
        panels, _, width = packed_shape(1, self.outer, storage)
        each = self.c if alone else self.groups * panels * self.inner * width
        packed, table, start = np.empty(taps * each, storage), [], 0
        sw = self.stride[1]
        for row, tap_row, rows, up, column, tap_column, columns, back in self.classes:
            first = -(column // sw)  # the first place that the result has
            places = (self.wide - column + sw - 1) // sw - first
            if places <= 0:
                continue
            if not (rows and columns):
                rows, columns, up, back = 0, 1, 0, 0
            # The last tap comes first: it meets what lies before the others in the image.
            tap = (tap_row + (rows - 1) * down) * kw + tap_column + (columns - 1) * ahead
            at = first * sw + column
            table.append((row, rows, up, at, columns, first - back, places, start, tap))
            count = rows * columns
            if alone and count:
                those = weight[:, 0, tap_row::down, tap_column::ahead][:, ::-1, ::-1]
                packed[start : start + count * each].reshape(rows, columns, -1)[...] = (
                    those.transpose(1, 2, 0)
                )
            start += count * each
        classes = np.array(table, np.int64).reshape(-1, 9)
        if not alone:
            _pack[storage](address(weight), address(packed), classes, (-down * kw, -ahead),
                           self.groups, self.inner, self.outer, taps)  # fmt: skip
        return packed, classes


def transposed_convolution(
    m: Backend, x: Array, weight: Array, bias: Array | None = None, out: Any = (),
    stride: Any = (1, 1), padding: Any = (0, 0), dilation: Any = (1, 1), groups: int = 1,
) -> Array:  # fmt: skip
    """The forward."""
    if x.dtype.itemsize == 2:
        x32, w32, b32 = map(widened, (x, weight, bias))
        y = transposed_convolution(m, x32, w32, b32, out, stride, padding, dilation, groups)
        return y.astype(x.dtype)
    storage = numpy_storage(x.dtype)
    call = _Call(x, weight, out, stride, padding, dilation, groups)
    own, (packed, classes) = channels_last(call.x), call.packed(storage)
    y = empty((call.n, call.tall, call.wide, call.o), x.dtype)
    row = np.empty(0, x.dtype) if bias is None else np.tile(bias, call.wide)
    threads, sh = pool.get_num_threads(), call.stride[0]
    line = x.dtype.itemsize * (call.wide * call.o + -(-call.width * call.c // sh))
    # Few images are cut into bands for all threads; how they are cut changes no sum.
    band = max(1, min(BAND // line, -(-call.n * call.tall // threads), call.tall))
    band = min(call.tall, -(-band // sh) * sh)
    phase = call.padding[0]
    rows = -(-(band + phase) // sh) - phase // sh + call.back
    room = rows * call.width * call.c if call.bordered else 0
    parts = min(threads, call.n * -(-call.tall // band))
    scratch = empty((parts * room,), x.dtype)
    _forward[storage](
        (call.c, call.o, *call.dilation, groups), (call.n, call.h, call.w, call.tall, call.wide),
        phase, call.stride, (call.back, call.left, call.width), address(own),
        address(packed), classes, address(row) if row.size else 0, address(y), band,
        address(scratch), room, parts,
    )  # fmt: skip
    seen = y.transpose(0, 3, 1, 2)
    return seen if x.ndim == 4 else seen[:, :, 0]


def transposed_convolution_backward(
    m: Backend, g: Array, x: Array, weight: Array, stride: Any, padding: Any, dilation: Any,
    groups: int, needs: Any, weight_home: Array | None = None, bias_home: Array | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """All gradients that are needed, in one pass over the batch."""
    if x.dtype.itemsize == 2:
        g32, x32, w32 = map(widened, (g, x, weight))
        found = transposed_convolution_backward(
            m, g32, x32, w32, stride, padding, dilation, groups, needs
        )
        homes = None, weight_home, bias_home
        return tuple(narrowed(a, x.dtype, home) for a, home in zip(found, homes))
    storage, dtype = numpy_storage(x.dtype), x.dtype
    call = call_of(g.shape, weight.shape, stride, padding, dilation, groups)
    seen, top = call.inside(x), call.inside(g)
    n, h, w, c = seen.shape
    packed = (call.packed(weight, storage, transposed=False, turned=False) if needs[0]
              else np.empty(0, dtype))  # fmt: skip
    gx = empty(seen.shape if needs[0] else (0,), dtype)
    weights = call.weights(storage)
    nbytes = weights * dtype.itemsize
    pieces = max(1, min(h, 4 // n)) if nbytes <= TOGETHER else 1
    chunks = min(CHUNKS, n * pieces, max(4, CHUNK_BYTES // nbytes))
    sums = empty((chunks if needs[1] else 0, weights), dtype)
    biases = np.empty((chunks, call.w, call.c), dtype)
    room = call.tall * call.wide * call.c if call.bordered else 0
    image = (call.h * call.w * call.c + h * w * c) * dtype.itemsize
    at_once = max(1, min(-(-n // chunks), TOGETHER // image, nbytes // image)) if pieces == 1 else 1
    parts = min(pool.get_num_threads(), chunks)
    scratch = empty((parts * at_once * room,), dtype)
    shape = (call.c, c, w, *call.shape[3:])
    _backward[storage](
        shape, (n, h, w, call.h, call.w), (call.top, call.left, call.wide),
        tuple(map(bool, needs)), address(top), address(seen), address(packed), address(gx),
        address(sums), weights, address(biases), chunks, pieces, address(scratch), room, at_once,
        parts,
    )  # fmt: skip
    return (
        call.outside(gx, x.shape) if needs[0] else None,
        call.unpacked(storage, sums, weight.shape, weight_home) if needs[1] else None,
        biases.sum(axis=(0, 1), out=bias_home) if needs[2] else None,
    )


def _refuse(
    m: Backend, x: Any, weight: Any, bias: Any = None, out: Any = (), stride: Any = (),
    padding: Any = (), dilation: Any = (), groups: int = 1,
) -> str | None:  # fmt: skip
    if why := misfit(x, weight, bias):
        return why
    if x.shape[1] != weight.shape[0] or x.shape[1] % groups or min(out) < 1:
        return "shapes that do not fit"
    return None if x.size and weight.size else "nothing to compute"


def _refuse_backward(
    m: Backend, g: Any, x: Any, weight: Any, stride: Any, padding: Any, dilation: Any, groups: int,
    needs: Any, weight_home: Any = None, bias_home: Any = None,
) -> str | None:  # fmt: skip
    for name, a in (("gradient", g), ("home", weight_home), ("home", bias_home)):
        if a is not None and (not isinstance(a, np.ndarray) or a.dtype != x.dtype):
            return f"a {name} that is not of {x.dtype}"
    return _refuse(m, x, weight, None, g.shape[2:], stride, padding, dilation, groups)


KERNELS = {
    "transposed_convolution": Kernel(transposed_convolution, LABEL, _refuse),
    "transposed_convolution_backward": Kernel(
        transposed_convolution_backward, LABEL, _refuse_backward
    ),
}
