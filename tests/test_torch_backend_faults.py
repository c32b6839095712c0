"""Whatever happens to a rank of torch.distributed: every rank learns of it, and every process ends.

The scenarios are those of ``torch_faults_program.py``, run in one go. Timeouts there are long where
none is expected: who waits for one of them is late here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist
import torch_faults_program as program
from forked_ranks import Outcome, run_program

from pycomm.errors import CommError, PeerLostError
from pycomm.torch_backend.monitored_barrier import MonitoredBarrier

pytestmark = pytest.mark.timeout(620)

# Between the fault and the end of the last process; the rest is what busy cores take.
SOON_S = 20.0

Outcomes = Mapping[str, list[Outcome]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """In two halves at a time: most of them wait for something most of the time."""

    def run_half(half: int, folder: Path) -> dict[str, list[Outcome]]:
        names = list(program.SCENARIOS)[half::2]
        return run_program("torch_faults_program.py", folder, 600, *names)

    folders = [tmp_path_factory.mktemp("faults") for _ in range(2)]  # which no thread may call
    with ThreadPoolExecutor() as threads:
        first, second = threads.map(run_half, range(2), folders)
    return {**first, **second}


def ended(outcomes: Outcomes, name: str, *codes: int) -> list[dict[str, object]]:
    """The ranks' reports; their processes have ended by themselves, with these exit codes."""
    ranks = outcomes[name]
    for rank, outcome in enumerate(ranks):
        assert outcome.returncode is not None, f"rank {rank} did not end: {outcome.err}"
    if codes:
        assert [outcome.returncode for outcome in ranks] == list(codes), [o.err for o in ranks]
    return [outcome.report for outcome in ranks]


@pytest.mark.parametrize("name", program.SCENARIOS)
def test_every_process_ends_by_itself(outcomes: Outcomes, name: str) -> None:
    ended(outcomes, name)


@pytest.mark.parametrize("name", [n for n in program.SCENARIOS if "_during_" in n])
def test_who_waits_for_a_peer_that_goes_raises_and_names_it(outcomes: Outcomes, name: str) -> None:
    *waiting, leaver = outcomes[name]
    gone = len(waiting)
    expected_code = {"killed": -9, "raises": 1, "exits": 3}.get(name.partition("_during_")[0], 1)
    assert leaver.returncode == expected_code, leaver.err
    for outcome in waiting:
        text = f"{outcome.report.get('error type')}: {outcome.report['error']}"
        kind = "MismatchError" if name.startswith("ends_") else "PeerLostError"
        assert kind in text and f"rank {gone}" in text, text
        assert outcome.returncode == 1, outcome.err
        assert outcome.seconds < leaver.seconds + SOON_S


@pytest.mark.parametrize("name", program.MISMATCHES)
def test_calls_that_differ_raise_on_every_rank_and_the_group_can_be_left(
    outcomes: Outcomes, name: str
) -> None:
    for rank, report in enumerate(ended(outcomes, f"mismatch_of_{name}", 0, 0)):
        text = f"{report.get('error type')}: {report.get('error')}"
        if name == "messages" and rank == 0:
            assert report["later type"] == "MismatchError"  # a send is over when it was taken
        else:
            assert "MismatchError" in text and "rank 0" in text, text
        assert "later" in report and report["destroyed"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mismatch_in_backward", "MismatchError"),
        ("timeout_in_backward", "CommTimeoutError"),
        ("timeout_of_the_default_group", "all_reduce"),
        ("timeout_of_a_receive", "recv"),
    ],
)
def test_what_is_raised_in_the_middle_ends_every_rank(
    outcomes: Outcomes, name: str, says: str
) -> None:
    for report in ended(outcomes, name, 1, 1):
        text = f"{report['error type']}: {report['error']}"
        assert says in text, text
        if name.startswith("timeout"):
            assert "timeout" in text or "timed out" in text


