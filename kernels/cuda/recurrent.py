"""What follows the product of one step of a recurrent layer, forward and back, in one launch.

A thread has one unit of one sequence: it reads what the unit's gates are given, and writes the
gates and the new state. Neighbours in memory are neighbours in the grid.

Layers of two-byte floats are computed in float32; nothing else comes here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel as Implementation
from gpugrad.kernels.cuda.elementwise import LABEL, in_a_row, refuse_arrays
from gpugrad.kernels.cuda.language import (
    Elements,
    Int,
    Kernel,
    Size,
    device,
    kernel,
    thread,
    threads,
)
from gpugrad.kernels.cuda.launch import Entry, machine, storage_of
from gpugrad.kernels.formula import formula
from gpugrad.kernels.template import Placeholder, read, write
from gpugrad.kernels.trace import scalar_function
from gpugrad.ops import cells

Array = Any

#: What layers are computed in.
STORAGES = ("float32", "float64")

#: The last function of a plain layer's step.
NONLINEARITIES = ("tanh", "relu")

cell: Any = Placeholder("cell")
partial: Any = Placeholder("partial")


@device
def sum_of(a: Any, b: Any, c: Any, i: Any, count: Any) -> Any:
    """The sum of element `i` of the first `count` of three arrays."""
    total = read(a, i)
    if count > 1:
        total += read(b, i)
    if count > 2:
        total += read(c, i)
    return total


@device
def both(p: Any, q: Any, i: Any) -> Any:
    """The shares of the input and of the hidden state."""
    return read(p, i) + read(q, i)


# -- the plain one --------------------------------------------------------------------------------


@kernel
def rnn_step_kernel(p: Elements, q: Elements, hidden: Elements, count: Size) -> None:
    """hidden = cell(p + q)."""
    e = thread()
    while e < count:
        write(hidden, e, cell(both(p, q, e)))
        e += threads()


@kernel
def rnn_step_backward_kernel(
    after: Elements, a: Elements, b: Elements, g: Elements, summands: Int, count: Size
) -> None:
    """g = partial(a + b, after)."""
    e = thread()
    while e < count:
        write(g, e, partial(sum_of(a, b, b, e, summands), read(after, e)))
        e += threads()


# -- LSTM -----------------------------------------------------------------------------------------


@kernel
def lstm_step_kernel(
    p: Elements, q: Elements, before: Elements, gates: Elements, after: Elements, hidden: Elements,
    n: Size, count: Size,
) -> None:  # fmt: skip
    """Gates, cell state and hidden state; a row of gates is four of `n`."""
    e = thread()
    while e < count:
        j = e + e // n * 3 * n
        i, f, g, o, c, h = cell(
            both(p, q, j), both(p, q, j + n), both(p, q, j + 2 * n), both(p, q, j + 3 * n),
            read(before, e),
        )  # fmt: skip
        write(gates, j, i)
        write(gates, j + n, f)
        write(gates, j + 2 * n, g)
        write(gates, j + 3 * n, o)
        write(after, e, c)
        write(hidden, e, h)
        e += threads()


@kernel
def lstm_step_backward_kernel(
    gates: Elements, a: Elements, b: Elements, gc: Elements, before: Elements, after: Elements,
    g: Elements, g_before: Elements, summands: Int, n: Size, count: Size,
) -> None:  # fmt: skip
    """Gradients of what the gates were given, and of the cell state before the step."""
    e = thread()
    while e < count:
        j = e + e // n * 3 * n
        gi, gf, gg, go, c = partial(
            sum_of(a, b, b, e, summands), read(gc, e), read(gates, j), read(gates, j + n),
            read(gates, j + 2 * n), read(gates, j + 3 * n), read(before, e), read(after, e),
        )  # fmt: skip
        write(g, j, gi)
        write(g, j + n, gf)
        write(g, j + 2 * n, gg)
        write(g, j + 3 * n, go)
        write(g_before, e, c)
        e += threads()


# -- GRU ------------------------------------------------------------------------------------------


@kernel
def gru_step_kernel(
    p: Elements, q: Elements, before: Elements, gates: Elements, hidden: Elements, n: Size,
    count: Size,
) -> None:  # fmt: skip
    """Gates and hidden state; a row of shares is three of `n`, a row of gates four."""
    e = thread()
    while e < count:
        row = e // n
        i = e + row * 2 * n
        j = e + row * 3 * n
        r, z, a, b, h = cell(
            both(p, q, i), both(p, q, i + n), read(p, i + 2 * n), read(q, i + 2 * n),
            read(before, e),
        )  # fmt: skip
        write(gates, j, r)
        write(gates, j + n, z)
        write(gates, j + 2 * n, a)
        write(gates, j + 3 * n, b)
        write(hidden, e, h)
        e += threads()


@kernel
def gru_step_backward_kernel(
    gates: Elements, a: Elements, b: Elements, c: Elements, before: Elements, gp: Elements,
    gq: Elements, gh: Elements, summands: Int, n: Size, count: Size,
) -> None:  # fmt: skip
    """Gradients of both shares, and of the hidden state where it is no part of a share."""
    e = thread()
    while e < count:
        row = e // n
        i = e + row * 2 * n
        j = e + row * 3 * n
        gr, gz, gn, gm, g = partial(
            sum_of(a, b, c, e, summands), read(gates, j), read(gates, j + n),
            read(gates, j + 2 * n), read(gates, j + 3 * n), read(before, e),
        )  # fmt: skip
        write(gp, i, gr)
        write(gp, i + n, gz)
        write(gp, i + 2 * n, gn)
        write(gq, i, gr)
        write(gq, i + n, gz)
        write(gq, i + 2 * n, gm)
        write(gh, e, g)
        e += threads()


# -- launching ------------------------------------------------------------------------------------

_STEPS = {
    "lstm": (lstm_step_kernel, lstm_step_backward_kernel),
    "gru": (gru_step_kernel, gru_step_backward_kernel),
}


@cache
def step_kernel(kind: str) -> Kernel:
    """The forward of a step; that of a plain layer goes by the name of its nonlinearity."""
    if kind in _STEPS:
        scalar = scalar_function(getattr(cells, kind), f"{kind}_cell")
        return _STEPS[kind][0].bind(cell=scalar).named(f"{kind}_step")
    return rnn_step_kernel.bind(cell=formula(kind).plain).named(f"rnn_step_{kind}")


@cache
def step_backward_kernel(kind: str) -> Kernel:
    """The backward of a step."""
    if kind in _STEPS:
        slope = getattr(cells, f"{kind}_partial")
        scalar = scalar_function(slope, f"{kind}_cell_partial", fixed={"direct": None})
        return _STEPS[kind][1].bind(partial=scalar).named(f"{kind}_step_backward")
    scalar = formula(f"{kind}_partial").plain
    return rnn_step_backward_kernel.bind(partial=scalar).named(f"rnn_step_{kind}_backward")


def _launch(made: Kernel, like: Array, *args: Any) -> None:
    """Run a kernel with a thread for each element of `like`."""
    if like.size:
        gpu = machine(like)
        gpu.run(made[storage_of(like)], gpu.flat(like.size, 1), *args, like.size)


def _made(like: Array, columns: int) -> Array:
    """A result with as many rows."""
    return machine(like).empty((like.shape[0], columns), like.dtype)


def _summands(*arrays: Any) -> tuple[list[Array], int]:
    """Arrays that there may be, the last as often as is left, and how many there are."""
    found = [in_a_row(x) for x in arrays if x is not None]
    return found + found[-1:] * (len(arrays) - len(found)), len(found)


def rnn_step(m: Backend, p: Array, q: Array, nonlinearity: str) -> Array:
    """The hidden state after a step."""
    p, q = in_a_row(p), in_a_row(q)
    hidden = _made(q, q.shape[1])
    _launch(step_kernel(nonlinearity), hidden, p, q, hidden)
    return hidden


def rnn_step_backward(m: Backend, after: Array, gh: Any, go: Any, nonlinearity: str) -> Array:
    """The gradient of both shares."""
    after, (given, count) = in_a_row(after), _summands(gh, go)
    g = _made(after, after.shape[1])
    _launch(step_backward_kernel(nonlinearity), g, after, *given, g, count)
    return g


def lstm_step(m: Backend, p: Array, q: Array, before: Array) -> tuple[Array, ...]:
    """Gates, cell state and hidden state after a step."""
    p, q, before = in_a_row(p), in_a_row(q), in_a_row(before)
    n = before.shape[1]
    gates, after, hidden = _made(p, 4 * n), _made(p, n), _made(p, n)
    _launch(step_kernel("lstm"), hidden, p, q, before, gates, after, hidden, n)
    return gates, after, hidden


def lstm_step_backward(
    m: Backend, gates: Array, gh: Array, go: Any, gc: Array, before: Array, after: Array,
    direct: Any = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Gradients of what the gates were given, and of the cell state before the step."""
    gates, gc, before, after = map(in_a_row, (gates, gc, before, after))
    (given, count), n = _summands(gh, go), after.shape[1]
    g, g_before = _made(gates, 4 * n), _made(gates, n)
    _launch(
        step_backward_kernel("lstm"), after, gates, *given, gc, before, after, g, g_before, count, n
    )
    return g, g_before


