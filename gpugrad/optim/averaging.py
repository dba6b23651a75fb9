"""Averages of a net's weights over training, as PyTorch's `torch.optim.swa_utils` makes them.

>>> import gpugrad as gg
>>> from gpugrad import nn
>>> net = nn.Linear(1, 1)
>>> averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.75))
>>> with gg.no_grad():
...     for value in (0.0, 8.0):
...         net.weight[...] = value
...         averaged.update_parameters(net)
>>> averaged.module.weight.item()
2.0
>>> with averaged.applied_to(net):
...     net.weight.item()
2.0
>>> net.weight.item()
8.0
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.clip.norms import cast
from gpugrad.core.actions import action
from gpugrad.core.conversion import tensor
from gpugrad.core.graph import mutations
from gpugrad.core.modes import no_grad
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.nn.module import Module, write
from gpugrad.nn.normalization import BatchNorm1d, BatchNorm2d
from gpugrad.ops import maximum, where
from gpugrad.ops.updates import RULES
from gpugrad.optim.arena import Arena, Place, leaf_of
from gpugrad.optim.errors import OptimizerError
from gpugrad.optim.flat import flat_update, prepared

__all__ = [
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Average:
    """A way to average: a row of :data:`gpugrad.ops.updates.RULES`, and its numbers.

    Called with averages, current values and how many were averaged, tensors or lists of them, it is
    PyTorch's function of that name: a single average is returned anew, a list changed in place.
    """

    rule: str
    numbers: Mapping[str, float]

    def __call__(self, averaged: Any, current: Any, num_averaged: Any) -> Tensor | None:
        # Whoever calls it by hand has an average already: it is never just replaced.
        at_least = 2 if self.rule == "ema" else 1
        with no_grad():
            if isinstance(averaged, Tensor):
                count = maximum(tensor(num_averaged, device=averaged.device) + 1, at_least)
                return tensor_of(self.blended(averaged, current, count))
            for a, b in zip(averaged, current, strict=True):
                count = maximum(tensor(num_averaged, device=a.device) + 1, at_least)
                write(a, tensor_of(self.blended(a, b, count)))
        return None

    def blended(self, averaged: Tensor, current: Tensor, count: Tensor) -> Array:
        """A new array; in float64 if they are whole numbers, whose fraction is then cut off."""
        m, dtype = averaged.backend, averaged.data.dtype
        wide = m.dtype("float64") if averaged.dtype.kind in "iub" else dtype
        x, g = cast(m, averaged.data, wide), cast(m, current.data, wide)
        made = prepared(m, self.rule, cast(m, count.data, wide), self.numbers)
        return cast(m, RULES[self.rule].update(m, x, g, *made)[0], dtype)

    def update(self, m: Backend, averaged: Array, current: Array, count: Array) -> Array:
        """In place where arrays can change; the average is the first value where `count` is 1."""
        (out,) = m.bind(flat_update)(
            m, averaged, current, count=count, factor=None, skip=None, finite_only=False,
            rule=self.rule, flags={}, numbers=self.numbers,
        )  # fmt: skip
        return out


def _ema(decay: float) -> Average:
    if not 0.0 <= decay <= 1.0:
        raise OptimizerError(f"decay is {decay}; it must be from 0 to 1, such as 0.999")
    return Average("ema", {"gain": 1.0 - decay})


_MEAN = Average("mean", {})


def get_ema_multi_avg_fn(decay: float = 0.999) -> Average:
    """For `AveragedModel`: an exponential average that keeps the share `decay` at each update."""
    return _ema(decay)


def get_ema_avg_fn(decay: float = 0.999) -> Average:
    """What `get_ema_multi_avg_fn` gives, for `avg_fn`."""
    return _ema(decay)


def get_swa_multi_avg_fn() -> Average:
    """For `AveragedModel`: the mean of all (Izmailov et al., 2018, arXiv:1803.05407)."""
    return _MEAN


def get_swa_avg_fn() -> Average:
    """What `get_swa_multi_avg_fn` gives, for `avg_fn`."""
    return _MEAN


class AveragedModel(Module):
    """A copy of a net whose parameters are averages of the net's, over the updates.

    The first update copies the parameters, each later one averages them with those before. Where
    an optimiser holds the net's parameters in few buffers, the averages lie in buffers, too, and an
    update is one pass over each. Nothing is read from the device.

    Parameters
    ----------
    model:
        The net; it is copied.
    device:
        Where the averages are, if not beside the net's parameters.
    avg_fn:
        `avg_fn(averaged, current, num_averaged)` returns the new average of one parameter.
    multi_avg_fn:
        The same for lists of all parameters of one device and dtype, in place; such as
        `get_ema_multi_avg_fn(0.999)`. Without any, all updates count the same.
    use_buffers:
        Average the buffers, too, in place of copying the latest.

    Attributes
    ----------
    module:
        The copy. Calling the averaged model calls it.
    n_averaged:
        How many updates there were, a 0-d tensor on the device. States have PyTorch's names.
    """

    module: Module
    n_averaged: Tensor

    def __init__(
        self,
        model: Module,
        device: str | None = None,
        avg_fn: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        multi_avg_fn: Callable[[list[Tensor], list[Tensor], Tensor], Any] | None = None,
        use_buffers: bool = False,
    ) -> None:
        super().__init__()
        if avg_fn is not None and multi_avg_fn is not None:
            raise OptimizerError("AveragedModel: give avg_fn or multi_avg_fn, not both")
        self.module = deepcopy(model)
        if device is not None:
            self.module.to(device)
        first = next(iter((*self.module.parameters(), *self.module.buffers())), None)
        if first is None:
            raise OptimizerError(
                f"AveragedModel: {type(model).__name__} has no parameters; there is nothing to "
                "average"
            )
        for p in self.module.parameters():
            p.grad = None
            if isinstance(p.data, np.generic):
                p.data = np.asarray(p.data)
        self.register_buffer("n_averaged", tensor(0, dtype="int64", device=first.device))
        self.avg_fn = avg_fn
        self.multi_avg_fn = multi_avg_fn
        self.use_buffers = use_buffers
        self._layout = _Layout()
        self._applied = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @no_grad()
    @action
    def update_parameters(self, model: Module) -> None:
        """Let the averages take in the parameters of a net like the one that was copied.

        Raises OptimizerError, and changes nothing, for a net with other parameters, and while the
        averages are lent by `applied_to`.
        """
        if self._applied:
            raise OptimizerError(
                "AveragedModel: the averages are in a net at the moment; leave the with-block of "
                "applied_to() before the next update"
            )
        pairs = _pairs(self.module.named_parameters(), model.named_parameters(), model)
        buffers = _pairs(self.module.named_buffers(), model.named_buffers(), model)
        if self.use_buffers:
            pairs, buffers = pairs + buffers, []
        with np.errstate(all="ignore"):
            self._average(pairs)
        for twin, buffer in buffers:
            write(twin, buffer.detach())
        write(self.n_averaged, self.n_averaged + 1)

    def _average(self, pairs: list[Pair]) -> None:
        function = self.multi_avg_fn or self.avg_fn or _MEAN
        if isinstance(function, Average):
            self._layout.run(function, pairs, self.n_averaged + 1)
            return
        kinds: dict[Any, list[Pair]] = {}
        for twin, p in pairs:
            now = p.detach().to(twin.device, twin.dtype)
            kinds.setdefault((twin.device, str(twin.dtype)), []).append((twin.detach(), now))
        for (device, dtype), alike in kinds.items():
            # What is made of the first update is thrown away; a count of 0 might trouble it. Counts
            # are floating-point, which divide what they meet without making it any wider.
            n = self.n_averaged.to(device, dtype if dtype == "float64" else "float32")
            count, begins = maximum(n, 1.0), n == 0
            if self.multi_avg_fn is not None:
                self.multi_avg_fn([a for a, _ in alike], [b for _, b in alike], count)
                made = [a for a, _ in alike]
            else:
                assert self.avg_fn is not None
                made = [self.avg_fn(a, b, count) for a, b in alike]
            for (twin, now), new in zip(alike, made, strict=True):
                write(twin, where(begins, now, new).to(dtype=twin.dtype))

    @contextmanager
    def applied_to(self, model: Module) -> Iterator[Module]:
        """For a while, let `model` compute with the averages in place of its own parameters.

        It gets its own back at the end, untouched, also after an error. Buffers are lent, too.
        Meanwhile it can be evaluated, not trained: a step would change the averages.

        >>> import gpugrad as gg
        >>> net = gg.nn.Linear(1, 1)
        >>> with AveragedModel(net).applied_to(net) as lent:
        ...     y = lent(gg.ones((1, 1)))
        """
        if self._applied:
            raise OptimizerError("AveragedModel: the averages are in a net already")
        pairs = _pairs(self.module.named_parameters(), model.named_parameters(), model)
        pairs += _pairs(self.module.named_buffers(), model.named_buffers(), model)
        own = [p.data for _, p in pairs]
        self._applied = True
        try:
            for twin, p in pairs:
                p.data = twin.detach().to(p.device, p.dtype).data
            yield model
        finally:
            for (_, p), data in zip(pairs, own):
                p.data = data
            self._applied = False

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes over: it finds out for itself where parameters lie."""
        return {**vars(self), "_layout": _Layout(), "_applied": False}


