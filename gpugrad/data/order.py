"""Random orders and indices from a counter: the same on every machine, whatever its libraries.

Only the raw words of Philox (Salmon et al., 2011) are used, which NumPy never changes, where its
`permutation` may differ from one version to the next.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["permutation", "uniform"]


def permutation(n: int, seed: int, offset: int) -> NDArray[np.int64]:
    """The numbers 0 to n - 1 in the random order of the draw (`seed`, `offset`).

    >>> permutation(5, seed=0, offset=0)
    array([0, 2, 1, 4, 3])
    """
    # Equal words, of 64 bits, keep their order.
    return np.argsort(_words(n, seed, offset), kind="stable")


def uniform(n: int, seed: int, offset: int) -> NDArray[np.float64]:
    """n numbers from the half-open interval [0, 1), of 53 bits each."""
    top: NDArray[np.float64] = (_words(n, seed, offset) >> np.uint64(11)).astype(np.float64)
    return top * 2.0**-53


def _words(n: int, seed: int, offset: int) -> NDArray[np.uint64]:
    # The offset is in the third of the counter's four words: draws never overlap.
    return np.random.Philox(key=seed, counter=offset << 128).random_raw(n)
