"""Read the JSON of a run, and make the rows of tables and pages from it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpugrad.bench import common
from gpugrad.bench.runner import FORMAT, VERSION
from gpugrad.errors import ParameterError

Report = dict[str, Any]


def load(path: str | Path) -> Report:
    """The JSON of a run; ParameterError for what is none, or of another version."""
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParameterError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ParameterError(f"{path}: is not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ParameterError(
            f"{path}: is no result of `gpugrad bench`; measure again: gpugrad bench --out FOLDER"
        )
    version = found.get("version")
    if version != VERSION:
        older = isinstance(version, int) and version < VERSION
        raise ParameterError(
            f"{path}: has format {version}, and this gpugrad reads {VERSION}; "
            + ("measure again, or read it with the gpugrad that wrote it ("
               f"{found.get('versions', {}).get('gpugrad')})" if older
               else "a newer gpugrad wrote it: pip install --upgrade gpugrad")
        )  # fmt: skip
    missing = {"contenders", "workloads", "versions", "machine", "ceilings"} - set(found)
    if missing:
        raise ParameterError(f"{path}: is damaged: {', '.join(sorted(missing))} are missing")
    return found


@dataclass(frozen=True)
class Line:
    """One contender's result in one size.

    Attributes
    ----------
    seconds:
        Of every round.
    ratio:
        Median over rounds of its time as a multiple of gpugrad's on the same device, with kernels
        where they take part; None for lack of one.
    share:
        Of the roofline, for gpugrad's: the least time that its bytes and operations allow over the
        median; None where nothing is declared. Above one, data come from a cache.
    """

    workload: str
    size: str
    contender: str
    label: str
    own: bool
    device: str
    seconds: tuple[float, ...]
    host: tuple[float, ...]
    ratio: float | None
    share: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.seconds)


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    if len(samples) < 2:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def attainable(entry: Mapping[str, Any], ceilings: Mapping[str, float]) -> float | None:
    """Seconds that a pass takes at least, by the machine's copy bandwidth and product rate."""
    if "bytes" not in entry or not ceilings:
        return None
    return max(entry["bytes"] / ceilings["bandwidth"], entry.get("flops", 0) / ceilings["flops"])


def lines(report: Report, name: str, size: str) -> list[Line]:
    """Everybody's results in one size, as listed."""
    entry = report["workloads"][name]["sizes"][size]
    about = report["contenders"]
    timed = {key: entry["seconds"][key] for key in about if entry["seconds"].get(key)}
    found = []
    for key, seconds in timed.items():
        device, own = about[key]["device"], about[key]["own"]
        base = timed.get(base_of(report, timed, device) or "")
        # Round by round: a drift of the machine hits both alike.
        ratio = None if base is None else statistics.median(a / b for a, b in zip(seconds, base))
        least = attainable(entry, report["ceilings"].get(device, {})) if own else None
        found.append(
            Line(
                name, size, key, about[key]["label"], own, device, tuple(seconds),
                tuple(entry.get("host", {}).get(key, ())), ratio,
                None if least is None else least / statistics.median(seconds),
            )
        )  # fmt: skip
    return found


def base_of(report: Report, timed: Mapping[str, Sequence[float]], device: str) -> str | None:
    """Which of gpugrad's contenders on a device others are measured by: its best with kernels."""
    about = report["contenders"]
    own = [
        key
        for key, seconds in timed.items()
        if seconds and about[key]["own"] and about[key]["device"] == device
    ]
    kernels = [key for key in own if about[key]["variant"] != "off"]
    return min(kernels or own, key=lambda key: statistics.median(timed[key]), default=None)


def last_sizes(report: Report) -> Iterator[tuple[str, str]]:
    """Each workload with the largest size that has been measured."""
    for name, about in report["workloads"].items():
        if about["sizes"]:
            yield name, list(about["sizes"])[-1]


def means(report: Report, device: str) -> list[tuple[str, float, int]]:
    """Everybody's label, the geometric mean over workloads of its time as a multiple of gpugrad's,
    and how many workloads it took part in."""
    logs: dict[str, list[float]] = {}
    for name, size in last_sizes(report):
        for line in lines(report, name, size):
            if line.device == device and line.ratio is not None and line.ratio != 1:
                logs.setdefault(line.label, []).append(math.log(line.ratio))
    return [(label, math.exp(statistics.fmean(found)), len(found)) for label, found in logs.items()]


