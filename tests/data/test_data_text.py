"""Text: vocabularies, reading files, caching tokens, windows."""

from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpugrad as gg
from gpugrad.data import (
    DataCorruptError,
    DataError,
    DataLoader,
    DataNotFoundError,
    RandomSampler,
    SequenceDataset,
)
from gpugrad.data.text import (
    ByteVocabulary,
    CharVocabulary,
    load_text,
    load_vocabulary,
    read_files,
)
from gpugrad.errors import ParameterError
from gpugrad.nn import Generator

# vocabularies


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    try:
        tokens = ByteVocabulary().encode(text)
    except UnicodeEncodeError:
        return  # half of a pair of surrogates
    assert ByteVocabulary().decode(tokens) == text
    assert tokens.dtype == np.uint8


@given(st.text(min_size=1))
def test_characters_round_trip(text: str) -> None:
    vocabulary = CharVocabulary(text)
    assert vocabulary.characters == "".join(sorted(set(text)))
    tokens = vocabulary.encode(text)
    assert vocabulary.decode(tokens) == text
    assert len(tokens) == len(text)


def test_tokens_are_narrow_and_of_any_kind_to_decode() -> None:
    vocabulary = CharVocabulary("abc")
    assert vocabulary.encode("cab").dtype == np.uint8
    assert vocabulary.encode("").shape == (0,)
    many = CharVocabulary(map(chr, range(1000, 2000)))
    assert many.encode(chr(1999)).tolist() == [999]
    assert many.encode(chr(1999)).dtype == np.uint16
    for tokens in ([2, 0, 1], np.array([2, 0, 1]), gg.tensor([2, 0, 1]), np.array([[2], [0], [1]])):
        assert vocabulary.decode(tokens) == "cab"
    assert vocabulary.decode([]) == ""
    assert (len(vocabulary), repr(vocabulary)) == (3, "CharVocabulary(size=3)")
    for tokens in ([3], [-1], [0.5]):
        with pytest.raises(DataError, match=r"no token|integers"):
            vocabulary.decode(tokens)
    assert ByteVocabulary().decode([0xC3]) == "�"


def test_unknown_characters() -> None:
    with pytest.raises(DataError, match="has no 'x', which is at position 2"):
        CharVocabulary("abc").encode("abx")
    with pytest.raises(DataError, match="has no '𝄞'"):
        CharVocabulary("abc").encode("𝄞")
    vocabulary = CharVocabulary("abc?", unknown="?")
    assert vocabulary.decode(vocabulary.encode("a𝄞bx")) == "a?b?"
    with pytest.raises(DataError, match="is not one of"):
        CharVocabulary("abc", unknown="?")
    with pytest.raises(DataError, match="no characters"):
        CharVocabulary("")


