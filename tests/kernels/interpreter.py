"""CPU kernels as plain Python: nothing is compiled, and an index beyond an array is an error."""

from __future__ import annotations

import ctypes
import importlib
import itertools
import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from gpugrad.kernels.cpu import attention, gemm, microkernel, pool, products, scan, winograd
from gpugrad.kernels.cpu import compile as compiler
from gpugrad.kernels.cpu import memory as memory_
from gpugrad.kernels.template import arithmetic

#: The sizes of pieces of work, so small that small arrays have several, and an incomplete one.
SMALL = {
    "elementwise": {"BLOCK": 64},
    "bias": {"BLOCK": 64, "CHUNKS": 5},
    "dropout": {"BLOCK": 64, "SPAN": 32},
    "embedding": {"BLOCK": 64, "PARTS": 5, "WIDTH": 16},
    "softmax": {"PIECE": 32, "TILE": 64, "NARROWEST": 4, "WIDEST": 16, "STRETCH": 8},
    "norm": {"BLOCK": 64, "CHUNKS": 5, "LONGEST": 16},
    "rows": {"PIECE": 32},
    "batch_norm": {"BLOCK": 64, "LOT": 128, "ROWS": 4, "WIDTH": 16},
    "reduce": {"BLOCK": 64},
    "reductions": {"PIECE": 32, "ROWS": 8, "WIDTH": 16},
    "scan": {"PIECE": 32, "BLOCK": 64, "STRETCH": 8, "WIDTH": 16, "LANES": 4},
    "layout": {"BLOCK": 64},
    "losses": {"BLOCK": 64},
    "select": {"BLOCK": 64},
    "gather": {"WIDTH": 16},
    "optimizer": {"BLOCK": 64, "FEW": 3},
    "linear": {"BLOCK": 64, "CHUNKS": 5, "STRETCH": 3, "GRAIN": 1000},
    "layers": {"PIECE": 4, "GRAIN": 200},
    "wide": {
        "GRAIN": 64,
        "SHARE": 64,
        "FEW": 100,
        "PIECE": 4,
        "CHUNKS": 3,
        "NARROWEST": 1,
        "LARGEST": 9000,
    },
    "moments": {"BLOCK": 64, "FEW": 3},
    "gemm": {"GRAIN": 64, "STRIP": 6},
    "direct": {"ROWS": 4, "DEPTH": 5, "STRIP": 8, "LARGEST": 4000, "FEWEST": 5, "SHORTEST": 4},
    "products": {"GRAIN": 64, "LARGEST": 4000, "VECTOR": 12},
    "memory": {"LINE": 4, "PIECE": 64, "VECTOR": 12},
    "microkernel": {"VECTOR": 12, "ROWS": 4},
    "weight_gradient": {"LEAST": 40, "LARGEST": 960, "STRIP": 8, "WIDTH": 6},
    "scores": {},
    "attention": {"QUERIES": 8, "KEYS": 6, "RANGE": 8, "ENOUGH": 3},
    "windows": {"DEPTH": 8},
    "winograd": {"VECTOR": 12, "TILES": 8, "CHANNELS": 6, "FEWEST": 4, "CHUNKS": 4},
    "convolution": {"CHUNKS": 3, "BAND": 400, "TOGETHER": 1200},
    "transposed": {"CHUNKS": 3, "BAND": 400, "TOGETHER": 1200},
    "pooling": {},
    "recurrent": {"BLOCK": 3, "STRIP": 8, "DEPTH": 6, "LARGEST": 4000, "GRAIN": 64},
}


class Interpreter:
    """A target whose functions are the bodies themselves. Each has a name of its own: instances
    are kept by name, and a body may have changed since the last one."""

    _number = itertools.count()

    def __init__(self, memory):
        self.name = f"interpreter {next(self._number)}"
        self._memory = memory

    def placeholder(self, name, storage):
        number = getattr(np, arithmetic(storage))
        integer = np.int64 if number is np.float64 else np.int32
        return {
            "T": number, "I": integer, "read": _read, "write": _write,
            "where": lambda c, a, b: a if c else b,
            "sqrt": np.sqrt, "floor": np.floor, "absolute": abs,
            "maximum": np.maximum, "minimum": np.minimum,
            "to_bits": lambda x: number(x).view(integer),
            "from_bits": lambda i: integer(i).view(number),
        }[name]  # fmt: skip

    def compile(self, function, role, storage):
        # A float is a double for the compiler. In Python it would take the type of what it meets.
        code = function.__code__
        constants = (np.float64(c) if type(c) is float else c for c in code.co_consts)
        function.__code__ = code.replace(co_consts=tuple(constants))
        return self._memory.seen_by(function) if "ctypes" in code.co_names else function


