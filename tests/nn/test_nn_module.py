"""Modules: the tree, its names, its state, and errors that name the layer."""

import copy

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.errors import DeviceError, InplaceError, ParameterError, ShapeError
from gpugrad.nn import functional as F


class Block(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.Module()
        self.norm.scale = nn.Parameter(gg.tensor(np.ones(width, np.float32)))
        self.register_buffer("steps", gg.tensor(np.zeros((), np.int64)))
        self.register_buffer("scratch", gg.tensor(np.zeros(2)), persistent=False)
        self.last = nn.Linear(width, 2, bias=False)

    def forward(self, x):
        return self.last(F.relu(self.first(x)) * self.norm.scale)


def shared():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


def test_names_and_order() -> None:
    block = Block()
    assert [n for n, _ in block.named_parameters()] == [
        "first.weight", "first.bias", "norm.scale", "last.weight",
    ]  # fmt: skip
    assert [n for n, _ in block.named_buffers()] == ["steps", "scratch"]
    assert [n for n, _ in block.named_modules()] == ["", "first", "norm", "last"]
    assert [n for n, _ in block.named_children()] == ["first", "norm", "last"]
    assert list(block.state_dict()) == [
        "steps", "first.weight", "first.bias", "norm.scale", "last.weight",
    ]  # fmt: skip
    assert [n for n, _ in block.named_parameters(recurse=False)] == []
    assert len(list(block.children())) == 3
    assert next(iter(block.modules())) is block


def test_shared_parameters_count_once() -> None:
    net = shared()
    assert [n for n, _ in net.named_parameters()] == ["0.weight", "0.bias", "1.bias"]
    assert len(list(net.named_parameters(remove_duplicate=False))) == 4
    assert list(net.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    layer = nn.Linear(2, 2)
    twice = nn.Sequential(layer, layer)
    assert [n for n, _ in twice.named_parameters()] == ["0.weight", "0.bias"]
    assert list(twice.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert len(list(twice.children())) == 1
    assert len(twice) == 2


def test_shared_parameter_gets_one_gradient() -> None:
    net = shared()
    x = gg.tensor(np.ones((2, 3), np.float32))
    gg.sum(net(x)).backward()
    assert net[0].weight.grad is net[1].weight.grad
    net.load_state_dict(net.state_dict())
    assert net[0].weight is net[1].weight


def test_frozen_parameters_stay_parameters() -> None:
    block = Block().requires_grad_(False)
    assert len(list(block.parameters())) == 4
    assert not any(p.requires_grad for p in block.parameters())
    assert all(p.requires_grad for p in block.requires_grad_().parameters())


def test_train_eval_apply() -> None:
    block = Block()
    assert block.eval() is block
    assert not any(m.training for m in block.modules())
    assert all(m.training for m in block.train().modules())
    seen = []
    assert block.apply(lambda m: seen.append(type(m).__name__)) is block
    assert seen == ["Linear", "Module", "Linear", "Block"]


def test_zero_grad() -> None:
    block = Block()
    gg.sum(block(gg.tensor(np.ones((2, 3), np.float32)))).backward()
    assert all(p.grad is not None for p in block.parameters())
    block.zero_grad(set_to_none=False)
    assert all(np.all(p.grad.numpy() == 0) for p in block.parameters())
    block.zero_grad()
    assert all(p.grad is None for p in block.parameters())


def test_a_parameter_is_not_replaced_by_accident() -> None:
    block = Block()
    with pytest.raises(nn.ModuleError, match="weight is a parameter and Tensor is not"):
        block.first.weight = gg.tensor(np.ones((3, 3)))
    with pytest.raises(nn.ModuleError, match="first is a module and int is not"):
        block.first = 3
    with pytest.raises(nn.ModuleError, match="steps is a buffer and float is no tensor"):
        block.steps = 3.0
    block.first.weight = nn.Parameter(gg.tensor(np.ones((3, 3), np.float32)))
    block.first.bias = None
    assert [n for n, _ in block.first.named_parameters()] == ["weight"]
    block.steps = gg.tensor(np.ones((), np.int64))
    assert block.state_dict()["steps"].item() == 1


@pytest.mark.parametrize("name", ["", "a.b", 3])
def test_bad_names(name) -> None:
    module = nn.Module()
    for register in (module.register_parameter, module.register_buffer, module.add_module):
        with pytest.raises(nn.ModuleError, match="cannot be a name"):
            register(name, None)


def test_register_checks_what_it_takes() -> None:
    module = nn.Module()
    with pytest.raises(nn.ModuleError, match="Parameter or None"):
        module.register_parameter("p", gg.tensor(1.0))
    with pytest.raises(nn.ModuleError, match="Tensor or None"):
        module.register_buffer("b", 1.0)
    with pytest.raises(nn.ModuleError, match="Module or None"):
        module.add_module("m", F.relu)
    with pytest.raises(nn.ModuleError, match="has an attribute 'training' already"):
        module.register_buffer("training", gg.tensor(1.0))
    module.register_parameter("p", None)
    assert module.p is None
    assert list(module.state_dict()) == []


def test_a_subclass_without_super_init_works() -> None:
    class Bare(nn.Module):
        def __init__(self):
            self.w = nn.Parameter(gg.tensor(2.0))
            self.register_buffer("b", gg.tensor(1.0))

        def forward(self, x):
            return x * self.w + self.b

    assert Bare()(gg.tensor(3.0)).item() == 7.0
    assert list(Bare().state_dict()) == ["w", "b"]
    assert nn.Module._buffers == {}  # nothing leaked into the class


def test_state_dict_shares_memory_and_loads_in_place() -> None:
    block = Block()
    state = block.state_dict()
    assert all(not t.requires_grad for t in state.values())
    assert np.shares_memory(state["first.weight"].data, block.first.weight.data)
    arrays = {k: np.asarray(v.numpy()) + 1 for k, v in state.items()}
    arrays = {k: v.astype(state[k].dtype) for k, v in arrays.items()}
    weight, data = block.first.weight, block.first.weight.data
    assert block.load_state_dict(arrays) == ([], [])
    assert block.first.weight is weight
    assert weight.data is data
    assert np.array_equal(weight.detach().numpy(), arrays["first.weight"])
    assert block.steps.item() == 1


def test_loading_lists_every_mismatch_and_changes_nothing() -> None:
    block = Block()
    before = {k: v.numpy().copy() for k, v in block.state_dict().items()}
    bad = {k: v + 1 for k, v in before.items()}
    del bad["norm.scale"]
    bad["extra"] = np.zeros(1)
    bad["first.weight"] = np.zeros((2, 3), np.float32)
    bad["first.bias"] = np.zeros(3, np.float64)
    with pytest.raises(nn.StateDictError) as caught:
        block.load_state_dict(bad)
    error = caught.value
    assert error.missing == ("norm.scale",)
    assert error.unexpected == ("extra",)
    assert error.wrong_shape == ("first.weight",)
    assert error.wrong_dtype == ("first.bias",)
    assert str(error) == (
        "the state does not fit Block:\n"
        "  missing: norm.scale\n"
        "  unexpected: extra\n"
        "  wrong shape: first.weight is (2, 3), expected (3, 3)\n"
        "  wrong dtype: first.bias is float64, expected float32"
    )
    assert isinstance(error, ValueError)
    for name, value in block.state_dict().items():
        assert np.array_equal(value.numpy(), before[name])


def test_loading_leniently() -> None:
    block = Block()
    found = block.load_state_dict(
        {"last.weight": np.full((2, 3), 7, np.float32), "old": np.zeros(1)}, strict=False
    )
    assert found.missing_keys == ["steps", "first.weight", "first.bias", "norm.scale"]
    assert found.unexpected_keys == ["old"]
    assert np.all(block.last.weight.detach().numpy() == 7)
    with pytest.raises(nn.StateDictError, match="wrong shape"):
        block.load_state_dict({"last.weight": np.zeros((1, 1), np.float32)}, strict=False)


def test_loading_is_seen_by_a_recorded_graph() -> None:
    layer = nn.Linear(2, 2)
    x = gg.tensor(np.ones((1, 2), np.float32), requires_grad=True)
    y = gg.sum(layer(x) * layer(x))
    layer.load_state_dict(nn.Linear(2, 2).state_dict())
    with pytest.raises(InplaceError):
        y.backward()


def test_to_dtype_in_place() -> None:
    block = Block()
    gg.sum(block(gg.tensor(np.ones((2, 3), np.float32)))).backward()
    weight = block.first.weight
    values = weight.detach().numpy().copy()
    assert block.to("float64") is block
    assert block.first.weight is weight
    assert weight.dtype == np.float64
    assert weight.grad.dtype == np.float64
    assert weight.requires_grad
    assert np.array_equal(weight.detach().numpy(), values)
    assert block.steps.dtype == np.int64
    assert block.to(dtype="float32").first.weight.dtype == np.float32
    with pytest.raises(nn.ModuleError, match="floating-point"):
        block.to("int32")


def test_to_a_device_that_is_not_there_changes_nothing() -> None:
    block = Block()
    with pytest.raises(DeviceError):
        block.to("abacus", "float64")
    assert block.first.weight.dtype == np.float32


def test_to_another_device() -> None:
    pytest.importorskip("array_api_strict")
    block = Block().to("strict:device1")
    assert {p.device for p in block.parameters()} == {"strict:device1"}
    assert block.steps.device == "strict:device1"
    x = gg.tensor(np.ones((2, 3), np.float32), device="strict:device1")
    y = block(x)
    gg.sum(y).backward()
    assert block.first.weight.grad.device == "strict:device1"
    host = block.to("cpu")
    assert host.first.weight.grad.device == "cpu"
    assert np.allclose(host(x.to("cpu")).detach().numpy(), y.detach().cpu().numpy())


def test_copies_are_apart() -> None:
    block = Block()
    twin = copy.deepcopy(block)
    assert list(twin.state_dict()) == list(block.state_dict())
    with gg.no_grad():
        twin.first.weight[...] = 0.0
    assert not np.all(block.first.weight.detach().numpy() == 0)
    tied = copy.deepcopy(shared())
    assert tied[0].weight is tied[1].weight


def test_hooks() -> None:
    layer = nn.Identity()
    seen = []
    remove = layer.register_forward_hook(lambda m, args, out: seen.append(out.item()))
    double = layer.register_forward_pre_hook(lambda m, args: args[0] * 2)
    assert layer(gg.tensor(2.0)).item() == 4.0
    remove()
    add = layer.register_forward_hook(lambda m, args, out: out + 1)
    assert layer(gg.tensor(2.0)).item() == 5.0
    add()
    double()
    assert layer(gg.tensor(2.0)).item() == 2.0
    assert seen == [4.0]


# -- errors that name the layer ------------------------------------------------------------------


def test_an_error_names_the_layer() -> None:
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(128, 10))
    with pytest.raises(ShapeError) as caught:
        net(gg.tensor(np.ones((5, 8), np.float32)))
    assert str(caught.value) == (
        "Sequential.2 (Linear 128->10): input has 64 features (shape (5, 64)), the layer takes "
        "128; give the layer before it 128 outputs, or make this one Linear(64, 10)"
    )


def test_an_error_names_the_whole_path() -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(4, 2)))
            self.unused = nn.Linear(1, 1)

        def forward(self, x):
            return self.body(x)

    with pytest.raises(ShapeError, match=r"^Net\.body\.1\.0 \(Linear 4->2\): input has 3 features"):
        Net()(gg.tensor(np.ones((1, 3), np.float32)))


