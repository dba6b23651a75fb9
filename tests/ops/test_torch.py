"""Activations and conventions at kinks against PyTorch: value, gradient and higher orders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpugrad as gg

pytestmark = pytest.mark.torch

#: On every kink, around it, and far out.
POINTS = np.array([-1000.0, -50.0, -6.0, -3.0, -2.5, -1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0, 2.5, 3.0,
                   6.0, 19.0, 21.0, 50.0, 1000.0])  # fmt: skip

ACTIVATIONS: list[tuple[str, dict[str, Any]]] = [
    ("relu", {}),
    ("relu6", {}),
    ("leaky_relu", {}),
    ("leaky_relu", {"negative_slope": 0.3}),
    ("threshold", {"threshold": 0.5, "value": -2.0}),
    ("hardtanh", {}),
    ("hardtanh", {"min_val": -0.5, "max_val": 2.5}),
    ("hardsigmoid", {}),
    ("hardswish", {}),
    ("elu", {}),
    ("elu", {"alpha": 0.7}),
    ("selu", {}),
    ("celu", {}),
    ("celu", {"alpha": 0.7}),
    ("sigmoid", {}),
    ("logsigmoid", {}),
    ("softplus", {}),
    ("softplus", {"beta": 2.0, "threshold": 5.0}),
    ("silu", {}),
    ("mish", {}),
    ("gelu", {}),
    ("gelu", {"approximate": "tanh"}),
    ("softsign", {}),
    ("tanhshrink", {}),
    ("softshrink", {}),
    ("softshrink", {"lambd": 1.0}),
    ("hardshrink", {}),
    ("hardshrink", {"lambd": 1.0}),
    ("tanh", {}),
]


def reference(name: str) -> Any:
    import torch

    return getattr(torch.nn.functional, name)


def derivatives(function: Any, x: Any, order: int) -> list[np.ndarray]:
    """Value and the first derivatives of an element-wise PyTorch function."""
    import torch

    x = torch.tensor(x, requires_grad=True)
    out = [function(x)]
    for _ in range(order):
        if not out[-1].requires_grad:  # PyTorch drops the graph of a constant derivative
            out.append(torch.zeros_like(x))
            continue
        out.append(torch.autograd.grad(out[-1].sum(), x, create_graph=True)[0])
    return [t.detach().numpy(force=True) for t in out]


def our_derivatives(function: Any, x: Any, order: int) -> list[np.ndarray]:
    functions = [function]
    for _ in range(order):
        lower = functions[-1]
        functions.append(gg.grad(lambda x, f=lower: gg.sum(f(x))))
    return [f(gg.tensor(x)).numpy() for f in functions]


#: PyTorch computes the derivatives of these with a coefficient rounded to float32.
ROUNDED = {("hardsigmoid", ()), ("celu", (("alpha", 0.7),))}


@pytest.mark.parametrize(("name", "kwargs"), ACTIVATIONS, ids=str)
def test_activation(name: str, kwargs: dict[str, Any]) -> None:
    """Value and gradient everywhere, kinks included."""
    theirs = derivatives(lambda x: reference(name)(x, **kwargs), POINTS, 1)
    ours = our_derivatives(lambda x: getattr(gg, name)(x, **kwargs), POINTS, 1)
    tolerances = [1e-12, 3e-7 if (name, tuple(kwargs.items())) in ROUNDED else 1e-12]
    for order, tol in enumerate(tolerances):
        np.testing.assert_allclose(
            ours[order], theirs[order], rtol=tol, atol=1e-12, err_msg=f"order {order}"
        )


@pytest.mark.parametrize(("name", "kwargs"), ACTIVATIONS, ids=str)
def test_second_derivative(name: str, kwargs: dict[str, Any]) -> None:
    """Off the kinks, where PyTorch's first and second derivatives take different sides."""
    if name == "hardsigmoid":
        pytest.skip("PyTorch has no second derivative of hardsigmoid")
    x = POINTS[1:-1] + 0.013  # its mish gives NaN far out
    theirs = derivatives(lambda x: reference(name)(x, **kwargs), x, 2)
    ours = our_derivatives(lambda x: getattr(gg, name)(x, **kwargs), x, 2)
    tol = 3e-7 if (name, tuple(kwargs.items())) in ROUNDED else 1e-12
    np.testing.assert_allclose(ours[2], theirs[2], rtol=tol, atol=1e-12)


@pytest.mark.parametrize(("name", "kwargs"), ACTIVATIONS, ids=str)
def test_activation_at_nan(name: str, kwargs: dict[str, Any]) -> None:
    """A NaN comes out as NaN, and what is above it hears of it: its gradient is never cut."""
    x = np.array([np.nan])
    theirs = derivatives(lambda x: reference(name)(x, **kwargs), x, 1)
    ours = our_derivatives(lambda x: getattr(gg, name)(x, **kwargs), x, 1)
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert ours[1][0] != 0.0
    if name != "hardsigmoid":  # the one that PyTorch cuts
        assert theirs[1][0] != 0.0