def _read(a, i):
    return a[i]


def _write(a, i, x):
    a[i] = x


class _Memory:
    """What kernels ask of the machine. There is no memory but the arrays of which they have asked
    for the address."""

    def __init__(self):
        self._arrays: dict = {}  # by their bounds; those found last come last

    def holder(self, low, high):
        """The bytes of an array that those from `low` to `high` are in, and where they begin."""
        for bounds in reversed(self._arrays):
            if bounds[0] <= low and high <= bounds[1]:
                break
        else:
            raise IndexError(f"{high - low} bytes at {low}, where no array is")
        array = self._arrays.pop(bounds)
        self._arrays[bounds] = array
        return (ctypes.c_char * (bounds[1] - bounds[0])).from_address(bounds[0]), bounds[0]

    def elements(self, address, count, dtype):
        found, first = self.holder(address, address + count * dtype.itemsize)
        return np.frombuffer(found, dtype, count, address - first)

    def block(self, address, shape, strides, dtype):
        """Elements with strides in bytes, all in one array."""
        if not all(shape):
            return np.empty(shape, dtype)
        far = [step * (n - 1) for step, n in zip(strides, shape)]
        low = sum(min(x, 0) for x in far)
        high = sum(max(x, 0) for x in far) + dtype.itemsize
        found, first = self.holder(address + low, address + high)
        return np.ndarray(shape, dtype, found, address - first, strides)

    def address(self, x):
        self._arrays[np.lib.array_utils.byte_bounds(x)] = np.asarray(x)
        if len(self._arrays) > 500:  # those of before are not asked for again
            del self._arrays[next(iter(self._arrays))]
        return x.ctypes.data

    def seen_by(self, function):
        """A function that may ask its arguments for their addresses itself."""
        memory = self

        class Seen(np.ndarray):
            @property
            def ctypes(self):
                return SimpleNamespace(data=memory.address(np.asarray(self)))

        def call(*args):
            function(*(x.view(Seen) if isinstance(x, np.ndarray) else x for x in args))

        return call

    def size(self, like):
        return like.dtype.itemsize

    def pointer(self, address, like):
        return _Pointer(self, address, like.dtype)

    def carray(self, pointer, shape):
        _, address, dtype = pointer._of
        return self.elements(address, math.prod(shape), dtype).reshape(shape)

    def _where(self, x):
        # Of the shares of a sum, the first is given, and where the next is.
        self.address(x.base if isinstance(x.base, np.ndarray) else x)
        return _WHERE(x)

    def _where_mask(self, *given):
        found, alive = _WHERE_MASK(*given)
        if alive is not None:
            self.address(alive)
        return found, alive

    def _tile(
        self, zero, rows, columns, n, odd, a, a_strides, b, b_strides, c, c_i, depth, accumulate
    ):
        """`rows` rows of a product, the last of them twice if that is `odd`."""
        vectors, masked = microkernel.COLUMNS[columns]
        width = vectors * microkernel.VECTOR // zero.itemsize
        if rows % 2 or not 0 < rows <= microkernel.ROWS:
            raise ValueError(f"no tile of {rows} rows")
        shape = (rows - odd, min(n, width) if masked else width)
        depth = [max(0, count) for count in depth]  # none, where a window is all border
        left = self.block(a, (shape[0], *depth), a_strides, zero.dtype)
        right = self.block(b, (*depth, shape[1]), (*b_strides, zero.itemsize), zero.dtype)
        out = self.block(c, shape, (c_i, zero.itemsize), zero.dtype)
        out[...] = np.tensordot(left, right, 2) + (out if accumulate else 0)

    def _both_sides(self, zero, name, adds, source, steps, target, to_steps):
        matrix, lanes = (
            np.array(dict(winograd.MATRICES)[name], zero.dtype),
            winograd.VECTOR // zero.itemsize,
        )
        rows, columns = matrix.shape
        squares = (columns, columns, lanes), (rows, rows, lanes)
        x = self.block(source, squares[0], (*steps, zero.itemsize), zero.dtype)
        y = self.block(target, squares[1], (*to_steps, zero.itemsize), zero.dtype)
        found = np.einsum("ik,jl,klv->ijv", matrix, matrix, x)
        for i, j in reversed(list(np.ndindex(rows, rows))):
            y[i, j] = found[i, j] + (y[i, j] if adds else 0)

    def _turn_block(self, zero, source, down, target, to_down):
        n = memory_.VECTOR // zero.itemsize
        block = self.block(source, (n, n), (down, zero.itemsize), zero.dtype)
        self.block(target, (n, n), (to_down, zero.itemsize), zero.dtype)[...] = block.T.copy()

    def _prefix(self, room, i, before):
        part = room[i : i + scan.LANES]
        if part.size < scan.LANES:
            raise IndexError(f"elements {i} to {i + scan.LANES} of {room.size}")
        part[:] = before + np.cumsum(part)
        return part[-1]

    def _blas_threads(self):
        return 1

    def _blas(self, alpha, ta, tb, m, n, k, a, lda, b, ldb, beta, c, ldc):
        def matrix(address, rows, columns, lead):
            if lead < max(1, columns) or address % alpha.itemsize:
                raise ValueError(f"rows of {columns} elements at {address}, {lead} apart")
            strides = lead * alpha.itemsize, alpha.itemsize
            return self.block(address, (rows, columns), strides, alpha.dtype)

        left = matrix(a, k, m, lda).T if ta == 112 else matrix(a, m, k, lda)
        right = matrix(b, n, k, ldb).T if tb == 112 else matrix(b, k, n, ldb)
        out = matrix(c, m, n, ldc)
        before = out.copy() if beta else alpha * 0
        out[...] = np.nan  # as what it is made of must lie elsewhere
        out[...] = alpha * (left @ right) + beta * before


