import math

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import DTypeError, OutOfRangeError, ParameterError, ShapeError

DEVICES = ["cpu", "strict:device1"]
RNG = np.random.default_rng(0)
LOGITS, DEEP = RNG.standard_normal((6, 4)) * 3, RNG.standard_normal((2, 4, 3, 2))
CLASSES, PLACES = RNG.integers(0, 4, 6), RNG.integers(0, 4, (2, 3, 2))
WEIGHT = np.array([0.5, 1.0, 2.0, 0.0])
REDUCTIONS = ["mean", "sum", "none"]


def host(x: gg.Tensor) -> np.ndarray:
    return x.backend.to_host(x.data)


def compare_with_torch(mine, theirs, values, wanted) -> None:
    """Value and gradients of ``mine(*tensors)`` against PyTorch's, in float64."""
    import torch

    xs = [None if v is None else gg.tensor(v) for v in values]
    ts = [None if v is None else torch.tensor(v) for v in values]
    for i in wanted:
        xs[i].requires_grad_()
        ts[i].requires_grad_()
    y, z = mine(*xs), theirs(*ts)
    np.testing.assert_allclose(y.detach().numpy(), z.detach().numpy(), rtol=1e-12, atol=1e-12)
    assert y.shape == tuple(z.shape)
    g = RNG.standard_normal(y.shape)
    y.backward(gg.tensor(g))
    z.backward(torch.tensor(g))
    for i in wanted:
        np.testing.assert_allclose(xs[i].grad.numpy(), ts[i].grad.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.torch
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore", [-100, 1])
@pytest.mark.parametrize(("x", "t"), [(LOGITS, CLASSES), (DEEP, PLACES)], ids=["flat", "deep"])
def test_cross_entropy_is_pytorchs(x, t, weight, smoothing, reduction, ignore) -> None:
    from torch.nn.functional import cross_entropy

    kw = {"ignore_index": ignore, "reduction": reduction, "label_smoothing": smoothing}
    compare_with_torch(
        lambda *a: gg.cross_entropy(*a, **kw),
        lambda *a: cross_entropy(*a, **kw),
        [x, t, weight],
        [0],
    )


@pytest.mark.torch
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("x", [LOGITS, DEEP, LOGITS[0]], ids=["flat", "deep", "single"])
def test_cross_entropy_with_distributions_is_pytorchs(x, weight, smoothing, reduction) -> None:
    from torch.nn.functional import cross_entropy

    kw = {"reduction": reduction, "label_smoothing": smoothing}
    p = RNG.random(x.shape)
    compare_with_torch(
        lambda *a: gg.cross_entropy(*a, **kw), lambda *a: cross_entropy(*a, **kw), [x, p, weight],
        [0, 1],
    )  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_of_a_single_element_is_pytorchs(reduction: str) -> None:
    from torch.nn.functional import cross_entropy

    compare_with_torch(
        lambda x, t: gg.cross_entropy(x, t, reduction=reduction),
        lambda x, t: cross_entropy(x, t, reduction=reduction), [LOGITS[0], np.array(2)], [0],
    )  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("x", "t"), [(LOGITS, CLASSES), (DEEP, PLACES)], ids=["flat", "deep"])
def test_nll_loss_is_pytorchs(x, t, weight, reduction) -> None:
    from torch.nn.functional import nll_loss

    kw = {"ignore_index": 2, "reduction": reduction}
    compare_with_torch(
        lambda *a: gg.nll_loss(*a, **kw), lambda *a: nll_loss(*a, **kw), [-abs(x), t, weight], [0]
    )


@pytest.mark.torch
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("name", "kw"),
    [
        ("mse_loss", {}),
        ("l1_loss", {}),
        ("huber_loss", {}),
        ("huber_loss", {"delta": 0.4}),
        ("smooth_l1_loss", {}),
        ("smooth_l1_loss", {"beta": 0.4}),
        ("smooth_l1_loss", {"beta": 0.0}),
    ],
)
def test_losses_of_numbers_are_pytorchs(name: str, kw, reduction: str) -> None:
    import torch

    x, t = RNG.standard_normal((2, 5, 3))
    x[0, 0] = t[0, 0]  # the kink
    x[1, 1] = t[1, 1] + 0.4  # the seam
    compare_with_torch(
        lambda x, t: getattr(gg, name)(x, t, reduction=reduction, **kw),
        lambda x, t: getattr(torch.nn.functional, name)(x, t, reduction=reduction, **kw),
        [x, t], [0, 1],
    )  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight", [None, np.array([[1.0], [2.0]])])
