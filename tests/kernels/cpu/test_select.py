"""The choice between two values: what `numpy.where` gives, for everything that it takes."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.backend.kernels import note_choices
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import pool, select
from tests.kernels.cpu.assembly import assembly
from tests.kernels.parity import DTYPES, layouts, run

NUMPY = backend_for_device("cpu")
C = np.random.default_rng(0).random((40, 50)) < 0.5
X, Y = np.random.default_rng(1).standard_normal((2, 40, 50)).astype("float32")
HALF = X.astype(DTYPES["bfloat16"])


@pytest.mark.parametrize(
    "operands",
    [
        (C, X, Y), (C, X, 0.0), (C, 1.0, Y), (C, 1.0, 0.0), (C, 3, 5), (True, 1.0, 2.0),
        (C[:1], X, Y), (C, X[:1], Y), (C[:, :1], X[:1], 2.0), (C, X, np.zeros((3, 1, 1))),
        (C, X.astype("float64"), Y), (C, X.astype(int), 2.5), (C.astype(int), X, Y[:, ::-1]),
        (C.T, X.T, Y.T), (C[0, 0], X, Y), (C[:0], X[:0], 1.0), (C, X > 0, False),
        (C, np.float32(2), np.zeros(())), (C, HALF, HALF[::-1]), (C, HALF, 0.0),
        (C, X.astype("float16"), 0.5), (C, X.astype("complex64"), 1j), (C[0, 0], X[0, 0], 1.0),
    ],
)  # fmt: skip
def test_parity(operands):
    want = np.where(*operands)
    with gg.use_kernels("require"):
        got = NUMPY.where(*operands)
    assert got.dtype == want.dtype and got.shape == want.shape
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype):
    x, y = X.astype(DTYPES[dtype]), Y.astype(DTYPES[dtype])
    g = np.where(C, x, -y)
    for a, b in zip(*(
        run(mode, lambda a, b: gg.where(a > b, a, b), x, y, g=g) for mode in ("require", "off")
    ), strict=True):  # fmt: skip
        assert a.dtype == DTYPES[dtype] and np.array_equal(a, b)


def test_layouts():
    want = np.where(X > Y, X, Y)
    with gg.use_kernels("require"):
        for (name, a), (_, b) in zip(layouts(X), layouts(Y)):
            assert np.array_equal(NUMPY.where(a > b, a, b), want), name
        beside = np.moveaxis(X.reshape(4, 10, 5, 10), -1, 1)
        assert NUMPY.where(beside > 0, beside, 0.0).strides == beside.strides


def test_a_nan_keeps_its_bits():
    x = np.array([0x7FA00001, 0x7FC12345, 0x3F800000], np.uint32).view(np.float32)
    with gg.use_kernels("require"):
        assert NUMPY.where(np.ones(3, bool), x, 0.0).tobytes() == x.tobytes()


def test_blocks_on_any_number_of_threads():
    x, y = np.random.default_rng(2).standard_normal((2, 50_001)).astype("float32")
    before = pool.get_num_threads()
    try:
        for n in (1, before):
            pool.set_num_threads(n)
            for a, b in ((x, y), (x, 0.0), (0.0, y)):
                with note_choices() as log:
                    got = NUMPY.where(x > y, a, b)
                assert np.array_equal(got, np.where(x > y, a, b))
                assert [c.implementation for c in log] == ["numba cpu"]
    finally:
        pool.set_num_threads(before)


def test_loops_are_vectorised():
    c, x, one = np.ones(64, np.uint8), np.ones(64, np.int32), np.ones(1, np.int32)
    for loop, a, b in (
        (select._both, x, x), (select._or_number, x, one), (select._number_or, one, x),
    ):  # fmt: skip
        text = assembly(loop["float32"], c, a, b, x)
        assert any(w in text for w in ("vpblend", "vblend", "vpmaskmov", "{%k", "bsl", "bif"))


def test_refusals_are_told():
    with gg.use_kernels("require"), pytest.raises(KernelError, match="elements of 16 bytes"):
        NUMPY.where(C, X, 1j * X.astype("float64"))