def gru_step(m: Backend, p: Array, q: Array, before: Array) -> tuple[Array, Array]:
    """Gates and hidden state after a step."""
    p, q, before = in_a_row(p), in_a_row(q), in_a_row(before)
    n = before.shape[1]
    gates, hidden = _made(p, 4 * n), _made(p, n)
    _launch(step_kernel("gru"), hidden, p, q, before, gates, hidden, n)
    return gates, hidden


def gru_step_backward(
    m: Backend, gates: Array, gh: Array, through: Any, go: Any, before: Array, direct: Any = None
) -> tuple[Array, Array, Array]:
    """Gradients of both shares, and of the state before the step where it is no part of a share."""
    gates, before = in_a_row(gates), in_a_row(before)
    (given, count), n = _summands(gh, through, go), before.shape[1]
    gp, gq, g_before = _made(gates, 3 * n), _made(gates, 3 * n), _made(gates, n)
    _launch(step_backward_kernel("gru"), before, gates, *given, before, gp, gq, g_before, count, n)
    return gp, gq, g_before


# -- the slots ------------------------------------------------------------------------------------


def _refuse(*arrays: Any) -> str | None:
    given = [x for x in arrays if x is not None]
    if why := refuse_arrays(*given):
        return why
    storage = storage_of(given[0])
    return None if storage in STORAGES else f"steps are not computed in {storage}"


