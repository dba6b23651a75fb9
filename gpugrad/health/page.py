"""A report on a run: one HTML file with everything in it, to be read in any browser."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpugrad.health.errors import HealthError, RecordError
from gpugrad.health.findings import Finding, Verdict
from gpugrad.health.page_charts import (
    Band,
    Guide,
    Line,
    Mark,
    chart,
    document,
    heat_map,
    number,
)
from gpugrad.health.page_thin import Columns
from gpugrad.health.record import Record
from gpugrad.health.remedies import REMEDIES
from gpugrad.health.verdict import judge

__all__ = ["HEADLINES", "read_record", "report"]

Array = NDArray[Any]

#: The file in a run's folder that holds its record.
RECORD = "health.jsonl"

#: Cells of a heat map at most, and its columns at least and at most.
CELLS, COLUMNS = 40_000, (60, 400)

#: Layers whose ranges are shown at once; the others wait until they are asked for.
SHOWN = 12

#: What a verdict is called in a headline, and how bad it is.
HEADLINES = {
    "healthy": ("Healthy", "good"),
    "exploding": ("Gradients explode", "bad"),
    "vanishing": ("Gradients vanish", "bad"),
    "non-finite": ("NaN or infinite numbers", "bad"),
    "diverging": ("Training diverges", "bad"),
    "stalled": ("Training does not get on", "warn"),
    "dead": ("Dead units", "warn"),
    "saturated": ("Saturated activations", "warn"),
    "clip-starved": ("Clipping starves the training", "warn"),
    "not reached": ("Layers that the loss does not reach", "warn"),
}

#: Title of a section, and what a reader has to know of it.
SECTIONS = {
    "loss": ("Loss", ""),
    "gradients": (
        "Gradient norm of every layer",
        "Each row is a layer, the first on top; each column shows the largest norm of its steps. "
        "The rows of a healthy net have like colours; where gradients explode or vanish, the "
        "colour changes from the bottom, where the loss is, to the top.",
    ),
    "signal": (
        "Backward signal by depth",
        "How large the gradient is that arrives at each layer's output. Every layer on the way "
        "back multiplies it by its weights and by the slope of its activation.",
    ),
    "clipping": (
        "Clipping",
        "The norm of all gradients before clipping, and the coefficient that they were then "
        "multiplied by: 1 where nothing was clipped.",
    ),
    "updates": (
        "Update ratio",
        "How far a step moves the parameters of a layer, relative to their norm. Around 0.001 is "
        "usual; far above, training is unsteady; far below, the layer hardly learns.",
    ),
    "values": (
        "Ranges of the layers' values",
        "What each layer puts out over the training: least and greatest, mean and standard "
        "deviation.",
    ),
    "parameters": (
        "Ranges of the parameters",
        "Least and greatest parameter of each layer over the training.",
    ),
    "units": (
        "Saturated and dead units",
        "Where an activation is flat, no gradient passes. Saturated: the share of outputs whose "
        "slope is below 1 % of the largest. Dead: the share of units that put out 0 for a whole "
        "batch.",
    ),
    "layers": ("Layers", "Medians over the recorded steps, where not said otherwise."),
}

_ICONS = {
    "good": '<circle cx="12" cy="12" r="10"/><path d="M7 12.5l3.5 3.5L17 9"/>',
    "warn": '<path d="M12 2.5L22.5 21h-21z"/><path d="M12 9v5.5M12 17.5v.5"/>',
    "bad": '<path d="M8 2h8l6 6v8l-6 6H8l-6-6V8z"/><path d="M8.5 8.5l7 7m0-7l-7 7"/>',
}


def report(
    record: Record | str | os.PathLike[str],
    out: str | os.PathLike[str] = "health.html",
    *,
    title: str | None = None,
    verdict: Verdict | None = None,
) -> Path:
    """Write a report on a run as one HTML file, and return its path.

    The verdict stands on top; below are the loss, the gradient norm of every layer and the backward
    signal, clipping, update ratios, the ranges of values and parameters, saturated and dead units,
    and a table of the layers. The file needs no network, follows the reader's light or dark mode,
    and can be printed. Of many steps it shows the extremes, and so stays small.

    Parameters
    ----------
    record:
        A :class:`Record`, a file that one was written to, or the folder of a run in which
        `health.jsonl` lies. The run may have been killed.
    out:
        The file to write.
    title:
        Heading of the page; by default the name of the folder or file.
    verdict:
        What is said on top, if not what :func:`gpugrad.health.judge` says of the record.

    Raises RecordError when there is no record, and HealthError when the file cannot be written.

    >>> import tempfile
    >>> record = Record(["0", "1"], ["Linear", "Tanh"])
    >>> record.append(1, {"gradient_norm": [0.5, float("nan")]}, {"loss": 2.0})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = report(record, folder + "/health.html").read_text(encoding="utf-8")
    >>> page[:15]
    '<!DOCTYPE html>'
    """
    if not isinstance(record, Record):
        path = Path(record)
        title = title or (path.resolve().name if path.is_dir() else path.stem)
        record = read_record(path)
    if verdict is None and len(record):
        verdict = judge(record)
    text = _Report(record, verdict, title or "a run").text()
    path = Path(out)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise HealthError(f"{path} could not be written: {error.strerror or error}") from error
    return path


def read_record(path: str | os.PathLike[str]) -> Record:
    """The record in a file, or in the folder of a run; RecordError when there is none."""
    path = Path(path)
    file = path / RECORD if path.is_dir() else path
    try:
        return Record.load(file)
    except FileNotFoundError:
        raise RecordError(
            f"{file}: there is no such file; train with --health, or give Monitor a path="
        ) from None
    except OSError as error:
        raise RecordError(f"{file}: cannot be read: {error.strerror or error}") from error


class _Report:
    """The pieces of one page."""

    def __init__(self, record: Record, verdict: Verdict | None, title: str) -> None:
        self.record = record
        self.findings = () if verdict is None else verdict.findings
        self.title = title
        self.values = record.values
        self.scalars = record.scalars
        self.names = [f"{a} {b}".strip() for a, b in zip(record.layers, record.kinds)]
        many = max(1, len(self.names))
        if len(record):
            fewest, most = COLUMNS
            self.wide = Columns.of(record.steps, min(most, max(fewest, CELLS // many)))
            self.narrow = Columns.of(record.steps, max(40, min(240, 4000 // many)))

    def text(self) -> str:
        title = f"Gradient health of {self.title}"
        head = f"<header><h1>{escape(title)}</h1>{self._about()}</header>{self._verdict()}"
        if not len(self.record):
            return document(title, f'{head}<p class="none">No step was recorded.</p>')
        bodies = {
            "loss": self._loss,
            "gradients": self._gradients,
            "signal": self._signal,
            "clipping": self._clipping,
            "updates": self._updates,
            "values": lambda: self._ranges(self._value_range),
            "parameters": lambda: self._ranges(self._parameter_range),
            "units": self._units,
            "layers": self._table,
        }
        sections = [_section(name, *SECTIONS[name], body()) for name, body in bodies.items()]
        return document(title, "\n".join((head, self._facts(), *sections)))

    # -- the head ---------------------------------------------------------------------------------

    def _about(self) -> str:
        n = len(self.record)
        if not n:
            return ""
        first, last = self.record.steps[[0, -1]].tolist()
        return (
            f'<p class="about">{n:,} recorded {"step" if n == 1 else "steps"}, from {first:,} to '
            f"{last:,}; {len(self.names):,} {'layer' if len(self.names) == 1 else 'layers'}</p>"
        )

    def _verdict(self) -> str:
        kind = self.findings[0].kind if self.findings else "nothing was recorded"
        headline, tone = HEADLINES.get(kind, (kind.capitalize(), "warn"))
        icon = (
            '<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="2" '
            'stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">'
            f"{_ICONS[tone]}</svg>"
        )
        found = "".join(f"<li>{_finding(f)}</li>" for f in self.findings)
        return (
            f'<div class="verdict {tone}" id="verdict"><p class="head">{icon}'
            f"<span>{escape(headline)}</span></p><ul>{found}</ul></div>"
        )

    def _facts(self) -> str:
        loss = self.scalars["loss"]
        known = loss[np.isfinite(loss)]
        norm, coefficient = self.scalars["norm"], self.scalars["coefficient"]
        facts = [("loss, first → last", f"{number(known[0])} → {number(known[-1])}")
                 if known.size else ("loss", "not recorded")]  # fmt: skip
        if known.size and not np.isfinite(loss[-1]):
            facts[0] = ("loss, first → last", f"{number(known[0])} → not finite")
        if np.isfinite(norm).any():
            facts.append(("gradient norm, median", number(_median(norm))))
        if (used := coefficient[~np.isnan(coefficient)]).size:
            facts.append(("clipped steps", f"{100 * float((used < 1).mean()):.0f} %"))
        growth = self._growth(-1)
        if growth is not None:
            facts.append(("signal, a layer back", f"×{number(growth[0])}"))
        ratios = self.values["update_ratio"]
        if np.isfinite(ratios).any():
            facts.append(("update ratio, median", number(_median(ratios))))
        broken = np.nansum(self.values["gradient_nonfinite"], axis=1) > 0
        if broken.any():
            facts.append(("NaN or infinity from step", f"{self.record.steps[broken.argmax()]:,}"))
        pairs = "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd></div>" for a, b in facts)
        return f'<dl class="facts">{pairs}</dl>'

    # -- over the steps ---------------------------------------------------------------------------

    def _gradients(self) -> str:
        label = "L2 norm of the gradient of the layer's parameters"
        return self._heat("gradient_norm", label, flags="gradient_nonfinite")

    def _loss(self) -> str:
        loss = self.scalars["loss"]
        known = np.isfinite(loss)
        if not known.any():
            return ""
        # Losses that fall through decades are read on a logarithmic scale.
        finite = loss[known]
        log = bool(finite.min() > 0 and finite.max() > 50 * finite.min())
        said = ""
        if not known[-1]:
            last = int(self.record.steps[known][-1])
            said = f"<p><strong>After step {last:,} the loss is no finite number.</strong></p>"
        return said + chart([Line("loss", self.record.steps, loss)], label="loss", log=log)

    def _heat(self, name: str, label: str, flags: str | None = None, log: bool = True) -> str:
        values = self.values[name]
        broken = self.values[flags] > 0 if flags else np.zeros_like(values, bool)
        rows = np.flatnonzero((~np.isnan(values) | broken).any(0))
        if not rows.size:
            return ""
        return heat_map(
            self.wide.greatest(values[:, rows]),
            [self.names[i] for i in rows],
            self.wide,
            label=label,
            not_finite=self.wide.any(broken[:, rows]),
            log=log,
        )

    def _clipping(self) -> str:
        steps = self.record.steps
        norm, coefficient = self.scalars["norm"], self.scalars["coefficient"]
        parts = []
        if np.isfinite(norm).any():
            parts.append(chart([Line("norm before clipping", steps, norm, 2)],
                               label="gradient norm before clipping", log=True))  # fmt: skip
        used = coefficient[~np.isnan(coefficient)]
        if used.size:
            log = bool(np.nanmin(used) > 0 and np.nanmin(used) < 0.02)
            marks: list[Mark] = [Line("coefficient", steps, coefficient, 4), Guide("", 1.0)]
            parts.append(
                f"<p>{100 * float((used < 1).mean()):.0f} % of the recorded steps were clipped; "
                f"the least coefficient is {number(used.min())}.</p>"
                + chart(marks, label="clip coefficient", log=log, height=140)
            )
        elif parts:
            parts.append('<p class="none">No gradient was clipped.</p>')
        return "".join(parts)

    def _updates(self) -> str:
        ratios = self.values["update_ratio"]
        known = np.isfinite(ratios) & (ratios > 0)
        if not known.any():
            return ""
        columns = self.wide
        x = (columns.edges[:-1] + columns.edges[1:] - 1) / 2
        middle = np.full(len(ratios), np.nan)
        rows = known.any(1)
        middle[rows] = _medians(np.where(known, ratios, np.nan)[rows], axis=1)
        ratios = np.where(known, ratios, np.nan)
        marks: list[Mark] = [
            Band("least to greatest layer", x, columns.least(np.fmin.reduce(ratios, axis=1)),
                 columns.greatest(np.fmax.reduce(ratios, axis=1)), 3),
            Line("median layer", x, columns.mean(middle), 3),
            Guide("0.001", 1e-3),
        ]  # fmt: skip
        return chart(marks, label="|change| / |parameters|", log=True) + self._heat(
            "update_ratio", "update ratio of the layer"
        )

    # -- over the layers --------------------------------------------------------------------------

    def _weighted(self) -> Array:
        """Which layers have parameters; all of them where that is not known."""
        found = (~np.isnan(self.values["parameter_norm"])).any(0)
        return np.asarray(found if found.any() else ~found)

    def _growth(self, row: int) -> tuple[float, int, int, float, float] | None:
        """Factor a layer on the way back, how many, the step, signal at both ends; of a row."""
        signal = self.values["signal"]
        rows = np.flatnonzero((np.isfinite(signal) & (signal > 0)).any(1))
        if not rows.size:
            return None
        at = int(rows[row])
        found = signal[at][self._weighted()].astype(np.float64)
        found = found[np.isfinite(found) & (found > 0)]
        if len(found) < 2:
            return None
        factor = float(np.exp((np.log(found[0]) - np.log(found[-1])) / (len(found) - 1)))
        return factor, len(found), int(self.record.steps[at]), float(found[0]), float(found[-1])

    def _signal(self) -> str:
        signal = self.values["signal"]
        layers = np.flatnonzero(~np.isnan(signal).all(0))
        rows = np.flatnonzero((np.isfinite(signal) & (signal > 0)).any(1))
        if not rows.size:
            return ""
        said = []
        ends = [(0, "At first"), (-1, "In the end")]
        for row, when in ends[: len(rows)]:
            growth = self._growth(row)
            if growth is not None:
                factor, many, step, first, last = growth
                said.append(
                    f"{when} (step {step:,}) it is multiplied by "
                    f"<strong>×{number(factor)}&nbsp;a&nbsp;layer</strong> on the way back: from "
                    f"{number(last)} at the last of {many} "
                    f"layers with parameters to {number(first)} at the first, "
                    f"×{number(first / last)} in all."
                )
        chosen = rows[sorted({round(k * (len(rows) - 1) / 3) for k in range(4)})]
        x = np.arange(len(layers))
        marks: list[Mark] = [Line(f"step {self.record.steps[r]:,}", x, signal[r, layers], k)
                 for k, r in enumerate(chosen.tolist(), 1)]  # fmt: skip
        return "".join(f"<p>{s}</p>" for s in said) + chart(
            marks,
            label="root mean square of ∂loss/∂(output of the layer)",
            x_label="layer, from the input to the loss",
            x_names=[self.names[i] for i in layers],
            log=True,
        )

    def _ranges(self, one: Callable[[int], str]) -> str:
        found = [(i, text) for i in range(len(self.names)) if (text := one(i))]
        if not found:
            return ""
        open_ = self._chosen([i for i, _ in found])
        shown = [text for i, text in found if i in open_]
        hidden = [text for i, text in found if i not in open_]
        form = "many four" if len(found) <= 4 else "many"
        legend = ""
        if 'class="line' in shown[0]:
            legend = (
                '<ul class="legend"><li><i class="key band c1"></i>least to greatest</li><li>'
                '<i class="key band c2"></i>mean ± standard deviation</li><li>'
                '<i class="key line c2"></i>mean</li></ul>'
            )
        more = (
            f"<details><summary>The other {len(hidden)} layers</summary>"
            f'<div class="{form}">{"".join(hidden)}</div></details>'
            if hidden
            else ""
        )
        return f'{legend}<div class="{form}">{"".join(shown)}</div>{more}'

    def _chosen(self, layers: Sequence[int]) -> set[int]:
        """Layers to show at once: those that the verdict names, and others over the whole depth."""
        if len(layers) <= SHOWN:
            return set(layers)
        named = {f.layer for f in self.findings}
        found = [i for i in layers if self.record.layers[i] in named][: SHOWN // 2]
        left = SHOWN - len(found)
        spread = [layers[round(k * (len(layers) - 1) / (left - 1))] for k in range(left)]
        return {*found, *spread}

    def _value_range(self, i: int) -> str:
        low, high, mean, std = (
            self.values[f"activation_{name}"][:, i] for name in ("min", "max", "mean", "std")
        )
        if not (np.isfinite(low) & np.isfinite(high)).any():
            return ""
        c = self.narrow
        x = self._x(c)
        middle, spread = c.mean(mean), c.mean(std)
        marks: list[Mark] = [
            Band("least to greatest", x, c.least(low), c.greatest(high), 1),
            Band("mean ± std", x, middle - spread, middle + spread, 2),
            Line("mean", x, middle, 2),
        ]
        broken = self.values["activation_nonfinite"][:, i] > 0
        return self._small(i, marks, broken, "values")

    def _parameter_range(self, i: int) -> str:
        low, high = (self.values[f"parameter_{name}"][:, i] for name in ("min", "max"))
        if not (np.isfinite(low) & np.isfinite(high)).any():
            return ""
        c = self.narrow
        marks: list[Mark] = [
            Band("least to greatest", self._x(c), c.least(low), c.greatest(high), 3)
        ]
        broken = np.isinf(low) | np.isinf(high)
        return self._small(i, marks, broken, "parameters")

    def _x(self, columns: Columns) -> Array:
        x = np.rint((columns.edges[:-1] + columns.edges[1:] - 1) / 2).astype(np.int64)
        x[0], x[-1] = columns.first, columns.last
        return x

    def _small(self, i: int, marks: Sequence[Mark], broken: Array, what: str) -> str:
        kind = self.record.kinds[i]
        said = ""
        if broken.any():
            step = int(self.record.steps[broken.argmax()])
            said = f"<p><strong>NaN or infinite from step {step:,}</strong></p>"
        label = f"{what} of {self.names[i]}"
        return (
            f"<div><h3>{escape(self.record.layers[i])} <small>{escape(kind)}</small></h3>{said}"
            + chart(marks, label=label, height=110, small=True)
            + "</div>"
        )

    def _units(self) -> str:
        parts = (
            self._heat("saturated", "share of outputs that are saturated", log=False),
            self._heat("dead", "share of units that are dead", log=False),
        )
        return "".join(parts)

    def _table(self) -> str:
        v = self.values
        named: dict[str, list[str]] = {}
        for f in self.findings:
            if f.layer is not None and f.kind != "healthy":
                named.setdefault(f.layer, []).append(f.kind)
        # The norm that is recorded is that of the finite elements.
        norms = np.where(v["gradient_nonfinite"] > 0, np.inf, v["gradient_norm"])
        columns: list[tuple[str, Callable[[int], str]]] = [
            ("gradient norm", lambda i: _shown(_median(v["gradient_norm"][:, i]))),
            ("first → last", lambda i: _first_to_last(norms[:, i])),
            ("largest |g|", lambda i: _shown(_greatest(v["gradient_max"][:, i]))),
            ("backward signal", lambda i: _shown(_median(v["signal"][:, i]))),
            ("update ratio", lambda i: _shown(_median(v["update_ratio"][:, i]))),
            ("parameter norm", lambda i: _shown(_median(v["parameter_norm"][:, i]))),
            ("std of values", lambda i: _shown(_median(v["activation_std"][:, i]))),
            ("saturated", lambda i: _percent(_median(v["saturated"][:, i]))),
            ("dead", lambda i: _percent(_median(v["dead"][:, i]))),
            ("not finite", lambda i: _shown(_greatest(v["gradient_nonfinite"][:, i]))),
        ]
        head = "".join(f'<th scope="col">{escape(c)}</th>' for c, _ in columns)
        rows = []
        for i, (layer, kind) in enumerate(zip(self.record.layers, self.record.kinds)):
            cells = "".join(f"<td>{f(i)}</td>" for _, f in columns)
            found = escape(", ".join(dict.fromkeys(named.get(layer, []))))
            rows.append(
                f'<tr><th scope="row">{escape(layer)}</th><td>{escape(kind)}</td>'
                f'<td class="said">{found}</td>{cells}</tr>'
            )
        return (
            '<div class="wide" tabindex="0"><table><thead><tr><th scope="col">layer</th>'
            f'<th scope="col">kind</th><th scope="col">found</th>{head}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )


def _section(name: str, title: str, about: str, body: str) -> str:
    said = f'<p class="about">{escape(about)}</p>' if about else ""
    body = body or '<p class="none">Not recorded.</p>'
    return f'<section id="{name}"><h2>{escape(title)}</h2>{said}{body}</section>'


def _finding(f: Finding) -> str:
    where = [] if f.layer is None else [f"layer {f.layer}"]
    where += [] if f.step is None else [f"from step {f.step:,}"]
    where.append(f"{100 * f.confidence:.0f} % sure")
    text = f"{escape(f.text)}<small>{escape(', '.join(where))}</small>"
    tried = [f"<li>{escape(REMEDIES[name].text())} <small>{escape(REMEDIES[name].why)}</small></li>"
             for name in f.remedies if name in REMEDIES]  # fmt: skip
    return text + (f"<p>What to try, best first:</p><ol>{''.join(tried)}</ol>" if tried else "")


def _medians(values: Array, axis: int) -> Array:
    return np.asarray(np.nanmedian(values.astype(np.float64), axis=axis))


def _median(values: Array) -> float:
    known = values[np.isfinite(values)].astype(np.float64)
    return float(np.median(known)) if known.size else math.nan


def _greatest(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if known.size else math.nan


def _first_to_last(values: Array) -> str:
    known = values[~np.isnan(values)]
    ends = (known[0], known[-1]) if known.size else ()
    return " → ".join(number(x) if np.isfinite(x) else "not finite" for x in ends)


def _shown(value: float) -> str:
    return "" if math.isnan(value) else number(value)


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.0f} %"
