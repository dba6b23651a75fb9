"""Drawings of a run as SVG, with colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from gpugrad.bench import summary
from gpugrad.bench.summary import Report, seconds_text

WIDTH = 540  # so that text is read on a phone, too
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 42


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from `low` to `high` in data, `start` to `end` in the picture."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Powers of ten inside, at most eight."""
        powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
        return [10.0**p for p in powers[:: max(1, math.ceil(len(powers) / 8))]]


def axis(values: Iterable[float], start: float, end: float) -> Axis:
    """An axis that holds all values with some room."""
    found = [v for v in values if v > 0 and math.isfinite(v)]
    return Axis(min(found) / 2, max(found) * 2, start, end)


def tag(name: str, text: str = "", /, **attributes: Any) -> str:
    """An element; ``_`` in a name of an attribute stands for ``-``, at its end for nothing."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{pairs}>{text}</{name}>" if text else f"<{name}{pairs}/>"


def text(x: float, y: float, words: str, **attributes: Any) -> str:
    return tag("text", escape(words), x=round(x, 1), y=round(y, 1), **attributes)


def power(value: float) -> str:
    """A tick's label, in the usual prefixes."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g}"


def frame(
    x: Axis, y: Axis, x_label: str, y_label: str, x_text: Callable[[float], str] = power,
    y_text: Callable[[float], str] = power,
) -> list[str]:  # fmt: skip
    """Grid, ticks and names of both axes."""
    parts = []
    for value in x.ticks():
        at = x(value)
        parts.append(tag("line", class_="grid", x1=at, x2=at, y1=y.start, y2=y.end))
        parts.append(text(at, y.start + 16, x_text(value), text_anchor="middle"))
    for value in y.ticks():
        at = y(value)
        parts.append(tag("line", class_="grid", x1=x.start, x2=x.end, y1=at, y2=at))
        parts.append(text(x.start - 6, at + 4, y_text(value), text_anchor="end"))
    parts.append(text((x.start + x.end) / 2, y.start + 34, x_label, text_anchor="middle"))
    parts.append(text(x.start + 4, y.end + 12, y_label))
    return parts


def picture(parts: Sequence[str], height: int, title: str) -> str:
    """The drawing with a title for those who cannot see it."""
    return tag(
        "svg", tag("title", escape(title)) + "".join(parts),
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}", role="img",
    )  # fmt: skip


# -- roofline -------------------------------------------------------------------------------------


def roofline(report: Report, device: str) -> str | None:
    """Every kernel by its operations per byte and the rate that it reaches, below the ceilings."""
    ceilings = report["ceilings"].get(device)
    dots = []
    for name, size in summary.last_sizes(report):
        entry = report["workloads"][name]["sizes"][size]
        if not entry.get("flops") or not entry.get("bytes"):
            continue
        dots += [
            (entry["flops"] / entry["bytes"], entry["flops"] / line.median, line)
            for line in summary.lines(report, name, size)
            if line.own and line.device == device
        ]
    if not dots or not ceilings:
        return None
    height = 420
    bandwidth, most = ceilings["bandwidth"], ceilings["flops"]
    ridge = most / bandwidth
    x = axis([d[0] for d in dots] + [ridge], LEFT, WIDTH - RIGHT)
    y = axis([d[1] for d in dots] + [most, x.low * bandwidth * 2], height - BOTTOM, TOP)
    parts = frame(x, y, "operations per byte", "operations a second")
    corner = max(x.low, y.low / bandwidth)
    path = f"M{x(corner)},{y(corner * bandwidth)} L{x(ridge)},{y(most)} L{x(x.high)},{y(most)}"
    parts.append(tag("path", class_="ceiling", d=path))
    told = f"product: {most / 1e9:,.0f} GFLOP/s"
    parts.append(text(x.end, y(most) - 6, told, text_anchor="end"))
    # Beside the slope, above its middle.
    middle = math.sqrt(corner * ridge)
    told = f"copy: {bandwidth / 1e9:,.0f} GB/s"
    parts.append(text(x(middle) - 8, y(middle * bandwidth) - 8, told,
                      text_anchor="end"))  # fmt: skip
    for at, rate, line in dots:
        share = f", {line.share:.0%} of the roofline" if line.share else ""
        about = f"{line.label}: {line.workload}, {line.size}: {rate / 1e9:.3g} GFLOP/s{share}"
        parts.append(tag("circle", tag("title", escape(about)), class_=f"dot c-{line.contender}",
                         cx=x(at), cy=y(rate), r=5))  # fmt: skip
    return picture(parts, height, f"Roofline of {device}")


