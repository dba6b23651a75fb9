"""Text: read from files, encoded as numbers, and cut into windows for training.

>>> from gpugrad.data.text import load_text
>>> text = load_text(limit=20_000)
>>> text.source
"the Python standard library's own sources"
>>> bool(text.vocabulary.decode(text.train[:3]))
True
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from gpugrad import io
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.data.errors import DataCorruptError, DataError, DataNotFoundError
from gpugrad.data.sources import Dataset, checked
from gpugrad.errors import ParameterError
from gpugrad.io.atomic import replace_file, sync_folder

__all__ = [
    "ByteVocabulary",
    "CharVocabulary",
    "SequenceDataset",
    "Text",
    "Vocabulary",
    "load_text",
    "load_vocabulary",
    "read_files",
]

#: Folders of the standard library that hold other people's code, or no code.
_NOT_THE_LIBRARY = frozenset(("site-packages", "dist-packages", "__pycache__", "test", "tests"))


# -- vocabularies ----------------------------------------------------------------------------------


class Vocabulary:
    """Text as numbers from 0 to ``size`` - 1, and back."""

    kind: ClassVar[str]
    size: int

    def __len__(self) -> int:
        return self.size

    def encode(self, text: str) -> NDArray[Any]:
        """The tokens of a text: unsigned integers, as narrow as they can be, shape [length]."""
        raise NotImplementedError

    def decode(self, tokens: Any) -> str:
        """The text of tokens: an array or a tensor of integers, or a list of them."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """What tells this vocabulary from others, for JSON."""
        return {"kind": self.kind}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary to a JSON file, atomically; :func:`load_vocabulary` reads it."""
        target = Path(os.path.realpath(path))
        content = json.dumps(self.to_dict(), ensure_ascii=False, indent=1).encode()
        try:
            replace_file(target, [content])
            sync_folder(target.parent)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size})"

    def _numbers(self, tokens: Any) -> NDArray[Any]:
        if isinstance(tokens, Tensor):
            tokens = tokens.detach().cpu().numpy()
        found = np.asarray(tokens).reshape(-1)
        if found.size:
            if found.dtype.kind not in "iu":
                raise DataError(f"{self!r}: tokens are integers, got {found.dtype}")
            for token in (found.min(), found.max()):
                if not 0 <= token < self.size:
                    raise DataError(f"{self!r}: there is no token {token}")
        return found.astype(np.int64)


class ByteVocabulary(Vocabulary):
    """The 256 bytes of UTF-8: every text has tokens.

    >>> ByteVocabulary().encode("aé")
    array([ 97, 195, 169], dtype=uint8)
    >>> ByteVocabulary().decode([97, 195, 169])
    'aé'
    """

    kind = "bytes"
    size = 256

    def encode(self, text: str) -> NDArray[np.uint8]:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, tokens: Any) -> str:
        # A window may begin or end within a character.
        return self._numbers(tokens).astype(np.uint8).tobytes().decode(errors="replace")


