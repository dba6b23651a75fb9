"""Every public name says what it is."""

import inspect
from typing import Any

import pytest

import gpugrad


@pytest.mark.parametrize("name", sorted(gpugrad.__all__))
def test_public_name_is_documented(name: str) -> None:
    value: Any = getattr(gpugrad, name)
    if inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value):
        assert (inspect.getdoc(value) or "").strip(), f"gpugrad.{name} has no docstring"


def test_public_names_are_listed_once() -> None:
    assert len(gpugrad.__all__) == len(set(gpugrad.__all__))
