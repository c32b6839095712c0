"""What torch passes beside tensors: options, and the ops in them, of each of its versions.

Torch's methods have overloads: an object of options, or the values that would be in it, by place or
by name. They all become the object here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllreduceOptions

from pycomm._core import Group, ReduceOp
from pycomm.arguments import refuse

# A torch that says whether its caller is going to wait takes None from a call that has run.
SAYS_ASYNC = hasattr(AllreduceOptions(), "asyncOp")

_Op = dist.ReduceOp.RedOpType
_OPS = {
    _Op.SUM: ReduceOp.SUM,
    _Op.AVG: ReduceOp.AVG,
    _Op.MIN: ReduceOp.MIN,
    _Op.MAX: ReduceOp.MAX,
    _Op.PRODUCT: ReduceOp.PROD,
    _Op.BAND: ReduceOp.BAND,
    _Op.BOR: ReduceOp.BOR,
    _Op.BXOR: ReduceOp.BXOR,
}

# By the names of torch's keyword arguments.
_FIELDS = {"op": "reduceOp", "root": "rootRank", "timeout": "timeout"}


def options_in(kind: type[Any], given: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """The options among a method's arguments, or new ones of this kind with what is given."""
    options = named.get("opts", given[0] if given else None)
    if hasattr(options, "timeout"):  # of this class, or of one like it
        return options
    options = kind()
    values = dict(named)
    for value in given:
        if isinstance(value, timedelta):
            values["timeout"] = value
        elif isinstance(value, int):
            values["root"] = value
        elif isinstance(value, (dist.ReduceOp, _Op)):
            values["op"] = value
    for name, value in values.items():
        if value is not None and name in _FIELDS:
            setattr(options, _FIELDS[name], value)
    return options


def is_asynchronous(options: Any) -> bool:
    return not SAYS_ASYNC or bool(options.asyncOp)


def core_op(call: str, options: Any, group: Group) -> tuple[ReduceOp, float]:
    """The core's op, and the factor of what torch calls PREMUL_SUM.

    Raises:
        InvalidArgumentError: the op is unknown, or its factor is a tensor.
    """
    op = options.reduceOp
    known = _OPS.get(op.op)
    if known is not None:
        return known, 1.0
    if op.op != dist.ReduceOp.PREMUL_SUM:
        names = ", ".join(o.name for o in _OPS)
        refuse(call, group, f"op is {op.op}, which is unknown.\n  Pass one of {names}.")
    factor = op.__getstate__()[1]
    if not isinstance(factor, float):
        refuse(call, group, "PREMUL_SUM has a tensor for a factor. Pass a float.")
    return ReduceOp.SUM, factor


def as_lists(*arguments: Any) -> tuple[Any, ...]:
    """Torch's overloads for one tensor of this rank: what is not in a list yet is put into one."""
    if any(isinstance(argument, Tensor) for argument in arguments):
        return tuple([argument] for argument in arguments)
    return arguments
