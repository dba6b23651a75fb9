"""The one file that knows which compiler makes PTX out of kernel bodies.

There are three of one dialect: numba-cuda (which puts itself in the place of `numba.cuda`), Numba's
own CUDA target, and numba-cuda-mlir. The first that proves usable by compiling a kernel is taken;
`GPUGRAD_CUDA_COMPILER` names another. None of them needs a GPU or a driver here.

Kernels are compiled with contraction of `a * b + c` to one rounding and without other liberties: no
approximate division or square root, subnormal numbers kept. Functions that a body calls are inlined
without exception.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import RLock
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from gpugrad.errors import GpugradError, KernelError
from gpugrad.kernels.cuda.assembly import portable
from gpugrad.kernels.cuda.language import Kernel, pack_size
from gpugrad.kernels.cuda.snippets import Snippet, snippets
from gpugrad.kernels.template import arithmetic

__all__ = ["ARCHITECTURE", "compile_kernel", "survey", "toolchain", "usable", "versions"]

#: Compute capability of the PTX; the driver makes code for its GPU out of it, this one or newer.
ARCHITECTURE = (8, 0)

_lock = RLock()

Architecture = tuple[int, int]
Signature = tuple[str, ...]


class Compiler(Protocol):
    """One of the compilers, made usable."""

    name: str
    packages: tuple[str, ...]

    def placeholder(self, name: str, storage: str) -> Any:
        """What stands for a placeholder in a body."""

    def device(self, function: Callable[..., Any]) -> Any:
        """A scalar function that bodies may call."""

    def ptx(
        self, function: Callable[..., Any], signature: Signature, architecture: Architecture
    ) -> str:
        """The text of a kernel, under whatever name."""


class _Target:
    """A compiler and an architecture as a target of `kernels/template.py`."""

    def __init__(self, compiler: Compiler, architecture: Architecture) -> None:
        self.name = f"cuda {compiler.name} sm_{architecture[0]}{architecture[1]}"
        self.placeholder = compiler.placeholder
        self._device = compiler.device

    def compile(self, function: Callable[..., Any], role: str, storage: str) -> Any:
        # A kernel is compiled for its signature, which only the one who asks for it knows.
        return function if role == "kernel" else self._device(function)


@contextmanager
def _alone() -> Iterator[None]:
    """One thread compiles at a time. What the compiler warns of itself is no concern of a user."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compile_kernel(
    kernel: Kernel, storage: str, name: str, architecture: Architecture = ARCHITECTURE
) -> str:
    """The portable PTX of a kernel for a storage, with the entry called `name`.

    Raises
    ------
    KernelError
        No compiler is usable, or it refuses the body; with the compiler's message.
    """
    compiler = usable()
    with _alone():
        try:
            body = kernel.instance(_Target(compiler, architecture), storage)
            text = compiler.ptx(body, kernel.signature(storage), architecture)
        except GpugradError:
            raise
        except Exception as error:
            raise KernelError(
                f"{name}: {compiler.name} cannot compile it for sm_{architecture[0]}"
                f"{architecture[1]}: {type(error).__name__}: {error}"
            ) from error
    return portable(text, name)


# -- which one ------------------------------------------------------------------------------------


def usable() -> Compiler:
    """The compiler that is used in this process.

    Raises
    ------
    KernelError
        None can be used; it says why each cannot, and how to install one.
    """
    found, reasons = _search(os.environ.get("GPUGRAD_CUDA_COMPILER", ""))
    if found is None:
        told = "".join(f"\n  {name}: {why}" for name, why in reasons.items())
        raise KernelError(
            f"no compiler for CUDA kernels is usable here:{told}\n"
            'Install one: pip install "nvidia-cuda-nvcc-cu12==12.4.*"'
        )
    return found


def survey() -> dict[str, str]:
    """For each compiler an empty text if it is usable, and else the reason why not."""
    return {name: _search(name)[1].get(name, "") for name in _COMPILERS}


@cache
def _search(wanted: str) -> tuple[Compiler | None, dict[str, str]]:
    if wanted and wanted not in _COMPILERS:
        raise KernelError(
            f"GPUGRAD_CUDA_COMPILER is {wanted!r}; it must be one of {', '.join(_COMPILERS)}"
        )
    reasons = {}
    for name in [wanted] if wanted else _COMPILERS:
        with _alone():
            try:
                compiler = _COMPILERS[name]()
                # Installed is not usable: parts are missing, or do not fit each other.
                compiler.ptx(_trial, ("float32*", "int64"), ARCHITECTURE)
            except Exception as error:
                first = (str(error).strip() or "no message").splitlines()[0]
                reasons[name] = f"{type(error).__name__}: {first}"
            else:
                return compiler, reasons
    return None, reasons


