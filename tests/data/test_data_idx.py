"""The IDX reader: every type it reads, and every way a file can be broken."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpugrad.data import (
    DataCorruptError,
    DataError,
    DataNotFoundError,
    NonFiniteDataError,
    read_idx,
)
from gpugrad.errors import GpugradError

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx(array: NDArray[Any]) -> bytes:
    header = bytes([0, 0, CODES[array.dtype.str[1:]], array.ndim])
    dims = np.array(array.shape, ">u4").tobytes()
    return header + dims + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("code", sorted(CODES))
def test_round_trip(tmp_path: Path, code: str, compress: Any) -> None:
    array = (np.arange(2 * 3 * 5).reshape(2, 3, 5) - (0 if code == "u1" else 7)).astype(code)
    path = tmp_path / "file"
    path.write_bytes(compress(idx(array)))
    read = read_idx(path)
    assert read.dtype == np.dtype(code)
    assert read.dtype.isnative
    assert read.flags.writeable
    np.testing.assert_array_equal(read, array)


def test_compression_is_told_from_content_not_name(tmp_path: Path) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(idx(np.arange(4, dtype="u1")))
    assert read_idx(path).tolist() == [0, 1, 2, 3]


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = idx(np.arange(12, dtype="i2").reshape(3, 4))
    path = tmp_path / "file"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataCorruptError, match="file"):
            read_idx(path)


def test_gz_truncated_anywhere(tmp_path: Path) -> None:
    whole = gzip.compress(idx(np.arange(200, dtype="u1")))
    path = tmp_path / "file.gz"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataCorruptError, match=r"file\.gz"):
            read_idx(path)


def test_gz_flipped_anywhere_behind_its_header(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 16, 300).astype("u1")
    whole = gzip.compress(idx(values))
    path = tmp_path / "file.gz"
    ignored = 0
    for position in range(10, len(whole)):  # the first ten bytes hold a time stamp and the like
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(read_idx(path), values)
        except DataCorruptError:
            continue
        ignored += 1
    assert ignored <= 1  # a few padding bits mean nothing to deflate


def test_trailing_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(idx(np.arange(4, dtype="u1")) + b"\0")
    with pytest.raises(DataCorruptError, match=r"overlong.*takes 12 bytes, the file has 13"):
        read_idx(path)


@pytest.mark.parametrize(
    "start", ["01 00 08 01", "00 01 08 01", "00 00 07 01", "00 00 0a 01", "00 00 08 00"]
)
def test_wrong_magic(tmp_path: Path, start: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes.fromhex(start) + idx(np.arange(4, dtype="u1"))[4:])
    with pytest.raises(DataCorruptError, match=f"begins with {start}"):
        read_idx(path)


def test_dimensions_whose_product_wraps_around(tmp_path: Path) -> None:
    path = tmp_path / "file"
    dims = np.array([2**31, 2**31, 4], ">u4").tobytes()  # their product is 0 modulo 2**64
    path.write_bytes(bytes([0, 0, 0x08, 3]) + dims)
    with pytest.raises(DataCorruptError, match="truncated"):
        read_idx(path)


def test_missing_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match="nothing: no such file"):
        read_idx(tmp_path / "nothing")
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path)


def test_errors_are_standard_ones_too() -> None:
    assert issubclass(DataError, ValueError)
    assert issubclass(DataError, GpugradError)
    assert issubclass(DataNotFoundError, FileNotFoundError)
    error = NonFiniteDataError("x of file", 2, 10, (1, 3))
    # Worker processes send their errors home by pickle.
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.count, copy.first_index) == (str(error), 2, (1, 3))
