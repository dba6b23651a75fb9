"""Data sets: what is loaded, and what is refused."""

from __future__ import annotations

import gzip
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpugrad.data import (
    DataCorruptError,
    DataError,
    DataNotFoundError,
    LabelledDataset,
    NonFiniteDataError,
    load,
)
from gpugrad.data.datasets import _stratified_fifth

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION = {
    "train-images-idx3-ubyte": (30, 28, 28),
    "train-labels-idx1-ubyte": (30,),
    "t10k-images-idx3-ubyte": (10, 28, 28),
    "t10k-labels-idx1-ubyte": (10,),
}


def check_invariants(data: LabelledDataset) -> None:
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        assert x.dtype == np.float32
        assert y.dtype == np.int64
        assert x.shape == (len(y), *data.feature_shape)
        assert x.min() >= 0
        assert x.max() <= 1
        assert 0 <= y.min() <= y.max() < data.classes


# digits


def test_digits() -> None:
    data = load("digits")
    check_invariants(data)
    assert data.train_x.shape == (1437, 8, 8)
    assert data.test_x.shape == (360, 8, 8)
    assert (data.classes, data.feature_shape) == (10, (8, 8))
    assert "10.24432/C50P49" in data.source
    assert "CC BY 4.0" in data.licence
    # Known figures of optdigits.tes.
    labels = np.concatenate([data.train_y, data.test_y])
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(labels).tolist() == counts
    pixels = np.concatenate([data.train_x, data.test_x]) * 16
    assert (pixels == pixels.round()).all()
    assert pixels.sum() == 561718


def test_digits_split_is_stratified_and_seeded() -> None:
    data = load("digits")
    shares = np.bincount(data.test_y) / (np.bincount(data.test_y) + np.bincount(data.train_y))
    assert np.abs(shares - 0.2).max() < 0.01
    path = Path(__file__).parents[2] / "gpugrad/data/digits/digits.npz"
    with np.load(path, allow_pickle=False) as arrays:
        drawn = _stratified_fifth(arrays["labels"], np.random.default_rng(0))
        np.testing.assert_array_equal(arrays["test"], drawn)


def test_digits_can_be_told_apart() -> None:
    # Nearest class mean: a permuted label array or a transposed pixel order would fail here.
    data = load("digits")
    train, test = data.train_x.reshape(-1, 64), data.test_x.reshape(-1, 64)
    means = np.stack([train[data.train_y == c].mean(axis=0) for c in range(10)])
    nearest = ((test[:, None] - means) ** 2).sum(axis=-1).argmin(axis=1)
    assert (nearest == data.test_y).mean() > 0.85


# fashion-mnist


def write_fashion(folder: Path, *, gz: bool = True) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = {}
    for name, shape in FASHION.items():
        top = 10 if len(shape) == 1 else 256
        raw = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        raw += rng.integers(0, top, shape).astype("u1").tobytes()
        paths[name] = folder / f"{name}.gz" if gz else folder / name
        paths[name].write_bytes(gzip.compress(raw) if gz else raw)
    return paths


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="apt-get install dataset-fashion-mnist to run this")
def test_fashion_mnist_as_debian_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUGRAD_DATA", raising=False)
    data = load("fashion-mnist")
    check_invariants(data)
    assert data.train_x.shape == (60000, 28, 28)
    assert data.test_x.shape == (10000, 28, 28)
    assert np.bincount(data.train_y).tolist() == [6000] * 10
    assert np.bincount(data.test_y).tolist() == [1000] * 10
    assert data.train_y[:5].tolist() == [9, 0, 0, 3, 0]
    assert data.train_x.max() == 1.0
    assert data.train_x.mean(dtype=np.float64) == pytest.approx(0.2860, abs=1e-4)


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize("subfolder", ["", "fashion-mnist"])
def test_fashion_mnist_in_a_folder(tmp_path: Path, gz: bool, subfolder: str) -> None:
    write_fashion(tmp_path / subfolder, gz=gz)
    data = load("fashion-mnist", folder=tmp_path)
    check_invariants(data)
    assert data.train_x.shape == (30, 28, 28)
    assert data.classes == 10


def test_fashion_mnist_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion(tmp_path)
    monkeypatch.setenv("GPUGRAD_DATA", str(tmp_path))
    assert len(load("fashion-mnist").train_x) == 30


def test_folder_goes_before_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion(tmp_path)
    monkeypatch.setenv("GPUGRAD_DATA", str(tmp_path))
    with pytest.raises(DataNotFoundError):
        load("fashion-mnist", folder=tmp_path / "elsewhere")


@pytest.mark.parametrize("name", sorted(FASHION))
def test_fashion_mnist_with_a_file_missing(tmp_path: Path, name: str) -> None:
    write_fashion(tmp_path)[name].unlink()
    with pytest.raises(DataNotFoundError) as caught:
        load("fashion-mnist", folder=tmp_path)
    text = str(caught.value)
    assert f"no {name}, with" in text
    for needed in (str(tmp_path), "apt-get install dataset-fashion-mnist", "--data-dir"):
        assert needed in text
    assert not any(f"no {other}" in text for other in FASHION if other != name)


