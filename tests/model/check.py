"""Check the models of the shared-memory protocol, and that each of their mutants is caught.

spin writes a verifier for each, gcc compiles it, and it visits every state. Prints a table; the
exit status is 0 only if every model holds and every mutant fails.
"""

import argparse
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Model:
    """A model, in which ways it is checked, and what must break it in one of them."""

    name: str
    ways: tuple[tuple[str, ...], ...]
    mutants: tuple[str, ...]


MODELS = (
    Model(
        "announce",
        ((),),
        (
            "ONE_SLOT",
            "SEQUENCE_FIRST",
            "WAIT_FOR_ONE",
            "NO_MEETING",
            "COMPLETE_EARLY",
            "COMPARE_WITH_FIRST",
            "COMPARE_LATE",
        ),
    ),
    Model(
        "doorbell",
        ((), ("REFUSED",)),
        ("NO_FENCE", "TICKET_LATE", "RING_FIRST", "NO_SECOND_LOOK", "WAKE_ONE"),
    ),
    Model(
        "failure",
        (("DIES",), ("GIVES_UP",), ("DIES", "GIVES_UP")),
        (
            "NO_SOUND_CHECK",
            "SOUND_IS_POSTED",
            "CHANGE_FIRST",
            "COMPLETE_EARLY",
            "NO_LIFE_WORD",
            "NO_NOTICE",
            "NO_QUARANTINE",
        ),
    ),
    Model("leaving", ((), ("DIES",)), ("OWN_WORD", "LEAVE_EARLY", "FREE_AT_ONCE")),
    Model(
        "ring",
        ((), ("DIES",)),
        ("PUSHED_FIRST", "NO_ROOM_CHECK", "NO_SLOT_CHECK", "POPPED_FIRST", "STALE_ROOM"),
    ),
)


@dataclass(frozen=True)
class Verdict:
    """What a verifier found: the first error's text, or nothing, in so many states."""

    error: str
    states: int
    seconds: float


def verify(model: str, ranks: int, defines: tuple[str, ...]) -> Verdict:
    """Visit the states of a model.

    Raises:
        RuntimeError: spin or gcc failed, or the search did not reach every state.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = [f"-DN={ranks}", *(f"-D{define}" for define in defines)]
        run(["spin", *options, "-a", str(HERE / f"{model}.pml")], folder)
        # Depth first, all states kept; only safety: assertions and invalid end states.
        run(["gcc", "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-o", "pan", "pan.c"], folder)
        began = time.monotonic()
        output = run(["./pan", "-m5000000"], folder)
        seconds = time.monotonic() - began
    stored = re.search(r"(\d+(?:\.\d+)?(?:e\+\d+)?) states, stored", output)
    if stored is None:
        raise RuntimeError(f"{model} {options}: the verifier said\n{output}")
    error = re.search(r"pan:1: (.+?) \(at depth", output)
    complete = "Search not completed" not in output and "too small" not in output
    if error is None and not complete:
        raise RuntimeError(f"{model} {options}: not all states were visited\n{output}")
    return Verdict(error.group(1) if error else "", int(float(stored.group(1))), seconds)


def run(command: list[str], folder: str) -> str:
    """Run a command to its end and return what it printed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{output}")
    return output


def named(defines: tuple[str, ...]) -> str:
    return " ".join(defines)


def check(model: Model, ranks: int) -> bool:
    """Check a model and its mutants for a number of ranks, a line for each."""
    right = True
    for way in model.ways:
        verdict = verify(model.name, ranks, way)
        right &= not verdict.error
        print_line(model.name, ranks, named(way), verdict, verdict.error or "holds")
    for mutant in model.mutants:
        verdicts = ((way, verify(model.name, ranks, (*way, mutant))) for way in model.ways)
        caught = next(((way, verdict) for way, verdict in verdicts if verdict.error), None)
        if caught:
            way, verdict = caught
            text = f"caught: {verdict.error:.40}"
            print_line(model.name, ranks, named((*way, mutant)), verdict, text)
        elif needs_three(model, mutant) and ranks == 2:
            print(f"{model.name:<9} {ranks:>5}  {mutant:<30} harmless with two ranks", flush=True)
        else:
            right = False
            print(f"{model.name} {ranks} {mutant}: NOT CAUGHT", flush=True)
    return right


def needs_three(model: Model, mutant: str) -> bool:
    """Whether two ranks are too few for a mutant to go wrong."""
    return (model.name, mutant) in {
        ("announce", "WAIT_FOR_ONE"),
        ("failure", "SOUND_IS_POSTED"),
    }


def print_line(model: str, ranks: int, defines: str, verdict: Verdict, text: str) -> None:
    found = f"{verdict.states:>10,} {verdict.seconds:>7.1f}"
    print(f"{model:<9} {ranks:>5}  {defines:<30} {found}  {text}", flush=True)


def main() -> int:
    """Check what the command line names, or everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="announce, doorbell, ...; default: all")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 3])
    arguments = parser.parse_args()
    if shutil.which("spin") is None:
        print("spin is missing: apt-get install spin (Debian, Ubuntu), or see spinroot.com.")
        return 1
    print(f"{'model':<9} {'ranks':>5}  {'with':<30} {'states':>10} {'seconds':>7}  verdict")
    chosen = [model for model in MODELS if not arguments.models or model.name in arguments.models]
    results = [check(*pair) for pair in itertools.product(chosen, arguments.ranks)]
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