@pytest.mark.parametrize("name", ["timeout_of_a_subgroup", "timeout_set_later"])
def test_a_timeout_of_one_group_leaves_the_rest_usable(outcomes: Outcomes, name: str) -> None:
    for report in ended(outcomes, name, 0, 0):
        assert report["error type"] == "CommTimeoutError"
        assert "timeout after 1." in str(report["error"]) and report["destroyed"]


def test_a_monitored_barrier_tells_who_let_a_call_time_out(outcomes: Outcomes) -> None:
    for report in ended(outcomes, "monitored_barrier_after_a_timeout", 0, 0):
        assert report["reduction type"] == report["error type"] == "CommTimeoutError"
        assert "Rank 1 failed to pass monitoredBarrier" in str(report["error"])
        assert "again" not in report and report["destroyed"]


def test_a_monitored_barrier_tells_ranks_of_other_hosts_who_is_gone() -> None:
    """They cannot see it: rank 2's host has nobody else."""
    store = dist.HashStore()

    def look(ranks: Sequence[int], call: str) -> None:
        raise PeerLostError(f"{call} on rank 0: rank 1 is gone")

    def see_nobody(ranks: Sequence[int], call: str) -> None:
        pass

    def wait(rank: int) -> str:
        barrier = MonitoredBarrier(store, rank, 3, 0, look if rank == 0 else see_nobody)
        with pytest.raises(PeerLostError) as raised:
            barrier.wait(30, wait_all_ranks=False)
        return str(raised.value)

    with ThreadPoolExecutor() as threads:
        first, third = threads.map(wait, (0, 2))
    assert first == "monitored_barrier on rank 0: rank 1 is gone"
    assert third.startswith("monitored_barrier on rank 2: another host's rank") and first in third


def test_a_monitored_barrier_names_rank_and_remedy_when_its_store_is_gone() -> None:
    class Gone:
        def set(self, key: str, value: bytes) -> None:
            raise dist.DistNetworkError("Broken pipe")

    looked = []
    barrier = MonitoredBarrier(Gone(), 1, 3, 0, lambda ranks, call: looked.append(ranks))
    with pytest.raises(CommError, match=r"monitored_barrier on rank 1 of 3: .*Broken pipe\n.*log"):
        barrier.wait(30, wait_all_ranks=False)
    assert looked == [[0, 2]]  # of which none is known to be gone


def test_a_wait_that_times_out_can_be_repeated(outcomes: Outcomes) -> None:
    first, second = ended(outcomes, "timeout_of_a_wait", 0, 0)
    assert "timed out after 0.5 s" in str(first["error"])
    assert first["sum"] == second["sum"] == [2, 2, 2]


def test_who_does_not_come_is_named(outcomes: Outcomes) -> None:
    first, _ = ended(outcomes, "timeout_of_meeting", 1, 0)
    assert first["error type"] == "CommTimeoutError" and "rank 1 did not come" in str(
        first["error"]
    )


def test_ends_and_begins(outcomes: Outcomes) -> None:
    for report in ended(outcomes, "destroyed_twice", 0, 0):
        assert report["initialized"] is False and "later" in report
    for report in ended(outcomes, "begun_again_and_again", 0, 0):
        assert [report[f"sum {number}"] for number in range(7)] == [[2, 2, 2]] * 7
        assert report["done"]
    for report in ended(outcomes, "begun_twice", 0, 0):
        assert "twice" in str(report["error"]) and report["destroyed"]


def test_destroying_with_work_under_way(outcomes: Outcomes) -> None:
    for report in ended(outcomes, "destroyed_with_pending_work", 0, 0):
        assert "reductions" not in report  # what was started on all ranks came to its end
        assert "abandoned" in str(report["recv"])


def test_a_subgroup_can_be_destroyed_by_itself(outcomes: Outcomes) -> None:
    for report in ended(outcomes, "subgroup_destroyed_while_others_go_on", 0, 0, 0):
        assert report["sum"] == [27, 27, 27] and report["destroyed"]


@pytest.mark.parametrize(
    "name",
    ["never_destroyed", "one_goes_early", "one_destroys_early", "one_destroys_much_too_early"],
)
def test_leaving_needs_no_care(outcomes: Outcomes, name: str) -> None:
    ended(outcomes, name, 0, 0)


