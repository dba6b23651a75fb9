"""Recurrent layers in one kernel for each direction of the walk, against the generic text."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import pool
from gpugrad.kernels.cpu import recurrent as family
from gpugrad.kernels.cpu.compile import CPU
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, EPS, layouts, wide

LAYERS = {"rnn_layer": (1, 1), "lstm_layer": (4, 2), "gru_layer": (3, 1)}


def operands(name, steps, batch, features, hidden, *, dtype="float32"):
    gates, states = LAYERS[name]
    rows, random = gates * hidden, np.random.default_rng(steps)
    shapes = [
        (steps, batch, features), (rows, features), (rows, hidden), (rows,), (rows,),
        *[(batch, hidden)] * states,
    ]  # fmt: skip
    return [(random.standard_normal(s) / np.sqrt(hidden)).astype(DTYPES[dtype]) for s in shapes]


def run(mode, name, args, used=("output", "last"), **parameters):
    """Results, and the gradients of all operands that there are, from fixed gradients above."""
    tensors = [x if x is None else gg.asarray(x).requires_grad_() for x in args]
    with gg.use_kernels(mode):
        found = getattr(gg, name)(*tensors, **parameters)
        count = 3 if name == "lstm_layer" else 2
        total = 0.0
        for k, y in enumerate(found[:count]):
            if ("output" if k == 0 else "last") in used:
                g = np.random.default_rng(k).standard_normal(y.shape)
                total = total + (y * g.astype(y.dtype)).sum()
        total.backward()
    return [y.data for y in found] + [t.grad.data for t in tensors if t is not None]


def agree(got, want, rtol=1e-12, atol=1e-12):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.shape == b.shape
        np.testing.assert_allclose(wide(a), wide(b), rtol=rtol, atol=atol)


SHAPES = [(1, 1, 1, 1), (3, 2, 3, 5), (4, 7, 17, 33), (2, 40, 5, 16), (6, 1, 64, 48), (3, 0, 2, 4),
          (9, 90, 3, 5), (3, 300, 2, 4)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAYERS)
def test_parity(name, shape):
    args = operands(name, *shape, dtype="float64")
    for reverse in (False, True):
        agree(run("require", name, args, reverse=reverse), run("off", name, args, reverse=reverse))


@pytest.mark.parametrize("name", LAYERS)
def test_operands_that_are_missing(name):
    full = operands(name, 4, 99, 5, 6, dtype="float64")
    for args in (
        [*full[:3]],
        [*full[:3], None, full[4]],
        [*full[:4]],
        [*full[:3], None, None, full[5]],
    ):
        agree(run("require", name, args), run("off", name, args))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_from_one_result(name):
    args = operands(name, 4, 3, 5, 6, dtype="float64")
    for used in ("output", "last"):
        agree(run("require", name, args, (used,)), run("off", name, args, (used,)))


def test_relu():
    args = operands("rnn_layer", 4, 3, 5, 6, dtype="float64")
    agree(
        run("require", "rnn_layer", args, nonlinearity="relu"),
        run("off", "rnn_layer", args, nonlinearity="relu"),
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_storage(name, dtype):
    args = operands(name, 8, 5, 12, 20, dtype=dtype)
    got = run("require", name, args)
    want = run("off", name, [wide(x) for x in args])
    for a, b in zip(got, want):
        assert a.dtype == DTYPES[dtype]
        slack = 64 * EPS["float32"] if dtype == "float32" else 4 * EPS[dtype]
        np.testing.assert_allclose(wide(a), b, rtol=slack, atol=slack * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("name", LAYERS)
def test_layouts(name):
    args = operands(name, 4, 3, 6, 8)
    want = run("require", name, args)
    for k in range(len(args)):
        for what, laid in layouts(args[k]):
            got = run("require", name, [*args[:k], laid, *args[k + 1 :]])
            for a, b in zip(got, want):
                # Products outside of the walk may be computed in another order.
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=f"{k} {what}")


@pytest.mark.parametrize("name", LAYERS)
def test_any_number_of_threads_gives_the_same_bits(name):
    args = operands(name, 41, 13, 40, 100)  # going back in several parts
    before, seen = pool.get_num_threads(), []
    try:
        for threads in (1, before):
            pool.set_num_threads(threads)
            seen.append(run("require", name, args))
    finally:
        pool.set_num_threads(before)
    for one, other in zip(*seen):
        assert np.array_equal(one, other)


def test_the_engines_sums_and_parts_of_the_batch():
    """However many sequences there are, each has the result that it has alone."""
    args = operands("lstm_layer", 5, 9, 6, 20)
    whole = family.lstm_layer(None, *args)
    for i in range(9):
        alone = [args[0][:, i : i + 1], *args[1:5], *(s[i : i + 1] for s in args[5:])]
        assert np.array_equal(family.lstm_layer(None, *alone)[0], whole[0][:, i : i + 1])


def test_infinite_and_missing_numbers_stay_in_their_sequence():
    args = operands("gru_layer", 5, 3, 4, 8)
    args[0][2, 1, 0] = np.nan
    output = family.gru_layer(None, *args)[0]
    assert np.isfinite(output[:, [0, 2]]).all()
    assert np.isfinite(output[:2]).all()
    assert np.isnan(output[2:, 1]).all()


def test_refusals():
    x, *rest = operands("lstm_layer", 3, 2, 4, 5)
    with gg.use_kernels("require"):
        with pytest.raises(KernelError, match=r"no kernel for float32 with float64"):
            gg.lstm_layer(x, *(w.astype("float64") for w in rest))
        with pytest.raises(KernelError, match=r"weights of shape \(20, 5\)"):
            gg.gru_layer(x, *rest[:4])
        with pytest.raises(KernelError, match=r"shape \(20, 3\) where \(20, 4\) is expected"):
            gg.lstm_layer(x, rest[0][:, :3], *rest[1:])
        with pytest.raises(KernelError, match=r"x of shape \(0, 2, 4\)"):
            gg.lstm_layer(x[:0], *rest)
        with pytest.raises(KernelError, match="no kernel for 'gelu'"):
            gg.rnn_layer(*operands("rnn_layer", 3, 2, 4, 5), nonlinearity="gelu")
        *_, gates = gg.lstm_layer(gg.asarray(x).requires_grad_(), *rest)
        with pytest.raises(KernelError, match="cell states or the gates of single steps"):
            gates.sum().backward()


@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh", "relu"])
def test_loops_are_vectorised(kind):
    forward, backward = family._loops(kind)
    n, wide_ = 64, 64 * (1 if kind in ("tanh", "relu") else 4)

    def rows(*sizes):
        return [np.ones(s, "float32") for s in sizes]

    row = forward.bound["_forward_part"].bound["forward_row"].instance(CPU, "float32")
    text = assembly(row, *rows(wide_, wide_, n, n, n, n))
    assert packed(text) >= (1 if kind == "relu" else 20)
    row = backward.bound["_backward_part"].bound["backward_row"].instance(CPU, "float32")
    shares = n * {"lstm": 4, "gru": 3}.get(kind, 1)
    text = assembly(row, *rows(wide_, n, n, n, n, n, shares, shares, wide_))
    assert packed(text) >= (1 if kind == "relu" else 3)


@pytest.mark.parametrize("name", LAYERS)
def test_weights_beyond_the_cache(name, monkeypatch):
    """Their gradients are one product each, at the end."""
    monkeypatch.setattr(family, "LARGEST", 0)
    for shape in SHAPES:
        args = operands(name, *shape, dtype="float64")
        for reverse in (False, True):
            agree(
                run("require", name, args, reverse=reverse),
                run("off", name, args, reverse=reverse),
            )
