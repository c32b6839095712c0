"""A rank that waits leaves its core to the ranks that compute."""

import time

import pytest
import torch
from run_ranks import run_ranks

from pycomm.collectives import all_reduce_, barrier

RANKS = 4
WAIT_S = 0.1
MOST_CPU_S = 0.005  # of each rank that waits so long; one that tests and sleeps 1 ms needs 0.004
REPEATS = 5  # of which the least counts: a busy machine adds to all, by cold caches


def small(group):
    all_reduce_(torch.ones(1), group=group)


def large(group):
    all_reduce_(torch.ones(100_000), group=group)


def in_flight(group):
    all_reduce_(torch.ones(1), group=group, async_op=True).wait()


def at_a_barrier(group):
    barrier(group=group)


@pytest.mark.parametrize("hosts", [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("call", [small, large, in_flight, at_a_barrier])
def test_waiting_burns_no_core(call, hosts):
    """The ranks are threads, so the process's CPU time is that of all who wait for the last."""

    def body(group):
        call(group)
        spent = []
        for _ in range(REPEATS):
            barrier(group=group)
            before = time.process_time()
            if group.rank == RANKS - 1:
                time.sleep(WAIT_S)
            call(group)
            spent.append(time.process_time() - before)
        return min(spent)

    waiting = RANKS - 1
    assert run_ranks(RANKS, body, hosts=hosts)[0] < waiting * MOST_CPU_S
