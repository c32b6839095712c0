"""The table of faults (`make fault-table`): what it lets pass, and where it is written."""

import re
from pathlib import Path

import pytest
from faults.every import FAULTS
from faults.fault import RANKS
from faults.render import BEGIN, END, table, write
from faults.runner import Seen
from faults.table import main
from faults.verdict import Row
from journal import Line

NAME = "another_shape"


def notes(rank: int, **changes: object) -> list[Line]:
    """Of a rank that sees what it is to see, 0.25 s after the fault, but for the changes."""
    saw = {"type": "MismatchError", "text": f"call #2 differs: {rank}", "usable": False} | changes
    began = [{"fault": NAME, "event": "began", "t": 10.0}] if rank == RANKS - 1 else []
    return [
        *began,
        {"fault": NAME, "event": "saw", "t": 10.25, **saw},
        {"fault": NAME, "event": "again", "t": 10.5, "works": False, "text": "no"},
        {"fault": NAME, "event": "over", "t": 11.0, "works": True, "text": ""},
    ]


def row(seen: Seen) -> Row:
    made = Row(FAULTS[NAME])
    made.add(seen)
    return made


def test_what_is_as_it_is_to_be() -> None:
    made = row(Seen([notes(rank) for rank in range(RANKS)], ""))
    assert made.problems == []
    assert made.seconds == [0.25] * (RANKS - 1)  # the victim's own are not counted
    assert "| all: `MismatchError` | 0.25 (0.25) | no | yes |" in table([made])


@pytest.mark.parametrize(
    ("of_rank_1", "problem"),
    [
        ([], "rank 1 was silent"),
        (notes(1, type="PeerLostError"), "rank 1 saw PeerLostError: call #2 differs: 1, not "),
        (notes(1, type="", text=""), "rank 1 saw nothing: , not MismatchError"),
        (notes(1, usable=True), "rank 1: group_usable is True"),
        (notes(1)[:2], "rank 1: starting over: did not happen"),
    ],
)
def test_what_is_not(of_rank_1: list[Line], problem: str) -> None:
    ranks = [notes(rank) for rank in range(RANKS)]
    ranks[1] = of_rank_1
    assert any(found.startswith(problem) for found in row(Seen(ranks, "")).problems)


def test_a_hang_and_a_fault_that_did_not_happen() -> None:
    found = row(Seen([[]] * RANKS, "", hung=True)).problems
    assert found[:2] == ["the job hung", "it did not come to the fault"]


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "errors.md"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")
    write(page, "new\n")
    assert page.read_text() == f"before\n{BEGIN}new\n{END}after\n"
    page.write_text("neither")
    with pytest.raises(ValueError, match="lacks the lines"):
        write(page, "new\n")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--only", "no such"], "no fault has that in its name: .*kill"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert re.search(problem, capsys.readouterr().err)
