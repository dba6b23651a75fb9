"""Gradients through time: the norms of dLoss/dh at each step, and truncation."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import models, nn
from gpugrad.errors import ParameterError
from gpugrad.health import HealthError, through_time


def data(*shape, seed=0):
    return gg.tensor(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_the_norms_are_those_of_the_states(kind) -> None:
    gg.manual_seed(0)
    layer = getattr(nn, kind)(3, 4, dtype="float64")
    cell = getattr(nn, f"{kind}Cell")(3, 4, dtype="float64")
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = data(7, 2, 3)

    def by_layer():
        (layer(x)[0][-1] ** 2).sum().backward()

    kept = []

    def by_cell():
        state = None
        for t in range(7):
            state = cell(x[t], state)
            kept.append(state if isinstance(state, tuple) else (state,))
            for s in kept[-1]:
                s.retain_grad()
        (kept[-1][0] ** 2).sum().backward()

    before = layer(x)[0].detach().numpy()
    (found,) = through_time(layer, by_layer)
    (other,) = through_time(cell, by_cell)
    want = [np.linalg.norm(states[0].grad.numpy()) for states in kept]
    np.testing.assert_allclose(found.hidden, want, rtol=1e-9)
    np.testing.assert_allclose(other.hidden, want, rtol=1e-9)
    assert (found.layer, other.layer) == (f"{kind}_l0", f"{kind}Cell")
    assert (found.cell is not None) == (kind == "LSTM")
    if found.cell is not None:
        # The last state of the cell has no way to the loss.
        want = [np.linalg.norm(states[1].grad.numpy()) for states in kept[:-1]]
        want.append(np.float64(0))
        np.testing.assert_allclose(found.cell, want, rtol=1e-9)
    np.testing.assert_allclose(layer(x)[0].detach().numpy(), before, rtol=1e-12)
    assert "run" not in vars(layer)


@pytest.mark.parametrize("gain", [0.5, 1.0, 1.5])
def test_growth_of_a_linear_recurrence(gain) -> None:
    layer = nn.RNN(2, 6, nonlinearity="relu", bias=False, dtype="float64")
    nn.init.orthogonal_(layer.weight_hh_l0)
    with gg.no_grad():
        layer.weight_hh_l0[...] = gain * np.eye(6)
        layer.weight_ih_l0[...] = 1.0

    def run():
        layer(gg.ones((30, 3, 2), dtype="float64"))[0][-1].sum().backward()

    (found,) = through_time(layer, run)
    assert found.growth == pytest.approx(gain, rel=1e-9)
    assert found.hidden[0] == pytest.approx(found.hidden[-1] * gain**29, rel=1e-9)


def test_layers_above_each_other_and_both_directions() -> None:
    layer = nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True, dtype="float64")
    x = data(2, 5, 3)
    want = layer(x)[0].detach().numpy()
    got = []

    def run():
        y = layer(x)[0]
        got.append(y.detach().numpy())
        y.sum().backward()

    found = through_time(layer, run)
    np.testing.assert_allclose(got[0], want, rtol=1e-12)
    assert [x.layer for x in found] == [
        "GRU_l0", "GRU_l0_reverse", "GRU_l1", "GRU_l1_reverse"
    ]  # fmt: skip
    assert all(x.hidden.shape == (5,) and (x.hidden > 0).all() for x in found)


def test_inside_a_model_and_steps_that_the_loss_does_not_reach() -> None:
    model = models.RecurrentLM(7, "lstm", width=8)
    tokens = gg.tensor([[1, 2, 3, 4, 5, 6]])

    def run():
        (model(tokens)[:, 2] ** 2).sum().backward()

    (found,) = through_time(model, run)
    assert found.layer == "recurrent_l0"
    assert (found.hidden[:3] > 0).all() and (found.hidden[3:] == 0).all()


def test_bad_input() -> None:
    with pytest.raises(HealthError, match="Linear has no recurrent layer"):
        through_time(nn.Linear(2, 2), lambda: None)
    with pytest.raises(HealthError, match="called no recurrent layer"):
        through_time(nn.RNN(2, 2), lambda: None)


def test_truncated_back_propagation() -> None:
    layer = nn.LSTM(3, 4, dtype="float64")
    x = data(10, 2, 3)
    grads = []
    for whole in (True, False):
        layer.zero_grad()
        if whole:  # by hand
            state = None
            for start in (0, 4, 8):
                y, state = layer(x[start : start + 4], state)
                y.sum().backward()
                state = tuple(s.detach() for s in state)
        else:
            parts = []
            for part, y in nn.utils.truncated(layer, x, 4):
                parts.append((part.start, part.stop))
                y.sum().backward()
            assert parts == [(0, 4), (4, 8), (8, 10)]
        grads.append([p.grad.numpy().copy() for p in layer.parameters()])
    for a, b in zip(*grads):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    full = layer(x)[0].detach().numpy()
    parts = [y.detach().numpy() for _, y in nn.utils.truncated(layer, x, 3)]
    np.testing.assert_allclose(np.concatenate(parts), full, rtol=1e-12)


def test_truncation_with_the_batch_first() -> None:
    layer = nn.GRU(3, 4, batch_first=True)
    x = gg.tensor(np.ones((2, 5, 3), np.float32))
    shapes = [y.shape for _, y in nn.utils.truncated(layer, x, 2, axis=1)]
    assert shapes == [(2, 2, 4), (2, 2, 4), (2, 1, 4)]
    with pytest.raises(ParameterError, match="steps=0"):
        next(nn.utils.truncated(layer, x, 0))
