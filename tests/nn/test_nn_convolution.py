"""Convolution and pooling layers against PyTorch: values, gradients, names, and errors."""

from types import SimpleNamespace

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.nn import functional as F

X1, X2 = (3, 6, 20), (3, 6, 11, 9)


def torch_module():
    return pytest.importorskip("torch")


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def agree(ours, theirs, *arrays, tol=1e-9):
    """Results and gradients of both libraries' functions, for a gradient from above."""
    torch = torch_module()
    mine = [gg.tensor(a, requires_grad=True) for a in arrays]
    others = [torch.tensor(a, requires_grad=True) for a in arrays]
    y, t = ours(*mine), theirs(*others)
    assert y.shape == tuple(t.shape)
    np.testing.assert_allclose(y.detach().numpy(), t.detach().numpy(), rtol=tol, atol=tol)
    g = normal(y.shape, 9)
    y.backward(gg.tensor(g))
    t.backward(torch.tensor(g))
    for a, b in zip(mine, others):
        np.testing.assert_allclose(a.grad.numpy(), b.grad.numpy(), rtol=tol, atol=tol)


def both(name, *args, **options):
    """A layer of PyTorch in float64 and ours with its parameters."""
    torch = torch_module()
    theirs = getattr(torch.nn, name)(*args, **options)
    ours = getattr(nn, name)(*args, **options)
    state = theirs.double().state_dict()
    if state:
        ours = getattr(nn, name)(*args, dtype="float64", **options)
        assert list(ours.state_dict()) == list(state)
        ours.load_state_dict({k: gg.tensor(v.numpy()) for k, v in state.items()})
    assert repr(ours) == repr(theirs)
    return ours, theirs


CONVOLUTIONS = [
    {}, {"bias": False}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2},
    {"padding": "valid"}, {"groups": 2, "padding": 2}, {"groups": 6}, {"dilation": 2, "stride": 3},
]  # fmt: skip


@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(("name", "shape"), [("Conv1d", X1), ("Conv2d", X2)])
def test_convolutions(name, shape, options, mode):
    ours, theirs = both(name, 6, 12, 3, **options)
    with gg.use_kernels(mode):
        agree(ours, theirs, normal(shape))
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters()):
        np.testing.assert_allclose(a.grad.numpy(), b.grad.numpy(), 1e-9, 1e-9, err_msg=key)


@pytest.mark.parametrize("options", [
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
    {"kernel_size": 1}, {"kernel_size": (1, 4), "padding": "same"},
    {"kernel_size": 4, "padding": 3},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_numbers_per_axis(options, mode):
    ours, theirs = both("Conv2d", 6, 4, **options)
    with gg.use_kernels(mode):
        agree(ours, theirs, normal(X2))


@pytest.mark.parametrize(("name", "shape"), [("Conv1d", X1), ("Conv2d", X2)])
def test_a_single_input(name, shape):
    ours, theirs = both(name, 6, 4, 3)
    agree(ours, theirs, normal(shape[1:]))


def test_initial_distribution():
    layer = nn.Conv2d(8, 200, 5)
    bound = 1 / np.sqrt(8 * 25)
    for p in (layer.weight, layer.bias):
        x = p.detach().numpy()
        assert abs(x).max() <= bound
        assert abs(x).max() > 0.95 * bound and abs(x.mean()) < 0.1 * bound


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "silu"])
@pytest.mark.parametrize("mode", ["off", "require"])
def test_an_activation_is_part_of_it(activation, mode):
    x, w, b = normal(X2), normal((5, 6, 3, 3), 1), normal(5, 2)
    arrays = [gg.tensor(a, requires_grad=True) for a in (x, w, b)]
    again = [gg.tensor(a, requires_grad=True) for a in (x, w, b)]
    with gg.use_kernels(mode):
        one = F.conv2d(*arrays, padding=1, activation=activation)
        two = getattr(F, activation)(F.conv2d(*again, padding=1))
        g = gg.tensor(normal(one.shape, 3))
        one.backward(g)
        two.backward(g)
    np.testing.assert_allclose(one.detach().numpy(), two.detach().numpy(), 1e-12, 1e-12)
    for a, c in zip(arrays, again):
        np.testing.assert_allclose(a.grad.numpy(), c.grad.numpy(), 1e-11, 1e-11)


def test_in_a_sequence_the_activation_behind_is_part_of_it():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, dtype="float64"), nn.ReLU())
    x = gg.tensor(normal((1, 1, 5, 5)))
    y = net(x)
    assert y._node.primitive.name == "convolution"
    np.testing.assert_array_equal(y.detach().numpy(), F.relu(net[0](x)).detach().numpy())


