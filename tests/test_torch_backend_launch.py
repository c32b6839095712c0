"""How ranks of torch.distributed come into being: what ``import torch`` does under each launcher,
where the ranks meet, and what is said when something was set wrong.
"""

import json
import re
import socket
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
import torch.distributed as dist
from launchers import Result, alone, mpirun, process_options, torchrun
from test_launch import (
    INTEL_MPI,
    MPICH,
    OPEN_MPI_5,
    PALS_WITH_PMIX,
    POD,
    SBATCH,
    SRUN,
    TORCHRUN,
    without,
)

import pycomm_launch.autoload as hook
from pycomm.errors import CommTimeoutError, InvalidArgumentError, MismatchError
from pycomm.torch_backend import membership

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

# What each rank of the scripts below calls.
REPORT = """
    import os, sys
    import torch
    import torch.distributed as dist

    def check_sum(group=None, ranks=None):
        ranks = list(range(dist.get_world_size())) if ranks is None else ranks
        t = torch.full((5,), float(dist.get_rank() + 1))
        dist.all_reduce(t, group=group)
        assert t.tolist() == [float(sum(r + 1 for r in ranks))] * 5, t

    def say(text):
        sys.stdout.write(f"rank {os.environ.get('RANK')}: {text}\\n")
        sys.stdout.flush()
"""


def script(text: str) -> str:
    return textwrap.dedent(REPORT) + textwrap.dedent(text)


def on_every_rank(done: Result, ranks: int, text: str) -> None:
    assert done.returncode == 0, done.out + done.err
    for rank in range(ranks):
        assert f"rank {rank}: {text}\n" in done.out, done.out + done.err


# --- launchers -----------------------------------------------------------------------------------

# It never imports pycomm: torch does when the first group is made. Each name in the arguments is a
# life: a default group and others, of other ranks than in the life before, though torch gives them
# the same names. Torchrun's store remembers those, and what was written under them.
TORCH_ONLY = script("""
    assert not [name for name in sys.modules if name.split(".")[0] == "pycomm"]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    assert os.environ["LOCAL_RANK"] == str(rank) and os.environ["LOCAL_WORLD_SIZE"] == str(size)
    for life, backend in enumerate(sys.argv[1:]):
        dist.init_process_group(backend)
        assert (dist.get_rank(), dist.get_world_size()) == (rank, size)
        assert dist.get_backend() == backend
        check_sum()
        all_ranks = list(range(size))
        for ranks in (all_ranks[:2], all_ranks[-1:], all_ranks[::-1])[:: -1 if life % 2 else 1]:
            group = dist.new_group(ranks)
            if rank in ranks:
                assert dist.get_backend(group) == backend
                check_sum(group, ranks)
        dist.group.WORLD.monitored_barrier()
        t = torch.ones(3)  # what torch's C++ code asks of gloo
        dist.group.WORLD._get_backend(torch.device("cpu")).allreduce([t]).wait()
        assert t.tolist() == [float(size)] * 3
        dist.destroy_process_group()
        say(f"{backend} in life {life}")
""")


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("launch", "lives"),
    [
        (mpirun, ["gloo", "pycomm", "pycomm", "gloo"]),
        (torchrun, ["pycomm", "pycomm", "pycomm"]),  # gloo has one life there
    ],
    ids=["mpirun", "torchrun"],
)
def test_a_script_that_knows_torch_alone(launch, lives):
    done = launch(3, TORCH_ONLY, *lives)
    for life, backend in enumerate(lives):
        on_every_rank(done, 3, f"{backend} in life {life}")


