"""Every workload by pytest-benchmark, in this process: ``pytest bench --benchmark-only``.

Parametrised by backend and size, ``-k "softmax and numba"`` picks some. Contenders that cannot
compute here are skipped, and say why. To compare contenders use ``gpugrad bench``: in one process
the threads of some libraries disturb others.
"""

from __future__ import annotations

from functools import cache

import pytest

from gpugrad.bench import runner, worker
from gpugrad.bench.available import why_not
from gpugrad.bench.workload import CONTENDERS, workloads

# What other libraries warn of is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")

REASONS = {key: cache(lambda who=who: why_not(who)) for key, who in CONTENDERS.items()}


def cases():
    for work in workloads().values():
        for size in work.sizes:
            for who in CONTENDERS.values():
                if work.refuses(who, size) is None:
                    yield pytest.param(work, size, who, id=f"{work.name}-{size}-{who.key}")


@pytest.mark.parametrize(("work", "size", "who"), list(cases()))
def test_workload(benchmark, work, size, who):
    if why := REASONS[who.key]():
        pytest.skip(why)
    job = work.makers[who.library](work.sizes[size], who)
    clock = worker.clock_of(who.library, who.device)
    found = worker.look(job.answer())
    # Pedantic: the clock of the device decides when a pass has ended.
    benchmark.pedantic(clock.time, (job.run, 1), rounds=5, warmup_rounds=1)
    again = worker.look(work.makers[who.library](work.sizes[size], who).answer())
    assert runner.disagreement(found, again, work.tolerance) is None
