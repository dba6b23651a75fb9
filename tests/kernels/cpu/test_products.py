"""Matrix products: against float64, in every layout, and what NumPy's semantics ask for."""

import re
from types import FunctionType

import numba
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.lib.stride_tricks import sliding_window_view

from gpugrad.backend import backend_for_device
from gpugrad.backend.kernels import use_kernels
from gpugrad.errors import DTypeError, ParameterError, ShapeError
from gpugrad.kernels.cpu import gemm as loops
from gpugrad.kernels.cpu import openblas, products
from gpugrad.kernels.cpu.compile import parallel, serial
from gpugrad.kernels.cpu.products import _room, available, gemm, matmul
from tests.kernels.cpu.processes import python

prange = numba.prange

needs_openblas = pytest.mark.skipif(available() is not None, reason=f"{available()}")

FLOATS = ("float32", "float64")
EPS = {"float32": 2.0**-24, "float64": 2.0**-53}
#: What results are compared in: more digits than they have.
FINER = {"float32": np.float64, "float64": np.longdouble}


def close(got, a, b, before=None):
    """Every element within the bound on the rounding of a sum of k products (Higham, §3.5)."""
    finer = FINER[got.dtype.name]
    a, b = a.astype(finer), b.astype(finer)
    true, size = np.matmul(a, b), np.matmul(abs(a), abs(b))
    if before is not None:
        true, size = true + before, size + abs(before.astype(finer))
    assert got.shape == true.shape
    steps = a.shape[-1] + 2
    assert np.all(abs(got - true) <= steps * EPS[got.dtype.name] * size)


def normal(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


LAYOUTS = ("contiguous", "transposed", "stretched", "strided", "reversed", "misaligned",
           "read-only", "upside down", "broadcast", "sliding")  # fmt: skip

READ_ONLY = ("read-only", "broadcast", "sliding")


def laid(x, layout):
    """The elements of `x`, lying in memory in another way."""
    if layout == "transposed" and x.ndim > 1:
        return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    if layout == "stretched" and x.ndim > 1:  # rows with a gap between them
        wide = np.full((*x.shape[:-1], x.shape[-1] + 3), np.nan, x.dtype)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if layout == "strided":
        return np.repeat(x, 2, axis=-1)[..., ::2]
    if layout == "reversed":
        return np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    if layout == "misaligned":
        raw = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
        raw[...] = x
        return raw
    if layout == "upside down" and x.ndim > 1:
        return np.ascontiguousarray(x[..., ::-1, :])[..., ::-1, :]
    if layout == "sliding" and x.ndim > 1 and x.size:  # each row a step further in the same memory
        rows, columns = x.shape[-2:]
        windows = sliding_window_view(np.resize(x, rows + columns - 1), columns)
        return np.broadcast_to(windows, x.shape)
    if layout == "broadcast" and x.ndim > 1:  # the same row again and again
        return np.broadcast_to(x[..., :1, :], x.shape)
    x = np.ascontiguousarray(x)
    if layout == "read-only":
        x.flags.writeable = False
    return x


def placed(x, layout):
    """The same for a result: an array that can be written to."""
    return laid(x.copy(), "contiguous" if layout in READ_ONLY else layout)


operands = st.builds(
    lambda shapes, dtype, layouts, seed: tuple(
        laid(normal(*shape, dtype=dtype, seed=seed + i), layout)
        for i, (shape, layout) in enumerate(zip(shapes.input_shapes, layouts))
    ),
    hnp.mutually_broadcastable_shapes(
        signature=np.matmul.signature, max_dims=4, min_side=0, max_side=20
    ),
    st.sampled_from(FLOATS),
    st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    st.integers(0, 1000),
)


@settings(deadline=None, max_examples=200)
@given(operands)
def test_any_shapes_and_layouts(pair):
    a, b = pair
    got = matmul(a, b)
    assert got.dtype == a.dtype
    assert type(got) is type(np.matmul(a, b))
    close(got, a, b)


@settings(deadline=None, max_examples=200)
@given(operands, st.sampled_from(LAYOUTS), st.booleans())
def test_into_any_array(pair, layout, accumulate):
    a, b = pair
    shape = np.matmul(a, b).shape
    assume(shape)
    before = (
        normal(*shape, dtype=a.dtype, seed=7) if accumulate else np.full(shape, np.nan, a.dtype)
    )
    out = placed(before, layout)
    assert matmul(a, b, out, accumulate=accumulate) is out
    close(out, a, b, before if accumulate else None)


#: The compiled loop, made to divide the smallest of products.
_fine = serial(FunctionType(loops._many.__code__, {**vars(loops), "GRAIN": 1}, "_many_fine"))


@needs_openblas
@settings(deadline=None, max_examples=200)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 20)),
    st.sampled_from(FLOATS),
    st.sampled_from(["contiguous", "transposed", "stretched"]),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.integers(1, 9),
)
def test_any_division_of_the_work(batch, sizes, dtype, layout, flags, threads):
    m, n, k = sizes
    accumulate, one_a, one_b = flags
    a = normal(*((1, 1) if one_a else batch), m, k, dtype=dtype)
    b = normal(*((1, 1) if one_b else batch), k, n, dtype=dtype, seed=1)
    before = normal(*batch, m, n, dtype=dtype, seed=2)
    out = placed(before, layout)
    assert _fine[dtype](a, b, out, out.dtype.type(accumulate), threads, _room(b)) == 0
    close(out, np.broadcast_to(a, (*batch, m, k)), b, before if accumulate else None)


