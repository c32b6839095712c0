"""Ranks find each other: through MPI, through torch's store, alone; and say so when they do not."""

import threading
import time

import pytest
import torch.distributed as dist
from launchers import alone, mpirun, torchrun

import pycomm
from pycomm.connection import _arena_bytes, _timeout_s, host_key
from pycomm.errors import CommTimeoutError, InvalidArgumentError, NotInitializedError
from pycomm.launch import detect
from pycomm.rendezvous import StoreGather, meet

REPORT = """
    import pycomm, torch
    pycomm.init()
    total = pycomm.all_reduce(torch.tensor([float(pycomm.rank())])).item()
    print(f"rank {pycomm.rank()}/{pycomm.size()} local {pycomm.local_rank()}/{pycomm.local_size()} "
          f"host {pycomm.host_rank()}/{pycomm.host_size()} {pycomm.hosts()} sum {total}")
"""


def report(rank, size, local, local_size, host, host_size, hosts):
    total = float(sum(range(size)))
    return (
        f"rank {rank}/{size} local {local}/{local_size} host {host}/{host_size} {hosts} sum {total}"
    )


@pytest.mark.parametrize("launch", [mpirun, torchrun])
def test_ranks_of_one_host(launch):
    done = launch(3, REPORT)
    assert done.returncode == 0, done.err
    for rank in range(3):
        assert report(rank, 3, rank, 3, 0, 1, [[0, 1, 2]]) in done.out


def test_a_setting_that_differs_is_an_error_on_every_rank():
    done = mpirun(
        2,
        """
        import os, pycomm
        rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"]
        for name, *of_rank in [
            ("PYCOMM_GPU_TRANSPORT", "auto", "staged"),
            ("PYCOMM_HOST_TIMEOUT_S", "10", "7.5"),
        ]:
            os.environ[name] = of_rank[int(rank)]
            try:
                pycomm.init()
            except pycomm.MismatchError as error:
                print(str(error).splitlines()[0])
            del os.environ[name]
        """,
    )
    assert done.returncode == 0, done.err
    for rank in range(2):
        on_rank = f"init on rank {rank}: "
        assert f"{on_rank}PYCOMM_GPU_TRANSPORT is auto on rank 0 and staged on rank 1." in done.out
        assert f"{on_rank}PYCOMM_HOST_TIMEOUT_S is 10 on rank 0 and 7.5 on rank 1." in done.out


def test_interleaved_hosts():
    done = mpirun(3, REPORT, PYCOMM_HOSTS="b,a,b")
    assert done.returncode == 0, done.err
    hosts = [[0, 2], [1]]
    assert report(0, 3, 0, 2, 0, 2, hosts) in done.out
    assert report(1, 3, 0, 1, 1, 2, hosts) in done.out
    assert report(2, 3, 1, 2, 0, 2, hosts) in done.out


def test_alone_without_mpi_and_without_hooks():
    done = alone(
        """
        import sys
        hook, leave = sys.excepthook, sys.exit
        import pycomm
        import threading
        assert threading.active_count() == 1
        pycomm.init()
        assert (pycomm.rank(), pycomm.size(), pycomm.hosts()) == (0, 1, [[0]])
        assert (sys.excepthook, sys.exit) == (hook, leave)
        assert "mpi4py" not in sys.modules
        """
    )
    assert done.returncode == 0, done.err


def test_torchrun_over_two_hosts_names_the_remedy():
    done = torchrun(
        2,
        """
        import os, pycomm
        os.environ["PYCOMM_HOST"] = os.environ["RANK"]
        try:
            pycomm.init()
        except pycomm.CommError as error:
            print(error)
        """,
    )
    assert done.out.count("the 2 ranks are on 2 hosts, and under torchrun") == 2, done.err
    assert "Start with mpirun" in done.out


def test_launcher_and_mpi_of_different_installations():
    done = alone(
        """
        import pycomm
        try:
            pycomm.init()
        except pycomm.CommError as error:
            print(error, flush=True)
            __import__("os")._exit(0)
        """,
        PMI_RANK="0",  # as another installation's mpiexec would have said; MPI finds itself alone
        PMI_SIZE="4",
        MPI_LOCALRANKID="0",
    )
    if "mpi4py is not installed" in done.out:
        pytest.skip("needs mpi4py")
    assert "announces 4 ranks (PMI_RANK=0, PMI_SIZE=4, MPI_LOCALRANKID=0) but MPI counts 1" in (
        done.out
    ), done.err
    assert "different installations" in done.out
    assert "reinstall mpi4py" in done.out


