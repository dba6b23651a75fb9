"""What the body of a CUDA kernel is written in, beyond the placeholders of `kernels/template.py`.

A kernel takes pointers and numbers, as C would, and is declared by :func:`kernel` with the types
below as annotations. It runs over *packs*, tuples of as many elements as 16 bytes hold (four
float32, two float64, eight of a half precision)::

    f = Placeholder("f")
    f_pack = lanes(f, "x.")        # f applied to each element of a pack

    @kernel
    def map_kernel(x: Elements, y: Elements, p: Number, n: Size, aligned: Int) -> None:
        i = thread() * LANES
        while i < n:
            z = f_pack(read_pack(x, i, n - i, aligned), p)
            write_pack(y, i, z, n - i, aligned)
            i += threads() * LANES

    map_kernel.bind(f=some_scalar_template)["float32"]      # an entry that can be launched

===============================  ===================================================================
`cuda`                           the module of the CUDA dialect: `cuda.threadIdx.x`, …
`thread()`, `threads()`          this thread's number in a one-dimensional grid, and how many
`LANES`                          elements in a pack
`load(a, i)`                     the pack that begins at element `i`, whose address is a multiple of
                                 16, as numbers of type `T`
`store(a, i, pack)`              the reverse, rounding to the storage
`read_pack(a, i, n, aligned)`    the same for any `i`: in one access if `aligned` and `n >= LANES`,
                                 else element by element, with 0 beyond the `n`-th
`write_pack(a, i, x, n, aligned)`  the reverse, for the first `n`
`zero_pack()`                    a pack of zeros
`spread(a, i, x, step)`          element `j` of a pack into `a[i + j * step]`: shared memory
`shuffle(x, mask)`               the `x` of the thread in this warp whose number differs by `mask`
===============================  ===================================================================

Offsets are 64 bits wide. Loops are `while` loops, for a `range` with a step divides. The compilers
agree on less than Python: `x` is NaN if `not (x == x)`, for one takes `x != x` for false; `min` and
`max` are selections, `a if a < b else b`; shared arrays are made in the kernel, not in a function
that it calls.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np

from gpugrad.errors import DeclarationError
from gpugrad.kernels import scalars
from gpugrad.kernels.template import (
    SCALARS,
    Placeholder,
    Target,
    Template,
    _names,
    arithmetic,
)
from gpugrad.kernels.template import device as _device

if TYPE_CHECKING:
    from gpugrad.kernels.cuda.launch import Entry

__all__ = [
    "LANES", "Bytes", "Elements", "Int", "Ints", "Longs", "Number", "Size", "Values", "cuda",
    "device", "elements_of", "fold", "kernel", "lanes", "load", "pack_size", "read_pack", "shuffle",
    "spread", "store", "thread", "threads", "write_pack", "zero_pack",
]  # fmt: skip

# Types of arguments; pointers first. Half precision is passed as its bits.
Elements = Any  #: of the storage; only `read`, `write`, `load` and `store` may touch them
Values = Any  #: of T
Bytes = Any  #: uint8
Ints = Any  #: int32
Longs = Any  #: int64
Number = Any  #: one T
Int = Any  #: one int32
Size = Any  #: one int64

#: For each type: how it is spelt in a signature, with T the arithmetic type and S the storage.
SPELLING = {
    "Elements": "S*", "Values": "T*", "Bytes": "uint8*", "Ints": "int32*", "Longs": "int64*",
    "Number": "T", "Int": "int32", "Size": "int64",
}  # fmt: skip

cuda: Any = Placeholder("cuda")
load: Any = Placeholder("load")
store: Any = Placeholder("store")
LANES: Any = Placeholder("LANES")
shuffle: Any = Placeholder("shuffle")


#: As in `kernels/template.py`. Bodies call what it makes, whose type says nothing of that.
device: Any = _device


@device
def thread() -> Any:
    """This thread's number in a one-dimensional grid."""
    return np.int64(cuda.blockIdx.x) * np.int64(cuda.blockDim.x) + np.int64(cuda.threadIdx.x)


@device
def threads() -> Any:
    """How many threads a one-dimensional grid has."""
    return np.int64(cuda.gridDim.x) * np.int64(cuda.blockDim.x)


def pack_size(storage: str) -> int:
    """How many elements of a storage make a pack.

    >>> pack_size("float32"), pack_size("bfloat16")
    (4, 8)
    """
    return {"float64": 2, "float32": 4}.get(storage, 8)


# -- packs ----------------------------------------------------------------------------------------