@pytest.mark.parametrize("pos_weight", [None, np.array([0.5, 1.0, 3.0])])
def test_binary_cross_entropy_is_pytorchs(weight, pos_weight, reduction) -> None:
    import torch

    x = np.array([[-800.0, -1.0, 0.0], [0.5, 30.0, 800.0]])
    compare_with_torch(
        lambda x, t, w, p: gg.binary_cross_entropy_with_logits(x, t, w, reduction, p),
        lambda x, t, w, p: torch.nn.functional.binary_cross_entropy_with_logits(
            x, t, w, pos_weight=p, reduction=reduction
        ),
        [x, RNG.random((2, 3)), weight, pos_weight], [0],
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kw", [{}, {"reduction": "none"}, {"label_smoothing": 0.2}])
def test_second_order(kw, device: str) -> None:
    target = gg.tensor([0, -100, 3], device=device)
    weight = gg.tensor(WEIGHT + 0.1, device=device)
    gg.check_grads(
        lambda x: gg.cross_entropy(x, target, weight, **kw),
        (gg.tensor(LOGITS[:3], device=device),),
        order=3,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_extreme_logits_stay_finite(device: str) -> None:
    x = gg.tensor([[1e4, 0.0], [-1e4, 1e4]], device=device, requires_grad=True)
    y = gg.cross_entropy(x, gg.tensor([1, 1], device=device), reduction="none")
    y.sum().backward()
    np.testing.assert_array_equal(host(y), [1e4, 0.0])
    np.testing.assert_array_equal(host(x.grad), [[1.0, -1.0], [0.0, 0.0]])


def test_a_class_that_cannot_be_costs_nothing_where_it_is_not_the_target() -> None:
    x = gg.tensor([[0.0, -math.inf], [0.0, -math.inf]], requires_grad=True)
    y = gg.cross_entropy(x, gg.tensor([0, -100]))
    y.backward()
    assert y.item() == 0.0
    np.testing.assert_array_equal(x.grad.numpy(), np.zeros((2, 2)))


def test_an_ignored_target_adds_nothing() -> None:
    x = gg.tensor(LOGITS, requires_grad=True)
    targets = np.where(np.arange(6) % 2, CLASSES, -100)
    gg.cross_entropy(x, gg.tensor(targets)).backward()
    assert not x.grad.numpy()[::2].any()
    kept = gg.cross_entropy(gg.tensor(LOGITS[1::2]), gg.tensor(CLASSES[1::2]))
    assert gg.cross_entropy(gg.tensor(LOGITS), gg.tensor(targets)).item() == pytest.approx(
        kept.item(), rel=1e-14
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_mean_over_no_target_is_nan() -> None:
    assert math.isnan(gg.cross_entropy(gg.tensor(LOGITS[:1]), gg.tensor([-100])).item())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_what_is_ignored_may_be_anything(device: str, smoothing: float) -> None:
    logits = LOGITS[:3].copy()
    logits[1] = [math.nan, math.inf, 0.0, -math.inf]
    target = gg.tensor([0, -100, 2], device=device)

    def loss(x: gg.Tensor) -> gg.Tensor:
        return gg.cross_entropy(x, target, reduction="sum", label_smoothing=smoothing)

    x = gg.tensor(logits, device=device)
    with np.errstate(invalid="ignore"):
        y = loss(x)
        g = gg.grad(loss)(x)
    assert np.isfinite(host(y))
    assert np.all(np.isfinite(host(g)))
    assert not host(g)[1].any()


def test_the_node_keeps_no_probabilities() -> None:
    x = gg.tensor(LOGITS, requires_grad=True)
    y = gg.cross_entropy(x, gg.tensor(CLASSES))
    saved = y.grad_fn.saved()
    assert y.grad_fn.primitive.name == "class_cross_entropy"
    assert saved["input"] is x.data
    rows = 2 * x.dtype.itemsize * len(CLASSES) + x.dtype.itemsize  # two numbers each, and a total
    kept = x.nbytes + CLASSES.nbytes + rows
    assert sum(v.nbytes for v in saved.values() if v is not None) == kept


def test_half_precision_comes_back_as_it_went_in() -> None:
    # 70 000 targets: more than float16 can count.
    x = gg.zeros((70_000, 2), dtype="float16").requires_grad_()
    y = gg.cross_entropy(x, gg.zeros(70_000, dtype="int64"))
    assert y.dtype == np.float16
    assert y.item() == pytest.approx(math.log(2), rel=1e-3)
    y.backward(gg.tensor(1024.0, dtype="float16"))
    assert x.grad.dtype == np.float16
    np.testing.assert_allclose(x.grad.numpy()[0], [-512 / 70_000, 512 / 70_000], rtol=1e-3)


def test_targets_of_plain_numbers() -> None:
    y = gg.cross_entropy(gg.tensor(LOGITS[:2]), [1, 0])
    assert y.item() == gg.cross_entropy(gg.tensor(LOGITS[:2]), gg.tensor([1, 0])).item()
    there = gg.tensor(LOGITS[:2], device="strict:device1")
    assert gg.cross_entropy(there, [1, 0]).device == "strict:device1"


@pytest.mark.parametrize(
    ("target", "words"),
    [([0, 4, 9, 1], "target 4 at \\[1\\] is no class; they are 0 to 3"), ([0, 1, -1, 1], "-1")],
)
def test_a_target_that_is_no_class_is_named(target, words: str) -> None:
    for loss in (gg.cross_entropy, gg.nll_loss):
        with pytest.raises(OutOfRangeError, match=words):
            loss(gg.tensor(LOGITS[:4]), gg.tensor(target))
    bad = np.zeros((2, 3, 2), int)
    bad[1, 0, 1] = 7
    with pytest.raises(IndexError, match="at \\[1, 0, 1\\]"):
        gg.cross_entropy(gg.tensor(DEEP), gg.tensor(bad))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gg.cross_entropy(gg.ones((4, 3)), gg.zeros(5, dtype=int)), ShapeError,
         ["(4, 3)", "(4,)", "(5,)"]),
        (lambda: gg.cross_entropy(gg.ones((4, 3)), gg.ones((4, 2))), ShapeError,
         ["(4, 3)", "(4, 2)", "integers"]),
        (lambda: gg.cross_entropy(gg.ones((4, 3)), gg.zeros(4, dtype=int), gg.ones(2)), ShapeError,
         ["weight of shape (2,)", "3 classes"]),
        (lambda: gg.cross_entropy(gg.ones((4, 3)), gg.zeros((4, 3), dtype=bool)), DTypeError,
         ["booleans"]),
        (lambda: gg.cross_entropy(gg.tensor(1.0), gg.tensor(0)), ShapeError, ["0-d"]),
        (lambda: gg.cross_entropy(gg.ones((1, 3)), [0], reduction="avg"), ParameterError,
         ["'mean', 'sum' or 'none'", "'avg'"]),
        (lambda: gg.cross_entropy(gg.ones((1, 3)), [0], label_smoothing=1.5), ParameterError,
         ["label_smoothing", "1.5"]),
        (lambda: gg.mse_loss(gg.ones((4, 1)), gg.ones(4)), ShapeError,
         ["mse_loss", "(4, 1)", "(4,)", "reshape"]),
        (lambda: gg.l1_loss(gg.ones(4), gg.ones(4), reduction="all"), ParameterError, ["l1_loss"]),
        (lambda: gg.huber_loss(gg.ones(4), gg.ones(4), delta=0.0), ParameterError, ["delta"]),
        (lambda: gg.smooth_l1_loss(gg.ones(4), gg.ones(4), beta=-1.0), ParameterError, ["beta"]),
        (lambda: gg.nll_loss(gg.ones(()), gg.tensor(1)), ShapeError, ["0-d"]),
        (lambda: gg.nll_loss(gg.ones((4, 3)), gg.ones(4)), DTypeError,
         ["float64", "cross_entropy"]),
    ],
)  # fmt: skip
def test_errors_name_what_met_and_the_fix(call, error, words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


# -- the others -----------------------------------------------------------------------------------

SURE = np.array([[0.0, 1.0, 0.3], [1.0, 0.0, 1e-20]])
ANSWERS = np.array([[0.0, 1.0, 0.2], [0.0, 1.0, 0.7]])


@pytest.mark.torch
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight", [None, np.array([[1.0], [2.0]])])
def test_binary_cross_entropy_of_probabilities_is_pytorchs(weight, reduction) -> None:
    from torch.nn.functional import binary_cross_entropy

    compare_with_torch(
        lambda x, t, w: gg.binary_cross_entropy(x, t, w, reduction),
        lambda x, t, w: binary_cross_entropy(x, t, w, reduction=reduction),
        [SURE, ANSWERS, weight], [0],
    )  # fmt: skip
    compare_with_torch(
        lambda x, t, w: gg.binary_cross_entropy(x, t, w, reduction),
        lambda x, t, w: binary_cross_entropy(x, t, w, reduction=reduction),
        [RNG.random((2, 3)), RNG.random((2, 3)), weight], [0, 1],
    )  # fmt: skip


#: PyTorch's opinion of the mean that its own kl_div takes by default.
QUIET = "ignore:reduction. 'mean' divides:UserWarning"


@pytest.mark.torch
@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "batchmean"])
@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div_is_pytorchs(log_target: bool, reduction: str) -> None:
    from torch.nn.functional import kl_div

    kw = {"reduction": reduction, "log_target": log_target}
    p = RNG.random((3, 4, 2))
    x, t = np.log(RNG.random((3, 4, 2))), np.log(p) if log_target else p
    compare_with_torch(lambda *a: gg.kl_div(*a, **kw), lambda *a: kl_div(*a, **kw), [x, t], [0, 1])
    p[0] = 0.0
    if not log_target:
        compare_with_torch(lambda *a: gg.kl_div(*a, **kw), lambda *a: kl_div(*a, **kw), [x, p], [0])


