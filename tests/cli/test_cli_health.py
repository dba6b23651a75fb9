"""`gpugrad health`, and `gpugrad train --live`."""

import json
import sys
import webbrowser

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from gpugrad.cli import main
from gpugrad.health import Record
from tests.health.synthetic import make

LIVE = ["train", "digits", "--width", "8", "--depth", "1", "--device", "cpu", "--live"]


@pytest.fixture
def run(tmp_path):
    """A folder as `gpugrad train --health` leaves it, of a net whose gradients vanish."""
    folder = tmp_path / "deep-1"
    folder.mkdir()
    filled = make(rows=20, depth=20, growth=0.5)
    record = Record(filled.layers, filled.kinds)
    for i, step in enumerate(filled.steps.tolist()):
        record.append(
            step,
            {name: values[i] for name, values in filled.values.items()},
            {name: values[i] for name, values in filled.scalars.items()},
        )
    record.save(folder / "health.jsonl")
    return folder


def test_a_run(run, capsys):
    assert main(["health", str(run)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("vanishing: ")
    assert "  try: " in told
    assert "▁" in told
    page = run / "health.html"
    assert str(page) in told.replace("\n", "")
    text = page.read_text("utf-8")
    assert "Gradient health of deep-1" in text
    assert "Gradients vanish" in text


def test_a_file_and_a_place(run, tmp_path, capsys):
    assert main(["health", str(run / "health.jsonl"), "--out", str(tmp_path / "x.html")]) == 0
    assert "Gradients vanish" in (tmp_path / "x.html").read_text("utf-8")
    assert not (run / "health.html").exists()


def test_a_run_that_was_killed(run, capsys):
    file = run / "health.jsonl"
    file.write_bytes(file.read_bytes()[:-100])
    assert main(["health", str(run)]) == 0
    assert "step 181," in capsys.readouterr().out  # the 19th of 20


def test_the_browser_is_asked(run, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(webbrowser, "open", asked.append)
    assert main(["health", str(run)]) == 0
    assert asked == []
    assert main(["health", str(run), "--open"]) == 0
    assert asked == [(run / "health.html").as_uri()]


def test_tensorboard(run, tmp_path, monkeypatch, capsys):
    for package in ("tensorboardX", "tensorboard.summary.writer.event_file_writer"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main(["health", str(run), "--tensorboard", str(tmp_path / "events")]) == 1
    assert "pip install 'gpugrad[tensorboard]'" in capsys.readouterr().err


def test_no_record(tmp_path, capsys):
    assert main(["health", str(tmp_path)]) == 1
    assert "there is no such file; train with --health" in capsys.readouterr().err


def test_an_empty_record(tmp_path, capsys):
    Record(["0"], ["Linear"]).save(tmp_path / "health.jsonl")
    assert main(["health", str(tmp_path)]) == 0
    assert "no step was recorded" in capsys.readouterr().out


def test_train_live_records(tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*LIVE, "--epochs", "1", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "epoch 1/1: loss" in told
    assert "health: " in told
    header, *rows = map(json.loads, (out / "health.jsonl").read_text("utf-8").splitlines())
    assert header["kinds"].count("Linear") == 2
    assert len(rows) > 2


def test_train_live_on_a_terminal(tmp_path, monkeypatch):
    import io

    from rich.console import Console

    from gpugrad.cli import app

    console = Console(file=io.StringIO(), force_terminal=True, width=90, height=30)
    monkeypatch.setattr(app, "out", console)
    assert main([*LIVE, "--epochs", "2", "--out", str(tmp_path / "run")]) == 0
    told = console.file.getvalue()
    assert "gradient norm" in told
    assert "epoch 2/2: loss" in told
