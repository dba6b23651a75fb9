"""Records as TensorBoard's curves and histograms."""

import importlib.util

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.health import Record, board
from tests.health.synthetic import make


class Board:
    def __init__(self):
        self.curves, self.histograms = {}, []

    def scalars(self, values, step):
        for name, value in values.items():
            self.curves.setdefault(name, []).append((step, value))

    def histogram(self, name, array, step):
        self.histograms.append((name, step, np.array(array)))


def test_every_known_number_is_a_point_of_a_curve():
    record = make(rows=6)
    log = Board()
    assert board.write(log, record) == record.steps[-1]
    norms = log.curves["health/gradient_norm/4"]
    assert [s for s, _ in norms] == record.steps.tolist()
    np.testing.assert_array_equal([v for _, v in norms], record.values["gradient_norm"][:, 4])
    assert "health/gradient_norm/5" not in log.curves  # a Tanh has none
    assert "health/dead/4" not in log.curves
    np.testing.assert_array_equal(
        [v for _, v in log.curves["health/loss"]], record.scalars["loss"]
    )  # fmt: skip
    name, step, array = log.histograms[2]
    assert (name, step) == ("health/log10_gradient_norm", record.steps[2])
    np.testing.assert_allclose(
        array, np.log10(record.values["gradient_norm"][2, ::2]), rtol=1e-6
    )  # fmt: skip


def test_only_what_came_since_is_written():
    record = Record(["0"])
    log = Board()
    written = 0
    for step in (1, 2, 3):
        record.append(step, {}, {"loss": step})
        written = board.write(log, record, since=written)
        assert board.write(log, record, since=written) == step
    assert log.curves["health/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert log.histograms == []


def test_histograms_of_a_model():
    net = nn.Linear(3, 2)
    log = Board()
    board.write_histograms(log, net, 7)
    assert [name for name, _, _ in log.histograms] == ["parameters/weight", "parameters/bias"]
    gg.sum(net(gg.ones((4, 3), dtype="float32"))).backward()
    board.write_histograms(log, net, 8)
    found = {name: array for name, step, array in log.histograms if step == 8}
    np.testing.assert_array_equal(found["gradients/weight"], np.full((2, 3), 4))
    np.testing.assert_array_equal(found["parameters/bias"], net.bias.detach().numpy())


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("tensorboardX", "tensorboard"))),
    reason="neither tensorboardX nor tensorboard is installed",
)
def test_event_files(tmp_path):
    from gpugrad.cli.tensorboard import TensorBoard

    with TensorBoard(tmp_path) as log:
        board.write(log, make(rows=4))
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for name in (b"health/loss", b"health/update_ratio/6", b"health/log10_gradient_norm"):
        assert name in content
