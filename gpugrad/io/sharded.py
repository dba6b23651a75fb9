"""Safetensors in several files, with an index of which tensor is in which."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gpugrad.io.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError

__all__ = ["find_shards", "load_shards"]

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def find_shards(path: Path) -> Path | None:
    """The index that `path` is, or that lies in the folder `path`; None for a single file.

    CheckpointError for a folder without a model in it.
    """
    if not path.is_dir():
        return path if path.name.endswith(".index.json") else None
    if (path / _WHOLE).is_file():
        return None
    if (path / _INDEX).is_file():
        return path / _INDEX
    raise CheckpointError(
        f"{path}: cannot be read: it is a folder with neither {_WHOLE} nor {_INDEX} in it"
    )


def load_shards(
    index: Path, names: Collection[str] | None, mmap: bool
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """As `load`, from the files that `index` lists. Metadata are those of the shards, together.

    Raises CheckpointNotFoundError for an index or shards that are not there, all of them listed,
    and CheckpointCorruptError when index and shards disagree on which tensors there are.
    """
    from gpugrad.io.checkpoint import read_file

    places = _read_index(index)
    if names is not None and (absent := sorted(set(names) - places.keys())):
        raise CheckpointError(f"{index}: has no tensors {', '.join(absent)}")
    wanted = {file for name, file in places.items() if names is None or name in names}
    if gone := sorted(file for file in wanted if not (index.parent / file).is_file()):
        raise CheckpointNotFoundError(
            f"{index}: shards are missing: {', '.join(gone)}; fetch them again"
        )
    found: dict[str, NDArray[Any]] = {}
    metadata: dict[str, str] = {}
    for file in sorted(wanted):
        tensors, more, there = read_file(index.parent / file, names, mmap)
        listed = {name for name, other in places.items() if other == file}
        if differing := sorted(there ^ listed):
            raise CheckpointCorruptError(
                f"{index}: index and shard {file} name different tensors: {', '.join(differing)}"
            )
        found |= tensors
        metadata |= more
    return {name: found[name] for name in places if name in found}, metadata


def _read_index(path: Path) -> dict[str, str]:
    """Which file each tensor is in: file names without a folder, so that none leads elsewhere."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path}: not an index of shards: {error}") from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointCorruptError(
            f"{path}: not an index of shards: it has no weight_map from tensors to files"
        )
    for file in places.values():
        if file != os.path.basename(file) or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointCorruptError(
                f"{path}: {file!r} is not the name of a .safetensors file beside it"
            )
    return places