def test_a_single_layer_is_named_alone() -> None:
    with pytest.raises(ShapeError, match=r"^Linear 4->2: input has 3 features"):
        nn.Linear(4, 2)(gg.tensor(np.ones((1, 3), np.float32)))


def test_an_error_of_another_kind_gets_a_note() -> None:
    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError("no such thing")

    with pytest.raises(KeyError) as caught:
        nn.Sequential(nn.Sequential(Broken()))(gg.tensor(1.0))
    assert caught.value.args == ("no such thing",)
    assert caught.value.__notes__ == ["gpugrad: in Sequential.0.0 (Broken)"]


def test_a_module_outside_the_tree_is_said_to_be() -> None:
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(4, 2)]

        def forward(self, x):
            return self.layers[0](x)

    with pytest.raises(ShapeError, match=r"^Hidden\.\(unregistered\) \(Linear 4->2\)"):
        Hidden()(gg.tensor(np.ones((1, 3), np.float32)))


def test_no_forward() -> None:
    class Empty(nn.Module):
        pass

    with pytest.raises(nn.ModuleError, match=r"Empty has no forward\(\)"):
        Empty()(1)


# -- layers --------------------------------------------------------------------------------------


def test_repr() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Sequential(nn.GELU(), nn.Dropout(0.2)), nn.Softmax())
    assert repr(net) == (
        "Sequential(\n"
        "  (0): Linear(in_features=8, out_features=4, bias=True)\n"
        "  (1): Sequential(\n"
        "    (0): GELU(approximate='none')\n"
        "    (1): Dropout(p=0.2)\n"
        "  )\n"
        "  (2): Softmax(dim=-1)\n"
        ")"
    )


