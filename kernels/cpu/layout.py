"""Copies that put axes into another order.

Where two blocks of axes have changed places, and those before and behind them have not, an array is
seen as (items, rows, columns, run) in the order of memory, and its copy as (items, columns, rows,
run). Single elements are turned in registers; runs of them are copied as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu.compile import parallel
from gpugrad.kernels.cpu.elementwise import LABEL
from gpugrad.kernels.cpu.memory import address, copy, size_of, turn_all
from gpugrad.kernels.template import T

Array = np.ndarray[Any, Any]

#: Elements that are copied by a thread at a time.
BLOCK = 8192


@parallel
def _copy_runs(source, target, items, rows, columns, run):
    size = size_of(T(0)) * run
    per = max(1, BLOCK // run)
    count = items * rows * columns
    for unit in prange((count + per - 1) // per):
        for at in range(unit * per, min((unit + 1) * per, count)):
            item, column, row = at // rows // columns, at // rows % columns, at % rows
            copy(source + ((item * rows + row) * columns + column) * size, target + at * size, run)


def exchanged_copy(
    m: Backend, x: Array, items: int, rows: int, columns: int, run: int
) -> Array:  # fmt: skip
    """The elements in C's order."""
    out = empty(x.shape, x.dtype)
    storage = "float32" if x.dtype.itemsize == 4 else "float64"
    if run == 1:
        turn_all[storage](address(x), address(out), items, rows, columns)
    else:
        _copy_runs[storage](address(x), address(out), items, rows, columns, run)
    return out


KERNELS = {"exchanged_copy": Kernel(exchanged_copy, LABEL)}
