"""Gradients through time in a record, and what is said of them."""

import copy
import json

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.health import Monitor, Record, judge, observe
from gpugrad.health.record import STATISTICS
from gpugrad.health.recurrence import farthest, growth
from tests.backend.counting import counting

NAN = float("nan")
KINDS = [nn.RNN, nn.LSTM, nn.GRU]


def data(*shape, seed=0, dtype="float32"):
    return gg.tensor(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def seen(model, x, use=lambda y, last: y[-1]):
    """The record of one forward and backward, whose loss uses a part of what the model returns."""

    def run():
        out = use(*model(x))
        loss = (out * out).mean()
        loss.backward()
        return loss

    return observe(model, run)


def over_time(record, layer=0):
    return tuple(
        float(record.values[name][0, layer]) for name in ("time_growth", "time_steps", "time_away")
    )


def linear(gain, **options):
    """Its state is gain·state + input, and always positive."""
    layer = nn.RNN(6, 6, nonlinearity="relu", bias=False, **options)
    with gg.no_grad():
        for p in layer.parameters():
            p[...] = np.eye(6)
        layer.weight_hh_l0[...] = gain * np.eye(6)
    return layer


@pytest.mark.parametrize("gain", [0.5, 1.0, 1.25])
@pytest.mark.parametrize(
    ("use", "away"),
    [(lambda y, h: y[-1], 29), (lambda y, h: y, 0), (lambda y, h: h, 29)],
    ids=["last", "all", "state"],
)
def test_growth_is_that_of_the_layer_wherever_the_loss_looks(gain, use, away) -> None:
    found = over_time(seen(linear(gain), gg.ones((30, 20, 6), dtype="float32"), use))
    assert found == (pytest.approx(gain, rel=1e-5), 29, away)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_it_is_what_the_loss_at_the_end_sees(kind, batch_first) -> None:
    gg.manual_seed(0)
    layer = kind(5, 24, batch_first=batch_first)
    x = data(16, 40, 5) if batch_first else data(40, 16, 5)
    x.requires_grad_()
    record = seen(layer, x, lambda y, _: y[:, -1] if batch_first else y[-1])
    factor, steps, away = over_time(record)
    g = x.grad.numpy().astype(np.float64)
    norms = np.sqrt((g**2).sum(axis=(0, 2) if batch_first else (1, 2)))
    assert (steps, away) == (39, 39)
    assert factor == pytest.approx((norms[0] / norms[-1]) ** (1 / 39), rel=0.05)


def test_how_far_the_outputs_are_that_the_loss_uses() -> None:
    x = data(12, 3, 6)
    layer, both = linear(1.0), nn.GRU(6, 4, bidirectional=True)
    assert over_time(seen(layer, x, lambda y, _: y[6:]))[2] == 6
    assert over_time(seen(layer, x, lambda y, _: gg.concat([y[:1], y[8:]])))[2] == 7
    assert over_time(seen(both, x, lambda y, _: y[-1]))[2] == 11
    assert over_time(seen(both, x, lambda y, h: h))[2] == 5
    # The lower layer's outputs are all used by the one above it.
    assert farthest(np.array([True] * 4), 1) == farthest(np.array([True] * 4), 2) == 0
    aside = nn.GRU(6, 4)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.aside = layer, aside

        def forward(self, x):
            self.aside(x)
            return self.used(x)

    record = seen(Net(), x)
    assert record.layers == ["aside", "used"]
    assert np.isnan(over_time(record, 0)[2]) and over_time(record, 1)[2] == 11


def test_what_is_lost_on_the_way_tells_nothing() -> None:
    fine = 0.5 ** np.arange(99, -1, -1.0)
    assert growth(np.where(fine < 1e-20, 0.0, fine)) == pytest.approx(0.5)
    assert growth(np.where(fine < 1e-20, np.inf, 1 / fine)) == pytest.approx(2.0)
    assert growth(np.array([0.0, 0.0, 1.0])) == 0.0
    assert growth(np.array([np.inf, np.inf, 1.0])) == np.inf
    assert all(np.isnan(growth(np.array([1.0, x]))) for x in (0.0, NAN, np.inf))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_training_changes(kind) -> None:
    x = data(9, 12, 4)
    results = []
    for watched in (False, True):
        gg.manual_seed(3)
        layer = kind(4, 6, num_layers=2, bidirectional=True, dropout=0.5)
        states = gg.ones((4, 12, 6), dtype="float32")
        first = (states, states) if kind is nn.LSTM else states
        optimizer = gg.optim.SGD(layer.parameters(), lr=0.1)
        monitor = Monitor(layer, optimizer, every=1)
        if watched:
            monitor.start()
        for _ in range(2):
            optimizer.zero_grad()
            layer(x, first)[0][-1].sum().backward()
            optimizer.step()
        monitor.stop()
        results.append([p.detach().numpy() for p in layer.parameters()])
    for a, b in zip(*results):
        np.testing.assert_array_equal(a, b)
    assert (monitor.record.values["time_growth"] > 0).all()
    assert (monitor.record.values["time_away"] == 8).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_call_a_layer(kind) -> None:
    gg.manual_seed(0)
    layer = kind(4, 6, num_layers=2)
    usual, *_ = over_time(seen(layer, data(15, 3, 4)))
    assert 0 < usual < 1
    single, steps, away = over_time(seen(layer, data(15, 4)))
    assert 0 < single < 1 and (steps, away) == (14, 14)
    state = data(2, 6)
    pair = (state, state) if kind is nn.LSTM else state
    record = observe(layer, lambda: layer(data(15, 4), pair)[0][-1].sum().backward())
    assert 0 < over_time(record)[0] < 1
    assert np.isnan(over_time(seen(layer, data(1, 3, 4)))).all()  # one step is no time
    by_name = observe(layer, lambda: layer(input=data(15, 3, 4))[0].sum().backward())
    assert np.isnan(over_time(by_name)).all()
    narrow = copy.deepcopy(layer).to("float16")
    assert over_time(seen(narrow, data(15, 3, 4).to("float16")))[0] == pytest.approx(usual, rel=0.1)
    with gg.autocast("cpu"):
        assert over_time(seen(layer, data(15, 3, 4)))[0] == pytest.approx(usual, rel=1e-3)


def test_the_longest_of_several_sequences_counts() -> None:
    layer = linear(0.5)

    def run():
        short, long = (layer(gg.ones((steps, 2, 6), dtype="float32"))[0] for steps in (3, 9))
        (short.sum() + long[-1].sum()).backward()

    assert over_time(observe(layer, run)) == (pytest.approx(0.5, rel=1e-5), 8, 8)


def test_the_device_is_read_once() -> None:
    with counting() as counts:
        layer = nn.LSTM(3, 4).to("counting")
        x = gg.ones((5, 2, 3), dtype="float32", device="counting")
        record = observe(layer, lambda: layer(x)[0][-1].sum().backward())
        assert counts.host_reads == 1
    assert 0 < over_time(record)[0] < 1


# -- verdicts --------------------------------------------------------------------------------------


def recorded(rows=1, loss=2.0, layers=("rnn",), **values):
    """A healthy record of recurrent layers and a last one; `values` are functions of the row."""
    made = Record([*layers, "head"], ["LSTM"] * len(layers) + ["Linear"])
    for row in range(rows):
        now = {k: [*np.atleast_1d(v(row) if callable(v) else v), NAN] for k, v in values.items()}
        now |= {"gradient_norm": [1.0] * (len(layers) + 1)}
        made.append(10 * row + 1, now, {"loss": loss * 0.9**row})
    return made


def test_what_vanishes_or_explodes_through_time() -> None:
    (found,) = judge(recorded(time_growth=0.5, time_steps=59, time_away=59)).findings
    assert found.text == (
        "vanishing through time: gradients ×0.5 a time step over 59 time steps = 1.7e-18 "
        "(first time step against last)"
    )
    assert (found.kind, found.layer, found.step) == ("vanishing", "rnn", 1)
    assert found.growth == pytest.approx(0.5) and found.confidence == 1
    assert found.remedies == ("open-gates", "initialise")
    (found,) = judge(recorded(time_growth=1.5, time_steps=59, time_away=59)).findings
    assert found.text.startswith("exploding through time: gradients ×1.5 a time step over 59 time")
    assert found.kind == "exploding" and found.remedies == ("initialise", "clip")
    for factor, text in ((0.0, "×0 a time step"), (np.inf, "×inf a time step"), (1e-30, "= 0 ")):
        made = recorded(time_growth=factor, time_steps=59, time_away=59)
        assert text in judge(made).findings[0].text


def test_where_all_outputs_are_used_a_short_memory_is_no_fault() -> None:
    assert judge(recorded(time_growth=0.5, time_steps=99, time_away=0)).healthy
    assert judge(recorded(time_growth=0.0, time_steps=99, time_away=0)).healthy
    # Growth is; but a net that learns copes with it.
    made = {"time_growth": 1.5, "time_steps": 99, "time_away": 0}
    assert judge(recorded(**made)).kind == "exploding"
    assert judge(recorded(rows=40, **made)).healthy
    assert judge(recorded(rows=40, **(made | {"time_away": 99}))).kind == "exploding"
    # What the loss does not depend on is not judged by it.
    assert judge(recorded(**(made | {"time_away": NAN}))).healthy


def test_one_of_the_layers_above_each_other_has_to_remember() -> None:
    both = {"layers": ("a", "b"), "time_steps": [99, 99], "time_away": [0, 99]}
    assert judge(recorded(**both, time_growth=[0.6, 0.5])).findings[0].layer == "b"
    assert judge(recorded(**both, time_growth=[0.99, 0.5])).healthy
    assert judge(recorded(**both, time_growth=[0.6, 0.5]), layers=["a"]).healthy


def test_a_figure_that_is_not_certain_gives_way_to_a_loss_that_falls() -> None:
    made = {"time_growth": 0.8, "time_steps": 59, "time_away": 59}  # 2e-6
    (found,) = judge(recorded(**made)).findings
    assert found.kind == "vanishing" and 0.5 < found.confidence < 0.95
    assert judge(recorded(rows=40, **made)).healthy
    assert judge(recorded(rows=40, **(made | {"time_growth": 0.5}))).kind == "vanishing"


def test_a_memory_that_grew() -> None:
    made = recorded(
        rows=40, time_growth=lambda r: 0.5 if r < 7 else 0.97, time_steps=59, time_away=59
    )
    healthy, start = judge(made).findings
    assert healthy.kind == "healthy"
    assert (start.kind, start.step, start.until, start.remedies) == ("vanishing", 1, 71, ())
    assert start.text.startswith("vanishing through time at the start: gradients ×0.5 a time step")
    assert start.text.endswith("; recovered at step 71")
    late = recorded(
        rows=40, time_growth=lambda r: 0.97 if r < 7 else 0.5, time_steps=59, time_away=59
    )
    (found,) = judge(late).findings
    assert (found.kind, found.step) == ("vanishing", 71)


def test_records_of_before(tmp_path) -> None:
    made = recorded(rows=3, time_growth=0.5, time_steps=59, time_away=59)
    made.save(tmp_path / "new.jsonl")
    again = Record.load(tmp_path / "new.jsonl")
    assert judge(again).findings == judge(made).findings
    lines = [json.loads(x) for x in (tmp_path / "new.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("time_growth", "time_steps", "time_away"):
            line.pop(name, None)
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    old = Record.load(tmp_path / "old.jsonl")
    assert set(old.values) == set(STATISTICS)
    assert np.isnan(old.values["time_growth"]).all() and judge(old).healthy


# -- nets ------------------------------------------------------------------------------------------


class Reader(nn.Module):
    def __init__(self, rnn) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1]), None


def reader(kind, seed, prepare=lambda rnn: None):
    gg.manual_seed(seed)
    rnn = kind(8, 32)
    with gg.no_grad():
        prepare(rnn)
    return Reader(rnn)


def open_forget(rnn):
    rnn.bias_ih_l0[32:64] = 1.0
    rnn.bias_hh_l0[32:64] = 0.0


def scaled(gain):
    def prepare(rnn):
        nn.init.normal_(rnn.weight_hh_l0, 0.0, gain / np.sqrt(32))

    return prepare


SOUND = [
    (nn.LSTM, open_forget, 25),
    (nn.GRU, lambda rnn: None, 18),
    (nn.RNN, lambda rnn: nn.init.orthogonal_(rnn.weight_hh_l0), 40),
    (nn.RNN, scaled(1.5), 60),
]
SICK = [
    (nn.LSTM, lambda rnn: None, 60, "vanishing"),
    (nn.GRU, lambda rnn: None, 60, "vanishing"),
    (nn.RNN, scaled(0.5), 40, "vanishing"),
    (nn.RNN, scaled(2.5), 150, "exploding"),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("kind", "prepare", "steps"), SOUND)
def test_nets_that_can_remember(kind, prepare, steps, seed) -> None:
    net = reader(kind, seed, prepare)
    verdict = judge(seen(net, data(steps, 32, 8, seed=seed), lambda y, _: y))
    assert verdict.healthy, str(verdict)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("kind", "prepare", "steps", "found"), SICK)
def test_nets_that_cannot(kind, prepare, steps, found, seed) -> None:
    net = reader(kind, seed, prepare)
    first = judge(seen(net, data(steps, 32, 8, seed=seed), lambda y, _: y)).findings[0]
    assert (first.kind, first.layer) == (found, "rnn")
    assert f"{found} through time" in first.text and first.confidence >= 0.95


def test_a_run_that_was_monitored() -> None:
    net = reader(nn.LSTM, 0)
    x, y = data(60, 16, 8), gg.tensor(np.arange(16) % 4)
    optimizer = gg.optim.Adam(net.parameters(), lr=1e-4)
    with Monitor(net, optimizer, every=2) as monitor:
        for _ in range(6):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x)[0], y)
            loss.backward()
            optimizer.step()
            monitor.step(loss)
    found = monitor.verdict().findings[0]
    assert (found.kind, found.layer, found.step) == ("vanishing", "rnn", 1)
    assert (monitor.record.values["time_steps"][:, 0] == 59).all()
