"""The formulas stay within what every target has: arrays, tensors, and one scalar at a time."""

from __future__ import annotations

import ast
import inspect
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpugrad.backend import backend_for_device
from gpugrad.ops import formulas

#: What a formula may ask of its namespace: a compiler's scalar functions offer no more.
VOCABULARY = {"exp", "expm1", "log", "log1p", "tanh", "erf", "abs", "where", "maximum", "minimum"}

#: The namespace as a module of scalar functions: what a compiled loop calls for each element.
scalar = SimpleNamespace(
    exp=math.exp, expm1=math.expm1, log=math.log, log1p=math.log1p, tanh=math.tanh, erf=math.erf,
    abs=abs, where=lambda condition, a, b: a if condition else b, maximum=max, minimum=min,
)  # fmt: skip

SOURCE = ast.parse(Path(inspect.getfile(formulas)).read_text())
PUBLIC = [
    node.name for node in SOURCE.body
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
]  # fmt: skip
POINTS = np.array([-1000.0, -30.0, -2.5, -0.5, -1e-9, 0.0, 1e-9, 0.5, 2.5, 30.0, 1000.0])


def arguments(name: str, x: Any) -> list[Any]:
    """Arguments for a formula, all operands at ``x`` and parameters at 0.75."""
    parameters = list(inspect.signature(getattr(formulas, name)).parameters.values())[1:]
    operands = {"g": 1.5, "x": x, "y": x, "gate": x, "value": x}
    operands |= {"target": 0 * x + 0.75, "variance": 0 * x + 0.75}
    return [operands.get(p.name, 0.75) for p in parameters
            if p.name in operands or p.default is p.empty]  # fmt: skip


def within(name: str, x: Any) -> Any:
    """Those numbers that a formula is for: probabilities, of which the least has a square."""
    return np.clip(x, 1e-3, 0.999) if name.startswith("binary_cross_entropy") else x


def test_imports_nothing() -> None:
    imports = [n for n in ast.walk(SOURCE) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert {getattr(n, "module", None) for n in imports} == {"__future__", "typing"}


def test_vocabulary() -> None:
    asked = {
        node.attr for node in ast.walk(SOURCE)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }  # fmt: skip
    assert asked == VOCABULARY


@pytest.mark.parametrize("name", PUBLIC)
def test_scalars(name: str) -> None:
    """One number at a time gives what arrays give."""
    formula = getattr(formulas, name)
    m = backend_for_device("cpu")
    points = within(name, POINTS)
    rows = formula(m, *(
        np.full_like(points, a) if isinstance(a, float) and i == 0 and name.endswith("partial")
        else a
        for i, a in enumerate(arguments(name, points))
    ))  # fmt: skip
    ones = [formula(scalar, *arguments(name, float(x))) for x in points]
    np.testing.assert_allclose(rows, np.array(ones), rtol=1e-14, atol=1e-300)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", PUBLIC)
def test_narrow_dtypes(name: str, dtype: str) -> None:
    """Python constants are weak: a formula keeps the dtype, and nothing overflows on the way."""
    x = within(name, POINTS).astype(dtype)
    squares = ("relu_squared", "swiglu", "geglu", "squared_error", "gaussian_nll",
               "huber", "smooth_l1")  # fmt: skip
    if name.startswith(squares):
        x = np.clip(x, -100.0, 100.0)  # products of two operands
    if "y" in inspect.signature(getattr(formulas, name)).parameters:
        x = np.clip(x, -1.0, 1.0)  # a result, not an operand
    args = arguments(name, x)
    if name.endswith("partial"):
        args[0] = np.full_like(x, 1.5)
    y = getattr(formulas, name)(backend_for_device("cpu"), *args)
    assert y.dtype == dtype
    assert np.all(np.isfinite(y))
