"""Which rank works on which micro-batch when: pipeline schedules as data.

Nothing here communicates. A schedule is a list of actions for each rank; ``simulate`` proves that
it completes and predicts its time, bubble and memory.

Gradients of a stage are accumulated in the order of its micro-batches in every schedule, which
makes them the bits that one process computes from the same micro-batches.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence

from pycomm.errors import InvalidArgumentError


class Kind(enum.Enum):
    """What an action does; the value is its letter in a timeline."""

    FORWARD = "F"
    BACKWARD = "B"  # both gradients
    INPUT_GRADIENT = "I"  # the half of a backward that the previous stage waits for
    WEIGHT_GRADIENT = "W"  # the half that nobody waits for


@dataclasses.dataclass(frozen=True)
class Action:
    """One piece of work: ``Action(Kind.FORWARD, stage=0, micro_batch=2)``."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.micro_batch} of stage {self.stage}"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Each rank's actions, in the order it takes them.

    Stage ``s`` is on rank ``s % ranks``: with several stages on a rank, a micro-batch passes all
    ranks in turn, several times.
    """

    name: str
    stages: int
    micro_batches: int
    actions: tuple[tuple[Action, ...], ...]  # of each rank
    activation_bound: tuple[int, ...]
    """Micro-batches whose activations each rank may hold at once, summed over its stages."""

    @property
    def ranks(self) -> int:
        return len(self.actions)

    def rank_of(self, stage: int) -> int:
        return stage % self.ranks


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds, or any unit, that each part of a stage's work takes for one micro-batch.

    A backward is both its halves. What is common, that a backward takes as long as two forwards,
    is the default.
    """

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0

    def of(self, kind: Kind) -> float:
        if kind is Kind.FORWARD:
            return self.forward
        if kind is Kind.INPUT_GRADIENT:
            return self.input_gradient
        if kind is Kind.WEIGHT_GRADIENT:
            return self.weight_gradient
        return self.input_gradient + self.weight_gradient


EQUAL_COSTS = Costs()


@dataclasses.dataclass(frozen=True)
class Timed:
    """An action of a timeline, and when it runs."""

    action: Action
    begin: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What a schedule takes, transfers not counted."""

    ranks: tuple[tuple[Timed, ...], ...]
    most_held: tuple[int, ...]
    """The largest number of micro-batches whose activations each rank held at once."""

    @property
    def end(self) -> float:
        return max((timed[-1].end for timed in self.ranks if timed), default=0.0)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time, from the first action to the last, that they are idle."""
        busy = sum(timed.end - timed.begin for rank in self.ranks for timed in rank)
        return 1 - busy / (len(self.ranks) * self.end) if self.end else 0.0


# --- the schedules --------------------------------------------------------------------------------


def gpipe(ranks: int, micro_batches: int, stages_per_rank: int = 1) -> Schedule:
    """All forwards, then all backwards.

    Bubble, for p ranks, m micro-batches and stages of equal cost: (p-1)/(m+p-1). Every rank holds
    the activations of all micro-batches.

    Source: Huang et al., GPipe, NeurIPS 2019.
    """
    _one_stage_a_rank("gpipe", stages_per_rank)
    numbers = range(micro_batches)
    actions = tuple(
        tuple(
            Action(kind, rank, number)
            for kind in (Kind.FORWARD, Kind.BACKWARD)
            for number in numbers
        )
        for rank in range(ranks)
    )
    return Schedule("gpipe", ranks, micro_batches, actions, (micro_batches,) * ranks)


def one_f_one_b(ranks: int, micro_batches: int, stages_per_rank: int = 1) -> Schedule:
    """1F1B: a backward after each forward as soon as the first gradient can be there.

    The bubble of GPipe, (p-1)/(m+p-1); rank r holds the activations of at most p-r micro-batches.

    Source: Narayanan et al., PipeDream, SOSP 2019 (there with weight versions; here every step is
    flushed, as in PipeDream-Flush, ICML 2021).
    """
    _one_stage_a_rank("1f1b", stages_per_rank)
    of_ranks = []
    for rank in range(ranks):
        passes = [(rank, number) for number in range(micro_batches)]
        of_ranks.append(_alternating(passes, passes, warm_up=ranks - rank - 1))
    bound = tuple(min(ranks - rank, micro_batches) for rank in range(ranks))
    return Schedule("1f1b", ranks, micro_batches, tuple(of_ranks), bound)


