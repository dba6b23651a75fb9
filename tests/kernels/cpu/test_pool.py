"""One pool of threads: what is decided, whose choices stay, and that threads and forks work."""

import ctypes
import importlib.metadata
import json
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from types import SimpleNamespace

import numba
import numpy as np
import pytest

from gpugrad.errors import ParameterError
from gpugrad.kernels.cpu import openblas, pool
from tests.kernels.cpu.processes import python

LIMIT = numba.config.NUMBA_NUM_THREADS
BLAS = openblas.find()

needs_threads = pytest.mark.skipif(LIMIT < 2, reason="one processor")
needs_blas = pytest.mark.skipif(isinstance(BLAS, str), reason=f"{BLAS}")
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="fork is safe on Linux only")

SHOW = """
import json
from dataclasses import asdict
from gpugrad.kernels.cpu import pool
print(json.dumps(asdict(pool.describe())))
"""


def described(before="", **variables):
    return json.loads(python(before + SHOW, **variables))


def lacks(layer):
    """Why a threading layer cannot be had here."""
    if layer == "tbb" and not list(distributions(name="tbb")):
        return "the package tbb is not installed"
    if layer == "omp" and find_spec("numba.np.ufunc.omppool") is None:
        return "Numba has no OpenMP layer here"
    return None


@pytest.fixture(params=["tbb", "omp", "workqueue"])
def layer(request):
    if lacks(request.param):
        pytest.skip(lacks(request.param))
    return request.param


# -- decisions ------------------------------------------------------------------------------------


@needs_blas
def test_one_pool_by_default():
    found = described()
    assert found["threads"] == min(LIMIT, pool._quota() or LIMIT)
    assert found["blas_threads"] == 1
    assert found["blas"].startswith("OpenBLAS 0.")
    assert set(found["reasons"]) == {"threads", "layer", "blas", "memory"}


@pytest.mark.skipif(lacks("tbb") is not None, reason=f"{lacks('tbb')}")
@pytest.mark.parametrize("wanted", ["default", "tbb", "safe"])
def test_the_layer_of_the_package_tbb_is_found(wanted):
    found = described(NUMBA_THREADING_LAYER=wanted)
    assert found["layer"] == "tbb"
    assert found["reasons"]["layer"].startswith("tbb, from ")


@needs_blas
@needs_threads
def test_the_switch_counts_for_more_than_other_variables():
    others = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    found = described(GPUGRAD_THREADS="2", **others)
    assert (found["threads"], found["blas_threads"]) == (2, 1)
    found = described(GPUGRAD_THREADS="1", **others)
    assert (found["threads"], found["blas_threads"]) == (1, 1)
    assert found["reasons"]["threads"] == "GPUGRAD_THREADS=1"


def test_no_more_threads_than_numba_has():
    found = described(GPUGRAD_THREADS="1000", NUMBA_NUM_THREADS="3")
    assert found["threads"] == 3
    assert "NUMBA_NUM_THREADS" in found["reasons"]["threads"]


@needs_blas
@needs_threads
def test_host_leaves_everything_alone():
    alone = "import numba; numba.config.THREADING_LAYER = 'workqueue'; numba.set_num_threads(1)\n"
    found = described(alone, GPUGRAD_THREADS="host")
    assert (found["threads"], found["layer"]) == (1, "workqueue")
    assert found["blas_threads"] == BLAS.default_threads > 1
    assert all(text for text in found["reasons"].values())


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_switch_without_meaning_is_an_error(text, monkeypatch):
    monkeypatch.setenv("GPUGRAD_THREADS", text)
    with pytest.raises(ParameterError, match=f"GPUGRAD_THREADS={text}: it must be a number of"):
        pool._wish()


@needs_blas
@needs_threads
@pytest.mark.parametrize("name", openblas.VARIABLES)
def test_a_number_of_blas_threads_from_outside_stays(name):
    found = described(**{name: "2"})
    assert found["blas_threads"] == 2
    assert f"{name}=2" in found["reasons"]["blas"]


@needs_blas
@needs_threads
def test_a_program_that_set_its_blas_keeps_it(monkeypatch):
    for name in openblas.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    state = SimpleNamespace(threads=3)

    def put(n):
        state.threads = n

    blas = openblas.OpenBlas(
        0, 0, 0, 64, "OpenBLAS 1.2.3 Any MAX_THREADS=16", lambda: state.threads, put, lambda: 32
    )
    monkeypatch.setattr(openblas, "find", lambda: blas)
    assert "the program, which set it to 3" in pool._choose_blas(None)
    assert state.threads == 3
    state.threads = 16  # the most that this build can do, though there are 32 processors
    assert "one thread" in pool._choose_blas(None)
    assert state.threads == 1
    assert blas.name == "OpenBLAS 1.2.3 Any"


