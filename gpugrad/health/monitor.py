"""A model watched while it is trained: statistics of some steps, which stay on the device."""

from __future__ import annotations

import math
import operator
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from gpugrad.backend import SPACES, Array, Backend
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.health.errors import HealthError, RecordError
from gpugrad.health.probe import (
    Layer,
    Piece,
    Place,
    Probe,
    apart,
    frozen_of,
    joined,
    layers_of,
    row_of,
)
from gpugrad.health.record import MEMORY, Record, Writer
from gpugrad.health.statistics import moments
from gpugrad.nn.module import Module

__all__ = ["Monitor"]

#: The share of the time that watching takes where nobody says how often to record.
SHARE = 0.02

#: The latest steps whose times are remembered, of each kind, and how many have to be known.
LATEST, FEW = 101, 9

#: Recorded steps whose numbers are brought to the host together, where that is a wait.
TOGETHER = 8


class Steps(Protocol):
    """What is asked of an optimiser."""

    param_groups: list[dict[str, Any]]
    arenas: list[Any]
    last_norm: Tensor | None
    last_coefficient: Tensor | None

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """Call the hook before parameters are changed."""

    def register_step_post_hook(self, hook: Callable[..., Any]) -> Any:
        """Call the hook after parameters are changed."""


class _Row(NamedTuple):
    """A recorded step: what is on the device, and what the host knows already."""

    step: int
    pieces: list[Piece]
    known: dict[str, float]


