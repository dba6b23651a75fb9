"""The pages for people: their examples run and print what they say, their links lead somewhere.

In one page the ```python blocks run in order, in one namespace. A ```text block right after one
is what it prints. The ```sh blocks of README.md are run by .ci/run.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), ROOT / "gpugrad/health/README.md"])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(match[1], match[2]) for match in FENCE.finditer(page.read_text(encoding="utf-8"))]


def script(page: Path) -> tuple[str, list[str]]:
    """One program that runs the page's examples, and what each should print ("" if unsaid)."""
    found = blocks(page)
    codes = [i for i, (language, _) in enumerate(found) if language == "python"]
    follow = [found[i + 1] if i + 1 < len(found) else ("", "") for i in codes]
    sources = [found[i][1] for i in codes]
    program = f"for source in {sources!r}:\n    exec(source)\n    print({MARK!r})\n"
    return program, [text if language == "text" else "" for language, text in follow]


MARK = "---- end of example ----"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page: Path) -> None:
    program, expected = script(page)
    if not expected:
        return
    # A process of its own: an example may register a primitive or a kernel.
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    printed = run.stdout.split(MARK + "\n")
    for text, said in zip(printed, expected, strict=False):
        assert not said or text.split() == said.split()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_nothing_private_or_unfinished(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"(?<!\w)/(?:home|root|Users)/\S*", text), "a path of one machine"
    assert not re.findall(r"\b(?:TODO|FIXME|XXX|TBD)\b", text)


def test_readme_has_its_two_commands() -> None:
    commands = [text.strip() for language, text in blocks(ROOT / "README.md") if language == "sh"]
    assert len(commands) >= 2
    assert commands[0].endswith("gpugrad train digits")
    assert commands[1].endswith("python -m pytest")
    assert all("\n" not in command for command in commands[:2]), "one command each"


#: The imports of the script for both libraries, ours and PyTorch's.
IMPORTS = {
    "import gpugrad as torch": "import torch",
    "from gpugrad import nn, optim": "from torch import nn, optim",
    "from gpugrad.data import DataLoader, TensorDataset": (
        "from torch.utils.data import DataLoader, TensorDataset"
    ),
    "from gpugrad.nn import functional as F": "from torch.nn import functional as F",
}


@pytest.mark.torch
def test_a_script_for_pytorch_differs_in_its_imports_only() -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    found = blocks(ROOT / "README.md")
    at = next(i for i, (_, text) in enumerate(found) if "class Net(nn.Module)" in text)
    lines = found[at][1].splitlines()
    assert lines[: len(IMPORTS)] == list(IMPORTS)
    theirs = "\n".join(IMPORTS.get(line, line) for line in lines)
    run = subprocess.run(
        [sys.executable, "-c", theirs], capture_output=True, text=True, cwd=ROOT, timeout=300,
        check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout == found[at + 1][1]
