"""What a record means: healthy or not, why, where, since when, and what helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpugrad.health.errors import HealthError
from gpugrad.health.findings import SHOWN, Finding, Verdict, finding
from gpugrad.health.record import Record
from gpugrad.health.remedies import REMEDIES

__all__ = ["judge"]

#: Beyond this factor between the first layer's gradient and the last one's, nothing trains.
EXTREME = 1e6
#: From these factors on an optimiser of the Adam family begins to fail.
GROWN, SHRUNK = 1e3, 3e-5
#: A factor by which activations may grow from the first layer to the last.
SWOLLEN = 3e3
#: Shares of a layer's units that are dead, and of its outputs that are saturated.
DEAD, SATURATED = 0.9, 0.9
#: A clip coefficient below which hardly anything is left of a gradient.
STARVED = 0.01
#: A loss has to fall to this share of its start, or of the best constant answer's, to have learnt.
LEARNT = 0.9
#: A loss is diverging from this many times its start, or its best, on.
RISEN = 2.0
#: A norm of all gradients that no bound is meant for.
LARGE = 100.0
#: Parameters that move by a smaller share of their norm in each step stand still.
STILL = 1e-5
#: Rows with a loss, from which on their mean tells whether a run has learnt.
FEW = 20
#: Of fewer rows the later half has to agree, and to be so many, this long after the start.
AGREE, EARLY = 3, 100
#: From this confidence on, a finding stands even if the net learns.
CERTAIN = 0.95
#: What makes a net stop learning; if it learns all the same, it is no trouble.
CAUSES = frozenset(("exploding", "vanishing"))
#: The figures of a gradient that goes through time are those of a random one. That of the loss may
#: fare better or worse by this factor, so what is certain of it begins so much farther out.
MARGIN = 10.0
#: The logarithm of what counts as infinite, and minus that of what counts as 0.
MOST = 700.0
#: What helps against vanishing and exploding through time; norms and short cuts go from layer to
#: layer.
_IN_TIME = ("gating", "open-gates", "initialise", "clip")
#: What long steps can make of a net that was sound.
_BY_TRAINING = frozenset(("exploding", "vanishing", "dead", "saturated"))

#: The smallest positive float32: what underflowed counts as this.
TINY = 1e-45

Floats = NDArray[np.floating[Any]]


def judge(
    record: Record, *, layers: Sequence[str] | None = None, chance: float | None = None
) -> Verdict:
    """Say whether a model is healthy, from what was recorded of it.

    What is judged is the state at the end, the last quarter of the recorded steps: a model whose
    trouble has passed is healthy. Gradients that were extreme at the start are told all the same,
    in a finding that says when they recovered. Works on a single row, and on thousands.

    Parameters
    ----------
    record:
        At least one row. HealthError for an empty one.
    layers:
        Look at these paths only.
    chance:
        The loss of the best constant answer, if it is known: a run that ends no better has not
        learnt anything. By default what the record says.

    >>> record = Record([f"{i}" for i in range(101)], ["Linear"] * 101)
    >>> record.append(1, {"gradient_norm": 1.1 ** np.arange(200, 99, -1)}, {"loss": 2.3})
    >>> judge(record).healthy
    False
    >>> print(judge(record).findings[0].text)
    exploding: gradients ×1.1 a layer over 100 layers = 1.4e+04 (first layer against last)
    """
    chance = record.chance if chance is None else chance
    found = suspicions(record, layers=layers, chance=chance)
    view = _View(record, layers, chance)
    for f in _through_time(view):
        # What explodes within a layer explodes from this layer to those behind it, too.
        same = [x for x in found if x.kind == f.kind == "exploding" and x.layer == f.layer]
        sure = max(x.confidence for x in [f, *same])
        found = [x for x in found if x not in same]
        found.append(replace(f, confidence=sure, remedies=_fitting(f, view, record.narrow)))
    if _has_learnt(record, chance):
        found = [f for f in found if f.confidence >= CERTAIN or f.kind not in CAUSES]
        found = [f for f in found if f.kind not in ("dead", "saturated")]
    in_time = list(_passed_in_time(view, found))
    told = {(f.kind, f.layer) for f in in_time}
    past = [f for f in _passed(view, found) if (f.kind, f.layer) not in told]
    return Verdict.of([*found, *in_time, *past], len(record), _unknown(view))


def _has_learnt(record: Record, chance: float | None) -> bool:
    """Whether the loss has come down over a run that is long enough to tell."""
    loss = record.scalars["loss"].astype(np.float64)
    loss = loss[np.isfinite(loss)]
    if len(loss) < FEW:
        return False
    start, end = float(np.median(loss[:2])), float(np.mean(loss[-max(2, len(loss) // 10) :]))
    return end < LEARNT * (start if chance is None else min(start, chance))


def suspicions(
    record: Record, *, layers: Sequence[str] | None = None, chance: float | None = None
) -> list[Finding]:
    """Everything that might be wrong from layer to layer; what `judge` chooses from."""
    if not len(record):
        raise HealthError(
            "judge: the record is empty; record a step first, or read a file that holds some"
        )
    view = _View(record, layers, chance)
    with np.errstate(all="ignore"):
        found = [f for look in _LOOKS for f in look(view)]
    return [replace(f, remedies=_fitting(f, view, record.narrow)) for f in found]


def _fitting(f: Finding, view: _View, narrow: bool | None) -> tuple[str, ...]:
    """The remedies of a finding that mean anything here, those first that its course points to."""
    found = [r for r in f.remedies if REMEDIES[r].fits(view.kinds)]
    if narrow is False:
        found = [r for r in found if r != "loss-scale"]
    first: list[str] = []
    if f.step is not None and f.step > view.steps[0] and f.kind in _BY_TRAINING:
        first = ["learning-rate", "clip"]  # the start was sound: long steps have made it so
    if f.kind == "clip-starved" and float(_recent(view.scalars["norm"])) > LARGE:
        first = ["initialise"]  # it is not the bound that is small
    if f.kind == "stalled":
        moved = [x for column in view["update_ratio"].T if (x := float(_recent(column))) == x]
        still = bool(moved) and max(moved) < STILL
        found = [r for r in found if still or r != "longer-steps"]
        first = ["longer-steps"] if still else []
    return tuple(dict.fromkeys((*first, *found)))


def profile_findings(
    values: Floats,
    names: Sequence[str],
    *,
    what: str = "gradients",
    unit: str = "layer",
    steps: Sequence[int] | None = None,
) -> list[Finding]:
    """Whether a profile, [rows, places] in forward order, explodes or vanishes on its way back.

    `what` and `unit` name in the text what is looked at, and what one place is.
    """
    now = np.array([_recent(column) for column in values.T])
    places = np.flatnonzero(np.isfinite(now))
    alive = np.flatnonzero(np.isfinite(now) & (now > 0))
    if len(places) < 2 or not alive.size or places[0] == alive[-1]:
        return []
    first, last = int(places[0]), int(alive[-1])
    ratio = np.maximum(values[:, first], TINY) / values[:, last]
    ratio = np.where(np.isfinite(ratio), ratio, np.nan)
    found = []
    final = max(float(_recent(ratio)), TINY)
    many = last - first
    # What underflowed to 0 tells nothing about the growth; the layers behind it do.
    seen = int(alive[0])
    growth = float((now[seen] / now[last]) ** (1 / (last - seen))) if seen < last else None
    for kind, begins, certain in (
        ("exploding", GROWN, EXTREME),
        ("vanishing", SHRUNK, 1 / EXTREME),
    ):
        sure = _between(math.log(final), math.log(begins), math.log(certain))
        if not sure:
            continue
        text = f"{kind}: {what} are 0 in all {unit}s before {names[last]}"
        if growth is not None:
            text = (
                f"{kind}: {what} ×{growth:.3g} a {unit} over {many} {unit}s = {final:.2g} "
                f"(first {unit} against last)"
            )
        off = ratio > begins if begins > 1 else ratio < begins
        found.append(finding(kind, sure, text, names[first], _since(off, steps), growth))
    return found


# -- one look for each kind ------------------------------------------------------------------------


class _View:
    """The part of a record that is looked at, with what all looks need."""

    def __init__(self, record: Record, layers: Sequence[str] | None, chance: float | None) -> None:
        wanted = range(len(record.layers))
        if layers is not None:
            index = {path: i for i, path in enumerate(record.layers)}
            unknown = [path for path in layers if path not in index]
            if unknown:
                raise HealthError(
                    f"judge: the record has no layer {unknown[0]!r}; it has {record.layers[:5]} …"
                )
            wanted = sorted(index[path] for path in layers)  # type: ignore[assignment]
        self.chosen = np.array(wanted, dtype=np.intp)
        self.names = [record.layers[i] for i in self.chosen]
        self.kinds = [record.kinds[i] for i in self.chosen]
        self.steps = record.steps
        self._values = record.values
        self.scalars = {name: x.astype(np.float64) for name, x in record.scalars.items()}
        self.chance = chance
        self.frozen = np.isin(self.names, record.frozen)

    def __getitem__(self, statistic: str) -> Floats:
        """A statistic as [rows, layers], in float64."""
        return self._values[statistic][:, self.chosen].astype(np.float64)

    def weighted(self) -> NDArray[np.intp]:
        """The layers whose parameters are weights: not scales, nor slopes of activations."""
        weighted = np.array([is_weighted(kind) for kind in self.kinds], np.bool_)
        return np.flatnonzero(weighted & ~np.isnan(self["gradient_norm"]).all(axis=0))


def is_weighted(kind: str) -> bool:
    """Whether layers of a class have weights, and not only scales, or slopes of activations."""
    return "Norm" not in kind and kind != "PReLU"


def _nonfinite(view: _View) -> list[Finding]:
    forward = view["activation_nonfinite"] > 0
    backward = (view["gradient_nonfinite"] > 0) | np.isinf(view["gradient_norm"])
    loss = ~np.isfinite(view.scalars["loss"]) & _known_from(view.scalars["loss"])
    bad = forward.any(axis=1) | backward.any(axis=1) | loss
    if not bad[-max(1, len(bad) // 4) :].any():  # a skipped step now and then is a loss scale's way
        return []
    row = int(np.flatnonzero(bad)[0])
    layer, what = None, "the loss is not finite"
    if forward[row].any():
        i = int(np.flatnonzero(forward[row])[0])
        layer, what = view.names[i], f"the output of {view.kinds[i]} is not finite"
    elif backward[row].any():
        i = int(np.flatnonzero(backward[row])[-1])  # the backward pass meets the last layer first
        layer, what = view.names[i], f"the gradient of {view.kinds[i]} is not finite"
    start = " from the first step on" if row == 0 else ""
    text = f"non-finite: {what}{start}"
    return [finding("non-finite", 1.0, text, layer, int(view.steps[row]))]


def _growth(view: _View) -> list[Finding]:
    weighted = view.weighted()
    gradients = view["gradient_norm"][:, weighted]
    names = [view.names[i] for i in weighted]
    found = profile_findings(gradients, names, steps=view.steps.tolist()) if len(names) > 1 else []
    # Signals that swell on their way forward, such as through residual sums, leave the ratio of
    # gradients alone: the last layer's is as large as its inputs.
    size = np.hypot(view["activation_mean"], view["activation_std"])[:, weighted]
    places = np.flatnonzero(np.isfinite(size[-1]) & (size[-1] > 0))
    if len(places) > 1 and not any(f.kind == "exploding" and f.confidence >= SHOWN for f in found):
        ratio = size[:, places[-1]] / size[:, places[0]]
        many = int(places[-1] - places[0])
        final = float(_recent(ratio))
        sure = _between(math.log(final), math.log(SWOLLEN), math.log(EXTREME)) if final > 0 else 0
        if sure:
            sure = min(sure, 0.94)  # how far they may go depends on the last layer: never certain
            growth = final ** (1 / many)
            text = (
                f"exploding: activations ×{growth:.3g} a layer over {many} layers = {final:.2g} "
                "(last layer against first)"
            )
            since = _since(ratio > SWOLLEN, view.steps.tolist())
            found.append(finding("exploding", sure, text, names[places[-1]], since, growth))
    return found


def _passed(view: _View, found: Sequence[Finding]) -> list[Finding]:
    """What was extreme in the first row, and no longer is in the last; `found` is what still is."""
    weighted = view.weighted()
    gradients = view["gradient_norm"][:, weighted]
    known = np.flatnonzero(np.isfinite(gradients[0]))
    if len(known) < 2:
        return []
    names = [view.names[i] for i in weighted]
    with np.errstate(all="ignore"):
        ratio = np.maximum(gradients[:, known[0]], TINY) / gradients[:, known[-1]]
    lasting = {f.kind for f in found if f.confidence >= SHOWN}
    past = []
    for f in profile_findings(gradients[:1], names, steps=view.steps[:1].tolist()):
        off = ratio > EXTREME if f.kind == "exploding" else ratio < 1 / EXTREME
        end = int(np.flatnonzero(off)[-1]) + 1 if off.any() else len(off)
        if f.confidence < CERTAIN or f.kind in lasting or end == len(off):
            continue
        past.append(_recovered(f, int(view.steps[end])))
    return past


def _over_time(view: _View) -> list[tuple[str, float, float, Floats, Floats, Floats]]:
    """What time does to gradients of each layer, [rows, layers].

    A kind; the logarithms of the factors from which on it is trouble, and certain; those of the
    factors that were seen, over all steps and of a single one; and how many steps these are.
    """
    away, steps = view["time_away"], view["time_steps"]
    with np.errstate(all="ignore"):
        each = np.clip(np.log(view["time_growth"]), -MOST, MOST)
    each = np.where(np.isnan(away), np.nan, each)  # the loss does not depend on the others
    # Of recurrent layers above each other, one that remembers is enough.
    best = np.where(np.isnan(each), -MOST, each).max(axis=1, initial=-MOST, keepdims=True)
    best = np.where(np.isnan(each), np.nan, best)
    certain = math.log(MARGIN * EXTREME)
    return [
        (kind, math.log(begins), sure, rate * many, rate, many)
        for kind, begins, sure, rate, many in (
            ("exploding", GROWN, certain, each, steps),
            ("vanishing", SHRUNK, -certain, best, away),
        )
    ]


def _through_time(view: _View, rows: slice = slice(None)) -> list[Finding]:
    """Whether what goes back through time explodes, or vanishes on its way to the first steps.

    Where the loss uses the outputs of all steps, its gradient is at the first ones in any case, and
    a short memory is no fault: not every task takes a long one. What explodes is, but training may
    cope with it.
    """
    found = []
    for kind, begins, certain, total, rate, many in _over_time(view):
        now = [float(_recent(column)) for column in total[rows].T]
        known = [i for i, x in enumerate(now) if x == x]
        if not known:
            continue
        i = max(known, key=lambda i: now[i] * math.copysign(1, begins))
        sure = _between(now[i], begins, certain)
        if not sure:
            continue
        if kind == "exploding" and not _recent(view["time_away"][rows, i]):
            sure = min(sure, 0.94)
        growth, steps = _exp(float(_recent(rate[rows, i]))), _recent(many[rows, i])
        text = (
            f"{kind} through time: gradients ×{growth:.3g} a time step over {steps:.0f} time steps "
            f"= {_exp(now[i]):.2g} (first time step against last)"
        )
        off = total[rows, i] * math.copysign(1, begins) > abs(begins)
        since = _since(off, view.steps[rows].tolist())
        f = finding(kind, sure, text, view.names[i], since, growth)
        found.append(replace(f, remedies=tuple(r for r in _IN_TIME if r in f.remedies)))
    return found


def _passed_in_time(view: _View, found: Sequence[Finding]) -> Iterator[Finding]:
    """What was extreme through time in the first row, and no longer is in the last."""
    lasting = {f.kind for f in found if f.confidence >= SHOWN}
    totals = {kind: total * math.copysign(1, begins) for kind, begins, _, total, *_ in
              _over_time(view)}  # fmt: skip
    for f in _through_time(view, slice(1)):
        off = totals[f.kind][:, view.names.index(f.layer or "")] > math.log(EXTREME)
        end = int(np.flatnonzero(off)[-1]) + 1 if off.any() else len(off)
        if f.confidence >= CERTAIN and f.kind not in lasting and end < len(off):
            yield _recovered(f, int(view.steps[end]))


def _recovered(f: Finding, until: int) -> Finding:
    text = f.text.replace(":", " at the start:", 1) + f"; recovered at step {until}"
    return replace(f, text=text, remedies=(), until=until)


def _exp(x: float) -> float:
    """e to the power of x, 0 and infinity for what is hardly a number any more."""
    return math.exp(x) if abs(x) < MOST else math.inf if x > 0 else 0.0


def _dead(view: _View) -> list[Finding]:
    return _share(view, "dead", DEAD, "of the units give 0 for the whole batch")


def _saturated(view: _View) -> list[Finding]:
    return _share(view, "saturated", SATURATED, "of the outputs are where the activation is flat")


def _share(view: _View, statistic: str, bound: float, text: str) -> list[Finding]:
    shares = view[statistic]
    now = np.array([_recent(column) for column in shares.T])
    over = np.flatnonzero(now >= bound)
    if not over.size:
        return []
    i = int(over[np.argmax(now[over])])
    others = f", and so in {len(over) - 1} more layers" if len(over) > 1 else ""
    text = f"{statistic}: {now[i]:.0%} {text} in {view.kinds[i]}{others}"
    since = _since(shares[:, i] >= bound, view.steps.tolist())
    return [finding(statistic, 0.6 + 0.4 * (now[i] - bound) / (1 - bound), text,
                     view.names[i], since)]  # fmt: skip


def _not_reached(view: _View) -> list[Finding]:
    gradients = view["gradient_norm"]
    owns = ~np.isnan(view["parameter_norm"]).all(axis=0)
    if owns.any() and view.frozen[owns].all():
        text = "not reached: all layers with parameters are frozen; there is nothing to train"
        return [finding("not reached", 1.0, text, None, int(view.steps[0]))]
    owns &= ~view.frozen
    without = np.flatnonzero(owns & np.isnan(gradients).all(axis=0))
    if not without.size:
        return []
    names = ", ".join(view.names[i] for i in without[:3]) + " …" * (len(without) > 3)
    if len(without) == owns.sum():
        text = "not reached: no layer got a gradient; is there a backward pass, is all detached?"
    else:
        text = (
            f"not reached: {len(without)} of {owns.sum()} layers with parameters got no gradient "
            f"({names}); the loss does not depend on them, or they are cut off by detach()"
        )
    return [finding("not reached", 0.9, text, view.names[without[0]], int(view.steps[0]))]


def _starved(view: _View) -> list[Finding]:
    coefficient = view.scalars["coefficient"]
    if np.isnan(coefficient).all() or len(coefficient) < 3:
        return []
    now = float(_recent(coefficient))
    if not now < STARVED:
        return []
    norm = float(_recent(view.scalars["norm"]))
    of = f": gradients of norm {norm:.3g} are cut to {norm * now:.3g}" if norm == norm else ""
    text = f"clip-starved: the clip coefficient fell to {now:.2g}{of}"
    since = _since(coefficient < STARVED, view.steps.tolist())
    return [finding("clip-starved", 0.9, text, None, since)]


def _loss(view: _View) -> list[Finding]:
    """Whether the loss rises, or does not fall."""
    loss = view.scalars["loss"]
    finite = np.flatnonzero(np.isfinite(loss))
    if len(finite) < 4:
        return []
    loss, steps = loss[finite], view.steps[finite]
    part = max(2, len(loss) // 10)
    start, end = float(np.median(loss[:part])), float(np.mean(loss[-part:]))
    smooth = np.convolve(loss, np.full(part, 1 / part), "valid")
    best = float(smooth.min())
    span = abs(start) + abs(best)
    if end > start + (RISEN - 1) * abs(start) or (
        end > best + (RISEN - 1) * max(abs(best), 0.1 * span) and end > start
    ):
        since = int(steps[int(np.argmin(smooth))])
        text = f"diverging: the loss rose from {best:.3g} to {end:.3g}"
        return [finding("diverging", 0.9, text, None, since)]
    sure, of = 1.0, ""
    if len(loss) < FEW:
        # A mean of few would tell little: the later half is asked one by one, and must not fall.
        later = loss[(len(loss) + 1) // 2 :]
        if len(later) < AGREE or steps[-1] < EARLY or _falls(later):
            return []
        end, sure = float(later.min()), (len(later) + 1) / (len(later) + 2)  # Laplace, as above
        of = f" at best in {len(later)} rows"
    if view.chance is not None and end > LEARNT * view.chance:
        text = (
            f"stalled: after {steps[-1]} steps the loss is {end:.4g}{of}, and the best constant "
            f"answer has {view.chance:.4g}"
        )
        return [finding("stalled", min(0.9, sure), text, None, int(steps[0]))]
    if view.chance is None and end > start - 0.03 * abs(start):
        text = f"stalled: the loss is {end:.4g}{of} after {steps[-1]} steps, and was {start:.4g}"
        return [finding("stalled", min(0.8, sure), text, None, int(steps[0]))]
    return []


def _falls(loss: Floats) -> bool:
    """Whether the later half of some losses lies below the earlier one."""
    half = len(loss) // 2
    return _below(float(loss[-half:].mean()), float(loss[:half].mean()))


def _below(loss: float, bar: float) -> bool:
    """Whether a loss, which may be negative, is clearly below another."""
    return loss < bar - (1 - LEARNT) * abs(bar)


def _unknown(view: _View) -> str:
    """Why the losses do not tell whether the net learns; "" if they do."""
    finite = np.flatnonzero(np.isfinite(view.scalars["loss"]))
    loss = view.scalars["loss"][finite]
    if not len(loss):
        return "whether it learns is not known, for no loss was recorded"
    if len(loss) >= FEW:
        return ""
    bar = min(loss[:2].min(), math.inf if view.chance is None else view.chance)
    if len(loss) >= 4 and _below(loss[-2:].max(), bar):
        return ""
    many = "one loss does" if len(loss) == 1 else f"{len(loss)} losses do"
    return f"{many} not tell whether it learns (the last is of step {view.steps[finite[-1]]})"


_LOOKS: tuple[Callable[[_View], list[Finding]], ...] = (
    _nonfinite, _growth, _dead, _saturated, _not_reached, _starved, _loss,
)  # fmt: skip


# -- helpers ---------------------------------------------------------------------------------------


def _between(x: float, begins: float, certain: float) -> float:
    """Confidence: 0.5 where trouble begins, 0.95 where it is certain, less before."""
    return min(1.0, max(0.0, 0.5 + 0.45 * (x - begins) / (certain - begins)))


def _recent(x: Floats) -> Any:
    """The median of the last quarter of what is known."""
    known = x[~np.isnan(x)]
    return np.median(known[-max(1, len(known) // 4) :]) if known.size else math.nan


def _since(off: NDArray[np.bool_], steps: Sequence[int] | None) -> int | None:
    """The step from which on it was so, most of the time."""
    if steps is None:
        return None
    share = np.cumsum(off[::-1])[::-1] / np.arange(len(off), 0, -1)
    rows = np.flatnonzero(off & (share >= 0.8))
    return int(steps[int(rows[0])]) if rows.size else int(steps[-1])


def _known_from(x: Floats) -> NDArray[np.bool_]:
    """Where a scalar is known: NaN before the first number, or throughout, is not known."""
    numbers = np.flatnonzero(~np.isnan(x))
    known = np.zeros(len(x), np.bool_)
    if numbers.size:
        known[numbers[0] :] = True
    return known