POOLS = [
    ("MaxPool2d", (2,), {}), ("MaxPool2d", (3,), {"stride": 2, "padding": 1}),
    ("MaxPool2d", ((2, 3),), {"stride": (1, 2), "dilation": (2, 1)}),
    ("MaxPool2d", (3,), {"stride": 2, "ceil_mode": True}),
    ("MaxPool2d", (2,), {"stride": 3, "padding": 1, "ceil_mode": True}),
    ("AvgPool2d", (2,), {}), ("AvgPool2d", (3,), {"stride": 2, "padding": 1}),
    ("AvgPool2d", (3,), {"stride": 2, "padding": 1, "count_include_pad": False}),
    ("AvgPool2d", (3,), {"stride": 2, "padding": 1, "ceil_mode": True}),
    ("AvgPool2d", (3,), {"stride": 2, "ceil_mode": True, "count_include_pad": False}),
    ("AvgPool2d", ((3, 2),), {"padding": (1, 0), "divisor_override": 5, "ceil_mode": True}),
    ("AdaptiveAvgPool2d", (1,), {}), ("AdaptiveAvgPool2d", ((4, 3),), {}),
    ("AdaptiveAvgPool2d", ((None, 3),), {}), ("AdaptiveAvgPool2d", ((13, 2),), {}),
    ("MaxPool1d", (2,), {}), ("MaxPool1d", (3,), {"stride": 2, "padding": 1, "dilation": 2}),
    ("MaxPool1d", (3,), {"ceil_mode": True}), ("AvgPool1d", (3,), {"stride": 2, "padding": 1}),
    ("AvgPool1d", (3,), {"ceil_mode": True, "count_include_pad": False, "padding": 1}),
    ("AdaptiveAvgPool1d", (3,), {}), ("AdaptiveAvgPool1d", (5,), {}),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["off", "auto", "require"])
@pytest.mark.parametrize(("name", "args", "options"), POOLS, ids=str)
def test_pools(name, args, options, mode):
    ours, theirs = both(name, *args, **options)
    shape = X1 if name.endswith("1d") else X2
    with gg.use_kernels(mode):
        agree(ours, theirs, normal(shape))
        agree(ours, theirs, normal(shape[1:]))