@pytest.mark.torch
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "huber_loss"])
def test_weights_are_pytorchs(name: str, reduction: str) -> None:
    import torch

    x, t, w = RNG.standard_normal((2, 5, 3)), RNG.standard_normal((2, 5, 3)), RNG.random((2, 5, 3))
    compare_with_torch(
        lambda x, t, w: getattr(gg, name)(x, t, reduction=reduction, weight=w),
        lambda x, t, w: getattr(torch.nn.functional, name)(x, t, reduction=reduction, weight=w),
        [x, t, w], [0, 1, 2],
    )  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (4,)])
def test_gaussian_nll_is_pytorchs(shape, full: bool, reduction: str) -> None:
    from torch.nn.functional import gaussian_nll_loss

    var = RNG.random(shape)
    var[0] = 0.01  # below eps
    kw = {"full": full, "eps": 0.05, "reduction": reduction}
    compare_with_torch(
        lambda *a: gg.gaussian_nll_loss(*a, **kw), lambda *a: gaussian_nll_loss(*a, **kw),
        [RNG.standard_normal((4, 3)), RNG.standard_normal((4, 3)), var], [0, 1, 2],
    )  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize(("dim", "shape"), [(1, (4, 3)), (0, (1, 3)), (-1, (3,))])
def test_cosine_similarity_is_pytorchs(dim: int, shape) -> None:
    from torch.nn.functional import cosine_similarity

    compare_with_torch(
        lambda a, b: gg.cosine_similarity(a, b, dim), lambda a, b: cosine_similarity(a, b, dim),
        [RNG.standard_normal((4, 3)), RNG.standard_normal(shape)], [0, 1],
    )  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("batch", [(4,), ()])
