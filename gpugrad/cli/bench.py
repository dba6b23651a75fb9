"""Measure all contenders on all workloads, and show what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from gpugrad.bench import available, common, runner, summary
from gpugrad.bench.page import page
from gpugrad.bench.processes import Pool
from gpugrad.bench.summary import Report, seconds_text
from gpugrad.bench.workload import CONTENDERS, Contender, Workload, workloads
from gpugrad.errors import ParameterError

__all__ = ["compare", "draw", "list_everything", "measure"]


# -- what is wanted -------------------------------------------------------------------------------


def chosen_workloads(only: str | None) -> list[Workload]:
    """The workloads whose names have one of the words, in any case; all without words."""
    everything = workloads()
    if not only:
        return list(everything.values())
    words = [word.strip().lower() for word in only.split(",") if word.strip()]
    for word in words:
        if not any(word in name.lower() for name in everything):
            raise ParameterError(
                f"no workload has {word!r} in its name; gpugrad bench --list shows them"
            )
    return [w for name, w in everything.items() if any(word in name.lower() for word in words)]


def chosen_contenders(backend: str | None) -> list[Contender]:
    """The contenders with these keys; all without."""
    if not backend:
        return list(CONTENDERS.values())
    keys = [key.strip().lower() for key in backend.split(",") if key.strip()]
    for key in keys:
        if key not in CONTENDERS:
            raise ParameterError(f"no backend is called {key!r}; there are {', '.join(CONTENDERS)}")
    return [CONTENDERS[key] for key in CONTENDERS if key in keys]


# -- a run ----------------------------------------------------------------------------------------


def measure(
    out: Console,
    only: str | None,
    backend: str | None,
    folder: Path | None,
    *,
    quick: bool,
) -> bool:
    """Measure, show the table, write JSON and page. False when it was interrupted.

    Parameters
    ----------
    only, backend:
        Parts of workloads' names, and keys of contenders, separated by commas.
    folder:
        Where both files go; a new one in runs/ without.
    """
    present, absent = available.split(chosen_contenders(backend))
    if not present:
        raise ParameterError("nobody can compute here:\n" + "\n".join(
            f"  {CONTENDERS[key].label}: {why}" for key, why in absent.items()))  # fmt: skip
    cases = runner.plan(chosen_workloads(only), present, quick=quick)
    if not cases:
        raise ParameterError("none of these backends can compute any of these workloads")
    folder = folder or Path("runs") / f"bench-{datetime.now(UTC):%Y-%m-%d-%H%M%S}"
    report = runner.begin(cases, present, absent, quick)
    tell_absent(out, absent)
    load = report["machine"]["load"]
    if load and load[0] > report["machine"]["cores"] / 2:
        out.print(
            f"others compute on this machine, too (load {load[0]:.1f}): times will be longer, most "
            "of all those of threads that wait by spinning",
            soft_wrap=True,
        )
    interrupted = False
    try:
        with Pool() as workers, _progress(out, len(cases)) as watch:
            runner.run(cases, report, pool=workers, watch=watch,
                       save=lambda found: save(found, folder))  # fmt: skip
    except KeyboardInterrupt:
        interrupted = True
    save(report, folder, with_page=True)
    show(out, report)
    # Some only show when they start that they cannot.
    tell_absent(out, {key: why for key, why in report["absent"].items() if key not in absent})
    out.print(f"{folder / JSON}\n{folder / PAGE}", soft_wrap=True)
    return not interrupted


JSON, PAGE = "bench.json", "bench.html"


def save(report: Report, folder: Path, *, with_page: bool = False) -> None:
    common.write_json(folder / JSON, report)
    if with_page:
        write_page(report, folder / PAGE)


def write_page(report: Report, path: Path) -> None:
    draft = path.with_name(path.name + ".part")
    draft.write_text(page(report), encoding="utf-8")
    draft.replace(path)


def tell_absent(out: Console, absent: dict[str, str]) -> None:
    """Who cannot compute here; contenders with the same reason in one line."""
    reasons: dict[str, list[str]] = {}
    for key, why in absent.items():
        reasons.setdefault(why, []).append(key)
    for why, keys in reasons.items():
        out.print(Text(f"without {', '.join(keys)}: {why}"), soft_wrap=True)


@contextmanager
def _progress(out: Console, total: int) -> Iterator[Callable[[runner.Case], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("starting", total=total)
        started = False

        def watch(case: runner.Case) -> None:
            nonlocal started
            bar.update(task, advance=int(started), description=f"{case.work.name}, {case.size}")
            started = True

        yield watch


# -- tables ---------------------------------------------------------------------------------------


def show(out: Console, report: Report) -> None:
    """A table for each device, the speed-ups in short, and what went wrong."""
    devices = dict.fromkeys(about["device"] for about in report["contenders"].values())
    for device in devices:
        table = table_of(report, device)
        if table.row_count:
            out.print(table)
            out.print(Text(in_short(report, device)), soft_wrap=True)
    for name, size, label, why in summary.problems(report):
        out.print(Text(f"{name}, {size}: {label} was not timed: {why}"), soft_wrap=True)


def table_of(report: Report, device: str) -> Table:
    """The largest size of each workload."""
    about = report["devices"].get(device, {}).get("name", report["machine"]["cpu"])
    what = "a quick check of small sizes, no result" if report["quick"] else "the largest sizes"
    table = Table(title=Text(f"{device}, {about}: {what}"))
    for heading in ("workload", "contender"):
        table.add_column(heading, overflow="fold")
    for heading in ("median", "quartiles", "× gpugrad", "roofline"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, size in summary.last_sizes(report):
        found = [line for line in summary.lines(report, name, size) if line.device == device]
        for number, line in enumerate(found):
            low, high = line.quartiles
            last = number + 1 == len(found)
            table.add_row(
                f"{name}, {size}" if number == 0 else "", line.label, seconds_text(line.median),
                f"{seconds_text(low)} – {seconds_text(high)}",
                "–" if line.ratio is None else multiple(line.ratio),
                "–" if line.share is None else f"{line.share:.0%}",
                style="bold" if line.ratio == 1 else None, end_section=last,
            )  # fmt: skip
    return table


def in_short(report: Report, device: str) -> str:
    """Geometric means over all workloads of everybody's time as a multiple of gpugrad's."""
    parts = [f"{label} {multiple(mean)} in {count}"
             for label, mean, count in summary.means(report, device)]  # fmt: skip
    if not parts:
        return "nobody to compare with"
    return f"times gpugrad's, geometric mean over workloads: {'; '.join(parts)}"


def multiple(ratio: float) -> str:
    return f"{ratio:.0f} ×" if ratio >= 100 else f"{ratio:.3g} ×"


def list_everything(out: Console) -> None:
    """Contenders with what is missing for them, and workloads with their sizes."""
    present, absent = available.split()
    backends = Table(title="backends")
    for heading in ("--backend", "what", "can it compute here?"):
        backends.add_column(heading, overflow="fold")
    for key, who in CONTENDERS.items():
        backends.add_row(key, who.label, Text("yes" if who in present else absent[key]))
    out.print(backends)
    table = Table(title="workloads")
    for heading in ("--only", "what it computes", "sizes"):
        table.add_column(heading, overflow="fold")
    for work in workloads().values():
        table.add_row(work.name, work.what, "; ".join(work.sizes))
    out.print(table)


# -- results that are there -----------------------------------------------------------------------


def draw(out: Console, result: Path) -> None:
    """The page of a result, beside it."""
    report = summary.load(result)
    where = result.with_suffix(".html")
    write_page(report, where)
    show(out, report)
    out.print(str(where), soft_wrap=True)


def compare(out: Console, first: Path, second: Path) -> None:
    """What changed from one result to another."""
    before, after = summary.load(first), summary.load(second)
    changes = summary.compare(before, after)
    if not changes:
        raise ParameterError(f"{first} and {second} have measured nothing in common")
    for what, report in (("before", before), ("after", after)):
        out.print(Text(f"{what}: {summary.where(report)}"), soft_wrap=True)
    if before["machine"]["cpu"] != after["machine"]["cpu"]:
        out.print("[bold]these are two machines: the ratios compare them, too[/]")
    out.print(_changes(changes))
    counts = {v: sum(c.verdict == v for c in changes) for v in ("slower", "faster", "same")}
    out.print(f"{counts['slower']} slower, {counts['faster']} faster, {counts['same']} within the "
              "noise", soft_wrap=True)  # fmt: skip
    moved = summary.drift(changes)
    if moved is not None:
        out.print(f"peers took {moved:.3g} × as long (their median): so much is the machine's or "
                  "their versions' part", soft_wrap=True)  # fmt: skip


def _changes(changes: Sequence[summary.Change]) -> Table:
    table = Table(title="what changed")
    table.add_column("workload, size", overflow="fold")
    table.add_column("contender", overflow="fold")
    for heading in ("before", "after", "after ÷ before", "noise", ""):
        table.add_column(heading, justify="right", overflow="fold")
    styles: dict[str, Any] = {"slower": "red", "faster": "green", "same": "dim"}
    for c in sorted(changes, key=lambda c: (c.verdict == "same", not c.own, -c.ratio)):
        low, high = c.band
        table.add_row(
            f"{c.workload}, {c.size}", c.contender, seconds_text(c.before), seconds_text(c.after),
            f"{c.ratio:.3g}", f"{low:.2f} to {high:.2f}", Text(c.verdict, styles[c.verdict]),
        )  # fmt: skip
    return table
