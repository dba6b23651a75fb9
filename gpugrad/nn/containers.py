"""Modules that hold other modules in an order."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, overload

from gpugrad.nn.activations import name_of
from gpugrad.nn.convolution import Conv1d, Conv2d
from gpugrad.nn.errors import ModuleError
from gpugrad.nn.layers import Linear
from gpugrad.nn.module import Module, Parameter
from gpugrad.ops.layers import joins, layers

__all__ = ["ModuleList", "Residual", "Sequential"]

#: Layers whose `forward` takes the name of an activation, to compute both in one operation.
TAKES_ACTIVATION: set[type[Module]] = {Conv1d, Conv2d, Linear}


class _Ordered(Module):
    """Children under the names "0", "1", …, or names of their own, with the manners of a list."""

    def _replace(self, children: Iterable[tuple[str, Module]]) -> None:
        for name, _ in list(self.named_children()):
            delattr(self, name)
        for name, child in children:
            self.add_module(name, child)

    def _values(self) -> list[Module]:
        return [child for _, child in self.named_children()]

    def _name_at(self, index: int) -> str:
        names = [name for name, _ in self.named_children()]
        try:
            return names[operator.index(index)]
        except IndexError:
            raise IndexError(f"{type(self).__name__} of {len(names)} has no {index}") from None

    @overload
    def __getitem__(self, index: int) -> Module: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Module | Self:
        if isinstance(index, slice):
            part = type(self)()
            chosen = list(self.named_children())[index]
            part._replace(self._renumbered(chosen))
            return part
        return getattr(self, self._name_at(index))  # type: ignore[no-any-return]

    def __setitem__(self, index: int, module: Module) -> None:
        self.add_module(self._name_at(index), module)

    def __delitem__(self, index: int | slice) -> None:
        children = list(self.named_children())
        del children[index]
        self._replace(self._renumbered(children))

    def _renumbered(self, children: list[tuple[str, Module]]) -> list[tuple[str, Module]]:
        """Count again what is named by numbers; names of their own stay."""
        return [
            (str(i) if name.isdecimal() else name, child)
            for i, (name, child) in enumerate(children)
        ]

    def __len__(self) -> int:
        return sum(1 for _ in self.named_children())

    def __iter__(self) -> Iterator[Module]:
        return iter(self._values())

    def append(self, module: Module) -> Self:
        """Add a module at the end."""
        self.add_module(str(len(self)), module)
        return self

    def extend(self, modules: Iterable[Module]) -> Self:
        """Add modules at the end."""
        for module in modules:
            self.append(module)
        return self

    def insert(self, index: int, module: Module) -> Self:
        """Put a module before the one at `index`."""
        children = list(self.named_children())
        children.insert(index, (str(index), module))
        self._replace(self._renumbered(children))
        return self


class Sequential(_Ordered):
    """Modules that run one after the other, each on the result of the one before.

    Takes modules, or one mapping from names to modules. Index and slice it like a list.

    A layer and the activation behind it are computed as one operation where there is one, such as
    `Linear` and `Tanh`; a hook on either keeps them apart. So are layers in a row, where that
    is quicker, if all have the same activation, but for a last one that has none.

    >>> import gpugrad.nn as nn
    >>> nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))[:2]
    Sequential(
      (0): Linear(in_features=8, out_features=16, bias=True)
      (1): ReLU()
    )
    """

    @overload
    def __init__(self, *args: Module) -> None: ...
    @overload
    def __init__(self, arg: Mapping[str, Module], /) -> None: ...
    def __init__(self, *args: Any) -> None:
        super().__init__()
        if len(args) == 1 and isinstance(args[0], Mapping):
            named = list(args[0].items())
        else:
            named = [(str(i), module) for i, module in enumerate(args)]
        for name, module in named:
            if not isinstance(module, Module):
                raise ModuleError(
                    f"Sequential: {name} is {type(module).__name__}, not a module; wrap a function "
                    "in a Module with a forward()"
                )
            self.add_module(name, module)

    def forward(self, x: Any) -> Any:
        modules = [module for module in self.__dict__.values() if isinstance(module, Module)]
        i, looked = 0, 0
        while i < len(modules):
            module = modules[i]
            i += 1
            name = None
            if i < len(modules) and type(module) in TAKES_ACTIVATION and not module._hooks:
                name = name_of(modules[i])
            if name is None:
                x = module(x)
                continue
            if i > looked and i + 1 < len(modules):
                parameters, ends = _chain(modules, i - 1, name)
                looked = i - 1 + len(parameters) - ends
                if len(parameters) > 2 and joins(x, parameters, name, ends):
                    x = layers(x, *parameters, activation=name, ends=ends)
                    i = looked
                    continue
            x = module(x, activation=name)
            i += 1
        return x


def _chain(modules: list[Module], start: int, name: str) -> tuple[list[Parameter], bool]:
    """Weights and biases of linear layers that lie one behind the other, each before the activation
    of this name, and that nothing looks between; and whether the last is the end of all, bare."""
    found: list[Parameter] = []
    for i in range(start, len(modules), 2):
        layer = modules[i]
        if type(layer) is not Linear or layer.bias is None or layer._hooks:
            break
        last = i == len(modules) - 1
        if not last and name_of(modules[i + 1]) != name:
            break
        found += (layer.weight, layer.bias)
        if last:
            return found, True
    return found, False


class ModuleList(_Ordered):
    """A list of modules that counts them among the children; it has no forward of its own.

    >>> import gpugrad.nn as nn
    >>> layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    >>> len(layers), [name for name, _ in layers.named_parameters()][:2]
    (3, ['0.weight', '0.bias'])
    """

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        super().__init__()
        self.extend(modules)


class Residual(Module):
    """``x + body(x)``: a way around some modules, on which gradients come by as they are.

    Several modules run one after the other. He et al., "Deep residual learning for image
    recognition", arXiv:1512.03385.

    >>> import gpugrad as gg
    >>> import gpugrad.nn as nn
    >>> Residual(nn.Identity())(gg.tensor([1.0, 2.0]))
    tensor([2., 4.])
    """

    def __init__(self, *body: Module) -> None:
        super().__init__()
        self.body = body[0] if len(body) == 1 else Sequential(*body)

    def forward(self, x: Any) -> Any:
        return x + self.body(x)
