"""Every remedy: what it changes, that the signal is better for it, and where it says no."""

import math

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.health import surgery
from gpugrad.health.diagnosis import diagnose, remedied
from gpugrad.health.errors import HealthError
from gpugrad.health.findings import KINDS
from gpugrad.health.remedies import REMEDIES, remedies_for
from gpugrad.health.surgery import Impossible, Residual
from gpugrad.models.mlp import MLP

RNG = np.random.default_rng(0)
X = RNG.standard_normal((48, 8)).astype(np.float32)
Y = (X @ RNG.standard_normal((8, 4))).argmax(1)


def plain(depth, activation, gain, width=24):
    gg.manual_seed(depth)
    modules = []
    for i in range(depth - 1):
        modules += [nn.Linear(width if i else 8, width), activation()]
    modules.append(nn.Linear(width, 4))
    for module in modules[::2]:
        nn.init.normal_(module.weight, 0, gain / math.sqrt(module.in_features))
    return nn.Sequential(*modules)


def names(model):
    return [type(m).__name__ for m in model]


def outputs(model, x=X):
    """Standard deviation of what each linear layer puts out."""
    found = []
    for m in model.modules():
        if isinstance(m, nn.Linear):
            m.register_forward_hook(lambda m, a, y: found.append(float(y.detach().numpy().std())))
    model(gg.tensor(x))
    return found


def test_the_table():
    for kind in KINDS:
        assert remedies_for(kind)
    for name, remedy in REMEDIES.items():
        assert remedy.name == name and remedy.change and remedy.why
        assert set(remedy.against) <= set(KINDS)
        # Each is made to a net, to the training, or by hand.
        assert (remedy.apply is not None) + (remedy.clips or remedy.slower != 1) + bool(
            remedy.by_hand
        ) == 1
    assert remedies_for("healthy") == ()
    assert REMEDIES["learning-rate"].text(lr="0.0001") == "lower the learning rate to 0.0001"


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Sigmoid, nn.GELU])
def test_initialise_brings_every_layer_to_variance_one(activation):
    model = remedied(plain(12, activation, 0.1), "initialise", (X, Y))
    np.testing.assert_allclose(outputs(model), 1.0, rtol=1e-3)
    w = model[2].weight.detach().numpy()
    product = w @ w.T / (w @ w.T)[0, 0]
    np.testing.assert_allclose(product, np.eye(24), atol=1e-5)


def test_initialise_leaves_frozen_layers_and_shared_ones_count_once():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), shared, nn.Tanh(), shared)
    model[0].requires_grad_(False)
    before = model[0].weight.numpy().copy()
    after = remedied(model, "initialise", (X, X))
    np.testing.assert_array_equal(after[0].weight.numpy(), before)
    assert after[2] is after[4]
    assert outputs(after)[1] == pytest.approx(1.0, rel=1e-3)


def test_layer_norm_goes_before_activations():
    model = remedied(MLP(8, 4, width=16, depth=2), "layer-norm", (X, Y))
    assert names(model) == [
        "Flatten", "Linear", "LayerNorm", "ReLU", "Linear", "LayerNorm", "ReLU", "Linear",
    ]  # fmt: skip
    picture = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
    x = np.zeros((2, 1, 5, 5), np.float32)
    model = remedied(picture, "layer-norm", (x, np.zeros((2, 36), np.float32)))
    assert names(model) == ["Conv2d", "GroupNorm", "ReLU", "Flatten"]


def test_names_of_modules_stay():
    model = nn.Sequential({"first": nn.Linear(8, 8), "bend": nn.Tanh(), "last": nn.Linear(8, 4)})
    found = remedied(model, "layer-norm", (X, Y))
    assert [name for name, _ in found.named_children()] == ["first", "bend_norm", "bend", "last"]


