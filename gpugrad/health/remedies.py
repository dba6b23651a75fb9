"""The table of remedies: what helps against what, in a sentence, and how to try it on a copy."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from gpugrad.health import surgery
from gpugrad.nn.module import Module

__all__ = ["REMEDIES", "Remedy", "remedies_for"]


@dataclass(frozen=True)
class Remedy:
    """One thing to change.

    Attributes
    ----------
    name:
        What findings call it.
    against:
        Kinds of findings that it helps against, each with its rank among what helps: 1 comes first.
    change:
        What to change, in a sentence; `{figures}` in braces are filled in by who has measured them.
    why:
        Why it helps, with the source.
    apply:
        Changes a net in place, given what runs it on the batch, and says what was changed; raises
        `surgery.Impossible` where it cannot. None for what is done to the training, or by hand.
    needs:
        Class names of layers, one of which a net must have for this to mean anything.
    slower, clips:
        What is done to the training: a factor on the learning rate, and whether gradients are
        clipped.
    by_hand:
        Why it cannot be tried.
    """

    name: str
    against: dict[str, int]
    change: str
    why: str
    apply: Callable[[Module, surgery.Forward], str] | None = None
    needs: tuple[str, ...] = ()
    slower: float = 1.0
    clips: bool = False
    by_hand: str = ""

    def fits(self, kinds: Collection[str]) -> bool:
        """Whether a net with layers of these class names has what is to be changed."""
        return not self.needs or any(kind in kinds for kind in self.needs)

    def text(self, **figures: object) -> str:
        """The sentence, with figures where they are known.

        >>> REMEDIES["clip"].text(norm="0.7 (the median norm of healthy steps)")
        'clip gradients at norm 0.7 (the median norm of healthy steps)'
        """
        defaults = {"norm": "1.0", "lr": "a tenth"}
        return self.change.format(**{**defaults, **figures})


_TABLE = (
    Remedy(
        "initialise",
        {"exploding": 1, "vanishing": 2, "saturated": 1, "dead": 1, "diverging": 2, "stalled": 2,
         "non-finite": 4, "clip-starved": 2},
        "initialise anew: orthogonal weights scaled so that every layer's output has variance 1 "
        "(gain 1 for tanh, √2 for ReLU), biases 0",
        "the gain per layer starts at 1; Saxe et al., arXiv:1312.6120, He et al., "
        "arXiv:1502.01852, Mishkin and Matas, arXiv:1511.06422",
        surgery.initialise,
    ),
    Remedy(
        "layer-norm",
        {"exploding": 2, "vanishing": 4, "saturated": 2, "non-finite": 5, "clip-starved": 3,
         "stalled": 3, "diverging": 3, "dead": 4},
        "insert LayerNorm before the activations",
        "activations keep mean 0 and variance 1 whatever the weights do; Ba et al., "
        "arXiv:1607.06450",
        surgery.insert_norms,
    ),
    Remedy(
        "residual",
        {"vanishing": 1, "exploding": 3, "stalled": 1, "saturated": 4, "dead": 3},
        "add residual connections, x + f(LayerNorm(x)), around blocks that keep their width",
        "the short cut carries the gradient past the layers with gain 1; He et al., "
        "arXiv:1603.05027",
        surgery.add_short_cuts,
    ),
    Remedy(
        "activation",
        {"vanishing": 3, "saturated": 3, "stalled": 4},
        "use ReLU in place of activations that saturate, with weights of gain √2",
        "its slope is 1 wherever it is not 0, that of a sigmoid at most 1/4; Glorot et al., "
        "Deep sparse rectifier neural networks (2011)",
        surgery.replace_activations,
        needs=tuple(kind.__name__ for kind in surgery.SATURATING),
    ),
    Remedy(
        "leak",
        {"dead": 2},
        "use LeakyReLU in place of ReLU",
        "a unit that is negative for every input still has a gradient; Maas et al. (2013)",
        surgery.leak,
        needs=("ReLU", "ReLU6"),
    ),
    Remedy(
        "gating",
        {"vanishing": 5, "exploding": 5, "stalled": 5, "saturated": 5, "clip-starved": 4},
        "use an LSTM or a GRU in place of the plain RNN, with gates that start open",
        "the state is carried on by sums and not by products; Hochreiter and Schmidhuber (1997), "
        "Cho et al., arXiv:1406.1078",
        surgery.replace_recurrences,
        needs=("RNN",),
    ),
    Remedy(
        "open-gates",
        {"vanishing": 6, "stalled": 6},
        "start the gates that keep the state open: biases up to ln(T - 1) for sequences of T steps",
        "the memory lasts as long as the sequences; Tallec and Ollivier, arXiv:1804.11188",
        surgery.open_gates,
        needs=("LSTM", "GRU"),
    ),
    Remedy(
        "clip",
        {"exploding": 4, "non-finite": 2, "diverging": 4, "clip-starved": 1},
        "clip gradients at norm {norm}",
        "one step cannot leave the region where the gradient means something; Pascanu et al., "
        "arXiv:1211.5063",
        clips=True,
    ),
    Remedy(
        "learning-rate",
        {"diverging": 1, "clip-starved": 5, "non-finite": 3, "dead": 5, "stalled": 7},
        "lower the learning rate to {lr}",
        "steps that are longer than the loss is curved make it rise",
        slower=0.1,
    ),
    Remedy(
        "longer-steps",
        {"stalled": 8},
        "raise the learning rate tenfold, and again",
        "parameters that hardly move learn nothing",
        slower=10.0,
    ),
    Remedy(
        "loss-scale",
        {"non-finite": 1},
        "scale the loss (optim.GradScaler), or compute in bfloat16 or float32",
        "float16 overflows beyond 65504 and loses what is below 6e-8; Micikevicius et al., "
        "arXiv:1710.03740",
        surgery.widen,
    ),
    Remedy(
        "connect",
        {"not reached": 1},
        "use the layer's output in the loss, without detach() or no_grad(), or freeze it with "
        "requires_grad_(False)",
        "a layer that the loss does not depend on is never trained",
        by_hand="which output is missing in the loss, only its author knows",
    ),
)  # fmt: skip

#: Every remedy by its name.
REMEDIES = {remedy.name: remedy for remedy in _TABLE}


def remedies_for(kind: str) -> tuple[str, ...]:
    """The names of what helps against a kind of finding, best first.

    >>> remedies_for("diverging")[0]
    'learning-rate'
    """
    found = [r for r in _TABLE if kind in r.against]
    return tuple(r.name for r in sorted(found, key=lambda r: r.against[kind]))
