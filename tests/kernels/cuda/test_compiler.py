"""The one file that knows the compiler: which is taken, what it makes, and what it says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gpugrad.errors import DeclarationError, KernelError
from gpugrad.kernels.cuda import compiler, launch, reduce
from gpugrad.kernels.cuda.language import (
    LANES,
    Elements,
    Int,
    Longs,
    Number,
    Size,
    Values,
    cuda,
    device,
    digest,
    elements_of,
    fold,
    kernel,
    lanes,
    load,
    read_pack,
    store,
    thread,
    threads,
    write_pack,
)  # fmt: skip
from gpugrad.kernels.template import Placeholder, T, exp, read, sqrt, where, write
from tests.kernels.cuda import offline
from tests.kernels.cuda.checks import DTYPES, inputs
from tests.kernels.cuda.ptx_machine import PtxGpu
from tests.kernels.cuda.ptx_machine import launch as launch_text

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def working():
    """Some compiler, or the reason why there is none."""
    try:
        return compiler.usable()
    except KernelError as error:
        pytest.skip(str(error))


# -- which is taken -------------------------------------------------------------------------------


def test_a_reason_for_every_compiler():
    found = compiler.survey()
    assert list(found) == ["numba-cuda", "numba", "numba-cuda-mlir"]
    for name, package in (("numba-cuda", "numba_cuda"), ("numba-cuda-mlir", "numba_cuda_mlir")):
        if importlib.util.find_spec(package) is None:
            assert "not installed" in found[name]


def alone(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_compiler_is_an_error_that_names_them_all():
    code = """
from gpugrad.errors import KernelError
from gpugrad.kernels.cuda import reduce
try:
    reduce.summary_kernel["float32"].compiled()
except KernelError as error:
    print(error)
"""
    # Nobody finds a toolkit here.
    run = alone(code, CUDA_HOME="/nowhere", GPUGRAD_CUDA_COMPILER="numba", NUMBA_ENABLE_CUDASIM="1")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("no compiler for CUDA kernels is usable here:\n  numba: ")
    assert "pip install" in run.stdout


def test_a_wrong_name_is_an_error():
    code = "from gpugrad.kernels.cuda.compiler import usable; usable()"
    run = alone(code, GPUGRAD_CUDA_COMPILER="nvcc")
    assert (
        "KernelError: GPUGRAD_CUDA_COMPILER is 'nvcc'; it must be one of numba-cuda" in run.stderr
    )


def test_launching_what_ships_imports_no_compiler():
    code = """
