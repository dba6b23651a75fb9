"""Attention layers and transformer blocks: PyTorch's names and numbers, masks, bad input."""

import itertools

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.errors import DTypeError, ParameterError, ShapeError
from gpugrad.nn import functional as F
from gpugrad.ops.attention import packed_attention
from tests.backend.counting import counting

INF = np.inf


def close(a, b) -> None:
    b = b.detach().numpy()
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def pair(name, *args, **options):
    """The layer here and in PyTorch, with equal random parameters."""
    import torch

    ours = getattr(nn, name)(*args, **options, dtype="float64")
    theirs = getattr(torch.nn, name)(*args, **options, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.4, generator=generator)
    ours.load_state_dict({k: v.detach().numpy() for k, v in theirs.state_dict().items()})
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return ours, theirs


def compare(ours, theirs, arrays, masks=None, **options):
    """Results, and gradients of inputs and parameters."""
    import torch

    masks = masks or {}
    names = dict.fromkeys(map(id, arrays))
    mine = {key: gg.tensor(x, requires_grad=True) for key, x in zip(names, unique(arrays))}
    other = {key: torch.tensor(x).requires_grad_() for key, x in zip(names, unique(arrays))}
    y = ours(*(mine[id(x)] for x in arrays), **options,
             **{k: gg.asarray(v) for k, v in masks.items()})  # fmt: skip
    t = theirs(*(other[id(x)] for x in arrays), **options,
               **{k: torch.tensor(v) for k, v in masks.items()})  # fmt: skip
    ys, ts = ((y,), (t,)) if not isinstance(y, tuple) else (y, t)
    total, sum_ = 0.0, 0.0
    rng = np.random.default_rng(5)
    for a, b in zip(ys, ts, strict=True):
        if b is None:
            assert a is None
            continue
        close(a.detach().numpy(), b)
        g = rng.standard_normal(a.shape)
        total, sum_ = total + gg.sum(a * gg.asarray(g)), sum_ + (b * torch.tensor(g)).sum()
    total.backward()
    sum_.backward()
    for key, x in mine.items():
        close(x.grad.numpy(), other[key].grad)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            close(p.grad.numpy(), q.grad)


def unique(arrays):
    return list({id(x): x for x in arrays}.values())


LAYERS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"kdim": 5, "vdim": 3},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 5, "vdim": 6},
]

BATCH, QUERIES, KEYS = 3, 4, 7


def inputs(options, kind, seed=0):
    """Query, key and value for a layer: "self", "memory" (keys are values) or "apart"."""
    rng = np.random.default_rng(seed)
    widths = (6, options.get("kdim", 6), options.get("vdim", 6))
    q, k, v = (rng.standard_normal((BATCH, n, w)) for n, w in zip((QUERIES, KEYS, KEYS), widths))
    if not options.get("batch_first"):
        q, k, v = (x.transpose(1, 0, 2).copy() for x in (q, k, v))
    if kind == "self":
        return [q, q, q]
    return [q, k, k if kind == "memory" else v]


def masks_for(keys):
    rng = np.random.default_rng(1)
    hidden = rng.random((QUERIES, keys)) < 0.4
    hidden[:, 0] = False  # a key that all see
    stacked = rng.random((BATCH * 2, QUERIES, keys)) < 0.4
    stacked[..., 0] = False
    padding = np.arange(keys) > np.array([[1], [keys - 1], [keys]]) % keys
    yield {}
    yield {"attn_mask": hidden}
    yield {"attn_mask": rng.standard_normal((QUERIES, keys))}
    yield {"attn_mask": stacked}
    yield {"attn_mask": np.where(stacked, -INF, 0.5)}
    yield {"key_padding_mask": padding}
    yield {"key_padding_mask": np.where(padding, -INF, 0.0)}
    yield {"key_padding_mask": padding, "attn_mask": hidden}
    yield {
        "key_padding_mask": np.where(padding, -INF, 0.0),
        "attn_mask": np.where(stacked, -9, 0.0),
    }


@pytest.mark.torch
@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_multihead_attention_like_pytorch(options, need_weights, mode) -> None:
    kinds = ["apart"] if "kdim" in options else ["self", "memory", "apart"]
    for kind in kinds:
        arrays = inputs(options, kind)
        for masks in masks_for(QUERIES if kind == "self" else KEYS):
            ours, theirs = pair("MultiheadAttention", 6, 2, **options)
            with gg.use_kernels(mode):
                compare(ours, theirs, arrays, masks, need_weights=need_weights)


