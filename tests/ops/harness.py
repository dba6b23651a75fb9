"""Checks that every declared operation has to pass, made from its own samples."""

from __future__ import annotations

import doctest
import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import gpugrad as gg
import gpugrad.nn
import gpugrad.ops
from gpugrad.backend import backend_for_device
from gpugrad.core.graph import Leaf, reachable
from gpugrad.core.primitive import Composite, Primitive, Sample, composites, registry
from gpugrad.core.tree import flatten
from gpugrad.errors import CompileError

DEVICES = ("cpu", "strict:device1")


# -- cases -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """Where an array stands in the arguments of a call."""

    index: int


@dataclass(frozen=True)
class Case:
    """One sample of one operation.

    ``template`` holds the arguments, with a :class:`Slot` in the place of every operand array, and
    ``arrays`` those operands on the host. ``moving`` are the numbers of the operands that have a
    derivative.
    """

    made: Primitive | Composite
    sample: Sample
    number: int
    template: tuple[Any, ...]
    arrays: tuple[np.ndarray, ...]
    moving: tuple[int, ...]

    def __str__(self) -> str:
        note = self.sample.note.replace(" ", "-") or self.number
        return f"{self.made.name}-{note}"

    @property
    def name(self) -> str:
        return self.made.name

    def call(self, operands: Any, device: str = "cpu") -> list[gg.Tensor]:
        """The results, as a flat list, with ``operands`` in place of the sample's arrays."""
        primitive = isinstance(self.made, Primitive)
        args = [_filled(a, operands, device, primitive) for a in self.template]
        kwargs = {k: _filled(v, operands, device, primitive) for k, v in self.sample.kwargs.items()}
        if device != "cpu" and not self.arrays and "device" in _parameters(self.made):
            kwargs["device"] = device
        return [gg.asarray(y) for y in flatten(self.made.function(*args, **kwargs))[0]]

    def expected(self, operands: Any) -> list[np.ndarray]:
        """What the reference gives for host arrays."""
        reference = self.made.reference
        if reference is None:
            native = getattr(self.made, "native", None)
            reference = getattr(np, native or self.name)
        args = [_filled(a, operands, None, True) for a in self.template]
        with np.errstate(all="ignore"):  # references are written for sense, not for warnings
            out = reference(*args, **self.sample.kwargs)
        return [np.asarray(y) for y in flatten(out)[0]]

    def tensors(self, device: str, dtype: Any = None, *, leaf: bool = False) -> list[gg.Tensor]:
        """The operands on ``device``; floating-point ones as ``dtype``, moving ones as leaves."""
        out = []
        for i, x in enumerate(self.arrays):
            floating = x.dtype.kind == "f"
            tensor = gg.tensor(x, dtype=dtype if floating else None, device=device)
            out.append(tensor.requires_grad_() if leaf and i in self.moving else tensor)
        return out


def _parameters(made: Primitive | Composite) -> Any:
    return inspect.signature(made.function).parameters


def _filled(template: Any, operands: Any, device: str | None, raw: bool) -> Any:
    """``template`` with the operands in their slots, and other arrays on ``device``."""
    if isinstance(template, Slot):
        return operands[template.index]
    if isinstance(template, np.ndarray) and device is not None:
        array = backend_for_device(device).asarray(template, device=device)
        return array if raw else gg.asarray(array)
    if isinstance(template, tuple | list):
        return type(template)(_filled(t, operands, device, raw) for t in template)
    return template


def _is_numbers(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_numbers(v) for v in value)
    return isinstance(value, int | float)


def _emptied(value: Any, arrays: list[np.ndarray]) -> Any:
    """``value`` with slots in place of arrays and of nested lists of numbers."""
    if isinstance(value, np.ndarray | np.generic) or (
        isinstance(value, list) and _is_numbers(value)
    ):
        arrays.append(np.asarray(value))
        return Slot(len(arrays) - 1)
    if isinstance(value, tuple | list):
        return type(value)(_emptied(v, arrays) for v in value)
    return value


def _samples(made: Primitive | Composite) -> list[Sample]:
    return list(made.samples() if callable(made.samples) else made.samples)


