"""Softmax and cross-entropy on the GPU, and without one: PTX run in Python."""

from __future__ import annotations

import numpy as np
import pytest

from gpugrad.kernels.cuda import assembly, cross_entropy, launch, softmax
from gpugrad.kernels.cuda.build import entries
from tests.kernels.cuda import offline
from tests.kernels.cuda import softmax_checks as checks
from tests.kernels.cuda.checks import DTYPES
from tests.kernels.cuda.fake_gpu import FakeArray
from tests.kernels.cuda.ptx_machine import PtxGpu

NAMES = ("softmax", "log_softmax")


@pytest.fixture(autouse=True)
def machine(request, monkeypatch):
    if request.node.get_closest_marker("gpu"):
        return None
    # What is short for a warp is a matter of speed alone; here a row of 80 is long.
    monkeypatch.setattr(softmax, "SHORT", 40)
    gpu = PtxGpu()
    monkeypatch.setitem(launch.STAND_INS, np.ndarray, gpu)
    return gpu


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((5, 13), -1), ((3, 16), 1), ((1, 91), 1), ((70, 3), 1), ((2, 7, 5), 1), ((4, 3), 0),
        ((9,), 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_softmax(name, shape, axis, storage):
    checks.check_softmax(name, storage, shape=shape, axis=axis)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_any_alignment(name, storage):
    checks.check_softmax(name, storage, shape=(3, 16), shift=1)
    checks.check_softmax(name, storage, shape=(2, 88), shift=3)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_masks_infinities_and_nan(name, storage):
    checks.check_special(name, storage)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_compute(name):
    for shape in ((0, 5), (3, 0), (2, 0, 3)):
        checks.check_softmax(name, "float32", shape=shape, axis=1)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("shape", [(5, 13), (9, 16), (3, 90), (2, 7, 5)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2, "weighted": True, "reduction": "none"},
        {"label_smoothing": 0.2, "reduction": "sum"},
        {"weighted": True, "ignore_index": 2},
    ],
)
def test_cross_entropy(options, shape, storage):
    checks.check_loss(storage, shape=shape, **options)


def test_losses_of_any_alignment():
    checks.check_loss("float32", shape=(3, 16), shift=1)
    checks.check_loss("bfloat16", shape=(2, 88), shift=3, label_smoothing=0.1)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32"])
def test_narrow_targets(kind):
    checks.check_loss("float32", kind=kind, ignore_index=3)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_of_masks_infinities_and_nan(smoothing):
    checks.check_special_losses(label_smoothing=smoothing)


def test_a_target_that_is_no_class_does_no_harm():
    checks.check_no_class()


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0)])
def test_no_rows(shape):
    checks.check_loss("float32", shape=shape)


def test_rows_of_a_transposed_view_are_rows():
    x = checks.random("float32", (3, 5, 20), 0)
    run = softmax.KERNELS["softmax"].run
    want = run(checks.numpy, x)
    got = run(checks.numpy, x.transpose(0, 2, 1), axis=1)
    assert np.array_equal(got.transpose(0, 2, 1), want)


def test_several_warps_in_a_block(machine):
    machine.threads = 128
    checks.check_softmax("softmax", "float32", shape=(2, 700))
    checks.check_softmax("log_softmax", "bfloat16", shape=(9, 16))
    checks.check_loss("float32", shape=(3, 700), label_smoothing=0.1)
    checks.check_loss("float16", shape=(9, 16))


def test_results_are_the_same_bit_for_bit(machine):
    machine.threads = 64
    x, target = checks.random("float32", (40, 90), 0), np.arange(40)
    run = cross_entropy.KERNELS["class_cross_entropy"].run
    first = [a.tobytes() for a in run(checks.numpy, x, target)]
    for _ in range(2):
        assert [a.tobytes() for a in run(checks.numpy, x.copy(), target)] == first


# -- the text -------------------------------------------------------------------------------------

