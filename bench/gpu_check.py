"""One command for a machine with a GPU: tests, every kernel, training steps, every claim.

``python bench/gpu_check.py [--quick] [--out FILE-OR-FOLDER] [--device cuda:0] [--only PART,…]
[--dry-run]``

Needs this checkout, NumPy and CuPy; nothing is installed or downloaded, and gpugrad itself is taken
from the checkout with the PTX that is in it. PyTorch, pytest, compute-sanitizer, safetensors, typer
are used where they are found, and the report says which were missing. Every part runs in a process
of its own under a time limit of its own; one that fails or hangs does not stop the rest, and what
it had found by then is kept. All parts end within eight minutes, those of ``--quick`` within two.

The JSON is written again every other second and after every part, so that little is lost when the
check itself is stopped: to ``--out``, or into the folder ``$OUT``, or to
``bench/results/gpu-<name>-<date>.json``. At the end there is one table; the exit status is 0 when
every figure holds. ``--dry-run`` goes through everything without a GPU, small: what needs right
results on the CPU, what launches and times on a stand-in for CuPy. It proves nothing about a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common, gpu_judge

WORKER = Path(__file__).with_name("gpu_parts.py")
#: For all parts; and for those of a quick check.
TOTAL_SECONDS, QUICK_SECONDS = 475.0, 118.0
#: For a part of a dry run, whose machine may be slow and have other things to do.
PATIENCE = 60.0
#: Between two writings of what the parts at work have found so far.
SNAPSHOT_SECONDS = 2.0
SCHEMA = 2

WORKLOADS = ("mlp", "deep", "cnn", "lstm", "gpt")
TOOLS = ("memcheck", "racecheck", "initcheck")

Results = dict[str, Any]
Judge = Callable[[Results], list[dict[str, Any]]]


@dataclass
class Part:
    """One piece of the check: what runs, for how long, beside whom, and what it must show.

    Attributes
    ----------
    group:
        Parts of a group run side by side.
    quick:
        The limit in a quick check; None if it is no part of one.
    launches:
        Whether a dry run needs the stand-in for CuPy, and not the CPU.
    """

    name: str
    about: str
    seconds: float
    group: int
    judge: Judge = gpu_judge.nothing
    quick: float | None = None
    launches: bool = False
    command: Sequence[str] | None = None
    arguments: Sequence[str] = ()


# -- running --------------------------------------------------------------------------------------


def how(part: Part, options: argparse.Namespace) -> list[str]:
    """Where a part runs, and how much of it."""
    quick = ["--quick"] if options.quick else []
    if not options.dry_run:
        return ["--device", options.device, *quick]
    where = ["--device", "cuda:0", "--fake"] if part.launches else ["--device", options.device]
    return [*where, "--small", *quick]


class Running:
    """A part at work: its process, its notes, its deadline."""

    def __init__(self, part: Part, options: argparse.Namespace, left: float) -> None:
        self.part = part
        self.limit = max(0.0, min(part.seconds, left))
        self.folder = tempfile.TemporaryDirectory(prefix="gpu_check_")
        self.notes = Path(self.folder.name) / "notes.jsonl"
        self.log = Path(self.folder.name) / "log.txt"
        self.start = time.monotonic()
        command = part.command or [
            sys.executable, str(WORKER), part.name, "--reference", "cpu", *how(part, options),
            *part.arguments,
        ]  # fmt: skip
        env = common.environment() | {"GPU_CHECK_NOTES": str(self.notes)}
        env.setdefault("TORCHINDUCTOR_CACHE_DIR", options.scratch)
        env["GPU_CHECK_DEADLINE"] = str(time.time() + self.limit)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                list(command), stdout=log, stderr=subprocess.STDOUT, env=env,
                cwd=self.folder.name, start_new_session=True,
            )  # fmt: skip

    def finished(self) -> bool:
        """Whether the process ended, by itself or because its time is over."""
        if self.process.poll() is not None:
            return True
        if time.monotonic() - self.start < self.limit:
            return False
        stop(self.process)
        return True

    def so_far(self) -> dict[str, Any]:
        """The entry of the report while it is at work."""
        return {"status": "stopped", "why": "the check was stopped while this was at work",
                "seconds": round(time.monotonic() - self.start, 1),
                "limit": round(self.limit, 1), "results": read_notes(self.notes)}  # fmt: skip

    def abandon(self) -> dict[str, Any]:
        """End it before its time."""
        entry = self.so_far()
        stop(self.process)
        self.folder.cleanup()
        return entry

    def collect(self) -> dict[str, Any]:
        """The part's entry of the report."""
        code = self.process.returncode
        seconds = time.monotonic() - self.start
        log = self.log.read_text(encoding="utf-8", errors="replace")
        results = read_notes(self.notes)
        why = results.pop("not_run", None)
        if why is not None:
            status = "not run"
        elif seconds >= self.limit and code != 0:
            status, why = "timed out", f"stopped after its limit of {self.limit:.0f} s"
        elif code != 0:
            status, why = "failed", last_line(log) or f"ended with status {code}"
        else:
            status = "done"
        self.folder.cleanup()
        entry = {"status": status, "why": why, "seconds": round(seconds, 1),
                 "limit": round(self.limit, 1), "results": results}  # fmt: skip
        if status in ("failed", "timed out"):
            entry["log"] = log[-3000:]
        return entry


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a part and everything it started: asked first, then made to."""
    for number, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue


def read_notes(path: Path) -> Results:
    """What a part wrote down, line by line; a line that was cut off in the middle is left out."""
    results: Results = {}
    if not path.is_file():
        return results
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            how, key, value = json.loads(line)
        except ValueError:
            continue
        if how == "put":
            results[key] = value
        else:
            results.setdefault(key, []).append(value)
    return results


def last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def run_all(
    parts: Sequence[Part],
    options: argparse.Namespace,
    done: Callable[[str, dict[str, Any]], None],
    total: float = TOTAL_SECONDS,
    so_far: Callable[[dict[str, dict[str, Any]]], None] = lambda entries: None,
    why_not: Callable[[], str] = str,
) -> None:
    """Run the groups one after another, the parts of a group side by side.

    `done` gets the entry of each part that has ended, `so_far` now and then those of the parts at
    work. `why_not` is asked before each group: why nothing more can run, or "". Whatever stops this
    function stops the parts, too, and what they had found is kept.
    """
    start = shown = time.monotonic()
    active: list[Running] = []
    try:
        for group in sorted({p.group for p in parts}):
            for part in (p for p in parts if p.group == group):
                left = total - (time.monotonic() - start)
                if why := why_not():
                    done(part.name, entry_not_run(why))
                    continue
                if left < 1:
                    done(part.name, entry_not_run(f"the {total:.0f} s for all parts were over"))
                    continue
                active.append(Running(part, options, left))
            while active:
                for running in [r for r in active if r.finished()]:
                    active.remove(running)
                    done(running.part.name, running.collect())
                if active and time.monotonic() - shown > SNAPSHOT_SECONDS:
                    so_far({r.part.name: r.so_far() for r in active})
                    shown = time.monotonic()
                time.sleep(0.02)
    finally:
        for running in active:
            done(running.part.name, running.abandon())


def entry_not_run(why: str) -> dict[str, Any]:
    return {"status": "not run", "why": why, "seconds": 0.0, "limit": 0.0, "results": {}}


# -- plan, report ---------------------------------------------------------------------------------


def plan(shards: int, quick: bool = False) -> list[Part]:
    """The parts. Those that time something have the machine to themselves."""
    judge = gpu_judge
    parts = [
        Part("environment", "GPU, driver, libraries, versions", 25, 0, quick=20, launches=True),
        Part("tests", "pytest -m gpu", 100, 1, judge.tests, quick=25),
    ]
    parts += [
        Part(f"primitives-{i}", f"the registry against NumPy, share {i + 1} of {shards}", 100, 1,
             arguments=("--shard", str(i), "--shards", str(shards)))
        for i in range(shards)
    ]  # fmt: skip
    parts += [
        Part(f"sanitizer-{tool}", f"compute-sanitizer {tool} on every kernel", 65, 2,
             judge.sanitizer, launches=True)
        for tool in TOOLS
    ]  # fmt: skip
    parts += [
        Part(f"compile-{name}", f"torch.compile of {name}, ahead of the clock", 65, 2,
             launches=True)
        for name in WORKLOADS
    ]  # fmt: skip
    parts += [
        Part("main_job", "train every model on the device and on the CPU", 50, 3, judge.main_job),
        Part("ceilings", "copy bandwidth, float32 matrix product", 12, 4, quick=8, launches=True),
        Part("claims", "figures that are claimed for GPUs", 30, 5, judge.claims, quick=16,
             launches=True),
        Part("kernels", "every family of kernels, share of a copy", 70, 6, judge.kernels, quick=19,
             launches=True),
        Part("overhead", "chain of x*a+b beside PyTorch", 18, 7, judge.overhead,
             launches=True),
    ]  # fmt: skip
    parts += [
        Part(f"steps-{name}", f"training step of {name} beside PyTorch", 18, 8 + i, judge.steps,
             quick=12 if name in ("mlp", "gpt") else None, launches=True)
        for i, name in enumerate(WORKLOADS)
    ]  # fmt: skip
    if not quick:
        return parts
    return [replace(p, seconds=p.quick) for p in parts if p.quick is not None]


def seconds_of(parts: Sequence[Part]) -> float:
    """The sum of the limits: of a group, that of its longest part."""
    groups = {p.group for p in parts}
    return sum(max(p.seconds for p in parts if p.group == group) for group in groups)


def verdicts(parts: Sequence[Part], entries: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the closing table from what the parts found, partial results included."""
    nothing = entries.get("environment", {})
    if nothing.get("status") == "not run":  # and so is everything else
        return [common.not_run("everything", nothing["why"])]
    out = []
    shards = {n: e for n, e in entries.items() if n.startswith("primitives-")}
    whole = shards and all(p.name in entries for p in parts if p.name.startswith("primitives-"))
    for part in parts:
        entry = entries.get(part.name)
        if entry is None:
            continue
        if entry["status"] == "not run":
            out.append(common.not_run(part.about, entry["why"]))
            continue
        if entry["status"] != "done":
            out.append({"what": part.about, "value": None, "unit": "", "target": "",
                        "verdict": f"{entry['status']}: {entry['why']}"})  # fmt: skip
        if entry["results"] and not part.name.startswith("primitives-"):
            out += part.judge(entry["results"])
    if whole and any(e["results"].get("primitives") for e in shards.values()):
        out += gpu_judge.primitives(gpu_judge.merge_shards(shards))
    return out


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def destination(
    out: str | None, device_name: str, stamp: datetime, dry: bool, quick: bool = False
) -> Path:
    """Where the JSON goes; that of a quick check not in the place of a whole one."""
    kind = "dry-run" if dry else "gpu-quick" if quick else "gpu"
    name = f"{kind}-{slug(device_name)}-{stamp:%Y-%m-%d}.json"
    given = out or os.environ.get("OUT")
    if given:
        path = Path(given).absolute()
        return path / name if path.is_dir() or given.endswith("/") else path
    if dry:
        return Path(tempfile.gettempdir()) / name
    return common.RESULTS / name


