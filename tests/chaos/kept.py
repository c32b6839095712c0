"""What a run has found so far, in its folder, so that one that was interrupted goes on.

A run that was of another state of the code, or that has come to its end, is not gone on with.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chaos.verdict import Outcome
from pycomm import _core

_STATE = "run.json"


class Kept:
    """The outcomes of a run, by number of round.

    Args:
        folder: of this seed.
        code: see ``state_of_code``.
    """

    def __init__(self, folder: Path, code: dict[str, Any]) -> None:
        self._folder = folder
        self._code = code
        self.why_anew = self._why_anew()
        if self.why_anew:
            self._forget()
        self._note(finished=False)

    def outcome(self, number: int) -> Outcome | None:
        path = self._path(number)
        return Outcome(**json.loads(path.read_text())) if path.exists() else None

    def keep(self, number: int, outcome: Outcome) -> None:
        _replace(self._path(number), asdict(outcome))

    def finish(self) -> None:
        """All rounds are done: the next run is a new one."""
        self._note(finished=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.json"

    def _note(self, *, finished: bool) -> None:
        _replace(self._folder / _STATE, {"code": self._code, "finished": finished})

    def _why_anew(self) -> str:
        """Why what is there is not gone on with; "" if it is, or if nothing is there."""
        if not any(self._folder.glob("[0-9]*")):
            return ""
        state = self._folder / _STATE
        former = json.loads(state.read_text()) if state.exists() else {}
        if former.get("finished"):
            return "the last run had finished"
        if former.get("code") != self._code:
            return "the code is not that of the last run"
        return ""

    def _forget(self) -> None:
        """Remove outcomes, and what rounds have left."""
        for path in self._folder.glob("[0-9]*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def state_of_code() -> dict[str, Any]:
    """What is run: the commit, what differs from it, and which core was built when."""
    changes = _git("diff", "HEAD")
    return {
        "commit": _git("rev-parse", "HEAD").strip(),
        "changes": hashlib.sha256(changes.encode()).hexdigest() if changes else "",
        "core": [_core.__file__, os.stat(_core.__file__).st_mtime],
    }


def _git(*arguments: str) -> str:
    """What git says of these sources; "" where they are no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace").stdout
    except FileNotFoundError:
        return ""


def _replace(path: Path, content: dict[str, Any]) -> None:
    """Write it so that whoever is interrupted leaves the former or the new one, whole."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(content))
    new.replace(path)
