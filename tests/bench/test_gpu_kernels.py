"""Timing of kernels and steps for a GPU: what is counted, what is said, what goes wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench import gpu_device, gpu_judge, gpu_kernels, gpu_nets, gpu_sanitize
from gpugrad.kernels.cuda import SLOTS

ROOT = Path(__file__).parents[2]


def python(code: str, **env: str) -> str:
    """What a fresh interpreter prints."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                         env=os.environ | {"PYTHONPATH": str(ROOT)} | env)  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def part(name: str, tmp_path: Path) -> dict:
    """What a part notes on the stand-in for CuPy."""
    from bench import gpu_check

    notes = tmp_path / "notes"
    command = [sys.executable, str(ROOT / "bench" / "gpu_parts.py"), name, "--fake", "--small"]
    run = subprocess.run(command, capture_output=True, text=True, check=False,
                         env=os.environ | {"GPU_CHECK_NOTES": str(notes)})  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return gpu_check.read_notes(notes)


# -- kernels --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return part("kernels", tmp_path_factory.mktemp("kernels"))["kernels"]


def test_every_kernel_is_timed(rows):
    """A slot that gets a kernel wants a case; of maps, which are made alike, some."""
    assert [row for row in rows if "error" in row] == []
    assert {row["size"] for row in rows} == {"HBM", "L2", "L2, in turn"}
    timed = {row["slot"] for row in rows}
    maps = {name for name, slot in SLOTS.items() if slot.module.endswith(".elementwise")}
    assert set(SLOTS) - maps - timed == set()
    assert len(timed & maps) >= 6
    for row in rows:
        assert row["launches"] == 1 or row["slot"] not in maps
        assert row["device_us"] > 0
        assert row["share"] > 0
        assert row["kernels"]
    step = next(r for r in rows if r["slot"] == "flat_step" and r["size"] == "HBM")
    assert step["launches"] == 2
    assert step["MiB"] * 2**20 == pytest.approx(32 * gpu_kernels.SMALL["HBM"], rel=0.01)


TWO_CASES = """
import argparse
from bench import gpu_fake, gpu_kernels
from bench.gpu_device import Notes
gpu_fake.install()
gpu_kernels.CASES = [case for case in gpu_kernels.CASES if case.name in ("tanh", "layer_norm")]
gpu_kernels.measure(Notes(), argparse.Namespace(device="cuda:0", small=True, quick=False))
"""


def test_out_of_memory_in_one_size_does_not_stop_the_others():
    told = map(json.loads, python(TWO_CASES, GPU_FAKE_MEMORY="9000").splitlines())
    rows = [row for _, key, row in told if key == "kernels"]
    failed = {row["case"]: row["error"] for row in rows if "error" in row}
    assert failed["layer_norm"] == "out of memory"
    assert failed.keys() == {"tanh", "layer_norm"}
    of_norm = {r["size"]: "error" in r for r in rows if r["case"] == "layer_norm"}
    assert of_norm == {"HBM": True, "L2": False, "L2, in turn": False}
    lines = gpu_judge.kernels({"kernels": rows})
    assert lines[0]["verdict"] == "holds"
    assert "not run: out of memory" in {line["verdict"] for line in lines}


def test_fewest_bytes():
    x, y, table = (np.zeros(n, np.float32) for n in (100, 100, 5000))
    fewest = gpu_kernels.fewest_bytes
    assert fewest("relu", (x,), {}, y) == 800
    assert fewest("multiply", (x, x), {}, y) == 800, "one operand, twice, is read once"
    assert fewest("embedding", (np.zeros(4, np.int64), table), {}, y) == 32 + 800
    p, g, m, v = (np.zeros(100, np.float32) for _ in range(4))
    assert fewest("flat_step", (p, g, m, v), {}, ()) == 32 * 100
    assert fewest("flat_update", (p, g, m, v), {}, (p, m, v)) == 28 * 100


def test_operations_of_attention():
    q = np.zeros((2, 3, 10, 4), np.float32)
    work = gpu_kernels.operations
    assert work("attention", (q,), {}, q) == 2 * 2 * 6 * 10 * 10 * 4 / 2
    assert work("attention_backward", (q, q), {}, q) == 2.5 * work("attention", (q,), {}, q)
    packed = np.zeros((6, 10, 12), np.float32)
    assert work("packed_attention", (packed,), {}, q) == work("attention", (q,), {}, q)
    assert work("softmax", (q,), {}, q) == 0


class Clock(gpu_device.Cpu):
    """A device whose events are numbers that a test gives."""

    def __init__(self, finished: bool) -> None:
        super().__init__()
        self.finished = finished

    def event(self) -> SimpleNamespace:
        return SimpleNamespace(done=self.finished)

    def elapsed(self, start, end) -> float:
        return 4e-6

    def occupy(self, seconds: float, small: bool = False) -> None:
        assert seconds > 0


