"""Host memory that is used again: only when nobody can see it any more."""

import gc
import subprocess
import sys
import threading

import numpy as np
import pytest

from gpugrad.backend import backend_for_device, scratch

LARGE = (512, 1024)


@pytest.fixture(autouse=True)
def clean():
    scratch.release()
    yield
    scratch.release()


def place(x):
    return x.__array_interface__["data"][0]


def test_memory_comes_back_when_the_array_and_its_views_are_gone():
    x = scratch.empty(LARGE, "float32")
    where = place(x)
    view = x[3:].T[::2]
    del x
    other = scratch.empty(LARGE, "float32")
    assert place(other) != where
    view[...] = 7.0
    del view
    assert place(scratch.empty(LARGE, "float32")) == where
    del other


def test_another_dtype_of_as_many_bytes_shares():
    x = scratch.empty(LARGE, "float32")
    where = place(x)
    del x
    y = scratch.empty((LARGE[0], LARGE[1] // 2), "float64")
    assert place(y) == where
    assert y.dtype == np.float64
    assert y.flags.writeable
    assert y.flags.c_contiguous


def test_small_arrays_are_ordinary():
    assert scratch.empty((3,), "float32").flags.owndata
    assert scratch.empty((0, 5), "float32").shape == (0, 5)
    assert scratch.empty((), "float64").shape == ()


@pytest.mark.parametrize("nbytes", [1 << 20, (1 << 20) + 1, 3 << 20, 1_500_001, 123_456_789])
def test_size_classes_waste_little(nbytes):
    size = scratch._size_class(nbytes)
    assert nbytes <= size <= nbytes * 1.125 + 4096
    assert size % 4096 == 0


def test_a_whole_array_is_no_view_and_a_part_is():
    numpy = backend_for_device("cpu")
    x = scratch.empty(LARGE, "float32")
    assert not numpy.is_view(x)
    assert numpy.is_view(x[1:])
    assert numpy.storage(x[1:][::2]) is x


def test_idle_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(scratch, "LIMIT", 5 << 20)
    arrays = [scratch.empty((1 << 20,), "uint16") for _ in range(6)]
    del arrays
    gc.collect()
    assert scratch._blocks.bytes <= 5 << 20
    assert sum(size for size, _ in scratch._blocks.idle.values()) == scratch._blocks.bytes
    assert sum(map(len, scratch._blocks.by_size.values())) == len(scratch._blocks.idle)


def test_threads_never_share_a_block():
    wrong = []

    def work(number):
        for _ in range(200):
            x = scratch.empty((1 << 18,), "float32")
            x[::4096] = number
            y = scratch.empty((1 << 18,), "float32")
            y[::4096] = -1
            if not (x[::4096] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system does not fork")
def test_after_a_fork_both_have_their_own():
    code = (
        "import os, warnings\n"
        "from gpugrad.backend import scratch\n"
        "x = scratch.empty((1 << 18,), 'float64'); x[:] = 1.0\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    x[:] = 2.0\n"
        "    del x\n"
        "    y = scratch.empty((1 << 18,), 'float64'); y[:] = 3.0\n"
        "    os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "print(x.min(), x.max())\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["1.0", "1.0"]


def test_at_exit_nothing_is_said():
    code = (
        "from gpugrad.backend import scratch\n"
        "kept = scratch.empty((1 << 20,), 'float32')\n"
        "scratch.empty((1 << 20,), 'float32')\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stderr == ""
