"""A chain of layers as one operation, against one operation for each."""

import itertools

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import DTypeError, InplaceError, ParameterError, ShapeError
from gpugrad.kernels.cpu.direct import LARGEST
from gpugrad.ops.fused import ACTIVATIONS
from gpugrad.ops.layers import joins, layers
from gpugrad.ops.linalg import linear, linear_activation


def operands(dtype="float64", rows=5, widths=(4, 3, 6, 2)):
    rng = np.random.default_rng(0)
    found = [rng.standard_normal((rows, widths[0]))]
    for shape in zip(widths[1:], widths):
        found += [rng.standard_normal(shape), rng.standard_normal(shape[:1])]
    return [gg.tensor(x.astype(dtype)) for x in found]


def one_by_one(x, *parameters, activation, ends=False):
    *pairs, last = zip(parameters[::2], parameters[1::2])
    for weight, bias in pairs:
        x = linear_activation(x, weight, bias, activation)
    return linear(x, *last) if ends else linear_activation(x, *last, activation)


def compared(made, mode, needs=None, **parameters):
    """Results and gradients of the chain and of separate layers."""
    values = []
    for function in (layers, one_by_one):
        tensors = [x.detach() for x in made]
        moving = [t.requires_grad_() for i, t in enumerate(tensors) if not needs or needs[i]]
        with gg.use_kernels(mode if function is layers else "auto"):
            y = function(*tensors, **parameters)
            gg.sum(y * y).backward()
        values.append([y.detach().numpy(), *(t.grad.numpy() for t in moving)])
    return zip(*values, strict=True)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("mode", ["off", "auto"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_results_and_gradients_are_those_of_separate_layers(activation, mode, ends):
    for got, want in compared(operands(rows=200), mode, activation=activation, ends=ends):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


wide = pytest.mark.skipif(not LARGEST, reason="with short vectors OpenBLAS is quicker")

#: Rows, and features before and after layers: more columns than rows, and the other way round; and
#: so few rows that weights are not packed.
WIDE = [
    (150, (130, 260, 90, 10)), (3000, (30, 33, 40)), (64, (400, 400)), (257, (100, 100, 1)),
    (41, (130, 260, 90, 10)), (17, (300, 200, 16, 300)),
]  # fmt: skip


@wide
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "widths"), WIDE)
def test_large_layers(rows, widths, activation, ends):
    made = operands(rows=rows, widths=widths)
    for got, want in compared(made, "require", activation=activation, ends=ends):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


@wide
@pytest.mark.parametrize("needs", [*itertools.product([False, True], repeat=5)][1:])
def test_gradients_of_large_layers_that_are_wanted(needs):
    made = operands(rows=100, widths=(160, 170, 30))
    for got, want in compared(made, "require", needs, activation="relu", ends=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


@wide
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [150, 70])
def test_large_layers_on_any_number_of_threads(rows, activation):
    made = operands("float32", rows=rows, widths=(130, 260, 90, 10))
    before, found = gg.get_num_threads(), []
    try:
        for threads in {1, before}:
            gg.set_num_threads(threads)
            found.append([a.tobytes() for a, _ in compared(made, "require", activation=activation)])
    finally:
        gg.set_num_threads(before)
    assert all(x == found[0] for x in found)


@wide
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("rows", [150, 70, 1100])
def test_squares_of_gradients_of_large_layers(rows, scale):
    x, *parameters = operands("float32", rows=rows, widths=(130, 260, 90, 10))
    for p in parameters:
        p.requires_grad_()
    optimizer = gg.optim.SGD(parameters, lr=0.0)
    with gg.use_kernels("require"):
        gg.sum(layers(x, *parameters, activation="relu") * scale).backward()
    leaves = [p._node for p in parameters]
    squares = [np.square(leaf.grad.data, dtype="float64").sum() for leaf in leaves]
    np.testing.assert_allclose([leaf.squares for leaf in leaves], squares, rtol=1e-6)
    optimizer.step(clip=1.0)
    if scale == 1:
        np.testing.assert_allclose(optimizer.last_norm.item(), np.sqrt(sum(squares)), rtol=1e-6)


@wide
def test_squares_that_are_not_finite_are_not_noted():
    x, *parameters = operands("float32", rows=70, widths=(130, 260, 90))
    for p in parameters:
        p.requires_grad_()
    optimizer = gg.optim.SGD(parameters, lr=0.0)
    x[3, 5] = np.nan
    with gg.use_kernels("require"):
        gg.sum(layers(x, *parameters, activation="tanh")).backward()
    assert all(p._node.squares is None for p in parameters)
    optimizer.step(clip=1.0, nonfinite="skip")
    assert optimizer.skipped.item() == 1


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
    def joined(x, parameters, ends=False):
        return joins(x, parameters, "tanh", ends)

    x, *parameters = operands("float32", widths=(4, 3, 6, 2, 5, 4, 3, 6, 2))
    assert joined(x, parameters)
    assert joined(x, parameters, ends=True)
    assert joined(gg.tensor(np.ones((3, 0, 4), "float32")), parameters)
    assert not joined(x, parameters[:-2])  # one less
    assert not joined(x.to("float64"), parameters)
    assert not joined(x, parameters[2:])
    assert not joined(x.to("float16"), [p.to("float16") for p in parameters])
    assert not joined(gg.tensor(np.float32(1.0)), parameters)
    assert not joined(x.numpy(), parameters)
    assert not joined(x, [p.to("strict:device1") for p in parameters])
    assert not joined(x.to("strict:device1"), [p.to("strict:device1") for p in parameters])
    assert not joined(x, [parameters[0], parameters[1][:2], *parameters[2:]])
    with gg.use_kernels("off"):
        assert not joined(x, parameters)
    with gg.autocast("cpu"):
        assert not joined(x, parameters)


def test_what_joins_of_large_layers():
    def joined(*widths, rows=128):
        x, *parameters = operands("float32", rows=rows, widths=widths)
        return joins(x, parameters, "tanh", True)

    assert joined(256, 256, 10) == bool(LARGEST)
    assert not joined(64, 64, 10)  # little work
    assert not joined(800, 800, 10)  # the squares of such a gradient are summed on the way
    assert not joined(4, 4, 10, rows=1 << 20)  # more rows than a cache holds


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
