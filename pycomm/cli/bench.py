"""``python -m pycomm bench``: pycomm, its peers and the machine, side by side in one run."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

import pycomm
from pycomm import cost, launch
from pycomm.bench import peers as known_peers
from pycomm.bench import report, sizes
from pycomm.bench.ranks.measure import COLLECTIVES
from pycomm.bench.rounds import Entry, Measured, Turns, measure
from pycomm.bench.step import measure_step
from pycomm.bench.team import Team, check_memory
from pycomm.errors import CommError, InvalidArgumentError
from pycomm.objects import raise_together

DEFAULT_RANKS = 2
DEFAULT_SIZES = "4:67108864"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    what = parser.add_subparsers(dest="what", required=True, metavar="what")
    for collective in COLLECTIVES:
        one = what.add_parser(
            collective, help=f"{collective} against peers and the machine's limit"
        )
        _add_common(one)
        one.add_argument("--sizes", default=DEFAULT_SIZES, help="FIRST:LAST by fours, or a list")
        one.add_argument(
            "--peers",
            default="",
            help=f"of {', '.join(known_peers.PEERS)}; under a launcher of mpi, gloo, c10d",
        )
        one.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
        one.add_argument("--plot", type=Path, metavar="FILE", help="write a plot (png, svg, pdf)")
        one.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
        one.add_argument(
            "--bound-mbit",
            type=float,
            metavar="RATE",
            help="between hosts: a link's goodput in Mbit/s, which gives the limit",
        )
        one.add_argument(
            "--environments",
            type=Path,
            default=Path(".bench"),
            metavar="FOLDER",
            help="where the peers are installed (.bench)",
        )
    _add_common(what.add_parser("step", help="what synchronisation adds to a training step"))
    _add_common(what.add_parser("calibrate", help="measure and store what the cost model needs"))


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, help=f"processes to start ({DEFAULT_RANKS})")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (9)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. 0: all was measured; 1: a contender failed; 2: a wrong argument."""
    try:
        with _ended_by_signals():
            return _run(arguments)
    except InvalidArgumentError as error:
        print(error, file=sys.stderr)
        return 2
    except CommError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; its ranks have been ended.", file=sys.stderr)
        return 130
    except _SignalError as error:
        print(f"bench: ended by {error.signal.name}; its ranks too.", file=sys.stderr)
        return 128 + error.signal


def _run(arguments: argparse.Namespace) -> int:
    if arguments.ranks is None and not _under_launcher():
        arguments.ranks = DEFAULT_RANKS
    if arguments.ranks is not None and arguments.ranks < 1:
        raise InvalidArgumentError(f"bench: --ranks {arguments.ranks}: pass at least 1.")
    if arguments.rounds < 2:
        raise InvalidArgumentError(
            f"bench: --rounds {arguments.rounds}: pass at least 2, the first is not counted."
        )
    if arguments.what == "step":
        return _step(arguments)
    if arguments.what == "calibrate":
        return _calibrate(arguments)
    return _collective(arguments)


