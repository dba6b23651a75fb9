"""Reductions of one array to one number, Σx², the greatest |x|, how many are not finite; scaling.

The elements are cut into blocks of a fixed size, and what the blocks give is combined in order: the
result is the same bit for bit from run to run and on any number of threads. Every layout is taken:
elements that do not lie in a row are copied a block at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.kernels.cpu.compile import CpuTemplate, numpy_storage, parallel, serial, storage_view
from gpugrad.kernels.template import I, Placeholder, T, arithmetic, read, to_bits, write

LABEL = "numba cpu"

#: Elements of a block. Enough of them that a block's sum costs nothing beside them, and few enough
#: that sums of so many in single precision are good to six digits and stay in the cache.
BLOCK = 8192

#: Sums of squares below this may have lost some that are too small for single precision.
TINY = float(np.finfo(np.float32).smallest_normal / np.finfo(np.float32).eps)

Array = np.ndarray[Any, Any]

part: Any = Placeholder("part")


@parallel
def _blocks(a: Array, out: Array) -> None:
    for block in prange(out.size):
        i = block * BLOCK
        out[block] = part(a[i : min(i + BLOCK, a.size)])


@serial
def _squares_of_T(a: Array) -> Any:
    total = T(0)
    for i in range(a.size):
        x = read(a, i)
        total += x * x
    return np.float64(total)


@serial
def _squares_of_float64(a: Array) -> Any:
    total = np.float64(0)
    for i in range(a.size):
        x = np.float64(read(a, i))
        total += x * x
    return total


@serial
def _squares(a: Array) -> Any:
    total = _squares_of_T(a)  # type: ignore[operator]
    if total > TINY and total < np.inf:
        return total
    return _squares_of_float64(a)  # type: ignore[operator]


# As integers, the bits of magnitudes are ordered as the magnitudes are, with NaN above infinity.
# For the greatest of integers there are vector instructions that heed no NaN.
@serial
def _greatest(a: Array) -> Any:
    most = I(0)
    magnitude = ~to_bits(T(-0.0))
    for i in range(a.size):
        bits = to_bits(read(a, i)) & magnitude
        most = bits if bits > most else most
    return most


@serial
def _not_finite(a: Array) -> Any:
    count = I(0)
    # An exponent of all ones, which infinity and NaN have and nothing else.
    ones = to_bits(T(np.inf))
    for i in range(a.size):
        count += I((to_bits(read(a, i)) & ones) == ones)
    return count


@serial
def _scale(a: Array, factor: Any) -> None:
    for i in range(a.size):
        write(a, i, read(a, i) * factor)


@parallel
def _scale_blocks(a: Array, factor: Any) -> None:
    for block in prange((a.size + BLOCK - 1) // BLOCK):
        i = block * BLOCK
        part(a[i : min(i + BLOCK, a.size)], factor)


def _reduce(loop: CpuTemplate, x: Array, dtype: Any, combine: np.ufunc) -> Any:
    """What the loop gives for the blocks of `x`, combined in order; 0 of no elements."""
    storage = numpy_storage(x.dtype)
    run = loop[storage]
    flat = in_a_row(x)
    if flat is None:
        parts = np.array([run(block) for block in _copied_blocks(storage_view(x))], dtype)
    elif flat.size <= BLOCK:
        return np.dtype(dtype).type(run(storage_view(flat)))
    else:
        parts = np.empty((flat.size + BLOCK - 1) // BLOCK, dtype)
        _blocks.bind(part=loop)[storage](storage_view(flat), parts)
    return combine.reduce(parts, initial=0)


def in_a_row(x: Array) -> Array | None:
    """The elements of `x` as they lie in memory, one after the other; None if there are gaps."""
    if not x.flags.c_contiguous:
        x = x.transpose(sorted(range(x.ndim), key=lambda axis: -x.strides[axis]))
    return x.reshape(-1) if x.flags.c_contiguous else None


def _copied_blocks(x: Array) -> Any:
    flags: Any = ["readonly", "contig"]
    return np.nditer(x, ["external_loop", "buffered", "zerosize_ok"], [flags], buffersize=BLOCK)


def sum_of_squares(m: Backend, x: Array, /) -> Any:
    """Σx² in double precision, which holds the squares of all narrower numbers, great or small."""
    return _reduce(_squares, x, "float64", np.add)


def max_abs(m: Backend, x: Array, /) -> Any:
    """The greatest |x|; NaN if there is one."""
    bits, width = _BITS[arithmetic(numpy_storage(x.dtype))]
    return _reduce(_greatest, x, bits, np.maximum).view(width)


def nonfinite_count(m: Backend, x: Array, /) -> Any:
    """How many elements are NaN or infinite."""
    return _reduce(_not_finite, x, "int64", np.add)


_BITS = {"float32": ("int32", np.float32), "float64": ("int64", np.float64)}


def scaled(m: Backend, x: Array, factor: Any, /) -> Array:
    """`x` times a 0-d factor, in place."""
    storage = numpy_storage(x.dtype)
    _, width = _BITS[arithmetic(storage)]
    row = in_a_row(x)
    assert row is not None  # or it would have been refused
    flat = storage_view(row)
    run = _scale if flat.size <= BLOCK else _scale_blocks.bind(part=_scale)
    run[storage](flat, width(factor))
    return x


def _refuse(m: Backend, x: Any, /) -> str | None:
    if not isinstance(x, np.ndarray):
        return f"a {type(x).__name__}; kernels take arrays"
    return None if numpy_storage(x.dtype) else f"no kernel for {x.dtype}"


def _refuse_scaled(m: Backend, x: Any, factor: Any, /) -> str | None:
    if why := _refuse(m, x):
        return why
    if np.ndim(factor):
        return f"a factor of shape {factor.shape}"
    return None if in_a_row(x) is not None else "gaps between the elements"


KERNELS = {
    **{f.__name__: Kernel(f, LABEL, _refuse) for f in (sum_of_squares, max_abs, nonfinite_count)},
    "scaled": Kernel(scaled, LABEL, _refuse_scaled),
}
