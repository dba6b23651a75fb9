"""The base of every optimiser: parameter groups, state, and the step over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from gpugrad.backend import SPACES, Array
from gpugrad.clip import check_bound, coefficient, total_norm
from gpugrad.core.conversion import asarray, tensor
from gpugrad.core.graph import mutations
from gpugrad.core.modes import enable_grad
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.nn.module import check_state, clear_grads
from gpugrad.optim.errors import OptimizerError
from gpugrad.optim.rules import RULES, UpdateRule

__all__ = ["Optimizer"]

Group = dict[str, Any]

#: Elements that a rule works on at a time in host memory: its temporaries then stay in the cache.
BLOCK = 1 << 15


class Optimizer:
    """Changes parameters in place by their gradients.

    Subclasses name a row of the table of update rules and check their hyperparameters.

    Attributes
    ----------
    param_groups:
        One dict per group: `"params"` and its hyperparameters, read anew at every step.
    state:
        What is kept for each parameter: arrays as tensors, and `"step"`.
    last_norm:
        The total norm of the gradients before clipping in the latest `step(clip=…)`, a 0-d tensor
        on the device; None before.
    """

    rule: ClassVar[str]

    def __init__(
        self, params: Tensor | Iterable[Tensor] | Iterable[Group], defaults: Group
    ) -> None:
        self.defaults = defaults
        self.param_groups: list[Group] = []
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.last_norm: Tensor | None = None
        if isinstance(params, Tensor):
            raise OptimizerError(
                f"{type(self).__name__}: an iterable of tensors is needed, not one tensor; put it "
                "into a list"
            )
        listed: list[Any] = list(params)
        if not listed:
            raise OptimizerError(
                f"{type(self).__name__}: there are no parameters; was an exhausted generator, or a "
                "module without layers, passed in?"
            )
        groups = listed if isinstance(listed[0], Mapping) else [{"params": listed}]
        for group in groups:
            self.add_param_group(group)

    def add_param_group(self, param_group: Mapping[str, Any]) -> None:
        """Train more parameters, with hyperparameters of their own.

        `param_group` has `"params"` and any hyperparameter that is not to be the default one.

        Raises OptimizerError for what cannot be trained: nothing at all, a tensor twice, one that
        was computed or does not require a gradient, something that is no tensor.
        """
        if not isinstance(param_group, Mapping) or "params" not in param_group:
            raise OptimizerError(f"a parameter group is a dict with 'params', not {param_group!r}")
        name = type(self).__name__
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        if not params:
            raise OptimizerError(f"{name}: the parameter group is empty")
        seen = {id(p) for group in self.param_groups for p in group["params"]}
        for i, p in enumerate(params):
            if not isinstance(p, Tensor):
                raise OptimizerError(f"{name}: parameter {i} is {type(p).__name__}, not a tensor")
            if not p.is_leaf:
                raise OptimizerError(
                    f"{name}: parameter {i} of shape {p.shape} was computed from other tensors; "
                    "train those, or detach() it"
                )
            if id(p) in seen:
                raise OptimizerError(
                    f"{name}: parameter {i} of shape {p.shape} is there twice; it would be updated "
                    "twice in a step"
                )
            seen.add(id(p))
        unknown = param_group.keys() - self.defaults.keys() - {"params", "name"}
        if unknown:
            raise OptimizerError(
                f"{name}: unknown hyperparameters {sorted(unknown)}; it has {list(self.defaults)}"
            )
        group = {**self.defaults, **param_group, "params": params}
        self.check(group)
        self.param_groups.append(group)

    def check(self, group: Group) -> None:
        """Raise OptimizerError for hyperparameters outside their range; for subclasses."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of every parameter, or fill them with zeros."""
        clear_grads(self._params(), set_to_none)

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    # -- the step ---------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None, *, clip: float | None = None) -> Any:
        """Change every parameter that has a gradient, and return what `closure` returned.

        Nothing is read from the device. Graphs that saved a parameter's old value raise
        InplaceError if they are run backward afterwards.

        Parameters
        ----------
        closure:
            Computes the loss anew and calls backward on it; called once, before the update.
        clip:
            Use gradients scaled so that their total norm is at most this. The gradients themselves
            stay as they are, and the norm before clipping is put into `last_norm`; infinity asks
            for the norm alone.
        """
        bound = None if clip is None else check_bound(clip, "clip")
        loss = None
        if closure is not None:
            with enable_grad():
                loss = closure()
        factor = None
        if bound is not None:
            self.last_norm = total_norm(p.grad for p in self._params() if p.grad is not None)
            if bound != np.inf:
                factor = coefficient(self.last_norm, bound).data
        rule = RULES[self.rule]
        for group in self.param_groups:
            hyper = {k: v for k, v in group.items() if k not in ("params", "name")}
            hyper["lr"] = float(hyper["lr"])  # a NumPy scalar would widen the arrays
            names = rule.state(hyper)
            for p in group["params"]:
                grad = p.grad
                if grad is not None:
                    kept = self._kept(p, names)
                    kept["step"] += 1
                    states = [kept[name] for name in names]
                    _apply(rule, p, grad.data, states, factor, {**hyper, "step": kept["step"]})
        return loss

    def _kept(self, p: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
        """The state of one parameter, made on its first step."""
        kept = self.state.get(p)
        if kept is None or any(name not in kept for name in names):
            space = SPACES[type(p.data)]
            kept = self.state[p] = {"step": 0}
            for name in names:
                kept[name] = tensor_of(space.zeros_like(p.data))
        return kept

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State and hyperparameters as PyTorch lays them out, parameters numbered in order.

        Arrays are tensors that share the optimiser's memory.
        """
        number = {p: i for i, p in enumerate(self._params())}
        return {
            "state": {number[p]: dict(self.state[p]) for p in number if p in self.state},
            "param_groups": [
                {**group, "params": [number[p] for p in group["params"]]}
                for group in self.param_groups
            ],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; tensors, or arrays, are copied.

        Numbers of parameters may also be strings. Everything is checked before anything changes.

        Raises OptimizerError when groups or hyperparameters do not fit, and StateDictError, listing
        all that differ, when arrays do not have the shapes of the parameters.
        """
        params = list(self._params())
        groups = [dict(group) for group in state_dict["param_groups"]]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in groups] != sizes:
            raise OptimizerError(
                f"{type(self).__name__}: the state is for groups of "
                f"{[len(group['params']) for group in groups]} parameters, here they have {sizes}"
            )
        for mine, group in zip(self.param_groups, groups):
            theirs = sorted(group.keys() - {"params", "name"})
            if theirs != sorted(self.defaults):
                raise OptimizerError(
                    f"{type(self).__name__}: the state has the hyperparameters {theirs}, here they "
                    f"are {sorted(self.defaults)}; it is of another optimiser"
                )
            group["params"] = mine["params"]
            self.check(group)
        # Numbers are those of the state's own groups, whose order is ours.
        order = [str(i) for group in state_dict["param_groups"] for i in group["params"]]
        kept = {str(i): dict(values) for i, values in state_dict["state"].items()}
        if unknown := sorted(kept.keys() - set(order)):
            raise OptimizerError(f"{type(self).__name__}: state for unknown parameters {unknown}")
        rule = RULES[self.rule]
        names = [rule.state(group) for group in groups for _ in group["params"]]
        new: dict[Tensor, dict[str, Any]] = {}
        own: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        for p, number, wanted in zip(params, order, names):
            if number in kept:
                new[p] = kept[number]
                arrays = {k: v for k, v in kept[number].items() if k != "step"}
                own |= {f"{number}.{name}": p.detach() for name in wanted}
                found |= {f"{number}.{name}": asarray(v) for name, v in arrays.items()}
        check_state(own, found, type(self).__name__)
        for p, values in new.items():
            for name, value in values.items():
                values[name] = int(value) if name == "step" else tensor(value, device=p.device)
            values.setdefault("step", 1)
        self.state = new
        self.param_groups = groups

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            lines += [f"    {k}: {v}" for k, v in group.items() if k != "params"]
        return "\n".join((*lines, ")"))


