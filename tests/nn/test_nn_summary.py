"""Tables of nets: counts against formulas by hand, and nets that are left as they were."""

import threading
from typing import Any

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import models, nn
from gpugrad.core.calls import each_call
from gpugrad.core.primitive import Primitive, registry
from gpugrad.errors import GraphError, ParameterError, ShapeError
from gpugrad.nn import functional as F
from gpugrad.nn.costs import Cost, cost_of
from gpugrad.ops.attention import packed_attention
from tests.ops import harness

N = 5


class Wrap(nn.Module):
    """A function as a net."""

    def __init__(self, function, *children):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(children)

    def forward(self, *args):
        return self.function(*args)


def row(found, path):
    (one,) = (r for r in found.rows if r.path == path)
    return one


def flops(function, *inputs):
    return nn.summary(Wrap(function), *inputs).total_flops


# -- counts ---------------------------------------------------------------------------------------


def test_linear():
    found = nn.summary(nn.Linear(8, 3), (N, 8))
    (own,) = found.rows
    assert own.class_name == "Linear"
    assert own.path == ""
    assert own.output_shapes == ((N, 3),)
    assert own.parameters == own.trainable == found.total_parameters == 27
    assert own.parameter_bytes == found.parameter_bytes == 4 * 27
    assert own.multiply_adds == found.total_multiply_adds == N * 8 * 3
    assert own.flops == found.total_flops == 2 * N * 8 * 3 + N * 3
    assert own.activation_bytes == found.activation_bytes == 4 * N * 8  # the input
    assert nn.summary(nn.Linear(8, 3, bias=False), (2, N, 8)).total_flops == 2 * 2 * N * 8 * 3


@pytest.mark.parametrize(
    ("options", "side"),
    [
        ({}, 8),
        ({"stride": 2, "padding": 1}, 5),
        ({"stride": (1, 3), "groups": 2, "dilation": 2, "bias": False}, None),
    ],
)
def test_convolution(options, side):
    layer = nn.Conv2d(4, 6, 3, **options)
    y = layer(gg.zeros((N, 4, 10, 10), dtype="float32"))
    assert side is None or y.shape == (N, 6, side, side)
    found = nn.summary(layer, (N, 4, 10, 10))
    each = 4 // options.get("groups", 1) * 9
    assert found.total_multiply_adds == y.size * each
    assert found.total_flops == 2 * y.size * each + y.size * options.get("bias", True)
    assert found.activation_bytes == 4 * N * 4 * 100


def test_convolution_on_one_axis():
    found = nn.summary(nn.Conv1d(4, 6, 3, padding=1), (N, 4, 7))
    assert found.total_flops == 2 * N * 6 * 7 * 12 + N * 6 * 7


