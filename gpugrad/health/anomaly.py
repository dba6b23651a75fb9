"""Where a NaN or an infinity first appears: the operation, the line, the layer, what went in."""

from __future__ import annotations

import linecache
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from threading import get_ident
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from gpugrad.backend import SPACES, is_array
from gpugrad.core.calls import each_call
from gpugrad.core.graph import HOOKED, MANY, Extra, Leaf, Node, Pick, reachable
from gpugrad.core.modes import keep_results
from gpugrad.core.primitive import Primitive
from gpugrad.core.rules import by_rules
from gpugrad.core.tensor import Tensor
from gpugrad.core.walk import on_walk
from gpugrad.health.errors import AnomalyError
from gpugrad.health.statistics import COUNT, GREATEST, LEAST, NONFINITE, moments
from gpugrad.nn.module import Module

__all__ = ["Range", "detect_anomaly"]


class Range(NamedTuple):
    """What an array held when something went wrong.

    Attributes
    ----------
    name:
        The operand's name, or `g` for the gradient that arrived.
    dtype, shape:
        Of the array; of a plain number, its type and ().
    least, greatest:
        Of its finite elements; NaN if there are none.
    nonfinite:
        How many elements are NaN or infinite.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    least: float
    greatest: float
    nonfinite: int

    def __str__(self) -> str:
        bad = f", {self.nonfinite} not finite" if self.nonfinite else ""
        shape = list(self.shape) if self.shape else ""
        return f"{self.name}: {self.dtype}{shape} in [{self.least:g}, {self.greatest:g}]{bad}"


class detect_anomaly:
    """Raise AnomalyError at the first operation that makes a NaN or an infinity.

    A context manager, for forward and backward passes of the thread that enters it. Every result
    and every gradient is looked at, and the host waits for each: a training is many times as slow.
    Elsewhere nothing is paid for it. To stay on, see `gpugrad.health.guard`.

    Masks are no anomaly: an infinity that goes into an operation may come out of it. Infinite
    gradients of a scaled loss are none either, see `infinite`.

    Parameters
    ----------
    infinite:
        Look for infinities, too, and not for NaN alone.

    Raises AnomalyError inside the block. GraphError if operations were replaced meanwhile.

    >>> import gpugrad as gg
    >>> x = gg.tensor([0.0, 4.0], requires_grad=True)
    >>> with detect_anomaly():
    ...     gg.sqrt(x).sum().backward()
    Traceback (most recent call last):
    gpugrad.health.errors.AnomalyError: sqrt, backward: 1 of 2 elements of the gradient of x are
    infinite...
    """

    def __init__(self, *, infinite: bool = True) -> None:
        self.infinite = infinite
        self.active = False
        self._blocks: ExitStack | None = None
        self._thread = 0
        self._at = _NOWHERE  # of the latest operation
        self._unsettled: list[tuple[Tensor, _Place]] = []

    def __enter__(self) -> Self:
        self._thread = get_ident()
        with ExitStack() as blocks:
            blocks.enter_context(np.errstate(all="ignore"))  # it is told of here
            blocks.enter_context(each_call(self._called, apart=True))
            blocks.enter_context(keep_results(self))
            on_walk.append(self._before_walk)
            blocks.callback(on_walk.remove, self._before_walk)
            self._blocks = blocks.pop_all()
        self.active = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.active = False
        self._unsettled = []
        assert self._blocks is not None
        self._blocks.__exit__(kind, error, trace)

    # -- forward ----------------------------------------------------------------------------------

    def _called(
        self,
        made: Primitive,
        operands: Sequence[Any],
        parameters: dict[str, Any],
        results: Sequence[Any],
    ) -> None:
        """An operation has run."""
        if not self.active:
            return
        self._settle()
        self._at = _Place.here()
        if not operands or made.name == "copy":
            return  # what was made and not computed, such as gpugrad.full
        found = _Faults.of(results)
        if not found:
            return
        names = _names(made, len(operands))
        given = _Faults.of([*operands, *parameters.values()])
        if given.nan:
            bad = [n for n, x in zip(names, operands) if _Faults.of([x]).nan]
            self._fail(made, "forward", f"{', '.join(bad)} came in with NaN", names, operands)
        if found.new(given, self.infinite):
            self._fail(made, "forward", found.text("the result"), names, operands)

    def append(self, result: Tensor, /) -> None:
        """Take the result of an operation that is recorded; its node is not there yet."""
        if self.active:
            self._unsettled.append((result, self._at))

    def _settle(self) -> None:
        """Watch the nodes of the latest results."""
        for result, at in self._unsettled:
            self._watch(result._node, at)
        self._unsettled = []

    # -- backward ---------------------------------------------------------------------------------

    def _before_walk(self, seeds: Any, retain: bool, wrap: Any, since: int) -> None:
        if self.active and get_ident() == self._thread:
            self._settle()
            for node in reachable([seed for seed, _ in seeds], since):
                self._watch(node, _NOWHERE)

    def _watch(self, node: Any, at: _Place) -> None:
        if isinstance(node, Pick):
            node = node.p0
        cls = type(node)
        if node is None or cls is Leaf or cls.pull is not None:
            return  # watched already, or a node that passes on what others compute
        watch = _Watch(self, at)
        if cls.kind == HOOKED:
            watch.hooks, watch.retain, watch.grad = (
                node.extra.hooks, node.extra.retain, node.extra.grad
            )  # fmt: skip
        if cls not in _watched:
            kind = HOOKED if cls.kind == HOOKED else MANY
            body = {"__slots__": (), "kind": kind, "pull": _pull, "vjp": _vjp, "pop": _pop,
                    "extra": property(_EXTRA.__get__, _keep_extra)}  # fmt: skip
            _watched[cls] = type(cls.__name__, (cls,), body)
        node.extra = watch
        node.__class__ = _watched[cls]

    def arrived(self, node: Any, at: _Place, g: Any, grads: Sequence[Any]) -> None:
        """A node has computed the gradients of its parents, `grads`, from its own."""
        given, found = _Faults.of([g]), _Faults.of(grads)
        if not (given.nan or found):
            return
        made: Primitive = node.primitive
        saved = {k: v for k, v in node.saved().items() if k in made.operands}
        names, arrays = ("g", *saved), (g, *saved.values())
        self._at = at
        if given.nan:
            what = (
                "the gradient that arrives has NaN: it was given to backward(), or is the sum of "
                "infinite gradients of several uses"
            )
            self._fail(made, "backward", what, names, arrays)
        if found.new(given, self.infinite):
            operands = _names(made, 1 + max((i for i, _ in node.parents()), default=0))
            bad = [operands[i] for (i, _), x in zip(node.parents(), grads) if _Faults.of([x])]
            what = found.text(f"the gradient of {', '.join(bad) or 'its operands'}")
            self._fail(made, "backward", what, names, arrays)

    def _fail(
        self, made: Primitive, where: str, what: str, names: Sequence[str], arrays: Sequence[Any]
    ) -> None:
        self.active = False  # what the message is made of is not looked at
        line, layer = self._at.line(), self._at.layer()
        ranges = tuple(r for n, x in zip(names, arrays) if (r := _range(n, x)) is not None)
        message = f"{made.name}, {where}: {what}"
        if layer and where == "backward":  # in a forward, the layers on the way say where they are
            message += f", in {layer}"
        if line:
            message += f"; {line}"
        if ranges:
            message += f"; given {'; '.join(map(str, ranges))}"
        raise AnomalyError(
            message, operation=made.name, where=where, line=line, layer=layer, inputs=ranges
        )


class _Watch(Extra):
    """What a watched node has beside its hooks: who watches, and where it was made."""

    __slots__ = ("at", "owner")

    def __init__(self, owner: detect_anomaly, at: _Place) -> None:
        super().__init__()
        self.owner = owner
        self.at = at


#: The slot of a node for it.
_EXTRA: Any = Node.__dict__["extra"]

#: Class of a node → that of the node when it is watched.
_watched: dict[type, type] = {}


def _keep_extra(node: Any, extra: Extra) -> None:
    """A watched node has an Extra already, when it gets its first hook."""


def _pull(node: Any, g: Any, wrap: Any) -> list[tuple[Any, Any]]:
    """The gradients of a watched node's parents, looked at."""
    pairs = by_rules(node, g, wrap)
    watch: _Watch = node.extra
    if watch.owner.active:
        watch.owner.arrived(node, watch.at, g, [x for _, x in pairs])
    return pairs


