"""The parts of gpu_check: each is run as ``python bench/gpu_parts.py PART`` in its own process.

A part writes what it finds line by line into the file ``$GPU_CHECK_NOTES``, so that nothing is lost
when it is stopped. Without that variable it prints, for use by hand.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from bench.gpu_device import (
    Notes,
    NotRun,
    import_torch,
    message,
    open_device,
    seconds_left,
    timed,
    torch_device,
)

WANTED = ("cupy", "torch", "numba", "pytest", "hypothesis", "safetensors", "typer", "rich",
          "array_api_strict", "autograd")  # fmt: skip


# -- environment ----------------------------------------------------------------------------------


def environment(notes: Notes, options: argparse.Namespace) -> None:
    """What the machine is and has, and whether gpugrad loads from this checkout."""
    missing = [name for name in WANTED if not importlib.util.find_spec(name)]
    notes.put(python=platform.python_version(), system=platform.platform(), missing=missing,
              versions=common.versions(), kernels_link=(common.ROOT / "gpugrad" / "kernels" /
                                                        "__init__.py").is_file())  # fmt: skip
    import gpugrad

    notes.put(gpugrad=str(Path(gpugrad.__file__).parent))
    if smi := shutil.which("nvidia-smi"):
        run = subprocess.run([smi], capture_output=True, text=True, timeout=10, check=False)
        notes.put(nvidia_smi=run.stdout)
    if options.device.startswith("cpu"):
        notes.put(gpu={"name": common.machine()["cpu"], "driver": "none", "runtime": "none"})
    else:
        cupy = open_device(options.device).xp
        runtime = cupy.cuda.runtime
        properties = runtime.getDeviceProperties(cupy.cuda.Device().id)
        name = properties["name"]
        notes.put(gpu={
            "name": name.decode() if isinstance(name, bytes) else name,
            "driver": driver_version() or runtime.driverGetVersion(),
            "runtime": runtime.runtimeGetVersion(),
            "cuda_of_driver": runtime.driverGetVersion(),
            "compute_capability": cupy.cuda.Device().compute_capability,
            "multiprocessors": properties["multiProcessorCount"],
            "memory_MiB": properties["totalGlobalMem"] // 2**20,
            "tf32": os.environ.get("CUPY_TF32", "0") != "0",
        })  # fmt: skip
        answer = gpugrad.tensor([1.0, 2.0], device=options.device, requires_grad=True)
        (answer * answer).backward(gpugrad.tensor([1.0, 1.0], device=options.device))
        notes.put(first_gradient=answer.grad.tolist())
    try:
        notes.put(torch_cuda=import_torch().version.cuda)
    except NotRun as reason:
        notes.put(torch=str(reason))
    if "numba" not in missing and not options.small:
        code = "import numba.cuda as c; print(c.is_available())"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             timeout=15, check=False)  # fmt: skip
        notes.put(numba_cuda=(run.stdout or run.stderr).strip().splitlines()[-1:])


def driver_version() -> str:
    """The driver's own number, which the runtime does not tell."""
    smi = shutil.which("nvidia-smi")
    if not smi:
        return ""
    run = subprocess.run([smi, "--query-gpu=driver_version", "--format=csv,noheader"],
                         capture_output=True, text=True, timeout=10, check=False)  # fmt: skip
    return run.stdout.strip().splitlines()[0] if run.stdout.strip() else ""


# -- tests and primitives -------------------------------------------------------------------------


def tests(notes: Notes, options: argparse.Namespace) -> None:
    """Every test marked gpu."""
    from bench import gpu_tests

    gpu_tests.run(notes, common.ROOT / "tests", options.quick)


def primitives(notes: Notes, options: argparse.Namespace) -> None:
    """This share of the registry, on the device against the reference."""
    open_device(options.device)  # says why when there is none
    from bench import gpu_registry

    names = gpu_registry.names()[:: 8 if options.small else 1]
    notes.put(total=len(names))
    mine = names[options.shard :: options.shards]
    for name in mine:
        notes.add("primitives", gpu_registry.compare(name, options.device, options.reference))


# -- the main job ---------------------------------------------------------------------------------


#: What is trained: data, options, and options for a quick check.
JOBS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mlp": ("digits", {}, {"epochs": 2}),
    "cnn": ("digits", {"model": "cnn", "epochs": 4}, {"epochs": 1, "width": 4}),
    "resnet": ("digits", {"model": "resnet", "depth": 8}, {"epochs": 1, "width": 4}),
    **{
        model: ("text", {"model": model, "limit": 0.1, "width": 64}, {"limit": 0.02, "width": 8})
        for model in ("rnn", "lstm", "gru", "gpt")
    },
}


