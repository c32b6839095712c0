"""The table, in Markdown."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pycomm
from faults.fault import ENDED, RANKS, ROLES, Fault
from faults.runner import CALL_TIMEOUT_S, HOST_TIMEOUT_S
from faults.verdict import Row

BEGIN = "<!-- made by make fault-table -->\n"
END = "<!-- end -->\n"
_LONGEST_TEXT = 200


def table(rows: Sequence[Row]) -> str:
    lines = [
        f"Of {RANKS} ranks under `mpirun --with-ft ulfm` the last is the victim. "
        f"{rows[0].rounds} rounds; `PYCOMM_TIMEOUT_S` is\n"
        f"{CALL_TIMEOUT_S[1]:g} on one host, and {CALL_TIMEOUT_S[2]:g} on two hosts of two ranks, "
        f"where `PYCOMM_HOST_TIMEOUT_S` is {HOST_TIMEOUT_S:g}. How soon: from the fault to\n"
        "the error, median and longest over the other ranks and all rounds.\n",
        "| fault | where the others were | what each rank sees | after, s (longest) "
        "| group usable | starting over |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {_what(row.fault)} | {row.fault.others} | {_sees(row.fault)} | {_soon(row)} "
        f"| {_usable(row)} | {_over(row)} |"
        for row in rows
    ]
    lines += [
        "",
        "What they are told, in the first round:",
        "",
        "| fault | who | first line |",
        "|---|---|---|",
    ]
    for row in rows:
        for who, text in _texts(row):
            where = "" if row.fault.others == "in a collective" else f" ({row.fault.others})"
            lines.append(f"| {_what(row.fault)}{where} | {who} | {_short(text)} |")
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Put the table between the marks of the file."""
    page = path.read_text()
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{path} lacks the lines {BEGIN!r} and {END!r}")
    path.write_text(before + BEGIN + text + END + after)


def _what(fault: Fault) -> str:
    if fault.hosts == 1 or fault.outside:
        return fault.what
    return f"{fault.what}; two hosts"


def _who(fault: Fault, role: str) -> str:
    if role == "victim":
        return "the victim"
    if fault.hosts == 1:
        return "the others"
    if role == "far":
        return "the other host"
    return "the lost host" if fault.outside else "the victim's host"


def _named(fault: Fault, roles: Sequence[str]) -> str:
    if len(roles) > 1 and len(roles) == len(_roles(fault)):
        return "all"
    if "near" in roles and "far" in roles:
        return "the others"
    return " and ".join(_who(fault, role) for role in roles)


def _roles(fault: Fault) -> list[str]:
    return [role for role in ROLES if role in {fault.role(rank) for rank in range(RANKS)}]


def _sees(fault: Fault) -> str:
    """Roles that see the same are named together."""
    by_class: dict[str, list[str]] = {}
    for role in _roles(fault):
        by_class.setdefault(getattr(fault, role), []).append(role)
    told = [f"{_named(fault, roles)}: {_class(name)}" for name, roles in by_class.items() if name]
    return "; ".join(told) or "nothing"


def _texts(row: Row) -> list[tuple[str, str]]:
    """Who was told what by pycomm; once, where others were told the same."""
    told: dict[tuple[str, str], tuple[str, str]] = {}
    for role in ("near", "far", "victim"):
        name, text = getattr(row.fault, role), row.texts.get(role, "")
        if not text or not (hasattr(pycomm, name) or name == ENDED):
            continue
        if role != "victim" or name != row.fault.near:
            told.setdefault((name, text.partition(": ")[2]), (_who(row.fault, role), text))
    return list(told.values())


def _class(name: str) -> str:
    return name if name == ENDED else f"`{name}`"


def _soon(row: Row) -> str:
    if not row.seconds:
        return "–"  # noqa: RUF001
    since = " after its next call" if row.fault.others == "computing" else ""
    return f"{statistics.median(row.seconds):.2f} ({max(row.seconds):.2f}){since}"


def _usable(row: Row) -> str:
    if row.fault.lost:
        return "no"
    return "yes" if row.usable and all(row.usable) else "no"


def _over(row: Row) -> str:
    if row.fault.lost:
        return "the job ends" if row.fault.ends_job else "[without them](elastic.md)"
    return "yes" if all(row.over) else "**no**"


def _short(text: str) -> str:
    return textwrap.shorten(text.replace("|", "\\|"), _LONGEST_TEXT, placeholder=" ...")
