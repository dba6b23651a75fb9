"""Indices that come from data: are they where they may be?"""

from __future__ import annotations

from gpugrad.backend.base import Array, Backend
from gpugrad.errors import DTypeError, OutOfRangeError


def check_rows(operation: str, m: Backend, indices: Array, rows: int) -> None:
    """Raise unless ``indices`` are whole numbers from 0 to ``rows`` - 1.

    Their values are looked at on the CPU only, where looking costs no waiting.

    Raises
    ------
    DTypeError
        ``indices`` are no integers.
    OutOfRangeError
        One is outside: the first, with its place.

    >>> import numpy as np
    >>> from gpugrad.backend import backend_for_device
    >>> check_rows("embedding", backend_for_device("cpu"), np.array([[0, 2], [4, 1]]), 4)
    Traceback (most recent call last):
    gpugrad.errors.OutOfRangeError: embedding: index 4 at [1, 0] is none of the 4 rows; they are ...
    """
    dtype = m.numpy_dtype(indices)
    if dtype.kind not in "iu":
        raise DTypeError(f"{operation}: indices are integers, not {dtype}; convert them with .to()")
    if m.prefix != "cpu" or not indices.size:
        return
    if indices.min() >= 0 and indices.max() < rows:
        return
    flat = indices.reshape(-1)
    first = int(((flat < 0) | (flat >= rows)).argmax())
    place = []
    for n in reversed(indices.shape):
        first, at = divmod(first, n)
        place.append(at)
    place.reverse()
    raise OutOfRangeError(
        f"{operation}: index {int(indices[tuple(place)])} at {place} is none of the {rows} rows; "
        f"they are 0 to {rows - 1}, and negative indices do not count from the end"
    )
