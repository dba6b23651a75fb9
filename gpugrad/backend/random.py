"""Random bits that are a function of a seed, an offset and a place, and of nothing else.

The function is Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3" (2011), a block cipher run over a counter. So the same numbers come out on every backend,
whatever the order they are made in, and can be made again in place of being kept.

*Word* i of the stream (seed, offset), 32 bits, is word i % 4 of the block with the counter
(i // 4, offset) and the key `seed`, each of 64 bits, low half first.
"""

from __future__ import annotations

from typing import Any

from gpugrad.backend.base import Array, Backend
from gpugrad.errors import ParameterError

#: Rounds of a block. Seven pass every known test; ten are the authors' recommendation.
ROUNDS = 10


def philox_round(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Counter and key after one more round, from those before it.

    Words are the low halves of 64-bit integers, signed ones included: products may wrap. The text
    is that of arrays, of Python integers and of every compiled loop.
    """
    a = c0 * 0xD2511F53
    b = c2 * 0xCD9E8D57
    return (
        (b >> 32 & 0xFFFFFFFF) ^ c1 ^ k0,
        b & 0xFFFFFFFF,
        (a >> 32 & 0xFFFFFFFF) ^ c3 ^ k1,
        a & 0xFFFFFFFF,
        k0 + 0x9E3779B9 & 0xFFFFFFFF,
        k1 + 0xBB67AE85 & 0xFFFFFFFF,
    )


def check_probability(p: float) -> None:
    """Raise ParameterError unless ``p``, the share that a dropout drops, is from 0 to 1."""
    if not 0 <= p <= 1:
        raise ParameterError(f"dropout: p is a probability from 0 to 1, got {p}")


def dropped(p: float) -> int:
    """Of 2**32 words, how many stand for an element that is dropped: those below this number.

    >>> dropped(0.25) == 1 << 30, dropped(1.0) == 1 << 32
    (True, True)
    """
    check_probability(p)
    return round(p * (1 << 32))


def kept_scale(p: float) -> float:
    """What an element that is kept is multiplied with; 1 where none is.

    >>> kept_scale(0.75), kept_scale(1.0)
    (4.0, 1.0)
    """
    return 1 / (1 - p) if p < 1 else 1.0


def stream(seed: int, offset: int) -> tuple[int, int, int, int]:
    """The words that set a stream apart: two of the counter, two of the key.

    >>> stream(5, (7 << 32) + 6)
    (6, 7, 5, 0)
    """
    for name, value in (("seed", seed), ("offset", offset)):
        if not 0 <= value < 1 << 64:
            raise ParameterError(f"{name} is an integer from 0 to 2**64 - 1, got {value}")
    return offset & 0xFFFFFFFF, offset >> 32, seed & 0xFFFFFFFF, seed >> 32


def words(m: Backend, count: int, seed: int, offset: int, device: str | None = None) -> Array:
    """The first ``count`` words of a stream: int64, shape (count,), from 0 to 2**32 - 1.

    >>> from gpugrad.backend import backend_for_device
    >>> [f"{int(word):08x}" for word in words(backend_for_device("cpu"), 4, 0, 0)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    block = m.create("arange", -(-count // 4), dtype="int64", device=device)
    state = (block & 0xFFFFFFFF, block >> 32, *stream(seed, offset))
    for _ in range(ROUNDS):
        state = philox_round(*state)
    return m.reshape(m.stack(state[:4], axis=1), (-1,))[:count]
