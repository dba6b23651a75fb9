"""One layer of a recurrent net in one direction, over all steps of a sequence.

The input meets its weights in one product for all steps, and so do, after the walk back through
time, the gradients of both weights. In between there is a product with the hidden state and the
formulas of the cell (:mod:`gpugrad.ops.cells`), step by step. A backend may have a kernel for a
whole layer, or only for what follows the product of one step.

All arrays of a layer have one dtype; two-byte floats are computed in float32.
"""

# A declared operation is known to return Any; what it returns is a tensor.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.backend.tape import replayable
from gpugrad.core.primitive import primitive, sample
from gpugrad.errors import ParameterError
from gpugrad.ops import cells
from gpugrad.ops.fused import ACTIVATIONS
from gpugrad.ops.samples import normal
from gpugrad.ops.sequences import (
    Gradients,
    bias_gradient,
    check_operands,
    first_state,
    in_order,
    joined,
    narrow,
    projected,
    split_gates,
    sum_of,
    weight_gradients,
    wide,
)

__all__ = ["gru_layer", "lstm_layer", "rnn_layer"]

#: What a plain recurrent layer may end a step with.
NONLINEARITIES = ("tanh", "relu")


# -- samples, and a reference ---------------------------------------------------------------------


def _samples(gates: int, states: int, **kinds: Any) -> list[Any]:
    """Layers with 3 features and 2 units."""
    x, w_ih, w_hh = normal((3, 2, 3), 0), normal((2 * gates, 3), 1), normal((2 * gates, 2), 2)
    biases = normal(2 * gates, 3), normal(2 * gates, 4)
    bare = (x, w_ih, w_hh)
    full = (*bare, *biases, *(normal((2, 2), 5 + k) for k in range(states)))
    one = (full[0][:1], *full[1:])
    empty = (full[0][:, :0], *full[1:5], *(h[:0] for h in full[5:]))
    return [
        sample(*full, **kinds),
        sample(*full, reverse=True, note="the last step first", **kinds),
        sample(*bare, **kinds, note="neither biases nor states"),
        sample(*one, **kinds, note="a single step"),
        sample(*empty, **kinds, note="an empty batch"),
    ]


def _numpy_walk(
    step: Callable[..., Any], x: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, states: list[Any],
    reverse: bool,
) -> list[Any]:  # fmt: skip
    """What the steps give, stacked; the reference. The hidden state is the first of the states."""
    x, w_ih, w_hh = (np.asarray(v) for v in (x, w_ih, w_hh))
    b_ih, b_hh = (0.0 if b is None else np.asarray(b) for b in (b_ih, b_hh))
    shape = (x.shape[1], w_hh.shape[1])
    states = [np.zeros(shape, x.dtype) if s is None else np.asarray(s) for s in states]
    found = []
    for xt in x[::-1] if reverse else x:
        *states, gates = step(xt @ w_ih.T + b_ih, states[0] @ w_hh.T + b_hh, *states)
        found.append((*states, gates))
    return [np.stack(y[::-1] if reverse else y) for y in map(list, zip(*found, strict=True))]


def _sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


# -- the plain one --------------------------------------------------------------------------------


@fusible
def rnn_step(m: Any, p: Any, q: Any, nonlinearity: str) -> Any:
    """The hidden state after a step: ``p`` is the input's share, ``q`` the hidden state's."""
    return ACTIVATIONS[nonlinearity].forward(m, p + q)


@fusible
def rnn_step_backward(m: Any, after: Any, gh: Any, go: Any, nonlinearity: str) -> Any:
    """The gradient of both shares.

    Of ``gh``, the hidden state's gradient by way of the next step, and ``go``, by way of the
    output, one may be None.
    """
    return ACTIVATIONS[nonlinearity].partial(m, sum_of(gh, go), after)


