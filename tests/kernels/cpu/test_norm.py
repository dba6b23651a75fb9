"""Normalisation: parity of the kernels with the generic text, in all layouts, and with float64."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.core.tensor import tensor_of
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import batch_norm, rows
from gpugrad.kernels.moments import from_mean
from gpugrad.ops import normalization as ops
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, EPS, layouts, wide

NUMPY = backend_for_device("cpu")

#: Operation, parameters, shape of the operand, shape of weight and bias (None: it has none).
CALLS: dict = {
    "layer": (gg.layer_norm, {}, (37, 53), (53,), 2),
    "layer of two axes": (gg.layer_norm, {"axes": 2, "eps": 1e-2}, (2, 5, 3, 7), (3, 7), 2),
    "layer without bias": (gg.layer_norm, {}, (37, 53), (53,), 1),
    "layer without weight": (gg.layer_norm, {}, (37, 53), (53,), 0),
    "rms": (gg.rms_norm, {}, (37, 53), (53,), 1),
    "group": (gg.group_norm, {"groups": 3}, (5, 6, 4, 3), (6,), 2),
    "group of one": (gg.group_norm, {"groups": 6}, (5, 6, 7), (6,), 1),
    "group of channels alone": (gg.group_norm, {"groups": 2}, (5, 6), (6,), 2),
    "batch": (ops.batch_norm_training, {}, (37, 53), (53,), 2),
    "batch of images": (ops.batch_norm_training, {"eps": 1e-2}, (7, 6, 5, 3), (6,), 2),
    "batch without weight": (ops.batch_norm_training, {}, (7, 6, 5), (6,), 0),
}
WITH_RESIDUAL: dict = {
    "layer": (gg.add_layer_norm, {}, (37, 53), (53,), 2),
    "rms": (gg.add_rms_norm, {}, (37, 53), (53,), 1),
    "group": (gg.add_group_norm, {"groups": 3}, (5, 6, 4, 3), (6,), 2),
}


def operands(shape, parameter, count, dtype, seed=0):
    rng = np.random.default_rng(seed)
    made = [rng.standard_normal(shape) * 2.0 + 0.5, *rng.standard_normal((count, *parameter))]
    return [v.astype(DTYPES[dtype]) for v in made]


def run(mode, function, *arrays, **parameters):
    """Results and gradients of all arrays, as raw arrays; upstream is random."""
    tensors = [tensor_of(x).requires_grad_() for x in arrays]
    with gg.use_kernels(mode):
        out = function(*tensors, **parameters)
        out = out if isinstance(out, tuple) else (out,)
        rng = np.random.default_rng(9)
        for k, y in enumerate(out):
            g = rng.standard_normal(y.shape).astype(y.data.dtype)
            y.backward(tensor_of(g), retain_graph=k < len(out) - 1)
    return [*(y.data for y in out), *(t.grad.data for t in tensors)]


def agree(got, want, rtol, atol):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(wide(a), wide(b), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_parity(call, dtype):
    function, parameters, shape, parameter, count = call
    arrays = operands(shape, parameter, count, dtype)
    got = run("require", function, *arrays, **parameters)
    want = run("off", function, *(wide(x) for x in arrays), **parameters)
    assert all(a.dtype == DTYPES[dtype] for a in got)
    agree(got, want, 200 * EPS[dtype], 200 * EPS[dtype])


@pytest.mark.parametrize("call", WITH_RESIDUAL.values(), ids=list(WITH_RESIDUAL))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_residual(call, dtype):
    function, parameters, shape, parameter, count = call
    x, *more = operands(shape, parameter, count, dtype)
    residual = operands(shape, parameter, 0, dtype, seed=5)[0]
    got = run("require", function, x, residual, *more, **parameters)
    want = run("off", function, x, residual, *more, **parameters)
    assert np.array_equal(got[1], want[1])  # the sum
    assert np.array_equal(got[2], got[3])  # its gradient goes to both
    assert all(a.dtype == DTYPES[dtype] for a in got)
    scale = 200 if dtype == "float32" else 4
    agree(got, want, scale * EPS[dtype], scale * EPS[dtype])


@pytest.mark.parametrize("call", [CALLS[k] for k in ("layer", "rms", "group", "batch",
                                                     "batch of images")])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32(call, dtype):
    function, parameters, shape, parameter, count = call
    arrays = operands(shape, parameter, count, dtype)
    got = run("require", function, *arrays, **parameters)
    single = run("require", function, *(x.astype("float32") for x in arrays), **parameters)
    assert all(a.dtype == DTYPES[dtype] for a in got)
    # The gradient from above differs by one rounding, and so does what is written.
    agree(got, single, 3 * EPS[dtype], 12 * EPS[dtype])


SHAPES: list = [
    *((gg.layer_norm, {}, s, s[-1:]) for s in [(1, 1), (4, 1), (1, 9), (0, 3), (3, 0), (8192, 3)]),
    (gg.layer_norm, {}, (3, 9001), (9001,)),  # longer than what is summed in single precision
    (gg.layer_norm, {}, (7,), (7,)),
    (gg.layer_norm, {"axes": 2}, (2, 3), (2, 3)),
    (gg.group_norm, {"groups": 2}, (0, 4, 3), (4,)),
    (gg.group_norm, {"groups": 2}, (3, 4, 0), (4,)),
    (gg.group_norm, {"groups": 1}, (1, 1, 1), (1,)),
    (gg.group_norm, {"groups": 4}, (300, 8, 9), (8,)),
    (ops.batch_norm_training, {}, (0, 3), (3,)),
    (ops.batch_norm_training, {}, (2, 3, 0), (3,)),
    (ops.batch_norm_training, {}, (5, 0), (0,)),
    (ops.batch_norm_training, {}, (1, 3), (3,)),
    (ops.batch_norm_training, {}, (4096, 3), (3,)),  # columns side by side, several lots
    (ops.batch_norm_training, {}, (2000, 300), (300,)),
    (ops.batch_norm_training, {}, (40, 3, 500), (3,)),
]


@pytest.mark.parametrize(("function", "parameters", "shape", "parameter"), SHAPES)
def test_shapes(function, parameters, shape, parameter):
    arrays = operands(shape, parameter, 2, "float64")
    got = run("require", function, *arrays, **parameters)
    want = run("off", function, *arrays, **parameters)
    agree(got, want, 1e-10, 1e-10)


@pytest.mark.parametrize("name", ["layer", "group", "batch", "batch of images"])
def test_layouts(name):
    function, parameters, shape, parameter, count = CALLS[name]
    x, *more = operands(shape, parameter, count, "float32")
    want = run("require", function, x, *more, **parameters)
    for label, laid in layouts(x):
        got = run("require", function, laid, *more, **parameters)
        agree(got, want, 2e-6, 2e-6)
        assert label == "transposed" or all(np.array_equal(a, b) for a, b in zip(got, want))
    for _, laid in layouts(more[0]):
        got = run("require", function, x, laid, *more[1:], **parameters)
        assert all(np.array_equal(a, b) for a, b in zip(got, want))


def test_channels_last_are_read_where_they_are():
    function, parameters, shape, parameter, count = CALLS["batch of images"]
    x, *more = operands(shape, parameter, count, "float32")
    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    got = run("require", function, last, *more, **parameters)
    agree(got, run("require", function, x, *more, **parameters), 1e-5, 1e-5)
    for y in (got[0], got[1]):  # the result and the gradient lie as the operand does
        assert np.moveaxis(y, 1, -1).flags.c_contiguous


def results(mode, function, *args, **parameters):
    with gg.use_kernels(mode):
        return function(NUMPY, *args, **parameters)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 0, 0)])
def test_only_the_gradients_that_are_needed(needs):
    (x,), (g,) = (operands((40, 6, 5), (6,), 0, "float64", seed) for seed in (0, 1))
    w = np.linspace(1.0, 2.0, 6)
    needs = tuple(map(bool, needs))
    v, up = x[..., 0].copy(), g[..., 0].copy()
    stats = [np.full((40, 1), s) for s in (0.3, 0.0, 2.0)]
    calls = [
        (ops.layer_norm_backward, (up, v, w, stats, 1, 1e-5, needs)),
        (ops.layer_norm_backward, (up, v, w, None, 1, 1e-5, needs, up)),
        (ops.group_norm_backward, (g, x, w, None, 3, 1e-5, needs)),
        (ops.batch_norm_backward, (up, v, w, None, 1e-5, needs)),
        (ops.batch_norm_backward, (g, x, w, None, 1e-5, needs)),
        (ops.batch_norm_inference_backward, (g, x, w, w, w, 1e-5, (*needs, True, False))),
    ]
    for function, args in calls:
        got, want = (results(mode, function, *args) for mode in ("require", "off"))
        assert [v is None for v in got] == [v is None for v in want]
        agree([v for v in got if v is not None], [v for v in want if v is not None], 1e-10, 1e-12)


def test_moments_and_inference():
    for shape in ((50, 6), (5, 6, 4, 3)):
        x, w, b = operands(shape, (6,), 2, "float32")
        got, want = (results(mode, lambda m, x: m.batch_moments(x), x)
                     for mode in ("require", "off"))  # fmt: skip
        agree(got, want, 1e-5, 1e-6)
        mean, var = got[0], got[2]
        for more in ((), (w,), (w, b), (None, b)):
            arrays = [x, mean, var, *(v for v in more if v is not None)]

            def call(x, mean, var, *rest, more=more):
                given = iter(rest)
                filled = [None if v is None else next(given) for v in more]
                return gg.batch_norm_inference(x, mean, var, *filled)

            agree(run("require", call, *arrays), run("off", call, *arrays), 1e-4, 1e-4)


def test_statistics_are_those_of_the_generic_text():
    x, w, b = operands((40, 6), (6,), 2, "float32")
    for function, parameters, value in (
        (gg.layer_norm, {}, x),
        (gg.rms_norm, {}, x),
        (gg.group_norm, {"groups": 2}, x),
        (gg.group_norm, {"groups": 2}, np.stack([x, x], -1)),
        (ops.batch_norm_training, {}, x),
    ):
        saved = []
        for mode in ("require", "off"):
            more = (w,) if function is gg.rms_norm else (w, b)
            with gg.use_kernels(mode):
                y = function(tensor_of(value).requires_grad_(), *more, **parameters)
            saved.append(y._node.saved())
        assert saved[0].keys() == saved[1].keys()
        for name in saved[0]:
            got, want = saved[0][name], saved[1][name]
            assert got.shape == want.shape, name
            if name == "rest":  # a rounding error, of the mean beside it
                total = [wide(s["mean"]) + wide(s["rest"]) for s in saved]
                np.testing.assert_allclose(*total, rtol=0, atol=1e-6)
            else:
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("name", ["layer", "group", "batch", "batch of images"])
def test_a_small_deviation_beside_a_large_mean(name, mode):
    """Mean 1e4 and deviation 1e-2: five digits of single precision are left, and all are used."""
    function, parameters, shape, *_ = CALLS[name]
    rng = np.random.default_rng(0)
    x = (1e4 + 1e-2 * rng.standard_normal((8, *shape[1:]))).astype("float32")
    options: dict = {**parameters, "eps": 1e-12}
    got = run(mode, function, x, **options)
    want = run("off", function, wide(x), **options)
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-4 * np.abs(want[1]).max())
    outlier = x.copy()
    outlier.reshape(-1)[0] = 0.0  # distances are taken from the first element
    got, want = (
        run(mode, function, outlier, **options),
        run("off", function, wide(outlier), **options),
    )
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["off", "require"])
def test_nan_stays_in_its_row(mode):
    x, w, b = operands((50, 40), (40,), 2, "float32")
    clean = run(mode, gg.layer_norm, x, w, b)
    x[7, 3], x[9, 0] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        y, gx, gw, gb = run(mode, gg.layer_norm, x, w, b)
    bad = np.isin(np.arange(50), (7, 9))
    for got, want in ((y, clean[0]), (gx, clean[1])):
        assert np.isnan(got[bad]).all()
        assert np.array_equal(got[~bad], want[~bad])
    assert np.isnan(gw).all()
    assert np.array_equal(gb, clean[3])
    x, w, b = operands((6, 4, 10), (4,), 2, "float32")
    x[2, 1, 5] = np.nan
    with np.errstate(invalid="ignore"):
        grouped = run(mode, gg.group_norm, x, w, b, groups=2)[0]
        batched = run(mode, ops.batch_norm_training, x, w, b)[0]
    at = np.argwhere(np.isnan(grouped))
    assert {tuple(i) for i in at[:, :2]} == {(2, 0), (2, 1)}
    assert set(np.argwhere(np.isnan(batched))[:, 1]) == {1}


@pytest.mark.parametrize("mode", ["off", "require"])
def test_constant_rows(mode):
    x = np.full((5, 8), 3.7, "float32")
    w, b = np.ones(8, "float32"), np.arange(8, dtype="float32")
    y, gx, gw, _ = run(mode, gg.layer_norm, x, w, b)
    assert np.array_equal(y, np.tile(b, (5, 1)))
    assert np.isfinite(gx).all()
    assert np.array_equal(gw, np.zeros(8))


def test_any_number_of_threads_gives_the_same_bits():
    from numba import get_num_threads, set_num_threads

    calls = [
        (gg.layer_norm, {}, (1000, 96), (96,)),
        (gg.group_norm, {"groups": 4}, (64, 8, 50), (8,)),
        (ops.batch_norm_training, {}, (3000, 70), (70,)),
        (ops.batch_norm_training, {}, (64, 8, 50), (8,)),
    ]
    before = get_num_threads()
    for function, parameters, shape, parameter in calls:
        arrays = operands(shape, parameter, 2, "float32")
        seen = []
        try:
            for threads in range(1, before + 1):
                set_num_threads(threads)
                seen.append(run("require", function, *arrays, **parameters))
        finally:
            set_num_threads(before)
        seen.append(run("require", function, *arrays, **parameters))
        for other in seen[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(other, seen[0]))


def test_refusals_are_told():
    x, w = np.zeros((4, 6), "float32"), np.zeros(6, "float32")
    cases = [
        (lambda: gg.layer_norm(x, np.zeros(6)), "weight or bias of float64 beside float32"),
        (lambda: gg.layer_norm(x, w[:5]), r"shape \(5,\) where \(6,\) is needed"),
        (lambda: gg.layer_norm(x, axes=3), "3 axes of 2"),
        (lambda: gg.group_norm(x, groups=4), "4 groups in the shape"),
        (lambda: gg.rms_norm(x.astype("int32")), "no kernel for int32"),
        (lambda: gg.add_layer_norm(x, x.astype("float64")), "operands of float32 and float64"),
        (lambda: ops.batch_moments(w), "no axis of channels"),
        (lambda: gg.batch_norm_inference(x, w[:5], w), "moments that are not 6 numbers"),
    ]
    with gg.use_kernels("require"):
        for call, reason in cases:
            with pytest.raises(KernelError, match=reason):
                call()


def test_explain_names_the_kernels():
    x = gg.tensor(np.ones((64, 64), "float32"), requires_grad=True)

    def step(x):
        y = gg.layer_norm(x)
        gg.sum(y * y).backward()
        return y

    text = str(gg.explain(step)(x))
    assert "layer_norm_backward" in text
    assert text.count("numba cpu") >= 2


def test_loops_are_vectorised():
    """More than the remainder of every loop over elements is done several at a time."""
    one = np.ones(4, "float32")
    x, w = np.ones((4, 64), "float32"), np.ones(64, "float32")
    both = {"centre": from_mean, "plus": rows.with_more}
    loops = [
        (rows.add_rows, (x, x, x), 1),
        (rows.row_moments, (x, one, one, one), 4),
        (rows.row_mean_squares, (x, one, one, one), 1),
        (rows.scale_rows.bind(centre=from_mean), (x, one, one, one, w, w, x), 4),
        (
            rows.row_gradients.bind(**both, level_of=rows.as_it_is, collect=rows.to_both),
            (x, x, w, one, one, one, x, x, w, w),
            12,
        ),
        (rows.fold_rows, (x, w), 1),
        (rows.scale_segments, (x, 0, 1, one, one, one, one, one, x), 4),
        (rows.segment_sums, (x, x, 0, 1, one, one, one, one, one), 4),
        (
            rows.segment_gradients.bind(plus=rows.with_more),
            (x, x, 0, 1, one, one, one, one, one, one, x, x),
            6,
        ),
        (batch_norm.column_moments, (x, w, w, w), 6),
        (batch_norm.scale_columns, (x, w, w, w, w, x), 3),
        (batch_norm.column_sums, (x, x, w, w, w, w), 4),
        (batch_norm.column_gradients, (x, x, w, w, w, w, w, x), 5),
    ]
    for loop, args, least in loops:
        found = packed(assembly(loop["float32"], *args))
        assert found >= least, f"{loop.name}: {found} packed instructions"