# -- time against size ----------------------------------------------------------------------------


def sizes(report: Report, name: str) -> str | None:
    """Seconds of everybody against the size of a workload, with the crossover of CPU and GPU."""
    about = report["workloads"][name]["sizes"]
    what = next((w for w in ("bytes", "flops") if all(w in e for e in about.values())), None)
    curves: dict[str, list[tuple[float, float, summary.Line]]] = {}
    for number, (size, entry) in enumerate(about.items()):
        for line in summary.lines(report, name, size):
            at = entry[what] if what else 10.0**number
            curves.setdefault(line.contender, []).append((at, line.median, line))
    if len(about) < 2 or not curves:
        return None
    height = 300
    points = [p for curve in curves.values() for p in curve]
    x = axis([p[0] for p in points], LEFT, WIDTH - RIGHT)
    y = axis([p[1] for p in points], height - BOTTOM, TOP)
    label = {"bytes": "bytes that a pass moves at least", "flops": "operations of a pass"}
    parts = frame(x, y, label.get(what or "", "size"), "seconds", y_text=seconds_text)
    for key, curve in curves.items():
        path = " L".join(f"{x(at)},{y(seconds)}" for at, seconds, _ in curve)
        parts.append(tag("path", class_=f"curve c-{key}", d=f"M{path}"))
        for at, seconds, line in curve:
            told = f"{line.label}, {line.size}: {seconds_text(seconds)}"
            parts.append(tag("circle", tag("title", escape(told)), class_=f"dot c-{key}",
                             cx=x(at), cy=y(seconds), r=4))  # fmt: skip
    at = summary.crossover(report, name)
    if at is not None:
        parts.append(tag("line", class_="crossover", x1=x(at), x2=x(at), y1=y.start, y2=y.end))
        parts.append(text(x(at) + 4, y.end + 26, f"GPU quicker from {power(at)}B on"))
    return picture(parts, height, f"{name}: time against size")


# -- speed-up -------------------------------------------------------------------------------------


def speed_ups(report: Report, name: str, size: str, device: str) -> str | None:
    """A bar for everybody's time as a multiple of gpugrad's."""
    lines = [
        line for line in summary.lines(report, name, size)
        if line.device == device and line.ratio is not None
    ]  # fmt: skip
    if len(lines) < 2:
        return None
    row, names = 22, 145
    most = max(line.ratio or 0 for line in lines)
    room = WIDTH - names - 115
    parts = []
    for i, line in enumerate(lines):
        assert line.ratio is not None
        top = 4 + i * row
        low, high = line.quartiles
        told = (f"{line.label}: {seconds_text(line.median)}, quartiles {seconds_text(low)} to "
                f"{seconds_text(high)}")  # fmt: skip
        wide = max(1.0, room * line.ratio / most)
        parts.append(text(names - 8, top + 14, line.label, text_anchor="end"))
        parts.append(tag("rect", tag("title", escape(told)), class_=f"bar c-{line.contender}",
                         x=names, y=top + 3, width=round(wide, 1), height=row - 8))  # fmt: skip
        parts.append(text(names + wide + 6, top + 14,
                          f"{line.ratio:.3g} ×, {seconds_text(line.median)}"))  # fmt: skip
    return picture(parts, 8 + row * len(lines), f"{name}, {size}: times as multiples of gpugrad's")
