"""Training that goes on without lost ranks, and with others that come."""

import json
import random
import re
import signal
import subprocess
import sys

import pytest
import torch
import torch.optim.lr_scheduler as schedules
from launchers import mpirun, mpirun_command, mpirun_ft, process_options, python_command, torchrun
from torch.optim.swa_utils import SWALR

import pycomm
from pycomm import runtime
from pycomm.checkpoint import record as checkpoint_record
from pycomm.elastic import membership, rescaling, running, values
from pycomm.elastic.copies import Copy, Mark
from pycomm.elastic.rescaling import rescale
from pycomm.errors import CommTimeoutError, InvalidArgumentError, PeerLostError
from pycomm_launch import recruit

# Four processes import torch, and a fifth one later: on busy cores most of the time goes there.
pytestmark = pytest.mark.timeout(180)

SAMPLES, BATCH = 104, 10  # the last batch of an epoch has one sample for each of four ranks

# Trains on the samples' numbers, and has in its state which of them committed steps have taken.
PROGRAM = f"""
    import json, os, signal, sys, time
    import no_compiler, pycomm, torch
    from torch.utils.data import DataLoader, TensorDataset

    no_compiler.stand_in_for_it()

    arguments = json.loads(sys.argv[1])
    data = TensorDataset(torch.arange({SAMPLES}))
    model = torch.nn.Linear(1, 1)
    state = pycomm.elastic.State(
        model=model, optimizer=torch.optim.Adam(model.parameters(), lr=0.01), turn=0, seen=[],
        sampler=pycomm.elastic.Sampler(data, {BATCH}), folder=arguments.get("folder"),
    )

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def train(state):
        turn = state.turn = state.turn + 1
        rank, size = pycomm.rank(), pycomm.size()
        print(f"turn {{turn}}: rank {{rank}} of {{size}}", flush=True)
        optimizer = pycomm.DistributedOptimizer(state.optimizer, state.model.named_parameters())
        loader = DataLoader(data, batch_sampler=state.sampler)
        begun = False
        while not finished(state, turn, begun):
            begun = True
            for steps, (numbers,) in enumerate(loader):
                inputs = numbers[:, None] / {SAMPLES}
                optimizer.zero_grad()
                loss = state.sampler.weight * (state.model(inputs) ** 2).mean()
                if arguments.get("die", {{}}).get(f"{{turn}} {{rank}}") == steps:
                    die()
                loss.backward()
                optimizer.step()
                taken = pycomm.all_gather_object((state.sampler.epoch, numbers.tolist()))
                state.seen = [*state.seen, *taken]
                state.sampler.advance()
                step_done(state, rank, steps)
                state.commit()

    def finished(state, turn, begun):
        return begun and turn >= arguments.get("turns", 1) and state.sampler.epoch >= 2

    def step_done(state, rank, steps):
        pass

    def report():
        print("end:", json.dumps([pycomm.rank(), pycomm.size(), state.model.weight.item(),
                                  state.seen]), flush=True)
"""
RUN = """
    pycomm.elastic.run(train, state, **arguments.get("run", {}))
    report()
"""


def ends(done):
    """What the ranks have at the end, by rank; checked against each other."""
    lines = [line for line in done.out.splitlines() if line.startswith("end:")]
    assert lines, done.out + done.err
    found = sorted(json.loads(line.removeprefix("end:")) for line in lines)
    assert [rank for rank, *_ in found] == list(range(found[0][1])), done.out + done.err
    assert len({(weight, str(seen)) for _, _, weight, seen in found}) == 1
    return found


def assert_each_sample_once(seen):
    by_epoch = {}
    for epoch, numbers in seen:
        by_epoch.setdefault(epoch, []).extend(numbers)
    assert sorted(by_epoch) == list(range(len(by_epoch)))
    for numbers in by_epoch.values():
        assert sorted(numbers) == list(range(SAMPLES))