def _trial(x: Any, n: Any) -> None:
    if n > 0:
        x[0] = np.float32(n)


def versions() -> dict[str, str]:
    """What made a text: with the same, it would be made the same again."""
    compiler = usable()
    with _alone():
        text = compiler.ptx(_trial, ("float32*", "int64"), ARCHITECTURE)
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    packages = {name: importlib.metadata.version(name) for name in compiler.packages}
    return {"compiler": compiler.name, **packages, "nvvm": found[1] if found else "unknown"}


@cache
def toolchain() -> str:
    """Versions of all that may take part in compiling, without importing any of it."""
    packages = (
        "numba", "numba-cuda", "numba-cuda-mlir", "llvmlite",
        "nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc", "nvidia-nvvm",
    )  # fmt: skip
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


@contextmanager
def _assumed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """The compilers ask the driver for its GPU even where they are told the architecture."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# -- Numba's own target, and numba-cuda -----------------------------------------------------------


class _Numba:
    """Both have one interface, `numba.cuda`, and differ in a few keywords."""

    name = "numba"
    packages: tuple[str, ...] = ("numba", "llvmlite")

    def __init__(self) -> None:
        self._check()
        with _row_stack():
            from numba import cuda
            from numba.core import config, types

            if config.ENABLE_CUDASIM:
                raise KernelError("NUMBA_ENABLE_CUDASIM is set, which replaces it by a simulator")
            from numba.cuda import dispatcher
            from numba.cuda.compiler import compile_cuda

            self._find_toolkit()
        self.cuda = cuda
        self._types: Any = types
        self._dispatcher = dispatcher
        known = inspect.signature(compile_cuda).parameters
        self._inlined = {"forceinline" if "forceinline" in known else "inline": True}
        self._placeholders = _numba_placeholders(self)

    def _check(self) -> None:
        if importlib.util.find_spec("numba_cuda") is not None:
            raise KernelError("numba-cuda is installed and has taken its place")

    def _find_toolkit(self) -> None:
        from numba.cuda import cuda_paths

        _use_wheels(cuda_paths)

    def placeholder(self, name: str, storage: str) -> Any:
        return _lookup(self._placeholders, name, storage)

    def device(self, function: Callable[..., Any]) -> Any:
        return self.cuda.jit(device=True, **self._inlined)(function)

    def ptx(
        self, function: Callable[..., Any], signature: Signature, architecture: Architecture
    ) -> str:
        arguments = [self._type(spelt) for spelt in signature]
        gpu = SimpleNamespace(compute_capability=architecture)
        with _row_stack(), _assumed(self._dispatcher, "get_current_device", lambda: gpu):
            text, _ = self.cuda.compile(
                function, self._types.void(*arguments), device=False, abi="numba",
                cc=architecture, fastmath=False,
            )  # fmt: skip
        return str(text)

    def _type(self, spelt: str) -> Any:
        element = getattr(self._types, spelt.removesuffix("*"))
        return self._types.CPointer(element) if spelt.endswith("*") else element


class _NumbaCuda(_Numba):
    name = "numba-cuda"
    packages = ("numba", "llvmlite", "numba-cuda")

    def _check(self) -> None:
        if importlib.util.find_spec("numba_cuda") is None:
            raise KernelError("not installed")

    def _find_toolkit(self) -> None:
        """It finds the wheels by itself."""


@contextmanager
def _row_stack() -> Iterator[None]:
    """numba-cuda 0.30 names a function that NumPy 2.5 has dropped (NVIDIA/numba-cuda#907)."""
    if hasattr(np, "row_stack"):
        yield
        return
    np.row_stack = np.vstack  # noqa: NPY201
    try:
        yield
    finally:
        del np.row_stack  # noqa: NPY201


def _use_wheels(cuda_paths: Any) -> None:
    """Numba's own target looks for NVVM where CUDA is installed, not among the installed wheels."""
    if "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        libraries = sorted(Path(place).glob("*/nvvm/lib64/libnvvm.so*"))
        bitcode = sorted(Path(place).glob("*/nvvm/libdevice/libdevice*.bc"))
        if libraries and bitcode:
            # What it found is kept there, and looked up each time.
            found = dict(cuda_paths.get_cuda_paths())
            for name, path in (("nvvm", libraries[-1]), ("libdevice", bitcode[-1])):
                found[name] = type(found[name])("installed package", str(path))
            cuda_paths.get_cuda_paths._cached_result = found


def _numba_placeholders(compiler: _Numba) -> dict[Any, Any]:
    cuda = compiler.cuda
    from numba.cuda import libdevice

    return {
        **_plain_functions(compiler.device, cuda, libdevice),
        **{key: _numba_intrinsic(snippet) for key, snippet in snippets().items()},
    }


def _plain_functions(inlined: Any, cuda: Any, libdevice: Any) -> dict[Any, Any]:
    """What is written in the dialect itself, for each of the compilers."""

    def where(c: Any, a: Any, b: Any) -> Any:
        return a if c else b

    def maximum(a: Any, b: Any) -> Any:
        return a if a >= b or not (a == a) else b  # noqa: SIM201

    def minimum(a: Any, b: Any) -> Any:
        return a if a <= b or not (a == a) else b  # noqa: SIM201

    def shuffle(x: Any, mask: Any) -> Any:
        return cuda.shfl_xor_sync(0xFFFFFFFF, x, mask)

    def sqrt32(x: Any) -> Any:
        return libdevice.sqrtf(x)

    def sqrt64(x: Any) -> Any:
        return libdevice.sqrt(x)

    def floor32(x: Any) -> Any:
        return libdevice.floorf(x)

    def floor64(x: Any) -> Any:
        return libdevice.floor(x)

    def absolute32(x: Any) -> Any:
        return libdevice.fabsf(x)

    def absolute64(x: Any) -> Any:
        return libdevice.fabs(x)

    found: dict[Any, Any] = {
        "cuda": cuda,
        ("T", "float32"): np.float32, ("T", "float64"): np.float64,
        ("I", "float32"): np.int32, ("I", "float64"): np.int64,
        ("sqrt", "float32"): inlined(sqrt32), ("sqrt", "float64"): inlined(sqrt64),
        ("floor", "float32"): inlined(floor32), ("floor", "float64"): inlined(floor64),
        ("absolute", "float32"): inlined(absolute32), ("absolute", "float64"): inlined(absolute64),
    }  # fmt: skip
    for function in (where, maximum, minimum, shuffle):
        found[function.__name__] = inlined(function)
    return found


def _lookup(table: dict[Any, Any], name: str, storage: str) -> Any:
    if name == "LANES":
        return pack_size(storage)
    for key in ((name, storage), (name, arithmetic(storage)), name):
        if key in table:
            return table[key]
    raise KernelError(f"{name} has no meaning in a CUDA kernel")


def _numba_intrinsic(snippet: Snippet) -> Any:
    """A snippet as a function that Numba's bodies may call."""
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    types: Any = importlib.import_module("numba.core.types")
    numba_types = {
        "f": types.float32, "d": types.float64, "r": types.int32, "l": types.int64,
        "h": types.uint16,
    }  # fmt: skip
    llvm_types = {
        "f": ir.FloatType(), "d": ir.DoubleType(), "r": ir.IntType(32), "l": ir.IntType(64),
        "h": ir.IntType(16),
    }  # fmt: skip
    out = [llvm_types[c] for c in snippet.results]
    result = ir.LiteralStructType(out) if len(out) > 1 else out[0] if out else ir.VoidType()
    constraints = ",".join([*(f"={c}" for c in snippet.results), *snippet.arguments])

    def typed(*arguments: Any) -> Any:
        numbers = [numba_types[c] for c in snippet.results]
        if len(numbers) > 1:
            returned = types.UniTuple(numbers[0], len(numbers))
        else:
            returned = numbers[0] if numbers else types.void
        taken = []
        letters = iter(snippet.arguments)
        for argument in arguments:
            if isinstance(argument, types.CPointer):
                next(letters)
                taken.append(argument)
            elif isinstance(argument, types.BaseTuple):
                wanted = [numba_types[next(letters)] for _ in range(len(argument))]
                taken.append(types.UniTuple(wanted[0], len(wanted)))
            else:
                taken.append(numba_types[next(letters)])
        return returned(*taken)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values: list[Any] = []
        for kind, value in zip(signature.args, args):
            if isinstance(kind, types.CPointer):
                values.append(builder.ptrtoint(value, llvm_types["l"]))
            elif isinstance(kind, types.BaseTuple):
                values += [builder.extract_value(value, j) for j in range(len(kind))]
            else:
                values.append(value)
        function = ir.FunctionType(result, [v.type for v in values])
        made = builder.asm(function, snippet.text, constraints, values, snippet.memory)
        if not out:
            return context.get_dummy_value()
        if len(out) == 1:
            return made
        parts = [builder.extract_value(made, j) for j in range(len(out))]
        return context.make_tuple(builder, signature.return_type, parts)

    # An intrinsic's arguments are read off its signature.
    if snippet.names == "x":

        def one(typing: Any, x: Any) -> Any:
            return typed(x), code

        return intrinsic(one)
    if snippet.names == "a, i":

        def two(typing: Any, a: Any, i: Any) -> Any:
            return typed(a, i), code

        return intrinsic(two)

    def three(typing: Any, a: Any, i: Any, x: Any) -> Any:
        return typed(a, i, x), code

    return intrinsic(three)


# -- numba-cuda-mlir ------------------------------------------------------------------------------


class _Mlir:
    """numba-cuda-mlir, the successor of both."""

    name = "numba-cuda-mlir"
    packages: tuple[str, ...] = ("numba-cuda-mlir",)

    def __init__(self) -> None:
        if importlib.util.find_spec("numba_cuda_mlir") is None:
            raise KernelError("not installed")
        cuda, tools, types, experimental, libdevice = (
            importlib.import_module(f"numba_cuda_mlir.{name}")
            for name in ("cuda", "tools", "types", "cuda.experimental", "cuda.libdevice")
        )
        self.cuda = cuda
        self._types = types
        self._tools = tools
        inlined = cuda.jit(device=True)
        self._placeholders = {
            **_plain_functions(inlined, cuda, libdevice),
            **{
                key: inlined(_mlir_function(snippet, experimental))
                for key, snippet in snippets().items()
            },
        }

    def placeholder(self, name: str, storage: str) -> Any:
        return _lookup(self._placeholders, name, storage)

    def device(self, function: Callable[..., Any]) -> Any:
        return self.cuda.jit(device=True)(function)

    def ptx(
        self, function: Callable[..., Any], signature: Signature, architecture: Architecture
    ) -> str:
        arguments = [self._type(spelt) for spelt in signature]
        with _assumed(self._tools, "_cached_cc", architecture):
            text, _ = self.cuda.compile(
                function, self._types.void(*arguments), device=False, abi="numba", cc=architecture,
                fastmath=False,
            )  # fmt: skip
        return str(text)

    def _type(self, spelt: str) -> Any:
        element = getattr(self._types, spelt.removesuffix("*"))
        return self._types.CPointer(element) if spelt.endswith("*") else element


def _mlir_function(snippet: Snippet, experimental: Any) -> Callable[..., Any]:
    """A snippet as the text of a function."""
    zero = {"f": "float32(0)", "d": "float64(0)", "r": "int32(0)", "l": "int64(0)"}
    names = snippet.names.split(", ")
    count = len(snippet.arguments) - len(names) + 1
    given = names[:-1] + ([f"{names[-1]}{j}" for j in range(count)] if count > 1 else names[-1:])
    lines = [f"def snippet({snippet.names}):"]
    if count > 1:
        lines.append(f"    {', '.join(given[-count:])} = {names[-1]}")
    pairs = [f"'={c}', np.{zero[c]}" for c in snippet.results]
    pairs += [f"'{c}', {value}" for c, value in zip(snippet.arguments, given)]
    text = snippet.text.replace("$", "%")
    lines.append(f"    return experimental.inline_ptx({text!r}, {', '.join(pairs)})")
    scope: dict[str, Any] = {"np": np, "experimental": experimental}
    exec("\n".join(lines), scope)
    function: Callable[..., Any] = scope["snippet"]
    return function


#: In the order in which they are tried.
_COMPILERS: dict[str, type[_Numba] | type[_Mlir]] = {
    "numba-cuda": _NumbaCuda, "numba": _Numba, "numba-cuda-mlir": _Mlir,
}  # fmt: skip