def test_a_communicator_instead_of_the_launcher():
    done = mpirun(
        3,
        """
        from mpi4py import MPI
        import pycomm
        world = MPI.COMM_WORLD
        reverse = world.Split(0, -world.rank)
        pycomm.init(comm=reverse)
        pycomm.init(comm=reverse)
        pycomm.init()
        assert (pycomm.rank(), pycomm.size()) == (2 - world.rank, 3)
        for other in (dict(comm=MPI.COMM_SELF), dict(timeout_s="soon")):
            try:
                pycomm.init(**other)
            except pycomm.InvalidArgumentError as error:
                print(error)
        pycomm.shutdown()
        for wrong in (MPI.COMM_NULL, 4):
            try:
                pycomm.init(comm=wrong)
            except pycomm.InvalidArgumentError as error:
                print(error)
        """,
    )
    assert done.returncode == 0, done.err
    assert done.out.count("called before with another comm") == 3
    assert done.out.count("called before with timeout_s=600, now with 'soon'") == 3
    assert done.out.count("not an mpi4py intra-communicator") == 6


@pytest.mark.parametrize("launch", [mpirun, torchrun])
def test_init_again_after_shutdown(launch):
    done = launch(
        2,
        """
        import pycomm, torch
        for turn in range(3):
            pycomm.init()
            value = pycomm.broadcast(torch.tensor([turn, pycomm.rank()]), 1)
            assert value.tolist() == [turn, 1]
            pycomm.shutdown()
            pycomm.shutdown()
            assert not pycomm.is_initialized()
        try:
            pycomm.barrier()
        except pycomm.NotInitializedError as error:
            print(error)
        """,
    )
    assert done.returncode == 0, done.err
    assert done.out.count("barrier: called after shutdown()") == 2


def test_a_forked_child_is_no_rank_and_shuts_nothing_down():
    done = mpirun(
        2,
        """
        import os, pycomm
        pycomm.init()
        child = os.fork()
        if child == 0:
            assert not pycomm.is_initialized()
            for call in (pycomm.rank, pycomm.barrier, pycomm.init):
                try:
                    call()
                except pycomm.NotInitializedError as error:
                    print(error)
            pycomm.shutdown()
            os._exit(0)  # as multiprocessing does
        assert os.waitpid(child, 0)[1] == 0
        pycomm.barrier()
        """,
    )
    assert done.returncode == 0, done.err
    for call in ("rank", "barrier", "init"):
        assert done.out.count(f"{call}: process ") == 2
    assert done.out.count("was forked from rank 1") == 3


def test_a_forked_child_does_not_wait_for_what_its_parent_has_under_way():
    done = mpirun(
        2,
        """
        import os, sys, pycomm, torch
        pycomm.init()
        other = 1 - pycomm.rank()
        received = torch.zeros(3)
        work = pycomm.irecv(received, other)
        pycomm.barrier()
        child = os.fork()
        if child == 0:
            assert not work.done()
            try:
                work.wait()
            except pycomm.CommError as error:
                print(error)
            del work
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        pycomm.barrier()  # nobody has sent before
        pycomm.send(torch.ones(3), other)
        assert work.wait() == other
        assert received.tolist() == [1, 1, 1]
        work.wait()
        """,
    )
    assert done.returncode == 0, done.err
    assert done.out.count("forked from a rank while the operation was under way") == 2


@pytest.mark.parametrize(
    ("last_words", "code"),
    [("pass", 0), ("sys.exit(3)", 3), ("sys.exit('no')", 1), ("sys.exit()", 0), ("1 / 0", 1)],
)
def test_a_forked_child_ends_as_python_does(last_words, code):
    """mpi4py alone would finalise its parent's MPI in it, and wait for ever."""
    done = mpirun(
        2,
        f"""
        import atexit, os, sys
        atexit.register(lambda: print("first registered", flush=True))
        import pycomm
        pycomm.init()
        child = os.fork()
        if child == 0:
            atexit.register(lambda: print("last registered", flush=True))
            {last_words}
        else:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == {code}
            pycomm.barrier()
        """,
    )
    assert done.returncode == 0, done.err
    assert done.out.count("last registered") == 2
    assert done.out.count("first registered") == 4
    assert done.err.count("ZeroDivisionError") == (2 if "/" in last_words else 0)


