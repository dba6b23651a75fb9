"""What the elements of arrays amount to, counted on their device: nothing here is read."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible

__all__ = [
    "COUNT",
    "GREATEST",
    "LEAST",
    "MOMENTS",
    "NONFINITE",
    "OUTSIDE",
    "SQUARES",
    "SUM",
    "ZEROS",
    "dead_units",
    "moments",
]

#: What is counted of a part of an array, one float64 each: how many elements there are; the sum of
#: the finite ones and of their squares, their least and their greatest (+∞ and -∞ if there are
#: none); how many are NaN or infinite; how many are 0; and how many lie outside an open interval.
COUNT, SUM, SQUARES, LEAST, GREATEST, NONFINITE, ZEROS, OUTSIDE = range(8)

#: How many numbers these are.
MOMENTS = 8


@fusible
def moments(
    m: Backend,
    x: Array,
    /,
    *,
    bounds: NDArray[np.int64] | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> Array:
    """What the elements of parts of an array amount to.

    Sums neither overflow nor vanish for elements narrower than float64.

    Parameters
    ----------
    x:
        Real numbers, floating-point, of any shape.
    bounds:
        First and last element of each part, in row-major order, the last one not in it: an array
        [parts, 2] in host memory. By default everything is one part.
    low, high:
        Elements at or below the one, or at or above the other, count as outside; numbers that the
        dtype of `x` has.

    Returns
    -------
    An array of float64, [parts, 8], on the device of `x`; the columns are those of :data:`COUNT`
    and what follows it.

    >>> import numpy as np
    >>> from gpugrad.backend import backend_for_device
    >>> x = np.array([3.0, -4.0, 0.0, np.nan, 1.0])
    >>> both = moments(backend_for_device("cpu"), x, bounds=np.array([[0, 2], [2, 5]]))
    >>> both[:, [COUNT, SQUARES, GREATEST, NONFINITE, ZEROS]].tolist()
    [[2.0, 25.0, 3.0, 0.0, 0.0], [3.0, 1.0, 1.0, 1.0, 1.0]]
    """
    flat = m.reshape(x, (-1,))
    if bounds is None:
        return m.expand_dims(_one(m, flat, low, high), axis=0)
    rows = [_one(m, m.getitem(flat, slice(int(a), int(b))), low, high) for a, b in bounds]
    return m.stack(rows) if rows else m.zeros((0, MOMENTS), dtype=m.dtype("float64"))


def _one(m: Backend, x: Array, low: float, high: float) -> Array:
    wide = m.dtype("float64")
    if not math.prod(x.shape):
        return m.asarray(_EMPTY, device=m.device(x))
    x = m.astype(x, wide)
    finite = m.isfinite(x)
    kept = m.where(finite, x, 0.0)
    bad = m.sum(m.astype(~finite, wide))
    return m.stack(
        [
            m.sum(m.astype(finite, wide)) + bad,
            m.sum(kept),
            m.vecdot(kept, kept),
            m.min(m.where(finite, x, math.inf)),
            m.max(m.where(finite, x, -math.inf)),
            bad,
            m.sum(m.astype(x == 0.0, wide)),
            m.sum(m.astype((x <= low) | (x >= high), wide)),
        ]
    )


_EMPTY = np.array([0.0, 0.0, 0.0, math.inf, -math.inf, 0.0, 0.0, 0.0])


def dead_units(m: Backend, x: Array, /, *, axis: int) -> Array:
    """How many units, the elements of an axis, are 0 in all examples; float64 of shape (1,).

    >>> import numpy as np
    >>> from gpugrad.backend import backend_for_device
    >>> dead_units(backend_for_device("cpu"), np.array([[0.0, 1.0], [0.0, 0.0]]), axis=1)
    array([1.])
    """
    axis %= len(x.shape)
    others = tuple(i for i in range(len(x.shape)) if i != axis)
    alive = m.any(x != 0, axis=others)
    return m.reshape(m.sum(m.astype(~alive, m.dtype("float64"))), (1,))
