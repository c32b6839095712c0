"""A backward pass in two halves: what the previous stage waits for, and what nobody waits for.

On the way from a stage's outputs down to its inputs a parameter's gradient branches off at some
node of the graph, that of the linear layer for instance. The first half runs the way, leaves the
branches out, and keeps what arrives at each such node; the second half runs the branches alone.
Together they do the work of one backward pass, and each parameter gets the same bits.

A stage whose inputs want no gradient, the first one, has no such way: all is in the second half.

Source: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

# What arrives at a node: a gradient for each of its outputs.
Arrived = tuple[Tensor | None, ...]


class SplitBackward:
    """The two halves of one micro-batch's backward pass.

    Args:
        outputs: what the pass begins at.
        gradients: of each output; None for a scalar's own.
        inputs: where the first half ends.
        parameters: what the second half accumulates the gradients of, in ``.grad``.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        inputs: Sequence[GradientEdge],
        parameters: Iterable[Tensor],
    ) -> None:
        self._outputs = list(outputs)
        self._gradients = list(gradients)
        self._inputs = list(inputs)
        self._parameters = [param for param in parameters if param.requires_grad]
        self._branches: dict[Node, list[Tensor]] = {}
        self._arrived: dict[Node, Arrived] = {}

    def input_gradients(self) -> list[Tensor | None]:
        """The first half; returns the gradient of each input."""
        if not self._inputs or not self._outputs:
            return [None] * len(self._inputs)
        self._branches = _branches(self._outputs, self._inputs, self._parameters)
        with self._watching():
            gradients = torch.autograd.grad(
                self._outputs, self._inputs, self._gradients, retain_graph=True, allow_unused=True
            )
        return list(gradients)

    def weight_gradients(self) -> None:
        """The second half."""
        if not self._inputs:
            if self._outputs:
                torch.autograd.backward(self._outputs, self._gradients)
            return
        sums: dict[Tensor, Tensor] = {}
        for node, parameters in self._branches.items():
            arrived = [
                (GradientEdge(node, number), gradient)
                for number, gradient in enumerate(self._arrived.get(node, ()))
                if gradient is not None
            ]
            if not arrived:
                continue
            edges, gradients = zip(*arrived, strict=True)
            # Nodes below the branching ones may be shared, so nobody frees what they have saved.
            found = torch.autograd.grad(
                edges, parameters, gradients, retain_graph=True, allow_unused=True
            )
            for param, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    sums[param] = sums[param] + gradient if param in sums else gradient
        if sums:  # accumulates them as any backward pass does, with its hooks
            torch.autograd.backward(list(sums), list(sums.values()))
        self._branches.clear()
        self._arrived.clear()
        self._outputs.clear()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Keep what arrives at the nodes where parameters branch off."""
        handles = [node.register_prehook(self._keeper(node)) for node in self._branches]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keeper(self, node: Node) -> Any:
        def keep(gradients: Arrived) -> None:
            self._arrived[node] = gradients

        return keep


def _branches(
    outputs: Sequence[Tensor], inputs: Sequence[GradientEdge], parameters: Sequence[Tensor]
) -> dict[Node, list[Tensor]]:
    """The parameters that branch off at each node on a way from an output to an input.

    Nodes come in the order in which a backward pass meets them. An output that leads to no input is
    a node to branch off at, too.
    """
    roots = {t.grad_fn for t in outputs if t.grad_fn is not None}
    order = _downward(roots)
    position = {node: number for number, node in enumerate(order)}
    ends = {edge.node for edge in inputs}
    on_the_way: set[Node] = set()
    for node in reversed(order):
        if node in ends or any(after in on_the_way for after, _ in node.next_functions):
            on_the_way.add(node)
    branching = on_the_way | roots
    above: dict[Node, set[Node]] = collections.defaultdict(set)  # of each node off the way
    for node in order:
        reached_from = {node} if node in branching else above[node]
        for after, _ in node.next_functions:
            if after is not None and after not in on_the_way:
                above[after] |= reached_from
    by_identity = {id(param): param for param in parameters}
    found: dict[Node, list[Tensor]] = {}
    for node in order:
        param = by_identity.get(id(getattr(node, "variable", None)))
        if param is not None:
            for before in above[node]:
                found.setdefault(before, []).append(param)
    return {node: found[node] for node in sorted(found, key=position.__getitem__)}


def _downward(roots: Iterable[Node]) -> list[Node]:
    """All nodes of a graph, each before those it leads to."""
    order: list[Node] = []
    seen: set[Node] = set()
    for root in roots:
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(root.next_functions))]
        while stack:
            node, rest = stack[-1]
            after = next((a for a, _ in rest if a is not None and a not in seen), None)
            if after is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(after)
                stack.append((after, iter(after.next_functions)))
    order.reverse()
    return order
