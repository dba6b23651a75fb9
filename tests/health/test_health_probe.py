"""One forward and backward, observed: what is measured is what is there, in every kind of net."""

import math

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.health import HealthError, judge, observe
from gpugrad.health.probe import layers_of
from tests.backend.counting import counting


def data(*shape, seed=0, dtype="float32"):
    return gg.tensor(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def squares(model, x):
    def run():
        y = model(x)
        y = y[0] if isinstance(y, tuple) else y
        loss = (y * y).mean()
        loss.backward()
        return loss

    return run


def at(record, statistic):
    return dict(zip(record.layers, record.values[statistic][0].tolist()))


def test_what_is_measured_is_there() -> None:
    gg.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.ReLU())
    model[0].weight.data[...] *= 20
    x = data(11, 5)
    record = observe(model, squares(model, x))
    assert record.layers == ["0", "1", "2", "3"]
    assert record.kinds == ["Linear", "Tanh", "Linear", "ReLU"]
    assert record.steps.tolist() == [1]
    outs = [model[: i + 1](x).detach().numpy() for i in range(4)]
    for i, y in enumerate(outs):
        for name, want in [
            ("mean", y.mean()), ("std", y.std()), ("min", y.min()), ("max", y.max()),
            ("nonfinite", 0),
        ]:  # fmt: skip
            got = record.values[f"activation_{name}"][0, i]
            assert got == pytest.approx(want, rel=1e-5, abs=1e-6), (i, name)
    saturated = np.mean(1 - outs[1] ** 2 < 0.01)
    assert 0.1 < saturated < 1
    np.testing.assert_allclose(record.values["saturated"][0], [np.nan, saturated, np.nan, np.nan])
    dead = np.mean((outs[3] == 0).all(axis=0))
    np.testing.assert_allclose(record.values["dead"][0], [np.nan, np.nan, np.nan, dead])
    for i, layer in ((0, model[0]), (2, model[2])):
        g = np.concatenate([p.grad.numpy().ravel() for p in layer.parameters()])
        p = np.concatenate([p.detach().numpy().ravel() for p in layer.parameters()])
        for name, want in [
            ("gradient_norm", np.linalg.norm(g)), ("gradient_max", np.abs(g).max()),
            ("gradient_nonfinite", 0), ("gradient_zeros", np.mean(g == 0)),
            ("parameter_norm", np.linalg.norm(p)), ("parameter_min", p.min()),
            ("parameter_max", p.max()),
        ]:  # fmt: skip
            assert record.values[name][0, i] == pytest.approx(want, rel=1e-5), name
    assert np.isnan(record.values["gradient_norm"][0, [1, 3]]).all()
    assert np.isnan(record.values["update_ratio"]).all()
    # The backward signal, by tensors that keep their gradients.
    y, kept = x, []
    for layer in model:
        y = layer(y)
        y.retain_grad()
        kept.append(y)
    loss = (y * y).mean()
    loss.backward()
    want = [np.sqrt(np.mean(k.grad.numpy() ** 2)) for k in kept]
    np.testing.assert_allclose(record.values["signal"][0], want, rtol=1e-5)
    assert record.scalars["loss"][0] == pytest.approx(loss.item(), rel=1e-6)


def test_nothing_of_the_model_changes() -> None:
    model = nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(6, 6), nn.Tanh())])
    x = data(4, 6)
    run = squares(model, x)
    run()
    before = [p.grad.numpy().copy() for p in model.parameters()]
    model.zero_grad()
    observe(model, run)
    for p, g in zip(model.parameters(), before):
        np.testing.assert_allclose(p.grad.numpy(), g, rtol=1e-5, atol=1e-7)
    assert all(not m._hooks for m in model.modules())


def test_joined_layers_come_apart_only_while_they_are_observed() -> None:
    model = nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(6, 6), nn.Tanh())])
    x = data(100, 6)
    with gg.use_kernels("require"):
        joined = model(x).grad_fn.primitive.name
        record = observe(model, squares(model, x))
        assert model(x).grad_fn.primitive.name == joined == "layers"
    assert len(record.layers) == 40
    assert not np.isnan(record.values["signal"]).any()


def test_transformer_and_attention() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    record = observe(model, squares(model, data(3, 5, 8)))
    names = at(record, "gradient_norm")
    attention = model.layers[0].self_attn
    own = [attention.in_proj_weight, attention.in_proj_bias]
    want = math.sqrt(sum(float((p.grad * p.grad).sum()) for p in own))
    assert names["layers.0.self_attn"] == pytest.approx(want, rel=1e-5)
    assert names["layers.0.self_attn.out_proj"] > 0
    # The activation is computed by linear1 itself.
    assert 0 <= at(record, "dead")["layers.0.linear1"] < 1
    assert not np.isnan(record.values["signal"]).any()
    assert record.layers.index("layers.0.linear1") < record.layers.index("layers.0.linear2")


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers(kind) -> None:
    model = kind(3, 4, num_layers=2, batch_first=True)
    record = observe(model, squares(model, data(2, 6, 3)))
    assert record.layers == [kind.__name__]
    assert record.values["signal"][0, 0] > 0 and record.values["gradient_norm"][0, 0] > 0
    assert np.isnan(record.values["saturated"][0, 0]) == (kind is not nn.RNN)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.act = nn.Tanh()
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.layer.weight

    def forward(self, x):
        return self.tied(self.act(self.layer(self.act(self.layer(x)))))


