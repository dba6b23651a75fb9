"""What is said of records: made by hand here, so that every figure is known."""

import json
import time

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.health.errors import HealthError
from gpugrad.health.monitor import Monitor
from gpugrad.health.record import Record
from gpugrad.health.remedies import REMEDIES
from gpugrad.health.verdict import judge
from gpugrad.models.mlp import MLP

NAN = float("nan")


def record(rows=40, layers=6, kind="Linear", **changed):
    """A healthy run; `changed` are statistics or scalars, as functions of the row, or constants."""
    made = Record([str(i) for i in range(layers)], [kind] * layers)
    usual = {
        "gradient_norm": np.full(layers, 0.3),
        "gradient_nonfinite": np.zeros(layers),
        "parameter_norm": np.full(layers, 4.0),
        "activation_mean": np.zeros(layers),
        "activation_std": np.ones(layers),
        "activation_nonfinite": np.zeros(layers),
        "saturated": np.full(layers, 0.1),
        "dead": np.full(layers, 0.2),
        "signal": np.full(layers, 0.01),
    }
    for row in range(rows):
        now = {k: v(row) if callable(v) else v for k, v in changed.items()}
        scalars = {"loss": 2.0 * 0.95**row, "lr": 1e-3, "norm": 1.0, "coefficient": 0.8}
        scalars |= {k: now.pop(k) for k in list(now) if k in scalars}
        made.append(10 * row + 1, {**usual, **now}, scalars)
    return made


def at(layer, value, usual, layers=6):
    return np.array([value if i == layer else usual for i in range(layers)], float)


def test_a_run_in_order_is_healthy():
    verdict = judge(record())
    assert verdict.healthy and verdict.kind == "healthy"
    assert str(verdict).startswith("healthy")
    assert judge(record(rows=1)).healthy


def test_that_nothing_is_wrong_is_as_sure_as_it_was_looked_at():
    sure = [judge(record(rows=n)).findings[0].confidence for n in (1, 8, 98)]
    assert sure == [pytest.approx(x, abs=1e-3) for x in (2 / 3, 0.9, 0.99)]


def test_the_example_of_the_textbook():
    made = Record([str(i) for i in range(101)], ["Linear"] * 101)
    made.append(1, {"gradient_norm": 1.1 ** np.arange(100, -1, -1.0)}, {})
    (found,) = judge(made).findings
    assert found.kind == "exploding"
    assert found.text == (
        "exploding: gradients ×1.1 a layer over 100 layers = 1.4e+04 (first layer against last)"
    )
    assert found.growth == pytest.approx(1.1, rel=1e-5)
    assert (found.layer, found.step) == ("0", 1)
    small = Record(made.layers, made.kinds)
    small.append(1, {"gradient_norm": 0.9 ** np.arange(100, -1, -1.0)}, {})
    (found,) = judge(small).findings
    assert found.kind == "vanishing"
    assert found.growth == pytest.approx(0.9, rel=1e-5)
    assert "2.7e-05" in found.text


@pytest.mark.parametrize(("factor", "kind"), [(1e7, "exploding"), (1e-7, "vanishing")])
def test_growth_that_sets_in_later(factor, kind):
    def norms(row):
        return np.geomspace(factor if row >= 25 else 1.0, 1.0, 6)

    # A loss that falls does not excuse what is as extreme as this.
    (found,) = judge(record(gradient_norm=norms)).findings
    assert (found.kind, found.layer, found.step) == (kind, "0", 251)
    assert found.confidence >= 0.95
    assert found.growth == pytest.approx(factor ** (1 / 5), rel=1e-4)


def test_confidence_grows_with_the_figure_and_a_run_that_learns_is_believed():
    def judged(ratio, loss):
        made = record(gradient_norm=np.geomspace(ratio, 1, 6), loss=loss)
        return judge(made, chance=2.0)

    falling = lambda row: 2.0 * 0.95**row
    assert judged(1e4, falling).healthy
    assert judged(1e4, 2.0).kind == "exploding"
    assert judged(1e5, 2.0).findings[0].confidence > judged(1e4, 2.0).findings[0].confidence
    assert judged(10.0, falling).healthy


