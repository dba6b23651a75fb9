"""The history of the committed results, as one page that needs nothing else.

``python bench/history.py [--results FOLDER] [--out FILE]``. It reads every JSON file of the folder:
those of ``bench/run.py``, of ``gpugrad bench`` and of ``bench/gpu_check.py``. Each figure gets a
picture over the results' dates, with what it must reach as a dashed line, and a curve for each
machine: figures of two machines are two figures. A file that cannot be read is named, with the
reason; so is one of a version that is not known here, of which what is known is shown.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpugrad.bench import common
from gpugrad.bench.page import STYLE
from gpugrad.bench.plots import LEFT, RIGHT, WIDTH, picture, tag, text

HEIGHT, TOP, BOTTOM = 190, 24, 46
#: Colours of the page's style, for as many machines; then they begin again.
COLOURS = ("numba", "torch", "jax", "torch-compile", "autograd", "mygrad")

#: Versions of formats that are read in full.
KNOWN = {"gpugrad bench": (1,), "gpu_check": (1, 2)}


@dataclass(frozen=True)
class Point:
    """A figure in one result.

    Attributes
    ----------
    group, what:
        The benchmark, and the figure's name in it.
    value, unit, target:
        As measured; what it must reach, as ``"≥ 1.3"``, or "".
    """

    group: str
    what: str
    value: float
    unit: str
    target: str
    date: str
    commit: str
    machine: str
    file: str


# -- reading --------------------------------------------------------------------------------------


def read(folder: Path) -> tuple[list[Point], list[str]]:
    """All figures in the order of their dates, and what is to be said of files."""
    points: list[Point] = []
    notes: list[str] = []
    for path in sorted(folder.glob("*.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(report, dict):
                raise TypeError("is no object")
            name, figures, note = opened(report)
            found = list(points_of(report, path.name, figures(report)))
        except (OSError, ValueError) as error:
            notes.append(f"{path.name}: cannot be read: {error}")
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            notes.append(f"{path.name}: is of an older or unknown format: "
                         f"{type(error).__name__}: {error}")  # fmt: skip
        else:
            points += found
            if note or not found:
                notes.append(f"{path.name}: {name}: {note or 'has no figures'}")
    return sorted(points, key=lambda p: (p.date, p.file)), notes


#: Group, name, value, unit and target of a figure.
Figure = tuple[str, str, float | None, str, str]


def opened(report: dict[str, Any]) -> tuple[str, Callable[[dict[str, Any]], Iterator[Figure]], str]:
    """The format of a report, what reads its figures, and what must be said of it."""
    if "format" in report:
        name, version, reader = report["format"], report.get("version"), of_workloads
    elif "tool" in report:
        name, version, reader = report["tool"], report.get("schema"), of_verdicts
    elif "truth" in report:
        return "health_grid.py", lambda report: iter(()), "verdicts, and nothing that takes time"
    elif "benchmarks" in report:
        return "run.py", of_benchmarks, quick(report)
    else:
        raise KeyError("neither format, nor tool, nor benchmarks")
    if name not in KNOWN:
        raise KeyError(f"format {name!r}")
    note = quick(report)
    if version not in KNOWN[name]:
        note = f"version {version}, of which only what is known here is shown"
    return name, reader, note


def quick(report: dict[str, Any]) -> str:
    """Why a report is no result; "" if it is one."""
    if report.get("dry_run"):
        return "a dry run"
    if report.get("quick"):
        return "a quick run: a check, not a result"
    whole = report.get("complete", report.get("whole", True))
    return "" if whole else "was stopped before its end"


def of_benchmarks(report: dict[str, Any]) -> Iterator[Figure]:
    for name, one in report["benchmarks"].items():
        for figure in of_verdicts(one):
            yield (name, *figure[1:])


def of_verdicts(report: dict[str, Any]) -> Iterator[Figure]:
    for line in report["verdicts"]:
        yield "GPU", line["what"], line["value"], line["unit"], line["target"]


def of_workloads(report: dict[str, Any]) -> Iterator[Figure]:
    """gpugrad's time and the best peer's, as a ratio, for the largest size of each workload."""
    about = report["contenders"]
    for name, work in report["workloads"].items():
        if not work["sizes"]:
            continue
        size, entry = list(work["sizes"].items())[-1]
        medians = {key: statistics.median(s) for key, s in entry["seconds"].items() if s}
        for device in sorted({about[key]["device"] for key in medians}):
            here = {k: s for k, s in medians.items() if about[k]["device"] == device}
            own = min((s for k, s in here.items() if about[k]["own"]), default=None)
            peer = min((s for k, s in here.items() if not about[k]["own"]), default=None)
            if own is not None and peer is not None:
                least = work.get("least") if device == "cpu" else None
                target = "" if least is None else f"≥ {least:g}"
                where = "" if device == "cpu" else f" on {device}"
                yield "workloads", f"{name}, {size}{where}, over the best peer", (
                    peer / own), "x", target  # fmt: skip


def points_of(report: dict[str, Any], file: str, figures: Iterable[Figure]) -> Iterator[Point]:
    figures = list(figures)
    if report.get("dry_run") or report.get("quick") or not figures:
        return
    machine = machine_of(report)
    for group, what, value, unit, target in figures:
        if isinstance(value, int | float) and math.isfinite(value):
            yield Point(group, steady(what), float(value), unit, target, report["date"],
                        report["commit"], machine, file)  # fmt: skip


def machine_of(report: dict[str, Any]) -> str:
    """The GPU of a GPU's result, else the CPU and its cores."""
    environment = report.get("parts", {}).get("environment", {})
    gpu = environment.get("results", {}).get("gpu", {}).get("name")
    machine = report["machine"]
    return str(gpu or f"{machine['cpu']}, {machine['cores']} cores")


