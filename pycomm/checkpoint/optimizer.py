"""The state of optimizers by the names of their parameters, whole or in pieces.

The names in the file are those of torch's flattened convention: ``state.<parameter>.exp_avg``,
``param_groups.<parameter>.lr``. They say nothing of who has which parameter, nor of param groups,
so a state goes to any layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from pycomm._core import Group
from pycomm.checkpoint.boxes import Box, boxes_of_memory
from pycomm.checkpoint.contents import (
    Contents,
    Part,
    TensorEntry,
    ValueEntry,
    Wanted,
    joined,
    listed,
)
from pycomm.checkpoint.module import Parameter, same_bits
from pycomm.checkpoint.record import GroupRecord, OptimizerRecord, ParameterRecord
from pycomm.checkpoint.saved import Saved
from pycomm.checkpoint.values import digest, entry_of, without_memory
from pycomm.errors import InvalidArgumentError
from pycomm.memory import dense_strides
from pycomm.optimizer import DistributedOptimizer
from pycomm.optimizer_state import install_state, options_of
from pycomm.sharded_optimizer import ShardedOptimizer

STATE = "state"
OPTIONS = "param_groups"


@dataclasses.dataclass(frozen=True)
class _Piece:
    """State of a parameter, or of a run of its elements, on this rank."""

    param: Tensor
    run: tuple[int, int] | None  # begin and count, in the order of memory; None: all of it
    state: Mapping[str, Any]


class OptimizerThing:
    """A bare, wrapped or sharded optimizer.

    Args:
        table: parameters of the modules that are saved with it, by id.
        ties: names of parameters that stages share, by module.

    Raises:
        InvalidArgumentError: a parameter without a name, or an optimizer whose state is not that of
            single parameters.
    """

    kind = "optimizer"

    def __init__(
        self,
        name: str,
        optimizer: Optimizer,
        table: Mapping[int, Parameter],
        ties: Mapping[str, list[list[str]]],
    ) -> None:
        self.name = name
        self.has_prefixes = False
        """Whether names begin with that of their module, as there are several: ranks agree."""
        self._optimizer = optimizer
        self.spreads: list[tuple[str, Group]] = []
        if isinstance(optimizer, ShardedOptimizer):
            self.spreads.append(("is a ShardedOptimizer over", optimizer.group))
        self._ties = ties
        self._class = type(optimizer)
        if isinstance(optimizer, (DistributedOptimizer, ShardedOptimizer)):
            self._class = optimizer.optimizer_class
        if any(base.__name__ == "LBFGS" for base in self._class.__mro__):
            raise InvalidArgumentError(
                f"'{name}' is an LBFGS, whose state is of all parameters together.\n"
                "  Save optimizer.state_dict() as a value, and load it on as many ranks."
            )
        self._groups: list[list[Tensor]] = [g["params"] for g in optimizer.param_groups]
        self._parameters: dict[int, Parameter] = {}
        own_names = dict(_own_names(optimizer))
        for number, params in enumerate(self._groups):
            for position, param in enumerate(params):
                known = table.get(id(param))
                if known is None and id(param) in own_names:
                    known = Parameter("", [own_names[id(param)]], 0, None)
                if known is None:
                    raise InvalidArgumentError(
                        f"'{name}' has a parameter of shape {tuple(param.shape)} (param_groups"
                        f"[{number}][{position}]) whose name is not known.\n  Pass the module that "
                        "has it in the same call, or make the optimizer over named_parameters()."
                    )
                self._parameters[id(param)] = known
        self._options_if_empty: Sequence[dict[str, Any]] = []
        self._targets: list[dict[str, Any]] = []
        self._twins: list[tuple[str, Tensor, str, Tensor]] = []

    def modules(self) -> set[str]:
        """Those that its parameters on this rank are from."""
        return {parameter.module for parameter in self._parameters.values()}

    def record(self) -> OptimizerRecord:
        """What the checkpoint says of it."""
        return OptimizerRecord(
            self._class.__name__,
            [
                ParameterRecord(
                    self._names(param), number, (self._parameters[id(param)].stage, position)
                )
                for number, params in enumerate(self._groups)
                for position, param in enumerate(params)
            ],
            [
                GroupRecord(not group["params"], without_memory(options_of(group)))
                for group in self._optimizer.param_groups
            ],
            [
                [self._prefixed(module, name) for name in tie]
                for module in sorted(self.modules())
                for tie in self._ties.get(module, [])
            ],
        )

    # --- saving -----------------------------------------------------------------------------------

    def contents(self) -> Contents:
        """See ``Thing``."""
        found = Contents()
        for params, group in zip(self._groups, self._optimizer.param_groups, strict=True):
            for key, value in options_of(group).items():
                encoded = entry_of(joined(self.name, f"{OPTIONS}.*.{key}"), value)
                found.values += [
                    dataclasses.replace(encoded, name=self._full(OPTIONS, name, key))
                    for param in params
                    for name in self._names(param)
                ]
        for piece in self._pieces():
            for key, value in piece.state.items():
                for name in self._names(piece.param):
                    entry = self._state_entry(self._full(STATE, name, key), piece, value)
                    if isinstance(entry, TensorEntry):
                        found.tensors.append(entry)
                    else:
                        found.values.append(entry)
        return found

    def _state_entry(self, full_name: str, piece: _Piece, value: Any) -> TensorEntry | ValueEntry:
        if not isinstance(value, Tensor):
            held = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
            if self._is_split(piece) and any(leaf.dim() > 0 for leaf in held):
                raise self._indivisible(full_name, f"a {type(value).__name__} of tensors")
            return entry_of(full_name, value)
        if value.layout is not torch.strided or value.is_meta:
            raise InvalidArgumentError(
                f"'{full_name}' is a {value.layout} tensor on {value.device}, and pycomm saves "
                "dense tensors of CPUs and GPUs."
            )
        like_elements = piece.param.shape if piece.run is None else (piece.run[1],)
        if value.shape == like_elements:
            shape, parts = self._parts(piece, value)
            return TensorEntry(full_name, shape, value.dtype, parts)
        if value.dim() > 0 and self._is_split(piece):
            raise self._indivisible(full_name, f"a tensor of shape {tuple(value.shape)}")
        return TensorEntry.whole(full_name, value)

    # --- loading ----------------------------------------------------------------------------------

    def wanted(self, saved: Saved) -> Wanted:
        """See ``Thing``."""
        self._check_class(saved)
        known = self._known_names(saved)
        problems = [
            f"parameter '{name}' is missing"
            for params in self._groups
            for param in params
            for name in self._names(param)
            if name not in known
        ]
        if problems:
            raise InvalidArgumentError(
                f"'{self.name}' does not fit the checkpoint: {listed(problems)}.\n"
                "  Make the optimizer over the same parameters."
            )
        saved_groups = saved.record["optimizers"][self.name].get("groups", ())
        corresponds = len(saved_groups) == len(self._groups)
        self._options_if_empty = saved_groups if corresponds else [{} for _ in self._groups]
        found = Wanted()
        keys = self._keys_by_parameter(saved, known)
        for params in self._groups:
            for param in params:
                found.values += [
                    self._full(OPTIONS, name, key)
                    for name in self._names(param)
                    for key in keys[OPTIONS].get(name, ())
                ]
        self._targets, self._twins = [], []
        for piece in self._pieces():
            first, *others = self._names(piece.param)
            target: dict[str, Any] = {}
            for key in keys[STATE].get(first, ()):
                full_name = self._full(STATE, first, key)
                if saved.tensor(full_name) is None:
                    found.values.append(full_name)
                    target[key] = _ValueOf(full_name)
                else:
                    entry, target[key] = self._target(saved, full_name, piece)
                    found.tensors.append(entry)
            self._targets.append(target)
            for other in others:  # the same parameter: read as well, and compared
                for key in keys[STATE].get(other, ()):
                    full_name = self._full(STATE, other, key)
                    if saved.tensor(full_name) is not None and isinstance(target.get(key), Tensor):
                        entry, twin = self._target(saved, full_name, piece)
                        found.tensors.append(entry)
                        self._twins.append(
                            (self._full(STATE, first, key), target[key], full_name, twin)
                        )
        return found

    def _target(self, saved: Saved, full_name: str, piece: _Piece) -> tuple[TensorEntry, Tensor]:
        """Memory for a state tensor, and what to read into it."""
        stored = saved.tensor(full_name)
        assert stored is not None
        dtype, shape = stored.properties.dtype, tuple(stored.size)
        param = piece.param
        if shape == self._whole_shape(param):
            if piece.run is None:
                size, strides = tuple(param.shape), dense_strides(param)
                value = torch.empty_strided(size, strides, dtype=dtype, device=param.device)
            else:
                value = torch.empty(piece.run[1], dtype=dtype, device=param.device)
            _, parts = self._parts(piece, value)
            return TensorEntry(full_name, shape, dtype, parts), value
        if shape and self._is_split(piece):
            raise self._indivisible(full_name, f"a tensor of shape {shape}")
        value = torch.empty(shape, dtype=dtype)
        return TensorEntry.whole(full_name, value), value

    def claims(self, saved: Saved) -> set[str]:
        """See ``Thing``."""
        known = self._known_names(saved)
        own = {name for params in self._groups for param in params for name in self._names(param)}
        return {
            name
            for name in saved.names(self.name)
            if (parsed := parsed_name(name, known)) is not None and parsed[1] in own
        }

    def check(self, values: Mapping[str, Any]) -> None:
        """See ``Thing``."""
        self._options(values)

    def install(self, values: Mapping[str, Any]) -> None:
        """See ``Thing``."""
        for name, value, twin_name, twin in self._twins:
            if not same_bits(value, twin):
                raise InvalidArgumentError(
                    f"'{name}' and '{twin_name}' are one tensor here, and differ in the checkpoint."
                    "\n  Build the model without sharing them."
                )
        states = [
            {
                key: values[value.name] if isinstance(value, _ValueOf) else value
                for key, value in target.items()
            }
            for target in self._targets
        ]
        options = self._options(values)
        if isinstance(self._optimizer, ShardedOptimizer):
            self._optimizer.load_state_pieces(states, options)
        else:
            pieces = zip(self._pieces(), states, strict=True)
            of_params = {piece.param: state for piece, state in pieces if state}
            install_state(self._optimizer, of_params, options)

    def _options(self, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Of each param group: what all of its parameters were saved with.

        Of one without any here: what the group of its number was saved with.
        """
        found: list[dict[str, Any]] = []
        prefix = joined(self.name, OPTIONS + ".")
        by_name: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            if name.startswith(prefix):
                its_name, _, key = name[len(prefix) :].rpartition(".")
                by_name.setdefault(its_name, {})[key] = value
        for number, params in enumerate(self._groups):
            names = [name for param in params for name in self._names(param)]
            options = by_name.get(names[0], {}) if names else self._options_if_empty[number]
            for name in names:
                for key in options.keys() | by_name.get(name, {}).keys():
                    mine, its = options.get(key), by_name.get(name, {}).get(key)
                    if mine is not its and digest(mine) != digest(its):
                        raise InvalidArgumentError(
                            f"'{self.name}' has '{names[0]}' and '{name}' in one param group, "
                            f"param_groups[{number}], and the checkpoint has them with {key} "
                            f"{mine!r} and {its!r}.\n  Put them into groups as they were saved."
                        )
            found.append(options)
        return found

    def _check_class(self, saved: Saved) -> None:
        class_name = saved.record["optimizers"][self.name]["class"]
        if class_name != self._class.__name__:
            raise InvalidArgumentError(
                f"'{self.name}' is {self._class.__name__}, and the checkpoint has the state of "
                f"{class_name}.\n  Make the optimizer that was saved."
            )

    def _known_names(self, saved: Saved) -> set[str]:
        parameters = saved.record["optimizers"][self.name]["parameters"]
        return {name for parameter in parameters for name in parameter["names"]}

    def _keys_by_parameter(self, saved: Saved, known: set[str]) -> dict[str, dict[str, list[str]]]:
        found: dict[str, dict[str, list[str]]] = {STATE: {}, OPTIONS: {}}
        for name in saved.names(self.name):
            parsed = parsed_name(name, known)
            if parsed is not None:
                section, its_name, key = parsed
                found[section].setdefault(its_name, []).append(key)
        return found

    # --- parameters and their pieces --------------------------------------------------------------

    def _pieces(self) -> Sequence[_Piece]:
        if isinstance(self._optimizer, ShardedOptimizer):
            return [
                _Piece(piece.param, (piece.begin, piece.count), piece.state)
                for piece in self._optimizer.state_pieces()
            ]
        packed: dict[Any, Any] = self._optimizer.state_dict()["state"]
        params = [param for group in self._groups for param in group]
        foreign = [repr(key) for key in packed if key not in range(len(params))]
        if foreign:
            raise InvalidArgumentError(
                f"'{self.name}' keeps state under {listed(foreign)}, which is no parameter, and "
                "pycomm saves the state of parameters.\n  Save optimizer.state_dict() as a value."
            )
        return [_Piece(param, None, packed.get(n, {})) for n, param in enumerate(params)]

    def _parts(self, piece: _Piece, value: Tensor) -> tuple[tuple[int, ...], list[Part]]:
        """Of a tensor with a value for each element of a piece: the whole shape, and its boxes."""
        param, share = piece.param, self._parameters[id(piece.param)].share
        boxes = [(Box.whole(value.shape), value)]
        if piece.run is not None:
            boxes = boxes_of_memory(value, param.shape, dense_strides(param), piece.run[0])
        if share is not None:
            boxes = [(box.shifted(share.dim, share.begin), elements) for box, elements in boxes]
        return self._whole_shape(param), [Part(box, elements) for box, elements in boxes]

    def _whole_shape(self, param: Tensor) -> tuple[int, ...]:
        share = self._parameters[id(param)].share
        return tuple(param.shape) if share is None else share.whole

    def _is_split(self, piece: _Piece) -> bool:
        return piece.run is not None or self._parameters[id(piece.param)].share is not None

    def _indivisible(self, full_name: str, what: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"'{full_name}' is {what}, for a parameter that is split over ranks: it has no value "
            f"for each element, so its parts make up no whole.\n  Use an optimizer whose state is "
            "element by element, such as AdamW, where parameters are split."
        )

    def _names(self, param: Tensor) -> list[str]:
        parameter = self._parameters[id(param)]
        return [self._prefixed(parameter.module, name) for name in parameter.names]

    def _prefixed(self, module: str, name: str) -> str:
        return joined(module, name) if self.has_prefixes and module else name

    def _full(self, section: str, name: str, key: str) -> str:
        return joined(self.name, f"{section}.{name}.{key}")


@dataclasses.dataclass(frozen=True)
class _ValueOf:
    """Stands for a value that is read by name."""

    name: str


def _own_names(optimizer: Optimizer) -> Iterator[tuple[int, str]]:
    """Names that the optimizer itself was given, by the parameters' ids."""
    for group in optimizer.param_groups:
        for param, name in zip(group["params"], group.get("param_names", ()), strict=False):
            yield id(param), name
    if isinstance(optimizer, DistributedOptimizer):
        for name, param in optimizer.named_by_user():
            yield id(param), name


def parsed_name(name: str, known: set[str]) -> tuple[str, str, str] | None:
    """Section, parameter and key of a name such as ``state.0.weight.exp_avg``."""
    section, _, rest = name.partition(".")
    if section not in (STATE, OPTIONS):
        return None
    its_name = rest
    while its_name:  # the longest parameter's name that fits
        its_name, _, _ = its_name.rpartition(".")
        if its_name in known:
            return section, its_name, rest[len(its_name) + 1 :]
    return None
