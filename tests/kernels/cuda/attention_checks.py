"""What the kernels of attention must compute, whatever runs them: see checks.py."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.core.primitive import registry
from gpugrad.kernels.cuda import attention_launch as family
from gpugrad.kernels.cuda import launch, tiles
from gpugrad.ops import attention as operations
from tests.kernels.cuda.checks import ARITHMETIC, DTYPES, EPS, same, wide
from tests.kernels.cuda.coroutines import QuickGpu
from tests.kernels.cuda.ptx_machine import PtxGpu

numpy = backend_for_device("cpu")
STREAM = {"seed": 0x9E3779B97F4A7C15, "offset": (1 << 33) + 5}


def flat(x):
    """The memory that an array with strides lies in, from its first element to its last."""
    if not isinstance(x, np.ndarray) or x.flags.c_contiguous:
        return x
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.strides)) // x.itemsize
    return np.lib.stride_tricks.as_strided(x, (extent,), (x.itemsize,))


class Quick(QuickGpu):
    """With registers in an array, and operands with strides."""

    def __init__(self):
        super().__init__()
        # What is not written shows.
        self.target.cuda.local = SimpleNamespace(array=lambda n, dtype: [dtype(np.nan)] * n)

    def run(self, entry, blocks, *args):
        super().run(entry, blocks, *map(flat, args))


@contextmanager
def quick(packs):
    """Kernels in Python, in blocks of a warp, with so many packs of features staged at a time."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("CHUNK", 4), ("PANEL", 256), ("WEIGHTS", 512)):
            patch.setattr(tiles, name, packs * size)
        machine = Quick()
        patch.setitem(launch.STAND_INS, np.ndarray, machine)
        yield machine


class Ptx(PtxGpu):
    """With operands with strides."""

    def run(self, entry, blocks, *args):
        super().run(entry, blocks, *map(flat, args))


def random(storage, shape, seed):
    drawn = np.random.default_rng(seed).standard_normal(shape)
    return drawn.astype(DTYPES[storage])


def near(got, want, storage, terms):
    """After sums of so many products of three numbers of about size 1."""
    got, want = wide(got), wide(want)
    assert got.shape == want.shape
    size = np.abs(want).max(initial=1.0)
    slack = (4 * EPS[storage] + 8 * ARITHMETIC[storage] * terms) * size
    bad = ~(np.abs(got - want) <= slack)
    assert not bad.any(), f"got {got[bad][:5]}, wanted {want[bad][:5]}"


def truth(name, *args, **parameters):
    """What the generic text makes of operands in double precision."""
    given = [wide(x) if isinstance(x, np.ndarray) and x.dtype != bool else x for x in args]
    function = getattr(operations, f"{name}_backward", None) if "g" in parameters else None
    with gg.use_kernels("off"), np.errstate(all="ignore"):
        if function is None:
            return registry[name].forward(numpy, *given, **parameters)
        return function(numpy, wide(parameters.pop("g")), *given, **parameters)


def compare(storage, put, get, q, k, v, mask, g, terms, needs=(True, True, True), **options):
    """Forward and backward against the generic text."""
    put_mask = None if mask is None else put(mask)
    arrays = [put(x) for x in (q, k, v)]
    y, lse = family.KERNELS["attention"].run(numpy, *arrays, put_mask, **options)
    want_y, want_lse = truth("attention", q, k, v, mask, **options)
    assert get(y).dtype == DTYPES[storage]
    near(get(y), want_y, storage, terms)
    blind = np.isinf(want_lse)
    assert np.array_equal(get(lse)[blind], want_lse[blind])
    number = "float64" if storage == "float64" else "float32"
    assert get(lse).dtype == number
    near(get(lse)[~blind], want_lse[~blind], number, terms)
    found = family.KERNELS["attention_backward"].run(
        numpy, put(g), *arrays, put_mask, y, lse, (*needs, False), **options
    )
    want = truth("attention", q, k, v, mask, want_y, want_lse, (*needs, False), g=g, **options)
    assert found[3] is None
    for mine, theirs, need in zip(found, want, needs):
        assert (mine is None) == (not need)
        if need:
            assert get(mine).dtype == DTYPES[storage]
            near(get(mine), theirs, storage, terms)


def check(
    storage, put=same, get=same, batch=(), queries=10, keys=9, features=5, out=3, masked="",
    **options,
):  # fmt: skip
    """One set of operands."""
    q, k, v, g = (
        random(storage, (*batch, *size), seed)
        for seed, size in enumerate(
            [(queries, features), (keys, features), (keys, out), (queries, out)]
        )
    )
    mask = None
    if masked:
        drawn = np.random.default_rng(9).random((*batch, queries, keys))
        seen = drawn < 0.6
        if queries > 1:
            seen[..., 1, :] = False  # a query that sees nothing
        mask = seen
        if masked == "added":
            mask = np.where(seen, drawn, -np.inf).astype("float32")
        elif masked == "keys":
            mask = seen[..., :1, :]
        elif masked == "queries":
            mask = seen[..., :, :1]
    terms = max(queries, keys, features, out)
    compare(storage, put, get, q, k, v, mask, g, terms, **options)


def check_packed(storage, put=same, get=same, shape=(2, 9, 24), heads=2, masked=False, **options):
    """Heads side by side, by one array and into one."""
    qkv, g = random(storage, shape, 0), random(storage, (*shape[:-1], shape[-1] // 3), 1)
    mask = np.tri(shape[-2], k=1, dtype=bool) if masked else None
    put_mask = None if mask is None else put(mask)
    y, lse = family.KERNELS["packed_attention"].run(numpy, put(qkv), put_mask, heads, **options)
    want_y, want_lse = truth("packed_attention", qkv, mask, heads, **options)
    near(get(y), want_y, storage, max(shape))
    gqkv, _ = family.KERNELS["packed_attention_backward"].run(
        numpy, put(g), put(qkv), put_mask, y, lse, heads, (True, False), **options
    )
    want, _ = truth(
        "packed_attention", qkv, mask, want_y, want_lse, heads, (True, False), g=g, **options
    )
    assert get(gqkv).dtype == DTYPES[storage]
    near(get(gqkv), want, storage, max(shape))


def check_special(put=same, get=same):
    """NaN and infinity stay in the rows that they belong to."""
    q, k, v = (random("float32", (6, 4), seed) for seed in range(3))
    q[2], q[4, 1] = np.nan, np.inf
    y, lse = family.KERNELS["attention"].run(numpy, *map(put, (q, k, v)))
    bad = [False, False, True, False, True, False]
    assert np.isnan(get(y)).all(1).tolist() == np.isnan(get(y)).any(1).tolist() == bad
    assert np.isnan(get(lse)).tolist() == bad