import sys
from gpugrad.kernels.cuda import reduce
assert reduce.summary_kernel["float32"].ptx()
print([name for name in sys.modules if name in ("numba", "llvmlite", "cupy", "numba.cuda")])
"""
    run = alone(code)
    assert run.stdout == "[]\n", run.stdout + run.stderr


def test_the_toolchain_is_told_without_loading_it():
    assert "numba " in compiler.toolchain()
    assert "llvmlite " in compiler.toolchain()


# -- what it makes --------------------------------------------------------------------------------


@device
def hypotenuse(a, b):
    return sqrt(a * a + b * b)


hypotenuse_lanes = lanes(hypotenuse, "x.")


@device
def grow(total, x):
    return total + x


grown = fold(grow, ".x")
SIXTEEN = elements_of(16)


@kernel
def sample_kernel(
    a: Elements, out: Elements, sums: Values, places: Longs, b: Number, count: Int, n: Size
) -> None:
    i = thread() * LANES
    step = threads() * LANES
    while i + LANES <= n:
        x = hypotenuse_lanes(load(a, i), b)
        store(out, i, x)
        total = grown(T(0), x)
        if count > 3:
            sums[i // LANES] = total
            places[i // LANES] = i
        i += step


@pytest.mark.parametrize("storage", DTYPES)
def test_a_kernel_of_everything(working, storage):
    entry = sample_kernel[storage]
    text = entry.compiled()
    offline.assert_whole(entry.name, text)
    assert offline.accesses(text, storage) == (1, 1)
    if storage != "float64":
        offline.assert_single(entry.name, text)
    (usage,) = offline.usage(text, "sm_90").values()
    offline.assert_light(entry.name, usage)

    wide = launch.number_type(storage)
    a = inputs(storage, 24, 0)
    out, sums, places = np.zeros_like(a), np.zeros(12, wide), np.zeros(12, np.int64)
    PtxGpu(shipped=False).run(entry, (1,), a, out, sums, places, 2.0, 4, 24)
    want = np.hypot(a.astype("float64"), 2)
    tolerance = 2.0**-7 if storage == "bfloat16" else 2.0**-10
    np.testing.assert_allclose(out.astype("float64"), want, rtol=tolerance)
    size = 16 // a.dtype.itemsize
    np.testing.assert_allclose(sums[: 24 // size], want.reshape(-1, size).sum(1), rtol=1e-5)
    assert places[: 24 // size].tolist() == list(range(0, 24, size))


@kernel
def round_trip_kernel(a: Elements, out: Elements, n: Size, packs: Int) -> None:
    i = np.int64(cuda.threadIdx.x) * LANES
    if packs != 0:
        write_pack(out, i, read_pack(a, i, n - i, 1), n - i, 1)
    else:
        while i < n:
            write(out, i, read(a, i))
            i += 1


@pytest.mark.parametrize("packs", [0, 1])
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_half_precision_survives_bit_for_bit(working, storage, packs):
    """Through float32 and back."""
    text = round_trip_kernel[storage].compiled()
    # Every 37th number, more than enough of each kind, and the special ones.
    bits = np.arange(0, 2**16, 37, dtype=np.uint16)
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1, 2, 3], DTYPES[storage])
    bits = np.concatenate([bits, special.view(np.uint16)])
    exponent = {"float16": 0x7C00, "bfloat16": 0x7F80}[storage]
    nan = (bits & 0x7FFF) > exponent
    for start in range(0, len(bits), 256):
        part = bits[start : start + 256].view(DTYPES[storage])
        out = np.zeros_like(part)
        launch_text(text, (1,), 32 if packs else 1, (part, out, part.size, packs))
        got, here = out.view(np.uint16), slice(start, start + 256)
        assert (got == bits[here])[~nan[here]].all()
        assert ((got & 0x7FFF) > exponent)[nan[here]].all()


@kernel
def narrow_kernel(a: Values, out: Elements, packs: Int) -> None:
    x = (a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7])
    if packs != 0:
        store(out, 0, x)
    else:
        write(out, 0, a[0])


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_rounding_to_half_precision(working, storage):
    """To nearest, ties to even; too large is infinite; in packs as alone."""
    eps = float(ml_dtypes.finfo(DTYPES[storage]).eps)
    a = np.array(
        [1 + eps / 2, 1 + 1.5 * eps, 1 + 0.51 * eps, -1e-7, 3e38, 65519, 65520, -0.0], "f4"
    )
    with np.errstate(over="ignore"):
        want = a.astype(DTYPES[storage])
    text = narrow_kernel[storage].compiled()
    out = np.zeros(8, DTYPES[storage])
    launch_text(text, (1,), 1, (a, out, 1))
    assert out.tobytes() == want.tobytes()
    for i in range(8):
        launch_text(text, (1,), 1, (np.roll(a, -i), out, 0))
        assert out[:1].tobytes() == want[i : i + 1].tobytes()


@kernel
def contraction_kernel(a: Values, out: Values) -> None:
    out[0] = a[0] * a[1] + a[2]
    out[1] = a[0] / a[1]
    out[2] = exp(a[2])
    out[3] = where(a[0] > a[1], a[2], T(0.5))


def test_products_are_contracted_and_nothing_is_approximate(working):
    text = contraction_kernel["float32"].compiled()
    assert "fma.rn.f32" in text
    assert "div.rn.f32" in text
    for word in ("approx", ".ftz", "div.full"):
        assert word not in text


def test_other_architectures(working):
    text = contraction_kernel["float32"].compiled((9, 0))
    assert ".target sm_90\n" in text
    assert ".version 8.0\n" in text
    assert contraction_kernel["float32"].compiled((8, 0)).replace("sm_80", "sm_90") == text


# -- what it says ---------------------------------------------------------------------------------


@kernel
def broken_kernel(a: Elements, n: Size) -> None:
    a.no_such_thing(n)


def test_the_compilers_message_is_passed_on(working):
    with pytest.raises(KernelError, match=r"broken_kernel_float32(?s:.)*no_such_thing"):
        broken_kernel["float32"].compiled()
    assert contraction_kernel["float32"].compiled()  # nothing is left half done


def test_a_body_without_types_is_refused():
    def bare(a, n):
        pass

    with pytest.raises(DeclarationError, match="argument a has no type"):
        kernel(bare)["float32"]


free = Placeholder("free")
free_lanes = lanes(free, "x")


@kernel
def unbound_kernel(a: Elements) -> None:
    store(a, 0, free_lanes(load(a, 0)))


def test_an_unbound_name_is_refused(working):
    with pytest.raises(DeclarationError, match="bind free to a template"):
        unbound_kernel["float32"].compiled()


# -- digests --------------------------------------------------------------------------------------


def test_a_digest_covers_all_parts(monkeypatch):
    before = digest(sample_kernel, "float32")
    assert digest(sample_kernel, "float32") == before
    assert digest(sample_kernel, "float64") != before
    monkeypatch.setattr(hypotenuse, "text", "other", raising=False)
    assert digest(sample_kernel, "float32") != before
    monkeypatch.undo()
    monkeypatch.setattr(SIXTEEN, "packs", 17)
    assert digest(sample_kernel, "float32") == before  # not a part of it
    monkeypatch.setitem(globals(), "hypotenuse_lanes", lanes(hypotenuse, ".x"))
    assert digest(sample_kernel, "float32") != before


def test_a_binding_is_a_kernel_of_its_own():
    one, two = (unbound_kernel.bind(free=f) for f in (hypotenuse, grow))
    assert digest(one, "float32") != digest(two, "float32")
    assert unbound_kernel.bind(free=grow) is two
    assert one.name == "unbound_kernel_hypotenuse"
    assert reduce.summary_kernel.family == "reduce"
