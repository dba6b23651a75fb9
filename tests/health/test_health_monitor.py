"""A training that is watched: what is recorded, when, and that nothing waits for it."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.health import HealthError, Monitor, Record, judge, observe
from gpugrad.health.monitor import _Schedule
from tests.backend.counting import counting

ROOT = Path(__file__).parents[2]


def net(dtype="float32", device=None, depth=1):
    gg.manual_seed(3)
    hidden = [m for _ in range(depth) for m in (nn.Linear(4, 4), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(4, 1)).to(device, dtype)


def train(model, optimizer, monitor, steps, device=None, dtype="float32", **options):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        x = gg.tensor(rng.standard_normal((8, 4)).astype("float32"), device=device).to(dtype=dtype)
        optimizer.zero_grad()
        loss = (model(x) ** 2).mean()
        loss.backward()
        optimizer.step(**options)
        if monitor is not None:
            monitor.step(loss)


def test_what_is_recorded_is_what_happened() -> None:
    model = net()
    optimizer = gg.optim.AdamW(model.parameters(), lr=0.01)
    twin = net()
    other = gg.optim.AdamW(twin.parameters(), lr=0.01)
    x = gg.ones((8, 4), dtype="float32")
    monitor = Monitor(model, optimizer, every=3)
    with monitor:
        for step in range(1, 8):
            before = [p.detach().numpy().copy() for p in twin.parameters()]

            def run(step=step):
                twin.zero_grad()
                loss = (twin(x * step) ** 2).mean()
                loss.backward()
                return loss

            want = observe(twin, run)
            other.step(clip=0.5)
            optimizer.zero_grad()
            loss = (model(x * step) ** 2).mean()
            loss.backward()
            optimizer.step(clip=0.5)
            monitor.step(loss)
            if step not in (1, 2, 3, 6):
                continue
            record = monitor.record
            assert record.steps[-1] == step
            for name, values in want.values.items():
                if name != "update_ratio":
                    np.testing.assert_allclose(
                        record.values[name][-1], values[0], rtol=1e-4, atol=1e-7, err_msg=name
                    )
            moved = [p.detach().numpy() - b for p, b in zip(twin.parameters(), before)]
            for layer, pair in ((0, slice(0, 2)), (2, slice(2, 4))):
                ratio = np.linalg.norm(np.concatenate([m.ravel() for m in moved[pair]]))
                ratio /= np.linalg.norm(np.concatenate([b.ravel() for b in before[pair]]))
                got = record.values["update_ratio"][-1, layer]
                assert got == pytest.approx(ratio, rel=1e-3)
            scalars = {k: float(v[-1]) for k, v in record.scalars.items()}
            assert scalars["loss"] == pytest.approx(loss.item(), rel=1e-6)
            assert scalars["lr"] == pytest.approx(0.01)
            assert scalars["norm"] == pytest.approx(other.last_norm.item(), rel=1e-5)
            assert scalars["coefficient"] == pytest.approx(other.last_coefficient.item(), rel=1e-5)
    for p, q in zip(model.parameters(), twin.parameters()):
        np.testing.assert_allclose(p.detach().numpy(), q.detach().numpy(), rtol=1e-4, atol=1e-6)
    assert monitor.record.steps.tolist() == [1, 2, 3, 6]


def test_without_an_optimiser() -> None:
    model = net()
    optimizer = gg.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, every=2) as monitor:
        train(model, optimizer, monitor, 6)
    record = monitor.record
    assert record.steps.tolist() == [1, 2, 4, 6]
    ratio, norm = (record.values[name] for name in ("update_ratio", "gradient_norm"))
    weights = record.values["parameter_norm"]
    np.testing.assert_allclose(ratio[:, 0], 0.1 * norm[:, 0] / weights[:, 0], rtol=1e-3)
    assert np.isnan(record.scalars["lr"]).all() and np.isfinite(record.scalars["norm"]).all()


def test_the_schedule() -> None:
    model = net()
    optimizer = gg.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, every=20) as monitor:
        train(model, optimizer, monitor, 65)
    assert monitor.record.steps.tolist() == [1, 2, 4, 8, 16, 20, 40, 60]
    with Monitor(model, optimizer) as monitor:
        train(model, optimizer, monitor, 200)
    steps = monitor.record.steps
    assert steps[:4].tolist() == [1, 2, 4, 8] and len(steps) < 40


def test_layers_are_joined_again_between_recorded_steps() -> None:
    model = net(depth=20)
    optimizer = gg.optim.SGD(model.parameters(), lr=0.1)
    x = gg.ones((50, 4), dtype="float32")
    found = []
    with gg.use_kernels("require"), Monitor(model, optimizer, every=4) as monitor:
        for _ in range(5):
            optimizer.zero_grad()
            y = model(x)
            found.append(y.grad_fn.primitive.name)
            (y * y).mean().backward()
            optimizer.step()
            monitor.step()
    assert [name == "layers" for name in found] == [False, False, True, False, True]
    assert np.isnan(monitor.record.scalars["loss"]).all()


def test_nothing_is_read_outside_the_schedule() -> None:
    with counting() as counts:
        model = net(device="counting")
        optimizer = gg.optim.AdamW(model.parameters(), lr=0.01)
        monitor = Monitor(model, optimizer, every=1).start()
        reads = []
        for _ in range(20):
            before = counts.host_reads
            train(model, optimizer, monitor, 1, device="counting", clip=1.0)
            reads.append(counts.host_reads - before)
        assert reads == [0] * 7 + [1] + [0] * 7 + [1] + [0] * 4
        monitor.stop()
        assert counts.host_reads == 3
        assert monitor.record.steps.tolist() == list(range(1, 21))
        assert np.isfinite(monitor.record.scalars["loss"]).all()
        counts.clear()
        with Monitor(model, optimizer, every=10**6) as monitor:
            train(model, optimizer, monitor, 4, device="counting")  # 1, 2 and 4 are recorded
            launches = []
            for _ in range(3):  # 5, 6 and 7 are not
                before = counts.launches
                train(model, optimizer, monitor, 1, device="counting")
                launches.append(counts.launches - before)
            assert counts.host_reads == 0
        before = counts.launches
        train(model, optimizer, None, 1, device="counting")
        assert launches == [counts.launches - before] * 3


def test_a_loss_scale_is_taken_out() -> None:
    found = []
    for scaled, form in ((False, ""), (True, "short"), (True, "long"), (True, "unscaled")):
        model = net()
        optimizer = gg.optim.SGD(model.parameters(), lr=0.1)
        scaler = gg.optim.GradScaler(init_scale=1024.0, enabled=scaled)
        x = gg.ones((8, 4), dtype="float32")
        with Monitor(model, optimizer, every=1) as monitor:
            for _ in range(2):
                optimizer.zero_grad()
                loss = (model(x) ** 2).mean()
                scaler.scale(loss).backward()
                if form in ("", "short"):
                    optimizer.step(scaler=scaler)
                else:
                    if form == "unscaled":
                        scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                    scaler.update()
                monitor.step(loss)
        found.append(monitor.record)
    for other in found[1:]:
        for name, values in found[0].values.items():
            np.testing.assert_allclose(other.values[name], values, rtol=1e-4, atol=1e-7)


def test_accumulated_gradients_and_evaluation() -> None:
    model = net()
    optimizer = gg.optim.SGD(model.parameters(), lr=0.1)
    x = gg.ones((8, 4), dtype="float32")
    with Monitor(model, optimizer, every=1) as monitor:
        for part in (x, 2 * x):
            (model(part) ** 2).mean().backward()
        with gg.no_grad():
            model(1000 * x)
        optimizer.step()
        monitor.step(1.5)
    record = monitor.record
    assert len(record) == 1 and record.scalars["loss"][0] == 1.5
    assert record.values["activation_max"][0, 0] < 100


def test_nan_from_the_first_step() -> None:
    model = net()
    model[0].weight.data[0, 0] = np.nan
    optimizer = gg.optim.SGD(model.parameters(), lr=0.1)
    with np.errstate(all="ignore"), Monitor(model, optimizer, every=1) as monitor:
        train(model, optimizer, monitor, 3, clip=1.0)
    record = monitor.record
    assert record.values["activation_nonfinite"][0].tolist() == [8, 8, 8]
    assert (record.values["gradient_nonfinite"][0, [0, 2]] > 0).all()
    assert np.isnan(record.scalars["loss"]).all() and len(record) == 3


def test_float16() -> None:
    model = net("float16")
    optimizer = gg.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, every=1) as monitor:
        train(model, optimizer, monitor, 3, dtype="float16")
    ratio = monitor.record.values["update_ratio"][:, [0, 2]]
    assert (ratio > 0).all() and (ratio < 1).all()


def test_some_layers_are_frozen_or_not_reached() -> None:
    parts = net()
    outer = nn.ModuleList([parts, nn.Linear(2, 2)])
    parts[0].requires_grad_(False)
    optimizer = gg.optim.SGD([p for p in outer.parameters() if p.requires_grad], lr=0.1)
    with Monitor(outer, optimizer, every=1) as monitor:
        train(parts, optimizer, monitor, 2)
    record = monitor.record
    assert record.layers == ["0.0", "0.1", "0.2", "1"]
    known = ~np.isnan(record.values["gradient_norm"])
    assert known.tolist() == [[False, False, True, False]] * 2
    assert (record.values["update_ratio"][:, [0, 3]] == 0).all()
    assert (record.values["update_ratio"][:, 2] > 0).all()


def test_what_is_frozen_on_purpose_is_no_trouble_in_a_file_either(tmp_path) -> None:
    parts = net()
    parts[0].requires_grad_(False)
    optimizer = gg.optim.SGD([p for p in parts.parameters() if p.requires_grad], lr=0.1)
    path = tmp_path / "health.jsonl"
    with Monitor(parts, optimizer, every=1, path=path) as monitor:
        train(parts, optimizer, monitor, 2)
    assert monitor.record.frozen == ["0"]
    assert monitor.verdict().healthy
    assert judge(Record.load(path)).healthy
    # The same numbers of a record that does not know of it.
    path.write_text(path.read_text().replace('"frozen": ["0"]', '"frozen": []'))
    assert judge(Record.load(path)).kind == "not reached"


def test_bad_input() -> None:
    model = net()
    optimizer = gg.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(HealthError, match=r"ReLU has no parameters.*observe"):
        Monitor(nn.ReLU())
    with pytest.raises(HealthError, match="none of the parameters"):
        Monitor(nn.Linear(2, 2), optimizer)
    for every in (0, -1, 1.5, True):
        with pytest.raises(HealthError, match="every="):
            Monitor(model, every=every)
    monitor = Monitor(model, optimizer)
    with pytest.raises(HealthError, match="not running"):
        monitor.step()
    with monitor, pytest.raises(HealthError, match="started already"):
        monitor.start()
    monitor.stop()
    assert monitor.record.layers == ["0", "1", "2"] and len(monitor.record) == 0


def test_an_error_leaves_the_model_alone_and_the_file_whole(tmp_path) -> None:
    model = net()
    optimizer = gg.optim.SGD(model.parameters(), lr=0.1)

    def run():
        with Monitor(model, optimizer, every=1, path=tmp_path / "h.jsonl") as monitor:
            train(model, optimizer, monitor, 5)
            model(gg.ones((8, 4), dtype="float32"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert not optimizer._hooks and all(not m._hooks for m in model.modules())
    assert Record.load(tmp_path / "h.jsonl").steps.tolist() == [1, 2, 3, 4, 5]


def test_a_killed_run_leaves_its_record(tmp_path) -> None:
    path = tmp_path / "h.jsonl"
    code = f"""
