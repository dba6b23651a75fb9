"""The checks on every supported Python: `nox -l` lists them, `nox -s lint types` runs two.

`tests` runs on the oldest and on the newest libraries that pyproject.toml allows.
"""

import os
import re
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["tests", "lint", "types", "package"]

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml("pyproject.toml")["project"]
PYTHONS = ["3.11", "3.12", "3.13"]

# The shims of pyenv answer only for the versions that are switched on, so its versions go first.
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
os.environ["PATH"] = os.pathsep.join(
    [*(str(path) for name in PYTHONS for path in PYENV.glob(f"{name}.*/bin")), os.environ["PATH"]]
)


def floors() -> list[str]:
    """The base dependencies, each at its oldest version."""
    return [re.sub(">=", "==", requirement) for requirement in PROJECT["dependencies"]]


@nox.session(python=PYTHONS)
@nox.parametrize("libraries", ["oldest", "newest"])
def tests(session: nox.Session, libraries: str) -> None:
    """The tests, on one Python and one age of libraries."""
    pins = floors() if libraries == "oldest" else ["numpy>=2,<3"]
    # One install, so that the pins bind whatever the extra brings along.
    session.install("-e", ".[test]", *pins, "--upgrade", "--upgrade-strategy", "eager")
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "loadfile", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and format."""
    session.install(*development("ruff"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict."""
    session.install("-e", ".[dev,bench]")
    session.run("mypy", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """Build the archives, install the wheel, and look at it from an empty folder."""
    session.install("build")
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--outdir", folder, ".")
        (wheel,) = Path(folder).glob("*.whl")
        session.install(f"{wheel}[cli]")
        session.chdir(folder)
        session.run("python", str(ROOT / "tests/packaging/check_installed.py"))
        session.run("gpugrad", "info")


@nox.session
def bench(session: nox.Session) -> None:
    """The CPU benchmarks; `nox -s bench -- --quick` only tries them."""
    session.install("-e", ".[bench]")
    session.run("python", "bench/run.py", *session.posargs)


def development(*names: str) -> list[str]:
    """The named requirements of the dev extra, with the versions that stand there."""
    extra = PROJECT["optional-dependencies"]["dev"]
    return [line for line in extra if re.split("[<>=~]", line)[0] in names]
