"""What a step runs over: which parameters have a gradient, and the spans that they make.

A plan is made when something has changed since the last step, and used again as long as nothing
has: to find that out, each parameter and each gradient is compared with what it was, by identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

from gpugrad.backend import SPACES
from gpugrad.core.graph import Leaf
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.optim.arena import MASTER, Arena, Place, Span, arenas_of
from gpugrad.optim.rules import UpdateRule

__all__ = ["Plan", "fits", "lay_out", "make_plan"]

Group = dict[str, Any]
State = dict[Tensor, dict[str, Any]]


@dataclass
class Plan:
    """One step's work.

    Attributes
    ----------
    names:
        The state arrays that are kept, for each group.
    spans:
        What to run over.
    steps:
        The counts of steps, 0-d tensors: parameters with one history share one.
    """

    names: list[tuple[str, ...]]
    spans: list[Span]
    steps: list[Tensor]
    _params: list[list[Tensor]]
    _state: State
    _size: int
    _active: list[tuple[Tensor, Place]]
    _idle: list[Tensor]
    _lasts: bool

    def holds(self, groups: Sequence[Group], state: State, names: list[tuple[str, ...]]) -> bool:
        """Whether everything is as it was when the plan was made."""
        if not self._lasts or state is not self._state or len(state) != self._size:
            return False
        if names != self.names or not _same(groups, self._params):
            return False
        for tensor, place in self._active:
            leaf = tensor._node
            if leaf is None or tensor.data is not place.own():
                return False
            grad = leaf.grad
            if grad is None or grad.data is not place.lent():
                return False
        for tensor in self._idle:
            leaf = tensor._node
            if leaf is not None and leaf.grad is not None:
                return False
        return True


def fits(groups: Sequence[Group], arenas: list[list[Arena]]) -> bool:
    """Whether the arenas hold all parameters of the groups, as they are now."""
    return len(arenas) == len(groups) and all(
        {id(place.tensor) for arena in made for place in arena.places}
        == {id(p) for p in group["params"]}
        and all(arena.fits() for arena in made)
        for made, group in zip(arenas, groups)
    )


def lay_out(groups: Sequence[Group], arenas: list[list[Arena]]) -> list[list[Arena]]:
    """Arenas for the groups: those that fit, and new ones for what was added or has moved."""
    found: list[list[Arena]] = []
    base = 0
    for i, group in enumerate(groups):
        keeps = i < len(arenas) and fits([group], [arenas[i]])
        found.append(arenas[i] if keeps else arenas_of(group["params"], i))
        for arena in found[-1]:
            arena.base = base
            base += arena.size
    return found


def make_plan(
    groups: Sequence[Group],
    arenas: list[list[Arena]],
    state: State,
    rule: UpdateRule,
    names: list[tuple[str, ...]],
) -> Plan:
    """The work of this step; state that is missing is made, and all of it moved into the arenas."""
    counts = _Counts()
    active: list[tuple[Tensor, Place]] = []
    idle: list[Tensor] = []
    for arena in (arena for group in arenas for arena in group):
        group = groups[arena.group]
        for place in arena.places:
            leaf = place.tensor._node
            if isinstance(leaf, Leaf) and leaf.grad is not None:
                active.append((place.tensor, place))
                _prepare(place, arena, state, _kept(arena, names), rule.initial(group), counts)
            else:
                idle.append(place.tensor)
    counts.part([state[t] for t, _ in active], [state[t] for t in idle if t in state])

    by_arena: dict[int, list[tuple[Place, Tensor]]] = {}
    for tensor, place in active:
        by_arena.setdefault(id(place.arena), []).append((place, state[tensor]["step"]))
    spans: list[Span] = []
    for arena in (arena for group in arenas for arena in group):
        spans += arena.spans(by_arena.get(id(arena), []), _kept(arena, names))
    steps = list({id(span.step): span.step for span in spans}.values())
    lasts = all(span.inside for span in spans)
    params = [list(group["params"]) for group in groups]
    return Plan(names, spans, steps, params, state, len(state), active, idle, lasts)


def _same(groups: Sequence[Group], params: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the groups have these parameters, and no others."""
    return len(groups) == len(params) and all(
        len(group["params"]) == len(known) and all(map(is_, group["params"], known))
        for group, known in zip(groups, params)
    )


def _kept(arena: Arena, names: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The state arrays of parameters in an arena."""
    return (MASTER, *names[arena.group]) if arena.narrow else names[arena.group]


def _prepare(
    place: Place, arena: Arena, state: State, names: Sequence[str], initial: float, counts: _Counts
) -> None:
    """Make the state of one parameter, or move it into the buffers."""
    kept = state.get(place.tensor)
    if kept is not None and kept is place.kept and all(name in kept for name in names):
        return
    if kept is None or any(name not in kept for name in names if name != MASTER):
        kept = state[place.tensor] = {"step": counts.at(arena, 0)}
        values: dict[str, Any] = {name: initial for name in names if name != MASTER}
    else:
        kept["step"] = counts.at(arena, kept["step"])
        values = {name: _brought(kept[name], arena) for name in names if name in kept}
    if MASTER in names and MASTER not in values:  # none is in a state that PyTorch has saved
        values[MASTER] = _brought(place.tensor, arena)
    for name, value in values.items():
        kept[name] = arena.new_state(place, name, value)
    place.kept = kept


def _brought(value: Tensor, arena: Arena) -> Any:
    """The array of a state, of the arena's library, dtype and device."""
    here = value.detach().to(arena.device, arena.state_dtype)
    return here.data


class _Counts:
    """Counts of steps, one for all parameters of a device that have made as many."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str, int], Tensor] = {}

    def at(self, arena: Arena, count: Any) -> Tensor:
        """The count of a parameter in an arena, given as a number or as a count."""
        if isinstance(count, Tensor):
            if SPACES[type(count.data)] is arena.space and count.device == arena.device:
                return count
            count = count.item()
        key = (arena.space.name, arena.device, int(count))
        if key not in self._made:
            space = arena.space
            array = space.create("full", (), int(count), dtype="int64", device=arena.device)
            self._made[key] = tensor_of(array)
        return self._made[key]

    @staticmethod
    def part(active: list[dict[str, Any]], idle: list[dict[str, Any]]) -> None:
        """Give those who make a step a count of their own, where others with theirs do not."""
        resting = {id(kept["step"]) for kept in idle}
        copies: dict[int, Tensor] = {}
        for kept in active:
            step = kept["step"]
            if id(step) in resting:
                if id(step) not in copies:
                    space = step.backend
                    x = space.asarray(step.data, device=step.device, copy=True)
                    copies[id(step)] = tensor_of(x)
                kept["step"] = copies[id(step)]
