"""Layer by layer: the measured gain of gradients beside the one that mean-field theory predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpugrad import nn
from gpugrad.health.probe import layers_of
from gpugrad.health.record import Record
from gpugrad.health.surgery import ELEMENTWISE, WEIGHTED
from gpugrad.health.theory import MeanField, length_map, mean_field, sigmas, slope_moment
from gpugrad.nn.module import Module

__all__ = ["Group", "MeanFieldOfNet", "describe", "predict"]

#: Lines of the table of layers before what lies in the middle is left out.
LINES = 10


@dataclass(frozen=True)
class Group:
    """A layer with weights and what follows it, up to the next one.

    Attributes
    ----------
    path, kinds:
        Of its first layer, and class names of all, joined by +.
    size:
        Root mean square of its output.
    signal:
        Root mean square of dLoss/d(its output).
    gradient:
        Norm of the gradients of its weights.
    gain:
        Measured factor on the signal on its way back through the group; NaN if it is the first.
    predicted:
        What mean-field theory says the gain is; NaN where it does not apply.
    sigma_w, sigma_b:
        Scale of the group's weights and biases; NaN where not known.
    """

    path: str
    kinds: str
    size: float
    signal: float
    gradient: float
    gain: float = math.nan
    predicted: float = math.nan
    sigma_w: float = math.nan
    sigma_b: float = math.nan

    def as_dict(self) -> dict[str, Any]:
        """The group as JSON has it."""
        return dict(vars(self))


@dataclass(frozen=True)
class MeanFieldOfNet:
    """Mean-field theory with the mean σ_w and σ_b of a net's plain layers.

    Attributes
    ----------
    activation:
        Their class name.
    layers:
        How many there are.
    field:
        What the theory says about infinitely many of them.
    measured:
        The geometric mean of the gains that were measured.
    """

    activation: str
    layers: int
    field: MeanField
    measured: float

    def as_dict(self) -> dict[str, Any]:
        """The theory as JSON has it."""
        return {
            "activation": self.activation,
            "layers": self.layers,
            "gain": self.field.gain,
            "measured": self.measured,
            **vars(self.field),
        }

    def __str__(self) -> str:
        return (
            f"mean-field theory of {self.layers} {self.activation} layers, {self.field}; measured "
            f"×{self.measured:.4g} a layer"
        )


def predict(model: Module, record: Record) -> tuple[tuple[Group, ...], MeanFieldOfNet | None]:
    """The groups of a record's first row, and the theory of the activation that most have."""
    modules = {x.path: x.module for x in layers_of(model)}
    parents = {
        id(child): parent
        for parent in model.modules()
        if isinstance(parent, nn.Sequential)
        for child in parent.children()
    }
    row = {name: x[0].astype(np.float64) for name, x in record.values.items()}
    starts = [i for i, path in enumerate(record.layers) if isinstance(modules[path], WEIGHTED)]
    groups: list[Group] = []
    plain: list[tuple[Group, Module]] = []
    square = math.nan  # of the outputs of the group before, as the theory has it
    before: Module | None = None  # the Sequential that it is in
    for start, end in zip(starts, [*starts[1:], len(record.layers)]):
        members = [modules[path] for path in record.layers[start:end]]
        parent = parents.get(id(members[0]))
        if parent is None or parent is not before:
            square = _measured_square(row, start - 1) if start else math.nan
        sigma_w, sigma_b = sigmas(*_host(members[0]))
        last = groups[-1].signal if groups else math.nan
        signal, size = row["signal"][end - 1], _rms(row, end - 1)
        gain = last / signal if groups and signal else math.nan
        together = all(parents.get(id(m)) is parent for m in members) and parent is not None
        predicted, square = _predicted(members, square, sigma_w, sigma_b) if together else (
            math.nan, math.nan)  # fmt: skip
        if parent is not before:
            predicted = math.nan  # what lies between the two is not known
        group = Group(
            record.layers[start], "+".join(record.kinds[start:end]), size, signal,
            row["gradient_norm"][start], gain, predicted, sigma_w, sigma_b,
        )  # fmt: skip
        groups.append(group)
        if (
            len(members) == 2
            and isinstance(members[1], ELEMENTWISE)
            and together
            and (parent is before or start == 0)
        ):
            plain.append((group, members[1]))
        before = parent
    return tuple(groups), _theory(plain)


