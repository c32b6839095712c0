"""python -m pycomm_launch.recruit PROGRAM ARGUMENTS: python PROGRAM, with MPI started before it.

For ``pycomm.elastic``, in a process that takes a lost rank's place. If another rank is lost while
such a process starts MPI, MPI ends it; importing torch first would make seconds of that moment.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

NAME = "pycomm_launch.recruit"


def command(orig_argv: Sequence[str]) -> list[str]:
    """The arguments of ``python`` that run again, here, what a process runs.

    Args:
        orig_argv: that process's ``sys.orig_argv``.
    """
    _, *arguments = orig_argv
    at = 0
    while at < len(arguments) and arguments[at].startswith("-"):
        if arguments[at] in ("-c", "-m"):
            break
        at += 2 if arguments[at] in ("-X", "-W") else 1  # with a value behind them
    options, program = arguments[:at], arguments[at:]
    if program[:2] == ["-m", NAME]:
        program = program[2:]
    return [*options, "-m", NAME, *program]


def main(program: list[str]) -> None:
    """Run what ``python`` would be given, as ``__main__``."""
    from mpi4py import MPI  # noqa: F401

    kind, *rest = program
    if kind == "-m":
        sys.argv = rest
        sys.path[0] = str(Path.cwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[0] = ""
        exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv = program
        sys.path[0] = str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
