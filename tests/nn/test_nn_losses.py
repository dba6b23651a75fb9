"""Losses as modules: PyTorch's values, gradients, names and states."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.errors import ParameterError

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((2, 6, 4, 3))
P, Q = (np.exp(a) / np.exp(a).sum(1, keepdims=True) for a in (X, Y))
CLASSES = RNG.integers(0, 4, (6, 3))
WEIGHT, EACH = np.array([0.5, 1.0, 2.0, 0.3]), RNG.random((4, 1))
SIDES = np.array([1, -1, 1, 1, -1, -1])

#: Name, options, whose arrays become tensors, and inputs.
CASES = [
    ("CrossEntropyLoss", {}, (X, CLASSES)),
    ("CrossEntropyLoss", {"weight": WEIGHT, "ignore_index": 2, "label_smoothing": 0.1},
     (X, CLASSES)),
    ("CrossEntropyLoss", {"weight": WEIGHT, "label_smoothing": 0.2}, (X, Q)),
    ("NLLLoss", {}, (np.log(P), CLASSES)),
    ("NLLLoss", {"weight": WEIGHT, "ignore_index": 2}, (np.log(P), CLASSES)),
    ("BCELoss", {}, (P, Q)),
    ("BCELoss", {"weight": EACH}, (P, Q)),
    ("BCEWithLogitsLoss", {}, (X, Q)),
    ("BCEWithLogitsLoss", {"weight": EACH, "pos_weight": EACH + 1}, (X, Q)),
    ("MSELoss", {}, (X, Y)),
    ("L1Loss", {}, (X, Y)),
    ("SmoothL1Loss", {}, (X, Y)),
    ("SmoothL1Loss", {"beta": 0.3}, (X, Y)),
    ("HuberLoss", {}, (X, Y)),
    ("HuberLoss", {"delta": 0.3}, (X, Y)),
    ("KLDivLoss", {}, (np.log(P), Q)),
    ("KLDivLoss", {"log_target": True}, (np.log(P), np.log(Q))),
    ("GaussianNLLLoss", {"full": True}, (X, Y, P)),
    ("CosineEmbeddingLoss", {"margin": 0.1}, (X[..., 0], Y[..., 0], SIDES)),
]  # fmt: skip


def made(namespace, tensor, name, options):
    options = {k: tensor(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    return getattr(namespace, name)(**options)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("name", "options", "inputs"), CASES)
def test_losses_are_pytorchs(name, options, inputs, reduction) -> None:
    options = {**options, "reduction": reduction}
    mine = made(nn, gg.tensor, name, options)
    theirs = made(torch.nn, torch.tensor, name, options)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    xs, ts = [gg.tensor(a) for a in inputs], [torch.tensor(a) for a in inputs]
    xs[0].requires_grad_()
    ts[0].requires_grad_()
    y, z = mine(*xs), theirs(*ts)
    np.testing.assert_allclose(y.detach().numpy(), z.detach().numpy(), rtol=1e-9, atol=1e-12)
    g = RNG.standard_normal(y.shape)
    y.backward(gg.tensor(g))
    z.backward(torch.tensor(g))
    np.testing.assert_allclose(xs[0].grad.numpy(), ts[0].grad.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.torch
@pytest.mark.parametrize("name", sorted({name for name, *_ in CASES}))
def test_defaults_and_attributes_are_pytorchs(name: str) -> None:
    mine, theirs = getattr(nn, name)(), getattr(torch.nn, name)()
    options = [k for k in vars(mine) if not k.startswith("_") and k not in ("training",)]
    assert options
    for option in options:
        assert getattr(mine, option) == getattr(theirs, option)


@pytest.mark.torch
def test_batchmean_and_similarity_are_pytorchs() -> None:
    args = np.log(P), Q
    for reduction in ("batchmean", "sum"):
        mine = nn.KLDivLoss(reduction=reduction)(*map(gg.tensor, args))
        theirs = torch.nn.KLDivLoss(reduction=reduction)(*map(torch.tensor, args))
        assert mine.item() == pytest.approx(theirs.item(), rel=1e-12)
    mine = nn.CosineSimilarity(dim=2)(gg.tensor(X), gg.tensor(Y))
    theirs = torch.nn.CosineSimilarity(dim=2)(torch.tensor(X), torch.tensor(Y))
    np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-12)


def test_weights_move_and_are_saved_with_the_module() -> None:
    loss = nn.BCEWithLogitsLoss(pos_weight=gg.tensor([2.0]))
    assert list(loss.state_dict()) == ["pos_weight"]
    assert list(loss.parameters()) == []
    loss.load_state_dict({"pos_weight": np.array([3.0])})
    assert loss.to("float32").pos_weight.dtype == np.float32
    assert loss.pos_weight.item() == 3.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.MSELoss(reduction="avg"), "MSELoss: reduction is one of mean, sum, none"),
        (lambda: nn.KLDivLoss(reduction="batch"), "batchmean, not 'batch'"),
        (lambda: nn.HuberLoss(delta=0.0), "HuberLoss: delta must be positive"),
        (lambda: nn.SmoothL1Loss(beta=-1.0), "SmoothL1Loss: beta must not be negative"),
        (lambda: nn.CrossEntropyLoss(label_smoothing=1.1), "label_smoothing is a share"),
        (lambda: nn.CrossEntropyLoss(label_smoothing=float("nan")), "label_smoothing is a share"),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        make()


def test_an_error_inside_a_net_names_the_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = nn.MSELoss()

        def forward(self, x):
            return self.criterion(x, gg.ones(2))

    with pytest.raises(gg.errors.ShapeError, match=r"Net\.criterion \(MSELoss\)"):
        Net()(gg.ones((2, 1)))
