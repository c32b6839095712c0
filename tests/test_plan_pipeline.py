"""The command that draws pipeline schedules."""

import json
from pathlib import Path

import pytest

from pycomm import cli


def test_a_timeline_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "pipeline", "--stages", "3", "--micro-batches", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1f1b: 3 stages on 3 ranks, 3 micro-batches, a backward as long as two forwards",
        "rank 0  F0F1F2........B0--..B1--..B2--",
        "rank 1  ..F0F1....B0--F2B1--..B2--",
        "rank 2  ....F0B0--F1B1--F2B2--",
        "F forward, B backward; the number is the micro-batch",
        "bubble 40.0%: the ranks' share of time without work",
        "activations kept at once, in micro-batches of a stage, by rank: 3, 2, 1",
    ]


def test_several_stages_of_a_rank_have_letters(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--stages", "4", "--micro-batches", "2", "--schedule", "interleaved"]
    assert cli.main(["plan", "pipeline", *arguments]) == 0
    out = capsys.readouterr().out
    assert "4 stages on 2 ranks" in out
    assert "\nrank 1  ...Fa0Fa1Fb0Bb0---" in out


def test_halves_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--stages", "2", "--micro-batches", "2", "--schedule", "zero_bubble"]
    assert cli.main(["plan", "pipeline", *arguments]) == 0
    out = capsys.readouterr().out
    assert "\nrank 1  ..F0I0F1I1W0W1\n" in out
    assert "I input gradient, W weight gradient" in out


@pytest.mark.parametrize("before", [True, False])
def test_for_programs(before: bool, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pipeline", "--stages", "2", "--micro-batches", "1"]
    words = ["--json", *words] if before else [*words, "--json"]
    assert cli.main(["plan", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["end"] == 6
    assert told["bubble"] == 0.5
    assert told["actions"][-1] == {
        "rank": 1,
        "kind": "backward",
        "stage": 1,
        "micro_batch": 0,
        "begin": 2,
        "end": 4,
    }


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--stages", "0", "--micro-batches", "2"], "--stages is 0. Pass at least 1."),
        (["--stages", "2", "--micro-batches", "-1"], "--micro-batches is -1."),
        (
            ["--stages", "3", "--micro-batches", "2", "--schedule", "interleaved"],
            "--stages 3 is no multiple of 2 stages on each rank. Pass --stages 4",
        ),
        (
            ["--stages", "4", "--micro-batches", "2", "--stages-per-rank", "2"],
            '"1f1b" has one stage on each rank, not 2. Use "interleaved"',
        ),
        (["--stages", "2000", "--micro-batches", "2000"], "is 4,000,000. Pass at most 1,000,000"),
    ],
)
def test_nonsense_is_refused(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "pipeline", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("plan pipeline: ")
    assert text in told


def test_an_all_reduce_still_needs_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--hosts", "2"]) == 2
    assert "needs --hosts and --bytes" in capsys.readouterr().err


def test_the_drawing_has_a_box_for_each_action_and_is_the_same_each_time(tmp_path: Path) -> None:
    texts = []
    for name in ("first.svg", "second.svg"):
        path = tmp_path / name
        options = ["--stages", "3", "--micro-batches", "4", "--schedule", "zero_bubble"]
        assert cli.main(["plan", "pipeline", *options, "--svg", str(path)]) == 0
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    assert [texts[0].count(f">{number}</text>") >= 9 for number in range(4)] == [True] * 4
    assert "weight gradient" in texts[0] and "zero_bubble: 4 micro-batches" in texts[0]


def test_a_drawing_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--stages", "2", "--micro-batches", "2", "--svg", "/nowhere/at/all.svg"]
    assert cli.main(["plan", "pipeline", *options]) == 2
    assert "plan pipeline: --svg /nowhere/at/all.svg: No such file" in capsys.readouterr().err
