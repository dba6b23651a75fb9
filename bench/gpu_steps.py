"""Training steps on a GPU beside PyTorch's, and the figures that are claimed for GPUs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from bench import common, gpu_nets
from bench.gpu_device import (
    Notes,
    NotRun,
    fake_counts,
    is_out_of_memory,
    message,
    open_device,
    own_launches,
    seconds_left,
    timed,
    torch_device,
)
from bench.gpu_kernels import Ceilings, Inputs, listening, timing

#: The mode of torch.compile that PyTorch means for small steps.
COMPILED = "reduce-overhead"

#: Losses of the first steps may differ by so much: a hundred layers make differences grow.
AGREE = 1e-3


# -- steps ----------------------------------------------------------------------------------------


def steps(notes: Notes, options: argparse.Namespace) -> None:
    """One workload: time, launches, host reads and memory of gpugrad and of PyTorch, in turn."""
    device = open_device(options.device)
    work = gpu_nets.WORKLOADS[options.workload]
    sizes = work.small if options.small else work.full
    ours = gpu_nets.with_gpugrad(work, sizes, options.device)
    losses = [float(ours().item()) for _ in range(gpu_nets.BATCHES)]
    notes.put(workload=options.workload, sizes=sizes, losses=losses)
    counts = {"gpugrad": device.count(ours)}
    notes.put(counts=counts["gpugrad"], waits=device.waits(ours))
    peaks = {"gpugrad": device.peak(ours)}
    rounds = 2 if options.small else 5 if options.quick else 15
    turns = taking_turns(device, {"gpugrad": ours}, rounds)
    report(notes, options.workload, turns, peaks, counts)
    name = "gpugrad, compiled"
    program = gpu_nets.with_gpugrad(work, sizes, options.device, compiled=True)
    found = [float(program().item()) for _ in range(gpu_nets.BATCHES)]
    notes.put(**{f"gap to {name}": max(abs(a - b) for a, b in zip(losses, found, strict=True))})
    counts[name], peaks[name] = device.count(program), device.peak(program)
    turns = taking_turns(device, {"gpugrad": ours, name: program}, rounds)
    report(notes, options.workload, turns, peaks, counts, beside=name)
    fake = fake_counts() is not None
    try:
        torch = torch_device("cpu" if fake else options.device)
    except NotRun as reason:
        notes.put(torch=str(reason))
        return
    place = "cpu" if fake else options.device
    for name, mode in (("torch", ""), (f"torch.compile, {COMPILED}", COMPILED)):
        if mode and (options.small or options.quick):
            continue  # compiling takes longer than all the rest
        if seconds_left() < 8:
            notes.add("left_out", f"{name}: too little time")
            continue
        try:
            theirs = gpu_nets.with_torch(work, sizes, place, mode)
            found = [float(theirs().item()) for _ in range(gpu_nets.BATCHES)]
            gap = max(abs(a - b) for a, b in zip(losses, found, strict=True))
            notes.put(**{f"gap to {name}": gap})
            if gap > AGREE and not fake:
                notes.add("left_out", f"{name}: other losses, {found}")
                continue
            peaks[name] = torch_peak(torch, theirs)
            counts[name] = {} if fake else device.count(theirs)
            turns = taking_turns(device, {"gpugrad": ours, name: theirs}, rounds)
            report(notes, options.workload, turns, peaks, counts, beside=name)
        except Exception as error:
            why = "out of memory" if is_out_of_memory(error) else message(error)
            notes.add("left_out", f"{name}: {why}")


def taking_turns(
    device: Any, contenders: dict[str, Callable[[], Any]], rounds: int, repeats: int = 4
) -> dict[str, list[tuple[float, float, float]]]:
    """Seconds of a step until it is handed over, until it is done, and between events."""
    turns: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():

            def several(run: Callable[[], Any] = run) -> None:
                for _ in range(repeats):
                    run()

            turns[name].append(tuple(x / repeats for x in timed(device, several)))  # type: ignore[arg-type]
    return turns


def report(
    notes: Notes, workload: str, turns: dict[str, Any], peaks: dict[str, int],
    counts: dict[str, dict[str, Any]], beside: str = "",
) -> None:  # fmt: skip
    """A row for everybody in `turns`; `beside` gpugrad, which has its own already."""
    for name, samples in turns.items():
        if beside and name == "gpugrad":
            continue
        host, total, event = (list(x) for x in zip(*samples, strict=True))
        row = {"step": workload, "contender": name,
               "ms": common.spread(total, 1e3)["median"],
               "quartiles": [common.spread(total, 1e3)[q] for q in ("q1", "q3")],
               "host_ms": common.spread(host, 1e3)["median"],
               "event_ms": common.spread(event, 1e3)["median"],
               "peak_MiB": round(peaks[name] / 2**20, 1),
               **{key: counts[name].get(key) for key in ("kernels", "host_reads")}}  # fmt: skip
        if beside:
            own = [x[1] for x in turns["gpugrad"]]
            row["gpugrad_ms"] = common.spread(own, 1e3)["median"]
            row["share"] = common.ratio(own, total)["median"]
        notes.add("steps", row)


def torch_peak(torch: Any, run: Callable[[], Any]) -> int:
    """The most bytes of PyTorch's tensors on the GPU while a step runs."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


def compile_ahead(notes: Notes, options: argparse.Namespace) -> None:
    """Fill PyTorch's cache of compiled code, so that no timed part waits for it."""
    if fake_counts() is None:
        open_device(options.device)
        torch_device(options.device)
        work = gpu_nets.WORKLOADS[options.workload]
        step = gpu_nets.with_torch(work, work.full, options.device, COMPILED)
        for _ in range(3):
            step()
    notes.put(compiled=options.workload)


