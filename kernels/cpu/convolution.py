"""Convolutions over two axes, or one: sums of products where the images lie, with no patches.

Images are taken with their channels last: a window's row is then contiguous, and a row of results
is one product of :mod:`gpugrad.kernels.cpu.microkernel`, whose left operand overlaps itself. Images
that lie otherwise are turned first; results lie with the channels last behind the strides of
(N, C, H, W), so that layers in a row turn nothing. Where there is padding, images are copied into
one with a border, a band of rows at a time.

Windows of 3×3 that lie close are for :mod:`gpugrad.kernels.cpu.winograd`, where there are enough.

The gradient of the input is the same with the weights turned around and the strides undone. The
gradient of the weights is summed over pieces of the batch, `CHUNKS` at most whatever the number of
threads, and these sums are added in order.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu import pool, winograd
from gpugrad.kernels.cpu.compile import CpuTemplate, numpy_storage, parallel, serial
from gpugrad.kernels.cpu.elementwise import LABEL
from gpugrad.kernels.cpu.memory import (
    address,
    channels_last,
    clear,
    copy,
    pointer,
    size_of,
)
from gpugrad.kernels.cpu.microkernel import packed_shape
from gpugrad.kernels.cpu.windows import (
    bordered,
    pack,
    rows_of_sums,
    spread_rows,
    unpack,
    weight_sums,
)
from gpugrad.kernels.formula import formula
from gpugrad.kernels.template import Placeholder, T, device
from gpugrad.ops import formulas

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

#: Pieces of the batch whose gradients of the weights are summed apart, and the bytes they may take.
CHUNKS, CHUNK_BYTES = 16, 1 << 25

#: Bytes of a band of rows: what is read and what is written stays in a core's cache.
BAND = 1 << 18

#: Bytes of images whose shares of the weights' gradient are added up one after the other.
TOGETHER = 1 << 20

f: Any = Placeholder("f")
df: Any = Placeholder("df")
finish: Any = Placeholder("finish")
slope: Any = Placeholder("slope")

# A shape is (channels, outputs, places in a row, kernel rows, kernel columns, stride of rows, of
# columns, dilation of rows, of columns, groups). Addresses are integers, strides count elements.

# -- results and their gradients -------------------------------------------------------------------


@device
def _same(x):
    return x


@device
def _pass_on(g, z):
    return g


@serial
def _finish(z, bias, y, n):
    """Bias and activation where the result is already: y is z."""
    # By one pointer: through two that meet, no loop is vectorised.
    a, b = pointer(z, T(0)), pointer(bias, T(0))
    for i in range(n):
        a[i] = f(a[i] + b[i])


@serial
def _finish_both(z, bias, y, n):
    """Bias, and activation into an array of its own."""
    a, b, c = pointer(z, T(0)), pointer(bias, T(0)), pointer(y, T(0))
    for i in range(n):
        x = a[i] + b[i]
        a[i] = x
        c[i] = f(x)


@parallel
def _forward(shape, sizes, corner, x, packed, bias, z, y, band, scratch, room, parts):
    """Results of a batch; scratch has `room` elements for each of `parts` threads."""
    n, h, w, rows, wide = sizes
    c, o, places, kh, _, sh, _, dh, _, _ = shape
    top, left = corner
    size = size_of(T(0))
    bands = (rows + band - 1) // band
    units = n * bands
    for part in prange(parts):
        for unit in range(units * part // parts, units * (part + 1) // parts):
            item, first = unit // bands, unit % bands * band
            count = min(band, rows - first)
            source = x + (item * h * w * c + first * sh * w * c) * size
            above = first * sh - top
            if room > 0:
                source = scratch + part * room * size
                bordered(x + item * h * w * c * size, source, h, w, c, top, left, first * sh,
                         (count - 1) * sh + (kh - 1) * dh + 1, wide)  # fmt: skip
            start = (item * rows + first) * places * o * size
            rows_of_sums(shape, source, wide * c, (-above, h - above), packed, z + start,
                         (places * o, o), count)  # fmt: skip
            if bias != 0:
                for r in range(count):
                    at = start + r * places * o * size
                    finish(z + at, bias, y + at, places * o)


@serial
def _slope(g, kept, out, total, n):
    a, b = pointer(g, T(0)), pointer(kept, T(0))
    c, d = pointer(out, T(0)), pointer(total, T(0))
    for i in range(n):
        x = df(a[i], b[i])
        c[i] = x
        d[i] += x


@parallel
def _backward(shape, sizes, corner, border, wants, g, kept, x, packed, gx, sums, weights, biases,
              chunks, scratch, rooms, at_once, parts):  # fmt: skip
    """Gradients of a batch. `wants` says which: input, whether gathered, and weights."""
    n, h, w, rows, wide, tall = sizes
    c, o, places, kh, kw, _, _, dh, dw, groups = shape
    top, left = corner
    # g with a border, in which the gradient of the input is a convolution.
    g_top, g_left, _, g_wide = border
    want_input, gathered, want_weight = wants
    room, g_room = rooms
    size = size_of(T(0))
    turned = (o, c, w, kh, kw, 1, 1, dh, dw, groups)
    has_border = wide > w or tall > h
    for part in prange(parts):
        images = scratch + part * at_once * (room + g_room) * size
        slopes = images + at_once * room * size
        inside = slopes + (g_top * g_wide + g_left) * o * size
        clear(slopes, at_once * g_room)
        for chunk in range(chunks * part // parts, chunks * (part + 1) // parts):
            total, bias = sums + chunk * weights * size, biases + chunk * places * o * size
            clear(bias, places * o)
            begin, last = chunk * n // chunks, (chunk + 1) * n // chunks
            for first in range(begin, last, at_once):
                items = min(at_once, last - first)
                for k in range(items):
                    for r in range(rows):
                        at = ((first + k) * rows + r) * places * o * size
                        to = inside + (k * g_room + r * g_wide * o) * size
                        slope(g + at, kept + at, to, bias, places * o)
                if want_weight:
                    source, image = x + first * h * w * c * size, h * w * c
                    if has_border:
                        for k in range(items):
                            bordered(source + k * image * size, images + k * room * size, h, w, c,
                                     top, left, 0, tall, wide)  # fmt: skip
                        source, image = images, room
                    weight_sums(shape, source, wide * c, image, inside, g_wide * o, g_room, total,
                                first == begin, items, rows)  # fmt: skip
                if not want_input:
                    continue
                for k in range(items):
                    target = gx + (first + k) * h * w * c * size
                    if gathered:
                        rows_of_sums(turned, slopes + k * g_room * size, g_wide * o,
                              (g_top, g_top + rows), packed, target, (w * c, c), h)  # fmt: skip
                        continue
                    here = images if has_border else target
                    clear(here, tall * wide * c)
                    spread_rows(shape, inside + k * g_room * size, wide * c, packed, here, rows)
                    for r in range(h if has_border else 0):
                        at = ((top + r) * wide + left) * c * size
                        copy(images + at, target + r * w * c * size, w * c)


# -- launching ------------------------------------------------------------------------------------


@cache
def _with_finish(loops: CpuTemplate, activation: str | None, both: bool) -> CpuTemplate:
    rule = _same if activation is None else formula(activation).plain
    return loops.bind(finish=(_finish_both if both else _finish).bind(f=rule))


@cache
def _with_slope(loops: CpuTemplate, activation: str | None) -> CpuTemplate:
    rule = _pass_on if activation is None else formula(f"{activation}_partial").plain
    return loops.bind(slope=_slope.bind(df=rule))


class Call:
    """The numbers of a call, with a second axis where there is one only."""

    def __init__(self, x: Shape, weight: Shape, stride: Any, padding: Any, dilation: Any,
                 groups: int) -> None:  # fmt: skip
        if len(x) == 3:
            x, weight = (*x[:2], 1, x[2]), (*weight[:2], 1, weight[2])
            stride, padding, dilation = (1, *stride), ((0, 0), *padding), (1, *dilation)
        (self.top, bottom), (self.left, right) = padding
        (sh, sw), (dh, dw) = stride, dilation
        self.n, self.c, self.h, self.w = x
        self.o, self.inner, kh, kw = weight
        self.tall, self.wide = self.h + self.top + bottom, self.w + self.left + right
        self.rows = (self.tall - dh * (kh - 1) - 1) // sh + 1
        self.places = (self.wide - dw * (kw - 1) - 1) // sw + 1
        self.groups, self.taps = groups, kh * kw
        self.shape = (self.c, self.o, self.places, kh, kw, sh, sw, dh, dw, groups)
        self.corner = (self.top, self.left)
        self.result = (self.n, self.rows, self.places, self.o)
        self.bordered = self.tall > self.h or self.wide > self.w
        self.alone = groups > 1 and self.inner == 1 and self.o == groups
        # The gradient of the input as a convolution of that of the result, in a border.
        self.border = (dh * (kh - 1) - self.top, dw * (kw - 1) - self.left,
                       self.h + dh * (kh - 1), self.w + dw * (kw - 1))  # fmt: skip
        fits = self.border[2] - self.border[0] >= self.rows
        fits = fits and self.border[3] - self.border[1] >= self.places
        self.gathered = sh == sw == 1 and min(self.border) >= 0 and fits

    def packed(self, weight: Array, storage: str, transposed: bool, turned: bool) -> Array:
        """The weights as the micro-kernel takes them; transposed: from outputs to inputs."""
        weight = np.ascontiguousarray(weight)
        taps, outer = self.taps, self.o // self.groups
        if self.alone:
            last = weight.reshape(self.c, taps).T
            return np.ascontiguousarray(last[::-1] if turned else last)
        rows, columns = (outer, self.inner) if transposed else (self.inner, outer)
        strides = (self.inner * taps, taps) if transposed else (taps, self.inner * taps)
        panels, _, width = packed_shape(1, columns, storage)
        packed = np.empty(self.groups * panels * taps * rows * width, storage)
        pack[storage](
            address(weight) + (taps - 1 if turned else 0) * weight.itemsize, address(packed),
            self.groups, outer * self.inner * taps, (1, taps), (0, -1 if turned else 1), rows,
            strides[0], columns, strides[1],
        )  # fmt: skip
        return packed

    def weights(self, storage: str) -> int:
        """Elements of a gradient of the weights, in panels."""
        outer = self.o // self.groups
        panels, _, width = packed_shape(1, outer, storage)
        each = self.o if self.alone else self.groups * panels * self.inner * width
        return int(self.taps * each)

    def unpacked(self, storage: str, sums: Array, shape: tuple[int, ...], home: Any) -> Array:
        """The gradient of the weights, of those in panels that are added up in their order."""
        gw = np.empty(shape, sums.dtype) if home is None else home
        if self.alone:
            gw[...] = sums.sum(axis=0).reshape(self.taps, self.o).T.reshape(shape)
            return gw
        dense = gw if gw.flags.c_contiguous and gw.flags.aligned else np.empty(shape, sums.dtype)
        unpack[storage](address(sums), *sums.shape, address(dense), self.groups, self.taps,
                        self.inner, self.o // self.groups)  # fmt: skip
        if dense is not gw:
            gw[...] = dense
        return gw

    def outside(self, y: Array, shape: tuple[int, ...]) -> Array:
        """An array with the channels last, seen as (N, C, \\*axes)."""
        seen = y.transpose(0, 3, 1, 2)
        return seen if len(shape) == 4 else seen[:, :, 0]

    def inside(self, x: Array) -> Array:
        return channels_last(x[:, :, None] if x.ndim == 3 else x)


#: The numbers of a call of these shapes: a net has few.
call_of = lru_cache(1024)(Call)


def widened(x: Any) -> Any:
    """An array in single precision; nothing stays nothing."""
    return None if x is None else x.astype(np.float32)


def narrowed(x: Array | None, dtype: Any, home: Array | None) -> Array | None:
    """A result in half precision, in the memory that is meant for it, if there is some."""
    if x is None or home is None:
        return None if x is None else x.astype(dtype)
    home[...] = x
    return home


def _run_forward(
    loops: CpuTemplate, call: Call, storage: str, x: Array, weight: Array, row: int, z: Array,
    y: Array,
) -> None:  # fmt: skip
    """Fill `z`, and `y`, by what `finish` makes of it; `row` is where the bias lies, tiled."""
    packed = call.packed(weight, storage, transposed=False, turned=False)
    _, _, _, kh, _, sh, _, dh, _, _ = call.shape
    size = x.dtype.itemsize
    line = size * max(call.places * call.o + sh * call.wide * call.c, 1)
    band = max(1, min(call.rows, BAND // line))
    room = ((band - 1) * sh + (kh - 1) * dh + 1) * call.wide * call.c if call.bordered else 0
    parts = min(pool.get_num_threads(), max(1, call.n * -(-call.rows // band)))
    scratch = empty((parts * room,), x.dtype)
    loops[storage](
        call.shape, (call.n, call.h, call.w, call.rows, call.wide), call.corner, address(x),
        address(packed), row, address(z), address(y), band, address(scratch), room, parts,
    )  # fmt: skip


def _run_backward(
    loops: CpuTemplate, call: Call, storage: str, g: Array, kept: Array, x: Array, weight: Array,
    wants: tuple[bool, bool], home: Array | None,
) -> tuple[Array | None, Array | None, Array]:  # fmt: skip
    """Gradients of the input and of the weights, where wanted, and shares of that of the bias."""
    want_input, want_weight = wants
    packed = np.empty(0, x.dtype)
    if want_input:
        packed = call.packed(weight, storage, transposed=True, turned=call.gathered)
    gx = empty((call.n, call.h, call.w, call.c) if want_input else (0,), x.dtype)
    weights = call.weights(storage)
    nbytes = weights * x.dtype.itemsize
    chunks = min(CHUNKS, call.n, max(4, CHUNK_BYTES // nbytes))
    sums = empty((chunks if want_weight else 0, weights), x.dtype)
    biases = np.empty((chunks, call.places, call.o), x.dtype)
    use_border = want_input and call.gathered
    border = call.border if use_border else (0, 0, call.rows, call.places)
    room = call.tall * call.wide * call.c if call.bordered else 0
    g_room = border[2] * border[3] * call.o
    parts = min(pool.get_num_threads(), chunks)
    # Images whose shares of the weights' gradient are added up together: many, if it is large.
    image = (call.h * call.w * call.c + g_room) * x.dtype.itemsize
    at_once = max(1, min(-(-call.n // chunks), TOGETHER // image, nbytes // image))
    scratch = empty((parts * at_once * (room + g_room),), x.dtype)
    loops[storage](
        call.shape, (call.n, call.h, call.w, call.rows, call.wide, call.tall), call.corner, border,
        (want_input, call.gathered, want_weight), address(g), address(kept), address(x),
        address(packed), address(gx), address(sums), weights, address(biases), chunks,
        address(scratch), (room, g_room), at_once, parts,
    )  # fmt: skip
    gw = call.unpacked(storage, sums, weight.shape, home) if want_weight else None
    return gx if want_input else None, gw, biases


def convolution(
    m: Backend, x: Array, weight: Array, bias: Array | None = None, stride: Any = (1, 1),
    padding: Any = ((0, 0), (0, 0)), dilation: Any = (1, 1), groups: int = 1,
    activation: str | None = None,
) -> tuple[Array, Array | None]:  # fmt: skip
    """The forward, and what the backward needs of it."""
    storage = numpy_storage(x.dtype)
    if x.dtype.itemsize == 2:
        x32, w32, b32 = map(widened, (x, weight, bias))
        y, kept = convolution(m, x32, w32, b32, stride, padding, dilation, groups, activation)
        result = y.astype(x.dtype)
        return result, None if kept is None else result if kept is y else kept.astype(x.dtype)
    call = call_of(x.shape, weight.shape, stride, padding, dilation, groups)
    own = call.inside(x)
    y = empty(call.result, x.dtype)
    # What the derivative is told: the result, or what the activation was applied to.
    both = activation is not None and "y" not in formula(f"{activation}_partial").operands
    z = empty(call.result, x.dtype) if both else y
    row = 0
    if bias is not None or activation is not None:
        tiled = np.empty((call.places, call.o), x.dtype)
        tiled[...] = 0 if bias is None else bias
        row = address(tiled)
    tiles = winograd.suits(call, storage)
    loops = _with_finish(winograd.results if tiles else _forward, activation, both)
    way = winograd.forward if tiles else _run_forward
    way(loops, call, storage, own, weight, row, z, y)
    result = call.outside(y, x.shape)
    if activation is None:
        return result, None
    return result, call.outside(z, x.shape) if both else result


def convolution_backward(
    m: Backend, g: Array, x: Array, weight: Array, bias: Array | None, kept: Array | None,
    stride: Any, padding: Any, dilation: Any, groups: int, activation: str | None, needs: Any,
    weight_home: Array | None = None, bias_home: Array | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """All gradients that are needed, in one pass over the batch."""
    storage = numpy_storage(x.dtype)
    if x.dtype.itemsize == 2:
        g32, x32, w32, b32, kept32 = map(widened, (g, x, weight, bias, kept))
        found = convolution_backward(
            m, g32, x32, w32, b32, kept32, stride, padding, dilation, groups, activation, needs
        )
        homes = None, weight_home, bias_home
        return tuple(narrowed(a, x.dtype, home) for a, home in zip(found, homes))
    call = call_of(x.shape, weight.shape, stride, padding, dilation, groups)
    own, top = call.inside(x), call.inside(g)
    told = top if kept is None else call.inside(kept)
    tiles = winograd.suits(call, storage)
    loops = _with_slope(winograd.gradients if tiles else _backward, activation)
    way = winograd.backward if tiles else _run_backward
    wants = bool(needs[0]), bool(needs[1])
    gx, gw, biases = way(loops, call, storage, top, told, own, weight, wants, weight_home)
    gb = np.add.reduce(biases, axis=(0, 1), out=bias_home) if needs[2] else None
    return None if gx is None else call.outside(gx, x.shape), gw, gb


def misfit(x: Any, weight: Any, bias: Any) -> str | None:
    """Why these are nothing for kernels, whatever their sizes."""
    for name, a in (("weight", weight), ("bias", bias)):
        if a is not None and not isinstance(a, np.ndarray):
            return f"a {name} that is no array"
        if a is not None and a.dtype != x.dtype:
            return f"{name} of {a.dtype} for an input of {x.dtype}"
    if not numpy_storage(x.dtype):
        return f"no kernel for {x.dtype}"
    if x.ndim not in (3, 4) or weight.ndim != x.ndim:
        return f"{max(x.ndim - 2, 0)} axes; there are kernels for one and two"
    return None


def _refuse(
    m: Backend, x: Any, weight: Any, bias: Any = None, stride: Any = (), padding: Any = (),
    dilation: Any = (), groups: int = 1, activation: str | None = None,
) -> str | None:  # fmt: skip
    if why := misfit(x, weight, bias):
        return why
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return "shapes that do not fit"
    if bias is not None and bias.shape != weight.shape[:1]:
        return "a bias that does not fit"
    if activation is not None and not hasattr(formulas, f"{activation}_partial"):
        return f"no activation {activation!r}"
    if not (x.size and weight.size):
        return "nothing to compute"
    call = call_of(x.shape, weight.shape, stride, padding, dilation, groups)
    return "no place for a window" if call.rows < 1 or call.places < 1 else None


def _refuse_backward(
    m: Backend, g: Any, x: Any, weight: Any, bias: Any, kept: Any, stride: Any, padding: Any,
    dilation: Any, groups: int, activation: str | None, needs: Any, weight_home: Any = None,
    bias_home: Any = None,
) -> str | None:  # fmt: skip
    homes = (("home", weight_home), ("home", bias_home))
    for name, a in (("gradient", g), ("kept result", kept), *homes):
        if a is not None and (not isinstance(a, np.ndarray) or a.dtype != x.dtype):
            return f"a {name} that is not of {x.dtype}"
    return _refuse(m, x, weight, bias, stride, padding, dilation, groups, activation)


KERNELS = {
    "convolution": Kernel(convolution, LABEL, _refuse),
    "convolution_backward": Kernel(convolution_backward, LABEL, _refuse_backward),
}
