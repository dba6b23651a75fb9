"""The arena: parameters, gradients and state of one dtype and device are parts of a few buffers.

Parameters of a group that share dtype and device lie one after the other in one buffer, their
gradients in a second one, and every array of the optimiser's state in one more. Each begins at a
cache line; what lies between them stays zero. Tensors keep their shapes and names, only their
arrays are now views. A step is then one pass over the gradients, for their norm, and one over
everything, for the update, however many parameters there are.

Parameters stored in two bytes, float16 or bfloat16, have a *master* among their state, the same
values in float32, and all their state is in float32. An update runs on the masters, and the
parameters are the masters rounded: a change too small for two bytes is not lost, it adds up. An
element that somebody else has changed since the last step, by loading a state dict for instance,
counts as what it is now.

Some arrays stay where they are, and their parameters are updated one by one, with the same results:

* a parameter whose array something else holds too: another tensor made by `detach()`, a view, a
  variable of the program, a graph that waits to be run backward. It moves in at the first step
  after these are gone. A parameter that is itself a view of something else never does;
* a gradient that was assigned to `.grad` by hand while an earlier one is still looked at. Any other
  gradient is copied into its place at the step, or was written there by the backward pass;
* everything in libraries without buffers, such as JAX, whose arrays cannot change.

Where two optimisers have the same parameters, the one made later holds them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from sys import getrefcount
from threading import Lock
from typing import Any

import numpy as np

from gpugrad.backend import SPACES, Array, Backend
from gpugrad.backend.memory import ALIGNMENT, NOTED, Buffer, buffer, squares
from gpugrad.core.graph import Leaf, Mark, lent, mutations
from gpugrad.core.tensor import Tensor, tensor_of

__all__ = ["MASTER", "Arena", "Place", "Span", "arenas_of", "leaf_of"]

#: The state that holds the values of narrow parameters in float32.
MASTER = "master"

Reference = Callable[[], Any]


def _gone() -> None:
    """A weak reference to nothing."""


#: References to an array in :meth:`Place.take` when nobody but its place holds it.
_IDLE = 3


_taking = Lock()


class Place:
    """Where one parameter belongs in an arena; to its leaf, the home of its gradient.

    Attributes
    ----------
    start, size, shape:
        The elements of the buffers that are its.
    own:
        The parameter's array in the buffer, or None while it is elsewhere.
    lent:
        The array that the memory of the gradient was last lent as, or None.
    """

    __slots__ = (
        "_arena", "_loan", "_mine", "kept", "lent", "own", "shape", "size", "start", "tensor"
    )  # fmt: skip

    def __init__(self, arena: Arena, tensor: Tensor, start: int) -> None:
        self._arena: Reference = weakref.ref(arena)
        self.tensor = tensor
        self.shape = tensor.shape
        self.size = tensor.size
        self.start = start
        self.own: Reference = _gone
        self.lent: Reference = _gone
        self._loan: Reference = _gone
        self._mine: Any = None  # the array to lend, where its references tell who else holds it
        self.kept: dict[str, Any] | None = None  # the state whose arrays are in the buffers

    @property
    def arena(self) -> Arena | None:
        """The arena, while its optimiser lives."""
        return self._arena()  # type: ignore[no-any-return]

    def take(self) -> Array | None:
        arena = self._arena()
        if arena is None or arena.g is None:
            return None
        array = self._mine
        if array is None or getrefcount(array) != _IDLE:
            with _taking:  # two threads may run backward
                if self._loan() is not None:
                    return None
                array, loan = arena.g.lend(self.start, self.shape)
                self.lent = weakref.ref(array)
                self._loan = weakref.ref(loan)
                lent.note(array, arena.g.flat, self.start)
                self._mine = array if arena.g.counts else None
        if squares:
            squares.pop(id(array), None)
        return array

    def keep(self, g: Array) -> Array | None:
        if g is self.lent():
            return g
        arena = self._arena()
        if arena is None or not arena.takes(g, self.shape):
            return None
        there = self.take()
        if there is not None:
            arena.space.setitem(there, ..., g)
        return there

    def __reduce__(self) -> Any:
        """A copy of the leaf, or its pickle, belongs to no arena."""
        return type(None), ()


@dataclass
class Span:
    """Arrays of one shape that an update runs over: a part of the buffers, or one parameter's.

    Attributes
    ----------
    step:
        The count of steps of all its parameters.
    start:
        Its first element in the arena.
    inside:
        Whether parameters and gradients are in the buffers.
    states:
        The arrays of the state. Where parameters are narrow, their masters are the first.
    settled:
        What makes the common step of it, once that has been chosen.
    """

    arena: Arena
    places: list[Place]
    p: Array
    g: Array
    step: Tensor
    start: int
    inside: bool
    states: list[Array] = field(default_factory=list)
    settled: Callable[..., Any] | None = None
    _large: list[Place] | None = None
    _left: tuple[list[Place], list[Array] | None] = field(default_factory=lambda: ([], None))

    def known(self) -> tuple[float, list[Array]] | None:
        """What is known of Σg², and the parts of the gradient that it is not known of.

        None where there is nothing known that would help.
        """
        if not self.inside:
            return None
        total = 0.0
        for place in self.places:
            part: float | None = place.tensor._node.squares
            if part is None:
                break
            total += part
        else:
            return total, []
        if self._large is None:
            self._large = [place for place in self.places if place.size >= NOTED]
        if not self._large:
            return None
        noted, total = [], 0.0
        for place in self._large:
            part = place.tensor._node.squares
            if part is not None:
                noted.append(place)
                total += part
        if not noted:
            return None
        if noted != self._left[0]:
            self._left = noted, self._others(noted)
        left = self._left[1]
        return None if left is None else (total, left)

    def _others(self, noted: Sequence[Place]) -> list[Array] | None:
        """The gradient without these places: a few large parts, and all small ones."""
        last = self.places[-1]
        starts = [*(place.start for place in noted), last.start + last.size]
        stops = [self.start, *(place.start + place.size for place in noted)]
        parts = [slice(a - self.start, b - self.start) for a, b in zip(stops, starts) if a < b]
        # Small ones are copied, which must be little beside what need not be read.
        small = sum(part.stop - part.start for part in parts if part.stop - part.start < NOTED)
        if 4 * small > sum(place.size for place in noted):
            return None
        getitem = self.arena.space.getitem
        return [getitem(self.g, part) for part in parts]

    def operands(self) -> tuple[Array, Array, list[Array]]:
        """Parameters, gradients and states to compute with: of narrow ones, in float32."""
        arena = self.arena
        if not arena.narrow:
            return self.p, self.g, self.states
        m, wide = arena.space, arena.space.dtype("float32")
        master, *states = self.states
        # Nothing is compared where it lies: what rounds to the parameter is its master.
        known = m.astype(master, self.p.dtype) == self.p
        fresh = m.where(known, master, m.astype(self.p, wide))
        if m.mutable:
            m.setitem(master, ..., fresh)
            fresh = master
        return fresh, m.astype(self.g, wide), states

    def round(self) -> None:
        """Give narrow parameters the values of their masters, after an update in place."""
        if self.arena.narrow:
            m = self.arena.space
            m.setitem(self.p, ..., m.astype(self.states[0], self.p.dtype))

    def mark(self) -> None:
        """Note that the parameters have changed."""
        if self.inside and len(self.places) == len(self.arena.places):
            mutations.mark_all(self.arena.marks)
        else:
            for place in self.places:
                mutations.mark(place.tensor.data)


class Arena:
    """Parameters of one group, dtype and device.

    Attributes
    ----------
    base:
        The number of its first element among those of all arenas of the optimiser.
    group:
        The number of the parameter group.
    size:
        Elements of each buffer.
    narrow:
        Whether parameters have two bytes, and masters.
    p, g, states:
        The buffers; None, and empty, in a library that has none. Those that are not trained have no
        `g`.
    """

    def __init__(
        self, space: Backend, tensors: Sequence[Tensor], group: int, *, trains: bool = True
    ) -> None:
        first = tensors[0].data
        self.space = space
        self.group = group
        self.base = 0
        self.dtype = first.dtype
        self.numpy_dtype = space.numpy_dtype(first)
        self.device = space.device(first)
        del first  # a reference of ours would look like somebody else's
        self.narrow = self.numpy_dtype.itemsize < 4
        self.state_dtype = np.dtype("float32") if self.narrow else self.numpy_dtype
        unit = max(1, ALIGNMENT // self.numpy_dtype.itemsize)
        self.places: list[Place] = []
        self.size = 0
        for tensor in tensors:
            self.places.append(Place(self, tensor, self.size))
            self.size += -(-tensor.size // unit) * unit
        self.p = self._buffer(self.numpy_dtype)
        self.g = self._buffer(self.numpy_dtype) if trains else None
        self.states: dict[str, Buffer] = {}
        self.marks = Mark()
        if self.p is not None:
            for place in self.places:
                self.settle(place, by_force=True)

    def _buffer(self, dtype: np.dtype[Any]) -> Buffer | None:
        return buffer(self.space, self.size, dtype, self.device)

    def takes(self, x: Array, shape: tuple[int, ...]) -> bool:
        """Whether an array could be one of this shape in the arena."""
        return (
            SPACES[type(x)] is self.space
            and x.dtype == self.dtype
            and x.shape == shape
            and (self.device == "cpu" or self.space.device(x) == self.device)
        )

    def fits(self) -> bool:
        """Whether all its parameters are still of its kind."""
        return all(
            place.tensor.data is place.own() or self.takes(place.tensor.data, place.shape)
            for place in self.places
        )

    # -- parameters -------------------------------------------------------------------------------

    def settle(self, place: Place, by_force: bool = False) -> bool:
        """Move a parameter's array into the buffer where nobody else holds it; whether it is there.

        An array that is in the buffer of another optimiser stays there, unless by force or when
        that optimiser is gone.
        """
        tensor = place.tensor
        if tensor.data is place.own():
            return True
        if self.p is None:
            return False
        leaf = leaf_of(tensor)
        home = None if leaf is None else leaf.home
        if isinstance(home, Place) and home is not place:
            if not by_force and home.arena is not None:
                return False
            inside = home.own() is tensor.data
        else:
            inside = False
        if leaf is not None:
            leaf.home = place
        if not (inside or _movable(self.space, tensor)) or not _alone(tensor):
            return False
        array, _ = self.p.lend(place.start, place.shape)
        self.space.setitem(array, ..., tensor.data)
        tensor.data = array
        place.own = weakref.ref(array)
        mutations.join(array, self.marks)
        return True

    # -- state ------------------------------------------------------------------------------------

    def new_state(self, place: Place, name: str, value: Any) -> Tensor:
        """A state array of one parameter, filled with a number or with the elements of an array."""
        space = self.space
        if self.p is None:
            if not isinstance(value, float):
                return tensor_of(value)
            dtype = space.dtype(self.state_dtype.name)
            made = space.zeros_like(place.tensor.data, dtype=dtype)
            return tensor_of(made + value if value else made)
        if name not in self.states:
            made = self._buffer(self.state_dtype)
            assert made is not None
            self.states[name] = made
        array, _ = self.states[name].lend(place.start, place.shape)
        space.setitem(array, ..., value)
        return tensor_of(array)

    # -- what a step runs over --------------------------------------------------------------------

    def spans(self, active: Sequence[tuple[Place, Tensor]], names: Sequence[str]) -> list[Span]:
        """The fewest spans over the places with a gradient, given with their count of steps.

        Neighbours in the buffers with a common count make one span.
        """
        found: list[Span] = []
        previous: Place | None = None
        order = {id(place): i for i, place in enumerate(self.places)}
        for place, step in active:
            tensor = place.tensor
            inside = self.settle(place)
            g = self._gradient(place)
            if not inside or g is not None:
                states = [place.kept[name].data for name in names]  # type: ignore[index]
                where = self.at(place) if g is None else g
                span = Span(self, [place], tensor.data, where, step, place.start, False, states)
                found.append(span)
                previous = None
                continue
            if (
                previous is not None
                and order[id(place)] == order[id(previous)] + 1
                and found[-1].step is step
            ):
                found[-1].places.append(place)
            else:
                found.append(Span(self, [place], None, None, step, place.start, True))
            previous = place
        for span in found:
            if span.inside:
                part = slice(span.start, span.places[-1].start + span.places[-1].size)
                assert self.p is not None and self.g is not None
                getitem = self.space.getitem
                span.p, span.g = getitem(self.p.flat, part), getitem(self.g.flat, part)
                span.states = [getitem(self.states[name].flat, part) for name in names]
        return found

    def _gradient(self, place: Place) -> Array | None:
        """The array of a gradient, if it is not in the buffer and cannot be copied there."""
        leaf: Leaf = place.tensor._node
        g = leaf.grad.data
        if g is place.lent():
            return None
        return g if place.keep(g) is None else None

    def at(self, place: Place) -> Array:
        """The gradient of one place in the buffer."""
        assert self.g is not None
        flat = self.space.getitem(self.g.flat, slice(place.start, place.start + place.size))
        return self.space.reshape(flat, place.shape)


def arenas_of(tensors: Sequence[Tensor], group: int) -> list[Arena]:
    """The arenas of a parameter group: one for each dtype and device."""
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        space = SPACES[type(tensor.data)]
        key = (space.name, space.device(tensor.data), str(tensor.dtype))
        kinds.setdefault(key, []).append(tensor)
    return [Arena(SPACES[type(alike[0].data)], alike, group) for alike in kinds.values()]


def leaf_of(tensor: Tensor) -> Leaf | None:
    """The leaf of a parameter, also of one that does not collect gradients at the moment."""
    node = tensor._node or getattr(tensor, "_stopped", None)
    return node if isinstance(node, Leaf) else None


def _movable(space: Backend, tensor: Tensor) -> bool:
    """Whether an array owns its memory, or is a scalar, which nobody can change."""
    x = tensor.data
    return isinstance(x, np.generic) or not space.is_view(x)


_probe = tensor_of(np.zeros(1))
#: References to an array that only its tensor holds. Views hold theirs, too.
_ONE_HOLDER = getrefcount(_probe.data)


def _alone(tensor: Tensor) -> bool:
    return isinstance(tensor.data, np.generic) or getrefcount(tensor.data) <= _ONE_HOLDER
