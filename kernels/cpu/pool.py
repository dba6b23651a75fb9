"""One pool of threads for everything that runs on the CPU.

Two pools on the same processors wait for each other: a step that takes 50 ms with one takes 300 ms
with two, and ten times as long on a busy machine. So there is one, Numba's. NumPy's OpenBLAS is
set to one thread, and matrix products are Numba loops over it (`kernels/cpu/products.py`).

This is decided once, when the first CPU kernel is compiled or loaded:

* **Numba's threading layer** is tbb where the package `tbb` is installed, else OpenMP, else Numba's
  own work queue. The last cannot run two loops at a time: a loop that finds it busy runs alone, on
  the thread that called it.
* **Number of threads**: what Numba would use (`NUMBA_NUM_THREADS`, or the processors that the
  process may run on), and no more than `OMP_NUM_THREADS` and than the processor time that the
  container may use.
* **OpenBLAS** uses one thread from then on.
* **The C library**, where it is glibc, keeps what arrays give back, up to 256 MiB, instead of
  returning it to the system, which would clear every page anew.

The environment variable `GPUGRAD_THREADS` decides otherwise: a number is the size of the one pool,
whatever other variables say; `host` leaves Numba, OpenBLAS and the C library as they are; so does
any variable `MALLOC_…` with the last. Without it, a program
that has made a choice keeps it: an OpenBLAS that was given its number of threads (by a variable or
by threadpoolctl), and a threading layer that was chosen or is running. Then a product is one call
of OpenBLAS on its own threads. :func:`describe` says what was decided, and why.

After a fork the child computes on, on one thread where the threading layer does not survive it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
from numba import types

from gpugrad.backend.tape import gate, note
from gpugrad.errors import ParameterError
from gpugrad.kernels.cpu import openblas

__all__ = ["Launch", "Settings", "describe", "get_num_threads", "set_num_threads", "start"]

VARIABLE = "GPUGRAD_THREADS"


@dataclass(frozen=True)
class Settings:
    """How the CPU kernels use threads.

    Attributes
    ----------
    threads:
        Threads of a parallel loop.
    layer:
        What runs them: Numba's name of it.
    blas, blas_threads:
        NumPy's BLAS, and the threads that one call of it uses (None if it cannot be told).
    reasons:
        Why each of `threads`, `layer`, `blas` and `memory` is what it is.
    """

    threads: int
    layer: str
    blas: str
    blas_threads: int | None
    reasons: dict[str, str]


class _Pool:
    """What was decided, and what a launch needs to know of it."""

    started = False
    threads = 1
    #: Whether a loop may start without further ado: on all of Numba's threads, safely.
    free = False
    #: Held by the loop that runs, where only one may.
    turn: threading.Lock | None = None
    reasons: dict[str, str]


_pool = _Pool()
_starting = threading.RLock()


def start() -> None:
    """Decide, unless that has been done. Called before the first parallel loop is compiled."""
    if _pool.started:
        return
    with _starting:
        if _pool.started:
            return
        wish = _wish()
        reasons = {"layer": _choose_layer(wish)}
        most, reasons["threads"] = _count(wish)
        reasons["blas"] = _choose_blas(wish)
        reasons["memory"] = _keep_memory(wish)
        _pool.reasons = reasons
        if numba.threading_layer() == "workqueue":
            _pool.turn = threading.Lock()
        _use(most)
        _pool.started = True


def _wish() -> int | str | None:
    """What `GPUGRAD_THREADS` asks for."""
    text = os.environ.get(VARIABLE, "").strip()
    if text in ("", "host"):
        return text or None
    if not text.isdecimal() or int(text) < 1:
        raise ParameterError(
            f"{VARIABLE}={text}: it must be a number of threads, or `host` to leave the settings "
            "of NumPy's BLAS and of Numba alone"
        )
    return int(text)


def _use(n: int) -> None:
    _pool.threads = n
    _pool.free = 1 < n >= numba.config.NUMBA_NUM_THREADS and _pool.turn is None


# -- the three decisions --------------------------------------------------------------------------


def _choose_layer(wish: int | str | None) -> str:
    try:
        return f"{numba.threading_layer()} was running before the kernels were loaded"
    except ValueError:  # none is running
        pass
    wanted = str(numba.config.THREADING_LAYER).lower()
    order = list(numba.config.THREADING_LAYER_PRIORITY)
    if wish == "host":
        reason = f"{VARIABLE}=host: as Numba is set"
    elif wanted in ("omp", "workqueue"):
        reason = f"Numba is set to {wanted!r}"
    elif wanted == "default" and order[0] != "tbb":
        reason = f"Numba is set to prefer {' to '.join(order)}"
    else:  # tbb is what Numba tries first, or the only one that it may take
        reason = _load_tbb()
    numba.get_num_threads()  # starts them
    return reason


def _load_tbb() -> str:
    """Load the library of the package `tbb`, so that Numba finds it: it asks for it by name only.

    The package puts it into a folder where the system's loader does not look.
    """
    name = "tbb12.dll" if sys.platform == "win32" else "libtbb.so.12"
    try:
        files = importlib.metadata.files("tbb") or []
    except importlib.metadata.PackageNotFoundError:
        return "the package tbb is not installed; Numba's first choice without it"
    for file in files:
        path = Path(str(file.locate()))
        if file.name == name and path.exists():
            ctypes.CDLL(str(path))
            return f"tbb, from {path.resolve().parent}"
    return f"the package tbb holds no {name}; Numba's first choice without it"


def _count(wish: int | str | None) -> tuple[int, str]:
    limit = numba.config.NUMBA_NUM_THREADS
    if isinstance(wish, int):
        if wish > limit:
            return limit, f"{VARIABLE}={wish}, but Numba has {limit} (NUMBA_NUM_THREADS)"
        return wish, f"{VARIABLE}={wish}"
    n = numba.get_num_threads()
    reason = "the processors that this process may run on"
    if n < limit:
        reason = f"the program called numba.set_num_threads({n})"
    elif os.environ.get("NUMBA_NUM_THREADS"):
        reason = f"NUMBA_NUM_THREADS={limit}"
    if wish == "host":
        return n, f"{VARIABLE}=host: {reason}"
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and 0 < int(asked) < n:
        n, reason = int(asked), f"OMP_NUM_THREADS={asked}"
    quota = _quota()
    if quota is not None and quota < n:
        n, reason = quota, "the processor time that the control group may use"
    return n, reason


def _quota(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Processors' worth of time that the control group may use, rounded down but at least one."""
    shares = []
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers
        folder = top / name.lstrip("/")
        # Limits of outer groups hold too. In a container the name may be one of the host's, which
        # does not exist here; the container's own group is then the top.
        for place in (folder, *folder.parents):
            if place == top or top in place.parents:
                shares += _share(place)
    return max(1, int(min(shares))) if shares else None


