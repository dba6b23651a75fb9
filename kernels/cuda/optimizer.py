"""A step of an optimiser over flat buffers in two launches: the gradient's norm, and the update.

The first kernel reads the gradient (`gradient.py`). In the second, every block puts together what
the blocks of the first have left behind, in one order and so with one result, and then updates its
share of the elements; the first block also writes down what the step found out. The host reads
nothing, and results are the same bit for bit from run to run, and on every GPU.

Numbers, such as the learning rate, are arguments of the kernel: a schedule that changes them at
every step costs nothing, and there is no copy on the device that could be out of date. A step that
is captured into a graph keeps those it was captured with. The count of steps lives on the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel as Implementation
from gpugrad.kernels.cuda.elementwise import LABEL
from gpugrad.kernels.cuda.gradient import (
    finite_pack,
    flat_norm,
    launch_measure,
    refuse_rows,
    times_pack,
    together,
    undone,
)
from gpugrad.kernels.cuda.language import (
    LANES,
    Elements,
    Int,
    Kernel,
    Longs,
    Number,
    Size,
    Values,
    cuda,
    device,
    kernel,
    lanes,
    pack_size,
    read_pack,
    thread,
    threads,
    write_pack,
)
from gpugrad.kernels.cuda.launch import Entry, machine, number_type, storage_of
from gpugrad.kernels.template import STORAGE, Placeholder, T, sqrt
from gpugrad.kernels.trace import formula_text, scalar_function, text_template
from gpugrad.ops.updates import RULES, Rule

__all__ = ["entries", "launch_update", "update_of"]

Array = Any

#: What a step may do about its gradient, added up: count elements that are not finite as 0; change
#: nothing if there are any; multiply by a factor.
CLEANS, SKIPS, SCALES = 1, 2, 4

#: What steps find out: see `gpugrad.optim.flat`.
SKIPPED, CLIPPED, FIRST, BAD = range(4)


def clip_ratio(m: Any, norm: Any, bound: Any) -> Any:
    """What a gradient of this norm is multiplied by: see `gpugrad.clip.scaling.ratio`."""
    return m.minimum(bound / (norm + 1e-6), 1.0)


ratio: Any = scalar_function(clip_ratio, "ratio")

# -- the step --------------------------------------------------------------------------------------


@device
def decide(
    sums: Any, marks: Any, count: Any, found: Any, norm: Any, coefficient: Any, new: Any,
    parts: Any, base: Any, mode: Any, bound: Any, scratch: Any,
) -> Any:  # fmt: skip
    """The factor of the gradient, whether nothing is to change, and the number of the step.

    After :func:`measure_kernel` they are computed from its parts, by every block, and the first
    block writes down what the step has found. Without parts they were computed before: they are
    `sums[0]`, `marks[0]` and `count[0]`.
    """
    if parts == 0:
        factor = sums[0] if mode & SCALES != 0 else T(1)
        skip = mode & SKIPS != 0 and marks[0] != 0
        return factor, skip, T(count[0])
    squares, scale, first = together(sums, marks, parts, scratch)
    size = undone(sqrt(squares), scale)
    factor = ratio(size, bound) if mode & SCALES != 0 else T(1)
    skip = mode & SKIPS != 0 and first >= 0
    # Blocks begin when they can: what the first one writes, none of them reads. The count of steps
    # is in `marks`, too.
    step = marks[2 * parts] + 1
    if cuda.blockIdx.x == 0 and cuda.threadIdx.x == 0:
        norm[0] = size
        if mode & SCALES != 0:
            coefficient[0] = factor
        new[SKIPPED] = found[SKIPPED] + (1 if skip else 0)
        new[CLIPPED] = found[CLIPPED] + (1 if factor < T(1) and not skip else 0)
        new[FIRST] = found[FIRST]
        if first >= 0 and found[BAD] == 0:
            new[FIRST] = first + base + 1
        new[BAD] = 1 if first >= 0 else 0
        if not skip:
            count[0] = step
    return factor, skip, T(step)


# -- the update ------------------------------------------------------------------------------------

rule_pack: Any = Placeholder("rule_pack")


@device
def used(d: Any, mode: Any, factor: Any) -> Any:
    """A pack of the gradient as the rule is to see it."""
    if mode & CLEANS != 0:
        d = finite_pack(d)
    return times_pack(d, factor)


@device
def item0(x: Any) -> Any:
    return x[0]


@device
def item1(x: Any) -> Any:
    return x[1]


@device
def item2(x: Any) -> Any:
    return x[2]


@device
def item3(x: Any) -> Any:
    return x[3]


# A rule with states gives a tuple for each element.
pack0 = lanes(item0, "x")
pack1 = lanes(item1, "x")
pack2 = lanes(item2, "x")
pack3 = lanes(item3, "x")


@device
def advance0(
    p: Any, g: Any, a: Any, b: Any, c: Any, i: Any, left: Any, aligned: Any, mode: Any,
    factor: Any, numbers: Any,
) -> None:  # fmt: skip
    """One pack from element `i` on, by a rule without states."""
    x, d = read_pack(p, i, left, aligned), read_pack(g, i, left, aligned)
    write_pack(p, i, rule_pack(x, used(d, mode, factor), numbers), left, aligned)


@device
def advance1(
    p: Any, g: Any, a: Any, b: Any, c: Any, i: Any, left: Any, aligned: Any, mode: Any,
    factor: Any, numbers: Any,
) -> None:  # fmt: skip
    """By a rule with one state."""
    x, d = read_pack(p, i, left, aligned), read_pack(g, i, left, aligned)
    s = read_pack(a, i, left, aligned)
    new = rule_pack(x, used(d, mode, factor), s, numbers)
    write_pack(p, i, pack0(new), left, aligned)
    write_pack(a, i, pack1(new), left, aligned)


@device
def advance2(
    p: Any, g: Any, a: Any, b: Any, c: Any, i: Any, left: Any, aligned: Any, mode: Any,
    factor: Any, numbers: Any,
) -> None:  # fmt: skip
    """By a rule with two states."""
    x, d = read_pack(p, i, left, aligned), read_pack(g, i, left, aligned)
    s, t = read_pack(a, i, left, aligned), read_pack(b, i, left, aligned)
    new = rule_pack(x, used(d, mode, factor), s, t, numbers)
    write_pack(p, i, pack0(new), left, aligned)
    write_pack(a, i, pack1(new), left, aligned)
    write_pack(b, i, pack2(new), left, aligned)


@device
def advance3(
    p: Any, g: Any, a: Any, b: Any, c: Any, i: Any, left: Any, aligned: Any, mode: Any,
    factor: Any, numbers: Any,
) -> None:  # fmt: skip
    """By a rule with three states."""
    x, d = read_pack(p, i, left, aligned), read_pack(g, i, left, aligned)
    s, t = read_pack(a, i, left, aligned), read_pack(b, i, left, aligned)
    u = read_pack(c, i, left, aligned)
    new = rule_pack(x, used(d, mode, factor), s, t, u, numbers)
    write_pack(p, i, pack0(new), left, aligned)
    write_pack(a, i, pack1(new), left, aligned)
    write_pack(b, i, pack2(new), left, aligned)
    write_pack(c, i, pack3(new), left, aligned)


_ADVANCE = (advance0, advance1, advance2, advance3)

advance: Any = Placeholder("advance")
made: Any = Placeholder("made")


@kernel
def update_kernel(
    p: Elements, g: Elements, a: Elements, b: Elements, c: Elements, sums: Values, marks: Longs,
    count: Longs, found: Longs, norm: Values, coefficient: Values, new: Longs, n: Size, parts: Int,
    base: Size, mode: Int, bound: Number, c0: Number, c1: Number, c2: Number, c3: Number,
    c4: Number, c5: Number, c6: Number, c7: Number, c8: Number, aligned: Int,
) -> None:  # fmt: skip
    """The update of `p` and of as many states as the rule has."""
    scratch = cuda.shared.array(32, T)
    factor, skip, step = decide(sums, marks, count, found, norm, coefficient, new, parts, base,
                                mode, bound, scratch)  # fmt: skip
    numbers = made(step, c0, c1, c2, c3, c4, c5, c6, c7, c8)
    i = n if skip else thread() * LANES
    while i < n:
        advance(p, g, a, b, c, i, n - i, aligned, mode, factor, numbers)
        i += threads() * LANES


#: Numbers that a rule takes at most, and states that it keeps.
NUMBERS, STATES = 9, 3


def numbers_of(row: Rule) -> list[str]:
    """The names of a rule's numbers, in the order in which the kernel takes them."""
    return list(dict.fromkeys((*row.prepares, *row.numbers)))


