"""When the autograd engine is done with a whole backward pass, nested ones included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_engine: Any = torch.autograd.Variable._execution_engine


class EndOfBackward:
    """Queued with the autograd engine; finishes the pass when the outermost backward is over.

    The engine runs a queued callback when the innermost backward ends, which may be one nested in
    an outer graph (re-entrant checkpointing). The outer graph's node is then being executed: a
    hook on it queues the callback once more, one level further out. (Below 60 nested levels, that
    is: deeper ones run in threads of the engine that know no outer node. Such a pass is finished
    early, and what fires after that is refused or belongs to another pass.)

    The engine alone keeps it alive, so a backward that an exception ended leaves a dead reference.

    Made and queued by a hook; ``finish`` may raise, and ``backward()`` then raises it.
    """

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish
        _engine.queue_callback(self)

    def __call__(self) -> None:
        node = torch._C._current_autograd_node()
        if node is None:
            self._finish()
            return

        def queue_again(*_: object) -> None:
            handle.remove()
            _engine.queue_callback(self)

        handle = node.register_hook(queue_again)


def no_backward() -> None:
    """Stands for the reference to the end of a backward when none is running."""
