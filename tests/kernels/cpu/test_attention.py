"""Attention in compiled loops: the generic text's results, on any layout, dtype and threads."""

from typing import Any

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import attention as family
from gpugrad.kernels.cpu import scores
from gpugrad.ops.attention import attention, packed_attention
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.cpu.processes import python
from tests.kernels.parity import DTYPES, EPS, layouts, run, wide

QUERIES, KEYS = family.QUERIES, family.KEYS

#: Batch, queries, keys, features, features of a value.
SHAPES: list[Any] = [
    ((), 1, 1, 1, 1),
    ((), 5, 7, 3, 2),
    ((2, 3), QUERIES, KEYS, 16, 16),
    ((2, 3), QUERIES + 1, KEYS + 1, 33, 17),
    ((3,), 2 * QUERIES - 1, 2 * KEYS - 1, 8, 40),
    ((2, 1, 2), 9, 20, 4, 4),
    ((1, 2), 300, 2 * family.RANGE + 5, 5, 3),  # heads are cut
    ((5, 2), 3, 5, 100, 1),
]

rng = np.random.default_rng(0)


def operands(*sizes, dtype="float64"):
    batch, queries, keys, features, out = sizes
    shapes = [(queries, features), (keys, features), (keys, out), (queries, out)]
    return [np.asarray(rng.standard_normal((*batch, *s))).astype(DTYPES[dtype]) for s in shapes]


def same(function, *arrays, g, rtol, **options):
    """What kernels give is what the generic text gives in double precision."""
    got = run("require", function, *arrays, g=g, **options)
    true = run("off", function, *map(wide, arrays), g=wide(g), **options)
    for a, t in zip(got, true, strict=True):
        assert a.shape == t.shape
        assert a.dtype == arrays[0].dtype
        # Gradients are differences of numbers of about the operands' size, 1.
        size = np.abs(t).max(initial=1.0)
        assert np.abs(wide(a) - t).max(initial=0.0) <= rtol * size
    return got


def tolerance(dtype):
    """A gradient adds up products of three operands: some roundings of numbers of several units."""
    return (256 if dtype == "float64" else 32) * EPS[dtype]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity(dtype, sizes, is_causal) -> None:
    q, k, v, g = operands(*sizes, dtype=dtype)
    same(attention, q, k, v, g=g, rtol=tolerance(dtype), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_masks(dtype, is_causal) -> None:
    q, k, v, g = operands((2, 3), QUERIES + 7, KEYS + 9, 6, 5, dtype=dtype)
    size = (2, 3, QUERIES + 7, KEYS + 9)
    for shape in (size, size[2:], (2, 1, 1, size[3]), (3, size[2], 1), (1, 1), (1, size[3])):
        seen = rng.random(shape) < 0.5
        added = np.where(rng.random(shape) < 0.2, -np.inf, rng.standard_normal(shape))
        for mask in (seen, added.astype(dtype), added.astype("float32"), seen[..., ::-1]):

            def function(*x, mask=mask, **options):
                return attention(*x, gg.asarray(mask), **options)

            same(function, q, k, v, g=g, rtol=tolerance(dtype), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout(p, is_causal) -> None:
    """The very elements that the generic text drops."""
    for sizes in SHAPES:
        q, k, v, g = operands(*sizes)
        same(attention, q, k, v, g=g, rtol=tolerance("float64"), is_causal=is_causal,
             dropout_p=p, seed=(1 << 63) + 5, offset=1 << 35)  # fmt: skip


def test_axes_that_broadcast() -> None:
    for left, right in (((2, 1), (1, 3)), ((), (2, 3)), ((4, 1, 2), (3, 1)), ((2,), ())):
        q, *_ = operands(left, 40, 50, 6, 5)
        _, k, v, _ = operands(right, 40, 50, 6, 5)
        g = rng.standard_normal((*np.broadcast_shapes(left, right), 40, 5))
        same(attention, q, k, v, g=g, rtol=tolerance("float64"))


@pytest.mark.parametrize("place", range(4))
def test_layouts(place) -> None:
    arrays = operands((2, 3), 40, 150, 6, 5, dtype="float32")
    want = run("require", attention, *arrays[:3], g=arrays[3], is_causal=True)
    for name, laid in layouts(arrays[place]):
        given = [*arrays[:place], laid, *arrays[place + 1 :]]
        got = run("require", attention, *given[:3], g=given[3], is_causal=True)
        for a, w in zip(got, want):
            assert np.array_equal(a, w), name


def test_heads_of_one_projection_are_not_copied(monkeypatch) -> None:
    qkv = rng.standard_normal((2, 40, 3, 4, 8)).astype("float32")
    q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))
    g = rng.standard_normal((2, 4, 40, 8)).astype("float32")
    want = run("require", attention, *(x.copy() for x in (q, k, v)), g=g)
    seen: list[Any] = []
    where = family._where

    def watched(x):
        seen.append(x)
        return where(x)

    monkeypatch.setattr(family, "_where", watched)
    y = run("require", attention, q, k, v, g=g)
    for a, w in zip(y, want):
        assert np.array_equal(a, w)
        # So that the heads lie side by side again.
        assert a.swapaxes(1, 2).flags.c_contiguous
    assert sum(np.shares_memory(x, qkv) for x in seen) == 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 24), (2, 70, 24), (1, 3, 24), (0, 3, 24), (2, 0, 24)])