class Packed(Template):
    """A scalar template applied to packs: :func:`lanes` and :func:`fold` make them.

    A tuple has to be taken apart in text, for a loop over its elements would put it into memory.
    """

    def __init__(self, scalar: Template | Placeholder, kinds: str, folds: bool) -> None:
        self.scalar = scalar
        self.kinds = kinds
        self.folds = folds
        self.name = f"{scalar.name}_{'fold' if folds else 'lanes'}"
        self.role = "device"
        self._instances = {}
        self._followers: dict[int, Packed] = {}

    def text(self, width: int) -> str:
        names = [f"a{j}" for j in range(len(self.kinds))]
        lines = [f"def {self.name}({', '.join(names)}):"]
        for name, kind in zip(names, self.kinds):
            if kind == "x":
                lines.append(f"    {', '.join(f'{name}_{i}' for i in range(width))} = {name}")
        calls = [
            "f({})".format(
                ", ".join(f"{n}_{i}" if kind == "x" else n for n, kind in zip(names, self.kinds))
            )
            for i in range(width)
        ]
        if self.folds:
            lines += [f"    a0 = {call}" for call in calls] + ["    return a0"]
        else:
            lines.append(f"    return {', '.join(calls)}")
        return "\n".join(lines) + "\n"

    def _make(self, target: Target, storage: str) -> Any:
        if isinstance(self.scalar, Placeholder):
            raise DeclarationError(f"{self.name}: bind {self.scalar.name} to a template first")
        scope: dict[str, Any] = {"f": self.scalar.instance(target, storage)}
        exec(self.text(pack_size(storage)), scope)
        return target.compile(scope[self.name], "device", storage)

    def following(self, bound: dict[str, Template]) -> Packed:
        """The same over what its placeholder is bound to."""
        if not isinstance(self.scalar, Placeholder) or self.scalar.name not in bound:
            return self
        scalar = bound[self.scalar.name]
        made = Packed(scalar, self.kinds, self.folds)
        return self._followers.setdefault(id(scalar), made)


def lanes(scalar: Any, kinds: str) -> Any:
    """A scalar function for each element: packs in, a pack out.

    Parameters
    ----------
    scalar:
        A template, or a placeholder that the kernel will be bound to.
    kinds:
        A letter for each argument: `x` for a pack, `.` for one number for all elements.
    """
    return Packed(scalar, kinds, folds=False)


def fold(scalar: Any, kinds: str) -> Any:
    """Carry the first argument, one number, through the elements: `a = f(a, x)` for each `x`.

    `kinds` is as in :func:`lanes`, and begins with `.`.
    """
    return Packed(scalar, kinds, folds=True)


class _Count(Template):
    """A number of elements that depends on the storage."""

    def __init__(self, packs: int) -> None:
        self.name = f"{packs}_packs"
        self.packs = packs

    def instance(self, target: Target, storage: str) -> Any:
        return self.packs * pack_size(storage)


def elements_of(packs: int) -> Any:
    """The elements of so many packs, as a constant: a size for `cuda.shared.array`."""
    return _Count(packs)


class _Loose(Template):
    """A function of a pack whose text depends on how many elements that has."""

    def __init__(self, name: str, text: Callable[[int], str]) -> None:
        self.name = name
        self.role = "device"
        self.text = text
        self._instances = {}

    def _make(self, target: Target, storage: str) -> Any:
        scope = {name: target.placeholder(name, storage) for name in ("read", "write", "T")}
        exec(self.text(pack_size(storage)), scope)
        return target.compile(scope[self.name], "device", storage)


def _gather_text(width: int) -> str:
    taken = ", ".join(f"read(a, i + {j}) if n > {j} else T(0)" for j in range(width))
    return f"def gather(a, i, n):\n    return {taken}\n"


def _scatter_text(width: int) -> str:
    lines = [f"    if n > {j}:\n        write(a, i + {j}, x[{j}])" for j in range(width)]
    return "\n".join(["def scatter(a, i, x, n):", *lines, ""])


gather: Any = _Loose("gather", _gather_text)
scatter: Any = _Loose("scatter", _scatter_text)


def _spread_text(width: int) -> str:
    lines = [f"    a[i + {j} * step] = x[{j}]" for j in range(width)]
    return "\n".join(["def spread(a, i, x, step):", *lines, ""])


def _zeros_text(width: int) -> str:
    return f"def zero_pack():\n    return {', '.join(['T(0)'] * width)}\n"


spread: Any = _Loose("spread", _spread_text)
zero_pack: Any = _Loose("zero_pack", _zeros_text)


