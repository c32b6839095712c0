"""What a benchmark says: rows of figures, as a table, Markdown, JSON or a plot."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pycomm.bench.ranks import own
from pycomm.bench.rounds import Measured

OWN = "pycomm"


@dataclass(frozen=True)
class Row:
    """Medians at one size, in seconds; None where something was not measured.

    Attributes:
        peers: by name, each the faster of its variants.
        best_peer_s: the fastest of them.
        limit_s: the machine's, see ``docs/cost-model.md``; between hosts the wire's.
    """

    nbytes: int
    bucket_s: float | None
    tensor_s: float | None
    core_s: float | None
    round_trip_s: float | None
    limit_s: float | None
    peers: dict[str, float | None]

    @property
    def best_peer_s(self) -> float | None:
        return min((each for each in self.peers.values() if each is not None), default=None)


def bus_factor(collective: str, ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth: the share of a buffer that each rank must send.

    Source: nccl-tests, doc/PERFORMANCE.md.
    """
    if collective == "all_reduce":
        return 2 * (ranks - 1) / ranks
    if collective in ("broadcast", "send_recv"):
        return 1.0
    return (ranks - 1) / ranks


def rows(
    measured: Measured, peers: Sequence[str], bound_s: dict[int, float] | None = None
) -> list[Row]:
    """One row a size. ``bound_s`` takes the place of the limit where ranks are on several hosts."""
    return [
        Row(
            nbytes=nbytes,
            bucket_s=measured.median(nbytes, OWN, "bucket"),
            tensor_s=measured.median(nbytes, OWN, "tensor"),
            core_s=measured.median(nbytes, OWN, own.CORE),
            round_trip_s=measured.median(nbytes, OWN, own.ROUND_TRIP),
            limit_s=bound_s[nbytes] if bound_s else measured.median(nbytes, OWN, own.LIMIT),
            peers={peer: measured.best(nbytes, peer) for peer in peers},
        )
        for nbytes in measured.samples
    ]


def machine(ranks: int, versions: Sequence[str]) -> list[str]:
    """Where this was measured."""
    return [
        f"{ranks} ranks on {os.cpu_count()} cores of {_processor()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}",
        *versions,
    ]


def table(collective: str, ranks: int, figures: Sequence[Row], peers: Sequence[str]) -> Table:
    """For the terminal."""
    header, lines = cells(collective, ranks, figures, peers)
    made = Table(*header, title=f"{collective}, {ranks} ranks, medians in us", box=None)
    for column in made.columns:
        column.justify, column.no_wrap = "right", True
    for line in lines:
        made.add_row(*line)
    return made


def markdown(collective: str, ranks: int, figures: Sequence[Row], peers: Sequence[str]) -> str:
    """The same table for a README."""
    header, lines = cells(collective, ranks, figures, peers)
    rule = ["---:"] * len(header)
    return "".join("| " + " | ".join(line) + " |\n" for line in [header, rule, *lines])


def cells(
    collective: str, ranks: int, figures: Sequence[Row], peers: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Header and lines: times in us, bandwidths of the bucket in GB/s, ratios as times faster."""
    header = ["size", "bucket", "tensor", "C++", "alg GB/s", "bus GB/s", *peers]
    header += ["bucket vs best", "tensor vs best", "limit", "of limit"]
    factor = bus_factor(collective, ranks)
    lines = []
    for row in figures:
        bandwidth = row.nbytes / row.bucket_s / 1e9 if row.bucket_s else None
        of_limit = _ratio(row.limit_s, _fastest_own(row))
        lines.append(
            [
                size(row.nbytes),
                _us(row.bucket_s),
                _us(row.tensor_s),
                _us(row.core_s),
                _number(bandwidth),
                _number(bandwidth * factor if bandwidth is not None else None),
                *[_us(row.peers[peer]) for peer in peers],
                _times(_ratio(row.best_peer_s, row.bucket_s)),
                _times(_ratio(row.best_peer_s, row.tensor_s)),
                _us(row.limit_s),
                "-" if of_limit is None else f"{100 * of_limit:.0f} %",
            ]
        )
    return header, lines


def _fastest_own(row: Row) -> float | None:
    """What is held against the limit: the core's own time where it was taken."""
    return row.core_s if row.core_s is not None else row.bucket_s


def as_json(collective: str, ranks: int, figures: Sequence[Row], about: Sequence[str]) -> str:
    """All figures, unrounded."""
    whole: dict[str, Any] = {"collective": collective, "ranks": ranks, "about": list(about)}
    whole["rows"] = [
        {**asdict(row), "best_peer_s": row.best_peer_s, "bus_factor": bus_factor(collective, ranks)}
        for row in figures
    ]
    return json.dumps(whole, indent=2) + "\n"


def plot(path: Path, collective: str, ranks: int, figures: Sequence[Row]) -> None:
    """Time over size, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, list[float | None]] = {
        "pycomm, bucket": [row.bucket_s for row in figures],
        "pycomm, tensor": [row.tensor_s for row in figures],
        "limit": [row.limit_s for row in figures],
    }
    for row in figures:
        for peer, seconds in row.peers.items():
            curves.setdefault(peer, []).append(seconds)
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, curve in curves.items():
        points = [
            (row.nbytes, 1e6 * each)
            for row, each in zip(figures, curve, strict=True)
            if each is not None
        ]
        if points:
            style = {"color": "black", "linestyle": ":"} if name == "limit" else {"marker": "."}
            axes.plot(*zip(*points, strict=True), label=name, **style)  # type: ignore[arg-type]
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="bytes",
        ylabel="us",
        title=f"{collective}, {ranks} ranks",
    )
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def show(made: Table, about: Sequence[str]) -> None:
    """Print table and surroundings, however narrow the terminal is: a cut figure is none."""
    console = Console(soft_wrap=True)
    console.width = max(console.width, Console(width=10_000).measure(made).maximum)
    console.print(made)
    for line in about:
        console.print(line, style="dim", highlight=False)


def size(nbytes: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


def _us(seconds: float | None) -> str:
    return _number(None if seconds is None else 1e6 * seconds)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _ratio(other: float | None, mine: float | None) -> float | None:
    return other / mine if other is not None and mine else None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
