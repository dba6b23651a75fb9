"""The product of small matrices with strides, against NumPy in more digits."""

# mypy: disable-error-code="operator"
import sys

import numba
import numpy as np
import pytest

from gpugrad.kernels.cpu import microkernel
from gpugrad.kernels.cpu.compile import parallel, serial
from gpugrad.kernels.cpu.microkernel import pack, packed_shape, panel, product
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.cpu.processes import python

prange = numba.prange

FINER = {"float32": np.float64, "float64": np.longdouble}
EPS = {"float32": 2.0**-24, "float64": 2.0**-53}


@serial
def run(a, b, b_strides, n, c, accumulate):
    """C (+)= A·B for an array A (m, p, q); B by its address and strides."""
    m, p, q = a.shape
    size = a.itemsize
    product(m, n, p, q, a.ctypes.data, (a.strides[0] // size, a.strides[1] // size,
            a.strides[2] // size), b.ctypes.data, b_strides, c.ctypes.data, c.strides[0] // size,
            accumulate)  # fmt: skip


@serial
def width():
    return panel()


def wrapped(a, b, c, accumulate, packs=True):
    """The product of arrays A (m, p, q) and B (p, q, n), with B packed or as it is."""
    p, q, n = b.shape
    storage = a.dtype.name
    if packs:
        there = np.full(packed_shape(p * q, n, storage), np.nan, storage)
        pack[storage](b.reshape(p * q, n), there)
        panels = there.shape[2]
        strides = (q * panels, panels, p * q * panels)
    else:
        there = b
        strides = (b.strides[0] // b.itemsize, b.strides[1] // b.itemsize, width[storage]())
    run[storage](a, there, strides, n, c, accumulate)
    return c


def normal(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(got, a, b, before=0.0):
    finer = FINER[got.dtype.name]
    a, b = a.astype(finer), b.astype(finer)
    true = np.tensordot(a, b, 2) + before
    size = np.tensordot(abs(a), abs(b), 2) + abs(before)
    steps = a.shape[1] * a.shape[2] + 2
    assert np.all(abs(got - true) <= steps * EPS[got.dtype.name] * size)


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "as it lies"])
@pytest.mark.parametrize("dtype", FINER)
def test_every_edge(dtype, packs):
    wide = width[dtype]()
    for m in (*range(1, 15), 25, 26):
        for n in (1, 3, wide // 2, wide // 2 + 1, wide - 1, wide, wide + 1, 2 * wide, 3 * wide - 5):
            a, b = normal(m, 2, 3, dtype=dtype), normal(2, 3, n, dtype=dtype, seed=1)
            before = normal(m, n, dtype=dtype, seed=2)
            close(wrapped(a, b, np.full((m, n), np.nan, dtype), False, packs), a, b)
            close(wrapped(a, b, before.copy(), True, packs), a, b, before)


@pytest.mark.parametrize("dtype", FINER)
def test_what_lies_beside_the_result_stays(dtype):
    a, b = normal(7, 1, 5, dtype=dtype), normal(1, 5, 19, dtype=dtype)
    c = np.full((9, 40), 7, dtype)
    wrapped(a, b, c[1:8, 3:22], False)
    close(c[1:8, 3:22], a, b)
    c[1:8, 3:22] = 7
    assert np.all(c == 7)


@pytest.mark.parametrize("dtype", FINER)
def test_windows_of_an_image(dtype):
    """A whose elements overlap: a convolution of one row without a matrix of patches."""
    image, b = normal(5, 20, 8, dtype=dtype), normal(3, 24, 33, dtype=dtype)
    step = image.itemsize
    a = np.lib.stride_tricks.as_strided(image, (9, 3, 24), (2 * 8 * step, 160 * step, step))
    close(wrapped(a, b, np.empty((9, 33), dtype), False), a, b)


def test_strides_may_be_negative_zero_and_of_any_axis():
    base = normal(4, 11, 6)
    for a in (base[::-1, ::-1, ::-1], base.transpose(2, 0, 1), base[:, ::3, ::2],
              np.broadcast_to(base[:1], (5, 11, 6))):  # fmt: skip
        b = normal(*a.shape[1:], 21, seed=1)
        close(wrapped(a, b, np.empty((a.shape[0], 21), a.dtype), False), a, b)


def test_addresses_need_not_be_aligned():
    raw = np.zeros(1000 * 4 + 1, np.uint8)
    a, b = normal(5, 1, 7), normal(1, 7, 33)
    c = raw[1 : 1 + 5 * 33 * 4].view(np.float32).reshape(5, 33)
    close(wrapped(a, b, c, False, packs=False), a, b)


@pytest.mark.parametrize("shape", [(3, 0, 4), (3, 4, 0)])
def test_a_sum_over_nothing(shape):
    a, b = np.empty(shape, np.float32), np.empty((*shape[1:], 5), np.float32)
    assert np.all(wrapped(a, b, np.ones((3, 5), np.float32), False, packs=False) == 0)
    assert np.all(wrapped(a, b, np.ones((3, 5), np.float32), True, packs=False) == 1)


def test_nothing_to_compute():
    for m, n in ((0, 5), (5, 0)):
        a, b = normal(m, 1, 4), normal(1, 4, n)
        wrapped(a, b, np.empty((m, n), np.float32), False)


def test_how_rows_are_cut_changes_no_bit():
    a, b = normal(26, 3, 40), normal(3, 40, 45)
    whole = wrapped(a, b, np.empty((26, 45), np.float32), False)
    for m in (1, 5, 13):
        part = wrapped(a[:m], b, np.empty((m, 45), np.float32), False)
        assert part.tobytes() == whole[:m].tobytes()


def test_nan_stays_with_its_row_and_column():
    a, b = normal(14, 1, 3), normal(1, 3, 50)
    a[4, 0, 1] = np.nan
    b[0, 2, 49] = np.inf
    got = wrapped(a, b, np.empty((14, 50), np.float32), False)
    assert np.isnan(got[4]).all() and np.isfinite(np.delete(got, 4, 0)[:, :49]).all()
    assert not np.isfinite(got[:, 49]).any()


@parallel
def blocks(a, b, c):
    """One row of blocks per thread: from a parallel loop."""
    m, _, q = a.shape
    for i in prange(4):
        low, high = i * m // 4, (i + 1) * m // 4
        product(high - low, c.shape[1], 1, q, a[low].ctypes.data, (q, 0, 1), b.ctypes.data,
                (0, c.shape[1], panel()), c[low].ctypes.data, c.shape[1], False)  # fmt: skip


def test_from_threads():
    a, b = normal(50, 1, 30), normal(1, 30, 70)
    c = np.empty((50, 70), np.float32)
    blocks["float32"](a, b, c)
    assert c.tobytes() == wrapped(a, b, np.empty_like(c), False).tobytes()


@pytest.mark.parametrize("dtype", FINER)
def test_its_instructions_are_packed(dtype):
    a, b = normal(12, 1, 4, dtype=dtype), normal(1, 4, 64, dtype=dtype)
    c = np.empty((12, 64), dtype)
    text = assembly(microkernel._product[dtype], 12, 64, 1, 4, a.ctypes.data, (4, 0, 1),
                    b.ctypes.data, (0, 64, 64), c.ctypes.data, 64, False)  # fmt: skip
    # Each form of a tile: rows × vectors, once.
    least = sum(rows * vectors for rows in range(2, microkernel.ROWS + 1, 2)
                for vectors, _ in microkernel.COLUMNS)  # fmt: skip
    assert packed(text) >= least


BOUNDS = """
import ctypes, mmap
import numba
import numpy as np
{patch}
from gpugrad.kernels.cpu import microkernel
from gpugrad.kernels.cpu.microkernel import pack, packed_shape, panel, product
from gpugrad.kernels.cpu.compile import serial

@serial
def run(m, n, q, a, b, b_strides, c, accumulate):
    product(m, n, 1, q, a, (q, 0, 1), b, b_strides, c, n, accumulate)

@serial
def width():
    return panel()

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE

def fenced(x, front):
    "The elements of x with a page beside them that may not be touched."
    pages = -(-x.nbytes // PAGE)
    raw = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(raw))
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(start + page * PAGE), PAGE, 0) == 0
    offset = PAGE if front else (pages + 1) * PAGE - x.nbytes
    y = np.frombuffer(raw, x.dtype, x.size, offset).reshape(x.shape)
    y[...] = x
    return y

random = np.random.default_rng(0)
for dtype in ("float32", "float64"):
    for front in (False, True):
        for m, n, q in ((1, 1, 1), (3, 5, 2), (13, 33, 7), (7, 64, 3), (2, 17, 4), (12, 9, 5)):
            a, b, c = (fenced(random.standard_normal(s).astype(dtype), front)
                       for s in ((m, q), (q, n), (m, n)))
            for accumulate in (False, True):
                want = a @ b + c * accumulate
                run[dtype](m, n, q, a.ctypes.data, b.ctypes.data, (0, n, width[dtype]()),
                           c.ctypes.data, accumulate)
                assert np.allclose(c, want, 1e-4, 1e-5), (dtype, m, n, q)
            lying = fenced(np.ascontiguousarray(b.T), front).T
            packed = fenced(np.ones(packed_shape(q, n, dtype), dtype), front)
            pack[dtype](lying, packed)
            assert (np.concatenate(list(packed), 1)[:, :n] == b).all()
            assert not np.concatenate(list(packed), 1)[:, n:].any()
print("done", microkernel.VECTOR)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no mprotect")
@pytest.mark.parametrize(("features", "vector"), [("avx512f avx2", 64), ("avx2", 32), ("", 16)])
def test_nothing_beyond_the_operands_is_touched(features, vector, tmp_path):
    """With vectors of every length: the compiler makes shorter ones of those that are missing."""
    patch = ("from gpugrad.kernels.cpu import compile\n"
             f"compile._host_features = lambda: frozenset({features!r}.split())\n"
             "compile.VECTOR = compile._vector_bytes()")  # fmt: skip
    out = python(BOUNDS.replace("{patch}", patch), GPUGRAD_CACHE_DIR=str(tmp_path))
    assert out == f"done {vector}\n"
