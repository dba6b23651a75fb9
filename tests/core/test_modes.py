"""no_grad and enable_grad: nesting, threads, decorators, exceptions."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

import gpugrad as gg
from gpugrad.core.modes import gate
from gpugrad.errors import GraphError


def recorded() -> bool:
    x = gg.tensor(1.0, requires_grad=True)
    return (x * x).requires_grad


def test_nesting_and_exceptions() -> None:
    assert recorded()
    with gg.no_grad():
        assert not recorded()
        with gg.enable_grad():
            assert recorded()
            with pytest.raises(ValueError), gg.no_grad():
                raise ValueError
            assert recorded()
        assert not recorded()
    assert recorded() and not gate


def test_one_setting_per_thread() -> None:
    inside, checked = threading.Event(), threading.Event()
    other: list[bool] = []

    def run() -> None:
        inside.wait(5)
        other.append(recorded())
        checked.set()

    thread = threading.Thread(target=run)
    thread.start()
    with gg.no_grad():
        inside.set()
        checked.wait(5)
        assert not recorded()
    thread.join()
    assert other == [True]


def test_decorator_and_one_object_used_twice() -> None:
    @gg.no_grad()
    def evaluate() -> bool:
        return recorded()

    assert not evaluate() and recorded()
    mode = gg.no_grad()
    with mode, mode:
        assert not recorded()
    assert recorded()


def test_a_generator_cannot_be_decorated() -> None:
    with pytest.raises(GraphError, match=r"no_grad: steps .*with block"):

        @gg.no_grad()
        def steps() -> Iterator[bool]:
            yield recorded()


def test_set_grad_enabled_as_a_call_a_block_and_a_decorator() -> None:
    gg.set_grad_enabled(False)
    try:
        assert not recorded()
        gg.set_grad_enabled(False)
        with gg.set_grad_enabled(True):
            assert recorded()
        assert not recorded()
    finally:
        gg.set_grad_enabled(True)
    assert recorded() and not gate
    decorated = gg.set_grad_enabled(False)(recorded)
    assert recorded() and not decorated() and recorded() and not gate
