"""Every workload on a stand-in for a GPU, in a process of its own: see test_device.py.

It computes with NumPy, so that generic text gives the same results; kernels of ours compute
nothing there, and are only launched.
"""

from __future__ import annotations

import json

from bench import gpu_fake


def main() -> None:
    gpu_fake.install()
    from gpugrad.bench import runner, worker  # after the stand-in
    from gpugrad.bench.workload import CONTENDERS, workloads

    differs, failed, timed = {}, {}, 0
    clock = worker.clock_of("gpugrad", "cuda:0")
    for work in workloads().values():
        make, size = work.makers["gpugrad"], next(iter(work.sizes.values()))
        try:
            here, there = (
                worker.look(make(size, CONTENDERS[key]).answer()) for key in ("numpy", "cupy")
            )
            if why := runner.disagreement(here, there, work.tolerance):
                differs[work.name] = why
            job = make(size, CONTENDERS["cuda"])
            found = clock.time(job.run, 2)
            timed += len(found["seconds"]) == len(found["host"]) == 2
        except Exception as error:
            failed[work.name] = repr(error)
    print(json.dumps({
        "differs": differs, "failed": failed, "timed": timed, "workloads": len(workloads()),
        "about": worker.start("gpugrad", "cuda:0"),
        "ceilings": worker.ceilings("cuda:0", quick=True),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
