"""Keeps torch's compiler out of ranks that make an optimizer and compile nothing.

``torch.optim`` imports it when the first optimizer is made, to mark functions that are not to be
compiled: 1.2 s of processor time in each of the hundreds of ranks that the tests start.
"""

import sys
import types

import torch


def stand_in_for_it() -> None:
    """From now on an optimizer finds what it needs of ``torch._dynamo``, and nothing else there."""
    dynamo = types.ModuleType("torch._dynamo")
    dynamo.disable = lambda function, *_, **__: function  # type: ignore[attr-defined]
    dynamo.graph_break = lambda *_, **__: None  # type: ignore[attr-defined]
    sys.modules[dynamo.__name__] = dynamo
    torch._dynamo = dynamo
