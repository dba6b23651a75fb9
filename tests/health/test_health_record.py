"""The record of a run: rows in memory, thinned, and on disk, whatever became of the run."""

import json
import subprocess
import sys

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.health import SCALARS, STATISTICS, Record, RecordError

LAYERS, KINDS = ["a.0", "a.1", "b"], ["Linear", "Tanh", "Linear"]


def filled(steps, **kwargs) -> Record:
    record = Record(LAYERS, KINDS, **kwargs)
    for step in steps:
        values = {name: np.full(3, step + i) for i, name in enumerate(STATISTICS)}
        record.append(step, values, dict.fromkeys(SCALARS, 1.0))
    return record


def same(a: Record, b: Record) -> None:
    assert (a.layers, a.kinds) == (b.layers, b.kinds)
    np.testing.assert_array_equal(a.steps, b.steps)
    for table, other in ((a.values, b.values), (a.scalars, b.scalars)):
        assert table.keys() == other.keys()
        for name in table:
            np.testing.assert_allclose(table[name], other[name], rtol=1e-6)


def test_rows_are_kept_as_given() -> None:
    record = Record(LAYERS, KINDS)
    record.append(3, {"signal": [1.0, np.nan, np.inf]}, {"loss": 0.5})
    record.append(7, {"dead": [0.0, 0.25, 1.0]}, {"norm": -np.inf})
    assert record.steps.dtype == np.int64 and record.steps.tolist() == [3, 7]
    assert tuple(record.values) == STATISTICS and tuple(record.scalars) == SCALARS
    assert all(v.shape == (2, 3) and v.dtype == np.float32 for v in record.values.values())
    np.testing.assert_array_equal(record.values["signal"], [[1, np.nan, np.inf], [np.nan] * 3])
    np.testing.assert_array_equal(record.values["dead"][1], [0.0, 0.25, 1.0])
    np.testing.assert_array_equal(record.scalars["loss"], np.float32([0.5, np.nan]))
    np.testing.assert_array_equal(record.scalars["norm"], np.float32([np.nan, -np.inf]))


def test_frozen_layers_are_in_the_header_and_older_files_have_none(tmp_path) -> None:
    path = tmp_path / "health.jsonl"
    record = filled([1, 2], frozen={"b", "a.0"})
    assert record.frozen == ["a.0", "b"]
    record.save(path)
    assert Record.load(path).frozen == Record.resume(path, 1).frozen == ["a.0", "b"]
    filled([1]).save(path)
    assert '"frozen"' not in path.read_text()
    assert Record.load(path).frozen == []


def test_beyond_float32_is_infinite_without_a_warning() -> None:
    record = Record(["x"])
    record.append(1, {"gradient_norm": [1e300]}, {"loss": -1e300})
    assert record.values["gradient_norm"][0, 0] == np.inf and record.scalars["loss"][0] == -np.inf


def test_a_long_run_stays_small_and_even() -> None:
    record = Record([str(i) for i in range(100)])
    row = {name: np.ones(100) for name in STATISTICS}
    for step in range(1, 10_001):
        record.append(step, row, {"loss": 1.0})
    assert record.nbytes < 1_000_000
    steps = record.steps
    assert steps[:8].tolist() == list(range(1, 9)) and steps[-1] == 10_000
    gaps = np.diff(steps[8:-1])
    assert (len(steps) > 60 and gaps.min() == gaps[3:].max()) or set(gaps[1:]) == {gaps[2]}


def test_rows_around_a_change_stay() -> None:
    record = Record(LAYERS, memory=4 * 64 * (len(STATISTICS) * 3 + len(SCALARS)))
    for step in range(1, 2001):
        bad = step >= 777
        record.append(
            step,
            {"gradient_nonfinite": [0.0, float(bad), 0.0]},
            {"loss": 1.0 if step < 301 else 100.0},
        )
    assert len(record) <= 64
    assert {300, 301, 776, 777, 2000} <= set(record.steps.tolist())


