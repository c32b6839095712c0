"""``read``: a whole checkpoint in one process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycomm.checkpoint import folder, record
from pycomm.checkpoint.contents import path_of
from pycomm.checkpoint.optimizer import OPTIONS, STATE, parsed_name
from pycomm.checkpoint.saved import Saved
from pycomm.checkpoint.values import digest
from pycomm.errors import InvalidArgumentError


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """All of a checkpoint, in this process, which needs no ``init()``.

    ::

        saved = pycomm.checkpoint.read("run/latest")
        model.load_state_dict(saved["model"])
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.load_state_dict(saved["optimizer"])

    Args:
        path: as for ``load``, with the same warning.

    Returns:
        By name: of a module the ``state_dict`` of the whole model, with ordinary layers; of an
        optimizer what the bare one over the whole model would save; of an object its
        ``state_dict()``; and the values. Tensors are on the CPU.

    Parameters of an optimizer are numbered stage after stage, as its ranks had them. Those are in
    one param group whose ranks had them in the same one, with the same options. A group that had
    none on any rank is there, too.

    Raises:
        InvalidArgumentError: there is no checkpoint, or it is damaged.

    Memory: the whole checkpoint.
    """
    try:
        saved = Saved.open(Path(os.path.realpath(folder.absolute(path))))
        found = saved.read_all()
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"checkpoint.read({str(path)!r}): {error}") from error
    result: dict[str, Any] = {
        name: {} for name, kind in saved.kinds.items() if kind in ("module", "optimizer")
    }
    for name, value in found.items():
        thing, *rest = path_of(name)
        if rest:
            result[thing][rest[0]] = value
        elif thing != record.NAME:
            result[thing] = value
    for name, its_record in saved.record["optimizers"].items():
        options = its_record.get("groups", ())
        result[name] = _packed(result[name], its_record["parameters"], options)
    return {name: result[name] for name in saved.kinds}


def _packed(
    flat: dict[str, Any], parameters: list[dict[str, Any]], of_groups: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """A torch optimizer's ``state_dict``, from names like ``state.0.weight.exp_avg``.

    Args:
        of_groups: options of each param group, for those without parameters.
    """
    states: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, Any]] = {}
    known = {name for parameter in parameters for name in parameter["names"]}
    for flat_name, value in flat.items():
        parsed = parsed_name(flat_name, known)
        if parsed is not None:
            section, name, key = parsed
            {STATE: states, OPTIONS: options}[section].setdefault(name, {})[key] = value
    groups: dict[tuple[int, str], list[str]] = {}
    for parameter in parameters:
        first = parameter["names"][0]
        alike = (parameter["param_group"], digest(sorted(options.get(first, {}).items())))
        groups.setdefault(alike, []).append(first)
    filled = {param_group for param_group, _ in groups}
    groups.update({(n, ""): [] for n in range(len(of_groups)) if n not in filled})
    packed: dict[str, Any] = {"state": {}, "param_groups": []}
    number = 0
    for (param_group, _), names in sorted(groups.items(), key=lambda item: item[0][0]):
        its_options = options.get(names[0], {}) if names else of_groups[param_group]
        numbers = range(number, number + len(names))
        number += len(names)
        packed["state"].update(
            {n: states[name] for n, name in zip(numbers, names, strict=True) if name in states}
        )
        packed["param_groups"].append({**its_options, "params": list(numbers)})
    return packed