@pytest.mark.parametrize(
    ("kind", "gates", "cell"), [(nn.RNN, 1, 0), (nn.LSTM, 4, 5), (nn.GRU, 3, 5)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_recurrent(kind, gates, cell, bias):
    steps, batch, features, hidden = 7, 2, 3, 4
    net = kind(features, hidden, num_layers=2, bidirectional=True, bias=bias)
    found = nn.summary(net, (steps, batch, features))
    adds = steps * batch * gates * hidden * 2 * ((features + hidden) + (2 * hidden + hidden))
    assert found.total_multiply_adds == adds
    units = 4 * steps * batch * hidden
    assert found.total_flops == 2 * adds + units * (gates * (4 if bias else 2) + cell)
    assert found.rows[0].output_shapes[0] == (steps, batch, 2 * hidden)


def test_states_of_a_recurrent_layer():
    found = nn.summary(nn.LSTM(3, 4), (7, 2, 3), ((1, 2, 4), (1, 2, 4)))
    assert found.rows[0].output_shapes == ((7, 2, 4), (1, 2, 4), (1, 2, 4))


def test_what_a_recurrent_layer_keeps():
    """All that lies between two steps: the states, the gates, and the input."""
    steps, batch, features, hidden = 7, 2, 3, 4
    found = nn.summary(nn.LSTM(features, hidden), (steps, batch, features))
    assert found.activation_bytes >= 4 * steps * batch * (features + (1 + 1 + 4) * hidden)


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal):
    def run(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    q, k, v = (2, 3, 4, 6), (2, 3, 4, 6), (2, 3, 4, 8)
    pairs = 2 * 3 * 4 * 4
    assert flops(run, q, k, v) == 2 * pairs * (6 + 8) + 5 * pairs
    if not causal:
        assert flops(run, q, (2, 3, 5, 6), (2, 3, 5, 8)) == (2 * 14 + 5) * 2 * 3 * 4 * 5


def test_packed_attention_counts_as_attention_does():
    n, length, heads, features = 2, 5, 3, 4
    packed = flops(lambda x: packed_attention(x, heads=heads), (n, length, 3 * heads * features))
    parts = flops(F.scaled_dot_product_attention, *[(n, heads, length, features)] * 3)
    assert packed == parts == n * heads * length**2 * (2 * 2 * features + 5)


def test_multihead_attention():
    length, batch, width = 5, 3, 16
    found = nn.summary(nn.MultiheadAttention(width, 2), *[(length, batch, width)] * 3)
    adds = length * batch * width * (3 * width + width) + batch * 2 * length**2 * (8 + 8)
    assert found.total_multiply_adds == adds


def test_embedding_is_free():
    found = nn.summary(nn.Embedding(11, 6), ((2, 3), "int64"))
    assert found.total_flops == 0
    assert found.total_parameters == 66
    assert found.rows[0].output_shapes == ((2, 3, 6),)


def test_norms():
    size = N * 8 * 4
    assert nn.summary(nn.LayerNorm(4), (N, 8, 4)).total_flops == 7 * size
    assert nn.summary(nn.GroupNorm(2, 8), (N, 8, 4)).total_flops == 7 * size
    assert nn.summary(nn.RMSNorm(4), (N, 8, 4)).total_flops == 4 * size
    norm = nn.BatchNorm1d(8)
    # Two running averages of 3 operations, the factor of the variance, and the count of batches.
    assert nn.summary(norm, (N, 8, 4)).total_flops == 8 * size + 7 * 8 + 1
    assert nn.summary(norm.eval(), (N, 8, 4)).total_flops == 4 * size


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x: x + 1.0, 96),
        (lambda x: gg.exp(x) * x, 192),
        (lambda x: gg.sum(x), 96),
        (lambda x: gg.mean(x, axis=0), 96),
        (lambda x: gg.softmax(x, axis=-1), 5 * 96),
        (lambda x: gg.argmax(x, axis=-1), 96),
        (lambda x: x > 0.0, 96),
        (lambda x: F.max_pool2d(x, 2), 96),
        (lambda x: F.max_pool2d(x, 3, stride=1), 2 * 3 * 2 * 2 * 9),
        (lambda x: F.avg_pool2d(x, 2), 96),
        (lambda x: x.reshape((-1,))[3:].astype("float64"), 0),
        (lambda x: gg.stack([x, x]), 0),
        (lambda x: gg.tensordot(x, x, axes=4), 2 * 96),
        (lambda x: gg.tensordot(x, x, axes=((2, 3), (2, 3))), 2 * 6 * 6 * 16),
        (lambda x: gg.einsum("ncij,ncjk->ncik", x, x), 2 * 6 * 64),
        (lambda x: x @ x[0, 0, 0], 2 * 96),
        (lambda x: x.detach() * 2.0, 96),
    ],
)
def test_operations(function, count):
    assert flops(function, (2, 3, 4, 4)) == count


def test_an_operation_of_ones_own_counts_its_elements():
    @gg.elementwise(partials=(lambda g: 3.0 * g,))
    def three_times_counted(m, x, /):
        return 3.0 * x

    assert flops(three_times_counted, (4, 2)) == 8


