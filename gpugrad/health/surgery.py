"""Changes to a net that remedies ask for: they are made in place, to a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpugrad import nn
from gpugrad.core.conversion import tensor
from gpugrad.core.modes import no_grad
from gpugrad.core.tensor import Tensor
from gpugrad.health.errors import HealthError
from gpugrad.nn import init
from gpugrad.nn.module import Module

__all__ = [
    "Impossible",
    "Residual",
    "add_short_cuts",
    "initialise",
    "insert_norms",
    "leak",
    "open_gates",
    "replace_activations",
    "replace_recurrences",
    "widen",
]

#: What a net is run with: forward only, on the batch.
Forward = Callable[[], Any]

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.RMSNorm)
RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)
SATURATING = (
    nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardtanh, nn.Softsign, nn.LogSigmoid,
)  # fmt: skip
ELEMENTWISE = (
    *SATURATING, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Softplus, nn.Hardswish, nn.PReLU,
)  # fmt: skip


class Impossible(HealthError):
    """A change that cannot be made to this net mechanically; the message says why."""


class Residual(Module):
    """x + body(x).

    >>> import gpugrad as gg
    >>> Residual(nn.Identity())(gg.tensor([1.0, 2.0]))
    tensor([2., 4.])
    """

    def __init__(self, *body: Module) -> None:
        super().__init__()
        self.body = body[0] if len(body) == 1 else nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


# -- initial values --------------------------------------------------------------------------------


def initialise(model: Module, forward: Forward) -> str:
    """Orthogonal weights, zero biases, and outputs of every layer scaled to variance 1.

    Layer-sequential unit variance: the scale is measured on a batch while it runs through, so that
    it suits any activation. Mishkin and Matas, arXiv:1511.06422. Recurrent weights become
    orthogonal (Saxe et al., arXiv:1312.6120), and the forget gates of an LSTM open.
    """
    scaled: set[int] = set()
    handles = []
    changed = 0

    def scale(module: Any, args: Any, out: Tensor) -> Tensor:
        if id(module.weight) in scaled:
            return out
        scaled.add(id(module.weight))
        size = float(np.std(out.detach().numpy().astype(np.float64)))
        if not (math.isfinite(size) and size > 0):
            return out
        with no_grad():
            module.weight[...] = module.weight.detach() / size
        return out / size

    try:
        for module in model.modules():
            if isinstance(module, WEIGHTED) and module.weight.requires_grad:
                init.orthogonal_(module.weight)
                if module.bias is not None:
                    init.zeros_(module.bias)
                handles.append(module.register_forward_hook(scale))
                changed += 1
            elif isinstance(module, RECURRENT):
                _initialise_recurrence(module)
                changed += 1
        if not changed:
            raise Impossible("there are no linear, convolutional or recurrent layers to initialise")
        with no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return f"{changed} layers initialised: orthogonal, scaled to outputs of variance 1"


def _initialise_recurrence(layer: Any) -> None:
    width = layer.hidden_size
    for name, p in layer.named_parameters():
        if not p.requires_grad:
            continue
        if name.startswith("bias"):
            init.zeros_(p)
            continue
        for gate in range(p.shape[0] // width):
            rows = p[gate * width : (gate + 1) * width].detach()
            init.orthogonal_(rows) if name.startswith("weight_hh") else init.xavier_uniform_(rows)
    if isinstance(layer, nn.LSTM):
        _bias(layer, 1, 1.0)


def open_gates(model: Module, forward: Forward) -> str:
    """Let gated recurrent layers remember for as long as the sequences are.

    The gate that keeps the state starts with biases between ln 1 and ln(T - 1), for times up to T
    steps. Tallec and Ollivier, arXiv:1804.11188.
    """
    lengths: dict[int, int] = {}
    layers = [m for m in model.modules() if isinstance(m, nn.LSTM | nn.GRU)]
    if not layers:
        raise Impossible("there is no LSTM or GRU; use gating first")

    def measure(module: Any, args: Any) -> None:
        x = args[0]
        lengths[id(module)] = x.shape[1 if module.batch_first and x.ndim == 3 else 0]

    handles = [m.register_forward_pre_hook(measure) for m in layers]
    try:
        with no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        _initialise_recurrence(layer)
        times = np.linspace(1, max(2, lengths.get(id(layer), 2) - 1), layer.hidden_size)
        # The GRU's update gate keeps the state where it is open, as the LSTM's forget gate does.
        _bias(layer, 1, np.log(times))
        if isinstance(layer, nn.LSTM):
            _bias(layer, 0, -np.log(times))
    return f"gates of {len(layers)} layers open for up to {max(lengths.values(), default=2)} steps"


def _bias(layer: Any, gate: int, values: Any) -> None:
    width = layer.hidden_size
    for name, p in layer.named_parameters():
        if name.startswith("bias_ih") and p.requires_grad:
            with no_grad():
                like = np.broadcast_to(np.asarray(values, p.dtype), (width,))
                p[gate * width : (gate + 1) * width] = _like(p, like)


def _like(p: Tensor, values: Any) -> Tensor:
    return tensor(np.ascontiguousarray(values), device=p.device)


def widen(model: Module, forward: Forward) -> str:
    """Parameters of float32 in place of narrower ones."""
    narrow = [p for p in model.parameters() if p.dtype.itemsize < 4]
    if not narrow:
        raise Impossible("all parameters are of float32 or wider")
    before = narrow[0].dtype
    model.to("float32")
    return f"{len(narrow)} parameters of float32 in place of {before}"


# -- modules ---------------------------------------------------------------------------------------


def replace_activations(model: Module, forward: Forward) -> str:
    """ReLU in place of activations that saturate, and weights that suit it."""
    names = _swap(model, SATURATING, lambda old: nn.ReLU())
    if not names:
        raise Impossible("no module of the net is an activation that saturates")
    initialise(model, forward)
    return f"ReLU in place of {_listed(names)}"


def leak(model: Module, forward: Forward) -> str:
    """LeakyReLU in place of ReLU: its units cannot die."""
    names = _swap(model, (nn.ReLU, nn.ReLU6), lambda old: nn.LeakyReLU(0.1))
    if not names:
        raise Impossible("no module of the net is a ReLU")
    return f"LeakyReLU(0.1) in place of {_listed(names)}"


def replace_recurrences(model: Module, forward: Forward) -> str:
    """A GRU in place of every plain RNN: it takes and returns the same."""

    def gated(old: Any) -> Module:
        p = old.weight_hh_l0
        new = nn.GRU(
            old.input_size, old.hidden_size, old.num_layers, old.bias, old.batch_first,
            old.dropout, old.bidirectional, device=p.device, dtype=p.dtype,
        )  # fmt: skip
        new.train(old.training)
        return new

    names = _swap(model, (nn.RNN,), gated)
    if not names:
        raise Impossible("there is no plain RNN")
    open_gates(model, forward)
    return f"GRU in place of {_listed(names)}, its gates open"


def _swap(
    model: Module, kinds: tuple[type[Module], ...], new: Callable[[Module], Module]
) -> list[str]:
    """Replace modules of these classes wherever they are children; their class names."""
    swapped: list[str] = []
    made: dict[int, Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in kinds:
                if id(child) not in made:
                    made[id(child)] = new(child)
                    made[id(child)].training = child.training
                    swapped.append(type(child).__name__)
                setattr(parent, name, made[id(child)])
    return swapped


def insert_norms(model: Module, forward: Forward) -> str:
    """LayerNorm between every linear layer, or convolution, and the activation behind it."""
    inserted = 0
    for sequence in _sequences(model):
        children: list[tuple[str, Module]] = []
        before: Module | None = None
        for name, child in sequence.named_children():
            if isinstance(child, ELEMENTWISE) and isinstance(before, WEIGHTED):
                children.append((f"{name}_norm" if not name.isdecimal() else name, _norm(before)))
                inserted += 1
            children.append((name, child))
            before = child
        _refill(sequence, [child for _, child in children], [name for name, _ in children])
    if not inserted:
        raise Impossible(
            "no Sequential of the net has a linear layer right before an activation; insert "
            "LayerNorm where yours are"
        )
    return f"LayerNorm before {inserted} activations"


def add_short_cuts(model: Module, forward: Forward) -> str:
    """Residual connections around blocks that keep their width, each behind a LayerNorm.

    x + f(LayerNorm(x)); He et al., arXiv:1603.05027.
    """
    made = 0
    for sequence in _sequences(model):
        new: list[Module] = []
        blocks = 0
        for group in _groups(list(sequence.children())):
            if _keeps_width(group):
                norm = _norm(group[0], inputs=True)
                new.append(Residual(norm, *group))
                blocks += 1
            else:
                new += group
        if blocks >= 2:
            _refill(sequence, new)
            made += blocks
    if not made:
        raise Impossible(
            "no Sequential of the net has two blocks in a row that keep their width; add x + f(x) "
            "in your own forward()"
        )
    return f"short cuts around {made} blocks, with LayerNorm in front of each"


def _sequences(model: Module) -> Iterator[nn.Sequential]:
    return (m for m in list(model.modules()) if isinstance(m, nn.Sequential))


def _groups(children: Sequence[Module]) -> list[list[Module]]:
    """Children from one weighted layer to before the next one; what comes first stands alone."""
    groups: list[list[Module]] = []
    for child in children:
        simple = isinstance(child, (*NORMS, *ELEMENTWISE, nn.Dropout))
        if isinstance(child, WEIGHTED) or not simple or not groups:
            groups.append([child])
        else:
            groups[-1].append(child)
    return groups


def _keeps_width(group: Sequence[Any]) -> bool:
    first = group[0]
    if not any(isinstance(m, ELEMENTWISE) for m in group):
        return False
    if isinstance(first, nn.Linear):
        return bool(first.in_features == first.out_features)
    if isinstance(first, nn.Conv1d | nn.Conv2d):
        rest = {"stride": 1, "dilation": 1}
        plain = all(set(np.atleast_1d(getattr(first, k))) == {v} for k, v in rest.items())
        padding = np.atleast_1d(first.padding) if not isinstance(first.padding, str) else None
        same = padding is not None and bool(
            np.all(2 * padding + 1 == np.array(first.weight.shape[2:]))
        )
        return first.in_channels == first.out_channels and plain and same
    return False


def _norm(layer: Any, inputs: bool = False) -> Module:
    """A normalisation for what the layer returns, or takes."""
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.LayerNorm(layer.in_features if inputs else layer.out_features, **like)
    return nn.GroupNorm(1, layer.in_channels if inputs else layer.out_channels, **like)


def _refill(sequence: Any, modules: Sequence[Module], names: Sequence[str] = ()) -> None:
    numbered = all(name.isdecimal() for name, _ in sequence.named_children())
    if numbered or not names:
        names = [str(i) for i in range(len(modules))]
    sequence._replace(list(zip(names, modules)))


def _listed(names: Sequence[str]) -> str:
    kinds = {name: names.count(name) for name in names}
    return ", ".join(f"{count} {name}" for name, count in kinds.items())
