"""One command for a machine with a GPU: tests, every primitive, the main job, overhead, ceilings.

``python bench/gpu_check.py [--out FILE-OR-FOLDER] [--device cuda:0] [--only PART,…] [--dry-run]``

Needs this checkout, NumPy and CuPy; nothing is installed or downloaded, and gpugrad itself is taken
from the checkout. PyTorch, pytest, safetensors, typer are used where they are found, and the report
says which were missing. Every part runs in a process of its own under a time limit of its own; one
that fails or hangs does not stop the rest, and what it had found by then is kept. The JSON is
written again after every part: to ``--out``, or into the folder ``$OUT``, or to
``bench/results/gpu-<name>-<date>.json``. At the end there is one table; the exit status is 0 when
every figure holds. ``--dry-run`` goes through everything on the CPU, small, and proves nothing
about a GPU.
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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

WORKER = Path(__file__).with_name("gpu_parts.py")
TOTAL_SECONDS = 210.0
SCHEMA = 1

# What must be reached on a GPU.
DIGITS_ACCURACY = 0.97
#: float32 on two machines: rounding differs in every product, and more so the longer it trains.
CURVE_TOLERANCE = 0.02
HOST_SHARE_OF_TORCH = 1.0

Results = dict[str, Any]
Judge = Callable[[Results], list[dict[str, Any]]]


@dataclass
class Part:
    """One piece of the check: what runs, for how long, beside whom, and what it must show."""

    name: str
    about: str
    seconds: float
    group: int
    judge: Judge = field(default=lambda results: [])
    command: Sequence[str] | None = None
    arguments: Sequence[str] = ()


# -- running --------------------------------------------------------------------------------------


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
            sys.executable, str(WORKER), part.name, "--device", options.device,
            "--reference", "cpu", *(["--small"] if options.dry_run else []), *part.arguments,
        ]  # fmt: skip
        env = common.environment() | {"GPU_CHECK_NOTES": str(self.notes)}
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
) -> None:
    """Run the groups one after another, the parts of a group side by side."""
    start = time.monotonic()
    for group in sorted({p.group for p in parts}):
        active = []
        for part in (p for p in parts if p.group == group):
            left = total - (time.monotonic() - start)
            if left < 1:
                done(part.name, entry_not_run(f"the {total:.0f} s for all parts were over"))
                continue
            active.append(Running(part, options, left))
        while active:
            for running in [r for r in active if r.finished()]:
                active.remove(running)
                done(running.part.name, running.collect())
            time.sleep(0.02)


def entry_not_run(why: str) -> dict[str, Any]:
    return {"status": "not run", "why": why, "seconds": 0.0, "limit": 0.0, "results": {}}


# -- judging --------------------------------------------------------------------------------------


def judge_tests(results: Results) -> list[dict[str, Any]]:
    """No test marked gpu may fail, and some must have run."""
    outcomes = [t["outcome"] for t in results.get("tests", ())]
    bad = sum(o in ("failed", "error") for o in outcomes)
    passed = outcomes.count("passed")
    verdict = common.verdict(f"tests marked gpu that fail ({passed} pass, "
                             f"{outcomes.count('skipped')} skipped, "
                             f"{outcomes.count('not collected')} files not collected)",
                             bad, 0, "")  # fmt: skip
    if not passed and not bad:
        return [common.not_run("tests marked gpu", results.get("summary") or "none ran")]
    return [verdict]


def judge_primitives(results: Results) -> list[dict[str, Any]]:
    """Every primitive agrees with NumPy: value, gradient, second derivative."""
    rows = results.get("primitives", [])
    total = results.get("total", len(rows))
    out = []
    for check in ("value", "vjp", "second"):
        bad = sum(row[check].startswith("fail") for row in rows)
        good = sum(row[check] == "pass" for row in rows)
        out.append(common.verdict(f"operations of {len(rows)} whose {check} differs from NumPy's "
                                  f"({good} agree)", bad, 0, ""))  # fmt: skip
    if len(rows) < total:
        out.append(common.verdict("operations that were not reached", total - len(rows), 0, ""))
    return out


def judge_main_job(results: Results) -> list[dict[str, Any]]:
    """The digits are learnt on the device, along the curve of the CPU."""
    if "device" not in results:
        return [common.not_run("main job on the device", "it did not get to its end")]
    found = results["device"]
    out = [common.verdict("digits on the device: test accuracy", found["accuracy"],
                          DIGITS_ACCURACY, "", at_least=True)]  # fmt: skip
    if "curve_difference" in results:
        out.append(common.verdict("digits: loss curve beside the CPU's, greatest difference "
                                  "over the first loss", results["curve_difference"],
                                  CURVE_TOLERANCE, ""))  # fmt: skip
    return out


def judge_overhead(results: Results) -> list[dict[str, Any]]:
    """Host time per operation at most PyTorch's."""
    out = []
    for row in results.get("chains", ()):
        what = f"x*a+b on {row['shape']}: host time per operation, PyTorch = 1"
        if "share_of_torch" in row:
            out.append(common.verdict(what, row["share_of_torch"]["median"],
                                      HOST_SHARE_OF_TORCH, ""))  # fmt: skip
        else:
            out.append(common.not_run(what, results.get("torch", "PyTorch did not run")))
    return out or [common.not_run("overhead per operation", "no chain was finished")]