@pytest.mark.parametrize(
    "made", [made for made in harness.operations() if isinstance(made, Primitive)], ids=str
)
def test_every_operation_has_a_count(made):
    for case in harness.cases(made):
        seen: list[Any] = []
        with each_call(lambda *call, seen=seen: seen.append(call)):
            case.call(case.tensors("cpu"))
        assert [call[0] for call in seen] == [made]
        cost = cost_of(*seen[0])
        assert isinstance(cost.flops, int)
        assert cost.flops >= 0


# -- bytes ----------------------------------------------------------------------------------------


def test_kept_bytes_are_those_of_the_graph_without_parameters():
    net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    x = gg.ones((N, 8), dtype="float32")
    whole = gg.graph(net(x)).saved_bytes
    parameters = sum(p.nbytes for p in net.parameters()) - net[2].bias.nbytes  # all but that
    found = nn.summary(net, x)
    assert found.activation_bytes == whole - parameters == 4 * N * (8 + 4)
    assert nn.summary(net, gg.copy(x).requires_grad_()).activation_bytes == found.activation_bytes


def test_what_two_layers_keep_counts_once():
    a, b = nn.Linear(8, 4), nn.Linear(8, 4)
    net = Wrap(lambda x: a(x) + b(x), a, b)
    found = nn.summary(net, (N, 8))
    assert [r.activation_bytes for r in found.rows] == [0, 0, 4 * N * 8, 0]


def test_views_of_one_memory_count_no_more_than_it_has():
    x = gg.ones((N, 5)).requires_grad_()
    one = nn.summary(Wrap(lambda x: gg.sum(x[:, :3] * x[:, :3])), x)
    two = nn.summary(Wrap(lambda x: gg.sum(x[:, :3] * x[:, 2:])), x)
    three = nn.summary(Wrap(lambda x: gg.sum(x[:, :3] * x[:, 1:4] * x[:, 2:])), x)
    assert one.activation_bytes == two.activation_bytes == 8 * N * 5
    # Views of 5 columns, and a product of 3.
    assert three.activation_bytes == 8 * N * (5 + 3)


def test_nothing_is_kept_for_what_is_not_trained():
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False)
    found = nn.summary(net, (N, 8))
    assert found.activation_bytes == 0
    assert found.total_flops == 2 * N * (32 + 8) + N * (4 + 4 + 2)
    assert found.total_parameters == 46
    assert found.trainable_parameters == 0
    net[2].requires_grad_()
    assert [r.trainable for r in nn.summary(net, (N, 8)).rows] == [0, 0, 0, 10]


def test_recording_is_on_whatever_is_around():
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    with gg.no_grad():
        found = nn.summary(net, (N, 8))
        assert not gg.is_grad_enabled()
    assert found == nn.summary(net, (N, 8))
    assert found.activation_bytes > 0


def test_a_graph_behind_the_input_is_not_the_nets():
    x = gg.tensor(np.ones((N, 8), "float32"), requires_grad=True)
    net = nn.Linear(8, 4)
    assert nn.summary(net, gg.exp(x) * x) == nn.summary(net, x)
    freed = gg.exp(x)
    gg.sum(freed).backward()
    assert nn.summary(net, freed).total_flops == nn.summary(net, x).total_flops


# -- layers with their activations ----------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, lambda: nn.GELU("tanh")])
def test_a_joined_activation_has_a_row(bias, activation):
    net = nn.Sequential(nn.Linear(8, 4, bias=bias), activation(), nn.Linear(4, 4))
    found = nn.summary(net, (N, 8))
    layer, act = row(found, "0"), row(found, "1")
    assert layer.flops == 2 * N * 32 + N * 4  # without a bias it adds zeros
    assert act.flops == N * 4
    assert act.output_shapes == layer.output_shapes == ((N, 4),)
    assert act.calls == 1
    assert act.joined == "0"
    assert layer.joined == row(found, "2").joined == ""


