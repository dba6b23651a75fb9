"""The archives hold everything: real kernel files, the digits, the type marker."""

import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Results, and benchmarks that only run from a checkout.
CHECKOUT_ONLY = tuple(
    f"gpugrad/bench/{name}"
    for name in ("results/*", "test_*.py", "gpu_*.py", "guards.*", "against.py", "history.py")
)

pytest.importorskip("build", reason="builds the archives")
pytest.importorskip("hatchling", reason="builds the archives")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from the sdist."""
    folder = tmp_path_factory.mktemp("archives")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def wanted() -> set[str]:
    """Every file of the package in the checkout, through the links as well."""
    package = ROOT / "gpugrad"
    files = {path for path in package.rglob("*") if path.is_file()}
    for link in ("kernels", "bench"):
        files |= {path for path in (package / link).rglob("*") if path.is_file()}
    names = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    return {name for name in names if not any(fnmatch(name, p) for p in CHECKOUT_ONLY)}


def test_wheel_is_whole(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        infos = archive.infolist()
    held = {info.filename for info in infos}
    assert wanted() <= held
    assert {"gpugrad/kernels/__init__.py", "gpugrad/py.typed"} <= held
    assert {"gpugrad/bench/__init__.py", "gpugrad/bench/page.py"} <= held
    assert not [name for name in held if any(fnmatch(name, p) for p in CHECKOUT_ONLY)]
    assert any(name.startswith("gpugrad/data/digits/") for name in held)
    # 0o120000 is a link in the upper half of the attributes, as Unix writes them.
    assert not [info.filename for info in infos if info.external_attr >> 16 & 0o170000 == 0o120000]
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} == {"gpugrad"}


def test_sdist_is_whole(archives: Path) -> None:
    (sdist,) = archives.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    held = {member.name.split("/", 1)[1] for member in members}
    assert wanted() <= held
    assert {"pyproject.toml", "README.md", "LICENSE"} <= held
    assert not [member.name for member in members if member.issym() or member.islnk()]