def main_job(notes: Notes, options: argparse.Namespace) -> None:
    """Train every model on the device and on the CPU; the command line is not needed for it."""
    open_device(options.device)
    from gpugrad.cli.config import make_config
    from gpugrad.cli.tasks import task_of
    from gpugrad.cli.training import start

    worst = 0.0
    for model, (data, usual, small) in JOBS.items():
        config = make_config(data, {**usual, **(small if options.small else {})})
        task = task_of(config, None)
        curves = {}
        for label, device in (("device", options.device), ("reference", options.reference)):
            with tempfile.TemporaryDirectory() as folder:
                run = start(config, task, device, Path(folder))
                watch = Watch()
                begin = time.perf_counter()
                run.train(watch)
                seconds = time.perf_counter() - begin
            curves[label] = [row["loss"] for row in watch.rows]
            name = label if model == "mlp" else f"{model}, {label}"
            notes.put(**{name: {
                "device": device, "seconds": round(seconds, 2), "loss": curves[label],
                "accuracy": watch.rows[-1]["test_accuracy"],
                "samples_per_second": round(watch.rows[-1]["samples_per_second"]),
            }})  # fmt: skip
        pairs = zip(curves["device"], curves["reference"], strict=True)
        worst = max(worst, max(abs(a - b) for a, b in pairs) / curves["reference"][0])
        notes.put(curve_difference=worst)


class Watch:
    """Keeps the rows of finished epochs."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def reading(self, reading: Any) -> None:
        pass

    def epoch(self, row: Any) -> None:
        self.rows.append(dict(row))


# -- overhead -------------------------------------------------------------------------------------


def overhead(notes: Notes, options: argparse.Namespace) -> None:
    """A chain of x*a+b, forward and backward, by gpugrad and by PyTorch, taking turns."""
    device = open_device(options.device)
    torch = None
    try:
        torch = torch_device(options.device)
    except NotRun as reason:
        notes.put(torch=str(reason))
    length = 50 if options.small else 1000
    rounds = 3 if options.small else 15
    profiled = {}
    for size in (8, 64 if options.small else 1024):
        makers: dict[str, Callable[..., Any]] = {"gpugrad": gpugrad_chain}
        if torch is not None:
            makers["torch"] = torch_chain
        chains = {name: make(size, options.device, length) for name, make in makers.items()}
        measured = {name: [] for name in chains}  # type: ignore[var-annotated]
        for run in chains.values():  # compiles kernels, fills memory pools
            run()
            device.synchronize()
        for _ in range(rounds):
            for name, run in chains.items():
                measured[name].append(timed(device, run))
        row: dict[str, Any] = {"shape": f"{size}x{size}", "length": length, "libraries": {}}
        for name, samples in measured.items():
            host, total, event = (list(s) for s in zip(*samples, strict=True))
            row["libraries"][name] = {
                f"{key}_us": common.spread(values, 1e6 / length)["median"]
                for key, values in (("host", host), ("total", total), ("event", event))
            }
            row["libraries"][name]["host_quartiles"] = [
                common.spread(host, 1e6 / length)[q] for q in ("q1", "q3")
            ]
        if torch is not None:
            row["share_of_torch"] = common.ratio(
                [s[0] for s in measured["gpugrad"]], [s[0] for s in measured["torch"]]
            )
        profiled[f"{size}x{size}"] = {n: m(size, options.device, 50) for n, m in makers.items()}
        counted(row, profiled[row["shape"]], torch, device, notes)
        notes.add("chains", row)


def counted(
    row: dict[str, Any], chains: dict[str, Callable[[], Any]], torch: Any, device: Any, notes: Notes
) -> None:
    """Kernels per operation and their own time, as PyTorch's profiler sees them for both."""
    if torch is None or device.name == "cpu":
        return
    try:
        for name, run in chains.items():
            run()
            device.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
                run()
                torch.cuda.synchronize()
            kernels = [e for e in p.events()
                       if e.device_type == torch.autograd.DeviceType.CUDA
                       and not e.name.startswith(("Memcpy", "Memset"))]  # fmt: skip
            if not kernels:
                notes.put(profiler=f"it saw no kernel of {name}")
                continue
            microseconds = sum(e.time_range.elapsed_us() for e in kernels)
            row["libraries"][name] |= {
                "kernels": round(len(kernels) / 50, 2), "kernel_us": round(microseconds / 50, 3),
                "kernel_names": sorted({e.name[:60] for e in kernels})[:6],
            }  # fmt: skip
    except Exception as error:
        notes.put(profiler=message(error))


def gpugrad_chain(size: int, device: str, length: int) -> Callable[[], Any]:
    import gpugrad as gg

    x, a, b, g = chain_inputs(size)
    xt = gg.tensor(x, device=device, requires_grad=True)
    at, bt, gt = (gg.tensor(v, device=device) for v in (a, b, g))

    def run() -> Any:
        xt.grad = None
        y = xt
        for _ in range(length):
            y = y * at + bt
        y.backward(gt)
        return xt.grad

    return run


