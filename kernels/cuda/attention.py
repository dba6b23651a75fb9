"""Attention, forward and backward: the kernels, that never write the matrix of all scores.

Forward, queries own the rows of a block (`tiles.py`), and keys pass by: each query keeps its
greatest score so far and the sum of exponentials relative to it. Backward, one body serves three
kernels: that of the values' gradient, which also finds what the others need of the results; that of
the queries', whose own rows are queries; and that of the keys'. Each makes the scores again, from
the logarithm of the sum of exponentials that the forward has kept for each query.

On a GPU with 128 multiplications a clock of each multiprocessor, products are expected to take
about three quarters of that, and the kernels to reach 50 to 60 percent of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from gpugrad.kernels.cuda.language import (
    Bytes,
    Elements,
    Int,
    Kernel,
    Number,
    Size,
    Values,
    _Count,
    cuda,
    device,
    kernel,
)
from gpugrad.kernels.cuda.launch import Entry
from gpugrad.kernels.cuda.tiles import (
    EACH,
    ROOM,
    TILE,
    across,
    down,
    first_first,
    gather_rows,
    hide_own,
    hide_theirs,
    last_first,
    no_levels,
    no_thinning,
    of_keys,
    of_queries,
    products,
    put_rows,
    put_tile,
    result_levels,
    row_at,
    row_greatest,
    row_sum,
    some_hidden,
    take_tile,
    thin_own,
    thinned_own,
    thinned_theirs,
)
from gpugrad.kernels.template import STORAGE, Placeholder, T, Target, exp, log

INF = math.inf


class Constant(_Count):
    """A number that a body is bound to."""

    def instance(self, target: Target, storage: str) -> Any:
        return self.packs


#: Columns of the result that a thread has.
WIDTH: Any = Placeholder("WIDTH")


# -- forward --------------------------------------------------------------------------------------


@device
def soften(s: Any, gathered: Any, top: Any, total: Any, r: Any, width: Any) -> None:
    """Scores of a query become exponentials relative to its greatest so far; what has been
    gathered relative to an earlier one follows."""
    best = top[r]
    for c in range(EACH):
        x = s[r * EACH + c]
        best = x if x > best else best
    best = row_greatest(best)
    # Where nothing has been seen yet, there is nothing to be relative to.
    base = T(0) if best == T(-INF) else best
    shrunk = exp(top[r] - base)
    top[r] = best
    total[r] *= shrunk
    for c in range(EACH):
        x = exp(s[r * EACH + c] - base)
        s[r * EACH + c] = x
        total[r] += x
    for w in range(width):
        gathered[r * width + w] *= shrunk


@kernel
def forward_kernel(
    q: Elements, k: Elements, v: Elements, y: Elements, lse: Values, seen: Bytes, added: Values,
    matrices: Size, heads: Size, queries: Size, keys: Size, features: Size, out: Size,
    q_outer: Size, q_head: Size, q_row: Size, k_outer: Size, k_head: Size, k_row: Size,
    v_outer: Size, v_head: Size, v_row: Size, y_outer: Size, y_head: Size, y_row: Size,
    mask_outer: Size, mask_head: Size, below: Size, beside: Size, kind: Int, is_causal: Int,
    scale: Number, factor: Number, dropped: Size, o0: Size, o1: Size, s0: Size, s1: Size,
    aligned: Int,
) -> None:  # fmt: skip
    """Results of some queries, and the logarithm of the sum of each one's exponentials."""
    panel = cuda.shared.array(ROOM, np.complex128).view(T)
    s = cuda.local.array(16, T)
    gathered = cuda.local.array(32, T)
    top = cuda.local.array(4, T)
    total = cuda.local.array(4, T)
    unit = last_first()
    own = np.int64(cuda.blockDim.x >> 2)
    matrix = unit % matrices
    place = (matrix // heads, matrix % heads)
    first = unit // matrices * own
    mask = (kind, row_at(place, 0, mask_outer, mask_head, below), below, beside)
    sizes = (queries, keys, is_causal)
    drop = (dropped, o0, o1, s0, s1)
    number = matrix * queries
    for r in range(EACH):
        top[r] = T(-INF)
        total[r] = T(0)
        for w in range(WIDTH):
            gathered[r * WIDTH + w] = T(0)
    j, stop = of_queries(first, own, keys, is_causal)
    while j < stop:
        products(
            panel, s, q, row_at(place, first, q_outer, q_head, q_row), q_row, queries - first,
            k, row_at(place, j, k_outer, k_head, k_row), k_row, keys - j, features, aligned,
        )  # fmt: skip
        query = first + down() * EACH
        key = j + across() * EACH
        for e in range(EACH * EACH):
            s[e] *= scale
        if some_hidden(query, key, sizes, mask):
            put_tile(panel, s)
            hide_own(panel, query, key, sizes, seen, added, mask)
            take_tile(panel, s)
        soften(s, gathered, top, total, 0, WIDTH)
        soften(s, gathered, top, total, 1, WIDTH)
        soften(s, gathered, top, total, 2, WIDTH)
        soften(s, gathered, top, total, 3, WIDTH)
        put_tile(panel, s)
        if dropped > 0:
            thin_own(panel, query, key, number, sizes, factor, drop)
        gather_rows(
            panel, gathered, v, row_at(place, j, v_outer, v_head, v_row), v_row, stop - j, out,
            WIDTH, aligned,
        )  # fmt: skip
        j += TILE
    for r in range(EACH):
        whole = row_sum(total[r])
        # A query that sees nothing gets zeros; from infinity, its shares are found to be zeros.
        blind = whole == T(0)
        for w in range(WIDTH):
            gathered[r * WIDTH + w] *= T(0) if blind else T(1) / whole
        i = first + down() * EACH + r
        if across() == 0 and i < queries:
            lse[number + i] = T(INF) if blind else top[r] + log(whole)
    put_rows(
        y, row_at(place, first, y_outer, y_head, y_row), y_row, queries - first, out, gathered,
        WIDTH,
    )  # fmt: skip


# -- backward -------------------------------------------------------------------------------------

order: Any = Placeholder("order")
levels: Any = Placeholder("levels")
span: Any = Placeholder("span")
turned: Any = Placeholder("turned")
slopes: Any = Placeholder("slopes")
weight: Any = Placeholder("weight")
which: Any = Placeholder("which")
hide: Any = Placeholder("hide")
thin_slopes: Any = Placeholder("thin_slopes")
thin_shares: Any = Placeholder("thin_shares")
weigh: Any = Placeholder("weigh")


@device
def _weigh(s: Any, d: Any, r: Any, query: Any, lse: Any, level: Any, scale: Any) -> None:
    """Scores of an own row become weights; `lse` and `level` are numbered as `query` is."""
    for c in range(EACH):
        e = r * EACH + c
        if s[e] == T(-INF):  # among them those of queries that there are not
            s[e] = T(0)
        else:
            i = query + which(r, c)
            s[e] = weight(exp(s[e] - lse[i]), d[e], level[i], scale)


@kernel
def gradient_kernel(
    own: Elements, passing: Elements, g: Elements, v: Elements, x: Elements, y: Elements,
    gx: Elements, lse: Values, level: Values, seen: Bytes, added: Values, matrices: Size,
    heads: Size, rows: Size, others: Size, features: Size, out: Size, columns: Size,
    own_outer: Size, own_head: Size, own_row: Size, passing_outer: Size, passing_head: Size,
    passing_row: Size, g_outer: Size, g_head: Size, g_row: Size, v_outer: Size, v_head: Size,
    v_row: Size, x_outer: Size, x_head: Size, x_row: Size, y_outer: Size, y_head: Size,
    y_row: Size, gx_outer: Size, gx_head: Size, gx_row: Size, mask_outer: Size, mask_head: Size,
    below: Size, beside: Size, kind: Int, is_causal: Int, scale: Number, factor: Number,
    dropped: Size, o0: Size, o1: Size, s0: Size, s1: Size, aligned: Int,
) -> None:  # fmt: skip
    """Gradients of some own rows: passing rows of `x`, weighted.

    Weights come of own · passing, the scores, and of g · v, the slopes.
    """
    panel = cuda.shared.array(ROOM, np.complex128).view(T)
    s = cuda.local.array(16, T)
    d = cuda.local.array(16, T)
    gathered = cuda.local.array(32, T)
    unit = order()
    size = np.int64(cuda.blockDim.x >> 2)
    matrix = unit % matrices
    place = (matrix // heads, matrix % heads)
    mask = (kind, row_at(place, 0, mask_outer, mask_head, below), below, beside)
    drop = (dropped, o0, o1, s0, s1)
    first = unit // matrices * size
    j, stop = span(first, size, others, is_causal)
    queries, keys = turned(rows, others)
    sizes = (queries, keys, is_causal)
    number = matrix * queries
    for e in range(EACH * WIDTH):
        gathered[e] = T(0)
    g_at = row_at(place, first, g_outer, g_head, g_row)
    while j < stop:
        query, key = turned(first + down() * EACH, j + across() * EACH)
        slopes(
            panel, d, g, g_at, g_row, rows - first,
            v, row_at(place, j, v_outer, v_head, v_row), v_row, others - j, out, aligned,
        )  # fmt: skip
        thin_slopes(panel, d, query, key, number, sizes, factor, drop)
        products(
            panel, s, own, row_at(place, first, own_outer, own_head, own_row), own_row,
            rows - first, passing, row_at(place, j, passing_outer, passing_head, passing_row),
            passing_row, others - j, features, aligned,
        )  # fmt: skip
        for e in range(EACH * EACH):
            s[e] *= scale
        if some_hidden(query, key, sizes, mask):
            put_tile(panel, s)
            hide(panel, query, key, sizes, seen, added, mask)
            take_tile(panel, s)
        at = number + query
        weigh(s, d, 0, at, lse, level, scale)
        weigh(s, d, 1, at, lse, level, scale)
        weigh(s, d, 2, at, lse, level, scale)
        weigh(s, d, 3, at, lse, level, scale)
        thin_shares(panel, s, query, key, number, sizes, factor, drop)
        put_tile(panel, s)
        gather_rows(
            panel, gathered, x, row_at(place, j, x_outer, x_head, x_row), x_row, others - j,
            columns, WIDTH, aligned,
        )  # fmt: skip
        j += TILE
    put_rows(
        gx, row_at(place, first, gx_outer, gx_head, gx_row), gx_row, rows - first, columns,
        gathered, WIDTH,
    )  # fmt: skip
    levels(
        x, row_at(place, 0, x_outer, x_head, x_row), x_row,
        y, row_at(place, 0, y_outer, y_head, y_row), y_row,
        unit // matrices, cuda.gridDim.x // matrices, others, columns, level, matrix * others,
    )  # fmt: skip


# Queries own the keys' scores.


@device
def own_first(a: Any, b: Any) -> Any:
    """Of own rows and passing ones, what is said of queries, and of keys."""
    return a, b


@device
def own_number(r: Any, c: Any) -> Any:
    """Of four own and passing rows, the number of the query."""
    return r


# Keys own the queries' scores.


@device
def own_last(a: Any, b: Any) -> Any:
    """As :func:`own_first`."""
    return b, a


@device
def passing_number(r: Any, c: Any) -> Any:
    """As :func:`own_number`."""
    return c


# What is weighted how.


@device
def score_weight(p: Any, d: Any, level: Any, scale: Any) -> Any:
    """The gradient of a product, for queries and keys."""
    return p * (d - level) * scale


@device
def share_weight(p: Any, d: Any, level: Any, scale: Any) -> Any:
    """The share of a value."""
    return p


@device
def no_slopes(
    panel: Any, s: Any, own: Any, own_at: Any, own_row: Any, own_count: Any, passing: Any,
    passing_at: Any, passing_row: Any, passing_count: Any, features: Any, aligned: Any,
) -> None:  # fmt: skip
    """Shares need none."""


# -- what ships -----------------------------------------------------------------------------------

#: Columns of a result in all threads that stand beside each other, for each width.
WIDTHS = {32: 2, 64: 4, 128: 8}

#: Kernels in which queries own the rows, and in which keys do.
OF_QUERIES = {"order": last_first, "span": of_queries, "turned": own_first, "hide": hide_own}
OF_KEYS = {"order": first_first, "span": of_keys, "turned": own_last, "hide": hide_theirs}

#: For the gradient of each operand, what the body stands for.
ROLES: dict[str, dict[str, Any]] = {
    "query": {
        **OF_QUERIES,
        "slopes": products,
        "thin_slopes": thinned_own,
        "weigh": _weigh.bind(which=own_number, weight=score_weight),
        "thin_shares": no_thinning,
        "levels": no_levels,
    },
    "key": {
        **OF_KEYS,
        "slopes": products,
        "thin_slopes": thinned_theirs,
        "weigh": _weigh.bind(which=passing_number, weight=score_weight),
        "thin_shares": no_thinning,
        "levels": no_levels,
    },
    "value": {
        **OF_KEYS,
        "slopes": no_slopes,
        "thin_slopes": no_thinning,
        "weigh": _weigh.bind(which=passing_number, weight=share_weight),
        "thin_shares": thinned_theirs,
        "levels": result_levels,
    },
}


@cache
def attention_kernel(columns: int) -> Kernel:
    """The forward, for results of at most so many columns."""
    return forward_kernel.bind(WIDTH=Constant(WIDTHS[columns])).named(f"attention_{columns}")


@cache
def attention_gradient_kernel(name: str, columns: int) -> Kernel:
    """The gradient of `query`, `key` or `value`, of at most so many columns."""
    bound = {**ROLES[name], "WIDTH": Constant(WIDTHS[columns])}
    return gradient_kernel.bind(**bound).named(f"attention_{name}_{columns}")


def entries() -> Iterator[Entry]:
    """All that ships."""
    for storage in STORAGE:
        for columns in WIDTHS:
            yield attention_kernel(columns)[storage]
            for name in ROLES:
                yield attention_gradient_kernel(name, columns)[storage]
