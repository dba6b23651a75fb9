"""Labelled data sets as NumPy arrays: shipped, installed, or the user's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpugrad.data.errors import DataCorruptError, DataError, DataNotFoundError, NonFiniteDataError
from gpugrad.data.idx import read_idx

__all__ = ["NAMES", "LabelledDataset", "load"]

NAMES = ("digits", "fashion-mnist")
"""The names `load` knows; anything else is taken for the path of an .npz file."""

_DEBIAN_FOLDER = Path("/usr/share/datasets")
_FASHION_FILES = {
    "train_x": "train-images-idx3-ubyte",
    "train_y": "train-labels-idx1-ubyte",
    "test_x": "t10k-images-idx3-ubyte",
    "test_y": "t10k-labels-idx1-ubyte",
}
_SPLIT_SEED = 0


@dataclass(frozen=True, eq=False, repr=False)
class LabelledDataset:
    """Examples and their class labels, split into a training set and a test set.

    `train_x` and `test_x` are float32 of shape [N, *feature_shape] and hold finite values;
    `train_y` and `test_y` are int64 of shape [N] and hold classes 0 ... `classes` - 1. `source`
    says where the data come from, `licence` on what terms.

    Building one checks all of this: `NonFiniteDataError` for NaN or infinity, `DataError` for
    anything else. Labels of any integer dtype are converted.

    >>> x = np.zeros((4, 2), np.float32)
    >>> LabelledDataset("toy", x, np.array([0, 1, 0, 1]), x[:1], np.array([1]), classes=2)
    LabelledDataset('toy': train [4, 2], test [1, 2], 2 classes)
    """

    name: str
    train_x: NDArray[np.float32]
    train_y: NDArray[np.int64]
    test_x: NDArray[np.float32]
    test_y: NDArray[np.int64]
    classes: int
    source: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            x, y = getattr(self, f"{part}_x"), getattr(self, f"{part}_y")
            name_x, name_y = f"{part}_x of {self.name}", f"{part}_y of {self.name}"
            if x.dtype != np.float32:
                raise DataError(f"{name_x} must be float32, got {x.dtype}")
            _check_features(x, name_x)
            _check_labels(y, name_y, self.classes)
            if len(x) != len(y):
                raise DataError(f"{name_x} has {len(x)} examples but {name_y} has {len(y)}")
            object.__setattr__(self, f"{part}_y", y.astype(np.int64, copy=False))
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise DataError(
                f"{self.name}: training examples have shape {self.train_x.shape[1:]}, "
                f"test examples {self.test_x.shape[1:]}"
            )

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return self.train_x.shape[1:]

    def __repr__(self) -> str:
        train, test = list(self.train_x.shape), list(self.test_x.shape)
        return f"LabelledDataset({self.name!r}: train {train}, test {test}, {self.classes} classes)"


def load(
    name_or_path: str | os.PathLike[str], *, folder: str | os.PathLike[str] | None = None
) -> LabelledDataset:
    """Load a data set by its name, or from an .npz file; features come as float32 in [0, 1].

    * `"digits"`: 1,797 handwritten digits, shape [8, 8], 10 classes; 1,437 for training and 360
      for testing, always the same. Shipped with gpugrad.
    * `"fashion-mnist"`: 60,000 + 10,000 pictures of clothes, shape [28, 28], 10 classes; four IDX
      files, gzipped or not. They are looked for in `folder` if it is given, or else in the folder
      the environment variable `GPUGRAD_DATA` names and then in /usr/share/datasets; in each of
      them also in a subfolder `fashion-mnist`.
    * any path ending in `.npz` (relative to `folder` if that is given) with arrays `x_train`,
      `y_train`, `x_test`, `y_test`, or `x` and `y`, of which a fifth, alike in every class, is
      then set apart for testing with a fixed seed. How features are scaled is told from the
      training set alone: if all lie in [0, 1] they stay as they are; if they are uint8 they are
      divided by 255; otherwise each is scaled by its own minimum and maximum, and test values may
      then lie outside. Files with pickled objects are refused.

    Raises `DataNotFoundError`, `DataCorruptError`, `NonFiniteDataError`, or their base
    `DataError` for data of an unusable shape, type or label.

    >>> load("digits")
    LabelledDataset('digits': train [1437, 8, 8], test [360, 8, 8], 10 classes)
    """
    name = os.fspath(name_or_path)
    if name == "digits":
        return _load_digits()
    if name == "fashion-mnist":
        return _load_fashion_mnist(None if folder is None else Path(folder))
    path = Path(name) if folder is None else Path(folder, name)
    if path.suffix == ".npz":
        return _load_npz(path)
    if path.exists():
        raise DataError(f"{path}: only .npz files are read; write one with numpy.savez")
    raise DataNotFoundError(
        f"no data set is called {name!r}: give one of {', '.join(NAMES)}, "
        "or the path of an .npz file"
    )


def _load_digits() -> LabelledDataset:
    folder = resources.files(__package__ or "gpugrad.data") / "digits"
    with (folder / "digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images, labels, test = arrays["images"], arrays["labels"], arrays["test"]
    x = images.astype(np.float32) / np.float32(16)
    return LabelledDataset(
        "digits",
        *(x[~test], labels[~test], x[test], labels[test]),
        classes=10,
        source="E. Alpaydin and C. Kaynak (1998), Optical Recognition of Handwritten Digits, "
        "UCI Machine Learning Repository, https://doi.org/10.24432/C50P49",
        licence="CC BY 4.0, https://creativecommons.org/licenses/by/4.0/",
    )


def _load_fashion_mnist(folder: Path | None) -> LabelledDataset:
    found = _find_fashion_mnist(folder)
    arrays = {key: read_idx(path) for key, path in found.items()}
    for key, array in arrays.items():
        ndim = 3 if key.endswith("_x") else 1
        if array.dtype != np.uint8 or array.ndim != ndim:
            raise DataCorruptError(
                f"{found[key]}: expected {ndim}-dimensional uint8, "
                f"found shape {array.shape} of {array.dtype}"
            )
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_x"], arrays[f"{part}_y"]
        if len(images) != len(labels):
            raise DataCorruptError(
                f"{found[f'{part}_x']} has {len(images)} images but {found[f'{part}_y']} has "
                f"{len(labels)} labels; fetch both again"
            )
    return LabelledDataset(
        "fashion-mnist",
        *(_unit_interval(arrays["train_x"]), arrays["train_y"]),
        *(_unit_interval(arrays["test_x"]), arrays["test_y"]),
        classes=10,
        source="H. Xiao, K. Rasul and R. Vollgraf (2017), Fashion-MNIST: a Novel Image Dataset "
        "for Benchmarking Machine Learning Algorithms, https://arxiv.org/abs/1708.07747",
        licence="MIT, copyright 2017 Zalando SE",
    )


def _find_fashion_mnist(folder: Path | None) -> dict[str, Path]:
    """Return the path of each of the four files, all from the first folder that has them all."""
    if folder is not None:
        roots = [folder]
    else:
        named = os.environ.get("GPUGRAD_DATA")
        roots = [*([Path(named)] if named else []), _DEBIAN_FOLDER]
    looked = [place for root in roots for place in (root / "fashion-mnist", root)]
    best: dict[str, Path] = {}
    for place in looked:
        found = {}
        for key, name in _FASHION_FILES.items():
            for path in (place / f"{name}.gz", place / name):
                if path.is_file():
                    found[key] = path
                    break
        if len(found) == len(_FASHION_FILES):
            return found
        if len(found) > len(best):
            best = found
    missing = [name for key, name in _FASHION_FILES.items() if key not in best]
    have = f" (the other files are in {next(iter(best.values())).parent})" if best else ""
    raise DataNotFoundError(
        f"fashion-mnist: no {', no '.join(missing)}, with or without .gz{have}; looked in "
        f"{', '.join(map(str, looked))}. On Debian and Ubuntu: apt-get install "
        "dataset-fashion-mnist. Elsewhere, put the four files of "
        "https://github.com/zalandoresearch/fashion-mnist into a folder and name it with "
        "--data-dir, folder= or GPUGRAD_DATA"
    )


def _load_npz(path: Path) -> LabelledDataset:
    arrays = _read_npz(path)
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        train_x, train_y = arrays["x_train"], arrays["y_train"]
        test_x, test_y = arrays["x_test"], arrays["y_test"]
        parts = {"x_train": train_x, "x_test": test_x, "y_train": train_y, "y_test": test_y}
    elif {"x", "y"} <= arrays.keys():
        parts = {key: arrays[key] for key in ("x", "y")}
    else:
        raise DataError(
            f"{path}: needs arrays x_train, y_train, x_test and y_test, or x and y; "
            f"it has {', '.join(sorted(arrays)) or 'none'}"
        )
    # Checked here as well as by LabelledDataset, to speak of the arrays by the file's own names.
    for key, array in parts.items():
        check = _check_features if key.startswith("x") else _check_labels
        check(array, f"{key} of {path}")
    for key in parts.keys() & {"x", "x_train", "x_test"}:
        labels = key.replace("x", "y", 1)
        if len(parts[key]) != len(parts[labels]):
            raise DataCorruptError(
                f"{path}: {key} has {len(parts[key])} examples but {labels} has "
                f"{len(parts[labels])}"
            )
    if "x" in parts:
        x, y = parts["x"], parts["y"]
        test = _stratified_fifth(y, np.random.default_rng(_SPLIT_SEED))
        train_x, train_y, test_x, test_y = x[~test], y[~test], x[test], y[test]
        if not test.any():
            raise DataError(f"{path}: {len(x)} examples are too few to set a fifth apart")
        classes = int(y.max()) + 1
    else:
        classes = int(train_y.max()) + 1
    if train_x.shape[1:] != test_x.shape[1:]:
        raise DataError(
            f"{path}: x_train has examples of shape {train_x.shape[1:]}, "
            f"x_test of shape {test_x.shape[1:]}"
        )
    if classes > len(train_y) + len(test_y):
        raise DataError(
            f"{path}: the greatest label is {classes - 1}, more than there are examples; number "
            "the classes from 0, for instance with numpy.unique(y, return_inverse=True)"
        )
    if train_x.dtype != test_x.dtype:
        raise DataError(
            f"{path}: x_train is {train_x.dtype} but x_test is {test_x.dtype}; store both alike"
        )
    train_x, test_x = _scaled(train_x, test_x)
    return LabelledDataset(path.stem, train_x, train_y, test_x, test_y, classes, source=str(path))


def _read_npz(path: Path) -> Mapping[str, NDArray[Any]]:
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                raise DataCorruptError(f"{path}: not an .npz file; write one with numpy.savez")
            file.seek(0)
            # Never pickles: loading one runs whatever code it names.
            with np.load(file, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
        for key, array in arrays.items():
            if not isinstance(array, np.ndarray):
                raise DataCorruptError(f"{path}: member {key} is no NumPy array")
        return arrays
    except FileNotFoundError:
        raise DataNotFoundError(
            f"{path}: no such file; give an existing .npz, or one of {', '.join(NAMES)}"
        ) from None
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except DataError:
        raise
    except Exception as error:
        if "Object arrays" in str(error):
            raise DataError(f"{path}: holds pickled objects, which are never loaded") from error
        # zipfile, zlib and NumPy raise a dozen classes between them, depending on the byte.
        raise DataCorruptError(f"{path}: damaged .npz: {error}; write it again") from error


def _check_features(x: NDArray[Any], name: str) -> None:
    if x.dtype.kind not in "biuf":
        raise DataError(f"{name} must hold real numbers, got {x.dtype}")
    if x.ndim < 2 or x.size == 0:
        raise DataError(f"{name} must have shape [N, features...] and not be empty, got {x.shape}")
    if x.dtype.kind == "f":
        finite = np.isfinite(x)
        if not finite.all():
            first = np.unravel_index(int(finite.argmin()), x.shape)
            count = x.size - int(np.count_nonzero(finite))
            raise NonFiniteDataError(name, count, x.size, tuple(int(i) for i in first))


def _check_labels(y: NDArray[Any], name: str, classes: int | None = None) -> None:
    if y.dtype.kind not in "iu":
        raise DataError(f"{name} must hold integer class labels, got {y.dtype}")
    if y.ndim != 1 or y.size == 0:
        raise DataError(
            f"{name} must have shape [N] and not be empty, got {y.shape}; "
            "one-hot rows become labels with argmax(axis=1)"
        )
    wrong = y < 0 if classes is None else (y < 0) | (y >= classes)
    if wrong.any():
        first = int(wrong.argmax())
        allowed = "0 or more" if classes is None else f"0 to {classes - 1}"
        raise DataError(
            f"{name}: {int(np.count_nonzero(wrong))} labels are out of range, the first is "
            f"{int(y[first])} at index {first}; labels must be {allowed}"
        )


def _stratified_fifth(y: NDArray[Any], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Mark a fifth of the examples, drawn from every class in proportion to its size."""
    order = rng.permutation(len(y))
    # By class, in random order within each: every fifth of these falls on the classes evenly.
    order = order[np.argsort(y[order], kind="stable")]
    marked = np.zeros(len(y), bool)
    marked[order[1::5]] = True
    return marked


def _unit_interval(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return pixels.astype(np.float32) / np.float32(255)


def _scaled(
    train: NDArray[Any], test: NDArray[Any]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Bring features to [0, 1] by what the training set alone tells."""
    if train.min() >= 0 and train.max() <= 1:
        return train.astype(np.float32), test.astype(np.float32)
    if train.dtype == np.uint8:
        return _unit_interval(train), _unit_interval(test)
    low = train.min(axis=0).astype(np.float64)
    span = train.max(axis=0) - low
    span[span == 0] = 1  # a constant feature becomes 0
    scaled = tuple(((x - low) / span).astype(np.float32) for x in (train, test))
    return scaled[0], scaled[1]
