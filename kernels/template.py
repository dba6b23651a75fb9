"""One text of a kernel body for every target and dtype: templates and their placeholders.

A body is an ordinary function that names *placeholders*, globals imported from here: `T` for the
type it computes in, `exp` for an exponential of that type, `read` and `write` for access to the
elements. Decorated, it is a :class:`Template`, and other templates may name it. An instance of it
for a target (the CPU's compiler, the GPU's, the GPU's simulator) and a storage dtype is the same
code object with other globals: the placeholders are replaced by what the target offers, and the
templates by their own instances.

=====================  =============================================================================
`T`                    the arithmetic type: float64 for float64, float32 for every narrower storage.
                       Constants are written `T(0.5)`: a bare 0.5 would compute in double precision
`I`                    the signed integer type as wide as `T`
`exp`, `log`, …        scalar functions of `kernels/scalars.py`
`sqrt`, `floor`        the machine's own
`absolute`             of a scalar
`where(c, a, b)`       a selection without a branch
`maximum`, `minimum`   of two scalars; NaN wins, as in NumPy
`to_bits`, `from_bits` the same bits as `I` and as `T`
`read(a, i)`           element `i` as `T`, whatever the storage
`write(a, i, x)`       store `x` as element `i`
=====================  =============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import RLock
from types import CodeType, FunctionType
from typing import Any, Protocol

from gpugrad.errors import DeclarationError

__all__ = [
    "STORAGE",
    "Target",
    "Template",
    "arithmetic",
    "device",
    "template",
]

#: What elements may be stored as, and what they are computed in.
STORAGE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


def arithmetic(storage: str) -> str:
    """The dtype that elements of `storage` are computed in.

    >>> arithmetic("bfloat16"), arithmetic("float64")
    ('float32', 'float64')
    """
    return STORAGE[storage]


class Placeholder:
    """A name in a body that every target fills in; calling it outside of an instance is a slip."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<placeholder {self.name}>"

    def __call__(self, *args: Any) -> Any:
        raise DeclarationError(
            f"{self.name} stands for a function of the target; call an instance of the template "
            "that names it, template.instance(target, dtype)"
        )


T: Any = Placeholder("T")
I: Any = Placeholder("I")  # noqa: E741 - the integer beside T
exp: Any = Placeholder("exp")
log: Any = Placeholder("log")
tanh: Any = Placeholder("tanh")
erf: Any = Placeholder("erf")
log1p: Any = Placeholder("log1p")
expm1: Any = Placeholder("expm1")
sqrt: Any = Placeholder("sqrt")
floor: Any = Placeholder("floor")
absolute: Any = Placeholder("absolute")
where: Any = Placeholder("where")
maximum: Any = Placeholder("maximum")
minimum: Any = Placeholder("minimum")
to_bits: Any = Placeholder("to_bits")
from_bits: Any = Placeholder("from_bits")
read: Any = Placeholder("read")
write: Any = Placeholder("write")

#: Placeholders whose text is in `kernels/scalars.py`, for every target.
SCALARS = ("exp", "log", "tanh", "erf", "log1p", "expm1")


class Target(Protocol):
    """A compiler, seen from here."""

    name: str

    def placeholder(self, name: str, storage: str) -> Any:
        """What stands for `name` in an instance for `storage`."""

    def compile(self, function: Callable[..., Any], role: str, storage: str) -> Any:
        """A compiled, or lazily compiling, function of a body whose globals are filled in."""


_building = RLock()


class Template:
    """A body with placeholders. Made by a decorator: :func:`device`, or a target's own.

    Parameters
    ----------
    function:
        The body. It may name globals only: an instance could not replace a closure's variables.
    role:
        What the target is to make of it: `"device"` (inlined into others), or one of its own.
    bound:
        Names given another meaning than the module's: see :meth:`bind`.
    """

    def __init__(
        self, function: Callable[..., Any], role: str, bound: dict[str, Template] | None = None
    ) -> None:
        assert isinstance(function, FunctionType)
        if function.__closure__:
            raise DeclarationError(
                f"{function.__name__}: a kernel body names globals, not variables of a function "
                f"around it ({', '.join(function.__code__.co_freevars)})"
            )
        self.function = function
        self.role = role
        self.bound = bound or {}
        self.name: str = "_".join((function.__name__, *(t.name for t in self.bound.values())))
        self._instances: dict[tuple[str, str], Any] = {}
        self._bindings: dict[tuple[tuple[str, int], ...], Template] = {}
        self.__doc__ = function.__doc__

    def bind(self, **templates: Template) -> Template:
        """The same body with some of its names standing for these templates.

        So one body of a loop serves every activation: it names a placeholder template, and is bound
        to the activation's formula. Binding the same again gives the same template.
        """
        key = tuple(sorted((name, id(t)) for name, t in templates.items()))
        with _building:
            made = self._bindings.get(key)
            if made is None:
                made = type(self)(self.function, self.role, {**self.bound, **templates})
                self._bindings[key] = made
        return made

    def instance(self, target: Target, storage: str) -> Any:
        """The compiled body for a target and the dtype its operands are stored in."""
        key = (target.name, storage)
        try:
            return self._instances[key]
        except KeyError:
            pass
        if storage not in STORAGE:
            raise DeclarationError(
                f"{self.name}: no kernels for {storage}; there are for {', '.join(STORAGE)}"
            )
        with _building:
            if key not in self._instances:
                self._instances[key] = self._make(target, storage)
        return self._instances[key]

    def _make(self, target: Target, storage: str) -> Any:
        own = self.function.__globals__
        scope: dict[str, Any] = {"__builtins__": __builtins__, "__name__": own.get("__name__")}
        for name in _names(self.function.__code__):
            value = self.bound.get(name, own.get(name))
            if isinstance(value, Template):
                value = value.instance(target, storage)
            elif isinstance(value, Placeholder):
                value = _placeholder(target, value.name, storage)
            elif name not in own:
                continue  # an attribute, or a builtin
            scope[name] = value
        body = FunctionType(self.function.__code__, scope, f"{self.name}_{storage}")
        body.__qualname__ = body.__name__
        body.__defaults__ = self.function.__defaults__
        body.__module__ = str(own.get("__name__"))
        return target.compile(body, self.role, storage)

    def __repr__(self) -> str:
        return f"<template {self.name}>"


def _placeholder(target: Target, name: str, storage: str) -> Any:
    if name not in SCALARS:
        return target.placeholder(name, storage)
    from gpugrad.kernels import scalars

    own = getattr(scalars, f"{name}_{arithmetic(storage)}", None) or getattr(scalars, name)
    # One instance for all storages of an arithmetic type: it never touches memory.
    return own.instance(target, arithmetic(storage))


def _names(code: CodeType) -> Iterator[str]:
    """Every global or attribute name in a code object and the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def template(role: str) -> Callable[[Callable[..., Any]], Template]:
    """A decorator that makes a body a template of the given role."""
    return lambda function: Template(function, role)


#: A scalar function that is inlined where it is called.
device = template("device")
