"""Another revision beside this one: the same workloads, alternating processes, one table.

``python bench/against.py REV [--only WORKLOAD,…] [--quick] [--json PATH]``. The revision is checked
out into a work tree in a temporary folder, which is taken away again at the end. Both run the text
of this file and of `gpu_nets.py`, so that only gpugrad differs. This one takes part twice: what
lies between it and itself is noise, and a difference within that band is called none.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common, gpu_nets

THREADS = 2
#: Sizes for a CPU, where they are not those for a GPU; and for a quick check.
SIZES = {"gpt": {"batch": 16, "length": 64, "width": 128, "heads": 4, "layers": 4, "classes": 96}}
CHAIN = 1000
WORKLOADS = ("chain", *gpu_nets.WORKLOADS)

#: Losses that differ by more are not rounding.
AGREE = 1e-3


class AgainstError(Exception):
    """The comparison cannot be made, and why."""


# -- the other revision ---------------------------------------------------------------------------


def git(*arguments: str, root: Path) -> str:
    """What git answers."""
    run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True,
                         check=False)  # fmt: skip
    if run.returncode:
        raise AgainstError(f"git {arguments[0]}: {run.stderr.strip() or 'failed'}")
    return run.stdout.strip()


@contextmanager
def checked_out(revision: str, root: Path = common.ROOT) -> Iterator[tuple[Path, str]]:
    """A work tree of a revision, and its commit; gone afterwards, whatever happens."""
    commit = git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}", root=root)
    with tempfile.TemporaryDirectory(prefix="gpugrad_against_") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", str(tree), commit, root=root)
        try:
            link = tree / "gpugrad" / "kernels"
            if not (link / "__init__.py").is_file():
                raise AgainstError(f"{revision}: its gpugrad/kernels is not there")
            yield tree, commit
        finally:
            git("worktree", "remove", "--force", str(tree), root=root)


# -- a contender ----------------------------------------------------------------------------------


def chain(quick: bool) -> Callable[[], Any]:
    """x*a+b on 8×8, forward and backward."""
    import numpy as np

    import gpugrad as gg

    drawn = np.random.default_rng(0).standard_normal((4, 8, 8)).astype("float32")
    x, a, b, g = (gg.tensor(v, requires_grad=i == 0) for i, v in enumerate(0.1 * drawn))

    def run() -> Any:
        x.grad = None
        y = x
        for _ in range(20 if quick else CHAIN):
            y = y * a + b
        y.backward(g)
        return y.detach().sum()

    return run


def serve(tree: str, workload: str, quick: bool) -> None:
    """Be a contender: gpugrad of `tree`, and nothing else of it."""
    sys.path.insert(0, tree)
    import gpugrad

    home = Path(str(gpugrad.__file__)).resolve().parents[1]
    if home != Path(tree).resolve():
        raise AgainstError(f"gpugrad comes from {home}, not from {tree}")
    if workload == "chain":
        run = chain(quick)
    else:
        work = gpu_nets.WORKLOADS[workload]
        sizes = work.small if quick else {**work.full, **SIZES.get(workload, {})}
        run = gpu_nets.with_gpugrad(work, sizes, "cpu")
    common.serve(run, lambda: [float(run().item()) for _ in range(gpu_nets.BATCHES)])


# -- comparing ------------------------------------------------------------------------------------


def judge(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The other revision's time over this one's, and the band in which that says nothing."""
    here, again, other = (seconds[name] for name in ("here", "here again", "there"))
    # Round by round: a drift of the machine hits all alike.
    noise = common.ratio(again, here)
    found = common.ratio(other, [statistics.fmean(pair) for pair in zip(here, again, strict=True)])
    band = max(abs(noise["q1"] - 1), abs(noise["q3"] - 1), (found["q3"] - found["q1"]) / 2)
    ratio = found["median"]
    word = "slower" if ratio < 1 - band else "faster" if ratio > 1 + band else "no difference"
    return {"ratio": ratio, "quartiles": [found["q1"], found["q3"]],
            "band": common.round_to(band, 2), "verdict": word}  # fmt: skip


def compare(tree: Path, workload: str, quick: bool, rounds: int) -> dict[str, Any]:
    """A workload in both trees."""
    more = ["--only", workload, *(["--quick"] if quick else [])]
    trees = {"here": common.ROOT, "there": tree, "here again": common.ROOT}
    commands = {name: ["--serve", str(place), *more] for name, place in trees.items()}
    seconds, answers = common.alternate_processes(
        __file__, commands, rounds=rounds, threads=THREADS
    )
    gap = max(abs(a - b) for a, b in zip(answers["here"], answers["there"], strict=True))
    row = {"workload": workload, "here_ms": common.spread(seconds["here"], 1e3)["median"],
           "there_ms": common.spread(seconds["there"], 1e3)["median"], **judge(seconds),
           "computes": "the same" if gap <= AGREE else f"something else, by {gap:.2g}"}  # fmt: skip
    return row | {"seconds": seconds}


def table(rows: Sequence[dict[str, Any]], revision: str) -> str:
    shown = [
        {"workload": r["workload"], f"{revision}, ms": r.get("there_ms"),
         "here, ms": r.get("here_ms"), "times as fast here": r.get("ratio"),
         "noise": None if "band" not in r else f"± {100 * r['band']:.2g} %",
         "verdict": r["verdict"], "computes": r.get("computes")}
        for r in rows
    ]  # fmt: skip
    return common.table(shown)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", nargs="?", help="anything that git takes for a commit")
    parser.add_argument("--only", default="", help=f"of {', '.join(WORKLOADS)}, with commas")
    parser.add_argument("--quick", action="store_true", help="few and small: a check, no result")
    parser.add_argument("--json", help="write all seconds to this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, options.only, options.quick)
        return 0
    if not options.revision:
        parser.error("the following arguments are required: revision")
    chosen = options.only.split(",") if options.only else list(WORKLOADS)
    if unknown := set(chosen) - set(WORKLOADS):
        parser.error(f"no workload {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the work tree is taken away
    rows: list[dict[str, Any]] = []
    try:
        with checked_out(options.revision) as (tree, commit):
            for workload in chosen:
                try:
                    rows.append(compare(tree, workload, options.quick, 3 if options.quick else 15))
                except RuntimeError as error:  # one of the two cannot compute it
                    why = str(error).strip().splitlines()[-1][:150]
                    rows.append({"workload": workload, "verdict": f"not run: {why}"})
                print(f"{workload}: {rows[-1]['verdict']}", file=sys.stderr, flush=True)
    except AgainstError as error:
        print(error, file=sys.stderr)
        return 2
    told = {"revision": options.revision, "commit_there": commit, "quick": options.quick,
            "threads": THREADS, **common.provenance(), "rows": rows}  # fmt: skip
    if options.json:
        common.write_json(os.path.abspath(options.json), told)
    if options.quick:
        print("quick: no result")
    print(f"{options.revision} is {commit[:12]}; here is {told['commit']}\n")
    print(table(rows, options.revision))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