@cache
def update_of(name: str, flags: tuple[bool, ...]) -> Kernel:
    """The kernel of one variant of an update rule."""
    row = RULES[name]
    given = dict(zip(row.flags, flags))
    kept = row.kept(given)
    variant = "_".join((name, *(flag for flag, on in given.items() if on)))
    numbers = (*row.made, *row.numbers)
    fixed = {**given, **dict.fromkeys(set(row.states) - set(kept))}
    text = formula_text(row.update, variant, arguments=["p", "g", *kept, *numbers], fixed=fixed)
    # The numbers come as a tuple, which has one place among the arguments whatever the rule.
    _, _, body = text.partition("\n")
    head = f"def {variant}({', '.join(('p', 'g', *kept))}, numbers):"
    scalar = text_template(f"{head}\n    {', '.join(numbers)} = numbers\n{body}", variant)
    rule = lanes(scalar, (2 + len(kept)) * "x" + ".")
    step = _ADVANCE[len(kept)].bind(rule_pack=rule)
    return update_kernel.bind(advance=step, made=_made(name)).named(f"update_{variant}")


@cache
def _made(name: str) -> Any:
    """From the step's number and a kernel's numbers to those that the rule takes."""
    row = RULES[name]

    def whole(m: Any, step: Any, **given: Any) -> Any:
        made = row.prepare(m, step, *(given[a] for a in row.prepares)) if row.prepare else ()
        return (*made, *(given[a] for a in row.numbers))

    takes = ["step", *numbers_of(row)]
    parameters = [inspect.Parameter(a, inspect.Parameter.KEYWORD_ONLY) for a in ("m", *takes)]
    whole.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spare = [f"unused{i}" for i in range(1 + NUMBERS - len(takes))]
    return scalar_function(whole, f"{name}_made", arguments=[*takes, *spare])


