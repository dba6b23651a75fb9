"""Event files, by each of the packages that can write them, read again."""

import importlib.util
import struct
import sys

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.cli.tensorboard import BINS, TensorBoard, TensorBoardError
from gpugrad.errors import GpugradError

PACKAGES = [p for p in ("tensorboardX", "tensorboard") if importlib.util.find_spec(p)]

needs_a_package = pytest.mark.skipif(
    not PACKAGES, reason="neither tensorboardX nor tensorboard is installed"
)


@pytest.fixture(params=["tensorboardX", "tensorboard"])
def package(request, monkeypatch):
    """Lets only this package be imported for writing."""
    if request.param not in PACKAGES:
        pytest.skip(f"{request.param} is not installed")
    if request.param == "tensorboard":
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
    return request.param


def events(folder):
    """The events of all files in a folder; a record is length, check, data, check."""
    if "tensorboardX" in PACKAGES and sys.modules.get("tensorboardX", 0) is not None:
        from tensorboardX.proto.event_pb2 import Event
    else:
        from tensorboard.compat.proto.event_pb2 import Event
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def values(folder):
    return [(e.step, v) for e in events(folder) for v in e.summary.value]


def test_scalars(package, tmp_path):
    with TensorBoard(tmp_path / "a" / "b") as board:
        board.scalars({"train/loss": 0.5, "train/accuracy": 0.25}, 1)
        board.scalars({"train/loss": float("nan")}, step=2)
    found = values(tmp_path / "a" / "b")
    assert [(step, v.tag) for step, v in found] == [
        (1, "train/loss"), (1, "train/accuracy"), (2, "train/loss")]  # fmt: skip
    assert [v.simple_value for _, v in found[:2]] == [0.5, 0.25]
    assert np.isnan(found[2][1].simple_value)


def test_histogram(package, tmp_path):
    x = np.random.default_rng(0).standard_normal((40, 25))
    with TensorBoard(tmp_path) as board:
        board.histogram("weights", gg.tensor(x, requires_grad=True), 3)
    ((step, value),) = values(tmp_path)
    h = value.histo
    counts, ends = np.histogram(x, BINS)
    assert (step, value.tag) == (3, "weights")
    np.testing.assert_array_equal(h.bucket, counts)
    np.testing.assert_allclose(h.bucket_limit, ends[1:], rtol=1e-12)
    assert (h.min, h.max, h.num) == (x.min(), x.max(), 1000)
    np.testing.assert_allclose([h.sum, h.sum_squares], [x.sum(), (x * x).sum()], rtol=1e-12)


def test_histograms_of_odd_arrays(package, tmp_path):
    big = np.finfo(np.float64).max
    with TensorBoard(tmp_path) as board:
        board.histogram("equal", np.full(7, 2.5, np.float32), 0)
        board.histogram("close", np.array([1.0, np.nextafter(1.0, 2.0)]), 0)
        board.histogram("wide", np.array([-big, big]), 0)
        board.histogram("holes", np.array([np.nan, 1.0, np.inf, -1.0, -np.inf]), 0)
        board.histogram("nothing", np.array([np.nan]), 0)
        board.histogram("empty", np.zeros((0, 3)), 0)
        board.histogram("narrow", gg.ones(3, dtype="bfloat16"), 0)
        board.histogram("integers", np.arange(65), 0)
    found = {v.tag: v.histo for _, v in values(tmp_path)}
    assert list(found) == ["equal", "close", "wide", "holes", "narrow", "integers"]
    assert (list(found["equal"].bucket), list(found["equal"].bucket_limit)) == ([7], [2.5])
    assert list(found["close"].bucket) == list(found["wide"].bucket) == [2]
    assert (found["holes"].num, found["holes"].min, found["holes"].max) == (2, -1.0, 1.0)
    assert list(found["narrow"].bucket) == [3]
    assert list(found["integers"].bucket) == [1] * (BINS - 1) + [2]


def test_text(package, tmp_path):
    with TensorBoard(tmp_path) as board:
        board.text("options", "lr **0.1**, ∂", 4)
    ((step, value),) = values(tmp_path)
    assert (step, value.tag) == (4, "options/text_summary")
    assert value.metadata.plugin_data.plugin_name == "text"
    assert [t.decode() for t in value.tensor.string_val] == ["lr **0.1**, ∂"]


def test_tensorboard_reads_it(package, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    with TensorBoard(tmp_path) as board:
        for step in range(3):
            board.scalars({"loss": 1.0 / (step + 1)}, step)
            board.histogram("weights", np.arange(100.0) * step, step)
        board.text("note", "hello", 0)
    read = EventAccumulator(str(tmp_path)).Reload()
    tags = read.Tags()["tensors"]
    assert sorted(tags) == ["loss", "note/text_summary", "weights"]
    losses = [make_ndarray(e.tensor_proto).item() for e in read.Tensors("loss")]
    np.testing.assert_allclose(losses, [1.0, 1 / 2, 1 / 3], rtol=1e-6)
    assert [e.step for e in read.Tensors("loss")] == [0, 1, 2]
    # What it shows of a histogram: left end, right end and count of each interval.
    first, second, _ = (make_ndarray(e.tensor_proto) for e in read.Tensors("weights"))
    assert first[:, 2].sum() == second[:, 2].sum() == 100
    assert (first[:, :2] == 0).all()
    assert (second[0, 0], second[-1, 1]) == (0.0, 99.0)
    assert (second[1:, 0] == second[:-1, 1]).all()
    assert make_ndarray(read.Tensors("note/text_summary")[0].tensor_proto).item() == b"hello"


def test_closed(package, tmp_path):
    board = TensorBoard(str(tmp_path))
    board.close()
    board.close()
    for call in (
        lambda: board.scalars({"x": 1.0}, 0),
        lambda: board.histogram("x", np.ones(3), 0),
        lambda: board.text("x", "y", 0),
    ):
        with pytest.raises(TensorBoardError, match="closed already"):
            call()


def test_it_closes_when_the_block_fails(package, tmp_path):
    def fail():
        with TensorBoard(tmp_path) as board:
            board.scalars({"x": 1.0}, 0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(values(tmp_path)) == 1


@needs_a_package
def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TensorBoardError, match="cannot make this folder"):
        TensorBoard(tmp_path / "file" / "x")


def test_neither_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [m for m in sys.modules if m.startswith(("tensorboard.", "tensorboardX."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(GpugradError, match=r"pip install 'gpugrad\[tensorboard\]'"):
        TensorBoard(tmp_path / "x")
    assert not (tmp_path / "x").exists()
