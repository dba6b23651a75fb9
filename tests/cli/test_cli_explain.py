"""`gpugrad explain`: every chapter runs, and what it claims holds in its own run."""

import io
import math

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from rich.console import Console

from gpugrad.cli import main
from gpugrad.cli.explain import CHAPTERS, ChapterError, tell
from gpugrad.cli.explain.book import BookError, plot
from tests.health.test_health_page import Page


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each chapter found, what it printed, and its page; a chapter runs once."""
    known = {}
    folder = tmp_path_factory.mktemp("chapters")

    def get(name):
        if name not in known:
            console = Console(file=io.StringIO(), width=80, highlight=False)
            figures = tell(name, console, folder)
            page = (folder / f"{name}.html").read_text("utf-8")
            known[name] = figures, console.file.getvalue(), page
        return known[name]

    return get


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_is_printed_with_a_picture_and_written(name, told):
    _, text, page = told(name)
    assert text.startswith(CHAPTERS[name].title)
    assert "…" not in text  # no column of a table was cut off
    # The picture is last: a frame on the left, signs, the ends of the axis, and its name.
    lines = text.rstrip().splitlines()
    last = max(i for i, line in enumerate(lines) if " |" in line)
    assert any(sign in "".join(lines[last - 15 :]) for sign in "●○×+")
    found = Page(page)
    assert [tag for tag, _ in found.elements].count("svg") == 1
    assert found.data
    assert "https:" not in page


# -- products -------------------------------------------------------------------------------------


def test_a_hundred_factors_of_1_1(told):
    figures, text, page = told("exploding")
    back = figures["back"]
    assert len(back) == 101
    np.testing.assert_allclose(back, 1.1 ** np.arange(101), rtol=1e-13)
    assert f"{1.1**100:.5f}" == "13780.61234"
    assert text.count("13780.61234") == 4
    assert page.count("13780.61234") == 4
    assert "100 multiplication nodes" in text.replace("\n", " ")


def test_a_hundred_factors_of_0_9(told):
    figures, text, _ = told("vanishing")
    np.testing.assert_allclose(figures["back"], 0.9 ** np.arange(101), rtol=1e-13)
    assert f"{0.9**100:.18f}".startswith("0.000026561398")
    assert text.count("0.000026561398") == 4


@pytest.mark.parametrize("name", ["exploding", "vanishing"])
def test_the_terms_multiply_to_the_gradients(name, told):
    figures, text, _ = told(name)
    assert figures["products"].shape == (6,)
    assert (figures["grads"] != 0).all()
    np.testing.assert_allclose(figures["products"], figures["grads"], rtol=1e-12)
    small = np.abs(figures["grads"]).max() < 0.01
    assert small == (name == "vanishing")
    assert "W1[1, 1]" in text


# -- nets -----------------------------------------------------------------------------------------


def test_exploding_grows_by_the_layer_and_ends_in_nan(told):
    figures, text, _ = told("exploding")
    assert 1.2 < figures["growth"] < 1.6  # 2·√½ = 1.41 for wide layers
    assert figures["signal"][0] / figures["signal"][-2] > 1e3
    assert 0.05 < figures["good"][0] / figures["good"][-2] < 20
    assert not math.isfinite(figures["losses"][-1])
    assert f"×{figures['growth']:.2f}" in text


def test_vanishing_leaves_the_first_layer_where_it_was(told):
    figures, _, _ = told("vanishing")
    assert figures["growth"] < 0.3
    assert figures["norms"][0] / figures["norms"][-1] < 1e-5
    assert figures["moved"][0] < 1e-4 < 0.05 < figures["moved"][-1]
    assert figures["losses"][-1] > 2.2  # ln 10 is 2.30


def test_clipping_saves_the_net_that_explodes(told):
    figures, _, _ = told("clipping")
    free, clipped = figures["losses"]
    assert len(free) < 10
    assert not math.isfinite(free[-1])
    assert len(clipped) == 200
    assert np.median(clipped[-20:]) < clipped[0] / 100
    norms, coefficients = figures["norms"][1], figures["coefficients"]
    assert norms[0] > 1e3
    np.testing.assert_allclose(coefficients, np.minimum(1, 1 / norms), rtol=1e-4)
    assert 0.5 < figures["clipped"] == (coefficients < 1).mean()


def test_relu_passes_the_gradient_and_sigmoid_does_not(told):
    figures, _, _ = told("relu")
    ratios, accuracies = figures["ratios"], figures["accuracies"]
    for depth in (4, 20, 100):
        assert 0.05 < ratios["relu", depth] < 20
        assert ratios["sigmoid", depth] < 0.35**depth
    assert accuracies["relu", 4] > 0.9
    assert accuracies["sigmoid", 4] > 0.5
    assert accuracies["relu", 20] > 0.4
    assert accuracies["sigmoid", 20] < 0.2
    assert accuracies["sigmoid", 100] < 0.2


def test_normalisation_keeps_the_spread(told):
    figures, _, _ = told("normalisation")
    small, large = "weights too small", "weights too large"
    spreads, accuracies = figures["spreads"], figures["accuracies"]
    assert spreads[small, "none"][-1] < 1e-4
    assert figures["ratios"][small, "none"] < 1e-3
    assert figures["ratios"][large, "none"] > 30
    assert figures["saturated"][large, "none"] > 0.1
    for name in ("BatchNorm", "LayerNorm"):
        for title in (small, large):
            spread = spreads[title, name]
            assert 0.5 < spread.min() < spread.max() < 0.8
            assert 1 / 30 < figures["ratios"][title, name] < 30
            assert accuracies[title, name] > accuracies[title, "none"] + 0.2


def test_memory_fails_without_gates(told):
    figures, _, _ = told("rnn")
    right, ratio = figures["accuracies"], figures["ratio"]
    for name in ("RNN", "RNN clipped", "LSTM open", "GRU open"):
        assert right[name, 5] > 0.95
    assert right["RNN", 30] < 0.65
    assert right["RNN", 30] == right["RNN clipped", 30]  # clipping never had anything to do
    assert figures["norms"]["RNN"] < 1
    assert right["LSTM", 30] < 0.65
    assert right["LSTM open", 30] > 0.9
    assert right["GRU open", 30] > 0.9
    assert ratio["RNN"] < 1e-4 < 1e-3 < ratio["RNN orthogonal"]
    assert ratio["LSTM"] < 1e-4 < 0.05 < ratio["LSTM open"]
    assert all(len(norms) == 30 for norms in figures["through"].values())


# -- the command ----------------------------------------------------------------------------------


def test_without_a_chapter_they_are_listed(capsys):
    assert main(["explain"]) == 0
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines() if line[0] != " "] == list(CHAPTERS)


def test_the_command_runs_a_chapter(tmp_path, capsys):
    assert main(["explain", "Clipping", "--out", str(tmp_path / "pages")]) == 0
    told = capsys.readouterr().out
    assert "coefficient" in told
    assert str(tmp_path / "pages" / "clipping.html") in told.replace("\n", "")
    assert (tmp_path / "pages" / "clipping.html").exists()


def test_an_unknown_chapter(capsys):
    assert main(["explain", "gelu"]) == 1
    assert "there is no chapter 'gelu'; there are exploding, vanishing" in capsys.readouterr().err
    with pytest.raises(ChapterError):
        tell("gelu", Console(file=io.StringIO()))


def test_a_page_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BookError, match="could not be written"):
        tell("clipping", Console(file=io.StringIO()), tmp_path / "file")


def test_a_plot_leaves_out_what_has_no_place():
    lines = {"a": (np.arange(4), np.array([1.0, np.nan, 0.0, 100.0]))}
    text = str(plot("t", lines, "x", log=True, width=40, height=5))
    assert text.count("●") == 3  # two points, and the legend
    assert str(plot("t", {"a": (np.arange(0), np.zeros(0))}, height=3)).count("|") == 3
