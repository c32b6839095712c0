"""Messages between ranks: pairing, dtypes, layouts, objects, and what bad calls raise."""

import re
import threading
import time

import pytest
import torch
from collective_cases import layout_id
from hypothesis import given, settings
from hypothesis import strategies as st
from launchers import mpirun
from run_ranks import run_ranks

import pycomm
from pycomm import CommError, CommTimeoutError, InvalidArgumentError, MismatchError
from pycomm.arguments import MOVABLE
from pycomm.collectives import barrier
from pycomm.point_to_point import (
    P2POp,
    batch_isend_irecv,
    irecv,
    isend,
    recv,
    recv_object,
    send,
    send_object,
)
from pycomm.runtime import world_group

LAYOUTS = [[0], [0, 0], [0, 1], [0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]]
laws = settings(max_examples=50)


def tensor_of(rank, shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=generator).to(dtype)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    raw = (actual.contiguous().flatten(), expected.contiguous().flatten())
    assert torch.equal(raw[0].view(torch.uint8), raw[1].view(torch.uint8))


# Bodies take the group, so that they run on loopback ranks and under mpirun alike.


def exchange(group, shape, dtype=torch.float32, tag=0):
    """Every rank sends to the next and receives from the one before."""
    p, rank = group.size, group.rank
    mine = tensor_of(rank, shape, dtype)
    got = torch.empty_like(mine)
    sent = isend(mine, (rank + 1) % p, tag=tag, group=group)
    assert recv(got, (rank - 1) % p, tag=tag, group=group) == (rank - 1) % p
    assert sent.wait() is None
    assert_same_bits(got, tensor_of((rank - 1) % p, shape, dtype))


def check_dtypes(group):
    for dtype in MOVABLE:
        for shape in [(), (0,), (3, 5), (70001,)]:
            exchange(group, shape, dtype)


def check_layouts(group):
    """Strided, transposed, expanded and conjugated tensors arrive row-major."""
    rank, p = group.rank, group.size
    views = [
        lambda t: t[:, ::2],
        lambda t: t.t(),
        lambda t: t[0].expand(3, -1),
        lambda t: t.to(torch.complex64).conj(),
        lambda t: t.requires_grad_(),
    ]
    for view in views:
        sent = isend(view(tensor_of(rank, (40, 60))), (rank + 1) % p, group=group)
        expected = view(tensor_of((rank - 1) % p, (40, 60))).detach().resolve_conj()
        got = torch.empty(expected.shape, dtype=expected.dtype)
        recv(got, (rank - 1) % p, group=group)
        sent.wait()
        assert torch.equal(got, expected)


def check_batch(group):
    """All pairs at once, each rank in another order, large and small, by tag."""
    p, rank = group.size, group.rank
    incoming = {(peer, tag): torch.empty(1 + 50000 * tag) for peer in range(p) for tag in range(2)}
    ops = [P2POp(irecv, t, peer, group, tag) for (peer, tag), t in incoming.items()]
    ops += [
        P2POp(isend, tensor_of(10 * rank + peer, (1 + 50000 * tag,), seed=tag), peer, group, tag)
        for peer in range(p)
        for tag in range(2)
    ]
    turn = rank * len(ops) // p
    works = batch_isend_irecv(ops[turn:] + ops[:turn])
    for work in works:
        work.wait()
        assert work.done()
    for (peer, tag), got in incoming.items():
        assert torch.equal(got, tensor_of(10 * peer + rank, got.shape, seed=tag))


def check_any_source(group):
    p, rank = group.size, group.rank
    if rank == 0:
        seen = []
        for _ in range(p - 1):
            got = torch.empty(5)
            source = recv(got, group=group)
            assert torch.equal(got, tensor_of(source, (5,)))
            seen.append(source)
        assert sorted(seen) == list(range(1, p))
        work = irecv(torch.empty(1), group=group, tag=1)
        isend(torch.ones(1), 0, tag=1, group=group).wait()
        assert work.wait() == 0
    else:
        send(tensor_of(rank, (5,)), 0, group=group)