import os
from gpugrad.health import Monitor
import gpugrad as gg
from tests.health.test_health_monitor import net, train
model = net()
optimizer = gg.optim.SGD(model.parameters(), lr=0.1)
with Monitor(model, optimizer, every=2, path={str(path)!r}) as monitor:
    train(model, optimizer, monitor, 9)
    os.kill(os.getpid(), 9)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True)
    assert run.returncode == -9, run.stderr
    record = Record.load(path)
    assert record.steps.tolist() == [1, 2, 4, 6, 8]
    assert np.isfinite(record.scalars["loss"]).all()


def test_hooks_of_a_step() -> None:
    p = gg.tensor([1.0], requires_grad=True)
    optimizer = gg.optim.SGD([p], lr=0.5)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    def hook(name):
        return lambda o, args, kwargs: seen.append((name, o is optimizer, args, kwargs, p.item()))

    with optimizer.register_step_pre_hook(hook("pre")):
        after = optimizer.register_step_post_hook(hook("post"))
        assert optimizer.step(closure, clip=9.0).item() == 1.0
        given = {"clip": 9.0, "scaler": None, "nonfinite": "propagate"}
        assert seen == [("pre", True, (), given, 1.0), ("post", True, (), given, 0.0)]
    optimizer.step()
    assert [one[0] for one in seen] == ["pre", "post", "post"]
    after.remove()
    optimizer.step()
    assert len(seen) == 3


