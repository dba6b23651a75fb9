"""One thread for small matrix products.

OpenBLAS splits every product over all cores and lets them wait for each other by spinning. For the
small nets that the command trains this gains a fifth on an idle machine, and on a busy one, where
a core that is waited for has other work, it costs a factor of ten to thirty.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["serial_blas"]

#: Multiply-adds of a product from which several threads are worth their price: about 2 ms of work.
LARGE = 1 << 27

_CHOICES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


@contextmanager
def serial_blas(largest: int) -> Iterator[None]:
    """Let NumPy's OpenBLAS use one thread, if the `largest` product has few multiply-adds.

    Does nothing when the user has chosen a number of threads by an environment variable, or NumPy
    computes with another library.
    """
    functions = None if largest >= LARGE or any(map(os.environ.get, _CHOICES)) else _openblas()
    if functions is None:
        yield
        return
    get, put = functions
    before = get()
    put(1)
    try:
        yield
    finally:
        put(before)


@cache
def _openblas() -> tuple[Any, Any] | None:
    """What gets and what sets the number of threads, in the OpenBLAS that NumPy has loaded."""
    home = Path(np.__file__).parent
    for folder in (home.with_name("numpy.libs"), home / ".dylibs"):
        for path in sorted(folder.glob("*openblas*")):
            try:
                library = ctypes.CDLL(str(path))  # it is loaded already: the same one
            except OSError:
                continue
            for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
                names = [f"{prefix}openblas_{verb}_num_threads{suffix}" for verb in ("get", "set")]
                if all(hasattr(library, name) for name in names):
                    return getattr(library, names[0]), getattr(library, names[1])
    return None
