"""Results read again: formats, ratios, rooflines, crossovers, comparisons, the page."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from gpugrad.bench import common, family, page, plots, summary
from gpugrad.bench.runner import FORMAT, VERSION
from gpugrad.errors import ParameterError
from tests.bench.reports import add, measured, report

# -- formats --------------------------------------------------------------------------------------


def stored(tmp_path, **changes):
    path = tmp_path / "bench.json"
    common.write_json(path, measured({"numba": [1.0, 2.0]}) | changes)
    return path


def test_what_is_written_is_read(tmp_path):
    found = summary.load(stored(tmp_path))
    assert found["workloads"]["first"]["sizes"]["one"]["seconds"] == {"numba": [1.0, 2.0]}


def test_an_older_format_says_what_to_do(tmp_path):
    with pytest.raises(ParameterError, match=rf"has format 0, and this gpugrad reads {VERSION}; "
                       r"measure again, or read it with the gpugrad that wrote it \("):  # fmt: skip
        summary.load(stored(tmp_path, version=0))


def test_a_newer_format_says_what_to_do(tmp_path):
    with pytest.raises(ParameterError, match=r"has format 99.*pip install --upgrade gpugrad"):
        summary.load(stored(tmp_path, version=99))


def test_a_foreign_file_is_told(tmp_path):
    with pytest.raises(ParameterError, match="is no result of `gpugrad bench`; measure again"):
        summary.load(stored(tmp_path, format=None))
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ParameterError, match="is no result"):
        summary.load(tmp_path / "list.json")


def test_a_damaged_file_is_told(tmp_path):
    path = stored(tmp_path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ParameterError, match="is not JSON"):
        summary.load(path)
    path.write_text(json.dumps({"format": FORMAT, "version": VERSION, "versions": {}}))
    with pytest.raises(ParameterError, match="is damaged: ceilings, contenders"):
        summary.load(path)
    with pytest.raises(ParameterError, match="cannot be read: No such file"):
        summary.load(tmp_path / "nowhere.json")


# -- lines ----------------------------------------------------------------------------------------


def by_key(found, name="first", size="one"):
    return {line.contender: line for line in summary.lines(found, name, size)}


def test_ratios_are_taken_round_by_round_over_gpugrad_with_kernels():
    # The machine turns twice as slow in mid-run.
    found = by_key(measured({"numpy": [3, 6], "numba": [1, 2], "torch": [5, 10]}))
    assert {key: line.ratio for key, line in found.items()} == {"numpy": 3, "numba": 1, "torch": 5}
    assert by_key(measured({"numpy": [2.0], "torch": [4.0]}))["torch"].ratio == 2
    assert by_key(measured({"torch": [4.0]}))["torch"].ratio is None


def test_the_share_of_the_roofline():
    # 4000 bytes at 1 GB/s take 4 µs; 5000 operations at 10 GFLOP/s less.
    found = by_key(measured({"numba": [8e-6], "torch": [8e-6]}))
    assert found["numba"].share == pytest.approx(0.5)
    assert found["torch"].share is None
    assert summary.attainable({"bytes": 1, "flops": 100}, {"bandwidth": 1, "flops": 10}) == 10
    assert summary.attainable({"flops": 100}, {"bandwidth": 1, "flops": 10}) is None
    assert summary.attainable({"bytes": 1}, {}) is None


def test_quartiles():
    assert summary.quartiles([1, 2, 3, 4, 5]) == (2, 4)
    assert summary.quartiles([7]) == (7, 7)


def both_devices():
    """The GPU loses in the small size and wins in the large one."""
    seconds = {"numba": [1e-6], "cuda": [4e-6], "cupy": [5e-6]}
    found = measured(seconds, host={"cuda": [3e-6]})
    add(found, {"numba": [8e-6], "cuda": [4e-6], "cupy": [9e-6]}, size="two")
    return found


def test_the_crossover_lies_between_two_sizes():
    # log2 of the ratio falls from 2 to -1 while bytes double: two thirds of the way.
    assert summary.crossover(both_devices(), "first") == pytest.approx(4000 * 2 ** (2 / 3))
    assert summary.crossover(measured({"numba": [1.0]}), "first") is None
    always = measured({"numba": [2.0], "cuda": [1.0]})
    add(always, {"numba": [2.0], "cuda": [1.0]}, size="two")
    assert summary.crossover(always, "first") is None


def test_means_are_geometric():
    found = measured({"numba": [1.0], "torch": [2.0]})
    add(found, {"numba": [1.0], "torch": [8.0]}, "second", "three")
    ((label, mean, count),) = summary.means(found, "cpu")
    assert (label, count) == ("PyTorch", 2)
    assert mean == pytest.approx(4)


@pytest.mark.parametrize(
    ("seconds", "told"), [(2.0, "2 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 µs"), (1e-8, "10 ns")]
)
def test_seconds_in_the_unit_that_fits(seconds, told):
    assert summary.seconds_text(seconds) == told


def test_where_a_result_comes_from():
    found = measured({"numba": [1.0]}) | {"driver": "999.1"}
    found["devices"]["cpu"]["name"] = "an abacus"
    for word in (found["date"], found["commit"], "an abacus", "driver 999.1", "numpy "):
        assert word in summary.where(found)


# -- two results ----------------------------------------------------------------------------------


def changes(before, after):
    return {c.contender: c for c in summary.compare(measured(before), measured(after))}


def test_a_change_within_the_quartiles_is_noise():
    steady, wild = [1.0, 1.01, 0.99, 1.0], [0.5, 1.0, 2.0, 1.0]
    found = changes({"numba": steady, "torch": wild}, {"numba": [1.2] * 4, "torch": [1.2] * 4})
    assert found["NumPy + Numba"].verdict == "slower"
    assert found["PyTorch"].verdict == "same"
    assert changes({"numba": steady}, {"numba": [0.8] * 4})["NumPy + Numba"].verdict == "faster"
    same = changes({"numba": steady}, {"numba": steady})["NumPy + Numba"]
    assert same.ratio == 1
    assert same.band[0] < 1 < same.band[1]


def test_only_what_both_have_is_compared():
    assert summary.compare(measured({"numba": [1.0]}), measured({"torch": [1.0]})) == []
    other = measured({"numba": [1.0]}, "second", "three")
    assert summary.compare(measured({"numba": [1.0]}), other) == []


def test_what_the_machine_changed_is_seen_at_the_peers():
    found = summary.compare(measured({"numba": [1.0], "torch": [1.0], "jax": [1.0]}),
                            measured({"numba": [9.0], "torch": [1.5], "jax": [1.5]}))  # fmt: skip
    assert summary.drift(found) == pytest.approx(1.5)
    assert summary.drift([c for c in found if c.own]) is None


# -- verdicts -------------------------------------------------------------------------------------


def test_a_promise_is_judged_by_the_best_peer():
    (held,) = family.verdicts(measured({"numba": [1.0], "torch": [3.0], "jax": [2.5]}))
    assert (held["verdict"], held["value"], held["what"]) == (
        "holds", 2.5, "first, one, over jax.jit")  # fmt: skip
    (short,) = family.verdicts(measured({"numba": [1.0], "torch": [1.5]}))
    assert short["verdict"] == "falls short"
    (alone,) = family.verdicts(measured({"numba": [1.0]}))
    assert alone["verdict"] == "not run: no peer is installed"
    held = measured({"numba": [1.0], "torch": [3.0]}, memory={"numba": 1, "torch": 4})
    held["workloads"]["first"]["memory"] = 0.5
    assert [v["value"] for v in family.verdicts(held)] == [3, 0.25]
    failed = family.verdicts(measured({"numba": [1.0]}, problems={"torch": "out of memory"}))
    assert failed[-1]["verdict"] == "not run: out of memory"


# -- the page -------------------------------------------------------------------------------------


def parsed(found):
    """The page, which is also well-formed XML."""
    text = page.page(found)
    assert text.startswith("<!DOCTYPE html>")
    return text, ElementTree.fromstring(text.partition("\n")[2])


def test_the_page_stands_alone():
    text, tree = parsed(both_devices())
    for element in tree.iter():
        assert not {"src", "href", "srcset"} & set(element.attrib)
        assert element.tag.rpartition("}")[2] not in ("script", "link", "iframe", "img")
    assert "url(" not in text
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}


def test_the_page_suits_phones_and_dark_rooms():
    text, tree = parsed(both_devices())
    assert "prefers-color-scheme: dark" in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1"/>' in text
    pictures = [e for e in tree.iter() if e.tag.endswith("}svg")]
    assert len(pictures) >= 4
    assert all("viewBox" in e.attrib and "width" not in e.attrib for e in pictures)
    tables = [e for e in tree.iter("div") if e.get("class") == "wide"]
    assert tables


def test_the_page_shows_both_devices():
    text, tree = parsed(both_devices())
    for word in ("Roofline of cpu", "Roofline of cuda:0", "GPU quicker from", "copy: 1 GB/s",
                 "queued by the host in", "2.25 ×", "first: time against size"):  # fmt: skip
        assert word in text, word
    for svg in (e for e in tree.iter() if e.tag.endswith("}svg")):
        wide, high = map(float, svg.get("viewBox").split()[2:])
        for e in svg.iter():
            for key, most in (("cx", wide), ("x1", wide), ("cy", high), ("y1", high)):
                assert 0 <= float(e.get(key, 0)) <= most


def test_the_page_says_what_is_missing():
    found = report("numba", "torch", jax="it is <gone> & lost")
    add(found, {"numba": [1.0]}, "second", "three", {"torch": "out of memory"})
    text, tree = parsed(found)
    told = " ".join(tree.itertext())
    assert "it is <gone> & lost" in told
    assert "out of memory" in told
    assert "nothing <again>" not in text  # names are escaped
    assert "The run was interrupted" in told
    assert "Nobody to compare with" in told


def test_a_page_of_nothing():
    found = report("torch")
    _, tree = parsed(found)
    assert "No ceilings were measured" in " ".join(tree.itertext())


def test_the_drawings_of_one_size():
    found = measured({"numba": [1.0], "torch": [2.0]})
    assert plots.sizes(found, "first") is None
    assert plots.speed_ups(found, "first", "one", "cuda:0") is None
    assert "PyTorch: 2 s" in str(plots.speed_ups(found, "first", "one", "cpu"))


def test_axes_are_logarithmic():
    axis = plots.Axis(1, 100, 0, 200)
    assert (axis(1), axis(10), axis(100)) == (0, 100, 200)
    assert axis.ticks() == [1, 10, 100]
    assert [plots.power(v) for v in (1e-3, 5, 2e3, 1e6, 1e9, 1e12)] == [
        "0.001", "5", "2 k", "1 M", "1 G", "1 T",
    ]  # fmt: skip