@pytest.mark.timeout(150)
def test_redirection_replaces_torchs_own_backends_and_no_others():
    done = mpirun(
        2,
        script("""
            from torch.distributed.device_mesh import init_device_mesh
            import torch.testing._internal.distributed.fake_pg  # registers "fake"

            for backend in ("gloo", None, "cpu:gloo,cuda:nccl", "GLOO"):
                dist.init_process_group(backend)
                assert dist.get_backend() == "pycomm", (backend, dist.get_backend())
                assert type(dist.group.WORLD).__module__.startswith("pycomm.")
                check_sum()
                for inner in ("gloo", "nccl", None, "pycomm"):
                    group = dist.new_group([1, 0], backend=inner)
                    assert dist.get_backend(group) == "pycomm", (inner, dist.get_backend(group))
                    check_sum(group)
                own = dist.ProcessGroupGloo._Options()  # pycomm has none
                group = dist.new_group(backend="gloo", pg_options=own)
                assert dist.get_backend(group) == "pycomm"
                check_sum(group)
                assert dist.get_backend(dist.new_group(backend="fake")) == "fake"
                mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "model"))
                assert dist.get_backend(mesh["data"].get_group()) == "pycomm"
                check_sum(mesh["data"].get_group())
                dist.destroy_process_group()
            init_device_mesh("cpu", (2,))  # makes the default group
            assert dist.get_backend() == "pycomm"
            dist.destroy_process_group()
            say("redirected")
        """),
        PYCOMM_TORCH_BACKEND="1",
    )
    on_every_rank(done, 2, "redirected")


@pytest.mark.timeout(100)
def test_under_mpirun_who_does_not_come_again_is_waited_for_as_long_as_was_asked():
    done = mpirun(
        2,
        script("""
            import time
            from datetime import timedelta

            for life in range(2):
                began = time.monotonic()
                try:
                    dist.init_process_group("pycomm", timeout=timedelta(seconds=3))
                except RuntimeError as error:
                    say(f"{type(error).__name__} {time.monotonic() - began < 30} {error}")
                    sys.exit()
                dist.destroy_process_group()
                if os.environ["RANK"] == "1":
                    break
        """),
    )
    assert "rank 0: CommTimeoutError True init on rank 0 of 2: rank 1 did not come" in done.out
    assert "within 3 s" in done.out, done.out + done.err


def spawn(folder, text, *args):
    """A program whose ranks torch.multiprocessing starts; ``text`` has a function ``rank``."""
    program = folder / "spawned.py"  # children import it
    start = "torch.multiprocessing.spawn(rank, (sys.argv[1:],), nprocs=2)"
    program.write_text(script(text) + f'\nif __name__ == "__main__":\n    {start}\n')
    command = [sys.executable, str(program), *args]
    done = subprocess.run(command, capture_output=True, timeout=120, **process_options())
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.timeout(150)
def test_processes_that_were_spawned_meet_where_they_are_told(tmp_path):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    done = spawn(
        tmp_path,
        """
            def rank(index, places):
                os.environ["RANK"] = str(index)  # for say()
                for place in places:
                    dist.init_process_group("pycomm", init_method=place, rank=index, world_size=2)
                    check_sum()
                    dist.destroy_process_group()
                say("met twice")
        """,
        f"tcp://localhost:{port}",
        f"file://{tmp_path}/store",
    )
    on_every_rank(done, 2, "met twice")


@pytest.mark.timeout(150)
def test_what_fails_in_a_spawned_process_is_told_to_the_others(tmp_path):
    """Not that it has made fewer calls: multiprocessing catches what it raises."""
    done = spawn(
        tmp_path,
        """
            import atexit, time

            def rank(index, places):
                dist.init_process_group("pycomm", init_method=places[0], rank=index, world_size=2)
                if index == 1:
                    atexit.register(time.sleep, 0.4)  # the other stays a second; torch ends it
                    raise ValueError("of the user's own")
                try:
                    dist.barrier()
                except RuntimeError as error:
                    sys.stderr.write(f"rank 0: {error}\\n")
                    raise
        """,
        f"file://{tmp_path}/store",
    )
    assert done.returncode == 1
    assert "ValueError: of the user's own" in done.err
    assert re.search("rank 0: the job was ended by rank 1 of 2 .*ends with exit code 1", done.err)
    assert "MismatchError" not in done.err


