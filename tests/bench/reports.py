"""Reports of runs that nobody ran."""

from __future__ import annotations

from gpugrad.bench import runner
from gpugrad.bench.workload import CONTENDERS
from tests.bench.fake_worker import FAKES


def report(*keys, **absent):
    """A report before anything is measured, of these contenders and the fake workloads."""
    contenders = [CONTENDERS[key] for key in keys]
    cases = runner.plan(FAKES.values(), contenders)
    found = runner.begin(cases, contenders, absent, quick=False)
    for who in contenders:
        if who.own:
            found["devices"][who.device] = {"version": "1", "device": who.device}
            found["ceilings"][who.device] = {"bandwidth": 1e9, "flops": 1e10}
    return found


def measured(seconds, name="first", size="one", **more):
    """A report with one entry: seconds of rounds by contender."""
    found = report(*seconds)
    add(found, seconds, name, size, **more)
    found["complete"] = True
    return found


def add(found, seconds, name="first", size="one", problems=None, **more):
    entry = {"budget": 1.0, **FAKES[name].cost(size), "problems": problems or {}}
    entry["seconds"] = {key: list(rounds) for key, rounds in seconds.items()}
    found["workloads"][name]["sizes"][size] = entry | more