def case_of(made: Primitive | Composite, sample: Sample, number: int) -> Case:
    """A sample prepared for the checks."""
    arrays: list[np.ndarray] = []
    fixed: set[int] = set()
    template = []
    for position, value in enumerate(sample.args):
        if isinstance(made, Primitive) and not made.variadic and position >= len(made.operands):
            template.append(value)  # a parameter
            continue
        before = len(arrays)
        template.append(_emptied(value, arrays))
        if isinstance(made, Primitive) and made.rules is not None and made.rules[position] is None:
            fixed.update(range(before, len(arrays)))
    differentiable = not isinstance(made, Primitive) or made.differentiable
    moving = tuple(
        i for i, x in enumerate(arrays)
        if differentiable and x.dtype.kind == "f" and i not in fixed
    )  # fmt: skip
    return Case(made, sample, number, tuple(template), tuple(arrays), moving)


def cases(made: Primitive | Composite) -> list[Case]:
    """Every sample of one operation."""
    return [case_of(made, s, i) for i, s in enumerate(_samples(made))]


def operations() -> list[Primitive | Composite]:
    """Every primitive and every composite of the library itself, not those of other tests."""
    for package in (gpugrad.ops, gpugrad.nn):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
    found: list[Primitive | Composite] = [*registry.values(), *composites.values()]
    return [made for made in found if home(made).startswith("gpugrad.")]


def home(made: Primitive | Composite) -> str:
    """The module that declares an operation."""
    function = made.forward if isinstance(made, Primitive) else made.function
    return str(function.__module__)


def all_cases() -> Iterator[Case]:
    """Every sample of every operation."""
    return itertools.chain.from_iterable(cases(made) for made in operations())


# -- small helpers ---------------------------------------------------------------------------------


def host(x: gg.Tensor) -> np.ndarray:
    return x.backend.to_host(x.data)


def close(got: np.ndarray, want: np.ndarray, rtol: float, atol: float, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=what)


def scale_of(arrays: Any) -> float:
    """The size of the largest finite element, at least 1."""
    sizes = [np.abs(a[np.isfinite(a)]).max(initial=0.0) for a in arrays if a.dtype.kind == "f"]
    return max([1.0, *sizes])


