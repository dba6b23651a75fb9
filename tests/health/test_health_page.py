"""The report: what stands on the page, that the numbers are right, and that a browser shows it."""

import base64
import json
import re
import shutil
import struct
import subprocess
import zlib
from html import unescape
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.health import Finding, HealthError, Record, RecordError, Verdict, report
from gpugrad.health.page import HEADLINES, SECTIONS
from gpugrad.health.page_charts import FIRST_CODE, LAST_CODE, Axis, Line, chart, number
from gpugrad.health.page_thin import Columns, extremes
from tests.health.synthetic import make

VOID = {"meta", "img", "br", "circle", "path"}


class Page(HTMLParser):
    """Reads a page, and fails on elements that are not closed in their order."""

    def __init__(self, text):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[Any] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script" and data.lstrip().startswith("{"):
            self.data.append(json.loads(data))
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def ids(self):
        return [attrs["id"] for _, attrs in self.elements if "id" in attrs]


def page_of(record, folder, **options):
    return Page(report(record, folder / "page.html", **options).read_text(encoding="utf-8"))


def section(text, name):
    return text[text.index(f'<section id="{name}">') :].split("</section>")[0]


def data_of(text):
    found = re.findall(r'<script type="application/json">(.*?)</script>', text)
    return [json.loads(x) for x in found]


def first(pattern, text):
    """The first group of what matches first."""
    found = re.search(pattern, text)
    assert found, pattern
    return found[1]


def cells(data):
    """The values of a heat map, [layers, columns]; NaN for special cells."""
    code = np.frombuffer(base64.b64decode(data["codes"]), "<u2").astype(float)
    low, high = data["axis"]
    place = low + (code - FIRST_CODE) / (LAST_CODE - FIRST_CODE) * (high - low)
    value = np.where(code >= FIRST_CODE, 10**place if data["log"] else place, np.nan)
    return value.reshape(data["rows"], data["columns"]), code.reshape(data["rows"], -1)


# -- what stands on it ----------------------------------------------------------------------------


def test_every_section_is_there_and_nothing_is_fetched(tmp_path):
    path = report(make(), tmp_path / "page.html", title="four layers")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert [i for i in page.ids() if i in SECTIONS] == list(SECTIONS)
    assert "Not recorded." not in text
    assert "Gradient health of four layers" in page.texts["title"]
    for tag, attrs in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "action", "data", "srcset", "xlink:href", "style"):
            value = attrs.get(name) or ""
            assert value.startswith("data:") or not re.search(r"//|url\(", value), (tag, value)
    style = "".join(page.texts["style"])
    assert "url(" not in style
    assert "@import" not in style
    for word in ("prefers-color-scheme: dark", "@media print", "max-width: 40rem"):
        assert word in style
    script = "".join(page.texts["script"])
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|https?:", script)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [
        attrs for tag, attrs in page.elements if tag == "meta"
    ]


@pytest.mark.parametrize("kind", HEADLINES)
def test_the_verdict_stands_on_top_in_words_and_with_an_icon(kind, tmp_path):
    finding = Finding(kind, "3", 41, 1.1, 0.9, "what was seen", ("clip", "residual"))
    text = report(make(), tmp_path / "a.html", verdict=Verdict((finding,))).read_text("utf-8")
    headline, tone = HEADLINES[kind]
    box = text[text.index('id="verdict"') - 30 :].split("</div>")[0]
    assert f'class="verdict {tone}"' in box
    assert f"<span>{headline}</span>" in box
    assert "<svg" in box
    assert "what was seen" in box
    assert "layer 3, from step 41, 90 % sure" in box
    for name in ("clip", "residual"):
        assert gg.health.REMEDIES[name].text() in unescape(box)
    assert text.index('id="verdict"') < text.index('<section id="loss"')
    assert (f'<td class="said">{kind}</td>' in text) == (kind != "healthy")


def test_the_verdict_is_that_of_the_record(tmp_path):
    text = report(make(depth=20, growth=0.5), tmp_path / "a.html").read_text("utf-8")
    assert HEADLINES["vanishing"][0] in text
    assert HEADLINES["healthy"][0] in report(make(), tmp_path / "b.html").read_text("utf-8")


