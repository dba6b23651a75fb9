"""Rows of a table: values, gradients, options, and what is refused."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import DTypeError, OutOfRangeError, ParameterError, ShapeError

TABLE = np.arange(12.0).reshape(4, 3)


def gradient(index, rows=4, g=None, **options):
    table = gg.tensor(np.zeros((rows, 2)), requires_grad=True)
    y = gg.embedding(gg.asarray(index), table, **options)
    y.backward(gg.ones(y.shape) if g is None else gg.asarray(g))
    return table.grad.numpy()


@pytest.mark.parametrize("index", [2, [], [3], [[0, 1], [1, 1]], np.zeros((2, 0, 3), int)])
def test_values(index):
    index = np.asarray(index, dtype=np.int64)
    assert np.array_equal(gg.embedding(index, TABLE).numpy(), TABLE[index])


def test_each_row_gets_the_sum_over_the_places_that_read_it():
    index = np.array([[1, 3, 1], [1, 0, 3]])
    g = np.arange(12.0).reshape(2, 3, 2)
    want = np.zeros((4, 2))
    for i, row in zip(index.ravel(), g.reshape(-1, 2)):
        want[i] += row
    assert np.array_equal(gradient(index, g=g), want)


def test_padding_gets_nothing():
    index = [0, 2, 2, 3]
    assert gradient(index, padding_idx=2)[:, 0].tolist() == [1, 0, 0, 1]
    assert gradient(index, padding_idx=-1)[:, 0].tolist() == [1, 0, 2, 0]
    g = np.full((4, 2), np.nan)
    assert np.array_equal(np.isnan(gradient(index, g=g, padding_idx=2))[:, 0], [1, 0, 0, 1])


def test_scaling_by_frequency():
    g = np.arange(8.0).reshape(4, 2)
    found = gradient([0, 2, 2, 2], g=g, scale_grad_by_freq=True)
    np.testing.assert_allclose(found, [[0, 1], [0, 0], [4, 5], [0, 0]])


def test_frequencies_beyond_what_half_precision_counts():
    table = gg.tensor(np.zeros((2, 1)), dtype="float16", requires_grad=True)
    y = gg.embedding(np.zeros(5000, int), table, scale_grad_by_freq=True)
    y.backward(gg.ones(y.shape, dtype="float16"))
    assert table.grad.tolist() == [[1.0], [0.0]]


def test_second_order():
    index = gg.asarray([1, 1, 2])

    def f(table):
        return gg.sum(gg.embedding(index, table) ** 3)

    table = gg.tensor(TABLE)
    found = gg.grad(lambda t: gg.sum(gg.grad(f)(t)))(table).numpy()
    np.testing.assert_allclose(found, 6 * TABLE * np.array([[0], [2], [1], [0]]))


def test_the_indices_are_looked_at_on_the_cpu_only():
    pytest.importorskip("array_api_strict")
    table = gg.tensor(TABLE, device="strict:device1")
    index = gg.asarray([1, 0], device="strict:device1")
    assert gg.embedding(index, table).device == "strict:device1"


def test_what_is_refused():
    with pytest.raises(OutOfRangeError, match=r"embedding: index 4 at \[1\] is none of the 4 rows"):
        gg.embedding([0, 4], TABLE)
    with pytest.raises(OutOfRangeError, match="negative indices do not count from the end"):
        gg.embedding([[0], [-1]], TABLE)
    with pytest.raises(OutOfRangeError, match=r"index 0 at \[0\] is none of the 0 rows"):
        gg.embedding([0], np.zeros((0, 3)))
    with pytest.raises(DTypeError, match="indices are integers, not float64"):
        gg.embedding([0.0], TABLE)
    with pytest.raises(DTypeError, match="indices are integers, not bool"):
        gg.embedding([True], TABLE)
    with pytest.raises(ShapeError, match=r"weight of shape \(4,\); a table has two axes"):
        gg.embedding([0], np.zeros(4))
    for row in (4, -5):
        with pytest.raises(ParameterError, match=f"padding_idx={row} is none of the 4 rows"):
            gg.embedding([0], TABLE, padding_idx=row)