def check_objects(group):
    p, rank = group.size, group.rank
    if rank == 0:
        for peer in range(1, p):
            obj, source = recv_object(peer, tag=3, group=group)
            assert (source, obj) == (peer, {"rank": peer, "data": [1.5] * 1000 * peer})
        for _ in range(1, p):
            obj, source = recv_object(group=group)
            assert obj == source
    else:
        send_object({"rank": rank, "data": [1.5] * 1000 * rank}, 0, tag=3, group=group)
        send_object(rank, 0, group=group)


def check_passes_collectives(group):
    if group.size == 1:
        return
    got = torch.empty(100000)
    last = group.size - 1
    if group.rank == last:
        recv(got, 0, group=group)  # the others are in the barrier by now
        barrier(group=group)
    else:
        fence = barrier(group=group, async_op=True)
        if group.rank == 0:
            send(torch.ones(100000), last, group=group)
        fence.wait()


BODIES = [
    check_dtypes,
    check_layouts,
    check_batch,
    check_any_source,
    check_objects,
    check_passes_collectives,
]


@pytest.mark.parametrize("hosts", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("body", BODIES)
def test_messages(body, hosts):
    run_ranks(len(hosts), body, hosts=hosts)


@pytest.mark.mpi
@pytest.mark.parametrize("body", BODIES)
def test_messages_under_mpirun(body):
    pycomm.init()
    body(world_group())


@laws
@given(
    hosts=st.sampled_from(LAYOUTS[1:]),
    messages=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 255, 256, 257, 5000, 40000])),
        max_size=12,
    ),
    order=st.randoms(use_true_random=False),
)
def test_a_tag_keeps_its_order_whatever_is_received_first(hosts, messages, order):
    tags = [tag for tag, _ in messages]
    order.shuffle(tags)

    def body(group):
        last = group.size - 1
        if group.rank == 0:
            works = [
                isend(tensor_of(i, (count,)), last, tag=tag, group=group)
                for i, (tag, count) in enumerate(messages)
            ]
            for work in works:
                work.wait()
        elif group.rank == last:
            left = {tag: [i for i, (t, _) in enumerate(messages) if t == tag] for tag in tags}
            for tag in tags:
                i = left[tag].pop(0)
                got = torch.empty(messages[i][1])
                recv(got, 0, tag=tag, group=group)
                assert torch.equal(got, tensor_of(i, got.shape))

    run_ranks(len(hosts), body, hosts=hosts)


# ----------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda g: send(torch.ones(1), 2, group=g), "send on rank .*: dst is 2.*rank from 0 to 1"),
        (lambda g: isend(torch.ones(1), None, group=g), "isend.*dst is None"),
        (lambda g: recv(torch.ones(1), -1, group=g), "recv.*src is -1"),
        (lambda g: recv(torch.ones(1), tag=-1, group=g), "tag is -1"),
        (lambda g: irecv(torch.ones(1), tag=1.5, group=g), "tag is 1.5"),
        (lambda g: recv(torch.ones(2, 3).t(), group=g), "not contiguous.*tensor.new_empty"),
        (lambda g: recv(torch.ones(1, requires_grad=True) * 2, group=g), "detach"),
        (lambda g: send(torch.ones(1, dtype=torch.complex32), 0, group=g), "complex32"),
        (lambda g: send([1.0], 0, group=g), "list"),
        (lambda g: send(torch.ones(1), 0, timeout_s=-1, group=g), "timeout_s is -1"),
        (lambda g: send_object(lambda: 0, 0, group=g), "cannot pickle"),
        (
            lambda g: batch_isend_irecv([P2POp(send, torch.ones(1), 0, g)]),
            r"batch_isend_irecv on rank [01]: .* is not a P2POp of pycomm.isend or pycomm.irecv",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_bad_calls_send_nothing_and_leave_the_group_usable(call, problem):
    def body(group):
        with pytest.raises(InvalidArgumentError, match=f"(?s){problem}"):
            call(group)
        exchange(group, (3,))

    run_ranks(2, body)


@pytest.mark.parametrize("hosts", [[0, 0], [0, 1]], ids=layout_id)
@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (torch.ones(20), torch.ones(20, dtype=torch.int32)),
        (torch.ones(20000), torch.ones(20001)),
        (torch.ones(100, 200), torch.ones(200, 100)),
    ],
    ids=["dtype", "count", "shape"],
)
def test_a_mismatch_is_raised_on_both_sides(sent, received, hosts):
    def body(group):
        def call():
            if group.rank == 0:
                send(sent, 1, tag=3, group=group)
                recv(torch.empty(1), 1, group=group)  # a small message was buffered
            else:
                recv(received.clone(), 0, tag=3, group=group)

        with pytest.raises(MismatchError) as caught:
            call()
        text = str(caught.value)
        for t in (sent, received):
            name = str(t.dtype).removeprefix("torch.")
            shape = ", ".join(map(str, t.shape)) + ("," if t.dim() == 1 else "")
            assert f"{t.numel()} {name}, shape ({shape})" in text
        assert "Rank 0 sent" in text
        assert "rank 1 receives" in text
        assert "tag 3" in text

    run_ranks(2, lambda group: body(group.duplicate()), hosts=hosts)


