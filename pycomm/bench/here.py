"""Contenders in the ranks that a launcher started, one after the other: ours, this MPI, torch."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

import pycomm
from pycomm import mpi_library
from pycomm.bench.peers import MPI_PEERS, TORCH_PEERS
from pycomm.bench.ranks.c10d import C10dContender
from pycomm.bench.ranks.collectives import Make, Sampler
from pycomm.bench.ranks.measure import Bench, Contender
from pycomm.bench.ranks.own import OwnContender, make_bench
from pycomm.errors import CommError, InvalidArgumentError


class HereTurns:
    """A contender in this process. All ranks go through the same turns."""

    def __init__(self, label: str, contender: Contender, make: Make = Bench) -> None:
        self.label = label
        self.variants = contender.variants()
        self.version = contender.version()
        self._sampler = Sampler(contender, make)

    def turn(self, *, variant: str, collective: str, nbytes: int, repeat: int) -> list[list[float]]:
        samples, problem = [], None
        try:
            samples = self._sampler.samples(variant, collective, nbytes, repeat)
        except (CommError, RuntimeError, ValueError) as error:
            problem = f"{self.label}: {type(error).__name__}: {error}"
        answers = pycomm.all_gather_object((samples, problem))
        problems = [theirs for _, theirs in answers if theirs]
        if problems:
            raise CommError(problems[0])
        return [theirs for theirs, _ in answers]


def contenders(peers: Sequence[str]) -> list[HereTurns]:
    """Ours and the peers that these ranks can run: torch, and their MPI, by name or as ``mpi``."""
    own = HereTurns("pycomm", OwnContender(), make_bench)
    return [own, *(HereTurns(peer, contender(peer)) for peer in peers)]


def contender(peer: str) -> Contender:
    """The peer among these ranks. All of them make this call."""
    if peer in TORCH_PEERS:
        return _torch(peer)
    if peer == "mpi" or peer in MPI_PEERS:
        return _mpi(peer)
    raise InvalidArgumentError(
        f"bench: under a launcher the peers are mpi (its own), gloo and c10d, not {peer}."
    )


def _mpi(peer: str) -> Contender:
    mpi_library.load()
    from mpi4py import MPI

    from pycomm.bench.ranks.mpi import MpiContender

    vendor, _ = MPI.get_vendor()
    if peer != "mpi" and MPI_PEERS[peer].label != vendor:
        raise InvalidArgumentError(
            f"bench: these ranks run on {vendor} and cannot run {peer}. Pass mpi, or start the "
            "bench without a launcher."
        )
    return MpiContender()


def _torch(peer: str) -> C10dContender:
    """A group of torch's among these ranks, which meet at a port of rank 0's host."""
    if not dist.is_initialized():
        address = None
        if pycomm.rank() == 0:
            with socket.socket() as probe:
                probe.bind(("", 0))
                address = (socket.gethostbyname(socket.gethostname()), probe.getsockname()[1])
        host, port = pycomm.broadcast_object(address)
        store = TCPStore(host, port, pycomm.size(), is_master=pycomm.rank() == 0)
        dist.init_process_group("gloo", store=store, rank=pycomm.rank(), world_size=pycomm.size())
    return C10dContender(peer, TORCH_PEERS[peer])
