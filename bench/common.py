"""What benchmarks share: the measuring process, turns, statistics, provenance, tables."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
#: What has to be on the path to import gpugrad: the checkout, or where the package is installed.
ROOT = _HERE.parents[1] if (_HERE.parent / "errors.py").is_file() else _HERE.parent
RESULTS = ROOT / "bench" / "results"

#: Settings that tune a BLAS to somebody's taste: the measuring process runs without them.
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS",
           "GPUGRAD_THREADS")  # fmt: skip

#: What a line of a contender in another process begins with, if it is for us.
ANSWER = "@answer "

CONTENDERS = ("numpy", "torch", "jax", "autograd", "mygrad", "numba", "cupy", "safetensors")
DISTRIBUTIONS = {"cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy")}


# -- the measuring process ------------------------------------------------------------------------


def environment(threads: int | None = None) -> dict[str, str]:
    """The variables of a measuring process: this checkout first, a fixed number of threads."""
    env = {k: v for k, v in os.environ.items() if k not in UNSET}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    if threads is not None:
        env |= dict.fromkeys(THREADS, str(threads))
    return env


def measure(
    script: str, *arguments: str, threads: int | None = 1, timeout: float = 600
) -> dict[str, Any]:
    """Run ``python script --measure FILE arguments`` afresh and return the JSON it writes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, script, "--measure", str(out), *arguments]
        run = subprocess.run(
            command, env=environment(threads), capture_output=True, text=True, timeout=timeout,
            check=False, cwd=folder,
        )  # fmt: skip
        if run.returncode != 0 or not out.is_file():
            raise RuntimeError(
                f"{Path(script).name} {' '.join(arguments)} ended with {run.returncode}:\n"
                f"{run.stdout[-2000:]}{run.stderr[-4000:]}"
            )
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write ``content``, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(content, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    draft.replace(path)


# -- timing and statistics ------------------------------------------------------------------------


def alternate(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmups: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every contender in every round: A B C, A B C, …, so that all meet the same load.

    For contenders of one thread ``time.process_time`` leaves out what other programs take.

    Python's cycle collector runs during a turn as it does in a user's program, but before each turn
    it is made to clean up, so that nobody pays for what another left behind.
    """
    for _ in range(warmups):
        for run in contenders.values():
            run()
    gc.collect()
    gc.freeze()  # the modules of all the libraries need not be looked through at every turn
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    try:
        for _ in range(rounds):
            for name, run in contenders.items():
                gc.collect()
                start = clock()
                run()
                seconds[name].append(clock() - start)
    finally:
        gc.unfreeze()
    return seconds


def serve(run: Callable[[], Any], answer: Callable[[], Any]) -> None:
    """Be a contender of :func:`alternate_processes`: do what its lines ask for until they end.

    `answer` gives what the contenders have to agree on, for JSON; it is asked once, first.
    """
    for line in sys.stdin:
        word, *count = line.split()
        if word == "answer":
            found: Any = answer()
        else:
            gc.collect()
            found = []
            for _ in range(int(count[0])):
                start = time.perf_counter()
                run()
                found.append(time.perf_counter() - start)
        print(ANSWER + json.dumps(found), flush=True)


def alternate_processes(
    script: str,
    commands: Mapping[str, Sequence[str]],
    *,
    rounds: int,
    repeats: int = 4,
    threads: int | None = None,
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """As :func:`alternate`, each contender in a process of its own, in which it calls `serve`.

    For contenders that disturb each other in one process, as the threads of OpenMP do, which wait
    for more work by spinning. In its turn a contender runs ``1 + repeats`` times, and the first,
    for which its threads and caches wake up, does not count. Seconds are the median of a turn.

    Parameters
    ----------
    commands:
        The arguments of the script that make it a contender, by name.

    Returns
    -------
    Seconds of every contender in every round, and what each answered before the first.
    """
    running: dict[str, subprocess.Popen[str]] = {}

    def ask(name: str, line: str) -> Any:
        child = running[name]
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(line + "\n")
            child.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, as is noticed below
        for reply in child.stdout:
            if reply.startswith(ANSWER):
                return json.loads(reply[len(ANSWER) :])
        child.wait()
        errors.seek(0)
        raise RuntimeError(f"{Path(script).name}: {name} ended:\n{errors.read()[-4000:]}")

    with tempfile.TemporaryFile("w+") as errors:
        try:
            answers = {}
            for name, arguments in commands.items():
                running[name] = subprocess.Popen(
                    [sys.executable, script, *arguments], env=environment(threads), text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                )  # fmt: skip
                answers[name] = ask(name, "answer")
            seconds: dict[str, list[float]] = {name: [] for name in commands}
            for _ in range(rounds):
                for name in commands:
                    turn = ask(name, f"turn {1 + repeats}")
                    seconds[name].append(statistics.median(turn[1:]))
            return seconds, answers
        finally:
            for child in running.values():
                child.kill()
                child.communicate()


def spread(samples: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Median, quartiles and least of ``samples`` times ``scale``."""
    values = sorted(s * scale for s in samples)
    if len(values) == 1:
        values *= 2
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round_to(middle), "q1": round_to(low), "q3": round_to(high),
            "min": round_to(values[0]), "n": len(samples)}  # fmt: skip


def ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """The spread of a/b, paired round by round: a drift of the machine hits both alike."""
    return spread([x / y for x, y in zip(a, b, strict=True)])


def round_to(x: float, digits: int = 4) -> float:
    """``x`` with so many significant digits."""
    if x == 0 or not math.isfinite(x):
        return x
    return round(x, digits - 1 - math.floor(math.log10(abs(x))))


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def forget_peak() -> bool:
    """Start the peak of resident memory anew, where the kernel lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_resident() -> int:
    """The most bytes that this process has had in memory since the last :func:`forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- where a number comes from --------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    """Date, commit, machine and versions behind a set of numbers."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "commit": commit(),
        "machine": machine(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def commit() -> str:
    """The commit of the checkout, with ``+`` when files differ from it."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(ROOT), *arguments],
                             capture_output=True, text=True, check=False)  # fmt: skip
        return run.stdout.strip() if run.returncode == 0 else ""

    try:
        name = git("rev-parse", "--short=12", "HEAD")
        if not name or name == "HEAD":
            return "none"
        return name + ("+" if git("status", "--porcelain", "--", "gpugrad", "kernels") else "")
    except OSError:
        return "unknown"


def machine() -> dict[str, Any]:
    """CPU model, cores, memory, system and present load."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    details: dict[str, str] = {}
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            details.setdefault(key.strip(), value.strip())
        model = details.get("model name", model)
        if "cpu family" in details:
            model += f" (family {details['cpu family']}, model {details.get('model', '?')})"
    memory = Path("/proc/meminfo")
    total = int(memory.read_text().split()[1]) // 1024 if memory.is_file() else None
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_MiB": total,
        "system": platform.platform(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }  # fmt: skip


def versions() -> dict[str, str | None]:
    """Version of gpugrad and of every contender; None for what is not installed."""
    found: dict[str, str | None] = {"gpugrad": own_version()}
    for name in CONTENDERS:
        found[name] = None
        for distribution in DISTRIBUTIONS.get(name, (name,)):
            try:
                found[name] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def own_version() -> str | None:
    """The version that the checkout states, read without importing it."""
    for line in (ROOT / "gpugrad" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    return None


# -- verdicts and tables --------------------------------------------------------------------------


def verdict(
    what: str, value: float, limit: float, unit: str, *, at_least: bool = False
) -> dict[str, Any]:
    """One line of the table at the end: a figure, what it must reach, and whether it does."""
    holds = value >= limit if at_least else value <= limit
    return {"what": what, "value": round_to(float(value)), "unit": unit,
            "target": f"{'≥' if at_least else '≤'} {limit:g}",
            "verdict": "holds" if holds else "falls short"}  # fmt: skip


def not_run(what: str, why: str) -> dict[str, Any]:
    """A verdict that could not be reached."""
    return {"what": what, "value": None, "unit": "", "target": "", "verdict": f"not run: {why}"}


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """A Markdown table of dictionaries, columns lined up."""
    columns = columns or list(rows[0]) if rows else list(columns or ())
    lines = [[str(c) for c in columns]]
    lines += [[cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
            for line in lines]  # fmt: skip
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def cell(value: Any) -> str:
    """One table cell."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value)


def verdict_table(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """The closing table."""
    rows = [{"figure": v["what"],
             "measured": f"{cell(v['value'])} {v['unit']}".strip(),
             "must be": v["target"] or "–",
             "verdict": v["verdict"]} for v in verdicts]  # fmt: skip
    return table(rows, ["figure", "measured", "must be", "verdict"])


# -- the command line of a benchmark --------------------------------------------------------------


def finish(report: Mapping[str, Any], path: str | None) -> None:
    """Print a benchmark's tables and verdicts, and write its JSON."""
    where = report["machine"]
    named = [f"{name} {v}" for name, v in report["versions"].items() if v is not None]
    print(f"{report['benchmark']}{' (quick: no result)' if report['quick'] else ''}, "
          f"{report['date']}, commit {report['commit']}\n{where['cpu']}, {where['cores']} cores, "
          f"threads {report['threads']}, load {where['load'][0]:.1f}\n"
          f"Python {report['python']}, {', '.join(named)}\n\n{report['table']}\n\n"
          f"{verdict_table(report['verdicts'])}")  # fmt: skip
    if path:
        write_json(path, report)
