"""Figures that need no clock hold, and a figure that leaves its band is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import gpugrad as gg
from bench import guards

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("group", guards.GROUPS)
def test_figures_hold(group):
    known = guards.read()[group]
    if why := guards.missing(group, known):
        pytest.skip(why)
    lines = guards.judged(group, known, guards.measured(group))
    more = [f"… and {len(lines) - 30} more"] if len(lines) > 30 else []
    told = "\n".join([*lines[:30], *more])
    assert not lines, f"if this is meant: python bench/guards.py --update\n{told}"


def test_nothing_reads_from_the_device_and_a_step_is_two_launches():
    """Whatever the file says: it must never be made to say otherwise."""
    known = guards.read()
    for group in ("generic", "gpu"):
        reads = {n: x for n, (x, _) in known[group].items() if n.endswith("host_reads")}
        assert len(reads) == 7
        assert set(reads.values()) == {0}
    assert known["gpu"]["clip_and_adamw.launches"][0] == 2
    assert known["gpu"]["clip_and_adamw.own"][0] == 2


@pytest.mark.parametrize(
    ("was", "band", "now", "line"),
    [
        (380, 0.02, 412, "engine.mlp_step.calls: 412, was 380 (band 2 %)"),
        (380, 0.02, 340, "engine.mlp_step.calls: 340, was 380 (band 2 %)"),
        (380, 0.02, 387, None),
        (2, 0.0, 3, "engine.mlp_step.calls: 3, was 2 (band 0 %)"),
        (0, 0.0, 0, None),
    ],
)
def test_what_leaves_its_band_is_named(was, band, now, line):
    found = guards.compare("engine", {"mlp_step.calls": [was, band]}, {"mlp_step.calls": now})
    assert found == ([line] if line else [])


def test_what_is_new_and_what_is_gone_is_named():
    known = {"own": [["gpugrad", "gpugrad.core"], 0.0], "old": [7, 0.0]}
    found = {"own": ["gpugrad", "gpugrad.heavy"], "new": 3}
    assert guards.compare("import", known, found) == [
        "import.new: 3, is new",
        "import.old: is gone, was 7",
        "import.own: gpugrad.heavy, is new",
        "import.own: gpugrad.core, is gone",
    ]


def test_the_engine_is_judged_by_the_figures_of_this_python():
    here, other = f"{guards.PYTHON}.chain.calls", "2.7.chain.calls"
    assert guards.missing("engine", {here: [5, 0.0]}) == ""
    assert "no figures for Python" in guards.missing("engine", {other: [5, 0.0]})
    known = {here: [5, 0.0], other: [9, 0.0]}
    assert guards.judged("engine", known, {here: 5}) == []
    assert guards.updated("engine", known, {here: 6}) == {other: [9, 0.0], here: [6, 0.02]}


def test_update_writes_what_is_and_says_what_changed(tmp_path, monkeypatch, capsys):
    path = tmp_path / "guards.json"
    told = guards.read()
    guards.write(told, path)
    assert guards.read(path) == told
    assert path.read_text() == guards.FIGURES.read_text(), "the file is as the command writes it"

    name = "mlp_step.launches"
    seen = {n: x for n, (x, _) in told["gpu"].items()}
    monkeypatch.setattr(guards, "measured", lambda group: {**seen, name: seen[name] + 1})
    line = f"gpu.{name}: {seen[name] + 1}, was {seen[name]} (band 0 %)"
    assert guards.main(["--only", "gpu"], path) == 1
    assert line in capsys.readouterr().out
    assert guards.main(["--only", "gpu", "--update"], path) == 0
    assert line in capsys.readouterr().out
    assert guards.main(["--only", "gpu"], path) == 0
    assert guards.read(path)["import"] == told["import"]


def test_more_calls_and_more_memory_are_counted():
    x = gg.tensor([1.0], requires_grad=True)
    x * x  # the first call of an operation makes its code

    def products(count: int) -> list[gg.Tensor]:
        return [x * x for _ in range(count)]

    one, two = (guards.calls_of(partial(products, n)) for n in (1, 2))
    assert one > 0
    assert two == 2 * one
    few, many = (guards.held_by(partial(products, n)) for n in (10, 20))
    assert many > few > 10
    assert 2e6 > guards.peak_of(lambda: bytearray(10**6)) > 1e6


def test_what_cannot_be_counted_says_why(monkeypatch):
    monkeypatch.setattr(guards, "__file__", str(ROOT / "bench" / "common.py"))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(
        a, 1, "", "ImportError: the third bolt is loose"))  # fmt: skip
    with pytest.raises(RuntimeError, match="gpu cannot be counted:\nImportError: the third bolt"):
        guards.measured("gpu")


def test_the_stand_in_checks_launches():
    """A kernel that is not in its text, or is given other arguments, is found without a GPU."""
    code = """
from bench import gpu_fake
import numpy as np
counts = gpu_fake.install()
import cupy, cupyx
from gpugrad.kernels.cuda import elementwise, launch
x = cupy.asarray(np.ones(8, "float32"))
gpu, relu = launch.machine(x), elementwise.map_of("relu")["float32"]
gpu.run(relu, (1,), x, x, 0.0, 0.0, 8, 1)
print(counts.kernels["map_relu_float32"])
for wrong in ((x, x, 0.0, 0.0, 8, 1, 1), (x, x, 0.0, 0.0, None, 1)):
    try: gpu.run(relu, (1,), *wrong)
    except AssertionError as error: print(error)
module = cupy.cuda.function.Module()
module.load(b".entry a()\\0")
try: module.get_function("b")
except RuntimeError as error: print(error)
with cupyx.allow_synchronize(False):
    try: x.get()
    except cupyx.DeviceSynchronized as error: print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                         env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "1", "map_relu_float32: 7 arguments",
        "map_relu_float32: argument 4 is a NoneType for a u64", "CUDA_ERROR_NOT_FOUND: b",
        "a host read where none is allowed",
    ]  # fmt: skip


def test_the_file_is_json():
    told = json.loads(guards.FIGURES.read_text())
    assert set(told) == {"about", *guards.GROUPS}
