"""Charts as pieces of HTML: inline SVG that stretches with the page, labels that do not.

A chart is a grid of three: labels of the vertical axis, the drawing, labels of the horizontal axis.
The drawing has no text and no fixed width, so that one text size is readable on every screen. The
numbers behind it stand beside it, for the page's script to show under the pointer.
"""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpugrad.health.page_thin import Columns, extremes

__all__ = ["Axis", "Band", "Guide", "Line", "chart", "document", "heat_map", "number"]

Array = NDArray[Any]

#: A drawing's own units, whatever its size on the screen.
WIDTH, HEIGHT = 4000, 1000

#: Stretches of a line of which first, last, least and greatest are drawn.
STRETCHES = 400


# -- numbers --------------------------------------------------------------------------------------


def number(value: float, digits: int = 3) -> str:
    """A number in few signs.

    >>> number(0.5), number(13780.61234), number(2.656e-5), number(float("nan"))
    ('0.5', '13800', '2.66e-5', 'NaN')
    """
    value = float(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    text = f"{value:.{digits - 1}e}"
    mantissa, exponent = text.split("e")
    power = int(exponent)
    if -4 < power < 6:
        plain = f"{float(text):.{max(0, digits - 1 - power)}f}"
        return plain.rstrip("0").rstrip(".") if "." in plain else plain
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{power}"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power_of_ten(exponent: int) -> str:
    """``10⁻³``; small powers are written out.

    >>> power_of_ten(-3), power_of_ten(0), power_of_ten(12)
    ('0.001', '1', '10¹²')
    """
    if -3 <= exponent <= 3:
        return number(10.0**exponent)
    return "10" + str(exponent).translate(_RAISED)


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`; with `log` both are powers of ten."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, parts: Iterable[Array], log: bool = False, whole: bool = False) -> Axis:
        """An axis on which every finite value of `parts` has a place; above 0 only if `log`.

        `whole` takes in 0 as well, unless `log`.
        """
        found = [np.asarray(p, np.float64).ravel() for p in parts]
        values = np.concatenate(found) if found else np.zeros(0)
        values = values[np.isfinite(values)]
        if log:
            values = np.log10(values[values > 0])
        elif whole:
            values = np.append(values, 0.0)
        if not values.size:
            return cls(0.0, 1.0, log)
        low, high = float(values.min()), float(values.max())
        gap = (high - low) * 0.03
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):
            gap = 0.5 if log else (abs(high) / 2 or 1.0)
        return cls(low if whole and low == 0 else low - gap, high + gap, log)

    def place(self, values: Array) -> Array:
        """Where values stand, from 0 at `low` to 1 at `high`; NaN for those that have no place."""
        values = np.asarray(values, np.float64)
        values = np.where(np.isfinite(values), values, np.nan)
        if self.log:
            values = np.log10(np.where(values > 0, values, np.nan))
        return np.asarray((values - self.low) / (self.high - self.low))

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Places and labels."""
        if self.log:
            first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
            if last - first >= 1:
                every = max(1, math.ceil((last - first) / (most - 1)))
                powers = range(first + -first % every, last + 1, every)
                return [(float(self._at(p)), power_of_ten(p)) for p in powers]
            step = _round_step((10**self.high - 10**self.low) / (most - 1))
            values = _multiples(10**self.low, 10**self.high, step)
            return [(float(self._at(math.log10(v))), number(v, 4)) for v in values if v > 0]
        step = _round_step((self.high - self.low) / (most - 1))
        digits = 2 + max(0, math.ceil(math.log10(max(abs(self.low), abs(self.high)) / step)))
        return [(float(self._at(v)), number(v, digits))
                for v in _multiples(self.low, self.high, step)]  # fmt: skip

    def _at(self, x: float) -> float:
        return (x - self.low) / (self.high - self.low)


def _round_step(least: float) -> float:
    """The least of 1, 2, 5, 10, 20 … that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return power * next(f for f in (1, 2, 5, 10) if f * power >= least * (1 - 1e-9))


def _multiples(low: float, high: float, step: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


# -- lines ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line through (x, y), broken where y is not finite. `colour` counts from 1."""

    name: str
    x: Array
    y: Array
    colour: int = 1


@dataclass(frozen=True)
class Band:
    """What lies between `low` and `high`; without a name it has no place in the legend."""

    name: str
    x: Array
    low: Array
    high: Array
    colour: int = 1


@dataclass(frozen=True)
class Guide:
    """A dashed line across, at a value that is worth knowing."""

    name: str
    value: float


Mark = Line | Band | Guide


def chart(
    marks: Sequence[Mark],
    *,
    label: str,
    x_label: str = "step",
    log: bool = False,
    y_axis: Axis | None = None,
    x_names: Sequence[str] | None = None,
    height: int = 220,
    small: bool = False,
) -> str:
    """A chart of lines and bands over one horizontal axis.

    Parameters
    ----------
    marks:
        In the order in which they are drawn.
    label:
        What the vertical axis measures.
    log:
        Whether that axis is logarithmic; what is not positive then has no place on it.
    y_axis:
        Its range, if not that of all marks.
    x_names:
        What to call the places 0, 1, 2 … on the horizontal axis, if they are no steps.
    height:
        Of the drawing, in CSS pixels.
    small:
        One of many: few labels, and no legend.
    """
    thin = [_thinned(m, log) for m in marks]
    x_axis = _x_axis(thin)
    y_axis = y_axis or Axis.over(_values(thin), log)
    drawn = [_draw(m, x_axis, y_axis) for m in thin]
    x_ticks = _x_ticks(x_axis, x_names, 5 if small else 7)
    y_ticks = y_axis.ticks()
    grid = "".join(f'<path class="grid" d="M0 {_y(p)}h{WIDTH}"/>' for p, _ in y_ticks)
    data = {
        "x": [x_axis.low, x_axis.high],
        "names": list(x_names) if x_names else None,
        "label": x_label,
        "series": [s for m in thin if not isinstance(m, Guide) for s in _said(m)],
    }
    return (
        f'<div class="chart{" small" if small else ""}">'
        + ("" if small else _legend(marks))
        + f'<p class="ylabel">{escape(label)}</p><div class="frame">'
        + _y_labels(y_ticks)
        + f'<div class="plot" style="height:{height}px" tabindex="0">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)} over {escape(x_label)}">{grid}{"".join(drawn)}</svg>'
        f'<script type="application/json">{_json(data)}</script></div>'
        + _x_labels(x_ticks, "" if small else x_label, 0.06 if x_names is None else 0.3)
        + "</div></div>"
    )


def _thinned(mark: Mark, log: bool) -> Mark:
    if not isinstance(mark, Line):
        return mark
    y = np.asarray(mark.y, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = extremes(np.log10(y) if log else y, STRETCHES)
    return Line(mark.name, np.asarray(mark.x)[kept], y[kept], mark.colour)


def _values(marks: Sequence[Mark]) -> list[Array]:
    found: list[Array] = []
    for m in marks:
        match m:
            case Line():
                found.append(m.y)
            case Band():
                found += [m.low, m.high]
            case Guide():
                found.append(np.array([m.value]))
    return found


def _x_axis(marks: Sequence[Mark]) -> Axis:
    ends = [float(x) for m in marks if not isinstance(m, Guide) and len(m.x)
            for x in (m.x[0], m.x[-1])]  # fmt: skip
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    return Axis(low, high) if high > low else Axis(low - 0.5, high + 0.5)


def _x_ticks(axis: Axis, names: Sequence[str] | None, most: int) -> list[tuple[float, str]]:
    if names is not None:
        most = max(2, min(most, 70 // max(map(len, names), default=1)))
        every = max(1, math.ceil(len(names) / most))
        return [(axis._at(i), names[i]) for i in range(0, len(names), every)]
    return _whole(axis.ticks(most))


def _whole(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Without fractions, if that leaves something: there is no step 1.5."""
    return [tick for tick in ticks if "." not in tick[1]] or list(ticks)


def _draw(mark: Mark, x_axis: Axis, y_axis: Axis) -> str:
    match mark:
        case Guide():
            place = float(y_axis.place(np.array([mark.value]))[0])
            return f'<path class="guide" d="M0 {_y(place)}h{WIDTH}"/>' if 0 <= place <= 1 else ""
        case Band():
            x, low, high = (np.asarray(v) for v in (mark.x, mark.low, mark.high))
            parts = [
                _points(x[a:b], high[a:b], x_axis, y_axis)
                + "L"
                + _points(x[a:b][::-1], low[a:b][::-1], x_axis, y_axis)[1:]
                + "Z"
                for a, b in _stretches(y_axis.place(low) + y_axis.place(high))
            ]
            return f'<path class="band c{mark.colour}" d="{"".join(parts)}"/>' if parts else ""
        case Line():
            x, y = np.asarray(mark.x), mark.y
            parts = [_points(x[a:b], y[a:b], x_axis, y_axis)
                     for a, b in _stretches(y_axis.place(y))]  # fmt: skip
            dots = " dots" if "L" not in "".join(parts) else ""
            return (
                f'<path class="line{dots} c{mark.colour}" d="{"".join(parts)}"/>' if parts else ""
            )


def _stretches(places: Array) -> list[tuple[int, int]]:
    """From where to where something can be drawn without a gap."""
    known = np.concatenate([[False], np.isfinite(places), [False]])
    turns = np.flatnonzero(np.diff(known.astype(np.int8)))
    return list(zip(turns[::2].tolist(), turns[1::2].tolist()))


def _points(x: Array, y: Array, x_axis: Axis, y_axis: Axis) -> str:
    left = np.rint(x_axis.place(x) * WIDTH).astype(int).tolist()
    top = np.rint((1 - np.clip(y_axis.place(y), -1, 2)) * HEIGHT).astype(int).tolist()
    # A point of its own would have no length, and so no ink.
    dot = "h1" if len(left) == 1 else ""
    return "M" + "L".join(f"{a} {b}" for a, b in zip(left, top)) + dot


def _y(place: float) -> int:
    return round((1 - place) * HEIGHT)


def _said(mark: Line | Band) -> list[dict[str, Any]]:
    """What the pointer is told of a mark."""
    x = np.asarray(mark.x).tolist()
    if isinstance(mark, Band):
        return [{"name": mark.name, "x": x, "low": _plain(mark.low), "high": _plain(mark.high)}]
    return [{"name": mark.name, "x": x, "y": _plain(mark.y)}]


def _plain(values: Array) -> list[Any]:
    """Numbers of four digits; null for NaN, and a text for infinity: JSON has neither."""
    return [
        float(f"{v:.4g}") if math.isfinite(v) else None if math.isnan(v) else number(v)
        for v in np.asarray(values, np.float64).tolist()
    ]


def _json(data: Any) -> str:
    """JSON that cannot end the element that it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.replace("<", "\\u003c")


def _legend(marks: Sequence[Mark]) -> str:
    entries = [
        f'<li><i class="key {type(m).__name__.lower()}'
        f'{"" if isinstance(m, Guide) else f" c{m.colour}"}"></i>{escape(m.name)}</li>'
        for m in marks
        if m.name
    ]
    return f'<ul class="legend">{"".join(entries)}</ul>' if len(entries) > 1 else ""


def _y_labels(ticks: Sequence[tuple[float, str]]) -> str:
    spans = "".join(
        f'<span style="top:{100 * (1 - p):.2f}%">{escape(t)}</span>'
        for p, t in ticks
        if 0 <= p <= 1
    )
    longest = max((len(t) for _, t in ticks), default=0)
    return f'<div class="yticks" style="min-width:{longest + 1}ch">{spans}</div>'


def _x_labels(ticks: Sequence[tuple[float, str]], label: str, edge: float = 0.06) -> str:
    said = f'<p class="xlabel">{escape(label)}</p>' if label else ""
    return f'<div class="xticks">{_along(ticks, edge)}</div>{said}'


def _along(ticks: Sequence[tuple[float, str]], edge: float = 0.06) -> str:
    """Labels at their places; those that are within `edge` of an end do not reach beyond it."""
    spans = []
    for p, t in ticks:
        if -1e-9 <= p <= 1 + 1e-9:
            end = ' class="start"' if p < edge else ' class="end"' if p > 1 - edge else ""
            spans.append(f'<span style="left:{100 * p:.2f}%"{end}>{escape(t)}</span>')
    return "".join(spans)


# -- heat maps ------------------------------------------------------------------------------------

#: The colours of a scale from its low end to its high one: dark to bright, so that they are told
#: apart in grey, and by people who see few colours.
RAMP = ("#1b1044", "#3b2a86", "#2d5fa8", "#1f8f9c", "#45b97c", "#a8d84e", "#fdf3a0")
SHADES = 240
NOT_FINITE, ZERO, UNKNOWN = SHADES, SHADES + 1, SHADES + 2
SPECIAL = {NOT_FINITE: "#ff1f6b", ZERO: "#000000", UNKNOWN: "#8080801f"}

#: What a cell's number is in the data for the pointer: below come the signs for special cells.
FIRST_CODE, LAST_CODE = 3, 65535


def heat_map(
    values: Array,
    names: Sequence[str],
    columns: Columns,
    *,
    label: str,
    not_finite: Array | None = None,
    log: bool = True,
) -> str:
    """Layers from top to bottom, steps from left to right, a colour for each value.

    Parameters
    ----------
    values:
        [columns, layers]; NaN where nothing is known.
    not_finite:
        Of the same shape: which cells saw NaN or infinity, besides those whose value is infinite.
    log:
        Whether colours follow the logarithm; otherwise they stand for values from 0 to 1.
    """
    values = np.asarray(values, np.float64).T
    broken = np.isinf(values)
    if not_finite is not None:
        broken |= not_finite.T
    zero = (values == 0) & ~broken if log else np.zeros_like(broken)
    axis = Axis.over([values], log=True) if log else Axis(0.0, 1.0)
    place = np.clip(axis.place(values), 0, 1)
    known = np.isfinite(place) & ~broken
    shade = np.where(known, np.rint(np.nan_to_num(place) * (SHADES - 1)), UNKNOWN)
    shade = np.select([broken, zero], [NOT_FINITE, ZERO], shade).astype(np.uint8)
    code = np.where(known, FIRST_CODE + np.nan_to_num(place) * (LAST_CODE - FIRST_CODE), 0)
    code = np.select([broken, zero], [1, 2], np.rint(code)).astype("<u2")
    rows = len(names)
    height = min(max(rows * 18, 90), 26 * rows, 640) if rows > 3 else 34 * max(rows, 1)
    data = {
        "codes": base64.b64encode(code.tobytes()).decode(),
        "rows": rows,
        "columns": len(columns),
        "axis": [axis.low, axis.high],
        "log": log,
        "steps": [columns.first, columns.last],
        "names": list(names),
    }
    x_axis = Axis(columns.first, columns.last + 1)
    x_ticks = [t for t in _whole(x_axis.ticks(7)) if float(t[1]) <= columns.last]
    labels = [name if len(name) <= 16 else name.split()[0] for name in names]
    return (
        f'<div class="chart heat">{_heat_legend(axis, label, shade)}<div class="frame">'
        + _row_labels(labels, height)
        + f'<div class="plot" style="height:{height}px" tabindex="0">'
        f'<img alt="{escape(label)}: layers from top to bottom, steps from left to right" '
        f'src="data:image/png;base64,{base64.b64encode(_png(shade)).decode()}">'
        f'<script type="application/json">{_json(data)}</script></div>'
        + _x_labels(x_ticks, "step")
        + "</div></div>"
    )


def _row_labels(names: Sequence[str], height: int) -> str:
    every = max(1, math.ceil(len(names) * 14 / max(height, 1)))
    spans = "".join(
        f'<span style="top:{100 * (i + 0.5) / len(names):.2f}%">{escape(names[i])}</span>'
        for i in range(0, len(names), every)
    )
    longest = min(max((len(n) for n in names), default=0) + 1, 18)
    return f'<div class="yticks rows" style="width:min({longest}ch,30vw)">{spans}</div>'


def _heat_legend(axis: Axis, label: str, shade: Array) -> str:
    named = {NOT_FINITE: "NaN or infinite", ZERO: "exactly 0", UNKNOWN: "not known"}
    special = "".join(
        f'<li><i class="swatch" style="background:{SPECIAL[s]}"></i>{text}</li>'
        for s, text in named.items()
        if (shade == s).any()
    )
    return (
        f'<div class="scale"><p class="ylabel">{escape(label)}</p><div class="ramp" '
        f'style="background:linear-gradient(90deg,{",".join(RAMP)})"></div>'
        f'<div class="xticks">{_along(axis.ticks(5))}</div>'
        + (f'<ul class="legend">{special}</ul>' if special else "")
        + "</div>"
    )


def _png(shade: Array) -> bytes:
    """A picture of one byte a cell, by the colours of the ramp (PNG, ISO/IEC 15948)."""
    rows, columns = shade.shape
    colours = np.array([_rgba(c) for c in RAMP], np.float64)
    at = np.linspace(0, len(RAMP) - 1, SHADES)
    ramp = [np.interp(at, range(len(RAMP)), colours[:, i]) for i in range(4)]
    palette = np.concatenate(
        [np.rint(np.stack(ramp, 1)), [_rgba(SPECIAL[k]) for k in sorted(SPECIAL)]]
    ).astype(np.uint8)
    lines = np.zeros((rows, columns + 1), np.uint8)  # each begins with its filter: none
    lines[:, 1:] = shade

    def part(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    return b"\x89PNG\r\n\x1a\n" + b"".join((
        part(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
        part(b"PLTE", palette[:, :3].tobytes()),
        part(b"tRNS", palette[:, 3].tobytes()),
        part(b"IDAT", zlib.compress(lines.tobytes(), 9)),
        part(b"IEND", b""),
    ))  # fmt: skip


def _rgba(colour: str) -> list[int]:
    return [int((colour[1:] + "ff")[i : i + 2], 16) for i in (0, 2, 4, 6)]


# -- the page -------------------------------------------------------------------------------------


def document(title: str, body: str) -> str:
    """A whole page with its style and script inside; it asks for nothing from elsewhere."""
    style, script = (Path(__file__).with_name(f"page.{end}").read_text("utf-8")
                     for end in ("css", "js"))  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f'{body}\n</main>\n<div id="tip" role="status" hidden></div>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )
