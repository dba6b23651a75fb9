"""Recurrent layers over a sequence: bad input, edges, and what the gates tell."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.core.primitive import registry
from gpugrad.errors import DTypeError, ParameterError, ShapeError
from gpugrad.ops import cells
from gpugrad.ops.linalg import linear
from tests.backend.counting import counting

LAYERS = {"rnn_layer": (1, 1), "lstm_layer": (4, 2), "gru_layer": (3, 1)}


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def operands(name, steps=5, batch=2, features=3, hidden=4, dtype="float64"):
    """All operands of a layer, biases and first states too."""
    gates, states = LAYERS[name]
    rows = gates * hidden
    shapes = [
        (steps, batch, features), (rows, features), (rows, hidden), (rows,), (rows,),
        *[(batch, hidden)] * states,
    ]  # fmt: skip
    return [random(*s, seed=k).astype(dtype) for k, s in enumerate(shapes)]


# -- bad input ------------------------------------------------------------------------------------


def wrong(position, shape):
    return lambda args: [*args[:position], np.zeros(shape), *args[position + 1 :]]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (wrong(0, (2, 3)), r"x of shape \(2, 3\); a sequence has three axes, .* expand_dims"),
        (wrong(0, (0, 2, 3)), r"x of shape \(0, 2, 3\) has no steps"),
        (wrong(1, (16, 5)), r"weight_ih of shape \(16, 5\), expected \(16, 3\) for x of shape"),
        (wrong(2, (15, 4)), r"weight_hh of shape \(15, 4\); it has 4 rows for each"),
        (wrong(2, (16,)), r"weight_hh of shape \(16,\)"),
        (wrong(3, (4,)), r"bias_ih of shape \(4,\), expected \(16,\)"),
        (wrong(4, (16, 1)), r"bias_hh of shape \(16, 1\), expected \(16,\)"),
        (wrong(5, (1, 4)), r"h0 of shape \(1, 4\), expected \(2, 4\)"),
        (wrong(6, (2, 3)), r"c0 of shape \(2, 3\), expected \(2, 4\)"),
    ],
)
def test_shapes(change, text) -> None:
    with pytest.raises(ShapeError, match=f"lstm_layer: {text}"):
        gg.lstm_layer(*change(operands("lstm_layer")))


@pytest.mark.parametrize("name", LAYERS)
def test_dtypes(name) -> None:
    layer, args = getattr(gg, name), operands(name)
    with pytest.raises(DTypeError, match="x of float64 and weight_hh of float32; convert one"):
        layer(*args[:2], args[2].astype("float32"), *args[3:])
    with pytest.raises(DTypeError, match="x of float64 and h0 of float32"):
        layer(*args[:5], args[5].astype("float32"), *args[6:])
    with pytest.raises(DTypeError, match="x of int64; a layer computes in real floating-point"):
        layer(args[0].astype("int64"), *args[1:])


def test_nonlinearity() -> None:
    with pytest.raises(ParameterError, match="nonlinearity='gelu'; it is one of tanh, relu"):
        gg.rnn_layer(*operands("rnn_layer"), nonlinearity="gelu")


# -- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_no_sequences(name) -> None:
    """Results are empty, and parameters have gradients of zeros."""
    tensors = [gg.tensor(x, requires_grad=True) for x in operands(name, batch=0)]
    output, last, *_ = getattr(gg, name)(*tensors)
    assert output.shape == (5, 0, 4)
    assert last.shape == (0, 4)
    output.sum().backward()
    for p in tensors[1:5]:
        assert not p.grad.numpy().any()


@pytest.mark.parametrize("name", LAYERS)
def test_results_do_not_share_memory(name) -> None:
    found = [y.data for y in getattr(gg, name)(*operands(name))]
    for i, a in enumerate(found):
        assert not any(np.shares_memory(a, b) for b in found[:i])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_last_states_are_those_of_the_last_step(name, reverse) -> None:
    output, hidden, *rest = getattr(gg, name)(*operands(name), reverse=reverse)
    last = 0 if reverse else -1
    assert hidden.tolist() == output[last].tolist()
    if name == "lstm_layer":
        assert rest[0].tolist() == rest[1][last].tolist()


@pytest.mark.parametrize("name", LAYERS)
def test_backwards_is_the_turned_sequence(name) -> None:
    args, layer = operands(name), getattr(gg, name)
    there = layer(*args, reverse=True)[0].numpy()
    turned = layer(args[0][::-1].copy(), *args[1:])[0].numpy()
    np.testing.assert_array_equal(there, turned[::-1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_two_bytes_are_computed_in_float32(name, dtype) -> None:
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    args = [x.astype(kind) for x in operands(name, steps=20)]

    def run(dtype):
        tensors = [gg.asarray(x.astype(dtype)).requires_grad_() for x in args]
        y = getattr(gg, name)(*tensors)[0]
        y.backward(gg.ones_like(y))
        return [y.data, *(t.grad.data for t in tensors)]

    with gg.use_kernels("off"):
        for narrow, wide in zip(run(kind), run("float32")):
            assert narrow.dtype == kind
            slack = 2.0**-6 if dtype == "bfloat16" else 2.0**-9
            np.testing.assert_allclose(
                narrow.astype("float32"), wide, rtol=slack, atol=slack * np.abs(wide).max()
            )


# -- gates and cells ------------------------------------------------------------------------------


def test_gates_of_an_lstm() -> None:
    """Closed forget gates forget, open ones keep: seen in the gates and in the cells."""
    x, w_ih, w_hh, _, b_hh, h0, c0 = operands("lstm_layer")
    bias = np.zeros(16)
    bias[4:8] = 50.0  # forget nothing
    bias[:4] = -50.0  # let nothing in
    *_, cell, gates = gg.lstm_layer(0 * x, 0 * w_ih, 0 * w_hh, bias, 0 * b_hh, h0, c0)
    np.testing.assert_allclose(gates.numpy()[..., 4:8], 1.0)
    np.testing.assert_allclose(gates.numpy()[..., :4], 0.0, atol=1e-20)
    np.testing.assert_allclose(cell.numpy(), np.broadcast_to(c0, (5, 2, 4)), rtol=1e-12)


@pytest.mark.parametrize("name", ["lstm_layer", "gru_layer"])
def test_gradients_by_way_of_the_gates(name) -> None:
    """A loss of the gates alone: the same as that of a layer put together by hand."""
    args = operands(name, steps=1)
    states = args[5:]

    def by_layer(x, w_ih, w_hh):
        return getattr(gg, name)(x, w_ih, w_hh, *args[3:])[-1]

    def by_hand(x, w_ih, w_hh):
        p, q = linear(x[0], w_ih, args[3]), linear(gg.asarray(states[0]), w_hh, args[4])
        if name == "lstm_layer":
            i, f, g, o = gg.split(p + q, 4, axis=-1)
            gates = [gg.sigmoid(i), gg.sigmoid(f), gg.tanh(g), gg.sigmoid(o)]
        else:
            (pr, pz, pn), (qr, qz, qn) = gg.split(p, 3, axis=-1), gg.split(q, 3, axis=-1)
            r = gg.sigmoid(pr + qr)
            gates = [r, gg.sigmoid(pz + qz), gg.tanh(pn + r * qn), qn]
        return gg.expand_dims(gg.concat(gates, axis=-1), axis=0)

    def gradient(gates, k):
        return gg.grad(lambda *w: (gates(*w) ** 2).sum(), argnums=k)(*map(gg.tensor, args[:3]))

    for k in range(3):
        got, want = gradient(by_layer, k).numpy(), gradient(by_hand, k).numpy()
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-13)


def test_gradients_of_every_state_of_a_cell() -> None:
    args = [gg.tensor(x) for x in operands("lstm_layer")]
    args[6].requires_grad_()
    *_, cell, _ = gg.lstm_layer(*args)
    cell.retain_grad()
    (cell * cell).sum().backward()
    np.testing.assert_allclose(cell.grad.numpy(), 2 * cell.detach().numpy())
    assert args[6].grad.shape == (2, 4)


@pytest.mark.parametrize("cell", [cells.lstm, cells.gru])
def test_the_cells_stay_finite(cell) -> None:
    """Gates that are given huge numbers are closed or open."""
    big = np.array([-1e30, -100.0, 0.0, 100.0, 1e30])
    found = cell(gg.asarray(big).backend, big, big, big, 0 * big, np.ones(5))
    assert all(np.isfinite(y).all() for y in found)


# -- what it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_read_by_the_host(name) -> None:
    with counting() as counts:
        tensors = [
            gg.tensor(x, device="counting", requires_grad=True)
            for x in operands(name, dtype="float32")
        ]
        uploads = counts.uploads
        output, *_ = getattr(gg, name)(*tensors)
        output.sum().backward()
        assert counts.host_reads == 0
        assert counts.uploads == uploads


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_go_straight_into_an_optimizers_memory(name) -> None:
    args = [gg.tensor(x, requires_grad=True) for x in operands(name)]
    plain = [gg.tensor(x, requires_grad=True) for x in operands(name)]
    optimizer = gg.optim.SGD(args[1:5], lr=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        output, *_ = getattr(gg, name)(*args)
        output.sum().backward()
        optimizer.step()
    getattr(gg, name)(*plain)[0].sum().backward()
    for a, b in zip(args[1:5], plain[1:5]):
        np.testing.assert_allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-12, atol=1e-14)


def test_what_a_layer_keeps() -> None:
    """Its operands and its results, nothing else."""
    for name in LAYERS:
        names = set(registry[name].saved_names([True] * len(registry[name].operands)))
        assert names <= {"x", "weight_ih", "weight_hh", "h0", "c0", "y"}
