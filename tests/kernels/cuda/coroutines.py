"""A GPU in plain Python, each of whose threads is a generator: quicker than threads of the host.

A body that waits for other threads, or calls one that does, is rewritten: it yields where it waits.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import warnings
from functools import cache
from types import FunctionType, SimpleNamespace

import numpy as np

from gpugrad.kernels.cuda.simulator import SIMULATOR, SimulatedGpu, _memory


def _shuffle(x, mask):
    raise AssertionError("a call of this is rewritten")


class _Waits(ast.NodeTransformer):
    """Calls that wait become yields: of nothing for the block, of what is exchanged in a warp."""

    def __init__(self, waiting):
        self.waiting = waiting

    def visit_Call(self, node):
        self.generic_visit(node)
        name = ast.unparse(node.func)
        if name == "cuda.syncthreads":
            return ast.Yield(None)
        if name == "shuffle":
            return ast.Yield(ast.Tuple(node.args, ast.Load()))
        return ast.YieldFrom(node) if name in self.waiting else node


@cache
def _rewritten(code, waiting):
    """The code of a body that waits itself, or in calls of those names."""
    text = textwrap.dedent(inspect.getsource(code))
    tree = _Waits(waiting).visit(ast.parse(text))
    tree.body[0].decorator_list = []
    scope: dict = {}
    # Annotations are names of the module, and are not asked for.
    tree.body[:0] = ast.parse("from __future__ import annotations").body
    exec(compile(ast.fix_missing_locations(tree), code.co_filename, "exec"), scope)
    return scope[code.co_name].__code__


class Pointer(np.ndarray):
    """Elements in a row, none of which is before the first."""

    def __getitem__(self, i):
        return super().__getitem__(_place(i))

    def __setitem__(self, i, x):
        super().__setitem__(_place(i), x)


def _place(i):
    if i < 0:
        raise IndexError(f"element {i}")
    return i


def _aligned(access):
    """Access to a pack, which is an error unless the pack is aligned to its width."""

    def checked(a, i, *pack):
        if (a.ctypes.data + i * a.itemsize) % 16:
            raise IndexError(f"the pack from element {i} on is not aligned")
        return access(a, i, *pack)

    return checked


class Coroutines:
    """A target; it holds what a running thread sees as `cuda`. Each has a name of its own, for
    instances are kept by name, and a body may have changed since the last one."""

    _number = itertools.count()

    def __init__(self):
        self.name = f"coroutines {next(self._number)}"
        self.cuda = SimpleNamespace(shared=SimpleNamespace(array=self.array))

    def placeholder(self, name, storage):
        own = {"cuda": self.cuda, "shuffle": _shuffle}
        found = own[name] if name in own else SIMULATOR.placeholder(name, storage)
        return _aligned(found) if name in ("load", "store") else found

    def compile(self, function, role, storage):
        code, scope = function.__code__, function.__globals__
        waiting = {n for n in code.co_names if inspect.isgeneratorfunction(scope.get(n))}
        if waiting or "syncthreads" in code.co_names or scope.get("shuffle") is _shuffle:
            return FunctionType(_rewritten(code, frozenset(waiting)), scope, function.__name__)
        return function

    def array(self, shape, dtype):
        """The thread's next array in shared memory; what is not written shows."""
        number = self.made[self.cuda.threadIdx.x]
        self.made[self.cuda.threadIdx.x] += 1
        if number == len(self.arrays):
            made = np.full(np.dtype(dtype).itemsize * shape, 0x7F, np.uint8)
            self.arrays.append(made.view(dtype).view(Pointer))
        return self.arrays[number]

    def run(self, body, grid, threads, args):
        """Blocks one after the other."""
        cuda = self.cuda
        cuda.gridDim = SimpleNamespace(**dict(zip("xyz", (*grid, 1, 1))))
        cuda.blockDim = SimpleNamespace(x=threads, y=1, z=1)
        for place in np.ndindex(*grid[::-1]):
            cuda.blockIdx = SimpleNamespace(**dict(zip("xyz", (*place[::-1], 0, 0))))
            self.arrays, self.made = [], [0] * threads
            if inspect.isgeneratorfunction(body):
                self._together(body, threads, args)
            else:
                for i in range(threads):
                    cuda.threadIdx = SimpleNamespace(x=i, y=0, z=0)
                    body(*args)

    def _together(self, body, count, args):
        """A block whose threads wait for each other."""
        threads = [body(*args) for _ in range(count)]
        places = [SimpleNamespace(x=i, y=0, z=0) for i in range(count)]
        answers: list = [None] * count
        alive = [min(32, count - first) for first in range(0, count, 32)]
        given: list[dict] = [{} for _ in alive]  # in each warp, what threads exchange
        barrier: list = []
        ready = list(range(count))
        while ready:
            for i in ready:
                self.cuda.threadIdx = places[i]
                try:
                    asked = threads[i].send(answers[i])
                except StopIteration:
                    alive[i >> 5] -= 1
                    continue
                if asked is None:
                    answers[i] = None
                    barrier.append(i)
                else:
                    given[i >> 5][i] = asked
            ready = []
            for warp, exchanged in enumerate(given):
                if exchanged and len(exchanged) == alive[warp]:
                    for i, (_, mask) in exchanged.items():
                        answers[i] = exchanged[i ^ mask][0]
                    ready += exchanged
                    given[warp] = {}
            if not ready and len(barrier) == sum(alive):
                ready, barrier = barrier, []
        assert not sum(alive), "threads wait for others that never come"


class QuickGpu(SimulatedGpu):
    """A GPU with NumPy arrays for memory."""

    def __init__(self):
        self.target = Coroutines()

    def run(self, entry, blocks, *args):
        given = [_memory(a).view(Pointer) if isinstance(a, np.ndarray) else a for a in args]
        for i, cast in entry.casts:
            given[i] = cast(given[i])
        body = entry.kernel.instance(self.target, entry.storage)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            self.target.run(body, blocks, self.threads, given)