@pytest.mark.parametrize("hosts", [[0, 0], [0, 1]], ids=layout_id)
def test_a_timeout_names_peer_and_tag(hosts):
    def body(group):
        if group.rank == 0:
            with pytest.raises(CommTimeoutError, match="from rank 1, tag 8, on rank 0: timeout"):
                recv(torch.empty(1), 1, tag=8, group=group, timeout_s=0.2)

    run_ranks(2, lambda group: body(group.duplicate()), hosts=hosts)


def test_a_timeout_names_whom_the_awaited_rank_waits_for_itself():
    over = threading.Event()

    def body(group):
        if group.rank == 0:
            recv(torch.empty(1), 1, tag=1, group=group)
            with pytest.raises(CommTimeoutError) as caught:
                recv(torch.empty(4), 1, tag=2, group=group, timeout_s=1.0)
            over.set()
            text = str(caught.value)
            waits = r"has been waiting for the end of recv of 8 float32.* from rank 2, tag 3"
            assert re.search(rf"rank 1 \(.*last did send of 1 float32.*, and {waits}", text)
            assert re.search(r"rank 2 \(process \d+, .*is in no call of pycomm", text)
        elif group.rank == 1:
            waiting = irecv(torch.empty(8), 2, tag=3, group=group)
            send(torch.empty(1), 0, tag=1, group=group)
            with pytest.raises(CommTimeoutError):
                waiting.wait()
        else:
            over.wait(30)

    run_ranks(3, lambda group: body(group.duplicate()))


def test_a_dropped_work_keeps_its_tensors_alive():
    def body(group):
        peer = 1 - group.rank
        for i in range(50):
            isend(torch.full((30000,), float(i)), peer, group=group)
        for i in range(50):
            got = torch.empty(30000)
            recv(got, peer, group=group)
            assert torch.equal(got, torch.full((30000,), float(i)))
        barrier(group=group)

    run_ranks(2, body)


def test_a_rank_that_left_is_not_waited_for():
    result = mpirun(
        2,
        """
        import pycomm, torch
        pycomm.init(timeout_s=30)
        if pycomm.rank() == 0:
            try:
                pycomm.recv(torch.empty(3), 1)
            except pycomm.MismatchError as error:
                print("told:", error)
        """,
    )
    assert "told: recv of 3 float32, shape (3,), from rank 1, tag 0, on rank 0" in result.out
    assert "called shutdown() instead" in result.out


def test_a_killed_peer_is_noticed():
    began = time.monotonic()
    result = mpirun(
        2,
        """
        import os, signal, time
        import pycomm, torch
        pycomm.init(timeout_s=50)
        pycomm.barrier()
        if pycomm.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            pycomm.recv(torch.empty(3), 1)
        except pycomm.PeerLostError as error:
            print("told:", error, flush=True)
            os._exit(3)
        """,
    )
    assert result.returncode != 0
    assert time.monotonic() - began < 45
    assert "told: recv of 3 float32" in result.out or "rank 1" in result.err


def test_before_init_nothing_is_sent():
    with pytest.raises(CommError, match="init"):
        pycomm.send(torch.ones(1), 0)
