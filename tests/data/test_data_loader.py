"""Loaders: PyTorch's behaviour, order with any number of workers, errors, threads, resuming."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.data import (
    BatchSampler,
    DataError,
    DataLoader,
    DataLoaderError,
    Dataset,
    DeviceLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from gpugrad.errors import DeviceError, ParameterError
from gpugrad.nn import Generator, manual_seed
from tests.backend.counting import counting

X, Y = np.arange(46.0).reshape(23, 2), np.arange(23)
DATA = TensorDataset(X, Y)


class Items(Dataset):
    """Examples one by one, some of which take long or go wrong."""

    def __init__(self, n: int = 23, slow: bool = False, bad: Any = ()) -> None:
        self.n, self.slow, self.bad = n, slow, bad
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Any, int]:
        self.threads.add(threading.current_thread().name)
        if self.slow:
            time.sleep(0.002 * (index % 3))
        if index in self.bad:
            raise FileNotFoundError(f"picture {index} has vanished")
        return np.array([2.0 * index, 2.0 * index + 1]), int(index)


def loader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("gpugrad-loader")]


@pytest.fixture(autouse=True)
def _no_threads_are_left() -> Iterator[None]:
    yield
    assert loader_threads() == []


def labels(loader: Any) -> list[list[int]]:
    return [y.numpy().tolist() for _, y in loader]


# batches


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("data", [DATA, Items(), Items(slow=True), Subset(DATA, range(23))])
def test_batches_in_order(data: Any, workers: int) -> None:
    loader = DataLoader(data, batch_size=5, num_workers=workers)
    assert len(loader) == 5
    found = list(loader)
    assert [len(y) for _, y in found] == [5, 5, 5, 5, 3]
    np.testing.assert_array_equal(np.concatenate([x.numpy() for x, _ in found]), X)
    np.testing.assert_array_equal(np.concatenate([y.numpy() for _, y in found]), Y)
    assert all(isinstance(x, gg.Tensor) for batch in found for x in batch)


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_workers_change_nothing(workers: int) -> None:
    data = Items(slow=True)
    wanted = labels(DataLoader(data, 4, shuffle=True, generator=Generator(3)))
    data.threads.clear()
    loader = DataLoader(data, 4, shuffle=True, generator=Generator(3), num_workers=workers)
    assert labels(loader) == wanted
    assert all(name.startswith("gpugrad-loader") for name in data.threads)


def test_every_epoch_has_its_order() -> None:
    loader = DataLoader(DATA, 5, shuffle=True, generator=Generator(0))
    first, second = labels(loader), labels(loader)
    assert first != second
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == Y.tolist()
    manual_seed(5)
    once = labels(DataLoader(DATA, 5, shuffle=True))
    manual_seed(5)
    assert labels(DataLoader(DATA, 5, shuffle=True)) == once


def test_the_order_is_drawn_when_the_epoch_begins() -> None:
    manual_seed(0)
    wanted = labels(DataLoader(DATA, 5, shuffle=True))
    manual_seed(0)
    epoch = iter(DataLoader(DATA, 5, shuffle=True))
    manual_seed(1)
    assert labels(epoch) == wanted


def test_drop_last() -> None:
    loader = DataLoader(DATA, 5, drop_last=True)
    assert len(loader) == len(list(loader)) == 4


def test_samplers() -> None:
    assert labels(DataLoader(DATA, 2, sampler=[5, 3, 1])) == [[5, 3], [1]]
    assert labels(DataLoader(DATA, batch_sampler=[[1, 2], [0]])) == [[1, 2], [0]]
    weighted = WeightedRandomSampler([0.0, 1.0] + [0.0] * 21, 4, generator=Generator(0))
    assert labels(DataLoader(DATA, 4, sampler=weighted)) == [[1, 1, 1, 1]]


def test_single_examples() -> None:
    found = list(DataLoader(Items(3), batch_size=None))
    assert [y for _, y in found] == [0, 1, 2]
    assert found[1][0].numpy().tolist() == [2.0, 3.0]
    assert [y.item() for _, y in DataLoader(DATA, None, sampler=[3, 4])] == [3, 4]


def test_collate_fn_gets_examples() -> None:
    loader = DataLoader(DATA, 2, sampler=[4, 2], collate_fn=lambda rows: [int(y) for _, y in rows])
    assert list(loader) == [[4, 2]]


def test_lists_and_arrays_are_data_sets() -> None:
    assert [x.numpy().tolist() for x in DataLoader([1, 2, 3], 2)] == [[1, 2], [3]]
    assert [x.numpy().tolist() for x in DataLoader(X[:3], 2)] == [X[:2].tolist(), X[2:3].tolist()]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_size": 0}, "batch_size is at least 1"),
        ({"num_workers": -1}, "num_workers is at least 0"),
        ({"timeout": -1, "num_workers": 1}, "timeout is at least 0"),
        ({"shuffle": True, "sampler": [1]}, "leave shuffle out"),
        ({"batch_sampler": [[1]], "shuffle": True}, "batch_sampler decides"),
        ({"batch_sampler": [[1]], "batch_size": 3}, "batch_sampler decides"),
        ({"batch_sampler": [[1]], "drop_last": True}, "batch_sampler decides"),
        ({"batch_size": None, "drop_last": True}, "nothing is dropped"),
        ({"prefetch_factor": 2}, "give num_workers"),
        ({"persistent_workers": True}, "give num_workers"),
        ({"timeout": 1}, "give num_workers"),
        ({"prefetch_factor": 0, "num_workers": 1}, "prefetch_factor is at least 1"),
        ({"multiprocessing_context": "spawn"}, "workers are threads"),
        ({"in_order": False}, "always come in order"),
        ({"shuffle": True, "generator": 3}, "generator"),
    ],
)
def test_parameters_that_cannot_be(options: Any, told: str) -> None:
    with pytest.raises(ParameterError, match=told):
        DataLoader(DATA, **options)


def test_streams_are_refused() -> None:
    with pytest.raises(ParameterError, match="generator gives no examples by index"):
        DataLoader(i for i in range(3))


def test_pinning_without_a_gpu_changes_nothing() -> None:
    loader = DataLoader(DATA, 5, pin_memory=True, pin_memory_device="abacus")
    assert labels(loader) == labels(DataLoader(DATA, 5))
    with counting():
        pinned = DataLoader(DATA, 5, pin_memory=True, pin_memory_device="counting")
        assert labels(pinned) == labels(loader)


def test_parameters_of_pytorch_are_taken() -> None:
    loader = DataLoader(
        DATA, 5, False, None, None, 2, None, True, False, 5.0, None, None, None,
        prefetch_factor=4, persistent_workers=True, pin_memory_device="", in_order=True,
    )  # fmt: skip
    assert len(labels(loader)) == len(labels(loader)) == 5


@pytest.mark.torch
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 4},
        {"batch_size": 5, "drop_last": True},
        {"batch_size": None},
        {"num_workers": 2, "batch_size": 3},
    ],
)
def test_batches_are_those_of_pytorch(options: Any) -> None:
    import torch.utils.data as theirs

    rows = [{"x": X[i], "n": i, "name": f"row {i}", "pair": (1.5 * i, i > 3)} for i in range(11)]
    loader = theirs.DataLoader(rows, **{**options, "num_workers": 0})
    wanted = list(loader)
    found = list(DataLoader(rows, **options))
    assert len(found) == len(wanted) == len(DataLoader(rows, **options)) == len(loader)
    for a, b in zip(found, wanted):
        assert a["name"] == b["name"]
        for mine, other in ((a["x"], b["x"]), (a["n"], b["n"]), *zip(a["pair"], b["pair"])):
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))
            if isinstance(mine, gg.Tensor):
                assert mine.dtype == np.asarray(other).dtype


# what goes wrong


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("collate", [None, lambda rows: rows])
def test_an_example_that_raises(workers: int, collate: Any) -> None:
    data = Items(slow=True, bad={13})
    epoch = iter(DataLoader(data, 4, num_workers=workers, collate_fn=collate))
    for _ in range(3):  # the batches before it come
        next(epoch)
    with pytest.raises(DataLoaderError, match=r"example 13 of Items: FileNotFoundError: pict") as e:
        next(epoch)
    assert e.value.index == 13
    assert e.value.indices == (12, 13, 14, 15)
    assert isinstance(e.value.__cause__, FileNotFoundError)
    assert loader_threads() == []
    assert list(epoch) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_example_that_raises_in_a_whole_batch(workers: int) -> None:
    data = Subset(Items(bad={7}), range(20))
    with pytest.raises(DataLoaderError, match=r"example 7 of Subset: FileNotFoundError") as caught:
        list(DataLoader(data, 4, num_workers=workers))
    assert caught.value.index == 7
    with pytest.raises(DataLoaderError, match=r"example 23 of TensorDataset: .*there is no|index"):
        list(DataLoader(DATA, 2, sampler=[0, 1, 2, 23], num_workers=workers))


def test_a_batch_that_cannot_be_collated() -> None:
    data = [np.zeros(2), np.zeros(2), np.zeros(3), np.zeros(2)]
    with pytest.raises(
        DataLoaderError, match=r"collating examples 2, 3 of list: DataError.*\(3,\)"
    ):
        list(DataLoader(data, 2, num_workers=1))


def test_a_sampler_that_raises() -> None:
    def indices() -> Iterator[int]:
        yield from range(5)
        raise ZeroDivisionError("sampler")

    with pytest.raises(ZeroDivisionError):
        list(DataLoader(DATA, 2, sampler=indices(), num_workers=2))


@pytest.mark.parametrize("given", [0, 1, 3])
@pytest.mark.parametrize("end", ["close", "del", "break", "raise"])
def test_an_epoch_given_up_half_way(given: int, end: str) -> None:
    epoch = iter(DataLoader(Items(200, slow=True), 2, num_workers=4))
    for _ in range(given):
        next(epoch)
    if given:
        assert loader_threads()
    if end == "break":
        for _ in epoch:
            break
    elif end == "raise":
        with pytest.raises(ZeroDivisionError):
            [1 / 0 for _ in epoch]
    elif end == "close":
        epoch.close()  # type: ignore[attr-defined]
    begin = time.perf_counter()
    del epoch
    assert loader_threads() == []
    assert time.perf_counter() - begin < 1


def test_threads_stop_between_examples_when_nobody_waits() -> None:
    class Slow(Items):
        def __getitem__(self, index: int) -> Any:
            time.sleep(0.05)
            return index

    begin = time.perf_counter()
    with pytest.raises(DataLoaderError, match=r"no batch after 0\.1 s; examples 0, 1, 2.* Slow"):
        list(DataLoader(Slow(400), 100, num_workers=2, timeout=0.1))
    assert time.perf_counter() - begin < 2  # a whole batch takes five seconds


def test_reading_ahead_has_a_limit() -> None:
    seen: list[int] = []

    class Seen(Items):
        def __getitem__(self, index: int) -> Any:
            seen.append(index)
            return super().__getitem__(index)

    epoch = iter(DataLoader(Seen(100), 1, num_workers=2, prefetch_factor=3))
    next(epoch)
    time.sleep(0.1)
    assert max(seen) <= 6
    assert len(seen) >= 6
    epoch.close()  # type: ignore[attr-defined]


def test_worker_init_fn() -> None:
    numbers: list[int] = []
    list(DataLoader(Items(slow=True), 1, num_workers=3, worker_init_fn=numbers.append))
    assert sorted(numbers) == [0, 1, 2]

    def fail(number: int) -> None:
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        list(DataLoader(DATA, 4, num_workers=1, worker_init_fn=fail))


# going on from a state


def make(kind: str, seed: int | None = 0, **more: Any) -> Any:
    generator = None if seed is None else Generator(seed)
    if kind == "device":
        return DeviceLoader(X, Y, batch_size=5, shuffle=True, generator=generator)
    if kind == "weighted":
        sampler = WeightedRandomSampler(np.arange(23.0), 17, generator=generator)
        return DataLoader(DATA, 5, sampler=sampler, **more)
    if kind == "batches":
        sampler = RandomSampler(DATA, generator=generator)
        return DataLoader(DATA, batch_sampler=BatchSampler(sampler, 5, False), **more)
    if kind == "plain":
        return DataLoader(DATA, 5, **more)
    if kind == "single":
        return DataLoader(DATA, None, shuffle=True, generator=generator, **more)
    return DataLoader(Items(), 5, shuffle=True, generator=generator, num_workers=2, **more)


KINDS = ["device", "weighted", "batches", "plain", "single", "workers"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [0, 1, 3, 5, "over", "abandoned"])
def test_resuming_gives_what_would_have_come(kind: str, given: Any) -> None:
    loader = make(kind)
    labels(loader)
    epoch = iter(loader)
    if given == "over":
        list(epoch)
    elif given == "abandoned":
        next(epoch)
        next(epoch)
        del epoch
    else:
        for _ in range(min(given, len(loader))):
            next(epoch)
    state = json.loads(json.dumps(loader.state_dict()))
    other = make(kind, seed=1234)
    other.load_state_dict(state)
    if given == "abandoned":
        assert len(labels(other)) == len(loader) - 2
    elif given != "over":
        rest = [np.asarray(y).tolist() for _, y in epoch]
        found = [np.asarray(y).tolist() for _, y in other]
        assert found == rest
    for _ in range(2):  # and the epochs after it
        assert [np.asarray(y).tolist() for _, y in other] == [
            np.asarray(y).tolist() for _, y in loader
        ]
    assert json.dumps(other.state_dict()) == json.dumps(loader.state_dict())


@pytest.mark.parametrize("kind", ["device", "weighted", "workers"])
def test_resuming_with_the_default_generator(kind: str) -> None:
    from gpugrad.nn.random import default_generator

    manual_seed(6)
    loader = make(kind, None)
    epoch = iter(loader)
    next(epoch)
    state, random = loader.state_dict(), default_generator.state
    rest = [labels(epoch), labels(loader)]
    manual_seed(99)
    other = make(kind, None)
    default_generator.state = random
    other.load_state_dict(state)
    assert [labels(other), labels(other)] == rest


def test_a_state_is_small_and_can_be_saved_twice() -> None:
    loader = make("workers")
    next(iter(loader))
    state = loader.state_dict()
    assert len(json.dumps(state)) < 300
    other = make("workers", 7)
    other.load_state_dict(state)
    assert json.dumps(other.state_dict()) == json.dumps(state)
    third = make("workers", 8)
    third.load_state_dict(other.state_dict())
    assert labels(third) == labels(other)


def test_batches_count_when_they_are_given() -> None:
    loader = DataLoader(Items(), 5, num_workers=3, prefetch_factor=4)
    epoch = iter(loader)
    next(epoch)
    time.sleep(0.05)  # by now they have all been read
    assert loader.state_dict()["given"] == 1
    epoch.close()  # type: ignore[attr-defined]


def test_only_the_latest_iteration_counts() -> None:
    loader = make("plain")
    old = iter(loader)
    next(old)
    new = iter(loader)
    next(old)
    list(old)
    next(new)
    assert (loader.state_dict()["given"], loader.state_dict()["running"]) == (1, True)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (DataLoader(TensorDataset(Y[:20]), 5), "23 examples in the data set, this one has 20"),
        (DataLoader(DATA, 4), "5 examples per batch, this one has 4"),
        (DataLoader(DATA, 5, drop_last=True), "False for drop_last"),
        (DataLoader(DATA, 5, shuffle=True), "shuffle="),
        (DeviceLoader(X, Y, batch_size=5), "the state has"),
    ],
)
def test_states_of_other_loaders(other: Any, told: str) -> None:
    loader = make("plain")
    next(iter(loader))
    before = json.dumps(other.state_dict())
    with pytest.raises(DataError, match=told):
        other.load_state_dict(loader.state_dict())
    assert json.dumps(other.state_dict()) == before


def test_states_of_other_device_loaders() -> None:
    state = make("device").state_dict()
    for other, told in (
        (
            DeviceLoader(X[:20], batch_size=5, shuffle=True, generator=Generator(0)),
            "examples was 23",
        ),
        (DeviceLoader(X, batch_size=4, shuffle=True, generator=Generator(0)), "batch_size was 5"),
        (DeviceLoader(X, batch_size=5), "shuffle was True"),
        (DeviceLoader(X, batch_size=5, shuffle=True), "with a generator of its own"),
        (DataLoader(DATA), "the state has"),
    ):
        with pytest.raises(DataError, match=told):
            other.load_state_dict(state)


# devices


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_a_device(workers: int) -> None:
    with counting() as counts:
        loader = DataLoader(DATA, 5, num_workers=workers, device="counting")
        epoch = iter(loader)
        x, y = next(epoch)
        assert (x.device, y.device) == ("counting", "counting")
        assert counts.uploads == 4, "two batches of two tensors: one is copied ahead"
        assert loader.state_dict()["given"] == 1
        found = [y, *(y for _, y in epoch)]
        assert counts.host_reads == 0
        assert np.concatenate([part.cpu().numpy() for part in found]).tolist() == Y.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_before_an_error_come_first(workers: int) -> None:
    with counting():
        epoch = iter(DataLoader(Items(bad={13}), 4, num_workers=workers, device="counting"))
        found = [next(epoch)[1].cpu().numpy().tolist() for _ in range(3)]
        with pytest.raises(DataLoaderError, match="example 13"):
            next(epoch)
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_parts_that_are_no_tensors_stay() -> None:
    with counting():
        found = list(DataLoader([(1, "a"), (2, "b"), (3, "c")], 2, device="counting"))
    assert [names for _, names in found] == [["a", "b"], ["c"]]


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match="abacus"):
        DataLoader(DATA, device="abacus")


def test_everything_on_the_device() -> None:
    with counting() as counts:
        loader = DeviceLoader(X, Y, batch_size=5, shuffle=True, generator=Generator(2),
                              device="counting")  # fmt: skip
        assert (counts.uploads, len(loader)) == (2, 5)
        epoch = iter(loader)
        assert counts.uploads == 3, "the order of the epoch"
        counts.clear()
        found = list(epoch)
        assert (counts.uploads, counts.host_reads, counts.launches) == (0, 0, 10)
        assert [x.shape for x, _ in found] == [(5, 2)] * 4 + [(3, 2)]
        wanted = labels(DataLoader(DATA, 5, shuffle=True, generator=Generator(2)))
        assert [y.cpu().numpy().tolist() for _, y in found] == wanted


def test_device_loader_without_shuffling() -> None:
    loader = DeviceLoader(X, Y, batch_size=5, drop_last=True)
    assert labels(loader) == Y[:20].reshape(4, 5).tolist()
    assert len(loader) == 4
    for bad in ((), (X, Y[:5]), (3.0,), (X[:0],)):
        with pytest.raises(DataError, match="equally many rows"):
            DeviceLoader(*bad)
    with pytest.raises(ParameterError, match="batch_size"):
        DeviceLoader(X, batch_size=0)


def test_a_file_that_vanishes(tmp_path: Path) -> None:
    for i in range(6):
        np.save(tmp_path / f"{i}.npy", np.full(2, i))

    class Files(Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            return np.load(tmp_path / f"{index}.npy")

    loader = DataLoader(Files(), 2, num_workers=2)
    assert len(list(loader)) == 3
    (tmp_path / "3.npy").unlink()
    with pytest.raises(DataLoaderError, match=r"example 3 of Files: FileNotFoundError.*3\.npy"):
        list(loader)


def test_samplers_know_their_loader() -> None:
    assert isinstance(DataLoader(DATA).sampler, SequentialSampler)
    assert isinstance(DataLoader(DATA, shuffle=True).sampler, RandomSampler)
    assert isinstance(DataLoader(DATA, 3).batch_sampler, BatchSampler)
