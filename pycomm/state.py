"""The same model and optimizer on every rank."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pycomm._core import Group
from pycomm.arguments import root_rank
from pycomm.collectives import broadcast_
from pycomm.errors import InvalidArgumentError, MismatchError
from pycomm.objects import (
    all_gather_bytes,
    all_gather_object,
    raise_together,
)
from pycomm.runtime import group_of
from pycomm.shares import named_shares
from pycomm.structures import broadcast_structure, is_movable


def broadcast_parameters(
    parameters: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    root: int = 0,
    *,
    group: Group | None = None,
) -> None:
    """Overwrite every rank's parameters and buffers with ``root``'s. Gradients are left alone.

    Args:
        parameters: a module (all its parameters and buffers), a ``state_dict()``, or (name, tensor)
            pairs; same names, order, shapes and dtypes on every rank, any strides. A tensor that
            appears twice (tied weights) travels once. What of a module is split over these very
            ranks (see ``tensor_parallel``) stays as it is.
        root: a rank of the group.
        group: the ranks taking part, the world if None; every one of them makes this call.

    Raises:
        InvalidArgumentError: on every rank, if one passed something that cannot be broadcast; no
            tensor has been changed and the group stays usable.
        MismatchError: on every rank, naming the first tensor that differs; no tensor has been
            changed and the group stays usable.
        CommTimeoutError, PeerLostError: as for ``all_reduce``.
    """
    call = "broadcast_parameters"
    group = group_of(group)
    root = root_rank(call, root, group)
    tensors: dict[str, Tensor] = {}
    mistake = None
    try:
        tensors = distinct(named_tensors(parameters, group))
    except InvalidArgumentError as error:
        mistake = error
    raise_together(call, mistake, group)
    require_same(call, {name: describe(t) for name, t in tensors.items()}, group)
    for tensor in tensors.values():
        _broadcast_any_strides(tensor, root, group)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root: int = 0, *, group: Group | None = None
) -> None:
    """Give every rank ``root``'s optimizer state and hyper-parameters (learning rate, ...).

    The root's optimizer may be fresh or in use, and so may the others': what the root does not have
    is dropped elsewhere. No step is made, no gradient touched, and step counters keep the type that
    they have on the root.

    Tensors travel as they are, the rest as a pickle: unpickling runs code that the root chose, so
    use it only among ranks that trust each other.

    Args:
        optimizer: over parameters of the same shapes and dtypes, in the same groups, on every rank.
        root: a rank of the group.
        group: the ranks taking part, the world if None; every one of them makes this call.

    Raises:
        InvalidArgumentError: on every rank, if the root's state cannot be sent or a rank's
            optimizer does not accept it; the group stays usable.
        MismatchError: on every rank, naming the first parameter that differs; no state has been
            changed and the group stays usable.
        CommTimeoutError, PeerLostError: as for ``all_reduce``.
    """
    call = "broadcast_optimizer_state"
    group = group_of(group)
    root = root_rank(call, root, group)
    described: dict[str, str] = {}
    mistake: Exception | None = None
    try:
        described = _describe_optimizer(optimizer)
    except InvalidArgumentError as error:
        mistake = error
    raise_together(call, mistake, group)
    require_same(call, described, group)

    received = broadcast_structure(call, optimizer.state_dict, root, group)
    if group.rank != root:
        try:
            _install(optimizer, received)
        except Exception as error:  # the optimizer's own load_state_dict
            mistake = error
    raise_together(call, mistake, group)


def named_tensors(
    parameters: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], group: Group
) -> list[tuple[str, Tensor]]:
    if isinstance(parameters, nn.Module):
        own = _split_over(parameters, group)
        named = [*parameters.named_parameters(), *parameters.named_buffers()]
        return [(name, t) for name, t in named if id(t) not in own]
    if isinstance(parameters, Mapping):
        return list(parameters.items())
    if not isinstance(parameters, Iterable):
        raise InvalidArgumentError(
            f"parameters is a {type(parameters).__name__}. "
            "Pass model, model.state_dict() or model.named_parameters()."
        )
    pairs = list(parameters)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise InvalidArgumentError(
                f"parameters yields a {type(pair).__name__}, not a (name, tensor) pair. "
                "Pass model, model.state_dict() or model.named_parameters()."
            )
    return pairs


def _split_over(module: nn.Module, group: Group) -> set[int]:
    """The ids of the parameters that are each rank's own share.

    Raises:
        InvalidArgumentError: some of the ranks have shares of one tensor, and others copies.
    """
    own = set()
    for name, param, share in named_shares(module):
        sharing = set(share.group.ranks) & set(group.ranks)
        if len(sharing) == group.size and group.size > 1:
            own.add(id(param))
        elif len(sharing) > 1:
            raise InvalidArgumentError(
                f"'{name}' is split over the ranks {sorted(share.group.ranks)}, and the call is "
                f"made by {sorted(group.ranks)}: a rank would get another one's share.\n"
                "  Call it with the group of data parallelism, then with that of the split layers."
            )
    return own


def distinct(pairs: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name, without those that are the same memory as an earlier one."""
    tensors: dict[str, Tensor] = {}
    seen_names: set[str] = set()
    seen_memory: set[tuple[object, ...]] = set()
    for name, tensor in pairs:
        if name in seen_names:
            raise InvalidArgumentError(f"the name '{name}' appears twice. Name each tensor once.")
        seen_names.add(name)
        if not isinstance(tensor, Tensor):
            raise InvalidArgumentError(
                f"'{name}' is a {type(tensor).__name__}, not a tensor. "
                "Leave it out and send it with broadcast_object."
            )
        if is_lazy(tensor):
            raise InvalidArgumentError(
                f"'{name}' has no shape yet. Run one batch through the lazy module first."
            )
        if not is_movable(tensor):
            raise InvalidArgumentError(
                f"'{name}' is a {tensor.dtype} tensor on {tensor.device} with layout "
                f"{tensor.layout}, and pycomm moves dense CPU and CUDA tensors only."
            )
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() == 0 or memory not in seen_memory:
            seen_memory.add(memory)
            tensors[name] = tensor
    return tensors


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgumentError(
            f"optimizer is {optimizer!r}. Pass a torch.optim.Optimizer, wrapped or not."
        )
    return {
        f"parameter {position} of group {index}": describe(param)
        for index, param_group in enumerate(optimizer.param_groups)
        for position, param in enumerate(param_group["params"])
    }


