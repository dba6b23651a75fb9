"""What holds for every test: property tests have no time limit, and missing devices are said so."""

import importlib.util
import os

import hypothesis
import pytest

# The first call of a kernel compiles it, which no per-example deadline should count. On CI the
# examples are the same in every run: a change is judged by what it does, not by luck.
hypothesis.settings.register_profile(
    "gpugrad", deadline=None, derandomize="CI" in os.environ, print_blob=True
)
hypothesis.settings.load_profile("gpugrad")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torch") and not importlib.util.find_spec("torch"):
        pytest.skip("compares with PyTorch, which is not installed")
    if item.get_closest_marker("gpu"):
        from gpugrad.backend import is_usable

        if not is_usable("cuda"):
            pytest.skip("needs a CUDA device and CuPy")