@device
def read_pack(a: Any, i: Any, n: Any, aligned: Any) -> Any:
    """The pack from element `i` on, of which the first `n` exist."""
    if aligned != 0 and n >= LANES:
        return load(a, i)
    return gather(a, i, n)


@device
def write_pack(a: Any, i: Any, x: Any, n: Any, aligned: Any) -> None:
    """Store the first `n` of a pack from element `i` on."""
    if aligned != 0 and n >= LANES:
        store(a, i, x)
    else:
        scatter(a, i, x, n)


# -- kernels --------------------------------------------------------------------------------------


class _Bindings(dict[str, Template]):
    """What a body's names are bound to; packed functions follow their placeholders."""

    def get(self, name: str, default: Any = None) -> Any:
        value = super().get(name, default)
        return value.following(self) if isinstance(value, Packed) else value


class Kernel(Template):
    """A kernel body: `body["float32"]` can be launched on arrays of that storage."""

    def __init__(
        self, function: Callable[..., Any], role: str, bound: dict[str, Template] | None = None
    ) -> None:
        super().__init__(function, role, bound)
        self.bound = _Bindings(self.bound)
        self._entries: dict[str, Entry] = {}

    def __getitem__(self, storage: str) -> Entry:
        try:
            return self._entries[storage]
        except KeyError:
            from gpugrad.kernels.cuda.launch import Entry

            return self._entries.setdefault(storage, Entry(self, storage))

    def bind(self, **templates: Template) -> Kernel:
        return super().bind(**templates)  # type: ignore[return-value]

    def named(self, name: str) -> Kernel:
        """Itself, with a name for its entries: shorter than that of all its parts."""
        self.name = name
        return self

    @property
    def family(self) -> str:
        """The file that it is declared in."""
        return self.function.__module__.rpartition(".")[2]

    def signature(self, storage: str) -> tuple[str, ...]:
        """The types of its arguments: dtypes, with a `*` for pointers; half precision is uint16."""
        found = []
        bits = {"float16": "uint16", "bfloat16": "uint16"}.get(storage, storage)
        for name in inspect.signature(self.function).parameters:
            annotation = self.function.__annotations__.get(name)
            if annotation not in SPELLING:
                raise DeclarationError(
                    f"{self.name}: argument {name} has no type; annotate it with one of "
                    f"{', '.join(SPELLING)}"
                )
            spelt = SPELLING[annotation]
            found.append(spelt.replace("S", bits).replace("T", arithmetic(storage)))
        return tuple(found)


def kernel(function: Callable[..., Any]) -> Kernel:
    """Declare a kernel. Its module must have `from __future__ import annotations`."""
    return Kernel(function, "kernel")


# -- what a kernel is made of ---------------------------------------------------------------------


def digest(template: Template, storage: str) -> str:
    """A digest of every text that a kernel is made of, the same on every Python version."""
    return hashlib.sha256("\n".join(_texts(template, storage, {})).encode()).hexdigest()[:32]


def _texts(value: Any, storage: str, seen: dict[int, int]) -> Iterator[str]:
    if isinstance(value, Placeholder) and value.name in SCALARS:
        value = getattr(scalars, value.name)
        storage = arithmetic(storage)
    if isinstance(value, scalars.Typed):
        value = value._values[arithmetic(storage)]
    if not isinstance(value, Template):
        yield _plain(value)
        return
    if id(value) in seen:
        yield f"part {seen[id(value)]}"
        return
    seen[id(value)] = len(seen)
    if isinstance(value, _Count):
        yield f"{value.packs * pack_size(storage)}"
        return
    if isinstance(value, Packed | _Loose):
        yield value.text(pack_size(storage))
        if isinstance(value, Packed):
            yield from _texts(value.scalar, storage, seen)
        return
    yield f"{value.role} {value.name}"
    yield _source(value)
    own = value.function.__globals__
    for name in sorted(set(_names(value.function.__code__))):
        if name in own or name in value.bound:
            yield f"{name}:"
            yield from _texts(value.bound.get(name, own.get(name)), storage, seen)


def _plain(value: Any) -> str:
    if isinstance(value, FunctionType | type) or inspect.ismodule(value):
        return f"{getattr(value, '__module__', '')}.{value.__name__}"
    return repr(value)


def _source(template: Template) -> str:
    text = getattr(template, "text", None)
    if text is not None:
        return str(text)
    try:
        return inspect.getsource(template.function)
    except OSError:  # typed in at a prompt
        code = template.function.__code__
        return f"{code.co_code.hex()} {code.co_consts} {code.co_names}"
