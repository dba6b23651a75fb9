"""Models in several safetensors files, as Hugging Face stores them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from gpugrad import nn
from gpugrad.io import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    load,
    load_model,
    save,
)

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TENSORS = {"a": np.arange(3.0), "b": np.ones((2, 2), np.float32), "c": np.array([7])}
PLACES = {"a": FIRST, "b": FIRST, "c": SECOND}


def write(folder: Path, places: Any = PLACES, **more: Any) -> Path:
    for file in (FIRST, SECOND):
        part = {name: TENSORS[name] for name, place in PLACES.items() if place == file}
        safetensors.numpy.save_file(part, folder / file, {"format": "pt"})
    path = folder / INDEX
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places, **more}))
    return path


def test_by_folder_and_by_index(tmp_path: Path) -> None:
    index = write(tmp_path)
    for path in (tmp_path, index, str(index)):
        found, metadata = load(path)
        assert list(found) == ["a", "b", "c"]
        assert metadata == {"format": "pt"}
        for name, x in TENSORS.items():
            assert found[name].dtype == x.dtype
            np.testing.assert_array_equal(found[name], x)
    assert not load(tmp_path, mmap=True)[0]["a"].flags.writeable


def test_some_names_open_only_their_shards(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / SECOND).unlink()
    assert list(load(tmp_path, names=["b"])[0]) == ["b"]
    with pytest.raises(CheckpointNotFoundError, match=f"shards are missing: {SECOND}"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="has no tensors x"):
        load(tmp_path, names=["a", "x"])


def test_one_file_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load(tmp_path)
    save(tmp_path / "model.safetensors", TENSORS)
    assert list(load(tmp_path)[0]) == ["a", "b", "c"]


def test_index_and_shards_that_disagree(tmp_path: Path) -> None:
    write(tmp_path, {**PLACES, "d": SECOND})
    with pytest.raises(CheckpointCorruptError, match=f"{SECOND} name different tensors: d"):
        load(tmp_path)
    write(tmp_path, {"a": FIRST, "c": SECOND})
    with pytest.raises(CheckpointCorruptError, match=f"{FIRST} name different tensors: b"):
        load(tmp_path)


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors",
     "weights.bin", "", ".."],
)  # fmt: skip
def test_files_elsewhere_are_not_opened(tmp_path: Path, file: str) -> None:
    write(tmp_path, {**PLACES, "d": file})
    with pytest.raises(CheckpointCorruptError, match=r"is not the name of a \.safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_other_files(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointCorruptError, match="not an index of shards"):
        load(tmp_path)


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such checkpoint"):
        load(tmp_path / INDEX)


def test_a_model_from_shards(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    state = {name: x.numpy() for name, x in net.state_dict().items()}
    places = {}
    for i, name in enumerate(state):
        file = (FIRST, SECOND)[i // 2]
        places[name] = file
    for file in (FIRST, SECOND):
        part = {name: state[name] for name in state if places[name] == file}
        safetensors.numpy.save_file(part, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    other = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    load_model(other, tmp_path)
    for name, x in other.state_dict().items():
        np.testing.assert_array_equal(x.numpy(), state[name])