class CharVocabulary(Vocabulary):
    """The characters of a text, one token each, in the order of their code points.

    Parameters
    ----------
    characters:
        A text, or a collection of single characters; each counts once.
    unknown:
        One of them, that stands for every other character. Without, those are an error.

    >>> vocabulary = CharVocabulary("hello world")
    >>> vocabulary.characters, vocabulary.decode(vocabulary.encode("low"))
    (' dehlorw', 'low')
    """

    kind = "characters"

    def __init__(self, characters: str | Iterable[str], unknown: str | None = None) -> None:
        text = characters if isinstance(characters, str) else "".join(characters)
        self._codes = np.unique(_code_points(text))
        if not len(self._codes):
            raise DataError("CharVocabulary: no characters")
        self.characters = self._codes.tobytes().decode("utf-32-le", "surrogatepass")
        self.size = len(self._codes)
        if unknown is not None and unknown not in self.characters:
            raise DataError(f"CharVocabulary: unknown={unknown!r} is not one of the characters")
        self.unknown = unknown
        # Code point to token; the last place stands for every code point beyond.
        self._table = np.full(int(self._codes[-1]) + 2, self.size, np.int32)
        self._table[self._codes] = np.arange(self.size)

    def encode(self, text: str) -> NDArray[Any]:
        codes = _code_points(text)
        tokens = self._table[np.minimum(codes, len(self._table) - 1)]
        strange = tokens == self.size
        if strange.any():
            if self.unknown is None:
                first = int(np.argmax(strange))
                raise DataError(
                    f"{self!r}: has no {text[first]!r}, which is at position {first}; build the "
                    "vocabulary from all of the text, or give it unknown="
                )
            tokens[strange] = self.characters.index(self.unknown)
        return tokens.astype(np.min_scalar_type(self.size - 1))

    def decode(self, tokens: Any) -> str:
        text: bytes = self._codes[self._numbers(tokens)].tobytes()
        return text.decode("utf-32-le", "surrogatepass")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters, "unknown": self.unknown}


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32)


def load_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary that :meth:`Vocabulary.save` wrote.

    Raises DataNotFoundError, and DataCorruptError for any other file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataNotFoundError(f"{path}: no such vocabulary") from None
    except (OSError, ValueError) as error:
        raise DataCorruptError(f"{path}: not a vocabulary: {error}") from error
    return vocabulary_from(content, str(path))


def vocabulary_from(content: Any, where: str) -> Vocabulary:
    match content:
        case {"kind": "bytes"}:
            return ByteVocabulary()
        case {"kind": "characters", "characters": str() as characters, "unknown": unknown}:
            return CharVocabulary(characters, unknown)
    raise DataCorruptError(f"{where}: not a vocabulary that Vocabulary.save has written")


# -- reading ---------------------------------------------------------------------------------------


def read_files(
    path: str | os.PathLike[str] | None = None,
    *,
    pattern: str | None = None,
    limit: int | None = None,
) -> Iterator[tuple[str, str]]:
    """Names and texts of a file, of every file in a folder, or of the standard library's modules.

    Parameters
    ----------
    path:
        A file, or a folder, whose files come sorted by their paths below it. None is Python's
        standard library without its tests: a few hundred files of ``*.py``.
    pattern:
        Which files of a folder, such as ``"*.txt"``; by default all of them.
    limit:
        After this many characters the text ends, within a file where it must.

    Files that are not UTF-8 are passed over in folders.

    Raises
    ------
    DataNotFoundError
        There is nothing at the path, or a file vanished while the folder was being read.
    DataCorruptError
        A file that was named is not UTF-8; the message says where.

    >>> next(read_files())[0]
    '__future__.py'
    """
    if limit is not None and operator.index(limit) < 1:
        raise ParameterError(f"limit is at least 1, got {limit}")
    left = limit
    for name, file, named in _files(path, pattern):
        try:
            text = file.read_bytes().decode()
        except FileNotFoundError:
            raise DataNotFoundError(f"{file}: no such file") from None
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            if not named:
                continue
            raise DataCorruptError(
                f"{file}: is not UTF-8 text: {error.reason} at byte {error.start}"
            ) from error
        if left is not None:
            text = text[:left]
            left -= len(text)
        if text:
            yield name, text
        if left == 0:
            return


