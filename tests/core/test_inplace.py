"""In-place operators: real ones outside the graph, safe ones inside, and detection of the rest."""

from __future__ import annotations

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import DTypeError, InplaceError, ShapeError


def leaf(*values: float) -> gg.Tensor:
    return gg.tensor(list(values), requires_grad=True)


def test_outside_the_graph_the_memory_itself_changes() -> None:
    host = np.array([1.0, 2.0])
    x = gg.asarray(host)
    same = x
    x += 1.0
    x *= gg.tensor([2.0, 3.0])
    x[0] = 100.0
    assert same is x
    np.testing.assert_array_equal(host, [100.0, 9.0])


def test_a_saved_array_that_changed_is_found() -> None:
    x, a = leaf(1.0, 2.0), gg.tensor([3.0, 4.0])
    y = gg.sum(x * a)
    a += 1.0
    with pytest.raises(InplaceError, match=r"multiply.*'b'.*\(2,\).*changed in place"):
        y.backward()
    assert x.grad is None


def test_a_change_through_a_view_is_found() -> None:
    x, a = leaf(1.0, 2.0), gg.tensor([3.0, 4.0])
    y = gg.sum(x * a)
    a[0:1].detach()[0] = 9.0
    with pytest.raises(InplaceError, match="multiply"):
        y.backward()


def test_a_parameter_changed_under_no_grad_is_found() -> None:
    w = leaf(1.0, 2.0)
    y = gg.sum(w * w)
    with gg.no_grad():
        w -= 0.1
    with pytest.raises(InplaceError):
        y.backward()


def test_an_index_array_that_changed_is_found() -> None:
    x, index = leaf(1.0, 2.0, 3.0), gg.tensor([0, 2])
    y = gg.sum(x[index] * 2.0)
    index += 0
    with pytest.raises(InplaceError, match="index"):
        y.backward()


def test_an_index_array_of_the_host_is_copied() -> None:
    x, index = leaf(1.0, 2.0, 3.0), np.array([0, 2])
    y = gg.sum(x[index])
    index[:] = 1
    y.backward()
    np.testing.assert_array_equal(x.grad.numpy(), [1.0, 0.0, 1.0])


def test_a_change_of_what_was_not_saved_is_harmless() -> None:
    x, a = leaf(1.0, 2.0), gg.tensor([3.0, 4.0])
    y = gg.sum(x + a)
    a += 1.0
    y.backward()
    np.testing.assert_array_equal(x.grad.numpy(), [1.0, 1.0])  # type: ignore[union-attr]


def test_a_change_before_saving_is_harmless() -> None:
    x, a = leaf(1.0, 2.0), gg.tensor([3.0, 4.0])
    a += 1.0
    gg.sum(x * a).backward()
    np.testing.assert_array_equal(x.grad.numpy(), [4.0, 5.0])  # type: ignore[union-attr]


def test_a_recorded_tensor_gets_a_new_value_and_the_right_gradient() -> None:
    x = leaf(1.0, 2.0)
    y = gg.exp(x)  # saves its result
    same = y
    y *= 3.0
    y += x
    assert same is y
    gg.sum(y).backward()
    np.testing.assert_allclose(x.grad.numpy(), 3 * np.exp([1.0, 2.0]) + 1)  # type: ignore[union-attr]


def test_setitem_is_recorded() -> None:
    x, v = leaf(1.0, 2.0, 3.0), leaf(5.0)
    y = x * 2.0
    y[1:2] = v
    gg.sum(y * y).backward()
    np.testing.assert_allclose(x.grad.numpy(), [8.0, 0.0, 24.0])  # type: ignore[union-attr]
    np.testing.assert_allclose(v.grad.numpy(), [10.0])  # type: ignore[union-attr]


def test_a_leaf_refuses() -> None:
    x = leaf(1.0, 2.0)
    with pytest.raises(InplaceError, match="no_grad"):
        x += 1.0
    np.testing.assert_array_equal(x.detach().numpy(), [1.0, 2.0])


def test_a_recorded_view_refuses() -> None:
    x = leaf(1.0, 2.0, 3.0, 4.0)
    v = gg.reshape(x * 1.0, (2, 2))
    with pytest.raises(InplaceError, match="reshape"):
        v += 1.0


def test_shape_and_dtype_must_stay() -> None:
    x = gg.tensor([1.0, 2.0])
    with pytest.raises(ShapeError, match=r"\(3, 2\)"):
        x += gg.ones((3, 2))
    i = gg.tensor([1, 2])
    with pytest.raises(DTypeError, match="float64"):
        i += 0.5
    np.testing.assert_array_equal(i.numpy(), [1, 2])


def test_of_two_values_for_one_element_the_last_has_the_gradient() -> None:
    for index in ([0, 0, 2], np.array([0, -4, 2], dtype=">i8"), (gg.tensor([0, 0, 2]),)):
        v = leaf(1.0, 2.0, 3.0)
        y = gg.zeros(4)
        y[index] = v
        assert y.tolist() == [2.0, 0.0, 3.0, 0.0]
        y.backward(gg.tensor([10.0, 20.0, 30.0, 40.0]))
        assert v.grad.tolist() == [0.0, 10.0, 30.0]  # type: ignore[union-attr]
    rows = gg.tensor([[0, 1], [1, 0]])

    def write(v: gg.Tensor) -> gg.Tensor:
        y = v[:2, 0] * 0.0
        y[rows] = v
        return gg.sum(y * y * y)

    gg.check_grads(write, (np.array([[1.0, 2.0], [3.0, 4.0]]),))


def test_an_integer_tensor_takes_no_recorded_values() -> None:
    i, v = gg.zeros(3, dtype="int64"), leaf(1.7)
    with pytest.raises(DTypeError, match=r"setitem: .*int64.*\.to"):
        i[0:1] = v
    i[0:1] = v.detach()
    assert i.tolist() == [1, 0, 0] and not i.requires_grad


def test_what_cannot_be_written_says_where() -> None:
    host = np.ones(2)
    host.flags.writeable = False
    x = gg.asarray(host)
    with pytest.raises(ValueError) as caught:
        x += 1.0
    assert "+= on a tensor of float64, shape (2,)" in caught.value.__notes__[0]


def test_bytes_of_another_machine_become_this_ones() -> None:
    x = gg.tensor(np.array([1.0, 2.0], dtype=">f8"), requires_grad=True)
    gg.sum(x * x).backward()
    with gg.no_grad():
        x -= x.grad
    assert x.tolist() == [-1.0, -2.0] and x.grad.data.dtype.isnative  # type: ignore[union-attr]
