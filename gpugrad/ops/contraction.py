"""Einstein summation, from permutations, matrix products and sums."""

# A declared operation is known to return Any; what it returns is a tensor.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import composite, sample
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.ops.indexing import subscript
from gpugrad.ops.linalg import matmul
from gpugrad.ops.manipulation import permute_dims, reshape
from gpugrad.ops.reductions import sum
from gpugrad.ops.samples import normal

__all__ = ["einsum"]

#: A label is a letter of the subscripts, or "...i" for an axis that an ellipsis stands for, counted
#: from the last.
Labels = tuple[str, ...]


def _fail(subscripts: str, what: str) -> ShapeError:
    return ShapeError(f"einsum({subscripts!r}): {what}")


def _labels(subscripts: str, term: str, ndim: int | None, hidden: int) -> Labels:
    """The labels of one term; an ellipsis stands for what ``ndim`` leaves, or ``hidden`` axes."""
    before, dots, after = term.partition("...")
    if any(not c.isalpha() for c in before + after):
        raise _fail(subscripts, f"{term!r} may hold letters and one ellipsis '...' only")
    if ndim is not None:
        hidden = ndim - len(before) - len(after)
        if hidden < 0 or (hidden and not dots):
            raise _fail(
                subscripts,
                f"{term!r} names {len(before + after)} axes, its operand has {ndim}"
                + ("; add '...' for the axes in front" if hidden > 0 else ""),
            )
    dotted = [f"...{i}" for i in range(hidden, 0, -1)] if dots else []
    return (*before, *dotted, *after)


def _parse(subscripts: str, shapes: list[tuple[int, ...]]) -> tuple[list[Labels], Labels]:
    """The labels of every operand and of the result."""
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(shapes):
        raise _fail(subscripts, f"{len(terms)} terms for {len(shapes)} operands")
    labels = [_labels(subscripts, t, len(s), 0) for t, s in zip(terms, shapes)]
    every = [x for term in labels for x in term]
    dotted = sorted({x for x in every if x[0] == "."}, key=lambda x: -int(x[3:]))
    if not arrow:  # what appears once, in alphabetical order
        once = sorted(x for x in {*every} if every.count(x) == 1 and x[0] != ".")
        return labels, (*dotted, *once)
    result = _labels(subscripts, output, None, len(dotted))
    if len({*result}) != len(result):
        raise _fail(subscripts, f"the result {output!r} names an axis twice")
    for x in result:
        if x not in every:
            raise _fail(subscripts, f"the result names {x!r}, which no operand has")
    return labels, result


def _sizes(subscripts: str, labels: list[Labels], shapes: list[tuple[int, ...]]) -> dict[str, int]:
    """The length of every label; those of length one broadcast."""
    sizes: dict[str, int] = {}
    for term, shape in zip(labels, shapes):
        own: dict[str, int] = {}
        for x, n in zip(term, shape):
            known = sizes.get(x, 1)
            if own.setdefault(x, n) != n or (n != 1 and known not in (1, n)):
                lengths = f"{own[x]} and {n}" if own[x] != n else f"{known} and {n}"
                raise _fail(subscripts, f"axis {x!r} has {lengths} elements; shapes {shapes}")
            sizes[x] = known if n == 1 else n
    return sizes


def _diagonal(x: Tensor, labels: Labels, label: str) -> tuple[Tensor, Labels]:
    """One axis in place of two that carry the same label: every n+1-th element of both as one."""
    i, j = [k for k, x in enumerate(labels) if x == label][:2]
    rest = [k for k in range(len(labels)) if k not in (i, j)]
    x = permute_dims(x, (*rest, i, j))
    *lead, n, _ = x.shape
    x = reshape(x, (*lead, n * n))
    return subscript(x, (..., slice(None, None, n + 1))), (*(labels[k] for k in rest), label)


def _reduced(x: Tensor, labels: Labels, keep: set[str]) -> tuple[Tensor, Labels]:
    """``x`` summed over the axes whose labels are not in ``keep``."""
    gone = tuple(k for k, label in enumerate(labels) if label not in keep)
    if not gone:
        return x, labels
    return sum(x, axis=gone), tuple(label for label in labels if label in keep)


def _ordered(x: Tensor, labels: Labels, order: Labels) -> Tensor:
    """``x`` with its axes in the order of ``order``."""
    if labels == order:
        return x
    return permute_dims(x, tuple(map(labels.index, order)))


def _shaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x if x.shape == shape else reshape(x, shape)