def check(parts: Sequence[Part], options: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Run all parts; the report, and where it was written."""
    started = datetime.now(UTC)
    clock = time.monotonic()
    report: dict[str, Any] = {
        "tool": "gpu_check", "schema": SCHEMA, "dry_run": options.dry_run,
        "device": options.device, "quick": options.quick, "whole": False,
        **common.provenance(), "parts": {}, "verdicts": [],
    }  # fmt: skip
    path = destination(options.out, "unknown", started, options.dry_run, options.quick)

    def note(entries: dict[str, dict[str, Any]]) -> None:
        report["parts"] |= entries
        report["seconds"] = round(time.monotonic() - clock, 1)
        report["verdicts"] = verdicts(parts, report["parts"])
        if options.dry_run:  # none of these lines shall be taken for a result
            for line in report["verdicts"]:
                line["verdict"] = f"dry run: {line['verdict']}"
        common.write_json(path, report)

    def done(name: str, entry: dict[str, Any]) -> None:
        nonlocal path
        if name == "environment":
            named = entry["results"].get("gpu", {}).get("name", "unknown")
            path.unlink(missing_ok=True)  # the name of the GPU is known now
            path = destination(options.out, named, started, options.dry_run, options.quick)
        note({name: entry})
        why = f" ({entry['why']})" if entry["why"] else ""
        print(f"{name}: {entry['status']}{why}, {entry['seconds']:.1f} s", flush=True)

    def why_not() -> str:
        found = report["parts"].get("environment", {})
        return "the environment has no GPU that can be used" * (found.get("status") == "not run")

    with tempfile.TemporaryDirectory(prefix="gpu_check_torch_") as options.scratch:
        try:
            run_all(parts, options, done, options.seconds, note, why_not)
            report["whole"] = True
        except KeyboardInterrupt:
            print("stopped; what was found by now is kept", flush=True)
        note({})
    return report, path


def summary(report: Mapping[str, Any], path: Path) -> str:
    """What stands on the screen at the end."""
    environment = report["parts"].get("environment", {}).get("results", {})
    gpu = environment.get("gpu", {})
    versions = {k: v for k, v in environment.get("versions", {}).items() if v}
    missing = environment.get("missing", [])
    lines = [
        "",
        "DRY RUN on the CPU: says nothing about a GPU" if report["dry_run"] else "",
        f"{gpu.get('name', 'no GPU seen')}, driver {gpu.get('driver', '?')}, "
        f"runtime {gpu.get('runtime', '?')}; commit {report['commit']}; {report['seconds']:.0f} s"
        f"{'' if report['whole'] else '; STOPPED before its end'}",
        ", ".join(f"{k} {v}" for k, v in versions.items()),
        f"not installed here: {', '.join(missing)}" if missing else "",
        "",
        gpu_judge.figures(report["parts"]),
        "",
        *gpu_judge.failures(report["parts"]),
        "",
        common.verdict_table(report["verdicts"]),
        f"\n{path}",
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="file or folder for the JSON (default: $OUT, bench/results)")
    parser.add_argument("--device", help="default: cuda:0; cpu in a dry run")
    parser.add_argument("--only", default="", help="names of parts, separated by commas")
    parser.add_argument("--shards", type=int, help="processes for the registry check")
    parser.add_argument("--seconds", type=float, help="for all parts")
    parser.add_argument("--quick", action="store_true", help="the most telling parts only")
    parser.add_argument("--dry-run", action="store_true", help="everything without a GPU, small")
    options = parser.parse_args(arguments)
    usual = QUICK_SECONDS if options.quick else TOTAL_SECONDS
    options.seconds = options.seconds or (20 * PATIENCE if options.dry_run else usual)
    options.device = options.device or ("cpu" if options.dry_run else "cuda:0")
    cores = common.machine()["cores"] or 2
    parts = plan(options.shards or max(1, min(6, cores // 2)), options.quick)
    only = [name for name in options.only.split(",") if name]
    if only:
        parts = [p for p in parts if any(p.name.startswith(name) for name in only)]
    if options.dry_run:  # no time matters: side by side, and with patience
        first = {p.name: 1 + i // (2 * cores) for i, p in enumerate(parts)} | {"environment": 0}
        parts = [replace(p, group=first[p.name], seconds=PATIENCE) for p in parts]
    print(f"{'dry run: ' if options.dry_run else ''}device {options.device}, at most "
          f"{min(options.seconds, seconds_of(parts)):.0f} s")  # fmt: skip
    print(common.table([{"part": p.name, "what": p.about, "limit s": p.seconds, "step": p.group}
                        for p in parts]), flush=True)  # fmt: skip
    # In the background of a shell, an interrupt would be ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: interrupt())
    report, path = check(parts, options)
    print(summary(report, path))
    if options.dry_run:
        return int(any(e["status"] in ("failed", "timed out") for e in report["parts"].values()))
    return int(not report["whole"] or any(v["verdict"] != "holds" for v in report["verdicts"]))


def interrupt() -> None:
    """A request to end is taken as Ctrl-C is."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
