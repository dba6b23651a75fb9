"""The base of every layer and net: a tree of modules that own parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import numpy as np

from gpugrad.backend import as_dtype
from gpugrad.core.actions import action
from gpugrad.core.compiling import Compiled
from gpugrad.core.conversion import asarray, tensor
from gpugrad.core.graph import Leaf
from gpugrad.core.handle import RemovableHandle, add_hook
from gpugrad.core.modes import no_grad
from gpugrad.core.settings import settings
from gpugrad.core.tensor import Parameter, Tensor
from gpugrad.core.trace import Trace, active, instead, noticing
from gpugrad.errors import GpugradError
from gpugrad.nn.errors import ModuleError, StateDictError
from gpugrad.nn.hooks import Watch

__all__ = ["IncompatibleKeys", "Module", "Parameter"]

Hook = Callable[..., Any]


class IncompatibleKeys(NamedTuple):
    """What `Module.load_state_dict` passed over: names only the module, or only the state, has."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Module:
    """A part of a net: whatever is assigned to its attributes becomes part of it.

    A `Parameter` among the attributes is trained, a module is a child, a buffer (registered with
    `register_buffer`) is a tensor that is saved but not trained. They are plain attributes, so that
    reading one costs nothing. Subclasses define `forward`; calling the module runs it, and an error
    inside names the layer by its path.

    >>> import gpugrad as gg
    >>> class Scale(Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.factor = Parameter(gg.tensor(2.0))
    ...     def forward(self, x):
    ...         return x * self.factor
    >>> scale = Scale()
    >>> scale(gg.tensor(3.0)).item()
    6.0
    >>> list(scale.state_dict())
    ['factor']
    """

    training: bool = True

    #: Computes the module's result; defined by subclasses, called through the module itself.
    forward: Callable[..., Any]

    # Replaced, never changed, on an instance that has some: most modules have none, and a subclass
    # that forgets super().__init__() works all the same.
    _buffers: Mapping[str, bool] = {}  # name → persistent
    _hooks: Mapping[str, Mapping[int, Hook]] = {}  # kind → number → hook

    # -- running ----------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            if self._hooks:
                return self._run_with_hooks(args, kwargs)
            return self.forward(*args, **kwargs)
        except Exception as error:
            if not hasattr(self, "forward"):
                raise ModuleError(
                    f"{type(self).__name__} has no forward(); define what it computes"
                ) from None
            _locate(error, self)
            raise

    def _run_with_hooks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for hook in self._hooks_of("forward_pre"):
            changed = hook(self, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
        watched = "backward" in self._hooks or "backward_pre" in self._hooks
        if watched:
            watch = Watch(self, self._hooks_of("backward"), self._hooks_of("backward_pre"))
            args = watch.enter(args)
        out = self.forward(*args, **kwargs)
        for hook in self._hooks_of("forward"):
            changed = hook(self, args, out)
            if changed is not None:
                out = changed
        return watch.leave(out) if watched else out

    def _hooks_of(self, kind: str) -> list[Hook]:
        return list(self._hooks.get(kind, {}).values())

    def register_forward_hook(self, hook: Hook) -> RemovableHandle:
        """Call `hook(module, args, output)` after every forward; returns what removes it.

        What the hook returns, unless None, takes the output's place.
        """
        return add_hook(self, "forward", hook)

    def register_forward_pre_hook(self, hook: Hook) -> RemovableHandle:
        """Call `hook(module, args)` before every forward; returns what removes it.

        What the hook returns, unless None, takes the arguments' place.
        """
        return add_hook(self, "forward_pre", hook)

    def register_full_backward_hook(self, hook: Hook) -> RemovableHandle:
        """Call `hook(module, grad_input, grad_output)` once the gradients of the inputs are known.

        Both are tuples: for each positional argument and each output that is a tensor with a
        gradient, the gradient, and None for what else there is. What the hook returns, unless None,
        takes the place of `grad_input`; nothing may be changed in place. Where no input requires a
        gradient, it is called with what has arrived at the outputs. Returns what removes the hook.

        >>> import gpugrad as gg
        >>> from gpugrad import nn
        >>> layer = nn.Linear(2, 3)
        >>> norms = []
        >>> with layer.register_full_backward_hook(
        ...     lambda module, grad_input, grad_output: norms.append(grad_output[0].shape)
        ... ):
        ...     layer(gg.ones((4, 2))).sum().backward()
        >>> norms
        [(4, 3)]
        """
        return add_hook(self, "backward", hook)

    def register_full_backward_pre_hook(self, hook: Hook) -> RemovableHandle:
        """Call `hook(module, grad_output)` before the gradients of the inputs are computed.

        What the hook returns, unless None, takes the place of `grad_output`, a tuple as in
        `register_full_backward_hook`. Returns what removes the hook.
        """
        return add_hook(self, "backward_pre", hook)

    # -- putting together -------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        here = self.__dict__.get(name)
        if isinstance(here, Parameter) and not isinstance(value, Parameter | None):
            raise ModuleError(
                f"{type(self).__name__}.{name} is a parameter and {type(value).__name__} is not: "
                "the optimiser would keep training the old one; assign a Parameter or None, or "
                "change its values under no_grad()"
            )
        if isinstance(here, Module) and not isinstance(value, Module | None):
            raise ModuleError(
                f"{type(self).__name__}.{name} is a module and {type(value).__name__} is not; "
                "assign a module or None"
            )
        if name in self._buffers and not isinstance(value, Tensor | None):
            raise ModuleError(
                f"{type(self).__name__}.{name} is a buffer and {type(value).__name__} is no "
                "tensor; assign a tensor or None"
            )
        if isinstance(value, Compiled) and isinstance(value.function, Module):
            raise ModuleError(
                f"{type(self).__name__}.{name} is a compiled module, whose parameters nobody would "
                "find; assign the module, and compile the whole net"
            )
        settings[0] += 1
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        settings[0] += 1
        object.__delattr__(self, name)

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Make `param` the parameter `name`; None keeps the name for later."""
        self._check_name(name, param, Parameter)
        setattr(self, name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Make `tensor` a buffer: it moves with the module and, if persistent, is saved with it."""
        self._check_name(name, tensor, Tensor)
        self._buffers = {**self._buffers, name: persistent}
        setattr(self, name, tensor)

    def add_module(self, name: str, module: Module | None) -> None:
        """Make `module` the child `name`."""
        self._check_name(name, module, Module)
        setattr(self, name, module)

    register_module = add_module

    def _check_name(self, name: str, value: Any, kind: type) -> None:
        if not isinstance(name, str) or not name or "." in name:
            raise ModuleError(f"{name!r} cannot be a name here: a string without dots is needed")
        if not isinstance(value, kind | None):
            raise ModuleError(
                f"{name}: a {kind.__name__} or None is needed, not {type(value).__name__}"
            )
        here = getattr(self, name, None)
        if here is not None and not isinstance(here, kind):
            raise ModuleError(f"{type(self).__name__} has an attribute {name!r} already")

    # -- looking through --------------------------------------------------------------------------

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Name and module of every direct child."""
        for name, value in self.__dict__.items():
            if isinstance(value, Module):
                yield name, value

    def children(self) -> Iterator[Module]:
        """Every direct child once."""
        return iter({id(m): m for _, m in self.named_children()}.values())

    def named_modules(
        self, memo: set[int] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """Path and module of this module ("" is its own path) and of everything below it."""
        memo = set() if memo is None else memo
        if remove_duplicate:
            if id(self) in memo:
                return
            memo.add(id(self))
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(memo, _join(prefix, name), remove_duplicate)

    def modules(self) -> Iterator[Module]:
        """This module and everything below it, each once."""
        return (module for _, module in self.named_modules())

    def _named(
        self, own: Callable[[Module], Iterator[tuple[str, Any]]], prefix: str, recurse: bool,
        remove_duplicate: bool,
    ) -> Iterator[tuple[str, Any]]:  # fmt: skip
        seen: set[int] = set()
        modules = (
            self.named_modules(prefix=prefix, remove_duplicate=remove_duplicate)
            if recurse
            else [(prefix, self)]
        )
        for path, module in modules:
            for name, value in own(module):
                if remove_duplicate:
                    if id(value) in seen:
                        continue
                    seen.add(id(value))
                yield _join(path, name), value

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """Path and parameter, in the order of assignment; a shared one once, by its first path."""
        return self._named(Module._own_parameters, prefix, recurse, remove_duplicate)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Every parameter once."""
        return (p for _, p in self.named_parameters(recurse=recurse))

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Path and buffer; a shared one once, by its first path."""
        return self._named(Module._own_buffers, prefix, recurse, remove_duplicate)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Every buffer once."""
        return (b for _, b in self.named_buffers(recurse=recurse))

    def _own_parameters(self) -> Iterator[tuple[str, Parameter]]:
        for name, value in self.__dict__.items():
            if isinstance(value, Parameter):
                yield name, value

    def _own_buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._buffers:
            value = self.__dict__.get(name)
            if isinstance(value, Tensor):
                yield name, value

    def _own_saved(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._own_parameters()
        for name, value in self._own_buffers():
            if self._buffers[name]:
                yield name, value

    # -- changing everything at once --------------------------------------------------------------

    def apply(self, fn: Callable[[Module], Any]) -> Self:
        """Call `fn` on every module below, then on this one."""
        for child in self.children():
            child.apply(fn)
        fn(self)
        return self

    def train(self, mode: bool = True) -> Self:
        """Put the module and everything below it into training mode (dropout works)."""
        for module in self.modules():
            module.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Put the module and everything below it into evaluation mode."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Let every parameter collect gradients, or stop it."""
        for p in self.parameters():
            p.requires_grad_(requires_grad)
        return self

    @action
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of every parameter, or fill them with zeros."""
        clear_grads(self.parameters(), set_to_none)

    def to(self, device: Any = None, dtype: Any = None) -> Self:
        """Move parameters and buffers to a device, and those with real numbers to a dtype.

        In place: the module and its parameters stay the same objects, so that an optimiser still
        holds them.
        """
        if device is not None and not _names_device(device):
            if dtype is not None:
                raise ModuleError(f"to: {device!r} is no device string such as 'cpu' or 'cuda:0'")
            device, dtype = None, device
        if dtype is not None and not _is_real_floating(as_dtype(dtype)):
            raise ModuleError(f"to: parameters are real floating-point numbers, not {dtype}")
        moved: list[tuple[Tensor, Any, Tensor | None]] = []
        for x in (*self.parameters(), *self.buffers()):
            wanted = dtype if _is_real_floating(x.dtype) else None
            grad = None if x.grad is None else x.grad.detach().to(device, wanted)
            moved.append((x, x.detach().to(device, wanted).data, grad))
        for x, data, grad in moved:  # only now: a device that cannot be used changes nothing
            x.data = data
            if grad is not None:
                x.grad = grad
        return self

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Every parameter and persistent buffer by its path, detached and sharing its memory.

        Names are PyTorch's. A shared parameter is there under each of its paths.
        """
        named = self._named(Module._own_saved, prefix.removesuffix("."), True, False)
        return {name: value.detach() for name, value in named}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True
    ) -> IncompatibleKeys:
        """Copy tensors, or arrays, into the parameters and buffers of the same names.

        Everything is checked before anything is changed: names (unless `strict` is False, when
        names that only one side has are passed over and returned), shapes and dtypes.

        Raises StateDictError, which lists everything that differs.

        >>> import gpugrad.nn as nn
        >>> nn.Linear(2, 1).load_state_dict({"weight": np.zeros((1, 3), np.float32)})
        Traceback (most recent call last):
        gpugrad.nn.errors.StateDictError: the state does not fit Linear:
          missing: bias
          wrong shape: weight is (1, 3), expected (1, 2)
        """
        own: dict[str, Tensor] = dict(self._named(Module._own_saved, "", True, False))
        found = {name: asarray(value) for name, value in state_dict.items()}
        check_state(own, found, type(self).__name__, strict)
        with no_grad():
            for name in own.keys() & found.keys():
                write(own[name], found[name])
        missing = [name for name in own if name not in found]
        return IncompatibleKeys(missing, [name for name in found if name not in own])

    # -- looks ------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """What stands between the parentheses of the module's line; for subclasses."""
        return ""

    def label(self) -> str:
        """What the module is called in messages."""
        return type(self).__name__

    def __repr__(self) -> str:
        lines = [
            f"  ({name}): " + repr(child).replace("\n", "\n  ")
            for name, child in self.named_children()
        ]
        if not lines:
            return f"{type(self).__name__}({self.extra_repr()})"
        return "\n".join((f"{type(self).__name__}({self.extra_repr()}", *lines, ")"))


def clear_grads(parameters: Iterator[Any], set_to_none: bool) -> None:
    """Forget gradients, or fill them with zeros."""
    for p in parameters:
        if type(p._node) is Leaf and set_to_none:  # the common case, without a property's price
            p._node.grad = p._node.squares = None
        elif set_to_none or p.grad is None:
            p.grad = None
        else:
            p.grad = p.grad.detach()
            p.grad[...] = 0.0


def check_state(
    own: Mapping[str, Tensor], found: Mapping[str, Tensor], whose: str, strict: bool = True
) -> None:
    """Raise StateDictError unless `found` fits `own` in names, shapes and dtypes."""
    missing = tuple(name for name in own if name not in found) if strict else ()
    unexpected = tuple(name for name in found if name not in own) if strict else ()
    lines = [f"missing: {name}" for name in missing]
    lines += [f"unexpected: {name}" for name in unexpected]
    wrong_shape, wrong_dtype = [], []
    for name in own:
        if name not in found:
            continue
        a, b = own[name], found[name]
        if a.shape != b.shape:
            wrong_shape.append(name)
            lines.append(f"wrong shape: {name} is {b.shape}, expected {a.shape}")
        if a.dtype != b.dtype:
            wrong_dtype.append(name)
            lines.append(f"wrong dtype: {name} is {b.dtype}, expected {a.dtype}")
    if lines:
        raise StateDictError(
            "\n  ".join((f"the state does not fit {whose}:", *lines)),
            *(missing, unexpected, tuple(wrong_shape), tuple(wrong_dtype)),
        )


def write(target: Tensor, value: Tensor) -> None:
    """Copy `value` into the memory of `target`, wherever the two are. Call it under no_grad."""
    if value.device != target.device:
        value = tensor(value, device=target.device)
    if target.backend.mutable:
        target[...] = value
    else:
        target.data = value.data


@contextmanager
def _noticed(trace: Trace) -> Iterator[None]:
    """Tell a trace of the modules that are called, for the length of it."""

    def call(plain: Any, module: Module, *args: Any, **kwargs: Any) -> Any:
        if active():
            note(module)
        return plain(module, *args, **kwargs)

    def note(module: Module) -> None:
        if id(module) not in trace.modules:
            for each in module.modules():
                trace.module(each, bool(each._hooks))

    for found in _mentioned(trace.function):
        note(found)
    with instead(Module, "__call__", call):
        yield


noticing.append(_noticed)


def _mentioned(function: Any) -> Iterator[Module]:
    """The modules that a function is, belongs to, or names."""
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    scope = getattr(function, "__globals__", {})
    cells = getattr(function, "__closure__", None) or ()
    values = [function, getattr(function, "__self__", None), *(scope.get(x) for x in names)]
    for cell in cells:
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not set yet
            continue
    yield from (x for x in values if isinstance(x, Module))


# -- errors that name the layer ------------------------------------------------------------------


class _Where:
    """How far up an error has come: the module it arose in, and the path to it so far."""

    __slots__ = ("culprit", "note", "outer", "path", "text")

    def __init__(self, culprit: Module, text: str | None) -> None:
        self.culprit = self.outer = culprit
        self.path = ""
        self.text = text  # None when the message is not ours to change: it gets a note
        self.note = ""


def _locate(error: Exception, module: Module) -> None:
    """Write the path from `module` down to the layer at fault into the error's message.

    Every module on the way up lengthens the path at its front, so that a forward that succeeds pays
    nothing for this.
    """
    where: _Where | None = getattr(error, "_gpugrad_where", None)
    if where is None:
        ours = isinstance(error, GpugradError) and len(error.args) == 1
        where = _Where(module, str(error) if ours else None)
        error._gpugrad_where = where  # type: ignore[attr-defined]
    elif where.outer is not module:
        paths = module.named_modules()
        name = next((path for path, m in paths if m is where.outer), "(unregistered)")
        where.path = _join(name, where.path) if where.path else name
        where.outer = module
    label = where.culprit.label()
    at = f"{type(module).__name__}.{where.path} ({label})" if where.path else label
    if where.text is not None:
        error.args = (f"{at}: {where.text}",)
        return
    notes: list[str] = getattr(error, "__notes__", [])
    if where.note in notes:
        notes.remove(where.note)
    where.note = f"gpugrad: in {at}"
    error.add_note(where.note)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _is_real_floating(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _names_device(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        as_dtype(value)
    except TypeError:
        return True
    return False
