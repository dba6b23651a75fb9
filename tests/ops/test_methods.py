import ast
import inspect
import operator

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.core import tensor as tensor_module
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ShapeError
from gpugrad.ops import methods


def declared() -> set[str]:
    """The names that core/tensor.py promises to type checkers and leaves to the operations."""
    tree = ast.parse(inspect.getsource(tensor_module))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Tensor").body
    block = next(n for n in body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))
    return {n.name for n in block.body if isinstance(n, ast.FunctionDef)}


def test_what_is_declared_exists_and_nothing_else_is_put_there(monkeypatch) -> None:
    class Bare:
        __slots__ = ()

    before = set(vars(Bare))
    monkeypatch.setattr(methods, "Tensor", Bare)
    methods.attach()
    assert set(vars(Bare)) - before == declared()
    assert declared() <= set(vars(Tensor))


def test_an_operator_is_the_operation_itself() -> None:
    assert Tensor.__mul__ is gg.multiply
    assert Tensor.__add__ is gg.add
    assert Tensor.__matmul__ is gg.matmul
    assert Tensor.sum is gg.sum


X, Y = np.array([[7, -3], [2, 5]]), np.array([[2, 3], [1, -4]])


ARITHMETIC = ["add", "sub", "mul", "truediv", "floordiv", "mod", "and_", "or_", "xor"]
COMPARISONS = ["lt", "le", "gt", "ge", "eq", "ne"]


@pytest.mark.parametrize("name", [*ARITHMETIC, "matmul", *COMPARISONS])
def test_binary_operators(name: str) -> None:
    op = getattr(operator, name)
    for left, right in [(gg.tensor(X), gg.tensor(Y)), (gg.tensor(X), Y), (X, gg.tensor(Y))]:
        out = op(left, right)
        assert isinstance(out, Tensor)
        np.testing.assert_array_equal(out.numpy(), op(X, Y))


@pytest.mark.parametrize("name", [*ARITHMETIC, "pow", *COMPARISONS])
def test_operators_with_python_numbers(name: str) -> None:
    op, a = getattr(operator, name), abs(Y)
    np.testing.assert_array_equal(op(3, gg.tensor(a)).numpy(), op(3, a))
    np.testing.assert_array_equal(op(gg.tensor(a), 3).numpy(), op(a, 3))


def test_shifts_and_unary_operators() -> None:
    x = gg.tensor(X)
    for mine, numpys in [(x << 2, X << 2), (x >> 1, X >> 1), (-x, -X), (+x, +X), (abs(x), abs(X)),
                         (~x, ~X)]:  # fmt: skip
        np.testing.assert_array_equal(mine.numpy(), numpys)


def test_a_tensor_is_not_none_and_no_string() -> None:
    x = gg.tensor([1.0, 2.0])
    assert not operator.eq(x, None)
    assert operator.ne(x, None)
    assert not operator.eq(x, "x")
    assert x in {x}


def test_gradients_through_reflected_operators() -> None:
    x = gg.tensor([0.5, 2.0])
    gg.check_grads(lambda x: (2.0 - x) / (1.0 + x) + 3.0**x + np.eye(2) @ x, (x,))


def test_reshape_takes_numbers_or_a_tuple() -> None:
    x = gg.arange(6)
    for y in (x.reshape(2, 3), x.reshape((2, 3)), x.reshape([2, -1]), x.reshape(-1, 3)):
        np.testing.assert_array_equal(y.numpy(), np.arange(6).reshape(2, 3))
    assert x.reshape(-1).shape == x.reshape((6,)).shape == (6,)
    assert gg.tensor(5.0).reshape(()).shape == gg.tensor([5.0]).reshape().shape == ()


def test_transposes_are_numpys() -> None:
    a = np.arange(24).reshape(2, 3, 4)
    x = gg.tensor(a)
    for mine, numpys in [
        (x.T, a.T), (x.mT, a.mT), (x.transpose(), a.T),
        (x.transpose(2, 0, 1), a.transpose(2, 0, 1)),
        (x.transpose((1, 0, 2)), a.transpose((1, 0, 2))), (x.transpose(None), a.T),
    ]:  # fmt: skip
        np.testing.assert_array_equal(mine.numpy(), numpys)
    with pytest.raises(ShapeError, match="name every axis once"):
        x.transpose(0, 1)


def test_methods_are_numpys() -> None:
    a = np.random.default_rng(0).standard_normal((3, 1, 4))
    x = gg.tensor(a)
    for name, kw in [
        ("sum", {"axis": 0}), ("mean", {"axis": (0, 2)}), ("var", {"axis": -1}), ("std", {}),
        ("max", {"axis": 2, "keepdims": True}), ("min", {}), ("prod", {"axis": 0}),
        ("any", {"axis": 1}), ("all", {}), ("argmax", {"axis": 2}), ("argmin", {}),
        ("squeeze", {"axis": 1}), ("flatten", {}),
    ]:  # fmt: skip
        np.testing.assert_allclose(getattr(x, name)(**kw).numpy(), getattr(a, name)(**kw))
    np.testing.assert_array_equal(x.clip(-0.5, 0.5).numpy(), a.clip(-0.5, 0.5))
    np.testing.assert_array_equal(x.clip(max=0.5).numpy(), a.clip(max=0.5))
    np.testing.assert_array_equal(x.take([0, 2], axis=0).numpy(), a.take([0, 2], axis=0))
    np.testing.assert_array_equal(x[:, 0].dot(x[0, 0]).numpy(), a[:, 0].dot(a[0, 0]))
    assert x.astype("float32").dtype == np.float32


def test_a_clone_is_apart_and_connected() -> None:
    x = gg.tensor([1.0, 2.0], requires_grad=True)
    y = x.clone()
    assert not np.shares_memory(x.data, y.data)
    y += 1.0
    y.sum().backward()
    np.testing.assert_array_equal(x.detach().numpy(), [1.0, 2.0])
    np.testing.assert_array_equal(x.grad.numpy(), [1.0, 1.0])


def test_iteration_and_unpacking_keep_the_graph() -> None:
    x = gg.tensor([1.0, 2.0, 3.0], requires_grad=True)
    a, b, c = x
    (a * b * c).backward()
    np.testing.assert_array_equal(x.grad.numpy(), [6.0, 3.0, 2.0])


def test_powers_of_unsigned_exponents() -> None:
    x = gg.tensor([3.0, 3.0, 0.0], requires_grad=True)
    gg.sum(x ** np.array([0, 2, 1], dtype="uint64")).backward()
    assert x.grad.tolist() == [0.0, 6.0, 1.0]  # type: ignore[union-attr]