def test_names_cannot_break_the_page(tmp_path):
    record = Record(["</script><b>&", 'a"b', "<!--"], ["Linear", "<i>", "x"])
    values = {"gradient_norm": [1, 2, 3], "signal": [1, 2, 3],
              "activation_min": [0, 0, 0], "activation_max": [1, 1, 1]}  # fmt: skip
    record.append(1, values, {"loss": 1.0})
    page = page_of(record, tmp_path, title="<h1>&")
    assert "b" not in {tag for tag, _ in page.elements}
    assert any("</script><b>& Linear" in d["names"] for d in page.data if d["names"])


# -- that the numbers are right -------------------------------------------------------------------


def test_few_steps_are_drawn_as_they_are(tmp_path):
    record = make(rows=50)
    text = report(record, tmp_path / "a.html").read_text("utf-8")
    (loss,) = data_of(section(text, "loss"))
    (line,) = loss["series"]
    assert line["x"] == record.steps.tolist()
    np.testing.assert_allclose(line["y"], record.scalars["loss"], rtol=1e-3)
    norm, coefficient = (d["series"][0]["y"] for d in data_of(section(text, "clipping")))
    np.testing.assert_allclose(norm, record.scalars["norm"], rtol=1e-3)
    np.testing.assert_allclose(coefficient, record.scalars["coefficient"], rtol=1e-3)


def test_heat_map_holds_the_gradient_norms(tmp_path):
    record = make(rows=40, every=1, growth=1.3)
    values = record.values
    values["gradient_norm"][10:12, 2] = np.inf
    values["gradient_norm"][20:, 4] = np.nan
    values["gradient_nonfinite"][20, 4] = 7
    values["gradient_norm"][5, 0] = 0
    text = report(record, tmp_path / "a.html").read_text("utf-8")
    (data,) = data_of(section(text, "gradients"))
    assert data["names"] == ["0 Linear", "2 Linear", "4 Linear", "6 Linear"]
    assert (data["rows"], data["columns"], data["steps"]) == (4, 40, [1, 40])
    shown, code = cells(data)
    expected = values["gradient_norm"][:, ::2].T.astype(float)
    known = np.isfinite(expected) & (expected > 0)
    np.testing.assert_allclose(shown[known], expected[known], rtol=1e-3)
    assert np.isnan(shown[~known]).all()
    assert (code[1, 10:12] == 1).all()  # infinite
    assert code[2, 20] == 1  # counted as not finite
    assert (code[2, 21:] == 0).all()  # not known
    assert code[0, 5] == 2  # exactly 0
    assert "NaN or infinite" in section(text, "gradients")
    assert section(text, "layers").count("→ not finite") == 1  # the last one known, of layer 4
    values["gradient_nonfinite"][39, 6] = 1
    text = report(record, tmp_path / "a.html").read_text("utf-8")
    assert section(text, "layers").count("→ not finite") == 2


def test_heat_map_picture_is_the_same_as_its_data(tmp_path):
    record = make(rows=30, every=1, growth=1.3)
    text = report(record, tmp_path / "a.html").read_text("utf-8")
    part = section(text, "gradients")
    png = base64.b64decode(first(r"base64,([^\"]+)\"", part))
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    parts, at = {}, 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(
            kind + body
        )
        parts[kind] = body
        at += 12 + length
    columns, rows, depth, colour = struct.unpack(">IIBB", parts[b"IHDR"][:10])
    assert (columns, rows, depth, colour) == (30, 4, 8, 3)
    pixels = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(rows, columns + 1)
    assert (pixels[:, 0] == 0).all()
    _, code = cells(data_of(part)[0])
    order = np.argsort(code.ravel())
    assert (np.diff(pixels[:, 1:].ravel()[order].astype(int)) >= 0).all()
    assert len(parts[b"PLTE"]) // 3 == len(parts[b"tRNS"]) > pixels.max()