def test_two_ranks_are_lost_and_one_comes():
    # Rank 1 of 4 is lost; another process takes its place; then rank 0 is lost.
    arguments = {"die": {"1 1": 3, "3 0": 2}, "turns": 4, "run": {"respawns": 1}}
    waiting = """
    def step_done(state, rank, steps):
        time.sleep(0.05 if state.turn == 2 else 0)
    """
    done = mpirun_ft(4, PROGRAM + waiting + RUN, json.dumps(arguments), timeout_s=170)
    assert done.returncode == 0, done.out + done.err
    for line in ("turn 1: rank 3 of 4", "turn 2: rank 2 of 3", "turn 3: rank 3 of 4"):
        assert line in done.out
    assert done.out.count("turn 4: rank") == 3
    found = ends(done)
    assert len(found) == 3
    assert_each_sample_once(found[0][3])
    assert "rank 1 was lost of 4" in done.err
    assert "1 more for 3 ranks." in done.err
    assert "4 go on from commit" in done.err


# Three of four are lost: while it takes its copy in commit(); next, in the recovery from that,
# before the ranks that are left have met; and in the next recovery while it puts its copy back.
AWKWARD = """
    class Bomb:
        def state_dict(self):
            if pycomm.is_initialized() and pycomm.size() == 4 and pycomm.rank() == 3:
                if state.sampler.done == 30:
                    die()
            return {}

        def load_state_dict(self, taken):
            if pycomm.size() == 2 and pycomm.rank() == 0:
                die()

    import pycomm.elastic.membership as membership
    init, inits = membership.runtime.init, []

    def init_or_die(**keywords):
        inits.append(keywords)
        if keywords and int(os.environ["OMPI_COMM_WORLD_RANK"]) == 1:
            die()
        init(**keywords)

    membership.runtime.init = init_or_die
    state = pycomm.elastic.State(
        model=model, optimizer=state.optimizer, turn=0, seen=[], sampler=state.sampler, bomb=Bomb(),
    )
"""


def test_ranks_are_lost_in_a_commit_and_in_recoveries():
    done = mpirun_ft(4, PROGRAM + AWKWARD + RUN, json.dumps({}), timeout_s=170)
    found = ends(done)
    assert done.returncode == 0, done.out + done.err
    assert len(found) == 1
    assert_each_sample_once(found[0][3])
    assert "rank 3 was lost of 4; 2 left" in done.err
    assert "turn 2: rank 0 of 2" not in done.out  # nobody trained before the third was lost
    assert "rank 0 was lost of 2; 1 left" in done.err
    # Rank 3 was lost in the third commit. If another rank heard of that at the end of the third
    # step, they go back to the second.
    assert re.search(r"\b1 go on from commit [23]\.", done.err)


def test_too_few_ranks_without_a_folder_are_an_error():
    arguments = {"die": {"1 1": 3}, "run": {"min_ranks": 2}}
    done = mpirun_ft(2, PROGRAM + RUN, json.dumps(arguments), timeout_s=170)
    assert done.returncode != 0
    assert (
        "PeerLostError: elastic.run: rank 1 was lost: 1 of 2 ranks are left, and min_ranks is 2."
        in done.err
    )
    assert "Exit code 75" not in done.err


# Rank 0 is on a host of its own. Rank 2 is lost, and rank 0 while the ranks that are left meet.
CUT = """
    import pycomm.elastic.membership as membership
    init, own_rank = membership.runtime.init, int(os.environ["OMPI_COMM_WORLD_RANK"])
    os.environ["PYCOMM_HOST"] = "a" if own_rank == 0 else "b"

    def init_or_die(**keywords):
        if keywords and own_rank == 0:
            die()
        init(**keywords)

    membership.runtime.init = init_or_die
"""


def test_a_host_is_cut_off_while_the_new_world_is_made(tmp_path):
    arguments = {"folder": str(tmp_path / "checkpoint"), "die": {"1 2": 3}}
    done = mpirun_ft(3, PROGRAM + CUT + RUN, json.dumps(arguments), timeout_s=170)
    assert "turn 2" not in done.out
    assert "1 of 2 ranks are left: the others may be alive" in done.err
    assert "Exit code 75." in done.err


