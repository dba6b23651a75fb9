"""`gpugrad train --health`: the record lies in the run's folder, whatever becomes of the run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpugrad.cli.config import Config
from gpugrad.cli.training import DivergedError, resume, start
from gpugrad.health import Record
from tests.cli.test_cli_train import Silent, command, digits, tensors

ROOT = Path(__file__).parents[2]


def config(**options) -> Config:
    return Config("digits", width=16, depth=2, health=True, **{"health_every": 10, **options})


def test_a_run_is_recorded(tmp_path) -> None:
    run = start(config(epochs=1), digits(), "cpu", tmp_path)
    run.train(Silent())
    record = Record.load(tmp_path / "health.jsonl")
    assert record.steps.tolist() == [1, 2, 4, 8, 10, 20]
    assert record.kinds == ["Flatten", "Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert all(np.isfinite(values).all() for values in record.scalars.values())
    np.testing.assert_allclose(record.scalars["loss"], run.monitor.record.scalars["loss"], 1e-5)
    metrics = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert record.scalars["norm"].max() <= metrics["grad_norm_max"] * 1.001


def test_it_is_off_by_default(tmp_path) -> None:
    run = start(Config("digits", width=16, depth=1, epochs=1), digits(), "cpu", tmp_path)
    run.train(Silent())
    assert run.monitor is None and not (tmp_path / "health.jsonl").exists()


@pytest.mark.parametrize("at", [3, 17, 30])
def test_an_interrupted_run_goes_on_exactly(tmp_path, at) -> None:
    start(config(epochs=2), digits(), "cpu", tmp_path / "whole").train(Silent())
    run = start(config(epochs=2), digits(), "cpu", tmp_path / "parts")
    calls = iter(range(1, 1000))
    assert not run.train(Silent(), lambda: next(calls) == at)
    before = len(Record.load(tmp_path / "parts" / "health.jsonl"))
    resume(tmp_path / "parts", digits(), "cpu", {}).train(Silent())
    assert tensors(tmp_path / "parts") == tensors(tmp_path / "whole")
    whole, parts = (Record.load(tmp_path / name / "health.jsonl") for name in ("whole", "parts"))
    assert parts.steps.tolist() == whole.steps.tolist() and before < len(parts)
    for name, values in whole.values.items():
        np.testing.assert_array_equal(parts.values[name], values)


def test_a_run_that_diverges_says_why(tmp_path) -> None:
    run = start(config(lr=1e4, clip=0.0, optimizer="sgd", epochs=1), digits(), "cpu", tmp_path)
    with pytest.raises(DivergedError):
        run.train(Silent())
    record = Record.load(tmp_path / "health.jsonl")
    assert (record.values["activation_nonfinite"][-1] > 0).any()


def test_the_command(tmp_path) -> None:
    code, out, err = command(
        "train", "digits", "--width", "16", "--depth", "1", "--epochs", "1", "--health",
        "--out", "run", cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert "\nhealth: " in out
    assert len(Record.load(tmp_path / "run" / "health.jsonl")) >= 5


def test_a_run_that_is_killed(tmp_path) -> None:
    args = ["train", "digits", "--width", "16", "--depth", "1", "--epochs", "500", "--health"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gpugrad.cli", *args, "--out", "run"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    path = tmp_path / "run" / "health.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and path.stat().st_size > 5000):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(Record.load(path)) >= 3