@fusible
def rnn_backward(
    m: Any, output: Any, weight_hh: Any, g_output: Any, g_hidden: Any, nonlinearity: str,
    reverse: bool, biased: bool,
) -> Any:  # fmt: skip
    """The walk back: gradients of what was activated at all steps, the first state, and a bias."""
    gs = None if g_output is None else in_order(m, g_output, reverse)
    outputs = in_order(m, output, reverse)
    gh, found = g_hidden, []
    for t in range(len(outputs) - 1, -1, -1):
        go = None if gs is None else gs[t]
        found.append(rnn_step_backward(m, outputs[t], gh, go, nonlinearity))
        gh = m.matmul(found[-1], weight_hh)
    g = joined(m, found, not reverse)
    return g, gh, bias_gradient(m, g, biased)


@fusible
def rnn_gradients(
    m: Any, x: Any, weight_ih: Any, weight_hh: Any, h0: Any, output: Any, g: Any,
    nonlinearity: str, reverse: bool, needs: Any, weight_ih_home: Any, weight_hh_home: Any,
) -> Gradients:  # fmt: skip
    """Gradients of all operands of :func:`rnn_layer`; ``g`` holds those of its results."""
    given = (*g, nonlinearity, reverse, needs[3] or needs[4])
    gp, gh0, gb = rnn_backward(m, output, weight_hh, *given)
    found = weight_gradients(
        m, gp, gp, x, weight_ih, h0, output, reverse, needs, weight_ih_home, weight_hh_home
    )
    return *found, gb, gb, gh0


@replayable
def _rnn_vjp(
    m: Any, g: Any, x: Any, weight_ih: Any, weight_hh: Any, h0: Any, y: Any, nonlinearity: str,
    reverse: bool, needs: Any, weight_ih_home: Any, weight_hh_home: Any,
) -> Gradients:  # fmt: skip
    x, weight_ih, weight_hh, h0, output, *g = wide(m, x, weight_ih, weight_hh, h0, y[0], *g)
    return rnn_gradients(
        m, x, weight_ih, weight_hh, h0, output, g, nonlinearity, reverse, needs, weight_ih_home,
        weight_hh_home,
    )  # fmt: skip


def _numpy_rnn(
    x: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None, h0: Any = None,
    nonlinearity: str = "tanh", reverse: bool = False,
) -> Any:  # fmt: skip
    def step(p: Any, q: Any, hidden: Any) -> Any:
        after = np.tanh(p + q) if nonlinearity == "tanh" else np.maximum(p + q, 0.0)
        return after, after

    output, _ = _numpy_walk(step, x, w_ih, w_hh, b_ih, b_hh, [h0], reverse)
    return output, output[0 if reverse else -1]


@primitive(
    vjp=_rnn_vjp,
    outputs=2,
    samples=lambda: [
        *_samples(1, 1),
        *_samples(1, 1, nonlinearity="relu")[:2],
    ],
    reference=_numpy_rnn,
)
def rnn_layer(
    m: Backend,
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    /,
    nonlinearity: str = "tanh",
    reverse: bool = False,
) -> tuple[Array, Array]:
    """One recurrent layer (Elman, 1990) in one direction, over a whole sequence.

    The hidden state after a step is tanh(x·W_ihᵀ + b_ih + h·W_hhᵀ + b_hh), h being the state before
    it.

    Parameters
    ----------
    x:
        Shape (steps, batch, features), at least one step.
    weight_ih, weight_hh:
        Shapes (hidden, features) and (hidden, hidden).
    bias_ih, bias_hh:
        Shape (hidden,), or None.
    h0:
        The state before the first step, shape (batch, hidden); None stands for zeros.
    nonlinearity:
        ``"tanh"`` or ``"relu"``.
    reverse:
        Whether the last step is computed first.

    Returns
    -------
    The states after all steps, shape (steps, batch, hidden), and the one that was computed last,
    (batch, hidden). Raises ShapeError and DTypeError when operands do not fit together.

    >>> import gpugrad as gg
    >>> x, one = gg.ones((3, 1, 1)), gg.ones((1, 1))
    >>> output, last = gg.rnn_layer(x, one, one, nonlinearity="relu")
    >>> output.flatten(), last
    (tensor([1., 2., 3.]), tensor([[3.]]))
    """
    check_operands("rnn_layer", m, 1, x, weight_ih, weight_hh, bias_ih, bias_hh, h0=h0)
    if nonlinearity not in NONLINEARITIES:
        raise ParameterError(
            f"rnn_layer: nonlinearity={nonlinearity!r}; it is one of {', '.join(NONLINEARITIES)}"
        )
    dtype = x.dtype
    x, weight_ih, weight_hh, bias_ih, bias_hh, hidden = wide(
        m, x, weight_ih, weight_hh, bias_ih, bias_hh, h0
    )
    p = projected(m, x, weight_ih, sum_of(bias_ih, bias_hh))
    w = m.matrix_transpose(weight_hh)
    hidden = first_state(m, hidden, p[0, ...], w.shape[0])
    found = []
    for pt in in_order(m, p, reverse):
        hidden = rnn_step(m, pt, m.matmul(hidden, w), nonlinearity)
        found.append(hidden)
    return narrow(m, dtype, joined(m, found, reverse), hidden)