def _files(
    path: str | os.PathLike[str] | None, pattern: str | None
) -> Iterator[tuple[str, Path, bool]]:
    """Name, path, and whether it was asked for by name, of every file that is to be read."""
    library = path is None
    root = Path(sysconfig.get_path("stdlib")) if path is None else Path(path)
    if root.is_file():
        yield root.name, root, True
        return
    if not root.is_dir():
        raise DataNotFoundError(f"{root}: no such file or folder")
    pattern = pattern or ("*.py" if library else "*")
    found = {}
    passed_over = _NOT_THE_LIBRARY if library else frozenset()
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name for name in folders if not name.startswith(".") and name not in passed_over
        ]
        for file in files:
            if not file.startswith(".") and fnmatch(file, pattern):
                path = Path(folder, file)
                if path.is_file():  # and no pipe, which would be waited for
                    found[path.relative_to(root).as_posix()] = path
    if not found:
        raise DataNotFoundError(f"{root}: no files {pattern} in this folder")
    for name in sorted(found):
        yield name, found[name], False


@dataclass(frozen=True, eq=False)
class Text:
    """Tokens to train on and tokens to validate with.

    `train` and `validation` are arrays of unsigned integers, perhaps views of a file.
    """

    train: NDArray[Any]
    validation: NDArray[Any]
    vocabulary: Vocabulary
    source: str


def load_text(
    path: str | os.PathLike[str] | None = None,
    *,
    vocabulary: str | Vocabulary = "characters",
    pattern: str | None = None,
    limit: int | None = None,
    validation: float = 0.1,
    split: str = "tail",
    cache: str | os.PathLike[str] | None = None,
) -> Text:
    """Read text, encode it, and set a part apart for validation.

    Parameters
    ----------
    path, pattern, limit:
        What to read, as :func:`read_files` has them: by default Python's standard library.
    vocabulary:
        ``"characters"``, those of all of the text; ``"bytes"``; or a vocabulary.
    validation:
        The share of the text that is set apart, from 0 to 1.
    split:
        ``"tail"`` sets the end of the text apart; ``"files"`` whole files, every n-th, so that both
        parts have files of all kinds.
    cache:
        A folder for the tokens, which are then views of a file in it: the second time nothing is
        encoded. Names, sizes and times of the files decide whether the tokens still hold.

    Raises
    ------
    DataError
        What :func:`read_files` raises; text that is empty, or too short to be split; and
        characters that a given vocabulary does not have.
    """
    if not 0 <= validation < 1:
        raise ParameterError(f"validation is a share from 0 up to 1, got {validation}")
    if split not in ("tail", "files"):
        raise ParameterError(f"split is 'tail' or 'files', got {split!r}")
    if isinstance(vocabulary, str) and vocabulary not in ("characters", "bytes"):
        raise ParameterError(
            f"vocabulary is 'characters', 'bytes' or a Vocabulary, got {vocabulary!r}"
        )
    source = "the Python standard library's own sources" if path is None else os.fspath(path)
    options: dict[str, Any] = {"limit": limit, "validation": validation, "split": split}
    options["vocabulary"] = vocabulary if isinstance(vocabulary, str) else vocabulary.to_dict()
    kept = None if cache is None else _cache_file(Path(cache), path, pattern, options)
    if kept is not None and (text := _from_cache(kept, source)) is not None:
        return text
    text = _encoded(
        list(read_files(path, pattern=pattern, limit=limit)), vocabulary, options, source
    )
    if kept is None:
        return text
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{kept.parent}: cannot make this folder: {error.strerror or error}"
        ) from error
    arrays = {"train": text.train, "validation": text.validation}
    io.save(kept, arrays, {"vocabulary": json.dumps(text.vocabulary.to_dict())})
    return _from_cache(kept, source) or text


def _encoded(
    files: list[tuple[str, str]],
    vocabulary: str | Vocabulary,
    options: Mapping[str, Any],
    source: str,
) -> Text:
    share = options["validation"]
    if share and options["split"] == "files":
        every = max(2, round(1 / share))
        parts = [
            "".join(text for i, (_, text) in enumerate(files) if (i % every == every - 1) == last)
            for last in (False, True)
        ]
    else:
        whole = "".join(text for _, text in files)
        at = len(whole) - round(len(whole) * share)
        parts = [whole[:at], whole[at:]]
    if not parts[0] or (share and not parts[1]):
        raise DataError(
            f"{source}: {len(files)} files with {sum(len(text) for _, text in files)} characters "
            f"are too few for a share of {share:g} to be set apart by {options['split']!r}"
        )
    if vocabulary == "bytes":
        vocabulary = ByteVocabulary()
    elif isinstance(vocabulary, str):
        vocabulary = CharVocabulary("".join(map("".join, map(set, parts))))
    train, apart = (vocabulary.encode(part) for part in parts)
    return Text(train, apart, vocabulary, source)


