"""Draws that an operation makes by itself, and a training that goes on where it stopped."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import io, nn, optim
from gpugrad.nn import functional as F


def test_a_stream_is_a_draw_like_any_other():
    generator = nn.Generator(9)
    assert generator.stream() == (9, 0)
    generator.normal((3,))
    assert generator.stream() == (9, 2)
    assert generator.state == (9, 3)
    generator.state = (9, 2)
    assert generator.stream() == (9, 2)


def test_long_seeds_are_folded():
    low, high = 0x0123456789ABCDEF, 0xFFFF0000FFFF0000
    assert nn.Generator(low | high << 64).stream() == (low ^ high, 0)
    assert nn.Generator((1 << 128) - 1).stream() == (0, 0)


def test_dropout_is_the_operation_on_the_next_stream():
    x = gg.tensor(np.ones((20, 30), "float32"))
    got = F.dropout(x, 0.3, generator=nn.Generator(5)).numpy()
    assert np.array_equal(got, gg.dropout(x, p=0.3, seed=5, offset=0).numpy())
    gg.manual_seed(5)
    assert np.array_equal(nn.Dropout(0.3)(x).numpy(), got)
    assert np.array_equal(
        nn.Dropout(0.3)(x).numpy(), gg.dropout(x, p=0.3, seed=5, offset=1).numpy()
    )


def test_what_drops_nothing_draws_nothing():
    x = gg.tensor(np.ones(4))
    generator = nn.Generator(5)
    assert F.dropout(x, 0.5, training=False, generator=generator) is x
    assert F.dropout(x, 0.0, generator=generator) is x
    assert generator.state == (5, 0)
    assert F.dropout(x, 1.0, generator=generator).tolist() == [0.0] * 4


@pytest.mark.parametrize("p", [-0.5, 1.5, float("nan")])
def test_p_is_looked_at_in_evaluation_too(p):
    from gpugrad.errors import ParameterError

    with pytest.raises(ParameterError, match="probability"):
        F.dropout(gg.ones(3), p, training=False)


def net():
    gg.manual_seed(3)
    layers = (nn.Embedding(50, 16), nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.4), nn.GELU())
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(32, 4))


def train(model, optimizer, steps):
    rng = np.random.default_rng(0)
    batches = [(rng.integers(0, 50, (8, 4)), rng.integers(0, 4, 8)) for _ in range(10)]
    for k in steps:
        x, y = batches[k]
        loss = F.cross_entropy(model(gg.asarray(x)), gg.asarray(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_resumed_training_is_the_same_bit_for_bit(tmp_path):
    model = net()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, range(5))
    state = {"rng": nn.default_generator.state, "model": model.state_dict(),
             "optimizer": optimizer.state_dict()}  # fmt: skip
    io.save(tmp_path / "c.safetensors", *io.pack(on_host(state)))
    train(model, optimizer, range(5, 10))

    again = net()
    fresh = optim.AdamW(again.parameters(), lr=0.01)
    found = io.unpack(*io.load(tmp_path / "c.safetensors"))
    again.load_state_dict(found["model"])
    fresh.load_state_dict(found["optimizer"])
    nn.default_generator.state = found["rng"]
    train(again, fresh, range(5, 10))
    for name, value in model.state_dict().items():
        assert np.array_equal(on_host(value), on_host(again.state_dict()[name])), name


def on_host(state):
    if isinstance(state, gg.Tensor):
        return state.detach().cpu().numpy()
    if isinstance(state, dict):
        return {str(k): on_host(v) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(on_host(v) for v in state)
    return state