def merge_shards(entries: Mapping[str, dict[str, Any]]) -> Results:
    """The shards of the registry check as one result."""
    rows = [row for e in entries.values() for row in e["results"].get("primitives", ())]
    total = max((e["results"].get("total", 0) for e in entries.values()), default=0)
    return {"primitives": sorted(rows, key=lambda r: r["name"]), "total": total}


# -- plan, report ---------------------------------------------------------------------------------


def plan(shards: int) -> list[Part]:
    """The parts. Those that time something have the machine to themselves."""
    parts = [
        Part("environment", "GPU, driver, libraries, versions", 35, 0),
        Part("tests", "pytest -m gpu", 75, 1, judge_tests),
    ]
    parts += [
        Part(f"primitives-{i}", f"the registry against NumPy, share {i + 1} of {shards}", 75, 1,
             arguments=("--shard", str(i), "--shards", str(shards)))
        for i in range(shards)
    ]  # fmt: skip
    return [
        *parts,
        Part("main_job", "train every model on the device and on the CPU", 60, 2, judge_main_job),
        Part("overhead", "chain of x*a+b beside PyTorch", 20, 3, judge_overhead),
        Part("ceilings", "copy bandwidth, float32 matrix product", 15, 4),
    ]


def verdicts(parts: Sequence[Part], entries: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the closing table from what the parts found, partial results included."""
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
        out += judge_primitives(merge_shards(shards))
    return out


def failures(entries: Mapping[str, dict[str, Any]], most: int = 20) -> list[str]:
    """The first few things that went wrong, one line each."""
    lines = []
    for name, entry in entries.items():
        lines += [f"{name}: {test['name']}: {test['why']}"
                  for test in entry["results"].get("tests", ())
                  if test["outcome"] in ("failed", "error")]  # fmt: skip
        for row in entry["results"].get("primitives", ()):
            lines += [f"{row['name']}: {check}: {row[check].removeprefix('fail: ')}"
                      for check in ("value", "vjp", "second")
                      if row[check].startswith("fail")]  # fmt: skip
    if len(lines) > most:
        lines[most:] = [f"… and {len(lines) - most} more, in the JSON"]
    return [line[:200] for line in lines]


def figures(entries: Mapping[str, dict[str, Any]]) -> str:
    """The measured figures, beside the verdicts."""
    text = []
    chains = entries.get("overhead", {}).get("results", {}).get("chains", [])
    rows = [{"chain": row["shape"], "library": library, **row["libraries"][library]}
            for row in chains for library in row["libraries"]]  # fmt: skip
    if rows:
        columns = ["chain", "library", "host_us", "total_us", "event_us", "kernel_us", "kernels"]
        text.append(f"Per operation (forward and backward):\n\n{common.table(rows, columns)}")
    ceilings = entries.get("ceilings", {}).get("results", {}).get("ceilings", [])
    if ceilings:
        text.append(f"Ceilings:\n\n{common.table(ceilings)}")
    return "\n\n".join(text)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def destination(out: str | None, device_name: str, stamp: datetime, dry: bool) -> Path:
    """Where the JSON goes."""
    name = f"{'dry-run' if dry else 'gpu'}-{slug(device_name)}-{stamp:%Y-%m-%d}.json"
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
        "device": options.device, **common.provenance(), "parts": {}, "verdicts": [],
    }  # fmt: skip
    path = destination(options.out, "unknown", started, options.dry_run)

    def done(name: str, entry: dict[str, Any]) -> None:
        nonlocal path
        report["parts"][name] = entry
        report["seconds"] = round(time.monotonic() - clock, 1)
        report["verdicts"] = verdicts(parts, report["parts"])
        if options.dry_run:  # none of these lines shall be taken for a result
            for line in report["verdicts"]:
                line["verdict"] = f"dry run: {line['verdict']}"
        if name == "environment":
            named = entry["results"].get("gpu", {}).get("name", "unknown")
            path = destination(options.out, named, started, options.dry_run)
        common.write_json(path, report)
        why = f" ({entry['why']})" if entry["why"] else ""
        print(f"{name}: {entry['status']}{why}, {entry['seconds']:.1f} s", flush=True)

    run_all(parts, options, done, options.seconds)
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
        f"runtime {gpu.get('runtime', '?')}; commit {report['commit']}; {report['seconds']:.0f} s",
        ", ".join(f"{k} {v}" for k, v in versions.items()),
        f"not installed here: {', '.join(missing)}" if missing else "",
        "",
        figures(report["parts"]),
        "",
        *failures(report["parts"]),
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
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all parts")
    parser.add_argument("--dry-run", action="store_true", help="everything on the CPU, small")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cpu" if options.dry_run else "cuda:0")
    cores = common.machine()["cores"] or 2
    parts = plan(options.shards or max(1, min(6, cores // 2)))
    only = [name for name in options.only.split(",") if name]
    if only:
        parts = [p for p in parts if any(p.name.startswith(name) for name in only)]
    print(f"{'dry run: ' if options.dry_run else ''}device {options.device}, at most "
          f"{options.seconds:.0f} s")  # fmt: skip
    print(common.table([{"part": p.name, "what": p.about, "limit s": p.seconds, "step": p.group}
                        for p in parts]), flush=True)  # fmt: skip
    report, path = check(parts, options)
    print(summary(report, path))
    if options.dry_run:
        return int(any(e["status"] in ("failed", "timed out") for e in report["parts"].values()))
    return int(any(v["verdict"] != "holds" for v in report["verdicts"]))


if __name__ == "__main__":
    raise SystemExit(main())
