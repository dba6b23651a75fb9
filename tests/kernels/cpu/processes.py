"""Fresh processes: settings of threads are made once in a process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

#: Variables that would decide something here.
THREADS = ("GPUGRAD_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS",
           "OPENBLAS_DEFAULT_NUM_THREADS", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER",
           "NUMBA_THREADING_LAYER_PRIORITY")  # fmt: skip


def python(code, timeout=300, **variables):
    """What a program prints, run with these variables and no other word about threads."""
    env = {k: v for k, v in os.environ.items() if k not in THREADS}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    env |= variables
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    assert not done.stderr, done.stderr
    return done.stdout
