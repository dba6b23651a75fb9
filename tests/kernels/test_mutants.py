"""A test of the tests: a kernel with a changed operator no longer agrees with the generic text."""

import importlib
import pkgutil
from functools import cache

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import kernels
from gpugrad.kernels import cpu
from tests.kernels import families
from tests.kernels.interpreter import interpreted
from tests.kernels.mutation import bodies, operators, unnoticed

#: What is run against the kernels of a module. Texts that several families share come last.
CHECKS = {
    "cpu.elementwise": ["elementwise", "pointwise"],
    "cpu.bias": ["bias"],
    "cpu.dropout": ["dropout"],
    "cpu.embedding": ["embedding"],
    "cpu.softmax": ["softmax"],
    "cpu.cross_entropy": ["cross_entropy"],
    "cpu.rows": ["norm"],
    "cpu.norm": ["norm"],
    "cpu.batch_norm": ["batch_norm"],
    "cpu.reduce": ["reduce"],
    "cpu.reductions": ["reductions"],
    "cpu.scan": ["scan"],
    "cpu.layout": ["exchanges"],
    "cpu.losses": ["pointwise"],
    "cpu.select": ["select"],
    "cpu.gather": ["gather"],
    "cpu.optimizer": ["optimizer"],
    "cpu.gemm": ["gemm", "linear"],
    "cpu.linear": ["linear"],
    "cpu.layers": ["layers"],
    "cpu.wide": ["wide"],
    "cpu.moments": ["moments"],
    "cpu.attention": ["attention"],
    "cpu.scores": ["attention"],
    "cpu.convolution": ["convolution"],
    "cpu.winograd": ["winograd"],
    "cpu.windows": ["convolution", "transposed"],
    "cpu.transposed": ["transposed"],
    "cpu.memory": ["pooling", "convolution", "turning"],
    "cpu.pooling": ["pooling"],
    "cpu.recurrent": ["recurrent"],
    "cpu.microkernel": ["small_products"],
    "cpu.weight_gradient": ["weights", "wide"],
    "cpu.direct": ["gemm", "weights"],
    "moments": ["norm", "batch_norm"],
    "probabilities": ["softmax", "cross_entropy"],
    "random": ["dropout"],
    "scalars": ["scalars"],
}

DIVISION = "it only divides the work in another way"
ROOM = "there is only more room than is needed"
DRAWN = "more words are drawn than are needed"
NOTHING = "there is a piece more, of nothing"
CHOICE = "there are two ways to the same result"
TURNS = "threads share some room, and take turns here"
BOTH = "that of two is 2 only for the numbers 0 and 2"

#: What threads are worth is told by so many multiply-adds.
WORK = (
    "rows * inputs -> rows + inputs",
    "rows * inputs * outputs -> rows * inputs + outputs",
)

