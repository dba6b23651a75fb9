"""The walk that runs the graph backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush, heappushpop
from typing import Any

from gpugrad.backend import SPACES
from gpugrad.core import graph
from gpugrad.core.graph import (
    FREED,
    HOOKED,
    NOT_IN_PLACE,
    PAIR,
    SINGLE,
    Extra,
    check_alive,
    describe,
    mutations,
    next_seq,
)
from gpugrad.core.primitive import differentiable
from gpugrad.core.rules import pullback
from gpugrad.errors import DTypeError, FreedGraphError, InplaceError, ShapeError

#: Told of a walk before it begins: the arguments of :func:`walk`, by position. One that returns
#: something has run it.
on_walk: list[Callable[[Sequence[tuple[Any, Any]], bool, Any, int], Any]] = []


def walk(
    seeds: Sequence[tuple[Any, Any]],
    *,
    retain: bool,
    wrap: Callable[..., Any] | None = None,
    since: int = 0,
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Run the graph backward from ``seeds``, pairs (node, gradient).

    Nodes run in falling order of creation, which is an order in which every consumer of a value
    runs before its producer. A heap holds the nodes that wait while more than one branch is
    pending; along a plain chain it stays empty and nothing is looked up. The first gradient that
    reaches a node is borrowed as it is, the second makes a sum that the walk owns, and only such a
    sum is added to in place.

    Pending gradients live in dictionaries of this call, so several threads may walk one retained
    graph, and a hook may start a walk of its own.

    Parameters
    ----------
    retain:
        Keep the saved arrays for another walk.
    wrap:
        ``wrap(array, node)`` makes a tensor: gradients are then tensors, recorded themselves.
    since:
        Run only nodes created after this number; the walk ends at older ones as at leaves.

    Returns
    -------
    Two dictionaries from where the walk ended to gradient: borrowed ones, and sums that are owned.
    """
    if on_walk:
        for notice in on_walk:
            found = notice(seeds, retain, wrap, since)
            if found is not None:
                return found  # type: ignore[no-any-return]
    plus, add_into = graph.plus, graph.add_into
    borrowed: dict[Any, Any] = {}
    owned: dict[Any, Any] = {}
    heap: list[tuple[int, Any]] = []
    for seed, g in seeds:
        if seed.seq == FREED:
            check_alive(seed)
        if seed in borrowed:
            borrowed[seed] = plus(borrowed[seed], g)
        else:
            borrowed[seed] = g
            if seed.seq > since:
                heappush(heap, (-seed.seq, seed))
    plain = wrap is None
    changed = mutations.last
    owned_get = owned.get
    node: Any = None
    try:
        while heap:
            node = heappop(heap)[1]
            g = owned.pop(node) if node in owned else borrowed.pop(node)
            while True:  # along a chain, without touching the heap
                if node.seq < changed:
                    check_alive(node)
                kind = node.kind
                if kind == SINGLE and plain:
                    parent = node.p0
                    g = node.vjp(g) if retain else node.pop(g)
                    if not heap and parent.seq > since:
                        node = parent
                        continue
                    pairs: Any = ((parent, g),)
                elif kind == PAIR and plain:
                    parent, pg, side, sg = node.vjp(g) if retain else node.pop(g)
                    if side.seq <= since and not heap and parent.seq > since:
                        # a chain with a leaf at its side, such as a weight
                        total = owned_get(side)
                        if total is not None:
                            add_into(total, sg)
                        else:
                            _deliver(side, sg, borrowed, owned)
                        node = parent
                        g = pg
                        continue
                    pairs = ((parent, pg), (side, sg))
                elif kind == HOOKED:
                    g = run_hooks(node.extra, g, wrap)
                    changed = mutations.last
                    pairs = pullback(node, g, wrap)
                    if not retain:
                        node.clear()
                elif plain:
                    pairs = node.vjp(g) if retain else node.pop(g)
                else:
                    pairs = pullback(node, g, wrap)
                    if not retain:
                        node.clear()

                hand = None  # one waiting node outside the heap
                hand_g: Any = None
                for parent, pg in pairs:
                    total = owned_get(parent)
                    if total is not None:
                        if pg is not None:
                            add_into(total, pg)
                    elif pg is None:
                        continue
                    elif parent in borrowed:
                        _deliver(parent, pg, borrowed, owned)
                    elif parent.seq <= since:
                        borrowed[parent] = pg
                    elif hand is None:
                        hand = parent
                        hand_g = pg
                    elif hand is parent:
                        hand_g = plus(hand_g, pg)
                    else:
                        borrowed[parent] = pg
                        heappush(heap, (-parent.seq, parent))
                if hand is None:
                    break
                if heap and -heap[0][0] > hand.seq:
                    borrowed[hand] = hand_g
                    node = heappushpop(heap, (-hand.seq, hand))[1]
                    g = owned.pop(node) if node in owned else borrowed.pop(node)
                else:
                    node = hand
                    g = hand_g
    except Exception as error:
        if node is not None and not isinstance(error, FreedGraphError | InplaceError):
            error.add_note(f"gpugrad: in the backward pass of {describe(node)}")
        raise
    for end in (*borrowed, *owned):
        if end.seq == FREED:
            check_alive(end)
    return borrowed, owned


def _deliver(parent: Any, g: Any, borrowed: dict[Any, Any], owned: dict[Any, Any]) -> None:
    """Leave a first or second gradient with ``parent``; a sum that ``+=`` can change is owned."""
    if parent not in borrowed:
        borrowed[parent] = g
        return
    total = graph.plus(borrowed[parent], g)
    if type(total) in NOT_IN_PLACE or total.shape == () or not SPACES[type(total)].mutable:
        borrowed[parent] = total
    else:
        del borrowed[parent]
        owned[parent] = total


def run_hooks(extra: Extra, g: Any, wrap: Callable[..., Any] | None) -> Any:
    """Hand a gradient to the hooks of its node; each may return another in its place.

    What goes on is a copy: hooks and ``.grad`` keep what they were given.
    """
    tensor = through_hooks(extra.hooks, differentiable.as_tensor(g))
    if extra.retain:
        extra.grad = tensor if extra.grad is None else extra.grad + tensor
    out = differentiable.copy(tensor)
    return out.data if wrap is None else out


def through_hooks(hooks: dict[int, Callable[[Any], Any]], g: Any) -> Any:
    """The tensor ``g`` after all hooks have seen it, of the shape and dtype that it had."""
    for hook in list(hooks.values()):
        before = next_seq()
        out = hook(g)
        if mutations.last > before and mutations.after(g.data, before):
            raise InplaceError(
                "register_hook: a hook changed its gradient in place, which other branches of the "
                "graph may share; return the new gradient (return g * 2 in place of g *= 2)"
            )
        if out is None:
            continue
        out = differentiable.as_tensor(out)
        shape = getattr(out.data, "shape", None)
        if shape is None:
            raise DTypeError(
                f"register_hook: a hook returns a tensor or None, not {type(out.data).__name__}"
            )
        if shape != g.shape:
            raise ShapeError(
                f"register_hook: a hook returned shape {tuple(shape)} for a gradient of shape "
                f"{g.shape}; they must be equal"
            )
        g = out if out.dtype == g.dtype else differentiable.astype(out, g.dtype)
    return g
