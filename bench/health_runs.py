"""Sick training runs, what is said of them, and what helps: real runs of `gpugrad train`.

``python bench/health_runs.py [--only KIND,…] [--out PATH] [--reports FOLDER] [--page PATH]``. Runs
everything that the table `RUNS` lists, checks it, and prints what came out. ``--out`` writes it as
JSON, ``--reports`` keeps the folders of the runs with their reports, and ``--page`` writes the
figures and the pictures into the page that teaches by them, `gpugrad/health/README.md`.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import gpugrad as gg
from gpugrad import cli, health, nn
from gpugrad.cli.training import load_run
from gpugrad.health.findings import Verdict
from gpugrad.health.page import HEADLINES
from gpugrad.health.record import Record
from gpugrad.health.verdict import is_weighted, judge

PAGE = Path(health.__file__).with_name("README.md")

#: By how much the share of right answers rises at least where a remedy helps, and does not rise
#: where it fails.
HELPS, FAILS = 0.25, 0.15

#: The file that the runs on long memory read.
RECALL = "recall.txt"


@dataclass(frozen=True)
class Change:
    """A remedy, as the options of `gpugrad train` express it.

    Attributes
    ----------
    remedy:
        Its name in the table of remedies.
    options:
        What is put in place of options of the run, or beside them.
    helps:
        Whether the changed run learns. What is listed and fails is worth knowing, too.
    gain:
        By how much the share of right answers rises at least if it helps, and does not if it fails.
    """

    remedy: str
    options: str
    helps: bool = True
    gain: float = HELPS


@dataclass(frozen=True)
class Run:
    """A run, what is to be found in it, and what is then changed."""

    kind: str
    options: str
    changes: tuple[Change, ...] = ()


RUNS = (
    Run("healthy", "digits --width 64 --epochs 10"),
    Run("exploding", "digits --width 64 --epochs 10 --depth 30 --activation tanh --gain 3", (
        Change("initialise", "--gain 0.6"),
        Change("layer-norm", "--norm"),
        Change("residual", "--residual --norm"),
        Change("clip", "--clip 0.1", helps=False),
    )),
    Run("exploding", "digits --width 64 --epochs 10 --depth 20 --gain 4", (
        Change("initialise", "--gain 1"),
        Change("layer-norm", "--norm"),
    )),
    Run("vanishing", "digits --width 64 --epochs 10 --depth 20 --activation sigmoid", (
        Change("residual", "--residual"),
        Change("activation", "--activation relu"),
        Change("layer-norm", "--norm", helps=False),
    )),
    Run("vanishing", "digits --width 64 --epochs 10 --depth 20 --gain 0.3", (
        Change("residual", "--residual"),
        Change("initialise", "--gain 1"),
        Change("layer-norm", "--norm"),
    )),
    Run("dead", "digits --width 64 --epochs 10 --depth 2 --lr 0.3", (
        Change("initialise", "--gain 0.5", helps=False),
        Change("leak", "--activation leaky_relu"),
        Change("residual", "--residual", helps=False),
        Change("layer-norm", "--norm", helps=False),
        Change("learning-rate", "--lr 0.03"),
    )),
    Run("saturated", "digits --width 64 --epochs 10 --depth 2 --activation tanh --gain 20", (
        Change("initialise", "--gain 0.6"),
        Change("layer-norm", "--norm"),
        Change("activation", "--activation relu --gain 1"),
        Change("residual", "--residual", helps=False),
    )),
    Run("non-finite", "digits --width 64 --epochs 10 --depth 10 --gain 3 --autocast float16", (
        Change("loss-scale", "--autocast bfloat16"),
        Change("initialise", "--gain 1"),
        Change("layer-norm", "--norm"),
    )),
    Run("non-finite", "digits --width 64 --epochs 10 --depth 10 --gain 1.3 --optimizer sgd "
        "--lr 0.1 --clip 0", (
        Change("clip", "--clip 1"),
        Change("learning-rate", "--lr 0.01"),
    )),
    Run("diverging", "digits --width 64 --epochs 10 --depth 2 --activation tanh --optimizer sgd "
        "--lr 2 --clip 0", (
        Change("learning-rate", "--lr 0.2"),
        Change("layer-norm", "--norm", helps=False),
        Change("clip", "--clip 0.1"),
    )),
    Run("clip-starved", "digits --width 64 --epochs 10 --depth 2 --optimizer sgd --lr 0.01 "
        "--clip 0.001", (
        Change("clip", "--clip 1"),
        Change("learning-rate", "--lr 0.001", helps=False),
    )),
    Run("exploding", "text --model rnn --depth 4 --width 64 --context 128 --limit 0.2 --gain 2",
        (
        Change("initialise", "--gain 1"),
        Change("gating", "--model gru"),
        Change("clip", "--clip 100", helps=False),
        Change("learning-rate", "--lr 0.0002", helps=False),
    )),
    Run("stalled", "digits --width 64 --epochs 10 --depth 6 --activation sigmoid --optimizer sgd "
        "--lr 0.01 --health-every 5", (
        Change("residual", "--residual --norm"),
        Change("layer-norm", "--norm", helps=False),
        Change("activation", "--activation relu"),
    )),
    Run("stalled", "digits --width 64 --epochs 10 --depth 2 --optimizer sgd --lr 1e-7 "
        "--health-every 5", (
        Change("longer-steps", "--lr 0.01"),
    )),
    Run("exploding", "digits --width 64 --epochs 10 --depth 20 --activation tanh --gain 3 --clip 0 "
        "--health-every 5", (
        Change("initialise", "--gain 0.6"),
    )),
    Run("saturated", "digits --width 64 --epochs 10 --depth 2 --activation tanh --gain 100 "
        "--health-every 5", (
        Change("initialise", "--gain 0.6"),
    )),
    Run("stalled", "digits --width 64 --epochs 10 --depth 50 --activation tanh --health-every 5", (
        Change("residual", "--residual --norm"),
    )),
    Run("healthy", f"{RECALL} --model rnn --width 64 --context 64 --epochs 20 --lr 0.005", (
        # Twenty-one of twenty-three characters need no memory.
        Change("gating", "--model gru", gain=0.015),
        Change("clip", "--clip 0.1", helps=False, gain=0.015),
    )),
)  # fmt: skip

#: Remedies for which `gpugrad train` has no option: its LSTM starts with open gates, and the loss
#: reaches all its layers.
NO_OPTION = ("open-gates", "connect")


# -- a run -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came out of a run.

    Attributes
    ----------
    accuracy:
        The share of right answers on what is set apart for tests; 0 where there were none because
        the loss was no longer finite.
    loss:
        On the same; NaN where there is none.
    """

    options: str
    accuracy: float
    loss: float
    verdict: Verdict
    record: Record
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The outcome as JSON has it."""
        return {
            "options": self.options, "accuracy": self.accuracy,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "verdict": self.verdict.as_dict(), "seconds": round(self.seconds, 2),
        }  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A run of the table with its changed runs, and what is not as it should be."""

    run: Run
    before: Outcome
    after: tuple[Outcome, ...]
    problems: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON has it."""
        changes = [
            {**asdict(change), "place": place(self.before.verdict, change.remedy), **x.as_dict()}
            for change, x in zip(self.run.changes, self.after)
        ]
        found = {"kind": self.run.kind, **self.before.as_dict(), "changes": changes}
        return {**found, "problems": list(self.problems)}


def changed(options: str, change: str) -> str:
    """The options of a run with those of a change in their place, or beside them.

    >>> changed("digits --depth 2 --norm --lr 0.3", "--lr 0.03 --residual")
    'digits --depth 2 --norm --lr 0.03 --residual'
    """
    data, *words = shlex.split(options)
    together = {**dict(_pairs(words)), **dict(_pairs(shlex.split(change)))}
    return shlex.join([data, *(word for pair in together.items() for word in pair if word)])


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option with its value, or with "" if it has none."""
    for i, word in enumerate(words):
        if word.startswith("--"):
            value = words[i + 1] if i + 1 < len(words) else "--"
            yield word, "" if value.startswith("--") else value