@pytest.mark.torch
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_causality_like_pytorch(need_weights, padded) -> None:
    hidden = ~np.tri(QUERIES, dtype=bool)
    padding = {"key_padding_mask": np.arange(QUERIES) > np.array([[1], [2], [3]])}
    ours, theirs = pair("MultiheadAttention", 6, 2)
    arrays = inputs({}, "self")
    masks = {"attn_mask": hidden, **(padding if padded else {})}
    compare(ours, theirs, arrays, masks, need_weights=need_weights, is_causal=True)
    # Without a mask, the word is enough.
    x = gg.tensor(arrays[0])
    more = {k: gg.asarray(v) for k, v in (padding if padded else {}).items()}
    a, _ = ours(x, x, x, need_weights=need_weights, is_causal=True, **more)
    b, _ = ours(x, x, x, need_weights=need_weights, attn_mask=gg.asarray(hidden), **more)
    np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=1e-12)


@pytest.mark.torch
@pytest.mark.parametrize("average", [False, True])
def test_weights_and_a_single_sequence_like_pytorch(average) -> None:
    ours, theirs = pair("MultiheadAttention", 6, 3, batch_first=True)
    options = {"average_attn_weights": average}
    compare(ours, theirs, inputs({"batch_first": True}, "apart"), **options)
    q, k, v = (x[0].copy() for x in inputs({"batch_first": True}, "apart"))
    compare(ours, theirs, [q, k, v], **options)
    compare(ours, theirs, [q, k, v], {"key_padding_mask": np.arange(KEYS) > 3}, **options)
    compare(ours, theirs, [q, q, q], need_weights=False)


@pytest.mark.torch
def test_a_query_that_sees_nothing_like_pytorch() -> None:
    import torch

    ours, theirs = pair("MultiheadAttention", 6, 2, batch_first=True)
    x = inputs({"batch_first": True}, "self")[0]
    padding = np.zeros((BATCH, QUERIES), bool)
    padding[1] = True
    for need_weights in (False, True):
        with np.errstate(invalid="ignore"):
            y, w = ours(*[gg.tensor(x)] * 3, key_padding_mask=gg.asarray(padding),
                    need_weights=need_weights)  # fmt: skip
        t, u = theirs(*[torch.tensor(x)] * 3, key_padding_mask=torch.tensor(padding),
                      need_weights=need_weights)  # fmt: skip
        close(y.detach().numpy(), t)
        assert np.isnan(y.detach().numpy()).any() == need_weights
        if need_weights:
            close(w.detach().numpy(), u)


