"""One stage: its modules, and what each micro-batch leaves there between forward and backward."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from pycomm.pipeline import skips
from pycomm.pipeline.split_backward import SplitBackward

MAIN = ""
"""The connection from each stage to the next one; the others have the names of their ``Stash``."""

Values = dict[str, Any]
"""What comes in or goes out on each connection."""
Gradients = dict[str, list[Tensor | None]]
"""On each connection: of its tensors that require a gradient, in order."""


@dataclasses.dataclass
class _Kept:
    """A micro-batch between its forward and its backward."""

    inputs: dict[str, _Entry]
    outputs: dict[str, list[Tensor]]  # on each connection, those that require a gradient
    seed: Tensor | None  # the gradient of the loss, in the last stage; None: 1
    split: SplitBackward | None = None  # its first half is over


class Stage:
    """A piece of the model. Knows micro-batches and autograd, no ranks and no schedules."""

    def __init__(self, number: int, module: nn.Module, *, recompute: bool) -> None:
        self.number = number
        self.module = module
        self._recompute = recompute
        self._parameters = list(module.parameters())
        self._kept: dict[int, _Kept] = {}

    @property
    def held(self) -> int:
        """Micro-batches whose activations are here."""
        return len(self._kept)

    def clear(self) -> None:
        """Forget micro-batches that an exception left here."""
        self._kept.clear()

    def run(self, values: Values, extra: Mapping[str, Any]) -> Values:
        """Forward, following nothing for a backward."""
        with torch.no_grad():
            return self._call(values, extra)

    def forward(
        self,
        micro_batch: int,
        values: Values,
        extra: Mapping[str, Any],
        finish: Callable[[Any], tuple[Tensor, Tensor | None]] | None,
    ) -> Values:
        """What goes to later stages; tensors and graph stay until ``backward``.

        Args:
            values: of each connection that ends here; its tensors tell whether they require a
                gradient.
            extra: keyword arguments for the module.
            finish: in the last stage, makes the output the loss, and the gradient of that.
        """
        # What is fed to the first stage keeps the graph that it may come with.
        entries = {
            name: _Entry(value) for name, value in values.items() if self.number > 0 or name != MAIN
        }
        inputs = {**values, **{name: entry.value for name, entry in entries.items()}}
        outputs = self._recomputed(inputs, extra) if self._recompute else self._call(inputs, extra)
        seed = None
        if finish is not None:
            outputs[MAIN], seed = finish(outputs[MAIN])
        followed = {
            name: [t for t in _tensors(value) if t.requires_grad] for name, value in outputs.items()
        }
        self._kept[micro_batch] = _Kept(entries, followed, seed)
        return outputs

    def backward(self, micro_batch: int, gradients: Gradients) -> Gradients:
        """Both halves; returns the gradients of what came in."""
        kept = self._kept.pop(micro_batch)
        outputs, arrived = _paired(kept, gradients)
        if outputs:
            torch.autograd.backward(outputs, arrived)
        return {name: entry.gradients for name, entry in kept.inputs.items()}

    def input_gradients(self, micro_batch: int, gradients: Gradients) -> Gradients:
        """The half that earlier stages wait for."""
        kept = self._kept[micro_batch]
        edges = [edge for entry in kept.inputs.values() for edge in entry.edges]
        kept.split = SplitBackward(*_paired(kept, gradients), edges, self._parameters)
        found = iter(kept.split.input_gradients())
        return {name: [next(found) for _ in entry.edges] for name, entry in kept.inputs.items()}

    def weight_gradients(self, micro_batch: int) -> None:
        """The other half."""
        split = self._kept.pop(micro_batch).split
        assert split is not None
        split.weight_gradients()

    def _call(self, values: Values, extra: Mapping[str, Any]) -> Values:
        taken = {name: value for name, value in values.items() if name != MAIN}
        with skips.keeping(taken) as stashed:
            output = self.module(values[MAIN], **extra)
        return {**stashed, MAIN: output}

    def _recomputed(self, values: Values, extra: Mapping[str, Any]) -> Values:
        """Keeps the inputs alone and runs the module again in the backward pass.

        The random state is that of the first run, so dropout drops the same. Buffers, such as the
        running averages of a BatchNorm, stay as the first run left them.
        """

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), _BuffersKept(self.module)

        outputs: Values = checkpoint(
            self._call, values, extra, use_reentrant=False, context_fn=contexts
        )
        return outputs


class _BuffersKept:
    """A context that leaves a module's buffers as it found them; entered once for each half."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> None:
        self._before = [(buffer, buffer.clone()) for buffer in self._module.buffers()]

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for buffer, value in self._before:
                buffer.copy_(value)


class _Entry:
    """Where a value enters the stage's graph: what flows back to here are its gradients.

    Its tensors are no leaves of the graph, so a module may change them in place.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self._node: Any = None
        self._leaf: Tensor | None = None
        self._gradients: list[Tensor | None] = []
        if isinstance(value, Tensor) and value.requires_grad and value.nbytes <= _SMALL_BYTES:
            self._leaf = value
            self.value = value.clone()
            self._node = self.value.grad_fn
            return
        leaves, spec = pytree.tree_flatten(value)
        followed = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not followed:
            return
        self._gradients = [None] * len(followed)
        entered = _Enter.apply(_ANCHOR, self._gradients, *followed)  # type: ignore[no-untyped-call]
        self._node = entered[0].grad_fn
        rest = iter(entered)
        leaves = [
            next(rest) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf
            for leaf in leaves
        ]
        self.value = pytree.tree_unflatten(leaves, spec)

    @property
    def gradients(self) -> list[Tensor | None]:
        """Of each tensor that requires one, once backward is over."""
        return self._gradients if self._leaf is None else [self._leaf.grad]

    @property
    def edges(self) -> list[GradientEdge]:
        """Where they enter the graph."""
        count = len(self._gradients) if self._leaf is None else 1
        return [GradientEdge(self._node, number) for number in range(count)]


_SMALL_BYTES = 1 << 16
"""Up to here copying a tensor is faster than calling Python twice, as ``_Enter`` does."""

_ANCHOR = torch.zeros((), requires_grad=True)
"""What makes autograd follow a value that enters."""


class _Enter(torch.autograd.Function):
    """Gives tensors a place in the graph, and takes their gradients there."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, gradients: list[Tensor | None], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.gradients[:] = gradients
        return (None, None, *(None for _ in gradients))


def _paired(kept: _Kept, gradients: Gradients) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs with what has come for them; those that nobody used are left out."""
    pairs: list[tuple[Tensor, Tensor | None]] = []
    for name, tensors in kept.outputs.items():
        if name not in gradients:  # the loss: nothing comes for it
            pairs += [(t, kept.seed) for t in tensors]
            continue
        for t, gradient in zip(tensors, gradients[name], strict=True):
            if gradient is not None:
                pairs.append((t, gradient))
    return [t for t, _ in pairs], [gradient for _, gradient in pairs]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