def test_joined_or_apart_the_count_is_the_same():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4), nn.GELU())
    joined = nn.summary(net, (N, 1, 6, 6))
    hooked = [m.register_forward_hook(lambda *_: None) for m in net]
    apart = nn.summary(net, (N, 1, 6, 6))
    for remove in hooked:
        remove()
    assert [r.joined for r in joined.rows] == ["", "", "0", "", "", "3"]
    assert [r.joined for r in apart.rows] == [""] * 6
    assert [r.flops for r in joined.rows] == [r.flops for r in apart.rows]


def test_one_activation_behind_two_layers():
    act = nn.ReLU()
    net = nn.Sequential(nn.Linear(8, 4), act, nn.Linear(4, 2), act)
    found = nn.summary(net, (N, 8))
    assert len(found.rows) == 4
    assert row(found, "1").calls == 2
    assert row(found, "1").flops == N * (4 + 2)
    assert "2 calls" in str(found)


# -- rows -----------------------------------------------------------------------------------------


def test_shared_parameters_count_once():
    net = models.GPT(30, context=8, width=16, depth=1, heads=2)
    found = nn.summary(net, ((2, 5), "int64"))
    head = row(found, "head")
    assert head.parameters == head.parameter_bytes == 0
    assert head.shared == (("weight", "tokens.weight"),)
    assert "weight is tokens.weight" in str(found)
    assert found.total_parameters == sum(p.size for p in net.parameters())


def test_a_module_that_is_not_called():
    found = nn.summary(Wrap(lambda x: x, nn.Linear(2, 2)), (2, 2))
    idle = row(found, "parts.0")
    assert (idle.calls, idle.output_shapes, idle.flops, idle.parameters) == (0, (), 0, 6)
    assert "not called" in str(found)


def test_depth_moves_counts_to_the_row_around():
    net = models.GPT(30, context=8, width=16, depth=2, heads=2)
    tokens = ((2, 5), "int64")
    whole = nn.summary(net, tokens)
    for depth in range(5):
        part = nn.summary(net, tokens, depth=depth)
        assert [r.path for r in part.rows] == [r.path for r in whole.rows if r.depth <= depth]
        for total in ("total_parameters", "trainable_parameters", "total_multiply_adds",
                      "total_flops", "parameter_bytes", "activation_bytes"):  # fmt: skip
            assert getattr(part, total) == getattr(whole, total)
    assert nn.summary(net, tokens, depth=0).rows[0].shared == (("head.weight", "tokens.weight"),)
    inner = [r for r in whole.rows if r.path.startswith("blocks.1")]
    assert row(nn.summary(net, tokens, depth=2), "blocks.1").flops == sum(r.flops for r in inner)


def test_hooks_of_the_net_count_for_it():
    net = nn.Sequential(nn.Linear(8, 4))
    remove = net.register_forward_hook(lambda module, args, y: y * 2.0)
    found = nn.summary(net, (N, 8))
    remove()
    assert row(found, "").flops == N * 4


def test_the_table():
    lines = str(nn.summary(models.CNN(1, 12, 12, 10), (2, 12, 12))).splitlines()
    table = lines[:-3]
    assert len(table) == 1 + 16
    assert table[1].startswith("(net) ")
    end = table[0].index("parameters") + len("parameters")
    for line in table[1:]:
        assert line[end - 1].isdigit()
        assert line[end : end + 2] == "  "
    assert all(line == line.rstrip() for line in lines)
    assert lines[-3].endswith("trainable")
    assert "KiB" in lines[-1]


# -- whole nets -----------------------------------------------------------------------------------

