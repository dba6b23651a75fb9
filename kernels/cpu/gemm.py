"""Matrix products in compiled code: calls of NumPy's own OpenBLAS, one or many, and their division.

OpenBLAS runs on one thread (`kernels/cpu/pool.py`). A large product is divided along the longer
side of its result, and a batch of them along the batch too. Transposed and strided operands are
read where they are, as long as one of their axes is contiguous. Where that is the quicker way, the
pieces are computed by `kernels/cpu/direct.py` instead.

How the work is divided depends on the number of threads. No sum is: each element is one thread's
work, and on some processors its last bit depends on where OpenBLAS's piece of it ends.
"""

from __future__ import annotations

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from gpugrad.kernels.cpu import openblas
from gpugrad.kernels.cpu.compile import parallel, serial
from gpugrad.kernels.cpu.direct import direct, suits
from gpugrad.kernels.cpu.memory import size_of
from gpugrad.kernels.cpu.microkernel import pack_turned, panel
from gpugrad.kernels.template import T, device

__all__ = ["GRAIN", "STRIP", "available", "gemm", "many", "one", "rows_product"]

#: Multiply-adds that a further thread is worth: about 10 µs of work, as long as waking it may take.
GRAIN = 1 << 20

#: Rows or columns of a result that go to one thread together: whole panels.
STRIP = 32

_SYMBOLS = {types.float32: "gpugrad_sgemm", types.float64: "gpugrad_dgemm"}


def _bind() -> tuple[int, str | None]:
    """The width of OpenBLAS's integers, and why there is none that can be called, if so."""
    blas = openblas.find()
    if isinstance(blas, str):
        return 64, blas
    llvmlite.binding.add_symbol("gpugrad_sgemm", blas.sgemm)
    llvmlite.binding.add_symbol("gpugrad_dgemm", blas.dgemm)
    llvmlite.binding.add_symbol("gpugrad_blas_threads", blas.get_threads)
    return blas.width, None


_WIDTH, _missing = _bind()


def available() -> str | None:
    """Why OpenBLAS cannot be called from compiled loops here; None if it can."""
    return _missing


# -- OpenBLAS -------------------------------------------------------------------------------------
# An address is an integer, and strides count elements.


@intrinsic
def _blas(typing, alpha, ta, tb, m, n, k, a, lda, b, ldb, beta, c, ldc):
    """C ← alpha·op(A)·op(B) + beta·C by `cblas_sgemm` or `cblas_dgemm`, rows contiguous."""
    signature = types.void(
        alpha, types.int32, types.int32, types.int64, types.int64, types.int64, types.intp,
        types.int64, types.intp, types.int64, alpha, types.intp, types.int64,
    )  # fmt: skip

    def code(context, builder, signature, args):
        size, enum = ir.IntType(_WIDTH), ir.IntType(32)
        real = context.get_value_type(alpha)
        pointer = context.get_value_type(types.intp)
        kinds = [enum, enum, enum, size, size, size, real, pointer, size, pointer, size, real,
                 pointer, size]  # fmt: skip
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), kinds), _SYMBOLS[alpha]
        )
        alpha_, ta, tb, m, n, k, a, lda, b, ldb, beta, c, ldc = args
        row_major = ir.Constant(enum, 101)
        values = [row_major, ta, tb, m, n, k, alpha_, a, lda, b, ldb, beta, c, ldc]
        if _WIDTH < 64:
            values = [builder.trunc(v, kind) if kind == size else v
                      for v, kind in zip(values, kinds)]  # fmt: skip
        builder.call(function, values)
        return context.get_dummy_value()

    return signature, code


