"""Some random programs of collectives and messages; ``make fuzz`` runs a hundred times as many.

And what a failure there looks like: the fuzzer itself must not be the part that is silent.
"""

import dataclasses

import pytest
from fuzz import execute as executor
from fuzz.program import KINDS, LAYOUTS, DropGroup, MakeGroup, Operation, Threads, generate
from fuzz.run import attempt_threads, kinds_of, report

import pycomm
from pycomm.runtime import world_group

STEPS = 50


@pytest.mark.parametrize("seed", range(20))
def test_a_random_program_does_what_numpy_says(seed):
    program = generate(seed, STEPS)
    problem = attempt_threads(program, 60.0)
    assert problem is None, report(program, problem or "", STEPS, lambda p: attempt_threads(p, 60))


def test_a_seed_always_makes_the_same_program_and_seeds_reach_everything():
    programs = [generate(seed, 100) for seed in range(60)]
    assert programs == [generate(seed, 100) for seed in range(60)]
    steps = [step for program in programs for step in program.steps]
    assert {kind for step in steps for kind in kinds_of(step)} >= set(KINDS)
    assert {type(step) for step in steps} == {Operation, MakeGroup, DropGroup, Threads}
    assert {program.hosts for program in programs} == set(map(tuple, LAYOUTS))
    operations = [step for step in steps if isinstance(step, Operation)]
    assert {step.wait_after is None for step in operations} == {True, False}
    assert any(step.count == 0 for step in operations)
    assert max(step.count for step in operations) > 8192  # elements: beyond what staging holds


def test_a_wrong_result_is_found_and_cut_down_to_its_prefix(monkeypatch):
    """A bug that shows at the third all_reduce with more than one element."""
    program = generate(3, STEPS)
    numbers = [
        number
        for number, step in enumerate(program.steps)
        if isinstance(step, Operation) and step.kind == "all_reduce" and step.count > 1
    ]
    broken = program.steps[numbers[1]].seed
    issue = executor._KINDS["all_reduce"]

    def wrong(operation, group):
        if operation.seed == broken and group.rank == 0:
            operation = dataclasses.replace(operation, seed=operation.seed + 1)
        return issue(operation, group)

    monkeypatch.setitem(executor._KINDS, "all_reduce", wrong)
    problem = attempt_threads(program, 5.0)
    assert problem is not None
    assert f"step {numbers[1]}:" in problem
    text = report(program, problem, STEPS, lambda p: attempt_threads(p, 5.0))
    assert f"the shortest prefix that fails has {numbers[1] + 1} steps" in text
    assert "--seed 3 --steps 50" in text


@pytest.mark.mpi
def test_random_programs_of_processes():
    pycomm.init()
    hosts = tuple(0 for _ in range(pycomm.size()))
    for seed in range(5):
        executor.execute(generate(seed, STEPS, hosts), world_group())
