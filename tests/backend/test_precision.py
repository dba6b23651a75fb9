"""The switch for products that are less exact."""

import subprocess
import sys

import pytest

import gpugrad as gg
from gpugrad.errors import ParameterError


def test_what_was_set_is_told():
    assert gg.get_float32_matmul_precision() == "highest"
    try:
        gg.set_float32_matmul_precision("high")
        assert gg.get_float32_matmul_precision() == "high"
    finally:
        gg.set_float32_matmul_precision("highest")
    with pytest.raises(ParameterError, match="'fast' is none of highest, high, medium"):
        gg.set_float32_matmul_precision("fast")


@pytest.mark.parametrize("before", [True, False], ids=["set before CuPy is loaded", "and after"])
def test_cupy_multiplies_as_it_was_told(before):
    pytest.importorskip("cupy", reason="CuPy is not installed")
    lines = ["gg.set_float32_matmul_precision('high')", "space = make()"]
    program = "\n".join((
        "import numpy as np, gpugrad as gg",
        "from gpugrad.backend import register_backend",
        "def make():",
        "    from gpugrad.backend.cupy import CupyBackend",
        "    return register_backend(CupyBackend())",
        "from cupy._core import _routines_linalg as products",
        # CuPy asks the GPU whether it can.
        "def told(dtype, kind): print(np.dtype(dtype).name, products.compute_type_to_str(kind))",
        "products.set_compute_type = told",
        *(lines if before else lines[::-1]),
        "gg.set_float32_matmul_precision('highest')",
    ))  # fmt: skip
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line]
    assert [line.split()[0] for line in lines] == ["float32", "float32"], run.stderr
    assert "TF32" in lines[0]
    assert "FP32" in lines[1] or "32F" in lines[1]