@pytest.mark.parametrize("name", ["softplus", "logsigmoid", "sigmoid", "silu", "mish", "gelu"])
def test_third_derivative_at_the_seam(name: str) -> None:
    """Pieces put together at zero agree there in every order."""
    x = np.array([-1e-3, 0.0, 1e-3])
    h = 1e-4
    second = lambda x: derivatives(reference(name), x, 2)[2]
    want = (second(x + h) - second(x - h)) / (2 * h)
    got = our_derivatives(getattr(gg, name), x, 3)[3]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_softmax(name: str, axis: int) -> None:
    import torch

    rng = np.random.default_rng(0)
    x, u = rng.standard_normal((2, 3, 4)) * 30, rng.standard_normal((2, 3, 4))
    x[0, 0] += 1000.0
    x[1, 1, 2] = -np.inf
    theirs = torch.tensor(x, requires_grad=True)
    y = getattr(torch.nn.functional, name)(theirs, dim=axis)
    y.backward(torch.tensor(u))
    ours = gg.tensor(x, requires_grad=True)
    z = getattr(gg, name)(ours, axis=axis)
    z.backward(gg.tensor(u))
    np.testing.assert_allclose(z.detach().numpy(), y.detach().numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ours.grad.numpy(), theirs.grad.numpy(), rtol=1e-12, atol=1e-12)


def test_glu() -> None:
    import torch

    x = np.random.default_rng(0).standard_normal((3, 4, 2))
    theirs = torch.tensor(x, requires_grad=True)
    ours = gg.tensor(x, requires_grad=True)
    y = torch.nn.functional.glu(theirs, dim=1)
    z = gg.glu(ours, axis=1)
    y.sum().backward()
    gg.sum(z).backward()
    np.testing.assert_allclose(z.detach().numpy(), y.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(ours.grad.numpy(), theirs.grad.numpy(), rtol=1e-12)


BINARY: list[tuple[str, str, list[float], list[float]]] = [
    ("maximum", "maximum", [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]),
    ("minimum", "minimum", [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]),
    ("pow", "pow", [0.0, 0.0, 0.0, 2.0, 3.0], [0.0, 1.0, 2.0, 0.0, -1.5]),
    ("atan2", "atan2", [1.0, -1.0, 0.0], [0.0, -2.0, 3.0]),
    ("hypot", "hypot", [1.0, -1.0, 0.0], [0.0, -2.0, 3.0]),
    ("copysign", "copysign", [1.0, -1.0, 0.0], [1.0, -2.0, -3.0]),
    ("remainder", "remainder", [7.0, -7.0, 7.0], [3.0, 3.0, -3.0]),
    ("logaddexp", "logaddexp", [1.0, -1.0, 800.0], [1.0, 2.0, 801.0]),
]


@pytest.mark.parametrize(("ours", "theirs", "a", "b"), BINARY, ids=[row[0] for row in BINARY])
def test_binary(ours: str, theirs: str, a: list[float], b: list[float]) -> None:
    import torch

    x, y = (torch.tensor(v, requires_grad=True, dtype=torch.float64) for v in (a, b))
    u, v = (gg.tensor(w, requires_grad=True) for w in (a, b))
    want, got = getattr(torch, theirs)(x, y), getattr(gg, ours)(u, v)
    want.sum().backward()
    gg.sum(got).backward()
    np.testing.assert_allclose(got.detach().numpy(), want.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(u.grad.numpy(), x.grad.numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(v.grad.numpy(), y.grad.numpy(), rtol=1e-12, atol=1e-12)


UNARY = {
    "abs": [-1.0, 0.0, 2.0], "sign": [-1.0, 0.0, 2.0], "floor": [-0.5, 0.0, 1.5],
    "sqrt": [1.0, 4.0], "erf": [-3.0, -1e-9, 0.0, 0.3, 5.0], "round": [0.5, 1.5, 2.2],
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    import torch

    theirs = derivatives(getattr(torch, name), np.array(UNARY[name]), 2)
    ours = our_derivatives(getattr(gg, name), np.array(UNARY[name]), 2)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (None, 1.0), (-1.0, None), (1.0, -1.0)])
@pytest.mark.parametrize("arrays", [False, True])
def test_clip(bounds: Any, arrays: bool) -> None:
    """The gradient passes inside and on the bounds; array bounds take what they replace."""
    import torch

    x = np.array([-2.0, -1.0, 0.5, 1.0, 3.0])
    theirs = torch.tensor(x, requires_grad=True)
    ours = gg.tensor(x, requires_grad=True)
    low, high = bounds
    if arrays:
        low, high = (None if v is None else np.full(5, v) for v in bounds)
        tl, th = (None if v is None else torch.tensor(v, requires_grad=True) for v in (low, high))
        ol, oh = (None if v is None else gg.tensor(v, requires_grad=True) for v in (low, high))
    else:
        tl, th, ol, oh = low, high, low, high
    torch.clamp(theirs, tl, th).sum().backward()
    gg.sum(gg.clip(ours, ol, oh)).backward()
    np.testing.assert_array_equal(ours.grad.numpy(), theirs.grad.numpy())
    if arrays:
        for a, b in ((ol, tl), (oh, th)):
            if a is not None:
                np.testing.assert_array_equal(a.grad.numpy(), b.grad.numpy())
