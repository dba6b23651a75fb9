"""Whole trainings reach the accuracy that they are there for."""

import pytest

from gpugrad.cli.config import make_config
from gpugrad.cli.tasks import Classes
from gpugrad.cli.training import start
from gpugrad.data import DataNotFoundError, load


class Silent:
    def reading(self, reading):
        pass

    def epoch(self, row):
        pass


@pytest.mark.parametrize("seed", [0, 1])
def test_digits(seed, tmp_path) -> None:
    run = start(make_config("digits", {"seed": seed}), Classes(load("digits")), "cpu", tmp_path)
    assert run.train(Silent())
    assert run.history[-1]["test_accuracy"] >= 0.97
    assert run.history[0]["grad_norm"] > run.history[-1]["grad_norm"] > 0
    # A second on an idle core; the rest is for cores that are not. The first epoch may compile.
    assert sum(row["seconds"] for row in run.history[1:]) < 10


def test_fashion_mnist(tmp_path) -> None:
    try:
        data = load("fashion-mnist")
    except DataNotFoundError as error:
        pytest.skip(str(error))
    config = make_config("fashion-mnist", {"epochs": 2, "batch_size": 256, "width": 128})
    run = start(config, Classes(data), "cpu", tmp_path)
    assert run.train(Silent())
    assert run.history[-1]["test_accuracy"] >= 0.84