# -- LSTM -----------------------------------------------------------------------------------------


@fusible
def lstm_step(m: Any, p: Any, q: Any, cell: Any) -> Any:
    """Gates, cell state and hidden state after a step.

    ``p`` and ``q`` are the shares of the input and the hidden state in what the gates are given.
    """
    given = (*split_gates(m, p + q, 4), cell)
    *gates, cell, hidden = cells.lstm(m, *given)
    return m.concat(gates, axis=-1), cell, hidden


@fusible
def lstm_step_backward(
    m: Any, gates: Any, gh: Any, go: Any, gc: Any, before: Any, after: Any, direct: Any = None
) -> Any:
    """Gradients of what the gates were given, and of the cell state before the step.

    ``gh`` and ``go`` as in :func:`rnn_step_backward`, ``gc`` that of the cell state, and ``direct``
    that of the gates, where they have one of their own.
    """
    pieces = None if direct is None else split_gates(m, direct, 4)
    given = (*split_gates(m, gates, 4), before, after, pieces)
    *found, gc = cells.lstm_partial(m, sum_of(gh, go), gc, *given)
    return m.concat(found, axis=-1), gc


@fusible
def lstm_backward(
    m: Any, gates: Any, cell: Any, weight_hh: Any, c0: Any, g_output: Any, g_hidden: Any,
    g_cell: Any, g_cells: Any, g_gates: Any, reverse: bool, biased: bool,
) -> Any:  # fmt: skip
    """The walk back: gradients of what the gates were given, of the first states, and of a bias.

    ``g_output`` to ``g_gates`` are the gradients of what the layer returned, or None.
    """
    like = m.zeros_like(cell[0, ...])
    gates, cell = in_order(m, gates, reverse), in_order(m, cell, reverse)
    g_output, g_cells, g_gates = (
        [None] * len(gates) if g is None else in_order(m, g, reverse)
        for g in (g_output, g_cells, g_gates)
    )
    gh, gc = like if g_hidden is None else g_hidden, like if g_cell is None else g_cell
    found = []
    for t in range(len(gates) - 1, -1, -1):
        before = cell[t - 1] if t else like if c0 is None else c0
        g, gc = lstm_step_backward(
            m, gates[t], gh, g_output[t], sum_of(gc, g_cells[t]), before, cell[t], g_gates[t]
        )
        found.append(g)
        gh = m.matmul(g, weight_hh)
    g = joined(m, found, not reverse)
    return g, gh, gc, bias_gradient(m, g, biased)


