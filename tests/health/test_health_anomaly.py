"""Where a NaN or an infinity first appears, forward and backward, and afterwards."""

import re

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.core.modes import gate
from gpugrad.core.walk import on_walk
from gpugrad.errors import GraphError
from gpugrad.health import AnomalyError, HealthError, detect_anomaly, guard
from tests.backend.counting import counting


def caught(run, **options) -> AnomalyError:
    with pytest.raises(AnomalyError) as info, detect_anomaly(**options):
        run()
    return info.value


def test_forward() -> None:
    x = gg.tensor([4.0, -1.0, 9.0], requires_grad=True)
    error = caught(lambda: (gg.sqrt(x) * 2).sum())  # the line at fault
    assert (error.operation, error.where, error.layer) == ("sqrt", "forward", "")
    assert "1 of 3 elements of the result are NaN" in str(error)
    assert re.search(r"test_health_anomaly\.py:\d+: .*# the line at fault", error.line)
    (given,) = error.inputs
    assert (given.name, given.dtype, given.shape) == ("x", x.dtype.name, (3,))
    assert (given.least, given.greatest, given.nonfinite) == (-1.0, 9.0, 0)


def test_backward() -> None:
    x = gg.tensor([4.0, 0.0], requires_grad=True)

    def run():
        y = gg.sqrt(x)  # made here
        loss = (y * 3).sum()
        loss.backward()

    error = caught(run)
    assert (error.operation, error.where) == ("sqrt", "backward")
    assert "1 of 2 elements of the gradient of x are infinite" in str(error)
    assert "# made here" in error.line
    assert error.inputs[0].name == "g" and error.inputs[0].greatest == 3.0
    assert x.grad is None
    with detect_anomaly(infinite=False):
        run()
    assert np.isinf(x.grad.numpy()[1])


def test_backward_of_the_last_operation() -> None:
    x = gg.tensor(0.0, requires_grad=True)
    error = caught(lambda: gg.sqrt(x).backward())
    assert (error.operation, error.where) == ("sqrt", "backward")
    assert "the gradient of x is infinite" in str(error)


def test_a_nan_that_is_born_in_the_way_back() -> None:
    x = gg.tensor([0.0], requires_grad=True)

    def run():
        y = gg.sqrt(x * x)  # infinity times zero
        y.sum().backward()

    assert caught(run).operation == "sqrt"
    error = caught(run, infinite=False)
    assert error.operation == "multiply" and "NaN" in str(error)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.encoder(x))


def test_the_layer_is_named() -> None:
    model = Net()
    with gg.no_grad():
        model.encoder[0].bias[...] = 30.0
        model.encoder[2].weight[...] = 3e38
    x = gg.ones((2, 3), dtype="float32")
    error = caught(lambda: model(x))
    assert error.layer == "encoder.2 (Linear)" and error.where == "forward"
    assert "Net.encoder.2 (Linear" in str(error)
    assert any(given.greatest > 1e38 for given in error.inputs)


def test_the_layer_of_a_backward() -> None:
    class Root(nn.Module):
        def forward(self, x):
            return gg.sqrt(x)

    model = nn.Sequential(nn.Linear(2, 2), Root())
    with gg.no_grad():
        model[0].weight[...] = 0.0
        model[0].bias[...] = 0.0
    error = caught(lambda: model(gg.ones((1, 2), dtype="float32")).sum().backward())
    assert (error.layer, error.operation, error.where) == ("1 (Root)", "sqrt", "backward")
    assert "in 1 (Root)" in str(error) and "return gg.sqrt(x)" in error.line


def test_joined_layers_come_apart() -> None:
    model = nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(4, 4), nn.Tanh())])
    with gg.no_grad():
        model[14].weight[0, 0] = np.nan
    x = gg.ones((200, 4), dtype="float32")
    with gg.use_kernels("require"):
        assert model(x).grad_fn.primitive.name == "layers"
        error = caught(lambda: model(x))
        assert error.layer == "14 (Linear)" and "came in with NaN" in str(error)
        assert model(x).grad_fn.primitive.name == "layers"


