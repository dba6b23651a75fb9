"""Checkpoints: what goes in comes out, and damage never goes unnoticed."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from gpugrad.errors import GpugradError
from gpugrad.io import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    load,
    save,
)

OLD = tuple(map(int, safetensors.__version__.split(".")[:2])) < (0, 7)

DTYPES = [
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64"),
    pytest.param("complex64", marks=pytest.mark.skipif(OLD, reason="needs safetensors 0.7")),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
]


def tensors() -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    return {
        "0.weight": rng.standard_normal((3, 4)).astype(np.float32),
        "0.bias": np.arange(3.0),
        "steps": np.array(7),
    }


def header_size(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


def assert_same(found: dict[str, NDArray[Any]], wanted: dict[str, NDArray[Any]]) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


# Round trips


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,), (5,), (2, 3, 4)], ids=str)
def test_round_trip(tmp_path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    array = np.asarray(np.random.default_rng(0).integers(0, 100, shape)).astype(dtype)
    save(tmp_path / "c", {"a": array})
    found, metadata = load(tmp_path / "c")
    assert_same(found, {"a": array})
    assert metadata == {}
    assert found["a"].flags.writeable


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    bits = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x7F800000, 1], np.uint32)
    save(tmp_path / "c", {"a": bits.view(np.float32)})
    assert load(tmp_path / "c")[0]["a"].view(np.uint32).tolist() == bits.tolist()


def test_layouts(tmp_path: Path) -> None:
    base = np.arange(24.0).reshape(4, 6)
    views = {
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "reversed": base[::-1],
        "broadcast": np.broadcast_to(base[0], (3, 6)),
        "fortran": np.asfortranarray(base),
    }
    save(tmp_path / "c", views)
    assert_same(load(tmp_path / "c")[0], views)


def test_big_endian_becomes_little_endian(tmp_path: Path) -> None:
    save(tmp_path / "c", {"a": np.arange(5, dtype=">f4")})
    found = load(tmp_path / "c")[0]["a"]
    assert found.dtype == np.float32
    assert found.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "metadata", [{}, {"epoch": "3"}, {"": "", 'naïve "quoted"\n': "日本\0", "format": "pt"}]
)
def test_metadata_round_trip(tmp_path: Path, metadata: dict[str, str]) -> None:
    save(tmp_path / "c", {}, metadata)
    assert load(tmp_path / "c") == ({}, metadata)
    save(tmp_path / "c", tensors(), metadata)
    found, again = load(tmp_path / "c")
    assert_same(found, tensors())
    assert again == metadata


def test_saving_again_replaces(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save(path, tensors())
    save(path, {"other": np.zeros(2)})
    assert list(load(path)[0]) == ["other"]
    assert list(tmp_path.iterdir()) == [path]


def test_saving_writes_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    link = tmp_path / "latest"
    link.symlink_to(tmp_path / "runs" / "c")
    save(link, tensors())
    assert link.is_symlink()
    assert_same(load(tmp_path / "runs" / "c")[0], tensors())


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    save(tmp_path / "c", tensors())
    (tmp_path / "plain").touch()
    assert (tmp_path / "c").stat().st_mode == (tmp_path / "plain").stat().st_mode


# Files of others


def test_file_without_checksums_loads(tmp_path: Path) -> None:
    path = tmp_path / "c"
    safetensors.numpy.save_file(tensors(), path, {"format": "pt"})
    found, metadata = load(path)
    assert_same(dict(sorted(found.items())), dict(sorted(tensors().items())))
    assert metadata == {"format": "pt"}
    safetensors.numpy.save_file(tensors(), path)
    assert load(path)[1] == {}


def test_others_read_what_is_saved(tmp_path: Path) -> None:
    save(tmp_path / "c", tensors(), {"epoch": "3"})
    found = safetensors.numpy.load_file(tmp_path / "c")
    for name, array in tensors().items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.torch
def test_pytorch_and_back(tmp_path: Path) -> None:
    import torch
    from safetensors import torch as safetensors_torch

    state = {"w": torch.arange(6.0).reshape(2, 3), "h": torch.ones(3, dtype=torch.bfloat16)}
    safetensors_torch.save_file(state, tmp_path / "theirs")
    found, _ = load(tmp_path / "theirs")
    assert found["h"].dtype == ml_dtypes.bfloat16
    save(tmp_path / "ours", found)
    again = safetensors_torch.load_file(tmp_path / "ours")
    for name, tensor in state.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)


def test_bfloat16_without_ml_dtypes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "c", {"h": np.ones(3, ml_dtypes.bfloat16)})
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(CheckpointError, match=r"tensor 'h' is bfloat16.*pip install ml_dtypes"):
        load(tmp_path / "c")


@pytest.mark.skipif(OLD, reason="needs safetensors 0.7, which knows the type")
def test_type_numpy_has_not(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "c").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(CheckpointError, match="tensor 'a' has type F8_E8M0"):
        load(tmp_path / "c")


def test_newer_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpugrad.io.checkpoint._FORMAT", "2")
    save(tmp_path / "c", tensors())
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format 2, .* reads format 1; upgrade") as caught:
        load(tmp_path / "c")
    assert not isinstance(caught.value, CheckpointCorruptError)


# Damage


@pytest.mark.parametrize("mask", [0x01, 0x02, 0x0F, 0x20, 0x80, 0xFF])
def test_a_flipped_byte_anywhere(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "c"
    save(path, tensors(), {"epoch": "3"})
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= mask
        path.write_bytes(damaged)
        with pytest.raises(CheckpointCorruptError) as caught:
            load(path)
        assert str(path) in str(caught.value)


def test_damaged_data_name_their_tensor(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save(path, tensors())
    whole = path.read_bytes()
    for name, array in tensors().items():
        damaged = bytearray(whole)
        damaged[whole.index(array.tobytes(), header_size(whole))] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointCorruptError, match=f"tensor '{name}' differs"):
            load(path)


def test_truncated_or_extended_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save(path, tensors(), {"epoch": "3"})
    whole = path.read_bytes()
    for content in (*(whole[:length] for length in range(len(whole))), whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(CheckpointCorruptError):
            load(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"F32","shape":[3,4]', b'"F32","shape":[4,3]'),
        (b'"F32","shape":[3,4]', b'"I32","shape":[3,4]'),
        (b'"0.bias":{', b'"1.bias":{'),
        (b'"epoch":"3"', b'"epoch":"4"'),
        (b'"epoch":"3"', b'"epoxx":"3"'),
    ],
)
def test_header_edited_to_another_valid_one(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "c"
    save(path, tensors(), {"epoch": "3"})
    whole = path.read_bytes()
    assert old in whole
    path.write_bytes(whole.replace(old, new))
    safetensors.numpy.load_file(path)  # which sees nothing wrong
    with pytest.raises(CheckpointCorruptError):
        load(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\xff" * 100, pickle.dumps({"a": 1})])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match="not a whole safetensors file"):
        load(tmp_path / "c")


def test_reserved_metadata_of_another_program(tmp_path: Path) -> None:
    safetensors.numpy.save_file(tensors(), tmp_path / "c", {"gpugrad.format": "1"})
    with pytest.raises(CheckpointCorruptError, match="metadata differ"):
        load(tmp_path / "c")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="c: no such checkpoint") as caught:
        load(tmp_path / "c")
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path)


# What cannot be saved


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"a": np.zeros(2, complex)}, "tensor 'a': .* complex128; store .real and .imag"),
        ({"a": np.array(["x"])}, "tensor 'a': .* <U1"),
        ({"a": np.array([None])}, "tensor 'a': .* object"),
        ({"a": [1.0, 2.0]}, "tensor 'a': expected a NumPy array or a tensor, got list"),
        ({1: np.zeros(2)}, "1 cannot be the name"),
        ({"__metadata__": np.zeros(2)}, "cannot be the name"),
        ({"\ud800": np.zeros(2)}, "UTF-8"),
    ],
)
def test_tensors_that_cannot_be_saved(tmp_path: Path, contents: Any, message: str) -> None:
    path = tmp_path / "c"
    save(path, tensors())
    with pytest.raises(CheckpointError, match=message):
        save(path, contents)
    assert_same(load(path)[0], tensors())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"epoch": 3}, "'epoch'.*strings only, got str -> int.*pack"),
        ({3: "epoch"}, "got int -> str"),
        ({"gpugrad.format": "9"}, "reserved"),
        ({"a": "\ud800"}, "UTF-8"),
    ],
)
def test_metadata_that_cannot_be_saved(tmp_path: Path, metadata: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "c", tensors(), metadata)
    assert not list(tmp_path.iterdir())


def test_errors_are_standard_ones_too() -> None:
    assert issubclass(CheckpointError, ValueError)
    assert issubclass(CheckpointError, GpugradError)
    assert issubclass(CheckpointWriteError, OSError)


def test_importing_does_not_load_safetensors() -> None:
    code = "import sys, gpugrad.io; sys.exit('safetensors' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_large_tensors_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "c"
    arrays = {f"w{i}": np.full(400_000, i, np.float64) for i in range(6)}
    save(path, arrays)
    assert_same(load(path)[0], arrays)
    raw = bytearray(path.read_bytes())
    raw[-1_000_000] ^= 1  # in the last third of w5
    path.write_bytes(raw)
    with pytest.raises(CheckpointCorruptError, match="tensor 'w5' differs"):
        load(path)
    assert list(load(path, names=["w0"])[0]) == ["w0"]