def _apply(
    rule: UpdateRule, p: Tensor, g: Array, states: list[Tensor], factor: Array | None, hyper: Group
) -> None:
    """Run a rule on one parameter: block by block in host memory, at once anywhere else."""
    space = SPACES[type(p.data)]
    if factor is not None:
        factor = space.astype(factor, g.dtype)
    arrays = (p.data, g, *(s.data for s in states))
    update = rule.update
    if _can_block(arrays):
        flat = [x.reshape(-1) for x in arrays]
        for start in range(0, flat[0].size, BLOCK):
            x, gradient, *kept = (a[start : start + BLOCK] for a in flat)
            if factor is not None:
                gradient = gradient * factor
            update(space, x, gradient, *kept, **hyper)
        mutations.mark(p.data)
        return

    def whole(x: Array, g: Array, *kept: Array) -> tuple[Array, ...]:
        return update(space, x, g if factor is None else g * factor, *kept, **hyper)

    out = space.bind(whole)(*arrays)
    for target, before, after in zip((p, *states), (arrays[0], *arrays[2:]), out):
        if after is not before:  # a library whose arrays do not change
            target.data = after
    mutations.mark(p.data)


def _can_block(arrays: tuple[Array, ...]) -> bool:
    return all(isinstance(x, np.ndarray) and x.flags.c_contiguous for x in arrays)