def test_fashion_mnist_with_fewer_labels_than_images(tmp_path: Path) -> None:
    paths = write_fashion(tmp_path)
    paths["train-labels-idx1-ubyte"].write_bytes(paths["t10k-labels-idx1-ubyte"].read_bytes())
    with pytest.raises(DataCorruptError, match=r"30 images but .*10 labels"):
        load("fashion-mnist", folder=tmp_path)


def test_fashion_mnist_with_labels_for_images(tmp_path: Path) -> None:
    paths = write_fashion(tmp_path)
    paths["train-images-idx3-ubyte"].write_bytes(paths["t10k-labels-idx1-ubyte"].read_bytes())
    with pytest.raises(DataCorruptError, match=r"train-images.*expected 3-dimensional uint8"):
        load("fashion-mnist", folder=tmp_path)


def test_fashion_mnist_truncated(tmp_path: Path) -> None:
    path = write_fashion(tmp_path)["t10k-images-idx3-ubyte"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataCorruptError, match="t10k-images"):
        load("fashion-mnist", folder=tmp_path)


def test_fashion_mnist_with_a_label_out_of_range(tmp_path: Path) -> None:
    path = write_fashion(tmp_path, gz=False)["train-labels-idx1-ubyte"]
    raw = bytearray(path.read_bytes())
    raw[8 + 3] = 10
    path.write_bytes(raw)
    with pytest.raises(DataError, match="first is 10 at index 3; labels must be 0 to 9"):
        load("fashion-mnist", folder=tmp_path)


# .npz


def arrays(n: int = 20, dtype: Any = np.float64) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(1)
    x = rng.uniform(0, 200, (n, 3)).astype(dtype)
    return {"x": x, "y": np.arange(n) % 4}


def four(n: int = 20) -> dict[str, NDArray[Any]]:
    one = arrays(n)
    return {
        "x_train": one["x"][:15],
        "y_train": one["y"][:15],
        "x_test": one["x"][15:],
        "y_test": one["y"][15:],
    }


def npz(folder: Path, content: dict[str, Any], name: str = "own.npz") -> Path:
    np.savez_compressed(folder / name, **content)
    return folder / name


def test_npz_of_two_arrays_is_split(tmp_path: Path) -> None:
    content = arrays(100)
    path = npz(tmp_path, content)
    data, again = load(path), load(str(path))
    assert (len(data.train_x), len(data.test_x), data.classes) == (80, 20, 4)
    assert np.bincount(data.test_y).tolist() == [5, 5, 5, 5]
    np.testing.assert_array_equal(data.train_x, again.train_x)
    # Every example is in one part, beside its own label.
    low, high = data.train_x.min(axis=0), data.train_x.max(axis=0)
    assert (low == 0).all()
    assert (high == 1).all()
    together = np.concatenate([data.train_x, data.test_x])
    labels = np.concatenate([data.train_y, data.test_y])
    order, wanted = np.argsort(together[:, 0]), np.argsort(content["x"][:, 0])
    np.testing.assert_array_equal(labels[order], content["y"][wanted])


def test_npz_of_four_arrays(tmp_path: Path) -> None:
    data = load("own.npz", folder=npz(tmp_path, four()).parent)
    assert data.name == "own"
    assert data.train_x.shape == (15, 3)
    assert data.test_y.tolist() == [3, 0, 1, 2, 3]
    assert data.train_x.min() == 0
    assert data.train_x.max() == 1


def test_npz_scaling(tmp_path: Path) -> None:
    labels = np.array([0, 1])

    def scaled(x: Any, t: Any) -> tuple[list[Any], list[Any]]:
        content = {"x_train": x, "y_train": labels, "x_test": t, "y_test": labels}
        data = load(npz(tmp_path, content))
        return data.train_x.tolist(), data.test_x.tolist()

    u1 = np.array([[0, 255], [51, 0]], np.uint8)
    assert scaled(u1, u1[::-1]) == ([[0, 1], [np.float32(0.2), 0]], [[np.float32(0.2), 0], [0, 1]])
    unit = np.array([[0.25, 0.5], [0.75, 0.5]])
    assert scaled(unit, unit) == (unit.tolist(), unit.tolist())
    # Each feature by itself, a constant one becomes 0, and the test set has no say.
    x = np.array([[-10.0, 7, 1000], [10.0, 7, 3000]])
    train, test = scaled(x, x + 5)
    assert train == [[0, 0, 0], [1, 0, 1]]
    np.testing.assert_allclose(test, [[0.25, 5, 0.0025], [1.25, 5, 1.0025]], rtol=1e-6)
    binary = np.array([[0, 1], [1, 0]], np.uint8)
    assert scaled(binary, binary) == (binary.tolist(), binary.tolist())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["x_train", "x_test"])
