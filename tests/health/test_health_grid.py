"""Verdicts on a grid of nets, against the truth that is measured by training them.

`bench/health_grid.py` says what the truth is, and runs the whole grid. Here are nets of every kind
that are quick to train; seeds are others than those that thresholds were chosen with.
"""

import pytest

from bench.health_grid import Case, examine, summary

#: Of plain nets: what vanishes, what explodes, what trains. Then norms, short cuts, recurrence.
CASES = [
    *(Case(depth, activation, gain, seed=depth + i)
      for depth in (4, 10)
      for i, activation in enumerate(("tanh", "relu", "sigmoid", "gelu"))
      for gain in (1.0, 2.5)),
    *(Case(20, "sigmoid", gain, norm, residual, seed=20)
      for gain in (0.5, 1.5)
      for norm, residual in (("none", False), ("none", True), ("layer", False), ("batch", True))),
    *(Case(20, activation, 1.5, norm, residual, seed=21)
      for activation in ("tanh", "relu")
      for norm, residual in (("none", False), ("layer", True), ("batch", False))),
    Case(50, "tanh", 1.0, "layer", True, seed=50),
    Case(10, "sigmoid", 0.5, seed=40),
    Case(20, "relu", 2.5, residual=True, seed=41),
    Case(20, "gelu", 2.5, residual=True, seed=42),
    Case(30, "tanh", 4.0, seed=43),
    Case(10, "relu", 2.5, residual=True, seed=44),
    Case(50, "tanh", 4.0, seed=51),
    Case(50, "relu", 1.0, "layer", seed=55),
    Case(100, "tanh", 2.5, seed=52),
    Case(100, "sigmoid", 1.0, seed=53),
    Case(200, "relu", 0.5, seed=54),
    *(Case(length, gain=1.0, cell=cell, seed=60)
      for length in (5, 60) for cell in ("rnn", "lstm", "gru")),
]  # fmt: skip

#: Sick ones of the grid that are quick to try remedies on.
SICK = [
    Case(10, "sigmoid", 0.5, seed=70),
    Case(20, "sigmoid", 1.0, seed=71),
    Case(20, "relu", 2.5, seed=72),
    Case(20, "gelu", 2.5, residual=True, seed=73),
    Case(30, "tanh", 4.0, seed=74),
    Case(60, cell="rnn", seed=75),
]


def test_verdicts_agree_with_the_truth():
    outcomes = [examine(case, remedies=False) for case in CASES]
    wrong = [f"{o.case}: {o.kind}, but {o.truth}" for o in outcomes if not o.right]
    found = summary(outcomes)
    assert found["false alarms"] == 0, wrong
    assert found["right"] >= 0.98 * found["cases"], wrong
    assert 0.25 < found["sick"] / found["cases"] < 0.75  # neither answer is right by habit


@pytest.mark.parametrize("case", SICK, ids=str)
def test_the_first_remedy_makes_a_sick_net_train(case):
    outcome = examine(case)
    assert outcome.truth.sick
    assert outcome.cured, outcome.remedy
