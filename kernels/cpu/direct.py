"""A large matrix product whose operands are read where they lie, as far as possible.

OpenBLAS copies both into an order that suits it. A right operand with contiguous rows is in a good
order already, and of the left one single elements are wanted, wherever they are: what is left to do
is to take the sums in blocks that the nearest caches hold. What is gained is most where one side
of the product is short. Gradients are such products: `gᵀ·x` of weights and `g·W` of inputs. The
product of a layer, `x·Wᵀ`, is one as soon as its weights have been packed in panels, once for all.

Sums are taken in blocks of the same length whatever the number of threads, and added up in order.
"""

from __future__ import annotations

from gpugrad.kernels.cpu.compile import VECTOR, serial
from gpugrad.kernels.cpu.memory import size_of
from gpugrad.kernels.cpu.microkernel import ROWS, product
from gpugrad.kernels.template import T, device

__all__ = ["direct", "suits"]

#: Products that are added up at a time: so many rows of a panel of B stay in a near cache.
DEPTH = 512

#: Rows of C that are worked on at a time, for which a panel is read once.
STRIP = 8 * ROWS

#: Bytes of B up to which it stays in a cache while all strips go through it. With shorter vectors
#: than these OpenBLAS is ahead.
LARGEST = 1 << 23 if VECTOR == 64 else 0

#: Rows, columns and products below which packing is little work, or has much to gain.
FEWEST, SHORTEST = 8, 32


@device
def suits(m, n, k):
    """Whether a product of C (m, n) over k is quicker so than by OpenBLAS."""
    fits = k * n * size_of(T(0)) <= LARGEST
    return m >= FEWEST and n >= FEWEST and k >= SHORTEST and fits


@serial
def direct(m, n, k, a, a_i, a_k, b, b_k, b_panel, c, c_i, accumulate):
    """C (+)= A·B for matrices at addresses, on the thread that calls; strides count elements.

    A (m, k) has any two strides, C (m, n) contiguous elements in its rows. So has B (k, n) within a
    panel, and `b_panel` leads from one panel to the next.
    """
    size = size_of(T(0))
    strips, blocks = (m + STRIP - 1) // STRIP, max(1, (k + DEPTH - 1) // DEPTH)
    for strip in range(strips):
        i, rows = m * strip // strips, m * (strip + 1) // strips - m * strip // strips
        for block in range(blocks):
            p, depth = k * block // blocks, k * (block + 1) // blocks - k * block // blocks
            product(
                rows, n, 1, depth, a + (i * a_i + p * a_k) * size, (a_i, 0, a_k),
                b + p * b_k * size, (0, b_k, b_panel), c + i * c_i * size, c_i,
                accumulate or block > 0,
            )  # fmt: skip
