"""The harness itself: each kind of mistake in a declaration has to be caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from gpugrad.core.primitive import (
    Primitive,
    differentiable,
    elementwise,
    primitive,
    registry,
    sample,
)
from gpugrad.errors import GradientCheckError
from gpugrad.ops.samples import normal, positive
from tests.ops import harness


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Forget the operations that a test declares."""
    names, ours = set(registry), set(vars(differentiable))
    yield
    for name in set(registry) - names:
        del registry[name]
    for name in set(vars(differentiable)) - ours:
        delattr(differentiable, name)


def case(made: Any) -> harness.Case:
    return harness.cases(made.primitive)[0]


def declared(forward: Callable[..., Any], **rules: Any) -> harness.Case:
    """A case of ``forward(m, x, /)`` declared with ``rules``."""

    def wrong(m: Any, x: Any, /) -> Any:
        """Something.

        >>> 1
        1
        """
        return forward(m, x)

    options: dict[str, Any] = {
        "samples": lambda: [sample(positive((2, 3)))],
        "reference": lambda x: forward(np, x),
        **rules,
    }
    make = elementwise if "partials" in options else primitive
    return case(make(**options)(wrong))


def test_a_right_declaration_passes() -> None:
    good = declared(lambda m, x: x * x * x, partials=(lambda g, x: g * (3.0 * x * x),))
    for device in harness.DEVICES:
        harness.check_value(good, device)
        harness.check_float32(good, device)
        harness.check_derivatives(good, device)
        harness.check_adjoint(good, device)
        harness.check_gradient_dtype(good, device)
        harness.check_inputs_unchanged(good, device)
        harness.check_shapes(good, device)
    harness.check_recorded(good, "cpu")
    harness.check_memory(good)
    harness.check_layouts(good)
    harness.check_documented(good.made)


@pytest.mark.parametrize("device", harness.DEVICES)
@pytest.mark.parametrize("factor", [-3.0, 2.0, 3.0001])
def test_wrong_derivative(factor: float, device: str) -> None:
    bad = declared(lambda m, x: x * x * x, partials=(lambda g, x: g * (factor * x * x),))
    with pytest.raises(GradientCheckError, match="reverse mode"):
        harness.check_derivatives(bad, device)


def test_derivative_wrong_in_one_element() -> None:
    def rule(g: Any, m: Any, x: Any) -> Any:
        return m.where(x == x[0, 0], 0.0, g)

    bad = declared(lambda m, x: x + 0.0, partials=(rule,))
    with pytest.raises(GradientCheckError):
        harness.check_derivatives(bad, "cpu")


def test_second_derivative_lost() -> None:
    """A rule that is right in value but cuts the graph of its operand."""

    def rule(g: Any, x: Any) -> Any:
        return g * (2.0 * (x.detach() if hasattr(x, "detach") else x))

    bad = declared(lambda m, x: x * x, partials=(rule,))
    with pytest.raises(GradientCheckError, match="gradient of"):
        harness.check_derivatives(bad, "cpu")


def test_recorded_gradient_differs() -> None:
    def rule(g: Any, x: Any) -> Any:
        return g * (2.0 * x) if hasattr(x, "detach") else g * x

    bad = declared(lambda m, x: x * x, partials=(rule,))
    with pytest.raises(AssertionError, match="recorded gradient"):
        harness.check_recorded(bad, "cpu")


def test_wrong_jvp() -> None:
    bad = declared(
        lambda m, x: x * x,
        vjps=(lambda g, x: g * (2.0 * x),),
        jvps=(lambda t, x: t * x,),
    )
    with pytest.raises(AssertionError, match="Jv"):
        harness.check_adjoint(bad, "cpu")
    with pytest.raises(GradientCheckError, match="forward mode"):
        harness.check_derivatives(bad, "cpu")


def test_wrong_value() -> None:
    bad = declared(
        lambda m, x: x * 2.0, partials=(lambda g: g * 2.0,), reference=lambda x: x * 2.0000001
    )
    for device in harness.DEVICES:
        with pytest.raises(AssertionError, match="value"):
            harness.check_value(bad, device)