def test_packed(shape, dtype) -> None:
    x = np.asarray(rng.standard_normal(shape)).astype(DTYPES[dtype])
    g = np.asarray(rng.standard_normal((*shape[:-1], 8))).astype(DTYPES[dtype])
    options = {"heads": 2, "is_causal": True}
    same(packed_attention, x, g=g, rtol=tolerance(dtype), **options)
    same(packed_attention, x, g=g, rtol=tolerance(dtype), dropout_p=0.4, seed=3, **options)
    spread = np.repeat(x, 2, axis=-1)[..., ::2]
    a, b = (run("require", packed_attention, v, g=g, **options) for v in (x, spread))
    assert all(np.array_equal(p, q) for p, q in zip(a, b))


@pytest.mark.parametrize(
    "sizes", [((2,), 0, 5, 3, 2), ((2,), 5, 0, 3, 2), ((0, 2), 5, 5, 3, 2), ((2,), 5, 5, 0, 2),
              ((2,), 5, 5, 3, 0)], ids=str)  # fmt: skip
def test_no_elements(sizes) -> None:
    q, k, v, g = operands(*sizes)
    same(attention, q, k, v, g=g, rtol=1e-14)


def test_each_set_of_wanted_gradients() -> None:
    q, k, v, g = operands((2, 2), 40, 50, 6, 5)
    _, *want = run("require", attention, q, k, v, g=g)
    for wanted in ((0,), (1,), (2,), (0, 2), (1, 2)):
        tensors = [gg.tensor(x, requires_grad=i in wanted) for i, x in enumerate((q, k, v))]
        with gg.use_kernels("require"):
            attention(*tensors).backward(gg.tensor(g))
        for i, x in enumerate(tensors):
            assert (x.grad is None) == (i not in wanted)
            if x.grad is not None:
                assert np.array_equal(x.grad.data, want[i])


def test_derivatives_of_every_kind() -> None:
    q, k, v, _ = operands((2,), 4, 5, 3, 2)
    with gg.use_kernels("require"):
        gg.check_grads(lambda *x: attention(*x, is_causal=True), [*map(gg.tensor, (q, k, v))],
                       order=2)  # fmt: skip


# -- the machine -----------------------------------------------------------------------------------


def test_memory_is_linear_in_the_length() -> None:
    """Of a whole process, with what compiled code takes: all scores would be 1 GiB."""
    grown = python(
        """
import resource
import numpy as np
import gpugrad as gg
from gpugrad.ops.attention import packed_attention

def run(length):
    x = gg.tensor(np.ones((length, 24), "float32"), requires_grad=True)
    with gg.use_kernels("require"):
        y = packed_attention(x, heads=1, is_causal=True)
        y.backward(gg.ones_like(y))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

short = run(64)
print((run(16384) - short) / 1024)
"""
    )
    assert float(grown) < 100


@pytest.mark.parametrize("sizes", [((3, 2), 150, 150, 16, 16), ((), 300, 2000, 8, 8)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(sizes) -> None:
    from numba import get_num_threads, set_num_threads

    q, k, v, g = operands(*sizes, dtype="float32")
    before = get_num_threads()
    seen = []
    try:
        for threads in [*range(1, before + 1), 1]:
            set_num_threads(threads)
            seen.append(run("require", attention, q, k, v, g=g, is_causal=True, dropout_p=0.1))
    finally:
        set_num_threads(before)
    for other in seen[1:]:
        assert all(np.array_equal(a, w) for a, w in zip(other, seen[0]))


def test_heavy_and_light_parts_alternate() -> None:
    deal = family._dealt.function
    for count in (1, 2, 5, 8):
        parts = [deal(unit, count) for unit in range(count)]
        assert sorted(parts) == list(range(count))
        if count == 8:
            assert sum(parts[:4]) == sum(parts[4:])


def test_refusals() -> None:
    q, k, v, g = operands((2,), 4, 5, 3, 2)
    mask = gg.tensor(rng.standard_normal((4, 5)), requires_grad=True)
    with gg.use_kernels("require"):
        with pytest.raises(KernelError, match="do not fit"):
            attention(q, k[:, :4], v)
        with pytest.raises(KernelError, match="float32 and float64"):
            attention(q.astype("float32"), k, v)
        with pytest.raises(KernelError, match="a mask of int64"):
            attention(q, k, v, np.ones((4, 5), int))
        with pytest.raises(KernelError, match="a gradient of the mask"):
            attention(gg.tensor(q, requires_grad=True), k, v, mask).backward(gg.tensor(g))
        with pytest.raises(KernelError, match="makes more of"):
            packed_attention(np.ones((1, 5, 12)), np.ones((3, 1, 5, 5), bool), heads=2)
        with pytest.raises(KernelError, match="of 5 heads"):
            packed_attention(np.ones((3, 12)), heads=5)


@pytest.mark.parametrize("storage", ["float32", "float64"])
def test_loops_are_vectorised(storage) -> None:
    tile, other = np.ones((KEYS, QUERIES), storage), np.ones((KEYS, QUERIES), storage)
    a, b, c, d = np.ones((4, QUERIES), storage)
    address, one = tile.ctypes.data, np.dtype(storage).type(1)
    for loop, args in {
        scores.soften: (tile, 9, 9, a, b, c, d),
        scores.thin: (tile, other, 9, 9),
        scores.scale_rows: (tile, 9, 9, a),
        scores.differentiate: (tile, other, 9, 9, a, b, one),
        scores.differentiate_thinned: (tile, other, other, 9, 9, a, b, one),
        scores.finish: (tile, 9, 9, a, b, address, 9, c),
        scores.levels: ((address, 9), (address, 9), 9, 9, a),
    }.items():
        assert packed(assembly(loop[storage], *args)) >= 1, loop
