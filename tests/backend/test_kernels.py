"""The one choice between a kernel and the generic text, and what tells about it."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.backend.kernels import Choice, Kernel, Slot, fusible
from gpugrad.errors import KernelError, ParameterError


class Space:
    """A namespace with one slot; its kernel says that it ran."""

    def __init__(self, *kernels, at_least=10):
        self.slots = {"double": Slot("double", "nowhere", at_least, list(kernels))}


@fusible
def double(m, x, /, factor=2):
    return "generic", factor


def kernel(label="k", why=None):
    return Kernel(lambda m, x, factor=2: (label, factor), label, lambda m, x, factor=2: why)


SMALL, LARGE = np.zeros(9), np.zeros(10)


def test_order_of_choice():
    space = Space(kernel("first", "wrong dtype"), kernel("second"))
    assert double(space, LARGE) == ("second", 2)
    assert double(space, LARGE, factor=3) == ("second", 3)
    assert double(space, SMALL) == ("generic", 2)
    with gg.use_kernels("off"):
        assert double(space, LARGE) == ("generic", 2)
    with gg.use_kernels("require"):
        assert double(space, SMALL) == ("second", 2), "sizes do not matter when it is required"


def test_without_a_slot_there_is_no_choice():
    space = Space()
    space.slots = {}
    with gg.use_kernels("require"):
        assert double(space, LARGE) == ("generic", 2)


def test_refusal_falls_to_the_generic_text_and_is_an_error_when_required():
    space = Space(kernel("first", "wrong dtype"), kernel("second", "too thin"))
    assert double(space, LARGE) == ("generic", 2)
    with (
        gg.use_kernels("require"),
        pytest.raises(KernelError, match=r"double: .*first: wrong dtype; second: too thin"),
    ):
        double(space, LARGE)


def test_an_error_in_a_kernel_is_never_swallowed():
    def broken(m, x, factor=2):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        double(Space(Kernel(broken, "broken")), LARGE)


def test_an_added_kernel_is_asked_first():
    space = Space(kernel("first"))
    space.slots["double"].add(kernel("mine"))
    assert double(space, LARGE) == ("mine", 2)


def test_mode_belongs_to_the_thread():
    space = Space(kernel("first"))
    seen = []
    with gg.use_kernels("off"):
        thread = threading.Thread(target=lambda: seen.append(double(space, LARGE)))
        thread.start()
        thread.join()
        assert double(space, LARGE) == ("generic", 2)
    assert seen == [("first", 2)]


def test_modes_nest():
    assert gg.kernel_mode() == "auto"
    with gg.use_kernels("require"):
        with gg.use_kernels("off"):
            assert gg.kernel_mode() == "off"
        assert gg.kernel_mode() == "require"
    assert gg.kernel_mode() == "auto"


def test_unknown_mode():
    with pytest.raises(ParameterError, match="'on' is no mode; use off, auto, require"):
        gg.use_kernels("on")


@pytest.mark.parametrize("mode", ["off", "require"])
def test_environment_sets_the_first_mode(mode):
    code = "import gpugrad as gg; print(gg.kernel_mode())"
    env = {**os.environ, "GPUGRAD_KERNELS": mode}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == mode


def test_a_wrong_environment_is_named():
    env = {**os.environ, "GPUGRAD_KERNELS": "fast"}
    out = subprocess.run(
        [sys.executable, "-c", "import gpugrad"], env=env, capture_output=True, text=True
    )
    assert out.returncode
    assert "GPUGRAD_KERNELS is 'fast'" in out.stderr


# -- explain --------------------------------------------------------------------------------------


def test_explain_tells_forward_and_backward():
    x = gg.tensor(np.linspace(-1, 1, 1 << 14, dtype="float32"), requires_grad=True)

    def loss(x):
        gg.sum(gg.silu(x) * 2.0).backward()

    seen = {c.operation: c for c in gg.explain(loss)(x).choices}
    assert seen["silu"].implementation == "numba cpu"
    assert seen["silu_partial"].implementation == "numba cpu"
    assert seen["multiply"] == Choice("multiply", "generic", "numpy has no kernel for it")
    with gg.use_kernels("off"):
        seen = {c.operation: c for c in gg.explain(loss)(x).choices}
    assert seen["silu"] == Choice("silu", "generic", "kernels are switched off")


def test_explain_says_why_a_kernel_refused():
    x = gg.tensor(np.arange(1 << 14))
    (choice,) = gg.explain(gg.relu)(x).choices
    assert choice.implementation == "generic"
    assert choice.reason == "numba cpu: no kernel for int64"


def test_explain_leaves_nothing_behind():
    gg.explain(gg.relu)(gg.tensor([1.0]))
    made = gg.multiply.primitive
    gg.multiply(gg.tensor([1.0]), 2.0)
    before = made.implementations[np.ndarray]
    assert not hasattr(before, "__closure__") or "told" not in repr(before)
    assert gg.explain(gg.multiply)(gg.tensor([1.0]), 2.0).result.tolist() == [2.0]


def test_every_slot_of_numpy_has_its_kernels():
    for name, slot in backend_for_device("cpu").slots.items():
        assert slot.name == name
        assert slot.kernels, name
        assert all(isinstance(k, Kernel) for k in slot.kernels)


def test_small_operations_load_no_compiler():
    code = (
        "import sys, gpugrad as gg\n"
        "x = gg.tensor([1.0, -2.0], requires_grad=True)\n"
        "gg.sum(gg.relu(x)).backward()\n"
        "assert 'numba' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
