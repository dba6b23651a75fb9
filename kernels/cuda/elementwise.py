"""Element-wise maps: every activation, and every derivative of one, in a single pass."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel as Implementation
from gpugrad.kernels.cuda.language import (
    LANES,
    Elements,
    Int,
    Kernel,
    Number,
    Size,
    kernel,
    lanes,
    pack_size,
    read_pack,
    thread,
    threads,
    write_pack,
)
from gpugrad.kernels.cuda.launch import Entry, machine, storage_of
from gpugrad.kernels.formula import (
    APPROXIMATE,
    PLAIN,
    Formula,
    approximated,
    formula,
    map_kernels,
)
from gpugrad.kernels.template import STORAGE, Placeholder

LABEL = "numba cuda"

Array = Any

f: Any = Placeholder("f")
f_of_1 = lanes(f, "x..")
f_of_2 = lanes(f, "xx..")
f_of_3 = lanes(f, "xxx..")


@kernel
def map1_kernel(a: Elements, out: Elements, p: Number, q: Number, n: Size, aligned: Int) -> None:
    """out = f(a)."""
    i = thread() * LANES
    step = threads() * LANES
    while i < n:
        x = read_pack(a, i, n - i, aligned)
        write_pack(out, i, f_of_1(x, p, q), n - i, aligned)
        i += step


@kernel
def map2_kernel(
    a: Elements, b: Elements, out: Elements, p: Number, q: Number, n: Size, aligned: Int
) -> None:
    """out = f(a, b)."""
    i = thread() * LANES
    step = threads() * LANES
    while i < n:
        x = read_pack(a, i, n - i, aligned)
        y = read_pack(b, i, n - i, aligned)
        write_pack(out, i, f_of_2(x, y, p, q), n - i, aligned)
        i += step


@kernel
def map3_kernel(
    a: Elements, b: Elements, c: Elements, out: Elements, p: Number, q: Number, n: Size,
    aligned: Int,
) -> None:  # fmt: skip
    """out = f(a, b, c)."""
    i = thread() * LANES
    step = threads() * LANES
    while i < n:
        x = read_pack(a, i, n - i, aligned)
        y = read_pack(b, i, n - i, aligned)
        z = read_pack(c, i, n - i, aligned)
        write_pack(out, i, f_of_3(x, y, z, p, q), n - i, aligned)
        i += step


_MAPS = {1: map1_kernel, 2: map2_kernel, 3: map3_kernel}


@cache
def map_of(name: str) -> Kernel:
    """The kernel of a formula."""
    made = formula(name)
    return _MAPS[len(made.operands)].bind(f=made.scalar).named(f"map_{name}")


def launch_map(made: Formula, arrays: tuple[Array, ...], numbers: list[float]) -> Array:
    """Run a formula over arrays of one shape and dtype whose elements lie in a row."""
    first = arrays[0]
    gpu, storage = machine(first), storage_of(first)
    out = gpu.empty(first.shape, first.dtype)
    if first.size:
        gpu.run(
            map_of(made.name)[storage], gpu.flat(first.size, pack_size(storage)),
            *arrays, out, *numbers, first.size, gpu.aligned(*arrays, out),
        )  # fmt: skip
    return out


def in_a_row(x: Array) -> Array:
    """The elements of an array one after the other; a copy if they are not."""
    return x if x.flags.c_contiguous else x.copy()


def refuse_arrays(*arrays: Any) -> str | None:
    """Why one kernel cannot take all of these arrays."""
    first = arrays[0]
    for x in arrays:
        if not hasattr(x, "dtype") or not hasattr(x, "flags"):
            return f"a {type(x).__name__} among the operands; kernels take arrays"
        if not storage_of(x):
            return f"no kernel for {x.dtype}"
        if x.dtype != first.dtype:
            return f"operands of {first.dtype} and {x.dtype}"
    return None


def refuse_shapes(*arrays: Any) -> str | None:
    """Why one map cannot take all of these arrays."""
    why = refuse_arrays(*arrays)
    shapes = {x.shape for x in arrays} if why is None else {()}
    return f"shapes {' and '.join(map(str, shapes))} broadcast" if len(shapes) > 1 else why


def map_implementation(name: str) -> Implementation:
    """The implementation of an operation that is one formula."""

    def run(m: Backend, *args: Any, **parameters: Any) -> Array:
        made = formula(name)
        n = len(made.operands)
        rows = tuple(in_a_row(x) for x in args[:n])
        return launch_map(made, rows, made.values(parameters, args[n:]))

    def refuse(m: Backend, *args: Any, **parameters: Any) -> str | None:
        return refuse_shapes(*args[: len(formula(name).operands)])

    return Implementation(run, LABEL, refuse)


#: For the slots of the backend.
KERNELS = map_kernels(map_implementation)


def entries() -> Iterator[Entry]:
    """All that ships."""
    names = [*PLAIN, *(one for name in APPROXIMATE for one in approximated(name).values())]
    for storage in STORAGE:
        for name in names:
            yield map_of(name)[storage]