@pytest.mark.torch
def test_the_function_like_pytorch() -> None:
    import torch

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s) for s in ((2, 4, 5, 6), (2, 2, 7, 6), (2, 2, 7, 3)))
    mask = rng.random((2, 1, 5, 7)) < 0.6
    mask[0, 0, 2] = False
    calls = [
        {"enable_gqa": True},
        {"enable_gqa": True, "is_causal": True, "scale": 0.7},
        {"enable_gqa": True, "attn_mask": mask},
        {"enable_gqa": True, "attn_mask": np.where(mask, 0.3, -INF)},
        {"enable_gqa": True, "attn_mask": rng.standard_normal((2, 4, 5, 7))},
    ]
    for options in calls:

        def given(make, options=options):
            return {n: make(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}

        ours = [gg.tensor(x, requires_grad=True) for x in (q, k, v)]
        theirs = [torch.tensor(x).requires_grad_() for x in (q, k, v)]
        y = F.scaled_dot_product_attention(*ours, **given(gg.asarray))
        t = torch.nn.functional.scaled_dot_product_attention(*theirs, **given(torch.tensor))
        close(y.detach().numpy(), t)
        g = rng.standard_normal(y.shape)
        y.backward(gg.tensor(g))
        t.backward(torch.tensor(g))
        for a, b in zip(ours, theirs, strict=True):
            close(a.grad.numpy(), b.grad)


# -- transformer blocks ---------------------------------------------------------------------------

BLOCKS = [
    {"norm_first": norm_first, "activation": activation, "batch_first": batch_first}
    for norm_first, activation, batch_first in itertools.product(
        (False, True), ("relu", "gelu"), (False, True)
    )
]


@pytest.mark.torch
@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("options", [*BLOCKS, {"bias": False}, {"layer_norm_eps": 0.1}], ids=str)
def test_encoder_layer_like_pytorch(options, mode) -> None:
    ours, theirs = pair("TransformerEncoderLayer", 6, 2, 10, dropout=0.0, **options)
    x = inputs(options, "self")[0]
    padding = np.arange(QUERIES) > np.array([[1], [2], [3]])
    with gg.use_kernels(mode):
        compare(ours, theirs, [x])
        ours.zero_grad()
        theirs.zero_grad()
        masks = {"src_mask": ~np.tri(QUERIES, dtype=bool)}
        compare(ours, theirs, [x], masks, is_causal=True)
        ours.zero_grad()
        theirs.zero_grad()
        compare(ours, theirs, [x], {**masks, "src_key_padding_mask": padding})


@pytest.mark.torch
@pytest.mark.parametrize("options", BLOCKS, ids=str)
def test_decoder_layer_like_pytorch(options) -> None:
    ours, theirs = pair("TransformerDecoderLayer", 6, 2, 10, dropout=0.0, **options)
    x, memory, _ = inputs(options, "memory")
    padding = np.arange(KEYS) > np.array([[1], [2], [3]])
    masks = {"tgt_mask": ~np.tri(QUERIES, dtype=bool), "memory_key_padding_mask": padding}
    compare(ours, theirs, [x, memory], masks)


@pytest.mark.torch
def test_activations_of_other_kinds_like_pytorch() -> None:
    import torch

    for mine, other in (
        (F.silu, torch.nn.functional.silu),
        (nn.GELU("tanh"), torch.nn.GELU("tanh")),
        (lambda x: x * x, lambda x: x * x),
    ):
        ours, theirs = pair("TransformerEncoderLayer", 6, 2, 10, 0.0, norm_first=True)
        ours.activation, theirs.activation = mine, other
        compare(ours, theirs, inputs({}, "self")[:1])


@pytest.mark.torch
@pytest.mark.parametrize("final", [False, True])
def test_encoder_like_pytorch(final) -> None:
    import torch

    def build(library, **kind):
        layer = library.TransformerEncoderLayer(6, 2, 10, 0.0, norm_first=True, **kind)
        return library.TransformerEncoder(
            layer, 3, library.LayerNorm(6, **kind) if final else None, enable_nested_tensor=False
        )

    ours, theirs = build(nn, dtype="float64"), build(torch.nn, dtype=torch.float64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    first, second = (dict(ours.layers[i].named_parameters()) for i in (0, 1))
    for name, p in first.items():  # copies start with equal parameters, of their own
        assert np.array_equal(p.detach().numpy(), second[name].detach().numpy())
        assert p is not second[name]
    ours.load_state_dict({k: v.detach().numpy() for k, v in theirs.state_dict().items()})
    x = inputs({}, "self")[0]
    compare(ours, theirs, [x])
    hidden = ~np.tri(QUERIES, dtype=bool)
    for mask in (hidden, np.where(hidden, -INF, 0.0), hidden & False):
        ours.zero_grad()
        theirs.zero_grad()
        compare(ours, theirs, [x], {"mask": mask})


@pytest.mark.torch
def test_parameters_start_as_in_pytorch() -> None:
    import torch

    nn.manual_seed(0)
    torch.manual_seed(0)
    for options in ({}, {"kdim": 200, "vdim": 100, "add_bias_kv": True}):
        ours = nn.MultiheadAttention(300, 3, **options)
        theirs = torch.nn.MultiheadAttention(300, 3, **options)
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            a, b = p.detach().numpy(), q.detach().numpy()
            assert a.std() == pytest.approx(b.std(), rel=0.1), name
            assert abs(a).max() == pytest.approx(abs(b).max(), rel=0.3 if "bias_" in name else 0.01)


# -- dropout, hooks, devices ----------------------------------------------------------------------


def test_dropout_in_training_only_and_from_the_generator() -> None:
    x = gg.tensor(np.random.default_rng(0).standard_normal((2, 9, 8)).astype("float32"))
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.5, batch_first=True, generator=nn.Generator(3))
    a = layer(x).detach().numpy()
    assert not np.array_equal(a, layer(x).detach().numpy())
    for module in layer.modules():
        if hasattr(module, "generator"):
            module.generator.manual_seed(3)
    assert np.array_equal(a, layer(x).detach().numpy())
    layer.eval()
    assert np.array_equal(layer(x).detach().numpy(), layer(x).detach().numpy())


def test_weights_are_those_that_were_used() -> None:
    layer = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True, dtype="float64")
    x = gg.tensor(np.random.default_rng(0).standard_normal((1, 40, 8)))
    _, weights = layer(x, x, x, average_attn_weights=False)
    dropped = float((weights.detach().numpy() == 0).mean())
    assert 0.4 < dropped < 0.6


