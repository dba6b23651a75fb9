"""A step of an optimiser over flat buffers: what the gradient amounts to, and the update.

Two passes over memory. The elements are cut into blocks of a fixed size, and what the blocks give
is combined in order: results are the same bit for bit from run to run and on any number of threads.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.kernels.cpu.compile import CpuTemplate, numpy_storage, parallel, serial, storage_view
from gpugrad.kernels.template import I, Placeholder, T, arithmetic, read, to_bits, where, write
from gpugrad.kernels.trace import scalar_function
from gpugrad.ops.updates import RULES

LABEL = "numba cpu"

#: Elements of a block: few enough that parameter, gradient and state stay in the cache, and that a
#: sum of squares in single precision is good to six digits.
BLOCK = 8192

#: Blocks that one thread is done with before others are awake.
FEW = 24

#: A sum of squares below this may have lost some that are too small for single precision.
TINY = float(np.finfo(np.float32).smallest_normal / np.finfo(np.float32).eps)

Array = np.ndarray[Any, Any]

measure: Any = Placeholder("measure")
span: Any = Placeholder("span")
rule: Any = Placeholder("rule")

# -- what the gradient amounts to ------------------------------------------------------------------
#
# As integers, the bits of magnitudes are ordered as the magnitudes are, with infinity above all
# numbers and NaN above infinity; and a compiler has vector instructions for the greatest of
# integers, come what may.


@serial
def _measure(g: Array, squares: Array, tops: Array, bads: Array) -> None:
    total, top, bad = T(0), I(0), I(0)
    magnitude, infinity = I(~to_bits(T(-0.0))), to_bits(T(np.inf))
    for i in range(g.size):
        x = read(g, i)
        bits = I(to_bits(x) & magnitude)
        top = bits if bits > top else top
        bad += I(bits >= infinity)
        total += x * x
    squares[0], tops[0], bads[0] = np.float64(total), top, bad


@serial
def _measure_finite(g: Array, squares: Array, tops: Array, bads: Array) -> None:
    total, top, bad = T(0), I(0), I(0)
    magnitude, infinity = I(~to_bits(T(-0.0))), to_bits(T(np.inf))
    for i in range(g.size):
        x = read(g, i)
        bits = I(to_bits(x) & magnitude)
        fine = bits < infinity
        bits = bits if fine else I(0)
        top = bits if bits > top else top
        bad += I(not fine)
        x = where(fine, x, T(0))
        total += x * x
    squares[0], tops[0], bads[0] = np.float64(total), top, bad


@serial
def _wide_squares(g: Array, finite_only: Any) -> Any:
    total = np.float64(0)
    for i in range(g.size):
        x = np.float64(read(g, i))
        if finite_only:
            x = x if x - x == 0 else np.float64(0)
        total += x * x
    return total


def _blocks(g: Array, squares: Array, tops: Array, bads: Array, finite_only: Any) -> None:
    for block in prange(squares.size):
        i = block * BLOCK
        j = min(i + BLOCK, g.size)
        measure(g[i:j], squares[block:], tops[block:], bads[block:])
        total = squares[block]
        if tops[block] > 0 and (0 <= total <= TINY or total == np.inf):
            # The elements are in the cache now, and double precision holds all their squares.
            squares[block] = _wide_squares(g[i:j], finite_only)  # type: ignore[operator]


_measure_some = serial(FunctionType(_blocks.__code__, globals(), "_measure_some"))
_measure_many = parallel(_blocks)


def flat_norm(m: Backend, g: Array, /, *, finite_only: bool) -> tuple[Any, Any, Any, Any]:
    """Σg² in double precision, the greatest |g|, how many are not finite, and the first of them."""
    storage = numpy_storage(g.dtype)
    bits, kind = _BITS[arithmetic(storage)]
    blocks = -(-g.size // BLOCK)
    squares, tops, bads = (np.empty(blocks, dtype) for dtype in (np.float64, bits, bits))
    flat = g.reshape(-1)
    run = _measuring(blocks > FEW, finite_only)[storage]
    run(storage_view(flat), squares, tops, bads, finite_only)
    count = np.add.reduce(bads, dtype=np.int64)
    first = np.int64(0)
    if count:
        start = int(np.argmax(bads > 0)) * BLOCK
        first = start + np.argmax(~np.isfinite(flat[start : start + BLOCK]))
    return np.add.reduce(squares), np.maximum.reduce(tops, initial=0).view(kind), count, first


@cache
def _measuring(many: bool, finite_only: bool) -> CpuTemplate:
    blocks = _measure_many if many else _measure_some
    return blocks.bind(measure=_measure_finite if finite_only else _measure)


_BITS = {"float32": (np.int32, np.float32), "float64": (np.int64, np.float64)}

# -- the update ------------------------------------------------------------------------------------
#
# One text for each number of states. The numbers of a rule come in an array, and are taken out of
# it before the loop: a compiler could not know that the loop does not change them.

#: Numbers that a rule takes at most, with the factor of the gradient.
NUMBERS = 8


@serial
def _span0(p: Array, g: Array, c: Array) -> None:
    c0, c1, c2, c3, c4, c5, c6, c7 = c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]
    for i in range(p.size):
        write(p, i, rule(read(p, i), read(g, i), c0, c1, c2, c3, c4, c5, c6, c7))


@serial
def _span1(p: Array, g: Array, a: Array, c: Array) -> None:
    c0, c1, c2, c3, c4, c5, c6, c7 = c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]
    for i in range(p.size):
        x, s = rule(read(p, i), read(g, i), read(a, i), c0, c1, c2, c3, c4, c5, c6, c7)
        write(p, i, x)
        write(a, i, s)


@serial
def _span2(p: Array, g: Array, a: Array, b: Array, c: Array) -> None:
    c0, c1, c2, c3, c4, c5, c6, c7 = c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]
    for i in range(p.size):
        x, s, t = rule(read(p, i), read(g, i), read(a, i), read(b, i),
                       c0, c1, c2, c3, c4, c5, c6, c7)  # fmt: skip
        write(p, i, x)
        write(a, i, s)
        write(b, i, t)


@serial
def _span3(p: Array, g: Array, a: Array, b: Array, d: Array, c: Array) -> None:
    c0, c1, c2, c3, c4, c5, c6, c7 = c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]
    for i in range(p.size):
        x, s, t, u = rule(read(p, i), read(g, i), read(a, i), read(b, i), read(d, i),
                          c0, c1, c2, c3, c4, c5, c6, c7)  # fmt: skip
        write(p, i, x)
        write(a, i, s)
        write(b, i, t)
        write(d, i, u)


@parallel
def _blocks0(p: Array, g: Array, c: Array) -> None:
    for block in prange((p.size + BLOCK - 1) // BLOCK):
        i = block * BLOCK
        j = min(i + BLOCK, p.size)
        span(p[i:j], g[i:j], c)


@parallel
def _blocks1(p: Array, g: Array, a: Array, c: Array) -> None:
    for block in prange((p.size + BLOCK - 1) // BLOCK):
        i = block * BLOCK
        j = min(i + BLOCK, p.size)
        span(p[i:j], g[i:j], a[i:j], c)


@parallel
def _blocks2(p: Array, g: Array, a: Array, b: Array, c: Array) -> None:
    for block in prange((p.size + BLOCK - 1) // BLOCK):
        i = block * BLOCK
        j = min(i + BLOCK, p.size)
        span(p[i:j], g[i:j], a[i:j], b[i:j], c)


@parallel
def _blocks3(p: Array, g: Array, a: Array, b: Array, d: Array, c: Array) -> None:
    for block in prange((p.size + BLOCK - 1) // BLOCK):
        i = block * BLOCK
        j = min(i + BLOCK, p.size)
        span(p[i:j], g[i:j], a[i:j], b[i:j], d[i:j], c)


_LOOPS = ((_span0, _blocks0), (_span1, _blocks1), (_span2, _blocks2), (_span3, _blocks3))


@cache
def loops(name: str, flags: tuple[bool, ...], finite_only: bool) -> tuple[CpuTemplate, CpuTemplate]:
    """The loops of one variant of an update rule: over a block, and over all blocks."""
    row = RULES[name]
    given = dict(zip(row.flags, flags))
    kept = row.kept(given)
    numbers = (*row.made, *row.numbers)

    def whole(m: Any, g: Any, factor: Any, **others: Any) -> Any:
        if finite_only:
            g = m.where(g - g == 0, g, 0.0)
        absent = dict.fromkeys(set(row.states) - set(kept))
        return row.update(m, g=g * factor, **others, **absent, **given)

    takes = ["p", "g", *kept, "factor", *numbers]
    spare = [f"unused{i}" for i in range(NUMBERS - 1 - len(numbers))]
    parameters = [inspect.Parameter(a, inspect.Parameter.KEYWORD_ONLY) for a in ("m", *takes)]
    whole.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    variant = "".join("ny"[flag] for flag in (*flags, finite_only))
    scalar = scalar_function(whole, f"{name}_{variant}", arguments=[*takes, *spare])
    one, blocks = _LOOPS[len(kept)]
    loop = one.bind(rule=scalar)
    return loop, blocks.bind(span=loop)


def flat_update(
    m: Backend,
    p: Array,
    g: Array,
    /,
    *states: Array,
    count: Any,
    factor: Any,
    skip: Any,
    finite_only: bool,
    rule: str,
    flags: Mapping[str, bool],
    numbers: Mapping[str, float],
) -> tuple[Array, ...]:
    """One step of an update rule, in place."""
    if skip is not None and skip:
        return (p, *states)
    storage = numpy_storage(p.dtype)
    way = _way(rule, tuple(flags.items()), finite_only, storage)
    c = [1.0 if factor is None else factor]
    if way.prepare is not None:
        c += way.prepare(np, way.kind(count), *[numbers[name] for name in way.prepares])
    c += [numbers[name] for name in way.numbers]
    run = (way.one if p.size <= FEW * BLOCK else way.blocks)[storage]
    run(*[storage_view(x.reshape(-1)) for x in (p, g, *states)], np.array(c + way.spare, way.kind))
    return (p, *states)


class _Way(NamedTuple):
    """An update rule's loops for arrays of one dtype, and how the numbers for them are come by."""

    kind: Any
    one: CpuTemplate
    blocks: CpuTemplate
    prepare: Any
    prepares: tuple[str, ...]
    numbers: tuple[str, ...]
    spare: list[float]


