"""``python -m pycomm plan pipeline``: a schedule as a timeline, its bubble and what it keeps."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pycomm.cli.timeline_svg import draw
from pycomm.errors import InvalidArgumentError
from pycomm.pipeline.schedule import (
    SCHEDULES,
    Kind,
    Schedule,
    Timeline,
    make,
    simulate,
    usual_stages_per_rank,
)

MOST_ACTIONS = 1_000_000
_STYLES = {
    Kind.FORWARD: "blue",
    Kind.BACKWARD: "green",
    Kind.INPUT_GRADIENT: "green",
    Kind.WEIGHT_GRADIENT: "yellow",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--stages", type=int, required=True, help="parts the model is cut into")
    parser.add_argument(
        "--micro-batches", type=int, required=True, help="parts a batch is cut into"
    )
    parser.add_argument("--schedule", choices=list(SCHEDULES), default="1f1b", help="(1f1b)")
    parser.add_argument("--stages-per-rank", type=int, help="(2 for interleaved, 1 for the others)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw it, too")
    # SUPPRESS: a default here would overwrite what was given before the word "pipeline".
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="for programs"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the timeline; 2 if an argument makes no sense."""
    try:
        schedule = _schedule(arguments)
    except InvalidArgumentError as error:
        print(f"plan pipeline: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    timeline = simulate(schedule)
    if arguments.svg is not None:
        try:
            draw(schedule, timeline, arguments.svg)
        except ImportError as error:
            print(f"plan pipeline: --svg needs matplotlib: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            print(f"plan pipeline: --svg {arguments.svg}: {error.strerror}", file=sys.stderr)
            return 2
    if arguments.json:
        print(json.dumps(_for_programs(schedule, timeline)))
        return 0
    console = Console(soft_wrap=True)
    console.print(
        f"{schedule.name}: {schedule.stages} stages on {schedule.ranks} ranks, "
        f"{schedule.micro_batches} micro-batches, a backward as long as two forwards"
    )
    for rank, line in enumerate(_lines(schedule, timeline)):
        console.print(Text(f"rank {rank:<{len(str(schedule.ranks - 1))}}  ") + line)
    console.print("F forward, B backward" + _legend(schedule) + "; the number is the micro-batch")
    console.print(f"bubble {timeline.bubble:.1%}: the ranks' share of time without work")
    held = ", ".join(map(str, timeline.most_held))
    console.print(f"activations kept at once, in micro-batches of a stage, by rank: {held}")
    return 0


def _schedule(arguments: argparse.Namespace) -> Schedule:
    of_each = arguments.stages_per_rank
    if of_each is None:
        of_each = usual_stages_per_rank(arguments.schedule)
    for option, number in (
        ("--stages", arguments.stages),
        ("--micro-batches", arguments.micro_batches),
        ("--stages-per-rank", of_each),
    ):
        if number < 1:
            raise InvalidArgumentError(f"{option} is {number}. Pass at least 1.")
    if arguments.stages % of_each:
        raise InvalidArgumentError(
            f"--stages {arguments.stages} is no multiple of {of_each} stages on each rank. "
            f"Pass --stages {-(-arguments.stages // of_each) * of_each}, or another "
            "--stages-per-rank."
        )
    if arguments.stages * arguments.micro_batches > MOST_ACTIONS:
        raise InvalidArgumentError(
            f"--stages {arguments.stages} times --micro-batches {arguments.micro_batches} is "
            f"{arguments.stages * arguments.micro_batches:,}. Pass at most {MOST_ACTIONS:,} in all."
        )
    ranks = arguments.stages // of_each
    return make(arguments.schedule, ranks, arguments.micro_batches, of_each)


def _lines(schedule: Schedule, timeline: Timeline) -> list[Text]:
    """A line for each rank; a forward is one cell: "F0", or "Fa0" if ranks have several stages."""
    chunks = schedule.stages // schedule.ranks
    cell = 1 + len(str(schedule.micro_batches - 1)) + (chunks > 1)
    lines = []
    for timed in timeline.ranks:
        line = Text()
        for entry in timed:
            action = entry.action
            line.append("." * (round(entry.begin) * cell - len(line)))
            chunk = chr(ord("a") + action.stage // schedule.ranks % 26) if chunks > 1 else ""
            name = f"{action.kind.value}{chunk}{action.micro_batch}"
            width = round(entry.end - entry.begin) * cell
            line.append(name.ljust(width, "-"), style=_STYLES[action.kind])
        lines.append(line)
    return lines


def _legend(schedule: Schedule) -> str:
    legend = ""
    if any(action.kind is Kind.INPUT_GRADIENT for action in schedule.actions[0]):
        legend += " in halves: I input gradient, W weight gradient"
    if schedule.stages > schedule.ranks:
        legend += "; a, b, ... the rank's first, second, ... stage"
    return legend


def _for_programs(schedule: Schedule, timeline: Timeline) -> dict[str, object]:
    return {
        "schedule": schedule.name,
        "stages": schedule.stages,
        "ranks": schedule.ranks,
        "micro_batches": schedule.micro_batches,
        "end": timeline.end,
        "bubble": timeline.bubble,
        "most_held": timeline.most_held,
        "actions": [
            {
                "rank": rank,
                "kind": entry.action.kind.name.lower(),
                "stage": entry.action.stage,
                "micro_batch": entry.action.micro_batch,
                "begin": entry.begin,
                "end": entry.end,
            }
            for rank, timed in enumerate(timeline.ranks)
            for entry in timed
        ],
    }
