"""Formulas spelled out: the text computes what the formula computes."""

import inspect
import math
from itertools import pairwise

import numpy as np
import pytest

from gpugrad.backend import backend_for_device
from gpugrad.errors import DeclarationError
from gpugrad.kernels.trace import CALLS, formula_text, scalar_function
from gpugrad.ops import formulas

NUMPY = backend_for_device("cpu")
NAMES = [
    name for name, f in vars(formulas).items() if inspect.isfunction(f) and not name.startswith("_")
]


def run(text, name, *args):
    """The text, run over NumPy scalars in double precision."""
    scope = {"T": np.float64, **{v: getattr(NUMPY, k) for k, v in CALLS.items()}}
    exec(text, scope)
    return scope[name](*args)


@pytest.mark.parametrize("name", NAMES)
def test_every_formula_of_the_library(name):
    formula = getattr(formulas, name)
    count = len(inspect.signature(formula).parameters) - 1
    for x in (-30.0, -1.3, -0.0, 0.0, 0.4, 2.5, 50.0):
        args = [np.float64(x + 0.37 * i) for i in range(count)]
        with np.errstate(invalid="ignore"):  # logarithms of what is below zero
            want = formula(NUMPY, *args)
            got = run(formula_text(formula, "f"), "f", *args)
        assert np.array_equal(got, want, equal_nan=True), (name, x)


def test_what_is_computed_twice_is_written_once():
    text = formula_text(lambda m, x: m.exp(x) * m.exp(x) + m.exp(x), "f")
    assert text.count("exp(") == 1


def test_constants_have_the_type_of_the_arithmetic():
    for name in NAMES:
        text = formula_text(getattr(formulas, name), name)
        for token in text.replace("(", " ( ").replace(")", " ) ").replace(",", " ").split("\n"):
            words = token.split()
            for before, word in pairwise(words):
                if word[0].isdigit() or (word[0] == "-" and word[1:2].isdigit()):
                    assert before == "(", f"{name}: a bare constant {word} in {token}"


def test_arguments_fixed_and_padded():
    def scaled(m, x, slope, flag):
        return m.where(x > 0, x, slope * x) if flag else x

    text = formula_text(scaled, "f", arguments=["x", "slope", "unused"], fixed={"flag": True})
    assert text.startswith("def f(x, slope, unused):")
    assert run(text, "f", -2.0, 0.25, 0.0) == -0.5
    assert "where" not in formula_text(scaled, "f", fixed={"flag": False})
    with pytest.raises(DeclarationError, match="f: its formula also takes slope"):
        formula_text(scaled, "f", arguments=["x"], fixed={"flag": True})


def test_several_results():
    text = formula_text(lambda m, a, b: (a + b, a * b), "f")
    assert run(text, "f", 2.0, 3.0) == (5.0, 6.0)


def test_operators():
    def all_of_them(m, a, b):
        both = (a < b) & (a <= b) | (a > b) | ~(a >= b) & (a != b) | (a == b)
        return m.where(both, 1 - a, 1 / a) + -b * (2 - b)

    for a, b in ((1.0, 2.0), (2.0, 1.0), (2.0, 2.0)):
        assert run(formula_text(all_of_them, "f"), "f", a, b) == 1 - a + -b * (2 - b)


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (lambda m, x: x if x > 0 else 0.0, "must not branch"),
        (lambda m, x: m.sin(x), r"m\.sin cannot be compiled; a formula may call exp, "),
        (lambda m, x: x + "1", "not of str"),
        (lambda m, x: x + np.ones(3), "not of ndarray"),
    ],
)
def test_what_cannot_be_spelled_out(formula, message):
    with pytest.raises(DeclarationError, match=message):
        formula_text(formula, "f")


def test_the_text_can_be_read():
    made = scalar_function(formulas.gelu_tanh, "gelu_tanh_for_reading")
    assert "tanh(" in inspect.getsource(made.function)


def test_infinite_constants():
    assert run(formula_text(lambda m, x: m.minimum(x, math.inf), "f"), "f", 3.0) == 3.0
