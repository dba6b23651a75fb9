"""Normalisation on the GPU, without one: its PTX run in Python."""

from __future__ import annotations

import numpy as np
import pytest

from gpugrad.kernels.cuda import assembly, launch, norm, norm_launch
from gpugrad.kernels.cuda.build import entries
from tests.kernels.cuda import norm_checks, offline
from tests.kernels.cuda.checks import DTYPES
from tests.kernels.cuda.fake_gpu import FakeArray
from tests.kernels.cuda.ptx_machine import PtxGpu


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    # What is short for a warp is a matter of speed alone; here a row of 80 is long.
    monkeypatch.setattr(norm_launch, "SHORT", 40)
    gpu = PtxGpu()
    monkeypatch.setitem(launch.STAND_INS, np.ndarray, gpu)
    return gpu


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("residual", [False, True])
def test_over_the_last_axis(kind, storage, residual):
    norm_checks.check_norm(kind, storage, shape=(3, 16), residual=residual)
    norm_checks.check_norm(kind, storage, shape=(3, 13), residual=residual, shift=1)
    norm_checks.check_norm(kind, storage, shape=(2, 88), residual=residual)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_over_groups(storage, residual):
    norm_checks.check_norm("group", storage, shape=(2, 6, 8), groups=3, residual=residual)
    norm_checks.check_norm("group", storage, shape=(2, 4, 3, 3), groups=1, residual=residual)
    norm_checks.check_norm("group", storage, shape=(3, 4), groups=2, residual=residual)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 8), (4, 6), (2, 3, 3, 5), (1, 3, 50)])
def test_over_a_batch(storage, shape):
    norm_checks.check_batch(storage, shape=shape)


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (0, 5), (3, 0), (70, 3), (7,)])
def test_shapes(shape):
    norm_checks.check_norm("layer", "float64", shape=shape)
    norm_checks.check_norm("rms", "float64", shape=shape, residual=True)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (1, 2, 1)])
def test_shapes_with_channels(shape):
    norm_checks.check_norm("group", "float64", shape=shape, groups=2)
    norm_checks.check_batch("float64", shape=shape)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)])
def test_only_what_is_needed(needs):
    needs = tuple(map(bool, needs))
    norm_checks.check_norm("layer", "float32", needs=needs)
    norm_checks.check_norm("group", "float32", shape=(2, 4, 5), groups=2, needs=needs)
    norm_checks.check_batch("float32", shape=(2, 4, 5), needs=needs)


def test_without_parameters():
    for kind, shape, groups in (("layer", (5, 13), None), ("group", (2, 4, 5), 2)):
        norm_checks.check_norm(kind, "float32", shape=shape, groups=groups, affine=False)


def test_a_large_mean():
    norm_checks.check_large_mean()


def test_nan_stays_in_its_row():
    norm_checks.check_nan()


def test_several_warps_in_a_block(machine):
    machine.threads = 128
    norm_checks.check_norm("layer", "float32", shape=(9, 24), residual=True)
    norm_checks.check_norm("layer", "bfloat16", shape=(3, 300))
    norm_checks.check_norm("group", "float32", shape=(2, 4, 60), groups=2)
    norm_checks.check_batch("float32", shape=(3, 4, 60))


# -- the text -------------------------------------------------------------------------------------


def test_memory_is_accessed_in_16_bytes():
    """Kernels over rows and tiles: as many loads and stores of packs as their text has, or more
    where a loop is unrolled."""
    least = {
        "moments": (2, 0), "norm_forward": (7, 2), "norm_gradient": (7, 1), "norm_segments": (1, 1),
        "norm_segment_sums": (2, 0), "norm_segment_gradients": (3, 1), "norm_column_sums": (2, 0),
        "norm_fold": (0, 0), "norm_together": (0, 0), "norm_levels": (0, 0),
    }  # fmt: skip
    text = (launch.SHIPPED / "norm.ptx").read_text(encoding="utf-8")
    for name, entry in entries("norm").items():
        loads, stores = offline.accesses(assembly.section(text, name), entry.storage)
        base = next(p for p in sorted(least, key=len, reverse=True) if name.startswith(p))
        assert (loads, stores) >= least[base], name
        assert (loads == 0) == (least[base] == (0, 0)), name


def test_refusals_say_why():
    x, w = FakeArray((4, 6), "float32"), FakeArray((6,), "float32")
    refuse = {name: kernel.refuse for name, kernel in norm_launch.KERNELS.items()}
    assert refuse["layer_norm"](None, x, w, w) is None
    assert refuse["add_layer_norm"](None, x, x, w) is None
    assert "broadcast" in refuse["add_layer_norm"](None, x, w)
    assert "3 axes of 2" in refuse["rms_norm"](None, x, axes=3)
    assert "(6,) is needed" in refuse["layer_norm"](None, x, FakeArray((5,), "float32"))
    assert "float64" in refuse["layer_norm"](None, x, FakeArray((6,), "float64"))
    assert "int32" in refuse["rms_norm"](None, FakeArray((4, 6), "int32"))
    assert "4 groups" in refuse["group_norm"](None, x, groups=4)
    assert refuse["group_norm_backward"](None, x, x, w, None, 2, 1e-5, (True,) * 3) is None
    assert "4 groups" in refuse["group_norm_backward"](None, x, x, w, None, 4, 1e-5, (True,) * 3)
    assert "no axis of channels" in refuse["batch_moments"](None, w)
    assert refuse["batch_norm_inference"](None, x, w, w, None, w) is None
    assert "moments that are not 6" in refuse["batch_norm_inference"](None, x, x, w)
    assert "broadcast" in refuse["batch_norm_backward"](None, w, x, w, None, 1e-5, (True,) * 3)


def test_every_operation_has_its_kernels():
    from gpugrad.kernels import cpu, cuda

    on_cpu = {name for name, slot in cpu.SLOTS.items() if slot.module.endswith("norm")}
    on_gpu = {name for name, slot in cuda.SLOTS.items() if slot.module.endswith("norm_launch")}
    assert on_cpu == on_gpu == set(norm_launch.KERNELS)
    assert len(list(norm.entries())) == len(entries("norm"))


# -- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("storage", DTYPES)
def test_on_a_gpu(storage):
    from tests.kernels.cuda.test_gpu import to_gpu, to_host

    for residual in (False, True):
        for kind in ("layer", "rms"):
            for shape in ((700, 512), (9, 5000), (33, 77)):
                norm_checks.check_norm(
                    kind, storage, to_gpu, to_host, shape=shape, residual=residual
                )  # fmt: skip
        norm_checks.check_norm(
            "group", storage, to_gpu, to_host, shape=(8, 12, 7, 9), groups=3, residual=residual
        )  # fmt: skip
    for shape in ((16, 6, 12, 10), (300, 40), (2, 3, 2000)):
        norm_checks.check_batch(storage, to_gpu, to_host, shape=shape)
    norm_checks.check_large_mean(to_gpu, to_host)
    norm_checks.check_nan(to_gpu, to_host)
