"""The safetensors format: a header of JSON, and behind it the bytes of every tensor.

A file begins with the length of the header, eight bytes, little-endian. The header maps names to
``{"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}`` and ``"__metadata__"`` to strings.
Offsets count from the end of the header. Nothing in a file is ever executed, and nothing is
allocated before the header has been found to describe the file's bytes exactly.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpugrad.io.errors import CheckpointCorruptError, CheckpointError

__all__ = ["Entry", "code_of", "make_header", "read_header"]

Metadata = dict[str, str]

#: The longest header that is read, in bytes; the limit of the reference implementation.
LONGEST_HEADER = 100_000_000

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    # From the package ml_dtypes.
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_ML_DTYPES = ("BF16", "F8_E4M3", "F8_E5M2")
_CODES = {name: code for code, name in _DTYPES.items()}
_ITEMSIZE = {
    code: np.dtype(name).itemsize for code, name in _DTYPES.items() if code not in _ML_DTYPES
} | {"BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}

#: Types of the format that are left to other libraries, some of them smaller than a byte.
_FOREIGN = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")

#: More dimensions than NumPy has.
_MOST_DIMENSIONS = 64


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file: `begin` and `end` count bytes from the end of the header."""

    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def dtype(self, where: str) -> np.dtype[Any]:
        """The little-endian NumPy dtype; CheckpointError when NumPy does not have it here."""
        if self.code not in _ML_DTYPES:
            return np.dtype(_DTYPES[self.code]).newbyteorder("<")
        try:
            module = importlib.import_module("ml_dtypes")
        except ImportError:
            raise CheckpointError(
                f"{where}: tensor {self.name!r} is {_DTYPES[self.code]}, which NumPy has only with "
                "the package ml_dtypes; pip install ml_dtypes"
            ) from None
        found: np.dtype[Any] = np.dtype(getattr(module, _DTYPES[self.code]))
        return found


def code_of(dtype: np.dtype[Any]) -> str | None:
    """What the format calls a dtype; None when it does not have it.

    >>> code_of(np.dtype("float32")), code_of(np.dtype("complex128"))
    ('F32', None)
    """
    return _CODES.get(dtype.name)


# -- writing ---------------------------------------------------------------------------------------


def make_header(
    arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """The bytes before the tensors' own, and the names in the order these have to follow in.

    Raises UnicodeEncodeError for text that UTF-8 cannot encode.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # The widest types come first, so that each tensor lies at a multiple of its item size.
    order = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    end = 0
    for name in order:
        x = arrays[name]
        begin, end = end, end + x.nbytes
        header[name] = {
            "dtype": _CODES[x.dtype.name],
            "shape": list(x.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER:
        raise CheckpointError(
            f"names and metadata take {len(text)} bytes, and a header may have {LONGEST_HEADER}; "
            "store large values as arrays"
        )
    return len(text).to_bytes(8, "little") + text, order


# -- reading ---------------------------------------------------------------------------------------


def read_header(file: BinaryIO, size: int, where: str) -> tuple[list[Entry], Metadata, int]:
    """Tensors in the order of their bytes, metadata, and where the first tensor's bytes begin.

    `file` stands at its beginning and has `size` bytes. Everything that the header says is checked:
    the tensors fill the rest of the file exactly, without holes or overlaps, and each has as many
    bytes as its shape and type take.

    Raises CheckpointCorruptError for anything else, CheckpointError for types NumPy has not.
    """
    broken = f"{where}: not a whole safetensors file"
    start = file.read(8)
    if len(start) < 8:
        raise CheckpointCorruptError(f"{broken}: it has {size} bytes")
    length = int.from_bytes(start, "little")
    if length > LONGEST_HEADER:
        raise CheckpointCorruptError(
            f"{broken}: its header would have {length} bytes, more than {LONGEST_HEADER}"
        )
    if length > size - 8:
        raise CheckpointCorruptError(
            f"{broken}: its header would have {length} bytes, and the file has {size}"
        )
    text = file.read(length)
    if not text.startswith(b"{"):
        raise CheckpointCorruptError(f"{broken}: its header does not begin with {{")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{broken}: its header is no valid JSON: {error}") from error
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointCorruptError(f"{broken}: __metadata__ must map names to strings")
    entries = [_entry(name, value, where, broken) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_places(entries, size - 8 - length, where)
    return entries, metadata, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{_short(name)} is there twice")
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _entry(name: str, value: Any, where: str, broken: str) -> Entry:
    tensor = f"{where}: tensor {name!r}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointCorruptError(
            f"{broken}: tensor {name!r} must have dtype, shape and data_offsets, and nothing else"
        )
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in _ITEMSIZE:
        if code in _FOREIGN:
            raise CheckpointError(f"{tensor} has type {code}, which NumPy has not")
        raise CheckpointCorruptError(f"{tensor} has type {_short(code)}, which is none")
    if not _counts(shape) or len(shape) > _MOST_DIMENSIONS:
        raise CheckpointCorruptError(
            f"{tensor}: its shape must be a list of at most {_MOST_DIMENSIONS} integers from 0 on, "
            f"got {_short(shape)}"
        )
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointCorruptError(
            f"{tensor}: data_offsets must be two integers from 0 on, the first not the greater, "
            f"got {_short(offsets)}"
        )
    begin, end = offsets
    needed = math.prod(shape) * _ITEMSIZE[code]
    if needed != end - begin:
        raise CheckpointCorruptError(
            f"{tensor}: shape {shape} of {_DTYPES[code]} takes {needed} bytes, and data_offsets "
            f"give it {end - begin}"
        )
    return Entry(name, code, tuple(shape), begin, end)


def _counts(value: Any) -> bool:
    """Whether `value` is a list of integers from 0 on (True and False are none)."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def _check_places(entries: Iterable[Entry], size: int, where: str) -> None:
    """Raise unless `entries`, sorted, fill `size` bytes, each byte once."""
    at, before = 0, "the header"
    for entry in entries:
        if entry.begin < at:
            raise CheckpointCorruptError(
                f"{where}: tensors {before} and {entry.name!r} overlap from byte {entry.begin} to "
                f"{min(at, entry.end)}"
            )
        if entry.begin > at:
            raise CheckpointCorruptError(
                f"{where}: {entry.begin - at} bytes between {before} and tensor {entry.name!r} "
                "belong to none"
            )
        at, before = entry.end, repr(entry.name)
    if at > size:
        raise CheckpointCorruptError(
            f"{where}: truncated: its tensors take {at} bytes, and {size} are there"
        )
    if at < size:
        raise CheckpointCorruptError(
            f"{where}: {size - at} bytes behind {before} belong to no tensor"
        )
