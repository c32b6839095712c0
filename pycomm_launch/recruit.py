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
    options: list[str] = []
    program = list(orig_argv[1:])
    while program and program[0].startswith("-") and program[0] != "-":
        option = program.pop(0)
        if option == "--":
            break
        flags, last, value = _parts(option)
        if last in ("-c", "-m"):
            options += [flags] if flags else []
            program = [last, *([value] if value else []), *program]
            break
        options.append(option)
        if last and not value:  # it is the next argument
            options.append(program.pop(0))
    if program[:2] == ["-m", NAME]:
        program = program[2:]
    return [*options, "-m", NAME, *program]


def _parts(option: str) -> tuple[str, str, str]:
    """``-uXdev`` as ``("-u", "-X", "dev")``: the one that takes a value is the last of several."""
    if option.startswith("--"):
        return "", option if option == "--check-hash-based-pycs" else "", ""
    for at, letter in enumerate(option):
        if letter in "cmWX":
            return option[:at] if at > 1 else "", f"-{letter}", option[at + 1 :]
    return option, "", ""


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
