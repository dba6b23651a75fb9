"""Functions of functions: grad, vjp, jvp, hvp, jacobian, hessian."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any

from gpugrad.core.conversion import asarray
from gpugrad.core.graph import Leaf, Node, Pick, describe, next_seq, reachable
from gpugrad.core.modes import enable_grad, is_grad_enabled, no_grad
from gpugrad.core.primitive import differentiable, linear, sample
from gpugrad.core.rules import evaluate, pullback
from gpugrad.core.tensor import Tensor, as_tensor, check_differentiable, seed, tensor_of
from gpugrad.core.tree import flatten
from gpugrad.core.walk import walk
from gpugrad.errors import DTypeError, GraphError, ShapeError

Function = Callable[..., Any]


@linear(
    transpose=lambda g: g,
    view=True,
    samples=lambda: [sample([1.0, 2.0, 3.0])],
    reference=lambda x: x,
)
def identity(m, x, /):  # type: ignore[no-untyped-def]
    """``x`` itself as a node of its own in the graph. Nothing is copied.

    >>> import gpugrad as gg
    >>> gg.identity(gg.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    return x


# -- inputs and outputs ----------------------------------------------------------------------------


class _Inside(threading.local):
    """How many differentiated calls this thread is inside of."""

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1


_inside = _Inside()


class _Call:
    """One call of ``f`` with the arguments ``argnums`` made into fresh inputs of the graph.

    An input that is recorded already becomes a node of its own on top, so that derivatives of this
    call can be differentiated again by whoever recorded it. Nodes made by the call are newer than
    ``since``: a walk through the call stops at everything older and leaves it intact.
    """

    def __init__(
        self, name: str, f: Function, args: Sequence[Any], kwargs: dict[str, Any],
        argnums: Sequence[int],
    ) -> None:  # fmt: skip
        for i in argnums:
            if not -len(args) <= i < len(args):
                raise GraphError(f"{name}: argnums={i}, but the call has {len(args)} arguments")
        if len({i % len(args) for i in argnums}) != len(argnums):
            raise GraphError(f"{name}: argnums={tuple(argnums)} names an argument twice")
        self.name = name
        full = list(args)
        self.inputs: list[Tensor] = []
        self.rebuilders = []
        watched = is_grad_enabled()
        with enable_grad(), _inside:
            for i in argnums:
                leaves, rebuild = flatten(full[i])
                fresh = [self._input(x) for x in leaves]
                full[i] = rebuild(list(fresh))
                self.inputs += fresh
                self.rebuilders.append((rebuild, len(fresh)))
            self.since = next_seq()
            # Whoever records an input, or a call around this one that may differentiate with
            # respect to something else in f, wants derivatives that are recorded too.
            nested = _inside.depth > 1 or any(not x.is_leaf for x in self.inputs)
            self.recorded = watched and nested
            self.output = f(*full, **kwargs)

    def _input(self, x: Any) -> Tensor:
        x = asarray(x)
        check_differentiable(x.data, self.name)
        if x._node is not None:
            return differentiable.identity(x)  # type: ignore[no-any-return]
        return tensor_of(x.data, Leaf())

    def scalar(self, y: Any) -> Tensor:
        if not isinstance(y, Tensor):
            y = asarray(y)
        if y.size != 1:
            raise GraphError(
                f"{self.name}: the function returned shape {y.shape}; a single number is needed "
                "(reduce it, or use jacobian or vjp)"
            )
        return y  # type: ignore[no-any-return]

    def pull(
        self, ys: Sequence[Any], gs: Sequence[Any], create: bool, retain: bool
    ) -> list[Tensor]:
        """Gradients of the inputs for the gradients ``gs`` of the outputs ``ys``."""
        seeds = [(y._node, g) for y, g in zip(ys, gs, strict=True)
                 if isinstance(y, Tensor) and y._node is not None]  # fmt: skip
        borrowed, owned = walk(
            seeds, retain=retain, wrap=tensor_of if create else None, since=self.since
        )
        out = []
        held = {id(as_tensor(g).data) for _, g in seeds}
        for x in self.inputs:
            g = owned.get(x._node, borrowed.get(x._node))
            if g is None:
                out.append(differentiable.zeros_like(x.detach()))
                continue
            g = as_tensor(g)  # and memory of its own: another input may have received the same
            if id(g.data) in held or (x._node not in owned and x.backend.is_view(g.data)):
                g = differentiable.copy(g)
            held.add(id(g.data))
            out.append(g)
        return out

    def nest(self, flat: Sequence[Tensor]) -> list[Any]:
        """One tree per differentiated argument."""
        out, at = [], 0
        for rebuild, n in self.rebuilders:
            out.append(rebuild(list(flat[at : at + n])))
            at += n
        return out


def _argnums(argnums: int | Sequence[int]) -> tuple[int, ...]:
    return (argnums,) if isinstance(argnums, int) else tuple(argnums)


def _create(call: _Call, create_graph: bool | None) -> bool:
    return call.recorded if create_graph is None else create_graph


def _detached(aux: Any) -> Any:
    """What a function returned beside its result, outside the graph as the result is."""
    leaves, rebuild = flatten(aux)
    if not any(isinstance(x, Tensor) and x._node is not None for x in leaves):
        return aux
    return rebuild([x.detach() if isinstance(x, Tensor) else x for x in leaves])


# -- reverse mode ----------------------------------------------------------------------------------


def value_and_grad(
    f: Function,
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    create_graph: bool | None = None,
) -> Function:
    """A function that returns ``(f(...), gradient)``; see :func:`grad`.

    >>> import gpugrad as gg
    >>> gg.value_and_grad(lambda x: gg.sum(x * x))(gg.tensor([1.0, 2.0]))
    (tensor(5.), tensor([2., 4.]))
    """
    numbers = _argnums(argnums)

    @wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        call = _Call("grad", f, args, kwargs, numbers)
        output, aux = call.output if has_aux else (call.output, None)
        y = call.scalar(output)
        create = _create(call, create_graph)
        gradients = call.nest(call.pull([y], [seed(y, None, create)], create, retain=create))
        gradient = gradients[0] if isinstance(argnums, int) else tuple(gradients)
        value = y if create else y.detach()
        aux = aux if create else _detached(aux)
        return ((value, aux), gradient) if has_aux else (value, gradient)

    return run


def grad(
    f: Function,
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    create_graph: bool | None = None,
) -> Function:
    """A function that returns the gradient of ``f``, which must return a single number.

    Parameters
    ----------
    f:
        Takes arrays, tensors, numbers, or nested tuples, lists and dictionaries of them.
    argnums:
        The argument to differentiate, or several; the gradient has its structure (with several, a
        tuple of them).
    has_aux:
        ``f`` returns ``(y, aux)``, and the result is ``(gradient, aux)``.
    create_graph:
        Record the gradient, to differentiate it again. Default: yes where an argument is recorded
        itself, and inside another differentiated function, so that ``grad(grad(f))`` works as it
        reads.

    >>> import gpugrad as gg
    >>> cube = lambda x: x * x * x
    >>> gg.grad(cube)(2.0), gg.grad(gg.grad(cube))(2.0)
    (tensor(12.), tensor(12.))
    """
    both = value_and_grad(f, argnums, has_aux=has_aux, create_graph=create_graph)

    @wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        value, gradient = both(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return run


def vjp(f: Function, *primals: Any, has_aux: bool = False) -> Any:
    """``f(*primals)`` and the function that multiplies a gradient with its transposed Jacobian.

    The function takes a gradient of the result's shape (or structure) and returns a tuple, one
    gradient per primal. It can be called any number of times. With ``has_aux`` the result is
    ``(y, pull, aux)``.

    >>> import gpugrad as gg
    >>> y, pull = gg.vjp(lambda x: x * x, gg.tensor([1.0, 2.0]))
    >>> pull(gg.tensor([1.0, 10.0]))
    (tensor([ 2., 40.]),)
    """
    call = _Call("vjp", f, primals, {}, range(len(primals)))
    output, aux = call.output if has_aux else (call.output, None)
    ys, rebuild = flatten(output)
    ys = [asarray(y) for y in ys]

    def pull(gradient: Any) -> tuple[Any, ...]:
        gs = _matching("vjp", gradient, ys)
        create = is_grad_enabled() and (
            call.recorded or any(isinstance(g, Tensor) and g._node is not None for g in gs)
        )
        raw = [seed(y, g, create) for y, g in zip(ys, gs, strict=True)]
        return tuple(call.nest(call.pull(ys, raw, create, retain=True)))

    y = rebuild(ys if call.recorded else [y.detach() for y in ys])
    aux = aux if call.recorded else _detached(aux)
    return (y, pull, aux) if has_aux else (y, pull)


def _matching(name: str, tree: Any, likes: Sequence[Tensor]) -> list[Any]:
    values = [tree] if len(likes) == 1 and _is_numeric(tree) else flatten(tree)[0]
    if len(values) != len(likes):
        raise ShapeError(f"{name}: {len(values)} arrays were given where {len(likes)} are needed")
    return values


def _is_numeric(tree: Any) -> bool:
    """A nested list of numbers is one array here, not a tree."""
    leaves = flatten(tree)[0] if isinstance(tree, list) else []
    return not isinstance(tree, tuple | dict | list) or (
        bool(leaves) and all(isinstance(x, int | float) for x in leaves)
    )


# -- forward mode ----------------------------------------------------------------------------------


def jvp(f: Function, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """``f(*primals)`` and its directional derivative along ``tangents``.

    Tangents have the structure and shapes of the primals. The function is recorded once and its
    graph walked forward, each node multiplying the tangents of its inputs by its local derivatives.

    >>> import gpugrad as gg
    >>> gg.jvp(lambda x: x * x, (gg.tensor([1.0, 2.0]),), (gg.tensor([1.0, 10.0]),))
    (tensor([1., 4.]), tensor([ 2., 40.]))
    """
    if not isinstance(primals, tuple | list) or not isinstance(tangents, tuple | list):
        raise GraphError("jvp: primals and tangents are tuples, one entry per argument of f")
    call = _Call("jvp", f, primals, {}, range(len(primals)))
    given = []
    for t, x in zip(_matching("jvp", tangents, call.inputs), call.inputs, strict=True):
        t = t if isinstance(t, Tensor) else tensor_of(x.backend.asarray(t, dtype=x.dtype))
        if t.shape != x.shape:
            raise ShapeError(f"jvp: a tangent of shape {t.shape} for a primal of shape {x.shape}")
        given.append(t)
    ys, rebuild = flatten(call.output)
    ys = [asarray(y) for y in ys]
    create = is_grad_enabled() and (call.recorded or any(t._node is not None for t in given))
    with nullcontext() if create else no_grad():
        known = {x._node: t for x, t in zip(call.inputs, given, strict=True)}
        _push([y._node for y in ys if y._node is not None], known, call.since, create)
        moved = [known.get(y._node) if y._node is not None else None for y in ys]
        out = [differentiable.zeros_like(y.detach()) if t is None else t.to(dtype=y.dtype)
               for t, y in zip(moved, ys, strict=True)]  # fmt: skip
    return rebuild(ys if create else [y.detach() for y in ys]), rebuild(out)


def _push(roots: Sequence[Any], known: dict[Any, Any], since: int, create: bool) -> None:
    """Carry tangents from the inputs in ``known`` up to ``roots``, filling ``known`` on the way."""
    wrap: Function = tensor_of if create else lambda x, _node=None: tensor_of(x)
    for node in reversed(list(reachable(roots, since))):
        if node in known or node.seq <= since:
            continue
        moving = {i: known[p] for i, p in node.parents() if p in known}
        if not moving:
            continue
        if isinstance(node, Pick):
            tangent = moving[0][node.index]
        else:
            tangent = _pushforward(node, moving, wrap)
        if tangent is not None:
            for t in tangent if isinstance(tangent, list) else (tangent,):
                if t is not None and t.dtype.kind == "c":
                    raise DTypeError(
                        f"jvp: the tangent of {describe(node)} is {t.dtype}; derivatives through "
                        "complex numbers are not supported"
                    )
            known[node] = tangent


def _pushforward(node: Node, moving: dict[int, Any], wrap: Function) -> Any:
    """The tangent of a node's result, from the tangents of its operands."""
    made = node.primitive
    if node.pull is not None:
        raise GraphError(
            f"jvp: no forward mode through {made.name}; call the function itself where it is used"
        )
    rules = made.rules if made.elementwise else made.jvps
    if made.linear:
        return made.function(moving[0], **node.parameters())
    if rules is None:
        return _transposed(node, moving, wrap)
    out = None
    for i, t in moving.items():
        rule = rules[i]
        if rule is None:
            continue
        part = evaluate(node, rule, t, wrap)
        out = part if out is None else out + part
    metas = node.metas()
    if out is not None and metas is not None and out.shape != metas[-1]:
        out = differentiable.broadcast_to(out, metas[-1])
    return out


def _transposed(node: Node, moving: dict[int, Any], wrap: Function) -> Any:
    """A jvp from the vjp: that one is linear in ``g``, and its transpose is the Jacobian.

    The rule runs once on a dummy gradient that is recorded, and the tangents walk back through what
    it recorded.
    """
    metas = node.metas()
    assert metas is not None, "only element-wise and linear nodes come without shapes"
    first = next(iter(moving.values()))
    shapes = metas[-1] if node.primitive.outputs != 1 else [metas[-1]]
    with enable_grad():
        dummies = [
            tensor_of(differentiable.zeros(s, dtype=first.dtype, device=first.device).data, Leaf())
            for s in shapes
        ]
        g: Any = dummies[0] if node.primitive.outputs == 1 else dict(enumerate(dummies))
        since = next_seq()
        pairs = pullback(node, g, wrap)
    seeds = [
        (z._node, moving[i])
        for (i, _), (_, z) in zip(node.parents(), pairs, strict=True)
        if i in moving and z is not None and z._node is not None
    ]
    create = is_grad_enabled()
    if not create:
        seeds = [(n, t.data) for n, t in seeds]
    # A recorded tangent is computed from what the rule recorded, which therefore stays.
    borrowed, owned = walk(seeds, retain=create, wrap=tensor_of if create else None, since=since)
    found = [owned.get(d._node, borrowed.get(d._node)) for d in dummies]
    tensors = [None if x is None else x if isinstance(x, Tensor) else tensor_of(x) for x in found]
    return tensors[0] if node.primitive.outputs == 1 else tensors


# -- second order ----------------------------------------------------------------------------------


def hvp(f: Function, primals: Any, tangents: Any) -> Any:
    """The Hessian of ``f`` at ``primals`` times ``tangents``, without forming the Hessian.

    ``f`` returns a single number. Both arguments are tuples, one entry per argument of ``f``, and
    so is the result; for a function of one argument the bare array will do.

    >>> import gpugrad as gg
    >>> f = lambda x: gg.sum(x * x * x)
    >>> gg.hvp(f, gg.tensor([1.0, 2.0]), gg.tensor([1.0, 1.0]))
    tensor([ 6., 12.])
    """
    bare = not isinstance(primals, tuple)
    xs, vs = ((primals,), (tangents,)) if bare else (primals, tangents)
    out = jvp(grad(f, argnums=tuple(range(len(xs))), create_graph=True), xs, vs)[1]
    return out[0] if bare else out


def jacobian(f: Function, argnums: int = 0, *, mode: str = "reverse") -> Function:
    """A function that returns the Jacobian of ``f``: shape ``y.shape + x.shape``.

    Parameters
    ----------
    mode:
        ``"reverse"`` runs one backward pass per element of the result, ``"forward"`` one forward
        pass per element of the argument: take the smaller side.

    >>> import gpugrad as gg
    >>> gg.jacobian(lambda x: x * x)(gg.tensor([1.0, 2.0]))
    tensor([[2., 0.],
            [0., 4.]])
    """
    if mode not in ("reverse", "forward"):
        raise GraphError(f"jacobian: mode is 'reverse' or 'forward', not {mode!r}")

    @wraps(f)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        if not -len(args) <= argnums < len(args):
            raise GraphError(f"jacobian: argnums={argnums}, but the call has {len(args)} arguments")
        x = asarray(args[argnums])

        def of_x(value: Any) -> Tensor:
            full = list(args)
            full[argnums] = value
            y = f(*full, **kwargs)
            if isinstance(y, tuple | list | dict):
                raise GraphError(
                    f"jacobian: the function returned a {type(y).__name__}; a single array is "
                    "needed (take jacobians of its parts, or use vjp or jvp)"
                )
            return asarray(y)

        if mode == "reverse":
            y, pull = vjp(of_x, x)
            rows = [pull(e)[0] for e in _basis(y)]
            return _assembled(rows, y, (*y.shape, *x.shape))
        pairs = [jvp(of_x, (x,), (e,)) for e in _basis(x)]
        y = pairs[0][0] if pairs else of_x(x)
        columns = [column for _, column in pairs]
        flat = _assembled(columns, x, (*x.shape, *y.shape))
        split = len(x.shape)
        order = (*range(split, flat.ndim), *range(split))
        return differentiable.permute_dims(flat, order)  # type: ignore[no-any-return]

    return run


def _basis(x: Tensor) -> list[Tensor]:
    """The unit arrays of the shape of ``x``."""
    eye = differentiable.eye(x.size, dtype=x.dtype, device=x.device)
    return [differentiable.reshape(eye[i], x.shape) for i in range(x.size)]


def _assembled(parts: list[Tensor], like: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not parts:
        return differentiable.zeros(shape, dtype=like.dtype, device=like.device)  # type: ignore[no-any-return]
    return differentiable.reshape(differentiable.stack(parts), shape)  # type: ignore[no-any-return]


def hessian(f: Function, argnums: int = 0) -> Function:
    """A function that returns the Hessian of ``f``: shape ``x.shape + x.shape``.

    ``f`` returns a single number.

    >>> import gpugrad as gg
    >>> gg.hessian(lambda x: gg.sum(x * x * x))(gg.tensor([1.0, 2.0]))
    tensor([[ 6.,  0.],
            [ 0., 12.]])
    """
    return jacobian(grad(f, argnums, create_graph=True), argnums)
