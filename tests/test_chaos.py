"""Jobs that break at random, a few of them: ``make chaos`` runs hundreds, docs/chaos.md says what
is counted."""

import mmap
import os
import shutil
from pathlib import Path

import pytest
from chaos import run, shared_memory
from chaos.job import CHECKPOINT
from chaos.kept import state_of_code
from chaos.plan import ELASTIC_KINDS, ELASTIC_PHASE, KINDS, PHASES, RANKS, Fault, fault_of
from chaos.reports import LEFT_MPI, left_mpi
from chaos.rounds import _only_the_launcher_waits
from chaos.saved import _judge_next_save, judge_checkpoint
from chaos.verdict import Outcome, judge
from journal import Line
from launchers import alone

from pycomm import failure


def test_a_round_follows_from_its_seed_and_number() -> None:
    assert fault_of(1, 17) == fault_of(1, 17)
    assert fault_of(1, 17) != fault_of(2, 17)
    assert Fault.decode(fault_of(1, 17).encode()) == fault_of(1, 17)


def test_every_kind_meets_every_phase_where_it_can_happen() -> None:
    faults = [fault_of(1, number) for number in range(len(KINDS) * len(PHASES))]
    met = {(fault.kind, fault.phase) for fault in faults}
    for kind in KINDS:
        for phase in PHASES:
            cannot = kind in ("differ", "leave") and phase in ("start-up", "shutdown")
            assert ((kind, phase) in met) == (kind not in ELASTIC_KINDS and not cannot)
    assert {kind for kind, phase in met if phase == ELASTIC_PHASE} == set(ELASTIC_KINDS)
    assert {fault.rank for fault in faults} == set(range(RANKS))


def made_up(*, broke: float = 1.0, end: float = 5.0, waited: bool = False) -> dict[int, list[Line]]:
    """What four ranks note that lose rank 3 at ``broke``, do their work, and go at ``end``."""
    done: list[Line] = [{"event": "end", "t": end, "step": 9}]
    if waited:
        done.append({"event": LEFT_MPI, "t": None})
    return {rank: list(done) for rank in range(3)} | {3: [{"event": "fault", "t": broke}]}


def judged(
    fault: Fault, lines: dict[int, list[Line]], broke: float | None = 1.0, exit_code: int | None = 0
) -> dict[str, int]:
    """What is counted, without zeros."""
    outcome = Outcome(str(fault), fault.kind, fault.phase)
    judge(outcome, fault, lines, broke, exit_code)
    return {what: count for what, count in outcome.counts.items() if count}


RECOVER = Fault("recover", 3, "elastic", 0.5)
LATE_KILL = Fault("kill", 3, "shutdown", 0.01)


def test_who_knows_of_a_loss_does_not_wait_for_it_in_mpi() -> None:
    """Every round that recovers has survivors that end after the fault: a hang there was "ok"."""
    assert judged(RECOVER, made_up()) == {}
    assert judged(RECOVER, made_up(waited=True)) == {"hangs": 3}
    assert judged(RECOVER, made_up(waited=True), broke=None, exit_code=None) == {"hangs": 3}


def test_who_had_left_when_a_rank_was_lost_may_wait_for_it_in_mpi() -> None:
    assert judged(LATE_KILL, made_up(broke=5.001, waited=True), broke=5.001) == {}
    assert judged(LATE_KILL, made_up(broke=4.999, waited=True), broke=4.999) == {}


def test_without_a_fault_nobody_waits_in_mpi() -> None:
    lines = made_up(waited=True) | {3: [{"event": "end", "t": 5.0}]}
    assert judged(LATE_KILL, lines, broke=None) == {"hangs": 3}


def test_the_wait_of_a_rank_in_mpi_is_found_in_its_words() -> None:
    said: list[str] = []
    member = failure.Member(2, 4, "node7", abort=lambda text: True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failure, "bound_end", lambda seconds, text: said.append(text))
        failure.bound_finalising(member, 8.0)
    assert left_mpi("x\n" + said[0] + "y\n") == [2]


