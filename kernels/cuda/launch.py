"""How kernels run on a GPU: their PTX from the wheel, the disk or the compiler, and their grids.

PTX is loaded through CuPy's module loader, whose launches cost a tenth of Numba's. A kernel runs on
CuPy's current stream.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from gpugrad.errors import KernelError
from gpugrad.kernels import disk
from gpugrad.kernels.cuda import assembly
from gpugrad.kernels.cuda.language import Kernel, digest
from gpugrad.kernels.template import STORAGE, arithmetic

__all__ = ["Entry", "Gpu", "Machine", "machine", "number_type", "storage_of", "warm_up"]

SHIPPED = Path(__file__).with_name("ptx")

#: That of the shipped PTX, and of what is compiled at run time. A GPU that is older gets its own.
ARCHITECTURE = (8, 0)

_lock = RLock()


class Entry:
    """A kernel for one storage: what a grid is launched of.

    Attributes
    ----------
    name:
        Of the entry in PTX.
    casts:
        Positions of the arguments that are numbers of a type of their own, and the type. Other
        whole numbers are 64 bits wide, which is what CuPy makes of Python's.
    """

    def __init__(self, kernel: Kernel, storage: str) -> None:
        self.kernel = kernel
        self.storage = storage
        self.name = f"{kernel.name}_{storage}"
        signature = kernel.signature(storage)
        self.casts = tuple(
            (i, getattr(np, spelt))
            for i, spelt in enumerate(signature)
            if spelt in ("float32", "float64", "int32")
        )

    @cached_property
    def digest(self) -> str:
        """Of all the source text that the kernel is made of."""
        return digest(self.kernel, self.storage)

    def ptx(self, architecture: tuple[int, int] = ARCHITECTURE) -> str:
        """The kernel's text: shipped if that is made of the same source, else cached or compiled.

        Raises
        ------
        KernelError
            It has to be compiled and cannot be: with the compiler's message.
        """
        text = self.shipped() if architecture == ARCHITECTURE else None
        if text is None:
            path = disk.cache_folder() / "cuda" / f"{self.name[:80]}-{self._key(architecture)}.ptx"
            text = disk.read_text(path)
            if text is None:
                text = self.compiled(architecture)
                disk.write_text(path, text)
        return text

    def shipped(self) -> str | None:
        """The text in the package; None if there is none, or it is that of other source."""
        text, manifest = _family(self.kernel.family)
        if manifest.get(self.name, {}).get("source") != self.digest:
            return None
        return assembly.section(text, self.name)

    def compiled(self, architecture: tuple[int, int] = ARCHITECTURE) -> str:
        """The text made anew."""
        from gpugrad.kernels.cuda.compiler import compile_kernel

        return compile_kernel(self.kernel, self.storage, self.name, architecture)

    def _key(self, architecture: tuple[int, int]) -> str:
        parts = (self.name, self.digest, str(architecture), _makers())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def __repr__(self) -> str:
        return f"<entry {self.name}>"


@cache
def _makers() -> str:
    """The compilers that are installed, and our own part in compiling."""
    from gpugrad.kernels.cuda.compiler import toolchain

    ours = hashlib.sha256()
    for name in ("compiler.py", "assembly.py"):
        ours.update(Path(__file__).with_name(name).read_bytes())
    return f"{toolchain()} {ours.hexdigest()}"


@cache
def _family(name: str) -> tuple[str, dict[str, Any]]:
    try:
        text = (SHIPPED / f"{name}.ptx").read_text(encoding="utf-8")
        manifest = json.loads((SHIPPED / f"{name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "", {}
    return text, manifest["kernels"]


# -- where kernels run ----------------------------------------------------------------------------


class Machine:
    """The one grid policy, and where arrays and launches come from.

    Attributes
    ----------
    threads:
        In a block; a power of 2.
    wave:
        At most so many blocks where elements are independent; loops stride over the rest. Several
        times what the device holds at once, so that the last blocks leave little of it idle.
    parts:
        At most so many where sums are combined. It is the same on every GPU, so that results are
        the same bit for bit.
    chunks, blocks:
        At most so many rows of blocks, and blocks, where the rows of a matrix are combined.
    """

    threads = 256
    wave = 8192
    parts = 1024
    chunks = 512
    blocks = 4096

    def empty(self, shape: Any, dtype: Any) -> Any:
        raise NotImplementedError

    def address(self, x: Any) -> int:
        raise NotImplementedError

    def run(self, entry: Entry, blocks: tuple[int, ...], *args: Any) -> None:
        raise NotImplementedError

    def aligned(self, *arrays: Any) -> int:
        """1 if packs may be loaded from all of these arrays, else 0."""
        for x in arrays:
            if self.address(x) & 15:
                return 0
        return 1

    def flat(self, n: int, lanes: int) -> tuple[int]:
        """Blocks for `n` independent elements."""
        work = self.threads * lanes
        return (max(1, min((n + work - 1) // work, self.wave)),)

    def divided(self, n: int, lanes: int) -> tuple[int]:
        """Blocks for `n` elements that are combined: a matter of `n` alone."""
        work = self.threads * lanes
        return (max(1, min((n + work - 1) // work, self.parts)),)

    def tiled(self, rows: int, columns: int, lanes: int) -> Tiles:
        """A division of a matrix among blocks, for work along its columns: a matter of its shape.

        A block is `tile` packs of columns wide, and its threads stand in as many rows as fit.
        """
        packs = max(1, (columns + lanes - 1) // lanes)
        tile = min(32, 1 << (packs - 1).bit_length())
        across = (packs + tile - 1) // tile
        at_once = self.threads // tile
        # A chunk of rows has work for every thread four times, if there are so many rows.
        wanted = (rows + 4 * at_once - 1) // (4 * at_once)
        chunks = max(1, min(wanted, self.chunks, self.blocks // across))
        return Tiles(tile, across, chunks, (rows + chunks - 1) // chunks)


class Tiles:
    """A division of a matrix: see :meth:`Machine.tiled`.

    Attributes
    ----------
    tile:
        Packs in the width of a block, a power of 2.
    across, chunks:
        How many blocks stand beside each other and below each other.
    rows:
        In a chunk.
    """

    __slots__ = ("across", "chunks", "rows", "tile")

    def __init__(self, tile: int, across: int, chunks: int, rows: int) -> None:
        self.tile = tile
        self.across = across
        self.chunks = chunks
        self.rows = rows


class Gpu(Machine):
    """A CUDA GPU under CuPy."""

    def __init__(self, number: int) -> None:
        import cupy

        self.number = number
        self._cupy = cupy
        self._functions: dict[Entry, Any] = {}
        self._block = (self.threads,)
        self._several = cupy.cuda.runtime.getDeviceCount() > 1
        self._device = device = cupy.cuda.Device(number)
        self.wave = 64 * device.attributes["MultiProcessorCount"]
        capability = device.compute_capability
        self.architecture = min(ARCHITECTURE, (int(capability[:-1]), int(capability[-1])))

    def empty(self, shape: Any, dtype: Any) -> Any:
        if self._elsewhere():
            with self._device:
                return self._cupy.empty(shape, dtype)
        return self._cupy.empty(shape, dtype)

    def address(self, x: Any) -> int:
        return x.data.ptr  # type: ignore[no-any-return]

    def run(self, entry: Entry, blocks: tuple[int, ...], *args: Any) -> None:
        """Launch a grid on the current stream; arrays as they are, numbers as Python's."""
        try:
            function = self._functions[entry]
        except KeyError:
            function = self.load(entry)
        given = list(args)
        for i, cast in entry.casts:
            given[i] = cast(given[i])
        if self._elsewhere():
            with self._device:
                function(blocks, self._block, given)
        else:
            function(blocks, self._block, given)

    def _elsewhere(self) -> bool:
        """Whether another GPU is the current one."""
        return self._several and bool(self._cupy.cuda.runtime.getDevice() != self.number)

    def load(self, entry: Entry) -> Any:
        """The entry as a function of this GPU, from now on at hand."""
        with _lock:
            if entry not in self._functions:
                text = entry.ptx(self.architecture)
                with self._device:
                    self._functions[entry] = self._function(entry.name, text)
            return self._functions[entry]

    def _function(self, name: str, text: str) -> Any:
        module = self._cupy.cuda.function.Module()
        try:
            module.load(text.encode() + b"\0")
            return module.get_function(name)
        except RuntimeError as error:
            raise KernelError(
                f"{name}: the CUDA driver cannot load its PTX ({error}); the driver must be that "
                "of CUDA 12.0 or newer"
            ) from error