def interleaved(ranks: int, micro_batches: int, stages_per_rank: int = 2) -> Schedule:
    """1F1B with several stages on each rank, which divides the bubble by their number v.

    Micro-batches pass in groups of p (as even ones of p or a few more where p does not divide m):
    a rank takes a group through its first stage, then through its second, and so on; backward
    likewise from the last one. Bubble for m of at least p: (p-1)/(v m+p-1). With groups of g,
    rank r holds at most 2(p-r-1) + (v-1)g + 1 activations, each of a stage that is v times smaller.

    Source: Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM, SC 2021 (there p divides m).
    """
    chunks = range(stages_per_rank)
    groups = _even_groups(micro_batches, max(1, micro_batches // ranks))
    bound, of_ranks = [], []
    for rank in range(ranks):
        forwards = [(c * ranks + rank, n) for group in groups for c in chunks for n in group]
        backwards = [
            (c * ranks + rank, n) for group in groups for c in reversed(chunks) for n in group
        ]
        # The first backward needs the first group's way through all of the rank's stages, and
        # what enters meanwhile keeps the ranks after this one busy.
        first = len(groups[0]) * (stages_per_rank - 1)
        warm_up = 2 * (ranks - rank - 1) + first
        of_ranks.append(_alternating(forwards, backwards, warm_up))
        bound.append(min(warm_up + 1, len(forwards)))
    return Schedule(
        "interleaved", ranks * stages_per_rank, micro_batches, tuple(of_ranks), tuple(bound)
    )


def zero_bubble(ranks: int, micro_batches: int, stages_per_rank: int = 1) -> Schedule:
    """ZB-H1: the halves of a backward apart, so that weight gradients fill what would be idle.

    1F1B in which rank r puts off r weight gradients: the rank before it gets its input gradients
    that much earlier, and what was put off fills the end. Bubble at equal costs and m of at least
    p: (p-1)/(3m+p-1), about a third of that of 1F1B. Activations stay until the weight gradient, so
    every rank holds those of at most p micro-batches, as rank 0 does in 1F1B.

    Source: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024.
    """
    _one_stage_a_rank("zero_bubble", stages_per_rank)
    of_ranks = []
    for rank, whole in enumerate(one_f_one_b(ranks, micro_batches).actions):
        actions = []
        for action in whole:
            number = action.micro_batch
            if action.kind is Kind.FORWARD:
                actions.append(action)
                continue
            actions.append(Action(Kind.INPUT_GRADIENT, rank, number))
            if number >= rank:
                actions.append(Action(Kind.WEIGHT_GRADIENT, rank, number - rank))
        for number in range(max(0, micro_batches - rank), micro_batches):
            actions.append(Action(Kind.WEIGHT_GRADIENT, rank, number))
        of_ranks.append(tuple(actions))
    bound = (min(ranks, micro_batches),) * ranks
    return Schedule("zero_bubble", ranks, micro_batches, tuple(of_ranks), bound)


SCHEDULES: Mapping[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zero_bubble": zero_bubble,
}


def make(name: str, ranks: int, micro_batches: int, stages_per_rank: int | None = None) -> Schedule:
    """The schedule of that name, checked.

    Args:
        stages_per_rank: ``usual_stages_per_rank(name)`` if None.

    Raises:
        InvalidArgumentError: no such schedule, or a number that it does not go with.
    """
    if name not in SCHEDULES:
        raise InvalidArgumentError(
            f"no pipeline schedule {name!r}.\n  Pass one of {', '.join(map(repr, SCHEDULES))}."
        )
    if stages_per_rank is None:
        stages_per_rank = usual_stages_per_rank(name)
    numbers = {"ranks": ranks, "micro_batches": micro_batches, "stages_per_rank": stages_per_rank}
    for argument, number in numbers.items():
        if number < 1:
            raise InvalidArgumentError(f"{argument} is {number}.\n  Pass at least 1.")
    schedule = SCHEDULES[name](ranks, micro_batches, stages_per_rank)
    simulate(schedule)
    return schedule


def usual_stages_per_rank(name: str) -> int:
    """As many as the schedule of that name needs to be worth its name."""
    return 2 if name == "interleaved" else 1


def _alternating(
    forwards: Sequence[tuple[int, int]], backwards: Sequence[tuple[int, int]], warm_up: int
) -> tuple[Action, ...]:
    """So many forwards, then one before each backward while there are any.

    Args:
        forwards, backwards: (stage, micro-batch), as many of either.
    """
    actions = [Action(Kind.FORWARD, *entry) for entry in forwards[:warm_up]]
    for index, entry in enumerate(backwards, start=warm_up):
        if index < len(forwards):
            actions.append(Action(Kind.FORWARD, *forwards[index]))
        actions.append(Action(Kind.BACKWARD, *entry))
    return tuple(actions)


def _even_groups(count: int, groups: int) -> list[range]:
    """So many consecutive ranges, the first ones longer by one where needed."""
    length, longer = divmod(count, groups)
    ends = [(index + 1) * length + min(index + 1, longer) for index in range(groups)]
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def _one_stage_a_rank(name: str, stages_per_rank: int) -> None:
    if stages_per_rank != 1:
        raise InvalidArgumentError(
            f'schedule "{name}" has one stage on each rank, not {stages_per_rank}.\n'
            '  Use "interleaved" for several.'
        )


# --- what is true of a schedule -------------------------------------------------------------------


class ScheduleError(InvalidArgumentError):
    """A schedule that cannot run: the text says which rank would do what wrong."""


def simulate(schedule: Schedule, costs: Costs | Sequence[Costs] = EQUAL_COSTS) -> Timeline:
    """Run a schedule in thought: prove it right and tell when each action begins and ends.

    Args:
        costs: of every stage, or of each.

    Raises:
        ScheduleError: an action is missing, comes twice or on the wrong rank; a rank would hold
            more activations than its bound; ranks would wait for each other for ever.

    Cost: linear in the number of actions.
    """
    of_stage = [costs] * schedule.stages if isinstance(costs, Costs) else list(costs)
    _check_complete(schedule)
    position = [0] * schedule.ranks
    clock = [0.0] * schedule.ranks
    held = [0] * schedule.ranks
    most_held = [0] * schedule.ranks
    timed: list[list[Timed]] = [[] for _ in range(schedule.ranks)]
    over: dict[Action, float] = {}
    waiting: dict[Action, int] = {}  # which rank waits for an action that is yet to come
    runnable = collections.deque(range(schedule.ranks))
    while runnable:
        rank = runnable.popleft()
        while position[rank] < len(schedule.actions[rank]):
            action = schedule.actions[rank][position[rank]]
            needed = _needs(action, schedule.stages)
            missing = next((other for other in needed if other not in over), None)
            if missing is not None:
                waiting[missing] = rank
                break
            begin = max([clock[rank], *(over[other] for other in needed)])
            clock[rank] = over[action] = begin + of_stage[action.stage].of(action.kind)
            timed[rank].append(Timed(action, begin, clock[rank]))
            position[rank] += 1
            if action.kind is Kind.FORWARD:
                held[rank] += 1
                most_held[rank] = max(most_held[rank], held[rank])
            elif action.kind is not Kind.INPUT_GRADIENT:
                held[rank] -= 1
            if held[rank] > schedule.activation_bound[rank]:
                raise ScheduleError(
                    f"schedule {schedule.name}: rank {rank} holds {held[rank]} micro-batches after "
                    f"{action}, and its bound is {schedule.activation_bound[rank]}."
                )
            if action in waiting:
                runnable.append(waiting.pop(action))
    if waiting:
        lines = [
            f"\n  rank {rank} waits for {missing}, on rank {schedule.rank_of(missing.stage)}"
            for missing, rank in sorted(waiting.items(), key=lambda item: item[1])
        ]
        raise ScheduleError(
            f"schedule {schedule.name} never ends with {schedule.micro_batches} micro-batches:"
            + "".join(lines)
        )
    return Timeline(tuple(map(tuple, timed)), tuple(most_held))


def _check_complete(schedule: Schedule) -> None:
    """Each stage takes each micro-batch once forward and once backward, on the stage's rank."""
    kinds: dict[tuple[int, int], list[Kind]] = collections.defaultdict(list)
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if schedule.rank_of(action.stage) != rank:
                raise ScheduleError(f"schedule {schedule.name}: {action} is on rank {rank}.")
            kinds[action.stage, action.micro_batch].append(action.kind)
    whole = [Kind.FORWARD, Kind.BACKWARD]
    halves = [Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT]
    for stage in range(schedule.stages):
        for number in range(schedule.micro_batches):
            found = kinds.pop((stage, number), [])
            if found not in (whole, halves):
                raise ScheduleError(
                    f"schedule {schedule.name}: stage {stage} takes micro-batch {number} "
                    f"{''.join(kind.value for kind in found) or 'never'}, not FB or FIW."
                )
    for stage, number in kinds:
        raise ScheduleError(
            f"schedule {schedule.name}: there is no stage {stage} or no micro-batch {number}."
        )


def _needs(action: Action, stages: int) -> list[Action]:
    """What must be over before an action, apart from what its rank does before it.

    A backward needs the next stage's: its input gradient, where that is apart. In one schedule
    either all backwards are whole, or all are in halves.
    """
    stage, number = action.stage, action.micro_batch
    if action.kind is Kind.FORWARD:
        return [Action(Kind.FORWARD, stage - 1, number)] if stage > 0 else []
    if action.kind is Kind.WEIGHT_GRADIENT:
        return [Action(Kind.INPUT_GRADIENT, stage, number)]
    if stage + 1 < stages:
        return [Action(action.kind, stage + 1, number)]
    return [Action(Kind.FORWARD, stage, number)]
