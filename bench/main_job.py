"""The main job: `gpugrad train` on two data sets, wall seconds and test accuracy.

``python bench/main_job.py [--quick] [--json PATH]``. The command runs as a user runs it, with as
many threads as it likes; a short run before the timed one leaves bytecode and files warm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpugrad.bench import common

#: data set → (test accuracy to reach, wall seconds for the whole command)
TARGETS = {"digits": (0.97, 15.0), "fashion-mnist": (0.885, 90.0)}


def train(data: str, *options: str) -> dict[str, Any]:
    """One run of the command in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gpugrad.cli", "train", data, "--out", f"{folder}/run",
                   *options]  # fmt: skip
        start = time.perf_counter()
        run = subprocess.run(command, env=common.environment(), capture_output=True, text=True,
                             timeout=300, check=False, cwd=folder)  # fmt: skip
        seconds = time.perf_counter() - start
        if run.returncode != 0:
            return {"data": data, "error": f"ended with {run.returncode}: "
                    f"{(run.stderr or run.stdout).strip()[-500:]}"}  # fmt: skip
        metrics = Path(folder) / "run" / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return {
        "data": data, "wall_s": common.round_to(seconds), "epochs": len(rows),
        "test_accuracy": common.round_to(rows[-1]["test_accuracy"]),
        "loss": common.round_to(rows[-1]["loss"]),
        "samples_per_second": round(rows[-1]["samples_per_second"]),
    }  # fmt: skip


def report(quick: bool) -> dict[str, Any]:
    """Both data sets; a missing one is reported, not downloaded."""
    found = []
    verdicts = []
    for data, (accuracy, seconds) in TARGETS.items():
        if quick and data != "digits":
            continue
        train("digits", "--epochs", "1")
        result = train(data, *(["--epochs", "1"] if quick else []))
        found.append(result)
        if "error" in result:
            verdicts.append(common.not_run(f"train {data}", result["error"][-200:]))
            continue
        if quick:
            verdicts.append(common.not_run(f"train {data}", "quick: one epoch learns too little"))
            continue
        verdicts.append(common.verdict(f"train {data}: wall time", result["wall_s"], seconds, "s"))
        verdicts.append(common.verdict(f"train {data}: test accuracy", result["test_accuracy"],
                                       accuracy, "", at_least=True))  # fmt: skip
    columns = ["data", "wall_s", "epochs", "test_accuracy", "samples_per_second"]
    return {"benchmark": "main_job", "quick": quick, "threads": "default", **common.provenance(),
            "results": found, "verdicts": verdicts,
            "table": common.table(found, columns)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one epoch of the digits: a check")
    parser.add_argument("--json", help="write the report to this file")
    options = parser.parse_args(arguments)
    common.finish(report(options.quick), options.json)


if __name__ == "__main__":
    main()
