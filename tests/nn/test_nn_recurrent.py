"""Recurrent layers: PyTorch's names and numbers, bad input, gradients of single steps."""

import itertools
import warnings

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.errors import DTypeError, ParameterError, ShapeError
from tests.backend.counting import counting

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def pair(name, *args, **options):
    """The layer here and in PyTorch, with equal random parameters."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dropout in a single layer
        ours = getattr(nn, name)(*args, **options, dtype="float64")
        theirs = getattr(torch.nn, name)(*args, **options, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.5, generator=generator)
    ours.load_state_dict({k: v.detach().numpy() for k, v in theirs.state_dict().items()})
    return ours, theirs


def close(a, b) -> None:
    a, b = a.detach().numpy(), b.detach().numpy()
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def flat(found):
    for x in found if isinstance(found, tuple) else (found,):
        if isinstance(x, tuple):
            yield from x
        else:
            yield x


def compare(ours, theirs, x, states=(), used=None) -> None:
    """Results, and the gradients of all that goes in, from random gradients of what is used."""
    import torch

    a, b = gg.tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    first_a = tuple(gg.tensor(s, requires_grad=True) for s in states)
    first_b = tuple(torch.tensor(s, requires_grad=True) for s in states)

    def call(layer, x, first):
        if not first:
            return tuple(flat(layer(x)))
        return tuple(flat(layer(x, first[0] if len(first) == 1 else first)))

    y, t = call(ours, a, first_a), call(theirs, b, first_b)
    assert len(y) == len(t)
    total_a = total_b = 0.0
    for k, (p, q) in enumerate(zip(y, t)):
        close(p, q)
        if used is None or k in used:
            g = random(*p.shape, seed=10 + k)
            total_a = total_a + (p * gg.tensor(g)).sum()
            total_b = total_b + (q * torch.tensor(g)).sum()
    ours.zero_grad()
    theirs.zero_grad()
    total_a.backward()
    total_b.backward()
    for p, q in zip((a, *first_a), (b, *first_b)):
        close(p.grad, q.grad)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(p.grad, q.grad)


OPTIONS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"bidirectional": True},
    {"num_layers": 3},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
    {"num_layers": 2, "bidirectional": True},
]


@pytest.mark.torch
@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_like_pytorch(name, options, mode) -> None:
    ours, theirs = pair(name, 3, 5, **options)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    count = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    shape = (4, 6, 3)
    batch = 4 if options.get("batch_first") else 6
    states = [random(count, batch, 5, seed=s) for s in range(2 if name == "LSTM" else 1)]
    with gg.use_kernels(mode):
        compare(ours, theirs, random(*shape))
        compare(ours, theirs, random(*shape), states)


@pytest.mark.torch
@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_result_alone(name, mode) -> None:
    """Gradients that come by the output alone, or by one of the last states alone."""
    ours, theirs = pair(name, 3, 4, 2, bidirectional=True)
    with gg.use_kernels(mode):
        for used in ([0], [1], [2])[: 3 if name == "LSTM" else 2]:
            compare(ours, theirs, random(5, 2, 3), used=used)


@pytest.mark.torch
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_single_sequence(name, batch_first) -> None:
    ours, theirs = pair(name, 3, 4, 2, batch_first=batch_first, bidirectional=True)
    states = [random(4, 4, seed=s) for s in range(2 if name == "LSTM" else 1)]
    compare(ours, theirs, random(5, 3))
    compare(ours, theirs, random(5, 3), states)


@pytest.mark.torch
def test_relu_like_pytorch() -> None:
    ours, theirs = pair("RNN", 3, 4, 2, nonlinearity="relu")
    compare(ours, theirs, random(5, 2, 3))
    ours, theirs = pair("RNNCell", 3, 4, nonlinearity="relu")
    assert repr(ours) == repr(theirs)
    compare(ours, theirs, random(2, 3), [random(2, 4)])


@pytest.mark.torch
@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_cells_like_pytorch(name, bias, mode) -> None:
    ours, theirs = pair(name, 3, 4, bias=bias)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with gg.use_kernels(mode):
        for shape in ((), (5,), (0,)):
            states = [random(*shape, 4, seed=s) for s in range(2 if name == "LSTMCell" else 1)]
            compare(ours, theirs, random(*shape, 3))
            compare(ours, theirs, random(*shape, 3), states)


@pytest.mark.torch
@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("name", LAYERS)
def test_edges_like_pytorch(name, mode) -> None:
    """No sequences, a single step, a single unit."""
    with gg.use_kernels(mode):
        for options, shape in (({}, (5, 0, 3)), ({"bidirectional": True}, (1, 2, 3))):
            ours, theirs = pair(name, 3, 4, **options)
            compare(ours, theirs, random(*shape))
        ours, theirs = pair(name, 1, 1)
        compare(ours, theirs, random(3, 1, 1))


@pytest.mark.torch
@pytest.mark.parametrize(("name", "make"), [*zip(LAYERS, itertools.repeat((70, 60, 2)))])
def test_initial_values(name, make) -> None:
    """Uniform within one over the root of the hidden units, biases too."""
    nn.manual_seed(0)
    for p in getattr(nn, name)(*make).parameters():
        bound = 1 / np.sqrt(60)
        values = p.detach().numpy()
        assert np.abs(values).max() <= bound
        np.testing.assert_allclose(values.std(), bound / np.sqrt(3), rtol=0.2)


@pytest.mark.parametrize("name", LAYERS)
def test_a_cell_makes_the_steps_of_its_layer(name) -> None:
    nn.manual_seed(0)
    layer = getattr(nn, name)(3, 4, dtype="float64")
    cell = getattr(nn, name + "Cell")(3, 4, dtype="float64")
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x, state = gg.tensor(random(5, 2, 3)), None
    output, _ = layer(x)
    for t in range(5):
        state = cell(x[t], state)
        hidden = state[0] if name == "LSTM" else state
        np.testing.assert_allclose(hidden.detach().numpy(), output[t].detach().numpy(), atol=1e-14)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_single_steps(name) -> None:
    """`retain_grad` and hooks on the output give the gradient at every step."""
    nn.manual_seed(0)
    layer = getattr(nn, name)(3, 4, dtype="float64")
    output, _ = layer(gg.tensor(random(5, 2, 3), requires_grad=True))
    output.retain_grad()
    seen = []
    output.register_hook(lambda g: seen.append(g.shape))
    (output[-1] * 2.0).sum().backward()
    assert output.grad.shape == (5, 2, 4)
    assert output.grad[:-1].tolist() == gg.zeros((4, 2, 4)).tolist()
    assert seen == [(5, 2, 4)]


def test_dropout_is_between_layers_and_in_training_only() -> None:
    nn.manual_seed(0)
    with pytest.warns(UserWarning, match="dropout=0.5 follows every layer but the last"):
        alone = nn.LSTM(3, 4, dropout=0.5)
    x = gg.tensor(random(5, 2, 3).astype("float32"))
    assert alone(x)[0].tolist() == alone(x)[0].tolist()
    layer = nn.LSTM(3, 64, 2, dropout=0.5)
    assert layer(x)[0].tolist() != layer(x)[0].tolist()
    layer.eval()
    assert layer(x)[0].tolist() == layer(x)[0].tolist()
    first = nn.LSTM(3, 64)
    first.load_state_dict({k: v for k, v in layer.state_dict().items() if k.endswith("l0")})
    layer.train()
    nn.manual_seed(3)
    thinned = layer(x)[0]
    nn.manual_seed(3)
    second = nn.LSTM(64, 64)
    second.load_state_dict(
        {k[:-1] + "0": v for k, v in layer.state_dict().items() if k.endswith("l1")}
    )
    nn.manual_seed(3)
    want = second(nn.functional.dropout(first(x)[0], 0.5))[0]
    assert thinned.tolist() == want.tolist()


def test_more_of_pytorch() -> None:
    layer = nn.LSTM(3, 4, 2, bidirectional=True)
    assert [len(w) for w in layer.all_weights] == [4] * 4
    assert layer.all_weights[3][1] is layer.weight_hh_l1_reverse
    layer.flatten_parameters()
    assert layer.label() == "LSTM 3->4"
    assert nn.GRUCell(3, 4).label() == "GRUCell 3->4"


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: nn.LSTM(3, 4, proj_size=2), ParameterError, "LSTM: proj_size=2; hidden states"),
        (lambda: nn.RNN(3, 4, nonlinearity="gelu"), ParameterError, "it is 'tanh' or 'relu'"),
        (lambda: nn.RNNCell(3, 4, nonlinearity="gelu"), ParameterError, "it is 'tanh' or 'relu'"),
        (lambda: nn.GRU(3, 4, 0), ParameterError, "num_layers=0; at least 1 layer"),
        (lambda: nn.GRU(3, 4, 2, dropout=1.5), ParameterError, "dropout=1.5 is a probability"),
        (lambda: nn.GRU(0, 4), ShapeError, "at least 1 feature and 1 hidden unit"),
        (lambda: nn.GRUCell(4, 0), ShapeError, "at least 1 feature and 1 hidden unit"),
    ],
)
def test_bad_options(make, error, text) -> None:
    with pytest.raises(error, match=text):
        make()


def zeros(*shape, dtype="float32"):
    return gg.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: nn.LSTM(3, 4)(zeros(5, 2, 2)), ShapeError,
         r"LSTM 3->4: input has 2 features \(shape \(5, 2, 2\)\), the layer takes 3; .* LSTM\(2, "),
        (lambda: nn.LSTM(3, 4)(zeros(3)), ShapeError, r"input of shape \(3,\), expected \(steps, "),
        (lambda: nn.GRU(3, 4, batch_first=True)(zeros(1, 1, 1, 3)), ShapeError,
         r"expected \(batch, steps, features\)"),
        (lambda: nn.GRU(3, 4)(zeros(0, 2, 3)), ShapeError, r"\(0, 2, 3\) has no steps"),
        (lambda: nn.GRU(3, 4)(zeros(0, 3)), ShapeError, r"\(0, 3\) has no steps"),
        (lambda: nn.GRU(3, 4, batch_first=True)(zeros(2, 0, 3)), ShapeError, "has no steps"),
        (lambda: nn.RNN(3, 4)(zeros(5, 2, 3), zeros(1, 3, 4)), ShapeError,
         r"h0 of shape \(1, 3, 4\), expected \(1, 2, 4\)"),
        (lambda: nn.RNN(3, 4)(zeros(5, 3), zeros(1, 1, 4)), ShapeError, r"expected \(1, 4\)"),
        (lambda: nn.LSTM(3, 4, 2, bidirectional=True)(
            zeros(5, 2, 3), (zeros(4, 2, 4), zeros(2, 2, 4))), ShapeError,
         r"c0 of shape \(2, 2, 4\), expected \(4, 2, 4\)"),
        (lambda: nn.LSTM(3, 4)(zeros(5, 2, 3), zeros(1, 2, 4)), ParameterError,
         r"hx is a pair \(hidden state, cell state\), not Tensor"),
        (lambda: nn.LSTM(3, 4)(zeros(5, 2, 3), (zeros(1, 2, 4),)), ParameterError, "not 1 of them"),
        (lambda: nn.LSTM(3, 4)(zeros(5, 2, 3, dtype="float64")), DTypeError,
         "x of float64 and weight_hh of float32"),
        (lambda: nn.LSTMCell(3, 4)(zeros(2, 4)), ShapeError, r"expected \(batch, 3\) or \(3,\)"),
        (lambda: nn.LSTMCell(3, 4)(zeros(2, 3), (zeros(2, 4), zeros(4))), ShapeError,
         r"cx of shape \(4,\), expected \(2, 4\)"),
        (lambda: nn.LSTMCell(3, 4)(zeros(2, 3), zeros(2, 4)), ParameterError, "hx is a pair"),
        (lambda: nn.GRUCell(3, 4)(zeros(1, 2, 3)), ShapeError, r"input of shape \(1, 2, 3\)"),
    ],
)  # fmt: skip
def test_bad_input(call, error, text) -> None:
    with pytest.raises(error, match=text):
        call()


def test_the_error_names_the_layer() -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.GRU(3, 4)

        def forward(self, x):
            return self.encoder(x)

    with pytest.raises(ShapeError, match=r"Model.encoder \(GRU 3->4\): input has 2 features"):
        Model()(zeros(5, 2, 2))


@pytest.mark.parametrize("name", LAYERS)
def test_training_reads_nothing(name) -> None:
    with counting() as counts:
        x = gg.tensor(random(5, 2, 3).astype("float32"), device="counting", requires_grad=True)
        net = getattr(nn, name)(3, 4, 2, bidirectional=True, dropout=0.5).to("counting")
        uploads = counts.uploads
        output, _ = net(x)
        output.backward(gg.ones_like(output))
        assert counts.host_reads == 0
        assert counts.uploads == uploads