def _pairs(
    twins: Iterable[tuple[str, Tensor]], values: Iterable[tuple[str, Tensor]], model: Module
) -> list[Pair]:
    """Each average with the value it is of; OptimizerError unless names and shapes agree."""
    mine, theirs = list(twins), list(values)
    found = [(a, b) for (name, a), (other, b) in zip(mine, theirs)
             if name == other and a.shape == b.shape]  # fmt: skip
    if not len(found) == len(mine) == len(theirs):
        here = {name: a.shape for name, a in mine}
        there = {name: b.shape for name, b in theirs}
        odd = sorted(
            f"{name} is {there.get(name, 'missing')}, here {here.get(name, 'missing')}"
            for name in here.keys() | there.keys()
            if here.get(name) != there.get(name)
        )
        raise OptimizerError(
            f"AveragedModel: {type(model).__name__} is not like the net that was copied: "
            + ("; ".join(odd) or "its parameters have another order")
        )
    return found


class _Layout:
    """Which averages lie in buffers that mirror those of an optimiser, and which are on their own.

    It is made anew when parameters have moved.
    """

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, Tensor, Any]] = []
        self._flat: list[tuple[Arena, Any]] = []
        self._single: list[Pair] = []

    def run(self, average: Average, pairs: list[Pair], count: Tensor) -> None:
        """Average everything, in place."""
        homes = [_arena_of(p) for _, p in pairs]
        if not self._holds(pairs, homes):
            self._make(pairs, homes)
        for own, there in self._flat:
            arena = there()
            n = count.to(own.device).data
            average.update(own.space, own.p.flat, arena.p.flat, n)  # type: ignore[union-attr]
            mutations.mark_all(own.marks)
        for twin, p in self._single:
            now, n = p.detach().to(twin.device), count.to(twin.device)
            if twin.dtype.kind in "iub":
                write(twin, tensor_of(average.blended(twin, now, n)))
            else:
                value = now.to(dtype=twin.dtype).data
                out = average.update(twin.backend, twin.data, value, n.data)
                if not twin.backend.mutable:
                    twin.data = out
                mutations.mark(twin.data)

    def _holds(self, pairs: Sequence[Pair], homes: Sequence[Arena | None]) -> bool:
        """Whether everything lies where it lay when this was made."""
        return (
            len(pairs) == len(self._known)
            and all(
                a is twin and b is p and (arena() if arena is not None else None) is home
                for (a, b), home, (twin, p, arena) in zip(pairs, homes, self._known)
            )
            and all(_is_whole(own) and there() is not None for own, there in self._flat)
        )

    def _make(self, pairs: Sequence[Pair], homes: Sequence[Arena | None]) -> None:
        self._known = [
            (twin, p, None if home is None else weakref.ref(home))
            for (twin, p), home in zip(pairs, homes)
        ]
        self._flat, self._single = [], []
        twins = {id(p): twin for twin, p in pairs}
        mirrored: set[int] = set()
        for arena in {id(home): home for home in homes if home is not None}.values():
            found = [twins.get(id(place.tensor)) for place in arena.places]
            alike = [t for t in found if t is not None and arena.takes(t.data, t.shape)]
            if len(alike) < len(found) or not _is_whole(arena):
                continue
            own = Arena(arena.space, alike, 0, trains=False)
            if _is_whole(own):
                self._flat.append((own, weakref.ref(arena)))
                mirrored |= {id(t) for t in alike}
        self._single = [pair for pair in pairs if id(pair[0]) not in mirrored]


