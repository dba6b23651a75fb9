"""Every operation on a device against the NumPy backend: value, gradient, second derivative.

Both sides run the same samples in float64, so they differ by rounding only. Values and gradients
are compared in float32 as well, where a device usually has kernels of its own.
"""

from __future__ import annotations

import inspect
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

import gpugrad as gg
from gpugrad.core.primitive import composites, registry

#: Relative to the largest element. float64: sums in another order and the last digits of a device's
#: exp or matrix product; float32: the same, nine digits earlier.
TOLERANCE = {"float64": 1e-9, "float32": 2e-4}

#: Differentiated twice when one is asked for the derivative of the derivative.
CHECKS = ("value", "vjp", "second")


class Differs(Exception):
    """The device computed something else."""


def names() -> list[str]:
    """Every operation that gpugrad declares, primitives first."""
    import gpugrad.nn  # noqa: F401 - declares operations of its own

    primitives = [n for n, made in registry.items() if ours(made.forward)]
    others = [n for n, made in composites.items() if n not in registry and ours(made.function)]
    return sorted(primitives) + sorted(others)


def ours(function: Callable[..., Any]) -> bool:
    return function.__module__.startswith("gpugrad.")


def samples_of(name: str) -> list[Any]:
    declared = (registry.get(name) or composites[name]).samples
    return list(declared() if callable(declared) else declared)


def function_of(name: str) -> Callable[..., Any]:
    return (registry.get(name) or composites[name]).function


def compare(name: str, device: str, reference: str = "cpu") -> dict[str, Any]:
    """One operation: for each check "pass", "fail: why" or "none: why"."""
    start = time.perf_counter()
    row: dict[str, Any] = {"name": name, **dict.fromkeys(CHECKS, "none: no samples")}
    try:
        found = samples_of(name)
    except Exception as error:
        return row | {"value": f"fail: samples: {type(error).__name__}: {error}"[:300]}
    row["samples"] = len(found)
    for number, sample in enumerate(found):
        for dtype in ("float64", "float32"):
            outcome = try_sample(name, sample, dtype, device, reference)
            for check in CHECKS:
                if check in outcome and not row[check].startswith("fail"):
                    text = outcome[check]
                    if text.startswith("fail"):
                        text = f"fail: sample {number} {dtype}: {text.removeprefix('fail: ')}"
                    if not (row[check] == "pass" and text.startswith("none")):
                        row[check] = text[:300]
    row["seconds"] = round(time.perf_counter() - start, 3)
    return row


def try_sample(name: str, sample: Any, dtype: str, device: str, reference: str) -> dict[str, str]:
    """The checks of one sample in one dtype. An error is fine when both sides raise it."""
    sides = []
    for place in (reference, device):
        side: dict[str, Any] = {}
        try:
            run(name, sample, dtype, place, side)
        except Exception as error:
            side["error"] = error
        sides.append(side)
    expected, found = sides
    outcome = {}
    for check in CHECKS:
        if check == "second" and (dtype == "float32" or not sample.smooth):
            continue
        if check in expected and check in found:
            try:
                for e, f in zip(expected[check], found[check], strict=True):
                    same(e, f, dtype)
                outcome[check] = "pass" if expected[check] else "none: no derivative"
            except (Differs, ValueError) as error:
                outcome[check] = f"fail: {error}"
        elif check in expected:
            outcome[check] = f"fail: {explain(found.get('error'))}"
        elif check in found:
            outcome[check] = f"fail: only the reference raises {explain(expected.get('error'))}"
        elif type(expected.get("error")) is type(found.get("error")):
            outcome[check] = f"none: both raise {explain(expected.get('error'))}"
        else:
            outcome[check] = f"fail: {explain(found.get('error'))}"
    if outcome["value"].startswith("none: both raise"):  # a sample is there to be computed
        outcome["value"] = outcome["value"].replace("none", "fail", 1)
    return outcome


def explain(error: BaseException | None) -> str:
    """An error and, since the cause often says more, what it came from."""
    if error is None:
        return "nothing"
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text[:250]