def upstream(results: list[gg.Tensor], seed: int = 0) -> list[np.ndarray]:
    """A random gradient for every result."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(y.shape) for y in results]


def moved(case: Case, device: str, dtype: Any = None) -> tuple[Any, list[gg.Tensor]]:
    """The operation as a function of its moving operands alone, and those operands."""
    operands = case.tensors(device, dtype)

    def function(*values: Any) -> Any:
        full = list(operands)
        for i, value in zip(case.moving, values, strict=True):
            full[i] = value
        results = [y for y in case.call(full, device) if y.dtype.kind == "f"]
        return results[0] if len(results) == 1 else results

    function.__name__ = str(case)
    return function, [operands[i] for i in case.moving]


def backward(
    case: Case, device: str, dtype: Any = None, *, create_graph: bool = False
) -> tuple[list[gg.Tensor], list[gg.Tensor], list[Any]]:
    """Operands, results, and the gradients of the moving operands for a random upstream."""
    operands = case.tensors(device, dtype, leaf=True)
    results = case.call(operands, device)
    pull(results, create_graph=create_graph)
    return operands, results, [operands[i].grad for i in case.moving]


def pull(results: list[gg.Tensor], *, create_graph: bool = False) -> list[gg.Tensor]:
    """Run backward from every floating-point result and return the gradients it started from."""
    recorded = [y for y in results if y.requires_grad]
    seeds = [gg.tensor(u, dtype=y.dtype, device=y.device)
             for u, y in zip(upstream(recorded), recorded, strict=True)]  # fmt: skip
    for k, (y, u) in enumerate(zip(recorded, seeds, strict=True)):
        last = k == len(recorded) - 1
        y.backward(u, retain_graph=not last or create_graph, create_graph=create_graph)
    return seeds


# -- checks ----------------------------------------------------------------------------------------


def check_value(case: Case, device: str) -> None:
    """The value in float64 against the reference, to 1e-12."""
    want = case.expected(case.arrays)
    got = case.call(case.tensors(device), device)
    assert len(got) == len(want), f"{len(got)} results, the reference has {len(want)}"
    for y, w in zip(got, want, strict=True):
        assert y.dtype.kind == w.dtype.kind, f"dtype {y.dtype}, expected {w.dtype}"
        assert y.device == device or "device" in _parameters(case.made), f"result on {y.device}"
        close(host(y), w, 1e-12, 1e-12 * scale_of([w]), "value")


def check_float32(case: Case, device: str) -> None:
    """The value in float32 to 1e-5; the dtype stays."""
    if not any(x.dtype == np.float64 for x in case.arrays):
        return
    narrow = [x.astype(np.float32) if x.dtype == np.float64 else x for x in case.arrays]
    wide = [x.astype(np.float64) if x.dtype == np.float32 else x for x in narrow]
    want = case.expected(wide)
    got = case.call(case.tensors(device, "float32"), device)
    asked = any("float64" in str(v) for v in (*case.sample.args, *case.sample.kwargs.values()))
    for y, w in zip(got, want, strict=True):
        if y.dtype.kind == "f" and not asked:
            assert y.dtype == np.float32, f"float32 became {y.dtype}"
        close(host(y), w.astype(y.dtype), 1e-5, 1e-5 * scale_of([w]), "float32 value")


def check_derivatives(case: Case, device: str) -> None:
    """vjp, jvp and those of the gradient against central differences."""
    function, at = moved(case, device)
    eps = 1e-5 / scale_of(case.arrays)  # one step for samples of every size
    gg.check_grads(function, at, order=2, eps=eps, rtol=2e-6, atol=2e-8)


def check_recorded(case: Case, device: str) -> None:
    """The gradient is the same whether it is recorded or not."""
    plain = backward(case, device)[2]
    recorded = backward(case, device, create_graph=True)[2]
    for a, b in zip(plain, recorded, strict=True):
        if a is None or b is None:
            assert a is b, "a gradient exists in one of the two ways only"
            continue
        assert a.dtype == b.dtype
        close(host(b.detach()), host(a), 1e-13, 1e-13, "recorded gradient")


def check_adjoint(case: Case, device: str) -> None:
    """⟨u, Jv⟩ = ⟨Jᵀu, v⟩: forward and reverse mode are transposes of each other."""
    function, at = moved(case, device)
    rng = np.random.default_rng(1)
    vs = [gg.tensor(rng.standard_normal(x.shape), device=device) for x in at]
    ys, tangents = gg.jvp(function, at, vs)
    _, transposed = gg.vjp(function, *at)
    ys, tangents = flatten(ys)[0], flatten(tangents)[0]
    us = [gg.tensor(u, device=y.device) for u, y in zip(upstream(ys), ys, strict=True)]
    gradients = transposed(us[0] if len(us) == 1 else us)
    left = [host(u) * host(t) for u, t in zip(us, tangents, strict=True)]
    right = [host(g) * host(v) for g, v in zip(gradients, vs, strict=True)]
    size = sum(np.abs(p).sum() for p in (*left, *right))
    difference = sum(p.sum() for p in left) - sum(p.sum() for p in right)
    assert abs(difference) <= 1e-12 * max(1.0, size), f"⟨u, Jv⟩ - ⟨Jᵀu, v⟩ = {difference}"


def check_gradient_dtype(case: Case, device: str) -> None:
    """Gradients of float32 operands are float32, and of their operand's shape and device."""
    operands, _, gradients = backward(case, device, "float32")
    for i, g in zip(case.moving, gradients, strict=True):
        if g is not None:
            assert g.dtype == operands[i].dtype, f"gradient {g.dtype} of {operands[i].dtype}"
            assert g.shape == operands[i].shape
            assert g.device == operands[i].device


def check_inputs_unchanged(case: Case, device: str) -> None:
    """Neither forward nor backward writes to the operands, nor to the gradient from above."""
    operands = case.tensors(device, leaf=True)
    before = [host(x.detach()).tobytes() for x in operands]
    results = case.call(operands, device)
    values = [host(y.detach()).tobytes() for y in results]
    assert [host(x.detach()).tobytes() for x in operands] == before, "forward changed an operand"
    seeds = pull(results)
    rows = [host(u).tobytes() for u in seeds]
    assert rows == [host(gg.tensor(u, dtype=s.dtype)).tobytes()
                    for u, s in zip(upstream(seeds), seeds, strict=True)], \
        "backward changed the gradient from above"  # fmt: skip
    assert [host(x.detach()).tobytes() for x in operands] == before, "backward changed an operand"
    assert [host(y.detach()).tobytes() for y in results] == values, "backward changed a result"


