"""What the command says about itself, and what it says where its libraries are missing."""

import subprocess
import sys
from pathlib import Path

import pytest

import gpugrad
from gpugrad.cli import main

ROOT = Path(__file__).parents[2]


def test_info(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert gpugrad.__version__ in said
    assert "Python" in said
    assert "NumPy" in said
    assert "numpy" in said
    assert "cupy" in said


def test_version_and_help(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gpugrad {gpugrad.__version__}\n"
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["fly"]) == 2


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_libraries(missing) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import gpugrad\nfrom gpugrad.cli import main\nsys.exit(main(['info']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "pip install 'gpugrad[cli]'" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_library_does_not_load_them() -> None:
    code = "import gpugrad, sys; print([m for m in ('typer', 'rich') if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout == "[]\n"
