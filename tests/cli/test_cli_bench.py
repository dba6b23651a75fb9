"""`gpugrad bench`: files, tables, interrupts, and everything that is told in a sentence."""

from __future__ import annotations

import importlib.util
import json

import pytest

from gpugrad.bench import common, processes
from gpugrad.bench.workload import CONTENDERS
from gpugrad.cli import bench as benches
from gpugrad.cli import main
from tests.bench.fake_worker import FAKES
from tests.bench.reports import measured


@pytest.fixture
def fakes(monkeypatch):
    """Two workloads of no size, and the processes that compute them."""
    works = {name: FAKES[name] for name in ("first", "second")}
    monkeypatch.setattr(benches, "workloads", lambda: works)
    monkeypatch.setattr(benches, "Pool", lambda: processes.Pool("tests.bench.fake_worker"))
    monkeypatch.setattr(benches.available, "why_not", lambda who: (
        None if who.key in ("numba", "torch", "mygrad") else "it is made up"))  # fmt: skip


def run(capsys, *words):
    code = main(["bench", *map(str, words)])
    printed = capsys.readouterr()
    return code, " ".join(printed.out.split()), " ".join(printed.err.split())


def test_a_run_writes_json_and_page_and_shows_a_table(fakes, tmp_path, capsys):
    code, out, _ = run(capsys, "--out", tmp_path, "--quick")
    assert code == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["complete"] is True
    assert found["workloads"]["first"]["sizes"]["one"]["seconds"]["numba"]
    assert (tmp_path / "bench.html").read_text().startswith("<!DOCTYPE html>")
    assert not list(tmp_path.glob("*.part"))
    for word in ("first, one", "NumPy +", "without numpy, numba-compile, cupy", "it is made up",
                 "first, one: PyTorch was not timed: disagrees with",
                 "without mygrad: ImportError: cannot import name",
                 str(tmp_path / "bench.html")):  # fmt: skip
        assert word in out, word


def test_ctrl_c_keeps_what_was_done(fakes, tmp_path, capsys, monkeypatch):
    real = benches.runner.measure

    def measure(pool, case):
        if case.work.name == "second":
            raise KeyboardInterrupt
        return real(pool, case)

    monkeypatch.setattr(benches.runner, "measure", measure)
    code, _, err = run(capsys, "--out", tmp_path, "--quick", "--backend", "numba")
    assert code == 130
    assert "interrupted; what had been measured is kept" in err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["complete"] is False
    assert found["workloads"]["first"]["sizes"]["one"]["seconds"]["numba"]
    assert found["workloads"]["second"]["sizes"] == {}
    assert "The run was interrupted" in (tmp_path / "bench.html").read_text()


def test_only_and_backend_choose(fakes, tmp_path, capsys):
    code, out, _ = run(
        capsys, "--out", tmp_path, "--quick", "--only", "SEC", "--backend", "torch,numba"
    )
    assert code == 0
    assert "first" not in out
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found["workloads"]) == ["second"]
    assert list(found["contenders"]) == ["numba", "torch"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--only", "nonsense"), "no workload has 'nonsense' in its name; gpugrad bench --list"),
        (("--backend", "abacus"), "no backend is called 'abacus'; there are numpy, numba,"),
        (("--backend", "jax"), "nobody can compute here: jax.jit: it is made up"),
    ],
)
def test_a_wrong_wish_is_told(fakes, tmp_path, capsys, words, told):
    code, _, err = run(capsys, "--out", tmp_path / "new", *words)
    assert code == 1
    assert told in err
    assert not (tmp_path / "new").exists()


def test_without_a_gpu_its_contenders_are_absent(capsys, monkeypatch):
    monkeypatch.setattr(benches.available, "no_device", lambda device: "there is no GPU")
    code, out, _ = run(capsys, "--list")
    assert code == 0
    installed = [c for c in CONTENDERS.values() if importlib.util.find_spec(c.library)]
    assert out.count("there is no GPU") == sum(not c.on_host for c in installed)
    assert "bias + GELU" in out
    code, _, err = run(capsys, "--backend", "cupy,cuda")
    assert code == 1
    assert "CuPy + Numba CUDA: there is no GPU" in err


def test_a_run_of_the_library_itself(tmp_path, capsys):
    code, out, err = run(capsys, "--quick", "--only", "SiLU", "--backend", "numpy,numba",
                         "--out", tmp_path)  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "bench.json").read_text())
    entry = found["workloads"]["SiLU"]["sizes"]["64×64"]
    assert set(entry["seconds"]) == {"numpy", "numba"}
    assert entry["problems"] == {}
    assert found["ceilings"]["cpu"]["bandwidth"] > 1e8
    assert "SiLU" in out


# -- results that are there -----------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    """Two results: gpugrad turned slower, PyTorch did not."""
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, own in zip(paths, (1.0, 1.5)):
        common.write_json(path, measured({"numba": [own] * 5, "torch": [2.0] * 5}))
    return paths


def test_compare_shows_what_changed(results, capsys):
    code, out, _ = run(capsys, "--compare", *results)
    assert code == 0
    assert "1 slower, 0 faster, 1 within the noise" in out
    assert "peers took 1 × as long" in out
    assert "1.5" in out


def test_results_without_a_common_workload_are_told(results, tmp_path, capsys):
    other = tmp_path / "c.json"
    common.write_json(other, measured({"numba": [1.0]}, "second", "three"))
    code, _, err = run(capsys, "--compare", results[0], other)
    assert code == 1
    assert "have measured nothing in common" in err


def test_an_older_result_is_told(results, capsys):
    old = json.loads(results[0].read_text()) | {"version": 0}
    results[0].write_text(json.dumps(old))
    for words in (("--compare", *results), ("--page", results[0])):
        code, _, err = run(capsys, *words)
        assert code == 1
        assert "has format 0, and this gpugrad reads 1; measure again" in err


def test_the_page_is_drawn_again(results, capsys):
    code, out, _ = run(capsys, "--page", results[1])
    assert code == 0
    assert "PyTorch 1.33 × in 1" in out
    assert "Roofline" in results[1].with_suffix(".html").read_text()
