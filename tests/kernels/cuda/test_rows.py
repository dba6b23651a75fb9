"""Dropout and embedding on the GPU, without one: their PTX run in Python."""

from __future__ import annotations

import numpy as np
import pytest

from gpugrad.backend.random import ROUNDS, philox_round, stream
from gpugrad.kernels.cuda import assembly, dropout, embedding, launch
from gpugrad.kernels.cuda.build import entries
from tests.kernels.cuda import offline, rows
from tests.kernels.cuda.checks import DTYPES
from tests.kernels.cuda.fake_gpu import FakeArray
from tests.kernels.cuda.ptx_machine import PtxGpu
from tests.kernels.cuda.ptx_machine import launch as launch_text
from tests.kernels.cuda.test_ptx import Far


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    gpu = PtxGpu()
    monkeypatch.setitem(launch.STAND_INS, np.ndarray, gpu)
    return gpu


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 3, 8, 37])
@pytest.mark.parametrize("shift", [0, 1])
def test_dropout(storage, count, shift):
    rows.check_dropout(storage, count, shift)


@pytest.mark.parametrize("p", [0.0, 2.0**-32, 0.999, 1.0])
def test_any_share_is_dropped(p):
    rows.check_dropout("float32", 70, p=p)


def test_strides_over_more_than_a_grid():
    rows.check_dropout("float32", 32 * 2 * 4 * 2 + 5)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("activation", dropout.BEFORE_DROPOUT)
def test_after_a_product(activation, storage):
    rows.check_after_product(activation, storage, shape=(3, 16))


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (7, 6), (70, 3), (4, 40), (3, 140)])
def test_every_shape_has_the_mask_of_dropout(storage, shape):
    rows.check_after_product("relu", storage, shape=shape)


def test_nothing_to_compute():
    for shape in ((0, 5), (3, 0)):
        rows.check_after_product("relu", "float32", shape=shape)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_ends_after_a_product(p):
    rows.check_after_product("gelu_tanh", "bfloat16", p=p)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_what_may_be_left_out(bias, adds):
    rows.check_after_product("silu", "float32", bias=bias, adds=adds, shift=1)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("options", [{}, {"padding_row": 2}, {"by_frequency": True}])
def test_embedding(storage, options):
    rows.check_embedding(storage, **options)


@pytest.mark.parametrize(
    ("shape", "rows_", "columns"),
    [((), 3, 4), ((0,), 3, 4), ((5,), 3, 0), ((60,), 1, 5), ((9,), 70, 3), ((3,), 2, 300)],
)
def test_embedding_of_any_shape(shape, rows_, columns):
    rows.check_embedding("float32", shape, rows_, columns)


@pytest.mark.parametrize("kind", ["int32", "uint8"])
def test_narrow_indices(kind):
    rows.check_embedding("float32", kind=kind)


def test_indices_outside():
    rows.check_outside()


def test_more_elements_than_31_bits_can_count():
    count = 2**33 + 2**20 + 3  # of blocks of words there are more than 31 bits can count, too
    x, y = Far(4 * count), Far(4 * count)
    y.address = x.address + (1 << 40)
    last = range(count - 3, count)
    for i in last:
        x[4 * i : 4 * i + 4] = np.float32(3).tobytes()
    blocks = -(-count // (32 * 4))
    text = dropout.dropout_kernel["float32"].shipped()
    arguments = (x, y, np.float32(2), *dropout._numbers(0.5, 7, 9)[1:], count, 1)
    launch_text(text, (blocks,), 32, arguments, only=[(blocks - 1,)])
    state = ((count - 1) // 4 & 0xFFFFFFFF, (count - 1) // 4 >> 32, *stream(7, 9))
    for _ in range(ROUNDS):
        state = philox_round(*state)
    want = [6.0 if word >= 1 << 31 else 0.0 for word in state[:3]]
    assert [np.frombuffer(y[4 * i : 4 * i + 4], np.float32)[0] for i in last] == want
    assert len(set(want)) == 2
    assert min(y.bytes) > 2**35


# -- the text -------------------------------------------------------------------------------------

#: Arrays that each kernel reads and writes in accesses of 16 bytes.
WIDE_ACCESSES = {
    "dropout_kernel": (1, 1), "after_forward": (3, 1), "after_backward": (3, 1), "gather": (1, 1),
}  # fmt: skip


@pytest.mark.parametrize("family", ["dropout", "embedding"])
def test_memory_is_accessed_in_16_bytes(family):
    text = (launch.SHIPPED / f"{family}.ptx").read_text(encoding="utf-8")
    seen = set()
    for name, entry in entries(family).items():
        for prefix in WIDE_ACCESSES:
            if name.startswith(prefix):
                found = offline.accesses(assembly.section(text, name), entry.storage)
                assert found == WIDE_ACCESSES[prefix], name
                seen.add(prefix)
    assert seen == {p for p in WIDE_ACCESSES if (p == "gather") == (family == "embedding")}


def test_refusals_say_why():
    x, short = FakeArray((2, 3), "float32"), FakeArray((2,), "float32")
    forward = dropout.KERNELS["bias_activation_dropout"].refuse
    assert forward(None, x) is None
    assert forward(None, x, None, x, "gelu") is None
    assert "no kernel for mish" in forward(None, x, None, None, "mish")
    assert "a bias of shape (2,)" in forward(None, x, short)
    assert "broadcast" in forward(None, x, None, short)
    assert "float16" in forward(None, x, FakeArray((3,), "float16"))
    backward = dropout.KERNELS["bias_activation_dropout_backward"].refuse
    assert backward(None, x, x, None, "relu", 0.5) is None
    assert "broadcast" in backward(None, short, x, None, "relu", 0.5)
    assert "int32" in dropout.KERNELS["dropout"].refuse(None, FakeArray(3, "int32"))
    refuse = embedding.KERNELS["embedding"].refuse
    assert refuse(None, FakeArray(3, "int64"), x) is None
    assert "integers" in refuse(None, FakeArray(3, "float32"), x)
    assert "two axes" in refuse(None, FakeArray(3, "int64"), short)
