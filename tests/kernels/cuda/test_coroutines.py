"""The kernels' logic in Python, for every storage; and the machine that runs them."""

from __future__ import annotations

import numpy as np
import pytest

from gpugrad.kernels.cuda import launch, norm_launch, softmax
from gpugrad.kernels.cuda.elementwise import map_of
from gpugrad.kernels.cuda.language import Int, Values, cuda, kernel, shuffle
from gpugrad.kernels.template import T
from tests.kernels.cuda import (
    checks,
    moments_checks,
    norm_checks,
    optimizer_checks,
    rows,
    softmax_checks,
)
from tests.kernels.cuda.checks import DTYPES
from tests.kernels.cuda.coroutines import QuickGpu


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Two blocks of a warp."""
    # What is short for a warp is a matter of speed alone; here a row of 80 is long.
    monkeypatch.setattr(softmax, "SHORT", 40)
    monkeypatch.setattr(norm_launch, "SHORT", 40)
    gpu = QuickGpu()
    monkeypatch.setitem(launch.STAND_INS, np.ndarray, gpu)
    return gpu


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("name", ["gelu", "tanh_partial", "geglu_gate_partial"])
def test_maps(name, storage):
    checks.check_map(name, storage, count=37)
    checks.check_map(name, storage, count=9, shift=1)


@pytest.mark.parametrize(
    ("activation", "storage", "shape"),
    [
        ("relu", "float32", (5, 13)),
        ("tanh", "float64", (70, 8)),
        ("mish", "bfloat16", (9, 16)),
        ("gelu", "float16", (4, 9)),
        ("gelu", "float32", (0, 3)),
    ],
)
def test_bias_and_activation(activation, storage, shape):
    checks.check_bias(activation, storage, shape=shape)


@pytest.mark.parametrize("storage", ["float32", "float64"])
def test_sums_over_rows(storage):
    for shape in ((5, 13), (2, 40, 33), (0, 3), (3, 0), (7,), (512, 1)):
        checks.check_rows(storage, shape=shape, shift=1)


@pytest.mark.parametrize("storage", DTYPES)
def test_summary(storage):
    checks.check_summary(storage, 0)
    checks.check_summary(storage, 700)
    checks.check_summary_counts(storage, count=70)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax(name, storage):
    softmax_checks.check_softmax(name, storage)
    softmax_checks.check_softmax(name, storage, shape=(3, 48))
    softmax_checks.check_softmax(name, storage, shape=(2, 5, 3), axis=1)


@pytest.mark.parametrize("storage", DTYPES)
def test_cross_entropy(storage):
    smooth = {"label_smoothing": 0.2}
    softmax_checks.check_loss(storage)
    softmax_checks.check_loss(storage, shape=(3, 48), reduction="none", weighted=True, **smooth)
    softmax_checks.check_loss(storage, shape=(2, 5, 3), reduction="sum", **smooth)


@pytest.mark.parametrize("storage", DTYPES)
def test_normalization(storage):
    norm_checks.check_norm("layer", storage, residual=True)
    norm_checks.check_norm("rms", storage, shape=(3, 48))
    norm_checks.check_norm("group", storage, shape=(2, 4, 5), groups=2)
    norm_checks.check_batch(storage, shape=(2, 3, 16))


@pytest.mark.parametrize("storage", DTYPES)
def test_dropout(storage):
    rows.check_dropout(storage)
    rows.check_dropout(storage, count=600, shift=1)
    rows.check_after_product("gelu", storage, (5, 13))
    rows.check_after_product("gelu", storage, (9, 16))


@pytest.mark.parametrize("storage", DTYPES)
def test_embedding(storage):
    rows.check_embedding(storage)
    rows.check_embedding(storage, shape=(70,), rows=5, columns=16, padding_row=4, by_frequency=True)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("variant", optimizer_checks.FULL, ids=str)
def test_every_update_rule(variant, storage):
    optimizer_checks.check_step(variant, storage, steps=1)


@pytest.mark.parametrize("storage", DTYPES)
def test_steps(storage, machine):
    for size in (0, 1, 7, 300, 1001):
        optimizer_checks.check_step(optimizer_checks.LION, storage, size=size, steps=1)
    optimizer_checks.check_step(optimizer_checks.ADAMW, storage, size=301, shift=1, steps=1)
    optimizer_checks.check_infinity(storage)
    optimizer_checks.check_zeros(storage)
    optimizer_checks.check_range(storage, finite_only=True, values=slice(3))
    machine.threads = 64
    optimizer_checks.check_step(optimizer_checks.ADAMW, storage, size=1100, steps=1)


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "zero"])
def test_trouble(nonfinite):
    optimizer_checks.check_trouble(optimizer_checks.ADAMW, "float32", nonfinite)


@pytest.mark.parametrize("storage", DTYPES)
def test_moments(storage):
    moments_checks.check_parts(storage)
    moments_checks.check_range(storage)
    moments_checks.check_digits(storage)


# -- the machine ----------------------------------------------------------------------------------


def test_wrong_types_and_indices_are_seen(machine):
    x = np.ones(8, np.float32)
    entry = map_of("relu")["float32"]
    with pytest.raises(IndexError):
        machine.run(entry, (1,), x, x.copy(), 0.0, 0.0, 9, 0)
    with pytest.raises(TypeError, match="float64 where float32"):
        machine.run(entry, (1,), x.astype("float64"), x, 0.0, 0.0, 8, 0)


@kernel
def exchange_kernel(out: Values, waits: Int) -> None:
    """Warps that meet as often as they like, and then all together."""
    share = cuda.shared.array(64, T)
    here = cuda.threadIdx.x
    x = T(here)
    if here >= 32:
        x = shuffle(x, 1)
    share[here] = shuffle(x, 2)
    if waits != 0 or here >= 40:
        cuda.syncthreads()
    out[here] = share[63 - here]


def test_threads_wait_for_their_warp_and_for_their_block(machine):
    machine.threads = 64
    out = np.empty(64, np.float32)
    machine.run(exchange_kernel["float32"], (1,), out, 1)
    here = 63 - np.arange(64)
    assert out.tolist() == np.where(here < 32, here ^ 2, here ^ 3).tolist()
    # Without the barrier the first warp reads what the second has not written yet.
    machine.run(exchange_kernel["float32"], (1,), out, 0)
    assert out.tolist() != np.where(here < 32, here ^ 2, here ^ 3).tolist()


@kernel
def lonely_kernel(out: Values) -> None:
    x = T(cuda.threadIdx.x)
    if cuda.threadIdx.x < 5:
        x = shuffle(x, 1)
    else:
        cuda.syncthreads()
    out[cuda.threadIdx.x] = x


def test_waiting_for_ever_is_an_error(machine):
    with pytest.raises(AssertionError, match="never come"):
        machine.run(lonely_kernel["float32"], (1,), np.empty(32, np.float32))
