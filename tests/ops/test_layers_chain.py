"""A chain of layers as one operation, against one operation for each."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import DTypeError, InplaceError, ParameterError, ShapeError
from gpugrad.ops.fused import ACTIVATIONS
from gpugrad.ops.layers import joins, layers
from gpugrad.ops.linalg import linear_activation


def operands(dtype="float64", rows=5, widths=(4, 3, 6, 2)):
    rng = np.random.default_rng(0)
    found = [rng.standard_normal((rows, widths[0]))]
    for shape in zip(widths[1:], widths):
        found += [rng.standard_normal(shape), rng.standard_normal(shape[:1])]
    return [gg.tensor(x.astype(dtype)) for x in found]


def one_by_one(x, *parameters, activation):
    for weight, bias in zip(parameters[::2], parameters[1::2]):
        x = linear_activation(x, weight, bias, activation)
    return x


@pytest.mark.parametrize("mode", ["off", "auto"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_results_and_gradients_are_those_of_separate_layers(activation, mode):
    values = []
    for function in (layers, one_by_one):
        tensors = [x.detach().requires_grad_() for x in operands(rows=200)]
        with gg.use_kernels(mode):
            y = function(*tensors, activation=activation)
            gg.sum(y * y).backward()
        values.append([y.detach().numpy(), *(t.grad.numpy() for t in tensors)])
    for got, want in zip(*values, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_second_order(activation):
    """Gradients of gradients, with and without the kernel."""
    found = []
    for function, mode in ((layers, "require"), (layers, "off"), (one_by_one, "off")):
        tensors = [x.detach().requires_grad_() for x in operands()]
        with gg.use_kernels(mode):
            y = function(*tensors, activation=activation)
            gg.sum(y * y).backward(create_graph=True)
            firsts = [t.grad for t in tensors]
            for t in tensors:
                t.grad = None
            sum(gg.sum(g * g) for g in firsts).backward()
        found.append([t.grad.numpy() for t in tensors])
    for got in found[:2]:
        for a, b in zip(got, found[2], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_an_array_that_comes_twice():
    x, w, b = operands(widths=(4, 4))
    values = []
    for function in (layers, one_by_one):
        tensors = [t.detach().requires_grad_() for t in (x, w, b)]
        function(tensors[0], *tensors[1:] * 3, activation="tanh").backward(gg.ones((5, 4)))
        values.append([t.grad.numpy() for t in tensors])
    for got, want in zip(*values, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("mode", ["require", "off"])
def test_gradients_are_written_into_their_homes(mode):
    tensors = [t.detach().requires_grad_() for t in operands("float32")]
    optimizer = gg.optim.SGD(tensors[1:], lr=0.0)
    with gg.use_kernels(mode):
        for _ in range(2):
            optimizer.zero_grad()
            layers(*tensors, activation="tanh").backward(gg.ones((5, 2), dtype="float32"))
            places = [t._node.home for t in tensors[1:]]
            assert all(t.grad.data is p.lent() for t, p in zip(tensors[1:], places, strict=True))
    once = [t.grad.numpy().copy() for t in tensors[1:]]
    layers(*tensors, activation="tanh").backward(gg.ones((5, 2), dtype="float32"))
    for t, g in zip(tensors[1:], once, strict=True):  # the second is added to the first
        np.testing.assert_allclose(t.grad.numpy(), 2 * g, rtol=1e-5, atol=1e-6)


def test_autocast_narrows_all_operands():
    tensors = [t.detach().requires_grad_() for t in operands("float32")]
    with gg.autocast("cpu"):
        y = layers(*tensors, activation="tanh")
    assert y.dtype.name == "bfloat16"
    y.backward(gg.ones((5, 2), dtype="bfloat16"))
    assert all(t.grad.dtype == np.float32 for t in tensors)


def test_errors():
    x, *parameters = operands()
    with pytest.raises(ShapeError, match="layers: 6 arrays; an input is needed"):
        layers(x, *parameters[:-1])
    with pytest.raises(ParameterError, match="no activation 'gleu'"):
        layers(x, *parameters, activation="gleu")
    with pytest.raises(DTypeError, match="layers: arrays of float32, float64"):
        layers(x, parameters[0].to("float32"), *parameters[1:])
    with pytest.raises(ShapeError, match="the last axis of the input has 4 elements"):
        layers(x, *parameters[2:])


def test_what_joins():
    x, *parameters = operands("float32")
    assert joins(x, parameters)
    assert joins(gg.tensor(np.ones((3, 0, 4), "float32")), parameters)
    assert not joins(x.to("float64"), parameters)
    assert not joins(x, parameters[2:])
    assert not joins(x.to("float16"), [p.to("float16") for p in parameters])
    assert not joins(gg.tensor(np.float32(1.0)), parameters)
    assert not joins(x.numpy(), parameters)
    assert not joins(gg.ones((1 << 17, 4), dtype="float32"), parameters)
    assert not joins(x, [p.to("strict:device1") for p in parameters])
    assert not joins(x.to("strict:device1"), [p.to("strict:device1") for p in parameters])
    assert not joins(x, [parameters[0], parameters[1][:2], *parameters[2:]])
    with gg.use_kernels("off"):
        assert not joins(x, parameters)
    with gg.autocast("cpu"):
        assert not joins(x, parameters)


@pytest.mark.parametrize("which", [0, 1, 4])
def test_an_operand_that_was_changed_in_between(which):
    tensors = [t.detach().requires_grad_() for t in operands()]
    y = layers(*tensors, activation="tanh")
    with gg.no_grad():
        tensors[which] += 1.0
    with pytest.raises(InplaceError):
        y.backward(gg.ones((5, 2)))


def test_a_graph_that_is_kept_gives_the_same_again():
    tensors = [t.detach().requires_grad_() for t in operands()]
    with gg.use_kernels("require"):
        y = layers(*tensors, activation="silu")
        y.backward(gg.ones((5, 2)), retain_graph=True)
        once = [t.grad.numpy().copy() for t in tensors]
        y.backward(gg.ones((5, 2)))
    for t, g in zip(tensors, once, strict=True):
        np.testing.assert_allclose(t.grad.numpy(), 2 * g, rtol=1e-12)