@intrinsic
def _blas_threads(typing):
    """Threads that one call uses: 1, unless the program keeps OpenBLAS's own."""

    def code(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        function = cgutils.get_or_insert_function(builder.module, kind, "gpugrad_blas_threads")
        return builder.call(function, [])

    return types.int32(), code


@device
def _address(x):
    return np.int64(x.ctypes.data)


@device
def _lead(x):
    """How BLAS can read the matrices in the last two axes of an array.

    Their leading dimension, negative if BLAS has to transpose them; 0 if it cannot read them.
    """
    size = size_of(T(0))
    rows, columns = x.shape[x.ndim - 2], x.shape[x.ndim - 1]
    down, right = x.strides[x.ndim - 2], x.strides[x.ndim - 1]
    if (_address(x) | down | right) & (size - 1):  # not aligned
        return 0
    if (right == size or columns <= 1) and (rows <= 1 or down >= columns * size):
        return down // size if rows > 1 else max(columns, 1)
    if (down == size or rows <= 1) and (columns <= 1 or right >= rows * size):
        return -(right // size if columns > 1 else max(rows, 1))
    return 0


# -- one product ----------------------------------------------------------------------------------


@serial
def gemm(a, b, out, beta):
    """out ← a·b + beta·out for matrices in a compiled function, on the thread that calls.

    `a` (m, k), `b` (k, n) and `out` (m, n) are arrays of one dtype, float32 or float64, of any
    strides, and `out` overlaps neither operand. `beta` is 0 (what `out` held does not matter) or 1.
    An operand without a contiguous axis is copied.
    """
    if _lead(a) == 0:
        _gemm_left(a.copy(), b, out, beta)
    else:
        _gemm_left(a, b, out, beta)


@device
def _gemm_left(a, b, out, beta):
    if _lead(b) == 0:
        _gemm_right(a, b.copy(), out, beta)
    else:
        _gemm_right(a, b, out, beta)


@device
def _gemm_right(a, b, out, beta):
    if _lead(out) != 0:
        _gemm(a, b, out, beta)
        return
    fresh = np.empty(out.shape, out.dtype)
    _gemm(a, b, fresh, T(0))
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = fresh[i, j] + (T(0) if beta == T(0) else out[i, j])


@device
def _gemm(a, b, out, beta):
    m, n = out.shape
    k = a.shape[1]
    if k == 0:
        if beta == T(0):
            out[:] = T(0)
    elif m > 0 and n > 0:
        ldc = _lead(out)
        if ldc > 0:
            _block(m, n, k, _address(a), _lead(a), _address(b), _lead(b), beta, _address(out), ldc)
        else:  # its columns are contiguous: outᵀ ← bᵀ·aᵀ
            _block(n, m, k, _address(b), -_lead(b), _address(a), -_lead(a), beta, _address(out),
                   -ldc)  # fmt: skip


@device
def _block(m, n, k, a, lda, b, ldb, beta, c, ldc):
    """C ← A·B + beta·C from addresses and what :func:`_lead` said of them."""
    no, yes = np.int32(111), np.int32(112)
    _blas(T(1), yes if lda < 0 else no, yes if ldb < 0 else no, m, n, k,
          a, abs(lda), b, abs(ldb), T(beta), c, ldc)  # fmt: skip


@device
def _bounds(x):
    """The first byte that an array touches, and the first behind it."""
    low = _address(x)
    high = low + size_of(T(0))
    for axis in range(x.ndim):
        reach = (x.shape[axis] - 1) * x.strides[axis]
        low += min(reach, 0)
        high += max(reach, 0)
    return low, high


@device
def _obstacles(a, b, out):
    """What must be copied before BLAS can do it: 1 for a, 2 for b, 4 for out; summed."""
    found = 0
    if _lead(a) == 0:
        found += 1
    if _lead(b) == 0:
        found += 2
    low, high = _bounds(out)
    for start, stop in (_bounds(a), _bounds(b)):
        if low < stop and start < high:
            return found + 4
    return found + 4 if _lead(out) == 0 else found


@serial
def one(a, b, out, beta):
    """A product of matrices, if nothing must be copied first; what :func:`_obstacles` found."""
    found = _obstacles(a, b, out)
    if found == 0:
        _gemm(a, b, out, beta)
    return found


@device
def rows_product(a, a_transposed, b, b_transposed, out):
    """out ← A·B for C-contiguous matrices that do not overlap; either operand may be transposed.

    Compiled in a fraction of the time that :func:`gemm` takes, which asks how its arrays lie.
    """
    m, n = out.shape
    k = a.shape[0] if a_transposed else a.shape[1]
    if k == 0:
        out[:] = T(0)
    elif m > 0 and n > 0:
        lda, ldb = a.shape[1], b.shape[1]
        _block(m, n, k, _address(a), -lda if a_transposed else lda,
               _address(b), -ldb if b_transposed else ldb, T(0), _address(out), n)  # fmt: skip


# -- many, or a large one -------------------------------------------------------------------------
# All operands have four axes here, the first two for the batch; those of one that is broadcast are
# of length 1. A *unit* of the work is a piece of one product of the batch.


@device
def _operand(x, step):
    """Where its matrices are, how BLAS can read them, bytes from one to the next along the two axes
    of the batch, and bytes from a row or column of the result to the next."""
    outer = x.strides[0] if x.shape[0] > 1 else 0
    inner = x.strides[1] if x.shape[1] > 1 else 0
    return _address(x), _lead(x), outer, inner, step


@device
def packed_size(n, k):
    """Elements of the panels of a matrix (k, n)."""
    return (n + panel() - 1) // panel() * panel() * k


@device
def _transposed(operand):
    address, lead, outer, inner, step = operand
    return address, -lead, outer, inner, step


@serial
def _share(sizes, left, right, result, mode, part, parts):
    """One thread's part of the units; see :func:`_many` for the numbers."""
    outer, inner, m, n, k = sizes
    beta, pieces, across, b_panel = mode
    a0, lda, a_outer, a_inner, a_step = left
    b0, ldb, b_outer, b_inner, b_step = right
    c0, ldc, c_outer, c_inner = result
    size = size_of(T(0))
    side = n if across else m
    strips = (side + STRIP - 1) // STRIP
    units = outer * inner * pieces
    for unit in range(units * part // parts, units * (part + 1) // parts):
        item, piece = unit // pieces, unit % pieces
        i, j = item // inner, item % inner
        first, last = strips * piece // pieces, strips * (piece + 1) // pieces
        low, high = first * STRIP, min(last * STRIP, side)
        if low >= high:
            continue
        a = a0 + i * a_outer + j * a_inner
        b = b0 + i * b_outer + j * b_inner
        c = c0 + i * c_outer + j * c_inner
        rows, columns = m, n
        if across:
            columns = high - low
            b, c = b + low * b_step, c + low * size
        else:
            rows = high - low
            a, c = a + low * a_step, c + low * ldc * size
        if b_panel > 0:
            a_i, a_k = (lda, 1) if lda > 0 else (1, -lda)
            direct(rows, columns, k, a, a_i, a_k, b, ldb, b_panel, c, ldc, beta != T(0))
        else:
            _block(rows, columns, k, a, lda, b, ldb, beta, c, ldc)


def _many(a, b, out, beta, threads, room):
    """Products of a batch on so many threads; `room` is for a right operand that is packed.

    Returns what must be copied first, when nothing has been done; see :func:`_obstacles`.
    """
    found = _obstacles(a, b, out)
    if found == 0:
        m, n, k = out.shape[2], out.shape[3], a.shape[3]
        left, right = _operand(a, a.strides[2]), _operand(b, b.strides[3])
        ldc = _lead(out)
        if ldc < 0:  # the columns of the results are contiguous: outᵀ ← bᵀ·aᵀ
            m, n = n, m
            left, right = _transposed(right), _transposed(left)
        sizes = (out.shape[0], out.shape[1], m, n, k)
        result = (_address(out), abs(ldc), out.strides[0], out.strides[1])

        items, work = out.shape[0] * out.shape[1], m * n * k
        # OpenBLAS on threads of its own is not called from ours.
        parts = min(threads, max(1, items * work // GRAIN)) if _blas_threads() == 1 else 1
        pieces = 1
        if items < 8 * parts:  # whole products would not divide evenly
            pieces = min(parts, max(1, work // GRAIN))
        b_panel = 0
        if suits(m, n, k):
            if right[1] > 0:
                b_panel = panel()
            elif items == 1 and room.size >= packed_size(n, k):
                width, size, to = panel(), size_of(T(0)), _address(room)
                for p in prange((n + width - 1) // width):
                    pack_turned(
                        right[0] - p * width * right[1] * size, -right[1],
                        min(width, n - p * width), k, to + p * k * width * size, width,
                    )  # fmt: skip
                right = (to, width, 0, 0, k * size)
                b_panel = k * width
        mode = (beta, pieces, n > m, b_panel)
        for part in prange(parts):
            _share(sizes, left, right, result, mode, part, parts)
    return found


many = parallel(_many)
