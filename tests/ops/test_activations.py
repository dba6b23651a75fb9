"""Activations: stability, special points, parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import ParameterError, ShapeError

SMOOTH = ["sigmoid", "logsigmoid", "softplus", "silu", "mish", "gelu", "elu", "selu", "celu",
          "tanh", "erf", "tanhshrink", "softsign"]  # fmt: skip


def host(x: gg.Tensor) -> np.ndarray:
    return x.detach().numpy()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SMOOTH)
def test_no_overflow_in_any_order(name: str, dtype: str) -> None:
    """Warnings are errors here: nothing may overflow or become NaN, up to the third derivative."""
    x = gg.tensor([-1e30, -1000.0, -90.0, 0.0, 90.0, 1000.0, 1e30], dtype=dtype)
    function = getattr(gg, name)
    for order in range(4):
        y = function(x)
        assert y.dtype == dtype
        assert np.all(np.isfinite(host(y))), f"order {order}"
        function = gg.grad(lambda x, f=function: gg.sum(f(x)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_limits(dtype: str) -> None:
    x = gg.tensor([-1000.0, 1000.0], dtype=dtype)
    np.testing.assert_array_equal(host(gg.sigmoid(x)), [0.0, 1.0])
    np.testing.assert_array_equal(host(gg.logsigmoid(x)), [-1000.0, 0.0])
    np.testing.assert_array_equal(host(gg.softplus(x)), [0.0, 1000.0])
    np.testing.assert_array_equal(host(gg.mish(x)), [0.0, 1000.0])
    np.testing.assert_array_equal(host(gg.silu(x)), [0.0, 1000.0])
    np.testing.assert_array_equal(host(gg.gelu(x)), [0.0, 1000.0])


def test_sigmoid_keeps_relative_precision_in_its_tail() -> None:
    y = host(gg.sigmoid(gg.tensor([-50.0, -300.0, -700.0])))
    np.testing.assert_allclose(y, np.exp([-50.0, -300.0, -700.0]), rtol=1e-13)


def test_parameters_that_cannot_be() -> None:
    x = gg.tensor([1.0])
    for call, message in [
        (lambda: gg.celu(x, alpha=0.0), "celu: alpha"),
        (lambda: gg.softplus(x, beta=0.0), "softplus: beta"),
        (lambda: gg.gelu(x, approximate="erf"), "gelu: approximate is 'none' or 'tanh'"),
        (lambda: gg.geglu(x, x, approximate="x"), "geglu: approximate"),
        (lambda: gg.softshrink(x, lambd=-1.0), "softshrink: lambd"),
        (lambda: gg.hardshrink(x, lambd=float("nan")), "hardshrink: lambd"),
    ]:
        with pytest.raises(ParameterError, match=message):
            call()


def test_glu_axis() -> None:
    with pytest.raises(ShapeError, match=r"glu: axis -1 of shape \(2, 3\).*odd"):
        gg.glu(gg.zeros((2, 3)))
    with pytest.raises(ShapeError, match=r"glu: axis 2 of a tensor of shape \(2, 3\)"):
        gg.glu(gg.zeros((2, 3)), axis=2)


# -- softmax ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3)])
def test_softmax_of_little(name: str, shape: Any) -> None:
    x = gg.zeros(shape)
    y = getattr(gg, name)(x)
    assert y.shape == shape
    if shape == ():
        assert y.item() == (1.0 if name == "softmax" else 0.0)
    x = gg.zeros(shape).requires_grad_()
    gg.sum(getattr(gg, name)(x)).backward()
    np.testing.assert_array_equal(host(x.grad), np.zeros(shape))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_softmax_masked(dtype: str) -> None:
    """Elements of -inf take no share and get no gradient, nor do they spoil the others'."""
    inf = float("inf")
    x = gg.tensor([[1.0, -inf, 2.0], [-inf, 5.0, -inf]], dtype=dtype, requires_grad=True)
    y = gg.softmax(x)
    np.testing.assert_allclose(host(y)[1], [0.0, 1.0, 0.0])
    np.testing.assert_allclose(host(gg.sum(y, axis=-1)), [1.0, 1.0], rtol=1e-6)
    gg.sum(y * gg.tensor([1.0, 2.0, 3.0], dtype=dtype)).backward()
    grad = host(x.grad)
    assert grad.dtype == dtype
    assert np.all(np.isfinite(grad))
    np.testing.assert_array_equal(grad[1], 0.0)
    assert grad[0, 1] == 0.0


