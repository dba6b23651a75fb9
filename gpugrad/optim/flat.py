"""The two passes of a step over flat buffers: what the gradients amount to, and the update.

Both are texts over whole arrays that kernels may take the place of, under their names; and so is
`flat_step`, the common step that is made of the two and of a few operations on single numbers
between them, all of which a GPU can do in two launches. In host memory the passes work block by
block, so that what they compute in between stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.backend.memory import NOTED
from gpugrad.clip.norms import cast
from gpugrad.clip.scaling import ratio
from gpugrad.ops.updates import RULES

__all__ = [
    "BAD",
    "BLOCK",
    "CLIPPED",
    "FIRST",
    "SKIPPED",
    "advance",
    "flat_norm",
    "flat_step",
    "flat_update",
    "known_norm",
    "norm_dtype",
    "noted",
    "unscale",
]

#: Elements that are worked on at a time in host memory.
BLOCK = 1 << 13


#: What steps find out is an array of four int64, zeros in the beginning: how many steps were
#: skipped; how many were clipped; the number, counted from 1, of the first element that was not
#: finite, in the step in which that last began; and whether one was not in the latest step.
SKIPPED, CLIPPED, FIRST, BAD = range(4)


def norm_dtype(m: Backend, *arrays: Array) -> Any:
    """What the norm of gradients is given as: float64 if one of them is, else float32."""
    wide = any(m.numpy_dtype(x).itemsize > 4 for x in arrays)
    return m.dtype("float64" if wide else "float32")


def _wide_dtype(m: Backend, x: Array) -> Any:
    """What the elements of `x` are computed in: float32 for anything narrower."""
    return m.dtype("float32") if m.numpy_dtype(x).itemsize < 4 else x.dtype


@fusible
def flat_norm(m: Backend, g: Array, /, *, finite_only: bool) -> tuple[Array, Array, Array, Array]:
    """What the elements of a gradient amount to, four 0-d arrays on its device.

    Parameters
    ----------
    finite_only:
        Let elements that are NaN or infinite count as 0 in the first two.

    Returns
    -------
    squares:
        Σg², which neither overflows nor vanishes for elements narrower than it.
    top:
        The greatest |g|; NaN if there is one.
    bad:
        How many elements are NaN or infinite, an int64.
    first:
        The index of the first of them in row-major order, an int64; 0 when there is none.
    """
    parts = [_part_norm(m, x, finite_only) for x in _blocks(g)]
    if len(parts) == 1:
        return parts[0]
    squares, tops, bads, firsts = (m.stack(list(column)) for column in zip(*parts))
    block = m.argmax(bads > 0)
    starts = m.arange(0, len(parts)) * BLOCK
    return m.sum(squares), m.max(tops), m.sum(bads), (starts + firsts)[block]


def known_norm(
    m: Backend, squares: float, left: list[Array]
) -> tuple[Array, Array, Array, Array] | None:
    """:func:`flat_norm` of a gradient of which Σg² is known but for some parts, in host memory.

    The greatest |g| is NaN, for it is not known. None if an element is not finite: then somebody
    has to look for the first.
    """
    zero = np.int64(0)
    if not left:
        return np.float64(squares), np.float64(np.nan), zero, zero
    small = [g for g in left if g.size < NOTED]
    parts = [g for g in left if g.size >= NOTED]
    if small:
        parts.append(m.concat(small))
    found = [flat_norm(m, g, finite_only=False) for g in parts]
    if any(bad for _, _, bad, _ in found):
        return None
    return np.float64(squares) + sum(part for part, *_ in found), np.float64(np.nan), zero, zero


def _part_norm(m: Backend, g: Array, finite_only: bool) -> tuple[Array, Array, Array, Array]:
    integer = m.dtype("int64")
    x = m.astype(m.reshape(g, (-1,)), m.dtype("float64"))
    if not math.prod(g.shape):
        nothing = m.sum(x)
        return nothing, nothing, m.astype(nothing, integer), m.astype(nothing, integer)
    bad = m.astype(~m.isfinite(x), integer)
    if finite_only:
        x = m.where(bad > 0, 0.0, x)
    return m.vecdot(x, x), m.max(m.abs(x)), m.sum(bad), m.argmax(bad)


@fusible
def flat_update(
    m: Backend,
    p: Array,
    g: Array,
    /,
    *states: Array,
    count: Array,
    factor: Array | None,
    skip: Array | None,
    finite_only: bool,
    rule: str,
    flags: Mapping[str, bool],
    numbers: Mapping[str, float],
) -> tuple[Array, ...]:
    """One step of an update rule of :data:`gpugrad.ops.updates.RULES` on arrays of one shape.

    Parameters
    ----------
    p, g, states:
        The parameter, its gradient, and the states that the rule keeps under these flags. Narrow
        elements are computed in float32.
    count:
        The number of this step, a 0-d array of int64.
    factor:
        The gradient is multiplied by this 0-d array.
    skip:
        Where this 0-d boolean is true, nothing changes.
    finite_only:
        Let elements of the gradient that are NaN or infinite count as 0.
    rule, flags, numbers:
        The row of the table, and its arguments by name.

    Returns
    -------
    The new parameter and states: the same arrays, changed in place, where arrays can change.
    """
    row = RULES[rule]
    dtype = _wide_dtype(m, p)
    if factor is not None:
        factor = m.astype(factor, dtype)
    made = prepared(m, rule, m.astype(count, dtype), numbers)
    others = tuple(numbers[name] for name in row.numbers)
    kept = row.kept(flags)

    def update(p: Array, g: Array, *states: Array) -> tuple[Array, ...]:
        old = tuple(_cast(m, x, dtype) for x in (p, *states))
        g = _cast(m, g, dtype)
        if finite_only:
            g = m.where(m.isfinite(g), g, 0.0)
        if factor is not None:
            g = g * factor
        there = dict(zip(kept, old[1:]))
        new = row.update(m, old[0], g, *(there.get(s) for s in row.states), *made, *others, **flags)
        if skip is not None:
            new = tuple(m.where(skip, a, b) for a, b in zip(old, new))
        return tuple(_cast(m, b, a.dtype) for a, b in zip((p, *states), new))

    if not m.mutable:
        return update(p, g, *states)
    for parts in zip(*(_blocks(x, together=(p, g, *states)) for x in (p, g, *states))):
        for target, value in zip((parts[0], *parts[2:]), update(*parts)):
            m.setitem(target, ..., value)
    return (p, *states)


@fusible
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
    measured: tuple[Array, Array, Array, Array] | None = None,
) -> tuple[Array, Array | None, Array]:
    """The common step, whole: the norm of one gradient, clipping by it, and the update, in place.

    For libraries whose arrays can change.

    Parameters
    ----------
    p, g, states, rule, flags, numbers:
        As for :func:`flat_update`.
    count:
        How many steps have been made, a 0-d array of int64; one more afterwards, unless this one is
        skipped.
    found:
        What the steps so far have found out: see :data:`SKIPPED`.
    base:
        How many elements there are before those of `g`.
    bound:
        The norm that gradients are scaled down to; infinity for the norm alone.
    nonfinite:
        `"propagate"`, `"skip"` or `"zero"`: see `Optimizer.step`.
    measured:
        What :func:`flat_norm` would find, if that is known.

    Returns
    -------
    norm:
        The norm before clipping.
    coefficient:
        What the gradient was multiplied by; None if the bound is infinite.
    found:
        What the steps have found out, this one among them: another array.
    """
    zero = nonfinite == "zero"
    squares, _, bad, first = measured or flat_norm(m, g, finite_only=zero)
    flag = bad > 0
    skip = flag if nonfinite == "skip" else None
    norm = cast(m, m.sqrt(squares), norm_dtype(m, g))
    coefficient = None if bound == math.inf else ratio(m, norm, bound)
    found = noted(m, found, flag, first + base, skip, coefficient)
    new = cast(m, count + 1, count.dtype)
    flat_update(
        m, p, g, *states, count=new, factor=coefficient, skip=skip, finite_only=zero, rule=rule,
        flags=flags, numbers=numbers,
    )  # fmt: skip
    m.setitem(count, ..., advance(m, count, new, skip))
    return norm, coefficient, found


def noted(
    m: Backend,
    found: Array,
    bad: Array,
    first: Array,
    skip: Array | None,
    coefficient: Array | None,
) -> Array:
    """What steps have found out, see :data:`SKIPPED`, after one more.

    Parameters
    ----------
    found:
        What it was before.
    bad, first:
        Whether an element of the gradients was not finite, and the index of the first such.
    skip:
        Whether the step was skipped, if it could be.
    coefficient:
        What the gradients were multiplied by, if there was a norm to clip by.
    """
    integer = found.dtype
    skipped, clipped = found[SKIPPED], found[CLIPPED]
    if skip is not None:
        skipped = skipped + cast(m, skip, integer)
    if coefficient is not None:
        counts = coefficient < 1 if skip is None else (coefficient < 1) & ~skip
        clipped = clipped + cast(m, counts, integer)
    # An element that was bad before would say nothing: once parameters are NaN, all of them are.
    # The library's own: between single numbers there is no kernel to choose.
    first = m.xp.where(bad & (found[BAD] == 0), cast(m, first + 1, integer), found[FIRST])
    return m.stack([skipped, clipped, first, cast(m, bad, integer)])


def advance(m: Backend, count: Array, new: Array, skip: Array | None) -> Array:
    """The count of steps after a step that may have been skipped."""
    return new if skip is None else m.xp.where(skip, count, new)


def prepared(m: Backend, rule: str, step: Array, numbers: Mapping[str, float]) -> tuple[Array, ...]:
    """What a rule computes once in a step, from the step's number in the type to compute in."""
    row = RULES[rule]
    if row.prepare is None:
        return ()
    return tuple(row.prepare(m, step, *(numbers[name] for name in row.prepares)))


def unscale(m: Backend, g: Array, /, *, factor: Array | None, finite_only: bool) -> Array:
    """`g` times a factor, in place where arrays can change, as :func:`flat_update` does within."""
    dtype = _wide_dtype(m, g)
    x = _cast(m, g, dtype)
    if finite_only:
        x = m.where(m.isfinite(x), x, 0.0)
    if factor is not None:
        x = x * m.astype(factor, dtype)
    x = _cast(m, x, g.dtype)
    if not m.mutable:
        return x
    m.setitem(g, ..., x)
    return g


def _cast(m: Backend, x: Array, dtype: Any) -> Array:
    return x if x.dtype == dtype else m.astype(x, dtype)


def _blocks(x: Array, together: tuple[Array, ...] | None = None) -> Iterator[Array]:
    """The parts to work on: blocks of what lies in a row in host memory, or the whole at once."""
    if all(isinstance(a, np.ndarray) and a.flags.c_contiguous for a in together or (x,)):
        flat = x.reshape(-1)
        for start in range(0, max(flat.size, 1), BLOCK):
            yield flat[start : start + BLOCK]
    else:
        yield x
