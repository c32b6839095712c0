"""Groups of some ranks, and meshes."""

import threading

import pytest
import torch
from collective_cases import layout_id
from hypothesis import given
from hypothesis import strategies as st
from run_ranks import run_ranks

import pycomm
from pycomm import InvalidArgumentError, MismatchError
from pycomm.collectives import all_reduce
from pycomm.groups import new_group
from pycomm.mesh import Mesh, MeshLayout
from pycomm.runtime import world_group

LAYOUTS = [[0, 0], [0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 2]]


def total(group, value):
    return float(all_reduce(torch.tensor(float(value)), group=group))


# Bodies take the group, so that they run on loopback ranks and under mpirun alike.


def check_new_group(group):
    p = group.size
    backwards = new_group(reversed(range(p)), group=group)
    assert backwards.rank == p - 1 - group.rank
    assert backwards.ranks == [group.ranks[rank] for rank in reversed(range(p))]
    assert total(backwards, group.rank) == sum(range(p))

    chosen = list(range(0, p, 2))
    some = new_group(chosen, group=group)
    assert (some is None) == (group.rank not in chosen)
    if some is not None:
        assert some.rank == chosen.index(group.rank)
        assert total(some, group.rank) == sum(chosen)
        inner = new_group([0], group=some)
        assert (inner is not None) == (some.rank == 0)
    # Ranks outside a group still agree with its members on what comes next.
    everyone = new_group(range(p), group=group)
    assert total(everyone, 1) == p
    assert total(group, 1) == p


def check_split(group):
    p, rank = group.size, group.rank
    row = group.split(rank % 2, -rank)
    members = [other for other in reversed(range(p)) if other % 2 == rank % 2]
    assert row.ranks == [group.ranks[other] for other in members]
    assert total(row, rank) == sum(members)
    lonely = group.split(None if rank == 0 else 7)
    assert (lonely is None) == (rank == 0)
    if lonely is not None:
        assert lonely.size == p - 1
    assert group.split(None) is None


def check_parallel_groups(group):
    """Four threads, each with a group of its own; then groups that overlap."""
    p = group.size
    pairs = [sorted({i % p, (i + 1) % p}) for i in range(p)]
    groups = {number: new_group(range(p), group=group) for number in range(4)}
    for number, pair in enumerate(pairs, start=4):
        groups[number] = new_group(pair, group=group)
    mine = {number: one for number, one in groups.items() if one is not None}
    results = dict.fromkeys(mine, 0.0)

    def work(number):
        for repeat in range(10):
            t = torch.full((1000 * repeat + 1,), float(number))
            results[number] += float(all_reduce(t, group=mine[number])[0])

    threads = [threading.Thread(target=work, args=(number,)) for number in mine]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: 10.0 * number * one.size for number, one in mine.items()}


