"""Runs a rank's share of a schedule: its stages, and the messages between them and the others'."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pycomm._core import Group
from pycomm.errors import CommError, StageError
from pycomm.pipeline.schedule import Action, Kind, Schedule
from pycomm.pipeline.stage import MAIN, Gradients, Stage, Values
from pycomm.pipeline.transfers import TAGS, Inlet, Local, Outlet, RemoteInlet, RemoteOutlet

# Gradients in use or waiting, of a connection: they are used up in one action.
_GRADIENT_SLOTS = 2

_DOING_NOTHING = contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Connection:
    """What stage ``source`` gives stage ``target`` for each micro-batch."""

    name: str
    source: int
    target: int


@dataclasses.dataclass(frozen=True)
class Feed:
    """What a step brings for this rank, in lists by micro-batch."""

    inputs: Sequence[Any] | None  # of the first stage
    targets: Sequence[Any] | None  # for the loss; None: there are none, or they come
    targets_travel: bool  # from the first stage's rank to the last one's
    extras: Mapping[int, Sequence[dict[str, Any]]]  # keyword arguments, by stage
    weights: Sequence[float]  # of each micro-batch's loss in that of the batch
    scale: Tensor | None = None  # of the loss, for backward
    gradients: dict[float, Tensor] = dataclasses.field(default_factory=dict)  # of a loss, by weight

    def gradient(self, micro_batch: int, loss: Tensor) -> Tensor | None:
        """What the backward of a micro-batch's loss begins with: its weight, scaled.

        Multiplying the loss would give the same bits, and two more nodes in the graph.
        """
        weight = self.weights[micro_batch]
        if weight == 1.0 and self.scale is None:
            return None
        if weight not in self.gradients:  # which has two sizes of micro-batches at most
            made = torch.full_like(loss, weight)
            if self.scale is not None:
                made *= self.scale.to(loss.device, loss.dtype)
            self.gradients[weight] = made
        return self.gradients[weight]


@dataclasses.dataclass
class Statistics:
    """Of a rank's last step."""

    seconds: float = 0.0
    wait_seconds: float = 0.0
    """How long it waited for other ranks: the bubble, and transfers that nothing hides."""
    most_held: int = 0
    """Micro-batches whose activations it held at once, summed over its stages."""