def _vjp(node: Any, g: Any) -> list[tuple[Any, Any]]:
    return _pull(node, g, None)


def _pop(node: Any, g: Any) -> list[tuple[Any, Any]]:
    pairs = _pull(node, g, None)
    node.clear()
    return pairs


# -- where ----------------------------------------------------------------------------------------

#: Frames of files below are the library's own.
_OURS = str(Path(__file__).parents[1]) + os.sep


class _Place(NamedTuple):
    """Where the program was: the line outside of the library, and the layers that ran."""

    file: str
    number: int
    modules: tuple[Module, ...]  # the innermost first

    @classmethod
    def here(cls) -> _Place:
        """The place of the caller."""
        file, number, modules = "", 0, []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code is Module.__call__.__code__:
                modules.append(frame.f_locals["self"])
            elif not file and not code.co_filename.startswith((_OURS, "<gpugrad")):
                file, number = code.co_filename, frame.f_lineno
            frame = frame.f_back
        return cls(file, number, tuple(modules))

    def line(self) -> str:
        """The line as "file:line: text"; "" if there is none."""
        text = linecache.getline(self.file, self.number).strip()
        return f"{self.file}:{self.number}" + f": {text}" * bool(text) if self.file else ""

    def layer(self) -> str:
        """The path of the innermost layer in the outermost, with its class; "" if there is none."""
        if not self.modules:
            return ""
        path = []
        for outer, inner in pairwise(reversed(self.modules)):
            path.append(next((p for p, m in outer.named_modules() if m is inner), "?"))
        kind = type(self.modules[0]).__name__
        return f"{'.'.join(path)} ({kind})" if path else kind