@pytest.mark.parametrize("options", [
    {"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
    {"kernel_size": (3, 2), "stride": 1, "dilation": (2, 1)},
], ids=str)  # fmt: skip
def test_places_of_the_largest(options):
    torch = torch_module()
    x = normal(X2)
    y, places = F.max_pool2d(gg.tensor(x), return_indices=True, **options)
    t, there = torch.nn.functional.max_pool2d(torch.tensor(x), return_indices=True, **options)
    np.testing.assert_array_equal(y.numpy(), t.numpy())
    np.testing.assert_array_equal(places.numpy(), there.numpy())
    assert places.dtype == np.int64


def test_places_along_one_axis():
    torch = torch_module()
    x = normal(X1[1:])
    y, places = nn.MaxPool1d(3, 2, 1, return_indices=True)(gg.tensor(x))
    t, there = torch.nn.MaxPool1d(3, 2, 1, return_indices=True)(torch.tensor(x))
    np.testing.assert_array_equal(y.numpy(), t.numpy())
    np.testing.assert_array_equal(places.numpy(), there.numpy())


@pytest.mark.parametrize("mode", ["off", "require"])
def test_nan_and_ties_as_in_pytorch(mode):
    torch = torch_module()
    x = np.zeros((1, 20, 4, 4))
    x[0, 3, 1, 1] = np.nan
    x[0, 4] = -np.inf
    x[0, 5, :, 0] = 1.0
    with gg.use_kernels(mode):
        a = gg.tensor(x, requires_grad=True)
        y = F.max_pool2d(a, 2)
        y.sum().backward()
    b = torch.tensor(x, requires_grad=True)
    t = torch.nn.functional.max_pool2d(b, 2)
    t.sum().backward()
    np.testing.assert_array_equal(y.detach().numpy(), t.detach().numpy())
    np.testing.assert_array_equal(a.grad.numpy(), b.grad.numpy())


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_a_net_trains_as_pytorchs(mode):
    torch = torch_module()
    functional = SimpleNamespace(ours=F, theirs=torch.nn.functional)

    def net(lib, **options):
        return lib.Sequential(
            lib.Conv2d(1, 8, 3, **options), lib.ReLU(), lib.Conv2d(8, 12, 3, padding=1, **options),
            lib.GELU(), lib.MaxPool2d(2), lib.Conv2d(12, 4, 3, stride=2, **options), lib.Tanh(),
            lib.Flatten(), lib.Linear(100, 3, **options),
        )  # fmt: skip

    theirs, ours = net(torch.nn, dtype=torch.float64), net(nn, dtype="float64")
    ours.load_state_dict({k: gg.tensor(v.numpy()) for k, v in theirs.state_dict().items()})
    x, target = normal((16, 1, 26, 26)), np.arange(16) % 3
    mine = gg.optim.SGD(ours.parameters(), lr=0.1)
    other = torch.optim.SGD(theirs.parameters(), lr=0.1)
    with gg.use_kernels(mode):
        for _ in range(3):
            mine.zero_grad()
            other.zero_grad()
            a = functional.ours.cross_entropy(ours(gg.tensor(x)), gg.tensor(target))
            b = functional.theirs.cross_entropy(theirs(torch.tensor(x)), torch.tensor(target))
            assert abs(a.item() - b.item()) < 1e-9
            a.backward()
            b.backward()
            mine.step()
            other.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        np.testing.assert_allclose(p.detach().numpy(), q.detach().numpy(), 1e-9, 1e-10)


@pytest.mark.parametrize("options", [
    {}, {"stride": 2, "padding": 1}, {"stride": 3, "output_padding": 2}, {"dilation": 2},
    {"stride": 2, "padding": 2, "output_padding": 1, "groups": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("axes", [1, 2])
def test_transposes(axes, options):
    torch = torch_module()
    name = f"conv_transpose{axes}d"
    shape = (3, 6, 7, 5)[: 2 + axes]
    weight, bias = normal((6, 4, *(3,) * axes), 1), normal(4 * options.get("groups", 1), 2)
    agree(lambda *a: getattr(F, name)(*a, **options),
          lambda *a: getattr(torch.nn.functional, name)(*a, **options),
          normal(shape), weight, bias)  # fmt: skip
    agree(lambda *a: getattr(F, name)(*a, **options),
          lambda *a: getattr(torch.nn.functional, name)(*a, **options),
          normal(shape[1:]), weight)  # fmt: skip


@pytest.mark.parametrize("options", [
    {}, {"stride": 2, "padding": 1, "output_padding": 1}, {"groups": 2, "bias": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("axes", [1, 2])
def test_transposed_layers(axes, options):
    ours, theirs = both(f"ConvTranspose{axes}d", 6, 4, 3, **options)
    assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == {
        k: tuple(v.shape) for k, v in theirs.state_dict().items()
    }
    assert repr(ours) == repr(theirs)
    x = normal((2, 6, 7, 5)[: 2 + axes])
    agree(ours, theirs, x)
    if options.get("stride") == 2:
        torch = torch_module()
        size = [14, 10][:axes]
        y = ours(gg.tensor(x), output_size=size)
        assert y.shape[2:] == tuple(size)
        want = theirs(torch.tensor(x), output_size=size)
        np.testing.assert_allclose(y.detach().numpy(), want.detach().numpy(), rtol=1e-9, atol=1e-9)


def test_transposed_layers_start_as_in_pytorch():
    torch = torch_module()
    ours, theirs = (lib.ConvTranspose2d(32, 64, 3, groups=2) for lib in (nn, torch.nn))
    for name in ("weight", "bias"):
        mine, other = getattr(ours, name).detach().numpy(), getattr(theirs, name).detach().numpy()
        assert np.isclose(np.abs(mine).max(), np.abs(other).max(), rtol=0.1)


def test_transposed_layers_refuse():
    layer = nn.ConvTranspose2d(3, 4, 3, stride=2)
    with pytest.raises(
        ShapeError, match=r"ConvTranspose2d 3->4: input of shape \(1, 2, 4, 4\) has 2"
    ):
        layer(gg.zeros((1, 2, 4, 4)))
    with pytest.raises(ShapeError, match=r"output_size=\(9, 12\) .* \(9, 9\) to \(10, 10\) can"):
        layer(gg.zeros((1, 3, 4, 4)), output_size=(9, 12))
    with pytest.raises(ParameterError, match="padding='same'; a transposed"):
        nn.ConvTranspose1d(3, 4, 3, padding="same")


# -- what does not fit -----------------------------------------------------------------------------


def test_layers_refuse_what_cannot_be():
    with pytest.raises(ParameterError, match=r"Conv2d: padding_mode='reflect'.*padding=0"):
        nn.Conv2d(1, 2, 3, padding_mode="reflect")
    with pytest.raises(ShapeError, match=r"Conv2d\(3, 4\), groups=2: in_channels"):
        nn.Conv2d(3, 4, 3, groups=2)
    with pytest.raises(ShapeError, match=r"out_channels must be 1 or more"):
        nn.Conv1d(3, 0, 3)
    with pytest.raises(ParameterError, match=r'Conv1d: padding="same" keeps the size.*numbers'):
        nn.Conv1d(3, 4, 3, stride=2, padding="same")
    with pytest.raises(ParameterError, match="Conv2d: stride=0; it must be 1 or more"):
        nn.Conv2d(3, 4, 3, stride=0)
    with pytest.raises(ParameterError, match="Conv2d: groups=0"):
        nn.Conv2d(3, 4, 3, groups=0)


def test_a_layer_names_itself_and_the_channels():
    with pytest.raises(ShapeError, match=r"has 5 channels, the layer takes 3.*Conv2d\(5, 4, …\)"):
        nn.Conv2d(3, 4, 3)(gg.zeros((2, 5, 8, 8), dtype="float32"))
