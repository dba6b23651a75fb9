"""The benchmarks run, their reports say where numbers come from, verdicts follow the numbers."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpugrad.bench import common, leak, long_chain, overhead
from gpugrad.bench import run as run_all

ROOT = Path(__file__).parents[2]
EVERY_REPORT = {"benchmark", "quick", "threads", "date", "commit", "machine", "python", "versions",
                "results", "verdicts", "table"}  # fmt: skip


def quick(name: str, tmp_path: Path) -> dict:
    """The report of ``python bench/NAME.py --quick``, run from a foreign folder."""
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), "--quick", "--json", str(out)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(out.read_text())
    assert set(report) == EVERY_REPORT
    assert report["quick"] is True
    assert report["machine"]["cpu"]
    assert report["versions"]["gpugrad"]
    for v in report["verdicts"]:
        assert v["verdict"] in ("holds", "falls short") or v["verdict"].startswith("not run: ")
        assert v["what"] in run.stdout
    return report


def test_overhead(tmp_path):
    report = quick("overhead", tmp_path)
    for variant in report["results"]["variants"].values():
        contenders = variant["contenders"]
        assert {"gpugrad", "numpy"} <= set(contenders)
        for entry in contenders.values():
            spread = entry["us_per_op"]
            assert 0 < spread["min"] <= spread["q1"] <= spread["median"] <= spread["q3"]
            assert entry["difference"] < 1e-4


def test_a_contender_that_computes_something_else_stops_the_comparison():
    import numpy as np

    truth = (np.ones(3), np.full(3, 2.0))
    assert overhead.agreement({"numpy": truth, "other": truth})["other"] == 0
    with pytest.raises(SystemExit, match=r"other differs from NumPy by 0\.05"):
        overhead.agreement({"numpy": truth, "other": (np.ones(3), np.full(3, 2.1))})
    with pytest.raises(SystemExit, match="other gives 1 results"):
        overhead.agreement({"numpy": truth, "other": truth[:1]})
    with pytest.raises(SystemExit, match="differs"):
        overhead.agreement({"numpy": truth, "other": (np.ones(3), np.full(3, np.nan))})


def test_overhead_is_judged_by_its_share_of_torch():
    def found(share):
        own = {"share_of_torch": {"median": share}}
        return {"variants": {"x": {"contenders": {"gpugrad": own}}}}

    assert [v["verdict"] for v in overhead.verdicts(found(0.30))] == ["holds", "holds"]
    assert [v["verdict"] for v in overhead.verdicts(found(0.35))] == ["falls short", "holds"]
    assert [v["verdict"] for v in overhead.verdicts(found(0.41))] == ["falls short"] * 2
    alone: dict = {"variants": {"x": {"contenders": {"gpugrad": {}}}}}
    assert "not run" in overhead.verdicts(alone)[0]["verdict"]


def test_import_time(tmp_path):
    report = quick("import_time", tmp_path)
    assert report["results"]["gpugrad_ms"]["median"] > report["results"]["numpy_ms"]["min"]
    assert "gpugrad" in report["results"]["packages_beyond"]
    assert report["results"]["too_early"] == []


def test_long_chain_in_this_process():
    found = long_chain.measure("gpugrad", "x+b on scalars", 20_000)
    assert found["nodes"] == 20_000
    assert found["backward_us"] > 0
    assert found["peak_MiB"] < 100


def test_long_chain_verdicts():
    def row(library, nodes, peak, seconds):
        return {"library": library, "chain": "x*a+b on 8x8", "nodes": nodes, "peak_MiB": peak,
                "forward_us": seconds, "backward_us": seconds}  # fmt: skip

    rows = [row(lib, n, p, 1.0 if n == 10 else 3.0) for lib, n, p in (
        ("gpugrad", 10, 1), ("torch", 10, 1), ("gpugrad", 100, 9), ("torch", 100, 8))]  # fmt: skip
    assert [v["verdict"] for v in long_chain.verdicts(rows)] == ["falls short"] * 3
    better = [r | {"peak_MiB": 7, "forward_us": 1, "backward_us": 1} if r["library"] == "gpugrad"
              else r for r in rows]  # fmt: skip
    assert [v["verdict"] for v in long_chain.verdicts(better)] == ["holds"] * 3
    alone = [r for r in rows if r["library"] == "gpugrad"]
    assert long_chain.verdicts(alone)[0]["verdict"] == "not run: PyTorch is not installed"


@pytest.mark.torch
def test_long_chain(tmp_path):
    report = quick("long_chain", tmp_path)
    longest = max(r["nodes"] for r in report["results"])
    peaks = {(r["chain"], r["library"]): r["peak_MiB"]
             for r in report["results"] if r["nodes"] == longest}  # fmt: skip
    for chain in {chain for chain, _ in peaks}:
        assert peaks[chain, "gpugrad"] < peaks[chain, "torch"]


def test_leak(tmp_path):
    report = quick("leak", tmp_path)
    found = report["results"]
    assert found["objects"]["settled"] > 0
    assert found["objects"]["end"] == found["objects"]["settled"], found["grown_classes"]
    assert found["growth_MiB"] < leak.TOLERANCE_MIB
    assert found["last_loss"] < found["first_loss"]


def test_leak_sees_objects_of_the_library():
    import gpugrad as gg

    gc.collect()
    before = leak.objects()["Tensor"]
    kept = [gg.tensor(0.0) for _ in range(100)]
    assert leak.objects()["Tensor"] >= before + len(kept)


def test_main_job(tmp_path):
    report = quick("main_job", tmp_path)
    (found,) = report["results"]
    assert found["epochs"] == 1
    assert 0.1 < found["test_accuracy"] <= 1
    assert found["wall_s"] > 0


def test_everything_into_one_file_and_one_page(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"# Mine\n\n{run_all.BEGIN}\nyesterday\n{run_all.END}\n\nStays.\n")
    run_all.main(["--quick", "--only", "import_time", "--results", str(tmp_path)])
    (written,) = tmp_path.glob("cpu-*.json")
    found = json.loads(written.read_text())
    assert found["benchmarks"]["import_time"]["verdicts"]
    text = page.read_text()
    assert "yesterday" not in text
    assert text.startswith("# Mine")
    assert text.endswith("Stays.\n")
    assert "import gpugrad beyond NumPy" in text
    assert written.name in text
    before = text.replace(found["date"], "")
    run_all.main(["--quick", "--only", "import_time", "--results", str(tmp_path)])
    assert page.read_text().count(run_all.BEGIN) == before.count(run_all.BEGIN) == 1


def test_a_benchmark_that_fails_is_told(tmp_path, monkeypatch, capsys):
    def explode(quick):
        raise RuntimeError("the roof fell in")

    monkeypatch.setattr("gpugrad.bench.leak.report", explode)
    found = run_all.run_all(["leak"], quick=True)
    assert "the roof fell in" in found["benchmarks"]["leak"]["verdicts"][0]["verdict"]
    assert "the roof fell in" in run_all.markdown(found, "x.json")


def test_contenders_take_turns():
    calls = []
    seconds = common.alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmups=1
    )
    assert "".join(calls) == "ab" * 4
    assert [len(s) for s in seconds.values()] == [3, 3]


def test_statistics():
    assert common.spread([1.0, 2.0, 3.0, 4.0, 5.0], 10) == {
        "median": 30, "q1": 20, "q3": 40, "min": 10, "n": 5
    }  # fmt: skip
    assert common.spread([2.0])["median"] == 2
    # A machine that turns twice as slow in mid-run changes no paired ratio.
    assert common.ratio([1, 2, 4], [2, 4, 8])["median"] == 0.5
    assert common.round_to(0.00123456) == 0.001235
    assert common.round_to(123456.0) == 123500


def test_verdicts():
    assert common.verdict("a", 1.0, 2.0, "s")["verdict"] == "holds"
    assert common.verdict("a", 3.0, 2.0, "s")["verdict"] == "falls short"
    assert common.verdict("a", 3.0, 2.0, "x", at_least=True)["verdict"] == "holds"
    assert common.verdict("a", float("nan"), 2.0, "s")["verdict"] == "falls short"
    text = common.verdict_table([common.verdict("speed", 3.0, 2.0, "x", at_least=True)])
    assert "| speed  | 3 x      | ≥ 2     | holds   |" in text


def test_the_measuring_process_is_clean(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "1")
    env = common.environment(threads=1)
    assert "OPENBLAS_CORETYPE" not in env
    assert "OPENBLAS_L2_SIZE" not in env
    assert env["OMP_NUM_THREADS"] == "1"
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert os.environ["OPENBLAS_CORETYPE"] == "Haswell"


def test_a_measuring_process_that_fails_says_why(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('no such thing')")
    with pytest.raises(RuntimeError, match="no such thing"):
        common.measure(str(script))


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads Linux's /proc")
def test_memory_is_seen():
    before = common.resident()
    block = mmap.mmap(-1, 64 * 2**20)  # not what the C library may have kept
    for i in range(0, len(block), 4096):
        block[i] = 1
    assert common.resident() - before > 60 * 2**20
    block.close()
    assert common.peak_resident() > before + 60 * 2**20


def test_every_benchmark_is_in_the_run():
    for name in run_all.SCRIPTS:
        assert callable(importlib.import_module(f"gpugrad.bench.{name}").report)
    assert time.strptime(common.provenance()["date"], "%Y-%m-%d %H:%M:%S UTC")