def run(name: str, sample: Any, dtype: str, device: str, out: dict[str, Any]) -> None:
    """Compute on one device; ``out`` fills up as far as it gets."""
    leaves: list[Any] = []
    function = function_of(name)
    made = registry.get(name)
    count = len(sample.args) if made is None or made.variadic else len(made.operands)
    raw = made is not None  # the parameters of a primitive are handed on as they are
    args = [place(x, dtype, device, leaves, raw and i >= count) for i, x in enumerate(sample.args)]
    kwargs = {k: place(x, dtype, device, leaves, raw) for k, x in sample.kwargs.items()}
    if not leaves and "device" in inspect.signature(function).parameters:
        kwargs.setdefault("device", device)
    results = [y for y in flat(function(*args, **kwargs)) if isinstance(y, gg.Tensor)]
    out["value"] = [host(y) for y in results]
    moving = [y for y in results if y.requires_grad]
    out["vjp"] = [host(g) for g in pull(moving, leaves, "first", record=False)]
    grads = pull(moving, leaves, "first", record=True)
    second = pull([g for g in grads if g.requires_grad], leaves, "second", record=True)
    out["second"] = [host(g) for g in (*grads, *second)] if second else []


def pull(results: list[Any], leaves: list[Any], label: str, *, record: bool) -> list[Any]:
    """Gradients of all leaves for fixed gradients from above; recorded, or on plain arrays."""
    for leaf in leaves:
        leaf.grad = None
    for i, y in enumerate(results):
        g = cotangent(y.shape, y.dtype, f"{label}{i}")
        y.backward(gg.tensor(g, device=y.device), retain_graph=True, create_graph=record)
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def cotangent(shape: tuple[int, ...], dtype: Any, label: str) -> Any:
    """A gradient from above: the same on every machine."""
    rng = np.random.default_rng(zlib.crc32(label.encode()))
    g = rng.standard_normal(shape)
    if np.dtype(dtype).kind == "c":
        g = g + 1j * rng.standard_normal(shape)
    return np.asarray(g).astype(dtype)


def place(x: Any, dtype: str, device: str, leaves: list[Any], raw: bool) -> Any:
    """An argument of a sample with its arrays on the device; operands of floats want a gradient."""
    if isinstance(x, tuple | list) and any(isinstance(v, np.ndarray | list) for v in x):
        return type(x)(place(v, dtype, device, leaves, raw) for v in x)
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.kind in "fc" and dtype == "float32":
        x = x.astype(np.float32 if x.dtype.kind == "f" else np.complex64)
    tensor = gg.tensor(x, device=device, requires_grad=x.dtype.kind == "f" and not raw)
    if tensor.requires_grad:
        leaves.append(tensor)
    return tensor.data if raw else tensor


def flat(x: Any) -> list[Any]:
    if isinstance(x, list | tuple):
        return [leaf for part in x for leaf in flat(part)]
    return [x]


def host(x: Any) -> Any:
    return x.detach().numpy()


def same(expected: Any, found: Any, dtype: str) -> None:
    """Raise Differs unless shape, dtype and elements agree."""
    if expected.shape != found.shape:
        raise Differs(f"shape {found.shape} for {expected.shape}")
    if expected.dtype != found.dtype:
        raise Differs(f"dtype {found.dtype} for {expected.dtype}")
    if expected.dtype.kind not in "fc":
        if not np.array_equal(expected, found):
            raise Differs(f"{int(np.sum(expected != found))} of {expected.size} elements differ")
        return
    if not np.array_equal(np.isfinite(expected), np.isfinite(found)):
        raise Differs("elements that are not finite stand elsewhere")
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], found[~finite], equal_nan=True):
        raise Differs("nan and infinity stand elsewhere")
    scale = max(1.0, float(np.max(np.abs(expected[finite]), initial=0.0)))
    gap = float(np.max(np.abs(expected[finite] - found[finite]), initial=0.0)) / scale
    tolerance = TOLERANCE["float32" if expected.dtype.itemsize <= 4 else dtype]
    if not gap <= tolerance:
        signs = np.allclose(np.abs(expected), np.abs(found), rtol=tolerance * 10, atol=tolerance)
        raise Differs(f"by {gap:.2g}{' (equal but for signs)' if signs else ''}")
