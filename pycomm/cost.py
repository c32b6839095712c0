"""What this machine's network and memory cost: measured once, stored, read by ``init()``."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from pycomm import _core
from pycomm.errors import InvalidArgumentError

# Sizes of the round trips, in bytes: short ones for the fixed part, long ones for the slope.
_MESSAGE_BYTES = [8, 1024, 16 << 10, 256 << 10, 1 << 20, 4 << 20]
_ROUNDS = 7


_MOST_S = 1e9


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Constants of the cost functions, in seconds; see ``docs/cost-model.md``.

    Attributes:
        alpha_s: a message between two hosts, however short.
        beta_s_per_byte: a byte on a host's link.
        gamma_s_per_byte: a byte that a core reads and folds.
        meeting_s: a meeting of a host's ranks.
    """

    alpha_s: float = _core.CostModel().alpha_s
    beta_s_per_byte: float = _core.CostModel().beta_s_per_byte
    gamma_s_per_byte: float = _core.CostModel().gamma_s_per_byte
    meeting_s: float = _core.CostModel().meeting_s

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0 <= value <= _MOST_S):
                raise InvalidArgumentError(
                    f"cost model: {name} is {value!r}. Pass a number of seconds, 0 or more."
                )

    def to_core(self) -> _core.CostModel:
        """The same as the engine takes it."""
        return _core.CostModel(**dataclasses.asdict(self))

    def save(self, path: Path | None = None) -> Path:
        """Write the file that ``init()`` reads, at once or not at all; returns where it is."""
        path = path or cost_file(os.environ)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            try:
                json.dump(dataclasses.asdict(self), file, indent=2)
                file.write("\n")
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
        return path


def load(environ: Mapping[str, str]) -> CostModel:
    """What was calibrated, or the defaults if nothing was.

    Raises:
        InvalidArgumentError: the file holds something else, or ``PYCOMM_COST_FILE`` names none.
    """
    try:
        path = cost_file(environ)
    except InvalidArgumentError:
        return CostModel()  # nowhere for a file to be
    remedy = "  Run `python -m pycomm bench calibrate` again, or delete it."
    try:
        text = path.read_text()
    except FileNotFoundError:
        if not environ.get("PYCOMM_COST_FILE"):
            return CostModel()
        raise InvalidArgumentError(
            f"init: PYCOMM_COST_FILE={str(path)!r} does not exist.\n"
            "  `python -m pycomm bench calibrate` writes it; unset it for the defaults."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"init: cannot read {path}: {error}.\n{remedy}") from error
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"init: {path} is not JSON: {error}.\n{remedy}") from error
    try:
        return from_values(values, str(path))
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{error}\n{remedy}") from error


def from_values(values: object, source: str) -> CostModel:
    """A model of what ``source``, a file or a rank, says.

    Raises:
        InvalidArgumentError: it says something else.
    """
    names = {field.name for field in dataclasses.fields(CostModel)}
    if not isinstance(values, dict) or set(values) != names:
        found = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise InvalidArgumentError(f"init: {source} holds {found} instead of {sorted(names)}.")
    try:
        return CostModel(**values)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"init: {source}: {error}") from error


def cost_file(environ: Mapping[str, str]) -> Path:
    """``PYCOMM_COST_FILE``, or ``pycomm/cost.json`` among the user's cached files.

    Raises:
        InvalidArgumentError: there is no place for such files.
    """
    if environ.get("PYCOMM_COST_FILE"):
        return Path(environ["PYCOMM_COST_FILE"])
    cache = environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(cache) if cache else Path.home() / ".cache"
    except RuntimeError as error:  # neither HOME nor an entry in /etc/passwd
        raise InvalidArgumentError(
            "this user has no home directory to keep measured costs in.\n"
            "  Set PYCOMM_COST_FILE, XDG_CACHE_HOME or HOME."
        ) from error
    return folder / "pycomm" / "cost.json"


def calibrate(group: _core.Group) -> CostModel:
    """Measure the constants; every rank of ``group`` makes this call.

    Between hosts a broadcast from the first rank, followed by one back from the first rank of the
    second host, takes the opening and one message each; a line through the medians over sizes
    (least squares of the relative error) gives alpha and beta. What the group does not have, one
    host or one rank a host, keeps its default. All ranks return what rank 0 measured.
    """
    default = CostModel()
    alpha_s, beta_s_per_byte = default.alpha_s, default.beta_s_per_byte
    if len(group.hosts) > 1:
        times = [_broadcast_seconds(group, size) for size in _MESSAGE_BYTES]
        fixed_s, beta_s_per_byte = _line(_MESSAGE_BYTES, times)
        messages = 2 * math.ceil(math.log2(len(group.hosts)))  # the opening, and the tree
        alpha_s = fixed_s / messages
        beta_s_per_byte /= messages / 2
    meeting_s = default.meeting_s
    if len(group.hosts) == 1 and group.size > 1:
        meeting_s = _median_seconds(group.barrier, repeat=100)
    measured = torch.tensor(
        [alpha_s, beta_s_per_byte, _fold_seconds_per_byte(), meeting_s], dtype=torch.float64
    )
    address = measured.data_ptr()
    group.broadcast(address, address, measured.numel(), _core.DType.FLOAT64, 0)
    return CostModel(*measured.tolist())


def _broadcast_seconds(group: _core.Group, size: int) -> float:
    """One way between two hosts, opening included: half of there and back."""
    there, back = group.hosts[0][0], group.hosts[1][0]
    memory = torch.zeros(size, dtype=torch.uint8)

    def there_and_back() -> None:
        for root in (there, back):
            address = memory.data_ptr()
            group.broadcast(address, address, size, _core.DType.UINT8, root)

    return _median_seconds(there_and_back) / 2


def _fold_seconds_per_byte() -> float:
    """A reduction's own fold of two buffers beyond the caches."""
    a, b = torch.ones(4 << 20), torch.ones(4 << 20)
    seconds = _median_seconds(lambda: _core.add_in_place(a.data_ptr(), b.data_ptr(), a.numel()))
    return seconds / (a.nbytes + b.nbytes)


def _median_seconds(call: Callable[[], object], repeat: int = 1) -> float:
    call()  # the first touches memory and opens connections
    samples = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for _ in range(repeat):
            call()
        samples.append((time.perf_counter() - began) / repeat)
    return statistics.median(samples)


def _line(sizes: list[int], seconds: list[float]) -> tuple[float, float]:
    """Intercept and slope with the least squares of relative errors, neither negative."""
    t = torch.tensor(seconds, dtype=torch.float64)
    columns = torch.stack([torch.ones_like(t), torch.tensor(sizes, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(columns / t[:, None], torch.ones_like(t)[:, None]).solution
    intercept, slope = solution.flatten().tolist()
    return max(intercept, 0.0), max(slope, 0.0)
