"""Functions that run as programs: `gpugrad.compile`."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from types import MethodType
from typing import Any

from gpugrad.backend import SPACES, kernels, on_register
from gpugrad.backend.kernels import kernel_mode
from gpugrad.core import calls, codegen, modes
from gpugrad.core.autocast import current_autocast
from gpugrad.core.program import Program
from gpugrad.core.settings import exact
from gpugrad.core.tensor import Tensor
from gpugrad.core.trace import Trace, active
from gpugrad.core.tree import flatten
from gpugrad.core.walk import on_walk
from gpugrad.errors import CompileError

__all__ = ["Compiled", "compile"]

#: Calls that may differ from the one before until it is an error: states that are made in a first
#: call, and the like.
TRIES = 3

#: Programs that are kept for arguments of one kind: in training and in evaluation mode, say.
KEPT = 4

#: Kinds of arguments that are known at a time; the one that came first goes first.
KINDS = 128

#: What a function may return beside tensors.
_VALUES = (bool, int, float, complex, str, bytes, type(None))

#: Stands for a tensor in the form of a result.
_TENSOR = object()


class _Kind:
    """What is known for arguments of one kind."""

    def __init__(self) -> None:
        self.programs: list[tuple[Program, Callable[[list[Any]], Any]]] = []
        #: The last call in each state of modules, and how often one differed from that before.
        self.last: dict[Any, tuple[Trace, Any]] = {}
        self.failed: dict[Any, int] = {}


_epoch = [0]


@on_register
def _forget() -> None:
    _epoch[0] += 1


#: Attributes that are not the function's.
_OWN = ("function", "_name", "_kinds", "_epoch")


class Compiled:
    """A function of tensors that runs as a program; see :func:`compile`.

    Attributes of the function, or module, are found here, too.

    Attributes
    ----------
    function:
        What was compiled.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        update_wrapper(self, function, updated=())
        self.function = function
        self._name = getattr(function, "__name__", type(function).__name__)
        self._kinds: dict[Any, _Kind] = {}
        self._epoch = _epoch[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if active() or _looked_at():
            return self.function(*args, **kwargs)
        plain = not kwargs
        for x in args:
            if not isinstance(x, Tensor):
                plain = False
        leaves: Any = args
        shape: Any = len(args)
        if not plain:
            leaves, rebuild = flatten((args, kwargs))
            shape = _skeleton((args, kwargs))
        key = (shape, modes.is_grad_enabled(), kernel_mode(), *self._facts(leaves))
        if self._epoch != _epoch[0]:
            self._kinds.clear()
            self._epoch = _epoch[0]
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind()
            if len(self._kinds) > KINDS:
                del self._kinds[next(iter(self._kinds))]
        tensors = args if plain else [x for x in leaves if isinstance(x, Tensor)]
        for program, finish in kind.programs:
            if program.holds():
                drawn = [generator.state for generator in program.generators]
                try:
                    return finish(program.run(tensors))
                except Exception:
                    if program.acts:  # it has changed something
                        raise
                    for generator, state in zip(program.generators, drawn):
                        generator.state = state
                    self.function(*args, **kwargs)  # says best what is wrong
                    raise
        if plain:
            leaves, rebuild = flatten((args, kwargs))
        return self._traced(kind, leaves, rebuild)

    def _facts(self, leaves: Any) -> list[Any]:
        """What a program depends on, of each argument."""
        setting = current_autocast()
        found: list[Any] = []
        if setting is not None and setting.enabled:
            found.append((setting.device_type, setting.dtype))
        for x in leaves:
            if isinstance(x, Tensor):
                data = x.data
                kind = data.__class__
                strides = getattr(data, "strides", None)
                found.append((kind, data.shape, data.dtype, strides, x._node is None))
                if not SPACES[kind].on_host:
                    found.append(x.device)
            else:
                try:
                    hash(x)
                except TypeError:
                    raise CompileError(
                        f"compile: {self._name} got a {type(x).__name__}; arguments are tensors, "
                        "or values that can be compared and hashed (gg.asarray makes a tensor of "
                        "an array)"
                    ) from None
                found.append(exact(x))
        return found

    def _traced(self, kind: _Kind, leaves: Any, rebuild: Any) -> Any:
        """Run the function as it is, and make a program when it has done the same twice."""
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        trace = Trace(self._name, self.function, tensors)
        fresh = iter(trace.inputs)
        args, kwargs = rebuild([next(fresh) if isinstance(x, Tensor) else x for x in leaves])
        with trace.taken():
            out = self.function(*args, **kwargs)
        found, finish = flatten(out)
        others = [x for x in found if not isinstance(x, Tensor)]
        outputs = [x for x in found if isinstance(x, Tensor)]
        if trace.watched:
            kind.last.clear()
            return out
        for x in others:
            if not isinstance(x, _VALUES):
                raise CompileError(
                    f"compile: {self._name} returns a {type(x).__name__}; return tensors and plain "
                    "values, in tuples, lists and dictionaries"
                )
        for y in outputs:
            trace.result(y)
        state = trace.state()
        before = kind.last.get(state)
        difference = None if before is None else trace.difference(before[0])
        if before is not None and difference is None and exact(before[1]) != exact(others):
            difference = f"it returned {before[1]}, and then {others}"
        if before is None or difference is not None or not trace.may_be_constant(before[0]):
            trace.release()
            trace.forget()
            kind.last[state] = trace, others
            if len(kind.last) > KEPT:
                del kind.last[next(iter(kind.last))]
            if difference is not None:
                kind.failed[state] = kind.failed.get(state, 0) + 1
                if kind.failed[state] >= TRIES:
                    raise CompileError(
                        f"compile: {self._name} does not do the same in every call: {difference}. "
                        "What changes from call to call must be an argument, or be computed by "
                        "operations"
                    )
            return out
        program = Program(trace, before[0], outputs)
        trace.release()
        simple = len(found) == 1 and found[0] is out
        # What is kept of the result is its form: `found` is the list that `finish` holds on to.
        found[:] = [_TENSOR if isinstance(x, Tensor) else x for x in found]

        def finished(results: list[Tensor]) -> Any:
            rest = iter(results)
            return finish([next(rest) if x is _TENSOR else x for x in found])

        kind.programs.insert(0, (program, (lambda results: results[0]) if simple else finished))
        del kind.programs[KEPT:]
        del kind.last[state]
        kind.failed.clear()
        return out

    @property
    def text(self) -> str:
        """The newest program, as Python: what is done forward, and then backward.

        Raises CompileError before there is one: the first two calls of a kind run as usual.
        """
        for kind in reversed(self._kinds.values()):
            for program, _ in kind.programs:
                return program.text
        raise CompileError(
            f"compile: {self._name} has no program yet; call it twice with arguments of one kind"
        )

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """A method, where a function in a class was compiled."""
        return self if instance is None else MethodType(self, instance)

    def __getattr__(self, name: str) -> Any:
        if name == "function":  # before there is one, while a copy is made
            raise AttributeError(name)
        return getattr(self.function, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN or name.startswith("__"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.function, name, value)

    def __reduce__(self) -> Any:
        """A copy has programs of its own."""
        return Compiled, (self.function,)

    def __repr__(self) -> str:
        return f"<compiled {self.function!r}>"


def _looked_at() -> bool:
    """Whether somebody is to see each operation, which a program would hide."""
    return bool(
        calls.told
        or codegen.watching
        or on_walk
        or (modes.gate and modes.keeps_results())
        or (kernels.gate and kernels.is_noted())
    )


def _skeleton(tree: Any) -> Any:
    """What a tree of arguments looks like without its leaves."""
    kind = type(tree)
    if kind is dict:
        return dict, tuple((exact(k), _skeleton(v)) for k, v in tree.items())
    if isinstance(tree, tuple) or kind is list:
        return kind, tuple(map(_skeleton, tree))
    if isinstance(tree, dict | list):
        raise CompileError(
            f"compile: got a {kind.__name__}; arguments are nested in tuples, lists and "
            "dictionaries of Python's own"
        )
    return tree is None


def compile(function: Callable[..., Any]) -> Compiled:
    """Let a function of tensors, or a module, run as a program made for its arguments.

    The first two calls with arguments of one kind run as usual, and are watched. Later ones do what
    these did without anything in between: no module is called, no graph is built, and no order is
    looked for on the way back. Results, gradients and random numbers are the same to the last bit.
    For training, compile what computes the loss, and call `backward` and the optimiser as usual::

        loss_of = gg.compile(lambda x, y: F.cross_entropy(model(x), y))
        for x, y in loader:
            optimizer.zero_grad()
            loss_of(x, y).backward()
            optimizer.step(clip=1.0)

    Or compile the whole step. Backward passes, `zero_grad`, optimisers, schedulers, loss scaling,
    `clip_grad_norm_` and averages of weights may be inside; what is returned has no graph then::

        @gg.compile
        def step(x, y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step(clip=1.0)
            return loss

    On the CPU the launches of such a step are noted once, with up to 64 MiB of memory that is kept
    for them, and made again from then on with nothing in between.

    Parameters
    ----------
    function:
        Takes tensors, nested in tuples, lists and dictionaries, and other values that can be
        hashed and do not change; returns tensors, nested likewise. Tensors from outside, such as
        the parameters of a model, are used with the values that they have in each call.

    Returns
    -------
    A :class:`Compiled`, which is called like the function. Its `text` is the program as Python.

    Arguments are of one kind when their shapes, dtypes, devices and orders in memory are equal, and
    those that are no tensors are; each kind has a program of its own. So has each mode (`train`,
    `eval`, `no_grad`, `autocast`, `use_kernels`), and a module that gets another part, parameter or
    setting gets another program. What else Python does is not done again: prints, counters, `if`,
    names that come to mean something else. Where a tensor is used inside and outside, and more than
    once inside, its gradients are added in another order. While modules have hooks, or somebody
    watches (`explain`, `detect_anomaly`, a `Monitor` in the steps that it records), the function
    runs as it is.

    Raises CompileError where a program could not do the same: the function looks at values
    (`item`, `if`), runs a backward pass that goes on outside of it, or computes with other means
    than operations. As JAX's `jit`, with the interface of PyTorch's `torch.compile`.

    >>> import gpugrad as gg
    >>> w = gg.tensor([2.0, 3.0], requires_grad=True)
    >>> loss_of = gg.compile(lambda x: gg.sum(gg.tanh(x * w)))
    >>> for _ in range(3):
    ...     w.grad = None
    ...     loss_of(gg.tensor([0.5, 1.0])).backward()
    >>> w.grad
    tensor([0.20998717, 0.00986604])
    >>> print(loss_of.text)
    def forward(x0):
        w0 = tensor_w0.data
        t0 = multiply(x0, w0)
        t1 = tanh(t0)
        del t0
        t2 = sum(t1, axis=None, dtype=None, keepdims=False)
        t2 = normalise(t2, kind)
        return [t2], [t1, x0]
    <BLANKLINE>
    def backward(g, kept, ends):
        t1, x0 = kept
        kept.clear()
        p0, = ends
        g_t2 = g
        g_t1 = sum_vjp0(g_t2, m, (2,), c1, None, None, False)
        del g_t2
        g_t0 = tanh_vjp0(m, g_t1, t1)
        del g_t1, t1
        g_p0 = multiply_vjp1(g_t0, x0)
        del g_t0, x0
        return (p0, g_p0),
    """
    if not callable(function):
        raise CompileError(
            f"compile: {type(function).__name__} is not callable; give a function or a module"
        )
    return function if isinstance(function, Compiled) else Compiled(function)