def test_sequential_is_a_list() -> None:
    a, b, c = nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)
    net = nn.Sequential(a, b, c)
    assert len(net) == 3
    assert net[0] is a
    assert net[-1] is c
    assert list(net) == [a, b, c]
    part = net[1:]
    assert isinstance(part, nn.Sequential)
    assert list(part) == [b, c]
    assert [n for n, _ in part.named_children()] == ["0", "1"]
    with pytest.raises(IndexError, match="Sequential of 3 has no 3"):
        net[3]
    net[1] = d = nn.Tanh()
    assert list(net) == [a, d, c]
    assert [n for n, _ in net.named_children()] == ["0", "1", "2"]
    del net[0]
    assert [n for n, _ in net.named_children()] == ["0", "1"]
    net.insert(0, a).append(b)
    assert list(net) == [a, d, c, b]
    assert [n for n, _ in net.named_children()] == ["0", "1", "2", "3"]


def test_sequential_with_names() -> None:
    net = nn.Sequential({"in": nn.Linear(2, 2), "out": nn.Linear(2, 1)})
    assert list(net.state_dict()) == ["in.weight", "in.bias", "out.weight", "out.bias"]
    assert net[-1] is getattr(net, "out")  # noqa: B009
    assert [n for n, _ in net[1:].named_children()] == ["out"]
    with pytest.raises(nn.ModuleError, match="1 is function, not a module"):
        nn.Sequential(nn.ReLU(), F.relu)


