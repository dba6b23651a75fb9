"""Run workloads: everybody agrees first, then takes turns; what is done is kept as it is done."""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpugrad.bench import common
from gpugrad.bench.processes import Pool, Problem
from gpugrad.bench.workload import CONTENDERS, THREADS, Contender, Workload

#: What the JSON of a run says it is. The version goes up when a reader of the old one would be
#: wrong.
FORMAT, VERSION = "gpugrad bench", 1


@dataclass(frozen=True)
class Budget:
    """How long a case is timed.

    Attributes
    ----------
    seconds:
        For all contenders and rounds together, as far as the fewest rounds allow.
    least, most:
        Rounds.
    turn:
        Seconds of a contender's turn in a round, at least.
    """

    seconds: float
    least: int
    most: int
    turn: float


FULL, SMALLER, QUICK = Budget(4.0, 5, 15, 0.1), Budget(0.5, 5, 7, 0.002), Budget(0.2, 3, 3, 0.001)


@dataclass(frozen=True)
class Case:
    """A workload of a size, who computes it, and why others do not."""

    work: Workload
    size: str
    contenders: tuple[Contender, ...]
    refused: Mapping[str, str]
    budget: Budget


def plan(
    works: Iterable[Workload], contenders: Sequence[Contender], *, quick: bool = False
) -> list[Case]:
    """Every size of every workload, the largest with the most time; or, quickly, the smallest of
    those that are not much alike."""
    cases = []
    for work in works:
        if quick and work.variant:
            continue
        labels = list(work.sizes)
        for label in labels[:1] if quick else labels:
            refused = {c.key: work.refuses(c, label, quick) for c in contenders}
            cases.append(
                Case(
                    work, label,
                    tuple(c for c in contenders if refused[c.key] is None),
                    {key: why for key, why in refused.items() if why is not None},
                    QUICK if quick else FULL if label == labels[-1] else SMALLER,
                )
            )  # fmt: skip
    return [case for case in cases if case.contenders]


# -- one case -------------------------------------------------------------------------------------


def disagreement(
    expected: Sequence[Sequence[float]], found: Sequence[Sequence[float]], tolerance: float
) -> str | None:
    """By how much results differ, in words; None when they agree."""
    if [len(x) for x in expected] != [len(x) for x in found]:
        return "its results have other shapes"
    for k, (a, b) in enumerate(zip(expected, found)):
        scale = max(1.0, a[0])  # the largest magnitude goes first
        worst = max((abs(x - y) for x, y in zip(a, b)), default=0.0)
        if not worst <= tolerance * scale:
            return f"result {k + 1} differs by {worst / scale:.2g}, more than {tolerance:g}"
    return None


def measure(pool: Pool, case: Case) -> dict[str, Any]:
    """What a case's entry in the JSON says: each round's seconds, and what went wrong."""
    size: dict[str, Any] = {"budget": case.budget.seconds, **case.work.cost(case.size)}
    seconds: dict[str, list[float]] = {}
    host: dict[str, list[float]] = {}
    problems: dict[str, str] = {}

    def ask(who: Contender, do: str, **request: Any) -> Any:
        """The result of a request; None, and the problem is noted, if there is none."""
        try:
            return pool.get(who).ask(do, contender=who.key, **request)
        except Problem as problem:
            problems[who.key] = str(problem)
            return None

    answers = {
        who: found
        for who in case.contenders
        if (found := ask(who, "load", workload=case.work.name, size=case.size)) is not None
    }
    reference = next((w for w in answers if w.own), next(iter(answers), None))
    for who, found in answers.items():
        assert reference is not None
        if why := disagreement(answers[reference], found, case.work.tolerance):
            problems[who.key] = f"disagrees with {reference.label}: {why}"
    counts, total = {}, 0.0
    for who in answers:
        if who.key not in problems and (first := ask(who, "turn", count=1)):
            one = max(first["seconds"], 1e-7)
            counts[who] = max(1, min(1000, math.ceil(case.budget.turn / one)))
            total += (counts[who] + 1) * one
    budget = case.budget
    # Where one round takes longer than all should, three have to do for quartiles.
    least = 3 if total > budget.seconds else budget.least
    rounds = max(least, min(budget.most, int(budget.seconds / max(total, 1e-9))))
    for _ in range(rounds):
        for who, count in counts.items():
            if who.key not in problems and (turn := ask(who, "turn", count=count)):
                seconds.setdefault(who.key, []).append(turn["seconds"])
                if "host" in turn:
                    host.setdefault(who.key, []).append(turn["host"])
    # Not in a `finally`: who interrupts a contender does not want to wait for its answer.
    for process in pool.running():
        try:
            process.ask("drop")
        except Problem:
            process.stop()
    if case.work.memory is not None and case.size == list(case.work.sizes)[-1]:
        size["memory"] = {
            who.key: used
            for who in case.contenders
            if who.key in seconds and (used := memory(pool, who, case)) is not None
        }
    for key in problems:  # rounds that were not finished compare with nothing
        seconds.pop(key, None)
        host.pop(key, None)
    return size | {"seconds": seconds, "problems": problems} | ({"host": host} if host else {})


