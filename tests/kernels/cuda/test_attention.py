"""Attention on the GPU, and without one: kernels in Python, and the PTX that ships."""

from __future__ import annotations

import re

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend.kernels import fusible
from gpugrad.backend.numpy import NumpyBackend
from gpugrad.core.primitive import registry
from gpugrad.kernels.cuda import SLOTS, assembly, attention_launch, launch
from gpugrad.kernels.cuda.build import entries
from gpugrad.ops import attention as operations
from tests.kernels.cuda import attention_checks as checks
from tests.kernels.cuda import offline
from tests.kernels.cuda.checks import DTYPES
from tests.kernels.cuda.fake_gpu import FakeArray

DROPOUT = {"dropout_p": 0.4, **checks.STREAM}


@pytest.fixture
def quick():
    """Kernels in Python: 8 own rows to a block."""
    with checks.quick(1) as gpu:
        yield gpu


@pytest.fixture
def ptx(monkeypatch):
    """The text that ships, in Python."""
    gpu = checks.Ptx()
    monkeypatch.setitem(launch.STAND_INS, np.ndarray, gpu)
    return gpu


# -- the logic ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("storage", DTYPES)
def test_every_storage(quick, storage, is_causal):
    checks.check(storage, is_causal=is_causal)
    checks.check(storage, batch=(2,), queries=3, keys=8, features=8, out=4, is_causal=is_causal)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (9, 70, 5, 3), (70, 9, 3, 4), (3, 4, 2, 40)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sizes(quick, sizes, is_causal):
    names = ("queries", "keys", "features", "out")
    checks.check("float32", **dict(zip(names, sizes)), is_causal=is_causal)


def test_the_widest(quick):
    checks.check("float32", queries=3, keys=4, features=128, out=100)


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_there(quick, queries, keys):
    checks.check("float32", queries=queries, keys=keys, batch=(2,))


@pytest.mark.parametrize("masked", ["seen", "added", "keys", "queries"])
def test_masks(quick, masked):
    checks.check("float32", batch=(2, 2), queries=5, keys=6, masked=masked)
    checks.check("float32", queries=9, keys=66, masked=masked, is_causal=True)


def test_dropout(quick):
    checks.check("float32", queries=9, keys=11, **DROPOUT)
    checks.check("float64", batch=(2,), queries=3, keys=67, is_causal=True, **DROPOUT)
    checks.check("float32", queries=3, keys=5, masked="seen", dropout_p=1.0)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_some_gradients(quick, needs):
    checks.check("float32", queries=3, keys=5, needs=tuple(map(bool, needs)), scale=0.3)


def test_infinity_and_nan(quick):
    checks.check_special()


@pytest.mark.parametrize(
    ("left", "right"), [((2, 1), (1, 3)), ((), (2,)), ((2, 1, 2), (3, 1)), ((2,), ())]
)
def test_axes_that_broadcast(quick, left, right):
    q = checks.random("float64", (*left, 3, 4), 0)
    k, v = (checks.random("float64", (*right, 5, n), n) for n in (4, 2))
    batch = np.broadcast_shapes(left, right)
    g = checks.random("float64", (*batch, 3, 2), 3)
    checks.compare("float64", checks.same, checks.same, q, k, v, None, g, 5)


def test_layouts(quick):
    """Any strides; what lies as kernels want it is not copied."""
    q, k, v, g = (checks.random("float32", (1, 2, 3, 4), seed) for seed in range(4))
    views = {
        "a slice of rows": lambda x: np.repeat(x, 2, -2)[..., ::2, :],
        "heads side by side": lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
        "backwards": lambda x: x[..., ::-1, :].copy()[..., ::-1, :],
        "transposed": lambda x: np.ascontiguousarray(x.swapaxes(2, 3)).swapaxes(2, 3),
        "misaligned": lambda x: np.concatenate([x.reshape(-1)[:1], x.reshape(-1)])[1:].reshape(
            x.shape
        ),
    }
    copied = {"backwards", "transposed"}
    for name, view in views.items():
        arrays = a, b, c = view(q), view(k), view(v)
        call = attention_launch._Call(checks.numpy, a, b, c, None, False, None, 0.0, 0, 0)
        shared = [np.shares_memory(x, y) for x, y in zip(call.operands, arrays)]
        assert shared == [name not in copied] * 3, name
        checks.compare("float32", checks.same, checks.same, a, b, c, None, view(g), 5)