def _pair(
    a: Tensor, a_labels: Labels, b: Tensor, b_labels: Labels, keep: set[str], sizes: dict[str, int]
) -> tuple[Tensor, Labels]:
    """The product of two operands summed over the labels they share that nobody needs any more."""
    a, a_labels = _reduced(a, a_labels, keep | {*b_labels})
    b, b_labels = _reduced(b, b_labels, keep | {*a_labels})
    both = tuple(x for x in a_labels if x in b_labels)
    stack = tuple(x for x in both if x in keep)
    summed = tuple(x for x in both if x not in keep)
    left = tuple(x for x in a_labels if x not in both)
    right = tuple(x for x in b_labels if x not in both)

    def lengths(labels: Labels) -> tuple[int, ...]:
        return tuple(sizes[x] for x in labels)

    labels = stack + left + right
    if not summed:
        a = _shaped(_ordered(a, a_labels, stack + left), lengths(stack + left) + (1,) * len(right))
        b = _shaped(
            _ordered(b, b_labels, stack + right),
            lengths(stack) + (1,) * len(left) + lengths(right),
        )
        return a * b, labels
    n, k, p = (math.prod(lengths(x)) for x in (left, summed, right))
    lead = (math.prod(lengths(stack)),) if stack else ()
    a = _shaped(_ordered(a, a_labels, stack + left + summed), (*lead, n, k))
    b = _shaped(_ordered(b, b_labels, stack + summed + right), (*lead, k, p))
    return _shaped(matmul(a, b), lengths(labels)), labels


def _order(subscripts: str, operands: list[Tensor]) -> list[tuple[int, ...]]:
    """Which operands to combine, step by step, so that intermediate results stay small."""
    if len(operands) < 3:
        return [tuple(range(len(operands)))]
    blanks = [np.broadcast_to(np.empty(()), x.shape) for x in operands]
    return np.einsum_path(subscripts, *blanks, optimize="greedy")[0][1:]


@composite(
    samples=lambda: [
        sample("ij,jk->ik", normal((2, 3), 0), normal((3, 4), 1)),
        sample("bij,bjk->bik", normal((2, 3, 4), 0), normal((2, 4, 2), 1)),
        sample("ii->i", normal((3, 3)), note="a diagonal"),
        sample("iji->j", normal((3, 2, 3))),
        sample("...ij->...", normal((2, 3, 4))),
        sample("ij,kj", normal((2, 3), 0), normal((4, 3), 1), note="result implied"),
        sample("i,j->ji", normal((2,), 0), normal((3,), 1)),
        sample("ij,jk,kl->il", normal((2, 3), 0), normal((3, 4), 1), normal((4, 2), 2)),
    ],
    reference=np.einsum,
)
def einsum(subscripts: str, *operands: Any) -> Tensor:
    """Products of the operands summed over the axes whose letters the result does not name.

    ``"ij,jk->ik"`` is a matrix product. A letter that an operand names twice takes its diagonal,
    ``...`` stands for axes that broadcast, and without ``->`` the result has the letters that
    appear once, in alphabetical order. Axes of length one broadcast. Three and more operands are
    combined two by two in an order that keeps intermediate results small.

    Raises ShapeError, naming the axis, when the operands do not fit the subscripts.

    >>> import gpugrad as gg
    >>> gg.einsum("ij,j->i", gg.asarray([[1.0, 2.0], [3.0, 4.0]]), gg.asarray([1.0, 1.0]))
    tensor([3., 7.])
    """
    if not isinstance(subscripts, str):
        raise ParameterError("einsum: a string of subscripts comes first: einsum('ij,j', a, b)")
    arrays = [asarray(x) for x in operands]
    shapes = [x.shape for x in arrays]
    labels, output = _parse(subscripts, shapes)
    sizes = _sizes(subscripts, labels, shapes)
    terms: list[tuple[Tensor, Labels]] = []
    for x, term in zip(arrays, labels):
        for label in dict.fromkeys(term):
            for _ in range(term.count(label) - 1):
                x, term = _diagonal(x, term, label)
        narrow = tuple(k for k, label in enumerate(term) if x.shape[k] != sizes[label])
        if narrow:  # of length one where another operand has more: it multiplies all of them
            x = reshape(x, tuple(n for k, n in enumerate(x.shape) if k not in narrow))
            term = tuple(label for k, label in enumerate(term) if k not in narrow)
        terms.append((x, term))
    for step in _order(subscripts, arrays):
        chosen = [terms.pop(i) for i in sorted(step, reverse=True)][::-1]
        keep = {*output}.union(*(term for _, term in terms))
        x, term = chosen[0]
        for n, (y, other) in enumerate(chosen[1:], start=2):
            later = keep.union(*(t for _, t in chosen[n:]))
            x, term = _pair(x, term, y, other, later, sizes)
        terms.append(_reduced(x, term, keep))
    ((x, term),) = terms
    return _ordered(x, term, output)
