"""Checkpoints: named arrays in a safetensors file that is replaced whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpugrad.io.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWriteError,
)

__all__ = ["load", "save"]

Tensors = dict[str, NDArray[Any]]
Metadata = dict[str, str]

# What `save` adds to the metadata. The digest over the metadata keeps its meaning in every future
# format, so that a damaged version number is never mistaken for a newer file.
_RESERVED = "gpugrad."
_FORMAT_KEY = "gpugrad.format"
_TENSORS_KEY = "gpugrad.tensors.sha256"
_METADATA_KEY = "gpugrad.metadata.sha256"
_FORMAT = "1"

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
}
_ML_DTYPES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_SUPPORTED = frozenset((*_DTYPES.values(), *_ML_DTYPES.values()))


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors` and `metadata` to a safetensors file at `path`, atomically and durably.

    The file appears under its name only when it is complete and on the disk. Whatever stops this
    before (a full disk, an interrupt, a crash), a previous checkpoint at `path` stays as it was.
    Only a killed process leaves its temporary file behind, `.gpugrad-*.tmp` in the same folder,
    which can be deleted. A symbolic link is written through. Checksums of the tensors and of the
    metadata go into the file's metadata, under names that begin with `gpugrad.`.

    Tensors are NumPy arrays of any shape and layout, of type bool, int8 ... int64, uint8 ...
    uint64, float16, float32, float64, complex64 (since safetensors 0.7) and, from ml_dtypes,
    bfloat16, float8_e4m3fn and float8_e5m2. They are stored little-endian. The whole file is built
    in memory first.

    Raises `CheckpointWriteError` when the file cannot be written, and `CheckpointError`, before
    anything is touched, for tensors or metadata that safetensors cannot hold.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "model.safetensors")
    ...     save(path, {"weight": np.ones((2, 3), np.float32)}, {"epoch": "7"})
    ...     load(path)
    ({'weight': array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)}, {'epoch': '7'})
    """
    _replace(Path(os.path.realpath(path)), _encode(tensors, metadata or {}))


def load(path: str | os.PathLike[str]) -> tuple[Tensors, Metadata]:
    """Read a safetensors file: its tensors, as writable NumPy arrays, and its metadata.

    A file that `save` wrote is checked against its checksums, and its metadata comes back as it
    was given; files of other programs have no checksums and are checked for structure alone.
    Nothing is ever unpickled.

    Raises `CheckpointNotFoundError`; `CheckpointCorruptError`, naming the tensor where one is to
    blame; and `CheckpointError` when the file is of a newer format or needs ml_dtypes (for
    bfloat16 and float8) while that is not installed.
    """
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return _decode(raw, f"checkpoint {path}")


def _encode(tensors: Mapping[Any, Any], metadata: Mapping[Any, Any]) -> bytes:
    import safetensors.numpy

    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CheckpointError(
                f"metadata {key!r}: safetensors stores strings only, got "
                f"{type(key).__name__} -> {type(value).__name__}; gpugrad.io.pack stores the rest"
            )
        if key.startswith(_RESERVED):
            raise CheckpointError(f"metadata {key!r}: names beginning {_RESERVED!r} are reserved")
    arrays = {name: _storable(name, tensor) for name, tensor in tensors.items()}
    digests = {name: _digest(array) for name, array in arrays.items()}
    complete = {**metadata, _FORMAT_KEY: _FORMAT, _TENSORS_KEY: json.dumps(digests)}
    try:
        complete[_METADATA_KEY] = _metadata_digest(complete)
        return safetensors.numpy.save(arrays, complete)
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{error.object!r} is not text that UTF-8 can encode") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"safetensors refuses these tensors: {error}") from error


def _decode(raw: bytes, where: str) -> tuple[Tensors, Metadata]:
    import safetensors

    try:
        entries = dict(safetensors.deserialize(raw))  # type: ignore[no-untyped-call]
        # `deserialize` has checked the header but returns no metadata.
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        metadata: Metadata = header.get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointCorruptError(f"{where}: not a whole safetensors file: {error}") from error
    digests = _checked_digests(metadata, where)
    if digests is None:
        names = sorted(entries)
    else:
        names = list(digests)
        if differing := sorted(entries.keys() ^ digests.keys()):
            raise CheckpointCorruptError(
                f"{where}: tensors and checksums name different tensors: {', '.join(differing)}"
            )
    tensors = {}
    for name in names:
        tensors[name] = _array(entries.pop(name), f"{where}: tensor {name!r}")
        if digests is not None and _digest(tensors[name]) != digests[name]:
            raise CheckpointCorruptError(
                f"{where}: tensor {name!r} differs from its checksum; restore another copy"
            )
    return tensors, {k: v for k, v in metadata.items() if not k.startswith(_RESERVED)}