#: Changes that change no result, by the name of the body, and why.
EQUAL: dict[str, dict[str, str]] = {
    **{
        f"cpu.{body}": {f"{size} + {piece} - 1 -> {size} + {piece} + 1": NOTHING}
        for those, size, piece in (
            ("elementwise._blocks1 elementwise._blocks2 elementwise._blocks3", "out.size", "BLOCK"),
            ("optimizer._blocks0 optimizer._blocks1", "p.size", "BLOCK"),
            ("optimizer._blocks2 optimizer._blocks3", "p.size", "BLOCK"),
            ("reduce._scale_blocks", "a.size", "BLOCK"),
            ("reductions._tiles", "inner", "WIDTH"),
            ("reductions._spread_rows", "x.shape[1]", "piece"),
            ("reductions._spread_tiles", "x.shape[1]", "ROWS"),
            ("elementwise._blocks4 select._blocks", "out.size", "BLOCK"),
            ("losses._slopes1 losses._slopes2 losses._slopes3", "out.size", "BLOCK"),
            ("dropout._dropout", "y.size", "SPAN"),
            ("embedding._sum", "columns", "WIDTH"),
            ("bias._forward dropout._forward norm._forward linear._forward_large", "rows", "per"),
            ("norm._forward_groups norm._backward_groups", "rows", "lot"),
            ("batch_norm._segment_moments batch_norm._scale_segments", "rows", "lot"),
            ("batch_norm._segment_sums batch_norm._segment_gradients", "rows", "lot"),
            ("batch_norm._scale_columns batch_norm._column_gradients", "x.shape[0]", "lot"),
            ("convolution._forward", "rows", "band"),
            ("transposed._forward", "tall", "band"),
            ("scan._rows", "rows", "per"),
            ("layout._copy_runs", "count", "per"),
        )
        for body in those.split()
    },
    "cpu.attention._dealt": {"unit % 2 == 0 -> unit % 2 != 0": DIVISION},
    "cpu.attention._backward_unit": {"keys + ranges - 1 -> keys + ranges + 1": DIVISION},
    "cpu.scores.masked": {"j + m - 1 -> j + m + 1": "where nothing is hidden, it is looked for"},
    "cpu.memory.turn_all": {
        "PIECE // rows // LINE * LINE -> PIECE // rows // LINE + LINE": DIVISION,
        "columns + width - 1 -> columns + width + 1": NOTHING,
    },
    "cpu.recurrent._pack": {
        "b.strides[0] < b.strides[1] -> b.strides[0] >= b.strides[1]": DIVISION,
        "rows + BLOCK - 1 -> rows + BLOCK + 1": NOTHING,
    },
    "cpu.recurrent._weights": dict.fromkeys(
        (
            "columns + STRIP - 1 -> columns + STRIP + 1",
            "(columns + STRIP - 1) // STRIP + parts - 1 -> "
            "(columns + STRIP - 1) // STRIP + parts + 1",
            "((columns + STRIP - 1) // STRIP + parts - 1) // parts * parts -> "
            "((columns + STRIP - 1) // STRIP + parts - 1) // parts + parts",
        ),
        DIVISION,
    ),
    "cpu.direct.suits": dict.fromkeys(
        (
            "k * n -> k + n",
            "k * n * size_of(T(0)) -> k * n + size_of(T(0))",
            "k * n * size_of(T(0)) <= LARGEST -> k * n * size_of(T(0)) > LARGEST",
            "m >= FEWEST -> m < FEWEST",
            "n >= FEWEST -> n < FEWEST",
            "k >= SHORTEST -> k < SHORTEST",
        ),
        CHOICE,
    ),
    "cpu.gemm.packed_size": {"n + panel() - 1 -> n + panel() + 1": ROOM},
    "cpu.direct.direct": {
        "m + STRIP - 1 -> m + STRIP + 1": DIVISION,
        "k + DEPTH -> k - DEPTH": DIVISION,
        "k + DEPTH - 1 -> k + DEPTH + 1": DIVISION,
    },
    "cpu.microkernel.pack": {
        "b.strides[1] > 0 -> b.strides[1] <= 0": CHOICE,
    },
    "cpu.winograd.results": {
        "tall + band - 1 -> tall + band + 1 (1)": NOTHING,
        "n + images - 1 -> n + images + 1 (1)": NOTHING,
        "o + width - 1 -> o + width + 1 (1)": NOTHING,
        "part * each -> part + each (1)": TURNS,
        "part * each * size -> part * each + size (1)": TURNS,
        "2 * count -> 2 + count (1)": "rows of the next piece are finished before they are made",
    },
    "cpu.winograd._add_weights": {
        "o + width - 1 -> o + width + 1 (1)": NOTHING,
        "o - p * width -> o + p * width (1)": "columns that nobody looks at are made, too",
    },
    "cpu.winograd._add_images": {"c + width - 1 -> c + width + 1 (1)": NOTHING},
    "cpu.winograd.gradients": {
        "part * each * size -> part * each + size (1)": TURNS,
        "tall - first -> tall + first (1)": "tiles that are all outside are taken along",
    },
    "cpu.windows.weight_sums": {"DEPTH + places // 2 -> DEPTH - places // 2": DIVISION},
    "cpu.pooling._max_row": {"i1 - i0 -> i1 + i0": BOTH, "j1 - j0 -> j1 + j0": BOTH},
    "cpu.microkernel._product": {
        "m + ROWS - 1 -> m + ROWS + 1": DIVISION,
        "(rows + 1) // 2 * 2 -> (rows + 1) // 2 + 2": DIVISION,
    },
    "cpu.dropout._words": {
        "skipped + room.size - SPARE -> skipped + room.size + SPARE": DRAWN,
    },
    "cpu.dropout._forward_rows": {
        "bottom - top -> bottom + top": DRAWN,
        "columns - left -> columns + left": DRAWN,
    },
    "cpu.dropout._backward_rows": {
        "bottom - top -> bottom + top": DRAWN,
        "columns - left -> columns + left (1)": DRAWN,
    },
    "cpu.embedding._gather": {
        "indices.size + per - 1 -> indices.size + per + 1": NOTHING,
        "block * per -> block + per (2)": "some rows are copied twice",
    },
    "cpu.embedding._boundary": {
        "2 * starts[middle] -> 2 + starts[middle]": DIVISION,
    },
    "cpu.reductions._moments_tile": {f"b - a -> b + a ({k})": ROOM for k in (1, 2, 3)},
    "cpu.reductions._log_sum_exp_tile": {f"b - a -> b + a ({k})": ROOM for k in (1, 2)},
    "cpu.softmax.statistics": {
        "base + T(MARGIN) -> base - T(MARGIN)": "sums are scaled anew more often",
    },
    "cpu.scan._tiles": {"b - a -> b + a": ROOM},
    "cpu.softmax._softmax_tile": {"b - a -> b + a (1)": ROOM},
    "cpu.softmax._log_softmax_tile": {"b - a -> b + a (1)": ROOM},
    "cpu.softmax._backward_tile": {"b - a -> b + a": ROOM},
    "cpu.cross_entropy._loss_tile": {"b - a -> b + a": ROOM},
    "cpu.cross_entropy._gradient_tile": {f"b - a -> b + a ({k})": ROOM for k in (1, 2, 3)},
    "cpu.batch_norm.column_moments": {
        "start + offset -> start - offset": "what is left of the mean makes up for it",
    },
    "cpu.reduce._squares_of_T": {
        "total += x * x -> total -= x * x": "such a sum is taken again, in double precision",
    },
    "cpu.weight_gradient._sum_squares": {
        "part += a[first + j] * a[first + j] -> part -= a[first + j] * a[first + j]": (
            "such a sum is taken again, in double"
        ),
        "total += np.float64(part) -> total -= np.float64(part)": (
            "such a sum is taken again, in double"
        ),
    },
    **{
        f"cpu.layers.{body}": {"rows + PIECE - 1 -> rows + PIECE + 1": DIVISION}
        for body in ("_forward", "_backward")
    },
    "cpu.wide._part": {"side + width - 1 -> side + width + 1": NOTHING},
    "cpu.wide._chunks": dict.fromkeys(
        ("rows + PIECE -> rows - PIECE", "rows + PIECE - 1 -> rows + PIECE + 1"), DIVISION
    ),
    **{
        f"cpu.wide.{body}": {"outputs > rows -> outputs <= rows": DIVISION}
        for body in ("_layer", "_layer_turned")
    },
    "cpu.wide._forward": dict.fromkeys(WORK, DIVISION),
    "cpu.wide._forward_turned": {
        **dict.fromkeys(WORK, DIVISION),
        "rows + width - 1 -> rows + width + 1": ROOM,
        "k + 1 -> k - 1 (1)": "the widest layer is found among the others, too",
    },
    "cpu.wide._backward": {
        **dict.fromkeys((WORK[0] + " (2)", WORK[1]), DIVISION),
        **dict.fromkeys(
            (
                "rows * outputs -> rows + outputs (1)",
                "rows * outputs < FEW -> rows * outputs >= FEW",
                "inputs > rows -> inputs <= rows (1)",
            ),
            DIVISION,
        ),
        **{f"{side} + width - 1 -> {side} + width + 1": ROOM for side in ("inputs", "outputs")},
    },
    "cpu.weight_gradient.units": dict.fromkeys(
        ("m + STRIP - 1 -> m + STRIP + 1", "n + WIDTH - 1 -> n + WIDTH + 1"), NOTHING
    ),
    "cpu.weight_gradient.compute_unit": dict.fromkeys(
        ("m + STRIP - 1 -> m + STRIP + 1", "n + width - 1 -> n + width + 1"), DIVISION
    ),
    "cpu.gemm._bounds": {
        "x.shape[axis] - 1 -> x.shape[axis] + 1": "operands beside the result are copied, too",
    },
    "cpu.gemm._obstacles": {
        "found + 4 -> found - 4": "below 0 it is as good as above 3",
    },
    "cpu.gemm._share": {
        "side + STRIP - 1 -> side + STRIP + 1": "a strip more would have no rows",
    },
    "cpu.gemm.many": dict.fromkeys(
        (
            "out.shape[0] * out.shape[1] -> out.shape[0] + out.shape[1]",
            "m * n -> m + n",
            "m * n * k -> m * n + k",
            "_blas_threads() == 1 -> _blas_threads() != 1",
            "items * work -> items + work",
            "8 * parts -> 8 + parts",
            "items < 8 * parts -> items >= 8 * parts",
            "n + width - 1 -> n + width + 1",
            "n > m -> n <= m",
        ),
        DIVISION,
    ),
}


