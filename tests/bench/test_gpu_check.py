"""gpu_check on a machine without a GPU: its machinery, and its parts against a fake device."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import gpugrad as gg
from bench import (
    gpu_check,
    gpu_device,
    gpu_judge,
    gpu_nets,
    gpu_parts,
    gpu_registry,
    gpu_sanitize,
    gpu_tests,
)
from bench.gpu_check import Part

ROOT = Path(__file__).parents[2]
FIND = "import os, json; notes = open(os.environ['GPU_CHECK_NOTES'], 'a')\n"


def script(name: str, code: str, seconds: float = 20.0, group: int = 0, **options) -> Part:
    """A part that runs a few lines of Python."""
    command = [sys.executable, "-c", FIND + textwrap.dedent(code)]
    return Part(name, f"about {name}", seconds, group, command=command, **options)


def run(parts: list[Part], out: Path, **given) -> dict:
    options = argparse.Namespace(
        device="cpu", dry_run=False, quick=False, out=str(out), seconds=60.0
    )
    vars(options).update(given)
    report, path = gpu_check.check(parts, options)
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    return report


def put(key: str, value: str) -> str:
    return f"notes.write(json.dumps(['put', {key!r}, {value}]) + chr(10)); notes.flush()\n"


# -- the machinery --------------------------------------------------------------------------------


def test_a_part_that_hangs_is_stopped_and_what_it_found_is_kept(tmp_path):
    child = "import subprocess, sys, time\n"
    child += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    hangs = script("hangs", child + put("found", "7") + "time.sleep(60)", seconds=1.0)
    after = script("after", put("fine", "True"), group=1)
    start = time.monotonic()
    report = run([hangs, after], tmp_path / "out.json")
    assert time.monotonic() - start < 15
    entry = report["parts"]["hangs"]
    assert entry["status"] == "timed out"
    assert entry["results"] == {"found": 7}
    assert "limit of 1 s" in entry["why"]
    assert report["parts"]["after"]["status"] == "done"
    told = {v["what"]: v["verdict"] for v in report["verdicts"]}
    assert told["about hangs"].startswith("timed out")


def test_a_part_that_ignores_the_request_to_end_is_killed(tmp_path):
    code = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    report = run([script("deaf", code + put("x", "1") + "time.sleep(60)", seconds=1.0)],
                 tmp_path / "out.json")  # fmt: skip
    assert report["parts"]["deaf"]["status"] == "timed out"


def test_a_part_that_crashes_does_not_stop_the_rest(tmp_path):
    crash = script("crash", put("first", "1") + "raise ValueError('the third bolt is loose')")
    dies = script("dies", put("first", "1") + "os.kill(os.getpid(), 9)")
    report = run([crash, dies, script("after", "", group=1)], tmp_path / "out.json")
    entry = report["parts"]["crash"]
    assert entry["status"] == "failed"
    assert entry["why"] == "ValueError: the third bolt is loose"
    assert "Traceback" in entry["log"]
    assert entry["results"] == {"first": 1}
    assert report["parts"]["dies"]["status"] == "failed"
    assert report["parts"]["dies"]["why"] == "ended with status -9"
    assert report["parts"]["after"]["status"] == "done"


def test_the_json_is_written_after_every_part(tmp_path):
    out = tmp_path / "out.json"
    looks = f"notes.write(json.dumps(['put', 'seen', json.load(open({str(out)!r}))]) + chr(10))"
    report = run([script("one", put("x", "1")), script("two", looks, group=1)], out)
    seen = report["parts"]["two"]["results"]["seen"]
    assert list(seen["parts"]) == ["one"]
    assert seen["parts"]["one"]["results"] == {"x": 1}
    assert seen["commit"]


def test_parts_of_a_group_run_side_by_side(tmp_path):
    """Each waits for the other's file: one after the other, both would time out."""
    code = "import time, pathlib\npathlib.Path({mine!r}).touch()\n"
    code += "while not pathlib.Path({other!r}).exists(): time.sleep(0.01)\n"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    parts = [script("a", code.format(mine=a, other=b)), script("b", code.format(mine=b, other=a))]
    report = run(parts, tmp_path / "out.json")
    assert [e["status"] for e in report["parts"].values()] == ["done", "done"]