def test_short_cuts_go_around_blocks_that_keep_their_width():
    model = remedied(plain(5, nn.Tanh, 1.0), "residual", (X, Y))
    assert names(model) == ["Linear", "Tanh", "Residual", "Residual", "Residual", "Linear"]
    assert names(model[2].body) == ["LayerNorm", "Linear", "Tanh"]
    x = gg.tensor(RNG.standard_normal((3, 24)).astype(np.float32))
    y, body = model[2](x).detach().numpy(), model[2].body(x).detach().numpy()
    np.testing.assert_allclose(y, x.numpy() + body, rtol=1e-6)
    # Blocks that have a short cut already are left alone.
    again = nn.Sequential(*(Residual(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
    with pytest.raises(Impossible, match="two blocks in a row"):
        remedied(again, "residual", (X, X))


def test_relu_takes_the_place_of_what_saturates():
    model = remedied(plain(6, nn.Sigmoid, 1.0), "activation", (X, Y))
    assert {type(m) for m in model[1::2]} == {nn.ReLU}
    np.testing.assert_allclose(outputs(model), 1.0, rtol=1e-3)
    with pytest.raises(Impossible, match="saturates"):
        remedied(plain(3, nn.ReLU, 1.0), "activation", (X, Y))
    leaky = remedied(plain(3, nn.ReLU, 1.0), "leak", (X, Y))
    assert isinstance(leaky[1], nn.LeakyReLU)


class Reader(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


def test_gates_take_the_place_of_plain_recurrence():
    gg.manual_seed(0)
    x = RNG.standard_normal((48, 40, 5)).astype(np.float32)
    model = Reader(nn.RNN(5, 16, batch_first=True))
    before = diagnose(model, (x, Y), steps=0)
    assert before.verdict.kind == "vanishing"
    gated = remedied(model, "gating", (x, Y))
    assert isinstance(gated.cell, nn.GRU)
    after = diagnose(gated, (x, Y), steps=0)
    assert after.times["cell"][0] / after.times["cell"][-1] > 1e-4
    assert after.verdict.healthy
    lstm = remedied(Reader(nn.LSTM(5, 16, batch_first=True)), "open-gates", (x, Y))
    bias = lstm.cell.bias_ih_l0.detach().numpy().reshape(4, 16)
    assert bias[1].max() == pytest.approx(math.log(39), rel=1e-5)
    np.testing.assert_allclose(bias[0], -bias[1], atol=1e-6)
    with pytest.raises(Impossible, match="no plain RNN"):
        remedied(lstm, "gating", (x, Y))


def test_wider_numbers():
    model = MLP(8, 4, width=8, depth=1).to("float16")
    after = remedied(model, "loss-scale", (X, Y))
    assert {p.dtype.name for p in after.parameters()} == {"float32"}
    assert {p.dtype.name for p in model.parameters()} == {"float16"}
    with pytest.raises(Impossible, match="float32 or wider"):
        remedied(after, "loss-scale", (X, Y))


def test_trials_are_ranked_by_what_they_reach():
    found = diagnose(plain(16, nn.Sigmoid, 1.0), (X, Y), try_remedies=True)
    assert found.verdict.kind == "vanishing"
    first = found.trials[0]
    assert first.helps and first.rehearsal.learnt
    assert first.rehearsal.end < 0.5 * np.log(4)
    assert 1e-6 < first.ratio < 1e6
    assert found.verdict.findings[0].remedies[0] == first.name
    tried = [t for t in found.trials if t.possible]
    assert [t.helps for t in tried] == sorted((t.helps for t in tried), reverse=True)
    steps = [len(t.rehearsal.losses) for t in tried if t.helps]
    assert steps == sorted(steps)
    assert "gating" not in {t.name for t in found.trials}  # there is nothing recurrent
    assert f"1. {first.name}" in str(found)


def test_what_is_done_to_the_training_is_tried_too():
    # Steps of Adam at 30 are far too long for any net.
    found = diagnose(MLP(8, 4, width=32, depth=8), (X, Y), lr=30.0, try_remedies=True)
    assert found.verdict.kind in ("diverging", "stalled")
    slower = next(t for t in found.trials if t.name == "learning-rate")
    assert slower.rehearsal.lr == pytest.approx(3.0)
    assert slower.text == "lower the learning rate to 3"


def test_what_cannot_be_done_is_said():
    with pytest.raises(HealthError, match="'pray' is no remedy"):
        remedied(nn.Linear(8, 4), "pray", (X, Y))
    with pytest.raises(Impossible, match="no linear"):
        surgery.initialise(nn.Tanh(), lambda: None)
    with pytest.raises(Impossible, match="insert LayerNorm where yours are"):
        remedied(nn.Linear(8, 4), "layer-norm", (X, Y))
    with pytest.raises(Impossible, match="use gating first"):
        remedied(nn.Linear(8, 4), "open-gates", (X, Y))
