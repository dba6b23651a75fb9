"""A run: who may take part, agreement before time, and whatever a contender may do."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpugrad.bench import available, runner, worker
from gpugrad.bench.processes import Pool, Problem, Process
from gpugrad.bench.runner import Budget, Case
from gpugrad.bench.workload import CONTENDERS, FAMILIES, workloads, workloads_of
from tests.bench.fake_worker import FAKES

ROOT = Path(__file__).parents[2]

MODULE = "tests.bench.fake_worker"
TINY = Budget(0.01, 2, 3, 1e-4)


def cases(*names, keys=("numba", "torch", "jax", "autograd", "mygrad")):
    return [
        Case(FAKES[name], size, tuple(CONTENDERS[key] for key in keys), {}, TINY)
        for name in names
        for size in FAKES[name].sizes
    ]


def begin(found, keys=("numba", "torch", "jax", "autograd", "mygrad")):
    return runner.begin(found, [CONTENDERS[key] for key in keys], {}, quick=True)


@pytest.fixture(scope="module")
def measured():
    """A report in which every contender misbehaves in its own way, and how often it was saved."""
    planned = cases("first", "second")
    report, saved = begin(planned), []
    with Pool(MODULE) as pool:
        runner.run(planned, report, pool=pool, save=lambda r: saved.append(r["complete"]))
    return report, saved


def test_who_is_right_is_timed(measured):
    report, _ = measured
    for name, size in (("first", "one"), ("first", "two"), ("second", "three")):
        seconds = report["workloads"][name]["sizes"][size]["seconds"]["numba"]
        assert 2 <= len(seconds) <= 3
        assert min(seconds) >= 1e-4


def test_who_disagrees_is_not_timed(measured):
    entry = measured[0]["workloads"]["first"]["sizes"]["one"]
    assert entry["problems"]["torch"] == (
        "disagrees with NumPy + Numba: result 1 differs by 0.5, more than 0.0001"
    )
    assert "torch" not in entry["seconds"]


def test_out_of_memory_in_one_size_leaves_the_others(measured):
    sizes = measured[0]["workloads"]["first"]["sizes"]
    assert "jax" in sizes["one"]["seconds"]
    assert sizes["two"]["problems"]["jax"] == "out of memory"
    assert "numba" in sizes["two"]["seconds"]


def test_a_process_that_dies_is_told_and_started_anew(measured):
    works = measured[0]["workloads"]
    told = works["first"]["sizes"]["two"]["problems"]["autograd"]
    assert told == "its process ended with 3: stack overflow, or the like"
    assert "autograd" in works["second"]["sizes"]["three"]["seconds"]


def test_a_peer_that_does_not_import_is_absent(measured):
    report, _ = measured
    assert report["absent"] == {"mygrad": "ImportError: cannot import name 'x' from 'numpy'"}
    for about in report["workloads"].values():
        for entry in about["sizes"].values():
            assert "mygrad" not in entry["problems"]


def test_it_is_saved_after_every_case_and_says_when_it_is_whole(measured):
    report, saved = measured
    assert saved == [False] * 4 + [True]
    assert report["ceilings"] == {"cpu": {"bandwidth": 1e10, "flops": 1e11}}
    assert report["devices"]["cpu"]["version"] == "1"


def test_an_interrupt_keeps_what_was_done():
    planned = cases("first", keys=("numba",))
    report = begin(planned, ("numba",))

    def watch(case):
        if case.size == "two":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Pool(MODULE) as pool:
        runner.run(planned, report, pool=pool, watch=watch)
    assert list(report["workloads"]["first"]["sizes"]) == ["one"]
    assert report["complete"] is False


def test_who_interrupts_does_not_wait_for_answers():
    asked = []

    class Slow(Pool):
        def get(self, who):
            return self

        def running(self):
            return [self]

        def ask(self, do, **request):
            asked.append(do)
            if do == "turn":
                raise KeyboardInterrupt
            return [[0.0]]

    with pytest.raises(KeyboardInterrupt):
        runner.measure(Slow(), cases("second", keys=("numba",))[0])
    assert asked == ["load", "turn"]


def test_a_contender_whose_process_fell_with_another_is_told():
    reply = worker.answer(
        worker.Worker(worker.HostClock()), '{"do": "turn", "contender": "numpy", "count": 1}'
    )
    assert reply == {"problem": "RuntimeError: its process ended with another one's work in it"}


def test_nobody_waits_forever():
    with Pool(MODULE, patience=5) as pool:
        process = pool.get(CONTENDERS["numba"])
        process.patience = 0.2
        (case,) = cases("third", keys=("numba",))
        entry = runner.measure(pool, case)
        assert entry["problems"] == {"numba": "took more than 0.2 s to load"}
        assert entry["seconds"] == {}
        assert not process.alive


def test_a_process_that_cannot_start_is_not_tried_again():
    with Pool(MODULE) as pool:
        for _ in range(2):
            with pytest.raises(Problem, match="cannot import"):
                pool.get(CONTENDERS["mygrad"])
        assert not pool.can(CONTENDERS["mygrad"])


def test_a_missing_library_is_told_by_the_real_worker():
    with pytest.raises(Problem, match="No module named 'no_such_library'"):
        Process("no_such_library", "cpu")


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads Linux's /proc")
def test_memory_is_what_a_pass_holds_beyond_its_operands():
    # In a process of its own, which keeps no memory of others to use again.
    code = """
