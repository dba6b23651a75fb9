"""What looks at elements in a function looks at those of every run of its program."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.core import program
from gpugrad.errors import OutOfRangeError

LOSSES = {"cross_entropy": gg.cross_entropy, "nll_loss": gg.nll_loss}


def _batches():
    random = np.random.default_rng(3)
    x = gg.tensor(random.standard_normal((128, 40)).astype(np.float32))
    good = random.integers(0, 5, 128)
    bad = good.copy()
    bad[3] = 5
    ignored = good.copy()
    ignored[7] = -100
    return x, gg.tensor(good), gg.tensor(bad), gg.tensor(ignored)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("records", [0, program.RECORDS], ids=["text", "replay"])
def test_a_target_that_is_no_class_stops_a_compiled_step(monkeypatch, name, records):
    monkeypatch.setattr(program, "RECORDS", records)
    x, good, bad, ignored = _batches()
    weights = []
    for how in (gg.compile, lambda step: step):
        gg.manual_seed(0)
        model = nn.Linear(40, 5)
        optimizer = gg.optim.SGD(model.parameters(), lr=0.1)

        @how
        def step(x, target, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = LOSSES[name](model(x), target)
            loss.backward()
            optimizer.step()
            return loss.detach()

        for target in (good, ignored, good, good, ignored):
            step(x, target)
        before = model.weight.detach().numpy().copy()
        with pytest.raises(OutOfRangeError, match=rf"{name}: target 5 at \[3\] is no class"):
            step(x, bad)
        assert np.array_equal(model.weight.detach().numpy(), before)
        step(x, good)
        weights.append(model.weight.detach().numpy().copy())
    assert np.array_equal(*weights)


@pytest.mark.parametrize("name", LOSSES)
def test_a_target_that_is_no_class_stops_a_compiled_loss(name):
    x, good, bad, _ = _batches()
    scores = gg.compile(lambda x, target: LOSSES[name](x[:, :5], target))
    for _ in range(3):
        scores(x, good)
    with pytest.raises(OutOfRangeError, match=rf"{name}: target 5 at \[3\] is no class"):
        scores(x, bad)


@pytest.mark.parametrize(
    ("loss", "good", "bad", "words"),
    [
        (gg.binary_cross_entropy, 0.5, 1.5, r"1.5 at \[2\] is no probability"),
        (lambda v, t: gg.gaussian_nll_loss(t, t, v), 0.5, -1.0, r"-1.0 at \[2\] is no variance"),
    ],
    ids=["binary_cross_entropy", "gaussian_nll_loss"],
)
def test_an_element_out_of_range_stops_a_compiled_loss(loss, good, bad, words):
    x, target = np.full(4, good), gg.ones(4, dtype="float64")
    compiled = gg.compile(loss)
    for _ in range(3):
        compiled(gg.tensor(x), target)
    x[2] = bad
    with pytest.raises(OutOfRangeError, match=words):
        compiled(gg.tensor(x), target)