class _SignalError(BaseException):
    """Like KeyboardInterrupt, of another signal."""

    def __init__(self, signum: int) -> None:
        self.signal = signal.Signals(signum)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Leave as after Ctrl-C: the ranks are in sessions of their own and would not hear of it."""

    def leave(signum: int, _frame: object) -> None:
        raise _SignalError(signum)

    before = {each: signal.signal(each, leave) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _collective(arguments: argparse.Namespace) -> int:
    chosen_sizes = sizes.parse(arguments.sizes)
    peers = list(dict.fromkeys(peer for peer in arguments.peers.split(",") if peer))
    _check_files(arguments)
    with (
        _launched(arguments, peers)
        if _under_launcher()
        else _started(arguments, peers, max(chosen_sizes)) as job
    ):
        entries = [Entry(each, variant) for each in job.turns for variant in each.variants]
        console = Console(soft_wrap=True, quiet=not job.speaks, stderr=True)
        with console.status("") as status:
            measured = measure(
                entries,
                arguments.what,
                chosen_sizes,
                arguments.rounds,
                announce=lambda nbytes: status.update(f"{arguments.what}, {report.size(nbytes)}"),
            )
        measured.failures |= job.failures
        versions = [f"{each.label}: {each.version}" for each in job.turns]
    if job.speaks:
        _report(arguments, measured, peers, job.ranks, versions)
    return 1 if measured.failures else 0


def _check_files(arguments: argparse.Namespace) -> None:
    for path in (arguments.json, arguments.plot, arguments.markdown):
        if path is not None:
            _check_writable(path)
    if arguments.plot is not None:
        if arguments.plot.suffix not in (".png", ".svg", ".pdf"):
            raise InvalidArgumentError(
                f"bench: --plot {arguments.plot}: end it in .png, .svg or .pdf."
            )
        if importlib.util.find_spec("matplotlib") is None:
            raise InvalidArgumentError(
                "bench: --plot needs matplotlib. Run `pip install matplotlib`."
            )
    rate = arguments.bound_mbit
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise InvalidArgumentError(
            f"bench: --bound-mbit {rate:g}: pass a number of Mbit/s above 0."
        )


def _check_writable(path: Path) -> None:
    """Before minutes of measuring, not after. Leaves no file behind."""
    existed = path.exists()
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise InvalidArgumentError(
            f"bench: {path.absolute()} cannot be written: {error.strerror}."
        ) from None
    if not existed:
        path.unlink()


def _report(
    arguments: argparse.Namespace,
    measured: Measured,
    peers: Sequence[str],
    ranks: int,
    versions: Sequence[str],
) -> None:
    bound_s = None
    if arguments.bound_mbit is not None:
        per_byte = 8 / (arguments.bound_mbit * 1e6)
        factor = report.bus_factor(arguments.what, ranks)
        bound_s = {nbytes: factor * nbytes * per_byte for nbytes in measured.samples}
    figures = report.rows(measured, peers, bound_s)
    about = report.machine(ranks, versions)
    table = report.table(arguments.what, ranks, figures, peers)
    report.show(table, about)
    if arguments.json is not None:
        arguments.json.write_text(report.as_json(arguments.what, ranks, figures, about))
    if arguments.markdown is not None:
        arguments.markdown.write_text(
            report.markdown(arguments.what, ranks, figures, peers)
            + "\n"
            + "".join(f"- {line}\n" for line in about)
        )
    if arguments.plot is not None:
        report.plot(arguments.plot, arguments.what, ranks, figures)
    for label, failure in measured.failures.items():
        print(f"bench: {label} was left out. {failure}", file=sys.stderr)


@dataclass(frozen=True)
class _Job:
    """What is measured together.

    Attributes:
        turns: the contenders that are there.
        failures: by name, why another is not.
        speaks: whether this process prints; of a launcher's ranks one does.
    """

    turns: Sequence[Turns]
    ranks: int
    speaks: bool = True
    failures: dict[str, str] = field(default_factory=dict)


class _TeamTurns:
    """A started contender."""

    def __init__(self, label: str, team: Team) -> None:
        self.label = label
        self.variants: Sequence[str] = team.hello["variants"]
        self.version: str = team.hello["version"]
        self._team = team

    def turn(self, *, variant: str, collective: str, nbytes: int, repeat: int) -> list[list[float]]:
        return self._team.turn(variant=variant, collective=collective, nbytes=nbytes, repeat=repeat)


@contextlib.contextmanager
def _started(arguments: argparse.Namespace, peers: Sequence[str], largest: int) -> Iterator[_Job]:
    """Processes of each contender, all there at once and asleep between their turns.

    One that cannot be installed or started is left out, like one that fails later.
    """
    unknown = [peer for peer in peers if peer not in known_peers.PEERS]
    if unknown:
        raise InvalidArgumentError(
            f"bench: unknown peer {unknown[0]}. Pass some of {', '.join(known_peers.PEERS)}."
        )
    check_memory(arguments.ranks, contenders=1 + len(peers), largest=largest)
    turns: list[Turns] = []
    failures: dict[str, str] = {}
    with contextlib.ExitStack() as teams:
        for label in (report.OWN, *peers):
            try:
                team = Team(label, _commands(label, arguments), arguments.ranks)
            except CommError as error:
                failures[label] = str(error)
            else:
                turns.append(_TeamTurns(label, teams.enter_context(team)))
        yield _Job(turns, arguments.ranks, failures=failures)


def _commands(label: str, arguments: argparse.Namespace) -> list[tuple[list[str], dict[str, str]]]:
    if label in known_peers.MPI_PEERS:
        folder = arguments.environments.absolute()
        return [known_peers.mpi_command(label, arguments.ranks, folder)]
    return _torch_commands("own" if label == report.OWN else label, arguments.ranks)


@contextlib.contextmanager
def _launched(arguments: argparse.Namespace, peers: Sequence[str]) -> Iterator[_Job]:
    from pycomm.bench import here

    pycomm.init()
    if arguments.ranks not in (None, pycomm.size()):
        raise InvalidArgumentError(
            f"bench: --ranks {arguments.ranks}, but the launcher has started {pycomm.size()}, and "
            "those are measured. Leave --ranks away, or run the command without the launcher."
        )
    yield _Job(here.contenders(peers), pycomm.size(), speaks=pycomm.rank() == 0)


def _under_launcher() -> bool:
    return launch.detect(os.environ).launcher is not launch.Launcher.NONE


def _step(arguments: argparse.Namespace) -> int:
    if _under_launcher():
        raise InvalidArgumentError(
            "bench step starts its ranks itself: run it without a launcher, with --ranks."
        )
    check_memory(arguments.ranks)
    with (
        Team("step", _torch_commands("step", arguments.ranks), arguments.ranks) as team,
        Console(stderr=True).status("") as status,
    ):
        costs = measure_step(
            team, arguments.rounds, announce=lambda number: status.update(f"step, round {number}")
        )
        parameters = team.hello["parameters"]
    table = Table(
        "", "step ms", "synchronisation ms", title=f"{arguments.ranks} ranks, medians", box=None
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for variant, cost_ in costs.items():
        difference = f"{1e3 * cost_.cost_s:.1f} +- {1e3 * cost_.spread_s:.1f}"
        table.add_row(
            variant, f"{1e3 * cost_.step_s:.1f}", "" if variant == "alone" else difference
        )
    seconds = {variant: each.cost_s for variant, each in costs.items()}
    added = {on: seconds[f"DDP on {on}"] - seconds["DDP on idle"] for on in ("pycomm", "gloo")}
    about = [
        f"{parameters / 1e6:.1f} M parameters; pycomm costs "
        f"{seconds['pycomm'] / seconds['DDP on gloo']:.2f} of DistributedDataParallel on gloo",
        f"to DDP on a process group that does nothing (idle) pycomm adds "
        f"{added['pycomm'] / added['gloo']:.2f} of what gloo adds",
    ]
    report.show(table, about + report.machine(arguments.ranks, []))
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    if not _under_launcher():
        raise InvalidArgumentError(
            "bench calibrate measures between hosts: start it on them, with "
            "`mpirun -np RANKS --host A,B python -m pycomm bench calibrate`."
        )
    path = cost.cost_file(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        # What init() would read is about to be replaced, and may be missing or damaged.
        os.environ["PYCOMM_COST_FILE"] = str(cost.CostModel().save(Path(folder) / "cost.json"))
        pycomm.init()
    mistake = None
    if pycomm.rank() == 0:
        try:
            with contextlib.suppress(OSError):  # _check_writable tells
                path.parent.mkdir(parents=True, exist_ok=True)
            _check_writable(path)
        except InvalidArgumentError as error:
            mistake = error
    raise_together("bench calibrate", mistake, pycomm.runtime.world_group())
    model = cost.calibrate(pycomm.runtime.world_group())
    if pycomm.rank() == 0:
        model.save(path)
        print(f"{path}: {model}")
    return 0


def _torch_commands(module: str, ranks: int) -> list[tuple[list[str], dict[str, str]]]:
    return known_peers.torch_commands(
        f"pycomm.bench.ranks.{module}", ranks, known_peers.free_port()
    )
