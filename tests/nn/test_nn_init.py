"""Initial values: distributions, and streams that depend on seed and counter alone."""

import math

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.nn import init

SHAPE = (300, 200)


def filled(function, *args, shape=SHAPE, **kwargs):
    x = gg.tensor(np.full(shape, np.nan), requires_grad=True)
    assert function(x, *args, generator=nn.Generator(7), **kwargs) is x
    return x.detach().numpy()


@pytest.mark.parametrize(
    ("function", "args", "bound"),
    [
        (init.uniform_, (), None),
        (init.xavier_uniform_, (2.0,), 2 * math.sqrt(6 / 500)),
        (init.kaiming_uniform_, (), math.sqrt(2) * math.sqrt(3 / 200)),
        (init.kaiming_uniform_, (math.sqrt(5),), 1 / math.sqrt(200)),
        (init.kaiming_uniform_, (0, "fan_out", "tanh"), 5 / 3 * math.sqrt(3 / 300)),
    ],
)
def test_uniform(function, args, bound) -> None:
    values = filled(function, *args)
    low, high = (0, 1) if bound is None else (-bound, bound)
    assert values.min() >= low
    assert values.max() < high
    width = high - low
    assert abs(values.mean() - (low + high) / 2) < 0.005 * width
    assert abs(values.std() - width / math.sqrt(12)) < 0.005 * width


@pytest.mark.parametrize(
    ("function", "args", "mean", "std"),
    [
        (init.normal_, (3.0, 2.0), 3, 2),
        (init.xavier_normal_, (), 0, math.sqrt(2 / 500)),
        (init.kaiming_normal_, (), 0, math.sqrt(2 / 200)),
        (init.kaiming_normal_, (0, "fan_out", "linear"), 0, math.sqrt(1 / 300)),
    ],
)
def test_normal(function, args, mean, std) -> None:
    values = filled(function, *args)
    assert abs(values.mean() - mean) < 0.02 * std
    assert abs(values.std() - std) < 0.01 * std
    assert abs(np.mean(np.abs(values - mean) < std) - 0.6827) < 0.01


def test_fans_of_a_convolution() -> None:
    values = filled(init.xavier_uniform_, shape=(8, 4, 3, 3))
    bound = math.sqrt(6 / (8 * 9 + 4 * 9))
    assert 0.95 * bound < np.abs(values).max() <= bound


def test_constants() -> None:
    x = gg.tensor(np.ones(3, np.float32), requires_grad=True)
    assert init.zeros_(x).detach().tolist() == [0, 0, 0]
    assert init.ones_(x).detach().tolist() == [1, 1, 1]
    assert init.constant_(x, 2.5).detach().tolist() == [2.5, 2.5, 2.5]
    assert x.dtype == np.float32
    assert x.is_leaf


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3), (4, 2, 3)])
def test_orthogonal(shape) -> None:
    q = filled(init.orthogonal_, 2.0, shape=shape).reshape(shape[0], -1) / 2
    product = q @ q.T if q.shape[0] <= q.shape[1] else q.T @ q
    assert np.allclose(product, np.eye(len(product)), atol=1e-12)


@pytest.mark.torch
def test_gains_are_pytorchs() -> None:
    import torch

    for name in ("linear", "conv2d", "sigmoid", "tanh", "relu", "selu", "leaky_relu"):
        ours, theirs = init.calculate_gain(name), torch.nn.init.calculate_gain(name)
        assert math.isclose(ours, theirs, rel_tol=1e-15)
    assert math.isclose(
        init.calculate_gain("leaky_relu", 0.3), torch.nn.init.calculate_gain("leaky_relu", 0.3)
    )


def test_errors() -> None:
    x = gg.tensor([1.0])
    with pytest.raises(ShapeError, match="at least 2 dimensions"):
        init.xavier_normal_(x)
    with pytest.raises(ShapeError, match="at least 2 dimensions"):
        init.orthogonal_(x)
    with pytest.raises(ParameterError, match="no gain is known for 'swoosh'"):
        init.calculate_gain("swoosh")
    with pytest.raises(ParameterError, match="fan_in"):
        init.kaiming_normal_(gg.tensor(np.ones((2, 2))), mode="fan")
    with pytest.raises(ParameterError, match="generator"):
        init.normal_(x, generator=np.random.default_rng(0))


def test_seeds_decide() -> None:
    gg.manual_seed(5)
    a = nn.Linear(4, 4).weight.detach().numpy()
    b = nn.Linear(4, 4).weight.detach().numpy()
    gg.manual_seed(5)
    assert np.array_equal(nn.Linear(4, 4).weight.detach().numpy(), a)
    assert not np.array_equal(a, b)
    gg.manual_seed(6)
    assert not np.array_equal(nn.Linear(4, 4).weight.detach().numpy(), a)


def test_the_state_is_two_integers() -> None:
    one = nn.Generator(9)
    one.uniform((1000,))
    assert one.state == (9, 1)
    two = nn.Generator()
    two.state = (9, 1)
    assert np.array_equal(one.normal((5,)), two.normal((5,)))
    for seed in (-1, 1 << 128):
        with pytest.raises(ParameterError, match="seed"):
            nn.Generator(seed)
    with pytest.raises(TypeError):
        nn.Generator(0.5)


def test_draws_of_one_stream_do_not_repeat() -> None:
    generator = nn.Generator(0)
    draws = np.concatenate([generator.uniform((1000,)) for _ in range(20)])
    assert len(np.unique(draws)) == len(draws)
    other = nn.Generator(1)
    assert not np.intersect1d(draws, other.uniform((1000,))).size


def test_the_same_numbers_on_another_backend() -> None:
    pytest.importorskip("array_api_strict")
    host = gg.tensor(np.zeros((3, 4), np.float32))
    device = gg.tensor(np.zeros((3, 4), np.float32), device="strict:device1")
    init.xavier_normal_(host, generator=nn.Generator(2))
    init.xavier_normal_(device, generator=nn.Generator(2))
    assert np.array_equal(host.numpy(), device.cpu().numpy())
