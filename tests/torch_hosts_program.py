"""What every rank of test_hosts.py runs of torch.distributed, as one would who knows torch alone.

    python torch_hosts_program.py 0,0,1,1 eth0

The arguments are the host of each rank, and the network interface by which gloo is to be reached
("": it finds out). Nobody says where rank 0 is, and no host knows the other's name.
"""

import copy
import faulthandler
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

HANGS_AFTER_S = 60.0


def main() -> None:
    placement, interface = sys.argv[1:]
    host_of_rank = [int(host) for host in placement.split(",")]
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
    dist.init_process_group("pycomm")
    assert hosts_of(dist.group.WORLD) == in_order_of_hosts(host_of_rank)
    collectives()
    for ranks in ([0, 1], [2, 3], [0, 2], [1, 3], [0, 2, 3], [1]):  # torch sorts them anyway
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            check_sum(group, ranks)
    messages()
    same_as_one_process()
    t = torch.ones(3)  # what torch's C++ code asks of the gloo group behind
    dist.group.WORLD._get_backend(torch.device("cpu")).allreduce([t]).wait()
    assert t.tolist() == [4.0] * 3
    dist.destroy_process_group()
    done("pycomm")

    if interface:  # gloo itself would take a loopback address on hosts that have no known name
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    dist.init_process_group("gloo")
    for ranks in ([0, 1, 2, 3], [1, 3], [0, 1], [0, 2, 3]):
        group = dist.new_group(ranks, backend="pycomm")  # its members join a job of their own
        if dist.get_rank() in ranks:
            assert hosts_of(group) == in_order_of_hosts([host_of_rank[rank] for rank in ranks])
            check_sum(group, ranks)
            dist.destroy_process_group(group)
    dist.destroy_process_group()
    done("pycomm in gloo")


def done(what: str) -> None:
    if os.environ["RANK"] == "0":
        print(f"{what}: done", flush=True)


def hosts_of(group: dist.ProcessGroup) -> list[list[int]]:
    """Group ranks by host, as the core sees them."""
    hosts: list[list[int]] = group.core.hosts
    return hosts


def in_order_of_hosts(host_of_rank: list[int]) -> list[list[int]]:
    hosts: dict[int, list[int]] = {}
    for rank, host in enumerate(host_of_rank):
        hosts.setdefault(host, []).append(rank)
    return list(hosts.values())


def of_rank(rank: int, *shape: int) -> Tensor:
    """Whole numbers, whose sums are exact in any order. Every rank can draw every rank's."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-1000, 1000, shape, generator=generator).to(torch.float32)


def check_sum(group: dist.ProcessGroup, ranks: list[int]) -> None:
    for count in (1, 1000, 300_003):
        t = of_rank(dist.get_rank(), count)
        dist.all_reduce(t, group=group)
        assert torch.equal(t, torch.stack([of_rank(rank, count) for rank in ranks]).sum(0))


def collectives() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    everything = torch.stack([of_rank(other, size, 70_001) for other in range(size)])
    mine = everything[rank].clone()
    check_sum(dist.group.WORLD, list(range(size)))
    work = dist.all_reduce(t := mine.clone(), async_op=True)
    work.wait()
    assert torch.equal(t, everything.sum(0))
    for root in range(size):
        dist.broadcast(t := mine.clone(), root)
        assert torch.equal(t, everything[root])
    output = torch.empty_like(everything)
    dist.all_gather_into_tensor(output, mine)
    assert torch.equal(output, everything)
    dist.reduce_scatter_tensor(block := torch.empty_like(mine[0]), mine)
    assert torch.equal(block, everything[:, rank].sum(0))
    dist.all_to_all_single(t := torch.empty_like(mine), mine)
    assert torch.equal(t, everything[:, rank])
    dist.barrier()


def messages() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for distance in range(1, size):
        sent = of_rank(rank, 50_000)
        received = torch.empty(50_000)
        requests = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, (rank + distance) % size),
                dist.P2POp(dist.irecv, received, (rank - distance) % size),
            ]
        )
        for request in requests:
            request.wait()
        assert torch.equal(received, of_rank((rank - distance) % size, 50_000))


def same_as_one_process() -> None:
    """A step of DDP, in float64: against the mean of all ranks' gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.Tanh(), torch.nn.Linear(60, 3))
    model = model.double()
    alone = copy.deepcopy(model)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.01)
    for step in range(3):
        inputs = [of_rank(10 * step + other, 8, 40).double() for other in range(size)]
        ddp.zero_grad()
        ddp(inputs[rank]).square().mean().backward()
        alone.zero_grad()
        for x in inputs:
            (alone(x).square().mean() / size).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            # The mean of four numbers in another order: a few units in the last place.
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
        for parameters in (model.parameters(), alone.parameters()):
            torch.optim.SGD(parameters, lr=1e-3).step()


if __name__ == "__main__":
    main()
