"""Minibatches: every example once, in an order that can be had again."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from gpugrad.data import DataError, batches

X = np.arange(34.0).reshape(17, 2)
Y = np.arange(17)


def labels(**options: Any) -> list[list[int]]:
    return [y.tolist() for _, y in batches(X, Y, 5, **options)]


def test_every_example_comes_once_beside_its_label() -> None:
    parts = list(batches(X, Y, 5, rng=np.random.default_rng(0)))
    assert [len(y) for _, y in parts] == [5, 5, 5, 2]
    seen = np.concatenate([y for _, y in parts])
    assert sorted(seen.tolist()) == list(range(17))
    assert seen.tolist() != list(range(17))
    np.testing.assert_array_equal(np.concatenate([x for x, _ in parts]), X[seen])


def test_order_follows_the_generator() -> None:
    assert labels(rng=np.random.default_rng(3)) == labels(rng=np.random.default_rng(3))
    assert labels(rng=np.random.default_rng(3)) != labels(rng=np.random.default_rng(4))
    rng = np.random.default_rng(3)
    assert labels(rng=rng) != labels(rng=rng)  # the next epoch has an order of its own


def test_drop_last_and_no_shuffle() -> None:
    assert [len(part) for part in labels(rng=np.random.default_rng(0), drop_last=True)] == [5, 5, 5]
    assert labels(shuffle=False)[2:] == [[10, 11, 12, 13, 14], [15, 16]]
    assert labels(shuffle=False, drop_last=True)[2:] == [[10, 11, 12, 13, 14]]


def test_batches_are_copies() -> None:
    x = X.copy()
    for part, _ in batches(x, Y, 5, shuffle=False):
        part[:] = -1
    np.testing.assert_array_equal(x, X)


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.Philox, np.random.SFC64])
def test_training_resumes_exactly(bits: Any) -> None:
    rng = np.random.Generator(bits(5))
    labels(rng=rng)
    state = rng.bit_generator.state
    epochs = [labels(rng=rng) for _ in range(3)]
    other = np.random.Generator(bits())
    other.bit_generator.state = state
    assert [labels(rng=other) for _ in range(3)] == epochs
    # Within an epoch: its state, and how many batches are done.
    other.bit_generator.state = state
    rest = itertools.islice(batches(X, Y, 5, rng=other), 2, None)
    assert [y.tolist() for _, y in rest] == epochs[0][2:]


def test_state_is_plain_json() -> None:
    rng = np.random.default_rng(5)
    state = json.loads(json.dumps(rng.bit_generator.state))
    first = labels(rng=rng)
    rng.bit_generator.state = state
    assert labels(rng=rng) == first


def test_order_is_drawn_at_the_call() -> None:
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    iterator = batches(X, Y, 5, rng=rng)
    assert rng.bit_generator.state != before
    rng.random(100)  # dropout between two batches, say, must not change the epoch
    assert [y.tolist() for _, y in iterator] == labels(rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (DataError, "x has 17 examples and y has 16", {"y": Y[:16]}),
        (DataError, "no examples", {"x": X[:0], "y": Y[:0]}),
        (DataError, "17 examples are fewer than batch_size=18", {"size": 18, "drop_last": True}),
        (ValueError, "at least 1, got 0", {"size": 0}),
        (TypeError, "got bool", {"size": True}),
        (TypeError, "integer", {"size": 2.5}),
        (TypeError, "got NoneType", {"rng": None}),
        (TypeError, "got RandomState", {"rng": np.random.RandomState(0)}),
    ],
)
def test_misuse_is_refused_at_the_call(error: Any, message: str, arguments: Any) -> None:
    given = {"x": X, "y": Y, "size": 5, "rng": np.random.default_rng(0), **arguments}
    with pytest.raises(error, match=message):
        batches(given.pop("x"), given.pop("y"), given.pop("size"), **given)
