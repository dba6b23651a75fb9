"""Imports point one way, kernels are loaded only when needed, and the core names no library.

The rules stand in the tables below. The checker reads source text and imports nothing, so it also
sees an import that stands inside a function or under TYPE_CHECKING.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "gpugrad"

# A package may import itself and every package to its left.
LAYERS = (
    ("backend",),
    ("core",),
    ("ops",),
    ("nn", "clip"),
    ("models", "optim", "health"),
    ("data", "io", "distributed"),
    ("cli", "bench"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Neighbours on one level do not know each other, but for these.
NEIGHBOURS = {
    ("nn", "clip"),  # nn.utils carries PyTorch's names for clipping
    ("data", "io"),  # tokens of a text are kept in files
    ("cli", "bench"),  # the command shows what benchmarks measure,
    ("bench", "cli"),  # and one of these trains a net by command
}

# Tensor.__array_namespace__ hands out gpugrad itself, which it can only look up when asked.
LOOKS_UP_GPUGRAD = ("core", "tensor")

ANYBODY_MAY_IMPORT = {"errors"}
KERNELS_MAY_IMPORT = (
    "gpugrad.kernels",
    "gpugrad.backend",
    "gpugrad.core.primitive",
    "gpugrad.ops.cells",
    "gpugrad.ops.formulas",
    "gpugrad.ops.updates",
)

# Only these folders know which library runs on a device.
LIBRARIES = re.compile("cupy|numba", re.IGNORECASE)
KNOW_LIBRARIES = {"backend", "kernels", "distributed", "bench"}


def violations(package: Path) -> list[str]:
    """Every broken rule below the folder `package`, as "file:line: what is wrong"."""
    found = []
    for path in sorted(_python_files(package)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parts = path.relative_to(package.parent).with_suffix("").parts
        for line, problem in _problems(tree, parts, package):
            found.append(f"{path.relative_to(package.parent)}:{line}: {problem}")
    return found


def _python_files(folder: Path) -> Iterator[Path]:
    # Path.rglob does not go through links to folders, and gpugrad/kernels is one.
    for path in folder.iterdir():
        if path.is_dir():
            yield from _python_files(path)
        elif path.suffix == ".py":
            yield path


def _problems(tree: ast.Module, parts: tuple[str, ...], package: Path) -> Iterator[tuple[int, str]]:
    # The folder of gpugrad that the file stands in; None for a file directly in gpugrad, which
    # gathers public names and may import everything but kernels.
    own = parts[1] if len(parts) > 2 else None
    for node, target, lazy in _imports(tree, parts, package):
        if problem := _judge(own, parts[-1], target, lazy):
            yield node.lineno, problem
    if own not in KNOW_LIBRARIES:
        for line, word in _words(tree):
            if match := LIBRARIES.search(word):
                yield line, f"names {match[0].lower()!r}: ask the backend layer instead"


def _judge(own: str | None, file: str, target: str, lazy: bool) -> str | None:
    top = target.split(".")[1] if "." in target else ""
    if own == "kernels":
        if top in ANYBODY_MAY_IMPORT or _within(target, KERNELS_MAY_IMPORT):
            return None
        return f"kernels import {target}; they may import only {', '.join(KERNELS_MAY_IMPORT)}"
    if top == "kernels":
        if own not in ("backend", "bench"):
            return f"imports {target}; only the backends do"
        return None if lazy else f"imports {target} at the top; a backend does so inside a function"
    if own is None:
        if file in ANYBODY_MAY_IMPORT and top:
            return f"imports {target}, but everybody imports {file}"
        return None
    if own not in LEVEL:
        return f"the folder {own!r} has no layer; give it one in tests/packaging/test_layers.py"
    if top == own or top in ANYBODY_MAY_IMPORT or (own, top) in NEIGHBOURS:
        return None
    if top in LEVEL:
        if LEVEL[top] < LEVEL[own]:
            return None
        return f"{own} imports {target}, which is not to its left"
    if lazy and target == "gpugrad" and (own, file) == LOOKS_UP_GPUGRAD:
        return None
    # What is left is `gpugrad` itself or a file directly in it: they import every layer.
    return None if own in ("cli", "bench") else f"{own} imports {target}, which imports every layer"


def _within(target: str, roots: tuple[str, ...]) -> bool:
    return any(target == root or target.startswith(root + ".") for root in roots)


def _imports(
    tree: ast.Module, parts: tuple[str, ...], package: Path
) -> Iterator[tuple[ast.stmt | ast.expr, str, bool]]:
    """(node, absolute name, inside a function) of every import of something in gpugrad."""
    stack: list[tuple[ast.AST, bool]] = [(tree, False)]
    while stack:
        node, lazy = stack.pop()
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = list(_from_names(node, parts, package))
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"}:
            names = [
                argument.value
                for argument in node.args[:1]
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            ]
        for name in names:
            if name.split(".")[0] == "gpugrad":
                assert isinstance(node, ast.stmt | ast.expr)
                yield node, name, lazy
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        stack.extend((child, inside) for child in ast.iter_child_nodes(node))


def _from_names(node: ast.ImportFrom, parts: tuple[str, ...], package: Path) -> Iterator[str]:
    base = list(parts[: len(parts) - node.level]) if node.level else []
    if node.module:
        base += node.module.split(".")
    for alias in node.names:
        # `from gpugrad import nn` imports a folder; `from gpugrad import sum` reads gpugrad itself.
        folder = package.parent.joinpath(*base, alias.name)
        is_module = folder.is_dir() or folder.with_suffix(".py").is_file()
        yield ".".join([*base, alias.name] if is_module else base)


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names, imports and strings of the code; comments and docstrings may say what they like."""
    prose = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if node in prose:
            continue
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                yield node.lineno, node.value
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.alias):
            yield node.lineno, f"{node.name} {node.asname or ''}"
        else:
            for field in ("id", "attr", "name", "arg"):
                word = getattr(node, field, None)
                if isinstance(word, str):
                    yield getattr(node, "lineno", 0), word