def test_float16_overflow() -> None:
    x = gg.tensor(np.full(3, 300.0, np.float16), requires_grad=True)
    error = caught(lambda: x * x)
    assert error.operation == "multiply" and "3 of 3 elements" in str(error)
    assert error.inputs[0].dtype == "float16" and error.inputs[0].greatest == 300.0


def test_data_with_nan() -> None:
    x = gg.tensor(np.array([[1.0, np.nan]], np.float32))
    error = caught(lambda: nn.Linear(2, 2)(x))
    assert "x came in with NaN" in str(error) and error.inputs[0].nonfinite == 1


def test_a_gradient_that_was_given() -> None:
    x = gg.tensor([1.0], requires_grad=True)
    error = caught(lambda: (2 * x).backward(gg.tensor([np.nan])))
    assert "the gradient that arrives has NaN" in str(error)


def test_what_is_meant_is_no_anomaly() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    x = gg.tensor(np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32"))
    mask = gg.asarray(np.triu(np.full((5, 5), -np.inf, np.float32), 1))
    lstm = nn.LSTM(8, 4, batch_first=True)
    with detect_anomaly():
        (layer(x, src_mask=mask) ** 2).mean().backward()
        lstm(x)[0].sum().backward()
        nn.functional.cross_entropy(x[0], gg.tensor([1, 2, 3, 4, 5])).item()
        y = gg.where(x > 0, x, -np.inf)
        gg.exp(y).sum()
        gg.full((2,), np.nan)
        gg.isnan(gg.full((2,), np.nan)).sum()
        z = gg.tensor([1.0, 2.0], requires_grad=True)
        with gg.no_grad():
            gg.exp(z)
        checked = nn.utils.checkpoint(lambda t: gg.tanh(t) * 2, z)
        checked.sum().backward()
        assert gg.grad(lambda t: (t**3).sum())(z.detach()).numpy().tolist() == [3.0, 12.0]
    assert z.grad is not None


def test_hooks_and_kept_gradients_work_in_it() -> None:
    x = gg.tensor([1.0, 2.0], requires_grad=True)
    seen = []
    with detect_anomaly():
        y = x * 3
        y.register_hook(lambda g: seen.append(g.numpy().tolist()))
        z = y * y
        y.retain_grad()
        remove = z.register_hook(lambda g: g * 10)
        z.sum().backward(retain_graph=True)
        remove()
        z.sum().backward()
        w = gg.exp(x * 0)
        late = w.sum()
        w.register_hook(lambda g: seen.append(g.numpy().tolist()))  # it is watched by now
        late.backward()
        assert seen.pop() == [1.0, 1.0]
    assert seen == [[60.0, 120.0], [6.0, 12.0]]
    assert y.grad.numpy().tolist() == [66.0, 132.0]
    assert x.grad.numpy().tolist() == [198.0, 396.0]


def test_gradients_are_the_same() -> None:
    gg.manual_seed(0)
    model = Net()
    x = gg.tensor(np.random.default_rng(0).standard_normal((6, 3)).astype("float32"))
    (model(x) ** 2).mean().backward()
    want = [p.grad.numpy().copy() for p in model.parameters()]
    model.zero_grad()
    with detect_anomaly():
        (model(x) ** 2).mean().backward()
    for p, g in zip(model.parameters(), want):
        np.testing.assert_allclose(p.grad.numpy(), g, rtol=1e-5, atol=1e-8)


def test_nothing_is_left_behind() -> None:
    x = gg.tensor([0.0, 1.0], requires_grad=True)
    caught(lambda: gg.sqrt(x).sum().backward())
    assert not on_walk and not gate
    with np.errstate(all="ignore"):
        gg.sqrt(x).sum().backward()
        assert np.isinf(x.grad.numpy()[0])
        with detect_anomaly():
            y = gg.sqrt(x).sum()
        y.backward()  # outside, nobody looks


def test_operations_that_are_replaced_meanwhile() -> None:
    def run(bad):
        with detect_anomaly():
            gg.explain(gg.exp)(gg.tensor([1.0]))
            gg.log(gg.tensor([-1.0 if bad else 1.0]))

    with pytest.raises(GraphError, match="looked up anew"):
        run(False)
    assert not on_walk and not gate
    with np.errstate(all="ignore"), pytest.raises(GraphError, match="looked up anew"):
        run(True)  # the table was emptied, and nobody saw it
    assert not on_walk and not gate


def test_checkpointed_layers() -> None:
    x = gg.tensor([0.0, 1.0], requires_grad=True)

    def run():
        nn.utils.checkpoint(lambda t: gg.sqrt(t) * 2, x).sum().backward()

    error = caught(run)
    assert (error.operation, error.where) == ("sqrt", "backward")


# -- what can stay on ------------------------------------------------------------------------------


def trainer(device=None):
    gg.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1)).to(device)
    optimizer = gg.optim.Adam(model.parameters(), lr=0.01)

    def step(x):
        optimizer.zero_grad()
        y = model(x)
        loss = (y / x[:, :1]).mean()
        loss.backward()
        optimizer.step()
        return loss

    return model, optimizer, step


