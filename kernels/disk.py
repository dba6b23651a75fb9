"""Where compiled kernels are kept on disk, and how: whole files or none, checked when read."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["cache_folder", "read_text", "write_text"]


def cache_folder() -> Path:
    """Where compiled kernels are kept: `GPUGRAD_CACHE_DIR`, or `gpugrad` in the user's cache."""
    own = os.environ.get("GPUGRAD_CACHE_DIR")
    if own:
        return Path(own)
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gpugrad"


def read_text(path: Path) -> str | None:
    """What :func:`write_text` wrote; None if it is not there, or not as it was written."""
    try:
        checksum, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return text if checksum == _checksum(text) else None


def write_text(path: Path, text: str) -> None:
    """Write a text with its checksum. Others see all of it or nothing.

    A cache that cannot be written (a full disk, a read-only home) costs time, not the result.
    """
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(f"{_checksum(text)}\n{text}")
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