def check_memory(case: Case, device: str = "cpu") -> None:
    """Results share memory with operands in views only, gradients with nothing."""
    operands = case.tensors(device, leaf=True)
    results = case.call(operands, device)
    for y in results:
        if any(np.shares_memory(y.data, x.data) for x in operands):
            assert _only_views(case, y), "the result shares memory with an operand"
    seeds = pull(results)
    gradients = [g for i in case.moving if (g := operands[i].grad) is not None]
    others = [*operands, *results, *seeds]
    for k, g in enumerate(gradients):
        for other in [*others, *gradients[:k]]:
            assert not np.shares_memory(g.data, other.data), "a gradient shares memory"


def _only_views(case: Case, y: gg.Tensor) -> bool:
    """Whether ``y`` was made by operations that are declared as views."""
    if isinstance(case.made, Primitive):
        return case.made.view
    if y._node is None:
        return not case.moving  # nothing was recorded that could tell
    nodes = [n for n in reachable([y._node]) if not isinstance(n, Leaf)]
    return all(n.primitive.view for n in nodes)


def check_compiled(case: Case, device: str) -> None:
    """A program has the values and gradients of the operation, bit for bit."""
    compiled = gg.compile(lambda *operands: case.call(operands, device))
    if getattr(case.made, "sized_by_values", False) is True or case.sample.note == "a mask":
        with pytest.raises(CompileError, match="fixed shapes"):
            compiled(*case.tensors(device))
        return
    for step in range(4):  # the first two are watched
        arrays = [
            # Other values for a program that would keep the old ones.
            x * (1 + step / 1024) if i in case.moving and case.sample.smooth else x
            for i, x in enumerate(case.arrays)
        ]
        found = []
        for function in (compiled, lambda *operands: case.call(operands, device)):
            operands = [gg.tensor(x, device=device) for x in arrays]
            for i in case.moving:
                if operands[i].dtype.kind == "f":
                    operands[i].requires_grad_()
            results = function(*operands)
            for y in results:
                if y.requires_grad:
                    g = np.cos(np.arange(y.size)).reshape(y.shape)
                    y.backward(gg.tensor(g, dtype=y.dtype, device=y.device), retain_graph=True)
            found.append([*(y.detach() for y in results), *(x.grad for x in operands)])
        for a, b in zip(*found, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
                equal_nan = a.dtype.kind in "fc"
                assert np.array_equal(a.cpu().numpy(), b.cpu().numpy(), equal_nan=equal_nan)
    assert compiled.text.startswith("def forward(")


def check_layouts(case: Case) -> None:
    """Operands that are strided, transposed, reversed or read-only: same value, same gradients."""
    _, results, gradients = backward(case, "cpu")
    for name, layout in LAYOUTS.items():
        operands = [gg.asarray(layout(x)) for x in case.arrays]
        for i in case.moving:
            operands[i].requires_grad_()
        again = case.call(operands)
        for a, b in zip(results, again, strict=True):
            close(host(b.detach()), host(a.detach()), 1e-13, 1e-13, f"{name} value")
        pull(again)
        for g, i in zip(gradients, case.moving, strict=True):
            h = operands[i].grad
            assert (g is None) == (h is None)
            if g is not None:
                close(host(h), host(g), 1e-12, 1e-12, f"{name} gradient")


def _transposed(x: np.ndarray) -> np.ndarray:
    return np.array(x, order="F")


def _strided(x: np.ndarray) -> np.ndarray:
    wide = np.empty((*x.shape[:-1], 2 * x.shape[-1]) if x.ndim else (2,), x.dtype)
    view = wide[..., ::2] if x.ndim else wide[:1].reshape(())
    view[...] = x
    return view


def _reversed(x: np.ndarray) -> np.ndarray:
    every: Any = (..., *(slice(None, None, -1),) * x.ndim)  # the dots keep a 0-d array an array
    return x[every].copy()[every]


def _read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "transposed": _transposed,
    "strided": _strided,
    "reversed": _reversed,
    "read-only": _read_only,
}

#: Operand shapes that every element-wise operation takes.
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "0-d": ((), (), ()),
    "empty": ((0,), (0,), (0,)),
    "empty broadcast": ((0, 3), (1, 3), ()),
    "outer product": ((3, 1), (1, 4), (3, 4)),
    "0-d operand": ((), (3,), (3,)),
    "more axes": ((2, 1, 3), (3,), (2, 1)),
}


