"""The processes of contenders, and asking them: the near end of `gpugrad.bench.worker`."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from threading import Thread
from types import TracebackType
from typing import Any

from gpugrad.bench import common
from gpugrad.bench.workload import THREADS, Contender

#: Seconds that a request may take: compiling a step takes a minute on a busy machine.
PATIENCE = 180.0


class Problem(Exception):
    """What a contender could not do, told by it or noticed of it."""


class Process:
    """A running worker.

    Parameters
    ----------
    library, device:
        What it is for.
    module:
        What is run, with these two as arguments.
    """

    def __init__(
        self, library: str, device: str, module: str = "gpugrad.bench.worker",
        patience: float = PATIENCE,
    ) -> None:  # fmt: skip
        self.name = library if device == "cpu" else f"{library} on {device}"
        self.patience = patience
        env = common.environment(THREADS) | {"TF_CPP_MIN_LOG_LEVEL": "2"}
        if library == "jax":
            env["JAX_PLATFORMS"] = "cpu" if device == "cpu" else "cuda"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in stop()
        # A session of its own: Ctrl-C is for the one who asks.
        self._child = subprocess.Popen(
            [sys.executable, "-m", module, library, device], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            start_new_session=True,
        )  # fmt: skip
        self._replies: queue.Queue[str | None] = queue.Queue()
        self._ears = Thread(target=self._listen, daemon=True)
        self._ears.start()
        try:
            self.about: dict[str, Any] = self._reply("to start")
        except Problem:
            self.stop()
            raise

    def _listen(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith(common.ANSWER):
                self._replies.put(line[len(common.ANSWER) :])
        self._replies.put(None)

    def ask(self, do: str, **request: Any) -> Any:
        """The result of a request; :class:`Problem` if it has none.

        A worker that ended, or does not answer in time, is of no more use: see :attr:`alive`.
        """
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._child.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass  # it has ended, as is noticed below
        return self._reply(f"to {do}")

    def _reply(self, what: str) -> Any:
        try:
            line = self._replies.get(timeout=self.patience)
        except queue.Empty:
            self._child.kill()
            self._child.wait()
            raise Problem(f"took more than {self.patience:g} s {what}") from None
        if line is None:
            code = self._child.wait()
            self._errors.seek(0)
            told = self._errors.read().strip().splitlines()
            # The system's own way of saying that memory is gone.
            why = "killed, most likely out of memory" if code == -9 else f"ended with {code}"
            raise Problem(f"its process {why}{': ' + told[-1][:200] if told else ''}")
        reply = json.loads(line)
        if "problem" in reply:
            raise Problem(reply["problem"])
        return reply["result"]

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def stop(self) -> None:
        self._child.kill()
        self._child.wait()
        self._ears.join()
        for stream in (self._child.stdin, self._child.stdout, self._errors):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()


class Pool:
    """One worker for each library and device, started when it is first wanted.

    One that ended is started anew for the next workload; one that cannot start is not tried again.
    """

    def __init__(self, module: str = "gpugrad.bench.worker", patience: float = PATIENCE) -> None:
        self._module, self._patience = module, patience
        self._running: dict[tuple[str, str], Process] = {}
        self._refused: dict[tuple[str, str], str] = {}

    def get(self, who: Contender) -> Process:
        """The contender's process; :class:`Problem` where it cannot be had."""
        place = (who.library, who.device)
        if place in self._refused:
            raise Problem(self._refused[place])
        found = self._running.get(place)
        if found is not None and not found.alive:
            found.stop()
            found = None
        if found is None:
            try:
                found = Process(*place, module=self._module, patience=self._patience)
            except Problem as problem:
                self._refused[place] = str(problem)
                raise
            self._running[place] = found
        return found

    def fresh(self, who: Contender) -> Process:
        """A process of the contender's that has done nothing yet, for the caller to stop."""
        return Process(who.library, who.device, module=self._module, patience=self._patience)

    def can(self, who: Contender) -> bool:
        """Whether the contender's process could be started, so far as is known."""
        return (who.library, who.device) not in self._refused

    def running(self) -> Iterable[Process]:
        return [p for p in self._running.values() if p.alive]

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for process in self._running.values():
            process.stop()
