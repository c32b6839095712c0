"""Where to cut a model into stages."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pycomm.errors import InvalidArgumentError
from pycomm.pipeline.micro_batches import map_tensors


def balanced(costs: Sequence[float], stages: int) -> list[int]:
    """How many consecutive layers each stage gets, so that the dearest stage costs least.

    Among cuts that do, the first stages get as few layers as they can. Every stage gets one.

    Cost: layers^2 x stages.

    Raises:
        InvalidArgumentError: more stages than layers.
    """
    layers = len(costs)
    if stages > layers:
        raise InvalidArgumentError(
            f"{stages} stages, and the model has {layers} layers to cut between.\n"
            f"  Use at most {layers} stages, or write finer layers into the nn.Sequential."
        )
    sums = [0.0, *itertools.accumulate(costs)]
    # least[s][i]: the cost of the dearest of s stages that hold the layers from i on.
    least = [[float("inf")] * layers + [0.0]]
    for count in range(1, stages + 1):
        after = least[-1]
        least.append(
            [
                min(
                    (
                        max(sums[end] - sums[begin], after[end])
                        for end in range(begin + 1, layers - count + 2)
                    ),
                    default=float("inf"),
                )
                for begin in range(layers)
            ]
            + [float("inf")]
        )
    best = least[stages][0]
    counts, begin = [], 0
    for left in range(stages - 1, -1, -1):
        end = next(
            end
            for end in range(begin + 1, layers + 1)
            if sums[end] - sums[begin] <= best and least[left][end] <= best
        )
        counts.append(end - begin)
        begin = end
    return counts


def by_hand(counts: Sequence[int], layers: int) -> list[int]:
    """``counts`` if they can be numbers of layers.

    Raises:
        InvalidArgumentError: one is below 1, or they do not add up.
    """
    if any(count < 1 for count in counts) or sum(counts) != layers:
        raise InvalidArgumentError(
            f"stages is {list(counts)}, {sum(counts)} layers in all, and the model has {layers}.\n"
            "  Give each stage at least one layer, and every layer a stage."
        )
    return list(counts)


def parameter_bytes(model: nn.Sequential) -> list[float]:
    """Of each layer; a parameter used by several counts at the first."""
    seen: set[int] = set()
    costs = []
    for layer in model:
        own = [param for param in layer.parameters() if id(param) not in seen]
        seen.update(map(id, own))
        costs.append(float(sum(param.nbytes for param in own)))
    return costs


def measured_seconds(model: nn.Sequential, sample: Any, rounds: int = 5) -> list[float]:
    """Seconds that each layer takes for forward and backward on ``sample``, the median.

    Leaves gradients, buffers and torch's random state as they were.
    """
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = [param.grad for param in model.parameters()]
    model.zero_grad()  # what is accumulated stays out of it
    costs = []
    with torch.random.fork_rng():
        for layer in model:
            seconds = []
            for _ in range(rounds):
                value = map_tensors(_input, sample)
                started = time.perf_counter()
                output = layer(value)
                _backward(output)
                seconds.append(time.perf_counter() - started)
            costs.append(statistics.median(seconds))
            sample = map_tensors(Tensor.detach, output)
    for param, gradient in zip(model.parameters(), gradients, strict=True):
        param.grad = gradient
    for name, buffer in model.named_buffers():
        buffer.copy_(state[name])
    return costs


def _input(t: Tensor) -> Tensor:
    t = t.detach()
    return t.requires_grad_(t.is_floating_point())


def _backward(output: Any) -> None:
    outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    followed = [t for t in outputs if t.requires_grad]
    if followed:
        torch.autograd.backward(followed, [torch.ones_like(t) for t in followed])
    if outputs and outputs[0].is_cuda:
        torch.cuda.synchronize()
