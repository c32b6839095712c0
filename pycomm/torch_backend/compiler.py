"""What ``torch.compile`` has to leave alone.

Torch calls a process group from C++ also where a program is being compiled: DDP's reducer agrees on
its buckets between two compiled pieces. Dynamo sees a frame of Python begin there and would compile
it, which ends in an error: it knows a process group as an object without insides.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping

from torch._C._dynamo import eval_frame


def keep_from_compiler(*modules: types.ModuleType) -> None:
    """Let functions that ``modules`` define, and whatever those call, run as they are.

    Importing ``torch._dynamo`` for its ``disable`` would take seconds. A torch without that
    strategy is left as it is.
    """
    if not hasattr(eval_frame, "set_code_exec_strategy"):
        return
    skip = eval_frame._FrameAction.SKIP
    as_it_is = eval_frame._FrameExecStrategy(skip, skip)  # the frame, and those that it calls
    for module in modules:
        for code in _codes(vars(module), module.__name__):
            eval_frame.set_code_exec_strategy(code, as_it_is)


def _codes(names: Mapping[str, object], module: str) -> Iterator[types.CodeType]:
    """Those of the functions and classes among ``names``, as far as ``module`` defines them."""
    for value in names.values():
        if isinstance(value, property):
            value = value.fget
        if getattr(value, "__module__", None) != module:
            continue  # imported
        if isinstance(value, type):
            yield from _codes(vars(value), module)
        elif isinstance(value, types.FunctionType):
            yield from _nested(value.__code__)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)
