import numpy as np
import pytest

import gpugrad as gg
from gpugrad.core.graph import reachable
from gpugrad.errors import DeviceError, ParameterError, ShapeError
from gpugrad.ops.manipulation import sum_to

DEVICES = ["cpu", "strict:device1"]
RNG = np.random.default_rng(0)


def host(x: gg.Tensor) -> np.ndarray:
    return x.backend.to_host(x.data)


@pytest.mark.parametrize("seed", range(30))
def test_sum_to_is_the_transpose_of_broadcast_to(seed: int) -> None:
    rng = np.random.default_rng(seed)
    big = tuple(map(int, rng.integers(0, 4, rng.integers(0, 5))))
    small = tuple(n if rng.random() < 0.5 else 1 for n in big[rng.integers(0, len(big) + 1) :])
    x, u = rng.standard_normal(small), rng.standard_normal(big)
    left = np.vdot(gg.broadcast_to(x, big).numpy(), u)
    right = np.vdot(x, sum_to(u, small).numpy())
    np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-12)
    gg.check_grads(lambda u: sum_to(u * u, small), (gg.tensor(u),), order=3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: gg.reshape(x, (4, 2)), ["reshape", "[2, 3]", "(4,2)"]),
        (lambda x: gg.squeeze(x, axis=0), ["squeeze", "[2, 3]"]),
        (lambda x: gg.expand_dims(x, axis=4), ["expand_dims", "4"]),
        (lambda x: gg.permute_dims(x, (0, 0)), ["permute_dims", "[2, 3]"]),
        (lambda x: gg.broadcast_to(x, (2, 4)), ["broadcast_to", "[2, 3]"]),
        (lambda x: gg.flip(x, axis=2), ["flip", "2"]),
        (lambda x: gg.moveaxis(x, (0, 0), (1, 0)), ["moveaxis", "no axis twice"]),
        (lambda x: gg.moveaxis(x, 2, 0), ["moveaxis", "axis 2"]),
        (lambda x: gg.concat([x, gg.zeros((2, 4))]), ["concat", "[2, 3]", "[2, 4]"]),
        (lambda x: gg.concat([]), ["concat", "at least one"]),
        (lambda x: gg.concat([x, x], axis=2), ["concat", "2"]),
        (lambda x: gg.stack([x, gg.zeros((2, 4))]), ["stack", "[2, 3]", "[2, 4]"]),
        (lambda x: gg.split(x, 2, axis=1), ["split", "3 elements", "2 equal parts"]),
        (lambda x: gg.split(x, 1, axis=2), ["split", "axis 2"]),
        (lambda x: gg.unstack(x, axis=-3), ["unstack", "axis -3"]),
        (lambda x: gg.broadcast_arrays(x, gg.zeros(2)), ["(2, 3)", "(2,)", "last axis backward"]),
        (lambda x: gg.pad(x, ((1, 1),) * 3), ["pad", "2 axes"]),
        (lambda x: gg.repeat(x, [1, 2], axis=1), ["repeat", "2 repeats", "3 elements"]),
    ],
)
def test_errors_name_operation_and_shapes(call, words: list[str]) -> None:
    with pytest.raises(ShapeError) as caught:
        call(gg.zeros((2, 3)))
    text = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    for word in words:
        assert word in text


def test_parameters_are_checked() -> None:
    with pytest.raises(ParameterError, match="must not be negative"):
        gg.pad(gg.zeros(3), -1)
    with pytest.raises(ParameterError, match="'mean' is not known"):
        gg.pad(gg.zeros(3), 1, mode="mean")


