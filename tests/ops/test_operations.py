"""Every operation of the library, through every check of the harness."""

from __future__ import annotations

from typing import Any

import pytest

from gpugrad.core.primitive import Primitive
from tests.ops import harness
from tests.ops.harness import DEVICES, Case

#: (operation, check) → why the check does not apply. Nothing else is left out.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("nextafter", "check_float32"): "the neighbour of a number depends on the dtype",
    ("swiglu", "check_python_numbers"): "an activation's operand is an array",
    ("geglu", "check_python_numbers"): "an activation's operand is an array",
    (
        "clamp",
        "check_python_numbers",
    ): "what is clipped is an array",
    ("clamp", "check_mixed_dtypes"): "the standard leaves the dtype of mixed bounds to the library",
}

OPERATIONS = harness.operations()
CASES = [case for made in OPERATIONS for case in harness.cases(made)]


def differentiable(case: Case) -> bool:
    """Whether a gradient is defined: by the declaration of a primitive, by the sample of others."""
    return bool(case.moving) and (isinstance(case.made, Primitive) or case.sample.smooth)


def elementwise(case: Case) -> bool:
    return isinstance(case.made, Primitive) and case.made.elementwise


def over(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=str)


def first_of_each(cases: list[Case]) -> list[Case]:
    """The first case of each operation that has no Python number or None among its operands."""
    found: dict[str, Case] = {}
    for case in cases:
        if all(isinstance(t, harness.Slot) for t in case.template[: len(case.made.operands)]):
            found.setdefault(case.name, case)
    return list(found.values())


def run(check: Any, case: Case, *args: Any) -> None:
    reason = EXCEPTIONS.get((case.name, check.__name__))
    if reason is not None:
        pytest.skip(reason)
    check(case, *args)


on_every_device = pytest.mark.parametrize("device", DEVICES)
DIFFERENTIABLE = [c for c in CASES if differentiable(c)]
SMOOTH = [c for c in DIFFERENTIABLE if c.sample.smooth]
ELEMENTWISE = first_of_each([c for c in CASES if elementwise(c)])


@pytest.mark.parametrize("made", OPERATIONS, ids=lambda made: made.name)
def test_documented(made: Any) -> None:
    harness.check_documented(made)


@on_every_device
@over(CASES)
def test_value(case: Case, device: str) -> None:
    run(harness.check_value, case, device)


@on_every_device
@over([c for c in CASES if c.arrays])
def test_float32(case: Case, device: str) -> None:
    run(harness.check_float32, case, device)


@on_every_device
@over(SMOOTH)
def test_derivatives(case: Case, device: str) -> None:
    run(harness.check_derivatives, case, device)


@on_every_device
@over(DIFFERENTIABLE)
def test_adjoint(case: Case, device: str) -> None:
    run(harness.check_adjoint, case, device)


@over(DIFFERENTIABLE)
def test_recorded_gradient(case: Case) -> None:
    run(harness.check_recorded, case, "cpu")


@on_every_device
@over(DIFFERENTIABLE)
def test_gradient_dtype(case: Case, device: str) -> None:
    run(harness.check_gradient_dtype, case, device)


@on_every_device
@over([c for c in CASES if c.arrays])
def test_inputs_unchanged(case: Case, device: str) -> None:
    run(harness.check_inputs_unchanged, case, device)


@over([c for c in CASES if c.arrays])
def test_memory(case: Case) -> None:
    run(harness.check_memory, case)


@on_every_device
@over(CASES)
def test_compiled(case: Case, device: str) -> None:
    run(harness.check_compiled, case, device)


@over([c for c in CASES if c.arrays])
def test_layouts(case: Case) -> None:
    run(harness.check_layouts, case)


@on_every_device
@over(ELEMENTWISE)
def test_shapes(case: Case, device: str) -> None:
    run(harness.check_shapes, case, device)


@on_every_device
@over([c for c in ELEMENTWISE if len(c.moving) > 1])
def test_mixed_dtypes(case: Case, device: str) -> None:
    run(harness.check_mixed_dtypes, case, device)


@on_every_device
@over([c for c in ELEMENTWISE if len(c.moving) > 1])
def test_python_numbers(case: Case, device: str) -> None:
    run(harness.check_python_numbers, case, device)


def test_every_elementwise_operation_meets_every_shape() -> None:
    names = {made.name for made in OPERATIONS if isinstance(made, Primitive) and made.elementwise}
    assert names == {case.name for case in ELEMENTWISE}


@pytest.mark.parametrize(("name", "check"), EXCEPTIONS)
def test_exceptions_are_needed(name: str, check: str) -> None:
    """An exception that no longer fails anywhere has to go."""
    failed = 0
    for case in (c for c in CASES if c.name == name and c.arrays):
        for device in DEVICES:
            try:
                getattr(harness, check)(case, device)
            except Exception:
                failed += 1
    assert failed
