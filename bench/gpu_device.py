"""A device as the parts of the check see it: time, memory, and what is launched and read.

There are three: a GPU under CuPy, the same with the stand-in of `gpu_fake.py`, and the CPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: What `seconds` of :meth:`Cuda.occupy` is made of: copies of so many bytes.
BALLAST = 256 * 2**20


class NotRun(Exception):
    """A part that has nothing to do here, and why."""


class Notes:
    """What a part has found so far."""

    def __init__(self) -> None:
        path = os.environ.get("GPU_CHECK_NOTES")
        self.file = open(path, "a", encoding="utf-8") if path else sys.stdout  # noqa: SIM115

    def put(self, **values: Any) -> None:
        """Set results by name."""
        for key, value in values.items():
            self._write("put", key, value)

    def add(self, key: str, value: Any) -> None:
        """Append to a list."""
        self._write("add", key, value)

    def _write(self, how: str, key: str, value: Any) -> None:
        self.file.write(json.dumps([how, key, value]) + "\n")
        self.file.flush()


def seconds_left() -> float:
    """Until this part is stopped."""
    return float(os.environ.get("GPU_CHECK_DEADLINE", time.time() + 60)) - time.time()


def message(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def is_out_of_memory(error: BaseException) -> bool:
    """Of CuPy, of PyTorch, or of a product's library."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "alloc_failed" in text


