"""What takes a hook away again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

__all__ = ["RemovableHandle"]


class RemovableHandle:
    """Comes back from registering a hook; removes it by `remove()`, or when a `with` block ends.

    A call of it does the same.

    >>> import gpugrad as gg
    >>> x = gg.tensor(2.0, requires_grad=True)
    >>> with x.register_hook(lambda g: 10 * g):
    ...     (3 * x).backward()
    >>> x.grad.item()
    30.0
    """

    __slots__ = ("_remove",)

    def __init__(self, remove: Callable[[], Any]) -> None:
        self._remove = remove

    def remove(self) -> None:
        """Take the hook away; a second time, nothing happens."""
        self._remove()

    __call__ = remove

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()
