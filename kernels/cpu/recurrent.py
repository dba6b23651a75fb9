"""A recurrent layer over a whole sequence: the walk through time, forward and back, in one kernel.

The input meets its weights in one product for all steps beforehand, and the gradients of the
weights are one product each afterwards. What is left goes step by step. The batch is divided among
the threads once, for sequences know nothing of each other: no thread waits for another inside the
walk. The recurrent weights are packed once for all steps; what a step's product gives is added to
what lies in the place of the gates, and turned into gates there.

How the batch is divided changes no bit of the result (see `kernels/cpu/microkernel.py`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import prange

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.backend.scratch import empty
from gpugrad.backend.tape import call, replayable, zeros
from gpugrad.kernels.cpu import pool
from gpugrad.kernels.cpu.compile import CpuTemplate, copied, numpy_storage, parallel, serial
from gpugrad.kernels.cpu.direct import DEPTH, LARGEST, STRIP, direct
from gpugrad.kernels.cpu.elementwise import LABEL
from gpugrad.kernels.cpu.gemm import GRAIN
from gpugrad.kernels.cpu.memory import address, size_of
from gpugrad.kernels.cpu.microkernel import pack, packed_shape, panel, product
from gpugrad.kernels.cpu.products import matmul
from gpugrad.kernels.formula import formula
from gpugrad.kernels.template import Placeholder, T
from gpugrad.kernels.trace import scalar_function
from gpugrad.ops import cells

Array = np.ndarray[Any, Any]

#: Rows of a matrix that are packed at a time.
BLOCK = 16

cell: Any = Placeholder("cell")
partial: Any = Placeholder("partial")
forward_row: Any = Placeholder("forward_row")
backward_row: Any = Placeholder("backward_row")


# -- one sequence, one step -----------------------------------------------------------------------
# The arguments are those of all three layers, so that one walk does for all: `z` is what the gates
# are given and then the gates, `hidden` and `state` are from before the step, `h` and `c` from
# after it.


@serial
def _lstm_row(z, bias, hidden, state, h, c):
    n = h.size
    for j in range(n):
        i, f, g, o, c_, h_ = cell(
            z[j] + bias[j], z[n + j] + bias[n + j], z[2 * n + j] + bias[2 * n + j],
            z[3 * n + j] + bias[3 * n + j], state[j],
        )  # fmt: skip
        z[j] = i
        z[n + j] = f
        z[2 * n + j] = g
        z[3 * n + j] = o
        c[j] = c_
        h[j] = h_


@serial
def _gru_row(z, bias, hidden, state, h, c):
    n = h.size
    for j in range(n):
        r, u, a, q, h_ = cell(
            z[j] + bias[j], z[n + j] + bias[n + j], z[2 * n + j] + bias[2 * n + j],
            z[3 * n + j] + bias[3 * n + j], hidden[j],
        )  # fmt: skip
        z[j] = r
        z[n + j] = u
        z[2 * n + j] = a
        z[3 * n + j] = q
        h[j] = h_


@serial
def _rnn_row(z, bias, hidden, state, h, c):  # the gate is the hidden state
    for j in range(z.size):
        z[j] = cell(z[j] + bias[j])


@serial
def _lstm_row_backward(gates, g, gh, gc, before, after, gp, gq, total):
    n = gh.size
    for j in range(n):
        i, f, a, o, c_ = partial(
            gh[j] + g[j], gc[j], gates[j], gates[n + j], gates[2 * n + j], gates[3 * n + j],
            before[j], after[j],
        )  # fmt: skip
        gp[j] = i
        gp[n + j] = f
        gp[2 * n + j] = a
        gp[3 * n + j] = o
        gc[j] = c_
    _add(total, gp)


@serial
def _gru_row_backward(gates, g, gh, gc, before, after, gp, gq, total):
    n = gh.size
    for j in range(n):
        r, u, a, q, h_ = partial(
            gh[j] + g[j], gates[j], gates[n + j], gates[2 * n + j], gates[3 * n + j], before[j]
        )
        gp[j] = r
        gp[n + j] = u
        gp[2 * n + j] = a
        gq[j] = r
        gq[n + j] = u
        gq[2 * n + j] = q
        gh[j] = h_
    _add(total[: 3 * n], gp)
    _add(total[3 * n :], gq[2 * n :])


@serial
def _rnn_row_backward(gates, g, gh, gc, before, after, gp, gq, total):
    for j in range(gh.size):
        gp[j] = partial(gh[j] + g[j], after[j])
    _add(total, gp)


@serial
def _add(total, x):
    for j in range(total.size):
        total[j] += x[j]


# -- the walks ------------------------------------------------------------------------------------


@serial
def _forward_part(
    x, packed_x, z, bias, packed, apart, h0, c0, begun, output, states, reverse, low, high
):  # fmt: skip
    """All steps of the sequences from `low` to `high`.

    The input has no share in the last `apart` columns of `z`, and the hidden state none in as many
    before them. Without `begun`, `h0` is zero.
    """
    steps, _, columns = z.shape
    features, n, width = x.shape[2], output.shape[2], packed.shape[2]
    strides = (0, width, n * width)
    shared = columns - 2 * apart
    panels = (shared + width - 1) // width
    for s in range(steps):
        t = steps - 1 - s if reverse else s
        hidden, state = h0, c0
        if s > 0:
            before = t + 1 if reverse else t - 1
            hidden, state = output[before], states[before]
        now, to = z[t], output[t]
        depth = n if s > 0 or begun else 0
        product(
            high - low, columns - apart, 1, features, x[t, low:].ctypes.data, (features, 0, 1),
            packed_x.ctypes.data, (0, width, features * width), now[low:].ctypes.data, columns,
            False,
        )  # fmt: skip
        product(
            high - low, shared, 1, depth, hidden[low:].ctypes.data, (n, 0, 1), packed.ctypes.data,
            strides, now[low:].ctypes.data, columns, True,
        )  # fmt: skip
        product(
            high - low, apart, 1, depth, hidden[low:].ctypes.data, (n, 0, 1),
            packed[panels:].ctypes.data, strides, now[low:, columns - apart :].ctypes.data,
            columns, False,
        )  # fmt: skip
        for i in range(low, high):
            forward_row(now[i], bias, hidden[i], state[i], to[i], states[t, i])


@parallel
def _forward(x, packed_x, z, bias, packed, apart, h0, c0, begun, output, states, reverse, parts):
    batch = z.shape[1]
    for part in prange(parts):
        _forward_part(
            x, packed_x, z, bias, packed, apart, h0, c0, begun, output, states, reverse,
            batch * part // parts, batch * (part + 1) // parts,
        )  # fmt: skip


@serial
def _backward_part(
    gates, g, first, states, packed, gh, gc, gp, gq, totals, accumulate, begun, reverse, low, high
):  # fmt: skip
    """All steps of the sequences from `low` to `high`, the last to be computed first.

    `g` holds the gradient of the output, of every step or of none (zeros, once). Without `begun`,
    nobody asks for the gradient of the hidden state before the first step.
    """
    steps = gates.shape[0]
    columns, n, width = gq.shape[2], gh.shape[1], packed.shape[2]
    for s in range(steps - 1, -1, -1):
        t = steps - 1 - s if reverse else s
        before = first
        if s > 0:
            before = states[t + 1] if reverse else states[t - 1]
        given, after, now, to, of = g[t % g.shape[0]], states[t], gates[t], gp[t], gq[t]
        for i in range(low, high):
            backward_row(
                now[i], given[i], gh[i], gc[i], before[i], after[i], to[i], of[i], totals[i]
            )
        if s > 0 or begun:
            product(
                high - low, n, 1, columns, of[low:].ctypes.data, (columns, 0, 1),
                packed.ctypes.data, (0, width, columns * width), gh[low:].ctypes.data, n,
                accumulate,
            )  # fmt: skip


@parallel
def _backward(
    gates, g, first, states, packed, gh, gc, gp, gq, totals, accumulate, begun, reverse, parts
):  # fmt: skip
    batch = gates.shape[1]
    for part in prange(parts):
        _backward_part(
            gates, g, first, states, packed, gh, gc, gp, gq, totals, accumulate, begun, reverse,
            batch * part // parts, batch * (part + 1) // parts,
        )  # fmt: skip


@parallel
def _pack(b, packed, parts):
    """The work is divided so that each part of it reads memory from one end to the other."""
    rows, width, panels = b.shape[0], packed.shape[2], packed.shape[0]
    if b.strides[0] < b.strides[1]:
        for part in prange(parts):
            low, high = panels * part // parts, panels * (part + 1) // parts
            pack(b[:, low * width : high * width], packed[low:high])
    else:
        for block in prange((rows + BLOCK - 1) // BLOCK):
            low = block * BLOCK
            pack(b[low : low + BLOCK], packed[:, low : low + BLOCK])


@serial
def _weights_strip(
    gp, gq, x, before, one, other, rows, later, columns, inputs, hidden, accumulate, low, high
):  # fmt: skip
    """Rows from `low` to `high` of both weights' gradients."""
    size, count = size_of(T(0)), high - low
    direct(count, inputs, rows, gp + low * size, 1, columns, x, inputs, panel(),
           one + low * inputs * size, inputs, accumulate)  # fmt: skip
    direct(count, hidden, later, gq + low * size, 1, columns, before, hidden, panel(),
           other + low * hidden * size, hidden, accumulate)  # fmt: skip


