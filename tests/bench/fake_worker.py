"""Workloads of no size for tests, and the process that computes them.

``python -m tests.bench.fake_worker LIBRARY DEVICE`` behaves by its library as a contender might:
gpugrad is right, torch is wrong, jax runs out of memory in the larger size, autograd dies with the
first workload, and mygrad does not import.
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np

from gpugrad.bench import worker
from gpugrad.bench.common import ANSWER
from gpugrad.bench.workload import Job, Workload

RIGHT = np.arange(5.0)


def right(size, who):
    return Job(lambda: time.sleep(1e-4), lambda: [RIGHT])


def wrong(size, who):
    return Job(lambda: None, lambda: [RIGHT * 1.5])


def hungry(size, who):
    if size[0] > 1:
        raise MemoryError("Unable to allocate 1 PiB")
    return right(size, who)


def deadly(size, who):
    if size[0] < 3:
        os.write(2, b"stack overflow, or the like\n")
        os._exit(3)
    return right(size, who)


def endless(size, who):
    time.sleep(60)
    raise AssertionError


MAKERS = {"gpugrad": right, "torch": wrong, "jax": hungry, "autograd": deadly, "mygrad": right}

FAKES = {
    w.name: w
    for w in (
        Workload(name="first", what="nothing", sizes={"one": (1,), "two": (2,)}, makers=MAKERS,
                 moved=lambda n: 1000 * n, flops=lambda n: 5000 * n, least=2.0),
        Workload(name="second", what="nothing <again>", sizes={"three": (3,)}, makers=MAKERS,
                 kind="step"),
        Workload(name="third", what="forever", sizes={"one": (1,)}, makers={"gpugrad": endless},
                 variant=True),
    )
}  # fmt: skip


class FakeWorker(worker.Worker):
    def ceilings(self, device, quick):
        return {"bandwidth": 1e10, "flops": 1e11}


def main(library, device):
    def say(reply):
        print(ANSWER + json.dumps(reply), flush=True)

    if library == "mygrad":
        say({"problem": "ImportError: cannot import name 'x' from 'numpy'"})
        return
    print("a library that talks")
    say({"result": {"version": "1", "device": device}})
    jobs = FakeWorker(worker.HostClock(), FAKES)
    for line in sys.stdin:
        say(worker.answer(jobs, line))


if __name__ == "__main__":
    main(*sys.argv[1:])
