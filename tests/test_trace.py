"""The flight recorder: what errors save of it, what of it a timeout tells, and how it is shown."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launchers import TIMEOUT_S, mpirun_command, process_options
from run_ranks import RankError, run_ranks

import pycomm
from pycomm import _core
from pycomm.cli import main
from pycomm.cli.trace import _cell, _summary, live_jobs
from pycomm.cli.trace_rows import RankView, first_divergence, rows
from pycomm.errors import CommTimeoutError, MismatchError

PROGRAM = str(Path(__file__).parent / "trace_program.py")


def reduce_(group, count, name="", op=_core.ReduceOp.SUM):
    tensor = torch.ones(count)
    address = tensor.data_ptr()
    group.all_reduce(address, address, count, _core.DType.FLOAT32, op, name=name)


def saved_trace(folder, fn, world_size=3, hosts=None):
    """What is saved when ``fn`` fails on the ranks of a loopback world."""
    worlds = _core.loopback_worlds(
        hosts or [0] * world_size, timeout_s=20.0, trace_folder=str(folder)
    )
    errors = {}

    def run(rank):
        try:
            fn(worlds[rank].group)
        except pycomm.CommError as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def views_in(folder):
    traces = [_core.read_trace(str(path)) for path in sorted(folder.glob("*.trace"))]
    views = [RankView(rank, trace.now_s) for trace in traces for rank in trace.ranks]
    return sorted(views, key=lambda view: view.rank)


def test_a_mismatch_is_saved_and_pointed_at(tmp_path, capsys):
    def calls(group):
        reduce_(group, 4, "bucket 0")
        reduce_(group, 5 if group.rank == 1 else 6, "bucket 1")

    errors = saved_trace(tmp_path / "job", calls)
    assert sorted(errors) == [0, 1, 2]
    for error in errors.values():
        assert isinstance(error, MismatchError)
        assert f"python -m pycomm trace {tmp_path / 'job'}" in str(error)
    views = views_in(tmp_path / "job")
    aligned = rows(views)
    assert [row.sequence for row in aligned] == [1, 2]
    assert sorted(aligned[0].records) == [0, 1, 2]
    assert len(aligned[1].records) >= 2  # the third may come after two have found the difference
    assert aligned[0].usual.call == "all_reduce 'bucket 0' of 4 float32, SUM"
    divergence = first_divergence(views, aligned)
    assert divergence is not None and divergence.row is aligned[1]
    assert "at call #2 of world: rank" in str(divergence)
    for call in ("all_reduce 'bucket 1' of 6 float32", "all_reduce 'bucket 1' of 5 float32"):
        assert f" made {call}" in str(divergence)
    assert main(["trace", str(tmp_path / "job")]) == 0
    shown = capsys.readouterr().out
    assert "First divergence" in shown and "call #2 differs" in shown


def recorded(rank, calls, size=3):
    """A rank's recorder: of each call its number, sequence (0: a message), text and duration."""
    records = [
        SimpleNamespace(
            number=number,
            group=1,
            group_name="world",
            sequence=sequence,
            is_message=sequence == 0,
            call=call,
            site="",
            hash=0,
            state=_core.OperationState.DONE,
            queued_s=float(number),
            started_s=float(number),
            ended_s=number + seconds,
        )
        for number, sequence, call, seconds in calls
    ]
    identity = {"size": size, "host": 0, "process": 1, "host_name": "node7", "job": "j"}
    state = {"gone": False, "left": False, "to_time_of_day_s": 0.0}
    return RankView(SimpleNamespace(rank=rank, records=records, **identity, **state), 9e3)


def test_a_rank_that_has_forgotten_its_calls_is_not_one_that_did_not_come():
    """Half as many messages, and rank 0 still knew of the barrier: rank 1 was said to miss it."""
    few = recorded(0, [(1, 1, "barrier", 0.001), *((n, 0, "send", 0.001) for n in range(2, 600))])
    many = recorded(1, [(n, 0, "send", 0.001) for n in range(178, 1202)])
    aligned = rows([few, many])
    assert first_divergence([few, many], aligned) is None
    assert _cell(aligned[0], many) == "not kept"
    # It does not know of a call that others began since.
    late = recorded(0, [(300, 1, "barrier", 0.001)])
    assert str(first_divergence([late, many], rows([late, many]))).startswith(
        "First divergence: rank 1 (alive) has not come to call #1 of world: barrier"
    )
    nothing = recorded(1, [])
    assert "rank 1 (alive) has not come" in str(first_divergence([few, nothing], aligned))


def test_of_many_ranks_one_that_did_something_else_stands_out():
    """It was among those that were done, for its call had taken milliseconds."""
    views = [
        recorded(rank, [(1, 1, "broadcast" if rank == 3 else "barrier", 0.002)])
        for rank in range(9)
    ]
    [row] = rows(views)
    assert _summary(row, views) == "done: 0-2, 4-8; broadcast: 2.0 ms: 3"


