"""The runs that the page on gradient health teaches by: what is listed, and some of them in full.

`bench/health_runs.py` has the table, and runs it all.
"""

from dataclasses import replace

import pytest

from bench import health_runs
from bench.health_runs import NO_OPTION, PAGE, RECALL, RUNS, Change, Run, changed, examine
from gpugrad.cli.config import make_config
from gpugrad.health.findings import KINDS, Finding, Verdict
from gpugrad.health.remedies import REMEDIES

#: Quick ones, each of another kind.
CHOSEN = [
    next(run for run in RUNS if run.kind == kind) for kind in ("vanishing", "dead", "clip-starved")
]


def test_every_finding_is_shown() -> None:
    # The loss of `gpugrad train` reaches every layer of its nets.
    assert {run.kind for run in RUNS} == {*KINDS, "healthy"} - {"not reached"}


def test_every_remedy_is_shown() -> None:
    helpful = {change.remedy for run in RUNS for change in run.changes if change.helps}
    assert helpful == REMEDIES.keys() - set(NO_OPTION)
    assert {c.remedy for run in RUNS for c in run.changes} <= REMEDIES.keys()


def test_all_options_are_options_of_train() -> None:
    for run in RUNS:
        for options in (run.options, *(changed(run.options, c.options) for c in run.changes)):
            data, *words = options.split()
            given = {
                name.removeprefix("--").replace("-", "_"): value or True
                for name, value in health_runs._pairs(words)
            }
            known = vars(make_config(data, {"model": given.get("model", "mlp")}))
            assert given.keys() <= known.keys(), options


@pytest.mark.parametrize("run", CHOSEN, ids=lambda run: run.kind)
def test_the_verdict_is_right_and_remedies_do_what_is_said(run, tmp_path) -> None:
    with health_runs.recall_beside(tmp_path):
        result = examine(run, tmp_path)
    assert result.problems == ()
    assert (tmp_path / "before" / "health.html").stat().st_size > 5000
    assert result.as_dict()["verdict"]["kind"] == run.kind


def test_what_is_not_so_is_told(tmp_path) -> None:
    short = "digits --width 8 --depth 1 --epochs 1"
    run = Run("stalled", short, (Change("clip", "--clip 2"), Change("clip", "--lr 0.03", False)))
    with health_runs.recall_beside(tmp_path):
        problems = "\n".join(examine(run, tmp_path).problems)
    assert "healthy, and not stalled" in problems
    assert "and should have helped" in problems and "and should have failed" in problems


def test_the_page_shows_the_runs_of_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for run in RUNS:
        assert f"$ gpugrad train {run.options} --health\n" in page
        for change in run.changes:
            assert f"| {change.remedy} | `{change.options}` |" in page
    for name in {run.kind for run in RUNS if not run.options.startswith(RECALL)} | {"memory"}:
        assert all(page.count(mark) == 1 for mark in health_runs.marks(name))


def test_writing_into_the_page_replaces_what_is_between_the_marks() -> None:
    begin, end = health_runs.marks("dead")
    page = f"before\n{begin}\nold\n{end}\nafter\n"
    once = health_runs.written(page, "dead", "new")
    assert once == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    assert health_runs.written(once, "dead", "new") == once
    with pytest.raises(ValueError, match="no <!-- begin: stalled"):
        health_runs.written(page, "stalled", "new")


def test_the_place_of_a_remedy_is_that_in_the_worst_finding() -> None:
    worst = Finding("dead", remedies=("leak", "clip"))
    verdict = Verdict((worst, replace(worst, kind="stalled", remedies=("residual",))))
    assert [health_runs.place(verdict, r) for r in ("clip", "leak", "residual")] == [2, 1, None]
