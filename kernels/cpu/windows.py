"""Sums over the windows of images: what convolutions and their gradients are made of.

Images have their channels last, and weights are packed into panels, for which see
:mod:`gpugrad.kernels.cpu.microkernel`. Addresses are integers, strides count elements.
"""

from __future__ import annotations

from numba import prange

from gpugrad.kernels.cpu.compile import parallel, serial
from gpugrad.kernels.cpu.memory import clear, copy, places_inside, pointer, size_of
from gpugrad.kernels.cpu.microkernel import panel, product
from gpugrad.kernels.template import T

__all__ = [
    "bordered",
    "pack",
    "pack_panel",
    "rows_of_sums",
    "spread_rows",
    "unpack",
    "weight_sums",
]

#: Places that one product of the gradient of the weights sums over, about.
DEPTH = 128

# A shape is (channels, outputs, places in a row, kernel rows, kernel columns, stride of rows, of
# columns, dilation of rows, of columns, groups). Addresses are integers, strides count elements.

# -- images ----------------------------------------------------------------------------------------


@serial
def bordered(image, target, h, w, c, top, left, first, count, wide):
    """Rows from `first`, of a border's upper left corner on, of an image in `wide` columns."""
    size = size_of(T(0))
    for r in range(count):
        to = target + r * wide * c * size
        i = first + r - top
        if i < 0 or i >= h:
            clear(to, wide * c)
            continue
        clear(to, left * c)
        copy(image + i * w * c * size, to + left * c * size, w * c)
        clear(to + (left + w) * c * size, (wide - left - w) * c)


# -- products -------------------------------------------------------------------------------------


@serial
def pack_panel(weight, packed, taps, tap, rows, row, there, column):
    """One panel, (tap, row, column), of a weight's elements at given strides."""
    a, b = pointer(weight, T(0)), pointer(packed, T(0))
    width = panel()
    for i in range(rows):
        for t in range(taps[0] * taps[1]):
            start = t // taps[1] * tap[0] + t % taps[1] * tap[1] + i * row
            at = (t * rows + i) * width
            for j in range(there):
                b[at + j] = a[start + j * column]
            for j in range(there, width):
                b[at + j] = T(0)


@parallel
def pack(weight, packed, groups, group, taps, tap, rows, row, columns, column):
    """All panels of all groups; of the taps there are two numbers, and two strides."""
    size, width = size_of(T(0)), panel()
    panels = (columns + width - 1) // width
    for unit in prange(groups * panels):
        first = unit % panels * width
        start = unit // panels * group + first * column
        pack_panel(weight + start * size,
                   packed + unit * taps[0] * taps[1] * rows * width * size, taps, tap, rows, row,
                   min(width, columns - first), column)  # fmt: skip


@serial
def _unpack_panel(sums, chunks, chunk, weight, taps, rows, there):
    a, b = pointer(sums, T(0)), pointer(weight, T(0))
    width = panel()
    for i in range(rows):
        for t in range(taps):
            start = (t * rows + i) * width
            for j in range(there):
                total = a[start + j]
                for k in range(1, chunks):
                    total += a[k * chunk + start + j]
                b[(j * rows + i) * taps + t] = total