def test_an_exception_is_not_tried_again():
    raising = """
    def step_done(state, rank, steps):
        if rank == 1 and steps == 2:
            raise ValueError("bad batch")
    """
    done = mpirun_ft(3, PROGRAM + raising + RUN, json.dumps({}), timeout_s=170)
    assert done.returncode == 1
    assert done.out.count("turn ") == 3
    assert done.err.count("ValueError: bad batch") == 1
    assert "lost" not in done.err


def test_preemption_and_going_on_with_fewer_ranks(tmp_path):
    """SIGUSR1 to mpirun; then the job is started again, on two ranks instead of three."""
    arguments = {"folder": str(tmp_path / "checkpoint")}
    slow = """
    def step_done(state, rank, steps):
        print("a step", flush=True)
        time.sleep(0.05)
    """
    command = mpirun_command(3, "--with-ft", "ulfm")
    command += python_command(PROGRAM + slow + RUN, json.dumps(arguments | {"turns": 99}))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **process_options()
    ) as job:
        try:
            while job.stdout.readline() != "a step\n":
                assert job.poll() is None
            job.send_signal(signal.SIGUSR1)
            _, err = job.communicate(timeout=100)
        finally:
            job.kill()
    assert job.returncode == pycomm.elastic.START_AGAIN == 75, err
    assert err.count("preempted at commit ") == 1
    record = pycomm.checkpoint.read(arguments["folder"])["elastic"]
    assert record["ranks"] == 3
    done = mpirun(2, PROGRAM + RUN, json.dumps(arguments))
    assert done.returncode == 0, done.err
    assert f"going on from commit {record['commit']} in" in done.err
    assert_each_sample_once(ends(done)[0][3])


def test_without_ulfm_the_job_is_to_be_started_again(tmp_path):
    arguments = {"folder": str(tmp_path / "checkpoint"), "die": {"1 1": 5}}
    every = PROGRAM.replace("folder=", "disk_every=2, folder=")
    # It looks so often whether a rank has ended, and then ends rank 0, which may just be about to
    # speak. By its first look the job is over.
    patience = {"PET_MONITOR_INTERVAL": "10"}
    done = torchrun(2, every + RUN, json.dumps(arguments), **patience)
    assert done.returncode != 0
    assert "rank 1 was lost, and this launcher has no --with-ft ulfm" in done.err
    assert f"it resumes from {arguments['folder']}. Exit code 75." in done.err
    assert pycomm.checkpoint.read(arguments["folder"])["elastic"] == {"commit": 4, "ranks": 2}


# --- the parts -------------------------------------------------------------------------------


@pytest.fixture
def place(monkeypatch):
    """Which rank this is, of how many."""

    def be(rank, size):
        monkeypatch.setattr(runtime, "rank", lambda: rank)
        monkeypatch.setattr(runtime, "size", lambda: size)

    return be


@pytest.mark.parametrize("seed", range(20))
def test_no_sample_is_lost_or_taken_twice_whatever_the_ranks(place, seed):
    """Worlds of any size, each of which makes some steps; some prefetch far more than they make."""
    chance = random.Random(seed)
    samples, batch = chance.randint(1, 60), chance.randint(8, 20)
    sampler = pycomm.elastic.Sampler(samples, batch, seed=seed)
    taken = {}
    while sampler.epoch < 4:
        size = chance.randint(1, 8)
        shares = []
        for rank in range(size):
            place(rank, size)
            shares.append(list(sampler))
        for step in range(min(chance.randint(0, 4), len(shares[0]))):
            ours = [share[step] for share in shares]
            left = min(batch, samples - sampler.done)
            if left < size:
                assert all(len(own) == left for own in ours)
                ours = ours[:1]
            weights = []
            for rank in range(size):
                place(rank, size)
                weights.append(sampler.weight)
            # The mean of what ranks compute is the mean over the batch.
            if left >= size:
                weighed = [w / len(own) for w, own in zip(weights, ours, strict=True)]
                assert weighed == pytest.approx([size / left] * size)
            taken.setdefault(sampler.epoch, []).extend(number for own in ours for number in own)
            sampler = reloaded(sampler)
            sampler.advance()
    assert all(sorted(taken[epoch]) == list(range(samples)) for epoch in range(4))
    assert samples < 9 or taken[0] != taken[1]


