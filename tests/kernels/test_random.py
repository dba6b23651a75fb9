"""Philox4x32-10: the authors' own numbers, the same words everywhere, and that they are random."""

import math

import numpy as np
import pytest

from gpugrad.backend import backend_for_device
from gpugrad.backend.random import ROUNDS, dropped, kept_scale, philox_round, stream, words
from gpugrad.errors import ParameterError
from gpugrad.kernels.cpu import dropout as family

NUMPY = backend_for_device("cpu")
ONES = 0xFFFFFFFF

#: Counter, key and block, from the file kat_vectors of the Random123 distribution.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def block(counter, key):
    """A block by the text that arrays and loops are made of."""
    state = (*counter, *key)
    for _ in range(ROUNDS):
        state = philox_round(*state)
    return state[:4]


def compiled(start, seed, offset, count):
    out = np.empty(count, np.uint32)
    family._draw["float32"](out, start, stream(seed, offset))
    return out


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_known_answers(counter, key, want):
    assert block(counter, key) == want
    arrays = block([np.full(3, c) for c in counter], [np.full(3, k) for k in key])
    assert [set(a.tolist()) for a in arrays] == [{w} for w in want]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_known_answers_of_the_compiled_loop(counter, key, want):
    low, high, o0, o1 = counter
    start = int(np.array([low | high << 32], np.uint64).view(np.int64)[0])
    out = compiled(start, key[0] | key[1] << 32, o0 | o1 << 32, 4)
    assert tuple(out.tolist()) == want


def test_the_words_of_a_stream_are_blocks_in_order():
    seed, offset = 0x0123456789ABCDEF, 0xFEDCBA9876543210
    want = [w for b in range(3) for w in block((b, 0, *stream(0, offset)[:2]), stream(seed, 0)[2:])]
    assert words(NUMPY, 12, seed, offset).tolist() == want
    assert compiled(0, seed, offset, 12).tolist() == want


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 1001])
def test_a_word_depends_on_its_place_alone(count):
    longest = words(NUMPY, 1004, 11, 5)
    found = words(NUMPY, count, 11, 5)
    assert found.dtype == np.int64 and found.shape == (count,)
    assert np.array_equal(found, longest[:count])
    assert np.array_equal(compiled(100, 11, 5, 400), longest[400:800])


def test_another_library_makes_the_same_words():
    pytest.importorskip("array_api_strict")
    space = backend_for_device("strict:device1")
    found = words(space, 37, 1 << 63, 3, "strict:device1")
    assert space.device(found) == "strict:device1"
    assert np.array_equal(space.to_host(found), words(NUMPY, 37, 1 << 63, 3))


def test_blocks_beyond_32_bits():
    at = (1 << 40) + 7
    assert compiled(at, 5, 6, 4).tolist() == list(block((7, 1 << 8, 6, 0), (5, 0)))


# -- are they random? -----------------------------------------------------------------------------

STREAMS = [(0, 0), (0, 1), (1, 0), (1 << 63, 1 << 40), (2**64 - 1, 2**64 - 1)]


@pytest.mark.parametrize(("seed", "offset"), STREAMS)
def test_every_bit_is_set_half_of_the_time(seed, offset):
    n = 1 << 16
    found = words(NUMPY, n, seed, offset)
    shares = np.array([np.mean(found >> bit & 1) for bit in range(32)])
    # 160 means of n tosses in all: 4.5 standard deviations are met once in a thousand sets.
    assert np.all(np.abs(shares - 0.5) < 4.5 * 0.5 / math.sqrt(n))


@pytest.mark.parametrize(("seed", "offset"), STREAMS)
def test_words_are_spread_evenly(seed, offset):
    n, bins = 1 << 16, 256
    for part in (words(NUMPY, n, seed, offset) >> 24, words(NUMPY, n, seed, offset) & 255):
        counts = np.bincount(part, minlength=bins)
        chi_squared = float(np.sum((counts - n / bins) ** 2) / (n / bins))
        assert abs(chi_squared - (bins - 1)) < 4.5 * math.sqrt(2 * (bins - 1))


def correlation(a, b):
    return abs(np.corrcoef(a, b)[0, 1]) * math.sqrt(len(a))


def test_streams_and_neighbours_are_not_correlated():
    n = 1 << 16
    found = [words(NUMPY, n, *pair) for pair in (*STREAMS, (0, 2), (2, 0))]
    for i, a in enumerate(found):
        for lag in (1, 2, 3, 4, 64, 1024):
            assert correlation(a[:-lag], a[lag:]) < 4.5
        for b in found[:i]:
            assert correlation(a, b) < 4.5


# -- what they are used for -----------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(("seed", "offset"), STREAMS)
def test_as_many_are_dropped_as_should_be(p, seed, offset):
    n = 1 << 16
    count = int(np.sum(words(NUMPY, n, seed, offset) < dropped(p)))
    assert abs(count - n * p) < 4.5 * math.sqrt(n * p * (1 - p))


def test_the_share_is_exact_at_both_ends():
    assert dropped(0.0) == 0
    assert dropped(1.0) == 1 << 32
    assert dropped(2.0**-32) == 1
    assert kept_scale(0.0) == 1.0
    for p in (-0.1, 1.0000001, math.nan):
        with pytest.raises(ParameterError, match="probability from 0 to 1"):
            dropped(p)


@pytest.mark.parametrize("bad", [-1, 1 << 64])
def test_streams_are_named_by_64_bits(bad):
    with pytest.raises(ParameterError, match="seed is an integer from 0 to"):
        stream(bad, 0)
    with pytest.raises(ParameterError, match="offset is an integer from 0 to"):
        stream(0, bad)
