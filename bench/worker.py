"""A process in which contenders of one library run.

``python -m gpugrad.bench.worker LIBRARY DEVICE``. It reads requests, a line of JSON each, and
answers them one by one until its input ends; `gpugrad.bench.processes` is the other end. Libraries
have processes of their own because they disturb each other in one: threads of OpenMP, for instance,
wait for more work by spinning.
"""

from __future__ import annotations

import gc
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpugrad.bench import common
from gpugrad.bench.workload import CONTENDERS, LOOKED_AT, Contender, Job, workloads

#: Seconds of a pass below which a turn begins with one that does not count, for which threads and
#: caches wake up.
SHORT = 0.05


# -- clocks ---------------------------------------------------------------------------------------


class HostClock:
    """Times work that is done when its call returns."""

    def time(self, run: Callable[[], Any], count: int) -> dict[str, list[float]]:
        """Seconds of so many calls."""
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}


class DeviceClock:
    """Times work that is queued on a device, by events in the queue.

    Parameters
    ----------
    record:
        Puts an event into the queue and returns it.
    elapsed:
        Seconds from one event to another, both in the past.
    wait:
        Returns when the queue is empty.
    """

    def __init__(
        self,
        record: Callable[[], Any],
        elapsed: Callable[[Any, Any], float],
        wait: Callable[[], Any],
    ) -> None:
        self.record, self.elapsed, self.wait = record, elapsed, wait

    def time(self, run: Callable[[], Any], count: int) -> dict[str, list[float]]:
        """Seconds of so many calls on the device, and those in which the host queued them."""
        seconds, host = [], []
        for _ in range(count):
            self.wait()
            begin = self.record()
            start = time.perf_counter()
            run()
            host.append(time.perf_counter() - start)
            end = self.record()
            self.wait()
            seconds.append(self.elapsed(begin, end))
        return {"seconds": seconds, "host": host}


Clock = HostClock | DeviceClock


def clock_of(library: str, device: str) -> Clock:
    """What times a library's work; JAX waits for its own."""
    if device == "cpu" or library not in ("gpugrad", "torch"):
        return HostClock()
    if library == "torch":
        import torch

        def record() -> Any:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        return DeviceClock(record, lambda a, b: a.elapsed_time(b) / 1e3, torch.cuda.synchronize)
    from gpugrad.backend import backend_for_device

    return backend_clock(backend_for_device(device))


def backend_clock(backend: Any) -> DeviceClock:
    """Events on the stream that gpugrad's arrays are computed on."""
    cuda = backend.xp.cuda

    def record() -> Any:
        return cuda.get_current_stream().record(cuda.Event())

    return DeviceClock(record, lambda a, b: cuda.get_elapsed_time(a, b) / 1e3, backend.synchronize)


# -- a library's start, and what its device can do ------------------------------------------------


def start(library: str, device: str) -> dict[str, Any]:
    """Import the library and touch the device: what it is, or an error that says why not."""
    module = importlib.import_module(library)
    found = {"version": getattr(module, "__version__", None), "device": device}
    if device == "cpu":
        if library == "torch":
            from gpugrad.bench.workload import THREADS

            module.set_num_threads(THREADS)
        return found
    if library == "torch":
        if not module.cuda.is_available():
            raise RuntimeError("this PyTorch sees no CUDA device")
        return found | {"name": module.cuda.get_device_name(0)}
    if library == "jax":
        return found | {"name": str(module.devices("gpu")[0])}
    import gpugrad as gg

    gg.tensor(0.0, device=device).numpy()
    from gpugrad.backend import backend_for_device

    devices = backend_for_device(device).describe_devices()
    about = next((d for d in devices if d.device == device), None)
    return found | ({} if about is None else {"name": about.name, "memory": about.memory})