def memory(pool: Pool, who: Contender, case: Case) -> int | None:
    """Bytes that a pass holds beyond its operands, in a process of its own."""
    process = None
    try:
        process = pool.fresh(who)
        process.ask("load", contender=who.key, workload=case.work.name, size=case.size)
        found: int = process.ask("memory", contender=who.key)
        return found
    except Problem:  # a system that does not tell
        return None
    finally:
        if process is not None:
            process.stop()


# -- all of them ----------------------------------------------------------------------------------


def begin(
    cases: Sequence[Case], contenders: Sequence[Contender], absent: Mapping[str, str], quick: bool
) -> dict[str, Any]:
    """The JSON of a run before anything is measured.

    `absent` are contenders that cannot compute here, and why.
    """
    everybody = {c.key: c for c in contenders} | {key: CONTENDERS[key] for key in absent}
    return {
        "format": FORMAT, "version": VERSION, "quick": quick, "complete": False,
        "threads": THREADS, **common.provenance(), "driver": driver(),
        "devices": {}, "ceilings": {},
        "contenders": {c.key: {"label": c.label, "library": c.library, "variant": c.variant,
                               "device": c.device, "own": c.own} for c in everybody.values()},
        "absent": dict(absent),
        "workloads": {
            case.work.name: {"what": case.work.what, "kind": case.work.kind,
                             "least": case.work.least, "memory": case.work.memory,
                             "refused": dict(case.refused), "sizes": {}}
            for case in cases
        },
    }  # fmt: skip


def driver() -> str | None:
    """The version of the GPU's driver; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        run = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip().splitlines()[0] if run.stdout.strip() else None


def run(
    cases: Sequence[Case],
    report: dict[str, Any],
    *,
    pool: Pool,
    save: Callable[[dict[str, Any]], None] = lambda report: None,
    watch: Callable[[Case], None] = lambda case: None,
) -> None:
    """Measure all cases into ``report``, and save it after each.

    A KeyboardInterrupt passes through; what was done until then is in the report.
    """
    start = time.perf_counter()
    for key in report["contenders"]:
        who = CONTENDERS[key]
        if key in report["absent"]:
            continue
        try:
            about = pool.get(who).about
            if who.own and who.device not in report["ceilings"]:
                report["devices"][who.device] = about
                found = pool.get(who).ask("ceilings", device=who.device, quick=report["quick"])
                report["ceilings"][who.device] = found
        except Problem as problem:
            if not pool.can(who):
                report["absent"][key] = str(problem)
    save(report)
    for case in cases:
        watch(case)
        case = replace(
            case, contenders=tuple(c for c in case.contenders if c.key not in report["absent"])
        )
        began = time.perf_counter()
        entry = measure(pool, case)
        entry["took"] = round(time.perf_counter() - began, 2)
        report["workloads"][case.work.name]["sizes"][case.size] = entry
        report["took"] = round(time.perf_counter() - start, 1)
        save(report)
    report["complete"] = True
    save(report)