def test_arguments_that_make_no_sense(capsys):
    for arguments in (["--last", "0"], ["--last", "-3"], ["folder", "--job", "x"]):
        with pytest.raises(SystemExit):
            main(["trace", *arguments])
    errors = capsys.readouterr().err
    assert "'-3' is no number of calls; pass at least 1" in errors
    assert "not allowed with argument" in errors


def test_every_host_saves_its_ranks(tmp_path):
    def calls(group):
        reduce_(group, 4)
        reduce_(group, 5 if group.rank == 3 else 6)

    errors = saved_trace(tmp_path / "job", calls, world_size=4, hosts=[0, 0, 1, 1])
    assert sorted(errors) == [0, 1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == [
        "host-0.trace",
        "host-1.trace",
    ]
    assert [view.rank for view in views_in(tmp_path / "job")] == [0, 1, 2, 3]


def test_a_host_that_is_told_of_an_end_saves_its_ranks_too(tmp_path):
    def calls(group):
        if group.rank == 0:
            group.abort("rank 0 has had enough")
        group.barrier()

    assert sorted(saved_trace(tmp_path / "job", calls, hosts=[0, 0, 1])) == [0, 1, 2]
    assert [view.rank for view in views_in(tmp_path / "job")] == [0, 1, 2]


def test_a_disk_that_hangs_holds_up_no_error(tmp_path):
    slow = tmp_path / f"host-0.trace.{os.getpid()}.new"
    os.mkfifo(slow)  # to open it waits for a reader

    def calls(group):
        reduce_(group, 4 + group.rank)

    began = time.monotonic()
    assert sorted(saved_trace(tmp_path, calls)) == [0, 1, 2]
    assert time.monotonic() - began < 15  # its deadline is 20 s
    slow.read_bytes()


def test_only_the_owner_can_read_it(tmp_path):
    saved_trace(tmp_path / "job", lambda group: reduce_(group, 4 + group.rank))
    assert (tmp_path / "job" / "host-0.trace").stat().st_mode & 0o777 == 0o600


def test_a_folder_that_cannot_be_made_is_said_once_and_hides_no_error(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    errors = saved_trace(tmp_path / "file" / "job", lambda group: reduce_(group, 4 + group.rank))
    assert all(isinstance(error, MismatchError) for error in errors.values())
    assert capfd.readouterr().err.count("cannot save what the ranks did last") == 1


def test_nothing_is_saved_where_no_folder_is_named():
    with pytest.raises(RankError, match="differs") as caught:
        run_ranks(2, lambda group: reduce_(group, 4 + group.rank))
    assert "pycomm trace" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 10, 14, 100, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path, length):
    saved_trace(tmp_path / "job", lambda group: reduce_(group, 4 + group.rank))
    whole = (tmp_path / "job" / "host-0.trace").read_bytes()
    (tmp_path / "cut.trace").write_bytes(whole[:length])
    with pytest.raises(pycomm.CommError, match=r"cut\.trace is not a whole trace"):
        _core.read_trace(str(tmp_path / "cut.trace"))


def test_what_is_no_trace_is_refused(tmp_path, capsys):
    (tmp_path / "text.trace").write_text("pycomm trace 1\n" + "x" * 1000)
    assert main(["trace", str(tmp_path)]) == 1
    assert main(["trace", str(tmp_path / "nothing.trace")]) == 1
    (tmp_path / "empty").mkdir()
    assert main(["trace", str(tmp_path / "empty")]) == 1
    assert capsys.readouterr().err.count("trace") >= 3


def test_a_timeout_tells_who_is_here_and_what_the_others_did():
    def calls(group):
        reduce_(group, 4, "bucket 0")
        if group.rank < 2:
            group.barrier(timeout_s=0.5)
        else:
            time.sleep(1.5)

    with pytest.raises(RankError) as caught:
        run_ranks(4, calls)
    error = caught.value.__cause__
    assert isinstance(error, CommTimeoutError)
    text = str(error)
    assert "Of this host's ranks 0, 1 got there." in text
    assert re.search(
        r"rank 2 \(process \d+, \w+\) last did all_reduce 'bucket 0' of 4 float32, SUM "
        r"\(call #1 of world\) at tests/test_trace\.py:\d+, which ended \d+\.\d s ago",
        text,
    )
    assert "rank 3 (process" in text


def test_who_waits_long_is_told_for_whom_once(capfd):
    worlds = _core.loopback_worlds([0, 0, 0], timeout_s=20.0, warn_after_s=0.3)

    def run(rank):
        if rank == 2:
            time.sleep(1.0)
        worlds[rank].group.barrier()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pycomm: ")]
    assert len(lines) == 1, lines
    assert re.match(
        r"pycomm: barrier \(call #1.*\) on rank 0 has waited 0\.\d s for rank 2", lines[0]
    )


def test_records_say_where_the_user_made_the_call(tmp_path):
    here = sys._getframe().f_lineno

    def calls(group):
        reduce_(group, 4)
        group.barrier()
        reduce_(group, 4 + group.rank)

    saved_trace(tmp_path / "job", calls, world_size=2)
    sites = [record.site for record in views_in(tmp_path / "job")[0].records]
    assert sites[1] == f" at tests/test_trace.py:{here + 4}"


# --- real processes ------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path):
    """Starts the program on three ranks, and ends it."""
    started = []

    def start(what, **environ):
        command = [*mpirun_command(3), sys.executable, PROGRAM, what]
        options = process_options(PYCOMM_TRACE_FOLDER=str(tmp_path), **environ)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_a_timeout_shows_the_stack_of_the_rank_that_does_not_come(job, tmp_path, capsys):
    output, _ = job("sleep", CALL_TIMEOUT_S="2").communicate(timeout=TIMEOUT_S)
    assert "Of this host's ranks 0, 1 got there." in output
    assert "last did broadcast of 6 float32, shape (2, 3), root 1 (call #2 of world)" in output
    assert re.search(r'File ".*trace_program\.py", line \d+ in absent', output)
    assert re.search(r"#3 at tests/trace_program\.py:\d+\) on rank", output)
    [folder] = tmp_path.iterdir()  # what was saved outlives all ranks
    assert main(["trace", str(folder)]) == 0
    assert "rank 2 (alive) has not come to call #3" in capsys.readouterr().out
    assert main(["trace", str(folder), "--rank", "2"]) == 0
    assert "broadcast of 6 float32" in capsys.readouterr().out


def test_a_timeout_says_that_a_rank_is_stopped(job):
    output, _ = job("stop", CALL_TIMEOUT_S="2").communicate(timeout=TIMEOUT_S)
    assert re.search(r"rank 2 \(process \d+, stopped by a signal\) last did broadcast", output)
    assert re.search(r"`kill -CONT \d+` lets it go on", output)


def test_a_mismatch_shows_both_places(job, tmp_path, capsys):
    output, _ = job("differ").communicate(timeout=TIMEOUT_S)
    for call in ("5 float32, shape (5,), MAX", "6 float32, shape (6,), SUM"):
        assert f"made all_reduce of {call} at tests/trace_program.py:" in output
    [folder] = tmp_path.iterdir()
    assert main(["trace", str(folder)]) == 0
    assert "First divergence, at call #3 of world" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("running", "job", "said"),
    [
        (["abc45678-9", "def"], "x", "name begins with 'x'; there are: abc45678, def."),
        ([], "x", "name begins with 'x'; no job of this user runs here."),
        (["abc45678-9", "abx", "def"], "ab", "several jobs run on this host: abc45678, abx.\n"),
        (["abc45678-9", "def"], None, "several jobs run on this host: abc45678, def.\n"),
    ],
)
def test_a_job_that_is_not_one_is_refused(running, job, said, monkeypatch, capsys):
    """A name that no job has was answered with "several jobs run: none of that name"."""
    monkeypatch.setattr("pycomm.cli.trace.live_jobs", lambda: {name: [] for name in running})
    assert main(["trace", *(["--job", job] if job else [])]) == 1
    assert said in capsys.readouterr().err


