"""Hooks on modules, and what removes them; backward hooks as in PyTorch."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.errors import ShapeError


class Both(nn.Module):
    """Two inputs, two outputs, and a setting."""

    def forward(self, a, b, scale=2.0):
        return a * b * scale, a + b


def leaf(*values):
    return gg.tensor(np.array(values), requires_grad=True)


def test_gradients_of_all_inputs_and_outputs_come_together() -> None:
    seen = []
    layer = Both()
    layer.register_full_backward_hook(lambda *found: seen.append(found))
    a, b = leaf(1.0, 2.0), leaf(3.0, 4.0)
    product, total = layer(a, b)
    (product.sum() + 5 * total.sum()).backward()
    ((module, grad_input, grad_output),) = seen
    assert module is layer
    assert [g.numpy().tolist() for g in grad_output] == [[1.0, 1.0], [5.0, 5.0]]
    assert [g.numpy().tolist() for g in grad_input] == [[11.0, 13.0], [7.0, 9.0]]
    assert a.grad.numpy().tolist() == [11.0, 13.0]
    seen.clear()
    product, _ = layer(a.detach(), b)  # one input has no gradient, one output gets none
    product.sum().backward()
    ((_, grad_input, grad_output),) = seen
    assert grad_input[0] is None
    assert grad_input[1].numpy().tolist() == [2.0, 4.0]
    assert grad_output[1] is None


def test_what_hooks_return_goes_on() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with gg.no_grad():
        layer.weight[...] = [[1.0, 2.0]]
    x = leaf(1.0, 1.0).to("float32").detach().requires_grad_()
    layer.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 10,))
    layer.register_full_backward_hook(lambda module, ins, outs: (ins[0] + outs[0],))
    layer(x).sum().backward()
    assert layer.weight.grad.numpy().tolist() == [[10.0, 10.0]]
    assert x.grad.numpy().tolist() == [20.0, 30.0]


def test_no_input_with_a_gradient() -> None:
    seen = []
    layer = nn.Linear(2, 3)
    layer.register_full_backward_hook(lambda module, ins, outs: seen.append((ins, outs[0].shape)))
    layer(gg.ones((4, 2))).sum().backward()
    assert seen == [((), (4, 3))]


def test_removal() -> None:
    seen = []
    layer = nn.Linear(2, 2)
    handle = layer.register_full_backward_hook(lambda *_: seen.append("a"))
    with layer.register_full_backward_pre_hook(lambda *_: seen.append("b")):
        layer(gg.ones((1, 2))).sum().backward()
    assert seen == ["b", "a"]
    handle.remove()
    handle.remove()
    assert not layer._hooks
    layer(gg.ones((1, 2))).sum().backward()
    assert seen == ["b", "a"]


def test_hooks_keep_fused_layers_apart() -> None:
    rng = np.random.default_rng(0)
    net = nn.Sequential(*(m for _ in range(10) for m in (nn.Linear(4, 4), nn.Tanh())))
    x = gg.tensor(rng.standard_normal((3, 4)).astype(np.float32))
    net(x).sum().backward()
    plain = [p.grad.numpy().copy() for p in net.parameters()]
    net.zero_grad()
    order = []
    for i, module in enumerate(net):
        module.register_full_backward_hook(lambda m, ins, outs, i=i: order.append(i))
    net(x).sum().backward()
    assert order == list(range(19, -1, -1))
    for p, g in zip(net.parameters(), plain):
        assert np.allclose(p.grad.numpy(), g, rtol=1e-5, atol=1e-7)


def test_second_derivatives_pass_the_gates() -> None:
    layer = Both()
    layer.register_full_backward_hook(
        lambda module, ins, outs: (None if ins[0] is None else ins[0] * 2, ins[1])
    )
    a, b = leaf(3.0), leaf(5.0)
    product, _ = layer(a, b)
    product.sum().backward(create_graph=True)
    g = a.grad  # 2 · 2b
    a.grad = b.grad = None
    g.sum().backward()
    assert b.grad.numpy().tolist() == [4.0]


def test_wrong_returns() -> None:
    layer = Both()
    handle = layer.register_full_backward_hook(lambda module, ins, outs: (ins[0],))
    a, b = leaf(1.0, 2.0), leaf(3.0, 4.0)
    with pytest.raises(ShapeError, match="returned 1 gradients for 2"):
        layer(a, b)[0].sum().backward()
    handle.remove()
    layer.register_full_backward_hook(lambda module, ins, outs: (ins[0].sum(), ins[1]))
    with pytest.raises(ShapeError, match=r"returned shape \(\) for gradient 0, of shape \(2,\)"):
        layer(a, b)[0].sum().backward()


def test_a_retained_graph_calls_hooks_each_time() -> None:
    seen = []
    layer = Both()
    layer.register_full_backward_hook(lambda module, ins, outs: seen.append(outs[0].item()))
    product, _ = layer(leaf(1.0), leaf(2.0))
    y = product.sum()
    y.backward(retain_graph=True)
    y.backward(gg.tensor(3.0, dtype="float64"))
    assert seen == [1.0, 3.0]


@pytest.mark.torch
def test_like_pytorch() -> None:
    torch = pytest.importorskip("torch")

    def run(lib, layer, x):
        seen = []
        layer.register_full_backward_pre_hook(lambda m, outs: (outs[0] * 2,))
        layer.register_full_backward_hook(
            lambda m, ins, outs: seen.append(
                [None if g is None else g.shape for g in (*ins, *outs)]
            )
        )
        layer.register_full_backward_hook(lambda m, ins, outs: tuple(g * 3 for g in ins))
        layer(x).sum().backward()
        return [[None if s is None else tuple(s) for s in row] for row in seen], x.grad, layer

    net, other = nn.Linear(3, 2), torch.nn.Linear(3, 2)
    with torch.no_grad():
        other.weight.copy_(torch.from_numpy(net.weight.detach().numpy().copy()))
    values = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    ours = run(gg, net, gg.tensor(values, requires_grad=True))
    theirs = run(torch, other, torch.tensor(values, requires_grad=True))
    assert ours[0] == theirs[0]
    assert np.allclose(ours[1].numpy(), theirs[1].numpy(), rtol=1e-6)
    assert np.allclose(ours[2].weight.grad.numpy(), theirs[2].weight.grad.numpy(), rtol=1e-6)
