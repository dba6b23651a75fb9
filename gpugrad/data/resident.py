"""Small data sets that live on the device as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gpugrad.backend import SPACES, Array
from gpugrad.core.conversion import asarray
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.data.errors import DataError
from gpugrad.data.order import permutation
from gpugrad.data.samplers import check_count
from gpugrad.data.sources import take_rows
from gpugrad.nn.random import Generator, draws_from

__all__ = ["DeviceLoader"]


class DeviceLoader:
    """Batches of arrays that are on the device from the beginning.

    The order of an epoch is made on the host, one array of integers, and sent to the device when
    the epoch begins. Batches are gathered there: no example is copied again, and nothing is read
    back.

    Parameters
    ----------
    tensors:
        Tensors, or arrays, with one example per row of each. They are copied to ``device`` if they
        are elsewhere.
    batch_size, shuffle, drop_last, generator:
        As those of :class:`DataLoader`; of equal generators both make equal orders.
    device:
        ``"cuda:0"``; by default each tensor stays where it is.

    A batch is a tuple with one tensor for each of ``tensors``; without ``shuffle`` these are views.

    Raises
    ------
    DataError
        Without tensors, and for tensors that differ in length.

    >>> import numpy as np
    >>> loader = DeviceLoader(np.arange(5.0), batch_size=2, shuffle=True, generator=Generator(0))
    >>> for (x,) in loader:
    ...     print(x)
    tensor([0., 2.])
    tensor([1., 4.])
    tensor([3.])
    """

    def __init__(
        self,
        *tensors: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: Generator | None = None,
        device: str | None = None,
    ) -> None:
        self.tensors = tuple(asarray(x, device=device).detach() for x in tensors)
        lengths = {x.shape[0] if x.ndim else 0 for x in self.tensors}
        if len(lengths) != 1 or lengths == {0}:
            raise DataError(
                "DeviceLoader: needs tensors of equally many rows, one per example, got shapes "
                f"{[tuple(x.shape) for x in self.tensors]}"
            )
        self.batch_size = check_count("batch_size", batch_size)
        self.shuffle = bool(shuffle)
        self.drop_last = bool(drop_last)
        self.generator = generator
        if generator is not None:
            draws_from(generator)  # complains
        self._draw: tuple[int, int] | None = None
        self._given = 0
        self._running = False
        self._resume: int | None = None
        self._latest = object()

    def __len__(self) -> int:
        whole, rest = divmod(self._examples, self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    @property
    def _examples(self) -> int:
        return int(self.tensors[0].shape[0])

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, as plain numbers; see :meth:`DataLoader.state_dict`."""
        return {
            "examples": self._examples,
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "shuffle": self.shuffle,
            "running": self._running,
            "given": self._given,
            "draw": self._draw,
            "generator": None if self.generator is None else self.generator.state,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the loader whose `state_dict` this is was: with the next iteration.

        Raises DataError, and changes nothing, when that loader had other data or other batches.
        """
        own = self.state_dict()
        if state_dict.keys() != own.keys():
            raise DataError(
                f"DeviceLoader: the state has {sorted(state_dict)}, and {sorted(own)} are wanted"
            )
        for name in ("examples", "batch_size", "drop_last", "shuffle"):
            if state_dict[name] != own[name]:
                raise DataError(
                    f"DeviceLoader: {name} was {state_dict[name]} in the state, and is {own[name]}"
                )
        state, draw = state_dict["generator"], state_dict["draw"]
        if (state is None) != (self.generator is None):
            raise DataError(
                "DeviceLoader: the state is of a loader "
                f"{'without' if state is None else 'with'} a generator of its own"
            )
        if self.generator is not None:
            self.generator.state = tuple(state)
        self._draw = None if draw is None else (int(draw[0]), int(draw[1]))
        self._given, self._running = int(state_dict["given"]), bool(state_dict["running"])
        self._resume = self._given if self._running else None
        self._latest = object()

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if self.shuffle and (self._resume is None or self._draw is None):
            self._draw = draws_from(self.generator).stream()
        self._given, self._resume = self._resume or 0, None
        self._running, self._latest = True, object()
        orders: dict[str, Array] = {}
        if self.shuffle and self._draw is not None:
            order = permutation(self._examples, *self._draw)
            for x in self.tensors:
                if x.device not in orders:
                    orders[x.device] = SPACES[type(x.data)].asarray(order, device=x.device)
        return self._epoch(orders, self._given, self._latest)

    def _epoch(
        self, orders: Mapping[str, Array], begin: int, iteration: object
    ) -> Iterator[tuple[Tensor, ...]]:
        for i in range(begin, len(self)):
            rows = slice(i * self.batch_size, min((i + 1) * self.batch_size, self._examples))
            batch = tuple(self._rows(x, orders.get(x.device), rows) for x in self.tensors)
            if iteration is self._latest:
                self._given += 1
            yield batch
        if iteration is self._latest:
            self._running = False

    def _rows(self, x: Tensor, order: Array | None, rows: slice) -> Tensor:
        m = SPACES[type(x.data)]
        if order is None:
            return tensor_of(m.getitem(x.data, rows))
        if m.on_host:
            return tensor_of(take_rows(x.data, order[rows]))
        return tensor_of(m.take(x.data, m.getitem(order, rows), axis=0))
