"""Convolutions by windows of 3×3 with fewer multiplications: Winograd's F(2×2, 3×3).

An image is cut into tiles of 4×4 that overlap by two, each of which gives 2×2 results. With

    V = Bᵀ d B  of a tile d,      U = G w Gᵀ  of a window w,      y = Aᵀ (U ∘ V) A

there are 16 multiplications in place of 36. Summed over the channels they are 16 products of
matrices, (tiles, channels) by (channels, outputs), for the micro-kernel; the changes of basis
around them are additions, a vector of channels at a time, over so few tiles that all of it stays
in a core's second cache. The backward is the transpose of each step: of a tile of the gradient
S = A g Aᵀ, which gives Gᵀ (Σ S ∘ V) G for the weights and B (S ∘ U) Bᵀ, added where tiles
overlap, for the input.

A NaN or an infinity in a tile reaches all results of the tile, and not those alone whose window it
is in. Rounding errors are about twice those of a direct sum; sums of small integers are exact.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu import pool
from gpugrad.kernels.cpu.compile import VECTOR, parallel, serial
from gpugrad.kernels.cpu.memory import address, clear, copy, pointer, size_of
from gpugrad.kernels.cpu.microkernel import packed_shape, panel, product
from gpugrad.kernels.cpu.windows import bordered
from gpugrad.kernels.template import Placeholder, T, device

#: The changes of basis. Signs are such that no sum has negative terms alone.
MATRICES = (
    ("Bt", ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, -1, 0, 1))),
    ("B", ((1, 0, 0, 0), (0, 1, -1, -1), (-1, 1, 1, 0), (0, 0, 0, 1))),
    ("At", ((1, 1, 1, 0), (0, 1, -1, 1))),
    ("A", ((1, 0), (1, 1), (1, -1), (0, 1))),
    ("G", ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))),
    ("Gt", ((1, 0.5, 0.5, 0), (0, 0.5, -0.5, 0), (0, 0.5, 0.5, 1))),
)

#: Tiles that are taken together, about: their sixteen matrices are to stay in the second cache.
TILES = 72

#: The least numbers that are worth it: of channels and outputs together, and of tiles.
CHANNELS, FEWEST = 64, 64

#: Pieces of the batch whose gradients of the weights are summed apart, and the bytes they may take.
CHUNKS, CHUNK_BYTES = 16, 1 << 23

Array = np.ndarray[Any, Any]

change: Any = Placeholder("change")
finish: Any = Placeholder("finish")
slope: Any = Placeholder("slope")

# A shape is (channels, outputs, rows of results, places in a row, rows of tiles, tiles in a row).
# Addresses are integers, strides count elements.

# -- changes of basis ------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def _both_sides(typing, zero, name, adds, source, steps, target, to_steps):
    """M X Mᵀ of a square of vectors: X from `source`, into or added to `target`.

    `name` is that of M, `steps` lead from row to row and from column to column, in bytes. Places
    are written last to first: where a step is 0, it is the first place that is left.
    """
    # All named here: it is by what a function names that its machine code is found on disk.
    matrix, vector = dict(MATRICES)[name.literal_value], VECTOR
    word, pair = types.int64, types.UniTuple(types.int64, 2)

    def code(context, builder, signature, args):
        _, _, _, source, steps, target, to_steps = args
        size = zero.bitwidth // 8
        line = ir.VectorType(context.get_value_type(zero), vector // size)

        def place(address, steps, i, j):
            for k, stride in zip((i, j), (builder.extract_value(steps, n) for n in range(2))):
                address = builder.add(address, builder.mul(stride, stride.type(k)))
            return builder.inttoptr(address, ir.PointerType())

        def total(factors, terms):
            parts = sorted(((f, x) for f, x in zip(factors, terms) if f), key=lambda p: -p[0])
            found = None
            for factor, x in parts:
                if abs(factor) != 1:
                    x = builder.fmul(x, ir.Constant(line, [abs(factor)] * line.count))
                join = builder.fadd if factor > 0 else builder.fsub
                found = x if found is None else join(found, x)
            return found

        rows, columns = range(len(matrix)), range(len(matrix[0]))
        x = [[builder.load(place(source, steps, i, j), align=size, typ=line) for j in columns]
             for i in columns]  # fmt: skip
        half = [[total(matrix[i], [x[k][j] for k in columns]) for j in columns] for i in rows]
        for i in reversed(rows):
            for j in reversed(rows):
                there, y = place(target, to_steps, i, j), total(matrix[j], half[i])
                if adds.literal_value:
                    y = builder.fadd(builder.load(there, align=size, typ=line), y)
                builder.store(y, there, align=size)
        return context.get_dummy_value()

    return types.void(zero, name, adds, word, pair, word, pair), code


# Functions of their own, for their sums: those of a loop may be compiled in any order, and not the
# same one where a kernel is compiled for one thread and for several.


@device
def _of_images(source, steps, target, to_steps):
    _both_sides(T(0), "Bt", False, source, steps, target, to_steps)


@device
def _to_images(source, steps, target, to_steps):
    _both_sides(T(0), "B", True, source, steps, target, to_steps)


@device
def _to_results(source, steps, target, to_steps):
    _both_sides(T(0), "At", False, source, steps, target, to_steps)


@device
def _of_results(source, steps, target, to_steps):
    _both_sides(T(0), "A", False, source, steps, target, to_steps)


@device
def _of_windows(source, steps, target, to_steps):
    _both_sides(T(0), "G", False, source, steps, target, to_steps)


@device
def _to_windows(source, steps, target, to_steps):
    _both_sides(T(0), "Gt", False, source, steps, target, to_steps)


@serial
def _tiles(rows, columns, channels, source, tile, steps, target, to_tile, to_steps, ends):
    """`change` all tiles of an image: rows and columns of them, at strides of their own.

    `ends` says whether the last row and column of tiles are only half there.
    """
    size = size_of(T(0))
    lanes = panel() // 2
    near = steps[0] * size, steps[1] * size
    for i in range(rows):
        down = to_steps[0] * size if i < rows - ends[0] else 0
        for j in range(columns):
            ahead = to_steps[1] * size if j < columns - ends[1] else 0
            a = source + (i * tile[0] + j * tile[1]) * size
            b = target + (i * to_tile[0] + j * to_tile[1]) * size
            for k in range(0, channels, lanes):
                change(a + k * size, near, b + k * size, (down, ahead))


from_images: Any = _tiles.bind(change=_of_images)
into_images: Any = _tiles.bind(change=_to_images)
from_results: Any = _tiles.bind(change=_of_results)
into_results: Any = _tiles.bind(change=_to_results)
from_windows: Any = _tiles.bind(change=_of_windows)
into_windows: Any = _tiles.bind(change=_to_windows)


@serial
def _add_chunks(sums, chunks, chunk, n):
    """Add to n elements those of further chunks, in their order."""
    a = pointer(sums, T(0))
    for k in range(1, chunks):
        for i in range(n):
            a[i] += a[k * chunk + i]


@parallel
def _weights_in(nine, panels, n, sixteen):
    """Panels of windows of nine places into their basis; n elements of each place."""
    size = size_of(T(0))
    for p in prange(panels):
        from_windows(1, 1, n, nine + p * 9 * n * size, (0, 0), (3 * n, n),
                     sixteen + p * 16 * n * size, (0, 0), (4 * n, n), (0, 0))  # fmt: skip


@parallel
def _weights_out(sixteen, chunks, panels, n, nine):
    """The transpose, of the sum of several chunks, which is left in the first."""
    size = size_of(T(0))
    for p in prange(panels):
        source = sixteen + p * 16 * n * size
        _add_chunks(source, chunks, panels * 16 * n, 16 * n)
        into_windows(1, 1, n, source, (0, 0), (4 * n, n), nine + p * 9 * n * size, (0, 0),
                     (3 * n, n), (0, 0))  # fmt: skip


# -- results and their gradients -------------------------------------------------------------------


@serial
def _take_in(shape, sizes, corner, image, first, count, border, room, inside, plane):
    """Some rows of tiles of an image in their basis, by way of a border if there is room for it."""
    c, _, _, _, _, across = shape
    _, h, w, wide = sizes
    size = size_of(T(0))
    source, row = image + 2 * first * w * c * size, w * c
    if room > 0:
        source, row = border, wide * c
        bordered(image, border, h, w, c, corner[0], corner[1], 2 * first, 2 * count + 2, wide)
    from_images(count, across, c, source, (2 * row, 2 * c), (row, c), inside, (across * c, c),
                (4 * plane, plane), (0, 0))  # fmt: skip


@parallel
def results(shape, sizes, corner, x, packed, bias, z, y, cut, scratch, rooms, parts):
    """Results of a batch. `cut`: images that are taken together, and rows of tiles."""
    n, h, w, _ = sizes
    c, o, rows, places, tall, across = shape
    images, band = cut
    each, room, in_plane, out_plane = rooms
    size, width = size_of(T(0)), panel()
    bands = (tall + band - 1) // band
    units = (n + images - 1) // images * bands
    for part in prange(parts):
        border = scratch + part * each * size
        inside = border + room * size
        sums = inside + 16 * in_plane * size
        for unit in range(units * part // parts, units * (part + 1) // parts):
            begin, first = unit // bands * images, unit % bands * band
            items, count = min(images, n - begin), min(band, tall - first)
            tiles = count * across
            there = min(2 * count, rows - 2 * first)
            for k in range(items):
                _take_in(shape, sizes, corner, x + (begin + k) * h * w * c * size, first, count,
                         border, room, inside + k * tiles * c * size, in_plane)  # fmt: skip
            start = (begin * rows + 2 * first) * places * o
            for p in range((o + width - 1) // width):
                columns = min(width, o - p * width)
                for t in range(16):
                    product(items * tiles, columns, 1, c, inside + t * in_plane * size, (c, 0, 1),
                            packed + (p * 16 + t) * c * width * size, (0, width, 0),
                            sums + t * out_plane * size, width, False)  # fmt: skip
                for k in range(items):
                    at = start + k * rows * places * o + p * width
                    into_results(count, across, columns, sums + k * tiles * width * size,
                                 (across * width, width), (4 * out_plane, out_plane),
                                 z + at * size, (2 * places * o, 2 * o), (places * o, o),
                                 (2 * count - there, 2 * across - places))  # fmt: skip
            if bias != 0:
                for k in range(items):
                    for r in range(there):
                        at = (start + (k * rows + r) * places * o) * size
                        finish(z + at, bias, y + at, places * o)


@serial
def _add_weights(shape, tiles, inside, in_plane, outside, out_plane, total, fresh):
    """Add to the gradient of the weights, panels of sixteen places; there may be nothing in it."""
    c, o, _, _, _, _ = shape
    size, width = size_of(T(0)), panel()
    for p in range((o + width - 1) // width):
        for t in range(16):
            product(c, min(width, o - p * width), 1, tiles, inside + t * in_plane * size, (1, 0, c),
                    outside + (t * out_plane + p * width) * size, (0, o, 0),
                    total + (p * 16 + t) * c * width * size, width, not fresh)  # fmt: skip


@serial
def _add_images(shape, items, count, outside, out_plane, packed, back, plane, target, image, row):
    """Add to the gradient of images where tiles overlap; `image` and `row` lead from each on."""
    c, o, _, _, _, across = shape
    size, width = size_of(T(0)), panel()
    tiles = count * across
    for p in range((c + width - 1) // width):
        columns = min(width, c - p * width)
        for t in range(16):
            product(items * tiles, columns, 1, o, outside + t * out_plane * size, (o, 0, 1),
                    packed + (p * 16 + t) * o * width * size, (0, width, 0),
                    back + t * plane * size, width, False)  # fmt: skip
        for k in range(items):
            into_images(count, across, columns, back + k * tiles * width * size,
                        (across * width, width), (4 * plane, plane),
                        target + (k * image + p * width) * size, (2 * row, 2 * c), (row, c),
                        (0, 0))  # fmt: skip


@parallel
def gradients(shape, sizes, corner, wants, g, kept, x, packed, gx, sums, weights, biases, chunks,
              cut, scratch, rooms, parts):  # fmt: skip
    """Gradients of a batch. `wants` says which: that of the input, and of the weights."""
    n, h, w, wide = sizes
    c, o, rows, places, tall, across = shape
    top, left = corner
    images, band = cut
    each, room, slope_room, back_room, in_plane, out_plane, back_plane = rooms
    want_input, want_weight = wants
    size = size_of(T(0))
    for part in prange(parts):
        border = scratch + part * each * size
        slopes = border + room * size
        whole = slopes + slope_room * size
        inside = whole + images * back_room * size
        outside = inside + 16 * in_plane * size
        back = outside + 16 * out_plane * size
        clear(slopes, slope_room)
        for chunk in range(chunks * part // parts, chunks * (part + 1) // parts):
            bias = biases + chunk * places * o * size
            clear(bias, places * o)
            start, last = chunk * n // chunks, (chunk + 1) * n // chunks
            for begin in range(start, last, images):
                items = min(images, last - begin)
                # The gradient of the input is gathered where it belongs, or within a border.
                target, image, row = gx + begin * h * w * c * size, h * w * c, w * c
                if back_room > 0:
                    target, image, row = whole, back_room, wide * c
                for k in range(items if want_input else 0):
                    clear(target + k * image * size, (2 * tall + 2) * row)
                for first in range(0, tall, band):
                    count = min(band, tall - first)
                    tiles = count * across
                    there = min(2 * count, rows - 2 * first)
                    for k in range(items):
                        for r in range(there):
                            at = ((begin + k) * rows + 2 * first + r) * places * o * size
                            slope(g + at, kept + at, slopes + r * 2 * across * o * size, bias,
                                  places * o)  # fmt: skip
                        # What of the last tiles is outside is zero.
                        clear(slopes + there * 2 * across * o * size,
                              (2 * count - there) * 2 * across * o)  # fmt: skip
                        from_results(count, across, o, slopes, (4 * across * o, 2 * o),
                                     (2 * across * o, o), outside + k * tiles * o * size,
                                     (across * o, o), (4 * out_plane, out_plane),
                                     (0, 0))  # fmt: skip
                    if want_weight:
                        for k in range(items):
                            _take_in(shape, sizes, corner, x + (begin + k) * h * w * c * size,
                                     first, count, border, room, inside + k * tiles * c * size,
                                     in_plane)  # fmt: skip
                        _add_weights(shape, items * tiles, inside, in_plane, outside, out_plane,
                                     sums + chunk * weights * size,
                                     begin == start and first == 0)  # fmt: skip
                    if want_input:
                        _add_images(shape, items, count, outside, out_plane, packed, back,
                                    back_plane, target + 2 * first * row * size, image,
                                    row)  # fmt: skip
                for k in range(items if want_input and back_room > 0 else 0):
                    for r in range(h):
                        copy(whole + (k * back_room + ((top + r) * wide + left) * c) * size,
                             gx + ((begin + k) * h + r) * w * c * size, w * c)  # fmt: skip


# -- launching -------------------------------------------------------------------------------------


class _Cut:
    """How a batch is cut into tiles, and how many are taken together."""

    def __init__(self, call: Any, n: int) -> None:
        tall, across = _tiles_of(call)
        self.band = max(1, min(tall, TILES // across))
        whole = TILES // (tall * across)
        self.images = max(1, min(n, whole)) if self.band == tall else 1
        self.bands = -(-tall // self.band)
        self.tiles = self.images * self.band * across
        self.wide, self.high = 2 * across + 2, 2 * tall + 2
        self.bordered = call.bordered or (self.high, self.wide) != (call.h, call.w)
        self.shape = (call.c, call.o, call.rows, call.places, tall, across)
        self.sizes = (call.n, call.h, call.w, self.wide)


def _tiles_of(call: Any) -> tuple[int, int]:
    return -(-call.rows // 2), -(-call.places // 2)


def suits(call: Any, storage: str) -> bool:
    """Whether a convolution of these numbers is one of this file's, and gains by it."""
    lanes = VECTOR // np.dtype(storage).itemsize
    if call.shape[3:] != (3, 3, 1, 1, 1, 1, 1) or call.c % lanes or call.o % lanes:
        return False
    tall, across = _tiles_of(call)
    # Tiles that are half outside cost what whole ones do.
    fewer = 9 * call.rows * call.places >= 1.4 * 16 * tall * across
    return bool(fewer and call.c + call.o >= CHANNELS and call.n * tall * across >= FEWEST)