def test_a_hook_of_a_norm_is_heeded() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, norm_first=True, batch_first=True)
    seen = []
    layer.norm2.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    layer(gg.ones((2, 3, 8), dtype="float32"))
    assert seen == [(2, 3, 8)]


def test_a_single_projection_and_the_packed_operation() -> None:
    """What a layer computes of one input is what it computes of three equal ones."""
    layer = nn.MultiheadAttention(8, 2, batch_first=True, dtype="float64")
    x = np.random.default_rng(0).standard_normal((2, 5, 8))
    one = gg.tensor(x)
    a, _ = layer(one, one, one, need_weights=False, is_causal=True)
    b, _ = layer(gg.tensor(x), gg.tensor(x), gg.tensor(x), need_weights=False, is_causal=True)
    np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=1e-12)
    qkv = F.linear(one, layer.in_proj_weight, layer.in_proj_bias)
    c = layer.out_proj(packed_attention(qkv, heads=2, is_causal=True))
    assert np.array_equal(a.detach().numpy(), c.detach().numpy())


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_step_reads_nothing_from_the_device(need_weights) -> None:
    with counting() as counts:
        x = gg.tensor(np.ones((2, 3, 8), "float32"), device="counting", requires_grad=True)
        net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).to("counting")
        attention = nn.MultiheadAttention(8, 2, batch_first=True).to("counting")
        mask = gg.asarray(~np.tri(3, dtype=bool), device="counting")
        uploads = counts.uploads
        y, _ = attention(x, x, x, attn_mask=mask, need_weights=need_weights)
        y = net(y, src_mask=mask, is_causal=True)
        y.backward(gg.ones_like(y))
        assert counts.host_reads == 0
        assert counts.uploads == uploads


# -- bad input ------------------------------------------------------------------------------------


def zeros(*shape):
    return gg.zeros(shape, dtype="float32")


BAD = [
    ((zeros(3, 2, 7),) * 3, {}, ShapeError, r"\(3, 2, 7\).*takes \(6, 6, 6\).*embed_dim=7"),
    ((zeros(3, 2, 6), zeros(4, 1, 6), zeros(4, 1, 6)), {}, ShapeError, r"batch_first right"),
    ((zeros(3, 2, 6), zeros(4, 2, 6), zeros(5, 2, 6)), {}, ShapeError, "value for each key"),
    ((zeros(3, 6), zeros(4, 2, 6), zeros(4, 2, 6)), {}, ShapeError, r"\[length, batch, width\]"),
    ((zeros(6),) * 3, {}, ShapeError, r"\(6,\)"),
    ((zeros(3, 2, 6),) * 3, {"attn_mask": zeros(3, 4)}, ShapeError,
     r"attn_mask of shape \(3, 4\).*\(3, 3\) or \(4, 3, 3\)"),
    ((zeros(3, 2, 6),) * 3, {"key_padding_mask": zeros(3, 2)}, ShapeError,
     r"key_padding_mask of shape \(3, 2\).*\(2, 3\)"),
    ((zeros(3, 2, 6),) * 3, {"attn_mask": gg.zeros((3, 3), dtype="int64")}, DTypeError,
     r"attn_mask is int64.*boolean"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "options", "error", "text"), BAD)
def test_input_that_does_not_fit_names_the_layer_and_the_fix(args, options, error, text) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2)

        def forward(self, *args, **options):
            return self.attention(*args, **options)

    with pytest.raises(error, match=r"Net\.attention \(MultiheadAttention.*" + text):
        Net()(*args, **options)


def test_layers_that_cannot_be() -> None:
    with pytest.raises(ParameterError, match=r"MultiheadAttention\(6, 4\).*multiple of num_heads"):
        nn.MultiheadAttention(6, 4)
    with pytest.raises(ParameterError, match="probability"):
        nn.MultiheadAttention(6, 2, dropout=1.5)
    with pytest.raises(ParameterError, match=r"TransformerEncoderLayer.*'swish'.*as a function"):
        nn.TransformerEncoderLayer(6, 2, activation="swish")
    with pytest.raises(ParameterError, match="probability"):
        F.scaled_dot_product_attention(zeros(2, 3), zeros(2, 3), zeros(2, 3), dropout_p=-0.1)