@pytest.mark.parametrize("finished", [False, True])
def test_a_device_that_waits_for_the_host_is_told(finished):
    turns: list[int] = []
    runs = [partial(turns.append, n) for n in range(3)]
    found = gpu_kernels.timing(Clock(finished), runs, small=True)
    assert found["waits"] is finished
    assert found["device_us"]["median"] == 2.0
    assert turns[:6] == [0, 1, 2, 0, 1, 2], "operands take turns"


def test_nets_train_as_pytorch_does():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    for name in ("mlp", "gpt"):
        work = gpu_nets.WORKLOADS[name]
        ours = gpu_nets.with_gpugrad(work, work.small, "cpu")
        theirs = gpu_nets.with_torch(work, work.small, "cpu")
        for _ in range(3):
            assert float(ours().item()) == pytest.approx(float(theirs().item()), abs=1e-5)


# -- the device -----------------------------------------------------------------------------------


def test_no_cupy(monkeypatch):
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(gpu_device.NotRun, match="CuPy is not installed"):
        gpu_device.open_device("cuda:0")


@pytest.mark.parametrize(
    ("error", "driver", "told"),
    [
        ((35, "cudaErrorInsufficientDriver"), 12020, "the NVIDIA driver knows CUDA 12.2, and CuPy"),
        ((35, "cudaErrorInsufficientDriver"), 0, "there is no NVIDIA driver"),
        ((100, "cudaErrorNoDevice"), 13020, "the NVIDIA driver finds no GPU"),
    ],
)
def test_why_a_gpu_cannot_be_used(error, driver, told):
    code = f"""
from tests.backend import fake_cupy
fake_cupy.install(error={error!r}, driver={driver})
from bench import gpu_device
try: gpu_device.open_device("cuda:0")
except gpu_device.NotRun as reason: print(reason)
"""
    assert told in python(code)


def test_kernels_and_reads_are_counted_by_the_profiler(monkeypatch):
    def event(name, kind="cuda"):
        return SimpleNamespace(name=name, device_type=kind)

    seen = [event("map_relu")] * 3 + [event("Memcpy DtoH (Device -> Pageable)"), event("Memset"),
                                      event("Memcpy HtoD"), event("launch", "cpu")]  # fmt: skip

    class Profile:
        def __init__(self, activities):
            self.events = lambda: seen

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    torch = SimpleNamespace(
        profiler=SimpleNamespace(profile=Profile, ProfilerActivity=SimpleNamespace(CUDA=0)),
        autograd=SimpleNamespace(DeviceType=SimpleNamespace(CUDA="cuda")),
        cuda=SimpleNamespace(synchronize=lambda: None),
    )
    monkeypatch.setattr(gpu_device, "torch_device", lambda device: torch)
    found = gpu_device.profiled(lambda: None)
    assert found == {"kernels": 3, "host_reads": 1, "uploads": 1}
    seen.clear()
    assert gpu_device.profiled(lambda: None)["kernels"] is None


@pytest.mark.parametrize(
    ("error", "yes"),
    [(MemoryError(), True), (RuntimeError("CUDA out of memory. Tried to"), True),
     (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True), (RuntimeError("a loose bolt"), False)],
)  # fmt: skip
def test_out_of_memory_has_many_names(error, yes):
    assert gpu_device.is_out_of_memory(error) is yes


def test_cupy_has_what_is_asked_of_it():
    """On the CuPy that is installed, which needs no GPU for it."""
    # This process may have a stand-in under that name.
    find = "import importlib.util as u; print(u.find_spec('cupy') is not None)"
    if python(find).strip() != "True":
        pytest.skip("CuPy is not installed")
    code = """
import cupy, cupyx
for name in ("Event", "MemoryHook", "UnownedMemory", "MemoryPointer", "get_current_stream",
             "get_elapsed_time", "set_allocator"):
    getattr(cupy.cuda, name)
for name in ("done", "record", "synchronize"):
    getattr(cupy.cuda.Event, name)
for name in ("malloc_postprocess", "free_postprocess"):
    getattr(cupy.cuda.MemoryHook, name)
for name in ("used_bytes", "total_bytes", "free_all_blocks"):
    getattr(cupy.get_default_memory_pool(), name)
assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)
cupy.cuda.MemoryPointer.copy_from_device_async, cupy.cuda.function.Module, cupy.tile
cupyx.allow_synchronize, cupyx.DeviceSynchronized
"""
    python(code)


# -- compute-sanitizer ----------------------------------------------------------------------------

MEMCHECK = """========= COMPUTE-SANITIZER
tanh: 2 calls
========= Invalid __global__ read of size 16 bytes
=========     at map_tanh_float32+0x190
=========     by thread (3,0,0) in block (0,0,0)
layer_norm: 3 calls
========= ERROR SUMMARY: 1 error
"""
RACECHECK = "x: 4 calls\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