def problems(report: Report) -> Iterator[tuple[str, str, str, str]]:
    """Workload, size, contender and what went wrong."""
    for name, about in report["workloads"].items():
        for size, entry in about["sizes"].items():
            for key, why in entry["problems"].items():
                label = report["contenders"].get(key, {}).get("label", key)
                yield name, size, label, why


def crossover(report: Report, name: str) -> float | None:
    """From how many bytes on gpugrad is quicker on a GPU than on the host; None if that is not
    between two sizes that were measured on both."""
    points = []
    for size, entry in report["workloads"][name]["sizes"].items():
        found = {line.device: line.median for line in lines(report, name, size)
                 if line.contender == base_of(report, entry["seconds"], line.device)}  # fmt: skip
        gpu = next((s for device, s in found.items() if device != "cpu"), None)
        if gpu is not None and "cpu" in found and "bytes" in entry:
            points.append((math.log(entry["bytes"]), math.log(gpu / found["cpu"])))
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 > 0 >= y1:
            return math.exp(x0 + (x1 - x0) * y0 / (y0 - y1))
    return None


def seconds_text(seconds: float) -> str:
    """In the unit that fits: three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def where(report: Report) -> str:
    """Date, commit, machine and versions in a few lines."""
    machine = report["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v)
    devices = [f"{key}: {about['name']}" for key, about in report.get("devices", {}).items()
               if "name" in about]  # fmt: skip
    driver = f", driver {report['driver']}" if report.get("driver") else ""
    load_ = machine.get("load")
    return (
        f"{report['date']}, commit {report['commit']}; {machine['cpu']}, {machine['cores']} cores, "
        f"{report['threads']} threads"
        + (f", load {load_[0]:.1f} at the start" if load_ else "")
        + "".join(f"; {d}" for d in devices)
        + f"{driver}; {machine['system']}; Python {report['python']}, {versions}"
    )


# -- two runs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One contender in one size, in two runs.

    Attributes
    ----------
    ratio:
        The second median over the first.
    band:
        The ratios between which it says nothing: where the quartiles of the runs could meet.
    """

    workload: str
    size: str
    contender: str
    own: bool
    before: float
    after: float
    band: tuple[float, float]

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        low, high = self.band
        return "slower" if self.ratio > high else "faster" if self.ratio < low else "same"


def compare(before: Report, after: Report) -> list[Change]:
    """What both runs have measured.

    The band is as wide as the spread of both runs: a ratio inside it may be noise.
    """
    found = []
    for name, about in before["workloads"].items():
        for size, entry in about["sizes"].items():
            other = after["workloads"].get(name, {}).get("sizes", {}).get(size)
            for key, a in entry["seconds"].items():
                b = (other or {"seconds": {}})["seconds"].get(key)
                if not a or not b:
                    continue
                (low_a, high_a), (low_b, high_b) = quartiles(a), quartiles(b)
                middle_a, middle_b = statistics.median(a), statistics.median(b)
                up = high_a / middle_a * middle_b / low_b
                down = low_a / middle_a * middle_b / high_b
                info = after["contenders"].get(key, before["contenders"].get(key))
                assert info is not None
                found.append(
                    Change(name, size, info["label"], info["own"], middle_a, middle_b, (down, up))
                )
    return found


def drift(changes: Sequence[Change]) -> float | None:
    """By how much the peers, whose code is the same, changed: the machine's part in the changes."""
    logs = [math.log(c.ratio) for c in changes if not c.own]
    return math.exp(statistics.median(logs)) if logs else None


# -- a page of text -------------------------------------------------------------------------------


def rows(report: Report) -> list[dict[str, Any]]:
    """The rows of a Markdown table of the largest sizes."""
    return [
        {"workload": f"{name}, {size}", "contender": line.label,
         **common.spread(line.seconds, 1e3),
         "over gpugrad": None if line.ratio is None else common.round_to(line.ratio),
         "of the roofline": None if line.share is None else common.round_to(line.share, 2)}
        for name, size in last_sizes(report)
        for line in lines(report, name, size)
    ]  # fmt: skip
