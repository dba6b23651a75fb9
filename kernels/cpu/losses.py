"""Losses of an element and its target: their sum in one pass over memory, a gradient in another.

The formulas are those of :mod:`gpugrad.ops.formulas`. A sum is taken over blocks of a fixed size,
which are added up in order in double precision: the result is the same bit for bit from run to run
and on any number of threads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.kernels.cpu.compile import CpuTemplate, in_a_row, numpy_storage, parallel, serial
from gpugrad.kernels.cpu.elementwise import LABEL, launch, refuse_arrays
from gpugrad.kernels.formula import formula
from gpugrad.kernels.template import Placeholder, T, arithmetic, read, write

Array = np.ndarray[Any, Any]

#: Elements that are added up by themselves.
BLOCK = 8192

f: Any = Placeholder("f")
span: Any = Placeholder("span")


@serial
def _sum2(a: Array, b: Array, p: Any, q: Any) -> Any:
    total = T(0)
    for i in range(a.size):
        total += f(read(a, i), read(b, i), p, q)
    return np.float64(total)


@serial
def _sum3(a: Array, b: Array, c: Array, p: Any, q: Any) -> Any:
    total = T(0)
    for i in range(a.size):
        total += f(read(a, i), read(b, i), read(c, i), p, q)
    return np.float64(total)


@parallel
def _sums2(a: Array, b: Array, parts: Array, p: Any, q: Any) -> None:
    for block in prange(parts.size):
        i = block * BLOCK
        j = min(i + BLOCK, a.size)
        parts[block] = span(a[i:j], b[i:j], p, q)


@parallel
def _sums3(a: Array, b: Array, c: Array, parts: Array, p: Any, q: Any) -> None:
    for block in prange(parts.size):
        i = block * BLOCK
        j = min(i + BLOCK, a.size)
        parts[block] = span(a[i:j], b[i:j], c[i:j], p, q)


# Of a mean or a sum, the gradient from above is one number.
@serial
def _slope1(g: Any, a: Array, out: Array, p: Any, q: Any) -> None:
    for i in range(out.size):
        write(out, i, f(g, read(a, i), p, q))


@serial
def _slope2(g: Any, a: Array, b: Array, out: Array, p: Any, q: Any) -> None:
    for i in range(out.size):
        write(out, i, f(g, read(a, i), read(b, i), p, q))


@serial
def _slope3(g: Any, a: Array, b: Array, c: Array, out: Array, p: Any, q: Any) -> None:
    for i in range(out.size):
        write(out, i, f(g, read(a, i), read(b, i), read(c, i), p, q))


@parallel
def _slopes1(g: Any, a: Array, out: Array, p: Any, q: Any) -> None:
    for block in prange((out.size + BLOCK - 1) // BLOCK):
        i = block * BLOCK
        j = min(i + BLOCK, out.size)
        span(g, a[i:j], out[i:j], p, q)


@parallel
def _slopes2(g: Any, a: Array, b: Array, out: Array, p: Any, q: Any) -> None:
    for block in prange((out.size + BLOCK - 1) // BLOCK):
        i = block * BLOCK
        j = min(i + BLOCK, out.size)
        span(g, a[i:j], b[i:j], out[i:j], p, q)


@parallel
def _slopes3(g: Any, a: Array, b: Array, c: Array, out: Array, p: Any, q: Any) -> None:
    for block in prange((out.size + BLOCK - 1) // BLOCK):
        i = block * BLOCK
        j = min(i + BLOCK, out.size)
        span(g, a[i:j], b[i:j], c[i:j], out[i:j], p, q)


_SUMS = {2: (_sum2, _sums2), 3: (_sum3, _sums3)}
_SLOPES = {1: (_slope1, _slopes1), 2: (_slope2, _slopes2), 3: (_slope3, _slopes3)}


@cache
def _loops(name: str, slope: bool) -> tuple[CpuTemplate, CpuTemplate]:
    """The loops of a formula, over one block and over all of them."""
    made = formula(name)
    one, blocks = (_SLOPES if slope else _SUMS)[len(made.operands) - slope]
    loop = one.bind(f=made.scalar)
    return loop, blocks.bind(span=loop)


def _numbers(name: str, number: float, storage: str) -> tuple[Any, Any]:
    """What a formula takes beside its operands, in the type that is computed in."""
    kind = np.dtype(arithmetic(storage)).type
    p, q = formula(name).values({}, (number,) if formula(name).numbers else ())
    return kind(p), kind(q)


def pointwise_loss(
    m: Backend, x: Array, target: Array, variance: Array | None = None, /,
    loss: str = "squared_error", reduction: str = "none", number: float = 0.0,
) -> Array:  # fmt: skip
    """The forward."""
    operands = [x, target] if variance is None else [x, target, variance]
    if reduction == "none":
        made = formula(loss)
        return launch(made, tuple(operands), made.values({}, (number,) if made.numbers else ()))
    storage = numpy_storage(x.dtype)
    one, blocks = _loops(loss, False)
    rows = [in_a_row(v.reshape(-1)) for v in operands]
    numbers = _numbers(loss, number, storage)
    if x.size <= BLOCK:
        total = one[storage](*rows, *numbers)
    else:
        parts = np.empty((x.size + BLOCK - 1) // BLOCK)
        blocks[storage](*rows, parts, *numbers)
        total = parts.sum()
    return np.asarray(total / x.size if reduction == "mean" else total, x.dtype)


def pointwise_loss_backward(
    m: Backend, x: Array, target: Array, variance: Array | None, g: Array, loss: str,
    reduction: str, number: float, needs: tuple[bool, ...],
) -> tuple[Array | None, ...]:  # fmt: skip
    """Gradients of those operands that need one, each in a pass of its own."""
    storage = numpy_storage(x.dtype)
    told = {"x": x, "target": target, "variance": variance}
    found: list[Array | None] = []
    for operand, need in zip(told, needs):
        if not need:
            found.append(None)
            continue
        name = f"{loss}_{operand}_partial"
        made = formula(name)
        operands: Any = [told[n] for n in made.operands[1:]]
        if reduction == "none":
            values = made.values({}, (number,) if made.numbers else ())
            found.append(launch(made, (g, *operands), values))
            continue
        up = np.dtype(arithmetic(storage)).type(g)
        if reduction == "mean":
            up /= x.size
        out = empty(x.shape, x.dtype)
        one, blocks = _loops(name, True)
        (one if x.size <= BLOCK else blocks)[storage](
            up, *(in_a_row(v.reshape(-1)) for v in operands), in_a_row(out.reshape(-1)),
            *_numbers(name, number, storage),
        )  # fmt: skip
        found.append(out)
    return tuple(found)


def _refuse(
    m: Backend, x: Any, target: Any, variance: Any = None, /, loss: str = "",
    reduction: str = "none", number: float = 0.0,
) -> str | None:  # fmt: skip
    if why := refuse_arrays(x, target, *([] if variance is None else [variance])):
        return why
    return None if x.size else "nothing to compute"


def _refuse_backward(
    m: Backend, x: Any, target: Any, variance: Any, g: Any, loss: str, reduction: str,
    number: float, needs: tuple[bool, ...],
) -> str | None:  # fmt: skip
    if why := _refuse(m, x, target, variance):
        return why
    if g.dtype != x.dtype or (reduction == "none" and g.shape != x.shape):
        return f"a gradient of {g.dtype}{list(g.shape)} for operands of {x.dtype}{list(x.shape)}"
    return None


KERNELS = {
    "pointwise_loss": Kernel(pointwise_loss, LABEL, _refuse),
    "pointwise_loss_backward": Kernel(pointwise_loss_backward, LABEL, _refuse_backward),
}