def test_value_that_leaves_float32() -> None:
    bad = declared(lambda m, x: x * np.float64(2.0), partials=(lambda g: g * 2.0,))
    with pytest.raises(AssertionError, match="float32 became float64"):
        harness.check_float32(bad, "cpu")


def test_gradient_that_leaves_float32() -> None:
    bad = declared(
        lambda m, x: x * 2.0, vjps=(lambda g: g * np.full(g.shape, 2.0),), broadcasts=False
    )
    with pytest.raises(AssertionError, match="gradient float64 of float32"):
        harness.check_gradient_dtype(bad, "cpu")


def test_host_leak() -> None:
    """NumPy's own function is no function of another library's arrays."""
    bad = declared(lambda m, x: np.exp(x), partials=(lambda g, y: g * y,))
    harness.check_value(bad, "cpu")
    with pytest.raises((TypeError, RuntimeError)):
        harness.check_value(bad, "strict:device1")


def test_forward_that_writes_to_its_operand() -> None:
    def forward(m: Any, x: Any) -> Any:
        x *= 2.0
        return x + 0.0

    bad = declared(forward, partials=(lambda g: g * 2.0,))
    with pytest.raises(AssertionError, match="forward changed an operand"):
        harness.check_inputs_unchanged(bad, "cpu")


def test_rule_that_writes_to_what_it_saved() -> None:
    def rule(g: Any, x: Any) -> Any:
        x *= 2.0
        return g * x

    bad = declared(lambda m, x: x * x, partials=(rule,))
    with pytest.raises(AssertionError, match="backward changed an operand"):
        harness.check_inputs_unchanged(bad, "cpu")


def test_rule_that_writes_to_the_gradient_from_above() -> None:
    def rule(g: Any) -> Any:
        g *= 2.0
        return g

    bad = declared(lambda m, x: x * 2.0, partials=(rule,))
    with pytest.raises(AssertionError, match="gradient from above"):
        harness.check_inputs_unchanged(bad, "cpu")


def test_result_that_is_a_view_in_secret() -> None:
    bad = declared(lambda m, x: x[...], partials=(lambda g: g * 1.0,))
    with pytest.raises(AssertionError, match="shares memory"):
        harness.check_memory(bad)


def test_layout_that_matters() -> None:
    def forward(m: Any, x: Any) -> Any:
        return x * (1.0 if x.flags.c_contiguous else 2.0)

    bad = declared(forward, partials=(lambda g: g,))
    with pytest.raises(AssertionError, match="transposed value"):
        harness.check_layouts(bad)


def test_broadcasting_undone_by_the_rule() -> None:
    """A rule that sums by itself is wrong as soon as nothing has to be summed."""

    @elementwise(
        partials=(lambda g, m: m.sum(g, axis=0, keepdims=True), lambda g: g),
        samples=lambda: [sample(normal((1, 3)), normal((2, 3), 1))],
        reference=np.add,
    )
    def wrong(m: Any, a: Any, b: Any, /) -> Any:
        """Something."""
        return a + b

    harness.check_derivatives(case(wrong), "cpu")  # this one sample hides it
    with pytest.raises((AssertionError, ValueError, IndexError)):
        harness.check_shapes(case(wrong), "cpu")


def test_undocumented() -> None:
    made: Primitive = declared(lambda m, x: x * 1.0, partials=(lambda g: g,)).made  # type: ignore[assignment]
    for doc, message in [
        ("", "no sentence"),
        ("No example.", "no example"),
        ("Wrong.\n\n>>> 1 + 1\n3\n", "Expected"),
    ]:
        made.doc = doc
        with pytest.raises(AssertionError, match=message):
            harness.check_documented(made)
    made.doc = "Right.\n\n>>> 1 + 1\n2\n"
    harness.check_documented(made)
    made.samples = ()
    with pytest.raises(AssertionError, match="no samples"):
        harness.check_documented(made)
    made.samples = [sample(1.0, smooth=False)]
    with pytest.raises(AssertionError, match="no smooth sample"):
        harness.check_documented(made)
