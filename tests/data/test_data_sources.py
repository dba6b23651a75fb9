"""Data sets by index, and their batches, which are those that collating examples gives."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.data import (
    ConcatDataset,
    DataError,
    Dataset,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
    random_split,
)
from gpugrad.errors import OutOfRangeError
from gpugrad.nn import Generator
from tests.backend.counting import counting

X, Y = np.arange(20.0).reshape(10, 2), np.arange(10)


class Squares(Dataset[tuple[int, float]]):
    def __init__(self, n: int = 6) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[int, float]:
        assert 0 <= index < self.n
        return index, index**2.0


def same(a: Any, b: Any) -> bool:
    if isinstance(a, gg.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and (a.numpy() == b.numpy()).all()
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


CHOSEN = [7, 0, 3, 3, -1]


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(X, Y),
        TensorDataset(gg.tensor(X), Y.astype(np.uint8), X[:, 0] > 3),
        Subset(TensorDataset(X, Y), [9, 1, 8, 2, 7, 3, 6, 4]),
        Subset(Squares(), [5, 4, 3, 2, 1, 0, 1, 2]),
        Subset(Subset(TensorDataset(X, Y), np.arange(10)[::-1]), range(1, 9)),
        ConcatDataset([TensorDataset(X[:4], Y[:4]), TensorDataset(X[4:], Y[4:])]),
        ConcatDataset([Squares(3), Squares(1), Squares(6)]),
        TensorDataset(Y[:2], Y[:2] ** 2.0) + Squares(8),
        Squares(5) + Subset(Squares(9), range(9)),
    ],
)
def test_a_batch_is_what_collating_gives(data: Any) -> None:
    batch = data.get_batch(CHOSEN)
    assert same(batch, default_collate([data[i] for i in CHOSEN]))
    assert same(data.get_batch(np.array([2])), default_collate([data[2]]))
    with pytest.raises((OutOfRangeError, IndexError)):
        data.get_batch([0, len(data)])
    with pytest.raises((OutOfRangeError, IndexError)):
        data.get_batch([-len(data) - 1])


def test_tensor_dataset_shares_memory_and_batches_do_not() -> None:
    data = TensorDataset(X, Y)
    assert len(data) == 10
    assert np.shares_memory(data.tensors[0].numpy(), X) or data.tensors[0].data is X
    assert not np.shares_memory(data.get_batch([0, 1])[0].data, X)


def test_large_batches_come_whole() -> None:
    x = np.random.default_rng(0).standard_normal((300, 1000))
    chosen = np.random.default_rng(1).integers(-300, 300, 400)
    np.testing.assert_array_equal(TensorDataset(x).get_batch(chosen)[0].data, x[chosen])


def test_a_batch_on_a_device_is_gathered_there() -> None:
    with counting() as counts:
        data = TensorDataset(gg.tensor(X, device="counting"), gg.tensor(Y, device="counting"))
        counts.clear()
        x, y = data.get_batch([3, 1])
        assert (counts.host_reads, counts.launches, counts.uploads) == (0, 2, 2)
        assert x.device == "counting"
        assert y.cpu().numpy().tolist() == [3, 1]


def test_tensor_dataset_of_unequal_tensors() -> None:
    with pytest.raises(DataError, match=r"have \[10, 9\] rows"):
        TensorDataset(X, Y[:9])
    with pytest.raises(DataError, match="at least one"):
        TensorDataset()
    with pytest.raises(DataError, match="no rows"):
        TensorDataset(3.0)
    with pytest.raises(DataError, match="at least one"):
        ConcatDataset([])


def test_sums_of_datasets() -> None:
    both = Squares(2) + Squares(3)
    assert [both[i] for i in range(5)] == [(0, 0.0), (1, 1.0), (0, 0.0), (1, 1.0), (2, 4.0)]
    assert both[-1] == (2, 4.0)
    with pytest.raises(OutOfRangeError, match="no example 5: the data set has 5"):
        both[5]


# random_split


def test_random_split() -> None:
    parts = random_split(Squares(10), [6, 3, 1], Generator(4))
    assert [len(part) for part in parts] == [6, 3, 1]
    indices = [i for part in parts for i in part.indices]
    assert sorted(indices) == list(range(10))
    again = random_split(Squares(10), [6, 3, 1], Generator(4))
    assert indices == [i for part in again for i in part.indices]
    other = random_split(Squares(10), [6, 3, 1], Generator(5))
    assert indices != [i for part in other for i in part.indices]


@pytest.mark.parametrize(
    ("n", "fractions", "sizes"),
    [
        (10, [0.7, 0.3], [7, 3]),
        (10, [0.33, 0.33, 0.34], [4, 3, 3]),
        (7, [0.5, 0.5], [4, 3]),
        (3, [1 / 3, 1 / 3, 1 / 3], [1, 1, 1]),
        (1, [1], [1]),
        (1, [0.5, 0.5], [1, 0]),
        (5, [1.0], [5]),
    ],
)
def test_fractions(n: int, fractions: list[float], sizes: list[int]) -> None:
    assert [len(p) for p in random_split(Squares(n), fractions, Generator(0))] == sizes


@pytest.mark.parametrize(
    "lengths", [[5, 4], [5, 6], [11, -1], [0.5, 0.4], [2.5, 7.5], [], [2, 0.5]]
)
def test_lengths_that_do_not_add_up(lengths: list[float]) -> None:
    with pytest.raises(DataError, match="random_split: lengths"):
        random_split(Squares(10), lengths, Generator(0))


# collating

Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("examples", "wanted"),
    [
        ([1, 2], gg.tensor([1, 2])),
        ([1.5, 2.0], gg.tensor([1.5, 2.0])),
        ([True, False], gg.tensor([True, False])),
        ([np.float32(1), np.float32(2)], gg.tensor([1, 2], dtype="float32")),
        ([X[0], X[1]], gg.tensor(X[:2])),
        ([gg.tensor(X[0]), gg.tensor(X[1])], gg.tensor(X[:2])),
        (["a", "b"], ["a", "b"]),
        ([b"a", b"b"], [b"a", b"b"]),
        ([None, None], [None, None]),
        ([(1, "a"), (2, "b")], (gg.tensor([1, 2]), ["a", "b"])),
        ([[1], [2]], [gg.tensor([1, 2])]),
        ([{"x": 1, "y": {"z": 2.0}}] * 2,
         {"x": gg.tensor([1, 1]), "y": {"z": gg.tensor([2.0, 2.0])}}),
        ([Point(1, 2), Point(3, 4)], Point(gg.tensor([1, 3]), gg.tensor([2, 4]))),
    ],
    ids=str,
)  # fmt: skip
def test_collate(examples: list[Any], wanted: Any) -> None:
    assert same(default_collate(examples), wanted)


@pytest.mark.parametrize(
    ("examples", "told"),
    [
        ([], "no examples"),
        ([np.zeros(2), np.zeros(3)], r"number 0 .* shape \(2,\), number 1 is .* \(3,\).*pad them"),
        ([np.zeros(2), np.zeros(2, np.float32)], "number 0 .*float64 .* number 1 is float32"),
        ([(1, 2), (1, 2, 3)], r"\[2, 3\] parts"),
        ([{"a": 1}, {"b": 1}], "different keys"),
        ([object(), object()], "of object; give the loader a collate_fn"),
        ([np.array("a"), np.array("b")], "<U1 is no numeric type"),
    ],
)
def test_examples_that_do_not_fit(examples: list[Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        default_collate(examples)


def test_collate_on_a_device() -> None:
    with counting() as counts:
        rows = [gg.tensor(X[i], device="counting") for i in range(3)]
        counts.clear()
        batch = default_collate(rows)
        assert (batch.device, counts.host_reads) == ("counting", 0)


def test_convert() -> None:
    found = default_convert({"a": (X[0], 1), "b": [np.float32(2)], "c": Point(X[1], "s")})
    wanted = {"a": (gg.tensor(X[0]), 1), "b": [gg.tensor(2, dtype="float32")],
              "c": Point(gg.tensor(X[1]), "s")}  # fmt: skip
    assert same(found, wanted)
