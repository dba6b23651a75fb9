"""Reductions by blocks: parity, every layout, and the same bits on any number of threads."""

import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.backend.kernels import note_choices
from gpugrad.clip import max_abs, nonfinite_count, norm_of, sum_of_squares
from gpugrad.clip.scaling import scaled
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import reduce
from gpugrad.kernels.cpu.compile import storage_view
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, layouts, wide

NUMPY = backend_for_device("cpu")
REDUCTIONS = {"sum_of_squares": sum_of_squares, "max_abs": max_abs,
              "nonfinite_count": nonfinite_count}  # fmt: skip
SIZES = [0, 1, 2, 31, 8191, 8192, 8193, 3 * 8192, 100_003]


def run(mode, name, x):
    with gg.use_kernels(mode):
        return REDUCTIONS[name](NUMPY, x)


def truth(name, x):
    x = wide(x)
    if name == "sum_of_squares":
        return math.fsum((x * x).ravel())
    return np.abs(x).max(initial=0) if name == "max_abs" else np.count_nonzero(~np.isfinite(x))


@pytest.mark.parametrize("name", REDUCTIONS)
def test_there_is_a_slot(name) -> None:
    x = np.ones(100_000, np.float32)
    with note_choices() as log:
        REDUCTIONS[name](NUMPY, x)
    assert [(c.operation, c.implementation) for c in log] == [(name, "numba cpu")]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_parity(name, dtype, size) -> None:
    x = np.random.default_rng(size).standard_normal(size).astype(DTYPES[dtype])
    if name == "nonfinite_count":
        x[::7], x[1::7], x[2::7] = math.nan, math.inf, -math.inf
    got, generic = run("require", name, x), run("off", name, x)
    want = truth(name, x)
    assert got.shape == generic.shape == ()
    if name == "sum_of_squares":
        assert got.dtype == np.float64
        assert got == pytest.approx(want, rel=1e-14 if dtype == "float64" else 3e-7)
        assert got == pytest.approx(generic, rel=1e-14 if dtype == "float64" else 2e-6)
    else:
        assert got == generic == want
        assert got.dtype.kind == generic.dtype.kind
        assert name != "max_abs" or got.dtype == generic.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_every_layout(name, dtype) -> None:
    x = np.random.default_rng(1).standard_normal((5, 60, 70)).astype(DTYPES[dtype])
    x[3, 4, 5] = 9.0
    want = truth(name, x)
    for layout, laid in layouts(x):
        assert run("require", name, laid) == pytest.approx(want, rel=1e-6), layout
    one, none, repeated = x[3, 4, 5], x[0, 0, 0:0], np.broadcast_to(x[0], (3, 60, 70))
    for laid in (x[::2, ::-1], x.T[3:, 1:], repeated, none, x[1:1], np.asarray(one)):
        assert run("require", name, laid) == pytest.approx(truth(name, laid), rel=1e-6)


def test_elements_in_another_order_of_axes_are_not_copied() -> None:
    x = np.zeros((3, 4, 5), np.float32)
    for laid in (
        x,
        x.T,
        x.transpose(1, 2, 0),
        np.asfortranarray(x),
        x[:, 1:2].transpose(2, 0, 1)[:0],
    ):
        row = reduce.in_a_row(laid)
        assert row.size == laid.size
        assert row.size == 0 or np.shares_memory(row, laid)
    for laid in (x[::2], x[..., 1], x[::-1], np.broadcast_to(x[0], (2, 4, 5))):
        assert reduce.in_a_row(laid) is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_squares_beyond_single_precision(dtype) -> None:
    """A kernel that returns float64 promises a sum that neither overflows nor vanishes."""
    limits = [65504.0, 6e-8] if dtype == "float16" else [3e38, 1e30, 1e-21, 1e-30, 1e-38, 1e-40]
    for value in limits:
        for size in (5, 30_000):
            x = np.full(size, value, DTYPES[dtype])
            expected = size * float(x[0]) ** 2
            assert expected > 0
            assert run("require", "sum_of_squares", x) == pytest.approx(expected, rel=1e-6)
            x[size // 2] = 1.0
            expected += 1.0 - float(x[0]) ** 2
            assert run("require", "sum_of_squares", x) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_sum_by_itself(dtype) -> None:
    x = np.random.default_rng(7).standard_normal(5000).astype(DTYPES[dtype])
    want = pytest.approx(truth("sum_of_squares", x), rel=3e-7)
    for loop in (reduce._squares_of_T, reduce._squares_of_float64):
        assert loop[dtype](storage_view(x)) == want


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype) -> None:
    for where in (0, 17, 8191, 8192, 19_999):
        x = np.full(20_000, 0.5, DTYPES[dtype])
        x[where] = -math.inf
        assert run("require", "sum_of_squares", x) == math.inf
        assert run("require", "max_abs", x) == math.inf
        x[-1 - where] = math.nan
        assert math.isnan(run("require", "sum_of_squares", x))
        assert math.isnan(run("require", "max_abs", x))
        assert run("require", "nonfinite_count", x) == 2
    negative = np.array([-0.0, -3.0, 2.0], DTYPES[dtype])
    assert run("require", "max_abs", negative) == 3.0
    assert not np.signbit(run("require", "max_abs", negative[:1]))


