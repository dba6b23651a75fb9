"""Checkpoints: named arrays in a safetensors file that is replaced whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpugrad.core.tensor import Tensor
from gpugrad.io.atomic import replace_file, sync_folder
from gpugrad.io.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWriteError,
)
from gpugrad.io.safetensors import Entry, Metadata, code_of, make_header, read_header

__all__ = ["load", "read_metadata", "save"]

Tensors = dict[str, NDArray[Any]]

# What `save` adds to the metadata. The digest over the metadata covers the digests of the tensors,
# and so the whole file. It keeps its meaning in every future format, so that a damaged version
# number is never mistaken for a newer file.
_RESERVED = "gpugrad."
_FORMAT_KEY = "gpugrad.format"
_TENSORS_KEY = "gpugrad.tensors.sha256"
_METADATA_KEY = "gpugrad.metadata.sha256"
_FORMAT = "1"

#: Bytes from which threads are worth their while.
_MANY = 1 << 23


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors` and `metadata` to a safetensors file at `path`, atomically and durably.

    The file appears under its name only when it is complete and on the disk. Whatever stops this
    before (a full disk, an interrupt, a crash), a previous checkpoint at `path` stays as it was.
    Only a killed process leaves its temporary file behind, `.gpugrad-*.tmp` in the same folder,
    which can be deleted. A symbolic link is written through. A checksum of every tensor, and one
    of all the metadata, these checksums among them, go into the file's metadata under names that
    begin with `gpugrad.`.

    Tensors are NumPy arrays, or tensors on any device, of any shape and layout, of type bool,
    int8 ... int64, uint8 ... uint64, float16, float32, float64, complex64 (which other programs
    read from safetensors 0.7 on) and, from ml_dtypes, bfloat16, float8_e4m3fn and float8_e5m2.
    They are stored little-endian.

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
    arrays = {name: _storable(name, tensor) for name, tensor in tensors.items()}
    complete = _checked_metadata(metadata or {})
    digests = _digests(arrays)
    complete |= {_FORMAT_KEY: _FORMAT, _TENSORS_KEY: json.dumps(digests)}
    try:
        complete[_METADATA_KEY] = _metadata_digest(complete)
        header, order = make_header(arrays, complete)
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{error.object!r} is not text that UTF-8 can encode") from error
    _replace(Path(os.path.realpath(path)), [header, *(_bytes(arrays[name]) for name in order)])


def load(
    path: str | os.PathLike[str],
    *,
    names: Collection[str] | None = None,
    mmap: bool = False,
) -> tuple[Tensors, Metadata]:
    """Read safetensors: the tensors, as writable NumPy arrays, and the metadata.

    `path` is a file; or an index of shards, `*.safetensors.index.json`, as Hugging Face writes it;
    or a folder with `model.safetensors` or `model.safetensors.index.json` in it.

    With `names`, only these tensors are read. With `mmap`, arrays are read-only views of the file,
    whose pages are read when they are used, and are not checked against their checksums.

    A file that `save` wrote is checked against its checksums, and its metadata comes back as it
    was given; files of other programs have no checksums and are checked for structure alone.
    Nothing is ever unpickled.

    Raises `CheckpointNotFoundError`; `CheckpointCorruptError`, naming the tensor where one is to
    blame; and `CheckpointError` when a name is not there, or the file is of a newer format or needs
    ml_dtypes (for bfloat16 and float8) while that is not installed.
    """
    from gpugrad.io.sharded import find_shards, load_shards

    if (index := find_shards(Path(path))) is not None:
        return load_shards(index, names, mmap)
    if os.path.isdir(path):
        path = Path(path, "model.safetensors")
    tensors, metadata, there = read_file(path, names, mmap)
    if names is not None and (absent := sorted(set(names) - there)):
        raise CheckpointError(f"checkpoint {path}: has no tensors {', '.join(absent)}")
    return tensors, metadata


# -- reading ---------------------------------------------------------------------------------------


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """The metadata of one file, checked against their checksum; its tensors are not read.

    Raises what :func:`load` raises.
    """
    with _opened(path) as (file, where):
        _, metadata, _ = read_header(file, os.fstat(file.fileno()).st_size, where)
        _checked_digests(metadata, where)
    return _public(metadata)


def read_file(
    path: str | os.PathLike[str], names: Collection[str] | None, mmap: bool
) -> tuple[Tensors, Metadata, set[str]]:
    """Those of `names` that one file has, its metadata, and the names of all its tensors."""
    with _opened(path) as (file, where):
        return _read(file, where, names, mmap)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, str]]:
    try:
        with open(path, "rb") as file:
            yield file, f"checkpoint {path}"
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"{path}: no such checkpoint") from None
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _read(
    file: BinaryIO, where: str, names: Collection[str] | None, mmap: bool
) -> tuple[Tensors, Metadata, set[str]]:
    entries, metadata, start = read_header(file, os.fstat(file.fileno()).st_size, where)
    digests = _checked_digests(metadata, where)
    there = {entry.name for entry in entries}
    if digests is None:
        wanted = sorted(there)
    else:
        wanted = list(digests)
        if differing := sorted(there ^ digests.keys()):
            raise CheckpointCorruptError(
                f"{where}: tensors and checksums name different tensors: {', '.join(differing)}"
            )
    if names is not None:
        wanted = [name for name in wanted if name in names]
    kept = set(wanted)
    chosen = {entry.name: entry for entry in entries if entry.name in kept}
    if mmap:
        found = _mapped(file, start, chosen, where)
    else:
        # In the order of the file.
        found = {name: _array(file, start, entry, where) for name, entry in chosen.items()}
    if digests is not None and not mmap:
        for name, digest in _digests(found).items():
            if digest != digests[name]:
                raise CheckpointCorruptError(
                    f"{where}: tensor {name!r} differs from its checksum; restore another copy"
                )
    return {name: found[name] for name in wanted}, _public(metadata), there


def _public(metadata: Metadata) -> Metadata:
    return {key: value for key, value in metadata.items() if not key.startswith(_RESERVED)}


def _array(file: BinaryIO, start: int, entry: Entry, where: str) -> NDArray[Any]:
    dtype = entry.dtype(where)
    raw = np.empty(entry.end - entry.begin, np.uint8)
    file.seek(start + entry.begin)
    got = file.readinto(raw.data) if raw.size else 0  # type: ignore[attr-defined]
    if got != raw.size:
        raise CheckpointCorruptError(f"{where}: tensor {entry.name!r}: the file became shorter")
    return raw.view(dtype).reshape(entry.shape)


def _mapped(file: BinaryIO, start: int, entries: Mapping[str, Entry], where: str) -> Tensors:
    raw = np.memmap(file, np.uint8, "r").view(np.ndarray)  # a plain array over the pages
    return {
        name: raw[start + entry.begin : start + entry.end]
        .view(entry.dtype(where))
        .reshape(entry.shape)
        for name, entry in entries.items()
    }


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


# -- writing ---------------------------------------------------------------------------------------


def _checked_metadata(metadata: Mapping[Any, Any]) -> Metadata:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CheckpointError(
                f"metadata {key!r}: safetensors stores strings only, got "
                f"{type(key).__name__} -> {type(value).__name__}; gpugrad.io.pack stores the rest"
            )
        if key.startswith(_RESERVED):
            raise CheckpointError(f"metadata {key!r}: names beginning {_RESERVED!r} are reserved")
    return dict(metadata)


def _storable(name: Any, tensor: Any) -> NDArray[Any]:
    """Return `tensor` as the file holds it: contiguous, little-endian, of a type it has."""
    if not isinstance(name, str) or name == "__metadata__":
        raise CheckpointError(f"{name!r} cannot be the name of a tensor; use another string")
    if isinstance(tensor, Tensor):
        tensor = tensor.detach().cpu().numpy()
    if not isinstance(tensor, np.ndarray):
        raise CheckpointError(
            f"tensor {name!r}: expected a NumPy array or a tensor, got {type(tensor).__name__}; "
            "bring it to the host first"
        )
    if code_of(tensor.dtype) is None:
        hint = "; store .real and .imag" if tensor.dtype.name == "complex128" else ""
        raise CheckpointError(
            f"tensor {name!r}: safetensors cannot hold {tensor.dtype}{hint or '; convert it'}"
        )
    # Not ascontiguousarray, which would give a 0-d array a dimension.
    return np.asarray(tensor, dtype=tensor.dtype.newbyteorder("<"), order="C")


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _digests(arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """The digest of each array; large ones are worked on by several threads."""
    if sum(array.nbytes for array in arrays.values()) < _MANY:
        return {name: _digest(array) for name, array in arrays.items()}
    with ThreadPoolExecutor() as pool:  # the hash lets other threads run
        return dict(zip(arrays, pool.map(_digest, arrays.values())))


def _digest(array: NDArray[Any]) -> str:
    # Type and shape too: one flipped byte in the header turns F32 into I32 of the same bytes.
    digest = hashlib.sha256(f"{array.dtype.name}{list(array.shape)}\n".encode())
    digest.update(_bytes(array))
    return digest.hexdigest()


def _metadata_digest(metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _replace(path: Path, chunks: list[Any]) -> None:
    """Put `chunks` at `path`; CheckpointWriteError says what became of the file that was there."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointWriteError(f"{path}: is not a regular file; choose another name")
    if not os.path.isdir(path.parent):
        raise CheckpointWriteError(f"{path}: there is no folder {path.parent}; create it first")
    try:
        replace_file(path, chunks)
    except OSError as error:
        previous = os.path.exists(path)
        fate = "the previous checkpoint is intact" if previous else "there was none before"
        size = sum(memoryview(chunk).nbytes for chunk in chunks)
        raise _write_error(
            f"checkpoint {path} could not be written ({size} bytes): "
            f"{error.strerror or error}; {fate}",
            error,
        ) from error
    try:
        sync_folder(path.parent)
    except OSError as error:
        raise _write_error(
            f"checkpoint {path} is written, but may not survive a power failure: "
            f"{error.strerror or error}",
            error,
        ) from error


def _write_error(message: str, cause: OSError) -> CheckpointWriteError:
    error = CheckpointWriteError(message)
    error.errno = cause.errno
    return error