def reloaded(sampler):
    other = pycomm.elastic.Sampler(sampler.samples, 1)
    other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    return other


def test_a_sampler_of_other_data_is_refused():
    with pytest.raises(InvalidArgumentError, match="5 samples here and 6"):
        pycomm.elastic.Sampler(5, 2).load_state_dict(pycomm.elastic.Sampler(6, 2).state_dict())
    for arguments, problem in (
        ({"batch": 0}, "batch is 0"),
        ({"batch": 1, "seed": "x"}, "seed is 'x'"),
        ({"batch": 1, "shuffle": "no"}, "shuffle 'no'"),
    ):
        with pytest.raises(InvalidArgumentError, match=problem):
            pycomm.elastic.Sampler(5, **arguments)


def test_a_resumed_sampler_goes_on_with_its_order(place):
    """Half an epoch was taken shuffled and half in order: samples were taken twice, and never."""
    place(0, 1)
    first = pycomm.elastic.Sampler(10, 5, seed=3)
    taken = next(iter(first))
    first.advance()
    second = pycomm.elastic.Sampler(10, 2, shuffle=False)
    second.load_state_dict(first.state_dict())
    assert sorted(taken + next(iter(second))) == list(range(10))


def test_what_has_two_names_is_rescaled_once():
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1.0)
    sampler = pycomm.elastic.Sampler(100, 32)
    state = pycomm.elastic.State(a=optimizer, b=optimizer, c=sampler, d=sampler)
    rescale("scale_learning_rate", state, state.things(), 4, 2)
    assert (optimizer.param_groups[0]["lr"], sampler.batch) == (0.5, 16)


@pytest.mark.parametrize(
    ("rule", "batch", "rate"),
    [("keep_global_batch", 32, 0.4), ("scale_learning_rate", 24, 0.3), ("none", 24, 0.4)],
)
def test_rules(rule, batch, rate):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    sampler = pycomm.elastic.Sampler(100, 32)
    state = pycomm.elastic.State(optimizer=optimizer, schedule=schedule, sampler=sampler)
    rescale(rule, state, state.things(), 4, 3)
    assert sampler.batch == batch
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def sequential(optimizer):
    parts = [schedules.LinearLR(optimizer, 0.1, total_iters=3), schedules.StepLR(optimizer, 2)]
    return schedules.SequentialLR(optimizer, parts, milestones=[3])


def chained(optimizer):
    return schedules.ChainedScheduler(
        [schedules.ConstantLR(optimizer, 0.5, 7), schedules.ExponentialLR(optimizer, 0.9)]
    )


SCHEDULES = {
    "ChainedScheduler": chained,
    "ConstantLR": lambda optimizer: schedules.ConstantLR(optimizer, 0.5, 7),
    "CosineAnnealingLR": lambda optimizer: schedules.CosineAnnealingLR(optimizer, 8, 0.01),
    "CosineAnnealingWarmRestarts": lambda optimizer: schedules.CosineAnnealingWarmRestarts(
        optimizer, 3, eta_min=0.01
    ),
    "CyclicLR": lambda optimizer: schedules.CyclicLR(optimizer, 0.1, 0.5, 3, cycle_momentum=False),
    "ExponentialLR": lambda optimizer: schedules.ExponentialLR(optimizer, 0.9),
    "LambdaLR": lambda optimizer: schedules.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "LinearLR": lambda optimizer: schedules.LinearLR(optimizer, 0.1, total_iters=7),
    "MultiplicativeLR": lambda optimizer: schedules.MultiplicativeLR(optimizer, lambda step: 0.9),
    "MultiStepLR": lambda optimizer: schedules.MultiStepLR(optimizer, [2, 5]),
    "OneCycleLR": lambda optimizer: schedules.OneCycleLR(
        optimizer, 0.5, total_steps=10, cycle_momentum=False
    ),
    "PolynomialLR": lambda optimizer: schedules.PolynomialLR(optimizer, 9),
    "ReduceLROnPlateau": lambda optimizer: schedules.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=0, min_lr=0.01
    ),
    "SequentialLR": sequential,
    "StepLR": lambda optimizer: schedules.StepLR(optimizer, 2),
    "SWALR": lambda optimizer: SWALR(optimizer, 0.05, anneal_epochs=6),
}


