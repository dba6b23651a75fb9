"""Samplers: what they give, that it is the same everywhere, and that they go on from a state."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from gpugrad.data import (
    BatchSampler,
    DataError,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from gpugrad.data.order import permutation, uniform
from gpugrad.errors import ParameterError
from gpugrad.nn import Generator, manual_seed

DATA = range(10)


def test_orders_are_the_same_on_every_machine() -> None:
    # Written down once: whoever changes these numbers breaks every run that is to be resumed.
    assert permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(5, 2**64 - 1, 2**63).tolist() == [1, 0, 2, 3, 4]
    assert uniform(2, 7, 3).tolist() == [0.7545134190860097, 0.976164072590892]


def test_draws_share_no_words() -> None:
    drawn = np.concatenate([uniform(1000, 5, offset) for offset in range(20)])
    assert len(np.unique(drawn)) == len(drawn)
    assert abs(drawn.mean() - 0.5) < 0.01
    assert ((drawn >= 0) & (drawn < 1)).all()


def test_sequential() -> None:
    assert list(SequentialSampler(DATA)) == list(DATA)
    assert len(SequentialSampler(DATA)) == 10
    with pytest.raises(NotImplementedError, match="needs an __iter__"):
        iter(Sampler())


def test_random_order() -> None:
    sampler = RandomSampler(DATA, generator=Generator(1))
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(DATA)
    assert first != second != list(DATA)
    assert first == list(RandomSampler(DATA, generator=Generator(1)))
    assert len(sampler) == 10


def test_every_order_is_as_likely() -> None:
    sampler = RandomSampler(range(3), generator=Generator(0))
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        order = tuple(sampler)
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(850 < n < 1150 for n in counts.values())  # five standard deviations


def test_the_default_generator_decides() -> None:
    sampler = RandomSampler(DATA)
    manual_seed(3)
    first = list(sampler)
    second = list(sampler)
    manual_seed(3)
    assert [list(sampler), list(sampler)] == [first, second]


def test_fewer_more_and_repeated() -> None:
    assert len(set(RandomSampler(DATA, num_samples=4, generator=Generator(0)))) == 4
    many = list(RandomSampler(DATA, num_samples=25, generator=Generator(0)))
    assert len(many) == 25
    assert sorted(many[:10]) == sorted(many[10:20]) == list(DATA)
    assert many[:10] != many[10:20]
    again = RandomSampler(DATA, replacement=True, num_samples=10_000, generator=Generator(0))
    counts = np.bincount(list(again))
    assert len(counts) == 10
    assert (abs(counts - 1000) < 160).all()
    assert len(again) == 10_000


def test_subset() -> None:
    assert sorted(SubsetRandomSampler([3, 5, 9], Generator(0))) == [3, 5, 9]
    assert len(SubsetRandomSampler([3, 5, 9])) == 3


def test_weights() -> None:
    weights = [0.0, 1.0, 2.0, 0.0, 5.0, 0.0]
    sampler = WeightedRandomSampler(weights, 8000, generator=Generator(0))
    counts = np.bincount(list(sampler), minlength=6)
    np.testing.assert_allclose(counts / 8000, np.array(weights) / 8, atol=0.025)
    assert (counts[[0, 3, 5]] == 0).all()
    assert len(sampler) == 8000


def test_weights_without_replacement() -> None:
    sampler = WeightedRandomSampler([0.0, 1.0, 2.0, 5.0], 2, False, Generator(0))
    first = np.zeros(4)
    for _ in range(4000):
        a, b = sampler
        assert a != b
        assert 0 not in (a, b)
        first[a] += 1
    np.testing.assert_allclose(first / 4000, [0, 1 / 8, 2 / 8, 5 / 8], atol=0.04)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (([1.0, -1.0], 1), "from 0 on"),
        (([1.0, np.nan], 1), "finite"),
        (([1.0, np.inf], 1), "finite"),
        (([0.0, 0.0], 1), "0 are above 0"),
        (([], 1), "0 are above 0"),
        (([1.0, 0.0, 1.0], 3, False), "2 are above 0, too few to draw 3 examples without"),
        (([[1.0]], 1), "one number per example"),
        (([1.0], 0), "num_samples is at least 1, got 0"),
        (([1.0], 1.5), "num_samples is an integer"),
        (([1.0], True), "num_samples is an integer"),
    ],
)
def test_weights_that_cannot_be(arguments: Any, told: str) -> None:
    with pytest.raises(ParameterError, match=told):
        WeightedRandomSampler(*arguments)


def test_batches() -> None:
    sampler = SequentialSampler(DATA)
    assert list(BatchSampler(sampler, 4, False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(BatchSampler(sampler, 4, True)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [len(BatchSampler(sampler, 4, drop)) for drop in (False, True)] == [3, 2]
    letters: list[Any] = list(BatchSampler(["a", "b", "c"], 2, False))
    assert letters == [["a", "b"], ["c"]]
    with pytest.raises(ParameterError, match="batch_size is at least 1"):
        BatchSampler(sampler, 0, False)


def test_wrong_generators() -> None:
    with pytest.raises(ParameterError, match="generator"):
        RandomSampler(DATA, generator=np.random.default_rng(0))
    with pytest.raises(DataError, match="empty"):
        iter(RandomSampler([], num_samples=2))


MAKE = [
    lambda g: RandomSampler(DATA, generator=g),
    lambda g: RandomSampler(DATA, replacement=True, generator=g),
    lambda g: SubsetRandomSampler([4, 5, 6, 7], g),
    lambda g: WeightedRandomSampler(np.arange(10.0), 7, generator=g),
    lambda g: BatchSampler(RandomSampler(DATA, generator=g), 3, False),
]


@pytest.mark.parametrize("make", MAKE)
def test_a_state_repeats_the_latest_order_and_goes_on(make: Any) -> None:
    sampler = make(Generator(8))
    list(sampler)
    latest = list(sampler)
    state = json.loads(json.dumps(sampler.state_dict()))
    after = [list(sampler), list(sampler)]
    other = make(Generator(99))
    other.load_state_dict(state)
    assert list(other) == latest
    assert [list(other), list(other)] == after


@pytest.mark.parametrize("make", MAKE)
def test_a_state_from_before_the_first_order(make: Any) -> None:
    sampler = make(Generator(8))
    other = make(Generator(99))
    other.load_state_dict(sampler.state_dict())
    assert list(other) == list(sampler)


def test_a_state_with_the_default_generator() -> None:
    manual_seed(1)
    sampler = RandomSampler(DATA)
    latest = list(sampler)
    other = RandomSampler(DATA)
    other.load_state_dict(sampler.state_dict())
    manual_seed(77)
    state = Generator(77).state
    from gpugrad.nn.random import default_generator

    assert list(other) == latest
    assert default_generator.state == state, "repeating an order draws nothing"


def test_states_of_other_samplers() -> None:
    with pytest.raises(DataError, match="with a generator of its own"):
        RandomSampler(DATA).load_state_dict(
            RandomSampler(DATA, generator=Generator(0)).state_dict()
        )
    with pytest.raises(DataError, match="without a generator"):
        RandomSampler(DATA, generator=Generator(0)).load_state_dict(
            RandomSampler(DATA).state_dict()
        )
    shuffled = BatchSampler(RandomSampler(DATA), 2, False)
    plain = BatchSampler(SequentialSampler(DATA), 2, False)
    with pytest.raises(DataError, match="shuffle="):
        plain.load_state_dict(shuffled.state_dict())
    with pytest.raises(DataError, match="shuffle="):
        shuffled.load_state_dict(plain.state_dict())
