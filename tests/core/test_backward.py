"""The walk: accumulation, release, retention, hooks, threads, long chains."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import (
    DeviceError,
    DTypeError,
    FreedGraphError,
    GraphError,
    InplaceError,
    ShapeError,
)


def leaf(*values: float) -> gg.Tensor:
    return gg.tensor(list(values), requires_grad=True)


def test_gradients_add_up_over_branches_and_calls() -> None:
    x = leaf(1.0, 2.0)
    y = x * x + x
    gg.sum(y * x).backward()  # x^3 + x^2
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), [5.0, 16.0])
    gg.sum(x).backward()
    np.testing.assert_allclose(x.grad.numpy(), [6.0, 17.0])


def test_diamonds_of_every_order_of_creation() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        x = gg.tensor(rng.standard_normal(3), requires_grad=True)
        values = [x]
        derivatives = [np.ones(3)]
        hosts = [x.detach().numpy()]
        for _ in range(8):
            i, j = rng.integers(len(values), size=2)
            if rng.random() < 0.5:
                values.append(values[i] + values[j])
                derivatives.append(derivatives[i] + derivatives[j])
                hosts.append(hosts[i] + hosts[j])
            else:
                values.append(values[i] * values[j])
                derivatives.append(derivatives[i] * hosts[j] + hosts[i] * derivatives[j])
                hosts.append(hosts[i] * hosts[j])
        gg.sum(values[-1]).backward()
        assert x.grad is not None
        np.testing.assert_allclose(x.grad.numpy(), derivatives[-1], rtol=1e-12)


def test_second_backward_names_the_operation_and_the_fix() -> None:
    x = leaf(1.0, 2.0)
    y = gg.sum(x * x)
    y.backward()
    with pytest.raises(FreedGraphError, match=r"sum.*retain_graph=True"):
        y.backward()


def test_second_backward_through_a_shared_part_raises_and_changes_nothing() -> None:
    x = leaf(1.0, 2.0)
    shared = x * x
    gg.sum(shared).backward()
    before = x.grad.numpy().copy()  # type: ignore[union-attr]
    with pytest.raises(FreedGraphError, match="multiply"):
        gg.sum(shared + x).backward()
    np.testing.assert_array_equal(x.grad.numpy(), before)  # type: ignore[union-attr]


def test_retained_graph_runs_again() -> None:
    x = leaf(1.0, 2.0)
    y = gg.sum(x * x)
    y.backward(retain_graph=True)
    y.backward()
    np.testing.assert_allclose(x.grad.numpy(), [4.0, 8.0])  # type: ignore[union-attr]


def test_non_scalar_needs_a_gradient() -> None:
    x = leaf(1.0, 2.0)
    with pytest.raises(GraphError, match=r"shape \(2,\).*gradient="):
        (x * x).backward()
    (x * x).backward(gg.tensor([1.0, 10.0]))
    np.testing.assert_allclose(x.grad.numpy(), [2.0, 40.0])  # type: ignore[union-attr]


def test_gradient_of_a_wrong_shape() -> None:
    x = leaf(1.0, 2.0)
    with pytest.raises(ShapeError, match=r"\(3,\).*\(2,\)"):
        (x * x).backward(gg.tensor([1.0, 1.0, 1.0]))


def test_no_graph() -> None:
    with pytest.raises(GraphError, match="requires_grad=True"):
        gg.sum(gg.tensor([1.0])).backward()
    with gg.no_grad():
        y = gg.sum(leaf(1.0))
    with pytest.raises(GraphError, match="no_grad"):
        y.backward()


@pytest.mark.parametrize("dtype", ["int32", "bool", "uint8"])
def test_integers_have_no_derivative(dtype: str) -> None:
    with pytest.raises(DTypeError, match=dtype):
        gg.tensor([1, 0], dtype=dtype, requires_grad=True)
    with pytest.raises(DTypeError, match="complex"):
        gg.tensor([1j], requires_grad=True)


def test_backward_on_a_leaf() -> None:
    x = gg.tensor(3.0, requires_grad=True)
    x.backward()
    assert x.grad is not None and x.grad.item() == 1.0


def test_gradients_share_memory_with_nothing() -> None:
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
    g = gg.tensor([1.0, 1.0])
    (x + w).backward(g)
    assert x.grad is not None and w.grad is not None
    arrays = [x.grad.data, w.grad.data, g.data, x.data, w.data]
    for i, a in enumerate(arrays):
        for b in arrays[i + 1 :]:
            assert not np.shares_memory(a, b)
    x.grad += 1.0
    np.testing.assert_array_equal(w.grad.numpy(), [1.0, 1.0])


def test_broadcast_gradient_of_a_sum_is_writeable() -> None:
    x = leaf(1.0, 2.0)
    gg.sum(x).backward()
    gg.sum(x).backward()
    np.testing.assert_array_equal(x.grad.numpy(), [2.0, 2.0])  # type: ignore[union-attr]


def test_unbroadcasting_and_promotion_are_undone() -> None:
    a = gg.tensor(np.ones((3, 1), "float32"), requires_grad=True)
    b = gg.tensor(np.full((2, 1, 4), 2.0), requires_grad=True)
    s = gg.tensor(5.0, requires_grad=True)
    y = a * b * s
    assert y.dtype == np.float64 and y.shape == (2, 3, 4)
    y.backward(gg.ones_like(y))
    assert a.grad is not None and a.grad.dtype == np.float32 and a.grad.shape == (3, 1)
    np.testing.assert_allclose(a.grad.numpy(), np.full((3, 1), 80.0))
    assert b.grad is not None
    np.testing.assert_allclose(b.grad.numpy(), np.full((2, 1, 4), 15.0))
    assert s.grad is not None and s.grad.shape == () and s.grad.item() == 48.0


def test_hooks_see_the_whole_gradient_and_may_replace_it() -> None:
    x = leaf(1.0, 2.0)
    h = x * 3.0
    seen: list[list[float]] = []
    remove = h.register_hook(lambda g: seen.append(g.tolist()))
    h.register_hook(lambda g: g * 10.0)
    y = h * h + h
    y.backward(gg.tensor([1.0, 1.0]), retain_graph=True)
    assert seen == [[7.0, 13.0]]
    np.testing.assert_allclose(x.grad.numpy(), [210.0, 390.0])  # type: ignore[union-attr]
    remove()
    y.backward(gg.tensor([1.0, 1.0]))
    assert len(seen) == 1


def test_hook_on_a_leaf_and_retain_grad() -> None:
    x = leaf(1.0, 2.0)
    x.register_hook(lambda g: g * 2.0)
    h = x * 3.0
    h.retain_grad()
    assert h.grad is None
    gg.sum(h * h).backward()
    np.testing.assert_allclose(h.grad.numpy(), [6.0, 12.0])  # type: ignore[union-attr]
    np.testing.assert_allclose(x.grad.numpy(), [36.0, 72.0])  # type: ignore[union-attr]


def test_a_hook_may_run_a_backward_of_its_own() -> None:
    x = leaf(1.0, 2.0)
    other = leaf(3.0)

    def hook(g: gg.Tensor) -> None:
        gg.sum(other * other).backward()

    h = x * x
    h.register_hook(hook)
    gg.sum(h).backward()
    np.testing.assert_allclose(x.grad.numpy(), [2.0, 4.0])  # type: ignore[union-attr]
    np.testing.assert_allclose(other.grad.numpy(), [6.0])  # type: ignore[union-attr]


def test_saved_arrays_go_as_soon_as_their_node_has_run() -> None:
    x = gg.tensor(np.ones(1000), requires_grad=True)
    a = x * 2.0
    alive = weakref.ref(a.data)
    y = gg.sum(a * a)
    del a
    assert alive() is not None
    y.backward()
    assert alive() is None  # y itself is still there


CYCLES = """
import gc, weakref
import gpugrad as gg