def test_when_the_time_for_all_is_over_the_rest_is_not_run(tmp_path):
    parts = [script("long", "import time; time.sleep(60)", 20), script("late", "", group=1)]
    report = run(parts, tmp_path / "out.json", seconds=1.5)
    assert report["parts"]["long"]["status"] == "timed out"
    assert report["parts"]["late"]["status"] == "not run"
    assert "were over" in report["parts"]["late"]["why"]


def test_without_a_gpu_nothing_is_tried(tmp_path):
    first = script("environment", put("not_run", '"there is no driver"'))
    never = script("kernels", "raise SystemExit(7)", group=1)
    report = run([first, never], tmp_path / "out.json")
    assert report["parts"]["kernels"]["status"] == "not run"
    assert told(report["verdicts"]) == ["not run: there is no driver"]


def test_notes_survive_a_cut_off_line(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text('["put", "a", 1]\n["add", "b", 2]\n["add", "b", 3]\n["put", "c", {"d"')
    assert gpu_check.read_notes(path) == {"a": 1, "b": [2, 3]}
    assert gpu_check.read_notes(tmp_path / "none") == {}


def test_where_the_json_goes(tmp_path, monkeypatch):
    day = datetime(2026, 1, 2, tzinfo=UTC)
    monkeypatch.delenv("OUT", raising=False)
    place = gpu_check.destination
    assert place(None, "NVIDIA H100 80GB HBM3", day, False) == (
        ROOT / "bench/results/gpu-nvidia-h100-80gb-hbm3-2026-01-02.json"
    )
    assert ROOT not in place(None, "some CPU", day, True).parents
    assert place(None, "x", day, False, quick=True).name == "gpu-quick-x-2026-01-02.json"
    assert place(str(tmp_path / "a.json"), "x", day, False) == tmp_path / "a.json"
    assert place(f"{tmp_path}/new/", "x", day, False).name == "gpu-x-2026-01-02.json"
    monkeypatch.setenv("OUT", str(tmp_path))
    assert place(None, "x", day, False) == tmp_path / "gpu-x-2026-01-02.json"


# -- verdicts -------------------------------------------------------------------------------------


def told(lines: list[dict]) -> list[str]:
    return [v["verdict"] for v in lines]


def test_verdicts_follow_the_results():
    judge = gpu_judge.tests
    assert told(judge({"tests": [{"outcome": "passed"}]})) == ["holds"]
    assert told(judge({"tests": [{"outcome": "passed"}, {"outcome": "error"}]})) == ["falls short"]
    assert told(judge({"tests": [{"outcome": "skipped"}]})) == ["not run: all 1 were skipped"]
    assert told(judge({"summary": "no test is marked gpu"})) == ["not run: no test is marked gpu"]

    row = {"name": "f", "value": "pass", "vjp": "fail: by 1", "second": "none: no derivative"}
    assert told(gpu_judge.primitives({"primitives": [row], "total": 3})) == [
        "holds", "falls short", "holds", "falls short"
    ]  # fmt: skip

    job = {"device": {"accuracy": 0.98}, "curve_difference": 0.5}
    assert told(gpu_judge.main_job(job)) == ["holds", "falls short"]
    assert told(gpu_judge.main_job({})) == ["not run: it did not get to its end"]

    slow = {"chains": [{"shape": "8x8", "share_of_torch": {"median": 1.5}}]}
    assert told(gpu_judge.overhead(slow)) == ["falls short"]
    alone = {"chains": [{"shape": "8x8"}], "torch": "PyTorch is not installed"}
    assert told(gpu_judge.overhead(alone)) == ["not run: PyTorch is not installed"]


def test_the_table_names_failures(tmp_path):
    row = {"name": "tanh", "value": "pass", "vjp": "fail: sample 0 float64: by 0.1",
           "second": "pass"}  # fmt: skip
    note = f"notes.write(json.dumps(['add', 'primitives', {row!r}]) + chr(10))\n"
    part = script("primitives-0", note + put("total", "1"))
    report = run([part], tmp_path / "out.json")
    text = gpu_check.summary(report, tmp_path / "out.json")
    assert "DRY RUN" not in text
    assert "tanh: vjp: sample 0 float64: by 0.1" in text
    assert "falls short" in text
    assert "| operations of 1 whose value differs" in text


# -- the registry against a fake device -----------------------------------------------------------


def test_operations_pass_on_a_device_that_is_no_host():
    pytest.importorskip("array_api_strict", reason="its device1 stands in for a GPU")
    names = gpu_registry.names()
    assert len(names) > 50
    # Some: tests/ops takes all of them through every device there is.
    chosen = {*names[::4], "multiply", "matmul", "tanh", "equal"}
    rows = [gpu_registry.compare(name, "strict:device1") for name in names if name in chosen]
    assert [r for r in rows if any(r[c].startswith("fail") for c in gpu_registry.CHECKS)] == []
    by_name = {r["name"]: r for r in rows}
    for name in ("multiply", "matmul", "tanh"):
        assert [by_name[name][c] for c in gpu_registry.CHECKS] == ["pass"] * 3
    assert by_name["equal"]["vjp"].startswith("none")


def test_a_wrong_result_is_found(monkeypatch):
    right = gpu_registry.run

    def wrong(check):
        def run(name, sample, dtype, device, out):
            right(name, sample, dtype, device, out)
            if device == "fake":
                out[check] = [x * (1 + 1e-3) for x in out[check]]

        monkeypatch.setattr(gpu_registry, "run", run)

    monkeypatch.setattr("gpugrad.tensor", tensor_on_fake(gg.tensor))
    for check in gpu_registry.CHECKS:
        wrong(check)
        row = gpu_registry.compare("tanh", "fake")
        assert row[check].startswith("fail: sample 0 float64: by 0.0")
        assert [row[c] for c in gpu_registry.CHECKS if c != check] == ["pass"] * 2


def tensor_on_fake(tensor):
    return lambda x, *, device, **options: tensor(x, device="cpu", **options)


def test_an_error_of_the_device_is_told(monkeypatch):
    right = gpu_registry.run

    def run(name, sample, dtype, device, out):
        if device == "fake":
            raise NotImplementedError("no kernel for this")
        right(name, sample, dtype, device, out)

    monkeypatch.setattr(gpu_registry, "run", run)
    row = gpu_registry.compare("tanh", "fake")
    assert row["value"].endswith("NotImplementedError: no kernel for this")
    assert row["value"].startswith("fail")


@pytest.mark.parametrize(
    ("expected", "found", "why"),
    [
        (np.ones(2), np.ones(3), "shape"),
        (np.ones(2), np.ones(2, np.float32), "dtype float32 for float64"),
        (np.ones(2), np.array([1, 1 + 1e-6]), "by 1e-06"),
        (np.ones(2), np.array([1, -1]) * 1.0, "equal but for signs"),
        (np.array([1, np.nan]), np.ones(2), "not finite"),
        (np.array([1, np.nan]), np.array([1, np.inf]), "nan and infinity"),
        (np.array([1, 2]), np.array([1, 3]), "1 of 2 elements"),
    ],
)
def test_what_counts_as_different(expected, found, why):
    gpu_registry.same(expected, expected, "float64")
    with pytest.raises(gpu_registry.Differs, match=why):
        gpu_registry.same(expected, found, "float64")


# -- the other parts ------------------------------------------------------------------------------


class Collected(gpu_device.Notes):
    """Notes in memory."""

    def __init__(self):
        self.results: dict = {}

    def put(self, **values):
        self.results |= values

    def add(self, key, value):
        self.results.setdefault(key, []).append(value)


@pytest.fixture
def options():
    return argparse.Namespace(
        device="cpu", reference="cpu", small=True, quick=False, shard=0, shards=1
    )


def test_parts_say_why_they_do_not_run(options):
    if importlib.util.find_spec("cupy"):
        import cupy

        if cupy.is_available():
            pytest.skip("there is a GPU here")
    options.device = "cuda:0"
    options.workload, options.tool = "mlp", "memcheck"
    names = set(gpu_parts.PARTS) - {"environment", "tests"}  # which have something to say anyway
    for name in sorted(names):
        with pytest.raises(gpu_device.NotRun, match="CuPy"):
            gpu_parts.PARTS[name](Collected(), options)


def test_every_model_is_trained_in_the_main_job(options):
    notes = Collected()
    gpu_parts.main_job(notes, options)
    assert len(notes.results["device"]["loss"]) == 2
    for model in gpu_parts.JOBS:
        name = "" if model == "mlp" else f"{model}, "
        assert notes.results[f"{name}device"]["loss"] == notes.results[f"{name}reference"]["loss"]
    assert notes.results["curve_difference"] == 0


def test_overhead_part(options):
    notes = Collected()
    gpu_parts.overhead(notes, options)
    assert [c["shape"] for c in notes.results["chains"]] == ["8x8", "64x64"]
    for chain in notes.results["chains"]:
        own = chain["libraries"]["gpugrad"]
        assert 0 < own["host_us"] <= own["total_us"] * 1.01


def test_kernels_are_counted_without_copies():
    """PyTorch's profiler lists what ran on the device, for whichever library launched it."""
    cuda = "cuda"

    def event(name, kind=cuda, us=2.0):
        return SimpleNamespace(name=name, device_type=kind,
                               time_range=SimpleNamespace(elapsed_us=lambda: us))  # fmt: skip

    seen = [event("add")] * 150 + [event("Memcpy HtoD")] * 9 + [event("launch", "cpu")] * 150

    class Profile:
        def __init__(self, activities):
            self.events = lambda: seen

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    torch = SimpleNamespace(
        profiler=SimpleNamespace(profile=Profile, ProfilerActivity=SimpleNamespace(CUDA=cuda)),
        autograd=SimpleNamespace(DeviceType=SimpleNamespace(CUDA=cuda)),
        cuda=SimpleNamespace(synchronize=lambda: None),
    )
    device = SimpleNamespace(name="cuda", synchronize=lambda: None)
    row: dict = {"libraries": {"gpugrad": {}}}
    notes = Collected()
    gpu_parts.counted(row, {"gpugrad": lambda: None}, torch, device, notes)
    assert row["libraries"]["gpugrad"] == {
        "kernels": 3.0, "kernel_us": 6.0, "kernel_names": ["add"]
    }  # fmt: skip
    seen.clear()
    gpu_parts.counted(row, {"gpugrad": lambda: None}, torch, device, notes)
    assert notes.results["profiler"] == "it saw no kernel of gpugrad"


def test_ceilings_part(options):
    notes = Collected()
    gpu_parts.ceilings(notes, options)
    whats = [row["what"] for row in notes.results["ceilings"]]
    assert whats[0].startswith("copy")
    assert all(row["best"] >= row["median"] > 0 for row in notes.results["ceilings"])


EXAMPLE_TESTS = """
import pytest

pytestmark = pytest.mark.gpu

def test_passes(): pass
def test_fails(): assert 1 == 2, "one is not two"
def test_skips(): pytest.skip("not today")
@pytest.mark.parametrize("n", [1, 2])
def test_each(n):
    with pytest.raises(ValueError, match="no"):
        raise ValueError("no")
def test_scratch(tmp_path): (tmp_path / "a").touch()
"""


@pytest.mark.parametrize("fallback", [False, True])
def test_tests_part(tmp_path, fallback):
    folder = tmp_path / "tests"
    folder.mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['gpu: x']\n")
    (folder / "test_example.py").write_text(EXAMPLE_TESTS)
    (folder / "test_broken.py").write_text("import nothing_of_this_name\n# mark.gpu\n")
    runner = "without_pytest" if fallback else "with_pytest"
    code = (f"from pathlib import Path\nfrom bench import gpu_device, gpu_tests\n"
            f"gpu_tests.{runner}(gpu_device.Notes(), Path({str(folder)!r}))")  # fmt: skip
    notes = tmp_path / "notes"
    env = os.environ | {"PYTHONPATH": str(ROOT), "GPU_CHECK_NOTES": str(notes)}
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True,
                           check=False)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    outcomes = [t["outcome"] for t in gpu_check.read_notes(notes)["tests"]]
    assert sorted(outcomes) == ["failed", "not collected", *["passed"] * 4, "skipped"]
    failed = next(t for t in gpu_check.read_notes(notes)["tests"] if t["outcome"] == "failed")
    assert "one is not two" in failed["why"]


