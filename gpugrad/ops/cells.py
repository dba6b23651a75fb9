"""The cells of recurrent layers, each written once, for arrays, tensors and compiled loops.

Formulas as in :mod:`gpugrad.ops.formulas`, of several results. ``cell(m, …)`` takes what its gates
are given before their activations, and the state of the step before; it returns the gates and the
new state. ``cell_partial(m, g…, …)`` takes the gradients of the new state and what ``cell``
returned; it returns those of its operands. ``direct`` holds further gradients of the gates, one for
each, or None: they come only where the gates themselves were results.
"""

from __future__ import annotations

from typing import Any

from gpugrad.ops.formulas import sigmoid, sigmoid_partial, tanh_partial


def lstm(m: Any, i: Any, f: Any, g: Any, o: Any, cell: Any) -> Any:
    """Hochreiter and Schmidhuber (1997), with the forget gate of Gers et al. (2000)."""
    i, f, g, o = sigmoid(m, i), sigmoid(m, f), m.tanh(g), sigmoid(m, o)
    cell = f * cell + i * g
    return i, f, g, o, cell, o * m.tanh(cell)


def lstm_partial(
    m: Any, gh: Any, gc: Any, i: Any, f: Any, g: Any, o: Any, before: Any, after: Any,
    direct: Any = None,
) -> Any:  # fmt: skip
    """``before`` and ``after`` are the cell state; the last result is the gradient of the first."""
    t = m.tanh(after)
    gc = gc + tanh_partial(m, gh * o, t)
    gates = gc * g, gc * before, gc * i, gh * t
    if direct is not None:
        gates = tuple(a + b for a, b in zip(gates, direct))
    gi, gf, gg, go = gates
    return (
        sigmoid_partial(m, gi, i), sigmoid_partial(m, gf, f), tanh_partial(m, gg, g),
        sigmoid_partial(m, go, o), gc * f,
    )  # fmt: skip


def gru(m: Any, r: Any, z: Any, n: Any, q: Any, hidden: Any) -> Any:
    """Cho et al. (2014), where the reset gate follows the product ``q``, as PyTorch has it.

    ``q`` is what the hidden state contributes to ``n``; it is no gate, but is returned with them.
    """
    r, z = sigmoid(m, r), sigmoid(m, z)
    n = m.tanh(n + r * q)
    return r, z, n, q, n + z * (hidden - n)


def gru_partial(
    m: Any, gh: Any, r: Any, z: Any, n: Any, q: Any, before: Any, direct: Any = None
) -> Any:
    """``before`` is the hidden state; the last result is its gradient by way of ``z`` alone."""
    gz, gn = gh * (before - n), gh - gh * z
    if direct is not None:
        gz, gn = gz + direct[1], gn + direct[2]
    gn = tanh_partial(m, gn, n)
    gr, gq = gn * q, gn * r
    if direct is not None:
        gr, gq = gr + direct[0], gq + direct[3]
    return sigmoid_partial(m, gr, r), sigmoid_partial(m, gz, z), gn, gq, gh * z