def test_trouble_that_has_passed_is_not_the_verdict():
    verdict = judge(record(gradient_norm=lambda r: np.geomspace(1e9 if r < 5 else 1, 1, 6)))
    assert verdict.healthy
    healthy, start = verdict.findings
    assert healthy.until is None
    assert (start.kind, start.layer, start.step, start.until) == ("exploding", "0", 1, 51)
    assert start.confidence >= 0.95 and start.remedies == ()
    assert start.growth == pytest.approx(1e9 ** (1 / 5), rel=1e-4)
    assert start.text.startswith("exploding at the start: gradients ×63.1 a layer over 5 layers")
    assert start.text.endswith("; recovered at step 51")
    assert judge(record(gradient_norm=lambda r: np.geomspace(1e5 if r < 5 else 1, 1, 6))
                 ).findings == judge(record()).findings  # fmt: skip
    lasting = judge(record(gradient_norm=np.geomspace(1e9, 1, 6))).findings
    assert [(f.kind, f.until) for f in lasting] == [("exploding", None)]
    assert judge(record(gradient_nonfinite=lambda r: at(2, r == 3, 0))).healthy


def test_gradients_that_underflowed():
    (found,) = judge(record(gradient_norm=np.array([0, 0, 1e-30, 1e-20, 1e-10, 1.0]))).findings
    assert found.kind == "vanishing"
    assert found.growth == pytest.approx(1e-10, rel=1e-4)
    (found,) = judge(record(gradient_norm=np.array([0, 0, 0, 0, 0, 1.0]))).findings
    assert found.growth is None
    assert "are 0 in all layers before 5" in found.text


def test_activations_that_swell():
    made = record(activation_std=np.geomspace(1, 1e6, 6), loss=2.0)
    found = judge(made).findings[0]
    assert (found.kind, found.layer) == ("exploding", "5")
    assert "activations ×15.8 a layer over 5 layers = 1e+06" in found.text


def test_where_numbers_went_bad():
    forward = record(
        activation_nonfinite=lambda r: np.array([0, 0, 3, 9, 9, 9]) * (r >= 20),
        gradient_nonfinite=lambda r: np.full(6, 5) * (r >= 20),
        loss=lambda r: NAN if r >= 20 else 1.0,
    )
    found = judge(forward).findings[0]
    assert (found.kind, found.layer, found.step) == ("non-finite", "2", 201)
    assert "output of Linear" in found.text
    backward = record(gradient_nonfinite=lambda r: np.array([5, 5, 5, 5, 0, 0]) * (r >= 20))
    found = judge(backward).findings[0]
    assert (found.kind, found.layer, found.step) == ("non-finite", "3", 201)  # met first on the way
    assert "gradient of Linear" in found.text
    first = record(rows=1, activation_nonfinite=at(0, 1, 0), loss=NAN)
    assert "from the first step on" in judge(first).findings[0].text
    assert judge(record(loss=lambda r: float("inf") if r > 30 else 1.0)).kind == "non-finite"


def test_dead_and_saturated_layers():
    made = record(dead=lambda r: at(4, 1.0 if r >= 10 else 0.3, 0.2), kind="ReLU", loss=2.0)
    found = judge(made).findings[0]
    assert (found.kind, found.layer, found.step) == ("dead", "4", 101)
    assert "100% of the units" in found.text
    # It was sound at the start: the steps have made it so.
    assert found.remedies[:3] == ("learning-rate", "clip", "initialise")
    always = record(dead=at(4, 1.0, 0.2), kind="ReLU", loss=2.0)
    assert judge(always).findings[0].remedies[:3] == ("initialise", "leak", "residual")
    found = judge(record(saturated=at(1, 0.97, 0.1), kind="Tanh", loss=2.0)).findings[0]
    assert (found.kind, found.layer) == ("saturated", "1")
    assert "activation" in found.remedies and "leak" not in found.remedies
    assert judge(record(dead=at(4, 0.6, 0.2), saturated=at(1, 0.6, 0.1))).healthy