def test_npz_with_values_not_finite(tmp_path: Path, key: str, bad: float) -> None:
    content = four()
    content[key] = content[key].copy()
    content[key][3, 1] = content[key][4, 0] = bad
    with pytest.raises(NonFiniteDataError, match=rf"{key} of .*own\.npz: 2 of") as caught:
        load(npz(tmp_path, content))
    assert caught.value.count == 2
    assert caught.value.first_index == (3, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.arange(20.0)}, "y of .* must hold integer class labels, got float64"),
        ({"y": np.arange(20) % 2 == 0}, "must hold integer class labels, got bool"),
        ({"y": np.eye(20, 4, dtype=int)}, r"shape \[N\].*argmax"),
        ({"y": np.arange(20) - 3}, "3 labels are out of range, the first is -3 at index 0"),
        ({"y": np.arange(20) + 1000}, "greatest label is 1019, more than there are examples"),
        ({"y": np.full(20, 2**64 - 1, np.uint64)}, "more than there are examples"),
        ({"y": np.arange(19)}, "x has 20 examples but y has 19"),
        ({"x": np.zeros((0, 3)), "y": np.zeros(0, int)}, "not be empty"),
        ({"x": np.zeros((20, 0))}, "not be empty"),
        ({"x": np.zeros(20)}, r"shape \[N, features...\]"),
        ({"x": np.zeros((20, 2), complex)}, "real numbers, got complex128"),
        ({"x": np.full((20, 2), "a")}, "real numbers, got <U1"),
        ({"x": np.full((20, 2), None)}, "pickled objects, which are never loaded"),
        ({"x": np.zeros((1, 3)), "y": np.zeros(1, int)}, "too few to set a fifth apart"),
    ],
)
def test_npz_of_unusable_arrays(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(npz(tmp_path, {**arrays(), **change}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_test": np.zeros((5, 4))}, r"examples of shape \(3,\), x_test of shape \(4,\)"),
        ({"x_test": np.zeros((5, 3), np.float32)}, "x_test is float32; store both alike"),
        ({"y_test": np.array([0, 1, 2, 3, 4])}, "first is 4 at index 4; labels must be 0 to 3"),
        ({"y_train": np.zeros(14, int)}, "x_train has 15 examples but y_train has 14"),
    ],
)
def test_npz_of_parts_that_disagree(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(npz(tmp_path, {**four(), **change}))


def test_npz_with_other_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x_train, y_train.*it has images, labels"):
        load(npz(tmp_path, {"images": np.zeros((2, 2)), "labels": np.zeros(2, int)}))


class Bomb:
    """Pickled, it would leave a file behind when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_npz_never_unpickles(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    bomb = np.empty((), object)
    bomb[()] = Bomb(trap)
    path = npz(tmp_path, {**arrays(), "x": bomb})
    with pytest.raises(DataError, match="pickled objects"):
        load(path)
    assert not trap.exists()


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
def test_npz_truncated_or_flipped_anywhere(tmp_path: Path, savez: Any) -> None:
    buffer = io.BytesIO()
    savez(buffer, **arrays())
    whole = buffer.getvalue()
    path = tmp_path / "own.npz"
    path.write_bytes(whole)
    intact = load(path)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataCorruptError, match=r"own\.npz"):
            load(path)
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        # Zip ignores some bytes (times, attributes), but a wrong value must never come out.
        try:
            data = load(path)
        except DataError:
            continue
        np.testing.assert_array_equal(data.train_x, intact.train_x)
        np.testing.assert_array_equal(data.test_y, intact.test_y)


def test_npz_that_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros((3, 3)))
    with pytest.raises(DataCorruptError, match=r"not an \.npz"):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", "no array")
        archive.writestr("y.npy", "no array")
    with pytest.raises(DataCorruptError, match="member x is no NumPy array"):
        load(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"own\.npz: no such file"):
        load(tmp_path / "own.npz")
    with pytest.raises(DataNotFoundError, match=r"no data set is called 'mnist'.*digits, fashion"):
        load("mnist")
    (tmp_path / "table.csv").write_text("1,2\n")
    with pytest.raises(DataError, match=r"only \.npz files are read"):
        load(tmp_path / "table.csv")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "folder.npz")


# LabelledDataset


def test_dataset_is_frozen_and_checked() -> None:
    x, y = np.zeros((4, 2), np.float32), np.array([0, 1, 0, 1], np.uint8)
    data = LabelledDataset("toy", x, y, x[:2], y[:2], classes=2)  # type: ignore[arg-type]
    assert data.train_y.dtype == np.int64
    with pytest.raises(AttributeError):
        data.classes = 3  # type: ignore[misc]
    with pytest.raises(DataError, match="train_x of toy must be float32, got float64"):
        LabelledDataset("toy", x.astype(float), y, x, y, classes=2)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"test_y of toy.*labels must be 0 to 0"):
        LabelledDataset("toy", x, y * 0, x, y, classes=1)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteDataError, match=r"test_x of toy: 8 of 8 .*index \(0, 0\)"):
        LabelledDataset("toy", x, y, x * np.float32(np.nan), y, classes=2)  # type: ignore[arg-type]
