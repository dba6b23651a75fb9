"""Every file of ops/ that declares operations, and every family of kernels, has a workload."""

from __future__ import annotations

from pathlib import Path

import gpugrad as gg
import gpugrad.nn
from gpugrad.bench.workload import CONTENDERS, workloads
from gpugrad.core.primitive import composites, registry
from gpugrad.kernels.cpu import SLOTS as CPU
from gpugrad.kernels.cuda import SLOTS as CUDA

PACKAGE = Path(gg.__file__).parent

#: Files without a workload, and why.
EXEMPT = {
    "ops/creation": "makes constants",
    "kernels/cpu/moments": "is timed as part of a training step that is watched",
    "kernels/cuda/moments": "is timed by bench/gpu_kernels.py",
}


def short(module):
    """``ops/losses`` of ``gpugrad.ops.losses``; launchers belong to their kernels."""
    return module.removeprefix("gpugrad.").replace(".", "/").removesuffix("_launch")


def declared():
    modules = {made.forward.__module__ for made in registry.values()}
    modules |= {made.function.__module__ for made in composites.values()}
    found = {short(m) for m in modules if m.startswith("gpugrad.ops.")}
    return found | {short(slot.module) for slot in (*CPU.values(), *CUDA.values())}


def test_every_family_is_covered():
    covered = {name for work in workloads().values() for name in work.covers}
    assert declared() - covered - set(EXEMPT) == set()


def test_what_is_covered_is_there():
    for work in workloads().values():
        for name in work.covers:
            assert (PACKAGE / f"{name}.py").is_file(), f"{work.name}: {name}"


def test_a_workload_runs_what_it_covers():
    """For files of primitives: one of the file's runs, forward or backward."""
    home = {name: short(made.forward.__module__) for name, made in registry.items()}
    for work in workloads().values():
        size = next(iter(work.sizes.values()))
        job = work.makers["gpugrad"](size, CONTENDERS["numba"])
        ran = {home.get(c.operation) for c in gg.explain(job.run)().choices}
        claimed = {name for name in work.covers if name in home.values()}
        assert claimed <= ran, work.name