def train(options: str, folder: Path) -> Outcome:
    """Run `gpugrad train` with `--health`, and `gpugrad health` on what it has left in `folder`."""
    start = time.perf_counter()
    _command("train", *shlex.split(options), "--health", "--out", str(folder), may_fail=True)
    _command("health", str(folder))
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(text[-1]) if text else {}
    record = Record.load(folder / "health.jsonl")
    # A run that ended early because its loss was not finite has no answers to speak of.
    fine = bool(last) and math.isfinite(record.scalars["loss"][-1])
    return Outcome(
        options, last["test_accuracy"] if fine else 0.0, last["test_loss"] if fine else math.nan,
        judge(record), record, time.perf_counter() - start,
    )  # fmt: skip


def _command(*argv: str, may_fail: bool = False) -> None:
    """Run the command, in this process; what it prints is kept for an error."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        code = cli.main(list(argv))
    if code and not may_fail:
        raise RuntimeError(f"gpugrad {shlex.join(argv)}: {code}\n{printed.getvalue()}")


def examine(run: Run, folder: Path) -> Result:
    """Run a line of the table, with all its changes, and check them."""
    before = train(run.options, folder / "before")
    after = tuple(
        train(changed(run.options, change.options), folder / f"{i}-{change.remedy}")
        for i, change in enumerate(run.changes)
    )
    return Result(run, before, after, tuple(_problems(run, before, after, folder)))


def _problems(run: Run, before: Outcome, after: Sequence[Outcome], folder: Path) -> Iterator[str]:
    found = before.verdict
    if found.kind != run.kind:
        yield f"{run.options}: {found.kind}, and not {run.kind}"
    if HEADLINES[found.kind][0] not in (folder / "before/health.html").read_text(encoding="utf-8"):
        yield f"{run.options}: the report does not say {found.kind}"
    first = found.findings[0].remedies[:1]
    if first and first[0] not in {change.remedy for change in run.changes}:
        yield f"{run.options}: {first[0]}, which is named first, is not tried"
    for change, now in zip(run.changes, after):
        rise = now.accuracy - before.accuracy
        said = f"{now.options}: {change.remedy} took accuracy from {before.accuracy:.1%} to "
        if change.helps and not rise >= change.gain:
            yield f"{said}{now.accuracy:.1%}, and should have helped"
        if not change.helps and not rise < min(FAILS, change.gain):
            yield f"{said}{now.accuracy:.1%}, and should have failed"
        if change.helps and not found.healthy and now.verdict.kind == found.kind:
            yield f"{now.options}: still {found.kind} after {change.remedy}"


def place(verdict: Verdict, remedy: str) -> int | None:
    """Where in the advice for the worst finding a remedy stands; None if it is not there."""
    named = verdict.findings[0].remedies
    return named.index(remedy) + 1 if remedy in named else None


@contextmanager
def recall_beside(folder: Path) -> Iterator[None]:
    """Work in `folder`, in which lies the text that takes a memory.

    Each line is a letter, twenty dots, and the letter again.
    """
    letters = np.random.default_rng(0).choice(list("abcd"), 60_000 // 23)
    text = "\n".join(f"{letter}{'.' * 20}{letter}" for letter in letters)
    (folder / RECALL).write_text(text, encoding="utf-8")
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


# -- what is printed, and written into the page ----------------------------------------------------


def markdown(result: Result) -> str:
    """The command, what it found, and a row for the run and each changed one."""
    verdict = result.before.verdict
    digits = 1 if any(change.gain < 0.05 for change in result.run.changes) else 0

    def row(remedy: str, options: str, named: int | None, now: Outcome) -> tuple[str, ...]:
        right = "none" if math.isnan(now.loss) else f"{now.accuracy:.{digits}%}"
        return remedy, options, str(named or "–"), right, now.verdict.kind

    rows = [row("as it is", "", None, result.before)]
    for change, now in zip(result.run.changes, result.after):
        named = place(verdict, change.remedy)
        rows.append(row(change.remedy, f"`{change.options}`", named, now))
    head = ("remedy", "options", "named", "accuracy", "verdict then")
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]
    said = f"$ gpugrad train {result.run.options} --health\n{verdict}"
    return f"```text\n{said}\n```\n\n" + "\n".join(lines)


def marks(name: str) -> tuple[str, str]:
    """The lines of the page between which something is written."""
    return f"<!-- begin: {name}, written by bench/health_runs.py -->", f"<!-- end: {name} -->"


def written(page: str, name: str, text: str) -> str:
    """The page with `text` between the marks of that name; ValueError if they are missing."""
    begin, end = marks(name)
    head, found, rest = page.partition(begin)
    _, also, tail = rest.partition(end)
    if not (found and also):
        raise ValueError(f"the page has no {begin} and {end}")
    return f"{head}{begin}\n\n{text}\n\n{end}{tail}"


def sections(results: Sequence[Result]) -> dict[str, str]:
    """What belongs between the marks, by their names: a kind, and `memory` for long memory."""
    found: dict[str, list[str]] = {}
    for result in results:
        memory = result.run.options.startswith(RECALL)
        found.setdefault("memory" if memory else result.run.kind, []).append(markdown(result))
    return {name: "\n\n".join(texts) for name, texts in found.items()}


def profile(record: Record) -> Any:
    """The gradient norms of the first recorded step, of all layers with weights, first to last."""
    norms = record.values["gradient_norm"][0]
    weighted = [is_weighted(kind) for kind in record.kinds]
    return norms[np.isfinite(norms) & np.array(weighted)]


def picture(lines: dict[str, Any], title: str, x_label: str) -> str:
    """Profiles that end at the right, the vertical axis logarithmic, as an SVG for light and dark.

    Each has its name at its end.
    """
    from gpugrad.health.page_charts import number

    width, height, left, bottom = 640, 280, 60, 240
    values = np.concatenate([np.log10(y) for y in lines.values()])
    low, high = math.floor(values.min()), math.ceil(values.max())
    step = max(1, math.ceil((high - low) / 6))
    many = max(len(y) for y in lines.values())

    def at(i: float, v: float) -> str:
        x = left + (width - left - 130) * i / max(1, many - 1)
        return f"{x:.1f},{bottom - (bottom - 30) * (v - low) / (high - low):.1f}"

    parts = []
    for v in range(low, high + 1, step):
        y = at(0, v).split(",")[1]
        parts.append(f'<path class="grid" d="M{left} {y}H{width - 130}"/>')
        parts.append(f'<text x="{left - 6}" y="{y}" dy="4" text-anchor="end">'
                     f"{number(10.0**v)}</text>")  # fmt: skip
    for i, y in enumerate(lines.values()):
        points = " ".join(at(many - len(y) + j, v) for j, v in enumerate(np.log10(y)))
        parts.append(f'<polyline class="line c{i}" points="{points}"/>')
    # The names at the ends, one below the other in the order of the lines.
    y_text = 0.0
    for name, y in sorted(lines.items(), key=lambda line: -line[1][-1]):
        y_end = float(at(0, float(np.log10(y[-1]))).split(",")[1])
        y_text = max(y_end + 4, y_text + 15)
        parts.append(f'<text class="c{list(lines).index(name)}" x="{width - 122}" '
                     f'y="{y_text:.1f}">{name}</text>')  # fmt: skip
    style = (
        "text{font:12px sans-serif;fill:#333}.grid{stroke:#8884;fill:none}"
        ".line{fill:none;stroke-width:2.5}.c0{stroke:#c22}.c1{stroke:#26c}.c2{stroke:#281}"
        "text.c0{fill:#c22}text.c1{fill:#26c}text.c2{fill:#281}text{stroke:none!important}"
        "@media(prefers-color-scheme:dark){text{fill:#ccc}.c0{stroke:#f77}.c1{stroke:#7af}"
        ".c2{stroke:#7c6}text.c0{fill:#f77}text.c1{fill:#7af}text.c2{fill:#7c6}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{title}"><title>{title}</title><style>{style}</style>'
        f'<text x="{left}" y="18">{title}</text>{"".join(parts)}'
        f'<text x="{(left + width - 130) / 2:.0f}" y="{height - 12}" text-anchor="middle">'
        f"{x_label}</text></svg>\n"
    )


def recalled(folder: Path) -> Any:
    """How much of the last letter's gradient arrives at the state after each character before.

    Of the net of a run on `RECALL`, relative to the last state.
    """
    course = load_run(folder, "cpu")
    vocabulary = course.task.text.vocabulary  # type: ignore[attr-defined]
    lines = [f"{letter}{'.' * 20}{letter}" for letter in "abcd"]
    tokens = gg.tensor(np.stack([vocabulary.encode(line) for line in lines]))

    def run() -> None:
        scores = course.net(tokens[:, :-1])
        nn.functional.cross_entropy(scores[:, -1], tokens[:, -1]).backward()

    (found,) = health.through_time(course.net, run)
    return found.hidden / found.hidden[-1]


def pictures(results: Mapping[Path, Result]) -> dict[str, str]:
    """The drawings of the page, by the names of their files, of runs by their folders."""
    lines: dict[str, Any] = {}
    found = {}
    for kind in ("exploding", "vanishing"):
        for result in (r for r in results.values() if r.run.kind == kind and kind not in lines):
            lines[kind] = profile(result.before.record)
            if kind == "exploding":
                lines["initialised"] = profile(result.after[0].record)
    if len(lines) == 3:
        title = "gradient norm of every layer at the first step"
        found["gradients.svg"] = picture(lines, title, "layers, first to last")
    for folder, result in results.items():
        if result.run.options.startswith(RECALL):
            lines = {"RNN": recalled(folder / "before"), "GRU": recalled(folder / "0-gating")}
            title = "gradient of the last letter, where it arrives"
            found["memory.svg"] = picture(lines, title, "characters, first to last")
    return found


def write_page(page: Path, results: Mapping[Path, Result]) -> None:
    """Put the figures into the page, and the pictures beside it; see `pictures`."""
    text = page.read_text(encoding="utf-8")
    for name, section in sections(list(results.values())).items():
        text = written(text, name, section)
    page.write_text(text, encoding="utf-8")
    for name, drawing in pictures(results).items():
        (page.parent / name).write_text(drawing, encoding="utf-8")


# -- the command -----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the table; 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="kinds of findings, separated by commas")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--reports", type=Path, help="the folder to keep runs and reports in")
    parser.add_argument("--page", type=Path, nargs="?", const=PAGE, help="the page to write into")
    options = parser.parse_args(arguments)
    only = options.only.split(",") if options.only else {run.kind for run in RUNS}
    start = time.perf_counter()
    results: dict[Path, Result] = {}
    out, kept, page = (x and x.resolve() for x in (options.out, options.reports, options.page))
    with tempfile.TemporaryDirectory() as scratch:
        folder = kept or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        with recall_beside(folder):
            for i, run in enumerate(RUNS):
                if run.kind in only:
                    here = folder / f"{i:02}-{run.kind}"
                    results[here] = examine(run, here)
                    print(f"\n{markdown(results[here])}", flush=True)
            if page:
                write_page(page, results)
    problems = [text for result in results.values() for text in result.problems]
    runs = sum(1 + len(result.after) for result in results.values())
    print(f"\n{runs} runs, {time.perf_counter() - start:.0f} s, {len(problems)} problems")
    print("\n".join(problems))
    if out:
        found = {"results": [x.as_dict() for x in results.values()], "problems": problems}
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
