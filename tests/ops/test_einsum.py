import string

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import ParameterError, ShapeError

CASES = [
    ("ij,jk->ik", [(2, 3), (3, 4)]),
    ("ij,jk", [(2, 3), (3, 4)]),
    ("ba,cb", [(2, 3), (4, 2)]),
    ("bij,bjk->bik", [(2, 3, 4), (2, 4, 2)]),
    ("bhqd,bhkd->bhqk", [(2, 2, 3, 4), (2, 2, 5, 4)]),
    ("i->", [(3,)]),
    ("ij->ji", [(2, 3)]),
    ("ii->i", [(3, 3)]),
    ("ii", [(3, 3)]),
    ("iij->j", [(3, 3, 2)]),
    ("iii->i", [(2, 2, 2)]),
    ("ijij->ij", [(2, 3, 2, 3)]),
    ("iji,jj->i", [(3, 2, 3), (2, 2)]),
    ("i,j->ij", [(2,), (3,)]),
    ("i,i->i", [(3,), (3,)]),
    ("i,i->", [(3,), (3,)]),
    ("ij,kl->jl", [(2, 3), (4, 2)]),
    ("...ij,...jk->...ik", [(5, 2, 3), (3, 4)]),
    ("...ij,jk", [(2, 5, 2, 3), (3, 4)]),
    ("i...,i...->...", [(2, 3, 1), (2, 4)]),
    ("...i,...->i...", [(2, 3, 4), (3,)]),
    ("...,...", [(2, 3), (3,)]),
    ("i...->...", [(2, 3)]),
    ("...", [(2, 3)]),
    ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 2)]),
    ("a,ab,abc->c", [(2,), (2, 3), (2, 3, 4)]),
    ("ab,bc,cd,de->ae", [(2, 3), (3, 2), (2, 4), (4, 3)]),
    ("i,i,i->", [(3,), (3,), (3,)]),
    ("ij,ij->ij", [(2, 3), (1, 3)]),
    ("ij,jk->ik", [(2, 1), (3, 4)]),
    ("i,->i", [(3,), ()]),
    (" i j , j k -> k i ", [(2, 3), (3, 4)]),
    ("ij,jk->ik", [(2, 0), (0, 4)]),
    ("Ab,bA->A", [(2, 3), (3, 2)]),
]


@pytest.mark.parametrize(("subscripts", "shapes"), CASES)
def test_einsum_is_numpys(subscripts: str, shapes: list[tuple[int, ...]]) -> None:
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(s) for s in shapes]
    expected = np.einsum(subscripts, *arrays)
    y = gg.einsum(subscripts, *arrays)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-12, atol=1e-12)
    gg.check_grads(lambda *xs: gg.einsum(subscripts, *xs), [gg.tensor(a) for a in arrays])


@pytest.mark.parametrize("seed", range(60))
def test_einsum_of_random_terms(seed: int) -> None:
    rng = np.random.default_rng(seed)
    letters = string.ascii_letters[: rng.integers(2, 6)]
    sizes = dict(zip(letters, map(int, rng.integers(1, 4, len(letters))), strict=True))
    count = rng.integers(1, 5)
    terms = ["".join(rng.choice(list(letters), rng.integers(0, 4))) for _ in range(count)]
    used = sorted(set("".join(terms)))
    result = "".join(rng.permutation(used)[: rng.integers(0, len(used) + 1)]) if used else ""
    subscripts = ",".join(terms) + (f"->{result}" if rng.random() < 0.8 else "")
    arrays = [rng.standard_normal(tuple(sizes[c] for c in t)) for t in terms]
    np.testing.assert_allclose(
        gg.einsum(subscripts, *arrays).numpy(),
        np.einsum(subscripts, *arrays),
        rtol=1e-11,
        atol=1e-12,
        err_msg=subscripts,
    )


def test_a_chain_of_products_stays_small() -> None:
    # In the order in which the operands come, the first product would have 200 x 200 elements.
    a, b, c = (gg.ones(s).requires_grad_() for s in [(200, 2), (2, 200), (200, 2)])
    y = gg.einsum("ij,jk,kl->il", a, b, c)
    sizes = []
    todo = [y.grad_fn]
    while todo:
        node = todo.pop()
        if node.seq:
            sizes += [x.size for x in node.saved().values() if hasattr(x, "size")]
            todo += [p for _, p in node.parents()]
    assert max(sizes) == 400


@pytest.mark.parametrize(
    ("subscripts", "shapes", "words"),
    [
        ("ij,jk->ik", [(2, 3)], "2 terms for 1 operands"),
        ("ij->i", [(2, 3, 4)], "names 2 axes, its operand has 3; add '...'"),
        ("ijk->i", [(2, 3)], "names 3 axes, its operand has 2"),
        ("ij,jk->ik", [(2, 3), (4, 5)], "axis 'j' has 3 and 4 elements"),
        ("ii->i", [(2, 3)], "axis 'i' has 2 and 3 elements"),
        ("ii->i", [(1, 3)], "axis 'i' has 1 and 3 elements"),
        ("ij->ik", [(2, 3)], "the result names 'k', which no operand has"),
        ("ij->ii", [(2, 3)], "names an axis twice"),
        ("i1->i", [(2, 3)], "letters and one ellipsis"),
        ("...i...->i", [(2, 3)], "letters and one ellipsis"),
        ("...i,...i->...", [(2, 3), (4, 3)], "has 2 and 4 elements"),
    ],
)
def test_errors_say_what_does_not_fit(subscripts: str, shapes, words: str) -> None:
    with pytest.raises(ShapeError) as caught:
        gg.einsum(subscripts, *(gg.ones(s) for s in shapes))
    assert words in str(caught.value)
    assert subscripts in str(caught.value)


def test_subscripts_come_first() -> None:
    with pytest.raises(ParameterError, match="string of subscripts comes first"):
        gg.einsum(gg.ones(2), [0], [0])