@pytest.mark.parametrize(
    ("fault", "waits"),
    [(RECOVER, False), (LATE_KILL, False), (Fault("stop", 3, "shutdown", 0), True)],
)
def test_only_for_a_stopped_rank_the_launcher_may_wait(
    fault: Fault, waits: bool, tmp_path: Path
) -> None:
    """Ten seconds after the last "end" a round was over, with its ranks there, and no leak."""
    assert not _only_the_launcher_waits(fault, tmp_path)
    for rank in range(3):
        (tmp_path / f"rank-{rank}.jsonl").write_text('{"event": "end", "t": 1.0}\n')
    assert _only_the_launcher_waits(fault, tmp_path) == waits


@pytest.mark.parametrize(("exit_code", "found"), [(0, {}), (None, {}), (137, {"exit codes": 1})])
def test_when_survivors_end_with_0_so_does_the_launcher(
    exit_code: int | None, found: dict[str, int]
) -> None:
    assert judged(RECOVER, made_up(), exit_code=exit_code) == found
    assert judged(LATE_KILL, made_up(broke=5.0), broke=5.0, exit_code=exit_code) == found


@pytest.mark.parametrize(("exit_code", "found"), [(1, {}), (0, {"exit codes": 1})])
def test_when_a_survivor_fails_so_does_the_launcher(exit_code: int, found: dict[str, int]) -> None:
    error = {"event": "error", "t": 1.1, "type": "PeerLostError", "typed": True, "text": "rank 3"}
    lines = made_up() | {rank: [error] for rank in range(3)}
    assert judged(Fault("kill", 3, "training", 0.5), lines, exit_code=exit_code) == found


def test_the_exit_code_of_a_launcher_that_has_lost_a_host_is_nobodys_promise() -> None:
    fault = Fault("recover after power off", 3, "elastic", 0.5, hosts=2)
    lines = made_up() | {2: []}
    assert judged(fault, lines, exit_code=1) == {}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a round whose third save was its last."""
    folder = tmp_path_factory.mktemp("round")
    script = """
    import pycomm, sys
    from chaos.job import SAVED
    pycomm.init()
    pycomm.checkpoint.save(sys.argv[1], {"state": SAVED, "number": 2})
    """
    done = alone(script, str(folder / CHECKPOINT), PYTHONPATH=str(Path(__file__).parent))
    assert done.returncode == 0, done.err
    return folder


SAVING = Fault("kill", 3, "checkpoint", 0.5)


def found_of(folder: Path, latest: int, fault: Fault = SAVING) -> dict[str, int]:
    """What is counted of a checkpoint, where ranks have noted saves up to ``latest``."""
    outcome = Outcome(str(fault), fault.kind, fault.phase, happened=True)
    lines: list[Line] = [{"event": "saved", "number": number} for number in range(latest + 1)]
    judge_checkpoint(outcome, fault, folder, {0: lines, 1: lines[:-1], 2: [], 3: []})
    return {what: count for what, count in outcome.counts.items() if count}


def test_a_checkpoint_that_was_saved_is_whole(checkpoint: Path, tmp_path: Path) -> None:
    """No round had looked at it: loads come before the fault, or fail for the fault."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "round"))
    assert found_of(folder, 2) == {}
    assert found_of(folder, 1) == {}  # it was in place, and no rank was told
    assert found_of(folder, 3) == {"wrong sums": 1}
    (folder / CHECKPOINT).rename(folder / f"{CHECKPOINT}.replaced")  # between two renames
    assert found_of(folder, 2) == {}  # its next save has removed both
    shutil.rmtree(folder / CHECKPOINT)
    assert found_of(folder, 2) == {"leaks": 1}
    assert found_of(folder, -1) == {}


def test_a_damaged_checkpoint_is_counted(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "round"))
    [values] = folder.glob("*/*.distcp")
    os.truncate(values, 1000)
    assert found_of(folder, 2) == {"leaks": 1}
    assert found_of(folder, -1) == {"leaks": 1}


def test_what_a_broken_save_leaves_goes_with_the_next_one(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "round"))
    unfinished = folder / f"{CHECKPOINT}.unfinished"
    unfinished.mkdir()
    assert found_of(folder, 2, Fault("kill", 3, "shutdown", 0.01)) == {"leaks": 1}
    assert found_of(folder, 2) == {}
    assert not unfinished.exists()
    unfinished.mkdir()
    (unfinished / "notes.txt").touch()  # for which a save refuses to remove it
    outcome = Outcome("", "kill", "checkpoint", happened=True)
    _judge_next_save(outcome, folder, [unfinished.name])
    assert outcome.counts["leaks"] == 2


