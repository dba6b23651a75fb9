"""The rows of a table and their gradient: the generic text's bits, on any number of threads."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.errors import DTypeError, KernelError, OutOfRangeError
from gpugrad.kernels.cpu import embedding as family
from gpugrad.kernels.cpu.compile import CPU
from gpugrad.ops.embeddings import embedding_backward
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, layouts, run

NUMPY = backend_for_device("cpu")


def normal(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


def indices(shape, rows, dtype="int64", seed=0):
    return np.random.default_rng(seed).integers(0, rows, shape).astype(dtype)


def both(index, table, g, **options):
    """Result and gradient with the kernels and without."""

    def call(weight):
        return gg.embedding(index, weight, **options)

    return [run(mode, call, table, g=g) for mode in ("require", "off")]


def equal(got, want):
    for a, w in zip(got, want):
        assert a.dtype == w.dtype and a.shape == w.shape
        assert np.array_equal(a, w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}])
def test_the_same_bits(dtype, options):
    # Some rows are read by nobody, some by many.
    index = indices((40, 25), 30) ** 2 // 20
    table, g = normal((50, 37), dtype), normal((40, 25, 37), dtype, 1)
    equal(*both(index, table, g, **options))


def test_options_together():
    index, table, g = indices((300,), 11), normal((11, 5)), normal((300, 5), seed=1)
    got, want = both(index, table, g, padding_idx=-1, scale_grad_by_freq=True)
    equal(got, want)
    assert np.all(got[1][10] == 0) and np.all(got[1][:10] != 0)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "uint32", "int64", "uint64"])
def test_integers(kind):
    index, table, g = indices((7, 9), 20, kind), normal((20, 6)), normal((7, 9, 6), seed=1)
    equal(*both(index, table, g))


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((), 3, 4), ((1,), 1, 1), ((0,), 3, 4), ((2, 0, 3), 3, 4), ((5,), 3, 0), ((2, 3, 4), 9, 7),
        ((1000,), 1, 300), ((1000,), 2, 1), ((3,), 1000, 257), ((64,), 63, 256), ((64,), 65, 513),
    ],
)  # fmt: skip
def test_shapes(shape, rows, columns):
    index = indices(shape, rows)
    table, g = normal((rows, columns)), normal((*shape, columns), seed=1)
    got, want = both(index, table, g)
    assert got[0].shape == (*shape, columns) and got[1].shape == (rows, columns)
    equal(got, want)


def test_layouts():
    index, table, g = indices((31, 18), 40), normal((40, 6)), normal((31, 18, 6), seed=1)
    want, _ = both(index, table, g)
    for (_, i), (_, laid), (_, h) in zip(layouts(index), layouts(table), layouts(g)):
        equal(both(i, laid, h)[0], want)


def test_half_precision_is_added_up_in_float32():
    index, g = np.zeros(5000, np.int64), np.ones((5000, 3), "float16")
    for mode in ("require", "off"):
        with gg.use_kernels(mode):
            total = embedding_backward(NUMPY, index, g, 2)
        # In half precision a sum of ones stays at 2048.
        assert total.dtype == np.float16
        assert np.array_equal(total, [[5000.0] * 3, [0.0] * 3])


def test_memory_that_held_other_numbers_is_written_whole():
    index, g = indices((400,), 900), np.full((400, 600), np.nan, "float32")
    with gg.use_kernels("require"):
        embedding_backward(NUMPY, index, g, 1000)  # leaves NaN behind in idle memory
        total = embedding_backward(NUMPY, index, np.ones_like(g), 1000)
    assert np.array_equal(total[:, 0], np.bincount(index, minlength=1000))
    assert np.array_equal(total, np.broadcast_to(total[:, :1], total.shape))


def test_any_number_of_threads_gives_the_same_bits():
    from numba import get_num_threads, set_num_threads

    index, g = indices((3000,), 500), normal((3000, 300))
    index[::2] = 7  # half of them name one row
    before = get_num_threads()
    seen = []
    try:
        for threads in range(1, before + 1):
            set_num_threads(threads)
            with gg.use_kernels("require"):
                seen.append(embedding_backward(NUMPY, index, g, 600, None, True))
    finally:
        set_num_threads(before)
    for other in seen[1:]:
        assert np.array_equal(other, seen[0])


def test_parts_cover_every_row_once():
    index = np.repeat(np.arange(100), np.arange(100) % 7 * 3)
    starts, order = np.zeros(102, np.int64), np.empty(index.size, np.int64)
    family._sort["float32"](index, starts, order, -1)
    assert np.array_equal(starts[:101], np.concatenate([[0], np.cumsum(np.bincount(index))]))
    assert np.array_equal(order, np.argsort(index, kind="stable"))
    boundary = family._boundary.instance(CPU, "float32")
    bounds = [boundary(starts, 100, part, 8) for part in range(9)]
    assert bounds[0] == 0 and bounds[-1] == 100 and bounds == sorted(bounds)
    work = np.diff([b + 2 * starts[b] for b in bounds])
    assert work.max() - work.min() <= 2 * (1 + 2 * 18)


@pytest.mark.parametrize("mode", ["require", "off"])
def test_an_index_outside_is_named_with_its_place(mode):
    table = np.zeros((4, 2), "float32")
    index = np.zeros((3, 5), np.int64)
    with gg.use_kernels(mode):
        index[1, 2] = 4
        with pytest.raises(OutOfRangeError, match=r"index 4 at \[1, 2\] is none of the 4 rows"):
            gg.embedding(index, table)
        index[0, 4] = -1
        with pytest.raises(OutOfRangeError, match=r"index -1 at \[0, 4\] is none of the 4 rows"):
            gg.embedding(index, table)
        with pytest.raises(OutOfRangeError, match=r"index 7 at \[\] is none"):
            gg.embedding(np.int64(7), table)


def test_refusals():
    with gg.use_kernels("require"):
        with pytest.raises(KernelError, match="no array of integers"):
            gg.embedding(np.zeros(2), np.zeros((2, 2)))
        with pytest.raises(KernelError, match="no kernel for int64"):
            gg.embedding(np.zeros(2, int), np.zeros((2, 2), int))
        with pytest.raises(KernelError, match="a table without two axes"):
            gg.embedding(np.zeros(2, int), np.zeros(2))
    with pytest.raises(DTypeError, match="indices are integers, not float64"):
        gg.embedding(np.zeros(2), np.zeros((2, 2)))


def test_loops_are_vectorised():
    row, total = np.ones(64, "float32"), np.ones(64, "float32")
    assert packed(assembly(family._add["float32"], row, total)) >= 1
    assert packed(assembly(family._store["float32"], total, row, np.float32(3))) >= 1
