"""The state of a whole run: collected, restored, kept, and gone on with bit by bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn, optim
from gpugrad.data import DataLoader, DeviceLoader, TensorDataset
from gpugrad.errors import ParameterError
from gpugrad.io import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    Checkpoints,
    collect,
    load,
    pack,
    read_metadata,
    restore,
    save,
    unpack,
)
from gpugrad.nn import functional as F
from gpugrad.nn.errors import StateDictError
from gpugrad.nn.random import default_generator
from gpugrad.optim import GradScaler, OptimizerError

ROOT = Path(__file__).parents[2]
X = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 50)


class Halving:
    """A scheduler as any user may write one."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.steps, self.milestones = optimizer, 0, {4: 1, 9: 2}

    def step(self) -> None:
        self.steps += 1
        for _ in range(self.milestones.get(self.steps, 0)):
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.5

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "milestones": self.milestones}

    def load_state_dict(self, state: Any) -> None:
        self.steps, self.milestones = state["steps"], dict(state["milestones"])


class Run:
    """Everything a run has: dropout, batch norm, momentum, a loss scale, a shuffled loader."""

    def __init__(self, kind: str, seed: int) -> None:
        nn.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
        )
        self.optimizer = optim.AdamW(self.model.named_parameters(), lr=0.01)
        self.scheduler = Halving(self.optimizer)
        self.scaler = GradScaler(init_scale=8.0, growth_interval=3)
        generator = nn.Generator(seed)
        if kind == "device":
            self.loader: Any = DeviceLoader(X, Y, batch_size=8, shuffle=True, generator=generator)
        else:
            workers = 2 if kind == "workers" else 0
            own = None if kind == "default" else generator
            self.loader = DataLoader(
                TensorDataset(X, Y), 8, shuffle=True, num_workers=workers, generator=own
            )
        self.noise = nn.Generator(seed)
        self.losses: list[float] = []

    def parts(self) -> dict[str, Any]:
        names = ("model", "optimizer", "scheduler", "scaler", "loader", "noise")
        return {name: getattr(self, name) for name in names}

    def steps(self, count: int, at: int = 0, path: Path | None = None) -> Run:
        """Train on, and save all of it in the middle, after the step ``at``."""
        while count:
            for x, y in self.loader:
                x = x + gg.asarray(self.noise.normal(x.shape).astype(np.float32)) * 0.1
                loss = F.cross_entropy(self.model(x), y)
                self.optimizer.zero_grad()
                self.scaler.scale(loss).backward()
                self.optimizer.step(clip=1.0, scaler=self.scaler)
                self.scheduler.step()
                self.losses.append(loss.item())
                if path is not None and len(self.losses) == at:
                    save(path, *pack(collect(**self.parts(), step=at)))
                count -= 1
                if not count:
                    break
        return self

    def values(self) -> list[bytes]:
        return [x.numpy().tobytes() for x in self.model.state_dict().values()]


@pytest.mark.parametrize("kind", ["plain", "default", "workers", "device"])
@pytest.mark.parametrize("at", [1, 7, 10, 14])
def test_resuming_is_exact_to_the_last_bit(tmp_path: Path, kind: str, at: int) -> None:
    whole = Run(kind, 3).steps(at + 12, at, tmp_path / "c")
    other = Run(kind, 99)
    other.steps(2)  # whatever it was before
    other.losses.clear()
    assert restore(unpack(*load(tmp_path / "c")), **other.parts()) == {"step": at}
    other.steps(12)
    assert other.losses == whole.losses[at:]
    assert other.values() == whole.values()
    assert other.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
    assert json.dumps(other.loader.state_dict()) == json.dumps(whole.loader.state_dict())
    assert other.scaler.state_dict() == whole.scaler.state_dict()


