"""The same nets in PyTorch: names, values, gradients, and a training."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn, optim
from gpugrad.nn import functional as F

pytestmark = pytest.mark.torch

ACTIVATIONS = [
    ("ReLU", {}), ("ReLU6", {}), ("LeakyReLU", {"negative_slope": 0.2}), ("ELU", {"alpha": 1.5}),
    ("SELU", {}), ("CELU", {"alpha": 0.7}), ("GELU", {}), ("GELU", {"approximate": "tanh"}),
    ("SiLU", {}), ("Mish", {}), ("Softplus", {"beta": 2.0, "threshold": 5.0}),
    ("Hardtanh", {"min_val": -0.5, "max_val": 2.0}), ("Hardswish", {}), ("Hardsigmoid", {}),
    ("Sigmoid", {}), ("LogSigmoid", {}), ("Tanh", {}), ("Softsign", {}), ("Softmax", {"dim": 1}),
    ("LogSoftmax", {"dim": 0}), ("Softmin", {"dim": 1}), ("Softshrink", {"lambd": 0.3}),
    ("Hardshrink", {"lambd": 0.3}), ("Tanhshrink", {}),
    ("Threshold", {"threshold": 0.1, "value": 2.0}),
]  # fmt: skip


def net(lib, **options):
    inner = lib.Sequential(lib.Linear(8, 5, bias=False, **options))
    outer = lib.Linear(5, 3, **options)
    return lib.Sequential(lib.Linear(6, 8, **options), lib.Tanh(), inner, lib.GELU(), outer)


def pair():
    import torch

    theirs = net(torch.nn, dtype=torch.float64)
    ours = net(nn, dtype="float64")
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    return ours, theirs


def test_names_and_looks() -> None:
    ours, theirs = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]


@pytest.mark.parametrize(("name", "options"), ACTIVATIONS)
def test_activations(name, options) -> None:
    import torch

    x = np.random.default_rng(0).standard_normal((4, 7)) * 3
    g = np.random.default_rng(1).standard_normal((4, 7))
    a = gg.tensor(x, requires_grad=True)
    b = torch.tensor(x, requires_grad=True)
    y, t = getattr(nn, name)(**options)(a), getattr(torch.nn, name)(**options)(b)
    y.backward(gg.tensor(g))
    t.backward(torch.tensor(g))
    # PyTorch rounds 1/alpha and 1/6 to single precision.
    rtol = 1e-6 if name in ("CELU", "Hardsigmoid") else 1e-11
    assert np.allclose(y.detach().numpy(), t.detach().numpy(), rtol=rtol, atol=1e-14)
    assert np.allclose(a.grad.numpy(), b.grad.numpy(), rtol=rtol, atol=1e-13)
    keyword = {"softmax": "softmax", "logsoftmax": "log_softmax", "leakyrelu": "leaky_relu"}
    function = getattr(F, keyword.get(name.lower(), name.lower()))
    assert np.array_equal(function(input=gg.tensor(x), **options).numpy(), y.detach().numpy())


@pytest.mark.parametrize("count", [1, 7])
def test_prelu(count) -> None:
    import torch

    x = np.random.default_rng(0).standard_normal((4, 7, 3))
    ours, theirs = nn.PReLU(count, dtype="float64"), torch.nn.PReLU(count, dtype=torch.float64)
    assert repr(ours) == repr(theirs)
    a, b = gg.tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    (y, t) = ours(a), theirs(b)
    (y * y).sum().backward()
    (t * t).sum().backward()
    for got, want in ((y.detach(), t.detach()), (a.grad, b.grad),
                      (ours.weight.grad, theirs.weight.grad)):  # fmt: skip
        assert np.allclose(got.numpy(), want.numpy(), rtol=1e-12, atol=1e-14)
    with pytest.raises(gg.errors.ShapeError, match=r"prelu: weight of shape \(5,\)"):
        nn.PReLU(5, dtype="float64")(a)


def test_glu() -> None:
    import torch

    x = np.random.default_rng(0).standard_normal((4, 6))
    a, b = gg.tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    y, t = nn.GLU(1)(a), torch.nn.GLU(1)(b)
    (y * y).sum().backward()
    (t * t).sum().backward()
    assert np.allclose(y.detach().numpy(), t.detach().numpy(), rtol=1e-12)
    assert np.allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-11)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"ignore_index": 1}]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(options, weighted) -> None:
    import torch

    x = np.random.default_rng(0).standard_normal((5, 3))
    target, weight = np.array([0, 2, 1, 1, 0]), np.array([0.5, 1.0, 2.0])
    a = gg.tensor(x, requires_grad=True)
    b = torch.tensor(x, requires_grad=True)
    ours = nn.CrossEntropyLoss(gg.tensor(weight) if weighted else None, **options)
    theirs = torch.nn.CrossEntropyLoss(torch.tensor(weight) if weighted else None, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    loss, expected = ours(a, gg.tensor(target)), theirs(b, torch.tensor(target))
    loss.backward()
    expected.backward()
    assert np.isclose(loss.item(), expected.item(), rtol=1e-12)
    assert np.allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mse(reduction) -> None:
    import torch

    x, y = np.random.default_rng(0).standard_normal((2, 4, 3))
    ours = nn.MSELoss(reduction=reduction)(gg.tensor(x), gg.tensor(y))
    theirs = torch.nn.MSELoss(reduction=reduction)(torch.tensor(x), torch.tensor(y))
    assert np.allclose(ours.numpy(), theirs.numpy(), rtol=1e-13)


def test_flatten() -> None:
    import torch

    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    for axes in ((1, -1), (0, 1), (-2, -1), (2, 2)):
        ours = nn.Flatten(*axes)(gg.tensor(x)).numpy()
        assert np.array_equal(ours, torch.nn.Flatten(*axes)(torch.tensor(x)).numpy())


def test_a_training() -> None:
    import torch

    ours, theirs = pair()
    a = optim.AdamW(ours.parameters(), lr=1e-2)
    b = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    rng = np.random.default_rng(0)
    for _ in range(30):
        x, y = rng.standard_normal((16, 6)), rng.integers(0, 3, 16)
        a.zero_grad()
        F.cross_entropy(ours(gg.tensor(x)), gg.tensor(y)).backward()
        a.step(clip=0.5)
        b.zero_grad()
        torch.nn.functional.cross_entropy(theirs(torch.tensor(x)), torch.tensor(y)).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        b.step()
        assert np.isclose(a.last_norm.item(), norm.item(), rtol=1e-9)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert np.allclose(p.detach().numpy(), q.detach().numpy(), rtol=1e-9, atol=1e-11)
