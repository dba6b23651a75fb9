"""The PTX that ships, run in Python: it computes what it should, for every kernel and storage."""

from __future__ import annotations

import numpy as np
import pytest

from gpugrad.kernels.cuda import bias, elementwise, launch, reduce
from gpugrad.kernels.formula import APPROXIMATE, PLAIN, approximated
from tests.kernels.cuda import checks
from tests.kernels.cuda.checks import DTYPES
from tests.kernels.cuda.ptx_machine import PtxGpu
from tests.kernels.cuda.ptx_machine import launch as launch_text

MAPS = sorted({*PLAIN, *(one for n in APPROXIMATE for one in approximated(n).values())})


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    gpu = PtxGpu()
    monkeypatch.setitem(launch.STAND_INS, np.ndarray, gpu)
    return gpu


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("name", MAPS)
def test_maps(name, storage):
    checks.check_map(name, storage)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 7, 16, 300])
@pytest.mark.parametrize("shift", [0, 1])
def test_maps_of_any_size_and_alignment(storage, count, shift):
    checks.check_map("silu_partial", storage, count=count, shift=shift)


def test_numbers_reach_the_formula():
    checks.check_map("softplus", "float32", numbers=(2.0, 1.0))
    checks.check_map("hardtanh_partial", "float64", numbers=(-0.25, 2))


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("activation", bias.BIASED)
def test_bias_and_activation(activation, storage):
    checks.check_bias(activation, storage, shape=(3, 8))


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (70, 3), (4, 40), (0, 5), (3, 140)])
def test_bias_of_any_shape(storage, shape):
    checks.check_bias("gelu_tanh", storage, shape=shape)


def test_bias_of_any_alignment():
    checks.check_bias("silu", "float32", shape=(3, 8), shift=1)
    checks.check_bias("silu", "bfloat16", shape=(3, 8), shift=3)


def test_bias_counts():
    checks.check_bias_counts()


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 5, 700])
@pytest.mark.parametrize("shift", [0, 1])
def test_summary(storage, count, shift):
    checks.check_summary(storage, count, shift=shift)


@pytest.mark.parametrize("storage", DTYPES)
def test_summary_counts(storage):
    checks.check_summary_counts(storage, count=70)


def test_half_norm():
    checks.check_half_norm()


def test_results_are_the_same_bit_for_bit(machine):
    x = checks.inputs("float32", 900, 5)
    first = reduce.launch_summary(x)
    for _ in range(2):
        again = reduce.launch_summary(x.copy())
        assert [a.tobytes() for a in first] == [a.tobytes() for a in again]


def test_several_warps_in_a_block(machine):
    machine.threads = 128
    checks.check_summary("float32", 1000)
    checks.check_summary("bfloat16", 1000)
    checks.check_bias("tanh", "float32", shape=(9, 12))


# -- faults ---------------------------------------------------------------------------------------


class Far:
    """A huge array of which only a few elements are ever touched."""

    address = 1 << 44

    def __init__(self, size):
        self.size = size
        self.bytes: dict[int, int] = {}

    def __len__(self):
        return self.size

    def __getitem__(self, part):
        return bytes(self.bytes.get(i, 0) for i in range(part.start, part.stop))

    def __setitem__(self, part, value):
        self.bytes.update(zip(range(part.start, part.stop), value))


def test_more_elements_than_31_bits_can_count():
    count = 2**31 + 2**20 + 3
    x, y = Far(4 * count), Far(4 * count)
    y.address = x.address + (1 << 40)
    last = 4 * (count - 1)
    x[last : last + 4] = np.float32(-3).tobytes()
    blocks = -(-count // (32 * 4))
    text = elementwise.map_of("relu_squared_partial")["float32"].shipped()
    g = Far(4 * count)
    g.address = y.address + (1 << 40)
    g[last : last + 4] = np.float32(2).tobytes()
    x[last : last + 4] = np.float32(5).tobytes()
    arguments = (g, x, y, np.float32(0), np.float32(0), count, 1)
    launch_text(text, (blocks,), 32, arguments, only=[(blocks - 1,)])
    assert np.frombuffer(y[last : last + 4], np.float32) == [20]
    assert min(y.bytes) > 2**33


def test_the_machine_sees_what_a_gpu_would_trip_over(machine):
    text = elementwise.map_of("relu")["float32"].shipped()
    x, y = np.ones(16, np.float32), np.ones(16, np.float32)
    with pytest.raises(AssertionError, match="outside"):
        launch_text(text, (1,), 32, (x, y, 0.0, 0.0, 17, 1))
    with pytest.raises(AssertionError, match="not aligned"):
        launch_text(text, (1,), 32, (x[1:], y[1:], 0.0, 0.0, 15, 1))
    with pytest.raises(AssertionError, match="some threads wait"):
        launch_text(UNMET, (1,), 32, ())


#: Five threads wait at a barrier for others that have left.
UNMET = """\
.visible .entry unmet(
)
{
	mov.u32 %r1, %tid.x;
	setp.lt.s32 %p1, %r1, 5;
	@%p1 bar.sync 0;
	ret;
}
"""
