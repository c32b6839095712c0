"""Pipeline schedules: pure data, so everything about them is checked without a rank."""

import dataclasses
import itertools

import pytest

from pycomm.errors import InvalidArgumentError
from pycomm.pipeline.schedule import (
    SCHEDULES,
    Action,
    Costs,
    Kind,
    Schedule,
    ScheduleError,
    make,
    simulate,
)

RANKS = [1, 2, 3, 4, 5, 8]
MICRO_BATCHES = [1, 2, 3, 4, 5, 7, 8, 9, 16, 31]
EVERY = [
    (name, ranks, micro_batches, stages_per_rank)
    for name, ranks, micro_batches in itertools.product(SCHEDULES, RANKS, MICRO_BATCHES)
    for stages_per_rank in ([1, 2, 3] if name == "interleaved" else [1])
]
every_schedule = pytest.mark.parametrize(
    ("name", "ranks", "micro_batches", "stages_per_rank"), EVERY
)


def drawn(schedule: Schedule) -> list[str]:
    """A line for each rank, two columns for each action; small letters are a second stage's."""
    lines = []
    costs = Costs(2, 2, 2) if has_halves(schedule) else Costs(2, 1, 1)
    for timed in simulate(schedule, costs).ranks:
        line = ""
        for entry in timed:
            action = entry.action
            letter = action.kind.value
            line = line.ljust(int(entry.begin), ".")
            line += letter if action.stage < schedule.ranks else letter.lower()
            line += str(action.micro_batch)
        lines.append(line)
    return lines


def has_halves(schedule: Schedule) -> bool:
    return any(action.kind is Kind.INPUT_GRADIENT for action in schedule.actions[0])


def test_gpipe_in_full() -> None:
    assert drawn(make("gpipe", 3, 4)) == [
        "F0F1F2F3........B0B1B2B3",
        "..F0F1F2F3....B0B1B2B3",
        "....F0F1F2F3B0B1B2B3",
    ]


def test_1f1b_in_full() -> None:
    assert drawn(make("1f1b", 3, 4)) == [
        "F0F1F2....B0F3B1..B2..B3",
        "..F0F1..B0F2B1F3B2..B3",
        "....F0B0F1B1F2B2F3B3",
    ]


def test_interleaved_in_full() -> None:
    assert drawn(make("interleaved", 3, 4)) == [
        "F0F1F2F3f0f1f2f3..b0..b1..b2..b3B0B1B2B3",
        "..F0F1F2F3f0f1f2b0f3b1..b2..b3B0B1B2B3",
        "....F0F1F2F3f0b0f1b1f2b2f3b3B0B1B2B3",
    ]


def test_zero_bubble_in_full() -> None:
    assert drawn(make("zero_bubble", 3, 4)) == [
        "F0F1F2....I0W0F3I1W1I2W2I3W3",
        "..F0F1..I0F2I1W0F3I2W1I3W2W3",
        "....F0I0F1I1F2I2W0F3I3W1W2W3",
    ]


