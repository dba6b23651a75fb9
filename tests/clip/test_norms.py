"""Norms at the ends of the range, in every library, the same bits every time."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_of
from gpugrad.clip import max_abs, nonfinite_count, norm_of, sum_of_squares, total_norm
from gpugrad.clip.norms import norm_over, unit_norms
from gpugrad.errors import DeviceError, DTypeError, ParameterError
from tests.backend.counting import counting
from tests.backend.test_libraries import jax_device  # noqa: F401

ORDERS = [0.5, 1.0, 1.5, 2.0, 3.0, 7.0, math.inf]
DTYPES = ["float16", ml_dtypes.bfloat16, "float32", "float64"]


def exact(arrays, p) -> float:
    """In the widest dtype there is, of magnitudes divided by the greatest."""
    flat = np.concatenate([np.abs(a).astype(np.longdouble).ravel() for a in arrays])
    top = flat.max(initial=0)
    if p == math.inf or top == 0 or not np.isfinite(top):
        return float(top)
    return float(top * np.sum((flat / top) ** np.longdouble(p)) ** (1 / np.longdouble(p)))


@pytest.fixture(params=["cpu", "counting", "strict:device1", "jax"])
def device(request):
    if request.param == "counting":
        with counting():
            yield "counting"
    elif request.param == "jax":
        yield request.getfixturevalue("jax_device")
    else:
        if request.param != "cpu":
            pytest.importorskip("array_api_strict")
        yield request.param


@pytest.mark.parametrize("mode", ["off", "auto"])
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_total_norm(p, dtype, mode) -> None:
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(s).astype(dtype) for s in [(70, 300), (3,), (), (2, 0), (1, 9)]]
    with gg.use_kernels(mode):
        norm = total_norm([gg.tensor(a) for a in arrays], p)
    assert norm.shape == ()
    assert type(norm.data) is np.ndarray
    assert norm.dtype == ("float64" if dtype == "float64" else "float32")
    tolerance = 1e-13 if dtype == "float64" else 2e-6
    assert math.isclose(norm.item(), exact(arrays, p), rel_tol=tolerance)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("value", [1e30, 1e-30, 1e-21, 3e37, 1e-37])
def test_powers_keep_within_single_precision(p, value, device) -> None:
    x = gg.tensor(np.full((3, 5), value, np.float32), device=device)
    y = gg.tensor(np.full(2, -value, np.float32), device=device)
    norm = total_norm([x, y], p)
    expected = 17 ** (1 / p) * float(np.float32(value))
    if expected > float(np.finfo(np.float32).max):
        assert norm.item() == math.inf
    else:
        assert math.isclose(norm.item(), expected, rel_tol=1e-5)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("value", [1e200, 1e-200])
def test_powers_keep_within_double_precision(p, value, device) -> None:
    norm = total_norm([gg.tensor(np.full(17, value), device=device)], p)
    assert math.isclose(norm.item(), 17 ** (1 / p) * value, rel_tol=1e-13)


@pytest.mark.parametrize("mode", ["off", "auto"])
@pytest.mark.parametrize("size", [5, 40_000])
def test_one_tensor_out_of_range_among_others(mode, size) -> None:
    small, large = np.full(size, 1e-25, np.float32), np.full(3, 2e20, np.float32)
    with gg.use_kernels(mode):
        assert math.isclose(
            total_norm([gg.tensor(small), gg.tensor(large)]).item(), 2e20 * 3**0.5, rel_tol=1e-6
        )
        assert math.isclose(
            total_norm([gg.tensor(small), gg.tensor(np.zeros(9, np.float32))]).item(),
            1e-25 * size**0.5,
            rel_tol=1e-5,
        )


@pytest.mark.parametrize("p", [0.5, 1, 2, 3, math.inf])
def test_half_precision_does_not_overflow(p, device) -> None:
    x = gg.tensor(np.full(1000, 300, np.float16 if not device.startswith("strict") else np.float32))
    norm = total_norm([x.to(device)], p)
    assert norm.dtype == np.float32
    assert math.isclose(norm.item(), 300 * 1000 ** (1 / p), rel_tol=1e-5)


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_nan_and_infinity(p, device) -> None:
    def norm(*values):
        return total_norm(
            [gg.tensor(np.float32([v, 1.0, 2.0]), device=device) for v in values], p
        ).item()

    assert math.isnan(norm(0.0, math.nan))
    assert math.isnan(norm(math.inf, math.nan))
    assert norm(1.0, -math.inf) == math.inf
    assert norm(0.0) == pytest.approx(exact([np.float32([0, 1, 2])], p))


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_one_nan_among_ten_million(mode) -> None:
    x = np.full(10_000_000, 1e-3, np.float32)
    with gg.use_kernels(mode):
        assert total_norm([gg.tensor(x)]).item() == pytest.approx(1e-3 * 1e7**0.5, rel=1e-4)
        x[7_654_321] = math.nan
        for p in (1, 2, math.inf):
            assert math.isnan(total_norm([gg.tensor(x)], p).item())
        assert nonfinite_count(backend_of(x), x) == 1


def test_zeros(device) -> None:
    zeros = [gg.tensor(np.zeros(4, np.float32), device=device)]
    for p in ORDERS:
        assert total_norm(zeros, p).item() == 0.0


def test_nothing_at_all(device) -> None:
    empty = [gg.tensor(np.zeros((0, 3), np.float32), device=device)]
    for p in ORDERS:
        assert total_norm([], p).item() == 0.0
        norm = total_norm(empty, p)
        assert (norm.shape, norm.device, norm.item()) == ((), empty[0].device, 0.0)


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_every_layout(mode) -> None:
    base = np.random.default_rng(2).standard_normal((40, 30, 50))
    repeated = np.broadcast_to(base[0], (9, 30, 50))
    layouts = [base[::2], base[:, ::-1, ::3], base.T, base[3], base[..., 0], repeated,
               np.asfortranarray(base), base[1:1]]  # fmt: skip
    with gg.use_kernels(mode):
        for x in layouts:
            norm = norm_of(backend_of(x), [x])
            assert math.isclose(norm, exact([x], 2), rel_tol=1e-13)


def test_complex_numbers() -> None:
    x = np.array([3 + 4j, -12j])
    for dtype, real in (("complex64", "float32"), ("complex128", "float64")):
        for p, expected in ((1, 17.0), (2, 13.0), (math.inf, 12.0)):
            norm = total_norm([gg.tensor(x.astype(dtype))], p)
            assert norm.dtype == real
            assert math.isclose(norm.item(), expected, rel_tol=1e-6)


@pytest.mark.parametrize(
    "dtypes", [("float16", "float32"), ("float32", "float64"), ("float16", "float64")]
)
@pytest.mark.parametrize("p", [0.5, 2, math.inf])
def test_mixed_dtypes_take_the_widest(dtypes, p) -> None:
    arrays = [np.full(20_000, 2, dtypes[0]), np.full(3, 5, dtypes[1])]
    for order in itertools.permutations(arrays):
        norm = total_norm([gg.tensor(a) for a in order], p)
        assert norm.dtype == dtypes[1]
        assert math.isclose(norm.item(), exact(arrays, p), rel_tol=1e-6)


@pytest.mark.parametrize("dtype", ["int64", "bool"])
def test_integers_have_no_norm(dtype) -> None:
    with pytest.raises(DTypeError, match=f"total_norm: {dtype} has no norm.*float32"):
        total_norm([gg.tensor(np.ones(3, dtype))])


def test_low_orders_are_refused_with_the_reason() -> None:
    x = [gg.tensor([1.0])]
    with pytest.raises(ParameterError, match=r"norm_type is 0\.1.*n\^10 times.*use 0\.5 or more"):
        total_norm(x, 0.1)
    with pytest.raises(ParameterError, match="norm_type is 5e-324"):
        total_norm(x, 5e-324)
    assert total_norm(x, "inf").item() == 1.0


def test_other_places_are_refused_with_the_way_out() -> None:
    pytest.importorskip("array_api_strict")
    here, there = gg.tensor([3.0]), gg.tensor([4.0], device="strict:device1")
    with pytest.raises(DeviceError, match=r"numpy on cpu.*take the norm of each.*\.to\(device\)"):
        total_norm([here, there])
    assert total_norm([total_norm([here]), total_norm([there]).to("cpu")]).item() == 5.0


@pytest.mark.parametrize("mode", ["off", "auto"])
@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_the_same_bits_wherever_the_memory_begins(mode, p) -> None:
    x = np.random.default_rng(3).standard_normal(100_003).astype(np.float32)
    room = np.empty(x.size + 16, np.float32)
    seen = set()
    with gg.use_kernels(mode):
        for offset in range(16):
            moved = room[offset : offset + x.size]
            moved[:] = x
            seen.add(norm_of(backend_of(x), [moved, moved[:7]], p).tobytes())
    assert len(seen) == 1


def test_norm_over_axes() -> None:
    x = np.random.default_rng(4).standard_normal((5, 3, 4))
    x[2] = 0.0
    m = backend_of(x)
    for p in (1.5, 2):
        norms = norm_over(m, x * 1e-200, p, (1, 2), keepdims=True)
        assert norms.shape == (5, 1, 1)
        expected = np.linalg.norm(x.reshape(5, -1), p, axis=1)
        assert np.allclose(norms.ravel(), expected * 1e-200, rtol=1e-13, atol=0)
    assert norm_over(m, np.float32([3, 4]), 2).dtype == np.float32


@pytest.mark.parametrize("factor", [1.0, 1e-200, 1e200])
def test_unit_norms(factor, device) -> None:
    x = np.random.default_rng(5).standard_normal((5, 3, 4))
    x[2] = 0.0
    there = gg.tensor(x * factor, device=device)
    m = there.backend
    with np.errstate(over="ignore"):
        norms = m.to_host(unit_norms(m, there.data))
    assert norms.shape == (5, 1, 1)
    want = np.linalg.norm(x.reshape(5, -1), axis=1) * factor
    assert np.allclose(norms.ravel(), want, rtol=1e-13, atol=0)
    for short in (x[0, 0], x[0, 0, 0]):
        norm = unit_norms(m, gg.tensor(np.asarray(short * factor), device=device).data)
        assert math.isclose(m.to_host(norm), np.linalg.norm(short) * factor, rel_tol=1e-13)


@pytest.mark.parametrize("p", [0.5, 1, 2, 3, math.inf])
def test_many_small_tensors(p, device) -> None:
    rng = np.random.default_rng(6)
    shapes = [(3,), (), (2, 2), (0,), (700, 2)] * 9
    arrays = [
        np.asarray(rng.standard_normal(s), "float64" if i % 3 else "float32")
        for i, s in enumerate(shapes)
    ]
    norm = total_norm([gg.tensor(a, device=device) for a in arrays], p)
    assert norm.dtype == np.float64
    assert math.isclose(norm.item(), exact(arrays, p), rel_tol=1e-6)


def test_the_number_of_small_tensors_costs_no_launches() -> None:
    with counting() as counts:
        launches = []
        for number in (10, 1000):
            made = [gg.tensor(np.ones(4, np.float32), device="counting") for _ in range(number)]
            counts.clear()
            assert total_norm(made).shape == ()
            launches.append(counts.launches)
        assert launches[0] == launches[1] < 25


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reductions(dtype) -> None:
    x = np.array([-3, 2, np.inf, np.nan, -np.inf], dtype)
    m = backend_of(x)
    assert sum_of_squares(m, x[:2]) == 13
    assert max_abs(m, x[:2]) == 3
    assert max_abs(m, x[:3]) == math.inf
    assert math.isnan(max_abs(m, x))
    assert nonfinite_count(m, x) == 3
    for reduction in (sum_of_squares, max_abs, nonfinite_count):
        assert reduction(m, x[:0]) == 0
    assert max_abs(m, x[:0]).dtype == ("float64" if dtype == "float64" else "float32")


def test_nothing_is_read_whatever_the_order() -> None:
    with counting() as counts:
        made = [gg.tensor(np.ones(5, np.float32), device="counting") for _ in range(3)]
        counts.clear()
        for p in ORDERS:
            total_norm(made, p)
        m = made[0].backend
        nonfinite_count(m, made[0].data)
        assert (counts.host_reads, counts.uploads) == (0, 0)
