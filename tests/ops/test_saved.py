"""What nodes keep for the backward pass: what their rule names, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpugrad as gg

A = np.array([[0.3, 0.5, 0.7], [0.2, 0.4, 0.6]])
B = np.array([[1.5, 2.5, 3.5], [1.2, 2.2, 3.2]])

#: Operation → the names saved when its first operand wants a gradient, its second, or both.
BINARY: dict[str, tuple[set[str], set[str], set[str]]] = {
    "add": (set(), set(), set()),
    "subtract": (set(), set(), set()),
    "multiply": ({"b"}, {"a"}, {"a", "b"}),
    "divide": ({"b"}, {"b", "y"}, {"b", "y"}),
    "floor_divide": (set(), set(), set()),
    "remainder": (set(), {"a", "b"}, {"a", "b"}),
    "pow": ({"a", "b"}, {"a", "y"}, {"a", "b", "y"}),
    "hypot": ({"a", "y"}, {"b", "y"}, {"a", "b", "y"}),
    "copysign": ({"a", "y"}, set(), {"a", "y"}),
    "minimum": ({"a", "b"}, {"a", "b"}, {"a", "b"}),
    "maximum": ({"a", "b"}, {"a", "b"}, {"a", "b"}),
    "logaddexp": ({"a", "y"}, {"b", "y"}, {"a", "b", "y"}),
    "atan2": ({"a", "b"}, {"a", "b"}, {"a", "b"}),
    "swiglu": ({"gate", "value"}, {"gate"}, {"gate", "value"}),
    "geglu": ({"gate", "value"}, {"gate"}, {"gate", "value"}),
}

#: What is saved → operations of one operand that save it.
UNARY = {
    "": "negative positive sign floor ceil round trunc",
    "y": "sqrt reciprocal exp expm1 tan tanh sigmoid relu softmax log_softmax",
    "x": "abs square log log1p log2 log10 erf sin cos asin acos atan sinh cosh asinh atanh "
         "relu6 relu_squared leaky_relu hardtanh hardsigmoid hardswish elu selu celu logsigmoid "
         "softplus silu mish gelu softsign tanhshrink softshrink hardshrink",
}  # fmt: skip


def saved(y: gg.Tensor) -> dict[str, Any]:
    return dict(y.grad_fn.saved())


@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str) -> None:
    function = getattr(gg, name)
    for (p, q), names in zip([(1, 0), (0, 1), (1, 1)], BINARY[name], strict=True):
        a, b = gg.tensor(A, requires_grad=bool(p)), gg.tensor(B, requires_grad=bool(q))
        assert set(saved(function(a, b))) == names, f"gradient wanted by {(p, q)}"


@pytest.mark.parametrize(
    ("name", "kept"), [(name, kept) for kept, names in UNARY.items() for name in names.split()]
)
def test_unary(name: str, kept: str) -> None:
    y = getattr(gg, name)(gg.tensor(A, requires_grad=True))
    assert "".join(saved(y)) == kept


def test_nothing_is_copied() -> None:
    """A node holds the operand's and the result's own arrays."""
    a, b = gg.tensor(A, requires_grad=True), gg.tensor(B, requires_grad=True)
    kept = saved(a * b)
    assert kept["a"] is a.data
    assert kept["b"] is b.data
    y = gg.tanh(a)
    assert saved(y)["y"] is y.data


def test_where_and_clip_save_what_decides() -> None:
    a, b = gg.tensor(A, requires_grad=True), gg.tensor(B, requires_grad=True)
    assert set(saved(gg.where(a > 0.4, a, b))) == {"condition"}
    assert set(saved(gg.clip(a, 0.3, 0.5))) == {"x", "min", "max"}
    assert saved(gg.clip(a, None, 0.5))["min"] is None


def test_a_python_number_is_saved_as_it_is() -> None:
    a = gg.tensor(A, requires_grad=True)
    assert saved(a * 2.0) == {"b": 2.0}
    assert saved(a + 2.0) == {}