def test_module_list() -> None:
    layers = nn.ModuleList([nn.Linear(2, 2)])
    layers.append(nn.Linear(2, 3)).extend([nn.ReLU()])
    assert len(layers) == 3
    assert [n for n, _ in layers.named_parameters()] == [
        "0.weight", "0.bias", "1.weight", "1.bias",
    ]  # fmt: skip
    with pytest.raises(nn.ModuleError, match="no forward"):
        layers(gg.tensor(1.0))


def test_linear_starts_in_its_interval() -> None:
    gg.manual_seed(0)
    layer = nn.Linear(400, 300)
    assert layer.weight.shape == (300, 400)
    assert layer.bias.shape == (300,)
    for p in (layer.weight, layer.bias):
        values = p.detach().numpy()
        assert p.dtype == np.float32
        assert np.abs(values).max() <= 1 / 20
        assert np.abs(values).max() > 0.98 / 20
        assert abs(values.std() - 1 / 20 / np.sqrt(3)) < 0.003
    assert nn.Linear(2, 3, bias=False).bias is None
    assert nn.Linear(2, 3, dtype="float64").weight.dtype == np.float64
    with pytest.raises(ShapeError, match="at least 1 feature"):
        nn.Linear(0, 3)


def test_linear_by_hand() -> None:
    layer = nn.Linear(3, 2, dtype="float64")
    x = np.arange(12.0).reshape(2, 2, 3)
    w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    assert np.allclose(layer(gg.tensor(x)).detach().numpy(), x @ w.T + b, rtol=1e-13)


def test_flatten() -> None:
    x = gg.tensor(np.zeros((2, 3, 4)))
    assert nn.Flatten()(x).shape == (2, 12)
    assert nn.Flatten(0)(x).shape == (24,)
    assert nn.Flatten(-2, -1)(x).shape == (2, 12)
    assert F.flatten(gg.tensor(1.0)).shape == (1,)
    with pytest.raises(ShapeError, match="axes from 1 to 5"):
        nn.Flatten(1, 5)(x)


def test_dropout() -> None:
    x = gg.tensor(np.ones((100, 100)), requires_grad=True)
    drop = nn.Dropout(0.25, generator=nn.Generator(3))
    y = drop(x)
    values = y.detach().numpy()
    assert set(np.unique(values)) == {0.0, 1 / 0.75}
    assert abs(np.mean(values == 0) - 0.25) < 0.02
    gg.sum(y).backward()
    assert np.array_equal(x.grad.numpy(), values)
    assert drop.eval()(x) is x
    drop.train()
    again = nn.Dropout(0.25, generator=nn.Generator(3))
    assert np.array_equal(again(x).detach().numpy(), values)
    assert not np.array_equal(again(x).detach().numpy(), values)
    assert np.all(nn.Dropout(1.0)(x).detach().numpy() == 0)
    with pytest.raises(ParameterError, match="probability"):
        nn.Dropout(1.5)


def test_dropout_is_the_same_elsewhere() -> None:
    pytest.importorskip("array_api_strict")
    host = np.ones(50, np.float32)
    a = nn.Dropout(generator=nn.Generator(1))(gg.tensor(host))
    b = nn.Dropout(generator=nn.Generator(1))(gg.tensor(host, device="strict:device1"))
    assert b.device == "strict:device1"
    assert np.array_equal(a.numpy(), b.cpu().numpy())