def test_what_compute_sanitizer_says():
    found = gpu_sanitize.parse(MEMCHECK)
    assert (found["errors"], found["calls"]) == (1, 5)
    assert found["where"] == ["map_tanh_float32"]
    assert gpu_sanitize.parse(RACECHECK)["errors"] == 0
    refused = gpu_sanitize.parse("========= Device not supported. Please refer to the manual")
    assert refused["errors"] is None
    assert refused["refused"].startswith("Device not supported")


def test_verdict_of_compute_sanitizer():
    base = {"tool": "memcheck", "with_tool": True, "ended": 0}
    verdict = gpu_judge.sanitizer
    assert [v["verdict"] for v in verdict(base | gpu_sanitize.parse(RACECHECK))] == ["holds"]
    assert [v["verdict"] for v in verdict(base | gpu_sanitize.parse(MEMCHECK))] == ["falls short"]
    (line,) = verdict(base | gpu_sanitize.parse("") | {"ended": -1})
    assert line["verdict"] == "not run: no summary; it ended with -1"
    (line,) = verdict(base | gpu_sanitize.parse(RACECHECK) | {"ended": 1})
    assert line["verdict"].startswith("not run: the program under it ended with 1")


def test_the_tool_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert gpu_sanitize.program([str(tmp_path)]) is None
    (tmp_path / "compute-sanitizer").touch()
    assert gpu_sanitize.program([str(tmp_path)]) == f"{tmp_path}/compute-sanitizer"


# -- verdicts -------------------------------------------------------------------------------------


def told(lines: list[dict]) -> dict[str, str]:
    return {line["what"]: line["verdict"] for line in lines}


def test_claims_are_held_against_what_was_measured():
    counts = {"own": 2, "kernels": 2, "host_reads": 0, "uploads": 0}
    row = {"parameters_M": 10, "share": 0.93, "own_launches": 2, "counts": counts, "waits": ""}
    good = {
        "launch_us": {"median": 7.0}, "clip_and_step": [row, row | {"parameters_M": 64}],
        "bias_backward": {"share": 0.86}, "tiny_step_ms": {"median": 0.05},
        "tiny_clip_grad_norm__ms": {"median": 0.09}, "other_in_mask": 0, "compilers_loaded": [],
    }  # fmt: skip
    lines = gpu_judge.claims(good)
    assert len(lines) == 10
    assert {line["verdict"] for line in lines} == {"holds"}
    bad = good | {
        "launch_us": {"median": 12.5}, "bias_backward": {"share": 0.84}, "other_in_mask": 1,
        "clip_and_step": [row | {"share": 0.89, "waits": "step.py:3", "counts": counts | {
            "kernels": 3}}],
        "tiny_step_ms": {"median": 0.2}, "tiny_clip_grad_norm__ms": {"median": 0.2},
        "compilers_loaded": ["numba.cuda"],
    }  # fmt: skip
    assert {line["verdict"] for line in gpu_judge.claims(bad)} == {"falls short"}
    without_profiler = row | {"counts": {"kernels": None, "host_reads": None}}
    lines = gpu_judge.claims(good | {"clip_and_step": [without_profiler]})
    assert {line["verdict"] for line in lines} == {"holds"}, "then our own launches are counted"
    lines = gpu_judge.claims({"left_out": ["bias_backward: out of memory"]})
    assert {line["verdict"] for line in lines} == {"not run: bias_backward: out of memory"}


def test_steps_are_held_against_pytorch():
    own = {"contender": "gpugrad", "ms": 1.0, "peak_MiB": 90.0}
    eager = {"contender": "torch", "ms": 1.1, "share": 0.9, "peak_MiB": 100.0}
    compiled = {"contender": "torch.compile", "ms": 0.8, "share": 1.25, "peak_MiB": 80.0}
    base = {"workload": "gpt", "counts": {"host_reads": 0}, "waits": ""}
    found = told(gpu_judge.steps(base | {"steps": [own, eager, compiled]}))
    assert found == {
        "gpt: host reads in a step": "holds",
        "step of gpt: time, torch.compile = 1": "falls short",
        "step of gpt: peak memory, PyTorch = 1": "holds",
    }
    found = told(gpu_judge.steps(base | {"steps": [own], "torch": "PyTorch is not installed"}))
    assert found["gpt: beside PyTorch"] == "not run: PyTorch is not installed"
    found = told(gpu_judge.steps(base | {"steps": [own, eager], "waits": "loss.py:7"}))
    assert found["gpt: host reads in a step (loss.py:7)"] == "falls short"
    assert told(gpu_judge.steps({})) == {"step of step": "not run: it did not come to its end"}


def test_the_tables(rows):
    rows = rows[:]
    rows[0] = {k: rows[0][k] for k in ("family", "slot", "case", "size")} | {"error": "loose bolt"}
    text = gpu_judge.kernel_table(rows)
    assert text.count("\n") == 1 + len({(r["case"], r["slot"]) for r in rows})
    assert "loose bolt" in text
    (line,) = gpu_judge.failures({"kernels": {"results": {"kernels": rows}}})
    assert line.endswith("HBM: loose bolt")
    json.dumps(rows)