_NOWHERE = _Place("", 0, ())


# -- what -----------------------------------------------------------------------------------------


class _Faults(NamedTuple):
    """How many elements are NaN, how many infinite, and how many there are."""

    nan: int
    infinite: int
    size: int

    @classmethod
    def of(cls, values: Iterable[Any]) -> _Faults:
        """Of all numbers and arrays together."""
        nan = infinite = size = 0
        for x in _flat(values):
            if isinstance(x, float):
                nan, infinite, size = nan + math.isnan(x), infinite + math.isinf(x), size + 1
                continue
            m = SPACES[type(x)]
            size += math.prod(x.shape)
            if not bool(m.to_host(m.bind(lambda m, x: m.all(m.isfinite(x)))(m, x))):
                host = m.to_host(x)
                bad = int(np.count_nonzero(np.isnan(host)))
                nan, infinite = nan + bad, infinite + int(np.count_nonzero(np.isinf(host)))
        return cls(nan, infinite, size)

    def __bool__(self) -> bool:
        return bool(self.nan or self.infinite)

    def new(self, given: _Faults, infinite: bool) -> bool:
        """Whether they are not just what was given; infinities count only if wanted."""
        if self.nan:
            return not given.nan
        return infinite and not given.infinite

    def text(self, what: str) -> str:
        """Told of something."""
        kinds = "NaN" * bool(self.nan), "infinite" * bool(self.infinite)
        which = " or ".join(filter(None, kinds))
        if self.size == 1:
            return f"{what} is {which}"
        return f"{self.nan + self.infinite} of {self.size} elements of {what} are {which}"


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """The floating-point arrays and numbers in what operations take and give."""
    for x in values:
        if isinstance(x, Tensor):
            x = x.data
        if isinstance(x, float):
            yield x
        elif isinstance(x, dict):
            yield from _flat(x.values())
        elif isinstance(x, list | tuple):
            yield from _flat(x)
        elif x is not None and is_array(x) and _is_floating(x):
            yield x


def _is_floating(x: Any) -> bool:
    dtype = SPACES[type(x)].numpy_dtype(x)
    return dtype.kind in "fc" or dtype.name == "bfloat16"


def _range(name: str, x: Any) -> Range | None:
    """What an operand holds; None for one without numbers."""
    if isinstance(x, Tensor):
        x = x.data
    if isinstance(x, bool) or x is None:
        return None
    if isinstance(x, int | float):
        fine = math.isfinite(x)
        value = float(x) if fine else math.nan
        return Range(name, type(x).__name__, (), value, value, int(not fine))
    if not is_array(x) or SPACES[type(x)].numpy_dtype(x).kind == "c":
        return None
    m = SPACES[type(x)]
    row = m.to_host(m.bind(moments)(m, x))[0]
    least, greatest = (float(row[i]) if row[COUNT] > row[NONFINITE] else math.nan
                       for i in (LEAST, GREATEST))  # fmt: skip
    shape = tuple(x.shape)
    return Range(name, str(m.numpy_dtype(x)), shape, least, greatest, int(row[NONFINITE]))


def _names(made: Primitive, count: int) -> list[str]:
    """The names of so many operands."""
    if made.variadic:
        return [f"{made.operands[0]}[{i}]" for i in range(count)]
    return list(made.operands)