@fusible
def lstm_gradients(
    m: Any, x: Any, weight_ih: Any, weight_hh: Any, h0: Any, c0: Any, output: Any, cell: Any,
    gates: Any, g: Any, reverse: bool, needs: Any, weight_ih_home: Any, weight_hh_home: Any,
) -> Gradients:  # fmt: skip
    """Gradients of all operands of :func:`lstm_layer`; ``g`` holds those of its results."""
    given = (*g, reverse, needs[3] or needs[4])
    gp, gh0, gc0, gb = lstm_backward(m, gates, cell, weight_hh, c0, *given)
    found = weight_gradients(
        m, gp, gp, x, weight_ih, h0, output, reverse, needs, weight_ih_home, weight_hh_home
    )
    return *found, gb, gb, gh0, gc0


@replayable
def _lstm_vjp(
    m: Any, g: Any, x: Any, weight_ih: Any, weight_hh: Any, h0: Any, c0: Any, y: Any,
    reverse: bool, needs: Any, weight_ih_home: Any, weight_hh_home: Any,
) -> Gradients:  # fmt: skip
    output, _, _, cell, gates = y
    x, weight_ih, weight_hh, h0, c0, output, cell, gates, *g = wide(
        m, x, weight_ih, weight_hh, h0, c0, output, cell, gates, *g
    )
    return lstm_gradients(
        m, x, weight_ih, weight_hh, h0, c0, output, cell, gates, g, reverse, needs,
        weight_ih_home, weight_hh_home,
    )  # fmt: skip


def _numpy_lstm(
    x: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None, h0: Any = None,
    c0: Any = None, reverse: bool = False,
) -> Any:  # fmt: skip
    def step(p: Any, q: Any, hidden: Any, cell: Any) -> Any:
        i, f, g, o = np.split(p + q, 4, axis=1)
        i, f, g, o = _sigmoid(i), _sigmoid(f), np.tanh(g), _sigmoid(o)
        cell = f * cell + i * g
        return o * np.tanh(cell), cell, np.concatenate([i, f, g, o], axis=1)

    output, cell, gates = _numpy_walk(step, x, w_ih, w_hh, b_ih, b_hh, [h0, c0], reverse)
    last = 0 if reverse else -1
    return output, output[last], cell[last], cell, gates


@primitive(vjp=_lstm_vjp, outputs=5, samples=lambda: _samples(4, 2), reference=_numpy_lstm)
def lstm_layer(
    m: Backend,
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    /,
    reverse: bool = False,
) -> tuple[Array, Array, Array, Array, Array]:
    """One layer of long short-term memory in one direction, over a whole sequence.

    Input gate i, forget gate f, candidate g and output gate o, in this order in the rows of the
    weights; the cell state becomes f·c + i·g, the hidden state o·tanh(c). Hochreiter and
    Schmidhuber (1997); Gers et al. (2000).

    Parameters
    ----------
    x:
        Shape (steps, batch, features), at least one step.
    weight_ih, weight_hh:
        Shapes (4 x hidden, features) and (4 x hidden, hidden).
    bias_ih, bias_hh:
        Shape (4 x hidden,), or None.
    h0, c0:
        Hidden and cell state before the first step, shape (batch, hidden); None stands for zeros.
    reverse:
        Whether the last step is computed first.

    Returns
    -------
    The hidden states after all steps, shape (steps, batch, hidden); hidden and cell state after the
    step that was computed last, (batch, hidden); the cell states after all steps; the gates of all
    steps, (steps, batch, 4 x hidden). Cell states and gates are kept for the backward pass anyway;
    they have gradients as the rest has. Raises ShapeError and DTypeError when operands do not fit
    together.

    >>> import gpugrad as gg
    >>> x, w_ih, w_hh = gg.ones((3, 2, 4)), gg.zeros((20, 4)), gg.zeros((20, 5))
    >>> output, hidden, cell, cells, gates = gg.lstm_layer(x, w_ih, w_hh)
    >>> output.shape, cell.shape, gates.shape
    ((3, 2, 5), (2, 5), (3, 2, 20))
    """
    check_operands("lstm_layer", m, 4, x, weight_ih, weight_hh, bias_ih, bias_hh, h0=h0, c0=c0)
    dtype = x.dtype
    x, weight_ih, weight_hh, bias_ih, bias_hh, hidden, cell = wide(
        m, x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0
    )
    p = projected(m, x, weight_ih, sum_of(bias_ih, bias_hh))
    w = m.matrix_transpose(weight_hh)
    hidden, cell = (first_state(m, s, p[0, ...], w.shape[0]) for s in (hidden, cell))
    found: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for pt in in_order(m, p, reverse):
        gates, cell, hidden = lstm_step(m, pt, m.matmul(hidden, w), cell)
        for steps, value in zip(found, (hidden, cell, gates)):
            steps.append(value)
    output, after, kept = (joined(m, steps, reverse) for steps in found)
    return narrow(m, dtype, output, hidden, cell, after, kept)