#: What the dry run of the test leaves out has tests of its own, or is the same with another name.
ENOUGH = ("environment", "primitives-0", "sanitizer-memcheck", "compile-gpt", "ceilings", "claims",
          "kernels", "overhead", "steps-mlp", "steps-gpt")  # fmt: skip


def test_dry_run(tmp_path):
    """The command, as it will be typed, without a GPU, and with a PyTorch that does not load."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libtorch.so is missing')")
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), "--dry-run", "--out", str(out),
               "--only", ",".join(ENOUGH)]  # fmt: skip
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False,
                           env=os.environ | {"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr
    report = json.loads(out.read_text())
    assert report["dry_run"] is report["whole"] is True
    assert set(report["parts"]) == set(ENOUGH)
    assert {e["status"] for e in report["parts"].values()} == {"done"}
    found = {name: e["results"] for name, e in report["parts"].items()}
    assert {"tool", "schema", "date", "commit", "machine", "versions", "verdicts"} <= set(report)
    assert found["environment"]["gpugrad"] == str(ROOT / "gpugrad")
    assert found["environment"]["torch"].endswith("libtorch.so is missing")
    assert not [row for row in found["kernels"]["kernels"] if "error" in row]
    assert "left_out" not in found["claims"]
    assert found["claims"]["clip_and_step"][0]["counts"]["kernels"] == 2
    for name in ("steps-mlp", "steps-gpt"):
        assert found[name]["counts"]["host_reads"] == 0
        assert found[name]["waits"] == ""
        assert "does not load" in found[name]["torch"]
    assert found["sanitizer-memcheck"]["calls"] > 50
    assert "DRY RUN" in ended.stdout
    assert all(v["verdict"].startswith("dry run: ") for v in report["verdicts"])
    assert "limit s" in ended.stdout
    assert "layer_norm_backward" in ended.stdout


def test_every_part_that_is_planned_exists():
    for quick in (False, True):
        for part in gpu_check.plan(2, quick):
            assert part.name.partition("-")[0] in gpu_parts.PARTS
    names = {p.name for p in gpu_check.plan(1)}
    assert set(ENOUGH) < names
    assert {f"steps-{name}" for name in gpu_nets.WORKLOADS} < names
    assert {f"sanitizer-{tool}" for tool in gpu_sanitize.TOOLS} < names


def test_the_limits_leave_room_in_eight_minutes_and_in_two():
    assert gpu_check.seconds_of(gpu_check.plan(4)) <= gpu_check.TOTAL_SECONDS < 480
    quick = gpu_check.plan(4, quick=True)
    assert gpu_check.seconds_of(quick) <= gpu_check.QUICK_SECONDS < 120
    assert {"tests", "claims", "kernels"} < {p.name for p in quick}
    assert gpu_tests.MARK == "gpu"


STOPPED = """
import sys
from bench import gpu_check
from bench.gpu_check import Part
gpu_check.SNAPSHOT_SECONDS = 0.05
code = "import os, json, time; notes = open(os.environ['GPU_CHECK_NOTES'], 'a');"
code += "notes.write(json.dumps(['put', 'found', 7]) + chr(10)); notes.flush(); time.sleep(10)"
first = Part("first", "the first", 20, 0, command=[sys.executable, "-c", "pass"])
second = Part("second", "the second", 20, 1, command=[sys.executable, "-c", code])
third = Part("third", "the third", 20, 2, command=[sys.executable, "-c", "pass"])
gpu_check.plan = lambda shards, quick: [first, second, third]
sys.exit(gpu_check.main(["--out", sys.argv[1]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_was_found_before_it_was_stopped_is_kept(tmp_path, number):
    out = tmp_path / "out.json"
    # What is killed leaves its temporary folders behind.
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    check = subprocess.Popen([sys.executable, "-c", STOPPED, str(out)], env=env, text=True,
                             stdout=subprocess.PIPE, start_new_session=True)  # fmt: skip

    def found() -> object:
        if not out.is_file():
            return None
        second = json.loads(out.read_text())["parts"].get("second", {})
        return second.get("results", {}).get("found")

    end = time.monotonic() + 20
    while found() != 7 and time.monotonic() < end:
        time.sleep(0.02)
    check.send_signal(number)
    told, _ = check.communicate(timeout=20)
    report = json.loads(out.read_text())
    assert report["whole"] is False
    assert list(report["parts"]) == ["first", "second"]
    assert report["parts"]["first"]["status"] == "done"
    assert report["parts"]["second"]["status"] == "stopped"
    assert report["parts"]["second"]["results"] == {"found": 7}
    assert any(v["verdict"].startswith("stopped") for v in report["verdicts"])
    if number != signal.SIGKILL:
        assert check.returncode == 1
        assert "STOPPED before its end" in told