# -- launching -------------------------------------------------------------------------------------


def launch_update(
    p: Array,
    g: Array,
    states: Sequence[Array],
    told: Sequence[Array],
    *,
    parts: int,
    base: int,
    mode: int,
    bound: float,
    rule: str,
    flags: Mapping[str, bool],
    numbers: Mapping[str, float],
) -> None:
    """The second launch: the update of a parameter and its states, in place.

    Parameters
    ----------
    told:
        The arrays from `sums` to `new` of :func:`decide`.
    parts, base, mode, bound:
        As there.
    """
    gpu, storage = machine(p), storage_of(p)
    row = RULES[rule]
    given = [numbers[name] for name in numbers_of(row)]
    # Each block begins by reading all parts: there are as many blocks as parts, and not as many as
    # would fill the GPU several times. Where a rule has no state, the kernel looks at nothing.
    gpu.run(
        update_of(rule, tuple(flags[name] for name in row.flags))[storage],
        gpu.divided(p.size, pack_size(storage)),
        p, g, *states, *[g] * (STATES - len(states)), *told, p.size, parts, base, mode, bound,
        *given, *[0.0] * (NUMBERS - len(given)), gpu.aligned(p, g, *states),
    )  # fmt: skip


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
    """One step of an update rule, in place; `factor` and `skip` stay on the device."""
    mode = CLEANS if finite_only else 0
    factors, skips = g, count  # not looked at
    if factor is not None:
        mode |= SCALES
        factors = factor.astype(number_type(storage_of(p)), copy=False)
    if skip is not None:
        mode |= SKIPS
        skips = skip.astype(np.int64)
    told = (factors, skips, count, count, g, g, count)
    launch_update(
        p, g, states, told, parts=0, base=0, mode=mode, bound=0.0, rule=rule, flags=flags,
        numbers=numbers,
    )  # fmt: skip
    return (p, *states)


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
) -> tuple[Array, Array | None, Array]:
    """The common step, in two launches: norm, coefficient, and what the steps have found out."""
    gpu = machine(p)
    number = number_type(storage_of(p))
    clean = nonfinite == "zero"
    mode = (CLEANS if clean else 0) | (SKIPS if nonfinite == "skip" else 0)
    norm, new = gpu.empty((), number), gpu.empty(4, np.int64)
    coefficient = None
    if bound != np.inf:
        mode |= SCALES
        coefficient = gpu.empty((), number)
    sums, marks, parts = launch_measure(g, count, clean=clean)
    told = (sums, marks, count, found, norm, sums if coefficient is None else coefficient, new)
    launch_update(
        p, g, states, told, parts=parts, base=base, mode=mode, bound=bound, rule=rule, flags=flags,
        numbers=numbers,
    )  # fmt: skip
    return norm, coefficient, new


def _refuse_step(
    m: Backend, *arrays: Any, count: Any, found: Any = None, **options: Any
) -> str | None:
    for x in (count,) if found is None else (count, found):
        if x.dtype != np.int64:
            return f"counts of {x.dtype}"
    return refuse_rows(m, *arrays)


#: For the slots of the backend.
KERNELS = {
    "flat_norm": Implementation(flat_norm, LABEL, refuse_rows),
    "flat_update": Implementation(flat_update, LABEL, _refuse_step),
    "flat_step": Implementation(flat_step, LABEL, _refuse_step),
}

#: Rules that ship for other storages than float32, too.
COMMON = ("sgd", "adam")


def variants(name: str) -> Iterator[tuple[bool, ...]]:
    """The flags that make sense for a rule."""
    flags = RULES[name].flags
    for number in range(1 << len(flags)):
        given = tuple(bool(number >> i & 1) for i in range(len(flags)))
        on = dict(zip(flags, given))
        if not on.get("nesterov") or on["moves"]:
            yield given


def entries() -> Iterator[Entry]:
    """All that ships."""
    for storage in STORAGE:
        for name in RULES if storage == "float32" else COMMON:
            for flags in variants(name):
                yield update_of(name, flags)[storage]
