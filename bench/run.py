"""Run every CPU benchmark; write one JSON file and the table in bench/results/README.md.

``python bench/run.py [--quick] [--only NAME,…] [--results FOLDER]``. One benchmark that fails does
not stop the others: the table says so.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpugrad.bench import common, family
from gpugrad.bench.workload import FAMILIES

#: Benchmarks that measure something else than the time of a workload.
SCRIPTS = ("overhead", "import_time", "long_chain", "leak", "main_job", "products", "data")
NAMES = (*SCRIPTS, *FAMILIES)
BEGIN, END = "<!-- begin: written by bench/run.py -->", "<!-- end -->"


def run_all(names: list[str], quick: bool) -> dict[str, Any]:
    """Reports by name, with what they took, and where they come from."""
    found: dict[str, Any] = {"quick": quick, **common.provenance(), "benchmarks": {}}
    for name in names:
        print(f"\n## {name}\n", flush=True)
        start = time.perf_counter()
        try:
            report = (
                importlib.import_module(f"gpugrad.bench.{name}").report(quick)
                if name in SCRIPTS
                else family.report(name, quick)
            )
            common.finish(report, None)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            print(why)
            report = {"benchmark": name, "results": None, "table": why[:300],
                      "verdicts": [common.not_run(name, why.splitlines()[0][:200])]}  # fmt: skip
        report["seconds"] = round(time.perf_counter() - start, 1)
        found["benchmarks"][name] = report
    return found


def markdown(found: dict[str, Any], source: str) -> str:
    """The verdicts of all benchmarks, the machine, and each benchmark's own table."""
    machine = found["machine"]
    named = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v)
    text = [
        f"{found['date']}, commit {found['commit']}, [{source}]({source})"
        f"{' (quick: a check, not a result)' if found['quick'] else ''}",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_MiB']} MiB, load "
        f"{machine['load'][0]:.1f} at the start; {machine['system']}; Python {found['python']}, "
        f"{named}. One thread unless said otherwise.",
        common.verdict_table([v for b in found["benchmarks"].values() for v in b["verdicts"]]),
    ]
    for name, b in found["benchmarks"].items():
        load = b["machine"]["load"][0] if "machine" in b else machine["load"][0]
        text.append(f"### {name}\n\nload {load:.1f} when it ended\n\n{b['table']}")
    return "\n\n".join(text)


def replace_between(page: str, text: str) -> str:
    """``page`` with ``text`` between the two markers, which are put at its end if missing."""
    if BEGIN not in page or END not in page:
        page = f"{page.rstrip()}\n\n{BEGIN}\n{END}\n".lstrip()
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small: a check, not a result")
    parser.add_argument("--only", default=",".join(NAMES), help="names, separated by commas")
    parser.add_argument("--results", default=str(common.RESULTS), help="the folder to write into")
    options = parser.parse_args(arguments)
    folder = Path(options.results)
    found = run_all(options.only.split(","), options.quick)
    name = f"cpu-{datetime.now(UTC):%Y-%m-%d}.json"
    common.write_json(folder / name, found)
    page = folder / "README.md"
    old = page.read_text(encoding="utf-8") if page.is_file() else "# Results\n"
    page.write_text(replace_between(old, markdown(found, name)), encoding="utf-8")
    print(f"\n{folder / name}\n{page}")


if __name__ == "__main__":
    main()
