"""grad, vjp, jvp, hvp, jacobian, hessian: values, nesting, structures, errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.core.modes import gate
from gpugrad.errors import DTypeError, GradientCheckError, GraphError, ShapeError


def test_grad_of_numbers_and_any_order() -> None:
    f = gg.sin
    x = 0.7
    for k in range(6):
        expected = math.sin(x + k * math.pi / 2)
        assert float(f(gg.tensor(x))) == pytest.approx(expected, rel=1e-12)
        f = gg.grad(f)


def test_argnums_structures_and_aux() -> None:
    def f(params: dict[str, Any], x: Any, scale: float) -> Any:
        y = gg.sum(params["w"] * x * scale + params["nested"][0])
        return y, "aux"

    params = {"w": np.array([1.0, 2.0]), "nested": (gg.tensor([3.0, 4.0]), None)}
    gradient, aux = gg.grad(f, has_aux=True)(params, gg.tensor([5.0, 6.0]), 2.0)
    assert aux == "aux"
    np.testing.assert_allclose(gradient["w"].numpy(), [10.0, 12.0])
    np.testing.assert_allclose(gradient["nested"][0].numpy(), [1.0, 1.0])
    value, (gw, gx) = gg.value_and_grad(lambda w, x: gg.sum(w * x), (0, 1))(
        np.array([1.0, 2.0]), np.array([3.0, 4.0])
    )
    assert float(value) == 11.0 and not value.requires_grad
    np.testing.assert_allclose(gw.numpy(), [3.0, 4.0])
    np.testing.assert_allclose(gx.numpy(), [1.0, 2.0])


def test_an_unused_argument_has_a_zero_gradient() -> None:
    g = gg.grad(lambda a, b: gg.sum(a), 1)(gg.tensor([1.0]), gg.tensor([1.0, 2.0]))
    np.testing.assert_array_equal(g.numpy(), [0.0, 0.0])
    g = gg.grad(lambda a: gg.tensor(3.0))(gg.tensor([1.0, 2.0]))
    np.testing.assert_array_equal(g.numpy(), [0.0, 0.0])


def test_inner_derivatives_leave_the_outer_graph_alone() -> None:
    w = gg.tensor([1.0, 2.0], requires_grad=True)
    h = w * w
    inner = gg.grad(lambda z: gg.sum(h * z * z))(gg.tensor([3.0, 4.0]))
    np.testing.assert_allclose(inner.numpy(), [6.0, 32.0])
    assert w.grad is None
    gg.sum(h).backward()  # h was not released by the inner walk
    np.testing.assert_allclose(w.grad.numpy(), [2.0, 4.0])  # type: ignore[union-attr]


def test_gradient_penalty_reaches_the_parameters() -> None:
    w = gg.tensor([1.0, 2.0], requires_grad=True)
    g = gg.grad(lambda x: gg.sum(w * x * x), create_graph=True)(gg.tensor([3.0, 4.0]))
    gg.sum(g * g).backward()  # sum (2 w x)^2
    np.testing.assert_allclose(w.grad.numpy(), [72.0, 256.0])  # type: ignore[union-attr]


def test_perturbations_are_not_confused() -> None:
    # d/dx (x * d/dy (x + y)) = 1, which a confused implementation gives as 2
    def outer(x: Any) -> Any:
        return x * gg.grad(lambda y: x + y)(1.0)

    assert float(gg.grad(outer)(1.0)) == 1.0

    def forward(x: Any) -> Any:
        return x * gg.jvp(lambda y: x + y, (gg.tensor(1.0),), (gg.tensor(1.0),))[1]

    assert float(gg.jvp(forward, (1.0,), (1.0,))[1]) == 1.0
    assert float(gg.grad(forward)(1.0)) == 1.0


def test_an_inner_derivative_with_respect_to_something_else() -> None:
    # d/db of (d/da a^b at 2) = d/db b 2^(b-1) = 2^(b-1) (1 + b log 2)
    expected = 4 * (1 + 3 * math.log(2))
    assert float(gg.grad(lambda b: gg.grad(lambda a: a**b)(2.0))(3.0)) == pytest.approx(expected)
    assert float(gg.grad(gg.grad(gg.pow), 1)(2.0, 3.0)) == pytest.approx(expected)
    inner = gg.jvp(lambda b: gg.grad(lambda a: a**b)(2.0), (3.0,), (1.0,))[1]
    assert float(inner) == pytest.approx(expected)
    pulled = gg.grad(lambda b: gg.vjp(lambda a: a**b, 2.0)[1](1.0)[0])(3.0)
    assert float(pulled) == pytest.approx(expected)


def test_all_four_ways_to_a_second_derivative() -> None:
    def f(x: Any) -> Any:
        return gg.sum(gg.exp(x) * gg.sin(x))

    x = gg.tensor([0.3, -0.7])
    v = gg.tensor([1.0, -2.0])
    expected = 2 * np.exp(x.numpy()) * np.cos(x.numpy()) * v.numpy()
    ways = {
        "reverse over reverse": gg.grad(lambda x: gg.sum(gg.grad(f)(x) * v))(x),
        "forward over reverse": gg.jvp(gg.grad(f), (x,), (v,))[1],
        "reverse over forward": gg.grad(lambda x: gg.jvp(f, (x,), (v,))[1])(x),
        "hvp": gg.hvp(f, x, v),
    }
    for name, got in ways.items():
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, err_msg=name)
    second = gg.jvp(lambda x: gg.jvp(f, (x,), (v,))[1], (x,), (v,))[1]
    np.testing.assert_allclose(float(second), float(np.sum(expected * v.numpy())), rtol=1e-12)
    np.testing.assert_allclose(gg.hessian(f)(x).numpy() @ v.numpy(), expected, rtol=1e-12)


def test_jacobian_both_modes_and_nested() -> None:
    a = np.arange(6.0).reshape(2, 3)

    def f(x: Any) -> Any:
        return gg.tanh(gg.matmul(a, x)) * x[0]

    x = gg.tensor([0.1, 0.2, -0.3])
    reverse, forward = gg.jacobian(f)(x), gg.jacobian(f, mode="forward")(x)
    assert reverse.shape == (2, 3)
    np.testing.assert_allclose(reverse.numpy(), forward.numpy(), rtol=1e-12)
    eps = 1e-6
    for j in range(3):
        step = np.eye(3)[j] * eps
        column = (f(x + step) - f(x - step)).numpy() / (2 * eps)
        np.testing.assert_allclose(reverse.numpy()[:, j], column, rtol=1e-6, atol=1e-9)
    third = gg.jacobian(gg.jacobian(gg.jacobian(lambda x: x * x * x)))(gg.tensor([2.0]))
    assert third.shape == (1, 1, 1, 1) and third.item() == 6.0


def test_vjp_can_be_called_again_and_takes_structures() -> None:
    y, pull = gg.vjp(lambda a, b: {"p": a * b, "s": a + b}, gg.tensor([2.0]), gg.tensor([3.0]))
    assert y["p"].tolist() == [6.0]
    for _ in range(2):
        ga, gb = pull({"p": gg.tensor([1.0]), "s": gg.tensor([10.0])})
        assert ga.tolist() == [13.0] and gb.tolist() == [12.0]
    with pytest.raises(ShapeError, match=r"\(2,\)"):
        pull({"p": gg.tensor([1.0, 2.0]), "s": gg.tensor([10.0])})


def test_errors() -> None:
    with pytest.raises(GraphError, match=r"shape \(2,\).*single number"):
        gg.grad(lambda x: x * x)(gg.tensor([1.0, 2.0]))
    with pytest.raises(DTypeError, match="int64"):
        gg.grad(lambda x: x)(gg.tensor(3))
    with pytest.raises(GraphError, match="argnums=2"):
        gg.grad(lambda x: x, 2)(1.0)
    with pytest.raises(ShapeError, match="tangent"):
        gg.jvp(gg.exp, (gg.tensor([1.0]),), (gg.tensor([1.0, 2.0]),))
    with pytest.raises(GraphError, match="tuples"):
        gg.jvp(gg.exp, gg.tensor([1.0]), gg.tensor([1.0]))
    with pytest.raises(GraphError, match="sideways"):
        gg.jacobian(gg.exp, mode="sideways")


def test_check_grads_finds_a_wrong_rule_in_either_order_and_mode() -> None:
    from gpugrad.core.primitive import registry

    @gg.elementwise(partials=(lambda g, x: g * x * 2.1,))
    def wrong_square(m: Any, x: Any, /) -> Any:
        """x squared, with a derivative that is not its own."""
        return x * x

    @gg.primitive(vjps=(lambda m, g, x: m.detached_double(g, x),))
    def first_order_only(m: Any, x: Any, /) -> Any:
        """x squared, whose gradient forgets that it depends on x."""
        return x * x

    from gpugrad.core.primitive import differentiable

    differentiable.detached_double = lambda g, x: g * x.detach() * 2.0
    gg.backend.SPACES[np.ndarray].detached_double = lambda g, x: g * x * 2.0
    try:
        x = (gg.tensor([1.0, -2.0]),)
        for mode in ("reverse", "forward"):
            with pytest.raises(GradientCheckError, match=mode):
                gg.check_grads(wrong_square, x, modes=[mode])
        gg.check_grads(first_order_only, x, order=1)
        with pytest.raises(GradientCheckError, match="gradient of first_order_only"):
            gg.check_grads(first_order_only, x, order=2)
    finally:
        del registry["wrong_square"], registry["first_order_only"]
        del differentiable.detached_double
    with pytest.raises(DTypeError, match="float32"):
        gg.check_grads(gg.exp, (gg.tensor([1.0], dtype="float32"),))


def test_gradients_of_several_arguments_share_no_memory() -> None:
    for create in (False, True):
        f = gg.grad(lambda a, b: gg.sum((a + b) * 2.0), (0, 1), create_graph=create)
        a, b = f(np.ones(2), np.ones(2))
        a *= 0.0
        assert b.tolist() == [2.0, 2.0]


def test_an_argument_is_named_once() -> None:
    with pytest.raises(GraphError, match="twice"):
        gg.grad(lambda a, b: a * b, (0, -2))(1.0, 2.0)


def test_what_comes_beside_the_value_is_outside_the_graph() -> None:
    w = gg.tensor([1.0, 2.0], requires_grad=True)

    def f(x: Any) -> Any:
        y = x * w
        return gg.sum(y), {"y": y, "note": "as it is"}

    _, aux = gg.grad(f, has_aux=True)(np.array([3.0, 4.0]))
    assert aux["y"].numpy().tolist() == [3.0, 8.0] and aux["note"] == "as it is"
    assert not gg.vjp(f, np.array([3.0, 4.0]), has_aux=True)[2]["y"].requires_grad
    assert gg.grad(f, has_aux=True, create_graph=True)(np.array([3.0, 4.0]))[1]["y"].requires_grad


def test_forward_mode_twice_through_rules_that_are_transposed() -> None:
    x, v = gg.tensor([0.3, -0.7, 1.1]), gg.tensor([1.0, -2.0, 0.5])
    for f in (gg.var, gg.std, gg.prod, gg.logsumexp, lambda x: gg.cumulative_prod(x)[2]):
        twice = gg.jvp(lambda x, f=f: gg.jvp(f, (x,), (v,))[1], (x,), (v,))[1]
        expected = float(gg.sum(gg.hvp(f, x, v) * v))
        assert float(twice) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_jacobian_of_a_constant_and_of_a_structure() -> None:
    for mode in ("reverse", "forward"):
        assert gg.jacobian(lambda x: 3.0, mode=mode)(np.ones(2)).tolist() == [0.0, 0.0]
        with pytest.raises(GraphError, match="returned a tuple"):
            gg.jacobian(lambda x: (x, x), mode=mode)(np.ones(2))
    with pytest.raises(GraphError, match="argnums=1"):
        gg.jacobian(gg.exp, 1)(np.ones(2))


@pytest.mark.parametrize("f", [lambda x: gg.imag((x + 1j) ** 2), lambda x: gg.abs(x * 1j)])
def test_tangents_through_complex_numbers_are_refused(f: Any) -> None:
    with pytest.raises(DTypeError, match="complex128"):
        gg.jvp(f, (np.ones(2),), (np.ones(2),))


def test_an_exception_leaves_nothing_behind() -> None:
    def interrupted(x: Any) -> Any:
        raise KeyboardInterrupt

    for transform in (gg.grad, gg.hessian, lambda f: lambda x: gg.jvp(f, (x,), (x,))):
        with pytest.raises(KeyboardInterrupt), gg.no_grad():
            transform(interrupted)(np.ones(2))
    assert gg.is_grad_enabled() and not gate
    assert not gg.grad(lambda x: gg.sum(x * x))(np.ones(2)).requires_grad
