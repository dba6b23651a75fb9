"""The embedding layer: PyTorch's names, initial values, looks, gradients and refusals."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.errors import DTypeError, OutOfRangeError, ParameterError, ShapeError
from gpugrad.nn import functional as F


def test_the_table_starts_normally_distributed() -> None:
    layer = nn.Embedding(500, 40, padding_idx=-2)
    table = layer.weight.detach().numpy()
    assert table.dtype == np.float32
    assert layer.padding_idx == 498
    assert np.all(table[498] == 0)
    rest = np.delete(table, 498, axis=0)
    assert abs(rest.mean()) < 0.04 and abs(rest.std() - 1) < 0.03
    layer.reset_parameters(nn.Generator(4))
    first = layer.weight.detach().numpy().copy()
    layer.reset_parameters(nn.Generator(4))
    assert np.array_equal(layer.weight.detach().numpy(), first)
    assert np.all(first[498] == 0)


def test_padding_stays_as_it_is() -> None:
    layer = nn.Embedding(6, 3, padding_idx=1)
    y = layer(gg.tensor([[1, 2], [1, 1]]))
    assert y.shape == (2, 2, 3)
    gg.sum(y).backward()
    assert layer.weight.grad.numpy()[:, 0].tolist() == [0, 0, 1, 0, 0, 0]


def test_pretrained_tables_share_memory_and_draw_nothing() -> None:
    table = gg.tensor(np.eye(3))
    before = nn.default_generator.state
    frozen = nn.Embedding.from_pretrained(table)
    assert nn.default_generator.state == before
    assert not frozen.weight.requires_grad
    assert frozen.weight.data is table.data
    assert frozen(gg.tensor([2])).tolist() == [[0.0, 0.0, 1.0]]
    trained = nn.Embedding.from_pretrained(table, freeze=False, padding_idx=0)
    assert trained.weight.requires_grad and trained.padding_idx == 0
    with pytest.raises(ShapeError, match="two axes"):
        nn.Embedding.from_pretrained(gg.ones(3))


def test_a_table_shared_with_the_last_layer() -> None:
    table = nn.Embedding(5, 4, dtype="float64")
    last = nn.Linear(4, 5, bias=False, dtype="float64")
    last.weight = table.weight
    index = gg.tensor([1, 3, 3])
    gg.sum(last(table(index)) ** 2).backward()

    def loss(w):
        return gg.sum((w[np.array([1, 3, 3])] @ w.T) ** 2)

    want = gg.grad(loss)(table.weight.detach())
    np.testing.assert_allclose(table.weight.grad.numpy(), want.numpy(), rtol=1e-12)


def test_looks() -> None:
    assert repr(nn.Embedding(10, 3)) == "Embedding(10, 3)"
    assert repr(nn.Embedding(10, 3, -1)) == "Embedding(10, 3, padding_idx=9)"
    scaled = nn.Embedding(10, 3, scale_grad_by_freq=True)
    assert repr(scaled) == "Embedding(10, 3, scale_grad_by_freq=True)"
    assert list(scaled.state_dict()) == ["weight"]


def test_what_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"max_norm=1\.0 would change the table while it is"):
        nn.Embedding(3, 2, max_norm=1.0)
    with pytest.raises(ParameterError, match="sparse=True"):
        F.embedding(gg.tensor([0]), gg.ones((3, 2)), sparse=True)
    with pytest.raises(ParameterError, match="padding_idx=3 is none of the 3 rows"):
        nn.Embedding(3, 2, padding_idx=3)
    with pytest.raises(ShapeError, match=r"Embedding\(0, 2\)"):
        nn.Embedding(0, 2)
    layer = nn.Embedding(3, 2)
    with pytest.raises(OutOfRangeError, match=r"index 3 at \[0, 1\] is none of the 3 rows"):
        layer(gg.tensor([[0, 3]]))
    with pytest.raises(DTypeError, match="integers"):
        layer(gg.tensor([1.0]))


@pytest.mark.torch
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True},
                                     {"padding_idx": -1, "scale_grad_by_freq": True}])  # fmt: skip
@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_pytorch(options, kind) -> None:
    import torch

    theirs = torch.nn.Embedding(7, 5, dtype=torch.float64, **options)
    ours = nn.Embedding(7, 5, dtype="float64", **options)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    rng = np.random.default_rng(0)
    index, g = rng.integers(0, 7, (6, 4)).astype(kind), rng.standard_normal((6, 4, 5))
    y, z = ours(gg.tensor(index)), theirs(torch.tensor(index))
    assert np.array_equal(y.detach().numpy(), z.detach().numpy())
    y.backward(gg.tensor(g))
    z.backward(torch.tensor(g))
    np.testing.assert_allclose(
        ours.weight.grad.numpy(), theirs.weight.grad.numpy(), rtol=1e-13, atol=1e-15
    )