@pytest.mark.parametrize("vocabulary", [ByteVocabulary(), CharVocabulary("hé𝄞\n", unknown="\n")])
def test_vocabularies_in_files(tmp_path: Path, vocabulary: Any) -> None:
    vocabulary.save(tmp_path / "v.json")
    assert load_vocabulary(tmp_path / "v.json") == vocabulary
    assert [p.name for p in tmp_path.iterdir()] == ["v.json"]
    assert hash(load_vocabulary(tmp_path / "v.json")) == hash(vocabulary)
    with pytest.raises(DataError, match="cannot be written"):
        vocabulary.save(tmp_path / "gone" / "v.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "words"}', '{"kind": "characters"}'])
def test_files_that_are_no_vocabularies(tmp_path: Path, text: str) -> None:
    (tmp_path / "v").write_text(text)
    with pytest.raises(DataCorruptError, match="not a vocabulary"):
        load_vocabulary(tmp_path / "v")
    with pytest.raises(DataNotFoundError):
        load_vocabulary(tmp_path / "w")


# reading


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


FILES = {
    "b.txt": "second",
    "a/z.txt": "first",
    "c.md": "third",
    ".hidden": "no",
    ".git/x.txt": "no",
    "binary": b"\xff\xfe\x00",
    "empty.txt": "",
}


def test_a_folder(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    found = list(read_files(tmp_path))
    assert found == [("a/z.txt", "first"), ("b.txt", "second"), ("c.md", "third")]
    assert [name for name, _ in read_files(tmp_path, pattern="*.txt")] == ["a/z.txt", "b.txt"]
    assert list(read_files(tmp_path, limit=8)) == [("a/z.txt", "first"), ("b.txt", "sec")]
    assert list(read_files(tmp_path, limit=5)) == [("a/z.txt", "first")]
    with pytest.raises(DataNotFoundError, match=r"no files \*\.rst"):
        list(read_files(tmp_path, pattern="*.rst"))


def test_a_file(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    assert list(read_files(tmp_path / "c.md")) == [("c.md", "third")]
    with pytest.raises(DataCorruptError, match=r"binary: is not UTF-8 text: .* at byte 0"):
        list(read_files(tmp_path / "binary"))
    with pytest.raises(DataNotFoundError, match="no such file or folder"):
        list(read_files(tmp_path / "gone"))
    with pytest.raises(ParameterError, match="limit"):
        list(read_files(tmp_path, limit=0))


def test_a_file_that_vanishes_while_others_are_read(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    files = read_files(tmp_path)
    next(files)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataNotFoundError, match=r"b\.txt: no such file"):
        next(files)


def test_pipes_and_broken_links_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert len(list(read_files(tmp_path))) == 3


def test_the_standard_library() -> None:
    names = [name for name, _ in read_files(limit=3_000_000)]
    assert names == sorted(names)
    assert "__future__.py" in names
    assert all(name.endswith(".py") for name in names)
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    root = Path(sysconfig.get_path("stdlib"))
    assert (root / names[-1]).is_file()


# tokens


def test_text_by_its_tail(tmp_path: Path) -> None:
    write(tmp_path, {"a": "0123456789", "b": "abcdefghij"})
    text = load_text(tmp_path, validation=0.25)
    assert text.vocabulary.decode(text.train) == "0123456789abcde"
    assert text.vocabulary.decode(text.validation) == "fghij"
    assert text.vocabulary.size == 20
    assert text.source == str(tmp_path)
    assert len(load_text(tmp_path, validation=0).validation) == 0


def test_text_by_files(tmp_path: Path) -> None:
    write(tmp_path, {f"{i}": str(i) * 3 for i in range(10)})
    text = load_text(tmp_path, validation=0.2, split="files")
    assert text.vocabulary.decode(text.validation) == "444999"
    assert text.vocabulary.decode(text.train) == "000111222333555666777888"


def test_text_as_bytes_and_with_a_given_vocabulary(tmp_path: Path) -> None:
    write(tmp_path, {"a": "aé" * 10})
    text = load_text(tmp_path / "a", vocabulary="bytes")
    assert text.vocabulary == ByteVocabulary()
    assert len(text.train) == 27
    given = CharVocabulary("aé ")
    assert load_text(tmp_path / "a", vocabulary=given).vocabulary is given
    with pytest.raises(DataError, match="has no 'é'"):
        load_text(tmp_path / "a", vocabulary=CharVocabulary("a"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"validation": 1.0}, "share"),
        ({"validation": -0.1}, "share"),
        ({"split": "random"}, "split is"),
        ({"vocabulary": "words"}, "vocabulary is"),
    ],
)
def test_options_that_cannot_be(options: Any, told: str) -> None:
    with pytest.raises(ParameterError, match=told):
        load_text(**options)


def test_too_little_text(tmp_path: Path) -> None:
    write(tmp_path, {"a": "x", "e": ""})
    for path, options in (
        ("a", {}),
        ("e", {}),
        ("e", {"validation": 0}),
        ("a", {"split": "files"}),
    ):
        with pytest.raises(DataError, match="too few"):
            load_text(tmp_path / path, **options)


def test_tokens_are_kept(tmp_path: Path) -> None:
    source, cache = write(tmp_path / "text", {"a": "abcdefghij", "b": "klm"}), tmp_path / "cache"
    first = load_text(source, cache=cache)
    again = load_text(source, cache=cache)
    (file,) = cache.iterdir()
    for text in (first, again):
        assert text.vocabulary.decode(text.train) + text.vocabulary.decode(text.validation) == (
            "abcdefghijklm"
        )
        assert not text.train.flags.writeable  # a view of the file
        assert text.vocabulary == first.vocabulary
    before = file.stat().st_mtime_ns
    load_text(source, cache=cache)
    assert file.stat().st_mtime_ns == before
    # Other options, and other files, are other tokens.
    load_text(source, cache=cache, vocabulary="bytes")
    load_text(source, cache=cache, limit=11)
    assert len(list(cache.iterdir())) == 3
    (source / "b").write_text("xyz!")
    text = load_text(source, cache=cache, validation=0)
    assert text.vocabulary.decode(text.train) == "abcdefghijxyz!"


def test_kept_tokens_that_are_damaged_are_made_anew(tmp_path: Path) -> None:
    source, cache = write(tmp_path / "text", {"a": "abcdefghij"}), tmp_path / "cache"
    load_text(source, cache=cache)
    (file,) = cache.iterdir()
    for content in (b"", file.read_bytes()[:-1], b"x" * 100):
        file.write_bytes(content)
        text = load_text(source, cache=cache)
        assert text.vocabulary.decode(text.train) == "abcdefghi"
    cache_file = tmp_path / "file"
    cache_file.touch()
    with pytest.raises(DataError, match="cannot make this folder"):
        load_text(source, cache=cache_file / "x")


# windows


@pytest.mark.parametrize("stride", [None, 1, 2, 5])
@pytest.mark.parametrize("n", [6, 7, 10, 11, 23])
def test_windows(n: int, stride: int | None) -> None:
    length, step = 5, stride or 5
    tokens = np.random.default_rng(0).integers(0, 200, n).astype(np.uint8)
    windows = SequenceDataset(tokens, length, stride)
    wanted = [
        (tokens[i : i + length].tolist(), tokens[i + 1 : i + 1 + length].tolist())
        for i in range(0, n, step)
        if i + length + 1 <= n
    ]
    assert len(windows) == len(wanted)
    for i, (x, y) in enumerate(wanted):
        assert windows[i][0].numpy().tolist() == x
        assert windows[i][1].numpy().tolist() == y
    x, y = windows.get_batch(range(len(wanted)))
    assert x.dtype == y.dtype == np.int64
    assert x.numpy().tolist() == [a for a, _ in wanted]
    assert y.numpy().tolist() == [b for _, b in wanted]


def test_windows_in_a_loader() -> None:
    windows = SequenceDataset(gg.arange(1000), 8, stride=1)
    sampler = RandomSampler(windows, replacement=True, num_samples=64, generator=Generator(0))
    batches = list(DataLoader(windows, 16, sampler=sampler, num_workers=2))
    assert [x.shape for x, _ in batches] == [(16, 8)] * 4
    for x, y in batches:
        assert (y.numpy() == x.numpy() + 1).all()


def test_tokens_that_cannot_be_cut() -> None:
    with pytest.raises(DataError, match=r"5 tokens are too few for one window of 5"):
        SequenceDataset(np.arange(5), 5)
    with pytest.raises(DataError, match="float64"):
        SequenceDataset(np.zeros(9), 3)
    with pytest.raises(DataError, match=r"shape \(3, 3\)"):
        SequenceDataset(np.zeros((3, 3), int), 2)
    for length, stride in ((0, 1), (2, 0)):
        with pytest.raises(ParameterError, match="at least 1"):
            SequenceDataset(np.arange(9), length, stride)
    with pytest.raises(IndexError):
        SequenceDataset(np.arange(9), 2)[4]


def test_a_kept_file_is_a_checkpoint_like_others(tmp_path: Path) -> None:
    from gpugrad import io

    write(tmp_path, {"text": "abcabcabca"})
    load_text(tmp_path / "text", cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    tensors, metadata = io.load(file)
    assert sorted(tensors) == ["train", "validation"]
    assert json.loads(metadata["vocabulary"])["characters"] == "abc"
