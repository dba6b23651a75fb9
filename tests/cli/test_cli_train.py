"""The train command: results, checkpoints that go on exactly, interrupts and failures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import io, models
from gpugrad.cli import main
from gpugrad.cli.config import ACTIVATIONS, Config, ConfigError, make_config
from gpugrad.cli.tasks import Classes, task_of
from gpugrad.cli.training import (
    BEST,
    CHECKPOINT,
    METRICS,
    DivergedError,
    ResumeError,
    Run,
    load_run,
    resume,
    start,
)
from gpugrad.data import load
from tests.backend.counting import counting

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "gpugrad.cli"]
SMALL = ["--width", "16", "--depth", "1"]


class Silent:
    """A watch that keeps what it is told."""

    def __init__(self):
        self.readings, self.rows = [], []

    def reading(self, reading):
        self.readings.append(reading)

    def epoch(self, row):
        self.rows.append(row)


def digits():
    return Classes(load("digits"))


def spawn(*args, cwd, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, *map(str, args)], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def command(*args, cwd, **options):
    process = spawn(*args, cwd=cwd, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def small(folder, epochs=2, **options):
    return start(
        Config("digits", width=16, depth=1, epochs=epochs, **options), digits(), "cpu", folder
    )


def tensors(folder):
    """Everything a checkpoint holds but the times."""
    state = io.unpack(*io.load(folder / CHECKPOINT))
    arrays, _ = io.load(folder / CHECKPOINT)
    for row in state["history"]:
        del row["seconds"], row["samples_per_second"]
    del state["model"], state["optimizer"], state["sums"]["seconds"]
    return {name: (a.dtype, a.tobytes()) for name, a in arrays.items()}, state


# -- results -------------------------------------------------------------------------------------


def test_a_run_in_full(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", *SMALL, "--epochs", "2", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "epoch 2/2: loss" in said.out
    assert "test accuracy" in said.out
    assert "\x1b" not in said.out  # no bar where nobody looks
    assert "\r" not in said.out
    folder = tmp_path / "runs" / "digits-1"
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["loss"] < rows[0]["loss"]
    assert set(rows[0]) >= {
        "epoch", "loss", "train_accuracy", "test_accuracy", "grad_norm", "seconds",
    }  # fmt: skip
    state = io.unpack(*io.load(folder / CHECKPOINT))
    assert state["epoch"] == 2
    assert state["history"] == rows
    assert list(state["model"]) == ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert main(["train", "digits", *SMALL, "--epochs", "1"]) == 0
    assert (tmp_path / "runs" / "digits-2" / CHECKPOINT).exists()
    assert "on the CPU: " in capsys.readouterr().out or "cuda" in said.out


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_trains(activation, tmp_path) -> None:
    watch = Silent()
    run = start(
        Config("digits", width=32, depth=2, epochs=3, activation=activation),
        digits(), "cpu", tmp_path / "run",
    )  # fmt: skip
    assert run.train(watch)
    assert watch.rows[-1]["loss"] < watch.rows[0]["loss"]


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "lr": 0.05},
        {"clip": 0.0},
        {"dtype": "float64"},
        {"depth": 0},
        {"batch_size": 5000},
        {"label_smoothing": 0.0, "lr_decay": 1.0},
        {"optimizer": "adam"},
        {"optimizer": "rmsprop", "lr": 1e-3, "momentum": 0.0},
        {"optimizer": "adagrad", "lr": 0.05},
        {"optimizer": "lion", "lr": 3e-4},
        {"schedule": "cosine", "warmup": 5},
        {"schedule": "linear", "accumulate": 3},
        {"autocast": "bfloat16"},
        {"autocast": "float16", "nonfinite": "skip"},
        {"model": "cnn", "width": 4, "norm": True, "augment": True},
        {"model": "resnet", "width": 4, "depth": 8, "lr": 5e-3, "recompute": True},
    ],
    ids=str,
)
def test_options_train(options, tmp_path) -> None:
    watch = Silent()
    config = Config("digits", **{"width": 16, "depth": 1, "epochs": 4, **options})
    run = start(config, digits(), "cpu", tmp_path / "run")
    assert run.train(watch)
    assert watch.rows[-1]["loss"] < watch.rows[0]["loss"]
    assert all(p.dtype == config.dtype for p in run.net.parameters())


def test_rows_agree_with_a_count_by_hand(tmp_path) -> None:
    watch = Silent()
    run = small(tmp_path / "run", 1)
    run.train(watch)
    x = load("digits").test_x.reshape(-1, 64)
    for layer in ("1", "3"):
        state = run.net.state_dict()
        x = x @ state[f"{layer}.weight"].numpy().T + state[f"{layer}.bias"].numpy()
        x = np.maximum(x, 0) if layer == "1" else x
    accuracy = np.mean(x.argmax(1) == load("digits").test_y)
    assert watch.rows[0]["test_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    last = watch.readings[-1]
    assert (last.epoch, last.step, last.steps) == (1, 23, 23)
    assert watch.rows[0]["train_accuracy"] == pytest.approx(last.accuracy, abs=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"model": "mlp", "width": 8, "depth": 1, "norm": True, "dropout": 0.1},
        {"model": "cnn", "width": 4, "augment": True},
        {"model": "resnet", "width": 4, "depth": 8, "recompute": True, "accumulate": 2},
        *(
            {"data": "text", "model": model, "width": 8, "depth": 1, "limit": 0.02, "context": 8}
            for model in ("rnn", "lstm", "gru")
        ),
        {"data": "text", "width": 8, "depth": 1, "heads": 2, "limit": 0.02, "context": 8},
    ],
    ids=lambda o: o.get("model", "gpt"),
)
def test_a_step_reads_nothing_from_the_device(options, tmp_path) -> None:
    options = {"data": "digits", "batch_size": 16, **options}
    config = make_config(options.pop("data"), options)
    with counting() as counts:
        run = start(config, task_of(config, None), "counting", tmp_path / "run")
        batches = iter(run.loader)
        run._train_step(batches)
        counts.clear()
        for _ in range(2):
            run.step += 1
            run._train_step(batches)
        assert counts.host_reads == 0
        run._read(1.0)
        assert counts.host_reads == 3  # losses, hits and norms, each in one copy
        batches.close()


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("digits", {"model": "mlp", "width": 16, "norm": True, "health": True}),
        ("digits", {"model": "cnn", "width": 4, "augment": True, "accumulate": 3}),
        ("text", {"model": "lstm", "width": 8, "context": 16, "dropout": 0.2, "limit": 0.05}),
        ("text", {"width": 8, "depth": 1, "heads": 2, "context": 16, "limit": 0.05,
                  "dropout": 0.1, "autocast": "float16"}),
    ],
    ids=["mlp", "cnn", "lstm", "gpt"],
)  # fmt: skip
def test_a_compiled_run_is_the_same_run(data, options, tmp_path) -> None:
    rows = []
    for compiles in (False, True):
        config = make_config(data, {**options, "epochs": 1, "compile": compiles})
        run = start(config, task_of(config, None), "cpu", tmp_path / str(compiles))
        watch = Silent()
        assert run.train(watch)
        rows.append([{k: v for k, v in row.items() if "second" not in k} for row in watch.rows])
        if compiles:
            assert run._forward.text.startswith("def forward(")
    assert rows[0] == rows[1]
    (arrays, state), (its_arrays, its) = (tensors(tmp_path / x) for x in ("False", "True"))
    assert arrays == its_arrays
    assert state.pop("config") == {**its.pop("config"), "compile": False}
    assert state == its


def test_a_compiled_run_keeps_what_it_computes() -> None:
    with pytest.raises(ConfigError, match="--compile and --recompute"):
        make_config("digits", {"model": "resnet", "compile": True, "recompute": True})


# -- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--optimizer", "sgd", "--lr", "0.05"]])
def test_a_resumed_run_is_the_straight_one(options, tmp_path, capsys) -> None:
    a, b = tmp_path / "straight", tmp_path / "broken"
    base = ["train", "digits", *SMALL, *options, "--device", "cpu"]
    assert main([*base, "--epochs", "4", "--out", str(a)]) == 0
    assert main([*base, "--epochs", "2", "--out", str(b)]) == 0
    assert main(["train", "digits", "--epochs", "4", "--resume", str(b)]) == 0
    assert "going on after epoch 2" in capsys.readouterr().out
    assert tensors(a) == tensors(b)
    assert len((b / METRICS).read_text().splitlines()) == 4


@pytest.mark.parametrize("steps", [1, 7, 22, 23, 30])
def test_a_run_stopped_at_any_step_goes_on_exactly(steps, tmp_path) -> None:
    straight = small(tmp_path / "straight")
    assert straight.train(Silent())
    run = small(tmp_path / "run")
    assert not run.train(Silent(), lambda: run.epoch * 23 + run.step >= steps)
    again = resume(tmp_path / "run", digits(), "cpu", {})
    assert (again.epoch, again.step) == divmod(steps, 23)
    assert again.train(Silent())
    assert tensors(tmp_path / "straight") == tensors(tmp_path / "run")


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("digits", {"model": "cnn", "width": 4, "augment": True, "accumulate": 3}),
        ("text", {"model": "lstm", "width": 8, "context": 16, "dropout": 0.2, "limit": 0.05}),
        ("text", {"width": 8, "depth": 1, "heads": 2, "context": 16, "limit": 0.05,
                  "autocast": "float16", "recompute": True}),
    ],
    ids=["cnn", "lstm", "gpt"],
)  # fmt: skip
def test_every_kind_of_run_goes_on_exactly(data, options, tmp_path) -> None:
    config = make_config(data, {**options, "epochs": 2, "schedule": "cosine", "warmup": 3})
    task = task_of(config, None)
    straight = start(config, task, "cpu", tmp_path / "straight")
    assert straight.train(Silent())
    run = start(config, task, "cpu", tmp_path / "run")
    assert not run.train(Silent(), lambda: run.epoch * run.steps + run.step >= 1.4 * run.steps)
    assert 0 < run.step < run.steps
    again = resume(tmp_path / "run", task, "cpu", {})
    assert again.train(Silent())
    assert tensors(tmp_path / "straight") == tensors(tmp_path / "run")


def test_metrics_of_a_broken_run_are_repaired(tmp_path) -> None:
    run = small(tmp_path, 1)
    run.train(Silent())
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"epoch": 2, "lo')
    resume(tmp_path, digits(), "cpu", {"epochs": 2}).train(Silent())
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]


def test_resume_elsewhere_leaves_the_source_alone(tmp_path) -> None:
    small(tmp_path / "a", 1).train(Silent())
    before = (tmp_path / "a" / CHECKPOINT).read_bytes()
    path = tmp_path / "a" / CHECKPOINT
    run = resume(path, digits(), "cpu", {"epochs": 2, "lr": 0.5, "lr_decay": 0.5}, tmp_path / "b")
    run.train(Silent())
    assert run.optimizer.param_groups[0]["lr"] == 0.25
    assert path.read_bytes() == before
    assert (tmp_path / "b" / CHECKPOINT).exists()


def test_resume_refuses_another_run_and_says_what_differs(tmp_path, capsys) -> None:
    small(tmp_path, 1).train(Silent())
    given = {"width": 32, "activation": "tanh", "epochs": 5, "seed": 0}
    with pytest.raises(ResumeError) as caught:
        resume(tmp_path, digits(), "cpu", given)
    assert caught.value.differences == (
        "--width: 16 in the checkpoint, 32 now",
        "--activation: relu in the checkpoint, tanh now",
    )
    other = tmp_path / "other.npz"
    np.savez(other, x=load("digits").train_x, y=load("digits").train_y)
    code = main(["train", str(other), "--resume", str(tmp_path), "--epochs", "3", "--width", "8"])
    said = capsys.readouterr().err
    assert code == 1
    assert "is of another run" in said
    assert "--width: 16 in the checkpoint, 8 now" in said
    assert "training examples of the data: 1437 in the checkpoint" in said
    assert "sha256 of the data" in said


def test_resume_refuses_what_is_finished_or_foreign(tmp_path) -> None:
    small(tmp_path, 1).train(Silent())
    with pytest.raises(ResumeError, match=r"all its epochs, 1, are done.*--epochs"):
        resume(tmp_path, digits(), "cpu", {})
    with pytest.raises(io.CheckpointNotFoundError):
        resume(tmp_path / "nowhere", digits(), "cpu", {})
    io.save(tmp_path / "foreign.safetensors", *io.pack({"model": {"w": np.zeros(2)}}))
    with pytest.raises(ResumeError, match="not written by gpugrad train"):
        resume(tmp_path / "foreign.safetensors", digits(), "cpu", {})


def test_a_folder_with_a_run_is_not_written_over(tmp_path, capsys) -> None:
    small(tmp_path, 1).train(Silent())
    before = (tmp_path / CHECKPOINT).read_bytes()
    assert main(["train", "digits", "--out", str(tmp_path)]) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_the_data_are_told_by_content(tmp_path) -> None:
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, x=load("digits").train_x, y=load("digits").train_y)
    config = Config("a.npz", width=8, depth=1, epochs=1)
    start(config, Classes(load(tmp_path / "a.npz")), "cpu", tmp_path / "run").train(Silent())
    given = {"data": "b.npz", "epochs": 2}
    run = resume(tmp_path / "run", Classes(load(tmp_path / "b.npz")), "cpu", given)
    assert run.config.data == "b.npz"


# -- what else a run can do --------------------------------------------------------------------


def test_a_run_that_gets_no_better_stops(tmp_path, capsys) -> None:
    out = tmp_path / "run"
    arguments = ["--epochs", "50", "--patience", "2", "--lr", "0.05", "--out", str(out)]
    assert main(["train", "digits", *SMALL, *arguments]) == 0
    assert "stopped: the test loss has not fallen for 2 epochs" in capsys.readouterr().out
    losses = [json.loads(line)["test_loss"] for line in (out / METRICS).read_text().splitlines()]
    assert len(losses) < 50
    assert losses.index(min(losses)) == len(losses) - 3
    assert main(["train", "digits", "--resume", str(out)]) == 1
    assert "has not fallen for 2 epochs; give it more with --patience 12" in (
        capsys.readouterr().err
    )
    best = load_run(out, "cpu")
    assert best.epoch == len(losses) - 2
    assert best.test()[0] == pytest.approx(min(losses))


def test_options_in_a_file(tmp_path, capsys) -> None:
    file = tmp_path / "run.toml"
    file.write_text('data = "digits"\n[train]\nwidth = 8\nbatch-size = 32\nlr = 1\ndepth = 1\n')
    out = tmp_path / "run"
    options = ["--config", str(file), "--epochs", "1", "--lr", "0.01", "--out", str(out)]
    assert main(["train", *options]) == 0
    config = io.unpack(*io.load(out / CHECKPOINT))["config"]
    assert (config["width"], config["batch_size"], config["lr"]) == (8, 32, 0.01)
    capsys.readouterr()
    for text, said in (
        ("width = 'x'", "width is 'x'; it must be of type int"),
        ("breadth = 3", "there is no option breadth; the options are data, model,"),
        ("width = ", "is no TOML"),
        ("width = 0\ndata = 'digits'", "--width is 0; it must be at least 1"),
        ("", "no data; name them, as in: gpugrad train digits"),
    ):
        file.write_text(text)
        assert main(["train", "--config", str(file)]) == 1
        assert said in capsys.readouterr().err
    assert main(["train", "--config", str(tmp_path / "none.toml")]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_logs_for_tensorboard(tmp_path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    out = tmp_path / "run"
    options = [*SMALL, "--epochs", "1", "--tensorboard", "--out", str(out)]
    assert main(["train", "digits", *options]) == 0
    (events,) = (out / "tensorboard").iterdir()
    content = events.read_bytes()
    for name in (b"loss/train", b"loss/test", b"accuracy/test", b"gradient/norm", b"1.weight"):
        assert name in content


def test_evaluating_a_run(tmp_path, capsys) -> None:
    run = small(tmp_path / "run", 2)
    run.train(Silent())
    best = min(run.history, key=lambda row: row["test_loss"])
    assert main(["eval", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert f"loss {best['test_loss']:.4f}, accuracy {best['test_accuracy']:.2%}" in said
    assert main(["eval", str(tmp_path / "run" / CHECKPOINT)]) == 0
    assert f"loss {run.history[-1]['test_loss']:.4f}" in capsys.readouterr().out
    assert main(["eval", str(tmp_path)]) == 1
    assert "no such checkpoint" in capsys.readouterr().err


def test_writing_text(tmp_path, capsys) -> None:
    (tmp_path / "book.txt").write_text("the cat sat on the mat. " * 400)
    out = tmp_path / "run"
    options = ["--model", "gru", "--width", "32", "--context", "12", "--epochs", "6"]
    options += ["--lr", "0.01", "--out", str(out)]
    assert main(["train", str(tmp_path / "book.txt"), *options]) == 0
    capsys.readouterr()
    greedy = ["sample", str(out), "--prompt", "the c", "--length", "19", "--temperature", "0"]
    assert main(greedy) == 0
    assert capsys.readouterr().out == "the cat sat on the mat. \n"
    drawn = ["sample", str(out), "--prompt", "the ", "--length", "30", "--seed", "3"]
    assert main(drawn) == main(drawn) == 0
    first, second, _ = capsys.readouterr().out.split("\n")
    assert first == second
    assert len(first) == 34
    assert main(["sample", str(out), "--prompt", ""]) == 1
    assert "an empty prompt" in capsys.readouterr().err
    assert main(["sample", str(out), "--prompt", "the dog"]) == 1
    said = capsys.readouterr()
    assert not said.out.strip()
    assert "the model knows no 'd'" in said.err
    # The text has no new line to begin with; its first character is the blank.
    assert main(["sample", str(out), "--length", "3"]) == 0
    assert len(capsys.readouterr().out) == 5
    # Another text is read with the run's characters, whichever of them it has.
    (tmp_path / "short.txt").write_text("sat on the mat. " * 100)
    assert main(["eval", str(out), "--data", str(tmp_path / "short.txt")]) == 0
    accuracy = float(capsys.readouterr().out.split("accuracy ")[1].rstrip("%\n"))
    assert accuracy > 80
    (tmp_path / "other.txt").write_text("dog eat dog. " * 100)
    assert main(["eval", str(out), "--data", str(tmp_path / "other.txt")]) == 1
    assert "has no 'd'" in capsys.readouterr().err
    small(tmp_path / "digits", 1).train(Silent())
    assert main(["sample", str(tmp_path / "digits")]) == 1
    assert "mlp tells classes apart, and writes nothing" in capsys.readouterr().err


def test_a_model_for_other_data(tmp_path, capsys) -> None:
    assert main(["train", "digits", "--model", "gpt"]) == 1
    assert "--model is 'gpt', which 'digits' is no data for; choose from mlp" in (
        capsys.readouterr().err
    )
    np.savez(tmp_path / "flat.npz", x=np.random.default_rng(0).random((50, 4)), y=np.arange(50) % 2)
    assert main(["train", str(tmp_path / "flat.npz"), "--model", "cnn"]) == 1
    assert "examples of shape (4,), which are no pictures" in capsys.readouterr().err


# -- interrupts ----------------------------------------------------------------------------------


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path) -> None:
    process = spawn("train", "digits", "--epochs", "100000", "--out", "run", cwd=tmp_path)
    metrics = tmp_path / "run" / METRICS
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline, "no epoch within a minute"
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted at" in err
    assert "gpugrad train digits --resume run" in err
    assert "Traceback" not in err
    state = io.unpack(*io.load(tmp_path / "run" / CHECKPOINT))
    done = state["epoch"]
    assert done >= 2
    code, out, err = command(
        "train", "digits", "--resume", "run", "--epochs", done + 1, cwd=tmp_path
    )
    assert (code, err) == (0, "")
    assert f"epoch {done + 1}/{done + 1}" in out


# -- failures ------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path) -> None:
    resource = pytest.importorskip("resource")  # a limit on file sizes fails as a full disk does
    small(tmp_path / "run", 1).train(Silent())
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    assert len(before) > 4096
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    code, _, err = command(
        "train", "digits", "--resume", "run", "--epochs", 3, cwd=tmp_path, preexec_fn=limit
    )
    assert code == 1
    assert "could not be written" in err
    assert "the previous checkpoint is intact" in err
    assert "Traceback" not in err
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [BEST, CHECKPOINT, METRICS]


def test_nan_in_the_data(tmp_path, capsys) -> None:
    x = np.random.default_rng(0).random((50, 4)).astype(np.float32)
    x[7, 2] = np.nan
    np.savez(tmp_path / "bad.npz", x=x, y=np.arange(50) % 2)
    assert main(["train", str(tmp_path / "bad.npz")]) == 1
    said = capsys.readouterr().err
    assert "1 of 200 values are NaN or infinite" in said
    assert "Traceback" not in said


def test_divergence_is_explained(tmp_path) -> None:
    run = small(tmp_path, 5, optimizer="sgd", lr=1e30, clip=0.0)
    with pytest.raises(
        DivergedError, match=r"the loss became (nan|inf) in epoch 1 at step"
    ) as caught:
        run.train(Silent())
    assert caught.value.epoch == 1
    assert 2 <= caught.value.step <= 10
    assert "--lr" in str(caught.value)
    assert not (tmp_path / CHECKPOINT).exists()
    code, _, err = command(
        "train", "digits", "--optimizer", "sgd", "--lr", "1e30", "--clip", 0, cwd=tmp_path
    )
    assert code == 1
    assert err.startswith("error: training diverged")
    assert "Warning" not in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--width", "0"], "--width"),
        (["--lr", "nan"], "not a finite number"),
        (["--lr", "-1"], "not a finite number"),
        (["--clip", "inf"], "not a finite number"),
        (["--lr-decay", "2"], "from 0 to 1"),
        (["--activation", "swoosh"], "not one of relu"),
        (["--optimizer", "lbfgs"], "not one of sgd"),
        (["--epochs", "many"], "--epochs"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_bad_options(args, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", "digits", *args]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nothing"], "no data set is called"),
        (["digits", "--device", "abacus"], "no backend for device"),
        (["fashion-mnist", "--data-dir", "."], "fashion-mnist: no "),
        (["digits", "--resume", "nowhere"], "no such checkpoint"),
    ],
)
def test_errors_are_one_message(args, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *args]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err
    assert "Traceback" not in err
    with pytest.raises(Exception, match=said):
        main(["train", *args, "--traceback"])


def test_options_in_any_spelling(tmp_path) -> None:
    args = ["--epochs", "1", "--activation", "Leaky-ReLU", "--out", str(tmp_path / "r")]
    assert main(["train", "digits", *SMALL, *args]) == 0
    state = io.unpack(*io.load(tmp_path / "r" / CHECKPOINT))
    assert state["config"]["activation"] == "leaky_relu"


def test_configurations_are_checked() -> None:
    for bad in (
        {"width": 0}, {"depth": -1}, {"epochs": 0}, {"lr": float("nan")}, {"activation": "x"},
        {"optimizer": "x"}, {"dtype": "int8"}, {"label_smoothing": 1.5}, {"seed": -1},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(bad)).replace("_", "-")):
            Config("digits", **bad)
    assert make_config("fashion-mnist", {}).epochs == 10
    assert make_config("digits", {"epochs": 3}).epochs == 3


def test_a_run_that_cannot_have_its_folder(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main(["train", "digits", "--out", str(tmp_path / "file" / "run")]) == 1
    assert "cannot make this folder" in capsys.readouterr().err


def test_the_result_does_not_depend_on_what_ran_before(tmp_path) -> None:
    small(tmp_path / "a", 1).train(Silent())
    Run(Config("digits", seed=9), digits(), "cpu", tmp_path)
    small(tmp_path / "b", 1).train(Silent())
    assert tensors(tmp_path / "a") == tensors(tmp_path / "b")


def test_a_context_longer_than_the_text(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("to be or not to be, that is the question\n" * 20, encoding="utf-8")
    code, _, err = command("train", str(text), "--context", "5000", cwd=tmp_path)
    assert code == 1
    assert "--context 5000 is too long for" in err
    assert "pass --context" in err


def test_gain_and_residual(tmp_path):
    plain, scaled = small(tmp_path / "a"), small(tmp_path / "b", gain=3.0)
    for (name, p), (_, q) in zip(plain.net.named_parameters(), scaled.net.named_parameters()):
        factor = 3.0 if name.endswith("weight") else 1.0
        assert np.array_equal(q.detach().numpy(), factor * p.detach().numpy())
    net = models.MLP(8, 3, width=16, depth=3, residual=True)
    assert [type(m).__name__ for m in net][1:] == [
        "Linear",
        "ReLU",
        "Residual",
        "Residual",
        "Linear",
    ]
    x = gg.tensor(np.random.default_rng(0).standard_normal((5, 8)).astype("float32"))
    h = net[2](net[1](x))
    for block in (net[3], net[4]):
        h = h + gg.relu(block.body[0](h))
    assert np.allclose(net(x).detach().numpy(), net[5](h).detach().numpy(), rtol=1e-5)