@parallel
def unpack(sums, chunks, chunk, weight, groups, taps, rows, columns):
    """A gradient (group, column, row, tap), of panels (tap, row, column) of several chunks.

    They are added up in their order.
    """
    size, width = size_of(T(0)), panel()
    panels = (columns + width - 1) // width
    for unit in prange(groups * panels):
        first = unit % panels * width
        start = (unit // panels * columns + first) * rows * taps
        _unpack_panel(sums + unit * taps * rows * width * size, chunks, chunk,
                      weight + start * size, taps, rows, min(width, columns - first))  # fmt: skip


@serial
def _alone(source, weight, out, channels, places, step, leap):
    """Each channel by itself: out += source · weight at one place of the window."""
    a, b, y = pointer(source, T(0)), pointer(weight, T(0)), pointer(out, T(0))
    for i in range(places):
        for j in range(channels):
            y[i * leap + j] += a[i * step + j] * b[j]


@serial
def _alone_nine(source, down, ahead, weight, out, channels, places, step, leap):
    """The same at three by three places, the whole window: nothing is added to."""
    a, b, y = pointer(source, T(0)), pointer(weight, T(0)), pointer(out, T(0))
    for i in range(places):
        for j in range(channels):
            first = i * step + j
            second = first + down
            third = second + down
            y[i * leap + j] = (
                a[first] * b[j]
                + a[first + ahead] * b[channels + j]
                + a[first + 2 * ahead] * b[2 * channels + j]
                + a[second] * b[3 * channels + j]
                + a[second + ahead] * b[4 * channels + j]
                + a[second + 2 * ahead] * b[5 * channels + j]
                + a[third] * b[6 * channels + j]
                + a[third + ahead] * b[7 * channels + j]
                + a[third + 2 * ahead] * b[8 * channels + j]
            )


@serial
def rows_of_sums(shape, source, row, there, packed, out, steps, count):
    """`count` rows of results; `source` is where the window of the first begins, `row` leads on.

    `there` are the first row from `source` on that is not border, and the first behind the last;
    `steps` lead from row to row of the results, and from place to place.
    """
    c, o, places, kh, kw, sh, sw, dh, dw, groups = shape
    size, width = size_of(T(0)), panel()
    inner, outer = c // groups, o // groups
    if groups > 1 and inner == 1 and outer == 1:
        for r in range(count):
            a, y = source + r * sh * row * size, out + r * steps[0] * size
            if kh == 3 and kw == 3:
                _alone_nine(a, dh * row, dw * c, packed, y, c, places, sw * c, steps[1])
                continue
            for i in range(places):
                clear(y + i * steps[1] * size, c)
            for k in range(kh * kw):
                at = k // kw * dh * row + k % kw * dw * c
                _alone(a + at * size, packed + k * c * size, y, c, places, sw * c, steps[1])
        return
    panels = (outer + width - 1) // width
    together = groups == 1 and dw == 1
    step = kw * inner * width
    for g in range(groups):
        for k in range(panels):
            n = min(width, outer - k * width)
            b = packed + (g * panels + k) * kh * step * size
            for r in range(count):
                # Only those rows of the window that meet the image.
                first, last = places_inside(r * sh - there[0], dh, kh, there[1] - there[0])
                a = source + ((r * sh + first * dh) * row + g * inner) * size
                weights = b + first * step * size
                y = out + (r * steps[0] + g * outer + k * width) * size
                if together:
                    product(places, n, last - first, kw * c, a, (sw * c, dh * row, 1),
                            weights, (step, width, 0), y, steps[1], False)  # fmt: skip
                    continue
                for t in range(kw):
                    product(places, n, last - first, inner, a + t * dw * c * size,
                            (sw * c, dh * row, 1), weights + t * inner * width * size,
                            (step, width, 0), y, steps[1], t > 0)  # fmt: skip


@serial
def _spread_alone(source, weight, out, channels, places, step):
    """Its transpose: adds to `out`, in steps, what each channel's place sees."""
    a, b, y = pointer(source, T(0)), pointer(weight, T(0)), pointer(out, T(0))
    for i in range(places):
        for j in range(channels):
            y[i * step + j] += a[i * channels + j] * b[j]


@serial
def spread_rows(shape, source, row, packed, out, count):
    """The transpose of :func:`rows_of_sums`: adds rows of `source` to `out`, whose row is `row`.

    `shape` is that of the convolution whose transpose it is; `out` has rows of its input.
    """
    c, o, places, kh, kw, sh, sw, dh, dw, groups = shape
    size, width = size_of(T(0)), panel()
    inner, outer = c // groups, o // groups
    panels = (inner + width - 1) // width
    taps = kh * kw
    if groups > 1 and inner == 1 and outer == 1:
        for r in range(count):
            for k in range(taps):
                at = (r * sh + k // kw * dh) * row + k % kw * dw * c
                _spread_alone(source + r * places * o * size, packed + k * c * size,
                              out + at * size, c, places, sw * c)  # fmt: skip
        return
    for r in range(count):
        for g in range(groups):
            a = source + (r * places * o + g * outer) * size
            for k in range(taps):
                at = (r * sh + k // kw * dh) * row + k % kw * dw * c + g * inner
                b = packed + (g * panels * taps + k) * outer * width * size
                product(places, inner, 1, outer, a, (o, 0, 1),
                        b, (0, width, taps * outer * width), out + at * size, sw * c,
                        True)  # fmt: skip


@serial
def _alone_sums(source, g, total, channels, places, step):
    """Each channel by itself: total += Σ over places of source · g."""
    a, b, y = pointer(source, T(0)), pointer(g, T(0)), pointer(total, T(0))
    for i in range(places):
        for j in range(channels):
            y[j] += a[i * step + j] * b[i * channels + j]


@serial
def weight_sums(shape, source, row, image, g, g_row, g_image, total, fresh, items, count):
    """Add to the gradient of the weights, panels (kernel row, column, inner channel, outer).

    If it is `fresh`, there is nothing in it yet. `image` and `g_image` lead from one of the images
    to the next.
    """
    c, o, places, kh, kw, sh, sw, dh, dw, groups = shape
    size, width = size_of(T(0)), panel()
    inner, outer = c // groups, o // groups
    if groups > 1 and inner == 1 and outer == 1:
        if fresh:
            clear(total, kh * kw * c)
        for item in range(items):
            for r in range(count):
                for k in range(kh * kw):
                    at = item * image + (r * sh + k // kw * dh) * row + k % kw * dw * c
                    _alone_sums(source + at * size, g + (item * g_image + r * g_row) * size,
                                total + k * c * size, c, places, sw * c)  # fmt: skip
        return
    together = groups == 1 and dw == 1
    m = kw * inner if together else inner
    panels = (outer + width - 1) // width
    steps = max(1, (DEPTH + places // 2) // places)
    for part in range(groups):
        for k in range(kh if together else kh * kw):
            i, j = (k, 0) if together else (k // kw, k % kw)
            for p in range(panels):
                # What is added to stays in the cache for all the images.
                y = total + (((part * panels + p) * kh + i) * kw + j) * inner * width * size
                column = p * width
                for item in range(items):
                    for first in range(0, count, steps):
                        a = (first * sh + i * dh) * row + j * dw * c + part * inner
                        b = first * g_row + part * outer + column
                        product(m, min(width, outer - column), min(steps, count - first), places,
                                source + (item * image + a) * size, (1, sh * row, sw * c),
                                g + (item * g_image + b) * size, (g_row, o, 0), y, width,
                                not fresh or item > 0 or first > 0)  # fmt: skip
