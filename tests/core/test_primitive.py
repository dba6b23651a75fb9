"""Declaring primitives from outside, with the calls the library itself uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.core.primitive import differentiable, registry
from gpugrad.errors import DeclarationError, DeviceError, DTypeError, ShapeError


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    before = set(registry)
    yield
    for name in set(registry) - before:
        del registry[name]
        delattr(differentiable, name)


def test_element_wise_with_broadcasting_and_both_modes() -> None:
    @gg.elementwise(partials=(lambda m, g, x, w: g * w * m.cos(x * w),
                              lambda m, g, x, w: g * x * m.cos(x * w)))  # fmt: skip
    def sin_product(m: Any, x: Any, w: Any, /) -> Any:
        """sin(x w)."""
        return m.sin(x * w)

    x = gg.tensor([[0.3], [0.4]])
    w = gg.tensor([1.0, 2.0, 3.0])
    gg.check_grads(sin_product, (x, w))
    leaf = gg.tensor([[0.3], [0.4]], requires_grad=True)
    gg.sum(sin_product(leaf, w)).backward()
    assert leaf.grad is not None and leaf.grad.shape == (2, 1)


def test_general_with_parameters_and_derived_forward_mode() -> None:
    @gg.primitive(vjps=(lambda m, g, x, power: g * power * x ** (power - 1),))
    def power_sum(m: Any, x: Any, /, *, power: int = 2) -> Any:
        """Sum of powers."""
        return m.sum(x**power)

    gg.check_grads(lambda x: power_sum(x, power=3), (gg.tensor([1.0, 2.0, -1.0]),))


def test_joint_rule_gets_needs_and_aux() -> None:
    seen: list[tuple[bool, ...]] = []

    def rule(m: Any, g: Any, a: Any, b: Any, mask: Any, needs: tuple[bool, ...]) -> Any:
        seen.append(needs)
        zero = m.zeros_like(g)
        return (m.where(mask, g, zero) if needs[0] else None,
                m.where(mask, zero, g) if needs[1] else None)  # fmt: skip

    @gg.primitive(vjp=rule, aux=("mask",))
    def larger(m: Any, a: Any, b: Any, /) -> Any:
        """The larger one."""
        mask = a > b
        return m.where(mask, a, b), mask

    a = gg.tensor([1.0, 5.0], requires_grad=True)
    b = gg.tensor([2.0, 3.0])
    gg.sum(larger(a, b)).backward()
    assert seen == [(True, False)]
    np.testing.assert_array_equal(a.grad.numpy(), [0.0, 1.0])  # type: ignore[union-attr]
    gg.check_grads(larger, (a.detach(), b))


def test_several_outputs() -> None:
    def rule(m: Any, g: Any, x_shape: tuple[int, ...]) -> Any:
        first = g[0] if g[0] is not None else m.zeros_like(g[1])
        second = g[1] if g[1] is not None else m.zeros_like(g[0])
        return (first + second * 2.0,)

    @gg.primitive(vjp=rule, outputs=2)
    def fork(m: Any, x: Any, /) -> Any:
        """x + 1 and 2 x."""
        return x + 1.0, x * 2.0

    x = gg.tensor([1.0, 2.0], requires_grad=True)
    a, b = fork(x)
    gg.sum(a * b).backward()
    np.testing.assert_allclose(x.grad.numpy(), [6.0, 10.0])  # type: ignore[union-attr]
    a, b = fork(x)
    x.grad = None
    gg.sum(b).backward()
    np.testing.assert_allclose(x.grad.numpy(), [2.0, 2.0])  # type: ignore[union-attr]
    gg.check_grads(lambda x: gg.multiply(*fork(x)), (x.detach(),))


def test_variadic() -> None:
    @gg.primitive(vjp=lambda g, arrays: [g for _ in arrays])
    def total(m: Any, *arrays: Any) -> Any:
        """Sum of all."""
        out = arrays[0]
        for x in arrays[1:]:
            out = out + x
        return out

    x, y = gg.tensor([1.0], requires_grad=True), gg.tensor([2.0])
    total(x, y, x).backward()
    assert x.grad is not None and x.grad.item() == 2.0


def test_variadic_with_aux_and_homes() -> None:
    seen: list[Any] = []

    def rule(m: Any, g: Any, arrays: Any, double: Any, arrays_home: Any, needs: Any) -> Any:
        seen.append(arrays_home)
        if seen[-1][0] is not None:
            m.setitem(arrays_home[0], ..., g * double)
        return [(home if home is not None else g * double) if need else None
                for home, need in zip(arrays_home, needs, strict=True)]  # fmt: skip

    @gg.primitive(vjp=rule, aux=("double",))
    def twice(m: Any, *arrays: Any) -> Any:
        """Two times the sum of all."""
        return 2.0 * sum(arrays[1:], arrays[0]), m.asarray(2.0)

    x, y, z = (gg.tensor([v], requires_grad=v < 3) for v in (1.0, 2.0, 3.0))
    optimizer = gg.optim.SGD([x], lr=1.0)
    twice(x, y, z).backward()
    home, *others = seen.pop()
    assert home is x.grad.data and others == [None, None]  # type: ignore[union-attr]
    assert x.grad.item() == y.grad.item() == 2.0  # type: ignore[union-attr]
    assert z.grad is None
    optimizer.zero_grad()
    twice(x, y, z).backward(create_graph=True)
    assert seen.pop() == [None, None, None]  # a gradient that is recorded is a tensor of its own
    gg.check_grads(twice, (x.detach(), y.detach()))


def test_a_node_saves_exactly_what_its_rules_name() -> None:
    x, y = gg.tensor([1.0], requires_grad=True), gg.tensor([2.0], requires_grad=True)
    assert (x + y)._node.saved() == {}
    product = x * y
    saved = product._node.saved()
    assert set(saved) == {"a", "b"} and saved["a"] is x.data and saved["b"] is y.data
    assert set((x * y.detach())._node.saved()) == {"b"}
    tanh = gg.tanh(x)
    assert tanh._node.saved() == {"y": tanh.data}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gg.primitive(vjps=(lambda g, z: g,))(_unary), "names 'z'"),
        (lambda: gg.primitive(vjps=(None, None))(_unary), "2 derivative rules for 1 operands"),
        (lambda: gg.primitive(vjps=(None,), vjp=lambda g: g)(_unary), "not both"),
        (lambda: gg.elementwise(partials=None)(lambda x: x), "first argument of a forward is m"),
        (lambda: gg.elementwise(partials=None)(lambda m: 0), "positional-only"),
        (lambda: gg.primitive(vjps=(None,))(lambda m, x, /, kind=1: x), "kind.*engine's own"),
    ],
)
def test_declarations_that_do_not_hold_together(make: Any, message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        make()


def _unary(m: Any, x: Any, /) -> Any:
    return x


def test_a_rule_of_a_wrong_shape_is_an_error_and_no_wrong_gradient() -> None:
    @gg.primitive(vjps=(lambda g: g[:1],))
    def cut(m: Any, x: Any, /) -> Any:
        """Doubles."""
        return x * 2.0

    x = gg.tensor([1.0, 2.0, 3.0], requires_grad=True)
    with pytest.raises(ShapeError, match=r"(?s)\(1,\).*\(3,\).*backward pass of cut"):
        gg.sum(cut(x)).backward()


def test_errors_name_operation_shapes_and_fix() -> None:
    with pytest.raises(ShapeError, match=r"add: .*a: float64\[2\], b: float64\[3\].*broadcast"):
        gg.tensor([1.0, 2.0]) + gg.tensor([1.0, 2.0, 3.0])
    with pytest.raises(ShapeError, match=r"concatenate.*\[2, 3\].*agree in all others"):
        gg.concat([gg.ones((2, 2)), gg.ones((2, 3))], axis=0)
    with pytest.raises(ShapeError, match=r"reshape.*\[4\].*elements must stay"):
        gg.reshape(gg.ones(4), (3,))
    with pytest.raises(ShapeError, match=r"sum.*\[2, 3\].*are -2 to 1"):
        gg.sum(gg.ones((2, 3)), axis=2)
    with pytest.raises(DTypeError, match=r"bitwise_and.*float64.*\.to\(dtype\)"):
        gg.tensor([1.0]) & gg.tensor([1.0])
    with pytest.raises(DTypeError):
        gg.tensor([1.0]) * "two"
    with pytest.raises(DeviceError, match=r"multiply: .*cpu.*strict:device1.*\.to"):
        gg.tensor([1.0]) * gg.tensor([1.0], device="strict:device1")
    with pytest.raises(DeviceError, match=r"strict:device2.*strict:device1"):
        gg.tensor([1.0], device="strict:device2") * gg.tensor(
            [1.0], device="strict:device1", dtype="float32"
        )


def test_weak_scalars_and_reflected_operators() -> None:
    x = gg.tensor([1.0, 2.0], dtype="float32", requires_grad=True)
    y = 2.0 * x + 1 - x / 2 + 3 / x - (1 - x)
    assert y.dtype == np.float32
    host = np.array([1.0, 2.0], "float32")
    np.testing.assert_allclose(
        y.detach().numpy(), 2 * host + 1 - host / 2 + 3 / host - (1 - host), rtol=1e-6
    )
    gg.sum(y).backward()
    assert x.grad is not None and x.grad.dtype == np.float32
    np.testing.assert_allclose(x.grad.numpy(), 2 - 0.5 - 3 / host**2 + 1, rtol=1e-6)
    assert isinstance(np.array([1.0, 2.0]) * x, gg.Tensor)
    assert isinstance(np.float64(2.0) * x, gg.Tensor)


def test_unary_and_linear_rules_of_others_are_looked_at() -> None:
    def double(m: Any, x: Any, /) -> Any:
        """Twice x."""
        return m.concat([x, x])

    x = gg.tensor([1.0, 2.0], dtype="float32", requires_grad=True)
    for make in (
        lambda: gg.elementwise(partials=(lambda g, m: m.sum(g),))(double),
        lambda: gg.linear(transpose=lambda g: g)(double),
    ):
        with pytest.raises(ShapeError, match=r"(?s)operand of shape \(2,\).*pass of double"):
            gg.sum(make()(x)).backward()

    def same(m: Any, x: Any, /) -> Any:
        """A copy of x."""
        return x * 1

    for rule in (lambda g: None, lambda g: 0.0):
        with pytest.raises(DTypeError, match=r"rule returned (NoneType|float); .*array"):
            gg.sum(gg.elementwise(partials=(rule,))(same)(x)).backward()
    wide = gg.elementwise(partials=(lambda g: g * np.ones(2),))(same)
    gg.sum(wide(x)).backward()
    assert x.grad.dtype == np.float32  # type: ignore[union-attr]
    g = gg.grad(lambda x: gg.sum(gg.sin(wide(x))), create_graph=True)(x)
    assert g.dtype == np.float32


def test_names_that_generated_code_uses() -> None:
    # As a name of the operation any will do; not so for its arguments.
    @gg.elementwise(partials=(lambda g, x: g * 2 * x,))
    def lift(m: Any, x: Any, /) -> Any:
        """x squared."""
        return x * x

    assert lift([1.0, 2.0]).tolist() == [1.0, 4.0] == lift(gg.tensor([1.0, 2.0])).tolist()
    for forward in (
        lambda m, u0, /: u0,
        lambda m, x, /, p1=2: x,
        lambda m, x, /, complex=False: x,
        lambda m, *xs, arrays=None: xs[0],
    ):
        with pytest.raises(DeclarationError, match="the engine's own"):
            gg.elementwise(partials=None)(forward)

    def dressed(m: Any, body: Any, body_shape: Any, /) -> Any:
        return body

    with pytest.raises(DeclarationError, match=r"'body_shape'.*shape of 'body'"):
        gg.elementwise(partials=None)(dressed)

    def plain(m: Any, x: Any, /) -> Any:
        return x

    plain.__name__ = "lambda_"
    for forward in (lambda m, x, /: x, plain):
        with pytest.raises(DeclarationError, match=r"lambda.*def with a name"):
            gg.elementwise(partials=None)(forward)


def test_an_operand_whose_name_ends_like_a_facet_is_differentiated() -> None:
    @gg.elementwise(partials=(lambda g, body_shape: g * 2 * body_shape,))
    def squared(m: Any, body_shape: Any, /) -> Any:
        """x squared."""
        return body_shape * body_shape

    gg.check_grads(squared, (np.array([1.0, -2.0]),))


def test_the_librarys_names_are_taken_and_ones_own_can_be_given_again() -> None:
    for name in ("sin", "clip", "device"):

        def mine(m: Any, x: Any, /) -> Any:
            """x."""
            return x

        mine.__name__ = name
        with pytest.raises(DeclarationError, match=f"{name}: gpugrad has an operation"):
            gg.elementwise(partials=(lambda g: g,))(mine)
    for factor in (2.0, 3.0):

        def scaled(m: Any, x: Any, /, factor: float = factor) -> Any:
            """x times a factor."""
            return x * factor

        gg.linear(transpose=lambda g, m: m.scaled(g))(scaled)
        x = gg.tensor([1.0], requires_grad=True)
        differentiable.scaled(x).backward()
        assert x.grad.tolist() == [factor]  # type: ignore[union-attr]


def test_several_results_in_a_rule_of_higher_order() -> None:
    def rule(m: Any, g: Any, y: Any) -> Any:
        return (sum(part * y[0] for part in g if part is not None),)

    @gg.primitive(vjp=rule, outputs=2)
    def twins(m: Any, x: Any, /) -> Any:
        """exp(x), twice."""
        return m.exp(x), m.exp(x)

    for k in (0, 1):
        gg.check_grads(lambda x, k=k: twins(x)[k], (np.array([0.3, 0.5]),))


@pytest.mark.parametrize(
    ("operand", "message"),
    [
        ("two", "multiply: str is not"),
        (np.array([1, None]), "multiply: object is not a numeric"),
        (np.array(["a", "b"]), "multiply: <U1 is not a numeric"),
        ([[1.0], [1.0, 2.0]], "multiply: cannot make an array of list"),
        ([gg.tensor(1.0)], "multiply: a list of tensors"),
    ],
)
def test_operands_that_are_no_numbers(operand: Any, message: str) -> None:
    x = gg.tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(DTypeError, match=message):
        x * operand
    with pytest.raises(DTypeError, match=message):
        gg.multiply(operand, x)


@pytest.mark.parametrize(("answer", "got"), [(lambda g: g, "ndarray"), (lambda g: (g,), "1")])
def test_a_joint_rule_returns_one_gradient_per_operand(answer: Any, got: str) -> None:
    @gg.primitive(vjp=lambda g: answer(g))
    def pair(m: Any, a: Any, b: Any, /) -> Any:
        """a + b."""
        return a + b

    x = gg.tensor(np.ones((2, 3)), requires_grad=True)
    with pytest.raises(DeclarationError, match=f"pair: .* returned {got}, and not 2"):
        gg.sum(pair(x, x)).backward()
