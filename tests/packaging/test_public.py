"""What a user sees under gpugrad: every name is listed, documented, and stays what it is."""

import inspect
import subprocess
import sys
from typing import Any

import pytest

import gpugrad

NAMES = sorted(
    name
    for name, value in vars(gpugrad).items()
    if not name.startswith("_") and not inspect.ismodule(value)
)


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_documented(name: str) -> None:
    value: Any = getattr(gpugrad, name)
    if inspect.isroutine(value) or inspect.isclass(value):
        assert (inspect.getdoc(value) or "").strip(), f"gpugrad.{name} has no docstring"


def test_public_names_are_listed() -> None:
    listed = gpugrad.__all__
    assert len(listed) == len(set(listed)), "listed twice"
    assert [name for name in listed if not hasattr(gpugrad, name)] == []
    assert sorted(set(NAMES) - set(listed)) == [], "not in __all__"


def test_no_folder_takes_a_public_name() -> None:
    # Importing gpugrad.x for the first time sets gpugrad.x, whatever it was before.
    code = f"""
import importlib, pkgutil
import gpugrad
before = {{name: getattr(gpugrad, name) for name in {NAMES!r}}}
for found in pkgutil.iter_modules(gpugrad.__path__, "gpugrad."):
    importlib.import_module(found.name)
print([name for name in before if getattr(gpugrad, name) is not before[name]])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]", "these names became modules"