# -- GRU ------------------------------------------------------------------------------------------


@fusible
def gru_step(m: Any, p: Any, q: Any, hidden: Any) -> Any:
    """Gates and hidden state after a step; ``p`` and ``q`` as in :func:`lstm_step`.

    With the gates, of which there are three, comes the last third of ``q``.
    """
    (pr, pz, pn), (qr, qz, qn) = split_gates(m, p, 3), split_gates(m, q, 3)
    *gates, hidden = cells.gru(m, pr + qr, pz + qz, pn, qn, hidden)
    return m.concat(gates, axis=-1), hidden


@fusible
def gru_step_backward(
    m: Any, gates: Any, gh: Any, gq: Any, go: Any, before: Any, direct: Any = None
) -> Any:
    """Gradients of both shares, and of the state before the step where it is no part of a share.

    ``gh`` and ``gq`` are the hidden state's gradient by way of the next step, past its product and
    through it; ``go`` and ``direct`` as in :func:`lstm_step_backward`.
    """
    pieces = None if direct is None else split_gates(m, direct, 4)
    given = (*split_gates(m, gates, 4), before, pieces)
    gr, gz, gn, gq, gh = cells.gru_partial(m, sum_of(gh, gq, go), *given)
    return m.concat([gr, gz, gn], axis=-1), m.concat([gr, gz, gq], axis=-1), gh


@fusible
def gru_backward(
    m: Any, gates: Any, output: Any, weight_hh: Any, h0: Any, g_output: Any, g_hidden: Any,
    g_gates: Any, reverse: bool, biased: bool,
) -> Any:  # fmt: skip
    """The walk back: gradients of both shares at all steps, the first state, and both biases."""
    like = m.zeros_like(output[0, ...])
    gates, output = in_order(m, gates, reverse), in_order(m, output, reverse)
    g_output, g_gates = (
        [None] * len(gates) if g is None else in_order(m, g, reverse) for g in (g_output, g_gates)
    )
    gh, through = like if g_hidden is None else g_hidden, None
    found: tuple[list[Any], list[Any]] = ([], [])
    for t in range(len(gates) - 1, -1, -1):
        before = output[t - 1] if t else like if h0 is None else h0
        gp, gq, gh = gru_step_backward(m, gates[t], gh, through, g_output[t], before, g_gates[t])
        found[0].append(gp)
        found[1].append(gq)
        through = m.matmul(gq, weight_hh)
    gp, gq = (joined(m, steps, not reverse) for steps in found)
    return gp, gq, gh + through, *(bias_gradient(m, g, biased) for g in (gp, gq))


@fusible
def gru_gradients(
    m: Any, x: Any, weight_ih: Any, weight_hh: Any, h0: Any, output: Any, gates: Any, g: Any,
    reverse: bool, needs: Any, weight_ih_home: Any, weight_hh_home: Any,
) -> Gradients:  # fmt: skip
    """Gradients of all operands of :func:`gru_layer`; ``g`` holds those of its results."""
    given = (*g, reverse, needs[3] or needs[4])
    gp, gq, gh0, *gb = gru_backward(m, gates, output, weight_hh, h0, *given)
    found = weight_gradients(
        m, gp, gq, x, weight_ih, h0, output, reverse, needs, weight_ih_home, weight_hh_home
    )
    return *found, *gb, gh0


