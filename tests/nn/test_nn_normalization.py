"""Normalisation layers: PyTorch's names and numbers, buffers, bad input, training without reads."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.errors import DTypeError, ParameterError, ShapeError
from gpugrad.nn import functional as F
from tests.backend.counting import counting

#: Layer, arguments, shape of the input.
LAYERS = [
    ("LayerNorm", (6,), {}, (4, 6)),
    ("LayerNorm", ((3, 4),), {"eps": 1e-3}, (2, 5, 3, 4)),
    ("LayerNorm", (6,), {"bias": False}, (2, 3, 6)),
    ("LayerNorm", (6,), {"elementwise_affine": False}, (4, 6)),
    ("LayerNorm", (1,), {}, (4, 1)),
    ("RMSNorm", (6,), {}, (4, 6)),
    ("RMSNorm", ([2, 3],), {"eps": 1e-2}, (4, 2, 3)),
    ("RMSNorm", (6,), {"elementwise_affine": False}, (4, 6)),
    ("GroupNorm", (2, 6), {}, (4, 6, 5)),
    ("GroupNorm", (3, 6), {"eps": 1e-2}, (2, 6, 3, 4)),
    ("GroupNorm", (6, 6), {"bias": False}, (3, 6, 4)),
    ("GroupNorm", (1, 6), {"affine": False}, (3, 6)),
    ("BatchNorm1d", (6,), {}, (5, 6)),
    ("BatchNorm1d", (6,), {"momentum": 0.3, "eps": 1e-2}, (5, 6, 3)),
    ("BatchNorm1d", (6,), {"momentum": None}, (5, 6)),
    ("BatchNorm1d", (6,), {"affine": False}, (5, 6)),
    ("BatchNorm1d", (6,), {}, (1, 6, 3)),
    ("BatchNorm2d", (3,), {}, (4, 3, 5, 2)),
    ("BatchNorm2d", (3,), {"bias": False}, (4, 3, 5, 2)),
    ("BatchNorm2d", (3,), {"track_running_stats": False}, (4, 3, 5, 2)),
]
IDS = [f"{name}-{i}" for i, (name, *_) in enumerate(LAYERS)]


def pair(name, args, options):
    """The layer here and in PyTorch, with equal random parameters."""
    import torch

    ours = getattr(nn, name)(*args, **options, dtype="float64")
    theirs = getattr(torch.nn, name)(*args, **options, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, generator=generator)
    ours.load_state_dict({k: v.detach().numpy() for k, v in theirs.state_dict().items()})
    return ours, theirs


@pytest.mark.torch
@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize(("name", "args", "options", "shape"), LAYERS, ids=IDS)
def test_like_pytorch(name, args, options, shape, mode) -> None:
    """Names, forward, gradients of input and parameters, and buffers, over several steps."""
    import torch

    ours, theirs = pair(name, args, options)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    rng = np.random.default_rng(1)
    with gg.use_kernels(mode):
        for step in range(5):
            if step == 3:
                ours.eval()
                theirs.eval()
            x, g = rng.standard_normal((2, *shape))
            a, b = gg.tensor(x + 3.0, requires_grad=True), torch.tensor(x + 3.0).requires_grad_()
            ours.zero_grad()
            theirs.zero_grad()
            y, t = ours(a), theirs(b)
            y.backward(gg.tensor(g))
            t.backward(torch.tensor(g))
            close(y.detach().numpy(), t)
            close(a.grad.numpy(), b.grad)
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                close(p.grad.numpy(), q.grad)
            for key, value in theirs.state_dict().items():
                close(ours.state_dict()[key].numpy(), value)


def close(a, b) -> None:
    b = b.detach().numpy()
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.torch
def test_functions_like_pytorch() -> None:
    import torch

    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal((4, 6, 3)), rng.standard_normal(6), rng.standard_normal(6)
    mean, var = rng.standard_normal(6), rng.uniform(0.5, 2.0, 6)
    calls = [
        ("layer_norm", (x, (3,)), {}),
        ("layer_norm", (x, (6, 3)), {"eps": 0.1}),
        ("rms_norm", (x, (6, 3)), {}),
        ("rms_norm", (x, (3,), x[0, 0]), {"eps": 0.1}),
        ("group_norm", (x, 3, w, b), {}),
        ("batch_norm", (x, mean, var, w, b), {}),
        ("batch_norm", (x, None, None, w, b), {"training": True}),
        ("batch_norm", (x, mean, var), {"training": True, "momentum": 0.3}),
    ]
    for name, args, options in calls:
        ours = [gg.tensor(v) if isinstance(v, np.ndarray) else v for v in args]
        theirs = [torch.tensor(v) if isinstance(v, np.ndarray) else v for v in args]
        close(getattr(F, name)(*ours, **options).numpy(), getattr(torch.nn.functional, name)(
            *theirs, **options))  # fmt: skip
        for mine, other in zip(ours, theirs):  # running averages change in place
            if isinstance(mine, gg.Tensor):
                close(mine.numpy(), other)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_default_eps_of_half_precision(dtype) -> None:
    import ml_dtypes
    import torch

    x = np.full((1, 4), 1e-4, "float32")
    theirs = torch.nn.functional.rms_norm(torch.tensor(x).to(getattr(torch, dtype)), (4,))
    ours = F.rms_norm(gg.tensor(x.astype(getattr(ml_dtypes, dtype, dtype))), 4)
    np.testing.assert_allclose(
        np.asarray(ours.numpy(), "float32"), theirs.float().numpy(), rtol=2.0**-7
    )


def test_an_empty_batch_leaves_the_running_averages_alone() -> None:
    layer = nn.BatchNorm1d(3)
    y = layer(gg.zeros((0, 3), dtype="float32"))
    assert y.shape == (0, 3)
    assert layer.running_mean.tolist() == [0.0] * 3
    assert layer.running_var.tolist() == [1.0] * 3
    assert layer.num_batches_tracked.item() == 1
    y.backward(gg.zeros((0, 3), dtype="float32"))
    assert layer.weight.grad.tolist() == [0.0] * 3


def test_running_averages_are_forgotten() -> None:
    layer = nn.BatchNorm2d(2)
    layer(gg.tensor(np.random.default_rng(0).standard_normal((3, 2, 4, 4), "float32")))
    assert layer.running_mean.tolist() != [0.0, 0.0]
    layer.reset_running_stats()
    assert layer.running_mean.tolist() == [0.0, 0.0]
    assert layer.running_var.tolist() == [1.0, 1.0]
    assert layer.num_batches_tracked.item() == 0


def test_buffers_move_with_the_layer() -> None:
    layer = nn.BatchNorm1d(2).to("float64")
    assert layer.running_var.dtype == np.float64
    assert layer.num_batches_tracked.dtype == np.int64
    layer.to("strict:device1")
    assert layer(gg.ones((2, 2), device="strict:device1")).device == "strict:device1"
    assert {b.device for b in layer.buffers()} == {"strict:device1"}


def test_running_averages_take_no_part_in_the_graph() -> None:
    layer = nn.BatchNorm1d(2, dtype="float64")
    x = gg.tensor(np.random.default_rng(0).standard_normal((5, 2)), requires_grad=True)
    y = layer(x)
    layer(x * 2.0)  # changes the buffers in place
    gg.sum(y * y).backward()
    assert not layer.running_mean.requires_grad
    evaluated = layer.eval()(x)
    layer.train()(x)
    with pytest.raises(gg.errors.InplaceError, match="changed in place"):
        gg.sum(evaluated).backward()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.LayerNorm(6), (4, 6)),
        (lambda: nn.RMSNorm(6), (4, 6)),
        (lambda: nn.GroupNorm(2, 6), (4, 6, 3)),
        (lambda: nn.BatchNorm1d(6), (4, 6)),
        (lambda: nn.BatchNorm1d(6, momentum=None), (4, 6)),
        (lambda: nn.BatchNorm2d(6).eval(), (4, 6, 2, 2)),
    ],
)
def test_a_step_reads_nothing_from_the_device(layer, shape) -> None:
    with counting() as counts:
        x = gg.tensor(np.ones(shape, "float32"), device="counting", requires_grad=True)
        net = layer().to("counting")
        uploads = counts.uploads
        y = net(x)
        y.backward(gg.ones_like(y))
        assert counts.host_reads == 0
        assert counts.uploads == uploads


# -- bad input ------------------------------------------------------------------------------------

BAD = [
    (lambda: nn.LayerNorm(6), (4, 7), ShapeError, r"LayerNorm \(6,\).*\(4, 7\).*\(6,\).*reshape"),
    (lambda: nn.LayerNorm((2, 6)), (6,), ShapeError, r"LayerNorm \(2, 6\).*\(6,\)"),
    (lambda: nn.RMSNorm(6), (4, 7), ShapeError, r"RMSNorm \(6,\).*\(4, 7\)"),
    (lambda: nn.GroupNorm(2, 6), (4, 7), ShapeError, r"GroupNorm 6 in 2.*7 channels.*takes 6"),
    (lambda: nn.GroupNorm(2, 6), (6,), ShapeError, r"GroupNorm.*\(6,\).*expand_dims"),
    (lambda: nn.BatchNorm1d(6), (4, 7), ShapeError, r"BatchNorm1d 6.*\(4, 7\).*7 channels"),
    (lambda: nn.BatchNorm1d(6), (4, 6, 2, 2), ShapeError, r"4 axes, the layer takes 2 or 3"),
    (lambda: nn.BatchNorm2d(6), (4, 6), ShapeError, r"2 axes, the layer takes 4"),
    (lambda: nn.BatchNorm1d(6), (1, 6), ShapeError, r"one value per channel.*eval\(\)"),
]


@pytest.mark.parametrize(("layer", "shape", "error", "text"), BAD)
def test_input_of_a_wrong_shape_names_the_layer_and_the_fix(layer, shape, error, text) -> None:
    net = nn.Sequential(nn.Identity(), layer())
    before = {k: v.tolist() for k, v in net.state_dict().items()}
    with pytest.raises(error, match=r"Sequential\.1 \(.*" + text):
        net(gg.zeros(shape, dtype="float32"))
    assert {k: v.tolist() for k, v in net.state_dict().items()} == before


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "BatchNorm1d"])
def test_input_of_a_wrong_dtype(name) -> None:
    layer = getattr(nn, name)(3)
    with pytest.raises(DTypeError, match=rf"{name}.*weight is float32 and x is float64.*\.to"):
        layer(gg.zeros((2, 3)))
    with pytest.raises(DTypeError, match="int64"):
        layer(gg.zeros((2, 3), dtype="int64"))


def test_a_weight_of_a_wrong_shape() -> None:
    x, w = gg.zeros((4, 6)), gg.zeros(5)
    for call in (
        lambda: F.layer_norm(x, 6, w),
        lambda: F.layer_norm(x, 6, None, w),
        lambda: F.rms_norm(x, 6, w),
        lambda: F.group_norm(x, 2, w),
        lambda: F.batch_norm(x, None, None, w, training=True),
        lambda: F.batch_norm(x, w, w),
        lambda: F.batch_norm(x, w, w, training=True),
    ):
        with pytest.raises(ShapeError, match=r"\(5,\)"):
            call()


def test_layers_that_cannot_be() -> None:
    with pytest.raises(ParameterError, match=r"num_channels \(6\).*num_groups \(4\)"):
        nn.GroupNorm(4, 6)
    with pytest.raises(ShapeError, match="normalized_shape is empty"):
        nn.LayerNorm(())
    with pytest.raises(ParameterError, match=r"6 channels.*4 groups"):
        F.group_norm(gg.zeros((2, 6)), 4)
    with pytest.raises(ParameterError, match="running_mean and running_var"):
        F.batch_norm(gg.zeros((2, 6)), None, None)
