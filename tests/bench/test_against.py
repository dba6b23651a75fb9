"""A revision beside another: the work tree, the contenders, and what a difference is called."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import against

ROOT = Path(__file__).parents[2]


@pytest.fixture
def repository(tmp_path):
    """Two commits: one with kernels behind a link, and before it one without."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root = tmp_path / "repository"
    (root / "gpugrad").mkdir(parents=True)

    def commit(name: str) -> None:
        who = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        for command in (("add", "-A"), (*who, "commit", "-qm", name), ("tag", name)):
            subprocess.run(["git", "-C", str(root), *command], check=True)

    subprocess.run(["git", "init", "-q", str(root)], check=True)
    (root / "gpugrad" / "__init__.py").write_text("")
    commit("bare")
    (root / "kernels").mkdir()
    (root / "kernels" / "__init__.py").write_text("number = 1\n")
    (root / "gpugrad" / "kernels").symlink_to("../kernels")
    commit("whole")
    (root / "kernels" / "__init__.py").write_text("number = 2\n")
    return root


def trees(root: Path) -> int:
    return len(against.git("worktree", "list", root=root).splitlines())


def test_a_revision_is_checked_out_and_taken_away(repository):
    with against.checked_out("HEAD", repository) as (tree, commit):
        assert commit == against.git("rev-parse", "whole", root=repository)
        assert (tree / "gpugrad" / "kernels" / "__init__.py").read_text() == "number = 1\n"
        (tree / "litter").touch()
        assert trees(repository) == 2
    assert not tree.parent.exists()
    assert trees(repository) == 1
    assert (repository / "kernels" / "__init__.py").read_text() == "number = 2\n"


def test_it_is_taken_away_when_something_fails(repository):
    def fail() -> None:
        with against.checked_out("whole", repository) as (tree, _):
            found.append(tree)
            raise RuntimeError("the third bolt is loose")

    found: list[Path] = []
    with pytest.raises(RuntimeError, match="third bolt"):
        fail()
    assert not found[0].exists()
    assert trees(repository) == 1


@pytest.mark.parametrize(
    ("revision", "why"),
    [("nowhere", "git rev-parse: fatal: Needed a single revision"), ("--all", "git rev-parse"),
     ("bare", "bare: its gpugrad/kernels is not there")],
)  # fmt: skip
def test_what_cannot_be_checked_out(repository, revision, why):
    with pytest.raises(against.AgainstError, match=why), against.checked_out(revision, repository):
        pass
    assert trees(repository) == 1


def test_two_trees_take_turns():
    row = against.compare(ROOT, "chain", quick=True, rounds=3)
    assert row["computes"] == "the same"
    assert set(row["seconds"]) == {"here", "there", "here again"}
    assert {len(s) for s in row["seconds"].values()} == {3}
    assert row["ratio"] > 0
    text = against.table([row, {"workload": "mlp", "verdict": "not run: no Linear"}], "HEAD~1")
    assert "| HEAD~1, ms" in text
    assert "not run: no Linear" in text


def test_only_gpugrad_of_the_tree_takes_part(tmp_path):
    """A tree without gpugrad must not be measured with this one's in its place."""
    command = [sys.executable, str(ROOT / "bench" / "against.py"), "--serve", str(tmp_path),
               "--only", "chain", "--quick"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, input="answer\n", check=False)
    assert run.returncode != 0
    assert f"not from {tmp_path}" in run.stderr


def seconds(there: float, again: float = 1.0, swing: float = 0.0) -> dict[str, list[float]]:
    drift = [1.0, 1.5, 2.0, 1.2, 0.9, 1.1]
    wave = [1 + swing * (-1) ** i for i in range(len(drift))]
    return {"here": drift, "here again": [again * d * w for d, w in zip(drift, wave)],
            "there": [there * d for d in drift]}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (seconds(1.1), "faster"),
        (seconds(0.9), "slower"),
        (seconds(1.0), "no difference"),
        (seconds(1.1, swing=0.3), "no difference"),
    ],
)
def test_a_difference_is_one_beyond_the_noise(given, word):
    found = against.judge(given)
    assert found["verdict"] == word


def test_the_drift_of_the_machine_is_no_noise():
    found = against.judge(seconds(1.25))
    assert found["ratio"] == pytest.approx(1.25)
    assert found["band"] == 0


def test_what_is_asked_wrongly(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        against.main(["HEAD", "--only", "chess"])
    assert "no workload chess; there are chain, mlp" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        against.main([])
    monkeypatch.setattr(against.signal, "signal", lambda *_: None)
    assert against.main(["no-such-revision", "--only", "chain"]) == 2
    assert "git rev-parse" in capsys.readouterr().err
