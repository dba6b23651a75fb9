"""A test of the tests: a CUDA kernel with a changed operator fails them."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import numpy as np
import pytest

from gpugrad.kernels import cuda as families
from gpugrad.kernels.cuda import launch, norm_launch, softmax
from gpugrad.kernels.cuda.blockwide import block_total
from gpugrad.kernels.cuda.language import Int, Values, cuda, kernel
from gpugrad.kernels.template import T
from tests.kernels.cuda import (
    attention_checks,
    checks,
    moments_checks,
    norm_checks,
    optimizer_checks,
    recurrent_checks,
    rows,
    softmax_checks,
)
from tests.kernels.cuda.coroutines import QuickGpu
from tests.kernels.mutation import bodies, operators, unnoticed


@kernel
def total_kernel(parts: Values, out: Values, count: Int) -> None:
    scratch = cuda.shared.array(32, T)
    total = block_total(parts, count, scratch)
    if cuda.threadIdx.x < 40:
        out[cuda.threadIdx.x] = total


def elementwise(machine):
    for name in ("gelu", "tanh_partial", "geglu_gate_partial"):
        checks.check_map(name, "float32", count=301, shift=1)
        checks.check_map(name, "float32", count=303)


def packs(machine):
    elementwise(machine)
    softmax_checks.check_softmax("softmax", "float32", shape=(9, 13), shift=1)


def bias(machine):
    checks.check_bias("tanh", "float32", shape=(9, 13))
    checks.check_bias("gelu", "float32", shape=(70, 12))
    checks.check_bias("tanh", "float32", shape=(9, 140))
    checks.check_bias_counts()
    machine.threads = 64
    checks.check_bias("tanh", "float32", shape=(70, 13))


def reduce(machine):
    machine.threads = 64
    checks.check_summary("float32", 300)
    checks.check_summary_counts("float32", count=70)
    parts, out = checks.inputs("float32", 100, 6), np.zeros(40, np.float32)
    machine.run(total_kernel["float32"], (1,), parts, out, 100)
    np.testing.assert_allclose(out, parts.sum(dtype="float64"), rtol=1e-5)


def softmaxes(machine):
    machine.threads = 64
    for name in ("softmax", "log_softmax"):
        softmax_checks.check_softmax(name, "float32", shape=(9, 13), shift=1)
        softmax_checks.check_softmax(name, "float32", shape=(3, 150))
        softmax_checks.check_softmax(name, "float32", shape=(3, 5, 50), axis=1)
        softmax_checks.check_special(name, "float32")


def losses(machine):
    machine.threads = 64
    check, smooth = softmax_checks.check_loss, {"label_smoothing": 0.2}
    check("float32", shape=(9, 13))
    check("float32", shape=(9, 13), weighted=True, reduction="none", **smooth)
    check("float32", shape=(5, 150), shift=1, **smooth)
    check("float32", shape=(5, 150), weighted=True, reduction="sum", ignore_index=2)
    check("float32", shape=(3, 5, 50), weighted=True, **smooth)
    check("float32", shape=(3, 5, 50), reduction="none")
    softmax_checks.check_no_class()
    softmax_checks.check_special_losses(label_smoothing=0.2)


def norm(machine):
    machine.threads = 64
    for shape, shift in (((5, 13), 1), ((3, 80), 0)):
        norm_checks.check_norm("layer", "float32", shape=shape, shift=shift)
        norm_checks.check_norm("rms", "float32", shape=shape, residual=True)
    norm_checks.check_norm("group", "float32", shape=(2, 4, 13), groups=2, residual=True)
    norm_checks.check_norm("group", "float32", shape=(2, 4, 44), groups=2)
    norm_checks.check_batch("float32", shape=(3, 3, 44))
    norm_checks.check_norm("layer", "float32", shape=(71, 13))
    norm_checks.check_large_mean()
    norm_checks.check_nan()


def dropout(machine):
    rows.check_dropout("float32", count=601, shift=1)
    rows.check_dropout("float32", count=601)
    rows.check_after_product("gelu", "float32", (5, 13), shift=1)
    rows.check_after_product("tanh", "float32", (70, 12))
    rows.check_after_product("gelu", "float32", (9, 140))
    rows.check_after_product("relu", "float32", p=0.0, bias=False, adds=False)
    rows.check_after_product(None, "float32", p=1.0, bias=False)


def embedding(machine):
    rows.check_embedding("float32")
    rows.check_embedding("float32", shape=(71,), rows=5, columns=16, padding_row=4)
    rows.check_embedding("float32", shape=(71,), rows=91, columns=16, by_frequency=True)
    rows.check_outside()


def gradients(machine):
    check = optimizer_checks.check_norm
    mixed = np.resize(np.array([3e38, 1e-45, 1e-13, 1.0], np.float32), 90)
    check(mixed)
    # In two parts, of which either has the greatest element.
    for drawn in np.random.default_rng(0).standard_normal((2, 300)).astype("float32"):
        check(drawn * np.repeat(np.float32([1, 2]), 150))
        drawn[[200, 130]] = np.inf
        check(drawn, finite_only=True)
    check(np.full(90, 1e-30, np.float32))
    check(np.full(700, np.nan, np.float32))
    for places in ([7], [60, 3]):
        mixed[places] = np.inf
        check(mixed, finite_only=True)
    optimizer_checks.check_seams()
    optimizer_checks.check_float64_range([1e300, 1e-300])
    optimizer_checks.check_infinity("float32")
    optimizer_checks.check_many(machine)
    optimizer_checks.check_accuracy(machine)


def optimizer(machine):
    adamw = optimizer_checks.ADAMW
    optimizer_checks.check_step(("sgd", (False, False, True)), "float32", steps=1, nonfinite="zero")
    optimizer_checks.check_step(("adagrad", (True,)), "float32", steps=1, bound=1e9)
    optimizer_checks.check_update(adamw, "float32")
    optimizer_checks.check_step(adamw, "float32", size=40, steps=1)
    optimizer_checks.check_trouble(adamw, "float32", "zero")
    optimizer_checks.check_trouble(adamw, "float32", "propagate", bound=np.inf)
    optimizer_checks.check_trouble(("rmsprop", (True, True, True)), "float32", "skip")


def moments(machine):
    moments_checks.check_digits("float32")
    moments_checks.check_parts("float32")
    moments_checks.check_whole("float32", 2200)
    moments_checks.check_range("float32")
    moments_checks.check_range("float64")
    machine.threads = 64
    moments_checks.check_parts("float32")


def recurrent(machine):
    machine.threads = 32
    for kind in recurrent_checks.LAYERS:
        recurrent_checks.check_step(kind, "float32", shape=(3, 5))
        recurrent_checks.check_step_backward(kind, "float32", shape=(3, 5))
        recurrent_checks.check_step_backward(kind, "float32", shape=(3, 5), missing=(1,))
    machine.wave = 2
    for kind in recurrent_checks.LAYERS:
        recurrent_checks.check_step(kind, "float32", shape=(9, 20))
        recurrent_checks.check_step_backward(kind, "float32", shape=(9, 20))


def attention(machine):
    check, dropout = attention_checks.check, {"dropout_p": 0.4, **attention_checks.STREAM}
    with attention_checks.quick(2):  # packs of features
        check("float32", queries=3, keys=6, features=13, masked="added", **dropout)
    with attention_checks.quick(1):
        check("float32", queries=5, keys=100, features=2, out=2, needs=(True, False, False))
        check("float32", queries=9, keys=10, out=2, **dropout)
        check("float32", queries=4, keys=6, out=2)
        check("float32", batch=(2, 2), queries=4, keys=8, masked="seen")
        check("float32", queries=9, keys=10, features=2, out=100, is_causal=True)


#: What is run against the kernels of a module.
CHECKS = {
    "elementwise": elementwise,
    "bias": bias,
    "dropout": dropout,
    "embedding": embedding,
    "softmax": softmaxes,
    "cross_entropy": losses,
    "norm": norm,
    "reduce": reduce,
    "blockwide": reduce,
    "gradient": gradients,
    "optimizer": optimizer,
    "moments": moments,
    "recurrent": recurrent,
    "language": packs,
    "attention": attention,
    "tiles": attention,
}

#: Modules whose bodies have no check yet.
WITHOUT = {"layers"}

AGAIN = "some packs are worked on twice"
EVERY = "every thread has the result, and any may write it"
MAKES_UP = "what is left of the mean makes up for it"

BANKS = "it is somewhere else in shared memory"

WRITER = {"cuda.threadIdx.x == 0 -> cuda.threadIdx.x != 0": EVERY}
LANE = {"lane == 0 -> lane != 0": EVERY}
STRIDE = {"threads() * LANES -> threads() + LANES": AGAIN}
WIDTH = {"width * LANES -> width + LANES": AGAIN}

#: Changes that change no result, by the name of the body, and why.
EQUAL: dict[str, dict[str, str]] = {
    "language.threads": {
        "np.int64(cuda.gridDim.x) * np.int64(cuda.blockDim.x) -> "
        "np.int64(cuda.gridDim.x) + np.int64(cuda.blockDim.x)": AGAIN,
    },
    "elementwise.map1_kernel": STRIDE,
    "elementwise.map2_kernel": STRIDE,
    "elementwise.map3_kernel": STRIDE,
    "dropout.dropout_kernel": STRIDE,
    "bias.bias_backward_kernel": {"thread == 0 -> thread != 0": EVERY},
    "bias.bias_total_kernel": {"thread == 0 -> thread != 0": EVERY},
    "softmax.block_greatest": {
        "cuda.threadIdx.x & 31 == 0 -> cuda.threadIdx.x & 31 != 0": EVERY,
    },
    "softmax.column_statistics": {
        "total * T(math.nan) -> total + T(math.nan)": "it is NaN either way",
    },
    "softmax.forward_rows_kernel": WIDTH,
    "softmax.backward_rows_kernel": {"width * LANES -> width + LANES (2)": AGAIN},
    "cross_entropy.loss_rows_kernel": WRITER,
    "cross_entropy.loss_columns_kernel": WRITER,
    "cross_entropy.loss_total_kernel": WRITER,
    "cross_entropy.gradient_rows_kernel": WIDTH,
    "norm.row_moments": {"first + offset -> first - offset": MAKES_UP},
    "norm.together_kernel": {"base + offset -> base - offset": MAKES_UP},
    "norm.moments_kernel": LANE,
    "norm.forward_kernel": {
        **LANE,
        **WIDTH,
        "first + (read(residual, start) if n > 0 else T(0)) -> "
        "first - (read(residual, start) if n > 0 else T(0))": "sums may be relative to any number",
    },
    "norm.gradient_kernel": {"width * LANES -> width + LANES (2)": AGAIN},
    "norm.segments_kernel": WIDTH,
    "norm.segment_sums_kernel": {**LANE, **WIDTH},
    "norm.segment_gradients_kernel": WIDTH,
    "attention.forward_kernel": {"across() == 0 -> across() != 0": EVERY},
    "tiles.result_levels": {"across() == 0 -> across() != 0": EVERY},
    "tiles.stage_turned": {"CHUNK - 1 -> CHUNK + 1": "it is less; so the compiler sees"},
    "tiles.weights_at": {
        "j >> 2 -> j << 2": BANKS,
        "down() + (j >> 2) -> down() - (j >> 2)": BANKS,
    },
    "tiles.some_hidden": {"EACH - 1 -> EACH + 1": "some look at what nothing hides"},
    "tiles._thin": {"queries - query -> queries + query": "what is not there may be dropped"},
    "reduce.summary_kernel": WRITER,
    "reduce.summary_total_kernel": WRITER,
    "blockwide._in_block": LANE,
    "gradient.measure_kernel": WRITER,
    "gradient.norm_total_kernel": WRITER,
    "moments._in_block": LANE,
    "moments.moments_kernel": {
        **WRITER,
        "start & LANES - 1 -> start | LANES - 1": "elements of a pack may be read one by one",
    },
    "moments.moments_total_kernel": WRITER,
    "optimizer.decide": {
        **WRITER,
        "mode & SCALES -> mode | SCALES (3)": "without a bound nobody reads what is written there",
    },
}


def run(check):
    with pytest.MonkeyPatch.context() as patch:
        # What is short for a warp is a matter of speed alone; here a row of 80 is long.
        patch.setattr(softmax, "SHORT", 40)
        patch.setattr(norm_launch, "SHORT", 40)
        machine = QuickGpu()
        patch.setitem(launch.STAND_INS, np.ndarray, machine)
        check(machine)


@cache
def passes(check):
    """The kernels as they are pass; looked at once."""
    run(check)


def test_every_body_has_a_check():
    names = [m.name for m in pkgutil.iter_modules(families.__path__)]
    found = {name: bodies(importlib.import_module(f"{families.__name__}.{name}")) for name in names}
    can_change = {name for name, those in found.items() if any(map(operators, those.values()))}
    assert can_change - WITHOUT == set(CHECKS)


@pytest.mark.parametrize(
    ("name", "template", "check"),
    [
        pytest.param(f"{family}.{name}", template, check, id=f"{family}.{name}")
        for family, check in CHECKS.items()
        for name, template in bodies(
            importlib.import_module(f"gpugrad.kernels.cuda.{family}")
        ).items()
        if operators(template)
    ],
)
def test_a_changed_operator_is_noticed(name, template, check):
    passes(check)
    missed = unnoticed(template, EQUAL.get(name, {}), lambda: run(check))
    assert not missed, f"nobody noticed {missed}"
