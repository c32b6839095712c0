"""A rank that waits leaves its core to the ranks that compute."""

import time

import pytest
import torch
from run_ranks import run_ranks

from pycomm.collectives import all_reduce_, barrier

RANKS = 4
WAIT_S = 0.1
MOST_CPU_S = 0.005  # of each rank that waits so long; one that tests and sleeps 1 ms needs 0.004
REPEATS = 30  # until one needs less: a busy machine adds to most, by cold caches


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
    most = (RANKS - 1) * MOST_CPU_S
    spent = []  # as rank 0 sees it, who adds to it before it comes to the next barrier

    def body(group):
        call(group)
        for _ in range(REPEATS):
            barrier(group=group)
            if spent and min(spent) < most:
                return
            before = time.process_time()
            if group.rank == RANKS - 1:
                time.sleep(WAIT_S)
            call(group)
            if group.rank == 0:
                spent.append(time.process_time() - before)

    run_ranks(RANKS, body, hosts=hosts)
    assert min(spent) < most