def test_ranges_and_table_hold_the_values(tmp_path):
    record = make(rows=30, every=1)
    text = report(record, tmp_path / "a.html").read_text("utf-8")
    charts = data_of(section(text, "values"))
    assert len(charts) == 8
    band = charts[3]["series"][0]
    np.testing.assert_allclose(band["low"], record.values["activation_min"][:, 3], rtol=1e-3)
    np.testing.assert_allclose(band["high"], record.values["activation_max"][:, 3], rtol=1e-3)
    inner = charts[3]["series"][1]
    mean, std = (record.values[f"activation_{s}"][:, 3] for s in ("mean", "std"))
    np.testing.assert_allclose(inner["high"], mean + std, rtol=1e-3)
    np.testing.assert_allclose(inner["low"], mean - std, rtol=1e-3)
    charts = data_of(section(text, "parameters"))
    assert len(charts) == 4
    np.testing.assert_allclose(
        charts[1]["series"][0]["low"], record.values["parameter_min"][:, 2], rtol=1e-3
    )
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", section(text, "layers"))
    assert len(rows) == 8
    row = re.findall(r"<td[^>]*>(.*?)</td>", rows[2])
    median = float(np.median(record.values["gradient_norm"][:, 2]))
    assert (row[0], row[2]) == ("Linear", number(median))


def test_growth_per_layer_is_told(tmp_path):
    record = make(rows=5, depth=10, growth=1.0)
    # Exactly ×1.21 from one Linear to the one before it.
    record.values["signal"][:] = 1e-3 * 1.1 ** np.arange(20, 0, -1.0)
    text = report(record, tmp_path / "a.html").read_text("utf-8")
    assert "×1.21&nbsp;a&nbsp;layer" in section(text, "signal")
    assert f"×{number(1.21**9)} in all" in section(text, "signal")


