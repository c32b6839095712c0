"""Parameters and buffers of modules, whole, split over ranks or in stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pycomm._core import Group
from pycomm.checkpoint.boxes import Box
from pycomm.checkpoint.contents import Contents, Part, TensorEntry, Wanted, joined, listed
from pycomm.checkpoint.saved import Saved
from pycomm.checkpoint.values import entry_of
from pycomm.errors import InvalidArgumentError
from pycomm.pipeline import Pipeline
from pycomm.shares import Share, named_shares


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Where an optimizer finds the name of what it updates."""

    module: str  # the thing
    names: list[str]  # in it, all of them
    stage: int
    share: Share | None


class ModuleThing:
    """A module, or this rank's part of a pipeline under the names of the whole model."""

    kind = "module"

    def __init__(self, name: str, module: nn.Module | Pipeline) -> None:
        self.name = name
        self.ties: list[list[str]] = []
        self.spreads: list[tuple[str, Group]] = []
        stages: Mapping[str, int] = {}
        if isinstance(module, Pipeline):
            self.spreads.append(("is a Pipeline over", module.group))
            self.ties, stages = module.tied_names(), module.stages_of_parameters()
            module = module.module
        self._module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
        self._state: dict[str, Any] = self._module.state_dict()
        self._shares = {name: share for name, _, share in named_shares(self._module)}
        self.spreads += [("has layers split over", s.group) for s in self._shares.values()]
        self._parameters: dict[int, Parameter] = {}
        self._parameter_names: set[str] = set()
        for its_name, param in self._module.named_parameters(remove_duplicate=False):
            self._parameter_names.add(its_name)
            known = self._parameters.setdefault(
                id(param),
                Parameter(name, [], stages.get(its_name, 0), self._shares.get(its_name)),
            )
            known.names.append(its_name)
        self._twins: list[tuple[str, Tensor, str, Tensor]] = []

    def parameters(self) -> dict[int, Parameter]:
        """By id."""
        return self._parameters

    def contents(self) -> Contents:
        """See ``Thing``."""
        found = Contents()
        for name, value in self._state.items():
            if isinstance(value, Tensor):
                found.tensors.append(self._entry(name, value))
            else:  # what get_extra_state() returned
                full_name = joined(self.name, name)
                found.values.append(entry_of(full_name, value, ranks_may_differ=True))
        return found

    def wanted(self, saved: Saved) -> Wanted:
        """See ``Thing``."""
        found, problems = Wanted(), list[str]()
        self._twins = []
        first_names: dict[tuple[object, ...], str] = {}
        for name, value in self._state.items():
            full_name = joined(self.name, name)
            if not isinstance(value, Tensor):
                if full_name in saved.metadata.state_dict_metadata:
                    found.values.append(full_name)
                else:
                    problems.append(f"'{full_name}' is missing")
                continue
            place = value
            memory = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            if value.numel() > 0 and first_names.setdefault(memory, name) != name:
                # Shared here: both names are read, and must be the same.
                place = torch.empty_like(value)
                self._twins.append((first_names[memory], value, name, place))
            entry = self._entry(name, place)
            problem = saved.problem(entry)
            if any(s == 0 and n > 1 for s, n in zip(value.stride(), value.shape, strict=True)):
                problem = f"'{full_name}' is expanded here: its elements share memory"
            if problem:
                problems.append(problem)
            else:
                found.tensors.append(entry)
        if problems:
            raise InvalidArgumentError(
                f"'{self.name}' does not fit the checkpoint: {listed(problems)}.\n"
                "  Build the model as it was when it was saved; pycomm.checkpoint.read(path) shows "
                "what there is."
            )
        return found

    def claims(self, saved: Saved) -> set[str]:
        """See ``Thing``."""
        return set(self._state)

    def check(self, values: Mapping[str, Any]) -> None:
        """See ``Thing``."""

    def install(self, values: Mapping[str, Any]) -> None:
        """See ``Thing``."""
        for name, value, twin_name, twin in self._twins:
            if not same_bits(value, twin):
                raise InvalidArgumentError(
                    f"'{self.name}' has one tensor under the names '{name}' and '{twin_name}', and "
                    "the checkpoint has two that differ.\n  Build the model without sharing them."
                )
        prefix = joined(self.name, "")
        for name in self._state:
            if prefix + name in values:
                self._state[name] = values[prefix + name]
        # Tensors are there; this is for extra state, and for modules with hooks of their own.
        self._module.load_state_dict(self._state)

    def _entry(self, name: str, value: Tensor) -> TensorEntry:
        full_name = joined(self.name, name)
        if is_lazy(value):
            raise InvalidArgumentError(
                f"'{full_name}' has no shape yet.\n  Run one batch through the module first."
            )
        if value.is_meta or value.layout is not torch.strided or type(value).__name__ == "DTensor":
            raise InvalidArgumentError(
                f"'{full_name}' is a {type(value).__name__} of layout {value.layout} on "
                f"{value.device}, and pycomm saves dense tensors of CPUs and GPUs."
            )
        share = self._shares.get(name)
        is_buffer = name not in self._parameter_names
        if share is None:
            return TensorEntry.whole(full_name, value, lowest_rank_wins=is_buffer)
        part = Part(Box.whole(value.shape).shifted(share.dim, share.begin), value)
        return TensorEntry(full_name, share.whole, value.dtype, [part], is_buffer)


def table_of(modules: Iterable[ModuleThing]) -> dict[int, Parameter]:
    """All parameters, by id; those of the first module that has them."""
    table: dict[int, Parameter] = {}
    for module in modules:
        for key, parameter in module.parameters().items():
            table.setdefault(key, parameter)
    return table


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal, NaNs included."""
    flat = [t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1) for t in (a, b)]
    return torch.equal(flat[0].view(torch.uint8), flat[1].view(torch.uint8))
