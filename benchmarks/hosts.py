"""All-reduce between hosts against gloo, MPI and what one TCP stream carries there.

mpirun -np 4 --host a,b,c,d python benchmarks/hosts.py

Run it with one rank or more on each of several hosts. Each contender has one turn a round, in
rotated order; a sample is the slowest rank's time for one call on input that was written just
before, and every result is checked.

The bound is the time in which a host's link carries the least bytes there are: 2(H-1)/H of the
buffer leave each of H hosts, and as many reach it. The goodput is what one TCP stream from a host's
first rank to the next host's carries while no other runs, on the slowest host. Beside it stands
the congestion control that the kernel gave that stream, since it decides how even the times are:
BBR all but stops a busy connection for 200 ms out of 10 s (README.md).

Beside the times stands what a call costs a host: the processor time of one of its ranks, and the
TCP segments that its kernel sent again because a full queue had dropped them.
"""

import argparse
import itertools
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

import pycomm
from pycomm.bench import here, report
from pycomm.bench.ranks.measure import Array, Bench, Contender
from pycomm.bench.ranks.own import OwnContender
from pycomm.runtime import world_group

MIB = 1 << 20
STREAM_S = 1.5
STREAM_WARM_UP_S = 0.3


class Algorithm(OwnContender):
    """pycomm's all-reduce by one algorithm; None: what it chooses."""

    def __init__(self, algorithm: str | None) -> None:
        super().__init__()
        self.algorithm = algorithm

    def call(
        self, variant: str, collective: str, source: Array, target: Array
    ) -> Callable[[], object]:
        return partial(pycomm.all_reduce_, torch.from_numpy(target), algorithm=self.algorithm)


class Line(Bench):
    """A line of the table: one contender, its samples, and what they cost this rank."""

    def __init__(self, label: str, contender: Contender, variant: str, nbytes: int) -> None:
        super().__init__(contender, variant, "all_reduce", nbytes)
        self.label = label
        self.slowest_s: list[float] = []
        self.cpu_s: list[float] = []
        self.resent: list[int] = []

    def run(self) -> float:
        resent, cpu_s = segments_resent(), time.process_time()
        seconds = super().run()
        self.cpu_s.append(time.process_time() - cpu_s)
        self.resent.append(segments_resent() - resent)
        return seconds

    def turn(self) -> None:
        """One sample, by all ranks together."""
        self.slowest_s.append(max(pycomm.all_gather_object(self.samples(1)[0])))

    def cells(self, bound_s: float) -> list[str]:
        """Medians, without the first turn, which touched the memory. All ranks make this call."""
        costs = pycomm.all_gather_object((self.cpu_s[1:], self.resent[1:]))
        # One rank for each host: they share its counter.
        firsts = [costs[host[0]] for host in world_group().hosts]
        seconds = statistics.median(self.slowest_s[1:])
        cpu_s = statistics.mean(itertools.chain.from_iterable(cpu for cpu, _ in costs))
        resent = statistics.mean(itertools.chain.from_iterable(count for _, count in firsts))
        return [
            self.label,
            f"{1e3 * seconds:.0f}",
            f"{1e3 * min(self.slowest_s[1:]):.0f}",
            f"{1e3 * max(self.slowest_s[1:]):.0f}",
            f"{100 * bound_s / seconds:.1f} %",
            f"{1e3 * cpu_s:.0f}",
            f"{resent:.0f}",
        ]


HEADER = ["", "median ms", "best", "worst", "of the bound", "CPU ms a rank", "resent a host"]


def segments_resent() -> int:
    """TCP segments that this host has sent again so far."""
    names, values = (
        line.split()
        for line in Path("/proc/net/snmp").read_text().splitlines()
        if line.startswith("Tcp:")
    )
    return int(values[names.index("RetransSegs")])