@needs_threads
def test_a_choice_of_numba_threads_stays():
    found = described("import numba; numba.set_num_threads(1)\n")
    assert found["threads"] == 1
    assert "numba.set_num_threads(1)" in found["reasons"]["threads"]
    assert described(NUMBA_NUM_THREADS="3")["threads"] == 3
    found = described(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="3")
    assert (found["threads"], found["reasons"]["threads"]) == (1, "OMP_NUM_THREADS=1")


def test_a_layer_that_runs_or_was_chosen_stays():
    running = """
import numba
numba.config.THREADING_LAYER = "workqueue"
numba.get_num_threads()
numba.config.THREADING_LAYER = "default"
"""
    found = described(running)
    assert found["layer"] == "workqueue"
    assert found["reasons"]["layer"] == "workqueue was running before the kernels were loaded"
    found = described(NUMBA_THREADING_LAYER="workqueue")
    assert (found["layer"], found["reasons"]["layer"]) == (
        "workqueue",
        "Numba is set to 'workqueue'",
    )
    found = described(NUMBA_THREADING_LAYER_PRIORITY="workqueue tbb omp")
    assert found["layer"] == "workqueue"
    assert found["reasons"]["layer"] == "Numba is set to prefer workqueue to tbb to omp"


def test_without_the_package_tbb(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    assert pool._load_tbb() == "the package tbb is not installed; Numba's first choice without it"
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    assert "holds no " in pool._load_tbb()


# -- the share of a control group -----------------------------------------------------------------


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("group", "files", "share"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, None),
        ("0::/a/b", {"a/b/cpu.max": "350000 100000"}, 3),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/of/the/host", {"cpu.max": "400000 100000"}, 4),
        (
            "3:cpu,cpuacct:/x",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "250000",
             "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            2,
        ),
        (
            "3:cpu:/x",
            {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("3:memory:/x", {"memory/x/cpu.max": "100000 100000"}, None),
    ],
)  # fmt: skip
def test_quota(tmp_path, group, files, share):
    for name, text in files.items():
        write(tmp_path / "fs" / name, text + "\n")
    write(tmp_path / "own", group + "\n")
    write(tmp_path / "cpu.max", "100000 100000")  # outside of all groups
    assert pool._quota(tmp_path / "fs", tmp_path / "own") == share


def test_quota_where_there_are_no_groups(tmp_path):
    assert pool._quota(tmp_path, tmp_path / "none") is None


def test_the_quota_limits_the_pool(monkeypatch):
    for name in ("GPUGRAD_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(numba, "get_num_threads", lambda: 8)
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 8)
    monkeypatch.setattr(pool, "_quota", lambda: 5)
    n, reason = pool._count(None)
    assert (n, reason) == (5, "the processor time that the control group may use")


# -- the number, from inside ----------------------------------------------------------------------


@pytest.fixture
def number():
    before = pool.get_num_threads()
    yield
    pool.set_num_threads(before)


def _mask(out):
    out[0] = numba.get_num_threads()
    for i in numba.prange(out.size):
        out[i] += 1


MASK = pool.Launch(numba.njit(parallel=True)(_mask), numba.njit(_mask))


@needs_threads
def test_a_launch_uses_the_number_and_leaves_numbas_own(number):
    pool.set_num_threads(2)
    for own in (2, 1):
        numba.set_num_threads(own)
        try:
            out = np.zeros(1)
            MASK(out)
            assert out[0] == own + 1  # what a program has lowered is not raised
            assert numba.get_num_threads() == own
        finally:
            numba.set_num_threads(LIMIT)
    pool.set_num_threads(1)
    assert pool.get_num_threads() == 1
    numba.set_num_threads(2)
    try:
        MASK(np.zeros(3))
        assert numba.get_num_threads() == 2
    finally:
        numba.set_num_threads(LIMIT)
    assert pool.describe().reasons["threads"] == "set_num_threads(1)"


def test_fewer_threads_than_numba_has():
    code = """
import numba, numpy as np
from gpugrad.kernels.cpu import pool
def mask(out):
    out[0] = numba.get_num_threads()
    for i in numba.prange(out.size):
        out[i] += 1
kernel = pool.Launch(numba.njit(parallel=True)(mask), numba.njit(mask))
out = np.zeros(5)
kernel(out)
print(pool.get_num_threads(), int(out[0]), out[4], numba.get_num_threads())
"""
    assert python(code, NUMBA_NUM_THREADS="3", GPUGRAD_THREADS="2").split() == [
        "2",
        "3",
        "1.0",
        "3",
    ]


@pytest.mark.parametrize("n", [0, -1, 1.0, True, LIMIT + 1, "2"])
def test_numbers_that_cannot_be(n):
    with pytest.raises(ParameterError, match=f"must be a whole number from 1 to {LIMIT}"):
        pool.set_num_threads(n)


# -- threads, forks, loops in loops ---------------------------------------------------------------

WORK = """
import sys, threading
import numpy as np
from gpugrad.kernels.cpu import pool, products
rng = np.random.default_rng(0)
a, b = rng.standard_normal((2, 160, 160), dtype=np.float32)
many = rng.standard_normal((40, 60, 60), dtype=np.float32)
def work():
    return products.matmul(a, b), products.matmul(many, many)
def good(results):
    x, y = results
    return np.allclose(x, a @ b, atol=1e-3) and np.allclose(y, many @ many, atol=1e-3)
"""


def test_two_python_threads_at_once(layer):
    code = WORK + """
results = []
def run():
    for _ in range(50):
        results.append(good(work()))
threads = [threading.Thread(target=run) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
print(pool.describe().layer, len(results), all(results))
"""  # fmt: skip
    found = python(code, NUMBA_THREADING_LAYER=layer)
    assert found.split() == [layer, "200", "True"]


@needs_fork
def test_a_fork_computes_on(layer):
    code = WORK + """
import multiprocessing, warnings
warnings.simplefilter("ignore")  # Python 3.12 warns of every fork in a process with threads
context = multiprocessing.get_context("fork")
assert good(work())
def child(queue):
    queue.put((good(work()), good(work()), pool.get_num_threads()))
queue = context.Queue()
for _ in range(3):
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(*queue.get(timeout=60))
    process.join()
    assert process.exitcode == 0, process.exitcode
print(good(work()), pool.get_num_threads())
"""  # fmt: skip
    found = python(code, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2").splitlines()
    there = 1 if layer == "omp" else 2
    assert found == [f"True True {there}"] * 3 + ["True 2"]


@needs_fork
def test_a_fork_before_any_kernel():
    code = (
        WORK
        + """
import os
pid = os.fork()
fine = good(work())
if pid == 0:
    os._exit(0 if fine else 1)
print(fine, os.waitpid(pid, 0)[1])
"""
    )
    assert python(code).split() == ["True", "0"]


def test_loops_in_loops(layer):
    code = (
        WORK
        + """
import numba
def double(x):
    for i in numba.prange(x.size):
        x[i] *= 2
inner = pool.Launch(numba.njit(parallel=True)(double), numba.njit(double))
@numba.njit
def one(x):
    inner(x)
@numba.njit(parallel=True)
def outer(x):
    for i in numba.prange(x.shape[0]):
        one(x[i])
pool.start()
x = np.ones((64, 33))
outer(x)
print(pool.describe().layer, (x == 2).all())
"""
    )
    assert python(code, NUMBA_THREADING_LAYER=layer).split() == [layer, "True"]


def test_a_kernel_called_back_from_a_parallel_loop(layer):
    code = (
        WORK
        + """
import numba
pool.start()
out = np.zeros((8, 160, 160), np.float32)
def back(i):
    products.matmul(a, b, out[i])
def outer(n):
    for i in numba.prange(n):
        with numba.objmode():
            back(i)
kernel = pool.Launch(numba.njit(parallel=True)(outer), numba.njit(outer))
kernel(8)
print(pool.describe().layer, np.allclose(out, a @ b, atol=1e-3))
"""
    )
    assert python(code, NUMBA_THREADING_LAYER=layer).split() == [layer, "True"]


def test_a_launch_looks_like_what_it_launches():
    assert MASK.py_func is _mask
    with pytest.raises(AttributeError):
        _ = MASK.__wrapped__


# -- OpenBLAS -------------------------------------------------------------------------------------


@needs_blas
@pytest.mark.parametrize("prefix", ["scipy_", ""])
@pytest.mark.parametrize(("suffix", "width"), [("64_", 64), ("", 32)])
def test_names_that_openblas_goes_by(monkeypatch, prefix, suffix, width):
    kind = ctypes.CFUNCTYPE(ctypes.c_int)
    stems = ("cblas_sgemm", "cblas_dgemm", "openblas_get_num_threads", "openblas_set_num_threads",
             "openblas_get_num_procs")  # fmt: skip
    functions = {f"{prefix}{stem}{suffix}": kind(lambda: 5) for stem in stems}
    functions[f"{prefix}openblas_get_config{suffix}"] = _config
    monkeypatch.setattr(openblas, "_libraries", lambda: [SimpleNamespace(**functions)])
    found = openblas.find.__wrapped__()
    assert found.width == width
    assert found.threads == 5
    assert (
        found.sgemm == ctypes.cast(functions[f"{prefix}cblas_sgemm{suffix}"], ctypes.c_void_p).value
    )
    assert found.name == "OpenBLAS 0.3.99 Core"


def _config():
    return b"OpenBLAS 0.3.99.1 DYNAMIC_ARCH Core MAX_THREADS=8"


def test_another_blas(monkeypatch):
    monkeypatch.setattr(openblas, "_libraries", lambda: [SimpleNamespace(cblas_sgemm=None)])
    found = openblas.find.__wrapped__()
    assert found == "NumPy computes with another library than OpenBLAS"
    monkeypatch.setattr(openblas, "find", lambda: found)
    assert pool._choose_blas(None) == f"{found}; products are NumPy's own"
    assert pool.describe().blas_threads is None