def check_shapes(case: Case, device: str) -> None:
    """Broadcasting: gradients are those of operands that were repeated by hand, summed again."""
    for name, shapes in SHAPES.items():
        if len(case.arrays) == 1 and name in ("0-d operand", "more axes", "outer product"):
            continue
        arrays = [np.resize(x, s) for x, s in zip(case.arrays, shapes, strict=False)]
        full = np.broadcast_shapes(*(x.shape for x in arrays))
        repeated = [np.broadcast_to(x, full).copy() for x in arrays]
        narrow, wide = (_with(case, values) for values in (arrays, repeated))
        operands, results, gradients = backward(narrow, device)
        _, expected, sums = backward(wide, device)
        assert results[0].shape == full, f"{name}: {results[0].shape}, expected {full}"
        for a, b in zip(results, expected, strict=True):
            close(host(a.detach()), host(b.detach()), 1e-13, 1e-13, f"{name} value")
        for i, g, s in zip(case.moving, gradients, sums, strict=True):
            want = _sum_to(host(s), arrays[i].shape)
            close(host(g), want, 1e-12, 1e-12, f"{name} gradient")
            assert g.dtype == operands[i].dtype


def check_python_numbers(case: Case, device: str) -> None:
    """A Python number in place of an operand: as an array of it, but weak in dtype."""
    for k in case.moving:
        number = float(case.arrays[k].flat[0])
        others = [i for i in case.moving if i != k]
        for dtype in ("float64", "float32"):
            operands = case.tensors(device, dtype, leaf=True)
            alike = case.tensors(device, dtype, leaf=True)
            operands[k] = number
            alike[k] = gg.tensor(number, dtype=dtype, device=device)
            results, expected = case.call(operands, device), case.call(alike, device)
            for y, w in zip(results, expected, strict=True):
                assert y.dtype == w.dtype, f"{dtype} with a Python number gave {y.dtype}"
                close(host(y.detach()), host(w.detach()), 1e-6, 1e-6, "value beside a number")
            pull(results)
            pull(expected)
            for i in others:
                got, want = operands[i].grad, alike[i].grad
                assert got.dtype == want.dtype
                close(host(got), host(want), 1e-6, 1e-6, "gradient beside a number")


def _with(case: Case, arrays: list[np.ndarray]) -> Case:
    return Case(case.made, case.sample, case.number, case.template, tuple(arrays), case.moving)


def _sum_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1)
    return x.sum(axis=axes, keepdims=True)


def check_mixed_dtypes(case: Case, device: str) -> None:
    """float32 beside float64 gives float64; every gradient has its operand's dtype."""
    for odd in case.moving:
        operands = case.tensors(device, leaf=True)
        operands[odd] = gg.tensor(
            case.arrays[odd], dtype="float32", device=device, requires_grad=True
        )
        results = case.call(operands, device)
        plain = case.call(case.tensors(device), device)
        for y, w in zip(results, plain, strict=True):
            assert y.dtype == w.dtype, f"float32 with float64 gave {y.dtype}"
            close(host(y.detach()), host(w), 1e-5, 1e-5 * scale_of([host(w)]), "mixed value")
        pull(results)
        for i in case.moving:
            assert operands[i].grad.dtype == operands[i].dtype


def check_documented(made: Primitive | Composite) -> None:
    """Samples, a first line that is a sentence, and an example that runs and is right."""
    doc = made.doc if isinstance(made, Primitive) else made.function.__doc__ or ""
    first = doc.strip().partition("\n\n")[0]
    assert first.endswith("."), f"{made.name}: the docstring starts with no sentence: {first!r}"
    assert ">>> " in doc, f"{made.name}: the docstring has no example"
    samples = _samples(made)
    assert samples, f"{made.name} has no samples"
    if isinstance(made, Primitive) and made.differentiable:
        assert any(s.smooth for s in samples), f"{made.name} has no smooth sample"
    parser = doctest.DocTestParser()
    test = parser.get_doctest(doc, {}, made.name, home(made), 0)
    report: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(verbose=False, optionflags=flags)
    outcome = runner.run(test, out=report.append)
    assert outcome.failed == 0, "".join(report)