import numpy as np
from gpugrad.bench import worker
from gpugrad.bench.workload import Job

held = []

def run():
    held[:] = [np.ones(4 << 20)]

jobs = worker.Worker(worker.HostClock())
jobs.jobs["numba"] = Job(run, list, held.clear)
print(jobs.memory("numba"))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         cwd=ROOT)  # fmt: skip
    assert int(ran.stdout) == pytest.approx(32 << 20, rel=0.1)


def test_memory_is_asked_of_a_process_of_its_own():
    asked = []

    class Fresh(Pool):
        def get(self, who):
            return self

        def fresh(self, who):
            asked.append("fresh")
            return self

        def stop(self):
            asked.append("stop")

        def ask(self, do, **request):
            asked.append(do)
            return {"load": [[0.0]], "turn": {"seconds": 1e-3}, "memory": 7}.get(do)

    (case,) = cases("second", keys=("numba",))
    entry = runner.measure(Fresh(), replace(case, work=replace(case.work, memory=0.5)))
    assert entry["memory"] == {"numba": 7}
    assert asked[-4:] == ["fresh", "load", "memory", "stop"]
    assert "memory" not in runner.measure(Fresh(), case)


# -- agreement ------------------------------------------------------------------------------------


def told(expected, found, tolerance):
    return str(runner.disagreement(expected, found, tolerance))


def test_agreement():
    a = worker.look([np.array([1.0, 100.0])])
    assert runner.disagreement(a, a, 0) is None
    assert runner.disagreement(a, worker.look([np.array([1.0, 100.009])]), 1e-4) is None
    assert "differs by 0.001" in told(a, worker.look([np.array([1.0, 100.1])]), 1e-4)
    assert "nan" in told(a, worker.look([np.array([1.0, np.nan])]), 1e-4)
    assert "shapes" in told(a, worker.look([np.ones(3)]), 1e-4)
    assert "shapes" in told(a, a * 2, 1e-4)


def test_no_element_of_a_small_result_is_overlooked():
    x = np.zeros(150)
    for i in range(150):
        y = x.copy()
        y[i] = 1
        assert runner.disagreement(worker.look([x]), worker.look([y]), 1e-4)


# -- what is planned ------------------------------------------------------------------------------


def test_a_quick_plan_takes_the_smallest_of_what_is_not_alike():
    planned = runner.plan(FAKES.values(), [CONTENDERS["numba"]], quick=True)
    assert [(c.work.name, c.size) for c in planned] == [("first", "one"), ("second", "three")]