class Monitor:
    """Records how the gradients of a model fare while it is trained.

    A context manager; or call `start` and `stop`. The optimiser's steps are counted, and some of
    them recorded: 1, 2, 4, 8, and so on, until one in `every` is. In a recorded step the layers run
    one by one, and not joined; in the others nothing is done.

    Gradients are those that the optimiser's step is given: clip in the step, by its argument, and
    they are seen as they were before. What the loss was scaled by is taken out.

    Nothing waits for the device: what was measured stays there, and is copied to the host beside
    the work, several steps at a time. Losses are the caller's to give, see `step`.

    Parameters
    ----------
    model:
        What is trained. Frozen layers are watched as far as they go.
    optimizer:
        What trains it. Without one, `step` must be called after each step of the training, and
        before the gradients are cleared; norm, clip coefficient and learning rate are not known.
    every:
        Record the steps whose number is a multiple of this. By default as many as make watching
        take 2 % of the time, which depends on the model and on the machine.
    path:
        A file to write the record to, row by row as they come; read it with `Record.load`. What is
        there is replaced.
    chance:
        The loss of the best constant answer, such as the logarithm of the number of classes: a run
        that ends no better has not learnt. Without it, a loss is compared with its start alone.
    memory:
        Bytes of the record, see `Record`.

    Attributes
    ----------
    steps:
        How many there were since the start.

    Raises
    ------
    HealthError
        For a model without parameters, an optimiser that has none of them, and `every` below 1.

    >>> import gpugrad as gg
    >>> from gpugrad import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> optimizer = gg.optim.SGD(model.parameters(), lr=0.1)
    >>> x, y = gg.ones((16, 4), dtype="float32"), gg.ones((16, 1), dtype="float32")
    >>> with Monitor(model, optimizer, every=10) as monitor:
    ...     for _ in range(30):
    ...         optimizer.zero_grad()
    ...         loss = nn.functional.mse_loss(model(x), y)
    ...         loss.backward()
    ...         optimizer.step()
    ...         monitor.step(loss)
    >>> monitor.record.steps
    array([ 1,  2,  4,  8, 10, 20, 30])
    >>> monitor.record.values["gradient_norm"].shape
    (7, 3)
    """

    def __init__(
        self,
        model: Module,
        optimizer: Steps | None = None,
        *,
        every: int | None = None,
        path: str | os.PathLike[str] | None = None,
        chance: float | None = None,
        memory: int = MEMORY,
    ) -> None:
        if every is not None and (isinstance(every, bool) or int(every) != every or every < 1):
            raise HealthError(f"Monitor: every={every!r}; it is a number of steps, 1 or more")
        layers = layers_of(model)
        own = {id(p) for layer in layers for p in layer.parameters}
        if not own:
            raise HealthError(
                f"Monitor: {type(model).__name__} has no parameters, and there is nothing to "
                "train; look at a single run of it with gpugrad.health.observe"
            )
        if optimizer is not None:
            trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if not own & trained:
                raise HealthError(
                    f"Monitor: the optimiser has none of the parameters of this "
                    f"{type(model).__name__}; give it the model that is trained"
                )
        self.steps = self._after = 0
        self._optimizer = optimizer
        self._schedule = _Schedule(every)
        self._path = path
        self._memory = memory
        self._chance = chance
        self._probe = Probe(model)
        self._record: Record | None = None
        self._writer: Writer | None = None
        self._watching = self._running = self._at_once = False
        self._handles: list[Any] = []
        self._before: list[tuple[_Group, Array]] = []
        self._open: _Row | None = None  # the latest recorded step, which may still get its loss
        self._rows: list[_Row] = []  # on the device
        self._coming: list[tuple[list[_Row], dict[Place, Callable[[], Any]]]] = []

    # -- from start to stop -----------------------------------------------------------------------

    def start(self, after: int = 0) -> Self:
        """Begin to watch; the next step is the first, or that after so many.

        With `after`, the record that is at the path goes on, if it is of the same layers.
        """
        if self._running:
            raise HealthError("Monitor.start: it has been started already")
        self._running = True
        self.steps = self._after = after
        self._schedule.begin(after)
        self._at_once = all(SPACES[type(p.data)].on_host for p in self._parameters())
        if self._optimizer is not None:
            self._handles = [
                self._optimizer.register_step_pre_hook(self._pre),
                self._optimizer.register_step_post_hook(self._post),
            ]
        self._arm()
        return self

    def stop(self) -> None:
        """Bring everything to the host, close the file, and leave the model alone."""
        if not self._running:
            return
        self._running = False
        for handle in self._handles:
            handle.remove()
        self._disarm()
        self._before = []
        self._close()
        self._receive()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def step(self, loss: Tensor | float | None = None) -> None:
        """Say that a step is over, and what its loss was; nothing is read from the device."""
        if not self._running:
            raise HealthError("Monitor.step: it is not running; call start(), or enter it")
        if self._optimizer is None:
            self._end([], {})
        if self._open is not None:
            if isinstance(loss, Tensor):
                self._open.pieces.extend(_scalar("loss", loss))
            elif loss is not None:
                self._open.known["loss"] = float(loss)
            self._close()

    @property
    def record(self) -> Record:
        """What was recorded; the host waits for the steps that are still on the device."""
        self._close()
        self._receive()
        if self._record is None:
            layers = self._probe.layers
            return Record([x.path for x in layers], [x.kind for x in layers])
        return self._record

    def verdict(self) -> Any:
        """What `gpugrad.health.judge` says of the record."""
        from gpugrad.health import judge

        return judge(self.record)

    # -- a step -----------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Prepare for the step that comes."""
        if self.steps + 1 == self._schedule.next:
            self._watching = True
            self._probe.__enter__()
            if self._optimizer is None:
                self._look_before()

    def _disarm(self) -> None:
        if self._watching:
            self._probe.__exit__()
            self._watching = False

    def _pre(self, optimizer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self._watching:
            self._look_before()
            self._look_at("gradient")
            if kwargs.get("scaler") is not None:
                self._look_at_scale(kwargs["scaler"])

    def _post(self, optimizer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._close()  # that of an earlier step, whose loss was not given
        clips = kwargs.get("clip") is not None or any("clip" in g for g in optimizer.param_groups)
        pieces, known = [], {"lr": float(optimizer.param_groups[0].get("lr", math.nan))}
        if self._watching and clips:
            pieces += _scalar("norm", optimizer.last_norm)
            pieces += _scalar("coefficient", optimizer.last_coefficient)
        self._end(pieces, known)

    def _look_before(self) -> None:
        """Measure the parameters, and keep a copy of them."""
        self._before = [(group, group.copy()) for group in self._look_at("parameter")]

    def _look_at(self, what: str) -> list[_Group]:
        arenas = () if self._optimizer is None else self._optimizer.arenas
        groups = list(_grouped(self._probe.layers, arenas, what))
        self._probe.pieces += [group.measured(what) for group in groups]
        return groups

    def _look_at_scale(self, scaler: Any) -> None:
        """What the loss was multiplied by, and what the gradients are yet to be divided by."""
        like = next((p.grad.data for p in self._parameters() if p.grad is not None), None)
        scale = getattr(getattr(scaler, "_scaler", scaler), "_scale", None)
        if like is not None and scale is not None:
            inverse = scaler.inverse(SPACES[type(like)], like)
            self._probe.pieces += _scalar("inverse", tensor_of(inverse)) + _scalar("scale", scale)

    def _end(self, pieces: list[Piece], known: dict[str, float]) -> None:
        """A step is over."""
        self.steps += 1
        recorded = self._watching
        if recorded:
            if self._optimizer is None:
                self._look_at("gradient")
            self._probe.pieces += [group.changed(before) for group, before in self._before]
            self._before = []
            self._disarm()
            self._probe.settle()
            self._open = _Row(self.steps, [*self._probe.take(), *pieces], known)
        self._schedule.note(self.steps, recorded)
        self._arm()

    def _parameters(self) -> Iterator[Tensor]:
        return (p for layer in self._probe.layers for p in layer.parameters)

    # -- to the host ------------------------------------------------------------------------------

    def _close(self) -> None:
        """The latest recorded step is complete; on its way with others, when there are enough."""
        if self._open is None:
            return
        start = perf_counter()
        self._rows.append(self._open)
        self._open = None
        if self._at_once:
            self._receive()
        elif len(self._rows) == TOGETHER:
            self._send()
            while len(self._coming) > 1:  # the others have arrived by now
                self._take_in(*self._coming.pop(0))
        self._schedule.add(perf_counter() - start)

    def _send(self) -> None:
        """Begin to copy what is on the device."""
        pieces = [piece for row in self._rows for piece in row.pieces]
        coming = {(m, d): m.read_async(x) for (m, d), x in joined(pieces).items()}
        self._coming.append((self._rows, coming))
        self._rows = []

    def _receive(self) -> None:
        """Take in everything that is under way, and what is still on the device."""
        if self._rows:
            self._send()
        while self._coming:
            self._take_in(*self._coming.pop(0))

    def _take_in(self, rows: list[_Row], coming: dict[Place, Callable[[], Any]]) -> None:
        host: dict[Place, NDArray[np.float64]] = {place: get() for place, get in coming.items()}
        found = apart([piece for row in rows for piece in row.pieces], host)
        layers = self._probe.layers
        if self._record is None:
            self._record, goes_on = self._begun(layers)
            if self._path is not None:
                self._writer = self._record.writer(self._path, append=goes_on)
        for row in rows:
            mine, found = found[: len(row.pieces)], found[len(row.pieces) :]
            values, scalars = row_of(mine, len(layers))
            if "norm" not in scalars and "gradient_norm" in values:
                scalars["norm"] = float(np.sqrt(np.nansum(values["gradient_norm"] ** 2)))
            self._record.append(row.step, values, {**scalars, **row.known})

    def _begun(self, layers: Sequence[Layer]) -> tuple[Record, bool]:
        """The record, and whether it goes on with the file."""
        names, kinds = [x.path for x in layers], [x.kind for x in layers]
        if self._after and self._path is not None:
            try:
                found = Record.resume(self._path, self._after, memory=self._memory)
                if found.layers == names:
                    return found, True
            except (RecordError, OSError):
                pass  # there is none, and it begins here
        made = Record(
            names, kinds, frozen=frozen_of(layers), chance=self._chance,
            narrow=self._probe.narrow, memory=self._memory,
        )  # fmt: skip
        return made, False


class _Schedule:
    """Which steps are recorded.

    Attributes
    ----------
    next:
        The step that is recorded next.
    """

    def __init__(self, every: int | None) -> None:
        self.next = 1
        self._every = every
        self._times: tuple[deque[float], ...] = deque(maxlen=LATEST), deque(maxlen=LATEST)
        self._since = 0.0

    def begin(self, after: int) -> None:
        """The first step begins, after so many others."""
        self.next = self._following(after)
        self._since = perf_counter()

    def note(self, step: int, recorded: bool) -> None:
        """A step is over."""
        before, self._since = self._since, perf_counter()
        self._times[recorded].append(self._since - before)
        if recorded:
            self.next = self._following(step)

    def _following(self, step: int) -> int:
        """The step that is recorded after this one."""
        if self._every is None:
            return step + max(1, min(step, self._gap()))
        power = 1 << step.bit_length()
        return power if power < self._every else (step // self._every + 1) * self._every

    def add(self, seconds: float) -> None:
        """The step that was recorded last took longer; what is going on now did not."""
        if self._times[1]:
            self._times[1][-1] += seconds
        self._since += seconds

    def _gap(self) -> int:
        """Steps from one that is recorded to the next."""
        plain, recorded = (sorted(times) for times in self._times)
        if len(plain) < FEW or not recorded:
            return 2 * FEW
        usual, longer = plain[len(plain) // 2], recorded[len(recorded) // 2]
        # There are always some that are not recorded, so that it stays known how long these take.
        return max(2, math.ceil((longer - usual) / (SHARE * usual)))


# -- parameters and gradients ---------------------------------------------------------------------


class _Group(NamedTuple):
    """Parameters, or their gradients, that lie in one array.

    Attributes
    ----------
    array:
        Gives the array as it is now.
    layers:
        The number of the layer of each.
    bounds:
        Where each begins and ends; None if there is only one.
    """

    array: Callable[[], Array]
    layers: list[int]
    bounds: NDArray[np.int64] | None = None

    def copy(self) -> Array:
        """Its elements, to be compared later."""
        x = self.array()
        m: Backend = SPACES[type(x)]
        return m.asarray(x, device=m.device(x), copy=True)

    def measured(self, what: str) -> Piece:
        """What its elements amount to."""
        return self._piece(what, self.array())

    def changed(self, before: Array) -> Piece:
        """How far its elements are from what they were."""
        return self._piece("update", operator.sub(self.array(), before))

    def _piece(self, what: str, x: Array) -> Piece:
        m: Backend = SPACES[type(x)]
        return Piece(what, self.layers, m.bind(moments)(m, x, bounds=self.bounds))


def _grouped(layers: Sequence[Layer], arenas: Sequence[Any], what: str) -> Iterator[_Group]:
    """All parameters or gradients; those in an optimiser's buffers together."""
    left: dict[int, tuple[int, Tensor]] = {}
    for i, layer in enumerate(layers):
        for p in layer.parameters:
            if what == "parameter":
                left[id(p)] = i, p
            elif p.requires_grad and p.grad is not None:
                left[id(p)] = i, p.grad
    for arena in arenas:
        buffer = arena.p if what == "parameter" else arena.g
        if buffer is None:
            continue
        inside, numbers = [], []
        for place in arena.places:
            i, x = left.get(id(place.tensor), (0, None))
            if x is None:
                continue
            if x.data is (place.own() if what == "parameter" else place.lent()):
                inside.append((place.start, place.start + place.size))
                numbers.append(i)
                del left[id(place.tensor)]
        if inside:
            yield _Group(partial(getattr, buffer, "flat"), numbers, np.array(inside))
    for i, x in left.values():
        yield _Group(partial(getattr, x, "data"), [i])


def _scalar(name: str, value: Tensor | None) -> list[Piece]:
    """A number that is on a device, to be read with the others."""
    if value is None:
        return []
    x = value.data
    m: Backend = SPACES[type(x)]
    wide = m.bind(m.astype)(x, m.dtype("float64"))
    return [Piece(name, (), m.reshape(wide, (1,)))]
