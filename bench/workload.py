"""What a benchmark declares: a workload, its sizes, and who can compute it.

A workload is made by one of two frames. :func:`kernel` differentiates a function once, forward and
backward; it is given the function in the words of each library. `gpugrad.bench.steps` has the
other, whole training steps. A workload that fits neither gives its makers itself.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

#: Threads of everybody, unless GPUGRAD_THREADS says otherwise: two, as in the published figures.
THREADS = int(os.environ.get("GPUGRAD_THREADS") or 2)

#: Elements of a result that contenders compare.
LOOKED_AT = 200


# -- who computes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """A library, in one of its variants, on a device.

    Attributes
    ----------
    key:
        What it is called on the command line and in results.
    label:
        What it is called in tables.
    library:
        What has to be importable.
    variant:
        For gpugrad the mode of :func:`gpugrad.use_kernels`, or "compiled" by
        :func:`gpugrad.compile`; for PyTorch "eager", "fused" (its fused optimiser) or "compiled"
        (that one as well).
    device:
        A device string of gpugrad.
    """

    key: str
    label: str
    library: str
    variant: str = ""
    device: str = "cpu"

    @property
    def own(self) -> bool:
        return self.library == "gpugrad"

    @property
    def on_host(self) -> bool:
        return self.device == "cpu"


_PEERS = {
    "torch": ("PyTorch", "torch", "eager"),
    "torch-fused": ("PyTorch, fused", "torch", "fused"),
    "torch-compile": ("PyTorch, compiled", "torch", "compiled"),
    "jax": ("jax.jit", "jax", ""),
}

#: Everybody, in the order of tables. The first of gpugrad's that takes part is the reference that
#: all others must agree with.
CONTENDERS: dict[str, Contender] = {
    c.key: c
    for c in (
        Contender("numpy", "NumPy generic", "gpugrad", "off"),
        Contender("numba", "NumPy + Numba", "gpugrad", "auto"),
        Contender("numba-compile", "NumPy + Numba, compiled", "gpugrad", "compiled"),
        Contender("cupy", "CuPy generic", "gpugrad", "off", "cuda:0"),
        Contender("cuda", "CuPy + Numba CUDA", "gpugrad", "auto", "cuda:0"),
        Contender("cuda-compile", "CuPy + Numba CUDA, compiled", "gpugrad", "compiled", "cuda:0"),
        *(Contender(key, *about) for key, about in _PEERS.items()),
        Contender("autograd", "HIPS autograd", "autograd"),
        Contender("mygrad", "MyGrad", "mygrad"),
        *(
            Contender(f"{key}-cuda", f"{label}, CUDA", library, variant, "cuda:0")
            for key, (label, library, variant) in _PEERS.items()
        ),
    )
}


# -- what is computed -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A workload, ready to run in one contender's process.

    Attributes
    ----------
    run:
        One pass. On a device it may end before the work there does.
    answer:
        Runs it a few times; arrays or numbers that everybody must agree on.
    forget:
        Drops what a pass leaves behind: gradients.
    """

    run: Callable[[], Any]
    answer: Callable[[], Sequence[Any]]
    forget: Callable[[], None] = lambda: None


