"""Diagnoses of small nets, sound and sick ones, and that the net is left as it was."""

import json
import math

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.health.diagnosis import diagnose
from gpugrad.health.errors import HealthError
from gpugrad.health.surgery import Residual
from gpugrad.models.mlp import MLP

RNG = np.random.default_rng(0)
X = RNG.standard_normal((48, 8)).astype(np.float32)
Y = (X @ RNG.standard_normal((8, 4))).argmax(1)


def plain(depth, activation, gain, width=24):
    gg.manual_seed(depth)
    modules = []
    inputs = 8
    for _ in range(depth - 1):
        modules += [nn.Linear(inputs, width), activation()]
        inputs = width
    modules.append(nn.Linear(inputs, 4))
    for module in modules[::2]:
        nn.init.normal_(module.weight, 0, gain / math.sqrt(module.in_features))
        nn.init.zeros_(module.bias)
    return nn.Sequential(*modules)


def test_a_sound_net():
    found = diagnose(plain(4, nn.ReLU, 1.4), (X, Y))
    assert found.verdict.healthy
    assert found.rehearsal.learnt
    assert found.rehearsal.chance == pytest.approx(np.log(4), rel=0.05)
    assert found.rehearsal.end < 0.5 * np.log(4)
    assert len(found.rehearsal.losses) < 300  # it stops when it knows
    assert found.trials == ()


def test_a_net_that_vanishes_beside_its_theory():
    found = diagnose(plain(20, nn.Sigmoid, 1.0, width=100), (X, Y), steps=0)
    worst = found.verdict.findings[0]
    assert (worst.kind, worst.layer) == ("vanishing", "0")
    assert worst.growth == pytest.approx(0.235, abs=0.02)
    assert found.theory.field.phase == "ordered"
    assert found.theory.measured == pytest.approx(found.theory.field.gain, rel=0.05)
    for group in found.groups[1:]:
        assert group.gain == pytest.approx(group.predicted, rel=0.25)
    assert found.separation[-2] < 1e-5  # all inputs look alike
    text = str(found)
    assert "mean-field theory of 19 Sigmoid layers" in text
    assert "… 10 more" in text and len(text.splitlines()) < 30


def test_a_net_that_explodes():
    found = diagnose(plain(30, nn.Tanh, 4.0), (X, Y))
    assert found.verdict.kind == "exploding"
    assert found.verdict.findings[0].growth == pytest.approx(1.5, abs=0.15)
    assert found.theory.field.phase == "chaotic"


def test_layer_norm_in_the_prediction():
    gg.manual_seed(0)
    modules = []
    for _ in range(6):
        modules += [nn.Linear(200, 200), nn.LayerNorm(200), nn.Tanh()]
        nn.init.normal_(modules[-3].weight, 0, 3 / math.sqrt(200))
    x = RNG.standard_normal((16, 200)).astype(np.float32)
    # A gradient that comes in at random, as the theory has it.
    found = diagnose(
        nn.Sequential(*modules), (x, x[::-1].copy()), lambda y, g: (y * g).sum(), steps=0
    )
    for group in found.groups[1:]:
        assert group.gain == pytest.approx(group.predicted, rel=0.1)


def test_recurrent_nets_through_time():
    class Reader(nn.Module):
        def __init__(self, cell):
            super().__init__()
            self.cell = cell
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.cell(x)[0][:, -1])

    gg.manual_seed(0)
    x = RNG.standard_normal((48, 60, 5)).astype(np.float32)
    reader = Reader(nn.RNN(5, 16, batch_first=True))
    found = diagnose(reader, (x, Y), steps=0)
    assert found.times["cell"].shape == (60,)
    worst = found.verdict.findings[0]
    assert (worst.kind, worst.layer) == ("vanishing", "cell, step 0")
    assert "a time step over 59 time steps" in worst.text
    assert worst.remedies[-1] == "gating"
    # The same figures from the gradient of the inputs themselves.
    z = gg.tensor(x, requires_grad=True)
    nn.functional.cross_entropy(reader(z), gg.tensor(Y)).backward()
    exact = np.sqrt((z.grad.numpy().astype(float) ** 2).mean((0, 2)))
    np.testing.assert_allclose(found.times["cell"], exact, rtol=1e-4)