def steady(what: str) -> str:
    """A figure's name without what changes from run to run: who was best, how many passed."""
    return re.sub(r" \([^()]*\)", "", what).strip()


# -- drawing --------------------------------------------------------------------------------------


def series(points: Sequence[Point]) -> dict[tuple[str, str, str], list[Point]]:
    """Points by group, figure and unit."""
    found: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        found.setdefault((point.group, point.what, point.unit), []).append(point)
    return found


def bound(target: str) -> float | None:
    """The number of ``"≥ 1.3"``."""
    number = re.search(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", target)
    return float(number[0]) if number else None


def drawing(points: Sequence[Point], colours: dict[str, str]) -> str:
    """One figure over the results in their order, which are as far apart as each other."""
    when = list(dict.fromkeys((p.date, p.commit) for p in points))
    must = bound(points[-1].target)
    values = [p.value for p in points] + ([] if must is None else [must])
    low, high = min(values), max(values)
    room = (high - low) * 0.15 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room
    width = WIDTH - RIGHT - LEFT

    def x(point: Point) -> float:
        share = (when.index((point.date, point.commit)) + 0.5) / len(when)
        return round(LEFT + share * width, 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP), 1)

    parts = []
    for i in range(4):
        value = low + (high - low) * i / 3
        parts.append(
            tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value))
        )
        parts.append(text(LEFT - 6, y(value) + 4, f"{value:.3g}", text_anchor="end"))
    if must is not None:
        parts.append(tag("line", class_="crossover", x1=LEFT, x2=WIDTH - RIGHT, y1=y(must),
                         y2=y(must)))  # fmt: skip
        parts.append(text(WIDTH - RIGHT, y(must) - 4, f"must be {points[-1].target}",
                          text_anchor="end"))  # fmt: skip
    for machine in dict.fromkeys(p.machine for p in points):
        mine = [p for p in points if p.machine == machine]
        path, colour = " L".join(f"{x(p)},{y(p.value)}" for p in mine), colours[machine]
        parts.append(tag("path", class_=f"curve c-{colour}", d=f"M{path}"))
        for p in mine:
            told = f"{p.value:g} {p.unit}, {p.date}, commit {p.commit}, {p.machine}, {p.file}"
            parts.append(tag("circle", tag("title", escape(told)), class_=f"dot c-{colour}",
                             cx=x(p), cy=y(p.value), r=4))  # fmt: skip
    step = max(1, math.ceil(len(when) / 7))
    for i, (date, commit) in list(enumerate(when))[::step]:
        at = LEFT + (i + 0.5) / len(when) * width
        parts.append(text(at, HEIGHT - 26, date[:10], text_anchor="middle"))
        parts.append(text(at, HEIGHT - 10, commit[:8], text_anchor="middle"))
    return picture(parts, HEIGHT, points[-1].what)


def page(points: Sequence[Point], notes: Sequence[str]) -> str:
    """The whole page."""
    machines = list(dict.fromkeys(p.machine for p in points))
    colours = {m: COLOURS[i % len(COLOURS)] for i, m in enumerate(machines)}
    legend = "".join(f'<li class="c-{colours[m]}"><i></i><span>{escape(m)}</span></li>'
                     for m in machines)  # fmt: skip
    body = ["<h1>gpugrad: history of results</h1>", f'<ul class="legend">{legend}</ul>']
    group = ""
    for (name, what, unit), found in series(points).items():
        if name != group:
            group = name
            body.append(f"<h2>{escape(name)}</h2>")
        last = found[-1]
        told = f"last {last.value:g} {unit}".strip() + (
            f", must be {last.target}" * bool(last.target)
        )
        body.append(f'<h3>{escape(what)}</h3>\n<p class="what">{escape(told)}</p>')
        body.append(drawing(found, colours))
    if not points:
        body.append("<p>There are no results.</p>")
    if notes:
        lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
        body.append(f"<h2>Files of which something is to be said</h2>\n<ul>{lines}</ul>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        '<meta name="color-scheme" content="light dark"/>\n'
        f"<title>gpugrad: history</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
        + "\n".join(body) + "\n</body>\n</html>\n"
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="the folder to read")
    parser.add_argument("--out", type=Path, help="default: history.html in that folder")
    options = parser.parse_args(arguments)
    points, notes = read(options.results)
    out = options.out or options.results / "history.html"
    out.write_text(page(points, notes), encoding="utf-8")
    print("\n".join([*notes, f"{out}: {len(series(points))} figures of {len(points)} points"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