@pytest.mark.timeout(150)
def test_a_forked_process_that_fails_leaves_the_exit_handlers_to_its_parent(tmp_path):
    done = alone(
        script("""
            import atexit
            import multiprocessing

            def rank(index):
                place = f"file://{sys.argv[1]}/store"
                dist.init_process_group("pycomm", init_method=place, rank=index, world_size=2)
                sys.exit(7 + index)

            atexit.register(print, "the parent's handler")
            context = multiprocessing.get_context("fork")
            ranks = [context.Process(target=rank, args=(index,)) for index in range(2)]
            for each in ranks:
                each.start()
            for each in ranks:
                each.join()
            print([each.exitcode for each in ranks])
        """),
        str(tmp_path),
    )
    assert done.out == "[7, 8]\nthe parent's handler\n", done.out + done.err
    assert "ends with exit code" in done.err


def test_ranks_of_pycomm_become_a_torch_group_and_stay_what_they_were():
    done = mpirun(
        2,
        script("""
            import pycomm

            pycomm.init()
            for _ in range(2):
                dist.init_process_group("pycomm")
                check_sum()
                dist.destroy_process_group()
            assert pycomm.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
            pycomm.shutdown()
            dist.init_process_group("pycomm")  # joins by itself, and leaves again
            assert pycomm.is_initialized()
            check_sum()
            dist.destroy_process_group()
            assert not pycomm.is_initialized()
            say("both")
        """),
    )
    on_every_rank(done, 2, "both")


# --- one process ---------------------------------------------------------------------------------


def test_pycomm_imported_before_torch_and_a_world_of_one_that_nobody_started():
    done = alone(
        """
        import pycomm, os
        import torch.distributed as dist, torch
        os.environ.update(RANK="0", WORLD_SIZE="1")  # torch asks for these; for an address, too
        dist.init_process_group("pycomm")
        t = torch.ones(3)
        dist.all_reduce(t)
        dist.destroy_process_group()
        print("sum", t.tolist())
        """
    )
    # Older versions of gloo, the group behind, print a line of their own.
    assert done.returncode == 0 and done.out.endswith("sum [1.0, 1.0, 1.0]\n"), done.out + done.err


def test_without_autoloading_the_import_of_the_backend_does_the_same():
    done = mpirun(
        2,
        script("""
            assert "RANK" not in os.environ and "pycomm" not in dist.Backend.backend_list
            import pycomm.torch_backend
            dist.init_process_group("pycomm")
            check_sum()
            dist.destroy_process_group()
            say("imported")
        """),
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    on_every_rank(done, 2, "imported")


def test_torch_works_where_the_hook_does_not():
    done = alone(
        """
        import pycomm_launch.autoload as hook
        def broken(environ):
            raise KeyError("something unforeseen")
        hook.detect = broken
        import torch
        print("sum", torch.ones(3).sum().item(), torch.distributed.is_available())
        """
    )
    assert done.returncode == 0 and done.out == "sum 3.0 True\n", done.out + done.err
    assert "pycomm did not register as a backend of torch.distributed" in done.err
    assert "something unforeseen" in done.err


# --- the hook by itself --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "added"),
    [
        (OPEN_MPI_5, ["2", "4", "0", "2"]),
        (MPICH, ["2", "4", "0", "2"]),
        (INTEL_MPI, ["2", "4", "0", "2"]),
        (SRUN, ["2", "4", "0", None]),
        ({**OPEN_MPI_5, "LOCAL_RANK": "5"}, ["2", "4", "5", "2"]),
        ({}, [None] * 4),
        (SBATCH, [None] * 4),
        (PALS_WITH_PMIX, [None] * 4),  # the size is for MPI to say, when it is asked
        (without(OPEN_MPI_5, "OMPI_COMM_WORLD_RANK"), [None] * 4),
        (TORCHRUN, ["2", "4", "0", "2"]),
        (POD, ["2", "4", None, None]),
        ({**OPEN_MPI_5, "RANK": "7"}, ["7", None, None, None]),
        ({**OPEN_MPI_5, "WORLD_SIZE": "9"}, [None, "9", None, None]),
    ],
)
def test_torchs_variables_say_what_the_launcher_said(environ, added):
    changed = dict(environ)
    hook.set_torch_variables(changed)
    assert [changed.get(name) for name in TORCH_VARIABLES] == added
    others = {name: value for name, value in changed.items() if name not in TORCH_VARIABLES}
    assert others == {k: v for k, v in environ.items() if k not in TORCH_VARIABLES}