def ceilings(device: str, *, quick: bool = False) -> dict[str, float]:
    """Bytes a second that a copy reads and writes, and operations a second of a product: the best
    of some tries.

    On the host one thread copies for each that computes, as kernels do.
    """
    import gpugrad as gg
    from gpugrad.bench.workload import THREADS

    who = Contender("", "", "gpugrad", "auto", device)
    clock = clock_of("gpugrad", device)
    tries = 3 if quick else 9
    n = 512 if quick else (2048 if who.on_host else 8192)
    size = (16 if quick else 64 if who.on_host else 256) << 20
    if who.on_host:
        copy = _host_copy(size, THREADS)
    else:
        x = gg.zeros((size // 4,), device=device).data
        y = gg.zeros((size // 4,), device=device).data

        def copy() -> None:
            y[...] = x

    a = gg.ones((n, n), dtype=gg.float32, device=device)

    def product() -> None:
        with gg.use_kernels("auto"):
            a @ a

    found = {}
    for what, run, work in (("bandwidth", copy, 2 * size), ("flops", product, 2 * n**3)):
        clock.time(run, 2)
        found[what] = work / min(clock.time(run, tries)["seconds"])
    return found


def _host_copy(size: int, threads: int) -> Callable[[], None]:
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    pool = ThreadPoolExecutor(threads)
    x, y = np.ones(size // 4, np.float32), np.zeros(size // 4, np.float32)
    parts = list(zip(np.array_split(y, threads), np.array_split(x, threads)))

    def copy() -> None:
        list(pool.map(lambda part: np.copyto(*part), parts))

    return copy


# -- requests -------------------------------------------------------------------------------------


def look(results: Sequence[Any]) -> list[list[float]]:
    """Some elements of every result and the largest magnitude of all: what is compared."""
    import numpy as np

    found = []
    for result in results:
        flat = np.ravel(np.asarray(result, dtype=np.float64))
        step = max(1, flat.size // LOOKED_AT)
        most = float(np.max(np.abs(flat), initial=0.0))
        found.append([most, *map(float, flat[::step])])
    return found


class Worker:
    """Jobs by contender, and what is done with them on request."""

    def __init__(self, clock: Clock, table: Mapping[str, Any] | None = None) -> None:
        self.clock = clock
        self.table = table
        self.jobs: dict[str, Job] = {}

    def load(self, contender: str, workload: str, size: str) -> list[list[float]]:
        """Make a job; its answer."""
        work = (workloads() if self.table is None else self.table)[workload]
        who = CONTENDERS[contender]
        job = work.makers[who.library](work.sizes[size], who)
        answer = look(job.answer())
        self.jobs[contender] = job
        # Python's collector cleans up before each turn; what the libraries hold need not be looked
        # through every time.
        gc.collect()
        gc.freeze()
        return answer

    def turn(self, contender: str, count: int) -> dict[str, float]:
        """Median seconds of so many passes."""
        if contender not in self.jobs:
            raise RuntimeError("its process ended with another one's work in it")
        run = self.jobs[contender].run
        gc.collect()
        first = self.clock.time(run, 1)
        if count == 1 and first["seconds"][0] > SHORT:
            return {what: values[0] for what, values in first.items()}
        timed = self.clock.time(run, count)
        return {what: statistics.median(values) for what, values in timed.items()}

    def memory(self, contender: str) -> int:
        """The most bytes that a pass holds in host memory, beyond the operands."""
        job = self.jobs[contender]
        job.run()
        job.forget()
        self.release()
        before = common.resident()
        common.forget_peak()
        job.run()
        return common.peak_resident() - before

    def drop(self) -> None:
        """Forget all jobs, with their memory."""
        self.jobs.clear()
        gc.unfreeze()
        self.release()

    @staticmethod
    def release() -> None:
        """Give back what is kept to be used again."""
        gc.collect()
        from gpugrad.backend import scratch

        scratch.release()

    def ceilings(self, device: str, quick: bool) -> dict[str, float]:
        return ceilings(device, quick=quick)


def out_of_memory(error: BaseException) -> bool:
    """Whether a library says, in its own words, that an array does not fit."""
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return True
    text = str(error)
    return any(words in text for words in ("RESOURCE_EXHAUSTED", "allocate memory", "out of memory",
                                           "Unable to allocate"))  # fmt: skip


def problem(error: BaseException) -> str:
    """An error in one line."""
    if out_of_memory(error):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def answer(worker: Any, line: str) -> dict[str, Any]:
    """The reply to one request: its result, or what went wrong."""
    request = json.loads(line)
    try:
        return {"result": getattr(worker, request.pop("do"))(**request)}
    except Exception as error:  # a contender may fail in any way; the others go on
        gc.collect()
        return {"problem": problem(error)}


def main(library: str, device: str) -> None:
    def say(reply: dict[str, Any]) -> None:
        print(common.ANSWER + json.dumps(reply), flush=True)

    try:
        about = start(library, device)
        worker = Worker(clock_of(library, device))
    except Exception as error:
        say({"problem": problem(error)})
        return
    say({"result": about})
    for line in sys.stdin:
        say(answer(worker, line))


if __name__ == "__main__":
    main(*sys.argv[1:])
