"""NumPy's own OpenBLAS: where its matrix product is, and how many threads it uses.

NumPy's wheels carry an OpenBLAS. Compiled loops call its `cblas_sgemm` and `cblas_dgemm` by their
addresses, and so need no SciPy and no BLAS of their own. Other libraries that NumPy may be linked
with (Accelerate, MKL, BLIS) are left alone: how many threads they use cannot be set from here.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["OpenBlas", "find"]

#: Variables by which a user tells OpenBLAS how many threads to use.
VARIABLES = (
    "OPENBLAS_NUM_THREADS", "OPENBLAS_DEFAULT_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS",
)  # fmt: skip


@dataclass(eq=False)
class OpenBlas:
    """The library that NumPy computes matrix products with.

    Attributes
    ----------
    sgemm, dgemm, get_threads:
        Addresses of the C functions `cblas_sgemm`, `cblas_dgemm`, `openblas_get_num_threads`.
    width:
        Bits of an integer in their signatures.
    config:
        What the library says of itself: version, processor, limits.
    """

    sgemm: int
    dgemm: int
    get_threads: int
    width: int
    config: str
    _get: Any
    _put: Any
    _processors: Any

    @property
    def name(self) -> str:
        """Version and kernels: "OpenBLAS 0.3.31 Haswell"."""
        version = re.search(r"OpenBLAS (\d+\.\d+\.\d+)", self.config)
        core = re.search(r"(\S+) +MAX_THREADS", self.config)
        return " ".join(["OpenBLAS", *(found[1] for found in (version, core) if found)])

    @property
    def threads(self) -> int:
        """Threads that one product uses now."""
        return int(self._get())

    @threads.setter
    def threads(self, n: int) -> None:
        self._put(n)

    @property
    def default_threads(self) -> int:
        """Threads that it uses when nobody says anything: all processors, up to a fixed limit."""
        limit = re.search(r"MAX_THREADS=(\d+)", self.config)
        return min(int(self._processors()), int(limit[1]) if limit else 1 << 30)

    @property
    def chosen_by(self) -> str | None:
        """Who has chosen the number of threads, if somebody has."""
        for name in VARIABLES:
            value = os.environ.get(name, "")
            if re.match(r"\s*0*[1-9]", value):
                return f"{name}={value}"
        # More than the default happens when a program gives up processors while it runs.
        if self.threads < self.default_threads:
            return f"the program, which set it to {self.threads}"
        return None


@cache
def find() -> OpenBlas | str:
    """NumPy's OpenBLAS, or why there is none that can be called."""
    for library in _libraries():
        for prefix in ("scipy_", ""):
            # 64_ is the suffix of a build whose sizes are 64 bits wide.
            for suffix, width in (("64_", 64), ("", 32)):
                made = _bind(library, prefix, suffix, width)
                if made is not None:
                    return made
    return "NumPy computes with another library than OpenBLAS"


def _libraries() -> Iterator[Any]:
    """Libraries to look into, all loaded by NumPy already."""
    if os.name == "nt":  # a library there shows its own functions only
        folder = Path(np.__file__).parent.with_name("numpy.libs")
        for path in sorted(folder.glob("*openblas*.dll")):
            yield ctypes.CDLL(str(path))
    else:  # a look-up goes on to everything that the library was linked with
        from numpy._core import _multiarray_umath  # type: ignore[attr-defined,unused-ignore]

        yield ctypes.CDLL(_multiarray_umath.__file__)


def _bind(library: Any, prefix: str, suffix: str, width: int) -> OpenBlas | None:
    names = [
        f"{prefix}{stem}{suffix}"
        for stem in (
            "cblas_sgemm", "cblas_dgemm", "openblas_get_config",
            "openblas_get_num_threads", "openblas_set_num_threads", "openblas_get_num_procs",
        )
    ]  # fmt: skip
    if not all(hasattr(library, name) for name in names):
        return None
    sgemm, dgemm, config, get, put, processors = (getattr(library, name) for name in names)
    config.restype = ctypes.c_char_p
    put.argtypes, put.restype = [ctypes.c_int], None
    addresses = [ctypes.cast(f, ctypes.c_void_p).value or 0 for f in (sgemm, dgemm, get)]
    return OpenBlas(addresses[0], addresses[1], addresses[2], width, config().decode(),
                    get, put, processors)  # fmt: skip
