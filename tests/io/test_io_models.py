"""Models in safetensors: round trips, tied weights, other types, PyTorch's files."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gpugrad import nn
from gpugrad.io import CheckpointError, load, load_model, save, save_model
from gpugrad.nn.errors import StateDictError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def values(net: nn.Module) -> dict[str, np.ndarray]:
    return {name: x.numpy().copy() for name, x in net.state_dict().items()}


def assert_same(net: nn.Module, wanted: dict[str, np.ndarray]) -> None:
    found = values(net)
    assert list(found) == list(wanted)
    for name, x in wanted.items():
        np.testing.assert_array_equal(found[name], x)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    net, other = Tied(), Tied()
    save_model(net, tmp_path / "m", {"epoch": "3"})
    tensors, metadata = load(tmp_path / "m")
    assert list(tensors) == ["embedding.weight", "body.weight", "body.bias"]
    assert metadata == {"format": "pt", "epoch": "3", "head.weight": "embedding.weight"}
    load_model(other, tmp_path / "m")
    assert_same(other, values(net))
    assert other.head.weight is other.embedding.weight


def test_tied_weights_under_either_name(tmp_path: Path) -> None:
    net = Tied()
    wanted = values(net)
    body = {name: wanted[name] for name in ("body.weight", "body.bias")}
    for names in (["head.weight"], ["embedding.weight"], ["head.weight", "embedding.weight"]):
        save(tmp_path / "m", {**body, **{name: wanted[name] for name in names}})
        other = Tied()
        load_model(other, tmp_path / "m")
        assert_same(other, wanted)
    save(tmp_path / "m", {**wanted, "head.weight": wanted["head.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"embedding\.weight and head\.weight differ"):
        load_model(other, tmp_path / "m")
    assert_same(other, wanted)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_types(tmp_path: Path, dtype: type) -> None:
    net = nn.Linear(3, 2)
    before = values(net)
    save(tmp_path / "m", {name: (x * 0 + 0.5).astype(dtype) for name, x in before.items()})
    with pytest.raises(StateDictError, match="wrong dtype: weight"):
        load_model(net, tmp_path / "m")
    assert_same(net, before)
    load_model(net, tmp_path / "m", convert=True)
    assert_same(net, {name: x * 0 + np.float32(0.5) for name, x in before.items()})


def test_a_file_that_half_fits_changes_nothing(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    before = values(net)
    wrong = {name: x + 1 for name, x in before.items()}
    wrong["1.weight"] = np.zeros((3, 3), np.float32)
    wrong["2.weight"] = wrong.pop("1.bias")
    save(tmp_path / "m", wrong)
    with pytest.raises(StateDictError) as caught:
        load_model(net, tmp_path / "m")
    for line in ("missing: 1.bias", "unexpected: 2.weight", "wrong shape: 1.weight is (3, 3)"):
        assert line in str(caught.value)
    assert_same(net, before)


def test_not_strict(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    save(tmp_path / "m", {"weight": np.ones((2, 3), np.float32), "extra": np.ones(1)})
    keys = load_model(net, tmp_path / "m", strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["bias"], ["extra"])
    assert (net.weight.detach().numpy() == 1).all()


@pytest.mark.torch
def test_pytorch_models_and_back(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_model as torch_load_model
    from safetensors.torch import save_model as torch_save_model

    class Theirs(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(5, 3)
            self.body = torch.nn.Linear(3, 3)
            self.head = torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    theirs, ours = Theirs(), Tied()
    torch_save_model(theirs, str(tmp_path / "t"))
    load_model(ours, tmp_path / "t")
    assert_same(ours, {name: x.numpy() for name, x in theirs.state_dict().items()})
    again = Theirs()
    save_model(ours, tmp_path / "o")
    torch_load_model(again, str(tmp_path / "o"))
    for name, x in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], x)