def test_layers_that_are_not_reached():
    (found,) = judge(record(gradient_norm=at(3, NAN, 0.3))).findings
    assert (found.kind, found.layer) == ("not reached", "3")
    assert "1 of 6 layers" in found.text
    assert judge(record(gradient_norm=at(3, NAN, 0.3)), layers=["0", "1", "2", "4", "5"]).healthy
    # A layer without parameters has no gradient to miss.
    activation = {"gradient_norm": at(3, NAN, 0.3), "parameter_norm": at(3, NAN, 4.0)}
    assert judge(record(**activation)).healthy
    made = record(gradient_norm=at(3, NAN, 0.3))
    made.frozen = ["3"]
    assert judge(made).healthy
    made.frozen = ["2"]
    assert judge(made).kind == "not reached"
    nothing = record(gradient_norm=np.full(6, NAN))
    nothing.frozen = nothing.layers
    assert "all layers with parameters are frozen" in judge(nothing).findings[0].text
    nothing.frozen = []
    assert "no layer got a gradient" in judge(nothing).findings[0].text


def test_clipping_that_starves():
    made = record(coefficient=lambda r: 1.0 if r < 20 else 1e-3, norm=lambda r: 1e3)
    (found,) = judge(made).findings
    assert (found.kind, found.step) == ("clip-starved", 201)
    assert "norm 1e+03 are cut to 1" in found.text
    assert found.remedies[:2] == ("initialise", "clip")
    assert found.remedies[-1] == "learning-rate"
    usual = record(coefficient=lambda r: 1.0 if r < 20 else 1e-3, norm=lambda r: 1.0)
    assert judge(usual).findings[0].remedies[0] == "clip"


def test_the_chance_that_a_record_knows():
    made = record(loss=lambda r: 300.0 - r)
    assert judge(made).healthy  # it falls, from wherever it was
    made.chance = 2.3
    assert judge(made).kind == "stalled"
    assert judge(made, chance=400.0).healthy


def test_remedies_that_mean_nothing_here_are_left_out():
    made = record(activation_nonfinite=at(0, 1, 0))
    assert judge(made).findings[0].remedies[0] == "loss-scale"
    made.narrow = False
    assert "loss-scale" not in judge(made).findings[0].remedies


def test_steps_that_are_too_short():
    for ratio, first in ((1e-7, "longer-steps"), (1e-3, "residual")):
        found = judge(record(loss=2.3, update_ratio=np.full(6, ratio))).findings[0]
        assert (found.kind, found.remedies[0]) == ("stalled", first)
        assert ("longer-steps" in found.remedies) == (first == "longer-steps")


def test_losses_that_rise_or_stand_still():
    found = judge(record(loss=lambda r: 0.5 + 0.01 * (r - 15) ** 2)).findings[0]
    assert found.kind == "diverging"
    assert found.step is not None and 100 < found.step <= 200
    assert judge(record(loss=lambda r: 2.3 - 1e-3 * r)).kind == "stalled"
    assert judge(record(rows=6, loss=lambda r: 2.3 - 1e-3 * r)).healthy  # too early to say
    # From a bad start down to what any constant answer has: the net has learnt nothing.
    bad_start = record(loss=lambda r: 2.3 + 20 * 0.7**r)
    assert judge(bad_start).healthy
    assert judge(bad_start, chance=2.3).kind == "stalled"
    assert judge(record(loss=lambda r: 2.0 * 0.8**r)).healthy  # it has converged


def test_few_rows_tell_only_what_they_agree_on():
    stands = lambda r: 2.3 + 0.01 * (-1) ** r
    (found,) = judge(record(rows=12, loss=stands), chance=2.3).findings
    assert (found.kind, found.step, found.confidence) == ("stalled", 1, 0.875)
    assert "after 111 steps the loss is 2.29 at best in 6 rows, and the best" in found.text
    (found,) = judge(record(rows=12, loss=stands)).findings
    assert (found.kind, found.confidence) == ("stalled", 0.8)
    assert judge(record(rows=19, loss=stands), chance=2.3).findings[0].confidence == 0.9
    # One loss that is lower, or fewer steps, or fewer rows: nobody knows.
    for rows, loss in ((12, lambda r: 1.9 if r == 9 else 2.3), (8, stands)):
        verdict = judge(record(rows=rows, loss=loss), chance=2.3)
        assert verdict.healthy
        assert verdict.findings[0].text == (
            f"healthy: nothing explodes or vanishes; {rows} losses do not tell whether it learns "
            f"(the last is of step {10 * rows - 9})"
        )
    # It comes down from a bad start, and may go on to; or it has stopped at what guessing gives.
    assert judge(record(rows=16, loss=lambda r: 60 - 3 * r), chance=2.3).healthy
    assert judge(record(rows=16, loss=lambda r: 2.3 + 60 * 0.2**r), chance=2.3).kind == "stalled"
    apart = Record(["0"], ["Linear"])
    for step in (1, 2, 100, 1000, 10_000):
        apart.append(step, {"gradient_norm": [1.0]}, {"loss": 2.3})
    assert judge(apart, chance=2.3).healthy
    apart.append(100_000, {"gradient_norm": [1.0]}, {"loss": 2.3})
    assert judge(apart, chance=2.3).kind == "stalled"


