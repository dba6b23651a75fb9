"""What takes a hook away again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

__all__ = ["RemovableHandle", "add_hook"]


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


def add_hook(owner: Any, kind: str, hook: Callable[..., Any]) -> RemovableHandle:
    """Put a hook into ``owner._hooks``, kind → number → hook.

    The mapping is replaced, never changed: a walk through the hooks may add and remove some, and an
    owner without any shares one with all others.
    """
    hooks = owner._hooks.get(kind, {})
    key = max(hooks, default=-1) + 1
    owner._hooks = {**owner._hooks, kind: {**hooks, key: hook}}

    def remove() -> None:
        left = {k: h for k, h in owner._hooks.get(kind, {}).items() if k != key}
        others = {k: table for k, table in owner._hooks.items() if k != kind}
        owner._hooks = {**others, kind: left} if left else others

    return RemovableHandle(remove)
