"""CPU kernels as plain Python: nothing is compiled, and an index beyond an array is an error."""

from __future__ import annotations

import ctypes
import importlib
import itertools
from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from gpugrad.kernels.cpu import compile as compiler
from gpugrad.kernels.cpu import gemm, pool, products
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
    "optimizer": {"BLOCK": 64, "FEW": 3},
    "linear": {"BLOCK": 64, "CHUNKS": 5, "STRETCH": 3, "GRAIN": 1000},
    "gemm": {"GRAIN": 64, "STRIP": 4},
    "products": {"GRAIN": 64, "STRIP": 4},
}


class Interpreter:
    """A target whose functions are the bodies themselves. Each has a name of its own: instances
    are kept by name, and a body may have changed since the last one."""

    _number = itertools.count()

    def __init__(self):
        self.name = f"interpreter {next(self._number)}"

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
        return function


def _read(a, i):
    return a[i]


def _write(a, i, x):
    a[i] = x


class _Memory:
    """What `kernels/cpu/gemm.py` asks of the machine. There is no memory but the arrays of which it
    has asked for the address."""

    def __init__(self):
        self.arrays: deque = deque(maxlen=50)  # those of before are not asked for again

    def elements(self, address, count, dtype):
        size = dtype.itemsize * count
        for x in self.arrays:
            low, high = np.lib.array_utils.byte_bounds(x)
            if low <= address and address + size <= high:
                found = (ctypes.c_char * size).from_address(address)
                return np.frombuffer(found, dtype)
        raise IndexError(f"{count} elements at {address}, where no array is")

    def _address(self, x):
        self.arrays.append(x)
        return x.ctypes.data

    def _size(self, like):
        return like.dtype.itemsize

    def _pointer(self, address, like):
        return _Pointer(self, address, like.dtype)

    def _blas_threads(self):
        return 1

    def _blas(self, alpha, ta, tb, m, n, k, a, lda, b, ldb, beta, c, ldc):
        def matrix(address, rows, columns, lead):
            if lead < max(1, columns) or address % alpha.itemsize:
                raise ValueError(f"rows of {columns} elements at {address}, {lead} apart")
            row = self.elements(address, (rows - 1) * lead + columns, alpha.dtype)
            strides = lead * row.itemsize, row.itemsize
            return np.lib.stride_tricks.as_strided(row, (rows, columns), strides)

        left = matrix(a, k, m, lda).T if ta == 112 else matrix(a, m, k, lda)
        right = matrix(b, n, k, ldb).T if tb == 112 else matrix(b, k, n, ldb)
        out = matrix(c, m, n, ldc)
        before = out.copy() if beta else alpha * 0
        out[...] = np.nan  # as what it is made of must lie elsewhere
        out[...] = alpha * (left @ right) + beta * before


class _Pointer:
    """Elements from an address on."""

    def __init__(self, memory, address, dtype):
        self.at = lambda i: memory.elements(address + i * dtype.itemsize, 1, dtype)

    def __getitem__(self, i):
        return self.at(i)[0]

    def __setitem__(self, i, x):
        self.at(i)[0] = x


@contextmanager
def interpreted():
    """Inside the block the CPU's kernels run in Python, on small pieces of work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "CPU", Interpreter())
        for family, sizes in SMALL.items():
            module = importlib.import_module(f"gpugrad.kernels.cpu.{family}")
            for name, size in sizes.items():
                patch.setattr(module, name, size)
        memory = _Memory()
        for name in ("_address", "_size", "_pointer", "_blas", "_blas_threads"):
            patch.setattr(gemm, name, getattr(memory, name))
        patch.setattr(pool, "get_num_threads", lambda: 3)
        many = gemm.many["float32"]
        one = SimpleNamespace(one=gemm.one["float32"], alone=many, many=many)
        patch.setattr(products, "_compiled", {np.dtype("float32"): one})
        yield