#: A job of a size, for a contender.
Maker = Callable[[tuple[Any, ...], Contender], Job]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Something to be timed.

    Attributes
    ----------
    name, what:
        What it is called, and what it computes in one line.
    sizes:
        By label, from the smallest, which a quick run takes, to the largest, the one that tables
        show and that `least` is about.
    makers:
        By library.
    kind:
        "kernel" or "step".
    covers:
        The files of ops/ and kernels/ that it is there for, as ``"ops/losses"``.
    moved, flops:
        Elements of float32 that a pass reads and writes at least, and its operations, from a size.
    tolerance:
        How far results may differ, as a share of the largest element, or of one.
    least:
        How many times as fast as the best peer it must be; None where nothing is promised.
    memory:
        Which share of PyTorch's memory it may take, beyond its operands; None where that is not
        measured.
    without:
        Contenders that cannot take part, and why.
    variant:
        Whether it is much like another one: quick runs leave it out.
    compiles:
        Whether there is something in it for :func:`gpugrad.compile`.
    """

    name: str
    what: str
    sizes: Mapping[str, tuple[Any, ...]]
    makers: Mapping[str, Maker]
    kind: str = "kernel"
    covers: tuple[str, ...] = ()
    moved: Callable[..., float] | None = None
    flops: Callable[..., float] | None = None
    tolerance: float = 1e-4
    least: float | None = None
    memory: float | None = None
    without: Mapping[str, str] = field(default_factory=dict)
    variant: bool = False
    compiles: bool = False

    def refuses(self, who: Contender, label: str, quick: bool = False) -> str | None:
        """Why a contender does not take part in a size; None if it does."""
        if who.key in self.without:
            return self.without[who.key]
        if who.library not in self.makers:
            return "nobody has written it"
        if who.variant == "fused" and self.kind == "kernel":
            return "there is no optimiser in it"
        if who.own and who.variant == "compiled" and not self.compiles:
            return "there is nothing to compile in it"
        if who.variant == "compiled" and (quick or label != list(self.sizes)[-1]):
            return "compiled for the largest size of a full run only"
        return None

    def cost(self, label: str) -> dict[str, float]:
        """Bytes and operations of a pass at least, as far as declared."""
        size = self.sizes[label]
        found = {}
        if self.moved is not None:
            found["bytes"] = 4.0 * self.moved(*size)
        if self.flops is not None:
            found["flops"] = float(self.flops(*size))
        return found


#: The modules with workloads, in the order of tables.
FAMILIES = (
    "elementwise", "bias", "dropout", "softmax", "norm", "embedding", "arrays", "reductions",
    "linear", "convolution", "attention", "optimizer", "recurrent", "steps", "gpt",
)  # fmt: skip


def workloads_of(family: str) -> tuple[Workload, ...]:
    """The workloads that a module declares."""
    found: tuple[Workload, ...] = importlib.import_module(f"gpugrad.bench.{family}").WORKLOADS
    return found


@cache
def workloads() -> dict[str, Workload]:
    """Every workload by name."""
    return {w.name: w for family in FAMILIES for w in workloads_of(family)}


# -- the frame of kernels: forward, backward, every library alike ---------------------------------

#: Operands of a size from a generator: those that want a gradient, and the others.
Arrays = Callable[..., tuple[list[Any], list[Any]]]
#: A function of a library's namespace and the operands, giving an array or several.
Function = Callable[..., Any]


def kernel(
    name: str,
    what: str,
    *,
    sizes: Mapping[str, tuple[Any, ...]],
    arrays: Arrays,
    ours: Function,
    torch: Function | None = None,
    plain: Function | None = None,
    jax: Function | None = None,
    answer: Callable[[list[Any], list[Any]], Sequence[Any]] | None = None,
    **options: Any,
) -> Workload:
    """A function, forward and backward, with the gradients of its first operands.

    Parameters
    ----------
    arrays:
        ``arrays(random, *size)``: operands that want a gradient, and those that do not.
    ours, torch, plain, jax:
        The function: of `gpugrad`, of `torch`, of a namespace with NumPy's names (that of `jax`,
        `autograd` or `mygrad`), of `jax` where it has other words than `plain`.
    answer:
        What everybody must agree on, from all results and operands as NumPy arrays; without it,
        the results themselves: values and gradients.
    options:
        Further attributes of the :class:`Workload`.
    """
    functions: dict[str, tuple[_Frame, Function | None]] = {
        "gpugrad": (_with_gpugrad, ours),
        "torch": (_with_torch, torch),
        "jax": (_with_jax, jax or (None if plain is None else _on_jax_numpy(plain))),
        "autograd": (_with_autograd, plain),
        "mygrad": (_with_mygrad, plain),
    }

    def make(frame: _Frame, function: Function, size: tuple[Any, ...], who: Contender) -> Job:
        import numpy as np

        leaves, others = arrays(np.random.default_rng(0), *size)
        run, to_host, forget = frame(function, leaves, others, who)

        def compared() -> Sequence[Any]:
            found = [np.asarray(to_host(x)) for x in run()]
            return found if answer is None else answer(found, [*leaves, *others])

        return Job(run, compared, forget)

    makers = {
        library: partial(make, frame, function)
        for library, (frame, function) in functions.items()
        if function is not None
    }
    return Workload(name=name, what=what, sizes=sizes, makers=makers, **options)


#: A pass that gives values and gradients, what copies one of them to the host, and what drops them.
_Made = tuple[Callable[[], Sequence[Any]], Callable[[Any], Any], Callable[[], None]]
_Frame = Callable[[Function, list[Any], list[Any], Contender], _Made]


def cotangents(results: Sequence[Any]) -> list[Any]:
    """Gradients from above, the same for everybody."""
    import numpy as np

    random = np.random.default_rng(1)
    shapes = (tuple(y.shape) for y in results)
    return [np.asarray(random.standard_normal(s, dtype=np.float32)) for s in shapes]


def several(y: Any) -> tuple[Any, ...]:
    return tuple(y) if isinstance(y, tuple | list) else (y,)


def _with_gpugrad(f: Function, leaves: list[Any], others: list[Any], who: Contender) -> _Made:
    import gpugrad as gg

    moving = [gg.tensor(x, device=who.device, requires_grad=True) for x in leaves]
    fixed = [gg.tensor(x, device=who.device) for x in others]
    above: list[Any] = []

    def forget() -> None:
        for x in moving:
            x.grad = None

    def run() -> Sequence[Any]:
        forget()
        with gg.use_kernels(who.variant):
            ys = several(f(gg, *moving, *fixed))
            if not above:
                above.extend(gg.tensor(g, device=who.device) for g in cotangents(ys))
            for i, (y, g) in enumerate(zip(ys, above)):
                y.backward(g, retain_graph=i + 1 < len(ys))
        return *(y.detach() for y in ys), *(x.grad for x in moving)

    return run, lambda x: x.detach().numpy(), forget


def _with_torch(f: Function, leaves: list[Any], others: list[Any], who: Contender) -> _Made:
    import torch

    start_torch()
    place = torch.device(who.device)
    moving = [torch.tensor(x, device=place, requires_grad=True) for x in leaves]
    fixed = [torch.tensor(x, device=place) for x in others]
    above: list[Any] = []

    def forward(*operands: Any) -> Any:
        return f(torch, *operands)

    function = compiled(forward, who)

    def forget() -> None:
        for x in moving:
            x.grad = None

    def run() -> Sequence[Any]:
        forget()
        ys = several(function(*moving, *fixed))
        if not above:
            above.extend(torch.tensor(g, device=place) for g in cotangents(ys))
        torch.autograd.backward(ys, above)
        return *(y.detach() for y in ys), *(x.grad for x in moving)

    return run, lambda x: x.cpu().numpy(), forget


def start_torch() -> None:
    import torch

    torch.set_num_threads(THREADS)
    # What was compiled for another workload is forgotten: of one function it keeps eight versions,
    # and runs a ninth without compiling it.
    torch._dynamo.reset()


def compiled(function: Any, who: Contender) -> Any:
    """A function or net for PyTorch to run, compiled where the contender says so."""
    if who.variant != "compiled":
        return function
    import torch

    return torch.compile(function, mode="default" if who.on_host else "reduce-overhead")


def _on_jax_numpy(plain: Function) -> Function:
    def function(jax: Any, *operands: Any) -> Any:
        return plain(jax.numpy, *operands)

    return function


def _with_jax(f: Function, leaves: list[Any], others: list[Any], who: Contender) -> _Made:
    import jax

    moving, fixed = ([jax.numpy.asarray(x) for x in part] for part in (leaves, others))

    def both(moving: Any, fixed: Any, above: Any) -> Any:
        ys, back = jax.vjp(lambda *x: several(f(jax, *x, *fixed)), *moving)
        return *ys, *back(above)

    shapes = jax.eval_shape(lambda: several(f(jax, *moving, *fixed)))
    above = tuple(jax.numpy.asarray(g) for g in cotangents(shapes))
    function = jax.jit(both)

    def run() -> Sequence[Any]:
        found: Sequence[Any] = jax.block_until_ready(function(moving, fixed, above))
        return found

    return run, lambda x: x, lambda: None


def _with_autograd(f: Function, leaves: list[Any], others: list[Any], who: Contender) -> _Made:
    import autograd.numpy
    from autograd import make_vjp

    above: list[Any] = []

    def forward(moving: Any) -> Any:
        return f(autograd.numpy, *moving, *others)

    def run() -> Sequence[Any]:
        back, y = make_vjp(forward)(tuple(leaves))
        if not above:
            above.extend(cotangents([y]))
        return y, *back(above[0])

    return run, lambda x: x, lambda: None


def _with_mygrad(f: Function, leaves: list[Any], others: list[Any], who: Contender) -> _Made:
    mg = importlib.import_module("mygrad")
    moving = [mg.tensor(x) for x in leaves]
    above: list[Any] = []

    def forget() -> None:
        for x in moving:
            x.null_grad()

    def run() -> Sequence[Any]:
        forget()
        y = f(mg, *moving, *others)
        if not above:
            above.extend(cotangents([y]))
        y.backward(above[0])
        return y.data, *(x.grad for x in moving)

    return run, lambda x: x, forget


# -- sizes ----------------------------------------------------------------------------------------


def squares(*sides: int) -> dict[str, tuple[int, int]]:
    """Sizes of square matrices by their labels."""
    return {f"{n}×{n}": (n, n) for n in sides}


def normal(random: Any, *shapes: tuple[int, ...]) -> list[Any]:
    """Normal deviates in float32, one array for each shape."""
    import numpy as np

    return [random.standard_normal(shape, dtype=np.float32) for shape in shapes]


def product(*size: int) -> float:
    return float(math.prod(size))
