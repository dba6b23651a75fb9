"""Transforms of images: what they do, and that they do the same on every backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import is_usable
from gpugrad.backend.random import words
from gpugrad.data.transforms import (
    Compose,
    Cutout,
    Normalize,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    ToFloat,
)
from gpugrad.errors import DTypeError, ParameterError, ShapeError
from gpugrad.nn import Generator, manual_seed
from tests.backend.counting import counting

ROOT = Path(__file__).parents[2]
IMAGES = np.random.default_rng(0).integers(0, 256, (16, 3, 7, 9)).astype(np.uint8)
FLOATS = IMAGES.astype(np.float32)

MAKE: dict[str, Any] = {
    "flip": lambda g: RandomHorizontalFlip(generator=g),
    "crop": lambda g: RandomCrop((5, 6), generator=g),
    "padded": lambda g: RandomCrop((7, 9), padding=(1, 2, 3, 4), fill=7, generator=g),
    "reflect": lambda g: RandomCrop(7, padding=3, padding_mode="reflect", generator=g),
    "edge": lambda g: RandomCrop(7, padding=(2, 3), padding_mode="edge", generator=g),
    "cutout": lambda g: Cutout(4, generator=g),
    "erasing": lambda g: RandomErasing(0.8, value=3, generator=g),
    "all": lambda g: Compose(
        [
            ToFloat(),
            RandomCrop(7, padding=2, generator=g),
            RandomHorizontalFlip(generator=g),
            Normalize([0.4, 0.5, 0.6], [0.1, 0.2, 0.3]),
            RandomErasing(generator=g),
        ]
    ),
}


@pytest.mark.parametrize("name", MAKE)
def test_the_same_on_every_backend(name: str) -> None:
    wanted = MAKE[name](Generator(4))(IMAGES)
    assert isinstance(wanted, np.ndarray)
    tensor = MAKE[name](Generator(4))(gg.asarray(IMAGES))
    np.testing.assert_array_equal(tensor.numpy(), wanted)
    assert tensor.dtype == wanted.dtype
    with counting() as counts:
        x = gg.tensor(IMAGES, device="counting")
        counts.clear()
        y = MAKE[name](Generator(4))(x)
        assert counts.host_reads == 0
        assert counts.uploads <= 2  # mean and deviation, once
        np.testing.assert_array_equal(y.cpu().numpy(), wanted)
    pytest.importorskip("array_api_strict")
    y = MAKE[name](Generator(4))(gg.tensor(IMAGES, device="strict:device1"))
    assert y.device == "strict:device1"
    np.testing.assert_array_equal(y.cpu().numpy(), wanted)


def play(gpus: int) -> None:
    """All transforms on the stand-in for CuPy; a broken assertion is a failure."""
    from tests.backend.fake_cupy import install

    install(gpus)
    for name, make in MAKE.items():
        y = make(Generator(4))(gg.tensor(IMAGES, device=f"cuda:{gpus - 1}"))
        assert y.device == f"cuda:{gpus - 1}"
        wanted = make(Generator(4))(IMAGES)
        assert y.dtype == wanted.dtype, name
        np.testing.assert_array_equal(y.data._host, wanted)


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_same_with_cupy(gpus: int) -> None:
    code = f"from tests.data.test_data_transforms import play; play({gpus})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAKE)
def test_the_same_on_the_gpu(name: str) -> None:
    assert is_usable("cuda")
    wanted = MAKE[name](Generator(4))(IMAGES)
    y = MAKE[name](Generator(4))(gg.tensor(IMAGES, device="cuda"))
    np.testing.assert_allclose(y.cpu().numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize("name", MAKE)
def test_draws_are_those_of_the_generator(name: str) -> None:
    generator = Generator(4)
    transform = MAKE[name](generator)
    first, second = transform(IMAGES), transform(IMAGES)
    assert (first != second).any()
    generator.manual_seed(4)
    np.testing.assert_array_equal(transform(IMAGES), first)
    manual_seed(4)
    np.testing.assert_array_equal(MAKE[name](None)(IMAGES), first)


@pytest.mark.parametrize("name", MAKE)
def test_an_image_does_not_depend_on_those_behind_it(name: str) -> None:
    whole = MAKE[name](Generator(4))(IMAGES)
    part = MAKE[name](Generator(4))(IMAGES[:5])
    np.testing.assert_array_equal(whole[:5], part)
    one = MAKE[name](Generator(4))(IMAGES[0])
    np.testing.assert_array_equal(one, whole[0])


@pytest.mark.parametrize("name", MAKE)
def test_half_precision_stays(name: str) -> None:
    if name != "all":
        x = FLOATS.astype(np.float16)
        assert MAKE[name](Generator(0))(x).dtype == np.float16
        y = MAKE[name](Generator(0))(FLOATS.astype(ml_dtypes.bfloat16))
        assert y.dtype == ml_dtypes.bfloat16


def test_flip() -> None:
    y = RandomHorizontalFlip(generator=Generator(1))(IMAGES)
    flipped = [(y[i] == IMAGES[i, :, :, ::-1]).all() for i in range(16)]
    kept = [(y[i] == IMAGES[i]).all() for i in range(16)]
    assert all(a != b for a, b in zip(flipped, kept))
    assert 2 < sum(flipped) < 14
    np.testing.assert_array_equal(RandomHorizontalFlip(1.0)(IMAGES), IMAGES[..., ::-1])
    np.testing.assert_array_equal(RandomHorizontalFlip(0.0)(IMAGES), IMAGES)
    many = RandomHorizontalFlip(0.3, Generator(0))(np.tile([0, 1], (4000, 1, 1, 1)))
    assert abs(many[:, 0, 0, 0].mean() - 0.3) < 0.04


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect"])
@pytest.mark.parametrize("padding", [None, 0, 2, (1, 3), (1, 2, 3, 4)])
def test_crops_are_windows_of_the_padded_image(mode: str, padding: Any) -> None:
    size = (6, 8)
    y = RandomCrop(size, padding, 9, mode, Generator(2))(IMAGES)
    left, top, right, bottom = {
        None: (0,) * 4, 0: (0,) * 4, 2: (2,) * 4, (1, 3): (1, 3, 1, 3)
    }.get(padding, padding)  # fmt: skip
    around = ((0, 0), (0, 0), (top, bottom), (left, right))
    options = {"constant_values": 9} if mode == "constant" else {}
    big = np.pad(IMAGES, around, mode, **options)
    windows = np.lib.stride_tricks.sliding_window_view(big, size, axis=(2, 3))
    places = set()
    for i in range(16):
        same = (windows[i] == y[i][:, None, None]).all(axis=(0, 3, 4))
        found = np.argwhere(same)
        assert len(found) == 1
        places.add(tuple(found[0]))
    assert len(places) > 1


def test_crops_reach_every_place() -> None:
    images = np.arange(4.0).reshape(1, 1, 2, 2).repeat(400, axis=0)
    found = RandomCrop(1, generator=Generator(0))(images).reshape(-1).astype(int)
    assert (np.bincount(found) > 60).all()
    # Reflection far beyond the border goes back and forth, as np.pad's does.
    far = RandomCrop((1, 14), padding=(6, 0), padding_mode="reflect")(images[:1, :, :1])
    np.testing.assert_array_equal(far[0, 0], np.pad([[0.0, 1.0]], ((0, 0), (6, 6)), "reflect"))
    single = RandomCrop((1, 3), padding=(1, 0), padding_mode="reflect")(images[:1, :, :1, :1])
    assert single.tolist() == [[[[0, 0, 0]]]]


def test_cutout() -> None:
    size = 4
    y = Cutout(size, value=300, generator=Generator(1))(FLOATS)
    erased = y == 300
    assert (y[~erased] == FLOATS[~erased]).all()
    assert (erased == erased[:, :1]).all(), "all channels"
    for image in erased[:, 0]:
        rows, columns = image.any(axis=1), image.any(axis=0)
        assert (image == rows[:, None] * columns).all(), "a rectangle"
        assert 2 <= rows.sum() <= size
        assert 2 <= columns.sum() <= size
    assert any(image.sum() == size * size for image in erased[:, 0])


def test_erasing() -> None:
    images = np.ones((3000, 1, 32, 32), np.float32)
    y = RandomErasing(0.25, (0.1, 0.3), (0.5, 2.0), generator=Generator(1))(images)
    areas = (y == 0).sum(axis=(1, 2, 3)) / 1024
    hit = areas > 0
    assert abs(hit.mean() - 0.25) < 0.04
    assert 0.08 < areas[hit].min() < 0.12
    assert 0.28 < areas[hit].max() < 0.32
    assert abs(areas[hit].mean() - 0.2) < 0.01
    for image in y[hit][:50, 0] == 0:
        rows, columns = image.any(axis=1), image.any(axis=0)
        assert (image == rows[:, None] * columns).all()
        assert 0.45 < rows.sum() / columns.sum() < 2.3
    whole = RandomErasing(1.0, (1.0, 1.0), (1.0, 1.0))(images[:2])
    assert (whole == 0).all()


def test_to_float() -> None:
    y = ToFloat()(IMAGES)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, IMAGES / np.float32(255))
    assert y.max() <= 1
    assert ToFloat("float64")(FLOATS).dtype == np.float64
    np.testing.assert_array_equal(ToFloat()(FLOATS), FLOATS)
    np.testing.assert_array_equal(ToFloat()(IMAGES.astype(np.int32)), FLOATS)
    with pytest.raises(DTypeError, match="int64 is no floating-point"):
        ToFloat("int64")


def test_normalize() -> None:
    y = Normalize([1.0, 2.0, 3.0], [2.0, 4.0, 0.5])(FLOATS)
    wanted = (FLOATS - np.array([1, 2, 3]).reshape(3, 1, 1)) / np.array([2, 4, 0.5]).reshape(
        3, 1, 1
    )
    np.testing.assert_allclose(y, wanted, rtol=1e-6)
    assert y.dtype == np.float32
    with pytest.raises(DTypeError, match=r"put ToFloat\(\) before it"):
        Normalize(0.5, 0.5)(IMAGES)
    with pytest.raises(ShapeError, match="2 numbers for images of 3 channels"):
        Normalize([0.1, 0.2], 1.0)(FLOATS)
    for std in (0.0, -1.0, [1.0, np.nan]):
        with pytest.raises(ParameterError, match="std is above 0"):
            Normalize(0.0, std)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: RandomHorizontalFlip(1.5), "probability from 0 to 1"),
        (lambda: RandomErasing(-0.1), "probability"),
        (lambda: RandomErasing(scale=(0.5, 0.2)), "scale is a range"),
        (lambda: RandomErasing(ratio=(0, 1)), "ratio is a range above 0"),
        (lambda: RandomCrop(0), "size is one or two numbers"),
        (lambda: RandomCrop((1, 2, 3)), "size is one or two numbers"),
        (lambda: RandomCrop(2, padding=-1), "padding is 1, 2 or 4 numbers"),
        (lambda: RandomCrop(2, padding=(1, 2, 3)), "padding is 1, 2 or 4 numbers"),
        (lambda: RandomCrop(2, padding_mode="wrap"), "padding_mode"),
        (lambda: Cutout(0), "size is at least 1"),
        (lambda: Cutout(3, generator=np.random.default_rng()), "generator"),
    ],
)
def test_parameters_that_cannot_be(make: Any, told: str) -> None:
    with pytest.raises(ParameterError, match=told):
        make()


def test_images_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"8 x 8 does not fit into images of 7 x 9"):
        RandomCrop(8)(IMAGES)
    with pytest.raises(ShapeError, match=r"Cutout: .* got \(7, 9\)"):
        Cutout(2)(IMAGES[0, 0])


def test_no_images() -> None:
    for name, make in MAKE.items():
        if name not in ("crop",):
            assert len(make(Generator(0))(IMAGES[:0])) == 0


def test_words_are_of_32_bits() -> None:
    from gpugrad.backend import backend_for_device

    assert int(words(backend_for_device("cpu"), 1000, 0, 0).max()) < 1 << 32


def test_reprs() -> None:
    assert repr(MAKE["all"](None)).startswith("Compose(ToFloat(), RandomCrop((7, 7), padding=")
