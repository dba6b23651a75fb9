"""The choice between two values, element by element, without a branch.

Elements are only moved: they are read as integers of their width, whatever they stand for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu.compile import CpuTemplate, in_a_row, parallel, serial
from gpugrad.kernels.cpu.elementwise import LABEL
from gpugrad.kernels.template import Placeholder, where

Array = np.ndarray[Any, Any]

#: Elements that one thread works on at a time.
BLOCK = 8192

span: Any = Placeholder("span")


@serial
def _both(c: Array, a: Array, b: Array, out: Array) -> None:
    for i in range(out.size):
        out[i] = where(c[i] != 0, a[i], b[i])


@serial
def _or_number(c: Array, a: Array, b: Array, out: Array) -> None:
    other = b[0]
    for i in range(out.size):
        out[i] = where(c[i] != 0, a[i], other)


@serial
def _number_or(c: Array, a: Array, b: Array, out: Array) -> None:
    other = a[0]
    for i in range(out.size):
        out[i] = where(c[i] != 0, other, b[i])


@parallel
def _blocks(c: Array, a: Array, b: Array, out: Array) -> None:
    for block in prange((out.size + BLOCK - 1) // BLOCK):
        i = block * BLOCK
        j = min(i + BLOCK, out.size)
        # Of a number there is one element, which every block begins with.
        s, t = min(i, a.size - 1), min(i, b.size - 1)
        span(c[i:j], a[s:j], b[t:j], out[i:j])


def choose(m: Backend, condition: Any, a: Any, b: Any, /) -> Array:
    """As `numpy.where`."""
    dtype = np.result_type(a, b)
    c = np.asarray(condition, bool)
    shape = np.broadcast_shapes(c.shape, np.shape(a), np.shape(b))
    size = int(np.prod(shape, dtype=np.int64))
    c = np.broadcast_to(c, shape)
    sides = [np.asarray(v, dtype) for v in (a, b)]
    whole = [v.size != 1 or size == 1 for v in sides]
    if not any(whole):
        whole[0] = True
    given = [np.broadcast_to(v, shape) if w else v for v, w in zip(sides, whole)]
    # Arrays that lie alike in another order of axes stay as they are, and so does the result.
    order = sorted(range(len(shape)), key=lambda axis: -c.strides[axis])
    arrays = [c, *(v for v, w in zip(given, whole) if w)]
    if not all(v.transpose(order).flags.c_contiguous for v in arrays):
        order = list(range(len(shape)))
    bits = np.dtype(_BITS[dtype.itemsize])
    c, *rest = [in_a_row(v.transpose(order)).reshape(-1) for v in arrays]
    rows = iter(rest)
    left, right = ((next(rows) if w else v.reshape(-1)).view(bits) for v, w in zip(given, whole))
    out = empty(tuple(shape[i] for i in order), dtype)
    if size:
        loop = _both if all(whole) else _or_number if whole[0] else _number_or
        run = loop if size <= 2 * BLOCK else _bound(loop)
        run["float32"](c.view(np.uint8), left, right, out.reshape(-1).view(bits))
    back = sorted(range(len(shape)), key=order.__getitem__)
    return out.transpose(back)


def _bound(loop: CpuTemplate) -> CpuTemplate:
    return _blocks.bind(span=loop)


#: By the bytes of an element.
_BITS = {1: "uint8", 2: "uint16", 4: "int32", 8: "int64"}


def _refuse(m: Backend, condition: Any, a: Any, b: Any, /) -> str | None:
    dtype = np.result_type(a, b)
    return None if dtype.itemsize in _BITS else f"elements of {dtype.itemsize} bytes"


KERNELS = {"where": Kernel(choose, LABEL, _refuse)}