def require_same(call: str, described: dict[str, str], group: Group) -> None:
    """Raise on every rank, naming the first difference, unless all ranks describe the same.

    Digests are compared first, so that equal lists, the usual case, cost 32 bytes a rank.
    """
    digest = hashlib.sha256(repr(list(described.items())).encode()).digest()
    if len(set(all_gather_bytes(call, digest, group))) == 1:
        return
    everyone = all_gather_object(list(described.items()), group=group)
    first = everyone[0]
    rank = next(rank for rank, theirs in enumerate(everyone) if theirs != first)
    other = everyone[rank]
    at = next(
        (i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b),
        min(len(first), len(other)),
    )
    raise MismatchError(
        f"{call} on rank {group.rank}: tensor {at} differs: rank 0 has {_entry(first, at)}, "
        f"rank {rank} has {_entry(other, at)}.\n"
        "  Build the same model, in the same order, on every rank.",
        group_usable=True,
    )


def _entry(described: list[tuple[str, str]], at: int) -> str:
    if at >= len(described):
        return f"only {len(described)} tensors"
    name, what = described[at]
    return f"'{name}', {what}"


def _broadcast_any_strides(tensor: Tensor, root: int, group: Group) -> None:
    with torch.no_grad():
        if tensor.is_contiguous() and not tensor.is_conj():
            broadcast_(tensor, root, group=group)
            return
        # Ranks need not agree on strides, so what travels is row-major.
        wire = tensor.contiguous().resolve_conj()
        broadcast_(wire, root, group=group)
        if group.rank == root:
            return
        for dim in range(tensor.dim()):
            if (
                tensor.stride(dim) == 0 and tensor.size(dim) > 1
            ):  # expanded: one element, seen often
                tensor, wire = tensor.narrow(dim, 0, 1), wire.narrow(dim, 0, 1)
        tensor.copy_(wire)


def _install(optimizer: torch.optim.Optimizer, received: dict[str, Any]) -> None:
    optimizer.load_state_dict(received)
    # torch casts state to its parameter's dtype while loading; the root has not cast.
    installed = optimizer.state_dict()["state"]
    for key, entry in received["state"].items():
        if isinstance(entry, dict):
            installed[key].update(entry)