class Executor:
    """One rank's part of every step.

    Args:
        stages: this rank's.
        group: the pipeline's ranks, for nothing but its messages.
        where: the device of this rank's stages.
        loss: from the last stage's output and target (None: there is none).
        accumulating: a context for backward passes whose gradients are not the step's last.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Sequence[Stage],
        connections: Sequence[Connection],
        group: Group,
        where: torch.device,
        loss: Callable[[Any, Any], Tensor],
        accumulating: Callable[[], contextlib.AbstractContextManager[object]],
    ) -> None:
        self.statistics = Statistics()
        self._action: Action | None = None  # the one in progress
        self._schedule = schedule
        self._actions = schedule.actions[group.rank]
        self._stages = {stage.number: stage for stage in stages}
        self._group = group
        self._where = where
        self._loss = loss
        self._accumulating = accumulating
        self._last = schedule.stages - 1
        # By stage, then by connection.
        self._values_in: dict[int, dict[str, Inlet]] = {s: {} for s in self._stages}
        self._values_out: dict[int, dict[str, Outlet]] = {s: {} for s in self._stages}
        self._gradients_in: dict[int, dict[str, Inlet]] = {s: {} for s in self._stages}
        self._gradients_out: dict[int, dict[str, Outlet]] = {s: {} for s in self._stages}
        tag = 0
        for connection in connections:
            source, target, name = connection.source, connection.target, connection.name
            slots = self._most_in_flight(target) + 1
            outlet, inlet = self._channel(source, target, tag, slots)
            if outlet is not None:
                self._values_out[source][name] = outlet
            if inlet is not None:
                self._values_in[target][name] = inlet
            outlet, inlet = self._channel(target, source, tag + TAGS, _GRADIENT_SLOTS)
            if outlet is not None:
                self._gradients_out[target][name] = outlet
            if inlet is not None:
                self._gradients_in[source][name] = inlet
            tag += 2 * TAGS
        self._targets_out, self._targets_in = self._channel(
            0, self._last, tag, self._most_in_flight(self._last) + 1
        )
        tag += TAGS
        self._loss_out: list[RemoteOutlet] = []
        self._loss_in: RemoteInlet | None = None
        last_rank = schedule.rank_of(self._last)
        host = torch.device("cpu")
        if group.rank != last_rank:
            self._loss_in = RemoteInlet(group, last_rank, tag, 1, host)
        else:
            others = (rank for rank in range(group.size) if rank != last_rank)
            self._loss_out = [RemoteOutlet(group, rank, tag, host) for rank in others]

    # --- a step -----------------------------------------------------------------------------------

    def train(self, feed: Feed) -> Tensor:
        """Forward and backward of all micro-batches; returns the loss of the batch.

        Raises:
            StageError: a stage raised, here; the other ranks get a PeerLostError that says so.
            CommError: as for messages, naming the action.
        """
        with self._step(feed, training=True):
            losses: list[Tensor] = []
            autocast = _may_autocast(self._where.type)
            for action in self._actions:
                self._action = action
                if action.kind is Kind.FORWARD:
                    self._forward(action, feed, losses)
                elif autocast:  # a backward has the dtypes that its forward chose
                    with torch.autocast(self._where.type, enabled=False):
                        self._backward(action)
                else:
                    self._backward(action)
            self._action = None
            return self._settle(feed, losses)

    def evaluate(self, feed: Feed, *, with_loss: bool) -> tuple[list[Any], Tensor | None]:
        """Forward alone: the last stage's outputs, if it is here, or the loss, everywhere."""
        with self._step(feed, training=False):
            outputs: list[Any] = []
            losses: list[Tensor] = []
            for action in self._actions:
                if action.kind is not Kind.FORWARD:
                    continue
                self._action = action
                stage = self._stages[action.stage]
                results = stage.run(self._values(action, feed), self._extra(action, feed))
                if action.stage != self._last:
                    self._send_values(action, results)
                elif with_loss:
                    with torch.no_grad():
                        self._loss_of(action, feed, losses, results[MAIN])
                else:
                    outputs.append(results[MAIN])
                self._release(self._values_in, action.stage)
            self._action = None
            if with_loss:
                return outputs, self._settle(feed, losses)
            self._settle_sends()
            return outputs, None

    def _forward(self, action: Action, feed: Feed, losses: list[Tensor]) -> None:
        stage, number = self._stages[action.stage], action.micro_batch
        finish = None
        if action.stage == self._last:
            finish = functools.partial(self._loss_of, action, feed, losses)
        values = self._values(action, feed)
        results = stage.forward(number, values, self._extra(action, feed), finish)
        if action.stage != self._last:
            self._send_values(action, results)
        held = sum(stage.held for stage in self._stages.values())
        self.statistics.most_held = max(self.statistics.most_held, held)

    def _backward(self, action: Action) -> None:
        """A whole one, or a half. A stage's gradients are final with its last micro-batch, to which
        every schedule comes last.
        """
        stage, number = self._stages[action.stage], action.micro_batch
        final = number == self._schedule.micro_batches - 1
        if action.kind is Kind.INPUT_GRADIENT:
            found = stage.input_gradients(number, self._gradients(action))
            self._send_gradients(action, found)
            self._release(self._gradients_in, action.stage)
            return
        with _DOING_NOTHING if final else self._accumulating():
            if action.kind is Kind.WEIGHT_GRADIENT:
                stage.weight_gradients(number)
            else:
                found = stage.backward(number, self._gradients(action))
        if action.kind is Kind.BACKWARD:
            self._send_gradients(action, found)
            self._release(self._gradients_in, action.stage)
        self._release(self._values_in, action.stage)

    # --- what comes and goes ----------------------------------------------------------------------

    def _values(self, action: Action, feed: Feed) -> Values:
        number = action.micro_batch
        inlets = self._values_in[action.stage]
        values = {name: inlet.receive(number) for name, inlet in inlets.items()}
        if action.stage == 0:
            assert feed.inputs is not None
            values[MAIN] = feed.inputs[number]
        return values

    def _gradients(self, action: Action) -> Gradients:
        inlets = self._gradients_in[action.stage]
        received = {name: inlet.receive(action.micro_batch) for name, inlet in inlets.items()}
        return {name: v if isinstance(v, list) else [v] for name, v in received.items()}

    def _send_gradients(self, action: Action, gradients: Gradients) -> None:
        for name, outlet in self._gradients_out[action.stage].items():
            of = gradients[name]
            outlet.send(of[0] if len(of) == 1 else of, action.micro_batch)  # a lone one is faster

    def _send_values(self, action: Action, values: Values) -> None:
        for name, outlet in self._values_out[action.stage].items():
            outlet.send(values[name], action.micro_batch)

    def _release(self, inlets: dict[int, dict[str, Inlet]], stage: int) -> None:
        for inlet in inlets[stage].values():
            inlet.release()

    def _extra(self, action: Action, feed: Feed) -> dict[str, Any]:
        extras = feed.extras.get(action.stage)
        return {} if extras is None else extras[action.micro_batch]

    def _loss_of(
        self, action: Action, feed: Feed, losses: list[Tensor], output: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The loss of a micro-batch, and what its backward begins with.

        Appends it to ``losses``, too.
        """
        number, target = action.micro_batch, None
        if feed.targets is not None:
            target = feed.targets[number]
        elif feed.targets_travel:
            assert self._targets_in is not None
            target = self._targets_in.receive(number)
            self._targets_in.release()
        loss = self._loss(output, target)
        losses.append(loss.detach())  # without its graph, which is backward's to free
        return loss, feed.gradient(number, loss)

    # --- around a step ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _step(self, feed: Feed, *, training: bool) -> Iterator[None]:
        """Open and close what a step needs; an exception on one rank ends it on all."""
        self.statistics = Statistics()
        waited = self._waited()
        started = time.perf_counter()
        try:
            for channel in self._channels(training):
                channel.begin(self._schedule.micro_batches)
            for stage in self._stages.values():
                stage.clear()
            if feed.targets_travel:
                if self._targets_in is not None:
                    self._targets_in.begin(self._schedule.micro_batches)
                if self._targets_out is not None:
                    self._targets_out.begin(self._schedule.micro_batches)
                    assert feed.targets is not None
                    for number, target in enumerate(feed.targets):
                        self._targets_out.send(target, number)
            yield
        except Exception as error:
            named = self._named(error)
            self._give_up(f"{type(named).__name__}: {named}")
            if named is error:
                raise
            raise named from error
        except BaseException as error:  # Ctrl-C
            self._give_up(type(error).__name__)
            raise
        self.statistics.seconds = time.perf_counter() - started
        self.statistics.wait_seconds += self._waited() - waited

    def _give_up(self, raised: str) -> None:
        self._group.abort(f"rank {self._group.rank} raised {raised}")
        targets = [self._targets_in, self._targets_out]
        for channel in [*self._channels(True), *targets, *self._loss_out, self._loss_in]:
            if channel is not None:
                channel.abandon()

    def _named(self, error: Exception) -> Exception:
        """The error with the action it happened in."""
        action = self._action
        if action is None:
            return error
        if isinstance(error, CommError):
            return type(error)(f"{self._where_in(action)}: {error}")
        return StageError(
            f"{self._where_in(action)}: {type(error).__name__}: {error}{self._came_in(action)}"
        )

    def _where_in(self, action: Action) -> str:
        kind = action.kind.name.lower().replace("_", " ")
        return (
            f"{kind} of micro-batch {action.micro_batch} in stage {action.stage} of "
            f"{self._schedule.stages}, on rank {self._group.rank}"
        )

    def _came_in(self, action: Action) -> str:
        inlet = self._values_in[action.stage].get(MAIN)
        if action.kind is not Kind.FORWARD or not isinstance(inlet, RemoteInlet):
            return ""
        return (
            f"\n  It was given what stage {action.stage - 1} returns, {inlet.layout}: one stage "
            "must take what the one before it gives."
        )

    def _settle(self, feed: Feed, losses: Sequence[Tensor]) -> Tensor:
        """Wait for what was sent; then all ranks learn the loss.

        It goes through the hosts: as a message between GPUs it would wait for its turn behind the
        reductions of replicas whose hosts wait for it.
        """
        if self._loss_in is not None:
            self._loss_in.begin(1)
            self._settle_sends()
            loss: Tensor = self._loss_in.receive(0)
            return loss.clone()
        shares = [
            loss if weight == 1.0 else loss * weight
            for loss, weight in zip(losses, feed.weights, strict=True)
        ]
        total = functools.reduce(torch.add, shares)
        for outlet in self._loss_out:
            outlet.begin(1)
            outlet.send(total, 0)
        self._settle_sends()
        for outlet in self._loss_out:
            outlet.settle()
        return total.clone()

    def _settle_sends(self) -> None:
        started = time.perf_counter()
        for channel in self._channels(training=True):
            if isinstance(channel, RemoteOutlet):
                channel.settle()
        if isinstance(self._targets_out, RemoteOutlet):
            self._targets_out.settle()
        self.statistics.wait_seconds += time.perf_counter() - started

    def _channels(self, training: bool) -> list[Inlet | Outlet]:
        tables: list[dict[int, dict[str, Any]]] = [self._values_in, self._values_out]
        if training:
            tables += [self._gradients_in, self._gradients_out]
        return [channel for table in tables for of in table.values() for channel in of.values()]

    def _waited(self) -> float:
        inlets = [*self._channels(training=True), self._targets_in, self._loss_in]
        return sum(inlet.wait_seconds for inlet in inlets if isinstance(inlet, RemoteInlet))

    # --- construction -----------------------------------------------------------------------------

    def _channel(
        self, source: int, target: int, tag: int, slots: int
    ) -> tuple[Outlet | None, Inlet | None]:
        """This rank's ends of what goes from one stage to another."""
        rank = self._group.rank
        src, dst = self._schedule.rank_of(source), self._schedule.rank_of(target)
        if src == dst:
            local = Local() if rank == src else None
            return local, local
        outlet = RemoteOutlet(self._group, dst, tag, self._where) if rank == src else None
        inlet = None
        if rank == dst:
            inlet = RemoteInlet(self._group, src, tag, slots, self._where)
        return outlet, inlet

    def _most_in_flight(self, stage: int) -> int:
        """Micro-batches whose activations a stage holds at once."""
        held = most = 0
        for action in self._schedule.actions[self._schedule.rank_of(stage)]:
            if action.stage != stage:
                continue
            if action.kind is Kind.FORWARD:
                held += 1
                most = max(most, held)
            elif action.kind is not Kind.INPUT_GRADIENT:
                held -= 1
        return most


def _may_autocast(device_type: str) -> bool:
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:  # before torch 2.4 one cannot ask of a device
        return True