def test_constant_changes_do_not_fill_the_memory() -> None:
    record = Record(LAYERS, memory=4 * 64 * (len(STATISTICS) * 3 + len(SCALARS)))
    for step in range(1, 3001):
        record.append(step, {}, {"loss": 100.0 if step % 2 else 1.0})
    assert 32 <= len(record) <= 64 and record.steps[-1] == 3000
    assert record.steps[len(record) // 2] > 500, "the later half of the run is gone"


def test_saved_and_loaded(tmp_path) -> None:
    record = filled(range(1, 20))
    record.append(50, {"signal": [np.nan, np.inf, -1e-30]}, {"loss": -np.inf})
    record.save(tmp_path / "r.jsonl")
    same(record, Record.load(tmp_path / "r.jsonl"))
    lines = [json.loads(x) for x in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert lines[0]["format"] == "gpugrad-health" and lines[0]["version"] == 1
    assert lines[-1] == {"step": 50, "loss": "-inf", "signal": [None, "inf", -1e-30]}


def test_the_writer_keeps_every_row(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    record = filled(range(1, 4), memory=0)
    with record.writer(path) as writer:
        assert len(Record.load(path)) == 3
        for step in range(4, 101):
            record.append(step, {}, {"loss": 1.0 / step})
            assert Record.load(path).steps[-1] == step if step % 30 == 0 else True
        with pytest.raises(RecordError, match="already"):
            record.writer(tmp_path / "other.jsonl")
    writer.close()
    record.append(101, {}, {})
    assert len(record) <= 32 and Record.load(path).steps.tolist() == list(range(1, 101))
    assert len(Record.load(path, memory=0)) <= 32


def test_a_killed_run_leaves_its_record(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    code = """
import os, sys
from gpugrad.health import Record
record = Record(["a", "b"])
record.writer(sys.argv[1])
for step in range(1, 51):
    record.append(step, {"gradient_norm": [1.0, 2.0]}, {"loss": 3.0})
os.kill(os.getpid(), 9)
"""
    run = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert run.returncode == -9
    assert Record.load(path).steps.tolist() == list(range(1, 51))
    text = path.read_text()
    path.write_text(text[:-7])  # cut short within the last line
    assert Record.load(path).steps.tolist() == list(range(1, 50))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no record"),
        ("hello\n", "no record"),
        ('{"format": "other", "version": 1}\n', "no record"),
        ("[1]\n", "no record"),
        ('{"format": "gpugrad-health", "version": 9, "layers": []}\n', "version 9.*update"),
    ],
)
def test_another_file_is_refused(tmp_path, text, told) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(RecordError, match=told):
        Record.load(tmp_path / "r.jsonl")


def test_damage_in_the_middle_is_no_silent_loss(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    filled([1, 2, 3]).save(path)
    lines = path.read_text().splitlines(keepends=True)
    for bad in ("{\n", '{"step": 2, "signal": [1.0]}\n', '{"loss": 1.0}\n', "7\n"):
        path.write_text("".join([*lines[:2], bad, *lines[3:]]))
        with pytest.raises(RecordError, match="line 3 is damaged"):
            Record.load(path)


def test_bad_rows_are_refused() -> None:
    record = filled([5])
    with pytest.raises(RecordError, match="step 5 is not after step 5"):
        record.append(5, {}, {})
    with pytest.raises(RecordError, match=r"'grads' is no statistic.*gradient_norm"):
        record.append(6, {"grads": [1, 2, 3]}, {})
    with pytest.raises(RecordError, match="'cost' is no scalar"):
        record.append(6, {}, {"cost": 1.0})
    with pytest.raises(RecordError, match="signal has 2 numbers for 3 layers"):
        record.append(6, {"signal": [1.0, 2.0]}, {})
    with pytest.raises(RecordError, match="1 layers and 2 kinds"):
        Record(["a"], ["A", "B"])
    assert record.steps.tolist() == [5]


def test_a_record_without_layers() -> None:
    record = Record([])
    record.append(1, {}, {"loss": 1.0})
    assert record.values["signal"].shape == (1, 0)


def test_health_is_loaded_when_used() -> None:
    code = """
import sys
import gpugrad as gg
before = [m for m in sys.modules if m.startswith("gpugrad.health.")]
gg.health.Record
print(before, "gpugrad.health.record" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]", "True"]
    assert set(gg.health.__all__) <= set(dir(gg.health))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gg.health.nothing