# -- thinning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 12345])
def test_extremes_keep_first_last_least_and_greatest(n):
    values = np.random.default_rng(n).normal(size=n)
    values[n // 3] = 50
    values[n // 2] = -50 if n > 2 else values[n // 2]
    kept = extremes(values, 20)
    assert (np.diff(kept) > 0).all()
    assert {0, n - 1, int(values.argmax()), int(values.argmin())} <= set(kept.tolist())
    assert len(kept) <= max(80, min(n, 80) + 2)


def test_columns_against_a_loop():
    rng = np.random.default_rng(0)
    steps = np.unique(rng.integers(1, 5000, 300))
    values = rng.normal(size=(len(steps), 3))
    values[rng.random(values.shape) < 0.2] = np.nan
    columns = Columns.of(steps, 60)
    assert len(columns) == 60
    assert (columns.first, columns.last) == (steps[0], steps[-1])
    with np.errstate(all="ignore"):
        found = [columns.greatest(values), columns.least(values), columns.mean(values)]
    before: Any = None
    for k in range(60):
        inside = (steps >= columns.edges[k]) & (steps < columns.edges[k + 1])
        if inside.any():
            before = values[inside]
        for j in range(3):
            known = before[:, j][~np.isnan(before[:, j])]
            wanted = [known.max(), known.min(), known.mean()] if known.size else [np.nan] * 3
            np.testing.assert_allclose([f[k, j] for f in found], wanted, rtol=1e-12)


def test_a_spike_of_one_step_among_many_is_seen_and_the_file_is_small(tmp_path):
    record = make(rows=20_000, depth=10, every=1)
    record.scalars["loss"][13_579] = 77
    record.values["gradient_norm"][13_579, 6] = 5e4
    path = report(record, tmp_path / "a.html")
    text = path.read_text("utf-8")
    (line,) = data_of(section(text, "loss"))[0]["series"]
    assert (13_580, 77) in list(zip(line["x"], line["y"]))
    assert len(line["x"]) < 2000
    shown, _ = cells(data_of(section(text, "gradients"))[0])
    assert shown[3].max() == pytest.approx(5e4, rel=1e-3)
    assert path.stat().st_size < 1_000_000


def test_many_layers(tmp_path):
    record = make(rows=200, depth=100, growth=1.01)
    record.values["signal"][:] = 1.0
    finding = Finding("dead", "77", 5, text="dead")
    path = report(record, tmp_path / "a.html", verdict=Verdict((finding,)))
    text = path.read_text("utf-8")
    Page(text)
    shown, hidden = section(text, "values").split("<details>")
    assert len(data_of(shown)) == 12
    assert len(data_of(hidden)) == 188
    assert "<h3>77 <small>" in shown
    assert path.stat().st_size < 2_000_000


# -- bad input ------------------------------------------------------------------------------------


def test_a_run_that_was_killed(tmp_path):
    record = Record(["0", "1"], ["Linear", "Tanh"])
    run = tmp_path / "run-7"
    run.mkdir()
    with record.writer(run / "health.jsonl"):
        for step in range(1, 21):
            record.append(step, {"gradient_norm": [1 / step, np.nan]}, {"loss": 3.0 - step / 10})
    whole = (run / "health.jsonl").read_bytes()
    (run / "health.jsonl").write_bytes(whole[:-25])
    text = report(run, tmp_path / "a.html").read_text("utf-8")
    assert "Gradient health of run-7" in text
    assert data_of(section(text, "loss"))[0]["series"][0]["x"] == list(range(1, 20))
    page = page_of(run / "health.jsonl", tmp_path)
    assert "19 recorded steps, from 1 to 19; 2 layers" in "".join(page.texts["p"])


def test_what_is_not_recorded_is_said(tmp_path):
    record = Record(["only"], ["Tanh"])
    record.append(1, {"activation_std": [0.5]}, {})
    text = report(record, tmp_path / "a.html").read_text("utf-8")
    Page(text)
    for name in SECTIONS:
        assert ("Not recorded." in section(text, name)) == (name != "layers"), name


@pytest.mark.parametrize("layers", [[], ["0"]])
def test_no_row(layers, tmp_path):
    text = report(Record(layers), tmp_path / "a.html").read_text("utf-8")
    Page(text)
    assert "No step was recorded." in text


def test_a_single_row(tmp_path):
    text = report(make(rows=1), tmp_path / "a.html").read_text("utf-8")
    Page(text)
    assert 'class="line dots' in section(text, "loss")


def test_nan_from_the_first_step(tmp_path):
    record = Record(["0"], ["Linear"])
    for step in (1, 2):
        values = {"gradient_norm": [np.nan], "gradient_nonfinite": [9],
                  "activation_min": [np.nan], "activation_nonfinite": [4]}  # fmt: skip
        record.append(step, values, {"loss": np.nan, "norm": np.nan})
    text = report(record, tmp_path / "a.html").read_text("utf-8")
    Page(text)
    assert HEADLINES["non-finite"][0] in text
    _, code = cells(data_of(section(text, "gradients"))[0])
    assert (code == 1).all()


def test_a_loss_that_ends_is_told(tmp_path):
    record = make(rows=20, every=1)
    record.scalars["loss"][15:] = np.nan
    text = report(record, tmp_path / "a.html").read_text("utf-8")
    assert "After step 15 the loss is no finite number." in text


def test_no_file_and_no_place(tmp_path):
    with pytest.raises(RecordError, match=r"health\.jsonl: there is no such file; train with"):
        report(tmp_path)
    with pytest.raises(HealthError, match="could not be written"):
        report(make(rows=2), tmp_path / "none" / "a.html")


# -- axes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "labels"),
    [
        (Axis(0, 10), ["0", "2", "4", "6", "8", "10"]),
        (Axis(-0.02, 0.031), ["-0.02", "0", "0.02"]),
        (Axis(-7.2, 1.1, log=True), ["10⁻⁶", "10⁻⁴", "0.01", "1"]),
        (Axis(0.1, 0.5, log=True), ["1.5", "2", "2.5", "3"]),
        (Axis(12000, 12004), ["12000", "12001", "12002", "12003", "12004"]),
    ],
)
def test_ticks(axis, labels):
    ticks = axis.ticks()
    shown = [text for _, text in ticks]
    assert shown == labels
    assert all(-1e-9 <= place <= 1 + 1e-9 for place, _ in ticks)


def test_ticks_stand_where_their_values_are():
    axis = Axis(-3.5, 4.2, log=True)
    for place, text in axis.ticks():
        value = float(text) if text[0] != "1" or "⁴" not in text else 1e4
        assert float(axis.place(np.array([value]))[0]) == pytest.approx(place)


def test_lines_have_gaps_where_nothing_is_known():
    x = np.arange(6)
    drawn = chart([Line("a", x, np.array([1, 2, np.nan, 3, np.inf, 4.0]))], label="a")
    assert first(r'<path class="line c1" d="([^"]+)"', drawn).count("M") == 3


# -- in a browser ---------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "chrome"))), "")  # fmt: skip
needs_browser = pytest.mark.skipif(not BROWSER, reason="there is no Chromium to show a page")

#: Moves over every drawing, and leaves what was found where --dump-dom shows it.
PROBE = """<script>
addEventListener("load", () => setTimeout(() => {
  const told = [];
  document.querySelectorAll(".plot").forEach((plot) => {
    const box = plot.getBoundingClientRect();
    if (!box.width) return;
    plot.dispatchEvent(new PointerEvent("pointermove",
      {clientX: box.left + box.width * 0.999, clientY: box.top + box.height * 0.01}));
    told.push(document.getElementById("tip").textContent);
  });
  const timing = performance.getEntriesByType("navigation")[0];
  document.body.setAttribute("data-found", JSON.stringify({
    told, errors: window.errors, width: innerWidth, load: timing.loadEventStart,
    scroll: document.documentElement.scrollWidth, fetched: performance.getEntriesByType("resource")
      .map((r) => r.name).filter((n) => !n.startsWith("data:")),
    paper: getComputedStyle(document.body).backgroundColor}));
}, 0));
</script>"""


def browse(path, tmp_path, *options):
    """What a browser finds on a page."""
    text = path.read_text("utf-8")
    catch = "<script>window.errors = []; onerror = (e) => { errors.push(String(e)); };</script>"
    probe = tmp_path / "probe.html"
    probe.write_text(text.replace("<style>", catch + "<style>", 1).replace(
        "</body>", PROBE + "</body>"), "utf-8")  # fmt: skip
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user",
         "--virtual-time-budget=2000", *options, "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "data-found" in done.stdout, done.stderr[-2000:]
    return json.loads(unescape(first(r'data-found="([^"]*)"', done.stdout)))


@needs_browser
def test_a_browser_shows_it_at_once_and_tells_values(tmp_path):
    record = make(rows=100_000, depth=5, every=1)
    path = report(record, tmp_path / "a.html")
    found = browse(path, tmp_path, "--window-size=1280,900")
    assert found["errors"] == []
    assert found["fetched"] == []
    assert found["load"] < 1000  # milliseconds
    assert found["scroll"] <= found["width"]
    assert found["paper"] == "rgb(255, 255, 255)"
    last = f"step 100000\nloss {float(record.scalars['loss'][-1]):.4g}"
    assert found["told"][0] == last
    name, steps, value = found["told"][1].split("\n")
    assert (name, steps) == ("0 Linear", "step 99751 to 100000")
    largest = record.values["gradient_norm"][99_750:, 0].max()
    assert float(value) == pytest.approx(float(largest), rel=0.01)
    assert all(found["told"])


@needs_browser
def test_it_fits_a_phone_in_the_dark(tmp_path):
    path = report(make(depth=30, growth=0.8), tmp_path / "a.html")
    dark = "--blink-settings=preferredColorScheme=0"
    found = browse(path, tmp_path, "--window-size=390,844", dark)
    assert found["width"] <= 500  # as narrow as the browser allows
    assert found["scroll"] <= found["width"]
    assert found["paper"] == "rgb(20, 23, 28)"


@needs_browser
def test_it_prints(tmp_path):
    path = report(make(), tmp_path / "a.html")
    out = tmp_path / "a.pdf"
    subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user",
         f"--print-to-pdf={out}", path.as_uri()],
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert out.read_bytes()[:5] == b"%PDF-"
    assert out.stat().st_size > 20_000