def test_log_softmax_masked() -> None:
    x = gg.tensor([[1.0, -np.inf, 2.0]], requires_grad=True)
    y = gg.log_softmax(x)
    assert host(y)[0, 1] == -np.inf
    (y[0, 0] + y[0, 2]).backward()
    np.testing.assert_allclose(
        host(x.grad), [[1.0 - 2 / (1 + np.e), 0.0, 1.0 - 2 / (1 + 1 / np.e)]]
    )


def test_softmax_shift_does_not_matter() -> None:
    x = np.random.default_rng(0).standard_normal((3, 4))
    for name in ("softmax", "log_softmax"):
        function = getattr(gg, name)
        np.testing.assert_allclose(
            host(function(gg.tensor(x + 1e6))), host(function(gg.tensor(x))), rtol=1e-9
        )


# -- conventions where there is no derivative ------------------------------------------------------


def grads(function: Any, *values: Any) -> list[np.ndarray]:
    tensors = [gg.tensor(v, requires_grad=True) for v in values]
    gg.sum(function(*tensors)).backward()
    return [host(t.grad) for t in tensors]


@pytest.mark.parametrize("value", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 0.0, 1.0, 2.0, 3.0])
def test_pow_with_a_python_exponent(value: float, exponent: float) -> None:
    """A whole exponent has a derivative at zero and below, in both orders."""
    power = lambda x: x**exponent
    first = gg.grad(power)(value).item()
    second = gg.grad(gg.grad(power))(value).item()
    assert first == (exponent * value ** (exponent - 1) if exponent else 0.0)
    assert second == (exponent * (exponent - 1) * value ** (exponent - 2) if exponent > 1 else 0.0)


def test_pow_with_an_array_exponent() -> None:
    base, exponent = grads(gg.pow, [0.0, 0.0, 0.0, 2.0], [0.0, 1.0, 2.0, 0.0])
    np.testing.assert_array_equal(base, [0.0, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(exponent, [0.0, 0.0, 0.0, np.log(2.0)])


def test_pow_mixed_derivative_at_exponent_zero() -> None:
    """d/db d/da a**b is 1/a at b = 0: the guard for a zero base must not reach other bases."""
    inner = gg.grad(gg.pow, argnums=0, create_graph=True)
    assert gg.grad(inner, argnums=1)(2.0, 0.0).item() == pytest.approx(0.5, rel=1e-15)


def test_at_the_origin() -> None:
    """Lengths and angles get no gradient where they have no direction."""
    for function in (gg.hypot, gg.atan2):
        a, b = grads(function, [0.0, 3.0], [0.0, 4.0])
        assert a[0] == b[0] == 0.0
        assert np.all(np.isfinite([a, b]))


def test_large_arguments_do_not_overflow() -> None:
    for function in (gg.atan2, gg.hypot):
        for g in grads(function, [1e200], [1e200]):
            assert np.all(np.isfinite(g))
    for function in (gg.atan, gg.asinh, gg.acosh):
        (g,) = grads(function, [1e200])
        assert np.all(np.isfinite(g))


def test_ties_share() -> None:
    for function in (gg.maximum, gg.minimum):
        a, b = grads(function, [1.0, 2.0], [1.0, 2.0])
        np.testing.assert_array_equal(a, [0.5, 0.5])
        np.testing.assert_array_equal(b, [0.5, 0.5])


def test_integer_operands_of_arithmetic_have_no_gradient() -> None:
    x = gg.tensor([1.0, 2.0], requires_grad=True)
    y = x * gg.tensor([3, 4])
    gg.sum(y).backward()
    np.testing.assert_array_equal(host(x.grad), [3.0, 4.0])


def test_relu_of_integers_stays_integer() -> None:
    y = gg.relu(gg.tensor([-1, 2]))
    assert y.dtype == np.int64
    np.testing.assert_array_equal(y.numpy(), [0, 2])