@pytest.mark.parametrize("rate_type", [float, torch.tensor])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_goes_on_with_scaled_rates(kind, rate_type):
    """What is left of it is what it would have been, times the factor; with two param groups."""

    def rates_of(factor):
        weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        groups = [{"params": [weight]} for weight in weights]
        optimizer = torch.optim.Adam(groups, lr=rate_type(0.4))
        schedule = SCHEDULES[kind](optimizer)
        state = pycomm.elastic.State(optimizer=optimizer, schedule=schedule)
        rescaling.check("scale_learning_rate", state.things())
        rates = []
        for step in range(9):
            if step == 4:
                state.put(values.take(state.things(), {}))
                rescale("scale_learning_rate", state, state.things(), 4, int(4 * factor))
                rates += schedule.get_last_lr()
            optimizer.step()
            schedule.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
            if step >= 4:
                rates += [float(group["lr"]) for group in optimizer.param_groups]
        return [float(rate) for rate in rates]

    wanted = [rate * 0.75 for rate in rates_of(1)]
    assert rates_of(0.75) == pytest.approx(wanted)
    assert len(set(wanted)) > 1 or kind == "ReduceLROnPlateau"  # at its lowest rate


def test_a_schedule_that_is_not_known_is_refused_at_the_beginning():
    class Own(schedules.StepLR):
        pass

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    inner = schedules.ChainedScheduler([Own(optimizer, 2)])
    state = pycomm.elastic.State(optimizer=optimizer, schedule=inner)
    with pytest.raises(InvalidArgumentError, match=r"where 'schedule' keeps .* a .*Own"):
        pycomm.elastic.run(print, state, rescale="scale_learning_rate")
    assert not pycomm.is_initialized()
    rescaling.check("none", state.things())


def test_the_batch_comes_back_with_the_ranks():
    sampler = pycomm.elastic.Sampler(100, 10)
    state = pycomm.elastic.State(sampler=sampler)
    batches = []
    for before, now in ((4, 3), (3, 2), (2, 4), (4, 1), (1, 4)):
        state.put(values.take(state.things(), {}))
        rescale("none", state, state.things(), before, now)
        batches.append(sampler.batch)
    assert batches == [8, 5, 10, 2, 10]
    sampler.batch = 20  # the program's own change counts
    rescale("none", state, state.things(), 4, 2)
    assert sampler.batch == 10


def test_a_rule_of_ones_own():
    state = pycomm.elastic.State(rate=1.0)

    def halve(state, before, now):
        state.rate = state.rate * now / before

    rescale(halve, state, state.things(), 4, 4)
    assert state.rate == 1.0
    rescale(halve, state, state.things(), 4, 2)
    assert state.rate == 0.5


