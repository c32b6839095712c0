"""Where torch's ranks meet when MPI's launcher started them and no variable names a place."""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import struct
from collections.abc import MutableMapping
from typing import Any

from pycomm.connection import DEFAULT_TIMEOUT_S, host_key
from pycomm.errors import CommError
from pycomm.launch import detect
from pycomm.rendezvous import meet

_CONNECT_S = 2.0  # to one address
_SIOCGIFADDR = 0x8915  # <linux/sockios.h>


def provide_address(environ: MutableMapping[str, str], timeout_s: float | None = None) -> None:
    """Set ``MASTER_ADDR`` and ``MASTER_PORT`` to an address of rank 0 that every rank reaches.

    ``RANK`` and ``WORLD_SIZE`` too, where the launcher did not say them and only MPI knows.

    Collective: the ranks ask each other through MPI. Rank 0 listens on a free port, offers the
    addresses of its host, and every rank tries them; the first that all reached is taken.

    Args:
        timeout_s: for each time that the ranks tell each other something; pycomm's if None.

    Raises:
        CommError: there is none, or MPI does not work; InvalidArgumentError, CommTimeoutError: as
            ``pycomm.init``.
    """
    if timeout_s is None:
        timeout_s = DEFAULT_TIMEOUT_S
    rendezvous = meet(detect(environ), environ, attempt=0, timeout_s=timeout_s)

    def all_gather(mine: Any) -> list[Any]:
        return [json.loads(data) for data in rendezvous.all_gather_bytes(json.dumps(mine).encode())]

    with contextlib.ExitStack() as stack:
        offer: tuple[list[str], int] | None = None
        if rendezvous.rank == 0:
            server = stack.enter_context(socket.create_server(("", 0)))
            offer = (_addresses(), server.getsockname()[1])
        cards = all_gather([host_key({}), offer])
        candidates, port = cards[0][1]
        if all(host == cards[0][0] for host, _ in cards):
            candidates = ["127.0.0.1"]
        reached = all_gather([address for address in candidates if _reaches(address, port)])
    all_gather(None)  # before rank 0 has stopped listening nobody shall look for its store there
    reached_by_all = set(candidates).intersection(*reached)
    if not reached_by_all:
        raise CommError(
            f"init_process_group on rank {rendezvous.rank}: no address of rank 0's host is reached "
            f"by every rank; tried port {port} of {', '.join(candidates) or 'none'}.\n"
            "  Set MASTER_ADDR to one that is, and MASTER_PORT to a port that no firewall closes "
            "(`mpirun -x MASTER_ADDR=... -x MASTER_PORT=29500`)."
        )
    environ["MASTER_ADDR"] = next(a for a in candidates if a in reached_by_all)
    environ["MASTER_PORT"] = str(port)
    if "RANK" not in environ and "WORLD_SIZE" not in environ:  # of some launchers only MPI knows
        environ["RANK"] = str(rendezvous.rank)
        environ["WORLD_SIZE"] = str(rendezvous.size)


def _addresses() -> list[str]:
    """This host's IPv4 addresses, those of its name first, without loopback."""
    found: list[str] = []
    with contextlib.suppress(OSError):  # a name that nobody resolves
        own = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
        found += [str(info[4][0]) for info in own]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            request = struct.pack("256s", interface.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # an interface without an address
            found.append(socket.inet_ntoa(answer[20:24]))
    return [address for address in dict.fromkeys(found) if not address.startswith("127.")]


def _reaches(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=_CONNECT_S):
            return True
    except OSError:
        return False
