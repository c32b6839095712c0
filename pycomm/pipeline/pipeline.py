"""Pipeline: a model in stages on the ranks of a group, trained as if it were on one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pycomm._core import DType, Group
from pycomm.clipping import Spread, scale_to_norm, spreads_of, total_norm, with_gradients
from pycomm.errors import InvalidArgumentError, MismatchError
from pycomm.objects import all_gather_object, raise_together
from pycomm.optimizer import DistributedOptimizer, optimizers_of
from pycomm.pipeline import cut
from pycomm.pipeline import micro_batches as parts
from pycomm.pipeline.executor import Executor, Feed, Statistics
from pycomm.pipeline.schedule import Schedule
from pycomm.pipeline.stage import Stage
from pycomm.pipeline.ties import Ties
from pycomm.runtime import group_of
from pycomm.shares import mark_part

_NONE = -1  # rows of what was not given, in the agreement that opens each step


class Pipeline:
    """A model cut into stages, whose activations and gradients move from rank to rank.

    ::

        pipeline = pycomm.pipeline.Pipeline(
            model, nn.functional.cross_entropy, schedule="1f1b", micro_batches=8, group=mesh["pp"]
        )
        optimizer = torch.optim.AdamW(pipeline.parameters(), lr=1e-3)
        for batch, target in loader:
            optimizer.zero_grad()
            loss = pipeline.step(batch, target)
            optimizer.step()

    A step leaves in ``.grad`` the bits that one process computes which runs the same micro-batches
    one after the other, each loss multiplied by its share of the batch's rows.

    With data parallelism each replica is a pipeline, and the optimizer is wrapped: hand
    ``named_parameters()`` to a ``DistributedOptimizer`` over the other axis. The pipeline finds it
    and lets it reduce with each stage's last micro-batch alone, while other stages still compute.

    Every rank of the group makes every call, with the same arguments except for data.

    Args:
        model: an ``nn.Sequential``, the same on every rank, of which each keeps its part; or a
            module for each stage, where a rank may have None for the stages of others. A stage is
            called with what the one before it returns: a tensor, or tuples, lists and dicts of
            tensors and constants. ``Stash`` and ``Take`` connect stages that are further apart.
        loss_fn: ``loss_fn(output, target)``, or ``loss_fn(output)`` without a target; one number.
        stages: how many, as many as ranks (times two, if interleaved) if None; or the number of
            layers of each.
        schedule: "gpipe", "1f1b", "interleaved" or "zero_bubble"; docs/model-parallel.md compares
            them, ``python -m pycomm plan pipeline`` draws them.
        micro_batches: in how many parts a batch goes through; as many rows of a batch or more.
        group: the ranks, in the order of the stages; the world if None.
        balance: how an ``nn.Sequential`` is cut where ``stages`` does not say it: by the bytes of
            the parameters, or by the seconds that rank 0 measures on ``sample``.
        sample: a micro-batch like those to come, for ``balance="measured_seconds"``.
        recompute: keep only each stage's input and run its forward again in its backward.
        loss_reduction: what ``loss_fn`` does with rows, "mean" or "sum".
        ties: for modules given apart, parameters that are one: tuples of names such as
            ``("0.embedding.weight", "3.head.weight")``. What an ``nn.Sequential`` shares between
            stages is found.
        device: where this rank's stages compute; where their parameters are if None, or else those
            of the other stages that this rank was given. What comes from another rank comes there.

    Raises:
        InvalidArgumentError: more stages than layers, fewer than ranks, an unknown schedule, a
            ``Take`` without its ``Stash``, ...; on every rank.
        MismatchError: ranks gave different arguments; on every rank.

    Cost of a step: for each stage boundary and micro-batch one message each way, one copy inside a
    host; the bubble of the schedule. Memory: see docs/model-parallel.md.
    """

    def __init__(
        self,
        model: cut.Model,
        loss_fn: Callable[..., Tensor],
        *,
        stages: int | Sequence[int] | None = None,
        schedule: str = "1f1b",
        micro_batches: int,
        group: Group | None = None,
        balance: cut.Balance = "parameter_bytes",
        sample: Any = None,
        recompute: bool = False,
        loss_reduction: Literal["mean", "sum"] = "mean",
        ties: Sequence[Sequence[str]] = (),
        device: torch.device | str | None = None,
    ) -> None:
        parent = group_of(group, "Pipeline")
        plan, mistake = None, None
        try:
            plan = cut.Plan.of(model, stages, schedule, micro_batches, balance, parent.size)
            if loss_reduction not in ("mean", "sum"):
                raise InvalidArgumentError(
                    f'loss_reduction is {loss_reduction!r}. Pass "mean" or "sum".'
                )
        except InvalidArgumentError as error:
            mistake = error
        raise_together("Pipeline", mistake, parent)
        assert plan is not None
        _check_same(
            parent,
            {
                "the model": plan.model,
                "schedule": schedule,
                "stages": plan.layers_by_hand or plan.schedule.stages,
                "micro_batches": plan.schedule.micro_batches,
                "balance": balance,
                "loss_reduction": loss_reduction,
            },
        )
        self._group = parent.duplicate()
        self._schedule = plan.schedule
        self._loss_fn = loss_fn
        self._loss_reduction = loss_reduction
        self._optimizers: list[DistributedOptimizer] = []  # of the step in progress

        pieces = plan.pieces(model, sample, self._group)
        here: dict[int, nn.Module] = {}
        for stage, piece in pieces.items():
            if self._schedule.rank_of(stage) == self._group.rank:
                if piece is None:
                    mistake = InvalidArgumentError(f"stage {stage} is mine, and its module is None")
                else:
                    here[stage] = piece
        raise_together("Pipeline", mistake, self._group)
        self.module = cut.together(model, here)
        """This rank's layers, by their names in the ``nn.Sequential``; stages, by their numbers."""
        self._parameters = list(self.module.parameters())
        for param in self._parameters:
            mark_part(param, "a stage's of a pipeline", self._group)
        self._ties = Ties(pieces, here, ties, self._schedule.rank_of, self._group)
        self._is_sequential = isinstance(model, nn.Sequential)
        # A part without parameters computes where the others would.
        modules = [self.module, *pieces.values()]
        self._device = torch.device(_device(modules) if device is None else device)
        self._stages = [Stage(stage, here[stage], recompute=recompute) for stage in here]
        self._executor = Executor(
            self._schedule,
            self._stages,
            cut.connections(here, self._schedule.stages, self._group),
            self._group,
            self._device,
            self._loss,
            self._accumulating,
        )

    # --- training ---------------------------------------------------------------------------------

    def step(
        self,
        batch: Any = None,
        target: Any = None,
        *,
        extra: Mapping[int, Mapping[str, Any]] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Forward and backward of one batch; gradients are added to ``.grad``.

        Args:
            batch: the first stage's input: tensors, or tuples, lists and dicts of them, cut into
                micro-batches along dimension 0. Ignored on the other ranks.
            target: for the loss, likewise; on the last stage's rank, or else on the first one's,
                from where it goes straight to the last.
            extra: by stage, keyword arguments for its module, cut likewise; on the stage's rank.
            scaler: multiplies the loss before the backward passes.

        Returns:
            The loss of the batch, detached; on every rank. The last stage's host waits for its GPU
            to have it, once a step; the other ranks have it on the host.

        Raises:
            InvalidArgumentError: fewer rows than micro-batches, other rows in the target than in
                the batch, no batch; on every rank, before anything is computed.
            StageError: a stage of this rank raised.
            PeerLostError: a stage of another rank did, or its process is gone.
        """
        scale = None
        if scaler is not None and scaler.is_enabled():
            scale = scaler.scale(torch.ones((), device=self._device))
        feed, _ = self._agree("Pipeline.step", batch, target, extra, scale, training=True)
        self._optimizers = optimizers_of(self._parameters)
        with contextlib.ExitStack() as stack:
            for optimizer in self._optimizers:
                stack.enter_context(optimizer.one_pass())
            loss = self._executor.train(feed)
        self._ties.sum_gradients()
        return loss

    def evaluate(
        self,
        batch: Any = None,
        target: Any = None,
        *,
        extra: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> Any:
        """Forward alone, without gradients. Call ``eval()`` first, as for any module.

        Returns:
            With a target, the loss, on every rank. Without one, the output of the whole batch on
            the last stage's rank, None on the others.
        """
        feed, with_loss = self._agree("Pipeline.evaluate", batch, target, extra, training=False)
        outputs, loss = self._executor.evaluate(feed, with_loss=with_loss)
        if with_loss:
            return loss
        return parts.join(outputs) if outputs else None

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` by the norm of all stages' gradients; returns that.

        Collective. What stages share counts once, and so does what ranks share that split the
        layers of a stage.
        """
        own = list(self.parameters())
        total = total_norm(with_gradients(own), norm_type, self.spreads())
        return scale_to_norm(own, total, max_norm, error_if_nonfinite, self._group)

    def spreads(self) -> list[Spread]:
        """Over which ranks the model is spread: for ``ShardedOptimizer.clip_grad_norm_``."""
        return [*spreads_of(self.module), Spread(self._group, self._ties.counts)]

    @property
    def statistics(self) -> Statistics:
        """Of this rank's last step."""
        return self._executor.statistics

    @property
    def group(self) -> Group:
        """The ranks, in the order of the stages."""
        return self._group

    @property
    def schedule(self) -> Schedule:
        """What each rank does when."""
        return self._schedule

    # --- a module in part -------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's."""
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's, by their names in the whole model."""
        return self.module.named_parameters()

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the whole model's."""
        return self.module.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take this rank's part out of the whole model's, or of its own."""
        own = self.module.state_dict().keys()
        self.module.load_state_dict({k: v for k, v in state_dict.items() if k in own})

    def stages_of_parameters(self) -> dict[str, int]:
        """The stage of each of this rank's parameters, under each of its names."""
        return {
            self._whole_name(stage.number, name): stage.number
            for stage in self._stages
            for name, _ in stage.module.named_parameters(remove_duplicate=False)
        }

    def tied_names(self) -> list[list[str]]:
        """Names in the whole model of each parameter that stages share; the same on every rank."""
        return [
            [self._whole_name(stage, name) for stage, name in names] for names in self._ties.names
        ]

    def _whole_name(self, stage: int, name: str) -> str:
        return name if self._is_sequential else f"{stage}.{name}"

    def train(self, mode: bool = True) -> Pipeline:
        """As ``nn.Module.train``."""
        self.module.train(mode)
        return self

    def eval(self) -> Pipeline:
        """As ``nn.Module.eval``."""
        return self.train(False)

    def __repr__(self) -> str:
        mine = ", ".join(str(stage.number) for stage in self._stages)
        return (
            f"Pipeline({self._schedule.name}, {self._schedule.stages} stages on "
            f"{self._schedule.ranks} ranks, {self._schedule.micro_batches} micro-batches; "
            f"here: {mine})"
        )

    # --- the start of a step ----------------------------------------------------------------------

    def _agree(
        self,
        call: str,
        batch: Any,
        target: Any,
        extra: Mapping[int, Mapping[str, Any]] | None,
        scale: Tensor | None = None,
        *,
        training: bool,
    ) -> tuple[Feed, bool]:
        """Check what all ranks were given; returns this rank's share and whether there are targets.

        Ranks that make different calls get a MismatchError here.
        """
        count, group = self._schedule.micro_batches, self._group
        last = self._schedule.rank_of(self._schedule.stages - 1)
        mistake: InvalidArgumentError | None = None
        rows = [_NONE, _NONE]
        extras: dict[int, list[dict[str, Any]]] = {}
        try:
            for index, (argument, value) in enumerate((("batch", batch), ("target", target))):
                if value is not None:
                    length = parts.length_of(argument, value)
                    if length is None and group.rank == 0:
                        raise InvalidArgumentError(
                            f"the {argument} is a {type(value).__name__} without a tensor that has "
                            "rows.\n  Pass tensors, or tuples, lists and dicts of them."
                        )
                    rows[index] = length or 0
            for stage, arguments in (extra or {}).items():
                parts.length_of(f"extra[{stage}]", arguments)
                if self._schedule.rank_of(stage) == group.rank:
                    extras[stage] = parts.cut(dict(arguments), count)
            if training:
                self._ties.check_fresh(call)
        except InvalidArgumentError as error:
            mistake = error
        mine = torch.tensor([mistake is not None, *rows])
        gathered = torch.empty((group.size, len(mine)), dtype=torch.int64)
        group.all_gather(mine.data_ptr(), gathered.data_ptr(), len(mine), DType.INT64, name=call)
        everyones = gathered.tolist()
        if any(has_mistake for has_mistake, _, _ in everyones):
            raise_together(call, mistake, group)
        _, length, first_target = everyones[0]
        last_target = everyones[last][2]
        problem = _problem(length, first_target, last_target, count, last)
        if problem:
            raise InvalidArgumentError(f"{call} on rank {group.rank}: {problem}")
        travel = last_target == _NONE and first_target != _NONE
        gives_targets = group.rank == (0 if travel else last) and target is not None
        sizes = parts.sizes(length, count)
        mean = self._loss_reduction == "mean"
        feed = Feed(
            inputs=parts.cut(batch, count) if group.rank == 0 else None,
            targets=parts.cut(target, count) if gives_targets else None,
            targets_travel=travel and last != 0,
            extras=extras,
            weights=[size / length if mean else 1.0 for size in sizes],
            scale=scale,
        )
        return feed, travel or last_target != _NONE

    def _loss(self, output: Any, target: Any) -> Tensor:
        loss = self._loss_fn(output) if target is None else self._loss_fn(output, target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
            raise TypeError(f"loss_fn returned a {type(loss).__name__}{shape}, not one number")
        return loss.reshape(())

    def _accumulating(self) -> contextlib.AbstractContextManager[object]:
        stack = contextlib.ExitStack()
        for optimizer in self._optimizers:
            stack.enter_context(optimizer.no_sync())
        return stack


def _problem(
    length: int, first_target: int, last_target: int, micro_batches: int, last: int
) -> str | None:
    """What is wrong with a step's data, if anything; the same on every rank."""
    if length == _NONE:
        return "rank 0, which has the first stage, was given no batch.\n  Pass it there."
    if length < micro_batches:
        return (
            f"the batch has {length} rows and is cut into {micro_batches} micro-batches.\n"
            f"  Pass {micro_batches} rows or more, or make a Pipeline with fewer micro_batches; a "
            "DataLoader leaves a short batch out with drop_last=True."
        )
    rank, rows = (0, first_target) if last_target == _NONE else (last, last_target)
    if rows not in (_NONE, 0, length):
        return (
            f"the batch on rank 0 has {length} rows and the target on rank {rank} has {rows}.\n"
            "  Give both ranks the same batch's."
        )
    return None


def _check_same(group: Group, arguments: dict[str, object]) -> None:
    for rank, theirs in enumerate(all_gather_object(arguments, group=group)):
        for name, value in arguments.items():
            if theirs[name] != value:
                raise MismatchError(
                    f"Pipeline: {name} is {value!r} on rank {group.rank} and {theirs[name]!r} on "
                    f"rank {rank}.\n  Give every rank the same arguments.",
                    group_usable=True,
                )


def _device(modules: Iterable[nn.Module | None]) -> torch.device:
    """Where modules compute: with the first parameter or buffer that there is."""
    for module in modules:
        if module is not None:
            for t in [*module.parameters(), *module.buffers()]:
                return t.device
    return torch.device("cpu")