def test_cosine_embedding_loss_is_pytorchs(batch, reduction: str) -> None:
    from torch.nn.functional import cosine_embedding_loss

    a, b = RNG.standard_normal((2, *batch, 3))
    t = np.resize([1, -1, -1, 1], batch)
    compare_with_torch(
        lambda a, b, t: gg.cosine_embedding_loss(a, b, t, 0.1, reduction),
        lambda a, b, t: cosine_embedding_loss(a, b, t, 0.1, reduction=reduction),
        [a, b, t], [0, 1],
    )  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nll_loss_of_a_single_element_is_pytorchs(reduction: str) -> None:
    from torch.nn.functional import nll_loss

    compare_with_torch(
        lambda x, t: gg.nll_loss(x, t, reduction=reduction),
        lambda x, t: nll_loss(x, t, reduction=reduction), [LOGITS[0], np.array(2)], [0],
    )  # fmt: skip


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::RuntimeWarning", QUIET)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "name",
    ["cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div",
     "binary_cross_entropy", "binary_cross_entropy_with_logits"],
)  # fmt: skip
def test_empty_batches_are_pytorchs(name: str, reduction: str) -> None:
    import torch

    of_classes = name in ("cross_entropy", "nll_loss")
    target = np.zeros(0, int) if of_classes else np.zeros((0, 3))
    compare_with_torch(
        lambda x, t: getattr(gg, name)(x, t, reduction=reduction),
        lambda x, t: getattr(torch.nn.functional, name)(x, t, reduction=reduction),
        [np.zeros((0, 3)), target], [0],
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_certainty_costs_a_hundred(device: str) -> None:
    for dtype in ("float32", "float64"):
        p = gg.tensor([0.0, 1.0, 0.0, 1.0], dtype=dtype, device=device, requires_grad=True)
        t = gg.tensor([1.0, 0.0, 0.0, 1.0], dtype=dtype, device=device)
        y = gg.binary_cross_entropy(p, t, reduction="none")
        y.sum().backward()
        np.testing.assert_array_equal(host(y), [100.0, 100.0, 0.0, 0.0])
        np.testing.assert_allclose(host(p.grad), [-1e12, 1e12, 0.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gg.binary_cross_entropy(gg.tensor([[0.5, 1.5]]), gg.ones((1, 2))), OutOfRangeError,
         ["binary_cross_entropy: 1.5 at [0, 1]", "no probability", "with_logits"]),
        (lambda: gg.binary_cross_entropy(gg.tensor([math.nan]), gg.ones(1)), OutOfRangeError,
         ["nan at [0]"]),
        (lambda: gg.binary_cross_entropy(gg.tensor([-0.1]), gg.ones(1)), OutOfRangeError,
         ["-0.1 at [0]"]),
        (lambda: gg.binary_cross_entropy(gg.ones((2, 1)), gg.ones(2)), ShapeError,
         ["(2, 1)", "(2,)", "reshape"]),
        (lambda: gg.binary_cross_entropy(gg.ones((2, 3)), gg.ones((2, 3)), gg.ones(2)), ShapeError,
         ["weight of shape (2,)", "(2, 3)"]),
        (lambda: gg.binary_cross_entropy_with_logits(gg.ones((2, 3)), gg.ones((2, 3)),
                                                     pos_weight=gg.ones(2)), ShapeError,
         ["weight of shape (2,)", "(2, 3)"]),
        (lambda: gg.mse_loss(gg.ones(4), gg.ones(4), weight=gg.ones(1)), ShapeError,
         ["mse_loss: weight of shape (1,)", "each element"]),
        (lambda: gg.kl_div(gg.ones(4), gg.ones(4), "batch_mean"), ParameterError,
         ["kl_div", "'batchmean'", "'batch_mean'"]),
        (lambda: gg.gaussian_nll_loss(gg.ones(2), gg.ones(2), gg.tensor([1.0, -1.0])),
         OutOfRangeError, ["-1.0 at [1]", "variance"]),
        (lambda: gg.gaussian_nll_loss(gg.ones((2, 3)), gg.ones((2, 3)), gg.ones(3)), ShapeError,
         ["var of shape (3,)", "(2, 3)"]),
        (lambda: gg.gaussian_nll_loss(gg.ones(2), gg.ones(2), 1.0, eps=0.0), ParameterError,
         ["eps"]),
        (lambda: gg.cosine_embedding_loss(gg.ones((2, 3)), gg.ones((2, 3)), gg.ones(3)), ShapeError,
         ["(2, 3)", "(3,)", "(batch,)"]),
    ],
)  # fmt: skip
def test_errors_of_the_others_name_what_met_and_the_fix(call, error, words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


LOSSES = {
    "cross_entropy": lambda x, t: gg.cross_entropy(x, gg.asarray(PLACES[0, :, 0], device=x.device)),
    "nll_loss": lambda x, t: gg.nll_loss(x, gg.asarray(PLACES[0, :, 0], device=x.device)),
    "binary_cross_entropy": lambda x, t: gg.binary_cross_entropy(gg.sigmoid(x), t),
    "binary_cross_entropy_with_logits": gg.binary_cross_entropy_with_logits,
    "kl_div": lambda x, t: gg.kl_div(gg.log_softmax(x, axis=1), t, "batchmean"),
    "mse_loss": gg.mse_loss,
    "l1_loss": gg.l1_loss,
    "smooth_l1_loss": gg.smooth_l1_loss,
    "huber_loss": gg.huber_loss,
    "gaussian_nll_loss": lambda x, t: gg.gaussian_nll_loss(x, t, t + 1.0),
    "cosine_embedding_loss": lambda x, t: gg.cosine_embedding_loss(
        x, t, gg.asarray([1, -1, 1], device=x.device)
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_reads_from_the_device(name: str) -> None:
    from tests.backend.counting import counting

    with counting() as counts:
        x = gg.tensor(LOGITS[:3], device="counting").requires_grad_()
        t = gg.tensor(abs(LOGITS[3:]) / 9, device="counting")
        LOSSES[name](x, t).backward()
        assert x.grad is not None
        assert counts.host_reads == 0