#: Products of a training step: (m, n, k), and which operands are transposed views.
STEPS = [
    (128, 512, 784, False, True), (128, 784, 512, False, False), (512, 784, 128, True, False),
    (1024, 384, 128, False, True), (1024, 128, 512, False, False), (512, 128, 1024, True, False),
    (3, 2000, 300, False, False), (2000, 3, 300, True, True), (1, 3000, 400, False, False),
]  # fmt: skip


def step(m, n, k, left, right, dtype):
    a = normal(k, m, dtype=dtype).T if left else normal(m, k, dtype=dtype)
    b = normal(n, k, dtype=dtype, seed=1).T if right else normal(k, n, dtype=dtype, seed=1)
    return a, b


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "n", "k", "left", "right"), STEPS)
def test_products_of_a_training_step(m, n, k, left, right, dtype):
    a, b = step(m, n, k, left, right, dtype)
    close(matmul(a, b), a, b)
    before = normal(n, m, dtype=dtype, seed=2).T
    out = before.copy(order="K")
    matmul(a, b, out, accumulate=True)
    close(out, a, b, before)


@pytest.mark.parametrize("dtype", FLOATS)
def test_batches_of_a_training_step(dtype):
    q, k = normal(16, 64, 4, 32, dtype=dtype), normal(16, 64, 4, 32, dtype=dtype, seed=1)
    heads, keys = q.swapaxes(1, 2), k.transpose(0, 2, 3, 1)
    close(matmul(heads, keys), heads, keys)
    few = normal(3, 200, 100, dtype=dtype)
    close(matmul(few, few.swapaxes(1, 2)), few, few.swapaxes(1, 2))
    x, weight = normal(5, 7, 11, 90, dtype=dtype), normal(120, 90, dtype=dtype)
    close(matmul(x, weight.T), x, weight.T)


@needs_openblas
def test_runs_repeat_bit_for_bit():
    a, b = step(300, 500, 400, True, False, "float32")
    first = matmul(a, b)
    for _ in range(5):
        assert np.array_equal(matmul(a, b), first)


# -- what a product means -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [5, 300])
def test_not_a_number_spreads(dtype, n):
    a, b = normal(n, n, dtype=dtype), normal(n, n, dtype=dtype, seed=1)
    a[3, 1], b[2, 4] = np.nan, np.inf
    a[1, 2] = 0.0  # 0 · inf
    got = matmul(a, b)
    with np.errstate(invalid="ignore"):
        want = np.matmul(a.astype("float64"), b.astype("float64"))
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert np.array_equal(np.isinf(got), np.isinf(want))
    assert np.isnan(got[3]).all() and np.isnan(got[1, 4])


@pytest.mark.parametrize("n", [5, 300])
def test_what_was_there_does_not_matter(n):
    a = normal(n, n)
    out = np.full((n, n), np.nan, "float32")
    matmul(a, a, out)
    close(out, a, a)


@pytest.mark.parametrize(
    "shapes",
    [((4, 0), (0, 3)), ((0,), (0,)), ((2, 4, 0), (0, 3)), ((3, 0, 4), (4, 2)), ((0, 4), (4, 0)),
     ((2, 0), (0,))],
)  # fmt: skip
def test_nothing_to_add_up(shapes):
    a, b = (np.empty(s, "float32") for s in shapes)
    want = np.matmul(a, b)
    assert np.array_equal(matmul(a, b), want)
    out = np.full(want.shape, np.nan, "float32")
    matmul(a, b, out)
    assert np.array_equal(out, want)
    if want.ndim == 2:
        out = np.full(want.shape, 3, "float32")
        matmul(a, b, out, accumulate=True)
        assert (out == 3).all()


