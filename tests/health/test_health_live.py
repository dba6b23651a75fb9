"""The view in the terminal."""

import io
import sys

import numpy as np
import pytest

from gpugrad.health import Record
from gpugrad.health.live import BARS, LiveError, LiveView, sparkline, view
from tests.health.synthetic import make

rich_console = pytest.importorskip("rich.console")


def shown(table, width=100):
    console = rich_console.Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("values", "options", "bars"),
    [
        ([1, 10, 100, 1000], {}, "▁▃▆█"),
        ([0, 7], {"log": False}, "▁█"),
        ([0, 1, 100], {}, "▁▁█"),
        ([5, 5], {}, "▅▅"),
        ([1, float("nan"), float("inf"), 2], {}, "▁××█"),
        ([], {}, ""),
        ([float("nan")], {}, "×"),
        ([10, 10], {"low": 1, "high": 100}, "▅▅"),
        (range(1, 1001), {"width": 3, "log": False}, "▁▅█"),
    ],
)
def test_sparkline(values, options, bars):
    assert sparkline(list(values), **options) == bars


def test_a_net_that_vanishes_shows_a_staircase():
    record = make(rows=40, depth=10, growth=0.4)
    text = shown(view(record))
    assert text.startswith("vanishing: ")
    assert f"step {record.steps[-1]}, loss" in text
    rows = [line for line in text.splitlines() if "Linear" in line]
    assert len(rows) == 10
    heights = [BARS.index(max(set(row) & set(BARS), key=BARS.index)) for row in rows]
    assert heights == sorted(heights)
    assert heights[0] <= 1
    assert heights[-1] == 7


def test_many_layers_are_left_out_but_for_both_ends():
    text = shown(view(make(rows=4, depth=60), rows=7))
    rows = [line.split()[0] for line in text.splitlines() if "Linear" in line]
    assert len(rows) == 7
    assert rows[0] == "0"
    assert rows[-1] == "118"


def test_what_is_not_finite_is_marked():
    record = make(rows=10, every=1)
    record.values["gradient_nonfinite"][9, 2] = 3
    text = shown(view(record, headline=False))
    rows = [line for line in text.splitlines() if "Linear" in line]
    assert "×" in rows[1]
    assert "NaN" in rows[1]
    assert "×" not in rows[0]
    assert "NaN" not in rows[0]


def test_nothing_recorded_yet():
    assert "nothing recorded yet" in shown(view(Record(["0"], ["Linear"])))


def test_live_view_draws_what_comes():
    console = rich_console.Console(file=io.StringIO(), force_terminal=True, width=80, height=30)
    record = Record(["first"], ["Linear"])
    with LiveView(record, console) as live:
        for step in (1, 2):
            record.append(step, {"gradient_norm": [np.float32(step)]}, {"loss": 2.5})
            live.update()
    text = console.file.getvalue()
    assert "nothing recorded yet" in text
    assert "first Linear" in text
    assert "step 2, loss 2.5" in text


def test_without_rich_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(LiveError, match=r"pip install 'gpugrad\[cli\]'"):
        view(make(rows=2))
