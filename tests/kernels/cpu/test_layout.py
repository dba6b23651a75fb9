"""Copies with axes in another order: which are taken, what they hold, what is left to NumPy."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.backend.kernels import note_choices
from gpugrad.backend.numpy import exchange, exchanged_copy
from gpugrad.kernels.cpu import pool

NUMPY = backend_for_device("cpu")

#: The shape in memory, the order of the axes, and (items, rows, columns, run).
EXCHANGED = [
    ((64, 12, 12, 64), (0, 3, 1, 2), (64, 144, 64, 1)),
    ((300, 301), (1, 0), (1, 300, 301, 1)),
    ((3, 50, 1, 70, 9), (0, 3, 4, 2, 1), (3, 50, 630, 1)),
    ((100, 16, 400), (1, 0, 2), (1, 100, 16, 400)),
    ((2, 10, 40, 20, 40), (0, 2, 1, 3, 4), (2, 10, 40, 800)),
]


def numbers(shape, dtype="float32"):
    return np.random.default_rng(0).integers(-99, 99, shape).astype(dtype)


@pytest.mark.parametrize(("shape", "axes", "layout"), EXCHANGED)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "complex64"])
def test_an_exchange_of_axes_is_copied(shape, axes, layout, dtype):
    x = numbers(shape, dtype).transpose(axes)
    assert exchange(x) == layout
    with note_choices() as log:
        got = NUMPY.reshape(x, (-1,))
    assert [(c.operation, c.implementation) for c in log] == [("exchanged_copy", "numba cpu")]
    assert got.dtype == x.dtype and got.flags.c_contiguous
    np.testing.assert_array_equal(got, np.reshape(x, (-1,)))


@pytest.mark.parametrize("shape", [(2, 5, 7, 1), (1, 130, 33, 1), (3, 4, 6, 5), (2, 1, 3, 9000)])
def test_any_size_is_copied(shape):
    x = numbers(shape).transpose(0, 2, 1, 3)
    with gg.use_kernels("require"):
        got = exchanged_copy(NUMPY, x, *shape)
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, x)


LARGE = numbers((2, 300, 400))


@pytest.mark.parametrize(
    "x",
    [
        LARGE,
        LARGE[:, ::2].transpose(0, 2, 1),
        LARGE[:, ::-1].transpose(0, 2, 1),
        LARGE.transpose(2, 1, 0),
        LARGE.astype("float16").transpose(0, 2, 1),
        LARGE.astype("M8[s]").transpose(0, 2, 1),
        np.broadcast_to(LARGE[:, :1], LARGE.shape).transpose(0, 2, 1),
        numbers((200, 300, 3)).transpose(1, 0, 2),
        numbers((100, 16, 100)).transpose(1, 0, 2),
        np.empty(LARGE.nbytes + 1, "u1")[1:].view("f4").reshape(LARGE.shape).transpose(0, 2, 1),
    ],
    ids=["in order", "gaps", "reversed", "three", "two bytes", "times", "repeated", "short runs",
         "few", "misaligned"],
)  # fmt: skip
def test_the_rest_is_left_alone(x):
    assert exchange(x) is None
    np.testing.assert_array_equal(NUMPY.reshape(x, (-1,)), np.reshape(x, (-1,)))


def test_a_view_stays_one():
    x = LARGE.transpose(0, 2, 1)
    split = NUMPY.reshape(x, (2, 40, 10, 300))
    assert np.shares_memory(split, x)
    np.testing.assert_array_equal(split, np.reshape(x, (2, 40, 10, 300)))
    with pytest.raises(ValueError, match="cannot reshape"):
        NUMPY.reshape(x, (7, -1))
    with pytest.raises(ValueError, match="copy"):
        NUMPY.reshape(x, (-1,), copy=False)
    assert not np.shares_memory(NUMPY.reshape(LARGE, (-1,), copy=True), LARGE)


def test_the_mode_is_heeded_and_gradients_come_back():
    x = gg.tensor(LARGE).requires_grad_()
    with gg.use_kernels("off"), note_choices() as log:
        gg.permute_dims(x, (0, 2, 1)).reshape(-1)
    assert {c.implementation for c in log} == {"generic"}
    w = numbers(LARGE.size)
    (gg.permute_dims(x, (0, 2, 1)).reshape(-1) * w).sum().backward()
    np.testing.assert_array_equal(x.grad.data, w.reshape(2, 400, 300).transpose(0, 2, 1))


def test_threads_change_nothing():
    before = pool.get_num_threads()
    try:
        for shape, axes, _ in EXCHANGED:
            x = numbers(shape).transpose(axes)
            pool.set_num_threads(1)
            np.testing.assert_array_equal(NUMPY.reshape(x, (-1,)), np.reshape(x, (-1,)))
    finally:
        pool.set_num_threads(before)
