"""One text, many instances: placeholders and templates are replaced, everything else stays."""

from typing import Any

import pytest

from gpugrad.errors import DeclarationError
from gpugrad.kernels import template
from gpugrad.kernels.template import I, Placeholder, T, device, exp, read

inner: Any = Placeholder("inner")
FIVE = 5


@device
def plus_five(x):
    return x + T(FIVE)


@device
def twice(x):
    return [inner(y) for y in (x, x)]


@device
def by_name(a):
    return read(a, I(0)), exp(T(0))


class Words:
    """A target that compiles nothing and says what it was asked for."""

    name = "words"

    def placeholder(self, name, storage):
        if name == "T":
            return float if storage == "float64" else (lambda x: f"{storage}:{x}")
        return lambda *args: (name, storage)

    def compile(self, function, role, storage):
        function.role = role
        return function


def test_placeholders_and_globals():
    made = plus_five.instance(Words(), "float64")
    assert made(1.0) == 6.0
    assert made.role == "device"
    assert made.__name__ == "plus_five_float64"


def test_an_instance_is_made_once():
    target = Words()
    assert plus_five.instance(target, "float64") is plus_five.instance(target, "float64")
    assert plus_five.instance(target, "float64") is not plus_five.instance(target, "float32")


def test_templates_inside_are_instances_of_the_same_dtype():
    bound = twice.bind(inner=plus_five)
    assert bound.instance(Words(), "float64")(1.0) == [6.0, 6.0]
    assert bound.name == "twice_plus_five"
    assert twice.bind(inner=plus_five) is bound


def test_a_name_in_a_nested_scope_is_replaced_too():
    # The comprehension above is a code object of its own in some versions of Python.
    assert "inner" in set(template._names(twice.function.__code__))


def test_scalar_functions_are_of_the_arithmetic_type():
    scope = by_name.instance(Words(), "float16").__globals__
    assert scope["read"]() == ("read", "float16")
    # exp is a text of kernels/scalars.py, and never touches memory.
    assert scope["exp"].__name__.endswith("_float32")


def test_unknown_storage():
    with pytest.raises(DeclarationError, match="plus_five: no kernels for int8; there are for"):
        plus_five.instance(Words(), "int8")


def test_a_closure_is_refused():
    factor = 3

    with pytest.raises(DeclarationError, match=r"not variables of a function around it \(factor\)"):

        @device
        def scaled(x):
            return x * factor


def test_a_placeholder_outside_of_an_instance_says_so():
    with pytest.raises(DeclarationError, match="exp stands for a function of the target"):
        exp(1.0)
