"""Run random programs until so many operations have been made: ``make fuzz N=100000``.

    python -m fuzz.run --operations 100000                        ranks are threads
    python -m fuzz.run --operations 5000 --mpirun "mpirun -np 4"  ranks are processes
    python -m fuzz.run --seed 17 --steps 100                      one program again, as was printed

A failure prints the seed, what went wrong, and the shortest prefix of the program that still fails.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable

from run_ranks import run_ranks

from fuzz.execute import STEP, execute
from fuzz.program import Operation, Program, Threads, generate

Attempt = Callable[[Program], str | None]  # what went wrong, or None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=1000, help="stop after so many")
    parser.add_argument("--first-seed", type=int, default=None, help="drawn if not given")
    parser.add_argument("--seed", type=int, help="run this program alone")
    parser.add_argument("--steps", type=int, default=100, help="of each program")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for a program")
    parser.add_argument("--mpirun", help="command that starts the ranks, with their number")
    parser.add_argument("--hosts", help="pretended host of each process, such as 0011")
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.first_seed is None:
        arguments.first_seed = random.SystemRandom().randrange(1 << 31)
    if arguments.process:
        return run_as_rank(arguments)
    if arguments.mpirun:
        return run_processes(arguments)

    def attempt(program: Program) -> str | None:
        return attempt_threads(program, arguments.timeout)

    if arguments.seed is not None:
        program = generate(arguments.seed, arguments.steps)
        problem = attempt(program)
        if problem is None:
            print(f"seed {arguments.seed} passed: {program.operations} operations")
            return 0
        print(report(program, problem, arguments.steps, attempt))
        return 1
    return run_many(arguments, attempt)


def run_many(arguments: argparse.Namespace, attempt: Attempt) -> int:
    began = time.monotonic()
    kinds: collections.Counter[str] = collections.Counter()
    worlds: collections.Counter[str] = collections.Counter()
    operations = programs = 0
    shown = began
    while operations < arguments.operations:
        program = generate(arguments.first_seed + programs, arguments.steps)
        problem = attempt(program)
        if problem is not None:
            print(report(program, problem, arguments.steps, attempt))
            return 1
        operations += program.operations
        programs += 1
        worlds["".join(map(str, program.hosts))] += 1
        for step in program.steps:
            kinds.update(kinds_of(step))
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            print(f"  {operations} operations after {shown - began:.0f} s", flush=True)
    seconds = time.monotonic() - began
    print(
        f"{operations} operations of {programs} programs, seeds {arguments.first_seed} to "
        f"{arguments.first_seed + programs - 1}, {seconds:.0f} s: all as NumPy says"
    )
    print("worlds: " + ", ".join(f"{name} {count}" for name, count in sorted(worlds.items())))
    print("kinds: " + ", ".join(f"{name} {count}" for name, count in sorted(kinds.items())))
    return 0


def kinds_of(step: object) -> list[str]:
    if isinstance(step, Threads):
        return [operation.kind for operations in step.lists for operation in operations]
    return [step.kind if isinstance(step, Operation) else type(step).__name__]


def attempt_threads(program: Program, timeout_s: float) -> str | None:
    try:
        run_ranks(
            len(program.hosts),
            lambda group: execute(program, group),
            hosts=program.hosts,
            piece_bytes=program.piece_bytes,
            timeout_s=timeout_s,
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def report(program: Program, problem: str, steps: int, attempt: Attempt) -> str:
    """What to do with a failure: the seed, and the shortest prefix that fails."""
    shortest, why = shorten(program, problem, attempt)
    lines = [
        f"FAILED: seed {program.seed}, hosts {list(program.hosts)}, {program.piece_bytes} bytes of "
        f"staging a piece: {problem}",
        f"again: cd tests && python -m fuzz.run --seed {program.seed} --steps {steps}",
        f"{why} {len(shortest.steps)} steps:",
        *(f"  {number}: {step}" for number, step in enumerate(shortest.steps)),
    ]
    return "\n".join(lines)


def shorten(program: Program, problem: str, attempt: Attempt) -> tuple[Program, str]:
    """The shortest prefix that fails, found by bisection from the step that is named."""
    named = re.search(rf"{STEP}(\d+):", problem)
    low, high = (int(named[1]) + 1 if named else 1), len(program.steps)
    if attempt(program.prefix(high)) is None:
        return program, "it passed when run again (a race?); the whole program has"
    while low < high:
        middle = (low + high) // 2
        if attempt(program.prefix(middle)) is None:
            low = middle + 1
        else:
            high = middle
    return program.prefix(low), "the shortest prefix that fails has"


# ---------------------------------------------------------------------------------------- processes


def run_processes(arguments: argparse.Namespace) -> int:
    """Under mpirun: all programs in one job, whose ranks say which one failed."""
    command = [
        *shlex.split(arguments.mpirun), sys.executable, "-m", "fuzz.run", "--process",
        "--operations", str(arguments.operations), "--first-seed", str(arguments.first_seed),
        "--steps", str(arguments.steps),
    ]  # fmt: skip
    if arguments.seed is not None:
        command += ["--seed", str(arguments.seed)]
    if arguments.hosts:
        command += ["--hosts", arguments.hosts]
    result = subprocess.run(command, timeout=arguments.timeout + arguments.operations)
    if result.returncode != 0:
        print("again: " + shlex.join(command[:-1]))
    return result.returncode


def run_as_rank(arguments: argparse.Namespace) -> int:
    import pycomm
    from pycomm.launch import detect
    from pycomm.runtime import world_group

    if arguments.hosts:
        os.environ["PYCOMM_HOST"] = arguments.hosts[detect(os.environ).rank]
    pycomm.init(timeout_s=arguments.timeout)
    group = world_group()
    hosts = tuple(
        next(host for host, ranks in enumerate(group.hosts) if rank in ranks)
        for rank in range(group.size)
    )
    began = time.monotonic()
    operations = programs = 0
    seed = arguments.first_seed if arguments.seed is None else arguments.seed
    while operations < arguments.operations:
        program = generate(seed + programs, arguments.steps, hosts)
        try:
            execute(program, group)
        except Exception as error:
            print(f"FAILED on rank {group.rank}: seed {program.seed}: {error}", flush=True)
            raise
        operations += program.operations
        programs += 1
        if arguments.seed is not None:
            break
    if group.rank == 0:
        print(
            f"{operations} operations of {programs} programs on {group.size} processes, hosts "
            f"{group.hosts}, seeds {seed} to {seed + programs - 1}, "
            f"{time.monotonic() - began:.0f} s: all as NumPy says"
        )
    pycomm.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
