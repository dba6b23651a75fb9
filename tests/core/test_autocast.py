"""Mixed precision: what is converted, what gradients come back, what is kept in between."""

import threading

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.nn import functional as F


def f32(*shape, seed=0):
    return gg.tensor(np.random.default_rng(seed).standard_normal(shape).astype("float32"))


def name(x):
    return x.dtype.name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_are_narrow_and_sums_wide(dtype):
    x, w, b = f32(4, 3), f32(5, 3, seed=1), f32(5, seed=2)
    with gg.autocast("cpu", dtype=dtype):
        assert name(x @ w.mT) == dtype
        assert name(F.linear(x, w, b)) == dtype
        assert name(F.linear(x, w, b, activation="tanh")) == dtype
        y = F.linear(x, w)
        assert name(gg.relu(y)) == name(y * 2) == dtype
        for wide in (gg.exp(y), gg.sum(y), gg.softmax(y), F.layer_norm(y, (5,)), gg.mean(y)):
            assert name(wide) == "float32"
        assert name(F.cross_entropy(y, gg.tensor([0, 1, 2, 3]))) == "float32"
        assert name(y + x[:, :1]) == "float32"
    assert name(x @ w.mT) == "float32"


def test_float64_and_integers_are_left_alone():
    x = gg.tensor(np.ones((2, 2)))
    with gg.autocast("cpu"):
        assert name(x @ x) == "float64"
        assert name(gg.sum(gg.tensor([1, 2]))) == "int64"
        assert name(gg.exp(x)) == "float64"


def test_gradients_of_parameters_stay_wide_and_are_nearly_right():
    def run(enabled):
        gg.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))
        x, target = f32(32, 6), gg.tensor(np.arange(32) % 3)
        with gg.autocast("cpu", enabled=enabled):
            loss = F.cross_entropy(net(x), target)
        loss.backward()
        return loss.item(), [p.grad.numpy() for p in net.parameters()]

    (narrow, grads), (wide, want) = run(True), run(False)
    assert narrow != wide
    assert narrow == pytest.approx(wide, rel=2e-2)
    for a, b in zip(grads, want):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max())


def test_the_gradient_of_a_converted_operand_is_the_cast_gradient():
    x, w = f32(8, 4).requires_grad_(), f32(3, 4, seed=1).requires_grad_()
    with gg.autocast("cpu", dtype="float16"):
        F.linear(x, w).backward(gg.ones((8, 3), dtype="float16"))
    low = w.detach().numpy().astype("float16").astype("float32")
    want = np.ones((8, 3), "float32") @ low
    np.testing.assert_array_equal(x.grad.numpy(), want.astype("float16").astype("float32"))


def test_a_parameter_is_converted_once_as_long_as_it_does_not_change():
    w, x = f32(3, 3).requires_grad_(), f32(2, 3)

    def conversions(y):
        return sum("cast" in line for line in str(gg.graph(y)).splitlines())

    with gg.autocast("cpu"):
        twice = (x @ w) * (x @ w)
        assert conversions(twice) == 1
        first = (x @ w).to("float32").detach().numpy()
        with gg.no_grad():
            w *= 2.0
        second = (x @ w).to("float32").detach().numpy()
    np.testing.assert_allclose(second, 2 * first, rtol=1e-2)
    with gg.autocast("cpu", cache_enabled=False):
        assert conversions((x @ w) * (x @ w)) == 2


def test_blocks_nest_and_belong_to_a_thread():
    x = f32(2, 2)
    seen = []
    with gg.autocast("cpu"):
        with gg.autocast("cpu", enabled=False):
            assert not gg.is_autocast_enabled()
            assert name(x @ x) == "float32"
        with gg.autocast("cuda"):
            assert name(x @ x) == "float32"  # not there
        assert name(x @ x) == "bfloat16"
        worker = threading.Thread(target=lambda: seen.append(name(x @ x)))
        worker.start()
        worker.join()
    assert seen == ["float32"]
    assert not gg.is_autocast_enabled()


def test_an_error_ends_the_block():
    with pytest.raises(ZeroDivisionError), gg.autocast("cpu"):
        raise ZeroDivisionError
    assert not gg.is_autocast_enabled()


def test_a_decorated_function():
    @gg.autocast("cpu", dtype="float16")
    def product(x):
        return x @ x

    assert name(product(f32(2, 2))) == "float16"
    assert name(f32(2, 2) @ f32(2, 2)) == "float32"


def test_a_second_derivative_goes_through():
    x = f32(3, 3)
    with gg.autocast("cpu", dtype="float16"):
        g = gg.hvp(lambda v: gg.sum((v @ v) * v), x, gg.ones((3, 3), dtype="float32"))
    want = gg.hvp(lambda v: gg.sum((v @ v) * v), x, gg.ones((3, 3), dtype="float32"))
    np.testing.assert_allclose(g.numpy(), want.numpy(), atol=3e-2 * np.abs(want.numpy()).max())


def test_what_it_refuses():
    with pytest.raises(gg.errors.DTypeError, match="'float64' is no narrow type"):
        gg.autocast("cpu", dtype="float64")
    with pytest.raises(gg.errors.DTypeError, match='device_type is \'tpu\'; it is "cpu" or "cuda"'):
        gg.autocast("tpu")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_of_narrow_types_add_up_in_single_precision(dtype):
    x = gg.ones((1, 4096), dtype=dtype) if dtype == "float16" else gg.ones((1, 4096)).to(dtype)
    for mode in ("auto", "off"):
        with gg.use_kernels(mode):
            assert float((x @ x.mT).to("float32").item()) == 4096.0