def run():
    x = gg.tensor([1.0, 2.0], requires_grad=True)
    y = gg.sum(gg.tanh(gg.exp(x) * x) + x)
    inner = weakref.ref(y)
    data = weakref.ref(gg.exp(x).data)
    y.backward()
    del y
    assert inner() is None and data() is None
    z = gg.tanh(x) * x
    kept = weakref.ref(z)
    del z  # never run backward
    assert kept() is None

run()  # the first call of an operation compiles it, which leaves garbage once
while gc.collect():
    pass
gc.disable()
run()
found = gc.collect()
assert found == 0, found
"""


def test_no_reference_cycles() -> None:
    # In a process of its own: what other tests have left behind is not looked for.
    subprocess.run([sys.executable, "-c", CYCLES], check=True)


def test_a_hundred_thousand_nodes_without_recursion() -> None:
    x = gg.tensor(1.0, requires_grad=True)
    y = x
    for _ in range(100_000):
        y = y + 1.0
    y.backward()
    assert x.grad is not None and x.grad.item() == 1.0
    y = x
    for _ in range(100_000):
        y = y * 1.0
    del y  # the graph is dropped unread


def test_two_threads_walk_one_retained_graph() -> None:
    x = gg.tensor(np.full(64, 0.5), requires_grad=True)
    y = x
    for _ in range(200):
        y = gg.tanh(y * x + y)
    y = gg.sum(y)
    expected = gg.grad(lambda v: _nest(v))(x.detach()).numpy()
    results: list[np.ndarray] = []
    errors: list[Exception] = []

    def run() -> None:
        from gpugrad.core.walk import walk

        try:
            for _ in range(10):
                borrowed, owned = walk([(y._node, np.ones(()))], retain=True)
                results.append({**borrowed, **owned}[x._node].copy())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    assert len(results) == 40
    for r in results:
        np.testing.assert_allclose(r, expected, rtol=1e-12)


def _nest(x: gg.Tensor) -> gg.Tensor:
    y = x
    for _ in range(200):
        y = gg.tanh(y * x + y)
    return gg.sum(y)


def test_create_graph_gives_derivatives_of_derivatives() -> None:
    x = leaf(2.0, 3.0)
    gg.sum(x * x * x).backward(create_graph=True)
    g = x.grad
    assert g is not None and g.requires_grad
    x.grad = None
    gg.sum(g).backward()
    np.testing.assert_allclose(x.grad.numpy(), [12.0, 18.0])  # type: ignore[union-attr]


def test_an_error_inside_a_rule_says_where() -> None:
    @gg.primitive(vjps=(lambda g: 1 / 0,))
    def broken(m, x, /):  # type: ignore[no-untyped-def]
        """Breaks."""
        return x * 2.0

    try:
        with pytest.raises(ZeroDivisionError) as caught:
            gg.sum(broken(leaf(1.0))).backward()
        assert "backward pass of broken" in "".join(caught.value.__notes__)
    finally:
        from gpugrad.core.primitive import registry

        del registry["broken"]


@pytest.mark.parametrize("factor", [1j, np.array([1j, 2j])])
def test_complex_numbers_on_the_way_are_refused(factor: object) -> None:
    x = leaf(1.0, 2.0)
    y = x * factor
    with pytest.raises(DTypeError, match="complex"):
        y.backward(np.ones(2, complex))
    assert x.grad is None


def test_subclasses_of_an_array_broadcast_like_arrays(tmp_path: Path) -> None:
    host = np.memmap(tmp_path / "x.bin", dtype="float64", mode="w+", shape=(1, 4))
    host[:] = 2.0
    x = gg.tensor(np.ones((3, 1)), requires_grad=True)
    gg.sum(x * host).backward()
    np.testing.assert_array_equal(x.grad.numpy(), np.full((3, 1), 8.0))


def test_a_hook_may_not_change_shape_or_memory() -> None:
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
    h = x * 1.0
    remove = h.register_hook(lambda g: g.sum())
    with pytest.raises(ShapeError, match=r"hook returned shape \(\).*\(2,\)"):
        gg.sum(h * h).backward()
    remove()

    def double(g: gg.Tensor) -> None:
        g *= 2.0

    for tensor in (x, x * 1.0):
        remove = tensor.register_hook(double)
        with pytest.raises(InplaceError, match=r"return g \* 2"):
            ((tensor + w) * gg.tensor([2.0, 3.0])).sum().backward()
        remove()
    x.register_hook(lambda g: 3.0)  # type: ignore[return-value]
    with pytest.raises(DTypeError, match="tensor or None, not float"):
        gg.sum(x * w).backward()
    assert x.grad is None and w.grad is None


def test_a_hook_that_raises_leaves_every_gradient_as_it_was() -> None:
    def fail(g: gg.Tensor) -> None:
        raise KeyboardInterrupt

    for swap in (False, True):
        x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
        (x if swap else w).register_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            gg.sum(x * w).backward()
        assert x.grad is None and w.grad is None


def test_a_hook_may_return_an_array_and_a_removal_is_for_one_hook() -> None:
    x = leaf(1.0, 2.0)
    remove = x.register_hook(lambda g: None)
    remove()
    x.register_hook(lambda g: np.array([7, 8]))  # type: ignore[return-value]
    remove()
    gg.sum(x * x).backward()
    assert x.grad.dtype == np.float64 and x.grad.tolist() == [7.0, 8.0]  # type: ignore[union-attr]


def test_what_a_hook_saw_and_what_was_retained_stays() -> None:
    for create in (False, True):
        x = leaf(1.0, 2.0)
        seen: list[gg.Tensor] = []
        h = x + 1.0
        h.retain_grad()
        h.register_hook(seen.append)
        gg.sum(h * h).backward(create_graph=create)
        with gg.no_grad():
            x.grad *= 0.0  # type: ignore[operator]
        assert h.grad.tolist() == [4.0, 6.0] == seen[0].tolist()  # type: ignore[union-attr]


def test_recorded_gradients_share_memory_with_nothing() -> None:
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
    gg.sum((x + w) * gg.tensor([2.0, 3.0])).backward(create_graph=True)
    x.grad *= 0.0  # type: ignore[operator]
    assert w.grad.tolist() == [2.0, 3.0]  # type: ignore[union-attr]
    given = gg.tensor([1.0, 1.0])
    v = leaf(1.0, 2.0)
    (v + 1.0).backward(given, create_graph=True)
    v.grad *= 0.0  # type: ignore[operator]
    assert given.tolist() == [1.0, 1.0]


def test_a_copy_has_a_gradient_of_its_own() -> None:
    x = leaf(1.0, 2.0)
    gg.sum(x * x * x).backward(create_graph=True)
    twin = copy.deepcopy(x)
    gg.sum(twin).backward()
    assert twin.grad.tolist() == [4.0, 13.0]  # type: ignore[union-attr]
    assert x.grad.tolist() == [3.0, 12.0]  # type: ignore[union-attr]


def test_requires_grad_switched_off_and_on_again() -> None:
    x = leaf(1.0, 2.0)
    y = gg.sum(x * x)
    x.requires_grad_(False)
    assert not (x * x).requires_grad
    x.requires_grad_()
    y.backward()
    assert x.grad.tolist() == [2.0, 4.0]  # type: ignore[union-attr]
    x.requires_grad = False
    assert x.grad.tolist() == [2.0, 4.0]  # type: ignore[union-attr]
    assert copy.deepcopy(x).grad is None
    x.grad = None
    x.requires_grad = True
    assert x.grad is None


def test_a_gradient_that_is_set_must_fit() -> None:
    x = leaf(1.0, 2.0)
    with pytest.raises(DTypeError, match=r"int64.*float64.*\.to\('float64'\)"):
        x.grad = gg.zeros(2, dtype="int64")
    with pytest.raises(DeviceError, match=r"strict:device1.*\.to\('cpu'\)"):
        x.grad = gg.zeros(2, device="strict:device1")
    with pytest.raises(DTypeError, match=r"complex128.*real part"):
        (x * x).backward(np.array([1j, 1.0]))
    assert x.grad is None


def test_threads_that_meet_at_a_leaf_lose_nothing() -> None:
    x = gg.tensor(np.ones(300_000), requires_grad=True)
    y = gg.sum(x * 2.0)
    together = threading.Barrier(4)

    def run() -> None:
        together.wait()
        for _ in range(5):
            y.backward(retain_graph=True)

    for _ in range(5):
        x.grad = None
        threads = [threading.Thread(target=run) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert x.grad is not None and (x.grad.numpy() == 40.0).all()


def test_one_number_prints_as_a_format_asks() -> None:
    x = gg.tensor(1.23456, requires_grad=True)
    assert f"{x * 1.0:.2f}" == "1.23" and f"{x}" == "tensor(1.23456, requires_grad=True)"
    assert complex(gg.tensor(1.0 + 2.0j)) == 1.0 + 2.0j


def test_complex_numbers_between_casts_are_refused() -> None:
    x = leaf(1.0, 2.0)
    y = gg.imag(x.to("complex128") * 1j)  # x itself: the derivative is 1
    with pytest.raises(DTypeError, match="complex"):
        gg.sum(y).backward()
    assert x.grad is None


@pytest.mark.parametrize(
    "shapes", [((0, 3), (1, 3)), ((1, 0), (5, 1)), ((1, 1), (4,)), ((3,), (1, 3))]
)
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("device", ["cpu", "strict:device1"])
def test_gradients_have_their_operands_shape_and_dtype(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], constant: bool, device: str
) -> None:
    for dtype, other in (("float32", "float32"), ("float32", "float64")):
        a = gg.asarray(np.ones(shapes[0], dtype), device=device).requires_grad_()
        b = gg.asarray(np.full(shapes[1], 2.0, other), device=device)
        if not constant:
            b.requires_grad_()
        for y in (a * b, b * a):
            y.backward(gg.ones_like(y.detach()))
        for x in (a, b):
            if x.requires_grad:
                assert x.grad.shape == x.shape and x.grad.dtype == x.dtype
        lost = int(np.prod(np.broadcast_shapes(*shapes))) // max(1, int(np.prod(shapes[0])))
        np.testing.assert_array_equal(
            a.grad.backend.to_host(a.grad.data), np.full(shapes[0], 4.0 * lost)
        )