def raising(*args, **kwargs):
    raise RuntimeError("something unforeseen")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda patch: patch.setattr(hook, "detect", raising),
        lambda patch: patch.setattr(dist, "is_available", raising),
        lambda patch: patch.setattr(dist.Backend, "register_backend", raising),
        lambda patch: patch.setattr(hook.importlib, "import_module", raising),
        lambda patch: patch.delattr(dist.distributed_c10d, "_new_process_group_helper"),
    ],
    ids=["detect", "is_available", "register", "rendezvous", "redirect"],
)
def test_whatever_fails_in_the_hook_is_a_warning(break_it, monkeypatch):
    monkeypatch.setenv(hook.REDIRECT, "1")
    monkeypatch.setattr(dist.Backend, "backend_list", ["gloo"])  # not registered yet
    monkeypatch.setattr(dist.Backend, "register_backend", lambda *args, **kwargs: None)
    handlers = dict(dist.distributed_c10d.rendezvous.__globals__["_rendezvous_handlers"])
    monkeypatch.setitem(
        dist.distributed_c10d.rendezvous.__globals__, "_rendezvous_handlers", handlers
    )
    break_it(monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"pycomm did not register .*: (Runtime|Attribute)Err"):
        hook.autoload()


def test_the_hook_may_run_again():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = dist.distributed_c10d._new_process_group_helper
        hook.autoload()
        assert dist.distributed_c10d._new_process_group_helper is before


@pytest.mark.parametrize("value", ["", "0", "1"])
def test_values_of_the_redirection(value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hook._wants_redirection({hook.REDIRECT: value}) == (value == "1")


@pytest.mark.parametrize("value", ["true", "yes", "2", "pycomm", " 1"])
def test_a_value_of_the_redirection_that_means_nothing_is_named(value):
    with pytest.warns(RuntimeWarning, match=f"PYCOMM_TORCH_BACKEND='{value}' is neither 0 nor 1"):
        assert not hook._wants_redirection({hook.REDIRECT: value})


@pytest.mark.parametrize(
    ("backend", "is_torchs"),
    [
        ("gloo", True),
        ("NCCL", True),
        ("undefined", True),
        ("cpu:gloo,cuda:nccl", True),
        ("pycomm", False),
        ("mpi", False),
        ("cpu:mpi,cuda:nccl", False),
        ("cpu:gloo,cuda:custom", False),
    ],
)
def test_which_backends_are_torchs_own(backend, is_torchs):
    assert hook._is_torchs_own(backend) == is_torchs


# --- what is set wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "named",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},  # a pod's shell, with an mpirun in it
        {"RANK": "0", "WORLD_SIZE": "4"},  # mpirun -x RANK=0
        {"RANK": "1", "WORLD_SIZE": "2"},
    ],
)
def test_variables_that_contradict_the_launcher_are_named(named):
    with pytest.warns(RuntimeWarning) as raised:
        assert hook.warn_of_contradiction({**OPEN_MPI_5, **named})
    (text,) = [str(warning.message) for warning in raised]
    assert f"RANK={named['RANK']} and WORLD_SIZE={named['WORLD_SIZE']} say" in text
    assert "Open MPI's mpirun started it as rank 2 of 4 (OMPI_COMM_WORLD_RANK=2, " in text