def _refuse_rnn(m: Backend, *args: Any, nonlinearity: str = "tanh") -> str | None:
    *arrays, nonlinearity = args if isinstance(args[-1], str) else (*args, nonlinearity)
    if nonlinearity not in NONLINEARITIES:
        return f"no kernel for {nonlinearity!r}"
    return _refuse(*arrays)


def _refuse_step(m: Backend, *arrays: Any) -> str | None:
    return _refuse(*arrays)


def _refuse_backward(m: Backend, *arrays: Any) -> str | None:
    *operands, direct = arrays
    if direct is not None:
        return "gradients that come by the gates of single steps"
    return _refuse(*operands)


#: For the slots of the backend.
KERNELS = {
    "rnn_step": Implementation(rnn_step, LABEL, _refuse_rnn),
    "rnn_step_backward": Implementation(rnn_step_backward, LABEL, _refuse_rnn),
    "lstm_step": Implementation(lstm_step, LABEL, _refuse_step),
    "lstm_step_backward": Implementation(lstm_step_backward, LABEL, _refuse_backward),
    "gru_step": Implementation(gru_step, LABEL, _refuse_step),
    "gru_step_backward": Implementation(gru_step_backward, LABEL, _refuse_backward),
}


def entries() -> Iterator[Entry]:
    """All that ships."""
    for storage in STORAGES:
        for kind in (*_STEPS, *NONLINEARITIES):
            yield step_kernel(kind)[storage]
            yield step_backward_kernel(kind)[storage]
