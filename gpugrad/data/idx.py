"""The IDX format of MNIST and its relatives: big-endian arrays, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpugrad.data.errors import DataCorruptError, DataError, DataNotFoundError

__all__ = ["read_idx"]

_GZIP_MAGIC = b"\x1f\x8b"
_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | os.PathLike[str]) -> NDArray[Any]:
    """Read one IDX file, whole, and check every byte of its structure.

    An IDX file is two zero bytes, a type code, the number of dimensions, the dimensions as
    big-endian 32-bit integers, and then exactly as many values as they call for. Whether the file
    is gzipped is told from its content, not from its name.

    Returns a writable array in native byte order: uint8, int8, int16, int32, float32 or float64.

    Raises `DataNotFoundError` without a file at `path`, and `DataCorruptError` when the file is
    truncated, overlong, no IDX file, or fails gzip's checksum.

    Format: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "labels-idx1-ubyte")
    ...     _ = path.write_bytes(bytes([0, 0, 0x08, 1]) + bytes([0, 0, 0, 3]) + bytes([7, 2, 1]))
    ...     read_idx(path)
    array([7, 2, 1], dtype=uint8)
    """
    raw = _read(Path(path))
    if len(raw) < 4:
        raise DataCorruptError(f"{path}: {len(raw)} bytes are too few for an IDX header")
    if raw[:2] != b"\0\0" or raw[2] not in _DTYPES or raw[3] == 0:
        raise DataCorruptError(
            f"{path}: not an IDX file: it begins with {raw[:4].hex(' ')}, but IDX begins with "
            "00 00, a type code (08, 09, 0b, 0c, 0d or 0e) and at least one dimension"
        )
    dtype, ndim = np.dtype(_DTYPES[raw[2]]), raw[3]
    start = 4 + 4 * ndim
    if len(raw) < start:
        raise DataCorruptError(
            f"{path}: truncated within its {ndim} dimensions: {len(raw)} of {start} header bytes"
        )
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", ndim, offset=4))
    # Python integers: the product of damaged dimensions must not wrap around to a plausible one.
    expected = start + math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        kind = "truncated" if len(raw) < expected else "overlong"
        raise DataCorruptError(
            f"{path}: {kind}: shape {shape} of {dtype.name} takes {expected} bytes, "
            f"the file has {len(raw)}; fetch it again"
        )
    values = np.frombuffer(raw, dtype, offset=start).reshape(shape)
    return values.astype(dtype.newbyteorder("="))


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not raw.startswith(_GZIP_MAGIC):
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataCorruptError(f"{path}: damaged gzip data: {error}; fetch it again") from error