@every_schedule
def test_it_completes_within_its_bound(
    name: str, ranks: int, micro_batches: int, stages_per_rank: int
) -> None:
    schedule = make(name, ranks, micro_batches, stages_per_rank)
    assert simulate(schedule).most_held == schedule.activation_bound
    in_all = {"gpipe": micro_batches, "1f1b": ranks, "zero_bubble": ranks}
    if name in in_all:
        assert max(schedule.activation_bound) == min(in_all[name], micro_batches)
    if name == "interleaved":
        group = -(-micro_batches // max(1, micro_batches // ranks))
        for rank, held in enumerate(schedule.activation_bound):
            most = 2 * (ranks - rank - 1) + (stages_per_rank - 1) * group + 1
            assert held == min(most, stages_per_rank * micro_batches)


@every_schedule
def test_gradients_are_accumulated_by_micro_batch(
    name: str, ranks: int, micro_batches: int, stages_per_rank: int
) -> None:
    schedule = make(name, ranks, micro_batches, stages_per_rank)
    for stage in range(schedule.stages):
        actions = schedule.actions[schedule.rank_of(stage)]
        for kinds in ({Kind.FORWARD}, {Kind.BACKWARD, Kind.WEIGHT_GRADIENT}):
            numbers = [a.micro_batch for a in actions if a.stage == stage and a.kind in kinds]
            assert numbers == list(range(micro_batches))


@every_schedule
def test_the_bubble_is_that_of_the_formula(
    name: str, ranks: int, micro_batches: int, stages_per_rank: int
) -> None:
    p, m, v = ranks, micro_batches, stages_per_rank
    if m < p and name in ("interleaved", "zero_bubble"):
        return  # too few to fill the pipeline even once; no formula is claimed
    rounds = {"gpipe": m, "1f1b": m, "interleaved": v * m, "zero_bubble": 3 * m}[name]
    bubble = simulate(make(name, p, m, v)).bubble
    assert bubble == pytest.approx((p - 1) / (rounds + p - 1), abs=1e-12)


def test_each_stage_may_cost_something_else() -> None:
    schedule = make("gpipe", 2, 2)
    timeline = simulate(schedule, [Costs(1, 1, 1), Costs(3, 1, 1)])
    # F0 F1 on rank 0, F0 F1 B0 B1 on rank 1 from 1 to 1 + 3 + 3 + 2 + 2, then B1 on rank 0.
    assert timeline.end == 13
    assert timeline.bubble == pytest.approx(1 - (6 + 10) / 26)


# --- schedules that are wrong ---------------------------------------------------------------------


def changed(schedule: Schedule, rank: int, actions: list[Action]) -> Schedule:
    of_ranks = list(schedule.actions)
    of_ranks[rank] = tuple(actions)
    return dataclasses.replace(schedule, actions=tuple(of_ranks))


def test_ranks_that_would_wait_for_each_other_are_named() -> None:
    schedule = make("1f1b", 2, 2)
    f0, f1, b0, b1 = (
        Action(kind, 0, n) for kind in (Kind.FORWARD, Kind.BACKWARD) for n in range(2)
    )
    other = [Action(a.kind, 1, a.micro_batch) for a in (f0, f1, b0, b1)]
    schedule = changed(changed(schedule, 0, [f0, b0, f1, b1]), 1, other)
    schedule = dataclasses.replace(schedule, activation_bound=(2, 2))
    with pytest.raises(ScheduleError) as caught:
        simulate(schedule)
    assert str(caught.value) == (
        "schedule 1f1b never ends with 2 micro-batches:\n"
        "  rank 0 waits for B0 of stage 1, on rank 1\n"
        "  rank 1 waits for F1 of stage 0, on rank 0"
    )


def test_a_backward_before_its_forward_is_refused() -> None:
    schedule = changed(
        make("gpipe", 1, 1), 0, [Action(Kind.BACKWARD, 0, 0), Action(Kind.FORWARD, 0, 0)]
    )
    with pytest.raises(ScheduleError, match="stage 0 takes micro-batch 0 BF, not FB or FIW"):
        simulate(schedule)


def test_a_missing_action_is_refused() -> None:
    schedule = make("zero_bubble", 2, 3)
    schedule = changed(schedule, 1, list(schedule.actions[1][:-1]))
    with pytest.raises(ScheduleError, match="stage 1 takes micro-batch 2 FI, not FB or FIW"):
        simulate(schedule)


def test_a_micro_batch_too_many_is_refused() -> None:
    schedule = make("gpipe", 1, 1)
    schedule = changed(schedule, 0, [*schedule.actions[0], Action(Kind.FORWARD, 0, 1)])
    with pytest.raises(ScheduleError, match="no stage 0 or no micro-batch 1"):
        simulate(schedule)


def test_an_action_on_the_wrong_rank_is_refused() -> None:
    schedule = make("gpipe", 2, 1)
    schedule = changed(schedule, 0, [*schedule.actions[0], Action(Kind.FORWARD, 1, 0)])
    with pytest.raises(ScheduleError, match="F0 of stage 1 is on rank 0"):
        simulate(schedule)


def test_a_rank_beyond_its_bound_is_refused() -> None:
    schedule = dataclasses.replace(make("gpipe", 2, 3), activation_bound=(3, 2))
    with pytest.raises(ScheduleError, match=r"rank 1 holds 3 micro-batches .* its bound is 2"):
        simulate(schedule)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("1F1B", 2, 4), "no pipeline schedule '1F1B'.\n  Pass one of 'gpipe', '1f1b'"),
        (("1f1b", 0, 4), "ranks is 0.\n  Pass at least 1"),
        (("1f1b", 2, 0), "micro_batches is 0"),
        (("interleaved", 2, 4, 0), "stages_per_rank is 0"),
        (("1f1b", 2, 4, 2), '"1f1b" has one stage on each rank, not 2.\n  Use "interleaved"'),
    ],
)
def test_what_makes_no_schedule_is_refused(arguments: tuple[str, int, int], text: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        make(*arguments)
    assert text in str(caught.value)
