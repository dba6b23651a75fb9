"""Attention: blocks, masks, memory, what is kept, and bad input."""

import tracemalloc

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.core.primitive import composites, registry, sample
from gpugrad.errors import DeviceError, DTypeError, ParameterError, ShapeError
from gpugrad.nn import functional as F
from gpugrad.ops import shares
from gpugrad.ops.attention import attention, packed_attention
from tests.kernels.parity import DTYPES
from tests.ops.harness import DEVICES, case_of, cases, check_derivatives, check_value

INF = np.inf

CASES = [
    case
    for made in (
        registry["attention"],
        registry["packed_attention"],
        composites["scaled_dot_product_attention"],
    )
    for case in cases(made)
]


def arrays(*shapes, dtype="float64"):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


# -- blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_of_any_size_give_the_same(case, block, device, monkeypatch) -> None:
    monkeypatch.setattr(shares, "BLOCK", block)
    with gg.use_kernels("off"):
        check_value(case, device)
        if block == 2 and device == "cpu":
            check_derivatives(case, device)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (3, 5, 5), (2, 1, 5, 5), (5, 5)])
def test_gradients_of_masks_of_any_shape(shape, is_causal, monkeypatch) -> None:
    monkeypatch.setattr(shares, "BLOCK", 2)
    made = registry["attention"]
    q, k, v = arrays((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 2))
    (mask,) = arrays(shape)
    tried = sample(q, k, v, mask, is_causal=is_causal)
    check_derivatives(case_of(made, tried, 0), "cpu")


def test_causal_blocks_that_nobody_sees_are_skipped() -> None:
    plan = shares.Shares(np, (), 700, 900, None, True, 1.0, 0.0, 0, 0)
    seen = {(rows.start, columns.start) for rows, columns in plan.blocks()}
    assert seen == {(i, j) for i in (0, 256, 512) for j in (0, 256, 512) if i >= j}


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("added", [False, True])
def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient(added, mode) -> None:
    q, k, v = (gg.tensor(x, requires_grad=True) for x in arrays((3, 4), (5, 4), (5, 2)))
    mask = np.ones((3, 5), bool)
    mask[1] = False
    given = np.where(mask, 0.0, -INF) if added else mask
    with gg.use_kernels(mode):
        y = gg.scaled_dot_product_attention(q, k, v, gg.asarray(given))
        y.backward(gg.ones_like(y))
    assert not y.detach().numpy()[1].any()
    assert y.detach().numpy()[[0, 2]].all()
    assert not q.grad.numpy()[1].any()
    assert all(np.isfinite(x.grad.numpy()).all() for x in (q, k, v))


@pytest.mark.parametrize("mode", ["off", "require"])
def test_a_causal_mask_counts_from_the_first_key(mode) -> None:
    """As in PyTorch: query i sees the keys up to number i, however many there are."""
    for queries, keys in ((3, 5), (5, 3)):
        q, k, v = arrays((queries, 4), (keys, 4), (keys, 2))
        with gg.use_kernels(mode):
            a = gg.scaled_dot_product_attention(q, k, v, is_causal=True).numpy()
            b = gg.scaled_dot_product_attention(q, k, v, np.tri(queries, keys, dtype=bool)).numpy()
        np.testing.assert_allclose(a, b, rtol=1e-14)


def test_a_mask_of_one_axis_is_one_of_keys() -> None:
    q, k, v = arrays((2, 3, 4), (2, 5, 4), (2, 5, 2))
    seen = np.array([True, False, True, True, False])
    a = gg.scaled_dot_product_attention(q, k, v, seen).numpy()
    b = gg.scaled_dot_product_attention(q, k[:, seen], v[:, seen]).numpy()
    np.testing.assert_allclose(a, b, rtol=1e-13)


@pytest.mark.parametrize("value", [np.nan, INF])
def test_what_is_not_finite_stays_in_its_row(value) -> None:
    q, k, v = arrays((4, 3), (5, 3), (5, 2))
    q[2, 1] = value
    for mode in ("off", "require"):
        with gg.use_kernels(mode), np.errstate(invalid="ignore"):
            y = gg.scaled_dot_product_attention(q, k, v).numpy()
        assert np.array_equal(np.isnan(y).any(axis=1), [False, False, True, False])


def test_large_scores_do_not_overflow() -> None:
    q, k, v = arrays((4, 3), (5, 3), (5, 2), dtype="float32")
    for mode in ("off", "require"):
        with gg.use_kernels(mode):
            y = gg.scaled_dot_product_attention(q * 1e4, k * 1e4, v).numpy()
        best = (q.astype("float64") @ k.T).argmax(axis=1)
        np.testing.assert_allclose(y, v[best], rtol=1e-6)


# -- memory ----------------------------------------------------------------------------------------