class Cpu:
    """NumPy on this machine: stands in for a GPU when the check itself is checked."""

    name = "cpu"

    def __init__(self, device: str = "cpu") -> None:
        import numpy

        self.xp = numpy

    def synchronize(self) -> None:
        """Nothing runs behind our back."""

    def event(self) -> Any:
        return time.perf_counter()

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds between two events."""
        return float(end - start)


class Cuda:
    """CuPy on one GPU."""

    name = "cuda"

    def __init__(self, device: str) -> None:
        if "cupy" not in sys.modules and not importlib.util.find_spec("cupy"):
            raise NotRun("CuPy is not installed")
        from gpugrad.backend import backend_for_device
        from gpugrad.errors import DeviceError

        try:  # says why not: no driver, one that is older than CuPy's CUDA, no GPU, no such GPU
            self.backend = backend_for_device(device)
        except DeviceError as error:
            raise NotRun(str(error)) from error
        import cupy

        self.device = device
        self.xp = cupy
        place = cupy.cuda.Device(int(device.partition(":")[2] or 0))
        place.use()
        self.properties = cupy.cuda.runtime.getDeviceProperties(place.id)
        self.l2 = int(self.properties.get("l2CacheSize") or 50 * 2**20)
        self._ballast: tuple[Any, Any] | None = None
        self._copy_seconds = 0.0
        self._drawn: dict[int, Any] = {}

    # -- time ------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        self.xp.cuda.get_current_stream().synchronize()

    def event(self) -> Any:
        event = self.xp.cuda.Event()
        event.record()
        return event

    def elapsed(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(self.xp.cuda.get_elapsed_time(start, end)) / 1e3

    def copy(self, target: Any, source: Any) -> None:
        """The driver's copy from device memory to device memory."""
        target.data.copy_from_device_async(source.data, source.nbytes)

    def occupy(self, seconds: float, small: bool = False) -> None:
        """Give the device so much to do that what is queued next waits, and waits together.

        Without it, time between events holds the pauses in which the device waits for the host.
        """
        if self._ballast is None:
            size = 2**12 if small else BALLAST
            self._ballast = (self.xp.zeros(size, "uint8"), self.xp.zeros(size, "uint8"))
            self.copy(*self._ballast)
            first = self.event()
            for _ in range(4):
                self.copy(*self._ballast)
            self._copy_seconds = max(self.elapsed(first, self.event()) / 4, 1e-6)
        for _ in range(min(200, 1 + int(seconds / self._copy_seconds))):
            self.copy(*self._ballast)

    # -- arrays and memory -----------------------------------------------------------------------

    def random(self, *shape: int, dtype: str = "float32") -> Any:
        """Normal deviates; a stretch of them, drawn on the host, again and again."""
        import math

        import numpy as np

        size = math.prod(shape)
        length = min(size, 2**20)
        if length not in self._drawn:
            drawn = np.random.default_rng(0).standard_normal(length, dtype=np.float32)
            self._drawn[length] = self.xp.asarray(drawn)
        times = -(-size // max(1, length))
        return self.xp.tile(self._drawn[length], times)[:size].astype(dtype).reshape(shape)

    def free(self) -> None:
        """Give what nobody uses back to the driver, so that others can have it."""
        import gc

        gc.collect()
        self.synchronize()
        self.xp.get_default_memory_pool().free_all_blocks()

    def peak(self, run: Callable[[], Any]) -> int:
        """The most bytes of arrays that are there at a time while `run` runs."""
        pool = self.xp.get_default_memory_pool()
        now = most = int(pool.used_bytes())

        class Hook(self.xp.cuda.MemoryHook):  # type: ignore[misc, name-defined]
            name = "peak"

            def malloc_postprocess(self, **told: int) -> None:
                nonlocal now, most
                now += told["mem_size"]
                most = max(most, now)

            def free_postprocess(self, **told: int) -> None:
                nonlocal now
                now -= told["mem_size"]

        with Hook():
            run()
            self.synchronize()
        return most

    # -- what is launched and read ---------------------------------------------------------------

    def count(self, run: Callable[[], Any]) -> dict[str, Any]:
        """What one call launches: our own kernels, all kernels, and reads by the host.

        All of them are counted by PyTorch's profiler, which sees every library; without PyTorch
        they are None.
        """
        fake = fake_counts()
        with own_launches() as own:
            if fake is not None:
                fake.clear()
                run()
                found = {"kernels": fake.launches, "host_reads": fake.host_reads,
                         "uploads": fake.library.uploads}  # fmt: skip
            else:
                found = profiled(run)
        return {"own": len(own), **found}

    def waits(self, run: Callable[[], Any]) -> str | None:
        """What in `run` waits for the device; "" if nothing does, as CuPy itself sees it.

        None if this CuPy does not look.
        """
        import warnings

        import cupyx

        if not hasattr(cupyx, "allow_synchronize"):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with cupyx.allow_synchronize(False):
                    run()
            except cupyx.DeviceSynchronized as error:
                frames = []
                trace = error.__traceback__
                while trace is not None:
                    code = trace.tb_frame.f_code
                    frames.append(f"{os.path.basename(code.co_filename)}:{trace.tb_lineno}")
                    trace = trace.tb_next
                return " < ".join(reversed(frames[-4:])) or "something"
        return ""


def open_device(device: str) -> Any:
    return Cpu() if device.startswith("cpu") else Cuda(device)


def fake_counts() -> Any:
    """The counters of the stand-in; None where CuPy is CuPy."""
    return getattr(sys.modules.get("cupy"), "counts_of_stand_in", None)


@contextmanager
def own_launches() -> Iterator[list[str]]:
    """The names of the kernels of ours that are launched meanwhile."""
    from gpugrad.kernels.cuda.launch import Gpu

    run = Gpu.run
    names: list[str] = []

    def noting(self: Any, entry: Any, *args: Any) -> None:
        names.append(entry.name)
        run(self, entry, *args)

    Gpu.run = noting  # type: ignore[method-assign]
    try:
        yield names
    finally:
        Gpu.run = run  # type: ignore[method-assign]


def profiled(run: Callable[[], Any]) -> dict[str, Any]:
    """Kernels and copies of one call, as PyTorch's profiler sees them."""
    nothing = {"kernels": None, "host_reads": None, "uploads": None}
    try:
        torch = torch_device("cuda")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        names = [e.name for e in profile.events()
                 if e.device_type == torch.autograd.DeviceType.CUDA]  # fmt: skip
    except Exception as error:
        return {**nothing, "profiler": message(error)}
    if not names:
        return {**nothing, "profiler": "it saw nothing"}
    return {
        "kernels": sum(not name.startswith(("Memcpy", "Memset")) for name in names),
        "host_reads": sum("DtoH" in name for name in names),
        "uploads": sum("HtoD" in name for name in names),
    }


def import_torch() -> Any:
    """PyTorch; NotRun when it is not there, or does not load."""
    if not importlib.util.find_spec("torch"):
        raise NotRun("PyTorch is not installed")
    try:
        import torch
    except Exception as error:  # a library of its own that is missing, say
        raise NotRun(f"PyTorch does not load: {message(error)}") from error
    return torch


def torch_device(device: str) -> Any:
    """PyTorch ready to compute on the same device; NotRun when it cannot."""
    torch = import_torch()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if device.startswith("cpu"):
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        raise NotRun("PyTorch finds no CUDA device")
    return torch


def timed(device: Any, run: Callable[[], Any]) -> tuple[float, float, float]:
    """Seconds until everything was handed to the device, until it was done, and between events."""
    device.synchronize()
    begin = time.perf_counter()
    first = device.event()
    run()
    last = device.event()
    host = time.perf_counter() - begin
    device.synchronize()
    return host, time.perf_counter() - begin, device.elapsed(first, last)