def _share(place: Path) -> list[float]:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            words = " ".join((place / n).read_text(encoding="utf-8") for n in names).split()
        except OSError:
            continue
        if len(words) == 2 and words[0].isdecimal():  # "max" or -1 is no limit
            return [int(words[0]) / int(words[1])]
    return []


def _choose_blas(wish: int | str | None) -> str:
    blas = openblas.find()
    if isinstance(blas, str):
        return f"{blas}; products are NumPy's own"
    if wish == "host":
        return f"{VARIABLE}=host: left as it is"
    if blas.threads == 1:
        return "one thread already"
    chosen = blas.chosen_by
    if chosen and wish is None:
        return f"left as it is, chosen by {chosen}; {VARIABLE}=N makes one pool of N threads"
    blas.threads = 1
    return "one thread, so that there is one pool"


def _keep_memory(wish: int | str | None) -> str:
    """Let the C library keep what arrays give back.

    By default it returns the end of its memory to the system at once, which clears every page anew
    when the next step asks for it: a tenth of the time of a step that makes many small arrays.
    """
    if wish == "host":
        return f"{VARIABLE}=host: left as it is"
    if told := next((name for name in os.environ if name.startswith("MALLOC_")), None):
        return f"left as it is, chosen by {told}"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return "not glibc"
    mallopt(_TRIM_THRESHOLD, 1 << 28)
    mallopt(_MMAP_THRESHOLD, 1 << 25)
    return "kept by the C library"


