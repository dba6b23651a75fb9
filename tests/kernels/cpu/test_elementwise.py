"""Every activation and derivative in one pass: parity with the generic text, and with float64."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import elementwise
from gpugrad.kernels.formula import APPROXIMATE, PLAIN, formula
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, EPS, layouts, run, wide

NUMPY = backend_for_device("cpu")
NUMBERS = {
    "threshold": {"threshold": 0.3, "value": -0.7},
    "softplus": {"beta": 1.5, "threshold": 4.0},
    "leaky_relu": {"negative_slope": 0.2},
    "elu": {"alpha": 0.7},
    "celu": {"alpha": 0.7},
    "hardtanh": {"min_val": -0.4, "max_val": 0.9},
    "softshrink": {"lambd": 0.3},
    "hardshrink": {"lambd": 0.3},
}
CALLS = [
    *((name, NUMBERS.get(name, {})) for name in PLAIN if not name.endswith("_partial")),
    *((name, {"approximate": a}) for name in ("gelu", "geglu") for a in ("none", "tanh")),
]
CALL_IDS = [f"{name}-{''.join(map(str, kw.values()))}" for name, kw in CALLS]


def values(name, n, dtype):
    """Positive, negative, large and small numbers that the operation is defined on."""
    x = np.random.default_rng(0).standard_normal(n) * 2.0
    x[: n // 8] *= 10.0
    x[n // 8 : n // 4] *= 1e-3
    if name.startswith("log") and name != "logsigmoid":
        return (np.abs(x) + 0.1).astype(dtype)
    if name.startswith("exp"):
        x = np.minimum(x, 20.0)
    return x.astype(dtype)


def operands(name, n, dtype):
    x = values(name, n, dtype)
    return [x, x[::-1].copy()] if name in ("swiglu", "geglu") else [x]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "parameters"), CALLS, ids=CALL_IDS)
def test_parity(name, parameters, dtype):
    arrays = operands(name, 1000, DTYPES[dtype])
    function = getattr(gg, name)
    got = run("require", function, *arrays, **parameters)
    want = run("off", function, *arrays, **parameters)
    true = run("off", function, *(wide(x) for x in arrays), **parameters)
    # The kernel is as far from the truth as the generic text may be: cancellation in a formula
    # (1 - y*y in tanh' near saturation) is its own, not the kernel's.
    # A gate's terms are products of both operands.
    scale = 1.0 + np.abs(wide(arrays[0]))
    for x in arrays[1:]:
        scale = scale * (1.0 + np.abs(wide(x)))
    for a, b, t in zip(got, want, true):
        assert a.dtype == b.dtype == DTYPES[dtype]
        near = 16 * EPS[dtype] * (scale + np.abs(t))
        assert np.all(np.abs(wide(a) - wide(b)) <= near)
        assert np.all(np.abs(wide(a) - t) <= near)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gelu", "tanh", "relu", "swiglu"])
def test_half_precision_is_computed_in_float32(name, dtype):
    arrays = operands(name, 1000, DTYPES[dtype])
    got = run("require", getattr(gg, name), *arrays)
    true = run("off", getattr(gg, name), *(wide(x) for x in arrays))
    for a, t in zip(got, true):
        assert a.dtype == DTYPES[dtype]
        # One rounding of the result and, in a derivative told the result, one of that.
        tiny = 2.0**-24 if dtype == "float16" else 0.0
        assert np.all(np.abs(wide(a) - t) <= 2.1 * EPS[dtype] * (np.abs(t) + 1.0) + tiny)


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan():
    x = np.array([1.0, 1.0 + 2.0**-7, 1e38, -1e38, np.inf, -np.inf, np.nan, 1e-40])
    x = np.tile(x, 4).astype(DTYPES["bfloat16"])
    with gg.use_kernels("require"):
        got = gg.leaky_relu(gg.tensor(x), negative_slope=1 / 3).data
    f = x.astype("float32")
    want = np.where(f > 0, f, np.float32(1 / 3) * f).astype(DTYPES["bfloat16"])
    assert np.array_equal(wide(got), wide(want), equal_nan=True)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (7, 13), (2, 3, 5, 7)])
def test_shapes(shape):
    x = np.random.default_rng(1).standard_normal(shape).astype("float32")
    (y, g), (want, slope) = (run(mode, gg.silu, x) for mode in ("require", "off"))
    assert y.shape == g.shape == shape
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(g, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 8191, 8193, 3 * 8192, 3 * 8192 + 5])
def test_block_edges(n):
    x = values("gelu", n, "float32")
    np.testing.assert_allclose(
        run("require", gg.gelu, x)[0], run("off", gg.gelu, x)[0], rtol=2e-6, atol=1e-6
    )


def test_layouts():
    x = values("gelu", 4 * 6 * 10, "float32").reshape(4, 6, 10)
    want = run("require", gg.gelu, x)
    for name, laid in layouts(x):
        for a, b in zip(run("require", gg.gelu, laid, g=x), run("require", gg.gelu, x, g=x)):
            assert np.array_equal(a, b), name
    assert want[0].shape == x.shape


def test_nan_and_infinity_keep_their_meaning():
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0] * 7, "float32")
    for name, parameters in CALLS:
        if name in ("swiglu", "geglu"):
            continue
        with np.errstate(all="ignore"):
            got = run("require", getattr(gg, name), x, **parameters)
            want = run("off", getattr(gg, name), x, **parameters)
        for a, b in zip(got, want):
            assert np.array_equal(np.isnan(a), np.isnan(b)), name
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ([np.zeros((2, 3), "float32"), np.zeros(3, "float32")], r"shapes \(2, 3\) and \(3,\)"),
        ([np.zeros(3, "float32"), np.zeros(3)], "operands of float32 and float64"),
        ([np.zeros(3, "int32"), np.zeros(3, "int32")], "no kernel for int32"),
        ([np.zeros(3, ">f4"), np.zeros(3, ">f4")], "no kernel for >f4"),
    ],
)
def test_refusals_are_told(arrays, reason):
    with gg.use_kernels("require"), pytest.raises(KernelError, match=reason):
        NUMPY.swiglu(*arrays)


def test_second_order_goes_through_the_generic_text():
    x = gg.tensor(values("silu", 64, "float64"), requires_grad=True)

    def second(x):
        y = gg.sum(gg.silu(x))
        (g,) = (gg.grad(lambda t: gg.sum(gg.silu(t)))(x),)
        return gg.sum(g * g) + y

    with gg.use_kernels("require"):
        a = gg.grad(second)(x).data
    with gg.use_kernels("off"):
        b = gg.grad(second)(x).data
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_several_threads_call_at_once():
    x = values("mish", 1 << 16, "float32")
    want = run("require", gg.mish, x)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: run("require", gg.mish, x), range(16)):
            assert all(np.array_equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("name", [*PLAIN, *APPROXIMATE])
def test_loops_are_vectorised(name):
    """More packed arithmetic than scalar: the loop, and not only its remainder."""
    loop = elementwise._loops(name, len(formula(name).operands))[0]["float32"]
    n = len(formula(name).operands)
    arrays = [np.ones(64, "float32") for _ in range(n + 1)]
    text = assembly(loop, *arrays, np.float32(1), np.float32(1))
    assert packed(text) >= 4, f"{name}: {packed(text)} packed instructions"


def test_compiled_kernels_are_kept_on_disk(tmp_path):
    code = (
        "import numpy as np, gpugrad as gg\n"
        "from gpugrad.kernels.cpu import elementwise\n"
        "x = gg.tensor(np.ones(1 << 16, 'float32'))\n"
        "gg.softsign(x)\n"
        "loop = elementwise._loops('softsign', 1)[1]['float32']\n"
        "print(sum(loop.stats.cache_hits.values()))\n"
    )
    env = {**os.environ, "GPUGRAD_CACHE_DIR": str(tmp_path)}
    seen = [
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True,
                       check=True).stdout.strip()
        for _ in range(2)
    ]  # fmt: skip
    assert seen == ["0", "1"]


def test_a_kernel_on_disk_is_found_by_all_that_it_is_made_of():
    """Another constant, formula or callee is another kernel; another name of a file is not."""
    from gpugrad.kernels.cpu.compile import _describe
    from gpugrad.kernels.trace import text_template

    def digest(text, **bound):
        import hashlib

        found = hashlib.sha256()
        loop = elementwise._map1.bind(f=text_template(text, "f"))["float32"]
        _describe(loop.py_func, found)
        return found.hexdigest()

    plain = "def f(x, p, q):\n    return x + T(1)"
    assert digest(plain) == digest(plain)
    assert digest(plain) != digest(plain.replace("T(1)", "T(2)"))
    assert digest(plain) != digest(plain.replace("+", "-"))
    assert digest(plain.replace("x +", "exp(x) +")) != digest(plain.replace("x +", "tanh(x) +"))
