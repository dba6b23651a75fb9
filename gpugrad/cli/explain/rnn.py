"""Long memory in recurrent nets: where the remedies fail, and what gates change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpugrad import nn, optim
from gpugrad.cli.explain.book import Book
from gpugrad.cli.explain.sequences import Reader, first_sign
from gpugrad.core.modes import no_grad
from gpugrad.health.page_charts import number
from gpugrad.nn import functional as F
from gpugrad.nn.random import manual_seed

NETS = ("RNN", "RNN clipped", "RNN orthogonal", "LSTM", "LSTM open", "GRU open")
SHORT, LONG, STEPS, LR, CLIP, WIDTH = 5, 30, 100, 1e-2, 1.0, 24


def show(book: Book) -> dict[str, Any]:
    """Tell the chapter; returns the figures that it found."""
    book.say(
        "A recurrent net reads a row of ±1. The first is marked, the others are noise; at the end "
        "it is to say which sign the first one had. Through time, too, the gradient is a product: "
        "of the recurrent weights and of the slope of tanh, once for every step."
    )
    accuracies: dict[tuple[str, int], float] = {}
    through: dict[str, Any] = {}
    norms: dict[str, float] = {}
    rows = []
    for name in NETS:
        row = [name]
        for length in (SHORT, LONG):
            net = _net(name, length)
            if length == LONG:
                through[name] = _through_time(net, length)
                kept = through[name][0] / through[name][-1]
            bound = math.inf if name == "RNN" else CLIP
            loss, accuracies[name, length], norms[name] = _train(net, length, bound)
            row.append(f"{accuracies[name, length]:.0%}")
        rows.append((*row, f"{loss:.4f}", number(kept), number(norms[name])))
    book.table(
        ("right over", f"{SHORT} steps", f"{LONG} steps", "loss", "first / last", "largest norm"),
        rows,
    )
    book.say(
        f"The last three columns are of the {LONG} steps. First / last: the gradient that arrives "
        "at the first step of the sequence, against that at the last one, before training. "
        f"Orthogonal: the recurrent weights at the start. Open: the gates at the start, see below. "
        f"Each net has {WIDTH} units and {STEPS} steps of Adam; guessing is right in half."
    )
    ratio = {name: found[0] / found[-1] for name, found in through.items()}
    book.say(
        f"Over {SHORT} steps everybody remembers. Over {LONG} the plain net guesses: what arrives "
        f"from the end is {number(ratio['RNN'])} of what it was. Clipping changes nothing, for it "
        f"only shortens what is long, and no norm here exceeded {number(norms['RNN'])}. Orthogonal "
        "recurrent weights keep lengths, and then the slopes of tanh alone shrink the gradient: "
        f"{number(ratio['RNN orthogonal'])} arrives. That took this net to "
        f"{accuracies['RNN orthogonal', LONG]:.0%}, and with other draws it may fail."
    )
    book.say(
        "A gated cell adds to its state instead of multiplying it: c ← f·c + i·g. An addition node "
        "passes the gradient on as it is, and the forget gate f is the one factor on its way. "
        f"Drawn at random f is about one half, and halving {LONG} times leaves nothing: the LSTM "
        f"as drawn, {number(ratio['LSTM'])}, is no better than the plain net. Started open, at a "
        f"bias of ln({LONG} - 1), so that it forgets in about {LONG} steps, it lets "
        f"{number(ratio['LSTM open'])} arrive, and is right in "
        f"{accuracies['LSTM open', LONG]:.0%}."
    )
    steps = np.arange(1, LONG + 1)
    book.picture(
        "gradient norm through time, before training",
        {name: (steps, through[name])
         for name in ("RNN", "RNN orthogonal", "LSTM", "LSTM open")},
        x_label="step of the sequence; the loss is at the end",
        log=True,
    )  # fmt: skip
    return {"accuracies": accuracies, "through": through, "ratio": ratio, "norms": norms}


def _net(name: str, length: int) -> Reader:
    manual_seed(0)
    kind = name.split()[0]
    net = Reader(getattr(nn, kind), 2, 2, WIDTH, dtype="float64")
    with no_grad():
        if "orthogonal" in name:
            nn.init.orthogonal_(net.cell.weight_hh_l0)
        if "open" in name:
            # Time scales of the gates as in Tallec and Ollivier, arXiv:1804.11188. The second
            # gate keeps the state: forget in the LSTM, update in the GRU.
            nn.init.zeros_(net.cell.bias_ih_l0)
            nn.init.zeros_(net.cell.bias_hh_l0)
            net.cell.bias_ih_l0[WIDTH : 2 * WIDTH] = math.log(length - 1)
            if kind == "LSTM":  # what is written is small where much is kept
                net.cell.bias_ih_l0[:WIDTH] = -math.log(length - 1)
    return net


def _through_time(net: Reader, length: int) -> Any:
    """The norm of the loss's gradient with respect to every step's input, [length]."""
    x, labels = first_sign(64, length, np.random.default_rng(1))
    x.requires_grad_()
    F.cross_entropy(net(x), labels).backward()
    assert x.grad is not None
    norms = np.sqrt((x.grad.numpy() ** 2).sum(axis=(0, 2)))
    net.zero_grad()
    return norms


def _train(net: Reader, length: int, bound: float) -> tuple[float, float, float]:
    """Mean loss of the last steps, accuracy on new sequences, and the largest norm."""
    optimizer = optim.Adam(net.parameters(), lr=LR)
    rng = np.random.default_rng(0)
    losses, norms = [], []
    for _ in range(STEPS):
        x, labels = first_sign(32, length, rng)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step(clip=bound)
        losses.append(loss.item())
        assert optimizer.last_norm is not None
        norms.append(optimizer.last_norm.item())
    x, labels = first_sign(256, length, rng)
    right = np.argmax(net(x).detach().numpy(), axis=-1) == labels.numpy()
    return float(np.mean(losses[-10:])), float(right.mean()), max(norms)