def _checked_digests(metadata: Metadata, where: str) -> dict[str, str] | None:
    """Check the metadata against their digest; None for a file of another program."""
    if not any(key.startswith(_RESERVED) for key in metadata):
        return None
    rest = {key: value for key, value in metadata.items() if key != _METADATA_KEY}
    if metadata.get(_METADATA_KEY) != _metadata_digest(rest):
        raise CheckpointCorruptError(f"{where}: metadata differ from their checksum")
    if metadata.get(_FORMAT_KEY) != _FORMAT:
        raise CheckpointError(
            f"{where}: is of format {metadata.get(_FORMAT_KEY)}, this version of gpugrad reads "
            f"format {_FORMAT}; upgrade gpugrad"
        )
    try:
        return dict(json.loads(metadata[_TENSORS_KEY]))
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointCorruptError(f"{where}: no list of checksums: {error}") from error


def _storable(name: Any, tensor: Any) -> NDArray[Any]:
    """Return `tensor` as safetensors wants it: contiguous, little-endian, of a type it has."""
    if not isinstance(name, str) or name == "__metadata__":
        raise CheckpointError(f"{name!r} cannot be the name of a tensor; use another string")
    if not isinstance(tensor, np.ndarray):
        raise CheckpointError(
            f"tensor {name!r}: expected a NumPy array, got {type(tensor).__name__}; "
            "bring it to the host first"
        )
    if tensor.dtype.name not in _SUPPORTED:
        hint = "; store .real and .imag" if tensor.dtype.name == "complex128" else ""
        raise CheckpointError(
            f"tensor {name!r}: safetensors cannot hold {tensor.dtype}{hint or '; convert it'}"
        )
    # Not ascontiguousarray, which would give a 0-d array a dimension.
    return np.asarray(tensor, dtype=tensor.dtype.newbyteorder("<"), order="C")


def _array(entry: Mapping[str, Any], where: str) -> NDArray[Any]:
    code = entry["dtype"]
    if code in _DTYPES:
        dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
    elif code in _ML_DTYPES:
        try:
            dtype = np.dtype(getattr(importlib.import_module("ml_dtypes"), _ML_DTYPES[code]))
        except ImportError:
            raise CheckpointError(
                f"{where} is {_ML_DTYPES[code]}, which NumPy has only with the package ml_dtypes; "
                "pip install ml_dtypes"
            ) from None
    else:
        raise CheckpointError(f"{where} has type {code}, which NumPy has not")
    values: NDArray[Any] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    return values


def _digest(array: NDArray[Any]) -> str:
    # Type and shape too: one flipped byte in the header turns F32 into I32 of the same bytes.
    digest = hashlib.sha256(f"{array.dtype.name}{list(array.shape)}\n".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _metadata_digest(metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Put `content` at `path`, so that at every moment the file there is the old or the new one."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointWriteError(f"{path}: is not a regular file; choose another name")
    if not os.path.isdir(path.parent):
        raise CheckpointWriteError(f"{path}: there is no folder {path.parent}; create it first")
    # In the same folder, since renaming is atomic only within one file system.
    temporary = path.with_name(f".gpugrad-{secrets.token_hex(8)}.tmp")
    try:
        # Unbuffered: closing after a failure must not try to write once more.
        with open(temporary, "xb", buffering=0) as file:
            view = memoryview(content)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        previous = os.path.exists(path)
        fate = "the previous checkpoint is intact" if previous else "there was none before"
        raise _write_error(
            f"checkpoint {path} could not be written ({len(content)} bytes): "
            f"{error.strerror or error}; {fate}",
            error,
        ) from error
    try:
        _sync_folder(path.parent)
    except OSError as error:
        raise _write_error(
            f"checkpoint {path} is written, but may not survive a power failure: "
            f"{error.strerror or error}",
            error,
        ) from error


def _sync_folder(folder: Path) -> None:
    """Bring a renaming within `folder` to the disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not know this; renaming is durable there by other means.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _write_error(message: str, cause: OSError) -> CheckpointWriteError:
    error = CheckpointWriteError(message)
    error.errno = cause.errno
    return error
