"""Loaders: batches of a data set, read ahead by threads and copied ahead to a device."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import closing
from functools import cached_property
from typing import Any

import numpy as np

from gpugrad.backend import Backend, backend_for_device, is_usable
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.core.tree import flatten
from gpugrad.data.collate import default_collate, default_convert
from gpugrad.data.errors import DataError, DataLoaderError
from gpugrad.data.samplers import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    load_state,
    state_of,
)
from gpugrad.errors import ParameterError
from gpugrad.nn.random import Generator as RandomGenerator

__all__ = ["DataLoader"]

#: Batches that wait on the device while one is worked on.
AHEAD = 2


class DataLoader:
    """The batches of a data set, one epoch per iteration; PyTorch's names and defaults.

    Parameters
    ----------
    dataset:
        Anything with ``[index]`` and a length. If it has ``get_batch(indices)``, as
        :class:`TensorDataset` has, whole batches are asked for, unless there is a ``collate_fn``.
    batch_size:
        Examples per batch; None gives single examples, without an axis of batches.
    shuffle:
        Whether each epoch has a random order of its own.
    sampler, batch_sampler:
        Which indices come, or which lists of indices, instead of ``shuffle``, or of ``shuffle``,
        ``batch_size``, ``sampler`` and ``drop_last``.
    num_workers:
        Threads that read ahead; 0 reads when a batch is asked for. Batches come in the same order
        for any number. Data sets are read by several threads at once.
    collate_fn:
        Makes a batch of a list of examples; :func:`default_collate` when None.
    pin_memory:
        Put batches into memory that a GPU reads by itself, where there is a GPU.
    drop_last:
        Leave the last batch out when it is shorter.
    timeout:
        Seconds to wait for a worker; 0 waits forever.
    worker_init_fn:
        Called with a worker's number when its thread begins.
    generator:
        Where orders are drawn from; the default generator when None.
    prefetch_factor:
        Batches that each worker reads ahead, 2 by default.
    persistent_workers:
        Taken for PyTorch's sake: threads begin within microseconds.
    device:
        Where batches go. Copies to a GPU run ahead of the work there, on a stream of their own.

    Every epoch draws once from the generator, when it begins, and its order is a function of that
    draw, the same on every machine. :meth:`state_dict` tells where the loader is, within an epoch
    too, and a loader of the same data that takes it over gives exactly the batches that would have
    come. If the order is drawn from the default generator, that is to be saved as well, which
    :func:`gpugrad.io.collect` does.

    Raises
    ------
    ParameterError, DataError
        Parameters that contradict each other.
    DataLoaderError
        While iterating: the data set or the ``collate_fn`` raised, which example is at fault, and
        the error as the cause. All threads have ended by then, as they have when an iteration is
        given up half-way.

    >>> from gpugrad.data import TensorDataset
    >>> data = TensorDataset(np.arange(5.0), np.arange(5))
    >>> for x, y in DataLoader(data, batch_size=2, num_workers=2):
    ...     print(x, y)
    tensor([0., 1.]) tensor([0, 1])
    tensor([2., 3.]) tensor([2, 3])
    tensor([4.]) tensor([4])
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Iterable[Any] | None = None,
        batch_sampler: Iterable[Any] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], Any] | None = None,
        multiprocessing_context: Any = None,
        generator: RandomGenerator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        device: str | None = None,
    ) -> None:
        _check(
            num_workers, timeout, multiprocessing_context, prefetch_factor, persistent_workers,
            in_order,
        )  # fmt: skip
        if not hasattr(dataset, "__getitem__"):
            raise ParameterError(
                f"DataLoader: {type(dataset).__name__} gives no examples by index; add __getitem__ "
                "and __len__, or read a stream without a loader"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = int(num_workers)
        self.collate_fn = collate_fn
        self.pin_memory = bool(pin_memory)
        self.drop_last = bool(drop_last)
        self.timeout = float(timeout)
        self.worker_init_fn = worker_init_fn
        self.generator = generator
        self.prefetch_factor = 2 if prefetch_factor is None else int(prefetch_factor)
        self.persistent_workers = bool(persistent_workers)
        self.pin_memory_device = pin_memory_device
        self.device = device
        if device is not None:
            backend_for_device(device).native_device(device)  # complains
        if batch_sampler is not None:
            if batch_size != 1 or shuffle or sampler is not None or drop_last:
                raise ParameterError(
                    "DataLoader: a batch_sampler decides on batch_size, shuffle, sampler and "
                    "drop_last; leave them out"
                )
            self.batch_size = None
        elif batch_size is None and drop_last:
            raise ParameterError("DataLoader: without batches, batch_size=None, nothing is dropped")
        if sampler is not None and shuffle:
            raise ParameterError("DataLoader: a sampler decides on the order; leave shuffle out")
        if sampler is None:
            sampler = (
                RandomSampler(dataset, generator=generator)
                if shuffle
                else SequentialSampler(dataset)
            )
        self.sampler = sampler
        if batch_sampler is None and batch_size is not None:
            batch_sampler = BatchSampler(sampler, batch_size, drop_last)
        self.batch_sampler = batch_sampler
        self._given = 0  # batches of the epoch that the consumer has
        self._epochs = 0  # epochs begun
        self._running = False
        self._resume: int | None = None  # batches to pass over in the next iteration
        self._latest = object()  # stands for the latest iteration

    @property
    def _index_sampler(self) -> Any:
        return self.sampler if self.batch_sampler is None else self.batch_sampler

    def __len__(self) -> int:
        return len(self._index_sampler)

    # -- where it is ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is: plain numbers, small however large the data set is.

        Batches count as given when the consumer has them, however many were read ahead.
        """
        return {
            "examples": len(self.dataset),
            "batch_size": getattr(self.batch_sampler, "batch_size", None),
            "drop_last": getattr(self.batch_sampler, "drop_last", False),
            "epochs": self._epochs,
            "running": self._running,
            "given": self._given,
            "sampler": state_of(self._index_sampler),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the loader whose `state_dict` this is was: with the next iteration.

        Raises DataError, and changes nothing, when that loader had other data or other batches.
        """
        own = self.state_dict()
        if state_dict.keys() != own.keys():
            raise DataError(
                f"DataLoader: the state has {sorted(state_dict)}, and {sorted(own)} are wanted"
            )
        for name, what in (
            ("examples", "examples in the data set"),
            ("batch_size", "examples per batch"),
            ("drop_last", "for drop_last"),
        ):
            if state_dict[name] != own[name]:
                raise DataError(
                    f"DataLoader: the state is of a loader with {state_dict[name]} {what}, this "
                    f"one has {own[name]}"
                )
        given, epochs = int(state_dict["given"]), int(state_dict["epochs"])
        load_state(self._index_sampler, state_dict["sampler"])
        self._given, self._epochs = given, epochs
        self._running = bool(state_dict["running"])
        self._resume = self._given if self._running else None
        self._latest = object()
        if self._epochs and not self._running:
            # The sampler would repeat its latest order, which belongs to the epoch that is over.
            iter(self._index_sampler)

    # -- iterating --------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        # Not a generator: the order is drawn now, and not at the first batch.
        order = iter(self._index_sampler)
        if self._resume is None:
            self._epochs += 1
        self._given, self._resume = self._resume or 0, None
        self._running, self._latest = True, object()
        return self._epoch(itertools.islice(order, self._given, None), self._latest)

    def _epoch(self, order: Iterator[Any], iteration: object) -> Iterator[Any]:
        with closing(self._copied(order)) as batches:
            for batch in batches:
                if iteration is self._latest:
                    self._given += 1
                yield batch
        if iteration is self._latest:
            self._running = False

    def _copied(self, order: Iterator[Any]) -> Generator[Any, None, None]:
        """Batches on the device, some of them copied ahead."""
        _ = self._pinning  # looked up before threads ask for it
        with closing(self._read(order)) as batches:
            if self.device is None:
                yield from batches
                return
            space = backend_for_device(self.device)
            waiting: deque[Callable[[], Any]] = deque()
            failure: Exception | None = None
            try:
                for batch in batches:
                    waiting.append(_send(batch, space, self.device))
                    if len(waiting) == AHEAD:
                        yield waiting.popleft()()
            except Exception as error:
                failure = error  # whose turn is after the batches that were read before
            while waiting:
                yield waiting.popleft()()
            if failure is not None:
                raise failure

    def _read(self, order: Iterator[Any]) -> Generator[Any, None, None]:
        """Batches on the host, in order."""
        if not self.num_workers:
            for indices in order:
                yield self._fetch(indices, _never)
            return
        stop = threading.Event()
        numbers, here = itertools.count(), threading.local()

        def work(indices: Any) -> Any:
            if self.worker_init_fn is not None and not hasattr(here, "number"):
                here.number = next(numbers)
                self.worker_init_fn(here.number)
            return self._fetch(indices, stop.is_set)

        pool = ThreadPoolExecutor(self.num_workers, "gpugrad-loader")
        try:
            ahead = self.num_workers * self.prefetch_factor
            jobs = deque(
                (pool.submit(work, indices), indices) for indices in itertools.islice(order, ahead)
            )
            while jobs:
                batch = self._wait(*jobs.popleft())
                for indices in itertools.islice(order, 1):
                    jobs.append((pool.submit(work, indices), indices))
                yield batch
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _wait(self, job: Future[Any], indices: Any) -> Any:
        try:
            return job.result(self.timeout or None)
        except FutureTimeoutError:
            if job.done():  # the data set's own
                raise
            raise DataLoaderError(
                f"DataLoader: no batch after {self.timeout:g} s; examples {_few(indices)} of "
                f"{type(self.dataset).__name__} are still being read",
                None,
                _numbers(indices),
            ) from None

    def _fetch(self, indices: Any, stopped: Callable[[], bool]) -> Any:
        """One batch, or example, on the host; a worker that is no longer wanted returns early."""
        if self.batch_sampler is None:
            example = self._example(indices, (indices,))
            batch = self._collated(self.collate_fn or default_convert, example, indices)
        elif self.collate_fn is None and hasattr(self.dataset, "get_batch"):
            batch = self._whole_batch(indices)
        else:
            examples = []
            for index in indices:
                if stopped():
                    return None
                examples.append(self._example(index, indices))
            batch = self._collated(self.collate_fn or default_collate, examples, indices)
        if (space := self._pinning) is not None:
            leaves, rebuild = flatten(batch)
            batch = rebuild([_pin(x, space) for x in leaves])
        return batch

    @cached_property
    def _pinning(self) -> Backend | None:
        """The backend that pins batches; None where they stay as they are."""
        if self.device is None and not self.pin_memory:
            return None
        device = self.device or self.pin_memory_device or "cuda"
        return backend_for_device(device) if is_usable(device) else None

    def _whole_batch(self, indices: Any) -> Any:
        try:
            return self.dataset.get_batch(indices)
        except Exception as error:
            for index in indices:  # one of them alone should show what is wrong
                self._example(index, indices)
            raise self._failed(
                f"a batch of examples {_few(indices)}", error, None, indices
            ) from error

    def _example(self, index: Any, indices: Any) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            raise self._failed(f"example {index}", error, index, indices) from error

    def _collated(self, collate: Callable[[Any], Any], examples: Any, indices: Any) -> Any:
        try:
            return collate(examples)
        except Exception as error:
            what = f"collating examples {_few(indices)}"
            raise self._failed(what, error, None, indices) from error

    def _failed(self, what: str, error: Exception, index: Any, indices: Any) -> DataLoaderError:
        return DataLoaderError(
            f"DataLoader: {what} of {type(self.dataset).__name__}: {type(error).__name__}: {error}",
            index,
            _numbers(indices),
        )


def _never() -> bool:
    return False


def _pin(x: Any, space: Backend) -> Any:
    if isinstance(x, Tensor) and isinstance(x.data, np.ndarray):
        return tensor_of(space.pinned(x.data))
    return x


def _send(batch: Any, space: Backend, device: str) -> Callable[[], Any]:
    """Begin to copy the tensors of a batch; the function waits for them and returns the batch."""
    leaves, rebuild = flatten(batch)
    copies: list[Callable[[], Any]] = [_send_leaf(x, space, device) for x in leaves]
    return lambda: rebuild([receive() for receive in copies])


def _send_leaf(x: Any, space: Backend, device: str) -> Callable[[], Any]:
    if not isinstance(x, Tensor):
        return lambda: x
    if not isinstance(x.data, np.ndarray):
        return lambda: x.to(device)
    receive = space.copy_async(x.data, device)
    return lambda: tensor_of(receive())


def _numbers(indices: Any) -> tuple[Any, ...]:
    return tuple(indices) if isinstance(indices, list | tuple | np.ndarray) else (indices,)


def _few(indices: Any) -> str:
    numbers = _numbers(indices)
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (", ..." if len(numbers) > 8 else "")


def _check(
    num_workers: Any,
    timeout: Any,
    multiprocessing_context: Any,
    prefetch_factor: Any,
    persistent_workers: Any,
    in_order: Any,
) -> None:
    if num_workers < 0:
        raise ParameterError(f"DataLoader: num_workers is at least 0, got {num_workers}")
    if timeout < 0:
        raise ParameterError(f"DataLoader: timeout is at least 0, got {timeout}")
    if multiprocessing_context is not None:
        raise ParameterError(
            "DataLoader: workers are threads; leave multiprocessing_context out, or read in "
            "processes inside your data set"
        )
    if not in_order:
        raise ParameterError(
            "DataLoader: batches always come in order, which resuming needs; leave in_order out"
        )
    if not num_workers and (timeout or prefetch_factor is not None or persistent_workers):
        raise ParameterError(
            "DataLoader: timeout, prefetch_factor and persistent_workers are for workers; give "
            "num_workers, or leave them out"
        )
    if prefetch_factor is not None and prefetch_factor < 1:
        raise ParameterError(f"DataLoader: prefetch_factor is at least 1, got {prefetch_factor}")