def test_shared_layers_and_parameters_count_once() -> None:
    model = Shared()
    x = data(9, 4)
    record = observe(model, squares(model, x))
    assert record.layers == ["layer", "act", "tied"]
    norms = at(record, "gradient_norm")
    g = np.concatenate([p.grad.numpy().ravel() for p in model.layer.parameters()])
    assert norms["layer"] == pytest.approx(np.linalg.norm(g), rel=1e-5)
    assert math.isnan(norms["tied"])
    a = model.layer(x)
    b = model.layer(model.act(a))
    both = np.concatenate([a.detach().numpy().ravel(), b.detach().numpy().ravel()])
    assert at(record, "activation_std")["layer"] == pytest.approx(both.std(), rel=1e-5)


def test_frozen_layers_and_layers_not_reached() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.aside, self.never = nn.Linear(3, 3), nn.Linear(3, 3)
            self.unused = nn.ReLU()

        def forward(self, x):
            x = self.a(x)
            self.aside(x)
            return self.b(x)

    model = Net()
    model.a.requires_grad_(False)
    record = observe(model, squares(model, data(5, 3)))
    assert record.layers == ["a", "aside", "b", "never"]
    norms, signal, std = (at(record, s) for s in ("gradient_norm", "signal", "activation_std"))
    assert math.isnan(norms["a"]) and math.isnan(norms["aside"]) and math.isnan(norms["never"])
    assert norms["b"] > 0 and signal["b"] > 0
    assert math.isnan(signal["a"]) and math.isnan(signal["aside"])
    assert std["a"] > 0 and std["aside"] > 0 and math.isnan(std["never"])
    assert not np.isnan(record.values["parameter_norm"]).any()
    assert record.frozen == ["a"]
    (found,) = judge(record).findings
    assert found.kind == "not reached" and "2 of 3 layers" in found.text
    assert judge(record, layers=["a", "b"]).healthy


def test_no_parameters() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Flatten())
    x = data(5, 3)
    x.requires_grad_()
    record = observe(model, squares(model, x))
    assert np.isnan(record.values["gradient_norm"]).all()
    assert (record.values["signal"] > 0).all() and (record.values["activation_std"] > 0).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_and_overflow(dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).to(dtype)
    model[0].weight.data[...] = 300.0 if dtype == "float16" else 1e25
    model[1].weight.data[...] = 300.0 if dtype == "float16" else 1e25
    x = gg.ones((2, 4), dtype="float32").to(dtype)

    def run():
        loss = model(x).sum()
        loss.backward()
        return loss

    with np.errstate(all="ignore"):
        record = observe(model, run)
    assert record.values["activation_nonfinite"][0].tolist() == [0, 8]
    assert record.values["activation_max"][0, 0] == pytest.approx(
        1200 if dtype == "float16" else 4e25, rel=1e-2
    )
    assert np.isnan(record.values["activation_mean"][0, 1])
    assert record.values["parameter_norm"][0, 0] > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_bounds_of_a_clipped_activation_count_as_saturated(dtype) -> None:
    model = nn.Hardtanh(-0.3, 0.9)
    x = gg.tensor([-1.0, -0.2, 0.1, 2.0, 3.0], requires_grad=True)
    for mode in ("require", "off"):
        with gg.use_kernels(mode):
            record = observe(model, squares(model, x.detach().to(dtype=dtype).requires_grad_()))
        assert record.values["saturated"][0, 0] == pytest.approx(0.6)
    assert record.layers == ["Hardtanh"]


def test_convolutions_die_by_channel() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    model[0].bias.data[...] = [-100.0, 100.0, -100.0, 100.0]
    record = observe(model, squares(model, data(2, 1, 6, 6)))
    assert at(record, "dead")["1"] == 0.5


def test_embedding_layers_and_outputs_of_integers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 3)
            self.pick = Argmax()

        def forward(self, x):
            y = self.words(x)
            self.pick(y)
            return y

    class Argmax(nn.Module):
        def forward(self, x):
            return {"best": gg.argmax(x, axis=-1)}

    model = Net()
    record = observe(model, squares(model, gg.tensor([[0, 1], [2, 2]])))
    assert record.layers == ["words", "pick"]
    assert math.isnan(at(record, "activation_mean")["pick"])
    assert at(record, "signal")["words"] > 0


def test_evaluation_does_not_count() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    x = data(4, 3)

    def run():
        squares(model, x)()
        with gg.no_grad():
            model(x * 1000)

    record = observe(model, run)
    assert record.values["activation_max"][0, 0] < 100
    assert math.isnan(record.scalars["loss"][0])


def test_checkpointed_blocks_are_seen_when_they_are_computed_again() -> None:
    block = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = nn.Linear(3, 3), block

        def forward(self, x):
            return nn.utils.checkpoint(self.block, self.first(x))

    model = Net()
    record = observe(model, squares(model, data(4, 3)))
    assert record.layers == ["first", "block.0", "block.1"]
    assert not np.isnan(record.values["signal"]).any()
    assert not np.isnan(record.values["activation_std"]).any()


def test_the_layers_of_a_model() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(gg.tensor(2.0))
            self.inner = nn.ReLU()

        def forward(self, x):
            return self.inner(x) * self.factor

    assert [(x.path, x.kind) for x in layers_of(Scale())] == [
        ("Scale", "Scale"), ("inner", "ReLU")
    ]  # fmt: skip
    with pytest.raises(HealthError, match="not function; wrap"):
        layers_of(lambda x: x)
    with pytest.raises(HealthError, match="called no layer of this Scale"):
        observe(Scale(), lambda: None)


def test_the_device_is_read_once() -> None:
    with counting() as counts:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to("counting")
        x = gg.ones((5, 3), dtype="float32", device="counting")
        run = squares(model, x)

        def quiet():
            run()

        record = observe(model, quiet)
        assert counts.host_reads == 1
    assert (record.values["signal"] > 0).all()