def _host(layer: Any) -> tuple[Any, Any]:
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    return layer.weight.detach().numpy(), bias


def _rms(row: dict[str, Any], i: int) -> float:
    return math.hypot(row["activation_mean"][i], row["activation_std"][i])


def _measured_square(row: dict[str, Any], i: int) -> float:
    return _rms(row, i) ** 2


def _predicted(
    members: Sequence[Module], square: float, sigma_w: float, sigma_b: float
) -> tuple[float, float]:
    """The gain on the way back, and the mean square of the outputs, of one group."""
    layer: Any = members[0]
    rest = list(members[1:])
    q = sigma_w**2 * square + sigma_b**2
    if not math.isfinite(q) or q <= 0:
        q = sigma_w**2 + sigma_b**2  # inputs of size 1, if nothing is known
    shrunk = 1.0
    if rest and isinstance(rest[0], nn.LayerNorm | nn.RMSNorm):
        rest.pop(0)
        shrunk, q = q, 1.0
    if len(rest) > 1 or (rest and not isinstance(rest[0], ELEMENTWISE)) or q <= 0 or q > 1e30:
        return math.nan, math.nan
    weight = layer.weight
    outputs_per_input = weight.shape[0] / weight.shape[1]
    if not rest:
        return sigma_w * math.sqrt(outputs_per_input / shrunk), q
    slope = slope_moment(rest[0], q)
    gain = sigma_w * math.sqrt(outputs_per_input * slope / shrunk)
    return gain, length_map(rest[0], q, 1.0)


def _theory(plain: Sequence[tuple[Group, Module]]) -> MeanFieldOfNet | None:
    kinds = [type(activation).__name__ for _, activation in plain]
    if len(kinds) < 3:
        return None
    kind = max(set(kinds), key=kinds.count)
    chosen = [(g, a) for (g, a), k in zip(plain, kinds) if k == kind]
    gains = np.array([g.gain for g, _ in chosen])
    gains = gains[np.isfinite(gains) & (gains > 0)]
    # The mean of squares: it is variances that the theory is about.
    sigma_w = math.sqrt(np.mean([g.sigma_w**2 for g, _ in chosen[1:]]))
    sigma_b = math.sqrt(np.mean([g.sigma_b**2 for g, _ in chosen[1:]]))
    if len(chosen) < 3 or not gains.size or not 0 < sigma_w < 1e6:
        return None
    field = mean_field(chosen[0][1], sigma_w, sigma_b)
    return MeanFieldOfNet(kind, len(chosen), field, float(np.exp(np.log(gains).mean())))


def describe(groups: Sequence[Group]) -> str:
    """A table of the groups; long runs of like ones in a line."""
    head = ("layer", "kind", "output", "signal", "gradient", "gain", "theory")
    shown: list[tuple[str, ...]] = [head]
    half = LINES // 2
    cut = len(groups) > LINES + 1
    for i, g in enumerate(groups):
        if cut and half <= i < len(groups) - half:
            if i == half:
                middle = groups[half : len(groups) - half]
                shown.append((
                    f"… {len(middle)} more", "", "", "", "",
                    _number(_mean([x.gain for x in middle])),
                    _number(_mean([x.predicted for x in middle])),
                ))  # fmt: skip
            continue
        numbers = (g.size, g.signal, g.gradient, g.gain, g.predicted)
        shown.append((g.path, g.kinds, *map(_number, numbers)))
    widths = [max(len(row[i]) for row in shown) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in shown
    )


def _number(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:.3g}"


def _mean(values: Sequence[float]) -> float:
    """The geometric mean of what is known."""
    x = np.array([v for v in values if math.isfinite(v) and v > 0])
    return float(np.exp(np.log(x).mean())) if x.size else math.nan
