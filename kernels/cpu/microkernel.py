"""A product of small matrices whose left operand lies in memory with any strides.

    C[i, j] (+)= Σ over p and q of A[i, p, q] · B[p, q, j]

Two sums in place of one make it a convolution without a matrix of patches: `p` walks over rows of
an image and `q` along them, both through memory as it is. The same loop is its gradients, and the
recurrent product of a net whose weights are packed once. Large plain products are OpenBLAS's
(`kernels/cpu/gemm.py`).

How to call it, from a `@serial` or `@parallel` template (`kernels/cpu/compile.py`)::

    from gpugrad.kernels.cpu.microkernel import pack, packed_shape, panel, product

    packed = np.empty(packed_shape(p * q, n, dtype))    # in Python, or of that shape from anywhere
    pack(b, packed)                                     # once; b: an array (p·q, n), any strides
    product(m, n, p, q, a, (a_i, a_p, a_q), b, (b_p, b_q, b_panel), c, c_i, accumulate)

* `a`, `b`, `c` are addresses (`x.ctypes.data`), `accumulate` a boolean, the rest counts and strides
  in *elements*; all of them int64. Nothing is checked. Nothing is read or written but the elements
  named, and no address needs more alignment than an element has.
* Columns of B are contiguous within a *panel* of `panel()` of them; `b_panel` leads from one panel
  to the next. A packed B has `(b_p, b_q, b_panel) = (q·panel(), panel(), p·q·panel())`; a B that
  is used where it lies, with rows of contiguous elements, has `b_panel = panel()`.
* Columns of C are contiguous, `c_i` leads from row to row. With `accumulate` the sums are added to
  what C holds; without it, that does not matter, and sums over nothing are 0.
* The sum of an element is taken in the order of `p`, then of `q`, one multiply-add after another,
  and added to what C holds at the end, whatever `m` and `n` are: how the work is cut along these
  changes no bit of it. Long sums are the more exact for being taken in a few parts.

It is quickest where `q` is 16 or more, `n` a multiple of `panel()`, and one panel of B fits into
the processor's nearest cache or the next.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpugrad.kernels.cpu.compile import VECTOR, CpuTemplate, serial
from gpugrad.kernels.cpu.memory import clear, copy, size_of, turn
from gpugrad.kernels.template import T, Target, arithmetic, device

__all__ = ["pack", "pack_turned", "packed_shape", "panel", "product"]


#: Rows of C that its registers hold, two vectors wide, beside two vectors of B and an element of A.
ROWS = 14 if VECTOR == 64 or platform.machine().lower() in ("aarch64", "arm64") else 6

#: Rows that share a pointer: a row's address is then the pointer and one of few strides.
GROUP = 4

#: What the columns of a tile may be: (vectors, whether only some elements of them are touched).
COLUMNS = ((2, False), (2, True), (1, True))

#: What writes the machine code is not part of it: by this, another text has another place on disk.
TEXT = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


# -- one tile -------------------------------------------------------------------------------------


class _Writer:
    """Writes the code of tiles for elements of one type; addresses and strides are in bytes."""

    def __init__(self, builder, real, size, vector):
        self.builder = builder
        self.size, self.step = size, vector
        self.lanes = vector // size
        self.real = real
        self.vector = ir.VectorType(real, self.lanes)
        self.pointer = ir.PointerType()
        self.alignment = ir.Constant(ir.IntType(32), size)

    def call(self, name, result, *operands):
        kind = ir.FunctionType(result, [x.type for x in operands])
        name = f"llvm.{name}.v{self.lanes}f{8 * self.size}"
        if name.startswith("llvm.masked"):
            name += ".p0"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, operands)

    def place(self, address, v):
        moved = self.builder.add(address, address.type(v * self.step))
        return self.builder.inttoptr(moved, self.pointer)

    def everywhere(self, x):
        """A vector of so many times `x`."""
        index = ir.IntType(32)
        first = ir.Constant(ir.VectorType(x.type, self.lanes), ir.Undefined)
        first = self.builder.insert_element(first, x, index(0))
        return self.builder.shuffle_vector(
            first, first, ir.Constant(ir.VectorType(index, self.lanes), None)
        )

    def masks(self, n, vectors):
        """For each vector, which of its elements are among the first `n`."""
        index = ir.IntType(32)
        there = self.everywhere(self.builder.trunc(n, index))
        kind = ir.VectorType(index, self.lanes)
        return [
            self.builder.icmp_signed(
                "<", ir.Constant(kind, [v * self.lanes + i for i in range(self.lanes)]), there
            )
            for v in range(vectors)
        ]

    def element(self, address):
        place = self.builder.inttoptr(address, self.pointer)
        return self.builder.load(place, align=self.size, typ=self.real)

    def read(self, address, v, mask):
        place = self.place(address, v)
        if mask is None:
            return self.builder.load(place, align=self.size, typ=self.vector)
        nothing = ir.Constant(self.vector, None)
        return self.call("masked.load", self.vector, place, self.alignment, mask, nothing)

    def write(self, x, address, v, mask):
        place = self.place(address, v)
        if mask is None:
            self.builder.store(x, place, align=self.size)
        else:
            self.call("masked.store", ir.VoidType(), x, place, self.alignment, mask)

    def variable(self, value):
        return cgutils.alloca_once_value(self.builder, value)

    def advance(self, variable, step):
        self.builder.store(self.builder.add(self.builder.load(variable), step), variable)

    def tile(self, rows, vectors, masked, group, n, odd, a, a_strides, b, b_strides, c, c_i, depth,
             accumulate):  # fmt: skip
        """`rows` × `vectors` vectors of C, held in registers over both sums.

        With `odd` the last row is the one before it, done twice.
        """
        builder = self.builder
        (a_i, a_p, a_q), (b_p, b_q), (p_end, q_end) = a_strides, b_strides, depth
        masks = self.masks(n, vectors) if masked else [None] * vectors
        last = builder.select(odd, n.type(rows - 2), n.type(rows - 1))

        def rows_of(address, stride, which):
            return [builder.add(address, builder.mul(stride, i))
                    for i in (*map(n.type, which), last)]  # fmt: skip

        c_rows = rows_of(c, c_i, range(rows - 1))
        starts = rows_of(a, a_i, range(0, rows - 1, group))
        within = [builder.mul(a_i, n.type(i)) for i in range(group)]
        cells = [(i, v) for i in range(rows) for v in range(vectors)]
        sums = {cell: self.variable(ir.Constant(self.vector, None)) for cell in cells}
        a_outer, b_outer = [self.variable(x) for x in starts], self.variable(b)
        with cgutils.for_range(builder, p_end):
            a_inner = [self.variable(builder.load(x)) for x in a_outer]
            b_inner = self.variable(builder.load(b_outer))
            with cgutils.for_range(builder, q_end):
                across = [self.read(builder.load(b_inner), v, masks[v]) for v in range(vectors)]
                for i in range(rows):
                    pointer, rest = divmod(i, group) if i < rows - 1 else (-1, 0)
                    address = builder.add(builder.load(a_inner[pointer]), within[rest])
                    x = self.everywhere(self.element(address))
                    for v in range(vectors):
                        total = builder.load(sums[i, v])
                        total = self.call("fmuladd", self.vector, x, across[v], total)
                        builder.store(total, sums[i, v])
                for x in a_inner:
                    self.advance(x, a_q)
                self.advance(b_inner, b_q)
            for x in a_outer:
                self.advance(x, a_p)
            self.advance(b_outer, b_p)
        with builder.if_then(accumulate):
            for i, v in cells:
                before = self.read(c_rows[i], v, masks[v])
                builder.store(builder.fadd(before, builder.load(sums[i, v])), sums[i, v])
        for i, v in cells:
            self.write(builder.load(sums[i, v]), c_rows[i], v, masks[v])


@intrinsic
def _tile(typing, zero, rows, columns, n, odd, a, a_strides, b, b_strides, c, c_i, depth,
          accumulate):  # fmt: skip
    """`rows` (even) rows of C and `n` columns; `columns` is the number of their form."""
    # All named here: it is by what a function names that its machine code is found on disk.
    vector, most, group, forms, _ = VECTOR, ROWS, GROUP, COLUMNS, TEXT
    word = types.int64
    signature = types.void(
        zero, word, word, word, types.boolean, word, types.UniTuple(word, 3), word,
        types.UniTuple(word, 2), word, word, types.UniTuple(word, 2), types.boolean,
    )  # fmt: skip

    def code(context, builder, signature, args):
        _, rows, columns, n, odd, a, a_strides, b, b_strides, c, c_i, depth, accumulate = args
        a_strides, b_strides, depth = (
            cgutils.unpack_tuple(builder, x) for x in (a_strides, b_strides, depth)
        )
        writer = _Writer(builder, context.get_value_type(zero), zero.bitwidth // 8, vector)
        done = builder.append_basic_block("tile.done")
        which = builder.add(builder.mul(rows, rows.type(len(forms))), columns)
        choice = builder.switch(which, done)
        for count in range(2, most + 1, 2):
            for number, (vectors, masked) in enumerate(forms):
                block = builder.append_basic_block(f"tile.{count}.{number}")
                choice.add_case(rows.type(count * len(forms) + number), block)
                builder.position_at_end(block)
                writer.tile(count, vectors, masked, group, n, odd, a, a_strides, b, b_strides, c,
                            c_i, depth, accumulate)  # fmt: skip
                builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature, code


# -- panels and rows ------------------------------------------------------------------------------


@device
def panel():
    """Columns of a panel: two vectors."""
    return 2 * VECTOR // size_of(T(0))


def packed_shape(rows: int, n: int, dtype: Any) -> tuple[int, int, int]:
    """Shape of the array that :func:`pack` fills: panels, rows of B, columns of a panel.

    >>> from gpugrad.kernels.cpu.microkernel import packed_shape
    >>> panels, rows, width = packed_shape(9, 100, "float32")
    >>> rows, panels * width >= 100
    (9, True)
    """
    width = 2 * VECTOR // np.dtype(dtype).itemsize
    return -(-n // width), rows, width


@serial
def pack(b, packed):
    """Copy B, an array (rows, n) of any strides, panel by panel; what is left over becomes 0."""
    size = size_of(T(0))
    rows, width = b.shape[0], packed.shape[2]
    n = b.shape[1]
    turned = b.strides[0] == size and b.strides[1] > 0
    for k in range(packed.shape[0]):
        there = min(width, n - k * width)
        if turned:
            pack_turned(b[:, k * width :].ctypes.data, b.strides[1] // size, there, rows,
                        packed[k].ctypes.data, width)  # fmt: skip
            continue
        for i in range(rows):
            if b.strides[1] == size:
                # By address: a compiler that does not know the strides copies one by one.
                copy(b[i, k * width :].ctypes.data, packed[k, i].ctypes.data, there)
            else:
                for j in range(there):
                    packed[k, i, j] = b[i, k * width + j]
            for j in range(there, width):
                packed[k, i, j] = T(0)


@serial
def pack_turned(source, down, there, rows, panel, width):
    """One panel, of `there` columns that are contiguous, `down` from each to the next."""
    if there < width:
        clear(panel, rows * width)
    turn(source, down, there, rows, panel, width)


@serial
def _product(m, n, p, q, a, a_strides, b, b_strides, c, c_i, accumulate):
    size = size_of(T(0))
    width = panel()
    a_i, a_p, a_q = a_strides[0] * size, a_strides[1] * size, a_strides[2] * size
    b_p, b_q, b_panel = b_strides[0] * size, b_strides[1] * size, b_strides[2] * size
    row = c_i * size
    tiles = (m + ROWS - 1) // ROWS
    for k in range((n + width - 1) // width):
        there = min(width, n - k * width)
        columns = 0 if there == width else 1 if 2 * there > width else 2
        done = 0
        for tile in range(tiles):
            # Tiles of about equal size: a small one does not keep the processor busy.
            rows = (m - done + tiles - tile - 1) // (tiles - tile)
            rows = min((rows + 1) // 2 * 2, m - done)
            odd = rows % 2
            _tile(
                T(0), rows + odd, columns, there, odd == 1, a + done * a_i, (a_i, a_p, a_q),
                b + k * b_panel, (b_p, b_q), c + done * row + k * width * size, row, (p, q),
                accumulate,
            )  # fmt: skip
            done += rows


# -- one piece of machine code for all who call it ------------------------------------------------

_WORD, _TRIPLE = types.int64, types.UniTuple(types.int64, 3)
_ARGUMENTS = (
    _WORD,
    _WORD,
    _WORD,
    _WORD,
    _WORD,
    _TRIPLE,
    _WORD,
    _TRIPLE,
    _WORD,
    _WORD,
    types.boolean,
)


class _Linked(CpuTemplate):
    """A function that calls :func:`_product` by a symbol.

    Linked in like other functions, all the forms of a tile would be compiled again, seconds of it,
    with every function that calls it directly or not.
    """

    def _make(self, target: Target, storage: str) -> Any:
        width = arithmetic(storage)
        dispatcher = _product[width]
        dispatcher.compile(_ARGUMENTS)
        compiled = dispatcher.overloads[_ARGUMENTS]
        place = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
        llvmlite.binding.add_symbol(f"gpugrad_product_{width}", place)
        return super()._make(target, storage)


@intrinsic
def _call_product(typing, zero, m, n, p, q, a, a_strides, b, b_strides, c, c_i, accumulate):
    def code(context, builder, signature, args):
        kind = context.call_conv.get_function_type(types.none, _ARGUMENTS)
        function = cgutils.get_or_insert_function(builder.module, kind, f"gpugrad_product_{zero}")
        context.call_conv.call_function(builder, function, types.none, _ARGUMENTS, args[1:])
        return context.get_dummy_value()

    return types.void(zero, *_ARGUMENTS), code


def _called(m, n, p, q, a, a_strides, b, b_strides, c, c_i, accumulate):
    """C (+)= A·B; see the head of this file for what the numbers mean."""
    _call_product(T(0), m, n, p, q, a, a_strides, b, b_strides, c, c_i, accumulate)


product = _Linked(_called, "device")