#: Accesses of 16 bytes in each kernel over rows: loads and stores. The first pass forward, unlike
#: the others, loads no pack that is not whole.
WIDE_ACCESSES = {
    "softmax_warp": (2, 1), "softmax_block": (2, 1), "log_softmax_warp": (2, 1),
    "softmax_backward_warp": (4, 1), "log_softmax_backward_block": (4, 1),
    "class_loss_warp": (1, 0), "class_loss_block": (1, 0), "gradient_rows": (1, 2),
}  # fmt: skip


@pytest.mark.parametrize("family", ["softmax", "cross_entropy"])
def test_memory_is_accessed_in_16_bytes(family):
    text = (launch.SHIPPED / f"{family}.ptx").read_text(encoding="utf-8")
    seen = set()
    for name, entry in entries(family).items():
        loads, stores = offline.accesses(assembly.section(text, name), entry.storage)
        for prefix, (fewest_loads, fewest_stores) in WIDE_ACCESSES.items():
            if name.startswith(prefix):
                # A compiler may unroll a loop.
                assert loads >= fewest_loads and stores >= fewest_stores, name
                seen.add(prefix)
    assert len(seen) == (5 if family == "softmax" else 3)


def test_refusals_say_why():
    x, target = FakeArray((4, 3), "float32"), FakeArray((4,), "int64")
    for name in NAMES:
        refuse = softmax.KERNELS[name].refuse
        assert refuse(None, x) is None
        assert "axis (0, 1) of 2" in refuse(None, x, axis=(0, 1))
        assert "axis 2 of 2" in refuse(None, x, axis=2)
        assert "no kernel for int32" in refuse(None, FakeArray((4, 3), "int32"))
        back = softmax.KERNELS[f"{name}_backward"].refuse
        assert back(None, x, x, -1) is None
        assert "broadcast" in back(None, x, FakeArray((3,), "float32"), -1)
    refuse = cross_entropy.KERNELS["class_cross_entropy"].refuse
    assert refuse(None, x, target) is None
    assert refuse(None, x, target, FakeArray((3,), "float64")) is None
    assert "targets of float32" in refuse(None, x, FakeArray((4,), "float32"))
    assert "targets of shape (3,)" in refuse(None, x, FakeArray((3,), "int64"))
    assert "weights of shape (4,)" in refuse(None, x, target, FakeArray((4,), "float32"))
    assert "no classes" in refuse(None, FakeArray((4, 0), "float32"), target)
    assert "no int64" in refuse(None, x, target, None, 1 << 63)
    refuse = cross_entropy.KERNELS["class_cross_entropy_backward"].refuse
    rest = (target, None, None, None, None, -100, "mean", 0.0)
    assert refuse(None, x, FakeArray((), "float32"), *rest) is None
    assert "a gradient of shape (4,)" in refuse(None, x, FakeArray((4,), "float32"), *rest)


# -- on a GPU -------------------------------------------------------------------------------------


def to_gpu(x, shift=0):
    import cupy

    whole = cupy.empty(x.size + shift, x.dtype)
    whole[shift:].set(np.ascontiguousarray(x).reshape(-1))
    return whole[shift:].reshape(x.shape)


def to_host(x):
    import cupy

    return cupy.asnumpy(x)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("shape", [(5, 13), (300, 1000), (9, 5003), (4, 40_000), (3, 21, 500)])
def test_on_a_gpu(shape, storage):
    for name in NAMES:
        checks.check_softmax(name, storage, to_gpu, to_host, shape, axis=1)
        checks.check_softmax(name, storage, lambda x: to_gpu(x, 1), to_host, shape, axis=1)
    for options in ({}, {"label_smoothing": 0.1, "weighted": True, "reduction": "none"}):
        checks.check_loss(storage, to_gpu, to_host, shape, **options)


@pytest.mark.gpu
def test_values_out_of_the_ordinary_on_a_gpu():
    for name in NAMES:
        for storage in DTYPES:
            checks.check_special(name, storage, to_gpu, to_host)
    checks.check_special_losses(to_gpu, to_host, 0.2)
    checks.check_no_class(to_gpu, to_host)
