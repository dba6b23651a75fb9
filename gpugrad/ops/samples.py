"""Small deterministic arrays that operations are tried on."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

Shape: TypeAlias = int | tuple[int, ...]
Float64: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


def normal(shape: Shape, seed: int = 0) -> Float64:
    """Normal deviates.

    >>> normal((2, 3)).shape
    (2, 3)
    """
    return np.asarray(np.random.default_rng(seed).standard_normal(shape))


def uniform(shape: Shape, lo: float = 0.0, hi: float = 1.0, seed: int = 0) -> Float64:
    """Numbers between ``lo`` and ``hi``, at a distance of a hundredth of the range from both.

    The distance keeps finite differences inside an interval on which an operation is defined.

    >>> bool((abs(uniform(50, -1.0, 1.0)) < 1).all())
    True
    """
    edge = 0.01 * (hi - lo)
    return np.asarray(np.random.default_rng(seed).uniform(lo + edge, hi - edge, shape))


def positive(shape: Shape, seed: int = 0) -> Float64:
    """Numbers between 0.5 and 3, away from every pole at zero.

    >>> bool((positive(50) > 0.5).all())
    True
    """
    return uniform(shape, 0.5, 3.0, seed)


def distinct(shape: Shape, seed: int = 0) -> Float64:
    """Numbers of both signs without ties: half a unit apart, none at zero, no two opposite.

    >>> sorted(distinct(4).tolist())
    [-0.85, -0.35, 0.15, 0.65]
    """
    n = math.prod(shape) if isinstance(shape, tuple) else shape
    order = np.random.default_rng(seed).permutation(n)
    return np.asarray((order - n // 2 + 0.3) * 0.5).reshape(shape)
