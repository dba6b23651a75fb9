"""One forward and backward of a model, observed layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from gpugrad.backend import SPACES, Array, Backend
from gpugrad.core.modes import is_grad_enabled
from gpugrad.core.tensor import Parameter, Tensor
from gpugrad.health.errors import HealthError
from gpugrad.health.record import Record
from gpugrad.health.recurrence import LAYERS, farthest, growth, used_by_step, walk_back
from gpugrad.health.statistics import (
    COUNT,
    GREATEST,
    LEAST,
    MOMENTS,
    NONFINITE,
    OUTSIDE,
    SQUARES,
    SUM,
    ZEROS,
    dead_units,
    moments,
)
from gpugrad.nn.module import Module

__all__ = ["Layer", "Piece", "Probe", "Row", "frozen_of", "layers_of", "observe"]

Row = dict[str, NDArray[np.float64]]
Scalars = dict[str, float]


class Layer(NamedTuple):
    """A module that computes something itself, or owns parameters.

    Attributes
    ----------
    path, kind:
        Where it is in the model (its class name if it is the model itself), and its class name.
    module:
        The module.
    parameters:
        Those of its own that no earlier layer has.
    """

    path: str
    kind: str
    module: Module
    parameters: tuple[Parameter, ...]


class Piece(NamedTuple):
    """Numbers on a device that belong to a layer.

    Attributes
    ----------
    what:
        "gradient", "parameter", "update", "activation", "signal", "dead", "walk", "used", or the
        name of a scalar.
    layers:
        The number of the layer for each part that was measured; empty for a scalar.
    data:
        The moments of the parts, [parts, 8]; of "dead", how many units are, [1]; of "walk", what
        `walk_back` finds, and of "used", which outputs the loss uses, both [time steps]; a scalar,
        [1].
    bounded:
        Of "activation": whether there are outputs where its slope is small.
    units:
        Of "dead": how many there are. Of "walk": in how many directions the layer runs.
    """

    what: str
    layers: Sequence[int]
    data: Array
    bounded: bool = False
    units: int = 0


def layers_of(model: Module) -> list[Layer]:
    """The layers of a model, in the order of their definition.

    They are the modules without modules in them, and those that own parameters; a parameter that
    several have belongs to the first.

    >>> from gpugrad import nn
    >>> tied = nn.Linear(2, 2)
    >>> [(x.path, x.kind, len(x.parameters)) for x in layers_of(nn.Sequential(tied, nn.Tanh()))]
    [('0', 'Linear', 2), ('1', 'Tanh', 0)]
    """
    if not isinstance(model, Module):
        raise HealthError(
            f"gpugrad.health: a model is a gpugrad.nn.Module, not {type(model).__name__}; wrap a "
            "function in a Module with a forward()"
        )
    seen: set[int] = set()
    found = []
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        if own or not any(True for _ in module.children()):
            kind = type(module).__name__
            found.append(Layer(path or kind, kind, module, tuple(own)))
    return found


def frozen_of(layers: Sequence[Layer]) -> set[str]:
    """The paths of the layers none of whose parameters is trained."""
    return {
        x.path for x in layers if x.parameters and not any(p.requires_grad for p in x.parameters)
    }


class Probe:
    """Watches the layers of a model while it is entered; what it measures stays on the device.

    The layers run one by one then, and not joined with their neighbours.

    Attributes
    ----------
    layers:
        In the order of the forward pass, once one was seen; those without parameters that were not
        called are left out then.
    pieces:
        What was measured since `take` was last called.
    """

    def __init__(self, model: Module) -> None:
        self.layers = layers_of(model)
        self.pieces: list[Piece] = []
        self.settled = False
        self.narrow = False  # whether an output had elements of two bytes
        self._place = {id(layer.module): i for i, layer in enumerate(self.layers)}
        self._called: dict[int, None] = {}  # numbers of layers in the order of their calls
        self._handles: list[Any] = []
        self._hooked: list[Any] = []

    # -- while it watches -------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._handles = [layer.module.register_forward_hook(self._forward) for layer in self.layers]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        for handle in (*self._handles, *self._hooked):
            handle.remove()
        self._handles, self._hooked = [], []

    def _forward(self, module: Module, args: Any, out: Any) -> None:
        number = self._place[id(module)]
        if not self.settled:
            self._called.setdefault(number)
        y = _first_tensor(out)
        if y is None or not is_grad_enabled() or y.dtype.kind in "biuc":
            return
        self.narrow |= y.dtype.itemsize < 4
        x = y.data
        m: Backend = SPACES[type(x)]
        low, high, dies = _activation(module, y)
        low, high = (float(y.dtype.type(bound)) for bound in (low, high))  # as outputs are rounded
        data = m.bind(moments)(m, x, low=low, high=high)
        bounded = low > -math.inf or high < math.inf
        self.pieces.append(Piece("activation", (number,), data, bounded))
        if dies and x.ndim and y.size:
            axis = 1 if x.ndim > 3 else x.ndim - 1
            dead = m.bind(dead_units)(m, x, axis=axis)
            self.pieces.append(Piece("dead", (number,), dead, units=x.shape[axis]))
        if y._node is not None:

            def backward(g: Tensor) -> None:
                self.pieces.append(Piece("signal", (number,), m.bind(moments)(m, g.data)))

            self._hooked.append(y.register_hook(backward))
        # What was given by name is not seen here, and what a subclass returns may be anything.
        if isinstance(module, LAYERS) and args and isinstance(out, tuple) and len(out) == 2:
            self._through_time(number, module, args, out)

    def _through_time(self, number: int, layer: Any, args: Any, out: Any) -> None:
        """Measure what time does to gradients, and note which outputs the loss uses."""
        found = walk_back(layer, args)
        if found is None:
            return
        m: Backend = SPACES[type(found)]
        directions = 1 + layer.bidirectional
        self.pieces.append(Piece("walk", (number,), found, units=directions))
        y, states = out
        axis = 1 if layer.batch_first and y.ndim == 3 else 0

        def output(g: Tensor) -> None:
            used = m.bind(used_by_step)(m, g.data, axis=axis)
            self.pieces.append(Piece("used", (number,), used))

        def last(g: Tensor) -> None:
            used = np.zeros(y.shape[axis])
            used[[-1, 0][:directions]] = 1.0
            self.pieces.append(Piece("used", (number,), m.asarray(used, device=m.device(g.data))))

        for x, hook in ((y, output), *((s, last) for s in _as_tuple(states))):
            if x._node is not None:
                self._hooked.append(x.register_hook(hook))

    # -- afterwards -------------------------------------------------------------------------------

    @property
    def ran(self) -> bool:
        """Whether a layer was called."""
        return bool(self._called)

    def settle(self) -> None:
        """Put the layers into the order in which they ran, once."""
        if self.settled:
            return
        rest = [i for i, x in enumerate(self.layers) if x.parameters and i not in self._called]
        order = [*self._called, *rest]
        new = {old: i for i, old in enumerate(order)}
        self.layers = [self.layers[i] for i in order]
        self._place = {id(layer.module): i for i, layer in enumerate(self.layers)}
        self.pieces = [p._replace(layers=[new[i] for i in p.layers]) for p in self.pieces]
        self.settled = True

    def take(self) -> list[Piece]:
        """What was measured since the last time."""
        taken, self.pieces = self.pieces, []
        return taken


def observe(model: Module, run: Callable[[], Any]) -> Record:
    """Watch a model while `run()` runs it forward and backward; a record of one row.

    Nothing of the model changes. Parameters have the gradients that `run` leaves them: clear those
    of earlier runs first. The host waits for the device in the end.

    A model without parameters is observed as any other, its gradients and parameters are not
    known; so are the gradients of layers that are frozen, or that the loss does not reach. The
    signal is known where something that requires a gradient goes in.

    Parameters
    ----------
    model:
        Any module.
    run:
        Calls the model and `backward()` on its loss. If it returns the loss, that is recorded.

    Raises
    ------
    HealthError
        If `run` did not call any layer of the model.

    >>> import gpugrad as gg
    >>> from gpugrad import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> def run():
    ...     loss = (model(gg.ones((16, 4), dtype="float32")) ** 2).mean()
    ...     loss.backward()
    ...     return loss
    >>> record = observe(model, run)
    >>> record.layers, record.kinds
    (['0', '1', '2'], ['Linear', 'Tanh', 'Linear'])
    >>> bool((record.values["signal"] > 0).all())
    True
    """
    probe = Probe(model)
    with probe:
        loss = run()
    if not probe.ran:
        raise HealthError(
            f"observe: run() called no layer of this {type(model).__name__}; it has to run the "
            "same model forward and backward"
        )
    probe.settle()
    pieces = [*probe.take(), *_of_parameters(probe.layers)]
    record = Record(
        [x.path for x in probe.layers], [x.kind for x in probe.layers],
        frozen=frozen_of(probe.layers),
    )  # fmt: skip
    value = math.nan
    if isinstance(loss, Tensor) and loss.size == 1:
        value = float(loss.detach().item())
    elif isinstance(loss, int | float):
        value = float(loss)
    values, _ = row_of(read(pieces), len(probe.layers))
    record.append(1, values, {"loss": value})
    return record


def _of_parameters(layers: Sequence[Layer]) -> Iterator[Piece]:
    """The moments of every parameter and of its gradient, one by one."""
    for i, layer in enumerate(layers):
        for p in layer.parameters:
            m = SPACES[type(p.data)]
            yield Piece("parameter", (i,), m.bind(moments)(m, p.data))
            if p.grad is not None:
                yield Piece("gradient", (i,), m.bind(moments)(m, p.grad.data))


# -- from the device to the host ------------------------------------------------------------------

#: Where numbers are: the library of their array, and its device.
Place = tuple[Backend, str]


def joined(pieces: Sequence[Piece]) -> dict[Place, Array]:
    """All numbers of one place in one array, float64, so that one copy brings them to the host."""
    places: dict[Place, list[Array]] = {}
    for piece in pieces:
        m = SPACES[type(piece.data)]
        places.setdefault((m, m.device(piece.data)), []).append(m.reshape(piece.data, (-1,)))
    return {(m, device): m.bind(m.concat)(found) for (m, device), found in places.items()}


def apart(
    pieces: Sequence[Piece], host: dict[Place, NDArray[np.float64]]
) -> list[tuple[Piece, NDArray[np.float64]]]:
    """The numbers of each piece, from what `joined` became in host memory."""
    at = dict.fromkeys(host, 0)
    found = []
    for piece in pieces:
        m = SPACES[type(piece.data)]
        key = m, m.device(piece.data)
        start, at[key] = at[key], at[key] + math.prod(piece.data.shape)
        found.append((piece, host[key][start : at[key]]))
    return found


def read(pieces: Sequence[Piece]) -> list[tuple[Piece, NDArray[np.float64]]]:
    """The numbers of each piece; the host waits for the device."""
    return apart(pieces, {(m, d): m.to_host(x) for (m, d), x in joined(pieces).items()})


@np.errstate(all="ignore")  # beyond float32 is infinite, and what is not known is 0/0
def row_of(found: Sequence[tuple[Piece, NDArray[np.float64]]], many: int) -> tuple[Row, Scalars]:
    """A record's row, statistics of `many` layers and scalars, from all pieces of a step.

    Where a layer was measured several times (it was called more than once, has several parameters),
    its elements count together.
    """
    parts: dict[str, list[NDArray[np.float64]]] = {}
    layers: dict[str, list[int]] = {}
    scalars: Scalars = {}
    for piece, numbers in found:
        if not piece.layers:
            scalars[piece.what] = float(numbers[0])
            continue
        if piece.what in _APART:
            continue
        parts.setdefault(piece.what, []).append(numbers.reshape(-1, MOMENTS))
        layers.setdefault(piece.what, []).extend(piece.layers)
    whole = {what: _added(np.concatenate(rows), layers[what], many) for what, rows in parts.items()}
    scale = scalars.pop("scale", 1.0), scalars.pop("inverse", 1.0)
    if not math.isfinite(scale[1]):  # gradients that overflowed are not divided by anything
        scale = scale[0], 1.0
    row: Row = {}
    for what, x in whole.items():
        row.update(_statistics(what, x, *scale))
    if "update" in whole:
        row["update_ratio"] = np.sqrt(whole["update"][:, SQUARES] / whole["parameter"][:, SQUARES])
    bounded = np.zeros(many, bool)
    units, dead = np.zeros(many), np.zeros(many)
    for piece, numbers in found:
        if piece.what == "activation" and piece.bounded:
            bounded[piece.layers[0]] = True
        elif piece.what == "dead":
            units[piece.layers[0]] += piece.units
            dead[piece.layers[0]] += numbers[0]
    if "saturated" in row:
        row["saturated"] = np.where(bounded, row["saturated"], np.nan)
    if units.any():
        row["dead"] = dead / units
    row.update(_through_time(found, many))
    return row, scalars


#: Of these there are no moments.
_APART = frozenset(("dead", "walk", "used"))


def _through_time(found: Sequence[tuple[Piece, NDArray[np.float64]]], many: int) -> Row:
    """What the longest sequence says of each recurrent layer, however often it was called."""
    longest: dict[int, tuple[Piece, NDArray[np.float64]]] = {}
    used: dict[tuple[int, int], NDArray[np.bool_]] = {}
    for piece, numbers in found:
        if piece.what == "walk":
            i = piece.layers[0]
            if i not in longest or len(longest[i][1]) < len(numbers):
                longest[i] = piece, numbers
        elif piece.what == "used":
            key = piece.layers[0], len(numbers)
            used[key] = used.get(key, np.zeros(len(numbers), np.bool_)) | (numbers > 0)
    if not longest:
        return {}
    row = {name: np.full(many, np.nan) for name in ("time_growth", "time_steps", "time_away")}
    for i, (piece, numbers) in longest.items():
        row["time_growth"][i] = growth(numbers)
        row["time_steps"][i] = len(numbers) - 1
        if (key := (i, len(numbers))) in used:
            row["time_away"][i] = farthest(used[key], piece.units)
    return row


def _added(rows: NDArray[np.float64], layers: list[int], many: int) -> NDArray[np.float64]:
    """The moments of each layer, those of its parts together."""
    out = np.zeros((many, MOMENTS))
    out[:, LEAST], out[:, GREATEST] = np.inf, -np.inf
    sums = [COUNT, SUM, SQUARES, NONFINITE, ZEROS, OUTSIDE]
    at = np.asarray(layers)
    for column in sums:
        np.add.at(out[:, column], at, rows[:, column])
    np.minimum.at(out[:, LEAST], at, rows[:, LEAST])
    np.maximum.at(out[:, GREATEST], at, rows[:, GREATEST])
    return out


def _statistics(what: str, x: NDArray[np.float64], scale: float, inverse: float) -> Row:
    """The statistics that moments of the layers give; NaN for a layer that was not measured.

    `scale` is what the loss was multiplied by, `inverse` what is left to unscale the gradients by.
    """
    count = np.where(x[:, COUNT] > 0, x[:, COUNT], np.nan)
    finite = count - x[:, NONFINITE]
    finite = np.where(finite > 0, finite, np.nan)
    here = count / count  # 1, or NaN
    least, greatest = (np.where(np.isinf(x[:, i]), np.nan, x[:, i]) for i in (LEAST, GREATEST))
    norm = np.sqrt(x[:, SQUARES]) * here
    if what == "gradient":
        return {
            "gradient_norm": norm * inverse,
            "gradient_max": np.maximum(np.abs(least), np.abs(greatest)) * inverse,
            "gradient_nonfinite": x[:, NONFINITE] * here,
            "gradient_zeros": x[:, ZEROS] / count,
        }
    if what == "parameter":
        return {"parameter_norm": norm, "parameter_min": least, "parameter_max": greatest}
    if what == "activation":
        mean = x[:, SUM] / finite
        return {
            "activation_mean": mean,
            "activation_std": np.sqrt(np.maximum(x[:, SQUARES] / finite - mean * mean, 0.0)),
            "activation_min": least,
            "activation_max": greatest,
            "activation_nonfinite": x[:, NONFINITE] * here,
            "saturated": x[:, OUTSIDE] / count,
        }
    if what == "signal":
        return {"signal": norm / np.sqrt(finite) / scale}
    return {}


# -- activations ----------------------------------------------------------------------------------

#: Between which outputs the slope of an activation is at least 1 % of its largest.
_STEEP: dict[str, tuple[float, float]] = {
    "tanh": (-math.sqrt(0.99), math.sqrt(0.99)),
    "sigmoid": (0.5 - math.sqrt(0.2475), 0.5 + math.sqrt(0.2475)),
    "softsign": (-0.9, 0.9),
    "hardsigmoid": (0.0, 1.0),
    "relu6": (-math.inf, 6.0),
}

#: Activations whose output is 0 over a range of inputs.
_DIES = frozenset(("relu", "relu6", "hardswish", "threshold", "hardshrink", "softshrink"))


def _activation(module: Any, y: Tensor) -> tuple[float, float, bool]:
    """Between which outputs a layer is not saturated, and whether its units can die."""
    name = type(module).__name__.lower()
    if name == "hardtanh":
        return float(module.min_val), float(module.max_val), False
    if name not in _STEEP and name not in _DIES:
        name = str(getattr(module, "nonlinearity", ""))
        made = getattr(y._node, "primitive", None)
        if not name and made is not None:
            # An activation that its layer computes along with it, or the function by itself.
            name = str(y._node.parameters().get("activation") or made.name)
    return (*_STEEP.get(name, (-math.inf, math.inf)), name in _DIES)


def _as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def _first_tensor(out: Any) -> Tensor | None:
    """The tensor that a layer returns, or the first of several."""
    if isinstance(out, Tensor):
        return out
    if isinstance(out, dict):
        out = tuple(out.values())
    if isinstance(out, tuple | list):
        return next((y for x in out if (y := _first_tensor(x)) is not None), None)
    return None
