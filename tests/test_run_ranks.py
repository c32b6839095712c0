"""The helper that runs ranks as threads: what it says of ranks that raise or hang."""

import subprocess
import sys
import time

import pytest
from launchers import process_options
from run_ranks import RankError, run_ranks

from pycomm import barrier


def test_run_ranks_names_the_rank_that_raised():
    def body(group):
        if group.rank == 2:
            raise KeyError("lost")
        barrier(group=group)

    with pytest.raises(RankError, match="rank 2 of 3: KeyError: 'lost'") as raised:
        run_ranks(3, body)
    assert isinstance(raised.value.__cause__, KeyError)


def test_run_ranks_shows_where_ranks_hang():
    def body(group):
        if group.rank == 0:
            barrier(group=group)
        else:
            time.sleep(1.5)

    with pytest.raises(TimeoutError, match=r"(?s)ranks \[0, 1\] of 2 .*in barrier.*in body"):
        run_ranks(2, body, timeout_s=0.5)


def test_a_process_that_ran_ranks_ends_well():
    """pytest-xdist does not look at how its processes end, and `make test-python` uses it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_all_reduce.py"]
    done = subprocess.run(command, capture_output=True, timeout=60, **process_options())
    assert done.returncode == 0, done.stdout + done.stderr
