"""The page of past results: every format, older ones named, and nothing from elsewhere on it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench import history

MACHINE = {"cpu": "A & B <CPU>", "cores": 2}


def verdict(what: str, value: float | None, target: str = "≥ 1.3") -> dict:
    return {"what": what, "value": value, "unit": "x", "target": target, "verdict": "holds"}


def by_run(date: str, value: float, peer: str = "torch") -> dict:
    return {"quick": False, "date": date, "commit": "c0ffee", "machine": MACHINE, "benchmarks": {
        "steps": {"verdicts": [verdict(f"step of mlp over the best peer ({peer})", value),
                               verdict("step of cnn", None)]}}}  # fmt: skip


def by_command(date: str, **changes) -> dict:
    contenders = {
        "numba": {"device": "cpu", "own": True},
        "numpy": {"device": "cpu", "own": True},
        "torch": {"device": "cpu", "own": False},
        "jax": {"device": "cpu", "own": False},
    }
    small = {"seconds": {"numba": [9.0], "torch": [9.0]}}
    large = {"seconds": {"numba": [1.0, 2.0, 3.0], "numpy": [7.0], "torch": [5.0], "jax": [4.0]}}
    works = {"gelu": {"least": 1.5, "sizes": {"8×8": small, "4096×4096": large}},
             "none": {"least": None, "sizes": {}}}  # fmt: skip
    return {"format": "gpugrad bench", "version": 1, "quick": False, "complete": True, "date": date,
            "commit": "abad1dea", "machine": MACHINE, "contenders": contenders, "workloads": works,
            **changes}  # fmt: skip


def by_gpu_check(date: str, **changes) -> dict:
    gpu = {"environment": {"results": {"gpu": {"name": "Some GPU"}}}}
    return {"tool": "gpu_check", "schema": 2, "whole": True, "dry_run": False, "quick": False,
            "date": date, "commit": "deadbeef", "machine": MACHINE, "parts": gpu,
            "verdicts": [verdict("host time (3 of 5)", 7.5, "≤ 12")], **changes}  # fmt: skip


def read(folder: Path, **files: object) -> tuple[list[history.Point], list[str]]:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return history.read(folder)


def test_every_format_is_read_in_the_order_of_dates(tmp_path):
    points, notes = read(tmp_path, a=by_gpu_check("2026-03-03"), b=by_run("2026-01-01", 1.4),
                         c=by_command("2026-02-02"))  # fmt: skip
    assert notes == []
    assert [(p.group, p.what, p.value, p.target, p.machine) for p in points] == [
        ("steps", "step of mlp over the best peer", 1.4, "≥ 1.3", "A & B <CPU>, 2 cores"),
        ("workloads", "gelu, 4096×4096, over the best peer", 2.0, "≥ 1.5", "A & B <CPU>, 2 cores"),
        ("GPU", "host time", 7.5, "≤ 12", "Some GPU"),
    ]


def test_a_figure_goes_on_when_another_peer_is_best(tmp_path):
    points, _ = read(tmp_path, a=by_run("2026-01-01", 1.4), b=by_run("2026-01-02", 1.5, "jax.jit"))
    assert [[p.value for p in s] for s in history.series(points).values()] == [[1.4, 1.5]]


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ("{", "x.json: cannot be read: Expecting"),
        ([1], "is of an older or unknown format: TypeError: is no object"),
        ({"results": {}}, "is of an older or unknown format: KeyError: 'neither format"),
        ({"format": "other"}, "is of an older or unknown format: KeyError: \"format 'other'\""),
        ({"benchmarks": {"steps": {}}, "date": "", "commit": "", "machine": MACHINE},
         "is of an older or unknown format: KeyError: 'verdicts'"),
        (by_run("2026-01-01", 1.0) | {"quick": True}, "run.py: a quick run: a check, not a result"),
        (by_gpu_check("2026-01-01", dry_run=True), "gpu_check: a dry run"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_named(tmp_path, content, note):
    points, notes = read(tmp_path, x=content, y=by_run("2026-01-01", 1.4))
    assert len(points) == 1
    assert len(notes) == 1
    assert note in notes[0]


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (by_gpu_check("2026-01-01", schema=7), "version 7, of which only what is known"),
        (by_command("2026-01-01", complete=False), "was stopped before its end"),
    ],
)
def test_what_is_shown_in_part_is_named(tmp_path, content, note):
    points, notes = read(tmp_path, x=content)
    assert len(points) == 1
    assert note in notes[0]


def test_the_page_needs_nothing_else(tmp_path, capsys):
    read(tmp_path, a=by_run("2026-01-01", 1.4), b=by_run("2026-01-02", 1.1),
         c=by_gpu_check("2026-01-03"), d="{")  # fmt: skip
    assert history.main(["--results", str(tmp_path)]) == 0
    assert "2 figures of 3 points" in capsys.readouterr().out
    page = (tmp_path / "history.html").read_text()
    root = ElementTree.fromstring(page.replace("<!DOCTYPE html>\n", ""))
    assert not re.findall(r"(?:src|href)=|<script|url\(|@import", page)
    assert "A & B <CPU>, 2 cores" in [e.text for e in root.iter("span")]
    svg = "{http://www.w3.org/2000/svg}"
    first, second = root.iter(f"{svg}svg")
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in first.iter(f"{svg}circle")]
    assert dots[0][0] < dots[1][0], "time goes to the right"
    assert dots[0][1] < dots[1][1], "and more stands higher"
    (must,) = (e for e in first.iter(f"{svg}line") if e.get("class") == "crossover")
    assert dots[0][1] < float(must.get("y1")) < dots[1][1], "1.4, at least 1.3, 1.1"
    assert len(list(second.iter(f"{svg}circle"))) == 1
    assert "d.json: cannot be read" in page


def test_an_empty_folder(tmp_path):
    history.main(["--results", str(tmp_path), "--out", str(tmp_path / "page.html")])
    assert "There are no results." in (tmp_path / "page.html").read_text()


def test_the_committed_results_are_read():
    points, notes = history.read(history.common.RESULTS)
    assert len(points) > 20
    assert not [note for note in notes if "unknown format" in note or "cannot be read" in note]
    assert "<svg" in history.page(points, notes)


@pytest.mark.parametrize(
    ("target", "number"), [("≥ 1.3", 1.3), ("≤ 12", 12.0), ("≤ 2e-05", 2e-5), ("", None)]
)
def test_the_number_of_a_target(target, number):
    assert history.bound(target) == number