def peak(length: int) -> int:
    """Bytes that one forward and backward pass takes at most, beside its operands."""
    x = gg.tensor(np.ones((length, 24), "float32"), requires_grad=True)
    tracemalloc.start()
    try:
        y = packed_attention(x, heads=2, is_causal=True)
        y.backward(gg.ones_like(y))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_linear_in_the_length() -> None:
    with gg.use_kernels("off"):
        short, long = peak(1024), peak(8192)
    assert long < 9 * short
    assert long < 8192 * 8192 * 4 / 8


def test_only_operands_result_and_a_number_per_query_are_kept() -> None:
    q, k, v = (gg.tensor(x, requires_grad=True) for x in arrays((2, 9, 4), (2, 7, 4), (2, 7, 3)))
    y = attention(q, k, v, dropout_p=0.5)
    kept = y._node.saved()
    assert sorted(x.shape for x in kept.values() if x is not None) == sorted(
        [(2, 9, 4), (2, 7, 4), (2, 7, 3), (2, 9, 3), (2, 9)]
    )


# -- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32(dtype, mode) -> None:
    shapes = (2, 40, 8), (2, 300, 8), (2, 300, 5), (40, 300)
    q, k, v, mask = (gg.tensor(x.astype(DTYPES[dtype])) for x in arrays(*shapes))
    wide = [x.to(dtype="float64") for x in (q, k, v, mask)]
    for operands in ((q, k, v, mask), wide):
        for x in operands[:3]:
            x.requires_grad_()
    with gg.use_kernels(mode):
        y, t = (gg.scaled_dot_product_attention(*x) for x in ((q, k, v, mask), wide))
        y.backward(gg.ones_like(y))
        t.backward(gg.ones_like(t))
    assert y.dtype == q.dtype
    pairs = [(y, t), *((a.grad, b.grad) for a, b in zip((q, k, v), wide, strict=False))]
    eps = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    for a, b in pairs:
        got, true = (np.asarray(x.detach().numpy(), "float64") for x in (a, b))
        # The backward pass is told the result as it is stored.
        assert np.abs(got - true).max() <= 4 * eps * np.abs(true).max()


# -- bad input -------------------------------------------------------------------------------------

Q, K, V = arrays((2, 3, 4), (2, 5, 4), (2, 5, 2))

BAD = [
    ((Q[0, 0], K, V), {}, ShapeError, r"query of shape \(4,\).*two axes"),
    ((Q[..., :3], K, V), {}, ShapeError, "3 features and a key 4"),
    ((Q, K, V[:, :4]), {}, ShapeError, "5 keys and 4 values"),
    ((Q, K[[0, 0, 0]], V[[0, 0, 0]]), {}, ShapeError, r"\(2,\), \(3,\).*enable_gqa=True"),
    ((Q, K, V, np.ones((3, 4), bool)), {}, ShapeError,
     r"attn_mask of shape \(3, 4\).*\(2, 3, 5\)"),
    ((Q, K, V, np.ones((2, 1, 3, 4), bool)), {}, ShapeError, "attn_mask"),
    ((Q, K, V, np.ones((3, 5), int)), {}, DTypeError, "attn_mask is int64.*boolean"),
    ((Q.astype("float32"), K, V), {}, DTypeError, "query is float32, key float64.*\\.to"),
    ((Q.astype(int), K.astype(int), V.astype(int)), {}, DTypeError, "int64.*floating-point"),
    ((Q, K, V), {"enable_gqa": True, "scale": 1.0}, None, ""),
    ((Q[[0, 1, 0]], K, V), {"enable_gqa": True}, ShapeError, "enable_gqa=True.*divisor"),
    ((Q[0], K[0], V[0]), {"enable_gqa": True}, ShapeError, "axis -3 counts heads"),
    ((Q, K, V), {"dropout_p": 1.5}, ParameterError, "probability"),
]  # fmt: skip


def test_the_primitive_wants_two_axes_of_a_mask() -> None:
    with pytest.raises(ShapeError, match=r"attn_mask of shape \(5,\) has no axes for queries"):
        attention(gg.asarray(Q), gg.asarray(K), gg.asarray(V), gg.asarray(np.ones(5, bool)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operands", "options", "error", "text"), BAD)
def test_operands_that_do_not_fit(operands, options, error, text, device) -> None:
    given = [gg.asarray(x, device=device) for x in operands]
    if error is None:
        F.scaled_dot_product_attention(*given, **options)
        return
    with pytest.raises(error, match=text):
        F.scaled_dot_product_attention(*given, **options)


def test_packed_operands_that_do_not_fit() -> None:
    for shape, heads in (((3, 10), 1), ((3, 12), 3), ((12,), 2), ((3, 12), 0)):
        with pytest.raises(ShapeError, match=rf"packed_attention: .*for {heads} heads.*side by"):
            packed_attention(gg.zeros(shape), heads=heads)


def test_operands_on_different_devices() -> None:
    q, k, v = map(gg.asarray, (Q, K, V))
    with pytest.raises(DeviceError, match="different devices"):
        attention(q, k.to("strict:device1"), v)
