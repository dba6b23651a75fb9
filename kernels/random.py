"""Random words in compiled loops: the text of `gpugrad/backend/random.py`, for every target."""

from __future__ import annotations

from gpugrad.backend import random
from gpugrad.backend.random import ROUNDS
from gpugrad.kernels.template import device

__all__ = ["philox_block"]

philox_round = device(random.philox_round)


@device
def philox_block(number, o0, o1, s0, s1):
    """The four words of block `number` of the stream with the offset (o0, o1) and seed (s0, s1).

    All words are int64.
    """
    c0, c1, c2, c3, k0, k1 = number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF, o0, o1, s0, s1
    for _ in range(ROUNDS):
        c0, c1, c2, c3, k0, k1 = philox_round(c0, c1, c2, c3, k0, k1)
    return c0, c1, c2, c3
