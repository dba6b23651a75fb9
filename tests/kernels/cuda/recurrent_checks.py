"""What the kernels of recurrent steps must compute, whatever runs them: see checks.py."""

from __future__ import annotations

import numpy as np

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.kernels.cuda import recurrent as family
from gpugrad.ops import recurrent
from tests.kernels.cuda.checks import close, inputs, same, sizes, wide

numpy = backend_for_device("cpu")

#: For each layer: columns of the shares and of the gates, in units.
LAYERS = {"rnn": (1, 1), "lstm": (4, 4), "gru": (3, 4)}


def arrays(storage, shape, count, first=0, shift=0):
    rows, columns = shape
    return [inputs(storage, rows * columns, first + k, shift).reshape(shape) for k in range(count)]


def compare(name, storage, put, get, operands, *parameters, scale):
    got = family.KERNELS[name].run(
        numpy, *(None if x is None else put(x) for x in operands), *parameters
    )
    with gg.use_kernels("off"):
        given = [None if x is None else wide(x) for x in operands]
        want = getattr(recurrent, name)(numpy, *given, *parameters)
    if not isinstance(got, tuple):
        got, want = (got,), (want,)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        a = get(a)
        assert a.dtype == np.dtype(storage)
        close(a, b, storage, scale)


def check_step(kind, storage, put=same, get=same, shape=(5, 13), shift=0, nonlinearity="tanh"):
    """One step forward."""
    rows, n = shape
    p, q = arrays(storage, (rows, LAYERS[kind][0] * n), 2, shift=shift)
    state = arrays(storage, shape, 1, 2, shift) if kind != "rnn" else []
    parameters = (nonlinearity,) if kind == "rnn" else ()
    largest = max([1.0, *(float(sizes(x).max()) for x in (p, q, *state) if x.size)])
    compare(f"{kind}_step", storage, put, get, [p, q, *state], *parameters, scale=largest**2)


def check_step_backward(
    kind, storage, put=same, get=same, shape=(5, 13), shift=0, nonlinearity="tanh", missing=()
):
    """One step back; `missing` are the numbers of summands of the state's gradient left out."""
    rows, n = shape
    (gates,) = arrays(storage, (rows, LAYERS[kind][1] * n), 1, shift=shift)
    summands = arrays(storage, shape, 3 if kind == "gru" else 2, 1, shift)
    summands = [None if k in missing else x for k, x in enumerate(summands)]
    others = arrays(storage, shape, {"rnn": 0, "lstm": 3, "gru": 1}[kind], 5, shift)
    parameters = (nonlinearity,) if kind == "rnn" else ()
    given = [x for x in (gates, *summands, *others) if x is not None]
    largest = max([1.0, *(float(sizes(x).max()) for x in given if x.size)])
    compare(
        f"{kind}_step_backward", storage, put, get, [gates, *summands, *others], *parameters,
        scale=largest**4,
    )  # fmt: skip