def test_who_leaves_while_others_call(outcomes: Outcomes) -> None:
    first, second = ended(outcomes, "one_destroys_while_the_other_calls", 0, 0)
    assert first["error type"] == second["destroy type"] == "MismatchError"
    first, second = ended(outcomes, "one_raises_and_destroys", 1, 1)
    assert first["error type"] == "ValueError" and second["error type"] == "MismatchError"
    for text in (str(first["destroy"]), str(second["error"])):  # the last thing that is printed
        assert "rank 0 made shutdown after ValueError: of the user's own" in text
        assert "The one that leaves has failed: read its log" in text


def test_errors_reach_ranks_that_had_no_part(outcomes: Outcomes) -> None:
    *_, third = ended(outcomes, "error_on_a_subgroup_not_caught", 1, 1, 1)
    assert "the job was ended by rank" in str(third["error"])
    for report in ended(outcomes, "error_caught_and_destroyed", 1, 1):
        assert report["destroyed"]
    _, second = ended(outcomes, "aborted", 0, 0)
    assert "aborted" in str(second["error"])


def test_forked_children_are_no_ranks(outcomes: Outcomes) -> None:
    for report in ended(outcomes, "data_loader_workers", 0, 0):
        assert "forked from a rank" in str(report["error"]) and report["destroyed"]
    for report in ended(outcomes, "forked_by_hand", 0, 0):
        for call in ("all_reduce", "async", "barrier", "send", "irecv"):
            assert "forked from a rank" in str(report[call]), call
        assert (report["child"], report["second_child"]) == (0, 0) and report["destroyed"]


def test_beside_calls_of_pycomm_and_groups_of_gloo(outcomes: Outcomes) -> None:
    for report in ended(outcomes, "pycomm_joined_before", 0, 0):
        assert report["sum"] == [24, 24, 24] and report["after"] == [2, 2, 2]
    for report in ended(outcomes, "pycomm_joined_after", 0, 0):
        assert report["sum"] == [24, 24, 24] and report["after"] is False
    for report in ended(outcomes, "on_some_ranks_joined_before", 1, 1):
        assert report["error type"] == "MismatchError"
    for report in ended(outcomes, "group_of_pycomm_in_a_world_of_gloo", 0, 0, 0):
        assert report["sum"] == [15, 15, 15] and report["destroyed"]


def test_callbacks_may_wait(outcomes: Outcomes) -> None:
    first, second = ended(outcomes, "callbacks_that_wait", 0, 0)
    assert first["sums"] == second["sums"] == [[16, 16, 16]] * 4
    assert first["grad"] == second["grad"]


@pytest.mark.parametrize("name", ["interrupted", "interrupted_while_waiting_for_work"])
def test_ctrl_c_ends_the_job(outcomes: Outcomes, name: str) -> None:
    first, second = ended(outcomes, name, 130, 1)
    assert first["error type"] == "KeyboardInterrupt"
    assert second["error type"] == "PeerLostError" and "interrupted" in str(second["error"])


def test_threads_on_groups_of_their_own(outcomes: Outcomes) -> None:
    for report in ended(outcomes, "threads_on_groups_of_their_own", 0, 0):
        assert report["sums"] == [0, 100, 200]


def test_the_profiler_sees_ranges(outcomes: Outcomes) -> None:
    for report in ended(outcomes, "profiled", 0, 0):
        counts = report["counts"]
        assert isinstance(counts, dict)
        assert counts["pycomm:all_reduce"] == 3  # blocking, asynchronous, and of the reducer
        for kind in ("broadcast", "all_gather", "reduce_scatter", "all_to_all", "reduce"):
            assert counts[f"pycomm:{kind}"] >= 1
        for kind in ("gather", "scatter", "barrier", "send", "recv"):
            assert counts[f"pycomm:{kind}"] == 1


def test_debug_level_detail(outcomes: Outcomes) -> None:
    for report in ended(outcomes, "debug_level_detail", 0, 0):
        assert report["sum"] == [4, 4, 4] and report["error type"] == "MismatchError"
