"""Element-wise maps: every activation, and every derivative of one, in a single pass."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu.compile import CpuTemplate, numpy_storage, parallel, serial, storage_view
from gpugrad.kernels.formula import Formula, formula, map_kernels
from gpugrad.kernels.template import Placeholder, read, write

LABEL = "numba cpu"

#: Elements that one thread works on at a time: in and out, they stay in its cache.
BLOCK = 8192

Array = np.ndarray[Any, Any]

f: Any = Placeholder("f")
span: Any = Placeholder("span")


@serial
def _map1(a: Array, out: Array, p: Any, q: Any) -> None:
    for i in range(out.size):
        write(out, i, f(read(a, i), p, q))


@serial
def _map2(a: Array, b: Array, out: Array, p: Any, q: Any) -> None:
    for i in range(out.size):
        write(out, i, f(read(a, i), read(b, i), p, q))


@serial
def _map3(a: Array, b: Array, c: Array, out: Array, p: Any, q: Any) -> None:
    for i in range(out.size):
        write(out, i, f(read(a, i), read(b, i), read(c, i), p, q))


@serial
def _map4(a: Array, b: Array, c: Array, d: Array, out: Array, p: Any, q: Any) -> None:
    for i in range(out.size):
        write(out, i, f(read(a, i), read(b, i), read(c, i), read(d, i), p, q))


@parallel
def _blocks1(a: Array, out: Array, p: Any, q: Any) -> None:
    for block in prange((out.size + BLOCK - 1) // BLOCK):
        i = block * BLOCK
        j = min(i + BLOCK, out.size)
        span(a[i:j], out[i:j], p, q)


@parallel
def _blocks2(a: Array, b: Array, out: Array, p: Any, q: Any) -> None:
    for block in prange((out.size + BLOCK - 1) // BLOCK):
        i = block * BLOCK
        j = min(i + BLOCK, out.size)
        span(a[i:j], b[i:j], out[i:j], p, q)


@parallel
def _blocks3(a: Array, b: Array, c: Array, out: Array, p: Any, q: Any) -> None:
    for block in prange((out.size + BLOCK - 1) // BLOCK):
        i = block * BLOCK
        j = min(i + BLOCK, out.size)
        span(a[i:j], b[i:j], c[i:j], out[i:j], p, q)


@parallel
def _blocks4(a: Array, b: Array, c: Array, d: Array, out: Array, p: Any, q: Any) -> None:
    for block in prange((out.size + BLOCK - 1) // BLOCK):
        i = block * BLOCK
        j = min(i + BLOCK, out.size)
        span(a[i:j], b[i:j], c[i:j], d[i:j], out[i:j], p, q)


_LOOPS = {
    1: (_map1, _blocks1), 2: (_map2, _blocks2), 3: (_map3, _blocks3), 4: (_map4, _blocks4),
}  # fmt: skip


def refuse_arrays(*arrays: Any) -> str | None:
    """Why a loop over all of these arrays at once is not possible."""
    first = arrays[0]
    for x in arrays:
        if not isinstance(x, np.ndarray):
            return f"a {type(x).__name__} among the operands; kernels take arrays"
        if not numpy_storage(x.dtype):
            return f"no kernel for {x.dtype}"
        if x.dtype != first.dtype:
            return f"operands of {first.dtype} and {x.dtype}"
        if x.shape != first.shape:
            return f"shapes {first.shape} and {x.shape} broadcast"
    return None


def flat(x: Array) -> Array:
    """The elements of `x` in a row as kernels read them; a copy if they do not lie in a row."""
    return storage_view(np.ascontiguousarray(x).reshape(-1))


def launch(made: Formula, arrays: tuple[Array, ...], numbers: list[float]) -> Array:
    """Run a formula over arrays of one shape and dtype."""
    first = arrays[0]
    if first.ndim == 4 and not first.flags.c_contiguous:
        turned = tuple(x.transpose(0, 2, 3, 1) for x in arrays)
        if all(x.flags.c_contiguous for x in turned):  # channels last, as convolutions leave them
            return launch(made, turned, numbers).transpose(0, 3, 1, 2)
    out = empty(first.shape, first.dtype)
    storage = numpy_storage(first.dtype)
    kind = np.float64 if storage == "float64" else np.float32
    one, blocks = _loops(made.name, len(arrays))
    run = (one if first.size <= 2 * BLOCK else blocks)[storage]
    run(*(flat(x) for x in arrays), flat(out), kind(numbers[0]), kind(numbers[1]))
    return out


@cache
def _loops(name: str, count: int) -> tuple[CpuTemplate, CpuTemplate]:
    one, blocks = _LOOPS[count]
    loop = one.bind(f=formula(name).scalar)
    return loop, blocks.bind(span=loop)


def map_kernel(name: str) -> Kernel:
    """The kernel of one formula."""

    def run(m: Backend, *args: Any, **parameters: Any) -> Array:
        made = formula(name)
        n = len(made.operands)
        return launch(made, args[:n], made.values(parameters, args[n:]))

    def refuse(m: Backend, *args: Any, **parameters: Any) -> str | None:
        return refuse_arrays(*args[: len(formula(name).operands)])

    return Kernel(run, LABEL, refuse)


KERNELS = map_kernels(map_kernel)
