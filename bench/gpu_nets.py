"""Nets and their training step, in words that gpugrad and PyTorch share.

What is given as `library` is `gpugrad` or `torch`; nothing else differs but how an array comes to
the device. A step is forward, loss, backward, clipping by the global norm, AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BATCHES, CLIP, LR = 4, 1.0, 1e-3

Sizes = dict[str, int]
#: One step, giving the loss as an array of the device.
Step = Callable[[], Any]


@dataclass(frozen=True)
class Workload:
    """A net, its data, and two sizes: as measured, and as small as it makes sense."""

    net: Callable[[Any, Sizes], Any]
    data: Callable[[Any, Sizes], tuple[Any, Any]]
    full: Sizes
    small: Sizes


def mlp(library: Any, s: Sizes) -> Any:
    nn, width = library.nn, s["width"]
    return nn.Sequential(
        nn.Linear(s["features"], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, s["classes"]),
    )  # fmt: skip


def deep(library: Any, s: Sizes) -> Any:
    nn, width = library.nn, s["width"]
    layers = [one for _ in range(s["layers"]) for one in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, s["classes"]))


def rows(random: Any, s: Sizes) -> tuple[Any, Any]:
    features = s.get("features", s["width"])
    x = random.standard_normal((s["batch"], features), dtype="float32")
    return x, random.integers(0, s["classes"], s["batch"])


def cnn(library: Any, s: Sizes) -> Any:
    nn, width = library.nn, s["width"]
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 2 * width, 3), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2 * width * (s["side"] // 2 - 2) ** 2, 128),
        nn.ReLU(), nn.Linear(128, s["classes"]),
    )  # fmt: skip


def images(random: Any, s: Sizes) -> tuple[Any, Any]:
    x = random.standard_normal((s["batch"], 1, s["side"], s["side"]), dtype="float32")
    return x, random.integers(0, s["classes"], s["batch"])


def lstm(library: Any, s: Sizes) -> Any:
    nn = library.nn

    class Net(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(s["features"], s["width"])
            self.head = nn.Linear(s["width"], s["classes"])

        def forward(self, x: Any) -> Any:
            output, _ = self.layer(x)
            return self.head(output[-1])

    return Net()


def sequences(random: Any, s: Sizes) -> tuple[Any, Any]:
    x = random.standard_normal((s["length"], s["batch"], s["features"]), dtype="float32")
    return x, random.integers(0, s["classes"], s["batch"])


def gpt(library: Any, s: Sizes) -> Any:
    nn, width, heads = library.nn, s["width"], s["heads"]
    moveaxis, attention = library.moveaxis, nn.functional.scaled_dot_product_attention

    class Block(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.gelu = nn.GELU(approximate="tanh")

        def attend(self, x: Any) -> Any:
            b, t, c = x.shape
            qkv = moveaxis(self.qkv(x).reshape((b, t, 3, heads, c // heads)), 2, 0)
            q, k, v = (moveaxis(qkv[i], 2, 1) for i in range(3))
            y = attention(q, k, v, is_causal=True)
            return self.out(moveaxis(y, 1, 2).reshape((b, t, c)))

        def forward(self, x: Any) -> Any:
            x = x + self.attend(self.norm1(x))
            return x + self.down(self.gelu(self.up(self.norm2(x))))

    class Net(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(s["classes"], width)
            self.places = nn.Embedding(s["length"], width)
            self.blocks = nn.Sequential(*(Block() for _ in range(s["layers"])))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, s["classes"])

        def forward(self, text: Any) -> Any:
            return self.head(self.norm(self.blocks(self.words(text) + self.places.weight)))

    return Net()


def text(random: Any, s: Sizes) -> tuple[Any, Any]:
    found = random.integers(0, 3, (s["batch"], s["length"] + 1)).cumsum(axis=-1) % s["classes"]
    return found[:, :-1].copy(), found[:, 1:].copy()


def _sizes(**sizes: int) -> Sizes:
    return {"classes": 10, **sizes}


WORKLOADS = {
    "mlp": Workload(
        mlp, rows, _sizes(batch=128, features=784, width=512),
        _sizes(batch=8, features=16, width=12),
    ),
    "deep": Workload(
        deep, rows, _sizes(batch=64, width=64, layers=100), _sizes(batch=8, width=8, layers=6)
    ),
    "cnn": Workload(
        cnn, images, _sizes(batch=64, side=28, width=32), _sizes(batch=4, side=12, width=4)
    ),
    "lstm": Workload(
        lstm, sequences, _sizes(batch=32, length=64, features=64, width=256),
        _sizes(batch=4, length=3, features=6, width=8),
    ),
    "gpt": Workload(
        gpt, text, _sizes(batch=16, length=256, width=384, heads=6, layers=6, classes=96),
        _sizes(batch=2, length=8, width=16, heads=2, layers=2, classes=12),
    ),
}  # fmt: skip


def initial(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Parameters for everybody: normal, with a variance of 1 / fan-in for what has one."""
    import numpy as np

    random = np.random.default_rng(7)
    made = {}
    for name in sorted(shapes):
        shape = shapes[name]
        x = random.standard_normal(shape, dtype=np.float32)
        if len(shape) < 2:
            made[name] = np.float32(0.01) * x + np.float32("norm" in name and "weight" in name)
        else:
            made[name] = x / np.float32(math.sqrt(math.prod(shape[1:])))
    return made


def batches(work: Workload, sizes: Sizes) -> list[tuple[Any, Any]]:
    import numpy as np

    random = np.random.default_rng(11)
    return [work.data(random, sizes) for _ in range(BATCHES)]


def with_gpugrad(work: Workload, sizes: Sizes, device: str, compiled: bool = False) -> Step:
    """A step of gpugrad; nothing in it reads from the device."""
    import gpugrad as gg

    net = work.net(gg, sizes)
    state = initial({name: tuple(p.shape) for name, p in net.named_parameters()})
    net.load_state_dict(state)
    net = net.to(device)
    optimizer = gg.optim.AdamW(net.parameters(), lr=LR)
    data = [(gg.tensor(x, device=device), gg.tensor(t, device=device))
            for x, t in batches(work, sizes)]  # fmt: skip
    number = 0

    def loss_of(x: Any, target: Any) -> Any:
        y = net(x)
        return gg.nn.functional.cross_entropy(y.reshape((-1, y.shape[-1])), target.reshape((-1,)))

    run = gg.compile(loss_of) if compiled else loss_of

    def step() -> Any:
        nonlocal number
        x, target = data[number % BATCHES]
        number += 1
        optimizer.zero_grad()
        loss = run(x, target)
        loss.backward()
        optimizer.step(clip=CLIP)
        return loss.detach()

    return step


def with_torch(work: Workload, sizes: Sizes, device: str, compiled: str = "") -> Step:
    """A step of PyTorch with its fused AdamW; `compiled` is a mode of torch.compile."""
    import torch

    net = work.net(torch, sizes)
    state = initial({name: tuple(p.shape) for name, p in net.named_parameters()})
    net.load_state_dict({k: torch.from_numpy(x) for k, x in state.items()})
    net = net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, fused=True)
    data = [(torch.from_numpy(x).to(device), torch.from_numpy(t).to(device))
            for x, t in batches(work, sizes)]  # fmt: skip
    run = torch.compile(net, mode=compiled) if compiled else net
    number = 0

    def step() -> Any:
        nonlocal number
        x, target = data[number % BATCHES]
        number += 1
        optimizer.zero_grad()
        y = run(x)
        loss = torch.nn.functional.cross_entropy(y.reshape(-1, y.shape[-1]), target.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        return loss.detach()

    return step