@pytest.mark.parametrize("source", [0, -1, (0, 2), (3, 0, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_moveaxis_is_numpys(source, flip: bool) -> None:
    a = np.zeros((2, 3, 4, 5))
    destination = source[::-1] if isinstance(source, tuple) else -2
    pair = (destination, source) if flip else (source, destination)
    assert gg.moveaxis(a, *pair).shape == np.moveaxis(a, *pair).shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric", "wrap"])
@pytest.mark.parametrize("width", [1, (0, 2), ((1, 0), (2, 1)), [[0, 0], [0, 1]]])
def test_padding_is_numpys(mode: str, width, device: str) -> None:
    a = RNG.standard_normal((3, 4))
    x = gg.tensor(a, device=device)
    np.testing.assert_array_equal(host(gg.pad(x, width, mode=mode)), np.pad(a, width, mode=mode))
    gg.check_grads(lambda x: gg.pad(x, width, mode=mode), (x,))


def test_padding_with_a_constant_keeps_dtype_and_gradient() -> None:
    x = gg.tensor([1.0, 2.0], dtype="float32", requires_grad=True)
    y = gg.pad(x, 1, constant_values=-np.inf)
    np.testing.assert_array_equal(y.detach().numpy(), [-np.inf, 1, 2, -np.inf])
    y[1:3].sum().backward()
    assert y.dtype == x.grad.dtype == np.float32
    np.testing.assert_array_equal(x.grad.numpy(), [1.0, 1.0])


@pytest.mark.parametrize("sections", [1, 2, 4, [1], [1, 3], (0, 2, 2), [3, 1], [-1], [2, 9]])
@pytest.mark.parametrize("used", ["all", "first", "last"])
def test_split_is_numpys_whichever_parts_are_used(sections, used: str) -> None:
    a = RNG.standard_normal((2, 4))
    parts = gg.split(gg.tensor(a), sections, axis=1)
    expected = np.split(a, sections, axis=1)
    for mine, numpys in zip(parts, expected, strict=True):
        np.testing.assert_array_equal(mine.numpy(), numpys)
    chosen = {"all": slice(None), "first": slice(0, 1), "last": slice(-1, None)}[used]

    def f(x: gg.Tensor) -> gg.Tensor:
        terms = gg.split(x, sections, axis=1)[chosen]
        return gg.stack([gg.sum(p * p * (i + 1.0)) for i, p in enumerate(terms)])

    gg.check_grads(f, (gg.tensor(a),))


def test_parts_that_nobody_uses_get_zeros() -> None:
    x = gg.ones((3, 2)).requires_grad_()
    gg.unstack(x)[1].sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [[0, 0], [1, 1], [0, 0]])


def test_concat_gives_gradients_only_to_those_that_want_them() -> None:
    a, b = gg.ones((2, 2)).requires_grad_(), gg.ones((1, 2))
    y = gg.concat([b, a, b])
    y.backward(gg.arange(8.0).reshape(4, 2))
    np.testing.assert_array_equal(a.grad.numpy(), [[2, 3], [4, 5]])
    assert b.grad is None


def test_concat_promotes_and_casts_gradients_back() -> None:
    a, b = gg.ones(2, dtype="float32").requires_grad_(), gg.ones(1).requires_grad_()
    y = gg.concat([a, b])
    assert y.dtype == np.float64
    y.sum().backward()
    assert (a.grad.dtype, b.grad.dtype) == (np.float32, np.float64)


def test_one_array_of_several_may_appear_twice() -> None:
    x = gg.tensor([1.0, 2.0], requires_grad=True)
    (gg.stack([x, x * x, x]) * gg.tensor([[1.0], [10.0], [100.0]])).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [121.0, 141.0])


def test_an_array_stands_for_its_parts() -> None:
    a = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(gg.concat(gg.tensor(a)).numpy(), np.concatenate(a))
    np.testing.assert_array_equal(gg.stack(gg.tensor(a), axis=1).numpy(), np.stack(a, axis=1))


@pytest.mark.parametrize("repeats", [0, 1, 3, [2, 0, 1], [2], np.array([1, 1, 2])])
def test_repeat_is_numpys(repeats) -> None:
    a = RNG.standard_normal((3, 2))
    np.testing.assert_array_equal(
        gg.repeat(gg.tensor(a), repeats, axis=0).numpy(), np.repeat(a, repeats, axis=0)
    )
    gg.check_grads(lambda x: gg.repeat(x, repeats, axis=-2), (gg.tensor(a),))


@pytest.mark.parametrize("times", [2, (2,), (1, 3), (2, 1, 2), (0, 1)])
@pytest.mark.parametrize("shape", [(3,), (2, 3), ()])
def test_tile_is_numpys(times, shape) -> None:
    a = RNG.standard_normal(shape)
    np.testing.assert_array_equal(gg.tile(gg.tensor(a), times).numpy(), np.tile(a, times))


def test_lists_will_do() -> None:
    rows = [[1.0, 2.0], [3.0, 4.0]]
    for mine, numpys in [
        (gg.tile(rows, 2), np.tile(rows, 2)),
        (gg.repeat(rows, 2), np.repeat(rows, 2)),
        (gg.pad(rows, 1), np.pad(rows, 1)),
        (gg.moveaxis(rows, 0, 1), np.moveaxis(np.array(rows), 0, 1)),
        (gg.concat([rows, rows]), np.concatenate([rows, rows])),
        (gg.astype(rows, "int64"), np.array(rows, int)),
        (gg.broadcast_arrays(rows, 1.0)[1], np.ones((2, 2))),
    ]:
        np.testing.assert_array_equal(mine.numpy(), numpys)


# -- dtypes and devices ---------------------------------------------------------------------------


def test_a_cast_sends_the_gradient_back_in_the_old_dtype() -> None:
    x = gg.tensor([1.5, 2.5], dtype="float32", requires_grad=True)
    y = gg.astype(x, gg.float64)
    (y * y).sum().backward()
    assert x.grad.dtype == np.float32
    np.testing.assert_array_equal(x.grad.numpy(), [3.0, 5.0])


def test_a_cast_to_integers_leaves_the_graph() -> None:
    x = gg.tensor([1.5, 2.5], requires_grad=True)
    assert not gg.astype(x, "int32").requires_grad
    assert not x.to("bool").requires_grad


def test_astype_copies_unless_told_otherwise() -> None:
    x = gg.tensor([1.0])
    assert gg.astype(x, "float64", copy=False) is x
    assert not np.shares_memory(gg.astype(x, "float64").data, x.data)
    assert gg.astype(x, "float32", copy=False).dtype == np.float32


@pytest.mark.parametrize("order", [1, 2])
def test_gradients_cross_devices(order: int) -> None:
    x = gg.tensor([1.0, 2.0], requires_grad=True)
    there = gg.to_device(x, "strict:device1")
    assert there.device == "strict:device1"
    back = (there * there * there).to("cpu")
    back.sum().backward(create_graph=order == 2)
    assert x.grad.device == "cpu"
    np.testing.assert_allclose(x.grad.detach().numpy(), [3.0, 12.0])
    if order == 2:
        gg.check_grads(
            lambda x: (x.to("strict:device1") ** 3.0).to("cpu"), (gg.tensor([1.0, 2.0]),)
        )


def test_a_tensor_on_its_own_device_is_copied_by_to_device_and_kept_by_to() -> None:
    x = gg.tensor([1.0])
    assert not np.shares_memory(gg.to_device(x, "cpu").data, x.data)
    assert x.to("cpu") is x


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(DeviceError, match="'nowhere'"):
        gg.to_device(gg.tensor([1.0]), "nowhere")


def test_reshaping_views_do_not_copy() -> None:
    x = gg.tensor(RNG.standard_normal((2, 3)))
    for y in (x.reshape(6), x.T, x.mT, gg.expand_dims(x), gg.broadcast_to(x, (4, 2, 3)), gg.flip(x),
              *gg.split(x, 2), *gg.unstack(x)):  # fmt: skip
        assert np.shares_memory(y.data, x.data)


def test_a_chain_of_moves_records_one_node_each() -> None:
    x = gg.ones((2, 3)).requires_grad_()
    y = gg.moveaxis(x.reshape(3, 2), 0, 1)
    assert [n.primitive.name for n in reachable([y._node]) if n.seq] == ["permute_dims", "reshape"]
