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


# -- many small layers -----------------------------------------------------------------------------

DEPTH = 10


def chain(dtype="float64", activation=nn.Tanh):
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(4, 4, dtype=dtype), activation())]
    return nn.Sequential(*layers, nn.Linear(4, 2, dtype=dtype))


def operations(y):
    return [node.operation for node in gg.graph(y).nodes if node.kind == "operation"]


def apart(net, x):
    for layer in net:
        x = layer(x)
    return x


@pytest.mark.parametrize("activation", [nn.Tanh, nn.SiLU, nn.ReLU])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_layers_in_a_row_are_one_operation(dtype, activation):
    net = chain(dtype, activation)
    data = x().to(dtype)
    values = []
    for function in (net, lambda data: apart(net, data)):
        net.zero_grad()
        y = function(data)
        gg.sum(y * y).backward()
        values.append([y.detach().numpy(), *(p.grad.numpy() for p in net.parameters())])
    near = 1e-5 if dtype == "float32" else 1e-12
    for got, want in zip(*values, strict=True):
        np.testing.assert_allclose(got, want, rtol=near, atol=near)
    assert operations(net(data)) == ["layers"]


def test_what_is_no_chain():
    net, data = chain(), x()
    narrow, short = chain("float16"), net[: 2 * 7]
    assert "layers" not in operations(narrow(data.to("float16")))
    assert "layers" not in operations(short(data))
    assert operations(net[2 : 2 + 2 * 8](data)) == ["layers"]
    with gg.use_kernels("off"):
        assert "layers" not in operations(net(data))
    with gg.autocast("cpu"):
        assert "layers" not in operations(chain("float32")(data.to("float32")))
    other = nn.Sequential(*net[:10], nn.ReLU(), *net[10:])
    assert "layers" not in operations(other(data))
    without = chain()
    without[8].bias = None
    assert "layers" not in operations(without(data))
    late = nn.Sequential(nn.Linear(4, 4, dtype="float64"), nn.ReLU(), *net)
    assert operations(late(data)) == ["linear_activation", "layers"]
    wide = gg.ones((1 << 17, 4), dtype="float64")
    assert "layers" not in operations(net(wide))


@pytest.mark.parametrize("which", [4, 5])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_in_a_chain_is_called(which, kind):
    net, data, seen = chain(), x(), []
    want = net(data).detach().numpy()
    remove = getattr(net[which], kind)(lambda module, *_: seen.append(module))
    y = net(data)
    assert seen == [net[which]]
    np.testing.assert_allclose(y.detach().numpy(), want, rtol=1e-12)
    remove()
    assert operations(net(data)) == ["layers"]


def test_frozen_and_shared_layers_of_a_chain():
    net, data = chain(), x()
    net[0].requires_grad_(False)
    net[6].bias.requires_grad_(False)
    net[10].weight = net[4].weight
    net[12] = net[8]
    optimizer = gg.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.0)
    values = []
    for function in (net, lambda data: apart(net, data)):
        optimizer.zero_grad()
        gg.sum(function(data)).backward()
        values.append({k: p.grad for k, p in net.named_parameters()})
    assert operations(net(data)) == ["layers"]
    for name, want in values[1].items():
        got = values[0][name]
        assert (got is None) == (want is None), name
        if got is not None:
            np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-11, atol=1e-14)
    assert values[0]["0.weight"] is None and values[0]["6.bias"] is None


def test_a_chain_trains_as_separate_layers_do():
    """Parameters in an arena, clipped, with their names as ever."""
    nets, data = [chain(), chain()], x()
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [gg.optim.AdamW(net.parameters(), lr=0.01) for net in nets]
    for _ in range(5):
        for function, optimizer in zip((nets[0], lambda v: apart(nets[1], v)), optimizers):
            optimizer.zero_grad()
            gg.sum(function(data) ** 2).backward()
            optimizer.step(clip=0.5)
    one, other = (net.state_dict() for net in nets)
    assert list(one) == [f"{i}.{part}" for i in range(0, 21, 2) for part in ("weight", "bias")]
    for name in one:
        np.testing.assert_allclose(one[name].numpy(), other[name].numpy(), rtol=1e-9, atol=1e-12)
    with gg.no_grad():
        assert not nets[0](data).requires_grad


def test_an_error_in_a_chain_names_the_layer():
    net = chain()
    net[6] = nn.Linear(3, 4, dtype="float64")
    with pytest.raises(gg.errors.ShapeError, match=r"Sequential\.6 \(Linear 3->4\): input has 4 f"):
        net(x())
    with pytest.raises(gg.errors.ShapeError, match=r"Sequential\.0 \(Linear 4->4\): input has 5 f"):
        net(gg.ones((2, 5), dtype="float64"))
