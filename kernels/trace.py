"""From a formula over a namespace to straight-line text that a loop can be compiled from.

A formula `f(m, x, …)` has no branches: it is arithmetic, comparisons and calls of `m`. Called with
symbols in place of arrays it spells itself out, whatever helpers it is made of, and what was
computed twice is found. The text is that of a scalar function with the placeholders of
`kernels/template.py`; its constants are of the type that it computes in.
"""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from gpugrad.errors import DeclarationError
from gpugrad.kernels import template
from gpugrad.kernels.template import Template

__all__ = ["formula_text", "scalar_function"]

#: What a formula may call, and the placeholder that stands for it.
CALLS = {
    "exp": "exp", "expm1": "expm1", "log": "log", "log1p": "log1p", "tanh": "tanh", "erf": "erf",
    "sqrt": "sqrt", "floor": "floor", "abs": "absolute", "where": "where",
    "maximum": "maximum", "minimum": "minimum",
}  # fmt: skip


class Symbol:
    """A value that is not there yet: operations on it are written down."""

    __slots__ = ("boolean", "lines", "name")
    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, lines: _Lines, name: str, boolean: bool = False) -> None:
        self.lines = lines
        self.name = name
        self.boolean = boolean

    def __bool__(self) -> bool:
        raise DeclarationError(
            f"{self.lines.formula}: a formula must not branch on a value; select with m.where"
        )


def _operator(name: str, text: str, boolean: bool = False) -> None:
    def apply(self: Symbol, other: Any) -> Symbol:
        return self.lines.add(text.format(self.name, self.lines.spell(other)), boolean)

    def reflected(self: Symbol, other: Any) -> Symbol:
        return self.lines.add(text.format(self.lines.spell(other), self.name), boolean)

    setattr(Symbol, f"__{name}__", apply)
    setattr(Symbol, f"__r{name}__", reflected)


for _name, _sign in {"add": "+", "sub": "-", "mul": "*", "truediv": "/"}.items():
    _operator(_name, f"{{}} {_sign} {{}}")
for _name, _sign in {"and": "&", "or": "|", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
                     "eq": "==", "ne": "!="}.items():  # fmt: skip
    _operator(_name, f"({{}}) {_sign} ({{}})" if _sign in "&|" else f"{{}} {_sign} {{}}", True)
setattr(Symbol, "__neg__", lambda self: self.lines.add(f"-{self.name}"))  # noqa: B010
setattr(Symbol, "__invert__", lambda self: self.lines.add(f"not {self.name}", True))  # noqa: B010


class _Lines:
    """The statements so far; one that is there already is not written again."""

    def __init__(self, formula: str) -> None:
        self.formula = formula
        self.known: dict[str, Symbol] = {}

    def add(self, text: str, boolean: bool = False) -> Symbol:
        if text not in self.known:
            self.known[text] = Symbol(self, f"t{len(self.known)}", boolean)
        return self.known[text]

    def spell(self, value: Any) -> str:
        if isinstance(value, Symbol):
            return value.name
        if not isinstance(value, Real) or value != value:
            raise DeclarationError(
                f"{self.formula}: a formula is made of numbers and its operands, not of "
                f"{'NaN' if isinstance(value, Real) else type(value).__name__}"
            )
        number = repr(float(value)).replace("inf", "1e999")  # which reads as infinity
        return f"T({number})"


class _Namespace:
    """The `m` of a formula that is being written down."""

    def __init__(self, lines: _Lines) -> None:
        self._lines = lines

    def __getattr__(self, name: str) -> Callable[..., Symbol]:
        if name not in CALLS:
            raise DeclarationError(
                f"{self._lines.formula}: m.{name} cannot be compiled; a formula may call "
                f"{', '.join(CALLS)}"
            )

        def call(*args: Any) -> Symbol:
            spelt = ", ".join(self._lines.spell(a) for a in args)
            return self._lines.add(f"{CALLS[name]}({spelt})")

        return call


def formula_text(
    formula: Callable[..., Any],
    name: str,
    *,
    arguments: Sequence[str] | None = None,
    fixed: dict[str, Any] | None = None,
) -> str:
    """The text of a scalar function that computes `formula`.

    Parameters
    ----------
    formula:
        `f(m, operands…, parameters…)`, without branches; it may return a tuple.
    name:
        What the function is to be called.
    arguments:
        The arguments of the function, in order; those that the formula does not take are there to
        give several functions one signature. By default the formula's own after `m`.
    fixed:
        Values for arguments of the formula that are constants in the text, flags among them.

    >>> print(formula_text(lambda m, x: m.where(x > 0, x, 0.1 * x), "leaky"))
    def leaky(x):
        t0 = x > T(0.0)
        t1 = T(0.1) * x
        t2 = where(t0, x, t1)
        return t2
    """
    takes = list(inspect.signature(formula).parameters)[1:]
    fixed = fixed or {}
    wanted = [a for a in takes if a not in fixed]
    arguments = list(arguments) if arguments is not None else wanted
    if missing := [a for a in wanted if a not in arguments]:
        raise DeclarationError(f"{name}: its formula also takes {', '.join(missing)}")
    lines = _Lines(name)
    given = {a: Symbol(lines, a) for a in wanted}
    out = formula(_Namespace(lines), **{**given, **fixed})
    result = ", ".join(lines.spell(y) for y in (out if isinstance(out, tuple) else (out,)))
    body = [f"    {symbol.name} = {text}" for text, symbol in lines.known.items()]
    return "\n".join((f"def {name}({', '.join(arguments)}):", *body, f"    return {result}"))


def scalar_function(
    formula: Callable[..., Any],
    name: str,
    *,
    arguments: Sequence[str] | None = None,
    fixed: dict[str, Any] | None = None,
) -> Template:
    """The template of a scalar function that computes `formula`: see :func:`formula_text`."""
    text = formula_text(formula, name, arguments=arguments, fixed=fixed)
    return text_template(text, name)


def text_template(text: str, name: str) -> Template:
    """A device template of a generated text, which stays readable in tracebacks."""
    filename = f"<gpugrad kernel {name}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    scope = {**{k: getattr(template, k) for k in ("T", *CALLS.values())}, "__name__": __name__}
    exec(compile(text, filename, "exec"), scope)
    made = template.device(scope[name])
    made.text = text  # type: ignore[attr-defined]
    return made