@replayable
def _gru_vjp(
    m: Any, g: Any, x: Any, weight_ih: Any, weight_hh: Any, h0: Any, y: Any, reverse: bool,
    needs: Any, weight_ih_home: Any, weight_hh_home: Any,
) -> Gradients:  # fmt: skip
    x, weight_ih, weight_hh, h0, output, gates, *g = wide(
        m, x, weight_ih, weight_hh, h0, y[0], y[2], *g
    )
    return gru_gradients(
        m, x, weight_ih, weight_hh, h0, output, gates, g, reverse, needs, weight_ih_home,
        weight_hh_home,
    )  # fmt: skip


def _numpy_gru(
    x: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None, h0: Any = None,
    reverse: bool = False,
) -> Any:  # fmt: skip
    def step(p: Any, q: Any, hidden: Any) -> Any:
        (pr, pz, pn), (qr, qz, qn) = np.split(p, 3, axis=1), np.split(q, 3, axis=1)
        r, z = _sigmoid(pr + qr), _sigmoid(pz + qz)
        n = np.tanh(pn + r * qn)
        return (1.0 - z) * n + z * hidden, np.concatenate([r, z, n, qn], axis=1)

    output, gates = _numpy_walk(step, x, w_ih, w_hh, b_ih, b_hh, [h0], reverse)
    return output, output[0 if reverse else -1], gates


@primitive(vjp=_gru_vjp, outputs=3, samples=lambda: _samples(3, 1), reference=_numpy_gru)
def gru_layer(
    m: Backend,
    x: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
    h0: Array | None = None,
    /,
    reverse: bool = False,
) -> tuple[Array, Array, Array]:
    """One layer of gated recurrent units in one direction, over a whole sequence.

    Reset gate r, update gate z and candidate n, in this order in the rows of the weights; n is
    tanh(x·W_inᵀ + b_in + r·(h·W_hnᵀ + b_hn)), and the hidden state becomes (1 - z)·n + z·h. Cho et
    al., arXiv:1406.1078.

    Parameters
    ----------
    x:
        Shape (steps, batch, features), at least one step.
    weight_ih, weight_hh:
        Shapes (3 x hidden, features) and (3 x hidden, hidden).
    bias_ih, bias_hh:
        Shape (3 x hidden,), or None.
    h0:
        The state before the first step, shape (batch, hidden); None stands for zeros.
    reverse:
        Whether the last step is computed first.

    Returns
    -------
    The hidden states after all steps, shape (steps, batch, hidden); the one that was computed last,
    (batch, hidden); r, z, n and what r was multiplied with, at all steps, (steps, batch, 4 x
    hidden), which is kept for the backward pass anyway. Raises ShapeError and DTypeError when
    operands do not fit together.

    >>> import gpugrad as gg
    >>> x, w_ih, w_hh = gg.ones((3, 2, 4)), gg.zeros((15, 4)), gg.zeros((15, 5))
    >>> output, last, gates = gg.gru_layer(x, w_ih, w_hh)
    >>> output.shape, last.shape, gates.shape
    ((3, 2, 5), (2, 5), (3, 2, 20))
    """
    check_operands("gru_layer", m, 3, x, weight_ih, weight_hh, bias_ih, bias_hh, h0=h0)
    dtype = x.dtype
    x, weight_ih, weight_hh, bias_ih, bias_hh, hidden = wide(
        m, x, weight_ih, weight_hh, bias_ih, bias_hh, h0
    )
    p = projected(m, x, weight_ih, bias_ih)
    w = m.matrix_transpose(weight_hh)
    hidden = first_state(m, hidden, p[0, ...], w.shape[0])
    found: tuple[list[Any], list[Any]] = ([], [])
    for pt in in_order(m, p, reverse):
        gates, hidden = gru_step(m, pt, sum_of(m.matmul(hidden, w), bias_hh), hidden)
        found[0].append(hidden)
        found[1].append(gates)
    output, kept = (joined(m, steps, reverse) for steps in found)
    return narrow(m, dtype, output, hidden, kept)
