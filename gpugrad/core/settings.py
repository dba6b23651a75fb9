"""Whether the modules and values that a program was made for are as they were."""

from __future__ import annotations

from typing import Any

__all__ = ["State", "exact", "settings"]

#: How often an attribute of some module has been set.
settings = [0]

#: What is compared by value.
_PLAIN = (bool, int, float, complex, str, bytes, tuple, type(None))


class State:
    """The attributes of a module, to be compared with what they are later."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.values = dict(vars(owner))

    def differs(self) -> str | None:
        """The name of an attribute that is another one now, or None.

        Numbers, strings and tuples are compared, and everything else by identity.
        """
        now = vars(self.owner)
        for name in now.keys() ^ self.values.keys():
            return str(name)
        for name, value in now.items():
            before = self.values[name]
            if value is not before and not (
                isinstance(value, _PLAIN) and exact(value) == exact(before)
            ):
                return str(name)
        return None

    def key(self) -> Any:
        """What tells this state from others, for a dictionary."""
        plain = ((k, exact(v)) for k, v in self.values.items() if isinstance(v, _PLAIN))
        return id(self.owner), tuple(plain)


def exact(value: Any) -> Any:
    """What is equal to that of another value only if the two are the same.

    1 is equal to True, 0.0 to -0.0, and NaN not to itself.
    """
    if isinstance(value, tuple | list):
        return type(value), tuple(map(exact, value))
    if isinstance(value, dict):
        return tuple((k, exact(v)) for k, v in value.items())
    if isinstance(value, slice):
        return slice, exact((value.start, value.stop, value.step))
    return type(value), repr(value) if isinstance(value, float | complex) else value
