"""Parts of the kernels of attention: products of rows with rows, staged in shared memory.

A block has some rows of one operand, its *own*, and lets those of another pass by, 64 at a time.
Two products alternate. The first, own rows times passing ones, is staged some features at a time,
turned so that what a thread needs lies in a row; each thread has 4x4 scores in registers. What
becomes of these lies in shared memory as a *tile*, from which the second product adds passing rows,
weighted, to what each own row has gathered: 4 rows of some columns to a thread.

Loads from shared memory are of 16 bytes, and feed eight multiplications or more; of the
instructions of the inner loops about four fifths are multiplications. No sum is of an order that
could change.

A block is of 32 to 256 threads, a power of 2; its own rows are a quarter as many.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpugrad.kernels.cuda.dropout import Words
from gpugrad.kernels.cuda.language import (
    LANES,
    _Count,
    cuda,
    device,
    read_pack,
    shuffle,
    spread,
)
from gpugrad.kernels.template import (
    Placeholder,
    T,
    Target,
    arithmetic,
    read,
    write,
)

INF = math.inf

#: Threads beside each other; each has so many rows and columns of a tile of scores.
ACROSS, EACH = 16, 4

#: Passing rows at a time, and features of a row that are staged for the first product.
TILE, CHUNK = ACROSS * EACH, 16

#: Numbers in the one or the other half of what is staged; behind both begin the weights.
PANEL = CHUNK * TILE
WEIGHTS = 2 * PANEL

#: What a mask is: nothing, which keys are seen, or what is added.
NONE, SEEN, ADDED = range(3)


class Room(_Count):
    """How many pieces of 16 bytes hold so many numbers of `T`."""

    def instance(self, target: Target, storage: str) -> Any:
        return self.packs * np.dtype(arithmetic(storage)).itemsize // 16


#: What is staged, and the weights. As pieces of 16 bytes, for the compiler to know how it is
#: aligned; with indices that it knows not to be negative, it then joins loads of neighbours.
ROOM = Room(WEIGHTS + TILE * TILE)


class FourWords(Words):
    """The words of four elements in a row, whatever the storage."""

    def text(self, width: int) -> str:
        return super().text(EACH)


four_words: Any = FourWords(anywhere=True)


# -- where things are -----------------------------------------------------------------------------


@device
def down() -> Any:
    """This thread's row in the block."""
    return np.int64((cuda.threadIdx.x & 255) >> 4)


@device
def across() -> Any:
    """Its place in the row."""
    return np.int64(cuda.threadIdx.x & 15)


@device
def row_at(place: Any, i: Any, outer: Any, head: Any, row: Any) -> Any:
    """Where row `i` of a head begins; `place` is the number of the head, on two axes."""
    return place[0] * outer + place[1] * head + i * row


@device
def column_of(w: Any, width: Any) -> Any:
    """Column number `w` of this thread: they lie in groups of four if there are so many."""
    group = EACH if width > EACH else width
    return w // group * (ACROSS * group) + across() * group + w % group


@device
def weights_at(j: Any) -> Any:
    """Where the weights of this thread's own rows for passing row `j` begin.

    Threads of a row write to rows of the tile four apart. That they do not meet in the same banks,
    groups of own rows go round.
    """
    return WEIGHTS + j * TILE + (((down() + (j >> 2)) & 15) << 2)


# -- the first product ----------------------------------------------------------------------------


@device
def stage_turned(
    panel: Any, start: Any, x: Any, at: Any, row: Any, count: Any, features: Any, aligned: Any
) -> None:
    """Some features of 64 rows, of which `count` exist: features down, rows across."""
    e = np.int64(cuda.threadIdx.x)
    while e < PANEL // LANES:
        i = e & (TILE - 1)
        f = ((e >> 6) & (CHUNK - 1)) * LANES
        left = features - f if i < count else np.int64(0)
        spread(panel, start + f * TILE + i, read_pack(x, at + i * row + f, left, aligned), TILE)
        e += cuda.blockDim.x


@device
def multiply_turned(panel: Any, s: Any) -> None:
    """Add what has been staged to the scores."""
    a = down() * EACH
    b = PANEL + across() * EACH
    for k in range(CHUNK):
        for r in range(EACH):
            x = panel[np.uint64(k * TILE + a + r)]
            for c in range(EACH):
                s[r * EACH + c] += x * panel[np.uint64(k * TILE + b + c)]