def _cache_file(folder: Path, path: Any, pattern: str | None, options: Mapping[str, Any]) -> Path:
    """Where the tokens of these files, read with these options, are kept."""
    digest = hashlib.sha256(json.dumps([1, options], sort_keys=True).encode())
    for name, file, _ in _files(path, pattern):
        try:
            status = file.stat()
        except OSError as error:
            raise DataNotFoundError(f"{file}: {error.strerror or error}") from None
        entry = [str(file), name, status.st_size, status.st_mtime_ns]
        digest.update(json.dumps(entry).encode())
    return folder / f"text-{digest.hexdigest()[:32]}.safetensors"


def _from_cache(file: Path, source: str) -> Text | None:
    """The tokens in a file of the cache; None when there is none, or it is of no use."""
    try:
        tokens, metadata = io.load(file, names=("train", "validation"), mmap=True)
        vocabulary = vocabulary_from(json.loads(metadata["vocabulary"]), str(file))
    except (io.CheckpointError, DataError, KeyError, ValueError):
        return None
    return Text(tokens["train"], tokens["validation"], vocabulary, source)


# -- windows ---------------------------------------------------------------------------------------


class SequenceDataset(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a long row of tokens: what is read, and at every place the token that follows.

    Example i is the pair of ``tokens[i * stride : i * stride + length]`` and the same one place
    further on, both int64, as embeddings and losses take them.

    Parameters
    ----------
    tokens:
        Integers of shape [n], on the host; a view of a file is read where it is needed.
    length:
        Tokens in one window.
    stride:
        How far the next window begins from this one: ``length`` by default, so that every token is
        predicted once; 1 for a window at every place.

    Raises
    ------
    DataError
        Tokens that are not integers in a row, or too few for one window.

    >>> windows = SequenceDataset(np.arange(8), length=3)
    >>> len(windows), windows[1]
    (2, (tensor([3, 4, 5]), tensor([4, 5, 6])))
    """

    def __init__(self, tokens: Any, length: int, stride: int | None = None) -> None:
        if isinstance(tokens, Tensor):
            tokens = tokens.detach().cpu().numpy()
        self.tokens = np.asarray(tokens)
        self.length = operator.index(length)
        self.stride = self.length if stride is None else operator.index(stride)
        if self.length < 1 or self.stride < 1:
            raise ParameterError(
                f"SequenceDataset: length and stride are at least 1, got {length} and {stride}"
            )
        if self.tokens.ndim != 1 or self.tokens.dtype.kind not in "iu":
            raise DataError(
                "SequenceDataset: tokens are integers of shape [n], got "
                f"{self.tokens.dtype} of shape {self.tokens.shape}"
            )
        if len(self.tokens) <= self.length:
            raise DataError(
                f"SequenceDataset: {len(self.tokens)} tokens are too few for one window of "
                f"{self.length} and the token that follows"
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1 - self.length) // self.stride + 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.get_batch([index])
        return x[0], y[0]

    def get_batch(self, indices: Any) -> tuple[Tensor, Tensor]:
        """The windows of these indices, two tensors of shape [len(indices), length]."""
        starts = checked(indices, len(self)) * self.stride
        windows = self.tokens[starts[:, None] + np.arange(self.length + 1)].astype(np.int64)
        return tensor_of(windows[:, :-1].copy()), tensor_of(windows[:, 1:].copy())