@pytest.mark.parametrize(
    "environ",
    [
        {},
        OPEN_MPI_5,
        TORCHRUN,
        POD,
        {**OPEN_MPI_5, "RANK": "2", "WORLD_SIZE": "4"},
        {**OPEN_MPI_5, "RANK": "5", "WORLD_SIZE": "8"},  # spawned by a rank
        {**OPEN_MPI_5, **TORCHRUN, "RANK": "0", "WORLD_SIZE": "2"},
        {**OPEN_MPI_5, "RANK": "x", "WORLD_SIZE": "4"},
    ],
)
def test_variables_that_contradict_nothing(environ):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hook.warn_of_contradiction(environ)


MISTAKES = script("""
    import json
    texts = {}

    def mistake(name, environ, *args, **kwargs):
        for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(variable, None)
        os.environ.update(environ)
        try:
            dist.init_process_group(*(args or ("pycomm",)), **kwargs)
        except Exception as error:
            texts[name] = f"{type(error).__name__}: {error}"
        assert not dist.is_initialized(), name

    two = {"RANK": "0", "WORLD_SIZE": "2"}
    file = f"file://{sys.argv[1]}/store"
    mistake("nothing is set", {})
    mistake("RANK alone", {"RANK": "0"})
    mistake("WORLD_SIZE alone", {"WORLD_SIZE": "2"})
    mistake("nowhere to meet", two)
    mistake("no port", {**two, "MASTER_ADDR": "localhost"})
    mistake("rank too high", {}, "pycomm", init_method=file, rank=2, world_size=2)
    one = {"RANK": "0", "WORLD_SIZE": "1"}
    mistake("gloo's options", one, "pycomm", pg_options=dist.ProcessGroupGloo._Options())
    mistake("a name with a typo", one, "pycom")
    print(json.dumps(texts))
""")


def test_every_mistake_is_named(tmp_path):
    done = alone(MISTAKES, str(tmp_path))
    assert done.returncode == 0, done.err
    texts = json.loads(done.out)
    assert "environment variable RANK expected, but not set" in texts["nothing is set"]
    assert "environment variable WORLD_SIZE expected, but not set" in texts["RANK alone"]
    assert "environment variable RANK expected, but not set" in texts["WORLD_SIZE alone"]
    assert "environment variable MASTER_ADDR expected, but not set" in texts["nowhere to meet"]
    assert "environment variable MASTER_PORT expected, but not set" in texts["no port"]
    assert "rank is 2, and world_size 2.\n  Ranks run from 0 to 1" in texts["rank too high"]
    assert texts["gloo's options"].startswith(
        "TypeError: pg_options is a ProcessGroupGloo._Options, and"
    )
    assert "pycom" in texts["a name with a typo"]


def joined(rank: int, size: int, store: dist.Store, errors: dict[object, Exception]) -> None:
    try:
        membership.join(store, rank, size, timeout_s=0.5)
    except Exception as error:
        errors[threading.current_thread()] = error


def errors_of_joining(*ranks_and_sizes: tuple[int, int]) -> list[Exception]:
    """What each of these raises when they join at the same time."""
    store = dist.HashStore()
    errors: dict[object, Exception] = {}
    threads = [
        threading.Thread(target=joined, args=(*pair, store, errors)) for pair in ranks_and_sizes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [errors[thread] for thread in threads]


def test_a_rank_that_there_is_twice():
    for error in errors_of_joining((0, 2), (0, 2)):
        assert type(error) is CommTimeoutError
        assert "on rank 0 of 2: rank 1 did not come to meet within 0.5 s, though 2 " in str(error)
        assert "Two of them have the same rank" in str(error)


def test_world_sizes_that_differ():
    of_two, of_four = errors_of_joining((0, 2), (1, 4))
    assert type(of_two) is MismatchError
    assert "world_size is 2 on rank 0 and 4 on rank 1" in str(of_two)
    assert type(of_four) is CommTimeoutError
    assert "on rank 1 of 4: rank 2, 3 did not come" in str(of_four)


@pytest.mark.parametrize("rank", [-1, 2, 7])
def test_a_rank_that_there_is_not(rank):
    with pytest.raises(InvalidArgumentError, match=f"rank is {rank}, and world_size 2"):
        membership.join(dist.HashStore(), rank, 2, timeout_s=0.5)