def test_gpugrad_keeps_its_layers() -> None:
    for link in ("kernels", "bench"):
        assert (PACKAGE / link / "__init__.py").is_file(), f"the link gpugrad/{link} is missing"
    assert violations(PACKAGE) == []


CLEAN = {
    "__init__.py": """
'CuPy in a docstring is fine.'
from gpugrad.ops import add
import gpugrad.nn
""",
    "errors.py": "",
    "backend/numpy.py": """
import numba
from gpugrad.errors import E
def f():
    from gpugrad.kernels import add
""",
    "core/primitive.py": "from gpugrad.backend import find  # numba in a comment is fine",
    "core/tensor.py": "def f():\n    import gpugrad",
    "core/graph.py": "from .primitive import P\nimport numpy\nfrom ..backend import find",
    "ops/formulas.py": "",
    "ops/basic.py": "from gpugrad.core.primitive import P\nfrom gpugrad.ops import formulas",
    "kernels/add.py": """
import cupy
from gpugrad.ops.formulas import add
from gpugrad.kernels import launch
""",
    "kernels/launch.py": "from gpugrad.core.primitive import P\nfrom gpugrad.errors import E",
    "nn/utils.py": "from gpugrad.clip import norm",
    "clip/__init__.py": "from gpugrad import ops",
    "cli/__init__.py": "import gpugrad as gg\nfrom gpugrad.data import digits",
}


def make_tree(root: Path, files: dict[str, str]) -> Path:
    package = root / "gpugrad"
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text + "\n", encoding="utf-8")
    return package


def test_a_clean_tree_passes(tmp_path: Path) -> None:
    assert violations(make_tree(tmp_path, CLEAN)) == []


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("core/a.py", "from gpugrad.ops import add", "core imports gpugrad.ops"),
        ("core/a.py", "from gpugrad import ops", "core imports gpugrad.ops"),
        ("core/a.py", "from .. import ops", "core imports gpugrad.ops"),
        ("core/a.py", "def f():\n    import gpugrad.ops.basic", "core imports gpugrad.ops.basic"),
        ("core/a.py", "import importlib\nimportlib.import_module('gpugrad.nn')", "gpugrad.nn"),
        ("core/a.py", "if TYPE_CHECKING:\n    from gpugrad.nn import Module", "gpugrad.nn"),
        ("core/tensor.py", "import gpugrad", "imports every layer"),
        ("core/graph.py", "def f():\n    import gpugrad", "imports every layer"),
        ("ops/a.py", "import gpugrad as gg", "imports every layer"),
        ("ops/a.py", "from gpugrad import add", "imports every layer"),
        ("clip/a.py", "from gpugrad.nn import utils", "not to its left"),
        ("optim/a.py", "from gpugrad.health import verdict\nimport gpugrad.data", "gpugrad.data"),
        ("errors.py", "from gpugrad.core import graph", "everybody imports errors"),
        ("extra/a.py", "from gpugrad.core import graph", "no layer"),
        ("kernels/a.py", "from gpugrad.nn import utils", "kernels import gpugrad.nn"),
        ("kernels/a.py", "from gpugrad.core import graph", "kernels import gpugrad.core.graph"),
        ("ops/a.py", "def f():\n    from gpugrad.kernels import add", "only the backends"),
        ("__init__.py", "from gpugrad import kernels", "only the backends"),
        ("backend/a.py", "from gpugrad.kernels import add", "inside a function"),
        ("core/a.py", "import cupy", "'cupy'"),
        ("core/a.py", "from numba.core import types", "'numba'"),
        ("ops/a.py", "def f(use_numba=False): ...", "'numba'"),
        ("ops/a.py", "x = 'pip install cupy-cuda13x'", "'cupy'"),
        ("nn/a.py", "raise E(f'{x} is a CuPy array')", "'cupy'"),
        ("__init__.py", "xp.numba_mode", "'numba'"),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, name: str, text: str, told: str) -> None:
    found = violations(make_tree(tmp_path, CLEAN | {name: text}))
    assert found, "the checker saw nothing"
    assert any(told in line and line.startswith(f"gpugrad/{name}:") for line in found), found


def test_a_linked_folder_is_read(tmp_path: Path) -> None:
    package = make_tree(tmp_path, {"errors.py": ""})
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("from gpugrad import nn\nimport gpugrad.nn\n")
    (package / "kernels").symlink_to("../kernels")
    assert any("gpugrad/kernels/a.py:2" in line for line in violations(package))
