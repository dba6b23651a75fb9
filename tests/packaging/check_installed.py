"""Look at an installed gpugrad from outside the repository: are all its files there?

    cd /an/empty/folder && python check_installed.py

The checks of the wheel run this with the Python of a clean environment.
"""

from importlib import metadata
from pathlib import Path


def check() -> str:
    import gpugrad
    import gpugrad.kernels

    package = Path(gpugrad.__file__).parent
    checkout = Path(__file__).parents[2]
    assert package.resolve() != checkout / "gpugrad", "this is the checkout itself"
    assert gpugrad.__version__ == metadata.version("gpugrad")

    assert not (package / "kernels").is_symlink()
    import gpugrad.bench.runner
    import gpugrad.bench.workload

    assert not (package / "bench").is_symlink()
    assert package.parent == gpugrad.bench.common.ROOT
    assert gpugrad.bench.workload.workloads()
    for folder in ("kernels", "data/digits"):
        here = names(checkout / "gpugrad" / folder)
        missing = here - names(package / folder)
        assert here, f"gpugrad/{folder} is empty in the checkout"
        assert not missing, f"not in the wheel: {sorted(missing)} of gpugrad/{folder}"
    assert (package / "py.typed").is_file()
    return f"gpugrad {gpugrad.__version__} in {package}: kernels, benchmarks, digits are there"


def names(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


if __name__ == "__main__":
    print(check())
