"""Run the tests marked gpu: with pytest where it is installed, else with the few lines below."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARK = "gpu"


#: What a quick check leaves out: cases of other dtypes than float32.
SLOW = "not float16 and not bfloat16 and not float64"


def run(notes: Any, folder: Path, quick: bool = False) -> None:
    """Run them and note one line per test as it ends."""
    if importlib.util.find_spec("pytest"):
        with_pytest(notes, folder, SLOW if quick else "")
    else:
        notes.put(runner="pytest is not installed: fallback, tests with fixtures are left out")
        without_pytest(notes, folder)


def marked(folder: Path) -> list[Path]:
    """The test files that mention the mark: collecting all the others takes longer than these."""
    return [path for path in sorted(folder.rglob("test_*.py"))
            if f"mark.{MARK}" in path.read_text(encoding="utf-8")]  # fmt: skip


class Recorder:
    """A plugin that notes outcomes while pytest runs, so that a time limit costs only the rest."""

    def __init__(self, notes: Any) -> None:
        self.notes = notes

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = ""
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                why = str(getattr(crash, "message", report.longrepr)).strip()
            elif report.skipped and isinstance(report.longrepr, tuple):
                why = str(report.longrepr[2])
            self.note(report.nodeid, report.outcome if report.when == "call" or report.skipped
                      else "error", why, report.duration)  # fmt: skip

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.note(report.nodeid, "not collected", str(report.longrepr)[-300:], 0.0)

    def note(self, name: str, outcome: str, why: str, seconds: float) -> None:
        why = " ".join(why.split())[:300]
        self.notes.add("tests", {"name": name, "outcome": outcome, "why": why,
                                 "seconds": round(seconds, 3)})  # fmt: skip


def with_pytest(notes: Any, folder: Path, chosen: str = "") -> None:
    """pytest, with settings of its own: a warning of the machine's CuPy is no failure of ours."""
    import pytest

    os.environ.pop("PYTEST_ADDOPTS", None)  # the caller's are for its own pytest
    code = pytest.main(
        [*map(str, marked(folder)), "-m", MARK, "-k", chosen, "-q",
         "-o", "addopts=--import-mode=importlib",
         "-o", "minversion=1.0", "-o", "filterwarnings=default", "-p", "no:cacheprovider",
         "-p", "no:xdist", "--continue-on-collection-errors", f"--rootdir={folder.parent}",
         "-c", str(folder.parent / "pyproject.toml")],
        plugins=[Recorder(notes)],
    )  # fmt: skip
    meaning = {0: "ran", 1: "some failed or were not collected", 5: "no test is marked gpu"}
    notes.put(runner="pytest " + pytest.__version__, exit=int(code),
              summary=meaning.get(int(code), f"pytest ended with {int(code)}"))  # fmt: skip


# -- without pytest -------------------------------------------------------------------------------


class Skipped(Exception):
    """A test that does not apply here."""


class Mark:
    """``pytest.mark.anything(...)``: remembered on the function, for a module in a list."""

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name, self.args = name, args

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and inspect.isfunction(args[0]) and not kwargs:
            args[0].marks = [*getattr(args[0], "marks", []), self]  # type: ignore[attr-defined]
            return args[0]
        return Mark(self.name, args)


class _Marks:
    def __getattr__(self, name: str) -> Mark:
        return Mark(name)


class _Raises:
    def __init__(self, expected: Any, match: str | None = None) -> None:
        self.expected, self.match = expected, match
        self.value: BaseException | None = None

    def __enter__(self) -> _Raises:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        import re

        if kind is None:
            raise AssertionError(f"did not raise {self.expected}")
        self.value = error
        if not issubclass(kind, self.expected):
            return False
        if self.match and not re.search(self.match, str(error)):
            raise AssertionError(f"{self.match!r} is not in {str(error)!r}")
        return True


def _skip(reason: str = "", **_: Any) -> None:
    raise Skipped(reason)


def _importorskip(name: str, **_: Any) -> Any:
    if not importlib.util.find_spec(name):
        raise Skipped(f"{name} is not installed")
    return importlib.import_module(name)


def stand_in() -> types.ModuleType:
    """A module that answers for pytest as far as simple tests ask."""
    module = types.ModuleType("pytest")

    def fixture(*args: Any, **_: Any) -> Any:
        return args[0] if args and callable(args[0]) else lambda function: function

    for name, value in {
        "mark": _Marks(), "raises": _Raises, "skip": _skip, "importorskip": _importorskip,
        "fixture": fixture, "param": lambda *values, **_: values if len(values) > 1 else values[0],
    }.items():  # fmt: skip
        setattr(module, name, value)
    return module


def without_pytest(notes: Any, folder: Path) -> None:
    """Import each test file that mentions the mark and call its marked functions."""
    sys.modules["pytest"] = stand_in()
    sys.path.insert(0, str(folder.parent))
    note = Recorder(notes).note
    for path in marked(folder):
        name = str(path.relative_to(folder.parent))
        try:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except Exception as error:
            note(name, "not collected", f"{type(error).__name__}: {error}", 0.0)
            continue
        whole = getattr(module, "pytestmark", [])
        whole = whole if isinstance(whole, list) else [whole]
        for title, function in vars(module).items():
            marks = [*getattr(function, "marks", []), *whole]
            if title.startswith("test") and any(m.name == MARK for m in marks):
                call(note, f"{name}::{title}", function, marks)
    notes.put(summary="ran by the fallback runner")


def cases(marks: list[Any]) -> Iterator[dict[str, Any]]:
    """Every combination of what ``parametrize`` lists."""
    axes = []
    for mark in marks:
        if mark.name == "parametrize":
            keys = mark.args[0]
            keys = [k.strip() for k in keys.split(",")] if isinstance(keys, str) else list(keys)
            axes.append([dict(zip(keys, v if len(keys) > 1 else [v], strict=True))
                         for v in mark.args[1]])  # fmt: skip
    for chosen in itertools.product(*axes):
        yield {k: v for part in chosen for k, v in part.items()}


def call(note: Any, name: str, function: Any, marks: list[Any]) -> None:
    """One test function with all its parameters."""
    for number, case in enumerate(cases(marks)):
        title = f"{name}[{number}]" if case else name
        wanted = set(inspect.signature(function).parameters) - set(case)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                if wanted == {"tmp_path"}:
                    case["tmp_path"] = Path(scratch)
                elif wanted:
                    raise Skipped(f"the fallback runner has no fixtures {sorted(wanted)}")
                function(**case)
            note(title, "passed", "", 0.0)
        except Skipped as reason:
            note(title, "skipped", str(reason), 0.0)
        except Exception as error:
            note(title, "failed", f"{type(error).__name__}: {error}", 0.0)