def check_mesh(group):
    p = group.size
    mesh = Mesh({"dp": -1, "pp": 2 if p % 2 == 0 else 1}, group=group)
    assert mesh.shape == {"dp": p // mesh.shape["pp"], "pp": mesh.shape["pp"]}
    for axis in mesh.shape:
        along = mesh[axis]
        assert along.size == mesh.shape[axis]
        assert along.rank == mesh.coordinate[axis]
        assert along.ranks == [group.ranks[rank] for rank in mesh.ranks(axis)]
        assert total(along, group.rank) == sum(mesh.ranks(axis))
    assert mesh.group(("pp", "dp")) is mesh.group(("dp", "pp"))
    assert total(mesh.group(("dp", "pp")), 1) == p
    with pytest.raises(InvalidArgumentError, match="no axis 'tp'"):
        mesh["tp"]
    assert f"coordinate={mesh.coordinate}" in repr(mesh)


BODIES = [check_new_group, check_split, check_parallel_groups, check_mesh]


@pytest.mark.parametrize("hosts", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("body", BODIES)
def test_groups(body, hosts):
    run_ranks(len(hosts), body, hosts=hosts)


@pytest.mark.mpi
@pytest.mark.parametrize("body", BODIES)
def test_groups_under_mpirun(body):
    pycomm.init()
    body(world_group())


# ----------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("ranks", "problem"),
    [
        ([], "no ranks"),
        ([0, 0], "appears twice"),
        ([0, 2], "one of ranks is 2, and the group has 2 ranks"),
        (["a"], "'a'"),
    ],
)
def test_bad_lists_are_refused_before_anything_is_sent(ranks, problem):
    def body(group):
        with pytest.raises(InvalidArgumentError, match=rf"new_group.* on rank .*{problem}"):
            new_group(ranks, group=group)
        assert total(group, 1) == 2

    run_ranks(2, body)


def test_different_lists_are_a_mismatch_that_shows_both():
    def body(group):
        with pytest.raises(MismatchError) as caught:
            new_group([0] if group.rank == 0 else [1], group=group)
        assert "new_group([0])" in str(caught.value)
        assert "new_group([1])" in str(caught.value)

    run_ranks(2, lambda group: body(group.duplicate()))


def test_an_error_of_a_group_says_which_ranks_of_the_job_its_ranks_are():
    def body(group):
        some = new_group([2, 1], group=group)
        if some is not None:
            with pytest.raises(MismatchError) as caught:
                all_reduce(torch.zeros(1 + some.rank), group=some)
            text = str(caught.value)
            assert text.count("Ranks 0, 1 of this group are ranks 2, 1 of the job;") == 1
        with pytest.raises(MismatchError) as caught:
            all_reduce(torch.zeros(1 + group.rank), group=group)
        assert "of this group" not in str(caught.value)

    run_ranks(3, lambda group: body(group.duplicate()))


def test_different_meshes_are_a_mismatch():
    def body(group):
        with pytest.raises(MismatchError, match="Mesh"):
            Mesh({"a": 1, "b": 2} if group.rank == 0 else {"a": 2, "b": 1}, group=group)

    run_ranks(2, lambda group: body(group.duplicate()))


# ------------------------------------------------------------------------------- mesh layouts


def test_the_last_axis_is_the_innermost_and_stays_on_a_host():
    layout = MeshLayout.of({"dp": 2, "tp": 2}, [[0, 2], [1, 3]])
    #             tp=0  tp=1
    #   dp=0        0     2      one host
    #   dp=1        1     3      the other
    assert layout.order == (0, 2, 1, 3)
    assert layout.coordinate(2) == {"dp": 0, "tp": 1}
    assert layout.coordinate(1) == {"dp": 1, "tp": 0}
    assert layout.ranks(["tp"], 3) == [1, 3]
    assert layout.ranks(["dp"], 3) == [2, 3]
    assert layout.ranks(["dp", "tp"], 3) == [0, 2, 1, 3]


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    open_axis=st.none() | st.integers(0, 3),
)
def test_every_rank_has_one_place_and_lines_cross_in_one_rank(lengths, open_axis):
    size = int(torch.tensor(lengths).prod())
    axes = {f"axis{i}": length for i, length in enumerate(lengths)}
    shape = dict(axes)
    if open_axis is not None and open_axis < len(lengths):
        axes[f"axis{open_axis}"] = -1
    layout = MeshLayout.of(axes, [list(range(0, size, 2)), list(range(1, size, 2))])
    assert layout.shape == shape
    places = {tuple(layout.coordinate(rank).items()) for rank in range(size)}
    assert len(places) == size
    for rank in range(size):
        lines = [set(layout.ranks([axis], rank)) for axis in axes]
        assert [len(line) for line in lines] == lengths
        assert set.intersection(*lines) == {rank} or max(lengths) == size


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        ({"dp": 3}, "dp=3 does not make 4 ranks: it makes 3.\n  Use {'dp': 4}, or start 3 ranks"),
        ({"dp": 2, "pp": 4}, "it makes 8.\n  Use {'dp': 1, 'pp': 4}, or start 8 ranks"),
        ({"dp": -1, "pp": 3}, "4 is no multiple of 3"),
        ({"dp": -1, "pp": -1}, "only one can be the rest"),
        ({"dp": 0}, "axis 'dp' has length 0"),
        ({}, "no axes"),
    ],
)
def test_a_mesh_that_does_not_fit_says_what_would(axes, text):
    with pytest.raises(InvalidArgumentError) as caught:
        MeshLayout.of(axes, [[0, 1, 2, 3]])
    assert text in str(caught.value)
