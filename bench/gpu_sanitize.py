"""compute-sanitizer over every family of kernels: bad accesses, races, memory that nobody wrote."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.gpu_device import Notes, NotRun, fake_counts, open_device, seconds_left

TOOLS = ("memcheck", "racecheck", "initcheck")
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin", "/usr/local/cuda/compute-sanitizer")
WORKER = Path(__file__).with_name("gpu_parts.py")


def program(places: Iterable[str] = PLACES) -> str | None:
    """Where compute-sanitizer is; None if it is nowhere."""
    found = shutil.which("compute-sanitizer")
    return found or next((f"{place}/compute-sanitizer" for place in places
                          if Path(place, "compute-sanitizer").is_file()), None)  # fmt: skip


def parse(output: str) -> dict[str, Any]:
    """What it found: errors in all (None if it did not come to its end), and where."""
    summary = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: (\d+).*)$", output, re.MULTILINE)
    where = re.findall(r"^=+ +(?:at|in) (\S+?)(?:\+0x\w+)?(?: in \S+)?$", output, re.MULTILINE)
    refused = re.search(r"(Device not supported.*|Unable to find .*|Internal .*rror.*)", output)
    return {
        "errors": int(summary[-1][1]) if summary else None,
        "summary": summary[-1][0] if summary else "",
        "refused": refused[1][:200] if refused else "",
        "where": sorted(set(where))[:10],
        "calls": sum(int(n) for n in re.findall(r": (\d+) calls$", output, re.MULTILINE)),
    }


def sanitize(notes: Notes, options: argparse.Namespace) -> None:
    """One tool over one call of every kernel, on few elements."""
    open_device(options.device)  # says why when there is none
    tool = program()
    if tool is None and fake_counts() is None:
        raise NotRun("compute-sanitizer is not installed")
    command = [sys.executable, str(WORKER), "touch", "--device", options.device, "--small"]
    if fake_counts() is not None:  # nothing to look at; the calls are made all the same
        command.append("--fake")
        tool = None
    elif tool is not None:
        command = [tool, "--tool", options.tool, *command]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False,
                             timeout=max(1.0, seconds_left() - 2))  # fmt: skip
        output, ended = run.stdout + run.stderr, run.returncode
    except subprocess.TimeoutExpired as late:
        raw = late.stdout or b""
        output, ended = raw.decode(errors="replace") if isinstance(raw, bytes) else raw, -1
    notes.put(tool=options.tool, with_tool=tool is not None, ended=ended,
              output=output[-1500:], **parse(output))  # fmt: skip