_WHERE, _WHERE_MASK = attention._where, attention._where_mask


class _Pointer:
    """Elements from an address on, all in one array."""

    def __init__(self, memory, address, dtype):
        self._of = memory, address, dtype
        self._first, self._found = 0, np.empty(0)

    def _place(self, i):
        if not self._found.size:
            memory, address, dtype = self._of
            there = address + i * dtype.itemsize
            found, low = memory.holder(there, there + dtype.itemsize)
            skipped = (there - low) % dtype.itemsize
            count = (len(found) - skipped) // dtype.itemsize
            self._found = np.frombuffer(found, dtype, count, skipped)
            self._first = (address - low - skipped) // dtype.itemsize
        place = self._first + i
        if place < 0:
            raise IndexError(f"element {i} is before the first")
        return place

    def __getitem__(self, i):
        place = self._place(i)
        return self._found[place]

    def __setitem__(self, i, x):
        place = self._place(i)
        self._found[place] = x


def _spoilt(shape, dtype):
    """An array that nobody has written to."""
    dtype = np.dtype(dtype)
    return np.full(math.prod(shape) * dtype.itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)


@contextmanager
def interpreted():
    """Inside the block the CPU's kernels run in Python, on small pieces of work."""
    memory = _Memory()
    machine = {
        "address": memory.address, "pointer": memory.pointer, "size_of": memory.size,
        "_address": memory.address,
        "_blas": memory._blas, "_blas_threads": memory._blas_threads, "_tile": memory._tile,
        "_turn_block": memory._turn_block, "_both_sides": memory._both_sides,
        "_prefix": memory._prefix, "carray": memory.carray, "empty": _spoilt,
        "workspace": lambda dtype, size: _spoilt((size,), dtype),
        "_where": memory._where, "_where_mask": memory._where_mask,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "CPU", Interpreter(memory))
        for family, sizes in SMALL.items():
            module = importlib.import_module(f"gpugrad.kernels.cpu.{family}")
            known = {name: thing for name, thing in machine.items() if hasattr(module, name)}
            for name, thing in (*sizes.items(), *known.items()):
                patch.setattr(module, name, thing)
        # Linked in by a symbol for the compiler's sake alone.
        product = microkernel._product
        patch.setattr(microkernel._Linked, "_make", lambda _, *of: product.instance(*of))
        patch.setattr(pool, "get_num_threads", lambda: 3)
        many = gemm.many["float32"]
        one = SimpleNamespace(one=gemm.one["float32"], alone=many, many=many)
        patch.setattr(products, "_rooms", products._Rooms())
        patch.setattr(products, "_compiled", {np.dtype("float32"): one})
        yield