def test_ranks_disagree_about_the_timeout():
    done = mpirun(
        2,
        """
        import os, pycomm
        try:
            pycomm.init(timeout_s=10 + int(os.environ.get("OMPI_COMM_WORLD_RANK") or
                                           os.environ["PMI_RANK"]))
        except pycomm.MismatchError as error:
            print(error)
        """,
    )
    assert done.out.count("timeout_s is 10 on rank 0 and 11 on rank 1") == 2, done.err


def test_calls_before_init_name_themselves():
    assert not pycomm.is_initialized()
    for call in (pycomm.rank, pycomm.local_size, pycomm.hosts, pycomm.barrier):
        with pytest.raises(NotInitializedError, match=rf"(?s)^{call.__name__}: .*pycomm\.init\(\)"):
            call()


@pytest.mark.parametrize(
    ("argument", "environ", "named"),
    [
        (0, {}, "timeout_s=0"),
        (-1.0, {"PYCOMM_TIMEOUT_S": "5"}, "timeout_s=-1.0"),
        (float("nan"), {}, "timeout_s=nan"),
        ("soon", {}, "timeout_s='soon'"),
        (None, {"PYCOMM_TIMEOUT_S": ""}, "PYCOMM_TIMEOUT_S=''"),
        (None, {"PYCOMM_TIMEOUT_S": "10m"}, "PYCOMM_TIMEOUT_S='10m'"),
        (None, {"PYCOMM_TIMEOUT_S": "inf"}, "PYCOMM_TIMEOUT_S='inf'"),
    ],
)
def test_a_timeout_that_is_none_is_named(argument, environ, named):
    with pytest.raises(InvalidArgumentError, match="init: ") as raised:
        _timeout_s(argument, environ)
    assert named in str(raised.value)


def test_timeout_from_argument_environment_default():
    assert _timeout_s(5, {"PYCOMM_TIMEOUT_S": "7"}) == 5.0
    assert _timeout_s(None, {"PYCOMM_TIMEOUT_S": "7.5"}) == 7.5
    assert _timeout_s(None, {}) == 600.0


@pytest.mark.parametrize("text", ["", "0", "-1", "1G", "1e9", "\u0661", str(1 << 63), "9" * 5000])
def test_bad_arena_sizes_are_named(text):
    with pytest.raises(InvalidArgumentError, match="PYCOMM_ARENA_BYTES="):
        _arena_bytes({"PYCOMM_ARENA_BYTES": text})


def test_arena_size():
    assert _arena_bytes({}) == 0
    assert _arena_bytes({"PYCOMM_ARENA_BYTES": "8589934592"}) == 8 << 30


def test_host_key():
    assert host_key({}) == host_key({})
    assert host_key({"PYCOMM_HOST": "a"}) == host_key({"PYCOMM_HOST": "a"})
    assert len({host_key({"PYCOMM_HOST": "a"}), host_key({"PYCOMM_HOST": "b"}), host_key({})}) == 3


def store_gathers(size, timeout_s):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    return [StoreGather(store, rank, size, timeout_s) for rank in range(size)]


def test_store_gathers_any_bytes_of_any_length():
    sent = [b"", b"\0\xff" * 5000, b"three"]
    received = [[] for _ in sent]

    def take_part(rank, gather):
        received[rank] = [gather(sent[rank]), gather(sent[rank] * 2)]

    threads = [
        threading.Thread(target=take_part, args=pair) for pair in enumerate(store_gathers(3, 20))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert received == [[sent, [data * 2 for data in sent]]] * 3


def test_store_names_the_ranks_that_did_not_come():
    gather = store_gathers(4, timeout_s=0.3)[2]
    start = time.monotonic()
    with pytest.raises(CommTimeoutError, match=r"rank 2 of 4: rank 0, 1, 3 did not come .* 0\.3 s"):
        gather(b"here")
    assert time.monotonic() - start < 5


def test_meeting_alone():
    rendezvous = meet(detect({}), {}, attempt=1, timeout_s=1)
    assert rendezvous.all_gather_bytes(b"x") == [b"x"]


def test_info():
    done = alone("import runpy; runpy.run_module('pycomm', run_name='__main__')", "info")
    assert done.returncode == 0, done.err
    for row in ("PyTorch", "SIMD level", "launcher", "no launcher", "MPI", "several hosts"):
        assert row in done.out