def measure_streams() -> tuple[float, str]:
    """What each host's stream to the next host carries, one after the other.

    Returns:
        Bits a second of the slowest, and the congestion controls of all.
    """
    firsts = [host[0] for host in world_group().hosts]
    rates: list[float] = []
    controls: set[str] = set()
    for sender, receiver in zip(firsts, [*firsts[1:], firsts[0]], strict=True):
        rate, control, listener, address = 0.0, "", None, None
        if pycomm.rank() == receiver:
            listener = socket.create_server(("", 0))
            address = (socket.gethostbyname(socket.gethostname()), listener.getsockname()[1])
        address = pycomm.broadcast_object(address, receiver)
        if pycomm.rank() == sender:
            control = send_stream(address)
        elif listener is not None:
            with listener, listener.accept()[0] as stream:
                rate = receive_stream(stream)
        rates.append(pycomm.broadcast_object(rate, receiver))
        controls.add(pycomm.broadcast_object(control, sender))
    return min(rates), ", ".join(sorted(controls))


def send_stream(address: tuple[str, int]) -> str:
    """Returns its congestion control: a route may name another than the host's default."""
    block = bytes(MIB)
    end = time.perf_counter() + STREAM_S
    with socket.create_connection(address) as stream:
        while time.perf_counter() < end:
            stream.sendall(block)
        name: bytes = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.rstrip(b"\0").decode()


def receive_stream(stream: socket.socket) -> float:
    """Bits a second, from the end of the warm-up to the last byte."""
    room = memoryview(bytearray(MIB))
    began = since = last = time.perf_counter()
    counted = 0
    while count := stream.recv_into(room):
        last = time.perf_counter()
        if last - began < STREAM_WARM_UP_S:
            since = last
        else:
            counted += count
    return 8 * counted / (last - since)


def make_lines(
    nbytes: int, algorithms: Sequence[str], memories: Sequence[str], peers: Sequence[str]
) -> tuple[list[Line], list[str]]:
    """The contenders, and their versions."""
    lines, versions = [], [OwnContender().version()]
    for algorithm, memory in itertools.product(algorithms, memories):
        own = Algorithm(None if algorithm == "default" else algorithm)
        lines.append(Line(f"pycomm, {algorithm}, {memory}", own, memory, nbytes))
    for peer in peers:
        contender = here.contender(peer)
        versions.append(contender.version())
        for variant in contender.variants():
            label = peer if variant == peer else f"{peer}, {variant}"
            lines.append(Line(label, contender, variant, nbytes))
    return lines, versions


def main() -> None:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=float, default=25, help="float32 in the buffer (25)")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each (5)")
    parser.add_argument("--algorithms", type=names, default="default,ring", help="default,ring")
    parser.add_argument("--memories", type=names, default="bucket,tensor", help="bucket,tensor")
    parser.add_argument("--peers", type=names, default="gloo,mpi", help="gloo,mpi")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pycomm.init()
    hosts = len(world_group().hosts)
    if hosts == 1:
        parser.error("all ranks are on one host; start them on several.")
    nbytes = int(args.mib * MIB)
    goodput, control = measure_streams()
    bound_s = report.bus_factor("all_reduce", hosts) * 8 * nbytes / goodput
    lines, versions = make_lines(nbytes, args.algorithms, args.memories, args.peers)
    for number in range(args.rounds + 1):
        turn = number % len(lines)
        for line in [*lines[turn:], *lines[:turn]]:
            line.turn()
    rows = [line.cells(bound_s) for line in lines]
    if pycomm.rank() == 0:
        print(
            f"{report.size(nbytes)} float32, {hosts} hosts, {pycomm.size()} ranks; one "
            f"TCP stream ({control}) carries {goodput / 1e6:.0f} Mbit/s, so the bound is "
            f"{1e3 * bound_s:.0f} ms\n"
        )
        for cells in [HEADER, ["---"] + ["---:"] * (len(HEADER) - 1), *rows]:
            print("| " + " | ".join(cells) + " |")
        print(f"\n{'; '.join(versions)}; {os.cpu_count()} cores, Linux {platform.release()}")


if __name__ == "__main__":
    main()