def test_the_model_is_left_as_it_was():
    gg.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(16, 4)
    ).eval()
    nn.functional.cross_entropy(model(gg.tensor(X)), gg.tensor(Y)).backward()
    before = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    grads = [p.grad.numpy().copy() for p in model.parameters()]
    state = gg.default_generator.state
    diagnose(model, (X, Y), try_remedies=True, steps=20)
    for k, v in model.state_dict().items():
        np.testing.assert_array_equal(v.numpy(), before[k])
    for p, g in zip(model.parameters(), grads):
        np.testing.assert_array_equal(p.grad.numpy(), g)
    assert gg.default_generator.state == state
    assert not any(m.training or m._hooks for m in model.modules())
    assert [type(m).__name__ for m in model] == [
        "Linear", "BatchNorm1d", "Sigmoid", "Dropout", "Linear",
    ]  # fmt: skip


def test_the_same_model_batch_and_seed_have_the_same_diagnosis():
    gg.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 4))

    def losses(**options):
        return diagnose(model, (X, Y), steps=20, **options).rehearsal.losses.tolist()

    first = losses()
    gg.default_generator.manual_seed(77)
    assert losses() == first
    assert losses(seed=1) != first


def test_what_is_learnt_by_heart_is_not_learnt():
    gg.manual_seed(44)
    model = nn.Sequential(
        nn.Linear(8, 24), *(Residual(nn.Linear(24, 24), nn.ReLU()) for _ in range(8)),
        nn.Linear(24, 4),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 2.8 / math.sqrt(module.in_features))
    alone = diagnose(model, (X, Y), batches=1)
    assert alone.rehearsal.learnt and alone.verdict.healthy
    among_others = diagnose(model, (X, Y))
    assert not among_others.rehearsal.learnt
    assert among_others.verdict.kind == "exploding"


def test_the_optimiser_and_the_learning_rate_are_those_of_the_training():
    model = plain(3, nn.ReLU, 1.4)
    assert diagnose(model, (X, Y), optimizer=lambda p: gg.optim.SGD(p, lr=0.1)).verdict.healthy
    slow = diagnose(model, (X, Y), optimizer=lambda p: gg.optim.SGD(p, lr=1e-6), try_remedies=True)
    assert slow.verdict.kind == "stalled"
    assert slow.rehearsal.lr == 1e-6
    assert diagnose(model, (X, Y), lr=1e-8).verdict.kind == "stalled"
    fast = diagnose(
        model, (X, Y), optimizer=lambda p: gg.optim.SGD(p, lr=1e4, momentum=0.9), try_remedies=True
    )
    assert not fast.verdict.healthy
    slower = next(t for t in fast.trials if t.name == "learning-rate")
    assert slower.rehearsal.lr == pytest.approx(1e3)
    assert "lower the learning rate to 1000" in slower.text


def test_losses_and_batches():
    target = (X @ RNG.standard_normal((8, 2))).astype(np.float32)
    gg.manual_seed(0)
    found = diagnose(nn.Linear(8, 2), (X, target), lr=0.1)  # float targets: squared errors
    assert found.verdict.healthy
    assert found.rehearsal.chance == pytest.approx(float(target.var(0).mean()), rel=1e-5)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, a, b):
            return {"scores": self.layer(a + b)}

    own = diagnose(
        Two(), ((X, X), Y), lambda out, y: nn.functional.cross_entropy(out["scores"], y), lr=0.1
    )
    assert own.verdict.healthy and own.rehearsal.chance is None
    with pytest.raises(HealthError, match="a batch is a pair"):
        diagnose(nn.Linear(8, 4), X)


