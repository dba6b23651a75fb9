"""`import gpugrad` is cheap: NumPy and the library itself, nothing that is needed only later."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

LATER = ("array_api_strict", "cupy", "ml_dtypes", "numba", "rich", "safetensors", "torch", "typer")
SECONDS_BEYOND_NUMPY = 0.2

PROBE = f"""
import json, sys, time
import numpy
start = time.process_time()
import gpugrad
seconds = time.process_time() - start
print(json.dumps([seconds, [name for name in {LATER!r} if name in sys.modules]]))
"""


def probe(bytecode: Path) -> tuple[float, list[str]]:
    """Seconds of an import, and what it loaded that is needed only later."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120, check=False,
        env=env | {"PYTHONPYCACHEPREFIX": str(bytecode)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    seconds, loaded = json.loads(run.stdout)
    return seconds, loaded


def test_import_loads_nothing_early(tmp_path) -> None:
    assert probe(tmp_path)[1] == []


def test_import_is_quick(tmp_path) -> None:
    # Seconds of this process alone, because other tests run at the same time.
    probe(tmp_path)  # writes the bytecode
    seconds = [probe(tmp_path)[0] for _ in range(5)]
    assert statistics.median(seconds) < SECONDS_BEYOND_NUMPY, seconds


def test_the_kernels_have_one_name() -> None:
    # From the root of a checkout `import kernels` would find the folder.
    code = "import sys; sys.path.insert(0, sys.argv[1]); import kernels"
    root = __file__.rsplit("tests", 1)[0]
    run = subprocess.run(
        [sys.executable, "-c", code, root], capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "their one name is 'gpugrad.kernels'" in run.stderr
