"""Products of matrices, layers made of them, and many small layers in one call."""

from __future__ import annotations

from typing import Any

from gpugrad.bench.bias import gelu
from gpugrad.bench.workload import Workload, kernel, normal, squares

#: Rows, inputs, outputs.
LAYERS = {"16×64×64": (16, 64, 64), "128×512×512": (128, 512, 512),
          "1024×512×2048": (1024, 512, 2048)}  # fmt: skip
#: Batch, heads, length, features.
HEADS = {"2×2×16×8": (2, 2, 16, 8), "4×4×64×32": (4, 4, 64, 32), "16×8×128×64": (16, 8, 128, 64)}
#: Layers, units, rows.
CHAINS = {"4 of 16, 8 rows": (4, 16, 8), "20 of 64, 64 rows": (20, 64, 64),
          "100 of 64, 64 rows": (100, 64, 64)}  # fmt: skip
LARGE_CHAINS = {"2 of 256, 64 rows": (2, 256, 64), "4 of 512, 128 rows": (4, 512, 128)}


def layer(random: Any, rows: int, inputs: int, outputs: int) -> tuple[list[Any], list[Any]]:
    x, w, b = normal(random, (rows, inputs), (outputs, inputs), (outputs,))
    return [x, w / inputs**0.5, b], []


def chain(random: Any, layers: int, units: int, rows: int) -> tuple[list[Any], list[Any]]:
    made = normal(random, (rows, units), *[(units, units), (units,)] * layers)
    return [x / units**0.5 if x.shape == (units, units) else x for x in made], []


def ours_chain(gg: Any, x: Any, *parameters: Any) -> Any:
    from gpugrad.ops.layers import layers

    return layers(x, *parameters, activation="tanh")


def plain_chain(np: Any, x: Any, *parameters: Any) -> Any:
    for w, b in zip(parameters[::2], parameters[1::2]):
        x = np.tanh(np.matmul(x, w.T) + b)
    return x


def torch_chain(torch: Any, x: Any, *parameters: Any) -> Any:
    for w, b in zip(parameters[::2], parameters[1::2]):
        x = torch.tanh(torch.nn.functional.linear(x, w, b))
    return x


WORKLOADS: tuple[Workload, ...] = (
    kernel(
        "matmul", "x @ y",
        sizes=squares(64, 256, 1024),
        arrays=lambda random, *n: (normal(random, n, n), []),
        ours=lambda gg, x, y: x @ y,
        torch=lambda torch, x, y: x @ y,
        plain=lambda np, x, y: np.matmul(x, y),
        covers=("ops/linalg", "kernels/cpu/products"),
        moved=lambda n, _: 8 * n**2, flops=lambda n, _: 6 * n**3,
    ),
    kernel(
        "linear + GELU", "GELU by tanh of x @ w.T + b, with the gradients of all three",
        sizes=LAYERS, arrays=layer,
        ours=lambda gg, x, w, b: gg.nn.functional.linear(x, w, b, activation="gelu_tanh"),
        torch=lambda torch, x, w, b: torch.nn.functional.gelu(
            torch.nn.functional.linear(x, w, b), approximate="tanh"),
        plain=lambda np, x, w, b: gelu(np, np.matmul(x, w.T) + b),
        covers=("ops/linalg", "kernels/cpu/linear", "kernels/cpu/weight_gradient",
                "kernels/cpu/direct"),
        moved=lambda n, i, o: 3 * (n * i + i * o + n * o), flops=lambda n, i, o: 6 * n * i * o,
        tolerance=1e-3,
    ),
    kernel(
        "einsum", "scores of heads: bhid,bhjd->bhij",
        sizes=HEADS,
        arrays=lambda random, *shape: (normal(random, shape, shape), []),
        ours=lambda gg, x, y: gg.einsum("bhid,bhjd->bhij", x, y),
        torch=lambda torch, x, y: torch.einsum("bhid,bhjd->bhij", x, y),
        plain=lambda np, x, y: np.einsum("bhid,bhjd->bhij", x, y),
        covers=("ops/contraction",),
        moved=lambda b, h, n, d: 2 * b * h * n * (3 * d + n),
        flops=lambda b, h, n, d: 6 * b * h * n * n * d,
        without={"autograd": "NumPy's einsum takes seconds", "mygrad":
                 "NumPy's einsum takes seconds"},
    ),
    kernel(
        "chain of layers", "tanh(x @ w.T + b), again and again",
        sizes=CHAINS, arrays=chain, ours=ours_chain, torch=torch_chain, plain=plain_chain,
        covers=("ops/layers", "kernels/cpu/layers"),
        moved=lambda layers, units, rows: 3 * layers * units * (units + rows),
        flops=lambda layers, units, rows: 6 * layers * units * units * rows,
        tolerance=2e-3,  # a hundred layers make differences grow
    ),
    kernel(
        "chain of large layers", "the same, each divided among the threads",
        sizes=LARGE_CHAINS, arrays=chain, ours=ours_chain, torch=torch_chain, plain=plain_chain,
        covers=("kernels/cpu/wide",),
        moved=lambda layers, units, rows: 3 * layers * units * (units + rows),
        flops=lambda layers, units, rows: 6 * layers * units * units * rows,
        tolerance=1e-3, variant=True,
    ),
)  # fmt: skip