@pytest.mark.parametrize("size", [100_003, 8192 * 3])
def test_the_same_bits_on_any_number_of_threads(size) -> None:
    code = (
        "import numpy as np\n"
        "from gpugrad.kernels.cpu.reduce import sum_of_squares, max_abs\n"
        f"x = np.random.default_rng(0).standard_normal({size}).astype('float32')\n"
        "for y in (x, np.repeat(x, 2)[::2]):\n"
        "    print(sum_of_squares(None, y).hex(), float(max_abs(None, y)).hex())\n"
    )
    seen = set()
    for threads in ("1", "2", "3"):
        env = {**os.environ, "NUMBA_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout)
    assert len(seen) == 1
    whole, strided = seen.pop().splitlines()
    assert whole == strided


def test_several_threads_call_at_once() -> None:
    x = np.random.default_rng(2).standard_normal(1 << 18).astype(np.float32)
    want = run("require", "sum_of_squares", x)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: run("require", "sum_of_squares", x), range(32))) == {want}


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (np.ones(3, np.complex64), "no kernel for complex64"),
        (np.ones(3, ">f4"), "no kernel for >f4"),
        (np.float32(3), "a float32; kernels take arrays"),
    ],
)
def test_refusals_are_told(x, reason) -> None:
    for name in REDUCTIONS:
        with pytest.raises(KernelError, match=reason):
            run("require", name, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loop", ["_squares_of_T", "_squares_of_float64"])
def test_sums_are_vectorised(loop, dtype) -> None:
    text = assembly(getattr(reduce, loop)[dtype], storage_view(np.ones(64, DTYPES[dtype])))
    assert packed(text) >= 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loop", ["_greatest", "_not_finite"])
def test_integer_loops_are_vectorised(loop, dtype) -> None:
    text = assembly(getattr(reduce, loop)[dtype], storage_view(np.ones(64, DTYPES[dtype])))
    found = re.findall(r"\bvp(?:max|cmp|add|blend|and)\w*\b|\b(?:smax|cmeq|cmgt|add)\s+v\d+", text)
    assert len(found) >= 4


def test_no_double_precision_beside_float32() -> None:
    """Two float32 sums for one of float64: conversions in the loop would halve the speed."""
    text = assembly(reduce._squares_of_T["float32"], np.ones(64, np.float32))
    assert not re.search(r"vcvtps2pd|vfm?add\d*pd|fcvtl", text)


# -- scaling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100, 8192, 30_001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_in_place(dtype, size) -> None:
    x = np.random.default_rng(4).standard_normal(size).astype(DTYPES[dtype])
    factor = np.float64(0.3) if dtype == "float64" else np.float32(0.3)
    got, want = x.copy(), x.copy()
    for mode, y in (("require", got), ("off", want)):
        with gg.use_kernels(mode):
            assert scaled(NUMPY, y, factor) is y
    assert np.array_equal(got, want)
    assert size == 0 or not np.array_equal(got, x)


def test_scaling_every_layout() -> None:
    base = np.random.default_rng(5).standard_normal((40, 50, 30)).astype(np.float32)
    for y in (base.T, np.asfortranarray(base), base[3:], np.asarray(base[0, 0, 0])):
        want = y * np.float32(0.5)
        with gg.use_kernels("require"):
            scaled(NUMPY, y, np.float32(0.5))
        assert np.array_equal(y, want)
    gaps = np.ones((40, 50), np.float32)
    with gg.use_kernels("require"), pytest.raises(KernelError, match="gaps between the elements"):
        scaled(NUMPY, gaps[:, ::2], np.float32(2))
    with (
        gg.use_kernels("require"),
        pytest.raises(KernelError, match=r"a factor of shape \(40, 1\)"),
    ):
        scaled(NUMPY, gaps, np.ones((40, 1), np.float32))


def test_scaling_keeps_nan_and_infinity() -> None:
    x = np.array([1.0, math.nan, math.inf, 0.0] * 5, np.float32)
    with gg.use_kernels("require"), np.errstate(all="ignore"):
        scaled(NUMPY, x, np.float32(0))
    assert np.array_equal(x[:4], [0.0, math.nan, math.nan, 0.0], equal_nan=True)


def test_scaling_is_vectorised() -> None:
    for dtype in DTYPES:
        x = np.ones(64, DTYPES[dtype])
        factor = np.float64(2) if dtype == "float64" else np.float32(2)
        assert packed(assembly(reduce._scale[dtype], storage_view(x), factor)) >= 4


def test_the_norm_takes_them(monkeypatch) -> None:
    x = np.random.default_rng(3).standard_normal((300, 400)).astype(np.float32)
    asked: list = []
    for name in REDUCTIONS:
        kernel = reduce.KERNELS[name].run
        monkeypatch.setitem(NUMPY.slots, name, _watching(NUMPY.slots[name], kernel, asked))
    with gg.use_kernels("require"):
        assert norm_of(NUMPY, [x, x[::2]]) == pytest.approx(
            math.hypot(np.linalg.norm(wide(x)), np.linalg.norm(wide(x[::2]))), rel=1e-6
        )
        norm_of(NUMPY, [x], math.inf)
    assert asked == ["sum_of_squares", "sum_of_squares", "max_abs"]


def _watching(slot, run, asked):
    from gpugrad.backend.kernels import Kernel, Slot

    def watched(m, *arrays):
        asked.append(slot.name)
        return run(m, *arrays)

    made = Slot(slot.name, slot.module)
    made.add(Kernel(watched, "watched"))
    return made