@device
def products(
    panel: Any, s: Any, own: Any, own_at: Any, own_row: Any, own_count: Any, passing: Any,
    passing_at: Any, passing_row: Any, passing_count: Any, features: Any, aligned: Any,
) -> None:  # fmt: skip
    """Own rows times passing ones: score `4 r + c` is that of own row r and passing row c."""
    for e in range(EACH * EACH):
        s[e] = T(0)
    f = np.int64(0)
    while f < features:
        cuda.syncthreads()  # what was staged before may still be read
        left = features - f
        stage_turned(panel, 0, own, own_at + f, own_row, own_count, left, aligned)
        stage_turned(
            panel, PANEL, passing, passing_at + f, passing_row, passing_count, left, aligned
        )
        cuda.syncthreads()
        multiply_turned(panel, s)
        f += CHUNK


# -- the second product ---------------------------------------------------------------------------


@device
def stage(
    panel: Any, x: Any, at: Any, row: Any, count: Any, columns: Any, width: Any, aligned: Any
) -> None:
    """As many rows as there is room for, of which `count` exist."""
    packs = ACROSS * width // LANES
    e = np.int64(cuda.threadIdx.x)
    while e < WEIGHTS // LANES:
        k = (e & (WEIGHTS - 1)) // packs
        f = (e & (packs - 1)) * LANES
        left = columns - f if k < count else np.int64(0)
        spread(panel, k * (ACROSS * width) + f, read_pack(x, at + k * row + f, left, aligned), 1)
        e += cuda.blockDim.x