def test_the_result_is_made_for_json():
    found = diagnose(plain(8, nn.Sigmoid, 0.5), (X, Y), steps=20, try_remedies=True)
    there = json.loads(json.dumps(found.as_dict()))
    assert there["verdict"]["kind"] == found.verdict.kind
    assert len(there["groups"]) == 8
    assert there["theory"]["gain"] == pytest.approx(found.theory.field.gain)
    assert [t["name"] for t in there["trials"]] == [t.name for t in found.trials]


# -- bad input -------------------------------------------------------------------------------------


def kinds(model, x=X, **options):
    return [f.kind for f in diagnose(model, (x, Y), **options).verdict.findings]


def test_nothing_to_train():
    found = diagnose(nn.Sequential(nn.Tanh(), nn.Identity()), (X, Y)).verdict
    assert found.kind == "not reached" and "no parameters" in found.findings[0].text
    frozen = MLP(8, 4, width=8, depth=1).requires_grad_(False)
    found = diagnose(frozen, (X, Y)).verdict
    assert found.kind == "not reached" and "frozen" in found.findings[0].text


def test_a_frozen_layer_is_no_trouble():
    for layer in (1, 3):
        model = MLP(8, 4, width=24, depth=2)
        model[layer].requires_grad_(False)
        assert kinds(model) == ["healthy"]


def test_shared_parameters():
    gg.manual_seed(1)
    shared = nn.Linear(24, 24)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(),
                          nn.Linear(24, 4))  # fmt: skip
    for layer in (model[0], shared, model[6]):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    found = diagnose(model, (X, Y), try_remedies=True)
    assert found.verdict.healthy
    assert found.record.layers == ["0", "1", "2", "3", "5", "6"]


def test_layers_that_the_loss_does_not_reach():
    class Split(nn.Module):
        def __init__(self, detach):
            super().__init__()
            self.used, self.other, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)
            self.detach = detach

        def forward(self, x):
            y = self.used(x)
            return self.head(y + self.other(x).detach() if self.detach else y)

    for detach in (True, False):
        found = diagnose(Split(detach), (X, Y)).verdict.findings[0]
        assert (found.kind, found.layer, found.remedies) == ("not reached", "other", ("connect",))


def test_half_precision_that_overflows():
    gg.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(64, 64), nn.ReLU())))
    for module in model[::2]:
        nn.init.normal_(module.weight, 0, 6)
    x = 50 * RNG.standard_normal((16, 64)).astype(np.float32)
    found = diagnose(model.to("float16"), (x, x)).verdict.findings[0]
    assert (found.kind, found.layer, found.step) == ("non-finite", "2", 1)
    assert "loss-scale" in found.remedies


def test_nan_from_the_first_step():
    bad = X.copy()
    bad[3, 2] = np.nan
    (found,) = diagnose(MLP(8, 4, width=8, depth=1), (bad, Y)).verdict.findings
    assert found.kind == "non-finite" and "input 0" in found.text
    model = MLP(8, 4, width=8, depth=2)
    with gg.no_grad():
        model[3].weight[0, 0] = float("nan")
    found = diagnose(model, (X, Y)).verdict.findings[0]
    assert (found.kind, found.layer) == ("non-finite", "3")


def test_units_that_are_dead():
    gg.manual_seed(0)
    model = MLP(8, 4, width=24, depth=2)
    with gg.no_grad():
        model[3].bias[...] = -100.0
    found = diagnose(model, (X, Y)).verdict.findings
    assert (found[0].kind, found[0].layer) == ("dead", "4")


def test_a_model_that_cannot_be_copied():
    model = nn.Linear(8, 4)
    model.file = (i for i in range(3))
    with pytest.raises(HealthError, match="cannot be copied"):
        diagnose(model, (X, Y))