@pytest.mark.parametrize("n", [6, 200])
def test_operands_in_the_memory_of_the_result(n):
    for accumulate in (False, True):
        x = normal(n, n)
        a, b = x.copy(), normal(n, n, seed=1)
        matmul(x, b, x, accumulate=accumulate)
        close(x, a, b, a if accumulate else None)
        x = a.copy()
        matmul(b, x.T, x)
        close(x, b, a.T)
        x = a.copy()
        matmul(x, x, x, accumulate=accumulate)
        close(x, a, a, a if accumulate else None)


def test_beside_each_other_is_not_in_the_same_memory():
    buffer = np.zeros(5000, "float32")
    a, b, out = (buffer[i : i + 900].reshape(30, 30) for i in (0, 900, 1800))
    a[...], b[...] = normal(2, 30, 30)
    assert products._compiled[a.dtype] is None or not products._compiled[a.dtype].one(
        a, b, out, 0.0
    )
    matmul(a, b, out)
    close(out, a, b)
    assert not buffer[2700:].any()


@pytest.mark.parametrize(
    ("a", "b"),
    [("int64", "int64"), ("float32", "float64"), ("complex64", "complex64"), (">f4", ">f4"),
     ("float16", "float16"), ("bool", "float32")],
)  # fmt: skip
def test_other_dtypes_are_numpys(a, b):
    x, y = (8 * normal(3, 4)).astype(a), (8 * normal(4, 5, seed=1)).astype(b)
    want = np.matmul(x, y)
    got = matmul(x, y)
    assert got.dtype == want.dtype
    assert np.array_equal(got, want)
    out = want.copy()
    if want.dtype != bool:
        assert np.array_equal(matmul(x, y, out, accumulate=True), want + want)


def test_shapes_that_do_not_fit():
    x = normal(2, 3)
    for a, b, text in [
        (x, x, r"shapes \(2, 3\) and \(2, 3\) do not fit: 3 columns meet 2 rows"),
        (x, normal(4), r"shapes \(2, 3\) and \(4,\) do not fit: 3 columns meet 4 rows"),
        (x, np.float32(2) * np.ones((), "float32"), "a 0-d operand has no axis to sum over"),
        (normal(2, 2, 3), normal(3, 3, 2), r"the stacks \(2,\) and \(3,\) do not broadcast"),
    ]:
        for kind in FLOATS:
            with pytest.raises(ShapeError, match=text):
                matmul(a.astype(kind), b.astype(kind))
    with pytest.raises(ShapeError, match=r"out has shape \(2, 2\), and the product \(3, 3\)"):
        matmul(x.T, x, np.empty((2, 2), "float32"))
    with pytest.raises(DTypeError, match="out holds float64, and the product is float32"):
        matmul(x.T, x, np.empty((3, 3)))
    with pytest.raises(ParameterError, match="give it as out"):
        matmul(x.T, x, accumulate=True)
    out = np.empty((3, 3), "float32")
    out.flags.writeable = False
    with pytest.raises(ParameterError, match="out is read-only"):
        matmul(x.T, x, out)


@needs_openblas
@pytest.mark.skipif(loops._WIDTH < 64, reason="sizes of 32 bits")
def test_more_elements_than_32_bits_count(tmp_path):
    """Rows that lie 2^31 elements apart, in a file that is all hole."""
    far = 2**31 + 16
    held = np.memmap(tmp_path / "hole", "float32", "w+", shape=(3, far))
    a = np.asarray(held)[:, 8:24]
    a[...] = normal(3, 16)
    b = normal(16, 300, seed=1)
    close(matmul(a, b), np.array(a), b)
    close(matmul(b.T, a.T), b.T, np.array(a).T)
    out = np.asarray(held)[:, 1000:1300]
    matmul(a, b, out)
    close(np.array(out), np.array(a), b)


# -- in compiled code -----------------------------------------------------------------------------


