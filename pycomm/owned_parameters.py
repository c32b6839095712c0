"""Which parameters an optimizer has, what they are called, and whether all ranks mean the same."""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pycomm import _core, device
from pycomm.errors import InvalidArgumentError, MismatchError
from pycomm.gradient_layout import check_gradient_dtype
from pycomm.gradient_sync import SyncOptions
from pycomm.objects import all_gather_object, raise_together
from pycomm.shares import check_replicas

# Who reduces a parameter's gradient, by id(param): whoever owns a parameter keeps it alive.
_owners: weakref.WeakValueDictionary[int, OwnedParameters] = weakref.WeakValueDictionary()


class OwnedParameters:
    """The parameters of one wrapped optimizer. Nobody else reduces them while this object lives."""

    def __init__(self) -> None:
        self.named: list[tuple[str, Tensor]] = []
        self._names: dict[int, str] = {}  # by id(param); may name more than the optimizer holds
        self._named_by_user: list[tuple[str, Tensor]] = []  # keeps those ids valid

    def take_new(
        self,
        call: str,
        param_groups: Sequence[dict[str, Any]],
        named_parameters: Iterable[tuple[str, Tensor]] | None,
        options: SyncOptions,
        group: _core.Group,
    ) -> list[tuple[str, Tensor]]:
        """Own the parameters that are new in ``param_groups``, and return them. Collective.

        Args:
            call: what the user called, for errors.
            named_parameters: their names; the optimizer's own, or numbers, if None.
            options: checked, and compared between ranks, like the parameters.

        Raises:
            InvalidArgumentError: on every rank if one has a parameter that cannot be reduced.
            MismatchError: on every rank, naming the first difference between ranks.
        """
        mistake: InvalidArgumentError | None = None
        added: list[tuple[str, Tensor]] = []
        try:
            options.check()
            if named_parameters is not None:
                self._learn_names(named_parameters)
            added = self._new(param_groups)
            for name, param in added:
                _check_parameter(name, param, options)
                check_replicas(name, param, group)
            if not any(param.requires_grad for _, param in self.named + added):
                raise InvalidArgumentError(
                    "a model with no trainable parameter: none of the optimizer's "
                    f"{len(self.named) + len(added)} parameters requires a gradient.\n"
                    "  Unfreeze one with param.requires_grad_(True), or use the bare optimizer."
                )
        except InvalidArgumentError as error:
            mistake = error
        raise_together(call, mistake, group)
        _check_agreement(call, [str(options), *map(_described, added)], group)
        self.named += added
        for _, param in added:
            _owners[id(param)] = self
        return added

    def named_by_user(self) -> list[tuple[str, Tensor]]:
        """Those that got their names from ``named_parameters``."""
        return [(name, param) for name, param in self.named if id(param) in self._names]

    def _learn_names(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        by_name: dict[str, Tensor] = {}
        if not isinstance(named_parameters, Iterable):
            raise InvalidArgumentError(
                f"named_parameters is a {type(named_parameters).__name__}.\n"
                "  Pass model.named_parameters()."
            )
        for entry in named_parameters:
            if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
                raise InvalidArgumentError(
                    f"named_parameters holds a {type(entry).__name__}, not (name, parameter).\n"
                    "  Pass model.named_parameters()."
                )
            name, param = entry
            if by_name.setdefault(name, param) is not param:
                raise InvalidArgumentError(
                    f"two parameters are named '{name}', of shapes {tuple(by_name[name].shape)} "
                    f"and {tuple(param.shape)}.\n  Give each model a prefix: "
                    "(f'generator.{name}', param) for name, param in ..."
                )
            self._names.setdefault(id(param), name)  # a tied weight keeps its first name
            self._named_by_user.append(entry)

    def _new(self, param_groups: Sequence[dict[str, Any]]) -> list[tuple[str, Tensor]]:
        known = {id(param) for _, param in self.named}
        added = []
        for group_number, param_group in enumerate(param_groups):
            own_names = param_group.get("param_names")
            for position, param in enumerate(param_group["params"]):
                if id(param) in known:
                    continue
                name = self._names.get(id(param))
                if name is None and own_names is not None:
                    name = own_names[position]
                if name is None and self._named_by_user and not self.named:
                    raise InvalidArgumentError(
                        f"parameter {position} of param_groups[{group_number}], of shape "
                        f"{tuple(param.shape)}, is missing in named_parameters.\n"
                        "  Pass the named_parameters() of every module the optimizer trains."
                    )
                added.append((name or f"param_groups[{group_number}][{position}]", param))
        first_name, first = (self.named + added)[0] if self.named or added else ("", None)
        for name, param in added:
            if first is not None and param.device != first.device:
                raise InvalidArgumentError(
                    f"parameter '{name}' is on {param.device} and '{first_name}' on "
                    f"{first.device}; the gradients of a rank are reduced on one device.\n"
                    "  Move the model to one, or wrap one optimizer for each."
                )
        names = Counter(name for name, _ in self.named + added)
        name, count = names.most_common(1)[0] if names else ("", 0)
        if count > 1:
            raise InvalidArgumentError(
                f"{count} parameters are named '{name}'.\n  Give each a name of its own."
            )
        return added


def _check_parameter(name: str, param: Tensor, options: SyncOptions) -> None:
    if not device.supported(param) or param.layout is not torch.strided:
        raise InvalidArgumentError(
            f"parameter '{name}' is a {param.layout} tensor on {param.device}; gradients are "
            "reduced dense, in the memory of a CPU or a CUDA GPU.\n"
            "  Move the model with model.cpu() or model.cuda() first."
        )
    if options.check_finite is not None and not param.is_cpu:
        raise InvalidArgumentError(
            f"parameter '{name}' is on {param.device}, and check_finite looks at gradients while "
            "the processor copies them.\n"
            "  Pass check_finite=None; on GPUs torch.amp.GradScaler skips such steps, and "
            "clip_grad_norm_(..., error_if_nonfinite=True) raises."
        )
    if param.requires_grad:
        check_gradient_dtype(name, param, options.compressor)
    if id(param) in _owners:
        raise InvalidArgumentError(
            f"parameter '{name}' already belongs to another wrapped optimizer, and its "
            "gradient cannot be reduced by both.\n  Drop the other (del optimizer), or give "
            "both optimizers' param groups to one."
        )


def _described(named: tuple[str, Tensor]) -> str:
    name, param = named
    trained = "trainable" if param.requires_grad else "frozen"
    return f"parameter '{name}': {tuple(param.shape)} {param.dtype}, {trained}"


def _check_agreement(call: str, lines: list[str], group: _core.Group) -> None:
    """Raise on every rank, naming the first difference, unless all have the same lines."""
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    if all(theirs == digest for theirs in all_gather_object(digest, group=group)):
        return
    by_rank: list[list[str]] = all_gather_object(lines, group=group)
    for rank, theirs in enumerate(by_rank):
        for number in range(max(len(theirs), len(by_rank[0]))):
            first, other = _line(by_rank[0], number), _line(theirs, number)
            if first != other:
                raise MismatchError(
                    f"{call}: ranks have different parameters or arguments, first:\n"
                    f"  rank 0: {first}\n  rank {rank}: {other}\n"
                    "  Build the same model and optimizer on every rank.",
                    group_usable=True,
                )


def _line(lines: list[str], number: int) -> str:
    return lines[number] if number < len(lines) else f"no more than {len(lines) - 1} parameters"
