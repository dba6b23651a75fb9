"""Normalisation: what nodes keep, half precision, results used in part, errors and their fix."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import DTypeError, ParameterError, ShapeError
from gpugrad.ops import normalization as ops


def random(*shape, seed=0, dtype="float64"):
    return gg.tensor(np.random.default_rng(seed).standard_normal(shape), dtype=dtype)


def test_a_node_keeps_the_operand_the_weight_and_two_or_three_numbers_of_a_row() -> None:
    x, w, b = random(4, 6).requires_grad_(), random(6), random(6)
    assert set(gg.layer_norm(x, w, b)._node.saved()) == {"x", "weight", "mean", "rest", "rstd"}
    saved = gg.rms_norm(x, w)._node.saved()
    assert set(saved) == {"x", "weight", "rstd"}
    assert saved["rstd"].shape == (4, 1)
    assert saved["x"] is x.data


@pytest.mark.parametrize("device", ["cpu", "strict:device1"])
def test_half_precision_neither_overflows_nor_loses_the_variance(device) -> None:
    x = np.array([[300.0, 301.0, 299.0, 300.0], [6e4, -6e4, 6e4, -6e4]])
    want = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    kind = "float16" if device == "cpu" else "float32"  # the standard knows no float16
    t = gg.tensor(x, dtype=kind, device=device).requires_grad_()
    y = gg.layer_norm(t, eps=0.0)
    assert y.dtype == np.dtype(kind)
    np.testing.assert_allclose(gg.asarray(y.detach()).to("cpu").numpy(), want, rtol=1e-3)
    y.backward(gg.ones_like(y))
    assert np.isfinite(t.grad.to("cpu").numpy()).all()
    mean, _, var = ops.batch_moments(t)
    assert mean.dtype == var.dtype == np.float32
    np.testing.assert_allclose(var.detach().to("cpu").numpy(), x.var(0), rtol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, r, w: gg.add_layer_norm(x, r, w),
        lambda x, r, w: gg.add_rms_norm(x, r, w),
        lambda x, r, w: gg.add_group_norm(x, r, w, groups=2),
        lambda x, r, w: gg.add_batch_norm(x, r, w)[:2],
    ],
)
@pytest.mark.parametrize("part", [0, 1])
def test_either_result_of_a_sum_that_is_normalised_may_be_used_alone(call, part) -> None:
    x, r, w = random(5, 4), random(5, 4, seed=1), random(4, seed=2)
    up = random(5, 4, seed=3)
    first, second = gg.grad(lambda x, r: gg.sum(call(x, r, w)[part] * up), argnums=(0, 1))(x, r)
    assert np.array_equal(first.numpy(), second.numpy())
    assert (part == 1) == np.array_equal(first.numpy(), up.numpy())


def test_the_moments_of_a_batch_have_gradients_too() -> None:
    x = random(5, 3, seed=1)

    def loss(x):
        y, mean, var = gg.batch_norm(x)
        return gg.sum(y**3) + gg.sum(mean**2) + gg.sum(var**2)

    gg.check_grads(loss, [x], order=2, rtol=1e-5, atol=1e-7)


def test_known_moments_give_the_same() -> None:
    x, w = random(5, 3).requires_grad_(), random(3, seed=1)
    moments = tuple(v.data for v in ops.batch_moments(x.detach()))
    a = ops.batch_norm_training(x, w, moments=moments)
    b = ops.batch_norm_training(x, w)
    assert np.array_equal(a.detach().numpy(), b.detach().numpy())
    up = random(5, 3, seed=2)
    grads = []
    for y in (a, b):
        x.grad = None
        y.backward(up)
        grads.append(x.grad.numpy())
    assert np.array_equal(*grads)


@pytest.mark.parametrize(
    "call",
    [gg.layer_norm, lambda v: gg.batch_norm(v)[0], lambda v: gg.group_norm(v, groups=5)],
)
def test_a_mean_far_from_zero(call) -> None:
    """1e8 beside a deviation of 1: no digits are lost in float64, forward nor backward."""
    far = random(6, 50) + 1e8
    near = gg.tensor(far.numpy() - 1e8)
    np.testing.assert_allclose(call(far).numpy(), call(near).numpy(), rtol=0, atol=1e-12)
    slopes = [gg.grad(lambda v: gg.sum(call(v) ** 3))(v).numpy() for v in (far, near)]
    np.testing.assert_allclose(*slopes, rtol=0, atol=1e-10)


X, W = np.zeros((4, 6)), np.zeros(6)
ERRORS = [
    (lambda: gg.layer_norm(X, W[:5]), ShapeError, r"weight of shape \(5,\).*\(4, 6\).*\(6,\)"),
    (lambda: gg.layer_norm(X, W, X), ShapeError, r"bias of shape \(4, 6\).*takes one of shape"),
    (lambda: gg.layer_norm(X, W, axes=2), ShapeError, r"weight of shape \(6,\).*\(4, 6\)"),
    (lambda: gg.layer_norm(X, axes=3), ShapeError, r"axes=3.*from 1 to the number of axes"),
    (lambda: gg.layer_norm(X, axes=0), ShapeError, "axes=0"),
    (lambda: gg.layer_norm(1.0), ShapeError, r"x of shape \(\)"),
    (lambda: gg.layer_norm(X, W.astype("f4")), DTypeError, r"weight is float32.*float64.*\.to\("),
    (lambda: gg.rms_norm(X.astype("i8")), DTypeError, "int64"),
    (lambda: gg.rms_norm(X + 1j), DTypeError, "complex128"),
    (lambda: gg.group_norm(X, groups=4), ParameterError, "6 channels.*4 groups.*divisor"),
    (lambda: gg.group_norm(X, groups=0), ParameterError, "0 groups"),
    (lambda: gg.group_norm(W, groups=1), ShapeError, r"axis 1 holds the channels.*expand_dims"),
    (lambda: gg.group_norm(X, X[0, :5], groups=2), ShapeError, r"\(5,\).*\(6,\)"),
    (lambda: gg.batch_norm(W), ShapeError, "axis 1 holds the channels"),
    (lambda: gg.batch_norm(X, W[:5]), ShapeError, r"weight of shape \(5,\)"),
    (lambda: gg.batch_norm_inference(X, W[:5], W), ShapeError, r"mean of shape \(5,\)"),
    (lambda: gg.batch_norm_inference(X, W, W[:5]), ShapeError, r"var of shape \(5,\)"),
    (lambda: gg.add_layer_norm(X, X[:2]), ShapeError, r"float64\[4, 6\].*residual float64\[2, 6\]"),
    (lambda: gg.add_rms_norm(X, X.astype("f4")), DTypeError, "residual float32.*convert"),
    (lambda: gg.add_batch_norm(X, W), ShapeError, r"residual float64\[6\]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), ERRORS)
def test_errors_name_what_met_and_the_fix(call, error, text) -> None:
    with pytest.raises(error, match=text):
        call()
