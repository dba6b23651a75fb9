"""Every operation that a piece of code runs, with what went into it and what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import Any

from gpugrad.backend import SPACES
from gpugrad.core.codegen import implement
from gpugrad.core.primitive import Primitive, registry
from gpugrad.errors import GraphError

__all__ = ["Notice", "each_call", "is_told", "told"]

#: Is told the primitive, its operands (arrays, numbers and None), its parameters, and its results.
Notice = Callable[[Primitive, Sequence[Any], dict[str, Any], Sequence[Any]], None]

#: Blocks replace what operations look up, so there is one at a time; one inside another will do.
_turn = RLock()


#: Not empty while some thread is told of operations.
told: list[None] = []

#: Threads that want to be told of each layer by itself.
_apart: list[int] = []


def is_told() -> bool:
    """Whether this thread is told of every operation, with none that stands for several layers."""
    return bool(_apart) and get_ident() in _apart


@contextmanager
def each_call(notice: Notice, *, apart: bool = False) -> Iterator[None]:
    """Tell `notice` of every operation that this thread runs inside the block.

    With `apart`, layers that could be one operation are several.

    Recorded or not, forward only: derivative rules run on raw arrays. It rides on the table in
    which operations find their implementation, so nothing is paid for it elsewhere.

    Raises GraphError when that table was emptied in the block: there would be calls missing.

    >>> import gpugrad as gg
    >>> seen = []
    >>> with each_call(lambda made, operands, parameters, results: seen.append(made.name)):
    ...     _ = gg.softmax(gg.ones((2, 3)) @ gg.ones((3, 4)), axis=1)
    >>> seen
    ['matmul', 'softmax']
    """
    with _turn:
        told.append(None)
        kinds = [kind for kind in SPACES if kind in SPACES[kind].types]
        if apart:
            _apart.append(get_ident())
        tellers = [_Teller(made, kind, notice) for made in registry.values() for kind in kinds]
        try:
            yield
        finally:
            told.pop()
            if apart:
                _apart.remove(get_ident())
            lost = [teller for teller in tellers if not teller.restore()]
    if lost:
        raise GraphError(
            "operations were looked up anew while they were watched, because of gpugrad.explain, "
            "or because a backend or a kernel was registered; do that before or after"
        )


class _Teller:
    """Stands in the place of an operation's implementation for one array class."""

    def __init__(self, made: Primitive, kind: type, notice: Notice) -> None:
        self.made = made
        self.kind = kind
        self.notice = notice
        self.thread = get_ident()
        self.found = made.implementations.get(kind)
        made.implementations[kind] = self

    def __call__(self, *operands: Any, **parameters: Any) -> Any:
        if self.found is None:
            self.found = implement(self.made, self.kind)
            self.made.implementations[self.kind] = self
        y = self.found(*operands, **parameters)
        if get_ident() == self.thread:
            several = self.made.outputs != 1
            results = y if several else y[:1] if self.made.aux else (y,)
            self.notice(self.made, operands, parameters, results)
        return y

    def restore(self) -> bool:
        """Leave the place; False when somebody else has taken it."""
        implementations = self.made.implementations
        if implementations.get(self.kind) is not self:
            return False
        if self.found is None:
            del implementations[self.kind]
        else:
            implementations[self.kind] = self.found
        return True