NETS = {
    "mlp": (lambda: models.MLP(64, 10, width=16, depth=2, dropout=0.1), (N, 8, 8)),
    "cnn": (lambda: models.CNN(1, 12, 12, 10), (N, 12, 12)),
    "resnet": (lambda: models.ResNet(3, 10, layers=8), (N, 3, 8, 8)),
    "rnn": (lambda: models.RecurrentLM(30, "rnn", width=8), ((N, 6), "int64")),
    "lstm": (lambda: models.RecurrentLM(30, "lstm", 8, 2, dropout=0.1), ((N, 6), "int64")),
    "gru": (lambda: models.RecurrentLM(30, "gru", width=8), ((N, 6), "int64")),
    "gpt": (lambda: models.GPT(30, 8, 16, 2, 2, dropout=0.1), ((N, 6), "int64")),
    "transformer": (lambda: nn.TransformerEncoderLayer(16, 2), (N, 3, 16)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_nets_are_left_as_they_were(name, training):
    make, shape = NETS[name]
    net = make().train(training)
    for p in net.parameters():
        p.grad = gg.ones_like(p)
    attributes = [dict(vars(m)) for m in net.modules()]
    arrays = [x.data for x in (*net.parameters(), *net.buffers())]
    values = [x.copy() for x in arrays]
    grads = [p.grad for p in net.parameters()]
    implementations = {k: dict(made.implementations) for k, made in registry.items()}
    random = gg.default_generator.state
    found = nn.summary(net, shape)
    assert found == nn.summary(net, shape)
    assert found.total_flops > 0
    assert found.total_parameters == sum(p.size for p in net.parameters())
    assert gg.default_generator.state == random
    assert [dict(vars(m)) for m in net.modules()] == attributes
    for x, array, value in zip((*net.parameters(), *net.buffers()), arrays, values):
        assert x.data is array
        np.testing.assert_array_equal(array, value)
    assert all(p.grad is g for p, g in zip(net.parameters(), grads))
    for k, made in registry.items():
        for kind, found_before in implementations[k].items():
            assert made.implementations[kind] is found_before


def test_training_after_a_summary_goes_on_as_without():
    def train(look):
        gg.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5))
        x = gg.asarray(np.random.default_rng(0).random((N, 8), "float32"))
        y = net(x)
        if look:
            nn.summary(net, x)  # between forward and backward
        gg.sum(y * y).backward()
        return [p.grad.numpy() for p in net.parameters()] + [b.numpy() for b in net.buffers()]

    for a, b in zip(train(False), train(True)):
        np.testing.assert_array_equal(a, b)


def test_an_error_leaves_the_net_as_it_was():
    net = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(7, 4))
    mean = net[0].running_mean.data
    with pytest.raises(ShapeError, match=r"Sequential\.1 \(Linear 7->4\)"):
        nn.summary(net, (N, 8))
    assert net[0].running_mean.data is mean
    assert not mean.any()
    assert all("forward" not in vars(m) for m in net.modules())


def test_a_generator_of_the_nets_own_goes_back():
    net = nn.Sequential(nn.Dropout(0.5))
    net[0].generator = generator = nn.Generator(3)
    generator.stream()
    nn.summary(Wrap(lambda x: F.dropout(x, generator=generator), net), (N, 8))
    assert generator.state == (3, 1)


@pytest.mark.parametrize("make", [
    lambda checkpoint: (models.GPT(30, 8, 16, 2, 2, checkpoint=checkpoint), ((N, 6), "int64")),
    lambda checkpoint: (models.ResNet(3, 10, layers=8, checkpoint=checkpoint), (N, 3, 8, 8)),
])  # fmt: skip
def test_a_checkpoint_keeps_less_and_computes_the_same(make):
    plain, checkpointed = (nn.summary(*make(flag)) for flag in (False, True))
    assert checkpointed.activation_bytes < plain.activation_bytes
    assert [r.flops for r in checkpointed.rows] == [r.flops for r in plain.rows]
    assert [r.calls for r in checkpointed.rows] == [r.calls for r in plain.rows]


def test_autocast_halves_what_is_kept():
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64, bias=False))
    whole = nn.summary(net, (1000, 64))
    with gg.autocast("cpu"):
        narrow = nn.summary(net, (1000, 64))
    assert narrow.total_flops == whole.total_flops
    converted = 2 * (64 * 64 + 64 + 64 * 64)  # both weights, and a bias
    assert narrow.activation_bytes == whole.activation_bytes // 2 + converted