@pytest.mark.parametrize("is_recruit", [True, False])
@pytest.mark.parametrize("folder", ["checkpoint", None])
@pytest.mark.parametrize("error", [membership.TooFewError("1 left"), CommTimeoutError("late")])
def test_ranks_are_lost_while_others_join(monkeypatch, place, is_recruit, folder, error):
    def fail(members, min_ranks):
        raise error

    def leave(reason, its_folder):
        raise SystemExit(f"{reason} {its_folder}")

    place(0, 2)
    members = membership.Members(None, [])
    monkeypatch.setattr(running, "enlist", lambda: members)
    monkeypatch.setattr(running, "leave", leave)
    monkeypatch.setattr(membership, "all_agree", bool)
    monkeypatch.setattr(membership, "form", fail)
    monkeypatch.setattr(running.Recruits, "merged", lambda *_: members)
    state = pycomm.elastic.State(folder=folder)
    run = running._Run(print, state, "none", 1, 0, running.Preemption())
    change = run.go if is_recruit else run._grow
    ended = (SystemExit, CommTimeoutError if "late" in str(error) else PeerLostError)
    with pytest.raises(ended[folder is None], match=str(error)):
        change()


@pytest.mark.parametrize(("holds", "expected"), [(True, "own"), (False, "rank 0's")])
def test_who_holds_a_copy_goes_back_to_its_own(monkeypatch, place, holds, expected):
    """In it are buffers that each rank has of its own; who has just come is given another's."""
    mark = Mark(3, "world")
    state = pycomm.elastic.State(buffers="")
    run = running._Run(print, state, "none", 1, 0, running.Preemption())
    if holds:
        run._copies.take(Copy(mark, 3, {"buffers": "own"}))
        run._copies.confirm()
    marks = [[mark], [mark] if holds else [], []]
    place(1, 3)
    monkeypatch.setattr(
        running, "all_gather_object", lambda mine: [(held, *mine[1:]) for held in marks]
    )
    monkeypatch.setattr(
        running, "_given", lambda held, root: Copy(mark, 3, {"buffers": f"rank {root}'s"})
    )
    run._restore()
    assert state.buffers == expected
    assert run._number == 3


