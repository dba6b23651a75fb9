"""A layer and the activation behind it are one operation where nothing looks between them."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.nn.activations import name_of


def x():
    return gg.tensor(np.random.default_rng(0).standard_normal((5, 4)))


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.Tanh(), nn.GELU(), nn.GELU("tanh"), nn.LeakyReLU(), nn.ELU(), nn.Softplus()],
    ids=repr,
)
def test_results_and_gradients_are_those_of_the_two(activation):
    net = nn.Sequential(nn.Linear(4, 3, dtype="float64"), activation)
    both = net(x())
    gg.sum(both * both).backward()
    got = [both.detach().numpy(), *(p.grad.numpy() for p in net.parameters())]
    net.zero_grad()
    one = activation(net[0](x()))
    gg.sum(one * one).backward()
    want = [one.detach().numpy(), *(p.grad.numpy() for p in net.parameters())]
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)


def test_what_has_numbers_of_its_own_or_a_hook_stays_apart():
    assert name_of(nn.LeakyReLU(0.2)) is None
    assert name_of(nn.ELU(2.0)) is None
    assert name_of(nn.Softmax()) is None

    class Loud(nn.Tanh):
        def forward(self, input):
            return super().forward(input) * 2

    assert name_of(Loud()) is None
    net = nn.Sequential(nn.Linear(4, 3, dtype="float64"), nn.Tanh())
    joined = net(x())
    seen = []
    for layer in net:
        remove = layer.register_forward_hook(lambda module, args, y: seen.append((module, y)))
        y = net(x())
        np.testing.assert_allclose(y.detach().numpy(), joined.detach().numpy(), rtol=1e-14)
        assert seen.pop()[0] is layer
        remove()
    seen_by = []
    remove = net[1].register_forward_pre_hook(lambda module, args: seen_by.append(args[0]))
    net(x())
    np.testing.assert_array_equal(seen_by[0].detach().numpy(), net[0](x()).detach().numpy())
    remove()


def test_an_error_names_the_layer():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(gg.errors.ShapeError, match=r"Sequential\.2 \(Linear 2->2\): input has 3"):
        net(gg.tensor(np.ones((5, 4), "float32")))


@pytest.mark.parametrize("rows", [1, 2000])  # with and without a kernel
def test_an_activation_that_is_none(rows):
    w, b = gg.tensor(np.ones((3, 4), "float32")), gg.tensor(np.ones(3, "float32"))
    with pytest.raises(gg.errors.ParameterError, match="no activation 'gleu'; there are relu, "):
        nn.functional.linear(gg.tensor(np.ones((rows, 4), "float32")), w, b, activation="gleu")
