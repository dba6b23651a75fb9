"""The report of one family of workloads, for `bench/run.py` and for a script of its own."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from gpugrad.bench import common, runner, summary
from gpugrad.bench.processes import Pool
from gpugrad.bench.workload import CONTENDERS, workloads_of


def report(family: str, quick: bool, only: str = "") -> dict[str, Any]:
    """Measure the workloads of a module on the CPU, and judge those that promise something."""
    names = only.split(",") if only else None
    works = [w for w in workloads_of(family) if names is None or w.name in names]
    contenders = [
        c for c in CONTENDERS.values()
        if c.on_host and importlib.util.find_spec(c.library) is not None
    ]  # fmt: skip
    cases = runner.plan(works, contenders, quick=quick)
    found = runner.begin(cases, contenders, {}, quick)
    with Pool() as pool:
        runner.run(cases, found, pool=pool)
    about = common.provenance()
    return {"benchmark": family, "quick": quick, "threads": found["threads"], **about,
            "results": found["workloads"], "verdicts": verdicts(found),
            "table": common.table(summary.rows(found))}  # fmt: skip


def verdicts(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One for every workload that has to be so many times as fast as the best peer, and one for
    everybody who took no part because something went wrong."""
    made = []
    for name, size in summary.last_sizes(found):
        least = found["workloads"][name]["least"]
        lines = summary.lines(found, name, size)
        peers = [line for line in lines if not line.own and line.ratio is not None]
        if least is not None and peers:
            best = min(peers, key=lambda line: line.median)
            assert best.ratio is not None
            made.append(common.verdict(f"{name}, {size}, over {best.label}", best.ratio, least,
                                       "x", at_least=True))  # fmt: skip
        elif least is not None:
            made.append(common.not_run(name, "no peer is installed"))
        used = found["workloads"][name]["sizes"][size].get("memory", {})
        if "numba" in used and "torch" in used:
            made.append(common.verdict(f"{name}, {size}: memory, of PyTorch's",
                                       used["numba"] / max(1, used["torch"]),
                                       found["workloads"][name]["memory"], "x"))  # fmt: skip
    made += [common.not_run(f"{name}, {size}, {label}", why)
             for name, size, label, why in summary.problems(found)]  # fmt: skip
    return made


def main(doc: str | None, family: str, arguments: list[str] | None = None) -> None:
    """The command line of a family."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: no result")
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--json", help="write the report to this file")
    options = parser.parse_args(arguments)
    common.finish(report(family, options.quick, options.only), options.json)
