"""A training step of a small GPT: forward, loss, backward, clipping and AdamW.

``python bench/gpt.py [--quick] [--json PATH]``. 4 layers of width 128 with 4 heads, sequences of 64
characters in batches of 16, float32, two threads. The contenders take turns, each in a process of
its own; all start from the same parameters and must have the same losses in the first four steps.

Two of them are gpugrad: one is written line by line as the one of PyTorch, with
`F.scaled_dot_product_attention` on the heads of one projection; the other is made of
`nn.TransformerEncoderLayer`.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

#: Layers, width, heads, length, batch, characters; and for a quick check.
FULL, QUICK = (4, 128, 4, 64, 16, 96), (2, 32, 2, 16, 2, 20)

THREADS = 2
LR, CLIP = 3e-4, 1.0

#: What has to be reached, over the best peer.
BEST = 1.35

Sizes = tuple[int, ...]
#: One step; it returns the loss in a form that the library can make a number of.
Step = Callable[[], Any]


# -- what all start from --------------------------------------------------------------------------


def parameters(sizes: Sizes) -> dict[str, Any]:
    """Initial values by name: normal deviates of 0.02, as GPT-2's."""
    layers, width, _, length, _, words = sizes
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}

    def draw(name: str, *shape: int) -> None:
        found[name] = (0.02 * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, out: int, into: int) -> None:
        draw(f"{name}.weight", out, into)
        found[f"{name}.bias"] = np.zeros(out, np.float32)

    def norm(name: str) -> None:
        found[f"{name}.weight"] = np.ones(width, np.float32)
        found[f"{name}.bias"] = np.zeros(width, np.float32)

    draw("words.weight", words, width)
    draw("places.weight", length, width)
    for i in range(layers):
        norm(f"blocks.{i}.norm1")
        linear(f"blocks.{i}.qkv", 3 * width, width)
        linear(f"blocks.{i}.out", width, width)
        norm(f"blocks.{i}.norm2")
        linear(f"blocks.{i}.up", 4 * width, width)
        linear(f"blocks.{i}.down", width, 4 * width)
    norm("norm")
    linear("head", words, width)
    return found


def batches(sizes: Sizes) -> tuple[Any, Any]:
    """Eight batches of characters, and of those that follow: noise with a pattern to learn."""
    *_, length, batch, words = sizes
    rng = np.random.default_rng(1)
    text = np.cumsum(rng.integers(0, 3, (8, batch, length + 1)), axis=-1) % words
    return text[..., :-1].copy(), text[..., 1:].copy()


# -- PyTorch and gpugrad, in the same words -------------------------------------------------------


