"""The base of every optimiser: parameter groups, state, and the step over all of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from gpugrad.core.actions import action
from gpugrad.core.conversion import asarray, tensor
from gpugrad.core.handle import RemovableHandle, add_hook
from gpugrad.core.modes import enable_grad
from gpugrad.core.tensor import Parameter, Tensor
from gpugrad.errors import ParameterError
from gpugrad.nn.module import check_state, clear_grads
from gpugrad.optim.arena import MASTER, Arena
from gpugrad.optim.errors import OptimizerError
from gpugrad.optim.flat import CLIPPED, FIRST, SKIPPED
from gpugrad.optim.plan import Plan, fits, lay_out, make_plan
from gpugrad.optim.rules import OTHERS, RULES, Told
from gpugrad.optim.step import NONFINITE, Report, check_clip, run_step

__all__ = ["Group", "Optimizer", "Params"]

Group = dict[str, Any]
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Group]


class Optimizer:
    """Changes parameters in place by their gradients.

    Subclasses name a row of the table of update rules and check their hyperparameters.

    Parameters
    ----------
    params:
        Tensors; pairs of name and tensor, as from `named_parameters()`; or dicts with one of these
        under `"params"` and hyperparameters of their own. A dict may also have its own `"clip"`.

    Attributes
    ----------
    param_groups:
        One dict per group: `"params"` and its hyperparameters, read anew at every step.
    state:
        What is kept for each parameter that has made a step: arrays as tensors, and `"step"`, a 0-d
        tensor on the device. Change the arrays in place, or through `load_state_dict`.

    Making an optimiser moves its parameters, with gradients and state, into a few buffers, one
    after the other (see `gpugrad.optim.arena`): a step is then two passes over memory, whatever the
    number of tensors. Parameters stay the same tensors, of the same shapes; their arrays are views.
    """

    rule: ClassVar[str]

    _arenas: list[list[Arena]]
    _plan: Plan | None
    _told: list[Told]
    _report: Report
    _first: str | None

    # Replaced, never changed: most optimisers have none.
    _hooks: Mapping[str, Mapping[int, Callable[..., Any]]] = {}

    def __init__(self, params: Tensor | Params, defaults: Group) -> None:
        self.defaults = defaults
        self.param_groups: list[Group] = []
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._forget()
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
            self._add(group)
        self._arenas = lay_out(self.param_groups, self._arenas)

    def _forget(self) -> None:
        """Begin without arenas, and without anything found out."""
        self._arenas = []
        self._plan = None
        self._told = []
        self._report = Report()
        self._first = None

    def add_param_group(self, param_group: Mapping[str, Any]) -> None:
        """Train more parameters, with hyperparameters of their own.

        `param_group` has `"params"` and any hyperparameter that is not to be the default one.

        Raises OptimizerError for what cannot be trained: nothing at all, a tensor twice, one that
        was computed, holds whole numbers, or does not require a gradient (a `Parameter` may be
        frozen for a while), something that is no tensor.
        """
        self._add(param_group)
        self._arenas = lay_out(self.param_groups, self._arenas)

    def _add(self, param_group: Mapping[str, Any]) -> None:
        if not isinstance(param_group, Mapping) or "params" not in param_group:
            raise OptimizerError(f"a parameter group is a dict with 'params', not {param_group!r}")
        name = type(self).__name__
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        if not params:
            raise OptimizerError(f"{name}: the parameter group is empty")
        names = [p[0] for p in params if isinstance(p, tuple) and len(p) == 2]
        if names and len(names) != len(params):
            raise OptimizerError(f"{name}: either all parameters have a name, or none has")
        if names:
            params = [p for _, p in params]
        seen = {id(p) for group in self.param_groups for p in group["params"]}
        for i, p in enumerate(params):
            if not isinstance(p, Tensor):
                raise OptimizerError(f"{name}: parameter {i} is {type(p).__name__}, not a tensor")
            if not p.is_leaf:
                raise OptimizerError(
                    f"{name}: parameter {i} of shape {p.shape} was computed from other tensors; "
                    "train those, or detach() it"
                )
            if p.dtype.kind in "iub":
                raise OptimizerError(
                    f"{name}: parameter {i} of shape {p.shape} holds {p.dtype}, which has no "
                    "gradient; leave it out, or convert it with .to('float32')"
                )
            if not (p.requires_grad or isinstance(p, Parameter)):
                raise OptimizerError(
                    f"{name}: parameter {i} of shape {p.shape} does not require a gradient and "
                    "would never change; call requires_grad_() on it, or leave it out"
                )
            if id(p) in seen:
                raise OptimizerError(
                    f"{name}: parameter {i} of shape {p.shape} is there twice; it would be updated "
                    "twice in a step"
                )
            seen.add(id(p))
        unknown = param_group.keys() - self.defaults.keys() - OTHERS
        if unknown:
            raise OptimizerError(
                f"{name}: unknown hyperparameters {sorted(unknown)}; it has {list(self.defaults)}"
            )
        group = {**self.defaults, **param_group, "params": params}
        if names:
            group["param_names"] = names
        check_clip(group.get("clip"), "clip of a parameter group")
        self.check(group)
        self.param_groups.append(group)

    def check(self, group: Group) -> None:
        """Raise OptimizerError for hyperparameters outside their range; for subclasses."""

    @action
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of every parameter, or fill them with zeros."""
        clear_grads(self._params(), set_to_none)

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    # -- the step ---------------------------------------------------------------------------------

    @action
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        clip: Any = None,
        scaler: Any = None,
        nonfinite: str = "propagate",
    ) -> Any:
        """Unscale, clip and use the gradients, and return what `closure` returned.

        Changes every parameter that requires a gradient and has one; the others keep their values
        and state. Nothing is read from the device, unless `nonfinite="raise"`. Graphs that saved a
        parameter's old value raise InplaceError if they are run backward afterwards.

        Parameters
        ----------
        closure:
            Computes the loss anew and calls backward on it; called once, before the update.
        clip:
            A policy of `gpugrad.clip`, or a number: use gradients scaled so that their total norm
            is at most this. Norms are scaled within the update, and `.grad` stays as it is;
            policies that treat each gradient in its own way change it in place. Infinity asks for
            the norm alone. A parameter group with an entry `"clip"` is clipped by that, apart from
            the others, or not at all if it is None.
        scaler:
            A GradScaler that scaled the loss. The gradients are unscaled before anything else, and
            the scale is adapted to what they were. With one, `"propagate"` means `"skip"`.
        nonfinite:
            What to do about gradients that are NaN or infinite. `"propagate"`: compute with them.
            `"skip"`: change nothing, and count the step in `skipped`. `"zero"`: such elements count
            as 0, in the norm, too. `"raise"`: NonFiniteGradientError, which names the parameter,
            and nothing is changed; the host waits for the device to find out.

        Raises ParameterError for a bound that is negative or NaN, and DeviceError when there is a
        norm or a flag to agree upon while parameters are in different places.
        """
        if clip is not None:
            check_clip(clip)
        if nonfinite not in NONFINITE:
            raise ParameterError(
                f"nonfinite is {nonfinite!r}; it must be one of {', '.join(map(repr, NONFINITE))}"
            )
        loss = None
        if closure is not None:
            with enable_grad():
                loss = closure()
        given = None
        if self._hooks:
            given = {"clip": clip, "scaler": scaler, "nonfinite": nonfinite}
            self._call_hooks("pre", given)
        plan = self._planned()
        if plan.spans:
            run_step(
                plan, self.param_groups, self._told, RULES[self.rule].rule, self._report,
                clip=clip, scaler=scaler, nonfinite=nonfinite, name_of=self._name_at,
            )  # fmt: skip
        if given is not None:
            self._call_hooks("post", given)
        return loss

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(optimizer, args, kwargs)` in every step when the gradients are there.

        That is after a closure, and before anything is changed. `args` is empty, and `kwargs` has
        the options of the step; what the hook returns is not used. Returns what removes it.

        >>> import gpugrad as gg
        >>> x = gg.tensor([1.0], requires_grad=True)
        >>> optimizer = gg.optim.SGD([x], lr=0.5)
        >>> x.grad = gg.tensor([1.0])
        >>> with optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: print(x)):
        ...     optimizer.step(clip=1.0)
        tensor([1.], requires_grad=True)
        """
        return add_hook(self, "pre", hook)

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(optimizer, args, kwargs)` after every step; returns what removes it."""
        return add_hook(self, "post", hook)

    def _call_hooks(self, kind: str, kwargs: dict[str, Any]) -> None:
        for hook in list(self._hooks.get(kind, {}).values()):
            hook(self, (), kwargs)

    def _planned(self) -> Plan:
        """What to do in this step; what was done in the last, if nothing has changed."""
        rule, groups = RULES[self.rule], self.param_groups
        if len(self._told) != len(groups):
            self._told = [Told(rule, group) for group in groups]
        names = [told.read(group).names for told, group in zip(self._told, groups)]
        if self._plan is None or not self._plan.holds(groups, self.state, names):
            self._plan = None
            if not fits(self.param_groups, self._arenas):
                self._first = self.first_nonfinite()
                self._report.forget_first()
                self._arenas = lay_out(self.param_groups, self._arenas)
            self._plan = make_plan(self.param_groups, self._arenas, self.state, rule, names)
        return self._plan

    @property
    def arenas(self) -> list[Arena]:
        """The buffers that parameters and gradients are in; see `gpugrad.optim.arena`."""
        return [arena for made in self._arenas for arena in made]

    # -- what the steps found ---------------------------------------------------------------------

    @property
    def last_norm(self) -> Tensor | None:
        """The norm before clipping in the latest step with a clip, a 0-d tensor on the device.

        Of the gradients that the step's own `clip` is for; without one, of the first group that has
        its own. None before.
        """
        return self._report.norm

    @property
    def last_coefficient(self) -> Tensor | None:
        """What the gradients of `last_norm` were multiplied by, a 0-d tensor on the device.

        None before, and when the latest clip was none by a norm.
        """
        return self._report.coefficient

    @property
    def clip_fraction(self) -> Tensor | None:
        """The share of steps whose coefficient was below 1, a 0-d tensor on the device."""
        clipped = self._report.count(CLIPPED)
        return clipped / self._report.clips if clipped is not None and self._report.clips else None

    @property
    def skipped(self) -> Tensor:
        """How many steps were skipped because a gradient was not finite, a 0-d tensor."""
        found = self._report.count(SKIPPED)
        return tensor(0) if found is None else found

    def first_nonfinite(self) -> str | None:
        """The parameter that went bad first, by name; None if none did. On a GPU the host waits.

        Gradients are looked at in steps that clip, have a scaler, or a `nonfinite` other than
        `"propagate"`. When a step finds one that is not finite, and the step before found none,
        this is the first parameter, in order, that has it. It has the name that it was given, or
        its number and shape.

        >>> import gpugrad as gg
        >>> a, b = (gg.tensor([1.0], requires_grad=True) for _ in range(2))
        >>> optimizer = gg.optim.SGD([("a", a), ("b", b)])
        >>> a.grad, b.grad = gg.tensor([1.0]), gg.tensor([float("nan")])
        >>> optimizer.step(nonfinite="skip")
        >>> optimizer.first_nonfinite(), optimizer.skipped.item(), b.item()
        ('b', 1, 1.0)
        """
        first = self._report.count(FIRST)
        number = 0 if first is None else int(first.item())
        return self._name_at(number - 1) if number else self._first

    def _name_at(self, number: int) -> str:
        """The name of the parameter that an element belongs to, counted through all arenas."""
        arenas = [arena for made in self._arenas for arena in made]
        arena = arenas[bisect_right([a.base for a in arenas], number) - 1]
        starts = [place.start for place in arena.places]
        p = arena.places[bisect_right(starts, number - arena.base) - 1].tensor
        group = self.param_groups[arena.group]
        i = next(i for i, other in enumerate(group["params"]) if other is p)
        if "param_names" in group:
            return str(group["param_names"][i])
        where = f" of group {arena.group}" if len(self.param_groups) > 1 else ""
        return f"parameter {i}{where}, of shape {p.shape}"

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State and hyperparameters as PyTorch lays them out, parameters numbered in order.

        Arrays are tensors that share the optimiser's memory, and counts of steps Python numbers: on
        a GPU the host waits for them. What a group has under `"clip"` is left out.
        """
        number = {p: i for i, p in enumerate(self._params())}
        counts: dict[int, int] = {}

        def shown(name: str, value: Any) -> Any:
            if name != "step":
                return value.detach()
            if id(value) not in counts:
                counts[id(value)] = int(value)
            return counts[id(value)]

        return {
            "state": {
                number[p]: {name: shown(name, value) for name, value in self.state[p].items()}
                for p in number
                if p in self.state
            },
            "param_groups": [
                {
                    **{name: value for name, value in group.items() if name != "clip"},
                    "params": [number[p] for p in group["params"]],
                }
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
            theirs = sorted(group.keys() - OTHERS)
            if theirs != sorted(self.defaults):
                raise OptimizerError(
                    f"{type(self).__name__}: the state has the hyperparameters {theirs}, here they "
                    f"are {sorted(self.defaults)}; it is of another optimiser"
                )
            group["params"] = mine["params"]
            group |= {name: mine[name] for name in ("clip", "param_names") if name in mine}
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
                narrow = p.dtype.itemsize < 4
                if narrow and MASTER in arrays:
                    wanted = (MASTER, *wanted)
                like = p.detach().to("float32") if narrow else p.detach()
                own |= {f"{number}.{name}": like for name in wanted}
                for name, value in arrays.items():
                    x = asarray(value)
                    # PyTorch keeps the state of narrow parameters as narrow as they are.
                    narrow_too = narrow and x.dtype == p.dtype and name != MASTER
                    found[f"{number}.{name}"] = x.to("float32") if narrow_too else x
        check_state(own, found, type(self).__name__)
        for p, values in new.items():
            for name, value in values.items():
                values[name] = int(value) if name == "step" else tensor(value, device=p.device)
            values.setdefault("step", 1)
        self.state = new
        self.param_groups = groups

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes over: it has parameters of its own, and finds out for itself."""
        own = ("_arenas", "_plan", "_told", "_report", "_first", "_hooks")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            hidden = ("params", "param_names")
            lines += [f"    {k}: {v}" for k, v in group.items() if k not in hidden]
        return "\n".join((*lines, ")"))
