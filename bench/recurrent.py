"""A training step of a recurrent net, whose last state is classified."""

from __future__ import annotations

from functools import partial
from typing import Any

from gpugrad.bench.steps import Arrays, jax_linear, step
from gpugrad.bench.workload import Workload

#: Hidden units, features, steps, batch, classes.
SIZES = {"16 units, 5 steps": (16, 8, 5, 4, 3), "256 units, 64 steps": (256, 64, 64, 32, 10)}

#: Rows of weights for each unit, by layer.
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def net(
    kind: str, nn: Any, hidden: int, features: int, steps: int, batch: int, classes: int
) -> Any:
    class Net(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(nn, kind)(features, hidden)
            self.head = nn.Linear(hidden, classes)

        def forward(self, x: Any) -> Any:
            output, _ = self.layer(x)
            return self.head(output[-1])

    return Net()


def data(random: Any, *size: int) -> tuple[Any, Any]:
    _, features, steps, batch, classes = size
    x = random.standard_normal((steps, batch, features), dtype="float32")
    return x, random.integers(0, classes, batch)


def cell(kind: str, jax: Any, state: Any, p: Any, q: Any) -> Any:
    """The next state, from what the input and the last state give the gates."""
    jnp, sigmoid = jax.numpy, jax.nn.sigmoid
    if kind == "RNN":
        return (jnp.tanh(p + q),)
    if kind == "GRU":
        (r, z, n), (qr, qz, qn) = jnp.split(p, 3, -1), jnp.split(q, 3, -1)
        r, z = sigmoid(r + qr), sigmoid(z + qz)
        return ((1 - z) * jnp.tanh(n + r * qn) + z * state[0],)
    i, f, g, o = jnp.split(p + q, 4, -1)
    c = sigmoid(f) * state[1] + sigmoid(i) * jnp.tanh(g)
    return sigmoid(o) * jnp.tanh(c), c


def with_jax(kind: str, jax: Any, size: tuple[Any, ...], w: Arrays, x: Any) -> Any:
    p = x @ w["layer.weight_ih_l0"].T + w["layer.bias_ih_l0"]

    def walk(state: Any, pt: Any) -> Any:
        q = state[0] @ w["layer.weight_hh_l0"].T + w["layer.bias_hh_l0"]
        return cell(kind, jax, state, pt, q), None

    zeros = jax.numpy.zeros((x.shape[1], size[0]))
    state, _ = jax.lax.scan(walk, (zeros, zeros)[: 2 if kind == "LSTM" else 1], p)
    return jax_linear(w, "head", state[0])


def flops(kind: str, hidden: int, features: int, steps: int, batch: int, classes: int) -> float:
    return 6.0 * GATES[kind] * hidden * (hidden + features) * steps * batch


WORKLOADS: tuple[Workload, ...] = tuple(
    step(
        f"step of {'an' if kind != 'GRU' else 'a'} {kind}", "one layer and a classifier",
        sizes=SIZES, net=partial(net, kind), data=data, jax=partial(with_jax, kind),
        flops=partial(flops, kind), least=1.25,
        variant=kind != "LSTM",
        covers=("ops/recurrent", "kernels/cpu/recurrent", "kernels/cuda/recurrent"),
    )
    for kind in GATES
)  # fmt: skip