def test_resuming_in_another_process(tmp_path: Path) -> None:
    whole = Run("plain", 3).steps(11, 5, tmp_path / "c")
    code = """
        import sys
        from gpugrad.io import load, restore, unpack
        from tests.io.test_io_training import Run
        run = Run("plain", 1)
        restore(unpack(*load(sys.argv[1])), **run.parts())
        print([loss.hex() for loss in run.steps(6).losses])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path / "c"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str([loss.hex() for loss in whole.losses[5:]])


def test_names_that_only_one_side_has() -> None:
    run = Run("plain", 0).steps(1)
    state = collect(model=run.model, optimizer=run.optimizer, scaler=run.scaler, epoch=2)
    before = run.values()
    with pytest.raises(CheckpointError) as caught:
        restore(state, model=run.model, scheduler=run.scheduler, ema=run.model)
    for line in (
        "not in the checkpoint: scheduler",
        "not in the checkpoint: ema",
        "in the checkpoint only: optimizer",
        "in the checkpoint only: scaler",
    ):
        assert line in str(caught.value)
    assert run.values() == before
    random = default_generator.state
    assert restore(state, strict=False, model=Run("plain", 5).model) == {"epoch": 2}
    assert default_generator.state != random  # Run() seeded it, restore() did not touch it
    with pytest.raises(CheckpointError, match=r"not made by gpugrad\.io\.collect"):
        restore({"model": {}}, model=run.model)


def everything(run: Run) -> Any:
    tensors, metadata = pack(collect(**run.parts()))
    return {name: x.tobytes() for name, x in tensors.items()}, metadata


@pytest.mark.parametrize("part", ["optimizer", "scheduler", "scaler", "loader", "noise", "model"])
def test_everything_or_nothing(part: str) -> None:
    state = unpack(*pack(collect(**Run("plain", 3).steps(9).parts())))
    broken = state["objects"][part]
    kind: type[Exception] | tuple[type[Exception], ...] = (KeyError, CheckpointError, ValueError)
    if part == "optimizer":
        broken["state"]["1" if "1" in broken["state"] else 1]["exp_avg"] = np.zeros(3)
        kind = StateDictError
    elif part == "scheduler":
        del broken["milestones"]
    elif part == "scaler":
        del broken["scale"]
    elif part == "loader":
        broken["examples"] = 51
    elif part == "noise":
        state["objects"]["noise"] = (-1, 0)
    else:
        broken["0.weight"] = np.zeros((8, 5), np.float32)
        kind = StateDictError
    run = Run("plain", 4).steps(3)
    before = everything(run)
    with pytest.raises(kind) as caught:
        restore(state, **run.parts())
    assert f"gpugrad: in the part {part!r} of the checkpoint" in caught.value.__notes__
    assert everything(run) == before


def test_an_optimiser_that_does_not_fit() -> None:
    run = Run("plain", 0).steps(2)
    state = collect(model=run.model, optimizer=run.optimizer)
    other = Run("plain", 1)
    before = other.values()
    sgd = optim.SGD(other.model.parameters(), lr=0.1)
    with pytest.raises(OptimizerError, match="another optimiser"):
        restore(state, model=other.model, optimizer=sgd)
    assert other.values() == before


# folders


def test_keeping_the_last_and_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run", keep_last=2, keep_best=1)
    assert (checkpoints.steps(), checkpoints.best()) == ([], None)
    for step, loss in enumerate([5.0, 2.0, 3.0, 4.0, 2.5]):
        path = checkpoints.save(10 * step, collect(step=step), metric=loss)
        assert path == checkpoints.path(10 * step)
        assert path.is_file()
    assert checkpoints.steps() == [10, 30, 40]
    assert checkpoints.best() == 10
    assert restore(checkpoints.load()) == {"step": 4}
    assert restore(checkpoints.load(10)) == {"step": 1}
    assert read_metadata(checkpoints.path(10))["metric"] == "2.0"
    assert Checkpoints(tmp_path / "run", mode="max").best() == 30
    again = Checkpoints(tmp_path / "run", keep_last=1, keep_best=0)
    again.save(50, collect(step=5))
    assert again.steps() == [50]
    with pytest.raises(CheckpointNotFoundError):
        again.load(40)


def test_metrics_that_are_not_numbers(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, {}, metric=1.0)
    checkpoints.save(2, {}, metric=float("nan"))
    checkpoints.save(3, {}, metric=float("inf"))
    checkpoints.save(4, {})
    assert (checkpoints.best(), checkpoints.steps()) == (1, [1, 4])


def test_all_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=None)
    for step in range(7):
        checkpoints.save(step, {})
    checkpoints.save(123_456_789_012, {})
    assert checkpoints.steps() == [*range(7), 123_456_789_012]


def test_going_back_to_an_older_step_keeps_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(100, {"a": 1})
    checkpoints.save(50, {"a": 2})
    assert checkpoints.steps() == [50, 100]


def test_damaged_ones_are_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, {"w": np.full(100, step)}, metric=-step)
    newest = checkpoints.path(3)
    raw = bytearray(newest.read_bytes())
    raw[-1] ^= 1
    newest.write_bytes(raw)
    middle = checkpoints.path(2)
    middle.write_bytes(middle.read_bytes()[:50])
    with pytest.warns(RuntimeWarning, match="passed over") as warned:
        assert checkpoints.load()["w"][0] == 1
    assert len(warned) == 2
    assert checkpoints.best() == 3  # only its data are damaged, which loading it tells
    with pytest.raises(CheckpointCorruptError):
        checkpoints.load(3)
    checkpoints.path(1).unlink()
    with pytest.warns(RuntimeWarning), pytest.raises(
        CheckpointNotFoundError, match=r"no whole checkpoint(.|\n)*00000003(.|\n)*00000002"
    ):  # fmt: skip
        checkpoints.load()


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    for name in (
        "notes.txt",
        "step-1.safetensors",
        "step-0000000x.safetensors",
        "best.safetensors",
    ):
        (tmp_path / name).touch()
    (tmp_path / ".gpugrad-0123.tmp").touch()  # left behind by a killed process
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    for step in (1, 2):
        checkpoints.save(step, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.safetensors", "notes.txt", "step-00000002.safetensors", "step-0000000x.safetensors",
        "step-1.safetensors",
    ]  # fmt: skip


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot make this folder"):
        Checkpoints(tmp_path / "file" / "x").save(1, {})
    with pytest.raises(CheckpointNotFoundError, match="no whole checkpoint"):
        Checkpoints(tmp_path / "gone").load()
    for options in ({"keep_last": 0}, {"keep_best": -1}, {"mode": "best"}):
        with pytest.raises(ParameterError):
            Checkpoints(tmp_path, **options)
    with pytest.raises(ParameterError, match="at least 0"):
        Checkpoints(tmp_path).save(-1, {})


SAVE_FOREVER = """
    import sys, itertools, numpy as np
    from gpugrad.io import Checkpoints
    checkpoints = Checkpoints(sys.argv[1], keep_last=2)
    for i in itertools.count(1 + (checkpoints.steps() or [0])[-1]):
        checkpoints.save(i, {"w": np.full(300_000, i), "b": np.full(10, i)}, metric=-i)
        print(i, flush=True)
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    orphans = 0
    for trial in range(8):
        command = [sys.executable, "-c", textwrap.dedent(SAVE_FOREVER), str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            first = int(child.stdout.readline())
            if trial % 2:  # while a file is being written ...
                while not any(tmp_path.glob(".gpugrad-*.tmp")):
                    pass
            time.sleep(rng.uniform(0, 0.01))  # ... or whenever
            child.send_signal(signal.SIGKILL)
            done = [first, *(int(line) for line in child.stdout.read().splitlines() if line)]
        orphans += len(list(tmp_path.glob(".gpugrad-*.tmp")))
        checkpoints = Checkpoints(tmp_path)
        state = checkpoints.load()  # without a warning: the newest is whole
        newest = int(state["w"][0])
        assert done[-1] <= newest <= done[-1] + 1
        assert (state["w"] == newest).all()
        assert (state["b"] == newest).all()
        assert 1 <= len(checkpoints.steps()) <= 3
        for step in checkpoints.steps():
            checkpoints.load(step)
    assert orphans > 0  # or no kill came in the middle of saving, and this test shows nothing