def net(
    library: Any, sizes: Sizes, split: Callable[[Any], Any], gelu: Callable[[Any, Any], Any]
) -> Any:
    """The net of either library.

    `split` cuts the last axis into three, and `gelu` is a linear layer with its activation.
    """
    nn = library.nn
    moveaxis = library.moveaxis
    attention = nn.functional.scaled_dot_product_attention
    layers, width, heads, length, _, words = sizes

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
                moveaxis(part.reshape((b, t, heads, c // heads)), 2, 1)
                for part in split(self.qkv(x))
            )
            y = attention(q, k, v, is_causal=True)
            return self.out(moveaxis(y, 1, 2).reshape((b, t, c)))

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


def with_torch(sizes: Sizes, compiled: bool = False, **options: bool) -> Step:
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(THREADS)
    model = net(
        torch, sizes, lambda x: x.chunk(3, dim=-1), lambda up, x: F.gelu(up(x), approximate="tanh")
    )
    model.load_state_dict({k: torch.tensor(v) for k, v in parameters(sizes).items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **options)
    xs, ts = (torch.tensor(x) for x in batches(sizes))
    forward = torch.compile(model) if compiled else model
    count = 0

    def step() -> Any:
        nonlocal count
        i, count = count % len(xs), count + 1
        loss = F.cross_entropy(forward(xs[i]).flatten(0, 1), ts[i].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.detach()

    return step


def trained(model: Any, sizes: Sizes) -> Step:
    """Training steps of a net of gpugrad."""
    import gpugrad as gg
    from gpugrad.nn import functional as F

    optimizer = gg.optim.AdamW(model.parameters(), lr=LR)
    xs, ts = ([gg.asarray(x) for x in part] for part in batches(sizes))
    ts = [gg.reshape(t, (-1,)) for t in ts]
    count = 0

    def step() -> Any:
        nonlocal count
        i, count = count % len(xs), count + 1
        y = model(xs[i])
        loss = F.cross_entropy(y.reshape((-1, y.shape[-1])), ts[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(clip=CLIP)
        return loss.detach()

    return step


def with_gpugrad(sizes: Sizes) -> Step:
    import gpugrad as gg

    model = net(
        gg, sizes, lambda x: gg.split(x, 3, axis=-1), lambda up, x: up(x, activation="gelu_tanh")
    )
    model.load_state_dict(parameters(sizes))
    return trained(model, sizes)


def with_layers(sizes: Sizes) -> Step:
    """The same of ready-made blocks."""
    from gpugrad import nn

    layers, width, heads, length, _, words = sizes

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(words, width)
            self.places = nn.Embedding(length, width)
            layer = nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, nn.GELU("tanh"), batch_first=True, norm_first=True
            )
            self.blocks = nn.TransformerEncoder(layer, layers)
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, words)

        def forward(self, text: Any) -> Any:
            x = self.words(text) + self.places.weight
            return self.head(self.norm(self.blocks(x, is_causal=True)))

    names = {"qkv.": "self_attn.in_proj_", "out.": "self_attn.out_proj.", "up.": "linear1.",
             "down.": "linear2.", "blocks.": "blocks.layers."}  # fmt: skip
    state = {}
    for name, value in parameters(sizes).items():
        for one, other in names.items():
            name = name.replace(one, other) if name.startswith("blocks.") else name
        state[name] = value
    model = Net()
    model.load_state_dict(state)
    return trained(model, sizes)


# -- JAX ------------------------------------------------------------------------------------------


def with_jax(sizes: Sizes) -> Step:
    import jax
    import jax.numpy as jnp

    layers, width, heads, length, batch, _ = sizes
    beta1, beta2, eps, decay = 0.9, 0.999, 1e-8, 1e-2

    def linear(p: Any, name: str, x: Any) -> Any:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(p: Any, name: str, x: Any) -> Any:
        d = x - x.mean(-1, keepdims=True)
        y = d * jax.lax.rsqrt((d * d).mean(-1, keepdims=True) + 1e-5)
        return y * p[f"{name}.weight"] + p[f"{name}.bias"]

    def loss_of(p: Any, text: Any, target: Any) -> Any:
        x = p["words.weight"][text] + p["places.weight"]
        for i in range(layers):
            name = f"blocks.{i}"
            qkv = linear(p, f"{name}.qkv", norm(p, f"{name}.norm1", x))
            q, k, v = jnp.split(qkv.reshape(batch, length, 3, heads, width // heads), 3, axis=2)
            s = jnp.einsum("bihd,bjhd->bhij", q[:, :, 0], k[:, :, 0]) / math.sqrt(width // heads)
            s = jnp.where(jnp.tri(length, dtype=bool), s, -jnp.inf)
            y = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(s), v[:, :, 0])
            x = x + linear(p, f"{name}.out", y.reshape(batch, length, width))
            h = linear(p, f"{name}.up", norm(p, f"{name}.norm2", x))
            x = x + linear(p, f"{name}.down", jax.nn.gelu(h, approximate=True))
        shares = jax.nn.log_softmax(linear(p, "head", norm(p, "norm", x)))
        return -jnp.take_along_axis(shares, target[..., None], -1).mean()

    def update(state: Any, text: Any, target: Any) -> Any:
        p, mean, square, n = state
        loss, g = jax.value_and_grad(loss_of)(p, text, target)
        total = jnp.sqrt(sum(jnp.vdot(x, x) for x in g.values()))
        factor, n = jnp.minimum(CLIP / (total + 1e-6), 1.0), n + 1

        def one(p: Any, g: Any, m: Any, v: Any) -> Any:
            m = beta1 * m + (1 - beta1) * factor * g
            v = beta2 * v + (1 - beta2) * jnp.square(factor * g)
            root = jnp.sqrt(v / (1 - beta2**n)) + eps
            return p * (1 - LR * decay) - LR / (1 - beta1**n) * m / root, m, v

        found = {name: one(p[name], g[name], mean[name], square[name]) for name in p}
        p, mean, square = ({name: x[i] for name, x in found.items()} for i in range(3))
        return (p, mean, square, n), loss

    p = {name: jnp.asarray(x) for name, x in parameters(sizes).items()}
    state = (p, *({n: jnp.zeros_like(x) for n, x in p.items()} for _ in range(2)), jnp.float32(0))
    compiled = jax.jit(update, donate_argnums=0)
    xs, ts = batches(sizes)
    count = 0

    def step() -> Any:
        nonlocal count, state
        i, count = count % len(xs), count + 1
        state, loss = compiled(state, xs[i], ts[i])
        return jax.block_until_ready(loss)

    return step


# -- taking turns ---------------------------------------------------------------------------------

#: Everybody, by name: the library that has to be installed, and what makes the contender.
CONTENDERS: dict[str, tuple[str, Callable[..., Step]]] = {
    "gpugrad": ("numpy", with_gpugrad),
    "gpugrad, TransformerEncoderLayer": ("numpy", with_layers),
    "torch, eager": ("torch", with_torch),
    "torch, fused optimiser": ("torch", partial(with_torch, fused=True)),
    "torch.compile": ("torch", partial(with_torch, compiled=True, fused=True)),
    "jax.jit": ("jax", with_jax),
}


def serve(name: str, quick: bool) -> None:
    """Be the contender `name`; the answer is the first four losses."""
    step = CONTENDERS[name][1](QUICK if quick else FULL)
    common.serve(step, lambda: [float(step()) for _ in range(4)])


def agree(answers: dict[str, list[float]]) -> None:
    """Raise unless everybody has the same losses."""
    for name, found in answers.items():
        worst = max(abs(a - b) for a, b in zip(answers["gpugrad"], found, strict=True))
        if not worst <= 1e-4:
            raise RuntimeError(f"{name} disagrees: {found}, {answers['gpugrad']}")


def measure(quick: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of everybody who is installed."""
    commands = {
        name: ["--serve", name, *(["--quick"] if quick else [])]
        for name, (library, _) in CONTENDERS.items()
        if importlib.util.find_spec(library) and not (quick and name == "torch.compile")
    }
    seconds, answers = common.alternate_processes(
        __file__, commands, rounds=rounds, threads=THREADS
    )
    agree(answers)
    return seconds


def report(quick: bool) -> dict[str, Any]:
    timed = measure(quick, rounds=2 if quick else 15)
    own = timed["gpugrad"]
    rows = [
        {"contender": name, **common.spread(s, 1e3), "over gpugrad": common.ratio(s, own)["median"]}
        for name, s in timed.items()
    ]
    peers = [name for name in timed if not name.startswith("gpugrad")]
    verdicts = []
    if peers:
        best = min(peers, key=lambda name: statistics.median(timed[name]))
        verdicts = [
            common.verdict(f"GPT step, {best} over {name}",
                           common.ratio(timed[best], timed[name])["median"], BEST, "x",
                           at_least=True)
            for name in timed if name.startswith("gpugrad")
        ]  # fmt: skip
    else:
        verdicts = [common.not_run("GPT step", "no peer is installed")]
    return {"benchmark": "gpt", "quick": quick, "threads": THREADS, **common.provenance(),
            "results": timed, "verdicts": verdicts, "table": common.table(rows)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny net: a check, no result")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, options.quick)
        return
    common.finish(report(options.quick), options.json)


if __name__ == "__main__":
    main()