def _arena_of(p: Tensor) -> Arena | None:
    """The arena whose buffer a parameter is in."""
    home = getattr(leaf_of(p), "home", None)
    return home.arena if isinstance(home, Place) and home.own() is p.data else None


def _is_whole(arena: Arena) -> bool:
    """Whether all its parameters are in its buffer."""
    return arena.p is not None and all(place.own() is place.tensor.data for place in arena.places)


@no_grad()
@action
def update_bn(loader: Iterable[Any], model: Module, device: str | None = None) -> None:
    """Find the running averages of a net's batch normalisations anew, from all batches of a loader.

    For nets with averaged weights, whose activations nobody has seen. Batches are tensors, or
    tuples whose first item goes into the net. All batches count the same.

    >>> import gpugrad as gg
    >>> net = gg.nn.BatchNorm1d(1).to("float64")
    >>> update_bn([gg.tensor([[1.0], [3.0]]), gg.tensor([[5.0], [7.0]])], net)
    >>> net.running_mean, net.running_var
    (tensor([4.]), tensor([2.]))
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm1d | BatchNorm2d)]
    if not norms:
        return
    shares = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        for batch in loader:
            x = batch[0] if isinstance(batch, tuple | list) else batch
            model(x if device is None else x.to(device))
    finally:
        for norm, share in zip(norms, shares):
            norm.momentum = share
        for module, mode in modes:
            module.training = mode