_gpus: dict[int, Machine] = {}

#: Machines for arrays of other types than CuPy's: a simulator's, a test's.
STAND_INS: dict[type, Machine] = {}


def machine(x: Any) -> Machine:
    """Where the array `x` lives, whichever device is the current one."""
    kind = type(x)
    if kind in STAND_INS:
        return STAND_INS[kind]
    if not kind.__module__.startswith("cupy"):
        raise KernelError(f"CUDA kernels take arrays on a GPU, not {kind.__name__}")
    try:
        return _gpus[x.data.device_id]
    except KeyError:
        return _gpu(x.data.device_id)


def _gpu(number: int) -> Machine:
    with _lock:
        if number not in _gpus:
            _gpus[number] = Gpu(number)
        return _gpus[number]


def warm_up(entries: Iterable[Entry], number: int = 0) -> None:
    """Load kernels on a GPU now, and not in the middle of a first step or of a graph's capture."""
    gpu = _gpu(number)
    assert isinstance(gpu, Gpu)
    for entry in entries:
        gpu.load(entry)


def storage_of(x: Any) -> str:
    """The name of the storage that an array's dtype is; "" for one that kernels do not take."""
    return _storage(x.dtype)


@cache
def _storage(dtype: Any) -> str:
    name = str(dtype)  # a few microseconds
    return name if name in STORAGE else ""


@cache
def number_type(storage: str) -> Any:
    """The NumPy type that elements of a storage are computed in."""
    return getattr(np, arithmetic(storage))
