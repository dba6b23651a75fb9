"""The `gpugrad` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv`, or those of the process; returns its exit code.

    0 is success, 1 an error that is told in a sentence, 2 a wrong use of the command, 130 an
    interrupt.
    """
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(
            f"gpugrad: the command needs typer and rich ({error.name} is not installed); "
            "pip install 'gpugrad[cli]'",
            file=sys.stderr,
        )
        return 1
    from gpugrad.cli.app import run

    return run(argv)
