"""Saving that fails half-way: the checkpoint is the old one or the new one, never neither."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpugrad.io import CheckpointWriteError, load, save

ROOT = Path(__file__).parents[2]
OLD = {"w": np.arange(1000.0)}


def assert_old_survives(path: Path) -> None:
    assert list(path.parent.iterdir()) == [path]  # no temporary file either
    np.testing.assert_array_equal(load(path)[0]["w"], OLD["w"])


def python(code: str, *arguments: str | Path, before: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    if before:
        command = ["unshare", "-rm", "sh", "-c", f'{before} && exec "$@"', "sh", *command]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES], ids=errno.errorcode.get
)
def test_system_call_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    path = tmp_path / "c"
    save(path, OLD)

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(CheckpointWriteError, match="previous checkpoint is intact") as caught:
            save(path, {"w": np.zeros(5)})
    assert os.strerror(code) in str(caught.value)
    assert caught.value.errno == code
    assert_old_survives(path)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    path = tmp_path / "c"
    save(path, OLD)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, function, interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(path, {"w": np.zeros(5)})
    assert_old_survives(path)


def test_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    save(path, {"w": np.zeros(5)})
    fsync, codes = os.fsync, [errno.EIO, errno.EINVAL]

    def fail_on_folders(descriptor: int) -> None:
        if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            return fsync(descriptor)
        code = codes.pop(0)
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_on_folders)
        with pytest.raises(CheckpointWriteError, match="is written, but may not survive"):
            save(path, OLD)
        assert_old_survives(path)  # that is, what was to be saved
        save(path, OLD)  # EINVAL: this file system does not know it
    assert not codes


def test_file_is_synced_before_it_is_renamed_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, sizes = [], []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(descriptor: int) -> None:
        calls.append(f"fsync {os.readlink(f'/proc/self/fd/{descriptor}')}")
        sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    def traced_replace(source: Path, target: Path) -> None:
        calls.append(f"replace {source} {target}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    path = tmp_path.resolve() / "c"
    save(path, {"w": np.zeros(3)})  # so little that a buffer could hold it back
    temporary = calls[0].removeprefix("fsync ")
    assert Path(temporary).parent == path.parent
    assert calls == [f"fsync {temporary}", f"replace {temporary} {path}", f"fsync {path.parent}"]
    assert sizes[0] == path.stat().st_size


TOO_MUCH = """
    import sys, numpy as np
    from pathlib import Path
    from gpugrad.io import CheckpointWriteError, load, save
    path = Path(sys.argv[1])
    save(path, {"w": np.arange(1000.0)})
    LIMIT
    try:
        save(path, {"w": np.zeros(1_000_000)})
    except CheckpointWriteError as error:
        assert "previous checkpoint is intact" in str(error), error
        print(error.errno)
    np.testing.assert_array_equal(load(path)[0]["w"], np.arange(1000.0))
    assert list(path.parent.iterdir()) == [path], list(path.parent.iterdir())
    save(path, {"w": np.arange(1001.0)})  # and it goes on working
    assert len(load(path)[0]["w"]) == 1001
"""


def test_file_size_limit(tmp_path: Path) -> None:
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    )
    done = python(TOO_MUCH.replace("LIMIT", limit), tmp_path / "c")
    assert (done.returncode, done.stdout) == (0, f"{errno.EFBIG}\n"), done.stderr


def test_full_disk(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=256k none {tmp_path}"
    if shutil.which("unshare") is None or python("", before=mount).returncode != 0:
        pytest.skip("mounting a small disk needs unprivileged user namespaces")
    done = python(TOO_MUCH.replace("LIMIT", ""), tmp_path / "c", before=mount)
    assert (done.returncode, done.stdout) == (0, f"{errno.ENOSPC}\n"), done.stderr
    assert not list(tmp_path.iterdir())  # it was written on the small disk indeed


SAVE_FOREVER = """
    import sys, itertools, numpy as np
    from gpugrad.io import save
    for i in itertools.count():
        save(sys.argv[1], {"w": np.full(1_000_000, i), "b": np.full(100, i)}, {"step": str(i)})
        print(i, flush=True)
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    path = tmp_path / "c"
    rng = np.random.default_rng(0)
    left_behind = 0
    for trial in range(8):
        command = [sys.executable, "-c", textwrap.dedent(SAVE_FOREVER), str(path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            child.stdout.readline()  # the first one is saved
            if trial % 2:  # just when a file is being written ...
                while not any(tmp_path.glob(".gpugrad-*.tmp")):
                    pass
            time.sleep(rng.uniform(0, 0.01))  # ... or whenever
            child.send_signal(signal.SIGKILL)
            done = [0, *(int(line) for line in child.stdout.read().splitlines() if line)]
        found, metadata = load(path)
        step = int(metadata["step"])
        assert done[-1] <= step <= done[-1] + 1
        assert (found["w"] == step).all()
        assert (found["b"] == step).all()
        orphans = [other for other in tmp_path.iterdir() if other != path]
        assert all(orphan.match(".gpugrad-*.tmp") for orphan in orphans)
        left_behind += len(orphans)
        for orphan in orphans:
            orphan.unlink()
    assert left_behind > 0  # or no kill came in the middle of saving, and this test shows nothing


def test_no_place_to_write(tmp_path: Path) -> None:
    with pytest.raises(CheckpointWriteError, match=r"there is no folder .*runs; create it first"):
        save(tmp_path / "runs" / "c", OLD)
    with pytest.raises(CheckpointWriteError, match="not a regular file"):
        save(tmp_path, OLD)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointWriteError, match="not a regular file"):
        save(tmp_path / "pipe", OLD)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_first_checkpoint_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointWriteError, match="there was none before"):
        save(tmp_path / "c", OLD)
    assert not list(tmp_path.iterdir())