@device
def multiply(panel: Any, gathered: Any, j: Any, width: Any) -> None:
    """Add rows that have been staged, from number `j` on, to what has been gathered."""
    for k in range(WEIGHTS // (ACROSS * width)):
        a = weights_at(j + k)
        b = k * (ACROSS * width)
        for r in range(EACH):
            x = panel[np.uint64(a + r)]
            for w in range(width):
                gathered[r * width + w] += x * panel[np.uint64(b + column_of(w, width))]


@device
def gather_rows(
    panel: Any, gathered: Any, x: Any, at: Any, row: Any, count: Any, columns: Any, width: Any,
    aligned: Any,
) -> None:  # fmt: skip
    """Add passing rows, weighted, to what own rows have gathered."""
    j = np.int64(0)
    while j < TILE and j < count:
        cuda.syncthreads()  # weights are there, and what was staged before is not needed any more
        stage(panel, x, at + j * row, row, count - j, columns, width, aligned)
        cuda.syncthreads()
        multiply(panel, gathered, j, width)
        j += WEIGHTS // (ACROSS * width)


@device
def put_rows(
    x: Any, at: Any, row: Any, count: Any, columns: Any, gathered: Any, width: Any
) -> None:
    """Write what own rows have gathered."""
    for r in range(EACH):
        i = down() * EACH + r
        for w in range(width):
            column = column_of(w, width)
            if i < count and column < columns:
                write(x, at + i * row + column, gathered[r * width + w])


# -- a thread's 4x4 of the tile -------------------------------------------------------------------
#
# What is done to elements one by one, in loops too long to be unrolled, is done to them in the
# tile: an array of registers cannot be indexed. Each thread looks at what it wrote itself.

entry: Any = Placeholder("entry")
thin: Any = Placeholder("thin")


@device
def put_tile(panel: Any, s: Any) -> None:
    """From registers into the tile."""
    for c in range(EACH):
        for r in range(EACH):
            panel[np.uint64(weights_at(across() * EACH + c) + r)] = s[r * EACH + c]


@device
def take_tile(panel: Any, s: Any) -> None:
    """From the tile into registers."""
    for c in range(EACH):
        for r in range(EACH):
            s[r * EACH + c] = panel[np.uint64(weights_at(across() * EACH + c) + r)]


@device
def some_hidden(query: Any, key: Any, sizes: Any, mask: Any) -> Any:
    """Whether of four queries and four keys some may not see each other."""
    queries, keys, is_causal = sizes
    last = key + (EACH - 1)
    return (
        mask[0] != NONE
        or query + EACH > queries
        or last >= keys
        or (is_causal != 0 and last > query)
    )


@device
def _hide(panel: Any, query: Any, key: Any, sizes: Any, seen: Any, added: Any, mask: Any) -> None:
    """Mask the scores of four queries and four keys: minus infinity for what is not seen."""
    queries, keys, is_causal = sizes
    kind, start, below, beside = mask
    for e in range(EACH * EACH):
        i = query + (e >> 2)
        j = key + (e & 3)
        at = entry(e >> 2, e & 3)
        place = start + i * below + j * beside
        if (
            i >= queries
            or j >= keys
            or (is_causal != 0 and j > i)
            or (kind == SEEN and seen[place] == 0)
        ):
            panel[at] = T(-INF)
        elif kind == ADDED:
            panel[at] += added[place]


@device
def _thin(panel: Any, query: Any, key: Any, first: Any, sizes: Any, factor: Any, drop: Any) -> None:
    """Drop some of what belongs to four queries and four keys, and scale the others.

    Query 0 has the number `first` among those of all matrices.
    """
    count, o0, o1, s0, s1 = drop
    queries, keys, _ = sizes
    rows = queries - query
    a = np.int64(0)
    while a < EACH and a < rows:
        place = (first + query + a) * keys + key
        w0, w1, w2, w3 = four_words(place, o0, o1, s0, s1)
        panel[entry(a, 0)] *= factor if w0 >= count else T(0)
        panel[entry(a, 1)] *= factor if w1 >= count else T(0)
        panel[entry(a, 2)] *= factor if w2 >= count else T(0)
        panel[entry(a, 3)] *= factor if w3 >= count else T(0)
        a += 1


@device
def _thinned(
    panel: Any, s: Any, query: Any, key: Any, first: Any, sizes: Any, factor: Any, drop: Any
) -> None:  # fmt: skip
    """Drop some of what is in registers."""
    if drop[0] > 0:
        put_tile(panel, s)
        thin(panel, query, key, first, sizes, factor, drop)
        take_tile(panel, s)


@device
def no_thinning(
    panel: Any, s: Any, query: Any, key: Any, first: Any, sizes: Any, factor: Any, drop: Any
) -> None:  # fmt: skip
    """That is for others to do."""


@device
def queries_own(a: Any, b: Any) -> Any:
    """Where query a and key b meet in the tile, if queries are the own rows."""
    return np.uint64(weights_at(across() * EACH + b) + a)


@device
def keys_own(a: Any, b: Any) -> Any:
    """The same if keys are."""
    return np.uint64(weights_at(across() * EACH + a) + b)


hide_own: Any = _hide.bind(entry=queries_own)
hide_theirs: Any = _hide.bind(entry=keys_own)
thin_own: Any = _thin.bind(entry=queries_own)
thin_theirs: Any = _thin.bind(entry=keys_own)
thinned_own: Any = _thinned.bind(thin=thin_own)
thinned_theirs: Any = _thinned.bind(thin=thin_theirs)


# -- threads beside each other --------------------------------------------------------------------


@device
def row_sum(x: Any) -> Any:
    """The sum over the threads beside each other."""
    mask = ACROSS >> 1
    while mask > 0:
        x += shuffle(x, mask)
        mask >>= 1
    return x


@device
def row_greatest(x: Any) -> Any:
    """The greatest of the threads beside each other."""
    mask = ACROSS >> 1
    while mask > 0:
        other = shuffle(x, mask)
        x = other if other > x else x
        mask >>= 1
    return x


@device
def result_levels(
    g: Any, g_at: Any, g_row: Any, y: Any, y_at: Any, y_row: Any, part: Any, parts: Any, count: Any,
    columns: Any, level: Any, level_at: Any,
) -> None:  # fmt: skip
    """For this part of the queries, the sum of each result times the gradient of that."""
    at_once = np.int64(cuda.blockDim.x >> 4)
    first = part * at_once
    while first < count:
        i = first + down()
        total = T(0)
        f = across() if i < count else columns
        while f < columns:
            total += read(g, g_at + i * g_row + f) * read(y, y_at + i * y_row + f)
            f += ACROSS
        total = row_sum(total)
        if across() == 0 and i < count:
            level[level_at + i] = total
        first += parts * at_once


@device
def no_levels(
    g: Any, g_at: Any, g_row: Any, y: Any, y_at: Any, y_row: Any, part: Any, parts: Any, count: Any,
    columns: Any, level: Any, level_at: Any,
) -> None:  # fmt: skip
    """They are there already."""


# -- the order of blocks --------------------------------------------------------------------------
#
# With causality the last queries, and the first keys, have the most work; they begin first.


@device
def first_first() -> Any:
    """The number of this block's work."""
    return np.int64(cuda.blockIdx.x)


@device
def last_first() -> Any:
    """The same in the opposite order."""
    return np.int64(cuda.gridDim.x) - np.int64(cuda.blockIdx.x) - 1


@device
def of_queries(first: Any, size: Any, others: Any, is_causal: Any) -> Any:
    """The range of keys that pass."""
    return np.int64(0), first + size if is_causal != 0 and first + size < others else others


@device
def of_keys(first: Any, size: Any, others: Any, is_causal: Any) -> Any:
    """The range of queries that pass."""
    return first if is_causal != 0 else np.int64(0), others