# -- claims ---------------------------------------------------------------------------------------


def claims(notes: Notes, options: argparse.Namespace) -> None:
    """What is claimed for a GPU, each measured by itself; one that fails stops no other."""
    device = open_device(options.device)
    ceilings = Ceilings(device, options.small)
    for claim in (first_use, launch_cost, clip_and_step, bias_backward, tiny_tensors, same_mask):
        if seconds_left() < 2:
            notes.add("left_out", f"{claim.__name__}: no time left")
            continue
        try:
            claim(notes, options, device, ceilings)
        except Exception as error:
            why = "out of memory" if is_out_of_memory(error) else message(error)
            notes.add("left_out", f"{claim.__name__}: {why}")
        device.free()
    notes.put(compilers_loaded=[name for name in ("numba.cuda", "gpugrad.kernels.cuda.compiler")
                                if name in sys.modules])  # fmt: skip


def first_use(notes: Notes, options: argparse.Namespace, device: Any, _: Ceilings) -> None:
    """The pause of the first call of a kernel: the driver makes machine code of its PTX."""
    import gpugrad as gg

    x = gg.asarray(device.random(64, 64))
    device.synchronize()
    start = time.perf_counter()
    gg.nn.functional.mish(x)
    device.synchronize()
    notes.put(first_use_ms=common.round_to(1e3 * (time.perf_counter() - start)))


def launch_cost(notes: Notes, options: argparse.Namespace, device: Any, _: Ceilings) -> None:
    """Host time of a launch, while the device keeps up."""
    from gpugrad.kernels.cuda import elementwise, launch

    x = device.random(1024)
    y = device.xp.empty_like(x)
    gpu, entry = launch.machine(x), elementwise.map_of("relu")["float32"]
    count = 5 if options.small else 300

    def once() -> float:
        device.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            gpu.run(entry, (1,), x, y, 0.0, 0.0, 1024, 1)
        return (time.perf_counter() - start) / count

    once()
    notes.put(launch_us=common.spread([once() for _ in range(10)], 1e6))


def optimizer_of(device: Any, tensors: int, size: int) -> tuple[Any, list[Any]]:
    """An AdamW whose gradients are there already."""
    import gpugrad as gg

    params = [gg.asarray(device.random(size)).requires_grad_() for _ in range(tensors)]
    optimizer = gg.optim.AdamW(params, lr=1e-3)
    for p in params:
        p.backward(gg.asarray(device.random(size)))
    return optimizer, params


def clip_and_step(
    notes: Notes, options: argparse.Namespace, device: Any, ceilings: Ceilings
) -> None:
    """Norm, clip and AdamW: 32 bytes for a parameter, once through memory in two launches."""
    for millions in (10, 64):
        size = 100 if options.small else millions * 20_000
        optimizer, _ = optimizer_of(device, 50, size)
        step = partial(optimizer.step, clip=1.0)
        step()
        with own_launches() as names:
            step()
        found = timing(device, [step], small=options.small)
        moved = 32 * 50 * size
        rate = moved / (found["device_us"]["median"] / 1e6)
        notes.add("clip_and_step", {
            "parameters_M": millions, "device_us": found["device_us"]["median"],
            "host_us": found["host_us"], "own_launches": len(names), "GB/s": rate / 1e9,
            "share": common.round_to(rate / ceilings.of(moved, 1), 3),
            "counts": device.count(step), "waits": device.waits(step),
        })  # fmt: skip


def bias_backward(
    notes: Notes, options: argparse.Namespace, device: Any, ceilings: Ceilings
) -> None:
    """Of bias + GELU(tanh) on 4096×4096, three sets of operands in turn."""
    import gpugrad as gg

    side = 32 if options.small else 4096
    calls = []
    for _ in range(3):
        inputs = Inputs(device, side * side, options.small)
        with listening() as heard:
            y = gg.bias_activation(inputs.new(side, side), inputs.new(side),
                                   activation="gelu_tanh")  # fmt: skip
            y.backward(inputs.new(side, side, grad=False))
        calls.append(next(c for c in heard if c.slot == "bias_activation_backward"))
    found = timing(device, [call.run for call in calls], small=options.small)
    rate = calls[0].bytes / (found["device_us"]["median"] / 1e6)
    notes.put(bias_backward={
        "device_us": found["device_us"]["median"], "GB/s": rate / 1e9,
        "share": common.round_to(rate / ceilings.of(calls[0].bytes, 3), 3),
    })  # fmt: skip


def tiny_tensors(notes: Notes, options: argparse.Namespace, device: Any, _: Ceilings) -> None:
    """1000 tensors of 4 elements: clipped by PyTorch's name for it, and in a step."""
    import gpugrad as gg

    optimizer, params = optimizer_of(device, 20 if options.small else 1000, 4)
    runs = {
        "clip_grad_norm_": lambda: gg.nn.utils.clip_grad_norm_(params, 1.0),
        "step": lambda: optimizer.step(clip=1.0),
    }
    for name, run in runs.items():
        for _ in range(3):
            run()
        found = [timed(device, run)[1] for _ in range(3 if options.small else 30)]
        notes.put(**{f"tiny_{name}_ms": common.spread(found, 1e3)})
        notes.put(**{f"tiny_{name}_counts": device.count(run)})


def same_mask(notes: Notes, options: argparse.Namespace, device: Any, _: Ceilings) -> None:
    """Random numbers are a matter of the seed, not of the device."""
    import numpy as np

    import gpugrad as gg

    masks = [gg.dropout(gg.ones((301, 7), device=place), 0.5, seed=3).numpy()
             for place in ("cpu", options.device)]  # fmt: skip
    notes.put(other_in_mask=int(np.sum((masks[0] == 0) != (masks[1] == 0))))