def test_a_running_job_is_shown_and_one_whose_rank_was_killed(job, capsys):
    process = job("sleep")
    lines = [process.stdout.readline() for _ in range(3)]
    pids = {int(line.removeprefix("ready: process ")) for line in lines}
    [name] = [  # others may run
        name for name, ranks in live_jobs().items() if pids & {rank.process for rank in ranks}
    ]
    deadline = time.monotonic() + 15
    shown = ""
    while "First divergence" not in shown and time.monotonic() < deadline:
        assert main(["trace", "--job", name]) == 0
        shown = capsys.readouterr().out
        time.sleep(0.05)
    assert "3 ranks" in shown or "running" in shown
    assert "rank 2 (alive) has not come to call #3 of world: all_reduce of 5 float32" in shown
    assert "in it for" in shown
    victim = int(re.search(r"rank 2: alive, process (\d+)", shown)[1])
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert "rank 2 is gone" in output


def test_an_unfinished_message_is_shown(job, tmp_path, capsys):
    job("message", CALL_TIMEOUT_S="2").communicate(timeout=TIMEOUT_S)
    [folder] = tmp_path.iterdir()
    main(["trace", str(folder)])
    assert re.search(
        r"recv of 3 float32, shape \(3,\) from rank 2, tag 7 at", capsys.readouterr().out
    )