def test_what_is_put_back_is_what_was_taken():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).bfloat16()
    optimizer = torch.optim.Adam(model.parameters())
    things = {"model": model, "optimizer": optimizer, "epoch": 3, "list": [torch.ones(2), (1, 2)]}

    def step():
        optimizer.zero_grad()
        model(torch.randn(4, 3, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()

    step()
    taken = values.take(things, {})
    wanted = values.take(things, {})
    step()
    later = values.take(things, taken)  # over the memory of an older one
    assert later["model"]["0.weight"] is not None
    assert later["model"]["0.weight"].data_ptr() == taken["model"]["0.weight"].data_ptr()
    assert not equal(later["model"], wanted["model"])
    plain = values.put(things, wanted)
    assert equal(values.take(things, {})["optimizer"], wanted["optimizer"])
    assert equal(values.take(things, {})["model"], wanted["model"])
    assert plain["epoch"] == 3 and equal(plain["list"], things["list"])
    step()  # does not write to what was taken
    values.put(things, wanted)
    assert equal(values.take(things, {})["optimizer"], wanted["optimizer"])
    assert all(param.grad is None for param in model.parameters())


def test_values_are_put_back_where_they_were():
    elsewhere = torch.zeros(2, device="meta")
    state = pycomm.elastic.State(x={"of": [elsewhere, 1]}, y=(elsewhere,), z=torch.zeros(1))
    here = torch.ones(2)
    state.put({"x": {"of": [here, 2, here], "new": here}, "y": (here,), "z": here})
    assert [value.device.type for value in (*state.x["of"][::2], *state.y)] == [
        "meta",
        "cpu",
        "meta",
    ]
    assert (state.x["of"][1], state.x["new"].device.type, state.z.device.type) == (2, "cpu", "cpu")


def test_tied_tensors_stay_tied_and_untied_ones_apart():
    shared = torch.ones(3)
    tied = values.take({"a": shared, "b": shared}, {})
    assert tied["a"] is tied["b"]
    apart = values.take({"a": torch.zeros(3), "b": torch.ones(3)}, tied)
    assert (apart["a"].sum(), apart["b"].sum()) == (0, 3)


def test_things_do_not_get_each_others_tensors():
    """What state_dict() makes may die, and the next one's tensors be made in its place."""
    net, teacher = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    state = pycomm.elastic.State(model=net, ema=teacher)
    for _ in range(20):
        taken = values.take(state.things(), {})
        assert equal(taken["model"], net.state_dict())
        assert equal(taken["ema"], teacher.state_dict())
    wanted = teacher.weight.detach().clone()
    state.put(taken)
    assert torch.equal(teacher.weight, wanted)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_a_state_that_cannot_be_written_is_an_error_before_train(tmp_path):
    trained = []
    try:
        for folder, thing in ((tmp_path / "file" / "x", 1), (tmp_path / "x", object())):
            (tmp_path / "file").touch()
            state = pycomm.elastic.State(folder=folder, thing=thing)
            with pytest.raises(InvalidArgumentError, match=r"checkpoint\.save"):
                pycomm.elastic.run(trained.append, state)
        pycomm.elastic.run(trained.append, pycomm.elastic.State(folder=tmp_path / "x", epoch=1))
    finally:
        pycomm.shutdown()
    assert len(trained) == 1
    assert pycomm.checkpoint.read(tmp_path / "x")["elastic"] == {"commit": 1, "ranks": 1}


@pytest.mark.parametrize("disk_every", [1, 100])
def test_what_was_done_since_the_last_commit_is_on_disk_at_the_end(tmp_path, disk_every):
    """With ``disk_every=1`` it was not, and otherwise bore the last commit's number."""

    def train(state):
        state.epoch = 1
        state.commit()
        state.epoch = 2

    state = pycomm.elastic.State(folder=tmp_path / "x", disk_every=disk_every, epoch=0)
    try:
        pycomm.elastic.run(train, state)
    finally:
        pycomm.shutdown()
    read = pycomm.checkpoint.read(tmp_path / "x")
    assert (read["epoch"], read["elastic"]["commit"]) == (2, 2)


def test_a_start_with_too_few_ranks_is_refused():
    try:
        with pytest.raises(InvalidArgumentError, match="1 ranks were started, and min_ranks is 2"):
            pycomm.elastic.run(print, pycomm.elastic.State(epoch=0), min_ranks=2)
    finally:
        pycomm.shutdown()


def test_who_is_preempted_leaves_with_its_code_though_another_is_lost(tmp_path, monkeypatch):
    """The commit is on disk, and the others may have left with that code."""

    def lost(**_):
        raise PeerLostError("shutdown: rank 1 is gone")

    def train(state):
        signal.raise_signal(signal.SIGUSR1)
        state.commit()

    state = pycomm.elastic.State(folder=tmp_path / "x", epoch=0)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "shutdown", lost)
        with pytest.raises(SystemExit) as left:
            pycomm.elastic.run(train, state)
    pycomm.shutdown()
    assert left.value.code == pycomm.elastic.START_AGAIN


def test_a_training_that_changes_its_folder_keeps_its_checkpoint(tmp_path, monkeypatch):
    """Later checkpoints went elsewhere, and the job that was started again resumed the first."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    state = pycomm.elastic.State(folder="x", disk_every=1, epoch=0)

    def train(state):
        monkeypatch.chdir("elsewhere")
        state.commit()

    try:
        pycomm.elastic.run(train, state)
    finally:
        pycomm.shutdown()
    assert pycomm.checkpoint.read(tmp_path / "x")["elastic"]["commit"] > 0


def test_what_cannot_be_in_a_state():
    model = torch.nn.Linear(2, 2)
    state = pycomm.elastic.State(model=model, epoch=0)
    state.epoch = 1
    assert (state.epoch, state.things()) == (1, {"model": model, "epoch": 1})
    with pytest.raises(InvalidArgumentError, match="State has no 'epohc'"):
        state.epohc = 2
    with pytest.raises(AttributeError, match="epohc"):
        _ = state.epohc
    with pytest.raises(pycomm.CommError, match=r"outside of pycomm\.elastic\.run"):
        state.commit()
    for name in ("commit", "folder.x", checkpoint_record.NAME):
        with pytest.raises(InvalidArgumentError, match=f"named '{name}'"):
            pycomm.elastic.State(**{name: 3})
    for value in (torch.nn.Parameter(torch.ones(1)), {"of": [torch.ones(1, requires_grad=True)]}):
        with pytest.raises(InvalidArgumentError, match="'rate' is, or has in it, a tensor that"):
            pycomm.elastic.State(rate=value)
    with pytest.raises(InvalidArgumentError, match="folder is 5"):
        pycomm.elastic.State(folder=5)
    for train, of in ((None, state), (state, print)):
        with pytest.raises(InvalidArgumentError, match=r"elastic\.run: (train|state) is"):
            pycomm.elastic.run(train, of)
    pycomm.init()
    try:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapped = pycomm.DistributedOptimizer(optimizer)
        with pytest.raises(InvalidArgumentError, match="'optimizer' is a DistributedOptimizer"):
            pycomm.elastic.State(optimizer=wrapped)
    finally:
        pycomm.shutdown()
    with pytest.raises(InvalidArgumentError, match="rescale is 'double'"):
        pycomm.elastic.run(print, state, rescale="double")
    with pytest.raises(InvalidArgumentError, match="respawns is -1"):
        pycomm.elastic.run(print, state, respawns=-1)


@pytest.mark.parametrize(
    ("original", "command"),
    [
        (
            "python --check-hash-based-pycs never a.py",
            "--check-hash-based-pycs never -m pycomm_launch.recruit a.py",
        ),
        ("python train.py -c 3", "-m pycomm_launch.recruit train.py -c 3"),
        ("python -u -X dev -m train x", "-u -X dev -m pycomm_launch.recruit -m train x"),
        ("python -c pass x", "-m pycomm_launch.recruit -c pass x"),
        ("python -u -m pycomm_launch.recruit a.py", "-u -m pycomm_launch.recruit a.py"),
        ("python -um train -m x", "-u -m pycomm_launch.recruit -m train -m x"),
        ("python -mtrain", "-m pycomm_launch.recruit -m train"),
        ("python -Ocpass -u", "-O -m pycomm_launch.recruit -c pass -u"),
        ("python -Xdev -uWerror a.py -m", "-Xdev -uWerror -m pycomm_launch.recruit a.py -m"),
        ("python -uX dev a.py", "-uX dev -m pycomm_launch.recruit a.py"),
        ("python -B -- a.py", "-B -m pycomm_launch.recruit a.py"),
    ],
)
def test_the_command_of_a_recruit(original, command):
    assert recruit.command(original.split()) == command.split()


@pytest.mark.parametrize(
    ("left", "were", "hosts", "has_first", "min_ranks", "goes_on"),
    [
        (1, 4, 1, False, 1, True),
        (1, 4, 1, True, 2, False),
        (3, 5, 2, False, 1, True),
        (2, 5, 2, True, 1, False),
        (2, 4, 2, True, 1, True),
        (2, 4, 2, False, 1, False),
    ],
)
def test_two_halves_never_both_go_on(left, were, hosts, has_first, min_ranks, goes_on):
    assert (membership.too_few(left, were, hosts, has_first, min_ranks) == "") == goes_on
    others = membership.too_few(were - left, were, hosts, not has_first, min_ranks)
    assert not (goes_on and others == "" and hosts > 1)


PRINT = "import sys; print(__name__, sys.argv[1:], sys.path[0])"


@pytest.mark.parametrize("kind", ["-c", "-m", "file"])
def test_a_recruit_runs_the_program_as_python_does(tmp_path, kind):
    pytest.importorskip("mpi4py")
    (tmp_path / "program.py").write_text(PRINT)
    program = {"-c": ["-c", PRINT], "-m": ["-m", "program"], "file": [str(tmp_path / "program.py")]}
    outputs = [
        subprocess.run(
            [sys.executable, *before, *program[kind], "a", "-b"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
        for before in ([], ["-m", recruit.NAME])
    ]
    assert outputs[0] == outputs[1] != ""