#: Numbers of glibc's `mallopt`.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


# -- for users ------------------------------------------------------------------------------------


def describe() -> Settings:
    """How the CPU kernels use threads, and why.

    >>> from gpugrad.kernels.cpu import pool
    >>> settings = pool.describe()
    >>> settings.threads == pool.get_num_threads()
    True
    """
    start()
    blas = openblas.find()
    found = None if isinstance(blas, str) else blas
    return Settings(
        _pool.threads,
        numba.threading_layer(),
        found.name if found else "unknown",
        found.threads if found else None,
        dict(_pool.reasons),
    )


def get_num_threads() -> int:
    """Threads that a CPU kernel uses at most."""
    if not _pool.started:
        start()
    return _pool.threads


def set_num_threads(n: int) -> None:
    """Let every CPU kernel use at most `n` threads, from now on and in every Python thread.

    Parameters
    ----------
    n:
        From 1 to the number that Numba has (`NUMBA_NUM_THREADS`; the processors that this process
        may run on, if that is not set). ParameterError otherwise.

    Other users of Numba and of NumPy's BLAS in this program are not affected.

    >>> from gpugrad.kernels.cpu import pool
    >>> before = pool.get_num_threads()
    >>> pool.set_num_threads(1)
    >>> pool.get_num_threads()
    1
    >>> pool.set_num_threads(before)
    """
    start()
    limit = numba.config.NUMBA_NUM_THREADS
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= limit:
        raise ParameterError(
            f"set_num_threads: {n!r} must be a whole number from 1 to {limit}; for more, set "
            "NUMBA_NUM_THREADS before the program starts"
        )
    _pool.reasons["threads"] = f"set_num_threads({n})"
    _use(n)


# -- for kernels ----------------------------------------------------------------------------------


class Launch:
    """A parallel kernel as Python calls it.

    Parameters
    ----------
    threaded, alone:
        The same function, compiled with and without `parallel=True`. The second runs where the
        first would gain nothing (a pool of one thread) or must not run (the work queue is busy; a
        child of fork whose threads are gone). Results are equal, because work is divided in the
        same way in both.

    In a compiled function its name stands for `alone`: that is called from loops which are
    parallel already.
    """

    def __init__(self, threaded: Any, alone: Any) -> None:
        self.threaded = threaded
        self.alone = alone

    def __call__(self, *args: Any) -> Any:
        if gate:
            note(self, args)
        if _pool.free:
            return self.threaded(*args)
        return _launch(self, args)

    @property
    def _numba_type_(self) -> Any:
        return types.Dispatcher(self.alone)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.threaded, name)


def here(kernel: Any, *args: Any) -> Any:
    """Launch on this thread alone, for work that is done before others are awake."""
    alone = getattr(kernel, "alone", kernel)  # a plain function where kernels are interpreted
    if gate:
        note(alone, args)
    return alone(*args)


def _launch(kernel: Launch, args: tuple[Any, ...]) -> Any:
    """Launch where not everything is as usual: fewer threads than Numba has, or one at a time."""
    start()
    n, turn = _pool.threads, _pool.turn
    if n == 1 or (turn is not None and not turn.acquire(blocking=False)):
        return kernel.alone(*args)
    before = numba.get_num_threads()  # of this Python thread; a program may have lowered it
    try:
        numba.set_num_threads(min(n, before))
        return kernel.threaded(*args)
    finally:
        numba.set_num_threads(before)
        if turn is not None:
            turn.release()


def _after_fork() -> None:
    global _starting
    _starting = threading.RLock()
    if not _pool.started:
        return
    if _pool.turn is not None:
        _pool.turn = threading.Lock()
    if numba.threading_layer() == "omp" and sys.platform == "linux":
        # GNU OpenMP's threads are gone, and it cannot make new ones.
        _pool.reasons["threads"] = "a child of fork, where OpenMP cannot start threads"
        _use(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