def test_another_array_library():
    pytest.importorskip("array_api_strict")
    net = models.CNN(1, 8, 8, 4, features=2, hidden=4)
    want = nn.summary(net, (N, 8, 8))
    found = nn.summary(net.to("strict"), (N, 8, 8))
    for a, b in zip(found.rows, want.rows):
        assert (a.flops, a.output_shapes, a.parameter_bytes) == (
            b.flops, b.output_shapes, b.parameter_bytes)  # fmt: skip


# -- inputs ---------------------------------------------------------------------------------------


def test_inputs():
    seen = []

    def take(*args):
        seen.append(args)

    net = Wrap(take)
    nn.summary(net, (2, 3), ((2,), "int64"), ((2,), np.float64), gg.ones(3), np.ones(2), None,
               ((4,), (5,)), ())  # fmt: skip
    a, b, c, d, e, f, g, h = seen[0]
    assert (a.shape, a.dtype) == ((2, 3), np.float32)
    assert (b.shape, b.dtype) == ((2,), np.int64)
    assert (c.shape, c.dtype) == ((2,), np.float64)
    assert (d.shape, e.shape, f) == ((3,), (2,), None)
    assert [x.shape for x in g] == [(4,), (5,)]
    assert (h.shape, h.dtype) == ((), np.float32)


@pytest.mark.parametrize("wrong", [3, "x", [2, 3], {"x": 1}])
def test_an_input_that_is_none(wrong):
    with pytest.raises(ParameterError, match=r"summary: an input is a tensor"):
        nn.summary(nn.Linear(2, 2), wrong)


def test_a_net_that_wants_an_input():
    with pytest.raises(ParameterError, match=r"summary: Linear needs an input.*\(8, 32\)"):
        nn.summary(nn.Linear(2, 2))

    class Own(nn.Module):
        def forward(self, x=None):
            return gg.ones((2,))

    assert nn.summary(Own()).total_flops == 0


def test_a_depth_that_is_none():
    with pytest.raises(ParameterError, match="depth=-1"):
        nn.summary(nn.Linear(2, 2), (2, 2), depth=-1)


# -- watching operations --------------------------------------------------------------------------


def test_calls_of_other_threads_are_not_told():
    seen = []
    x = gg.ones(3)

    def other():
        gg.exp(x)

    with each_call(lambda made, *_: seen.append(made.name)):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        gg.log(x)
    assert seen == ["log"]
    gg.exp(x)
    assert seen == ["log"]


def test_blocks_inside_each_other():
    outer, inner = [], []
    x = gg.ones(3)
    with each_call(lambda made, *_: outer.append(made.name)):
        with each_call(lambda made, *_: inner.append(made.name)):
            gg.exp(x)
        gg.log(x)
    assert outer == ["exp", "log"]
    assert inner == ["exp"]


def test_a_table_that_was_emptied_is_told():
    with pytest.raises(GraphError, match="looked up anew"), each_call(lambda *_: None):
        gg.explain(gg.exp)(gg.ones(3))
    assert gg.exp(gg.zeros(())).item() == 1.0


def test_operands_parameters_and_results():
    seen = []
    with each_call(lambda *call: seen.append(call)):
        y = F.linear(gg.ones((2, 3)), gg.ones((4, 3)), gg.ones(4), activation="relu")
        parts = gg.unstack(y)
    (first, operands, parameters, results), (second, *_, several) = seen
    assert (first.name, second.name) == ("linear_activation", "unstack")
    assert [x.shape for x in operands] == [(2, 3), (4, 3), (4,)]
    assert parameters == {"activation": "relu"}
    assert results[0] is y.data
    assert len(results) == 1
    assert len(several) == len(parts) == 2


def test_costs_add_up():
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)
    assert Cost(10, 2, 3).flops == 25
