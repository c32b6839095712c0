"""Whatever moment a rank is lost at, the others have a commit in common to go back to."""

import copy
from dataclasses import dataclass, field

import pytest

from pycomm.elastic.copies import Copies, Copy, Mark, latest_in_common

# A model of the ranks. Each takes a copy, waits for the others, confirms, and so on; when it hears
# of a loss it waits for all others that are alive to hear of it; then they go back to a copy, one
# after the other. A rank may be lost between any two steps. All interleavings are tried.
RANKS, COMMITS, LOSSES = 3, 3, 2


@dataclass
class Rank:
    copies: Copies = field(default_factory=Copies)
    doing: str = "settle"
    number: int = 0  # of the commit under way
    alive: bool = True


@dataclass
class Ranks:
    ranks: list[Rank]
    world: int = 0
    chosen: Mark = field(default_factory=lambda: Mark(0, "0"))
    members: tuple[int, ...] = tuple(range(RANKS))
    losses: int = 0

    def key(self):
        return (
            self.world,
            self.chosen,
            self.members,
            tuple(
                (r.doing, r.number, r.alive, tuple(r.copies.marks()) if r.alive else ())
                for r in self.ranks
            ),
        )

    def others(self):
        """The states one step from here."""
        for index in self.members:
            rank = self.ranks[index]
            if not rank.alive:
                continue
            for step in self.steps_of(rank):
                following = copy.deepcopy(self)
                step(following, following.ranks[index])
                yield following
            if self.losses < LOSSES and sum(self.ranks[i].alive for i in self.members) > 1:
                following = copy.deepcopy(self)
                following.losses += 1
                following.ranks[index].alive = False
                yield following
        living = [index for index in self.members if self.ranks[index].alive]
        if living and all(self.ranks[index].doing == "hear" for index in living):
            yield self.met(tuple(living))

    def steps_of(self, rank):
        somebody_lost = not all(self.ranks[index].alive for index in self.members)
        if rank.doing == "settle":
            yield Ranks.settle
        if rank.doing == "take" and rank.number <= COMMITS:
            yield Ranks.take
        if rank.doing == "wait" and all(self.has_come(index, rank) for index in self.members):
            yield Ranks.confirm
        if rank.doing in ("settle", "wait") and somebody_lost:  # what waits for all may fail
            yield Ranks.hear

    def has_come(self, index, to):
        """Whether that rank has taken the copy that ``to`` waits for; it may be lost by now."""
        other = self.ranks[index]
        return other.doing != "settle" and (
            other.number > to.number or (other.number == to.number and other.doing != "take")
        )

    def settle(self, rank):
        held = rank.copies.held(self.chosen)
        rank.copies.settle(held or Copy(self.chosen, RANKS, {}))
        rank.doing, rank.number = "take", self.chosen.number + 1

    def take(self, rank):
        rank.copies.take(Copy(Mark(rank.number, str(self.world)), RANKS, {}))
        rank.doing = "wait"

    def confirm(self, rank):
        rank.copies.confirm()
        rank.doing, rank.number = "take", rank.number + 1

    def hear(self, rank):
        rank.doing = "hear"

    def met(self, living):
        following = copy.deepcopy(self)
        ranks = [following.ranks[index] for index in living]
        confirmed = [r.copies._confirmed.mark.number for r in ranks if r.copies._confirmed]
        chosen = latest_in_common([r.copies.marks() for r in ranks])  # asserts that there is one
        assert chosen is None or chosen.number >= max(confirmed), following
        following.world += 1
        following.chosen = chosen or Mark(0, str(following.world))
        following.members = living
        for rank in ranks:
            rank.doing = "settle"
        return following


def test_survivors_always_have_the_last_confirmed_commit_in_common():
    seen = set()
    left = [Ranks([Rank() for _ in range(RANKS)])]
    worlds = set()
    while left:
        state = left.pop()
        if state.key() in seen:
            continue
        seen.add(state.key())
        worlds.add((state.world, state.chosen.number, len(state.members)))
        left += state.others()
    assert len(seen) > 1000
    # Losses at every commit, and again after the first.
    assert {(2, number, 1) for number in range(COMMITS)} <= worlds


def test_a_commit_of_the_same_number_in_another_world_is_another_one():
    old, new = Mark(7, "old"), Mark(7, "new")
    assert latest_in_common([[Mark(6, "old"), old], [Mark(6, "old"), new]]) == Mark(6, "old")
    with pytest.raises(AssertionError, match="no copy in common"):
        latest_in_common([[old], [new]])


def test_who_has_just_come_has_no_say():
    assert latest_in_common([[Mark(3, "a")], [], [Mark(3, "a"), Mark(2, "a")]]) == Mark(3, "a")
    assert latest_in_common([[], []]) is None
