"""Random programs against PyTorch, and random nests of transforms against HIPS autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpugrad as gg

# -- programs of array operations -----------------------------------------------------------------


class Gpugrad:
    """gpugrad, and what the programs below need beyond its namespace."""

    tensor = staticmethod(gg.tensor)

    def __init__(self, hooks: bool = True) -> None:
        self.hooks = hooks

    def __getattr__(self, name: str) -> Any:
        return getattr(gg, name)

    def leaf(self, x: Any) -> Any:
        return gg.tensor(x, requires_grad=True)

    def change(self, x: Any, k: int, y: Any) -> Any:
        if k == 0:
            x += y
        elif k == 1:
            x *= y
        elif k == 2:
            x -= y
        else:
            x /= 1.0 + y * y
        return x

    def write(self, x: Any, index: Any, y: Any) -> Any:
        x[index] = y
        return x

    def host(self, x: Any) -> Any:
        return x.detach().numpy()


class Torch:
    """PyTorch under the same names. What gpugrad changes in place, it makes anew."""

    def __init__(self, hooks: bool = True) -> None:
        import torch

        self.torch = torch
        self.hooks = hooks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.torch, name)

    def leaf(self, x: Any) -> Any:
        return self.torch.tensor(x, requires_grad=True)

    def concat(self, xs: Any, axis: int) -> Any:
        return self.torch.cat(xs, axis)

    def stack(self, xs: Any, axis: int) -> Any:
        return self.torch.stack(xs, axis)

    def reduce(self, name: str, x: Any, axis: Any, keepdims: bool) -> Any:
        function = getattr(self.torch, {"max": "amax", "min": "amin"}.get(name, name))
        options = {"correction": 0} if name == "var" else {}
        return function(x, axis, keepdim=keepdims, **options)

    def permute_dims(self, x: Any, axes: Any) -> Any:
        return x.permute(axes)

    def flip(self, x: Any, axis: int) -> Any:
        return x.flip((axis,))

    def cumulative_sum(self, x: Any, axis: int) -> Any:
        return x.cumsum(axis)

    def softmax(self, x: Any, axis: int) -> Any:
        return x.softmax(axis)

    def change(self, x: Any, k: int, y: Any) -> Any:
        return [x + y, x * y, x - y, x / (1.0 + y * y)][k]

    def write(self, x: Any, index: Any, y: Any) -> Any:
        x = x.clone()
        x[index] = y
        return x

    def host(self, x: Any) -> Any:
        return x.detach().numpy()


def _fits(x: Any, y: Any) -> bool:
    """Whether ``y`` broadcasts to the shape of ``x``."""
    try:
        return np.broadcast_shapes(x, y) == tuple(x)
    except ValueError:
        return False


Step = Callable[[Any, list[Any]], Any]


class Program:
    """A random sequence of steps on a growing list of values, the same one in both libraries."""

    def __init__(self, seed: int, length: int = 14) -> None:
        self.rng = rng = np.random.default_rng(seed)
        shapes = [tuple(rng.integers(1, 4, size=rng.integers(4)).tolist()) for _ in range(3)]
        self.inputs = [np.asarray(rng.uniform(0.3, 1.4, s) * rng.choice([-1, 1])) for s in shapes]
        self.steps: list[Step] = []
        self.own: set[int] = set()  # values that may change in place: neither leaves nor views
        makers = [self.unary, self.binary, self.binary, self.scalar, self.reduce, self.shape,
                  self.index, self.matmul, self.join, self.constant, self.change, self.write,
                  self.hook]  # fmt: skip
        library = Gpugrad()
        values = [library.leaf(x) for x in self.inputs]
        while len(self.steps) < length:
            make = makers[int(rng.integers(len(makers)))]
            i, j = (int(k) for k in rng.integers(len(values), size=2))
            step = make(i, j, values[i], values[j])
            if step is not None:
                before = len(values)
                step(library, values)
                self.steps.append(step)
                if len(values) > before and make in (self.unary, self.binary, self.matmul):
                    self.own.add(before)
        self.weights = [np.asarray(rng.standard_normal(v.shape)) for v in values]
        self.probes = [np.asarray(rng.standard_normal(x.shape)) for x in self.inputs]

    def run(self, library: Any, inputs: list[Any]) -> Any:
        """The weighted sum of the squares of all values."""
        values = list(inputs)
        for step in self.steps:
            step(library, values)
        total = 0.0
        for value, weight in zip(values, self.weights):
            total = total + (value * value * library.tensor(weight)).sum()
        return total

    def one_of(self, *functions: Callable[..., Any]) -> Step:
        """A step that appends what one of ``functions`` makes of the values."""
        f = functions[int(self.rng.integers(len(functions)))]
        return lambda L, v: v.append(f(L, v))

    def unary(self, i: int, j: int, x: Any, y: Any) -> Step:
        return self.one_of(
            lambda L, v: L.tanh(v[i]),
            lambda L, v: L.sin(v[i]),
            lambda L, v: L.abs(v[i]) * 0.9,
            lambda L, v: L.sigmoid(v[i]),
            lambda L, v: L.exp(-v[i] * v[i]),
            lambda L, v: L.sqrt(v[i] * v[i] + 0.3),
        )

    def binary(self, i: int, j: int, x: Any, y: Any) -> Step | None:
        if not (_fits(x.shape, y.shape) or _fits(y.shape, x.shape)):
            return None
        return self.one_of(
            lambda L, v: v[i] + v[j],
            lambda L, v: v[i] - v[j],
            lambda L, v: L.sin(v[i] * v[j]),
            lambda L, v: v[i] / (1.5 + v[j] * v[j]),
            lambda L, v: L.maximum(v[i], v[j] * 0.7 + 0.013),
            lambda L, v: L.where(v[i] > v[j] + 0.017, v[i] * 0.5, v[j]),
            lambda L, v: L.where(v[j] > 0.1, v[i], v[i]),
            lambda L, v: L.hypot(v[i], v[j] + 2.5),
            lambda L, v: (v[i] * v[i] + 0.5) ** L.tanh(v[j]),
        )

    def scalar(self, i: int, j: int, x: Any, y: Any) -> Step:
        return self.one_of(
            lambda L, v: 2.0 - v[i],
            lambda L, v: 1 / (v[i] * v[i] + 1),
            lambda L, v: L.tanh(v[i] ** 3),
            lambda L, v: (v[i] * v[i] + 0.5) ** -0.5,
            lambda L, v: -v[i] * True,
            lambda L, v: L.sin(1.5 ** L.tanh(v[i])),
        )

    def reduce(self, i: int, j: int, x: Any, y: Any) -> Step | None:
        if not x.shape:
            return None
        name = str(self.rng.choice(["sum", "mean", "max", "min", "var", "logsumexp", "prod"]))
        axis: Any = int(self.rng.integers(-x.ndim, x.ndim))
        if name != "prod" and x.ndim > 1 and self.rng.random() < 0.3:
            axis = (0, -1)
        keepdims = bool(self.rng.random() < 0.5)

        def reduced(L: Any, v: list[Any]) -> Any:
            if isinstance(L, Torch):
                out = L.reduce(name, v[i], axis, keepdims)
            else:
                out = getattr(gg, name)(v[i], axis=axis, keepdims=keepdims)
            return out / (1.0 + out * out)

        return self.one_of(reduced)

    def shape(self, i: int, j: int, x: Any, y: Any) -> Step | None:
        if x.size > 40:
            return None
        axes = tuple(int(a) for a in self.rng.permutation(x.ndim))
        wide = (2, *x.shape)
        if not x.shape:
            return self.one_of(
                lambda L, v: L.reshape(v[i], (1, 1)), lambda L, v: L.broadcast_to(v[i], wide)
            )
        axis = axes[0]
        return self.one_of(
            lambda L, v: L.reshape(v[i], (-1,)),
            lambda L, v: L.permute_dims(v[i], axes),
            lambda L, v: L.broadcast_to(v[i], wide),
            lambda L, v: L.cumulative_sum(L.flip(v[i], axis=axis), axis=axis) * 0.5,
            lambda L, v: L.softmax(v[i], axis=axis),
        )

    def index(self, i: int, j: int, x: Any, y: Any) -> Step | None:
        if not x.shape or x.ndim > 4 or not x.size:
            return None
        n = x.shape[0]
        at = int(self.rng.integers(-n, n))
        rows = [int(r) for r in self.rng.integers(-n, n, size=3)]
        last = [int(r) for r in self.rng.integers(x.shape[-1], size=3)]
        mask = (np.arange(n) % 2 == 0).tolist()
        return self.one_of(
            lambda L, v: v[i][at],
            lambda L, v: v[i][..., None, : max(1, abs(at))],
            lambda L, v: v[i][rows],
            lambda L, v: v[i][v[i] > -5.0],
            lambda L, v: v[i][rows, ..., last] if x.ndim > 1 else v[i][rows],
            lambda L, v: v[i][L.tensor(mask)],
        )

    def matmul(self, i: int, j: int, x: Any, y: Any) -> Step | None:
        if x.ndim >= 2 and self.rng.random() < 0.5:
            return self.one_of(lambda L, v: L.tanh(v[i] @ v[i].mT))
        try:
            np.matmul(np.zeros(x.shape), np.zeros(y.shape))
        except ValueError:
            return None
        return self.one_of(lambda L, v: L.tanh(L.matmul(v[i], v[j])))

    def join(self, i: int, j: int, x: Any, y: Any) -> Step | None:
        if x.size + y.size > 60:
            return None
        if x.shape == y.shape and self.rng.random() < 0.5:
            axis = int(self.rng.integers(-x.ndim - 1, x.ndim + 1))
            return self.one_of(lambda L, v: L.stack([v[i], v[j], v[i]], axis=axis))
        if not x.shape or not y.shape or x.shape[1:] != y.shape[1:]:
            return None
        return self.one_of(lambda L, v: L.concat([v[i], v[j], v[i]], axis=0))

    def constant(self, i: int, j: int, x: Any, y: Any) -> Step:
        def unrecorded(L: Any, v: list[Any]) -> Any:
            with L.no_grad():
                return L.tanh(v[i])

        return self.one_of(unrecorded, lambda L, v: v[i].detach() * 0.5)

    def change(self, i: int, j: int, x: Any, y: Any) -> Step | None:
        if i not in self.own or not x.requires_grad or not _fits(x.shape, y.shape):
            return None
        k = int(self.rng.integers(4))

        def step(L: Any, v: list[Any]) -> None:
            v[i] = L.change(v[i], k, v[j])

        return step

    def write(self, i: int, j: int, x: Any, y: Any) -> Step | None:
        if i not in self.own or not x.shape or not x.requires_grad:
            return None
        at = int(self.rng.integers(x.shape[0]))
        index: Any = [at, slice(at, at + 1), [at]][int(self.rng.integers(3))]
        if not _fits(x.detach()[index].shape, y.shape):
            return None

        def step(L: Any, v: list[Any]) -> None:
            v[i] = L.write(v[i], index, v[j])

        return step

    def hook(self, i: int, j: int, x: Any, y: Any) -> Step | None:
        if not x.requires_grad or x.is_leaf:
            return None

        def step(L: Any, v: list[Any]) -> None:
            if L.hooks:
                v[i].register_hook(lambda g: g * 1.5)

        return step


def _derivatives(make: Callable[..., Any], program: Program) -> list[Any]:
    """The value, ``.grad`` after two backward passes, and the gradient of the squared gradient.

    Without hooks in the second order: what passes an inner node there depends on how a rule is
    written, only the sum of all ways is the same.
    """
    library = make()
    leaves = [library.leaf(x) for x in program.inputs]
    y = program.run(library, leaves)
    y.backward(retain_graph=True)
    y.backward()
    found = [y, *(x.grad for x in leaves)]
    for x in leaves:
        x.grad = None
    program.run(make(hooks=False), leaves).backward(create_graph=True)
    second = 0.0
    for x, probe in zip(leaves, program.probes):
        second = second + (x.grad * x.grad * library.tensor(probe)).sum()
        x.grad = None
    second.backward()
    return [library.host(x) for x in [*found, *(x.grad for x in leaves)]]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("seed", range(0, 80, 10))
def test_programs_against_pytorch(seed: int) -> None:
    for k in range(seed, seed + 10):
        program = Program(k)
        for ours, theirs in zip(_derivatives(Gpugrad, program), _derivatives(Torch, program)):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9, err_msg=f"program {k}")


@pytest.mark.parametrize("seed", range(0, 20, 10))
def test_programs_forward_and_backward_agree(seed: int) -> None:
    """⟨u, Jv⟩ by jvp is ⟨Jᵀu, v⟩ by vjp, and the Hessian is symmetric whichever way it is made."""
    for k in range(seed, seed + 10):
        program = Program(k)

        def f(*xs: Any, program: Program = program) -> Any:
            return program.run(Gpugrad(hooks=False), [x * 1.0 for x in xs])

        xs, vs = tuple(map(gg.tensor, program.inputs)), tuple(map(gg.tensor, program.probes))
        value, pull = gg.vjp(f, *xs)
        again, pushed = gg.jvp(f, xs, vs)
        assert value.item() == again.item()
        pulled = sum(float((g * v).sum()) for g, v in zip(pull(1.0), vs))
        assert pushed.item() == pytest.approx(pulled, rel=1e-9, abs=1e-9)
        twice = gg.jvp(lambda *xs: gg.jvp(f, xs, vs)[1], xs, vs)[1]  # noqa: B023
        mixed = sum(float((h * v).sum()) for h, v in zip(gg.hvp(f, xs, vs), vs))
        assert twice.item() == pytest.approx(mixed, rel=1e-7, abs=1e-8)


# -- nests of transforms --------------------------------------------------------------------------

#: First derivatives of a function of one number, and the second one, in every way there is.
FIRST = ("grad", "pulled", "pushed", "rows", "columns", "valued")
SECOND = ("hess", "along")


def _expression(rng: np.random.Generator, names: tuple[str, ...], depth: int) -> str:
    """Random source text of a number that depends on ``names``, with derivatives inside."""
    if depth == 0 or rng.random() < 0.15:
        return str(rng.choice([*names, *names, "0.7"]))

    def part(more: tuple[str, ...] = ()) -> str:
        return _expression(rng, names + more, depth - 1)

    kind = int(rng.integers(9))
    if kind < 2:
        return f"({part()} * {part()})"
    if kind == 2:
        return f"({part()} + {part()})"
    if kind == 3:
        return f"sin({part()})"
    if kind == 4:
        return f"stop({part()})"
    inner = f"v{len(names)}"
    name = str(rng.choice(FIRST if kind < 8 else SECOND))
    return f"{name}(lambda {inner}: {part((inner,))})({part()})"


def _in_gpugrad() -> dict[str, Any]:
    def stop(x: Any) -> Any:
        with gg.no_grad():
            return gg.asarray(x) * 1.0

    one = gg.tensor(1.0)
    return {
        "sin": gg.sin,
        "stop": stop,
        "grad": gg.grad,
        "valued": lambda f: lambda x: gg.value_and_grad(f)(x)[1],
        "pulled": lambda f: lambda x: gg.vjp(f, x)[1](1.0)[0],
        "pushed": lambda f: lambda x: gg.jvp(f, (x,), (one,))[1],
        "rows": gg.jacobian,
        "columns": lambda f: gg.jacobian(f, mode="forward"),
        "hess": gg.hessian,
        "along": lambda f: lambda x: gg.hvp(f, x, one),
    }


def _in_autograd() -> dict[str, Any]:
    from autograd import grad, numpy
    from autograd.tracer import getval, isbox

    def stop(x: Any) -> Any:
        while isbox(x):
            x = getval(x)
        return x

    return {
        "sin": numpy.sin,
        "stop": stop,
        **dict.fromkeys(FIRST, grad),
        **dict.fromkeys(SECOND, lambda f: grad(grad(f))),
    }


@pytest.mark.filterwarnings("ignore:Output seems independent of input")
@pytest.mark.parametrize("seed", range(8))
def test_nested_transforms_against_autograd(seed: int) -> None:
    pytest.importorskip("autograd", reason="compares nested transforms with HIPS autograd")
    rng = np.random.default_rng(seed)
    ours, theirs = _in_gpugrad(), _in_autograd()
    for _ in range(15):
        text = f"lambda v0: {_expression(rng, ('v0',), 5)}"
        f, g = eval(text, ours), eval(text, theirs)
        value, derivative = float(g(0.6)), float(theirs["grad"](g)(0.6))
        close = {"rel": 1e-9, "abs": 1e-9}
        assert float(f(gg.tensor(0.6))) == pytest.approx(value, **close), text
        for name in FIRST:
            got = float(ours[name](f)(gg.tensor(0.6)))
            assert got == pytest.approx(derivative, **close), f"{name} of {text}"
    assert gg.is_grad_enabled()
