"""A training step of a small GPT, made line by line of the modules of either library."""

from __future__ import annotations

import importlib
import math
from typing import Any

from gpugrad.bench.steps import Arrays, jax_linear, step
from gpugrad.bench.workload import Workload

#: Layers, width, heads, length, batch, characters.
SIZES = {"2 of 32": (2, 32, 2, 16, 2, 20), "4 of 128": (4, 128, 4, 64, 16, 96)}


def net(nn: Any, layers: int, width: int, heads: int, length: int, batch: int, words: int) -> Any:
    ours = nn.__name__.startswith("gpugrad")
    library = importlib.import_module("gpugrad" if ours else "torch")
    split = library.split if ours else library.tensor_split

    def gelu(layer: Any, x: Any) -> Any:
        if ours:
            return layer(x, activation="gelu_tanh")
        return nn.functional.gelu(layer(x), approximate="tanh")

    class Block(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.norm1 = nn.LayerNorm(width)
            self.qkv = nn.Linear(width, 3 * width)
            self.out = nn.Linear(width, width)
            self.norm2 = nn.LayerNorm(width)
            self.up = nn.Linear(width, 4 * width)
            self.down = nn.Linear(4 * width, width)

        def attend(self, x: Any) -> Any:
            b, t, c = x.shape
            q, k, v = (
                library.moveaxis(part.reshape((b, t, heads, c // heads)), 2, 1)
                for part in split(self.qkv(x), 3, -1)
            )
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(library.moveaxis(y, 1, 2).reshape((b, t, c)))

        def forward(self, x: Any) -> Any:
            x = x + self.attend(self.norm1(x))
            return x + self.down(gelu(self.up, self.norm2(x)))

    class Net(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(words, width)
            self.places = nn.Embedding(length, width)
            self.blocks = nn.ModuleList([Block() for _ in range(layers)])
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, words)

        def forward(self, text: Any) -> Any:
            x = self.words(text) + self.places.weight
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    return Net()


def data(random: Any, *size: int) -> tuple[Any, Any]:
    """Characters, and those that follow: noise with a pattern to learn."""
    *_, length, batch, words = size
    text = random.integers(0, 3, (batch, length + 1)).cumsum(axis=-1) % words
    return text[..., :-1].copy(), text[..., 1:].copy()


def jax_norm(jax: Any, p: Arrays, name: str, x: Any) -> Any:
    d = x - x.mean(-1, keepdims=True)
    y = d * jax.lax.rsqrt((d * d).mean(-1, keepdims=True) + 1e-5)
    return y * p[f"{name}.weight"] + p[f"{name}.bias"]


def with_jax(jax: Any, size: tuple[Any, ...], p: Arrays, text: Any) -> Any:
    jnp = jax.numpy
    layers, width, heads, length, batch, _ = size
    x = p["words.weight"][text] + p["places.weight"]
    for i in range(layers):
        name = f"blocks.{i}"
        qkv = jax_linear(p, f"{name}.qkv", jax_norm(jax, p, f"{name}.norm1", x))
        q, k, v = jnp.split(qkv.reshape(batch, length, 3, heads, width // heads), 3, axis=2)
        s = jnp.einsum("bihd,bjhd->bhij", q[:, :, 0], k[:, :, 0]) / math.sqrt(width // heads)
        s = jnp.where(jnp.tri(length, dtype=bool), s, -jnp.inf)
        y = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(s), v[:, :, 0])
        x = x + jax_linear(p, f"{name}.out", y.reshape(batch, length, width))
        h = jax_linear(p, f"{name}.up", jax_norm(jax, p, f"{name}.norm2", x))
        x = x + jax_linear(p, f"{name}.down", jax.nn.gelu(h, approximate=True))
    return jax_linear(p, "head", jax_norm(jax, p, "norm", x))


def flops(layers: int, width: int, heads: int, length: int, batch: int, words: int) -> float:
    """Products alone: those of the layers, of attention, and of the head."""
    places = batch * length
    return 6 * places * (layers * (12 * width**2 + 2 * length * width / 2) + width * words)


WORKLOADS: tuple[Workload, ...] = (
    step(
        "step of a GPT", "blocks of attention and an MLP, on characters: layers, width",
        sizes=SIZES, net=net, data=data, jax=with_jax, flops=flops, least=1.35,
        tolerance=1e-3,
    ),
)  # fmt: skip
