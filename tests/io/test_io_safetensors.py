"""Headers of safetensors files, honest and malicious."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from gpugrad.io import CheckpointCorruptError, CheckpointError, load, read_metadata, save
from gpugrad.io.safetensors import LONGEST_HEADER


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


DATA = bytes(range(16))
A, B = tensor(), tensor(offsets=(8, 16))


def test_an_honest_header(tmp_path: Path) -> None:
    path = write(tmp_path / "c", {"__metadata__": {"x": "1"}, "b": B, "a": A}, DATA)
    found, metadata = load(path)
    assert sorted(found) == ["a", "b"]
    assert found["a"].tobytes() + found["b"].tobytes() == DATA
    assert metadata == read_metadata(path) == {"x": "1"}


@pytest.mark.parametrize(
    ("header", "data", "told"),
    [
        # where the tensors lie
        ({"a": A, "b": tensor(offsets=(4, 12))}, DATA[:12], "'a' and 'b' overlap from byte 4 to 8"),
        ({"a": A, "b": tensor(offsets=(0, 8))}, DATA[:8], "'a' and 'b' overlap from byte 0 to 8"),
        (
            {"a": tensor(shape=[4], offsets=[0, 16]), "b": tensor("U8", [1], [4, 5])},
            DATA,
            "overlap",
        ),
        ({"a": A, "b": tensor(offsets=(9, 17))}, DATA + b"x", "1 bytes between 'a' and tensor 'b'"),
        ({"a": tensor(offsets=(8, 16))}, DATA, "8 bytes between the header and tensor 'a'"),
        ({"a": A}, DATA, "8 bytes behind 'a' belong to no tensor"),
        ({}, DATA, "16 bytes behind the header belong to no tensor"),
        ({"a": A, "b": B}, DATA[:15], "truncated: its tensors take 16 bytes, and 15 are there"),
        ({"a": tensor(shape=[2**60], offsets=[0, 2**62])}, DATA, "truncated"),
        # shapes, types and offsets
        ({"a": tensor(shape=[3])}, DATA[:8], r"shape \[3\] of float32 takes 12 bytes.* give it 8"),
        ({"a": tensor("F64")}, DATA[:8], r"float64 takes 16 bytes"),
        ({"a": tensor(shape=[2**64, 2**64])}, DATA[:8], "takes"),
        ({"a": tensor(shape=[2**33, 2**31, 0])}, DATA[:8], "takes 0 bytes"),
        ({"a": tensor(shape=[-2])}, DATA[:8], r"integers from 0 on, got \[-2\]"),
        ({"a": tensor(shape=[-1, -2])}, DATA[:8], "integers from 0 on"),
        ({"a": tensor(shape=[2.0])}, DATA[:8], "integers from 0 on"),
        ({"a": tensor(shape=[True, 2])}, DATA[:8], "integers from 0 on"),
        ({"a": tensor(shape="2")}, DATA[:8], "integers from 0 on"),
        ({"a": tensor(shape=None)}, DATA[:8], "integers from 0 on"),
        ({"a": tensor(shape=[1] * 65)}, DATA[:4], "at most 64"),
        ({"a": tensor(offsets=[8, 0])}, DATA[:8], "the first not the greater"),
        ({"a": tensor(offsets=[-8, 0])}, DATA[:8], "from 0 on"),
        ({"a": tensor(offsets=[0, 8, 8])}, DATA[:8], "two integers"),
        ({"a": tensor(offsets=[0, "8"])}, DATA[:8], "two integers"),
        ({"a": tensor("F31")}, DATA[:8], "type 'F31', which is none"),
        ({"a": tensor("f32")}, DATA[:8], "type 'f32', which is none"),
        ({"a": tensor(["F32"])}, DATA[:8], "which is none"),
        ({"a": tensor(None)}, DATA[:8], "which is none"),
        # what stands in the JSON
        (
            {"a": {"dtype": "F32", "shape": [2]}},
            DATA[:8],
            "must have dtype, shape and data_offsets",
        ),
        ({"a": tensor(strides=[1])}, DATA[:8], "and nothing else"),
        ({"a": [1, 2]}, DATA[:8], "must have dtype"),
        ({"__metadata__": {"x": 1}}, b"", "__metadata__ must map names to strings"),
        ({"__metadata__": ["x"]}, b"", "__metadata__ must map"),
        (b'{"a": NaN}', b"", "NaN is no number of JSON"),
        (b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', DATA[:8], "Infinity"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-Infinity,8]}}', DATA[:8], "-Infinity"),
        (b'{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', DATA[:4], "integers from 0"),
        (b'{"__metadata__":{"x":"1","x":"2"}}', b"", "'x' is there twice"),
        (b'{"__metadata__":{},"__metadata__":{}}', b"", "'__metadata__' is there twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "no valid JSON"),
        (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', b"", "JSON"),
        (b'{"a\xff": 1}', b"", "no valid JSON"),
        (b'["a"]', b"", "does not begin with {"),
        (b' {"a":1}', b"", "does not begin with {"),
        (b"{", b"", "no valid JSON"),
        (b"{} {}", b"", "no valid JSON"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, header: Any, data: bytes, told: str) -> None:
    path = write(tmp_path / "c", header, data)
    with pytest.raises(CheckpointCorruptError, match=told) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    with pytest.raises(CheckpointCorruptError):
        load(path, mmap=True)


@pytest.mark.parametrize("key", [b'"a"', b'"\\u0061"'])
def test_a_name_that_is_there_twice(tmp_path: Path, key: bytes) -> None:
    # The reference implementation takes the last one without a word.
    a = json.dumps(A).encode()
    path = write(tmp_path / "c", b'{"a":' + a + b"," + key + b":" + a + b"}", DATA[:8])
    assert len(safetensors.deserialize(path.read_bytes())) == 1
    with pytest.raises(CheckpointCorruptError, match="'a' is there twice"):
        load(path)


@pytest.mark.parametrize(
    ("length", "told"),
    [
        (LONGEST_HEADER + 1, "would have 100000001 bytes, more than 100000000"),
        (2**64 - 1, "more than 100000000"),
        (10_000, "would have 10000 bytes, and the file has"),
        (0, "does not begin with {"),
    ],
)
def test_lengths_of_headers(tmp_path: Path, length: int, told: str) -> None:
    path = write(tmp_path / "c", {"a": A}, DATA[:8], length)
    with pytest.raises(CheckpointCorruptError, match=told):
        load(path)


def test_nothing_is_allocated_for_sizes_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "c", {"a": tensor("U8", [2**40], [0, 2**40])}, DATA)
    tracemalloc.start()
    with pytest.raises(CheckpointCorruptError, match="truncated"):
        load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_types_of_others(tmp_path: Path) -> None:
    path = write(tmp_path / "c", {"a": tensor("F8_E8M0", [2], [0, 2])}, b"\0\0")
    with pytest.raises(CheckpointError, match="type F8_E8M0, which NumPy has not") as caught:
        load(path)
    assert not isinstance(caught.value, CheckpointCorruptError)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 20) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
OFFSETS = st.lists(st.integers(-1, 17), min_size=2, max_size=2)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F4"]) | JSON,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | JSON,
        "data_offsets": OFFSETS | JSON,
    }
)


@given(st.dictionaries(st.text(max_size=2), ENTRY | JSON, max_size=3), st.binary(max_size=20))
def test_any_header_loads_whole_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "any", header, data)
    try:
        found, _ = load(path)
    except CheckpointError:
        return
    assert sum(x.nbytes for x in found.values()) == len(data)


def test_tensors_lie_aligned_and_others_read_them(tmp_path: Path) -> None:
    arrays = {"a": np.ones(3, np.int8), "b": np.ones(3), "c": np.ones(1, np.float32)}
    save(tmp_path / "c", arrays, {"note": "日本"})
    with open(tmp_path / "c", "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    assert length % 8 == 0
    for name, x in arrays.items():
        assert header[name]["data_offsets"][0] % x.dtype.itemsize == 0
    with safetensors.safe_open(tmp_path / "c", "numpy") as theirs:
        assert theirs.metadata()["note"] == "日本"
        for name, x in arrays.items():
            np.testing.assert_array_equal(theirs.get_tensor(name), x)


def test_some_names(tmp_path: Path) -> None:
    save(tmp_path / "c", {"a": np.arange(3), "b": np.ones(2), "c": np.zeros(1)})
    assert list(load(tmp_path / "c", names=["c", "a"])[0]) == ["a", "c"]
    with pytest.raises(CheckpointError, match="has no tensors d, e"):
        load(tmp_path / "c", names=["a", "e", "d"])


def test_mapped_arrays_are_views_of_the_file(tmp_path: Path) -> None:
    save(
        tmp_path / "c", {"a": np.arange(6.0).reshape(2, 3), "e": np.zeros((0, 2)), "s": np.array(5)}
    )
    found, _ = load(tmp_path / "c", mmap=True)
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["e"].shape == (0, 2)
    assert found["s"] == 5
    assert not found["a"].flags.writeable
    assert not found["a"].flags.owndata
