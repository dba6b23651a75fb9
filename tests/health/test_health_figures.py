"""matplotlib's pictures of a record show what is in it."""

import sys

import numpy as np
import pytest

from gpugrad.health import HealthError, Record, figures
from gpugrad.health.figures import FigureError
from tests.health.synthetic import make


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FigureError, match=r"pip install 'gpugrad\[plots\]'"):
        figures.heat_map(make(rows=3))


class TestDrawn:
    @pytest.fixture(autouse=True)
    def _needs_matplotlib(self):
        pytest.importorskip("matplotlib")

    def test_heat_map(self):
        record = make(rows=20, every=1)
        record.values["gradient_norm"][7, 2] = np.inf
        figure = figures.heat_map(record)
        image, red = figure.axes[0].images
        shown = np.array(image.get_array())
        expected = record.values["gradient_norm"][:, ::2].T
        known = np.isfinite(expected)
        np.testing.assert_array_equal(shown[known], expected[known])
        np.testing.assert_array_equal(np.argwhere(~np.ma.getmaskarray(red.get_array())), [[1, 7]])
        labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
        assert labels == ["0", "2", "4", "6"]
        assert type(image.norm).__name__ == "LogNorm"
        assert image.norm.vmin == expected[known].min()

    def test_heat_map_of_shares(self):
        (image,) = figures.heat_map(make(rows=5), "saturated").axes[0].images
        assert (image.norm.vmin, image.norm.vmax) == (0, 1)

    def test_lines(self):
        record = make(rows=30)
        (line,) = figures.loss(record).axes[0].lines
        np.testing.assert_array_equal(line.get_ydata(), record.scalars["loss"])
        upper, lower = figures.clipping(record).axes
        np.testing.assert_array_equal(upper.lines[0].get_ydata(), record.scalars["norm"])
        np.testing.assert_array_equal(lower.lines[0].get_ydata(), record.scalars["coefficient"])
        *layers, guide = figures.update_ratios(record).axes[0].lines
        assert len(layers) == 4
        assert set(guide.get_ydata()) == {1e-3}
        first, last = figures.signal(record).axes[0].lines
        np.testing.assert_array_equal(first.get_ydata(), record.values["signal"][0])
        np.testing.assert_array_equal(last.get_ydata(), record.values["signal"][-1])

    def test_ranges(self, tmp_path):
        record = make(rows=30)
        figure = figures.ranges(record)
        assert len(figure.axes) == 8
        figure = figures.ranges(record, "parameter", ["4", "0"])
        assert [a.get_title() for a in figure.axes] == ["4 Linear", "0 Linear"]
        corners = figure.axes[0].collections[0].get_datalim(figure.axes[0].transData)
        values = record.values
        assert corners.y0 == pytest.approx(values["parameter_min"][:, 4].min())
        assert corners.y1 == pytest.approx(values["parameter_max"][:, 4].max())
        figure.savefig(tmp_path / "a.svg")
        assert (tmp_path / "a.svg").read_text("utf-8").startswith("<?xml")

    @pytest.mark.parametrize(
        ("draw", "told"),
        [
            (lambda r: figures.heat_map(r, "gradients"), "'gradients' is no statistic"),
            (lambda r: figures.heat_map(r, "dead"), "the record has no dead"),
            (lambda r: figures.ranges(r, "weight"), "it is 'activation' or 'parameter'"),
            (lambda r: figures.ranges(r, layers=["0", "x"]), "no layer x"),
            (lambda r: figures.loss(Record(["0"])), "the record has no loss"),
        ],
    )
    def test_what_cannot_be_drawn(self, draw, told):
        with pytest.raises(HealthError, match=told):
            draw(make(rows=3))