@cache
def expected(check):
    """What the generic text computes."""
    with gg.use_kernels("off"), np.errstate(all="ignore"):
        return [np.array(x) for x in getattr(families, check)()]


def run(check):
    """What the kernels compute is what the generic text does."""
    wanted = iter(expected(check))
    with interpreted(), gg.use_kernels("require"), np.errstate(all="ignore"):
        for got, want in zip(getattr(families, check)(), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@cache
def passes(check):
    """The kernels as they are pass; looked at once."""
    run(check)


def test_every_body_has_a_check():
    names = [m.name for m in pkgutil.iter_modules(kernels.__path__) if not m.ispkg]
    names += [f"cpu.{m.name}" for m in pkgutil.iter_modules(cpu.__path__)]
    found = {name: bodies(importlib.import_module(f"gpugrad.kernels.{name}")) for name in names}
    can_change = {name for name, those in found.items() if any(map(operators, those.values()))}
    assert can_change == set(CHECKS)


@pytest.mark.parametrize(
    ("name", "template", "checks"),
    [
        pytest.param(f"{family}.{name}", template, checks, id=f"{family}.{name}")
        for family, checks in CHECKS.items()
        for name, template in bodies(importlib.import_module(f"gpugrad.kernels.{family}")).items()
        if operators(template)
    ],
)
def test_a_changed_operator_is_noticed(name, template, checks):
    def check():
        for one in checks:
            run(one)

    for one in checks:
        passes(one)
    missed = unnoticed(template, EQUAL.get(name, {}), check)
    assert not missed, f"nobody noticed {missed}"