def _packed(call: Any, weight: Array, storage: str, transposed: bool) -> Array:
    """The weights in their basis, as the micro-kernel takes them; transposed: to the inputs."""
    nine = call.packed(weight, storage, transposed=transposed, turned=False)
    rows, columns = (call.o, call.c) if transposed else (call.c, call.o)
    panels, _, width = packed_shape(1, columns, storage)
    sixteen = np.empty(panels * 16 * rows * width, storage)
    _weights_in[storage](address(nine), panels, rows * width, address(sixteen))
    return sixteen


def forward(
    loops: Any, call: Any, storage: str, x: Array, weight: Array, row: int, z: Array, y: Array
) -> None:
    """Fill `z`, and `y`, by what `finish` makes of it; `row` is where the bias lies, tiled."""
    cut = _Cut(call, -(-call.n // pool.get_num_threads()))
    packed = _packed(call, weight, storage, transposed=False)
    _, rows, width = packed_shape(cut.tiles, call.o, storage)
    # Planes that are a multiple of a page apart would share a few lines of the first cache.
    pad = width // 2
    room = (2 * cut.band + 2) * cut.wide * call.c if cut.bordered else 0
    planes = cut.tiles * call.c + pad, rows * width + pad
    parts = min(pool.get_num_threads(), -(-call.n // cut.images) * cut.bands)
    each = room + 16 * sum(planes)
    scratch = empty((parts * each,), x.dtype)
    loops[storage](
        cut.shape, cut.sizes, call.corner, address(x), address(packed), row, address(z),
        address(y), (cut.images, cut.band), address(scratch), (each, room, *planes), parts,
    )  # fmt: skip


def backward(
    loops: Any, call: Any, storage: str, g: Array, kept: Array, x: Array, weight: Array,
    wants: tuple[bool, bool], home: Array | None,
) -> tuple[Array | None, Array | None, Array]:  # fmt: skip
    """Gradients of the input and of the weights, where wanted, and shares of that of the bias."""
    want_input, want_weight = wants
    panels, _, width = packed_shape(1, call.o, storage)
    weights = panels * 16 * call.c * width
    nbytes = weights * x.itemsize
    chunks = min(CHUNKS, call.n, max(4, CHUNK_BYTES // nbytes))
    cut = _Cut(call, -(-call.n // chunks))
    packed = np.empty(0, x.dtype)
    if want_input:
        packed = _packed(call, weight, storage, transposed=True)
    gx = empty((call.n, call.h, call.w, call.c) if want_input else (0,), x.dtype)
    sums = empty((chunks if want_weight else 0, weights), x.dtype)
    biases = np.empty((chunks, call.places, call.o), x.dtype)
    pad = width // 2
    rooms = (
        (2 * cut.band + 2) * cut.wide * call.c if want_weight and cut.bordered else 0,
        2 * cut.band * (cut.wide - 2) * call.o,
        cut.high * cut.wide * call.c if want_input and cut.bordered else 0,
    )
    planes = (
        cut.tiles * call.c + pad if want_weight else 0,
        cut.tiles * call.o + pad,
        cut.tiles * width + pad if want_input else 0,
    )
    parts = min(pool.get_num_threads(), chunks)
    each = sum(rooms[:2]) + cut.images * rooms[2] + 16 * sum(planes)
    scratch = empty((parts * each,), x.dtype)
    loops[storage](
        cut.shape, cut.sizes, call.corner, wants, address(g), address(kept), address(x),
        address(packed), address(gx), address(sums), weights, address(biases), chunks,
        (cut.images, cut.band), address(scratch), (each, *rooms, *planes), parts,
    )  # fmt: skip
    gw = None
    if want_weight:
        nine = np.empty((1, panels * 9 * call.c * width), x.dtype)
        _weights_out[storage](address(sums), chunks, panels, call.c * width, address(nine))
        gw = call.unpacked(storage, nine, weight.shape, home)
    return gx if want_input else None, gw, biases