def test_heads_of_one_projection(quick):
    checks.check_packed("float32", shape=(2, 5, 24), heads=2, is_causal=True)
    checks.check_packed("bfloat16", shape=(9, 12), heads=1, masked=True, **DROPOUT)
    checks.check_packed("float32", shape=(0, 5, 12), heads=2)


def test_several_warps_in_a_block(quick):
    quick.threads = 128
    checks.check("float32", queries=33, keys=40, is_causal=True, **DROPOUT)


def test_results_are_the_same_bit_for_bit(quick):
    q, k, v, g = (checks.random("float32", (9, 4), seed) for seed in range(4))

    def everything():
        kernels = attention_launch.KERNELS
        y, lse = kernels["attention"].run(checks.numpy, q, k, v, None, True)
        found = kernels["attention_backward"].run(
            checks.numpy, g, q, k, v, None, y, lse, (True, True, True, False), True
        )
        return [x.tobytes() for x in (y, lse, *found[:3])]

    assert everything() == everything()


def device():
    """NumPy's arrays with the GPU's kernels for attention."""
    m = NumpyBackend()
    m.__dict__["slots"] = {name: slot for name, slot in SLOTS.items() if "attention" in name}
    return m


@pytest.mark.parametrize("name", ["attention", "packed_attention"])
def test_one_launch_forward_and_three_back(quick, monkeypatch, name):
    launched = []
    run = type(quick).run

    def noted(self, entry, *args):
        launched.append(entry.name)
        run(self, entry, *args)

    monkeypatch.setattr(type(quick), "run", noted)
    packed = name == "packed_attention"
    args = [checks.random("float32", (5, 12) if packed else (5, 4), seed) for seed in range(3)]
    args = [args[0], None, 1] if packed else [*args, None]
    needs = (True, False) if packed else (True, True, True, False)
    g = checks.random("float32", (5, 4), 5)
    seen = []
    for m, mode in ((device(), "require"), (NumpyBackend(), "off")):
        with gg.use_kernels(mode):
            y, lse = fusible(registry[name].forward, name)(m, *args, is_causal=True)
            before = args[: 2 if packed else 4]
            given = (g, *before, y, lse, *args[len(before) :], needs, True)
            seen.append([y, lse, *getattr(operations, f"{name}_backward")(m, *given)])
    assert launched == [f"attention_{x}32_float32" for x in ("", "value_", "query_", "key_")]
    for a, b in zip(*seen, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_refusals_say_why():
    x = FakeArray((2, 5, 8), "float32")
    refuse = attention_launch.KERNELS["attention"].refuse
    assert refuse(None, x, x, x) is None
    assert refuse(None, x, x, x, FakeArray((5, 5), "bool")) is None
    assert refuse(None, x, x, x, FakeArray((5, 5), "float64")) is None
    assert "a mask of int32" in refuse(None, x, x, x, FakeArray((5, 5), "int32"))
    assert "do not fit together" in refuse(None, x, x, FakeArray((2, 4, 8), "float32"))
    assert "float32 and float16" in refuse(None, x, x, FakeArray((2, 5, 8), "float16"))
    wide = FakeArray((5, 129), "float32")
    assert "kernels for 1 to 128" in refuse(None, wide, wide, wide)
    empty = FakeArray((5, 0), "float32")
    assert "0 features of a key" in refuse(None, empty, empty, empty)
    back = attention_launch.KERNELS["attention_backward"].refuse
    needs = [True, True, True, False]
    assert back(None, x, x, x, x, None, x, x, needs) is None
    needs[3] = True
    assert "gradient of the mask" in back(None, x, x, x, x, None, x, x, needs)
    half = FakeArray((2, 5, 8), "float16")
    assert "float32 and float16" in back(None, half, x, x, x, None, x, x, [True] * 3 + [False])


def test_refusals_of_one_projection():
    def array(*shape):
        return np.zeros(shape, "float32")

    refuse = attention_launch.KERNELS["packed_attention"].refuse
    assert refuse(None, array(2, 5, 24), None, 2) is None
    assert "(5, 24) of 5 heads" in refuse(None, array(5, 24), None, 5)
    assert "4 axes" in refuse(None, array(2, 2, 5, 24))
    assert "makes more of" in refuse(None, array(5, 24), array(3, 1, 5, 5))
    back = attention_launch.KERNELS["packed_attention_backward"].refuse
    x, g = array(5, 24), array(5, 8)
    assert back(None, g, x, None, g, None, 2, (True, False)) is None
    assert "gradient of the mask" in back(None, g, x, g, g, None, 2, (True, True))


# -- the text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", DTYPES)
def test_what_ships(ptx, storage):
    checks.check(storage, queries=3, keys=5, is_causal=True, masked="added", **DROPOUT)


def test_what_ships_for_more_columns(ptx):
    checks.check("float32", queries=2, keys=3, features=2, out=36, masked="seen")
    checks.check("float16", queries=2, keys=3, features=2, out=72, needs=(False, False, True))


#: Kernels load 16 bytes at a time what products are staged of: own rows and passing ones, the
#: latter again for the second product; and so for the slopes.
WIDE_LOADS = {"query": 5, "key": 5, "value": 3}


def test_memory_is_accessed_in_16_bytes():
    text = (launch.SHIPPED / "attention.ptx").read_text(encoding="utf-8")
    for name, entry in entries("attention").items():
        section = assembly.section(text, name)
        loads, _ = offline.accesses(section, entry.storage)
        assert loads >= WIDE_LOADS.get(name.split("_")[1], 3), name
        # In shared memory: what the products of a step need of each operand.
        kind = "v2.f64" if entry.storage == "float64" else "v4.f32"
        shared = len(re.findall(rf"\bld\.shared\.{re.escape(kind)}", section))
        assert shared >= 8, f"{name} has {shared}"


# -- on a GPU -------------------------------------------------------------------------------------


def to_gpu(x):
    import cupy

    return cupy.asarray(x)


def to_host(x):
    import cupy

    return cupy.asnumpy(x)


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (64, 64, 32, 32), (200, 333, 64, 64), (70, 65, 128, 100)], ids=str
)
def test_on_a_gpu(storage, sizes, is_causal):
    names = ("queries", "keys", "features", "out")
    for options in ({}, {"masked": "seen"}, {"masked": "added", **DROPOUT}):
        checks.check(
            storage, to_gpu, to_host, (2, 3), **dict(zip(names, sizes)), is_causal=is_causal,
            **options,
        )  # fmt: skip


@pytest.mark.gpu
def test_one_projection_on_a_gpu():
    for storage in DTYPES:
        checks.check_packed(
            storage, to_gpu, to_host, (2, 130, 3 * 4 * 24), 4, is_causal=True, **DROPOUT
        )
    checks.check_special(to_gpu, to_host)


@pytest.mark.gpu
def test_bit_for_bit_on_a_gpu():
    kernels = attention_launch.KERNELS
    q, k, v, g = (to_gpu(checks.random("float32", (2, 4, 777, 64), seed)) for seed in range(4))
    options = {"is_causal": True, **DROPOUT}

    def everything():
        y, lse = kernels["attention"].run(checks.numpy, q, k, v, **options)
        found = kernels["attention_backward"].run(
            checks.numpy, g, q, k, v, None, y, lse, (True, True, True, False), **options
        )
        return [to_host(x).tobytes() for x in (y, lse, *found[:3])]

    first = everything()
    for _ in range(10):
        assert everything() == first