@cache
def _way(name: str, flags: tuple[tuple[str, bool], ...], finite_only: bool, storage: str) -> _Way:
    row, given = RULES[name], dict(flags)
    one, blocks = loops(name, tuple(given[flag] for flag in row.flags), finite_only)
    kind = np.dtype(arithmetic(storage)).type
    spare = [0.0] * (NUMBERS - 1 - len(row.made) - len(row.numbers))
    return _Way(kind, one, blocks, row.prepare, row.prepares, row.numbers, spare)


# -- the step --------------------------------------------------------------------------------------


def flat_step(
    m: Backend,
    p: Array,
    g: Array,
    /,
    *states: Array,
    count: Array,
    found: Array,
    base: int,
    bound: float,
    nonfinite: str,
    rule: str,
    flags: Mapping[str, bool],
    numbers: Mapping[str, float],
    measured: tuple[Any, Any, Any, Any] | None = None,
) -> tuple[Any, Any, Array]:
    """Both passes, and between them Python's own numbers: in host memory they need no arrays."""
    zero = nonfinite == "zero"
    squares, _, bad, first = measured or flat_norm(m, g, finite_only=zero)
    norm = (np.float64 if g.dtype.itemsize > 4 else np.float32)(math.sqrt(squares))
    coefficient = None
    if bound != math.inf:
        coefficient = bound / (norm + 1e-6)
        coefficient = coefficient if not coefficient >= 1 else type(norm)(1)  # NaN stays
    skip = bool(bad) and nonfinite == "skip"
    skipped, clipped, known, was_bad = found.tolist()
    if bad and not was_bad:
        known = int(first) + base + 1
    clips = coefficient is not None and coefficient < 1 and not skip
    found = np.array([skipped + skip, clipped + clips, known, bool(bad)], found.dtype)
    if not skip:
        new = count + 1
        flat_update(
            m, p, g, *states, count=new, factor=coefficient, skip=None, finite_only=zero,
            rule=rule, flags=flags, numbers=numbers,
        )  # fmt: skip
        count[...] = new
    return norm, coefficient, found


# -- refusals --------------------------------------------------------------------------------------


def _refuse_norm(m: Backend, g: Any, /, **options: Any) -> str | None:
    if not isinstance(g, np.ndarray):
        return f"a {type(g).__name__}; kernels take arrays"
    if not numpy_storage(g.dtype):
        return f"no kernel for {g.dtype}"
    return None if g.flags.c_contiguous else "elements that do not lie in a row"


def _refuse_update(m: Backend, p: Any, g: Any, /, *states: Any, **options: Any) -> str | None:
    for x in (p, g, *states):
        why = _refuse_norm(m, x)
        if why is not None:
            return why
        if x.dtype != p.dtype or x.shape != p.shape:
            return f"a {x.dtype} of shape {x.shape} beside a {p.dtype} of shape {p.shape}"
    return None


KERNELS = {
    "flat_norm": Kernel(flat_norm, LABEL, _refuse_norm),
    "flat_step": Kernel(flat_step, LABEL, _refuse_update),
    "flat_update": Kernel(flat_update, LABEL, _refuse_update),
}
