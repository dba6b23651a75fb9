"""The gradient of a large weight, and the sum of its squares."""

import numpy as np
import pytest

from gpugrad.backend.memory import squares
from gpugrad.kernels.cpu import pool
from gpugrad.kernels.cpu import weight_gradient as family
from gpugrad.kernels.cpu.memory import address
from gpugrad.ops.linalg import linear
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, layouts, run, wide

#: Rows, and features on both sides: of whole tiles, and of none.
SIZES = [(32, 14 * 12, 128), (1, 33, 47), (37, 113, 259), (7, 1, 1), (600, 30, 31)]


@pytest.fixture(autouse=True)
def _whatever_the_size(monkeypatch):
    monkeypatch.setattr(family, "LEAST", 0)


def operands(size, dtype="float32"):
    rows, features, inputs = size
    rng = np.random.default_rng(rows)
    shapes = ((rows, features), (rows, inputs))
    return [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]


def noted(g, x):
    """The gradient in a home, and what is noted of it."""
    home = np.full((g.shape[-1], x.shape[-1]), np.nan, g.dtype)
    squares.pop(id(home), None)
    assert family.weight_gradient(None, g, x, home) is home
    return home, squares.pop(id(home), None)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", SIZES)
def test_parity(size, dtype):
    g, x = operands(size, dtype)
    eps = np.finfo(dtype).eps
    want = wide(g).T @ wide(x)
    bound = size[0] * eps * (np.abs(wide(g)).T @ np.abs(wide(x))).max()
    home, total = noted(g, x)
    np.testing.assert_allclose(home, want, rtol=0, atol=bound)
    alone = family.weight_gradient(None, g, x, None)
    np.testing.assert_allclose(alone, want, rtol=0, atol=bound)
    np.testing.assert_allclose(total, np.square(wide(home)).sum(), rtol=1e-6)


def test_each_sum_is_taken_in_the_order_of_the_rows():
    """So it is the same whatever part of the result is computed by which thread."""
    g, x = operands((50, 131, 67))
    want, whole = noted(g, x)
    before = pool.get_num_threads()
    try:
        for threads in {1, before}:
            pool.set_num_threads(threads)
            for _ in range(3):
                got, total = noted(g, x)
                np.testing.assert_array_equal(got, want)
                assert total == whole
    finally:
        pool.set_num_threads(before)
    part, _ = noted(g[:, 5:90], x[:, 3:])
    np.testing.assert_array_equal(part, want[5:90, 3:])


@pytest.mark.parametrize("scale", [1e-12, 1e-25, 1e-38, 1e11, 1e15])
def test_squares_beyond_single_precision(scale):
    g, x = operands((20, 40, 50))
    home, total = noted(g * np.float32(scale), x)
    np.testing.assert_allclose(total, np.square(wide(home)).sum(), rtol=1e-6)
    assert total > 0


def test_zeros():
    g, x = operands((20, 40, 50))
    assert noted(0 * g, x)[1] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nothing_is_noted_of_what_is_not_finite(value):
    g, x = operands((20, 40, 50))
    g[3, 17] = value
    home, total = noted(g, x)
    assert total is None
    assert not np.isfinite(home[17]).any()
    assert np.isfinite(np.delete(home, 17, 0)).all()


def test_layouts():
    g, x = operands((19, 37, 45))
    want, _ = noted(g, x)
    for (name, a), (_, b) in zip(layouts(g), layouts(x)):
        np.testing.assert_array_equal(noted(a, b)[0], want, err_msg=name)


def test_what_is_left_to_blas(monkeypatch):
    g, x = operands((19, 37, 45))
    want = noted(g, x)[0]

    def close(got):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    home = np.zeros((37, 90), np.float32)[:, ::2]  # does not lie in a row
    close(family.weight_gradient(None, g, x, home))
    assert id(home) not in squares
    for name, value in (("LARGEST", x.nbytes - 1), ("LEAST", 37 * 45 + 1)):
        with monkeypatch.context() as patch:
            patch.setattr(family, name, value)
            got, total = noted(g, x)
        close(got)
        assert total is None


def test_no_rows():
    home, total = noted(*operands((0, 30, 20)))
    assert total is None
    assert not home.any()


def test_the_slot():
    """Any number of axes before the last, and an empty batch, as the generic text."""
    for shape in ((4, 5, 6), (0, 6), (3, 6)):
        rng = np.random.default_rng(0)
        x, w = rng.standard_normal(shape), rng.standard_normal((7, 6))
        for got, want in zip(run("require", linear, x, w), run("off", linear, x, w)):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_refusals():
    g, x = operands((4, 3, 2))
    refuse = family.KERNELS["weight_gradient"].refuse
    assert refuse(None, g, np.float32(1), None)
    assert refuse(None, g, x.astype("float64"), None)
    assert refuse(None, g.astype("float16"), x.astype("float16"), None)
    assert "so few" in refuse(None, g, x, None)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_vector_instructions(dtype):
    x = np.ones(1000, dtype)
    assert packed(assembly(family._sum_squares[dtype], address(x), 100, 10, 100)) >= 4
    assert packed(assembly(family._double[dtype], address(x), x.size)) >= 4