def test_compiling_is_for_the_largest_size():
    keys = ("numba", "torch", "torch-fused", "torch-compile")
    planned = runner.plan([FAKES["first"]], [CONTENDERS[key] for key in keys])
    assert [[c.key for c in case.contenders] for case in planned] == [
        ["numba", "torch"],
        ["numba", "torch", "torch-compile"],
    ]
    assert planned[1].refused == {"torch-fused": "there is no optimiser in it"}
    assert planned[0].budget.seconds < planned[1].budget.seconds


def test_contenders_are_sorted_into_present_and_absent(monkeypatch):
    monkeypatch.setattr(available, "no_device", lambda device: "there is no GPU")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "jax" or None)
    present, absent = available.split()
    assert [c.key for c in present] == [
        "numpy", "numba", "numba-compile", "torch", "torch-fused", "torch-compile", "autograd",
        "mygrad",
    ]  # fmt: skip
    assert absent["cuda"] == absent["torch-cuda"] == "there is no GPU"
    assert absent["jax"] == "jax is not installed; pip install jax"


def test_a_device_without_a_backend_is_told():
    assert available.no_device("cpu") is None
    assert "no backend" in str(available.no_device("abacus:0"))


# -- clocks ---------------------------------------------------------------------------------------


def test_the_host_clock_times_every_call():
    calls = []
    found = worker.HostClock().time(lambda: calls.append(1), 3)
    assert len(calls) == len(found["seconds"]) == 3
    assert set(found) == {"seconds"}


class FakeDevice:
    """A queue whose work takes a second a launch, with the words of CuPy that the clock uses."""

    def __init__(self):
        self.now, self.log = 0.0, []
        self.xp = self.cuda = self

    def launch(self):
        self.log.append("launch")
        self.now += 1.0

    def synchronize(self):
        self.log.append("wait")

    def get_current_stream(self):
        return self

    def Event(self):
        return object()

    def record(self, event):
        self.log.append("event")
        return self.now

    def get_elapsed_time(self, a, b):
        return (b - a) * 1e3


def test_a_device_is_timed_by_events_in_its_queue():
    device = FakeDevice()
    found = worker.backend_clock(device).time(device.launch, 2)
    assert found["seconds"] == [1.0, 1.0]
    assert len(found["host"]) == 2
    assert max(found["host"]) < 0.5
    assert device.log == ["wait", "event", "launch", "event", "wait"] * 2


def test_host_and_device_time_are_kept_apart():
    class Device(Pool):
        def get(self, who):
            return self

        def ask(self, do, **request):
            return [[0.0]] if do == "load" else {"seconds": 2.0, "host": 0.1}

    entry = runner.measure(Device(), cases("second", keys=("numba",))[0])
    assert set(entry["seconds"]["numba"]) == {2.0}
    assert set(entry["host"]["numba"]) == {0.1}


@pytest.mark.parametrize(
    "error",
    [MemoryError(), type("OutOfMemoryError", (Exception,), {})("x"),
     RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
)  # fmt: skip
def test_out_of_memory_has_many_names(error):
    assert worker.problem(error) == "out of memory"


def test_other_errors_are_told_in_a_line():
    assert worker.problem(ValueError("a\n  b")) == "ValueError: a b"


# -- the workloads --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compute_what_the_generic_text_does(family):
    for work in workloads_of(family):
        size = next(iter(work.sizes.values()))
        generic, fused = (
            worker.look(work.makers["gpugrad"](size, CONTENDERS[key]).answer())
            for key in ("numpy", "numba")
        )
        assert runner.disagreement(generic, fused, work.tolerance) is None, work.name


def test_declarations_are_whole():
    for name, work in workloads().items():
        assert work.kind in ("kernel", "step")
        assert "gpugrad" in work.makers, name
        assert set(work.without) <= set(CONTENDERS), name
        costs = [work.cost(label) for label in work.sizes]
        for smaller, larger in itertools.pairwise(costs):
            assert all(smaller[what] < larger[what] for what in smaller), name


def test_ceilings_are_measured():
    found = worker.ceilings("cpu", quick=True)
    assert found["bandwidth"] > 1e8
    assert found["flops"] > 1e8