@parallel
def _bands(a, b, out, beta):
    for band in prange((out.shape[0] + 6) // 7):
        i, j = 7 * band, min(7 * band + 7, out.shape[0])
        gemm(a[i:j], b, out[i:j], beta)  # type: ignore[operator]


@needs_openblas
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("contiguous", "float32"), ("read-only", "float64"), ("transposed", "float64"),
     ("strided", "float32")],
)  # fmt: skip
def test_gemm_in_a_loop_of_another_kernel(dtype, layout):
    a, b = (laid(normal(*s, dtype=dtype), layout) for s in ((50, 20), (20, 30)))
    before = normal(50, 30, dtype=dtype, seed=2)
    for beta in (0, 1):
        out = placed(before if beta else np.full_like(before, np.nan), layout)
        _bands[dtype](a, b, out, np.dtype(dtype).type(beta))
        close(out, a, b, before if beta else None)
    empty = np.full((8, 3), np.nan, dtype)
    _bands[dtype](a[:8, :0], b[:0, :3], empty, np.dtype(dtype).type(0))
    assert not empty.any()


@needs_openblas
@pytest.mark.parametrize("width", [32, 64])
def test_the_width_of_openblas_integers(monkeypatch, width):
    monkeypatch.setattr(loops, "_WIDTH", width)
    blas = loops._blas

    def call(x, n):
        blas(x, np.int32(111), np.int32(112), n, n, n, n, n, n, n, x, n, n)

    compiled = numba.njit(call)
    compiled.compile((numba.float64, numba.int64))
    text = next(iter(compiled.inspect_llvm().values()))
    (arguments,) = re.findall(r"call void @gpugrad_dgemm\((.*)\)", text)
    kinds = [part.split()[0] for part in arguments.split(",")]
    i = f"i{width}"
    assert kinds == ["i32", "i32", "i32", i, i, i, "double", "i64", i, "i64", i, "double", "i64", i]


def test_the_disk_cache_works(tmp_path):
    code = """
import numpy as np
from gpugrad.kernels.cpu import products
a = np.ones((300, 300), np.float32)
assert (products.matmul(a, a) == 300).all()
assert (products.matmul(a[:3, :3], a[:3, :3]) == 3).all()
kinds = products._compiled[a.dtype]
stats = [d.stats for d in (kinds.one, kinds.alone, kinds.many.threaded)]
print(sum(len(s.cache_hits) for s in stats), sum(len(s.cache_misses) for s in stats))
"""
    assert [python(code, GPUGRAD_CACHE_DIR=str(tmp_path)).split() for _ in range(2)] == [
        ["0", "3"], ["3", "0"]
    ]  # fmt: skip


# -- without OpenBLAS, and with its own threads ---------------------------------------------------


def test_numpy_computes_where_openblas_is_missing(monkeypatch):
    why = "NumPy computes with another library than OpenBLAS"
    monkeypatch.setattr(openblas, "find", lambda: why)
    monkeypatch.setattr(loops, "_missing", loops._bind()[1])
    monkeypatch.setattr(products, "_compiled", products._ByDtype())
    assert available() == why
    a, b = normal(2, 30, 40), normal(40, 20, seed=1)
    close(matmul(a, b), a, b)
    out = np.ones((2, 30, 20), "float32")
    matmul(a, b, out, accumulate=True)
    close(out, a, b, np.ones_like(out))
    assert products.refuse(None, a, b) == why


@needs_openblas
@pytest.mark.skipif(not isinstance(openblas.find(), str) and openblas.find().default_threads < 2,
                    reason="one processor")  # fmt: skip
def test_openblas_on_threads_of_its_own():
    code = """
import numpy as np
from gpugrad.kernels.cpu import pool, products
rng = np.random.default_rng(0)
a = rng.standard_normal((300, 300))
many = rng.standard_normal((20, 70, 70))
for _ in range(20):
    assert np.allclose(products.matmul(a, a), a @ a)
    assert np.allclose(products.matmul(many, many), many @ many)
print(pool.describe().blas_threads, pool.get_num_threads())
"""
    assert python(code, OPENBLAS_NUM_THREADS="2", NUMBA_NUM_THREADS="2").split() == ["2", "2"]


# -- the slot -------------------------------------------------------------------------------------


@needs_openblas
def test_what_is_left_to_numpy():
    m = backend_for_device("cpu")
    kernel = products.KERNELS["matmul"]
    large = normal(300, 300)
    assert kernel.refuse(m, large, large) is None
    close(kernel.run(m, large, large), large, large)
    for a, b, why in [
        (large, large.astype("float64"), "operands of float32 and float64"),
        (large.astype("int64"), large.astype("int64"), "no products for int64"),
        (large, 2.0, "a float without axes"),
        (large[:60, :60], large[:60, :60], "so few multiply-adds that NumPy is as quick"),
    ]:
        assert why in str(kernel.refuse(m, a, b))
    with use_kernels("require"):
        assert kernel.refuse(m, large[:60, :60], large[:60, :60]) is None
