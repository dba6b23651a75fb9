"""Files that are replaced whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["replace_file", "sync_folder"]


def replace_file(path: Path, chunks: Iterable[Any]) -> None:
    """Put `chunks`, one after the other, at `path`: at every moment the old file or the new one.

    The content is on the disk when this returns; :func:`sync_folder` makes the name so too. Only a
    killed process leaves its temporary file, `.gpugrad-*.tmp` in the same folder, behind.

    Raises OSError, and whatever `chunks` raise; the old file is untouched then.
    """
    # In the same folder, since renaming is atomic only within one file system.
    temporary = path.with_name(f".gpugrad-{secrets.token_hex(8)}.tmp")
    try:
        # Unbuffered: closing after a failure must not try to write once more.
        with open(temporary, "xb", buffering=0) as file:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sync_folder(folder: Path) -> None:
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