def torch_chain(size: int, device: str, length: int) -> Callable[[], Any]:
    import torch

    xt, at, bt, gt = (torch.from_numpy(v).to(device) for v in chain_inputs(size))
    xt.requires_grad_()

    def run() -> Any:
        xt.grad = None
        y = xt
        for _ in range(length):
            y = y * at + bt
        y.backward(gt)
        return xt.grad

    return run


def chain_inputs(size: int) -> list[Any]:
    import numpy as np

    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, size, size), dtype=np.float32)
    a = (1 + 1e-3 * rng.standard_normal((size, size))).astype(np.float32)
    b = (1e-2 * rng.standard_normal((size, size))).astype(np.float32)
    return [x, a, b, g]


# -- ceilings -------------------------------------------------------------------------------------


def ceilings(notes: Notes, options: argparse.Namespace) -> None:
    """What the device can do at best here, and how near plain operations of gpugrad come."""
    import numpy as np

    import gpugrad as gg

    device = open_device(options.device)
    xp = device.xp
    elements = 2**20 if options.small else 2**27  # 512 MiB of float32
    source = xp.ones(elements, dtype=xp.float32)
    target = xp.empty_like(source)

    def copy() -> None:
        target[...] = source

    def row(what: str, work: float, unit: str, run: Callable[[], Any], repeats: int) -> None:
        run()
        seconds = [timed(device, run)[2] for _ in range(repeats)]
        rates = common.spread([work / s for s in seconds])
        notes.add("ceilings", {"what": what, "best": common.round_to(work / min(seconds)),
                               "median": rates["median"], "unit": unit})  # fmt: skip

    repeats = 3 if options.small else 15
    row("copy, bytes read and written", 8e-9 * elements, "GB/s", copy, repeats)
    left, right = (gg.asarray(v) for v in (source, target))
    row("gpugrad add, bytes", 12e-9 * elements, "GB/s", lambda: left + right, repeats)
    n = 256 if options.small else 8192
    host = np.random.default_rng(0).random((n, n), dtype=np.float32)  # constants draw less power
    p = xp.asarray(host)
    row(f"matmul {n}, float32, TF32 off", 2e-12 * n**3, "TFLOP/s", lambda: p @ p, repeats // 3)
    square = gg.asarray(p)
    row(f"gpugrad matmul {n}", 2e-12 * n**3, "TFLOP/s", lambda: square @ square, repeats // 3)
    try:
        torch = torch_device(options.device)
    except NotRun as reason:
        notes.put(torch=str(reason))
        return
    t = torch.from_numpy(host).to(options.device)
    row(f"PyTorch matmul {n}, TF32 off", 2e-12 * n**3, "TFLOP/s", lambda: t @ t, repeats // 3)


def kernels(notes: Notes, options: argparse.Namespace) -> None:
    """Every family of kernels, as a share of a copy."""
    from bench import gpu_kernels

    gpu_kernels.measure(notes, options)


def steps(notes: Notes, options: argparse.Namespace) -> None:
    """Training steps beside PyTorch's."""
    from bench import gpu_steps

    gpu_steps.steps(notes, options)


def compiled(notes: Notes, options: argparse.Namespace) -> None:
    """PyTorch's compiler, ahead of the clock."""
    from bench import gpu_steps

    gpu_steps.compile_ahead(notes, options)


def claims(notes: Notes, options: argparse.Namespace) -> None:
    """What is claimed for GPUs."""
    from bench import gpu_steps

    gpu_steps.claims(notes, options)


def sanitizer(notes: Notes, options: argparse.Namespace) -> None:
    """compute-sanitizer, when it is installed."""
    from bench import gpu_sanitize

    gpu_sanitize.sanitize(notes, options)


def touch(notes: Notes, options: argparse.Namespace) -> None:
    """Every kernel once."""
    from bench import gpu_kernels

    gpu_kernels.touch(options)


PARTS = {
    "environment": environment,
    "tests": tests,
    "primitives": primitives,
    "main_job": main_job,
    "overhead": overhead,
    "ceilings": ceilings,
    "kernels": kernels,
    "claims": claims,
    "steps": steps,
    "compile": compiled,
    "sanitizer": sanitizer,
    "touch": touch,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", help="primitives-0, steps-gpt, …: a part and which share of it")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--reference", default="cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fake", action="store_true", help="on a stand-in for CuPy")
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    options = parser.parse_args(arguments)
    name, _, share = options.part.partition("-")
    options.workload = options.tool = share
    if options.fake:
        from bench import gpu_fake

        gpu_fake.install()
    notes = Notes()
    if "GPU_CHECK_DEADLINE" in os.environ and hasattr(signal, "alarm"):
        signal.alarm(max(1, int(seconds_left()) + 5))  # should nobody be left who would stop this
    try:
        PARTS[name](notes, options)
    except NotRun as reason:
        notes.put(not_run=str(reason))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
