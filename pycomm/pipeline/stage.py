"""One stage: its modules, and what each micro-batch leaves there between forward and backward."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
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
        finish: Callable[[Any], Tensor] | None,
    ) -> Values:
        """What goes to later stages; tensors and graph stay until ``backward``.

        Args:
            values: of each connection that ends here; its tensors tell whether they require a
                gradient.
            extra: keyword arguments for the module.
            finish: in the last stage, makes the output the loss.
        """
        entries = {name: _Entry(value) for name, value in values.items()}
        inputs = {name: entry.value for name, entry in entries.items()}
        outputs = self._recomputed(inputs, extra) if self._recompute else self._call(inputs, extra)
        if finish is not None:
            outputs[MAIN] = finish(outputs[MAIN])
        followed = {
            name: [t for t in _tensors(value) if t.requires_grad] for name, value in outputs.items()
        }
        self._kept[micro_batch] = _Kept(entries, followed)
        return outputs

    def backward(self, micro_batch: int, gradients: Gradients) -> Gradients:
        """Both halves; returns the gradients of what came in."""
        kept = self._kept.pop(micro_batch)
        outputs, arrived = _paired(kept.outputs, gradients)
        if outputs:
            torch.autograd.backward(outputs, arrived)
        return {name: entry.gradients for name, entry in kept.inputs.items()}

    def input_gradients(self, micro_batch: int, gradients: Gradients) -> Gradients:
        """The half that earlier stages wait for."""
        kept = self._kept[micro_batch]
        edges = [edge for entry in kept.inputs.values() for edge in entry.edges]
        kept.split = SplitBackward(*_paired(kept.outputs, gradients), edges, self._parameters)
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
    """Where a value enters the stage's graph: what flows back to here are its gradients."""

    def __init__(self, value: Any) -> None:
        leaves, spec = pytree.tree_flatten(value)
        followed = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        self.gradients: list[Tensor | None] = [None] * len(followed)
        self.edges: list[GradientEdge] = []
        self.value = value
        if not followed:
            return
        anchor = torch.zeros((), requires_grad=True)
        entered = iter(_Enter.apply(anchor, self.gradients, *followed))  # type: ignore[no-untyped-call]
        leaves = [
            next(entered) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf
            for leaf in leaves
        ]
        self.value = pytree.tree_unflatten(leaves, spec)
        self.edges = [get_gradient_edge(t) for t in _tensors(self.value) if t.requires_grad]


class _Enter(torch.autograd.Function):
    """Gives tensors a place in the graph; not leaves, so a module may change them in place.

    ``anchor`` is what makes autograd follow it.
    """

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


def _paired(
    outputs: Mapping[str, Sequence[Tensor]], gradients: Gradients
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs with what has come for them; those that nobody used are left out."""
    pairs: list[tuple[Tensor, Tensor | None]] = []
    for name, tensors in outputs.items():
        if name not in gradients:  # the loss: nothing comes for it
            pairs += [(t, None) for t in tensors]
            continue
        for t, gradient in zip(tensors, gradients[name], strict=True):
            if gradient is not None:
                pairs.append((t, gradient))
    return [t for t, _ in pairs], [gradient for _, gradient in pairs]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
