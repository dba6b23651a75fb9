"""Dropout as an operation: what it computes, what it keeps, what it refuses."""

import math

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import DTypeError, ParameterError, ShapeError


def ones(shape, **kw):
    return gg.ones(shape, dtype="float32", **kw)


def test_an_element_depends_on_seed_offset_and_place_alone():
    whole = gg.dropout(ones(1000), p=0.5, seed=3, offset=4).numpy()
    assert np.array_equal(gg.dropout(ones(37), p=0.5, seed=3, offset=4).numpy(), whole[:37])
    square = gg.dropout(ones((10, 100)), p=0.5, seed=3, offset=4).numpy()
    assert np.array_equal(square.ravel(), whole)
    turned = gg.dropout(ones((100, 10)).T, p=0.5, seed=3, offset=4).numpy()
    assert np.array_equal(turned.ravel(), whole)
    values = gg.asarray(np.arange(1.0, 1001.0, dtype="float32"))
    assert np.array_equal(gg.dropout(values, p=0.5, seed=3, offset=4).numpy() != 0, whole != 0)


def test_seed_and_offset_each_make_another_mask():
    masks = [gg.dropout(ones(200), p=0.5, seed=s, offset=o).numpy() for s in (0, 1) for o in (0, 1)]
    assert len({m.tobytes() for m in masks}) == 4


@pytest.mark.parametrize("p", [0.05, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_the_mean_stays(p, seed):
    n = 1 << 16
    y = gg.dropout(ones(n), p=p, seed=seed, offset=seed).numpy()
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / (1 - p))}
    kept = int(np.count_nonzero(y))
    assert abs(kept - n * (1 - p)) < 4.5 * math.sqrt(n * p * (1 - p))


def test_nothing_and_everything():
    x = gg.tensor([1.0, -2.0, math.inf, math.nan], requires_grad=True)
    none = gg.dropout(x, p=0.0, seed=1)
    assert np.array_equal(none.detach().numpy(), x.detach().numpy(), equal_nan=True)
    every = gg.dropout(x, p=1.0, seed=1)
    assert every.tolist() == [0.0] * 4
    gg.sum(every).backward()
    assert x.grad.tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_factor_is_not_rounded_before_it_multiplies(dtype):
    x = gg.tensor(np.linspace(1, 2, 500), dtype=dtype)
    y = gg.dropout(x, p=0.1, seed=5).numpy()
    wide = np.float32 if dtype == "float16" else np.dtype(dtype).type
    want = (x.numpy().astype(wide) * wide(1 / 0.9)).astype(dtype)
    assert y.dtype == np.dtype(dtype)
    assert np.array_equal(y[y != 0], want[y != 0])


def test_nothing_is_kept_for_the_backward_pass():
    x = gg.tensor(np.ones((100, 100)), requires_grad=True)
    y = gg.dropout(x, p=0.5, seed=1)
    assert y._node.saved() == {}
    b = gg.tensor(np.zeros(100), requires_grad=True)
    z = gg.bias_activation_dropout(x, b, x, activation="relu", seed=1)
    assert set(z._node.saved()) == {"x", "bias"}


def test_derivatives_of_every_order_have_the_same_mask():
    x = gg.tensor(np.random.default_rng(0).standard_normal(30))

    def f(x):
        return gg.sum(gg.dropout(x, p=0.5, seed=9) ** 3)

    kept = gg.dropout(gg.ones(30), p=0.5, seed=9).numpy() != 0
    value = x.numpy()
    first, second = gg.grad(f)(x).numpy(), gg.grad(lambda x: gg.sum(gg.grad(f)(x)))(x).numpy()
    np.testing.assert_allclose(first, np.where(kept, 24 * value**2, 0.0))
    np.testing.assert_allclose(second, np.where(kept, 48 * value, 0.0))
    _, tangent = gg.jvp(f, (x,), (gg.ones(30),))
    np.testing.assert_allclose(tangent.item(), first.sum())


def test_after_a_product_it_is_the_three_operations():
    r = np.random.default_rng(0)
    arrays = [r.standard_normal(s) for s in ((6, 5), 5, (6, 5))]
    fused = [gg.tensor(a, requires_grad=True) for a in arrays]
    plain = [gg.tensor(a, requires_grad=True) for a in arrays]
    y = gg.bias_activation_dropout(*fused, activation="gelu", p=0.3, seed=2, offset=7)
    z = gg.dropout(gg.gelu(plain[0] + plain[1]), p=0.3, seed=2, offset=7) + plain[2]
    np.testing.assert_allclose(y.detach().numpy(), z.detach().numpy(), rtol=1e-13)
    g = gg.tensor(r.standard_normal((6, 5)))
    y.backward(g)
    z.backward(g)
    for a, b in zip(fused, plain):
        np.testing.assert_allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-12)


@pytest.mark.parametrize("function", [gg.dropout, gg.bias_activation_dropout])
@pytest.mark.parametrize("size", [10, 10_000])
def test_bad_parameters(function, size):
    x = ones((1, size))
    for p in (-0.01, 1.01, math.nan):
        with pytest.raises(ParameterError, match=f"p is a probability from 0 to 1, got {p}"):
            function(x, p=p)
    for name in ("seed", "offset"):
        for value in (-1, 1 << 64):
            with pytest.raises(ParameterError, match=f"{name} is an integer from 0 to"):
                function(x, p=0.5, **{name: value})


def test_bad_operands():
    with pytest.raises(DTypeError, match="dropout: int64 cannot be scaled"):
        gg.dropout(gg.asarray([1, 2]))
    x = gg.ones((2, 3))
    with pytest.raises(ShapeError, match=r"bias of shape \(2,\); a bias has one axis"):
        gg.bias_activation_dropout(x, gg.ones(2))
    with pytest.raises(ShapeError, match=r"residual of shape \(3,\) must agree; broadcast"):
        gg.bias_activation_dropout(x, None, gg.ones(3))
    with pytest.raises(ParameterError, match="no activation 'gleu'; there are relu"):
        gg.bias_activation_dropout(x, gg.ones(3), activation="gleu")


def test_complex_numbers():
    x = gg.asarray(np.full(50, 1 + 2j))
    y = gg.dropout(x, p=0.5, seed=1).numpy()
    assert set(y.tolist()) == {0j, 2 + 4j}