def test_shared_memory_without_a_process_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name with "pycomm" in it was looked for, and pycomm makes none."""
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    (tmp_path / "former").touch()
    before = shared_memory.names()
    for name in ("left", "sm_segment.node7.0.1.2", "mapped"):
        (tmp_path / name).write_bytes(b"x")
    with open(tmp_path / "mapped", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with open(tmp_path / "opened", "wb"), mapped:
        assert shared_memory.left_since(before) == ["left"]
    assert shared_memory.left_since(before) == ["left", "mapped", "opened"]


class Rounds:
    """Stands for real ones: which were run, and how they go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run: list[int] = []
        self.interrupt_at = -1
        self.red: set[int] = set()
        self.code = {"commit": "a"}
        monkeypatch.setattr(run, "state_of_code", lambda: self.code)
        monkeypatch.setattr(run, "what_is_missing", lambda: "")
        monkeypatch.setattr(run, "_round", self._round)

    def interrupted(self, arguments: list[str], number: int) -> None:
        """A run that ends in this round."""
        self.interrupt_at = number
        with pytest.raises(KeyboardInterrupt):
            run.main(arguments)
        self.interrupt_at = -1

    def _round(self, fault: Fault, folder: Path) -> Outcome:
        number = int(folder.name)
        if number == self.interrupt_at:
            raise KeyboardInterrupt
        self.run.append(number)
        outcome = Outcome(str(fault), fault.kind, fault.phase)
        if number in self.red:
            outcome.count("hangs", "for ever")
        return outcome


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Rounds:
    return Rounds(monkeypatch)


def test_an_interrupted_run_goes_on(
    rounds: Rounds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--rounds", "5", "--folder", str(tmp_path)]
    rounds.interrupted(arguments, 3)
    assert run.main(arguments) == 0
    assert rounds.run == [0, 1, 2, 3, 4]
    assert "3 rounds were done before." in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.new"))


def test_a_run_that_had_finished_starts_anew(
    rounds: Rounds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It printed the old table, in a second: what was mended since stayed red for ever."""
    arguments = ["--rounds", "2", "--folder", str(tmp_path)]
    rounds.red = {1}
    assert run.main(arguments) == 1
    rounds.red = set()
    assert run.main(arguments) == 0
    assert rounds.run == [0, 1, 0, 1]
    assert "Starts anew: the last run had finished." in capsys.readouterr().out


def test_a_run_of_other_code_is_not_gone_on_with(
    rounds: Rounds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--rounds", "2", "--folder", str(tmp_path)]
    rounds.interrupted(arguments, 1)
    rounds.code = {"commit": "b"}
    assert run.main(arguments) == 0
    assert rounds.run == [0, 0, 1]
    assert "Starts anew: the code is not that of the last run." in capsys.readouterr().out


def test_a_round_that_is_repeated_alone_is_run_and_not_kept(rounds: Rounds, tmp_path: Path) -> None:
    for _ in range(2):
        assert run.main(["--only", "1", "--folder", str(tmp_path)]) == 0
    assert run.main(["--rounds", "2", "--folder", str(tmp_path)]) == 0
    assert rounds.run == [1, 1, 0, 1]


def test_an_interrupt_while_an_outcome_is_written_loses_only_that(
    rounds: Rounds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a file was left, on which the next run failed."""
    arguments = ["--rounds", "2", "--folder", str(tmp_path)]
    write_text = Path.write_text

    def interrupted(path: Path, text: str) -> int:
        if not path.name.startswith("1.json"):
            return write_text(path, text)
        write_text(path, text[:10])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.main(arguments)
    assert run.main(arguments) == 0
    assert rounds.run == [0, 1, 1]


def test_the_state_of_the_code_tells_of_the_core() -> None:
    state = state_of_code()
    assert state == state_of_code()
    assert state["core"][0].endswith(".so")


@pytest.mark.timeout(900)
def test_twenty_broken_jobs(tmp_path: Path) -> None:
    # All kinds twice, over all phases.
    arguments = ["--rounds", "20", "--stride", "13", "--seed", "1", "--folder", str(tmp_path)]
    assert run.main(arguments) == 0