def test_a_copy_of_the_optimiser_is_not_watched() -> None:
    import copy

    model = net()
    optimizer = gg.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer):
        assert not copy.deepcopy(optimizer)._hooks


def test_losses_far_away() -> None:
    model = net()
    optimizer = gg.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, every=1) as monitor:
        optimizer.step()
        monitor.step(gg.tensor(1e300, dtype="float64"))
    assert math.isinf(monitor.record.scalars["loss"][0])


def bring_to_the_host(gpus: int, device: str) -> None:
    """What a monitor asks of a GPU; a broken assertion is a failure."""
    from tests.backend.fake_cupy import ndarray
    from tests.data.test_data_cupy import Event, install, log

    cupy = install(gpus)
    waited = []
    Event.synchronize = lambda self: waited.append(self)

    def get(self, stream, out, blocking):
        assert not blocking and stream.name == "copies"
        log.append("copies read")
        out[...] = self._host

    ndarray.get = get
    x = gg.tensor(np.arange(6.0), device=device)
    space = x.backend
    receive = space.read_async(x.data)
    # The copy waits for the work that was queued, and the host for the copy.
    kinds = [line.rpartition(" ")[0] for line in log[:2]]
    assert kinds == ["compute record", "copies wait"] and log[2] == "copies read"
    assert log[0].split()[-1] == log[1].split()[-1] and not waited
    assert receive().tolist() == [0, 1, 2, 3, 4, 5] and len(waited) == 1
    empty = gg.tensor(np.zeros(0), device=device)
    assert space.read_async(empty.data)().shape == (0,)
    assert cupy.cuda.runtime.current == 0


@pytest.mark.parametrize(("gpus", "device"), [(1, "cuda"), (2, "cuda:1")])
def test_numbers_are_copied_from_a_gpu_beside_the_work(gpus, device) -> None:
    call = f"bring_to_the_host({gpus}, {device!r})"
    code = f"from tests.health import test_health_monitor as t; t.{call}"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_steps_that_are_not_recorded_stay_known() -> None:
    schedule = _Schedule(None)
    schedule._times[0].extend([2.0] * 9)  # before something else on the machine ended
    schedule._times[1].append(1.0)
    assert schedule._following(100) == 102
    schedule._times[0].extend([0.5] * 101)
    assert schedule._following(100) == 150
