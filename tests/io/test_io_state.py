"""Training state: packed into a checkpoint and unpacked, it is the same."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpugrad.io import CheckpointCorruptError, CheckpointError, load, pack, save, unpack


def same(a: Any, b: Any) -> bool:
    """Equal in value and in type, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return bool(list(a) == list(b)) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray | np.generic):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, float):
        return a.hex() == b.hex()
    return bool(a == b)


def test_training_state_through_a_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    state = {
        "model": {"0.weight": np.ones((2, 3), np.float32), "0.bias": np.zeros(2, np.float32)},
        "optimizer": {
            "state": [{"exp_avg": np.ones(3), "step": 4}, {"exp_avg": np.zeros(2), "step": 4}],
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "amsgrad": False, "clip": None}],
        },
        "epoch": 12,
        "best": math.inf,
        "scale": np.float32(0.1),
        "note": "naïve\n日本",
        "rng": rng.bit_generator.state,
        "legacy": {**np.random.RandomState(0).get_state(legacy=False)},
    }
    tensors, metadata = pack(state)
    assert {"model.0.weight", "optimizer.state.1.exp_avg", "legacy.state.key"} <= tensors.keys()
    save(tmp_path / "c", tensors, metadata)
    found = unpack(*load(tmp_path / "c"))
    assert same(found, state)
    again = np.random.default_rng()
    again.bit_generator.state = found["rng"]
    assert again.random() == rng.random()


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -1, 2**64, -(2**127), 10**300, "", "\ud800 \0 é", "$array"),
        *(0.0, -0.0, 0.1, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan),
        *([], {}, (), [[], [{}]], [(1,), [1]], ((),), {"": {"": None}}),
        *({"$array": "x"}, {"$tuple": [1]}, {"$": {"$dict": 1}}, {"$array": 1, "b": 2}, {"$x": ()}),
        *({"1": True, "0": 1}, [1, 1.0, True]),
        *({0: 1, -3: [2]}, {10**30: {}}, {"$ints": {"0": 1}}, {1: np.arange(2)}),
        *(np.array(3.0), np.float64(0.1), np.int8(-3), np.bool_(True), [np.zeros((0, 2))]),
    ],
    ids=repr,
)
def test_value_round_trip(value: Any) -> None:
    assert same(unpack(*pack({"value": value})), {"value": value})


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
ARRAYS = st.builds(np.arange, st.integers(0, 3))
KEYS = st.sampled_from(["a", "b", "$array", "$tuple", "$dict", "x y"])
VALUES = st.recursive(
    SCALARS | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=10,
)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_state_round_trip(state: dict[str, Any]) -> None:
    assert same(unpack(*pack(state)), state)


def test_mappings_come_back_as_dicts() -> None:
    state = {"model": OrderedDict(b=1, a=2)}
    found = unpack(*pack(state))
    assert type(found["model"]) is dict
    assert list(found["model"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": {1, 2}}}, r"a\.b: .*set"),
        ({"a": [0, object()]}, r"a\.1: .*object"),
        ({"a": 1j}, "a: .*complex"),
        ({"a": {"b": {0: "x", "1": "y"}}}, r"a\.b: key 0 is not a string"),
        ({"a": {"b": {None: "x"}}}, r"a\.b: key None is not a string"),
        ({"a": {True: "x"}}, "a: key True is not a string"),
        ({1.5: 2}, "state: key 1.5 is not a string"),
        ({"a.b": np.zeros(1), "a": {"b": np.zeros(1)}}, r"both be called 'a\.b'"),
    ],
)
def test_state_that_cannot_be_packed(state: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        pack(state)


def test_tensors_that_are_not_those_of_the_state() -> None:
    tensors, metadata = pack({"model": {"w": np.zeros(2), "b": np.zeros(1)}})
    with pytest.raises(CheckpointCorruptError, match=r"names a tensor not there: 'model\.b'"):
        unpack({"model.w": tensors["model.w"]}, metadata)
    with pytest.raises(CheckpointCorruptError, match="does not name these tensors: extra"):
        unpack({**tensors, "extra": np.zeros(1)}, metadata)
    with pytest.raises(CheckpointError, match="not packed by gpugrad"):
        unpack(tensors, {"format": "pt"})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": {"$tuple": 3}}', '{"a": {"$x": 1}}'])
def test_state_that_cannot_be_read(text: str) -> None:
    with pytest.raises(CheckpointCorruptError, match="packed state"):
        unpack({}, {"state": text})


def test_state_is_not_emptied_by_unpacking() -> None:
    tensors, metadata = pack({"w": np.zeros(2)})
    unpack(tensors, metadata)
    assert list(tensors) == ["w"]