def test_what_is_known_of_learning_is_said():
    def text(**given):
        return judge(record(**given)).findings[0].text

    learns = "healthy: nothing explodes, vanishes or stands still"
    assert text() == text(rows=6) == text(rows=4, loss=lambda r: -1.5 * r) == learns
    assert text(rows=3).endswith("3 losses do not tell whether it learns (the last is of step 21)")
    assert text(rows=1).endswith(
        "; one loss does not tell whether it learns (the last is of step 1)"
    )
    assert text(loss=NAN).endswith("; whether it learns is not known, for no loss was recorded")


def test_findings_are_sorted_and_made_for_json():
    made = record(
        gradient_norm=np.geomspace(1e-9, 1, 6), saturated=np.full(6, 0.99), loss=2.3, kind="Tanh"
    )
    verdict = judge(made)
    assert [f.kind for f in verdict.findings] == ["vanishing", "saturated", "stalled"]
    there = json.loads(json.dumps(verdict.as_dict()))
    assert there["kind"] == "vanishing" and there["healthy"] is False
    assert there["findings"][0]["remedies"] == list(verdict.findings[0].remedies)
    assert all(name in REMEDIES for f in verdict.findings for name in f.remedies)
    assert "try: residual" in str(verdict)


def test_bad_input():
    with pytest.raises(HealthError, match="the record is empty"):
        judge(Record(["0"], ["Linear"]))
    with pytest.raises(HealthError, match="no layer 'x'"):
        judge(record(), layers=["x"])
    assert judge(one_layer()).healthy


def one_layer():
    made = Record(["only"], ["Linear"])
    made.append(1, {"gradient_norm": [1.0]}, {"loss": 1.0})
    return made


def test_long_records_are_judged_quickly():
    zeros = ("gradient_nonfinite", "activation_nonfinite", "activation_mean", "dead", "saturated")
    ones = ("parameter_norm", "activation_std", "signal")
    values = {k: np.zeros(100) for k in zeros} | {k: np.ones(100) for k in ones}
    values["gradient_norm"] = np.geomspace(1e-8, 1, 100)
    made = record(rows=3000, layers=100, **values)
    began = time.perf_counter()
    assert judge(made).kind == "vanishing"
    assert time.perf_counter() - began < 1.0


# -- real runs -------------------------------------------------------------------------------------


def run(model, steps=100, every=2, lr=1e-3, **step):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 8)).astype(np.float32)
    y = gg.tensor((x @ rng.standard_normal((8, 4))).argmax(1))
    optimizer = gg.optim.SGD(model.parameters(), lr=lr)
    with Monitor(model, optimizer, every=every) as monitor, np.errstate(all="ignore"):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(gg.tensor(x)), y)
            loss.backward()
            optimizer.step(**step)
            monitor.step(loss)
    return monitor


def test_runs_that_were_monitored():
    gg.manual_seed(0)
    assert run(MLP(8, 4, width=32, depth=2), lr=0.1).verdict().healthy

    vanishing = run(MLP(8, 4, width=32, depth=12, activation="sigmoid")).verdict().findings[0]
    assert (vanishing.kind, vanishing.layer) == ("vanishing", "1")
    assert vanishing.growth == pytest.approx(0.25, abs=0.1)  # the slope of a sigmoid at 0

    starved = run(MLP(8, 4, width=32, depth=2), clip=1e-3).verdict()
    assert "clip-starved" in [f.kind for f in starved.findings]

    overflow = run(MLP(8, 4, width=32, depth=3), lr=1e30).verdict().findings[0]
    assert overflow.kind == "non-finite"
    assert overflow.step is not None and overflow.step <= 8
