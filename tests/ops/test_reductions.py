import math
import warnings

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import ShapeError

DEVICES = ["cpu", "strict:device1"]
RNG = np.random.default_rng(0)
NAMES = ["sum", "mean", "var", "std", "max", "min", "prod", "any", "all", "count_nonzero"]


def host(x: gg.Tensor) -> np.ndarray:
    return x.backend.to_host(x.data)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(8))
def test_reductions_over_any_axes_are_numpys(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(map(int, rng.integers(1, 4, rng.integers(1, 5))))
    a = rng.standard_normal(shape) * (rng.random(shape) < 0.8)
    ndim = len(shape)
    some = tuple(
        int(i) - ndim * int(rng.integers(0, 2)) for i in rng.permutation(ndim)[: rng.integers(1, 4)]
    )
    for axis in (None, int(rng.integers(-ndim, ndim)), some):
        for keepdims in (False, True):
            y = getattr(gg, name)(gg.tensor(a), axis=axis, keepdims=keepdims)
            expected = getattr(np, name)(a, axis=axis, keepdims=keepdims)
            assert y.shape == np.shape(expected)
            np.testing.assert_allclose(y.numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["sum", "mean", "var", "std", "max", "min", "prod", "logsumexp",
                                  "argmax", "any", "count_nonzero"])  # fmt: skip
@pytest.mark.parametrize("device", DEVICES)
def test_an_axis_that_is_not_there_is_named(name: str, device: str) -> None:
    with pytest.raises((ShapeError, IndexError)) as caught:
        getattr(gg, name)(gg.ones((2, 3), device=device), axis=2)
    text = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert name in text
    assert "2" in text
    assert "[2, 3]" in text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_adds_up_in_float32(dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x = gg.full((2, 10_000), 0.1, dtype="float32").astype(dtype)
    value = float(x[0, 0].astype("float64"))
    for name, expected in [
        ("sum", 10_000 * value), ("mean", value), ("logsumexp", math.log(10_000) + value),
    ]:  # fmt: skip
        y = getattr(gg, name)(x, axis=1)
        assert y.dtype == x.dtype
        assert float(y[0].astype("float64")) == pytest.approx(expected, rel=4e-3)
    x = x.detach().requires_grad_()
    gg.sum(x).backward()
    assert x.grad.dtype == x.dtype
    assert bool((x.grad.astype("float32") == 1.0).all())


def test_gradients_of_half_precision_count_beyond_its_range() -> None:
    x = gg.zeros((70_000,), dtype="float16").requires_grad_()
    gg.mean(x).backward(gg.tensor(1024.0, dtype="float16"))
    np.testing.assert_allclose(x.grad.numpy()[:2], 1024 / 70_000, rtol=2e-3)
    x.grad = None
    gg.max(x).backward(gg.tensor(1024.0, dtype="float16"))
    np.testing.assert_allclose(x.grad.numpy()[:2], 1024 / 70_000, rtol=2e-3)
    assert x.grad.dtype == np.float16
    ones = gg.ones((5000,), dtype="float16")
    assert gg.cumulative_sum(ones)[-1].item() == 5000.0


def test_an_axis_may_be_a_numpy_integer() -> None:
    x = gg.ones((2, 3)).requires_grad_()
    for name in ("sum", "mean", "max", "prod", "var", "logsumexp"):
        getattr(gg, name)(x, axis=np.int64(1)).sum().backward()
    assert x.reshape(np.int64(6)).shape == (6,)


def test_sums_of_small_integers_and_booleans_are_wide() -> None:
    for dtype in ("bool", "int8", "int16"):
        y = gg.sum(gg.ones((300,), dtype=dtype))
        assert (y.dtype, y.item()) == (np.int64, 300)
    assert gg.sum(gg.ones(3, dtype="float32"), dtype="float64").dtype == np.float64


def test_a_sum_in_another_dtype_casts_its_gradient_back() -> None:
    x = gg.ones(3, dtype="float32").requires_grad_()
    for y in (gg.sum(x, dtype="float64"), gg.prod(x, dtype="float64"),
              gg.cumulative_sum(x, dtype="float64").sum()):  # fmt: skip
        x.grad = None
        y.backward()
        assert x.grad.dtype == np.float32


def test_sum_and_mean_save_no_array() -> None:
    x = gg.ones((2, 3)).requires_grad_()
    for y in (gg.sum(x, axis=0), gg.mean(x)):
        assert not any(isinstance(v, np.ndarray) for v in y.grad_fn.saved().values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["max", "min"])
def test_ties_share_the_gradient_equally(name: str, device: str) -> None:
    sign = 1.0 if name == "max" else -1.0
    a = sign * np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    x = gg.tensor(a, device=device, requires_grad=True)
    getattr(gg, name)(x, axis=1).sum().backward()
    np.testing.assert_allclose(host(x.grad), [[0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-15)


def test_the_extreme_of_a_row_with_nan_is_the_nan() -> None:
    x = gg.tensor([[1.0, math.nan, 3.0], [1.0, 2.0, 3.0]], requires_grad=True)
    y = gg.max(x, axis=1)
    y.sum().backward()
    np.testing.assert_array_equal(y.detach().numpy(), [math.nan, 3.0])
    np.testing.assert_array_equal(x.grad.numpy(), [[0, 1, 0], [0, 0, 1]])


def test_the_extreme_of_nothing() -> None:
    with pytest.raises(ShapeError, match="max: cannot take"):
        gg.max(gg.zeros((0,)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("zeros", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8])
def test_derivatives_of_a_product_with_zeros(n: int, zeros: int, device: str) -> None:
    a = np.linspace(0.5, 2.0, n)
    a[: min(zeros, n)] = 0.0
    x = gg.tensor(a, device=device)
    gradient = np.array([np.prod(np.delete(a, i)) for i in range(n)])
    np.testing.assert_allclose(host(gg.grad(gg.prod)(x)), gradient, rtol=1e-12)
    second = np.array(
        [[0.0 if i == j else np.prod(np.delete(a, [i, j])) for j in range(n)] for i in range(n)]
    )
    np.testing.assert_allclose(host(gg.hessian(gg.prod)(x)), second, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("axis", [None, 1, (0, -1), (2, 0)])
def test_gradient_of_a_product_over_axes(axis) -> None:
    a = RNG.standard_normal((2, 3, 2))
    a[0, 0, 0] = a[1, 2, 1] = a[1, 0, 0] = 0.0
    gg.check_grads(lambda x: gg.prod(x, axis=axis), (gg.tensor(a),))


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("zeros", [(), (0,), (2,), (1, 3), (0, 1, 2, 3, 4)])
def test_gradient_of_a_running_product_with_zeros(zeros, initial: bool) -> None:
    a = np.array([[1.5, -2.0, 0.5, 3.0, 1.2]])
    a[0, list(zeros)] = 0.0
    jacobian = np.zeros((5, 5))
    for i in range(5):
        for j in range(i + 1):
            jacobian[i, j] = np.prod(np.delete(a[0, : i + 1], j))
    x = gg.tensor(a, requires_grad=True)
    g = np.arange(1.0, 6.0)
    y = gg.cumulative_prod(x, axis=1, include_initial=initial)
    y.backward(gg.tensor(np.concatenate([[7.0] * initial, g])[None]))
    np.testing.assert_allclose(x.grad.numpy()[0], g @ jacobian, rtol=1e-12, atol=1e-14)
    gg.check_grads(lambda x: gg.cumulative_prod(x, axis=1), (gg.tensor(a),))


def test_logsumexp_at_the_edges_without_a_warning() -> None:
    inf = math.inf
    rows = [[-inf, -inf], [-inf, 1.0], [inf, 1.0], [1e300, 1e300], [-1e300, -1e300], [math.nan, 1]]
    x = gg.tensor(rows, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = gg.logsumexp(x, axis=1)
        gg.logsumexp(x[:2], axis=1).sum().backward()
    np.testing.assert_array_equal(y.detach().numpy(), [-inf, 1.0, inf, 1e300, -1e300, math.nan])
    np.testing.assert_array_equal(x.grad.numpy()[:2], [[0, 0], [0, 1]])


def test_logsumexp_of_large_and_small() -> None:
    x = gg.tensor([1000.0, 1000.0, 999.0])
    expected = 1000.0 + math.log(2.0 + math.exp(-1.0))
    assert gg.logsumexp(x).item() == pytest.approx(expected, rel=1e-15)
    assert gg.logsumexp(x - 2000.0).item() == pytest.approx(expected - 2000.0, rel=1e-15)


def test_the_derivative_of_std_is_zero_where_it_is_zero() -> None:
    x = gg.tensor([[2.0, 2.0], [1.0, 3.0]], requires_grad=True)
    gg.std(x, axis=1).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), [[0.0, 0.0], [-0.5, 0.5]], rtol=1e-15)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_variance_of_too_few_is_nan() -> None:
    assert math.isnan(gg.var(gg.tensor([1.0]), correction=1).item())


def test_variance_of_numbers_far_from_zero() -> None:
    x = 1e8 + np.array([0.0, 1.0, 2.0, 3.0])
    assert gg.var(gg.tensor(x)).item() == 1.25


@pytest.mark.torch
@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (lambda x: gg.max(x, axis=1), lambda x: x.amax(1)),
        (lambda x: gg.min(x, axis=(0, 2)), lambda x: x.amin((0, 2))),
        (lambda x: gg.max(x), lambda x: x.amax()),
        (lambda x: gg.logsumexp(x, axis=(0, 1)), lambda x: x.logsumexp((0, 1))),
        (lambda x: gg.std(x, axis=2, correction=1), lambda x: x.std(2)),
        (lambda x: gg.var(x, axis=1), lambda x: x.var(1, correction=0)),
        (lambda x: gg.prod(x, axis=1), lambda x: x.prod(1)),
        (lambda x: gg.cumulative_prod(x, axis=1), lambda x: x.cumprod(1)),
        (lambda x: gg.cumulative_sum(x, axis=1), lambda x: x.cumsum(1)),
    ],
)
def test_gradients_are_pytorchs(mine, theirs) -> None:
    import torch

    a = RNG.integers(-2, 3, (3, 4, 5)).astype(float)  # ties and zeros
    x, t = gg.tensor(a, requires_grad=True), torch.tensor(a, requires_grad=True)
    y, z = mine(x), theirs(t)
    g = RNG.standard_normal(y.shape)
    y.backward(gg.tensor(g))
    z.backward(torch.tensor(g))
    np.testing.assert_allclose(y.detach().numpy(), z.detach().numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), t.grad.numpy(), rtol=1e-12, atol=1e-12)