def inputs(count, bad=None, device=None):
    rng = np.random.default_rng(0)
    for i in range(1, count + 1):
        x = rng.uniform(1, 2, (4, 2)).astype("float32")
        if i == bad:
            x[2, 0] = 0.0
        yield gg.tensor(x, device=device)


@pytest.mark.parametrize("every", [1, 4, 7, 100])
def test_the_first_bad_step_is_found(every) -> None:
    model, optimizer, step = trainer()
    for x in inputs(5):
        step(x)
    want = [p.detach().numpy().copy() for p in model.parameters()]
    model, optimizer, step = trainer()
    guarded = guard(step, model, optimizer, every=every)

    def run():
        with guarded:
            for x in inputs(12, bad=6):
                guarded(x)

    with pytest.raises(AnomalyError) as info:
        run()
    error = info.value
    assert (error.step, error.operation, error.where) == (6, "divide", "forward")
    assert "y / x[:, :1]" in error.line
    assert any("in step 6" in note for note in error.__notes__)
    # The model is as it was before that step, dropout and all.
    for p, w in zip(model.parameters(), want):
        np.testing.assert_array_equal(p.detach().numpy(), w)


def test_a_good_training_is_left_alone() -> None:
    model, optimizer, step = trainer()
    losses = [step(x).item() for x in inputs(9)]
    model, optimizer, step = trainer()
    with guard(step, model, optimizer, every=4) as guarded:
        assert [guarded(x).item() for x in inputs(9)] == losses
    assert guarded.steps == 9


def test_an_update_that_overflows() -> None:
    model = nn.Linear(1, 1)
    optimizer = gg.optim.SGD(model.parameters(), lr=1e38)

    def step(x):
        optimizer.zero_grad()
        loss = (model(x) * 100).mean()
        loss.backward()
        optimizer.step()
        return loss

    guarded = guard(step, model, optimizer)
    guarded(gg.ones((2, 1), dtype="float32"))
    with pytest.raises(AnomalyError, match=r"step 1.*the update.*learning rate") as info:
        guarded.look()
    assert info.value.where == "update" and info.value.step == 1


def test_a_step_that_is_not_the_same_again() -> None:
    model, optimizer, _ = trainer()
    scales = iter([1.0, np.nan, 1.0, 1.0])
    guarded = guard(lambda: model(gg.ones((2, 2), dtype="float32")).mean() * next(scales),
                    model, optimizer, every=2)  # fmt: skip
    guarded()
    with pytest.raises(AnomalyError, match="something that guard was not given"):
        guarded()


def test_the_device_is_read_on_schedule() -> None:
    with counting() as counts:
        model, optimizer, step = trainer("counting")
        reads = []
        guarded = guard(step, model, optimizer, every=3)
        for x in inputs(7, device="counting"):
            before = counts.host_reads
            guarded(x)
            reads.append(counts.host_reads - before)
    # The copy of the state in the beginning, where counts of steps are numbers, and each look.
    assert reads[1] == reads[4] == 0 and reads[2] > 0


def test_bad_input() -> None:
    model, optimizer, step = trainer()
    with pytest.raises(HealthError, match="a step is a function"):
        guard(3, model)
    with pytest.raises(HealthError, match="int has no state_dict"):
        guard(step, model, 3)
    with pytest.raises(HealthError, match="give the model"):
        guard(step, optimizer)
    with pytest.raises(HealthError, match="every=0"):
        guard(step, model, every=0)
