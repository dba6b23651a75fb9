"""Random numbers that depend on a seed and a counter, and on nothing else."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpugrad.core.trace import Trace, active, instead, noticing, refuse
from gpugrad.errors import ParameterError

__all__ = ["Generator", "default_generator", "manual_seed"]


class Generator:
    """A stream of random arrays whose whole state is two integers.

    The numbers come from Philox, a block cipher run over a counter (Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3", 2011): draw number `draws` of seed `seed` is always the same, on
    every backend. :meth:`uniform` and :meth:`normal` make them in float64 on the host, and whoever
    asks moves them to a device. :meth:`stream` only names a draw: dropout makes its numbers where
    they are used.

    >>> generator = Generator(0)
    >>> state = generator.state
    >>> first = generator.normal((2,))
    >>> generator.state = state
    >>> bool((generator.normal((2,)) == first).all())
    True
    """

    def __init__(self, seed: int = 0) -> None:
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> Generator:
        """Start the stream of `seed`, an integer from 0 to 2**128 - 1, from its beginning."""
        if active():
            refuse(
                "seeds a generator of random numbers",
                "seed it outside; a program draws new numbers in each call",
            )
        seed = operator.index(seed)
        if not 0 <= seed < 1 << 128:
            raise ParameterError(f"a seed is an integer from 0 to 2**128 - 1, got {seed}")
        self.seed = seed
        self.draws = 0
        return self

    @property
    def state(self) -> tuple[int, int]:
        """Seed and number of arrays drawn; setting it goes back, or on, to that point."""
        return self.seed, self.draws

    @state.setter
    def state(self, value: tuple[int, int]) -> None:
        seed, draws = value
        self.manual_seed(seed)
        self.draws = operator.index(draws)

    def uniform(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Numbers from the half-open interval [0, 1)."""
        return self._next().random(shape)

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Numbers from the standard normal distribution."""
        return self._next().standard_normal(shape)

    def stream(self) -> tuple[int, int]:
        """Two numbers of 64 bits that stand for one draw: the `seed` and `offset` of an operation.

        The seed is the generator's own, folded in half if it is longer.

        >>> generator = Generator(7)
        >>> generator.stream(), generator.stream()
        ((7, 0), (7, 1))
        """
        offset = self.draws
        self.draws += 1
        return (self.seed ^ self.seed >> 64) & (1 << 64) - 1, offset

    def _next(self) -> np.random.Generator:
        # Draws differ in the upper half of the 256-bit counter: no two can overlap.
        bits = np.random.Philox(key=self.seed, counter=self.draws << 128)
        self.draws += 1
        return np.random.Generator(bits)

    def __repr__(self) -> str:
        return f"Generator(seed={self.seed}, draws={self.draws})"


#: Where initialisers and dropout draw from unless they are given a generator of their own.
default_generator = Generator(int(np.random.SeedSequence().entropy))  # type: ignore[arg-type]


def manual_seed(seed: int) -> Generator:
    """Seed the default generator, from which parameters are initialised and dropout is drawn.

    Unseeded, every process starts somewhere else.

    >>> import gpugrad.nn as nn
    >>> _ = manual_seed(0)
    >>> a = nn.Linear(2, 1).weight.detach().numpy()
    >>> _ = manual_seed(0)
    >>> b = nn.Linear(2, 1).weight.detach().numpy()
    >>> bool((a == b).all())
    True
    """
    return default_generator.manual_seed(seed)


@contextmanager
def _noticed(trace: Trace) -> Iterator[None]:
    """Tell a trace of the draws that generators name, for the length of it."""

    def stream(plain: Any, generator: Generator) -> Any:
        pair = plain(generator)
        if active():
            trace.draw(generator, pair)
        return pair

    with instead(Generator, "stream", stream):
        yield


noticing.append(_noticed)


def draws_from(generator: Any) -> Generator:
    """`generator`, or the default one in place of None."""
    if generator is None:
        return default_generator
    if not isinstance(generator, Generator):
        raise ParameterError(
            f"generator: a gpugrad.nn.Generator or None, not {type(generator).__name__}"
        )
    return generator
