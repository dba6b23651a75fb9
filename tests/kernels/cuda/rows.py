"""What the kernels of dropout and embedding must compute, whatever runs them: see checks.py."""

from __future__ import annotations

import numpy as np

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.kernels.cuda import dropout, embedding
from gpugrad.ops.embeddings import embedding_backward
from gpugrad.ops.random import bias_activation_dropout_backward
from tests.kernels.cuda.checks import DTYPES, close, inputs, sizes, wide

numpy = backend_for_device("cpu")
STREAM = (0x9E3779B97F4A7C15, (1 << 33) + 5)


def generic(function, *args, **parameters):
    """A result of the generic text, as raw arrays."""
    with gg.use_kernels("off"):
        found = function(*args, **parameters)
    return found.data if isinstance(found, gg.Tensor) else found


def check_dropout(storage, count=37, shift=0, p=0.4):
    """The bits of the generic text."""
    x = inputs(storage, count, 0, shift)
    got = dropout.KERNELS["dropout"].run(numpy, x, p, *STREAM)
    want = generic(gg.dropout, x, p, *STREAM)
    assert got.dtype == DTYPES[storage]
    assert np.array_equal(got, want)


def check_after_product(activation, storage, shape=(5, 13), shift=0, p=0.4, bias=True, adds=True):
    """Bias, activation, dropout and residual, forward and backward."""
    rows, columns = shape
    g, x, r = (inputs(storage, rows * columns, k, shift).reshape(shape) for k in range(3))
    b = inputs(storage, columns, 3) if bias else None
    r = r if adds else None
    # In double precision, in which the generic text rounds nothing that shows.
    truth = [None if a is None else wide(a) for a in (g, x, b, r)]
    options = (activation, p, *STREAM)
    forward, backward = (
        dropout.KERNELS[f"bias_activation_dropout{part}"].run for part in ("", "_backward")
    )
    scale = sizes(x) + (sizes(b) if bias else 0) + (sizes(r) if adds else 0)
    scale = 1 + scale / max(1 - p, 0.1)
    want = generic(gg.bias_activation_dropout, *truth[1:], *options)
    close(forward(numpy, x, b, r, *options), want, storage, scale)

    gx, gb = backward(numpy, g, x, b, *options)
    want_x, want_b = generic(bias_activation_dropout_backward, numpy, *truth[:3], *options)
    scale = sizes(g) * scale
    close(gx, want_x, storage, scale)
    assert (gb is None) == (want_b is None)
    if gb is not None:
        close(gb, want_b, storage, scale.sum(0))


def check_embedding(
    storage, shape=(4, 5), rows=7, columns=9, kind="int64", padding_row=None, by_frequency=False
):
    """Rows and the table's gradient: the bits of the generic text."""
    drawn = np.random.default_rng(1).integers(0, rows, shape)
    index = np.asarray(drawn**2 // max(rows - 1, 1), dtype=kind)
    table = inputs(storage, rows * columns, 0).reshape(rows, columns)
    g = inputs(storage, index.size * columns, 1).reshape(*shape, columns)
    forward, backward = (embedding.KERNELS[f"embedding{part}"].run for part in ("", "_backward"))
    assert np.array_equal(forward(numpy, index, table), table[index])
    got = backward(numpy, index, g, rows, padding_row, by_frequency)
    want = generic(embedding_backward, numpy, index, g, rows, padding_row, by_frequency)
    assert got.dtype == DTYPES[storage] and got.shape == (rows, columns)
    assert np.array_equal(got, want)


def check_outside():
    """An index that is no row reads NaN, and its gradient goes nowhere."""
    index = np.array([1, -1, 3, 0, 1 << 40])
    table, g = inputs("float32", 9, 0).reshape(3, 3), inputs("float32", 15, 1).reshape(5, 3)
    got = embedding.launch_gather(index, table)
    assert np.array_equal(got[[0, 3]], table[[1, 0]])
    assert np.all(np.isnan(got[[1, 2, 4]]))
    total = embedding.KERNELS["embedding_backward"].run(numpy, index, g, 3)
    assert np.array_equal(total, [g[3], g[0], np.zeros(3)])