@parallel
def _weights(
    gp, gq, x, before, one, other, rows, later, columns, inputs, hidden, accumulate, parts
):  # fmt: skip
    """one (+)= gpᵀ·x over `rows` rows, and other (+)= gqᵀ·before over `later` of them."""
    strips = ((columns + STRIP - 1) // STRIP + parts - 1) // parts * parts
    for strip in prange(strips):
        _weights_strip(
            gp, gq, x, before, one, other, rows, later, columns, inputs, hidden, accumulate,
            columns * strip // strips, columns * (strip + 1) // strips,
        )  # fmt: skip


@serial
def _add_rows(x, out):
    total = np.zeros(x.shape[1])
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            total[j] += np.float64(x[i, j])
    for j in range(x.shape[1]):
        out[j] = T(total[j])


# -- launching ------------------------------------------------------------------------------------

_CELLS = {"lstm": (_lstm_row, _lstm_row_backward), "gru": (_gru_row, _gru_row_backward)}


@cache
def _loops(kind: str) -> tuple[CpuTemplate, CpuTemplate]:
    """Both walks of a cell; that of a plain layer goes by the name of its nonlinearity."""
    if kind in _CELLS:
        rows = _CELLS[kind]
        value = scalar_function(getattr(cells, kind), f"{kind}_cell")
        slope = scalar_function(
            getattr(cells, f"{kind}_partial"), f"{kind}_cell_partial", fixed={"direct": None}
        )
    else:
        rows = _rnn_row, _rnn_row_backward
        value, slope = formula(kind).plain, formula(f"{kind}_partial").plain
    return (
        _forward.bind(_forward_part=_forward_part.bind(forward_row=rows[0].bind(cell=value))),
        _backward.bind(
            _backward_part=_backward_part.bind(backward_row=rows[1].bind(partial=slope))
        ),
    )


def _contiguous(storage: str, *arrays: Any) -> list[Any]:
    """The arrays as kernels take them: elements in a row, two-byte floats in float32.

    Those that lie in memory otherwise, or are read-only, would be compiled for anew.
    """
    return [x if x is None or _fits(storage, x) else copied(x, storage) for x in arrays]


def _fits(storage: str, x: Array) -> bool:
    flags = x.flags
    return x.dtype == storage and flags.c_contiguous and flags.aligned and flags.writeable


def _packed(storage: str, *parts: Array) -> Array:
    """Matrices of equally many rows, packed one behind the other."""
    shapes = [packed_shape(b.shape[0], b.shape[1], b.dtype) for b in parts]
    out = empty((sum(s[0] for s in shapes), *shapes[0][1:]), parts[0].dtype)
    first = 0
    for b, (panels, *_) in zip(parts, shapes):
        _pack[storage](b, out[first : first + panels], min(panels, pool.get_num_threads()))
        first += panels
    return out


def _parts(batch: int, work: int) -> int:
    """How many threads share so many sequences: each goes through all the weights at every step."""
    return max(1, min(pool.get_num_threads(), batch // 4, work // GRAIN))


def _narrow(dtype: Any, *arrays: Array) -> tuple[Array, ...]:
    return tuple(y if y.dtype == dtype else copied(y, dtype) for y in arrays)


def _added(storage: str, rows: int, *biases: Array | None) -> Array:
    """The sum of the biases that there are."""
    total = np.empty(rows, storage)
    call(_add_biases, total, *(bias for bias in biases if bias is not None))
    return total


def _add_biases(total: Array, *biases: Array) -> None:
    total[...] = 0
    for bias in biases:
        total += bias


def _walk(
    kind: str, storage: str, x: Array, weight_ih: Array, z: Array, bias: Array, packed: Array,
    apart: int, h0: Any, c0: Any, output: Array, states: Array, reverse: bool,
) -> None:  # fmt: skip
    """The forward of a layer."""
    begun = h0 is not None
    h0, c0 = (np.zeros(output.shape[1:], storage) if s is None else s for s in (h0, c0))
    _loops(kind)[0][storage](
        x, _packed(storage, weight_ih.T), z, bias, packed, apart, h0, c0, begun, output, states,
        reverse, _parts(x.shape[1], z.size * (x.shape[2] + output.shape[2])),
    )  # fmt: skip


def _storage(x: Array) -> str:
    return "float64" if x.dtype == np.float64 else "float32"


@replayable
def rnn_layer(
    m: Backend, x: Array, weight_ih: Array, weight_hh: Array, bias_ih: Any = None,
    bias_hh: Any = None, h0: Any = None, nonlinearity: str = "tanh", reverse: bool = False,
) -> tuple[Array, ...]:  # fmt: skip
    """The forward of a plain layer."""
    storage, dtype = _storage(x), x.dtype
    x, weight_ih, weight_hh, bias_ih, bias_hh, h0 = _contiguous(
        storage, x, weight_ih, weight_hh, bias_ih, bias_hh, h0
    )
    (steps, batch, _), n = x.shape, weight_hh.shape[0]
    output = empty((steps, batch, n), storage)
    _walk(
        nonlinearity, storage, x, weight_ih, output, _added(storage, n, bias_ih, bias_hh),
        _packed(storage, weight_hh.T), 0, h0, None, output, output, reverse,
    )  # fmt: skip
    return _narrow(dtype, output, copied(output[0 if reverse else -1]))


@replayable
def lstm_layer(
    m: Backend, x: Array, weight_ih: Array, weight_hh: Array, bias_ih: Any = None,
    bias_hh: Any = None, h0: Any = None, c0: Any = None, reverse: bool = False,
) -> tuple[Array, ...]:  # fmt: skip
    """The forward of a layer of long short-term memory."""
    storage, dtype = _storage(x), x.dtype
    x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0 = _contiguous(
        storage, x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0
    )
    (steps, batch, _), n = x.shape, weight_hh.shape[1]
    gates = empty((steps, batch, 4 * n), storage)
    output, states = (empty((steps, batch, n), storage) for _ in range(2))
    _walk(
        "lstm", storage, x, weight_ih, gates, _added(storage, 4 * n, bias_ih, bias_hh),
        _packed(storage, weight_hh.T), 0, h0, c0, output, states, reverse,
    )  # fmt: skip
    last = 0 if reverse else -1
    return _narrow(dtype, output, copied(output[last]), copied(states[last]), states, gates)


@replayable
def gru_layer(
    m: Backend, x: Array, weight_ih: Array, weight_hh: Array, bias_ih: Any = None,
    bias_hh: Any = None, h0: Any = None, reverse: bool = False,
) -> tuple[Array, ...]:  # fmt: skip
    """The forward of a layer of gated recurrent units."""
    storage, dtype = _storage(x), x.dtype
    x, weight_ih, weight_hh, bias_ih, bias_hh, h0 = _contiguous(
        storage, x, weight_ih, weight_hh, bias_ih, bias_hh, h0
    )
    (steps, batch, _), n = x.shape, weight_hh.shape[1]
    gates = empty((steps, batch, 4 * n), storage)
    output = empty((steps, batch, n), storage)
    bias = np.empty(4 * n, storage)
    call(_add_gru_biases, bias, n, bias_ih, bias_hh)
    w = weight_hh.T
    _walk(
        "gru", storage, x, weight_ih, gates, bias,
        _packed(storage, w[:, : 2 * n], w[:, 2 * n :]), n, h0, None, output, output, reverse,
    )  # fmt: skip
    return _narrow(dtype, output, copied(output[0 if reverse else -1]), gates)


def _add_gru_biases(total: Array, n: int, bias_ih: Any, bias_hh: Any) -> None:
    """The candidate's two biases do not meet."""
    total[...] = 0
    if bias_ih is not None:
        total[: 3 * n] = bias_ih
    if bias_hh is not None:
        total[: 2 * n] += bias_hh[: 2 * n]
        total[3 * n :] = bias_hh[2 * n :]


# Going back, gates have gradients as large as themselves. Nobody keeps them: some steps at a time,
# what they give the weights and the input is computed while they are in the cache.


def _gradients(
    kind: str, x: Array, weight_ih: Array, weight_hh: Array, h0: Any, first: Any, output: Array,
    states: Array, gates: Array, g_output: Any, gh: Any, gc: Any, reverse: bool, needs: Any,
    homes: tuple[Any, Any],
) -> tuple[Any, Any, Any, Array, Array, Array]:  # fmt: skip
    """Gradients of the input, of both weights, the sums of biases, and of the first states.

    `states` is what goes from step to step beside the product, and `first` what it began with. The
    sums of biases are taken over the steps of each sequence first: they do not depend on who
    computes which.
    """
    storage = _storage(x)
    arrays = (x, weight_ih, weight_hh, h0, first, output, states, gates, g_output, gh, gc)
    x, weight_ih, weight_hh, h0, first, output, states, gates, g_output, gh, gc = _contiguous(
        storage, *arrays
    )
    (steps, batch, inputs), (columns, n) = x.shape, weight_hh.shape
    begun = needs[5] or h0 is not None
    first = np.zeros((batch, n), storage) if first is None else first
    g_output = np.zeros((1, batch, n), storage) if g_output is None else g_output
    gh, gc = (zeros((batch, n), storage) if g is None else copied(g) for g in (gh, gc))
    totals, packed = zeros((batch, gates.shape[-1]), storage), _packed(storage, weight_hh)
    gx = empty(x.shape, storage) if needs[0] else None
    one, other = (
        _home(storage, (columns, size), home) if wanted else np.empty((0, 0), storage)
        for size, wanted, home in zip((inputs, n), needs[1:3], homes)
    )
    # As many rows as are added up together anyway, if the weights' gradients stay in the cache.
    together = one.nbytes + other.nbytes <= LARGEST
    length = min(steps, max(1, DEPTH // max(1, batch))) if together else steps
    gp = empty((length, batch, columns), storage)
    gq = empty(gp.shape, storage) if kind == "gru" else gp
    order = range(0, steps, length)
    for low in order if reverse else reversed(order):
        high = min(low + length, steps)
        ends = high == steps if reverse else low == 0  # with the step that was computed first
        before = first if ends else states[high if reverse else low - 1]
        given = g_output[low:high] if len(g_output) == steps else g_output
        _loops(kind)[1][storage](
            gates[low:high], given, before, states[low:high], packed, gh, gc, gp[: high - low],
            gq[: high - low], totals, kind == "gru", begun or not ends, reverse,
            _parts(batch, gp.size * n),
        )  # fmt: skip
        rows, later = (high - low) * batch, (high - low - ends) * batch
        flat = gp[: high - low].reshape(rows, columns)
        begin = int(ends and not reverse)
        hidden = output[low + 1 :] if reverse else output[max(low - 1, 0) :]
        if gx is not None:
            call(matmul, flat, weight_ih, gx[low:high].reshape(rows, inputs))
        if together:
            _weights[storage](
                address(gp), address(gq[begin:]), address(x[low:]), address(hidden), address(one),
                address(other), rows, later, columns, one.shape[1], other.shape[1],
                low > 0 if reverse else high < steps,
                _parts(columns, rows * columns * (one.shape[1] + other.shape[1])),
            )  # fmt: skip
            continue
        if needs[1]:
            call(matmul, flat.T, x.reshape(rows, inputs), one)
        if needs[2]:
            after, earlier = gq[begin : begin + steps - 1], hidden[: steps - 1]
            call(matmul, after.reshape(later, columns).T, earlier.reshape(later, n), other)
    if h0 is not None and needs[2]:
        call(_add_product, gq[high - low - 1 if reverse else 0].T, h0, other)
    total = np.empty(totals.shape[1], storage)
    call(_add_rows[storage], totals, total)
    return gx, one if needs[1] else None, other if needs[2] else None, total, gh, gc


def _add_product(a: Array, b: Array, out: Array) -> None:
    matmul(a, b, out, accumulate=True)


def _home(storage: str, shape: tuple[int, ...], home: Any) -> Array:
    """Where a gradient goes."""
    return empty(shape, storage) if home is None or not home.flags.c_contiguous else home


@replayable
def rnn_gradients(
    m: Backend, x: Array, weight_ih: Array, weight_hh: Array, h0: Any, output: Array, g: Any,
    nonlinearity: str, reverse: bool, needs: Any, *homes: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The backward of a plain layer."""
    g_output, g_hidden = g
    *found, total, gh, _ = _gradients(
        nonlinearity, x, weight_ih, weight_hh, h0, None, output, output, output, g_output,
        g_hidden, None, reverse, needs, homes,
    )  # fmt: skip
    gb = total if needs[3] or needs[4] else None
    return *found, gb, gb, gh


@replayable
def lstm_gradients(
    m: Backend, x: Array, weight_ih: Array, weight_hh: Array, h0: Any, c0: Any, output: Array,
    cell: Array, gates: Array, g: Any, reverse: bool, needs: Any, *homes: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The backward of a layer of long short-term memory."""
    g_output, g_hidden, g_cell, *_ = g
    *found, total, gh, gc = _gradients(
        "lstm", x, weight_ih, weight_hh, h0, c0, output, cell, gates, g_output, g_hidden, g_cell,
        reverse, needs, homes,
    )  # fmt: skip
    gb = total if needs[3] or needs[4] else None
    return *found, gb, gb, gh, gc


@replayable
def gru_gradients(
    m: Backend, x: Array, weight_ih: Array, weight_hh: Array, h0: Any, output: Array, gates: Array,
    g: Any, reverse: bool, needs: Any, *homes: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The backward of a layer of gated recurrent units."""
    g_output, g_hidden, _ = g
    *found, total, gh, _ = _gradients(
        "gru", x, weight_ih, weight_hh, h0, h0, output, output, gates, g_output, g_hidden, None,
        reverse, needs, homes,
    )  # fmt: skip
    if not (needs[3] or needs[4]):
        return *found, None, None, gh
    n = output.shape[2]
    other = np.empty(3 * n, total.dtype)
    call(np.concatenate, (total[: 2 * n], total[3 * n :]), 0, other)
    return *found, total[: 3 * n], other, gh


# -- the slots ------------------------------------------------------------------------------------


def _refuse_arrays(*arrays: Any) -> str | None:
    dtype = next(x.dtype for x in arrays if x is not None)
    for x in arrays:
        if x is None:
            continue
        if not isinstance(x, np.ndarray):
            return f"a {type(x).__name__} among the operands; kernels take arrays"
        if not numpy_storage(x.dtype) or x.dtype != dtype:
            return f"no kernel for {dtype} with {x.dtype}"
    return None


def _refuse_layer(
    m: Backend, x: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any = None, bias_hh: Any = None,
    *states: Any, reverse: bool = False, nonlinearity: str = "tanh",
) -> str | None:  # fmt: skip
    if why := _refuse_arrays(x, weight_ih, weight_hh, bias_ih, bias_hh, *states):
        return why
    if x.ndim != 3 or x.shape[0] == 0 or weight_hh.ndim != 2 or weight_hh.shape[1] == 0:
        return f"x of shape {x.shape} with weights of shape {weight_hh.shape}"
    rows, hidden = weight_hh.shape
    wanted = [(weight_ih, (rows, x.shape[2])), (bias_ih, (rows,)), (bias_hh, (rows,))]
    wanted += [(s, (x.shape[1], hidden)) for s in states]
    for value, shape in wanted:
        if value is not None and value.shape != shape:
            return f"an operand of shape {value.shape} where {shape} is expected"
    if nonlinearity not in ("tanh", "relu"):
        return f"no kernel for {nonlinearity!r}"
    return None


def _refuse_gates(gates: int) -> Any:
    """The refusal of a layer that has so many rows of weights for each unit."""

    def refuse(m: Backend, *operands: Any, **parameters: Any) -> str | None:
        if why := _refuse_layer(m, *operands, **parameters):
            return why
        rows, hidden = operands[2].shape
        return None if rows == gates * hidden else f"weights of shape {(rows, hidden)}"

    return refuse


def _refuse_gradients(m: Backend, *operands: Any) -> str | None:
    """Everything but the last four operands is arrays, or None, or several of them."""
    *arrays, _reverse, _needs, weight_ih_home, weight_hh_home = operands
    found = [weight_ih_home, weight_hh_home]
    for x in arrays:
        found += x if isinstance(x, tuple | list) else [] if isinstance(x, str) else [x]
    return _refuse_arrays(*found)


def _refuse_lstm_gradients(m: Backend, *operands: Any) -> str | None:
    *_, g_cells, g_gates = operands[8]
    if g_cells is not None or g_gates is not None:
        return "gradients that come by the cell states or the gates of single steps"
    return _refuse_gradients(m, *operands)


def _refuse_gru_gradients(m: Backend, *operands: Any) -> str | None:
    if operands[6][-1] is not None:
        return "gradients that come by the gates of single steps"
    return _refuse_gradients(m, *operands)


KERNELS = {
    "rnn_layer": Kernel(rnn_layer, LABEL, _refuse_gates(1)),
    "lstm_layer": Kernel(lstm_layer, LABEL, _refuse_gates(4)),
    "gru_layer": Kernel(gru_layer, LABEL, _refuse_gates(3)),
    "rnn_gradients": Kernel(rnn_gradients, LABEL, _refuse_gradients),
    "lstm_gradients": Kernel(lstm_gradients, LABEL, _refuse_lstm_gradients),
    "gru_gradients": Kernel(gru_gradients, LABEL, _refuse_gru_gradients),
}
